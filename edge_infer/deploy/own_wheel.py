"""edge_infer's own wheel, made from what is installed here: a device gets exactly the code that the host runs."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import edge_infer
from edge_infer import target
from edge_infer.bundle import replace_file
from edge_infer.errors import UsageError

PROJECT = "edge-infer"
#: No times, so that the same files give the same wheel.
EPOCH = (1980, 1, 1, 0, 0, 0)
WHEEL = "Wheel-Version: 1.0\nGenerator: edge-infer\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def distribution() -> importlib.metadata.Distribution:
    """What pip wrote of edge-infer when it was installed. Raises UsageError when it was not."""
    try:
        return importlib.metadata.distribution(PROJECT)
    except importlib.metadata.PackageNotFoundError:
        raise UsageError(
            "edge-infer runs here from plain files, which say nothing of what it needs; install it with pip"
        ) from None


def write_own_wheel(
    folder: Path, package: Path | None = None, installed: importlib.metadata.Distribution | None = None
) -> Path:
    """Write ``edge_infer-VERSION-py3-none-any.whl`` into ``folder``, which is there, and give its path.

    Files are stored and not compressed: other versions of zlib would give other bytes, and so another hash. ``package``
    and ``installed`` are the running package's. Raises UsageError as ``distribution``.
    """
    package = package or Path(edge_infer.__file__).parent
    installed = installed or distribution()
    version = edge_infer.__version__
    info = f"edge_infer-{version}.dist-info"
    files = dict(sorted(_package_files(package)))
    files |= dict(sorted(_metadata(installed, info, version)))
    files[f"{info}/RECORD"] = _record(files, info)
    path = folder / f"edge_infer-{version}-py3-none-any.whl"
    replace_file(path, _archive(files), durable=False)
    return path


def _package_files(package: Path) -> Iterator[tuple[str, bytes]]:
    for path in package.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            yield f"edge_infer/{path.relative_to(package).as_posix()}", path.read_bytes()
    # In a checkout the profiles lie beside the package.
    folder = package.parent / "targets"
    if not (package / "targets").is_dir() and folder in target.FOLDERS:
        for path in folder.glob("*.toml"):
            yield f"edge_infer/targets/{path.name}", path.read_bytes()


def _metadata(installed: importlib.metadata.Distribution, info: str, version: str) -> Iterator[tuple[str, bytes]]:
    # An editable installation keeps the version that it was made with.
    text = re.sub(r"^Version: .*$", f"Version: {version}", installed.read_text("METADATA") or "", count=1, flags=re.M)
    yield f"{info}/METADATA", text.encode()
    yield f"{info}/WHEEL", WHEEL.encode()
    yield f"{info}/entry_points.txt", (installed.read_text("entry_points.txt") or "").encode()
    for file in installed.files or ():
        if "licenses" in file.parts and file.parts[0].endswith(".dist-info"):
            yield f"{info}/licenses/{file.name}", file.read_binary()


def _record(files: dict[str, bytes], info: str) -> bytes:
    rows = []
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
        rows.append(f"{name},sha256={digest},{len(data)}")
    return "\n".join([*rows, f"{info}/RECORD,,", ""]).encode()


def _archive(files: dict[str, bytes]) -> bytes:
    import io

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, data)
    return buffer.getvalue()
