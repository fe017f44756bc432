"""Small real wheels, made by hand: pip reads, chooses and installs them like any other."""

from __future__ import annotations

import base64
import hashlib
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from conftest import ROOT

WHEELHOUSE = ROOT / "build" / "wheelhouse"


def make_wheel(
    folder: Path,
    name: str,
    version: str,
    tag: str = "py3-none-any",
    needs: Sequence[str] = (),
    files: Mapping[str, str] | None = None,
) -> Path:
    """Write ``NAME-VERSION-TAG.whl``; ``files`` are its modules by path."""
    project = name.replace("-", "_")
    info = f"{project}-{version}.dist-info"
    metadata = [
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}",
        *(f"Requires-Dist: {need}" for need in needs),
    ]
    content = {
        **(files or {f"{project}/__init__.py": ""}),
        f"{info}/METADATA": "\n".join(metadata) + "\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    record = [f"{path},sha256={_digest(text)},{len(text)}" for path, text in content.items()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{project}-{version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        content[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""])
        for file, text in content.items():
            archive.writestr(zipfile.ZipInfo(file, (1980, 1, 1, 0, 0, 0)), text)  # the same file each time
    return path


def _digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")


def add_pip(folder: Path) -> None:
    """The pip wheel that scripts/test fetched."""
    found = sorted(WHEELHOUSE.glob("pip-*.whl"))
    assert found, f"{WHEELHOUSE} holds no pip; run scripts/test, which fills it"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(found[-1], folder)


def small_engine(folder: Path, version: str, code: str = "") -> None:
    """An engine of no size under ai-edge-litert's name, its numpy, and pip: an index for quick installations."""
    make_wheel(folder, "numpy", "2.0.0")
    make_wheel(
        folder,
        "ai-edge-litert",
        version,
        needs=["numpy"],
        files={"ai_edge_litert/__init__.py": "", "ai_edge_litert/interpreter.py": code},
    )
    add_pip(folder)
