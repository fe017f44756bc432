"""Target profiles: what a device is, what a model may take of it, which engines it has. Data: ``targets/*.toml``."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import tomllib

from edge_infer import quantize
from edge_infer.errors import UsageError
from edge_infer.manifest import FORMATS, PLAIN_NAME, PRECISIONS, PROVIDERS, TargetFacts

#: Inside the wheel the profiles lie in the package, in a checkout beside it.
FOLDERS = (Path(__file__).parent / "targets", Path(__file__).parent.parent / "targets")
VERSION = re.compile(r"\d+(\.\d+)*\Z")


@dataclass(frozen=True)
class EngineProfile:
    """One engine on the device: ``package`` in at least ``version``; ``providers`` and ``precisions`` by preference.

    ``golden_tolerance``: by precision, the share of an output's largest value by which the engine's answers there may
    differ from those of the machine that packages, where that is not what docs/decisions/0008 says.
    """

    format: str
    package: str
    version: str
    providers: tuple[str, ...]
    precisions: tuple[str, ...]
    golden_tolerance: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TargetProfile:
    """A device. ``page_size_bytes`` is the largest its kernels use; ``python`` the oldest there, as ``3.11``.

    ``model_ram_share`` and ``model_storage_share`` are the parts of RAM and storage that one model may take,
    ``max_accuracy_drop`` the share of the source's accuracy that it may lose unless the user says otherwise.
    ``cpu_features`` are names of /proc/cpuinfo that every such device has. ``sources`` back the figures.
    """

    name: str
    description: str
    architecture: str
    cores: int
    cpu_features: tuple[str, ...]
    page_size_bytes: int
    ram_bytes: int
    model_ram_share: float
    storage_bytes: int
    model_storage_share: float
    max_accuracy_drop: float
    python: str
    sources: tuple[str, ...]
    engines: tuple[EngineProfile, ...]

    @property
    def ram_limit_bytes(self) -> int:
        """Private memory that one running model may take."""
        return int(self.ram_bytes * self.model_ram_share)

    @property
    def storage_limit_bytes(self) -> int:
        """Length of all files of one bundle."""
        return int(self.storage_bytes * self.model_storage_share)

    def engine(self, format: str) -> EngineProfile:
        """The engine for a format. Raises UsageError when the device has none."""
        for engine in self.engines:
            if engine.format == format:
                return engine
        known = ", ".join(engine.format for engine in self.engines)
        raise UsageError(f"{self.name} has no engine for {format}, it has: {known}; choose one of these with --format")

    def facts(self) -> TargetFacts:
        """What a push compares with the device."""
        return TargetFacts(
            self.name, self.architecture, self.cpu_features, self.ram_bytes, self.page_size_bytes, self.python
        )


def target_names() -> list[str]:
    """The profiles that come with edge_infer."""
    return sorted(path.stem for folder in FOLDERS for path in folder.glob("*.toml"))


def read_target(name_or_path: str) -> TargetProfile:
    """A profile by name, or from a ``.toml`` file of the user's. Raises UsageError."""
    if name_or_path.endswith(".toml"):
        path = Path(name_or_path)
        if not path.is_file():
            raise UsageError(f"there is no target file {path}")
        return _read_file(path)
    for folder in FOLDERS:
        path = folder / f"{name_or_path}.toml"
        if path.is_file():
            return _read_file(path)
    near = difflib.get_close_matches(name_or_path, target_names(), 1, 0.0)
    raise UsageError(
        f"no target is named {name_or_path!r}; did you mean {near[0]!r}? "
        "`edge-infer targets` lists them, and a path ending in .toml names your own"
    )


def _read_file(path: Path) -> TargetProfile:
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not a TOML file ({error})") from None
    engines = table.pop("engines", [])
    if not isinstance(engines, list) or not engines:
        raise UsageError(f"{path} lists no [[engines]], expected at least one")
    table["engines"] = [_build(EngineProfile, row, path) for row in engines]
    profile: TargetProfile = _build(TargetProfile, table, path)
    _check(profile, path)
    return profile


def _build(kind: type[Any], table: Any, path: Path) -> Any:
    """Make a profile dataclass of a TOML table: every field that has no default there, of its type, and no other."""
    expected = {item.name: item.type for item in fields(kind)}
    needed = {item.name for item in fields(kind) if item.default_factory is MISSING}
    if not isinstance(table, dict):
        raise UsageError(f"{path}: an entry of [[engines]] is not a table")
    for name in table.keys() - expected.keys():
        near = difflib.get_close_matches(name, expected, 1, 0.0)[0]
        raise UsageError(f"{path} has a field {name!r} that nothing reads; did you mean {near!r}?")
    for name in needed - table.keys():
        raise UsageError(f"{path} lacks the field {name!r} ({expected[name]})")
    return kind(**{name: _typed(value, expected[name], f"{path}: {name}") for name, value in table.items()})


def _typed(value: Any, annotation: Any, where: str) -> Any:
    if annotation == "tuple[EngineProfile, ...]":
        return tuple(value)
    if annotation == "Mapping[str, float]":
        numbers = value.values() if isinstance(value, dict) else [None]
        valid = all(isinstance(number, (int, float)) and not isinstance(number, bool) for number in numbers)
    elif annotation == "tuple[str, ...]":
        valid = isinstance(value, list) and all(isinstance(item, str) for item in value)
        value = tuple(value) if valid else value
    else:
        kinds: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float)}
        valid = isinstance(value, kinds[annotation]) and not isinstance(value, bool)
    if not valid:
        raise UsageError(f"{where} is {value!r}, expected {annotation}")
    return value


def _check(profile: TargetProfile, path: Path) -> None:
    """Raise UsageError for values of the right type that mean nothing."""
    for share in (profile.model_ram_share, profile.model_storage_share):
        if not 0 < share <= 1:
            raise UsageError(f"{path}: a share of {share} was given, expected more than 0 and at most 1")
    if not 0 <= profile.max_accuracy_drop < 1:
        raise UsageError(
            f"{path}: max_accuracy_drop is {profile.max_accuracy_drop}, expected a share of at least 0 and less than 1"
        )
    page = profile.page_size_bytes
    if page < 4096 or page & (page - 1):
        raise UsageError(f"{path}: page_size_bytes is {page}, expected a power of two of at least 4096")
    for name in ("cores", "ram_bytes", "storage_bytes"):
        if getattr(profile, name) < 1:
            raise UsageError(f"{path}: {name} is {getattr(profile, name)}, expected at least 1")
    if not PLAIN_NAME.match(profile.name):
        raise UsageError(f"{path}: name is {profile.name!r}, expected letters, digits and ._+- only")
    if not VERSION.match(profile.python):
        raise UsageError(f"{path}: python is {profile.python!r}, expected a version such as 3.11")
    formats = [engine.format for engine in profile.engines]
    for engine in profile.engines:
        _check_engine(engine, path)
        if formats.count(engine.format) > 1:
            raise UsageError(f"{path} lists {engine.format} twice, expected one engine for each format")


def _check_engine(engine: EngineProfile, path: Path) -> None:
    for kind, values, known in (
        ("format", (engine.format,), FORMATS),
        ("provider", engine.providers, PROVIDERS),
        ("precision", engine.precisions, PRECISIONS),
    ):
        if not values:
            raise UsageError(f"{path}: the {engine.format} engine has no {kind}s, expected at least one")
        for value in values:
            if value not in known:
                raise UsageError(f"{path}: {kind} {value!r} is not known, expected one of {', '.join(known)}")
    for value, share in engine.golden_tolerance.items():
        if value not in engine.precisions or not 0 < share <= 1:
            raise UsageError(
                f"{path}: the {engine.format} engine has a golden_tolerance of {share} for {value}, expected a share "
                f"of more than 0 and at most 1 for one of {', '.join(engine.precisions)}"
            )
    built = quantize.PRECISIONS[engine.format]
    for value in engine.precisions:
        if value not in built:
            raise UsageError(f"{path}: {engine.format} has no {value}, expected one of {', '.join(built)}")
    if not VERSION.match(engine.version):
        raise UsageError(f"{path}: {engine.format} has version {engine.version!r}, expected one such as 1.20.1")
