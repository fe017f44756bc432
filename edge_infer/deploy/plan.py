"""What a push will do, as a pure function of the bundle and the device's facts: decided before a byte is sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edge_infer.errors import DeviceError, EngineMissing
from edge_infer.manifest import Manifest
from edge_infer.runtime.engines import EXTRAS, at_least, release_numbers

#: A kernel keeps part of the memory that is on the box to itself; a 512 MB board shows 416 MB.
RAM_SHARE_SHOWN = 0.75
#: The device half's own oldest Python.
OLDEST_PYTHON = "3.10"


@dataclass(frozen=True)
class Step:
    """``action`` is send, copy, keep, self-test, tune or activate; ``size`` the bytes it sends from ``offset``."""

    action: str
    subject: str
    size: int = 0
    offset: int = 0

    def __str__(self) -> str:
        amount = f" ({self.size:,} bytes{f' from {self.offset:,}' if self.offset else ''})" if self.size else ""
        return f"{self.action} {self.subject}{amount}"


def make_plan(manifest: Manifest, digest: str, answer: Mapping[str, Any], tune: bool = False) -> list[Step]:
    """The steps of a push, given the receiver's answer to ``begin``.

    Raises DeviceError when the device is not what the bundle was made for or has too little space, EngineMissing
    when no engine there can run it.
    """
    facts = answer["facts"]
    check_device(manifest, facts)
    check_engine(manifest, facts)
    steps = []
    if answer["present"]:
        steps.append(Step("keep", f"release {digest[:12]}"))
    else:
        for name, entry in sorted(manifest.files.items()):
            have = int(answer["have"].get(name, 0))
            if have == entry.size:
                steps.append(Step("keep", name))
            elif name in answer["copies"]:
                steps.append(Step("copy", f"{name} from another release"))
            else:
                steps.append(Step("send", name, entry.size - have, have))
    # What is copied on the device takes space as well as what is sent.
    needed = 0 if answer["present"] else manifest.size - sum(answer["have"].values())
    if needed > facts["free_bytes"]:
        raise DeviceError(
            f"the push needs {needed:,} bytes, the device has {facts['free_bytes']:,} free beyond its reserve; "
            "free some space there"
        )
    steps.append(Step("self-test", f"{digest[:12]} with {facts['serving_python']}"))
    if tune:
        steps.append(Step("tune", digest[:12]))
    return [*steps, Step("activate", manifest.name)]


def check_device(manifest: Manifest, facts: Mapping[str, Any]) -> None:
    """Raise DeviceError for the first fact that the bundle's target does not admit."""
    target = manifest.target
    hint = f"package the model for this device instead (the bundle is for {target.name})"
    if facts["architecture"] != target.architecture:
        raise DeviceError(f"the device is {facts['architecture']}, the bundle is for {target.architecture}; {hint}")
    lacking = sorted(set(target.cpu_features) - set(facts["cpu_features"]))
    if lacking:
        raise DeviceError(f"the device's processor lacks {', '.join(lacking)}; {hint}")
    if facts["ram_bytes"] < target.ram_bytes * RAM_SHARE_SHOWN:
        raise DeviceError(
            f"the device has {facts['ram_bytes']:,} bytes of memory, {target.name} has {target.ram_bytes:,}; {hint}"
        )
    if facts["page_size_bytes"] > target.page_size_bytes:
        raise DeviceError(
            f"the device's pages have {facts['page_size_bytes']} bytes, the weights are aligned to "
            f"{target.page_size_bytes}; {hint}"
        )
    oldest = max(target.python, OLDEST_PYTHON, key=release_numbers)
    if not at_least(facts["python"], oldest):
        raise DeviceError(
            f"{facts['serving_python']} is Python {facts['python']}, expected {oldest} or later; "
            "name a newer one with --python"
        )


def check_engine(manifest: Manifest, facts: Mapping[str, Any]) -> None:
    """Raise EngineMissing unless the serving Python has edge-infer and an engine that can run the bundle."""
    packages = facts["packages"]
    wanted = manifest.artifact.requires
    extra = EXTRAS.get(wanted[0].package, manifest.artifact.format)
    command = f"{facts['serving_python']} -m pip install 'edge-infer[{extra}]'"
    if "edge-infer" not in packages:
        raise EngineMissing(f"edge-infer is not installed for {facts['serving_python']}; there: {command}")
    have = [item for item in wanted if item.package in packages]
    if not have:
        raise EngineMissing(
            f"the bundle needs {' or '.join(map(str, wanted))}, and {facts['serving_python']} has no such engine; "
            f"there: {command}"
        )
    if not any(at_least(packages[item.package], item.version) for item in have):
        raise EngineMissing(
            f"the bundle needs {have[0]}, and {facts['serving_python']} has {packages[have[0].package]}; there: "
            f"{facts['serving_python']} -m pip install --upgrade {have[0].package}"
        )
