"""An inventory: which devices there are, which groups they form, and what is known of each. One TOML file.

    [groups.all]                    # every device belongs to it
    python = "/opt/models/bin/python"

    [groups.kitchen]
    groups = ["house"]              # groups belong to groups
    jump = "gateway.example.com"
    variables = { port = "8080" }

    [groups.house]

    [devices.kitchen-1]
    groups = ["kitchen"]
    address = "pi@kitchen-1.local"
    target = "raspberry-pi-4"

What a device says itself counts first, then its groups. A group counts before the groups that it belongs to, so
``all`` comes last; two groups of which neither belongs to the other may not disagree.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomllib

from edge_infer.deploy.local import PREFIX
from edge_infer.errors import UsageError
from edge_infer.manifest import PLAIN_NAME

ALL = "all"
#: What a device, or a group for its devices, may say besides ``groups`` and ``variables``.
KEYS = ("target", "address", "jump", "python", "store", "identity")
VARIABLE = re.compile(r"[a-z][a-z0-9_]*\Z")
#: Known of every device, so that no variable may be called so.
RESERVED = ("name", "address", "target")
#: ``{name}`` in a value. A shell's ``${name}`` and ``{print $1}`` are none, so that health commands may hold them.
PLACE = re.compile(r"(?<!\$)\{([a-z][a-z0-9_]*)\}")


@dataclass(frozen=True)
class Device:
    """One device. What the inventory leaves out is None; ``groups`` are all that it belongs to, ``all`` last."""

    name: str
    address: str
    groups: tuple[str, ...]
    target: str | None
    jump: str | None
    python: str | None
    store: str | None
    identity: Path | None
    variables: Mapping[str, str]

    def expand(self, text: str) -> str:
        """``text`` with ``{name}``, ``{address}``, ``{target}`` and the device's variables put in.

        Raises UsageError for a variable that the device does not have.
        """
        return _expand(text, self._known(), f"device {self.name}")

    def _known(self) -> dict[str, str]:
        own = {"name": self.name, "address": self.address}
        return {**self.variables, **own, **({"target": self.target} if self.target else {})}


@dataclass(frozen=True)
class Inventory:
    """Devices and group names in the order of the file."""

    path: Path
    devices: tuple[Device, ...]
    groups: tuple[str, ...]


def read_inventory(path: Path) -> Inventory:
    """Read the inventory at ``path``. Raises UsageError for the first mistake, naming file, device and key."""
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as an inventory: {error}") from None
    _refuse_others(table, ("devices", "groups"), str(path))
    groups = _sections(table, "groups", path)
    devices = _sections(table, "devices", path)
    if not devices:
        raise UsageError(f"{path} has no devices, expected a table [devices.NAME] for each")
    for name in devices.keys() & groups.keys():
        raise UsageError(f"{path}: {name} is a device and a group, expected a name of its own for each")
    parents = _parents(groups, path)
    found = tuple(_device(name, row, groups, parents, path) for name, row in devices.items())
    return Inventory(path, found, tuple(dict.fromkeys([*groups, ALL])))


# -- the file's tables -----------------------------------------------------------------------------------------------


def _sections(table: Mapping[str, Any], kind: str, path: Path) -> dict[str, dict[str, Any]]:
    """The tables ``[devices.NAME]`` or ``[groups.NAME]``, each checked by itself."""
    sections = table.get(kind, {})
    if not isinstance(sections, dict):
        raise UsageError(f"{path}: {kind} is {sections!r}, expected tables such as [{kind}.NAME]")
    for name, row in sections.items():
        where = f"{path}: {kind.removesuffix('s')} {name}"
        if not PLAIN_NAME.match(name):
            raise UsageError(f"{where}: a name may hold letters, digits and ._+- only")
        if not isinstance(row, dict):
            raise UsageError(f"{where} is {row!r}, expected a table [{kind}.{name}]")
        _check_section(row, where)
    if kind == "devices" and ALL in sections:
        raise UsageError(f"{path}: device {ALL}: that name means every device, choose another")
    return sections


def _check_section(row: Mapping[str, Any], where: str) -> None:
    _refuse_others(row, (*KEYS, "groups", "variables"), where)
    for key in KEYS:
        if key in row and not (isinstance(row[key], str) and row[key]):
            raise UsageError(f"{where}: {key} is {row[key]!r}, expected text")
    groups = row.get("groups", [])
    if not (isinstance(groups, list) and all(isinstance(group, str) for group in groups)):
        raise UsageError(f'{where}: groups is {groups!r}, expected a list of names such as ["kitchen"]')
    variables = row.get("variables", {})
    if not isinstance(variables, dict):
        raise UsageError(f"{where}: variables is {variables!r}, expected a table of texts")
    for name, value in variables.items():
        if not VARIABLE.match(name) or name in RESERVED:
            raise UsageError(
                f"{where}: variable {name!r} is no name for one: small letters, digits and _, and not "
                f"{', '.join(RESERVED)}"
            )
        if not isinstance(value, str | int) or isinstance(value, bool):
            raise UsageError(f"{where}: variable {name} is {value!r}, expected text or a whole number")


def _refuse_others(row: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    for key in row.keys() - set(known):
        near = difflib.get_close_matches(key, known, 1, 0.0)[0]
        raise UsageError(f"{where}: nothing reads the key {key!r}; did you mean {near!r}?")


# -- groups ----------------------------------------------------------------------------------------------------------


def _parents(groups: Mapping[str, Mapping[str, Any]], path: Path) -> dict[str, tuple[str, ...]]:
    """All groups that each group belongs to, near ones first. Raises UsageError for one that belongs to itself."""

    def climb(name: str, below: tuple[str, ...]) -> list[str]:
        if name in below:
            circle = " -> ".join([*below[below.index(name) :], name])
            raise UsageError(f"{path}: group {name}: groups lead in a circle ({circle})")
        own = _known_groups(groups.get(name, {}), groups, f"{path}: group {name}")
        return [*own, *(far for near in own for far in climb(near, (*below, name)))]

    if groups.get(ALL, {}).get("groups"):
        raise UsageError(f"{path}: group {ALL}: groups is given, but it is the outermost")
    return {name: tuple(dict.fromkeys([*climb(name, ()), *([] if name == ALL else [ALL])])) for name in groups}


def _known_groups(row: Mapping[str, Any], groups: Mapping[str, Any], where: str) -> list[str]:
    for name in row.get("groups", []):
        if name not in groups and name != ALL:
            near = difflib.get_close_matches(name, groups, 1, 0.5)
            hint = f"; did you mean {near[0]!r}?" if near else f", expected a table [groups.{name}]"
            raise UsageError(f"{where}: groups names {name!r}, which is not there{hint}")
    return list(row.get("groups", []))


# -- devices ---------------------------------------------------------------------------------------------------------


def _device(
    name: str,
    row: Mapping[str, Any],
    groups: Mapping[str, Mapping[str, Any]],
    parents: Mapping[str, tuple[str, ...]],
    path: Path,
) -> Device:
    where = f"{path}: device {name}"
    own = _known_groups(row, groups, where)
    member_of = tuple(dict.fromkeys([*own, *(far for near in own for far in parents.get(near, ())), ALL]))
    member_of = (*(group for group in member_of if group != ALL), ALL)
    rows = [(name, row), *((group, groups.get(group, {})) for group in member_of)]
    variables = _merged([(giver, has.get("variables", {})) for giver, has in rows], parents, where)
    values = _merged([(giver, _settings(has)) for giver, has in rows], parents, where)
    known = {"name": name, **{key: str(value) for key, value in variables.items()}}
    for key in KEYS:  # the target and the address first: the others may hold them
        if key in values:
            values[key] = _expand(values[key], known, f"{where}: {key}")
        if key in RESERVED:
            known[key] = values.get(key) or (name if key == "address" else "")
    device = Device(
        name=name,
        address=known["address"],
        groups=member_of,
        target=values.get("target"),
        jump=values.get("jump"),
        python=values.get("python"),
        store=values.get("store"),
        identity=_path(values["identity"], path) if "identity" in values else None,
        variables={key: str(value) for key, value in variables.items()},
    )
    _check_way(device, where)
    return device


def _settings(row: Mapping[str, Any]) -> dict[str, str]:
    return {key: row[key] for key in KEYS if key in row}


def _merged(
    rows: list[tuple[str, Mapping[str, Any]]], parents: Mapping[str, tuple[str, ...]], where: str
) -> dict[str, Any]:
    """What counts of what a device, the first of ``rows``, and its groups say."""
    (_, own), *groups = rows
    merged = dict(own)
    for key in dict.fromkeys(key for _, has in groups for key in has if key not in own):
        givers = {group: has[key] for group, has in groups if key in has}
        outer = {far for group in givers for far in parents.get(group, ())}
        first, *others = [group for group in givers if group not in outer]
        for other in others:
            if givers[other] != givers[first]:
                raise UsageError(
                    f"{where}: {key} is {givers[first]!r} by group {first} and {givers[other]!r} by group {other}; "
                    "give the device its own, or let one of the groups belong to the other"
                )
        merged[key] = givers[first]
    return merged


def _expand(text: str, known: Mapping[str, str], where: str) -> str:
    def value(match: re.Match[str]) -> str:
        if not known.get(match[1]):
            raise UsageError(f"{where}: {match[0]} in {text!r} is not known; give the device a variable {match[1]!r}")
        return known[match[1]]

    return PLACE.sub(value, text)


def _path(text: str, inventory: Path) -> Path:
    """A file on this machine; relative ones count from the inventory's folder."""
    return inventory.parent / Path(text).expanduser()


def _check_way(device: Device, where: str) -> None:
    """Raise UsageError for an address or jump host that no connection could be made with."""
    if device.address.startswith(PREFIX):
        if device.jump is not None and device.jump.lower() != "none":
            raise UsageError(f"{where}: jump is {device.jump!r}, but {device.address} is this machine")
        return
    from edge_infer.deploy.ssh_route import parse_address

    jumps = [] if device.jump is None or device.jump.lower() == "none" else device.jump.split(",")
    for key, text in (("address", device.address), *(("jump", jump.strip()) for jump in jumps)):
        try:
            parse_address(text.removeprefix("ssh://") if key == "jump" else text)
        except UsageError as error:
            raise UsageError(f"{where}: {key}: {error}") from None
