"""How bundles and the engine's own cache are damaged: what scripts/fuzz_bundles.py tries, from a seed and a number."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from edge_infer import manifest as parts
from edge_infer.manifest import MANIFEST_NAME, seal
from edge_infer.runtime.engine_cache import ENTRY_NAME

#: What a manifest can say; the last but three are the largest image, a nested list and text that is none.
ODD_VALUES = (
    *(None, True, -1, 0, 1, 2**63, 1e308, "", "x", "../../etc/passwd", "model.bin"),
    *([32768, 32768], [], {}, [[]] * 50, "\u0000"),
)
#: What JSON can say and a manifest cannot.
ODDER_VALUES = (*ODD_VALUES, float("inf"), float("nan"), -(2**70))
#: All that the parts of a manifest are called.
FIELDS = sorted({item.name for kind in vars(parts).values() if isinstance(kind, type) and is_dataclass(kind)
                 for item in fields(kind)})  # fmt: skip
LINKS = ("/dev/zero", "/dev/full", "/nowhere", "..")


def damage(data: bytes, rng: random.Random) -> bytes:
    """Some bytes flipped, cut, inserted, copied elsewhere or zeroed."""
    if not data:
        return b"\x00"
    place, length = rng.randrange(len(data)), rng.choice((1, 2, 4, 8, 64, 1024))
    kind = rng.randrange(6)
    if kind <= 1:
        flipped = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 16))):
            flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    if kind == 2:
        return data[:place]
    if kind == 3:
        return data[:place] + rng.randbytes(length) + data[place:]
    if kind == 4:
        source = rng.randrange(len(data))
        piece = data[source : source + length]
        return data[:place] + piece + data[place + len(piece) :]
    return data[:place] + rng.choice((b"\x00", b"\xff")) * min(length, len(data) - place) + data[place + length :]


# -- a bundle ----------------------------------------------------------------------------------------------------------


def lying(folder: Path, rng: random.Random) -> None:
    """As a bundle may lie on a bad card."""
    damage_file(rng.choice(sorted(folder.iterdir())), sorted(folder.iterdir()), rng)


def damage_file(path: Path, others: Sequence[Path], rng: random.Random) -> None:
    """``path`` written over, perhaps with its old times; or missing, swapped with one of ``others``, or no file."""
    kind = rng.randrange(11)
    before, data = path.stat(), path.read_bytes()
    if kind < 6:
        path.write_bytes(damage(data, rng))
        if rng.random() < 0.5:
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        return
    path.unlink()
    if kind == 6:
        path.mkdir()
    elif kind == 7:
        path.symlink_to(rng.choice((*LINKS, path.name)))
    elif kind == 8:
        os.mkfifo(path)
    elif kind == 9:
        other = rng.choice([item for item in others if item != path])
        path.write_bytes(other.read_bytes())
        other.write_bytes(data)


def manifest(folder: Path, rng: random.Random) -> None:
    """Fields of the manifest replaced or removed, its own hash made right again."""
    content = json.loads((folder / MANIFEST_NAME).read_bytes())
    replace_fields(content, ODD_VALUES, rng)
    (folder / MANIFEST_NAME).write_bytes(seal(content))


def replace_fields(content: Any, values: Sequence[Any], rng: random.Random) -> None:
    """One or two fields anywhere in ``content`` removed, replaced by another that a manifest knows, copied from
    elsewhere in it, or one of ``values``."""
    places = list(_places(content))
    for _ in range(rng.choice((1, 1, 1, 2))):
        holder, key = rng.choice(places)
        if rng.random() < 0.2 and isinstance(holder, dict):
            holder.pop(key, None)
            if rng.random() < 0.5:  # a field at its default is left out; here it says something
                holder[rng.choice(FIELDS)] = rng.choice(values)
        elif rng.random() < 0.3:
            other, its = rng.choice(places)
            holder[key] = json.loads(json.dumps(other[its])) if _has(other, its) else 0
        else:
            holder[key] = rng.choice(values)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield value, key
        yield from _places(item)


def _has(holder: Any, key: Any) -> bool:
    return key in holder if isinstance(holder, dict) else key < len(holder)


def sealed(folder: Path, rng: random.Random) -> None:
    """An engine's own file damaged and the manifest's hashes made right again: the engine sees it."""
    _damage_and_seal(folder, _engines_files, rng)


def contents(folder: Path, rng: random.Random) -> None:
    """As ``sealed``, of what edge_infer itself reads: golden questions, labels, anchors."""
    _damage_and_seal(folder, lambda content: sorted(content["files"].keys() - set(_engines_files(content))), rng)


def _engines_files(content: Any) -> list[str]:
    return [name for name in (content["artifact"]["model"], content["artifact"].get("weights")) if name]


def _damage_and_seal(folder: Path, names: Callable[[Any], list[str]], rng: random.Random) -> None:
    content = json.loads((folder / MANIFEST_NAME).read_bytes())
    name = rng.choice(names(content))
    data = damage((folder / name).read_bytes(), rng)
    (folder / name).write_bytes(data)
    content["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / MANIFEST_NAME).write_bytes(seal(content))


# -- what an engine made of it -----------------------------------------------------------------------------------------


def cache(folder: Path, other: Path, rng: random.Random) -> None:
    """The engine cache in ``folder``: a file or stamp of it damaged, an entry's fields replaced, or something of
    the entry of another model, from the engine cache ``other``, put in its place."""
    entry = rng.choice(sorted(path for path in folder.iterdir() if path.is_dir()))
    kind = rng.randrange(10)
    if kind < 5:
        files = sorted(path for path in rng.choice((folder, entry)).rglob("*") if path.is_file())
        damage_file(rng.choice(files), files, rng)
    elif kind < 7:
        _replace_entry_fields(entry / ENTRY_NAME, rng)
    elif kind == 7:
        mine = rng.choice(sorted(entry.iterdir()))
        mine.write_bytes(rng.choice(sorted(other.glob(f"*/{mine.name}"))).read_bytes())
    else:
        shutil.rmtree(entry)
        if kind == 8:
            shutil.copytree(rng.choice(sorted(path for path in other.iterdir() if path.is_dir())), entry)
        else:
            rng.choice((Path.touch, Path.mkdir, os.mkfifo, lambda path: path.symlink_to(rng.choice(LINKS))))(entry)


def _replace_entry_fields(path: Path, rng: random.Random) -> None:
    row = json.loads(path.read_bytes())
    if rng.random() < 0.1:
        path.write_text(rng.choice(("[" * 100_000, json.dumps(rng.choice(ODDER_VALUES)))))
        return
    replace_fields(row, ODDER_VALUES, rng)
    path.write_text(json.dumps(row, indent=1, sort_keys=True))
