"""What kind of model a path holds, told by its content and not by its name. Imports no framework."""

from __future__ import annotations

import contextlib
import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path

from edge_infer.bundle import hash_file
from edge_infer.errors import BundleError, ConversionError, UsageError
from edge_infer.runtime.onnx_files import locations_of

HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
TFLITE_MAGIC = b"TFL3"
#: Legacy torch.save files begin with a pickle protocol marker.
PICKLE_MAGIC = b"\x80"

FAMILIES = {
    "saved-model": "tensorflow",
    "keras": "tensorflow",
    "torch-pickle": "torch",
    "torchscript": "torch",
    "torch-export": "torch",
    "torch-safetensors": "torch",
    "onnx": "onnx",
    "tflite": "tflite",
}


#: The longest header that a safetensors file may have: https://huggingface.co/docs/safetensors
SAFETENSORS_LONGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class Source:
    """A model as the user has it. ``kind`` is a key of FAMILIES, ``sha256`` covers all of its files."""

    path: Path
    kind: str
    sha256: str

    @property
    def family(self) -> str:
        """The framework that reads it: tensorflow, torch, onnx or tflite."""
        return FAMILIES[self.kind]


def read_source(path: Path) -> Source:
    """Find out what ``path`` holds. Raises UsageError when nothing is there, ConversionError when it is no model."""
    if not path.exists():
        raise UsageError(f"there is no model at {path}")
    return Source(path.resolve(), _kind(path), hash_files(path))


def _kind(path: Path) -> str:
    if path.is_dir():
        if (path / "saved_model.pb").is_file():
            return "saved-model"
        raise ConversionError(f"{path} is a directory without saved_model.pb, expected a SavedModel or a model file")
    head = _head(path)
    if head.startswith(HDF5_MAGIC):
        return "keras"
    if head[4:8] == TFLITE_MAGIC:
        return "tflite"
    if _looks_like_safetensors(head, path.stat().st_size):
        return "torch-safetensors"
    if zipfile.is_zipfile(path):
        return _zip_kind(path)
    if head.startswith(b"PK"):
        raise ConversionError(f"{path} is an archive that is cut off; copy or save the model again")
    if head.startswith(PICKLE_MAGIC):
        return "torch-pickle"
    if path.suffix == ".onnx" or _looks_like_onnx(head):
        return "onnx"
    raise ConversionError(
        f"{path} begins with {head[:8]!r}, which is no model this packager reads; expected a SavedModel directory, "
        ".keras, .h5, PyTorch .pth, .safetensors, TorchScript .pt, torch.export .pt2, .onnx or .tflite"
    )


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(16)


def _zip_kind(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise ConversionError(f"{path} is a damaged archive ({error}); copy or save the model again") from None
    if "config.json" in names and "metadata.json" in names:
        return "keras"
    # Inside a PyTorch archive everything lies below one folder with a name of its own.
    inner = {name.split("/", 1)[1] for name in names if "/" in name}
    if "archive_format" in inner or any(name.startswith("models/") for name in inner):
        return "torch-export"
    if "constants.pkl" in inner:
        return "torchscript"
    if "data.pkl" in inner:
        return "torch-pickle"
    raise ConversionError(f"{path} is an archive with {sorted(names)[:3]} in it, which is no model this packager reads")


def _looks_like_onnx(head: bytes) -> bool:
    """An ONNX ModelProto begins with its IR version: field 1, a small number."""
    return len(head) > 3 and head[0] == 0x08 and 0 < head[1] < 0x20


def _looks_like_safetensors(head: bytes, size: int) -> bool:
    """The length of a JSON header in 8 bytes, little-endian, then that header."""
    length = int.from_bytes(head[:8], "little")
    return head[8:9] == b"{" and length <= min(size - 8, SAFETENSORS_LONGEST_HEADER)


def hash_files(path: Path) -> str:
    """SHA-256 over names, lengths and contents of all files."""
    digest = hashlib.sha256()
    for file in _files(path):
        name = str(file.relative_to(path)) if path.is_dir() else file.name
        digest.update(name.encode() + b"\0" + str(file.stat().st_size).encode() + b"\0")
        digest.update(bytes.fromhex(hash_file(file)))
    return digest.hexdigest()


def _files(path: Path) -> list[Path]:
    """All files of a source: a folder's, or a model's own and, for ONNX, those with weights beside it."""
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file() and not file.is_symlink())
    beside: set[str] = set()
    if path.suffix == ".onnx" or _looks_like_onnx(_head(path)):
        with contextlib.suppress(BundleError):  # damaged: the converter says how
            beside = locations_of(path)
    found = [path.parent / name for name in sorted(beside)]
    return [path.resolve(), *(file for file in found if file.is_file() and not file.is_symlink())]
