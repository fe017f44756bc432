"""What sending files would take, compressed on the way."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path

#: zlib's own default. https://www.zlib.net/manual.html
LEVEL = 6
CHUNK = 1 << 20


def transfer_size(files: Iterable[Path]) -> int:
    """Bytes of the files after zlib, each by itself; they are read piece by piece. Raises OSError."""
    return sum(_compressed(Path(file)) for file in files)


def _compressed(path: Path) -> int:
    packer = zlib.compressobj(LEVEL)
    size = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            size += len(packer.compress(chunk))
    return size + len(packer.flush())
