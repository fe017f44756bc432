"""Read and write ``.npz`` files.

``numpy.savez`` takes names as keywords, so an array named ``file`` cannot be stored by it; ``numpy.load`` takes other
files than archives and fails in a dozen ways on a damaged one.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np


def write_npz(path: Path, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Store arrays uncompressed under any names; the same arrays give the same bytes."""
    write_items(path, arrays.items())


def write_items(path: Path, items: Iterable[tuple[str, np.ndarray[Any, Any]]]) -> None:
    """As ``write_npz``, with one array in memory at a time."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, array in items:
            # ZipInfo's own time is the fixed 1980-01-01.
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asanyarray(array), allow_pickle=False)


def read_npz(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """All arrays of an archive. Raises FileNotFoundError, or ValueError when it is no archive of plain arrays."""
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise ValueError("one array without a name")
        with loaded as arrays:
            return dict(arrays)
    except FileNotFoundError:
        raise
    # The last two: compressed in a way this Python does not know, encrypted.
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        raise ValueError(str(error)) from None
