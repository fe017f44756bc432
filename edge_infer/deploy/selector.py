"""Which devices of an inventory are meant: Ansible's host patterns, with ``key=value`` besides.

    kitchen                     the device or the devices of the group
    kitchen,attic               both (Ansible's colon works as well as the comma)
    pi-*                        names of devices and groups may hold *, ? and [abc]
    kitchen,&target=jetson-*    those of kitchen with such a target; a variable's name works the same
    kitchen,!pi-7               those of kitchen without pi-7
    all                         every device

As in Ansible, the order does not matter: what is named is joined, then cut down by each ``&``, then each ``!`` is left
out. Without anything to join, all devices are meant.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from edge_infer.deploy.inventory import ALL, Device, Inventory
from edge_infer.errors import UsageError


def select(inventory: Inventory, pattern: str) -> list[Device]:
    """The devices that ``pattern`` means, in the inventory's order. Raises UsageError when a part of it, or all of it,
    means none: a misspelt exclusion would push to a device that was to be left alone."""
    terms = [term.strip() for term in re.split(r"[,:]", pattern) if term.strip()]
    found = {term: _matching(inventory, term.lstrip("&!").strip()) for term in terms}
    chosen = {name for term, names in found.items() if term[0] not in "&!" for name in names}
    if not any(term[0] not in "&!" for term in terms):
        chosen = {device.name for device in inventory.devices}
    for term, names in found.items():
        if term.startswith("&"):
            chosen &= names
    for term, names in found.items():
        if term.startswith("!"):
            chosen -= names
    if not chosen:
        raise UsageError(f"no device of {inventory.path} is {pattern!r}; `edge-infer fleet list` shows them")
    return [device for device in inventory.devices if device.name in chosen]


def _matching(inventory: Inventory, term: str) -> set[str]:
    key, equals, value = term.partition("=")
    if equals:
        found = {device.name for device in inventory.devices if fnmatchcase(_value(device, key), value)}
    else:
        found = {device.name for device in inventory.devices if _is_named(device, term)}
    if not found and not (not equals and term in inventory.groups):
        near = _nearest(inventory, key)
        raise UsageError(f"{term!r} fits no device or group of {inventory.path}{near}")
    return found


def _is_named(device: Device, term: str) -> bool:
    return term == ALL or any(fnmatchcase(name, term) for name in (device.name, *device.groups) if name != ALL)


def _value(device: Device, key: str) -> str:
    """Empty for what the device does not have; a value is never empty."""
    return (device.target or "") if key == "target" else device.variables.get(key, "")


def _nearest(inventory: Inventory, term: str) -> str:
    names = [*(device.name for device in inventory.devices), *inventory.groups, *_keys(inventory.devices)]
    near = difflib.get_close_matches(term, names, 1, 0.5)
    return f"; did you mean {near[0]!r}?" if near and near[0] != term else ""


def _keys(devices: Sequence[Device]) -> list[str]:
    return ["target", *dict.fromkeys(key for device in devices for key in device.variables)]
