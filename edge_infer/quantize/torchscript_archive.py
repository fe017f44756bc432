"""TorchScript archives, written without what this machine put there, and packed weights taken apart."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

#: Records that the writer of an archive adds itself.
WRITTEN_LAST = ("version", "byteorder", ".data/serialization_id")


def save_archive(module: Any, path: Path, extra: dict[str, str]) -> None:
    """Save without the call stacks that TorchScript keeps for debugging: they hold this machine's paths."""
    rewrite(module.save_to_buffer(_extra_files=extra), torch._C.PyTorchFileWriter(str(path)))


def reloaded(module: Any, source: str, change: Callable[[bytes], bytes]) -> Any:
    """The module saved and loaded again, with ``change`` made to the file ``source`` of its code."""
    made = io.BytesIO()
    rewrite(
        module._c.save_to_buffer({}),
        torch._C.PyTorchFileWriter(made),
        lambda name, data: change(data) if name == source else data,
    )
    made.seek(0)
    return torch.jit.load(made)


def rewrite(archive: bytes, writer: Any, change: Callable[[str, bytes], bytes] = lambda name, data: data) -> None:
    full = torch._C.PyTorchFileReader(io.BytesIO(archive))
    for name in full.get_all_records():
        if not name.endswith(".debug_pkl") and name not in WRITTEN_LAST:
            data = change(name, full.get_record(name))
            writer.write_record(name, data, len(data))
    writer.write_end_of_file()
