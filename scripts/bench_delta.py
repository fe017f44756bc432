#!/usr/bin/env python3
"""What the update of a retrained network takes to send: a delta beside the tools that people use.

    python scripts/bench_delta.py [--work build/delta] [--docs]     some minutes the first time: it trains and packages

The networks and how they were retrained are in scripts/delta_models.py. Counted are the bytes of all files of a bundle
that changed, but for the manifest, which every push sends:

    full      as they are
    delta     as edge_infer sends them: each file as a delta, or whole where that is not worth it
    zstd      each file by itself, zstd -19
    patch     zstd -19 --patch-from, the old file given
    xdelta3   xdelta3 -9 -S lzma, the old file given
    bsdiff    bsdiff, the old file given
    rsync     rsync --compress over the folder that has the old files, all bytes in both directions by --stats

zstd, xdelta3, bsdiff and rsync are Debian's packages of these names. Every delta is applied as on a device, and the
result compared. ``time`` is how long the processor takes for that over how long to hash the result, alternating in one
process; only of files that are large enough for it to mean something.
"""

from __future__ import annotations

import argparse
import bz2
import hashlib
import json
import lzma
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import delta_models
import numpy as np
import pages

from edge_infer import delta
from edge_infer.bundle import Bundle, hash_file, open_bundle
from edge_infer.deploy.difference import WORTHWHILE, digits, make
from edge_infer.deploy.tensor_places import places
from edge_infer.manifest import TensorSpec
from edge_infer.package import Request, package

ROOT = Path(__file__).resolve().parent.parent
FORMS = {
    "tflite": ("int8", "float16", "float32"),
    "onnx": ("int8", "float16", "float32"),
    "torchscript": ("int8", "float32"),
}
ALL = tuple((format, precision) for format, precisions in FORMS.items() for precision in precisions)
INT8 = tuple(pair for pair in ALL if pair[1] == "int8")
#: The deep network's int8 for TFLite computes something else than its float32, and packaging refuses it.
DEEP = (("onnx", "int8"), ("onnx", "float16"), ("onnx", "float32"), ("torchscript", "int8"))
#: Network, retraining, and the artifacts that are compared.
CASES: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    ("digits", "tuned", ALL),
    ("digits", "tuned-gently", ALL),
    ("digits", "head", ALL),
    ("digits", "from-scratch", INT8),
    ("digits-deep", "tuned", DEEP),
    ("digits-deep", "tuned-gently", DEEP),
)
CODECS = ("zlib", "lzma")
TOOLS = ("zstd", "xdelta3", "bsdiff", "rsync")
#: Of how many applications and hashes the time is the median, and from how many bytes on.
RUNS, TIMED_BYTES = 7, 500_000
#: The case whose differences are written in all ways, to see which is smallest.
WAYS_OF = ("digits", "tuned", "tuned-gently")


# -- the bundles -------------------------------------------------------------------------------------------------------


def bundle(work: Path, network: str, release: str, format: str, precision: str) -> Bundle:
    """The release packaged; made once and kept in the folder."""
    path = work / "bundles" / f"{network}-{release}-{format}-{precision}.edge"
    if not path.exists():
        print(f"  packaging {path.name}", file=sys.stderr, flush=True)
        request = Request(
            work / f"{network}-{release}.pth",
            "cpu-x86_64",
            path,
            format,
            precision,
            calibration=work / "calibration.npz",
            factory=str(work / delta_models.factory(network)),
            inputs=(TensorSpec("image", "float32", (None, 1, 8, 8)),),
            max_drop=0.9,
            name=network,
        )
        package(request)
    return open_bundle(path)


def changed(old: Bundle, new: Bundle) -> list[str]:
    return [name for name, entry in new.manifest.files.items() if old.manifest.files[name].sha256 != entry.sha256]


# -- the ways to send them ---------------------------------------------------------------------------------------------


def delta_bytes(old: Bundle, new: Bundle, names: list[str], folder: Path) -> int:
    sent = 0
    for name in names:
        made = make(old, new, name, CODECS, folder / f"{name}.delta")
        sent += made.size if made else new.manifest.files[name].size
    return sent


def zstd(old: Path, new: Path, out: Path) -> list[str]:
    return ["zstd", "-q", "-f", "-19", str(new), "-o", str(out)]


def zstd_patch(old: Path, new: Path, out: Path) -> list[str]:
    return ["zstd", "-q", "-f", "-19", f"--patch-from={old}", str(new), "-o", str(out)]


def xdelta3(old: Path, new: Path, out: Path) -> list[str]:
    return ["xdelta3", "-q", "-f", "-e", "-9", "-S", "lzma", "-s", str(old), str(new), str(out)]


def bsdiff(old: Path, new: Path, out: Path) -> list[str]:
    return ["bsdiff", str(old), str(new), str(out)]


PEERS: dict[str, Callable[[Path, Path, Path], list[str]]] = {
    "zstd": zstd, "patch": zstd_patch, "xdelta3": xdelta3, "bsdiff": bsdiff,
}  # fmt: skip


def peer_bytes(command: Callable[[Path, Path, Path], list[str]], old: Bundle, new: Bundle, names: list[str]) -> int:
    sent = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            out = Path(folder) / name
            subprocess.run(command(old.file(name), new.file(name), out), check=True, capture_output=True)
            sent += out.stat().st_size
    return sent


def rsync_bytes(old: Bundle, new: Bundle) -> int:
    """What really goes over the wire between two rsync processes, in both directions."""
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder) / "there"
        shutil.copytree(old.path, there)
        # In place of ssh: leaves the host name out and runs the rest here.
        shell = Path(folder) / "shell"
        shell.write_text('#!/bin/sh\nshift\nexec "$@"\n')
        shell.chmod(0o755)
        command = ["rsync", "--recursive", "--checksum", "--compress", "--no-whole-file", "--stats"]
        command += ["--exclude=manifest.json", "-e", str(shell), f"{new.path}/", f"there:{there}/"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        assert all(hash_file(there / name) == entry.sha256 for name, entry in new.manifest.files.items())
    found = re.findall(r"Total bytes (?:sent|received): ([0-9,]+)", done.stdout)
    return sum(int(number.replace(",", "")) for number in found)


# -- what it takes -----------------------------------------------------------------------------------------------------


def row(work: Path, network: str, release: str, format: str, precision: str) -> dict[str, Any]:
    old = bundle(work, network, "first", format, precision)
    new = bundle(work, network, release, format, precision)
    names = changed(old, new)
    full = sum(new.manifest.files[name].size for name in names)
    found: dict[str, Any] = {
        "network": network, "retraining": release, "format": format, "precision": precision,
        "moved": moved_share(old, new), "full": full,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        found["delta"] = delta_bytes(old, new, names, Path(folder))
        found["time"] = time_over_hashing(old, new, names, Path(folder)) if full >= TIMED_BYTES else None
    found |= {peer: peer_bytes(command, old, new, names) for peer, command in PEERS.items()}
    return found | {"rsync": rsync_bytes(old, new)}


def tensors(old: Bundle, new: Bundle) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Width and numbers, as unsigned integers, of all tensors that both have, in any file that changed."""
    for name in changed(old, new):
        if name.startswith("golden"):
            continue
        before, after = (np.fromfile(item.file(name), np.uint8) for item in (old, new))
        known = {place.name: place for place in places(old, name)}
        for place in places(new, name):
            base = known.get(place.name)
            if base is not None and base.size == place.size and place.size % place.width == 0:
                pair = [
                    data[item.start : item.start + item.size].copy().view(f"<u{place.width}")
                    for data, item in ((before, base), (after, place))
                ]
                yield place.width, pair[0], pair[1]


def moved_share(old: Bundle, new: Bundle) -> float:
    """The share of numbers that changed."""
    counts = [(np.count_nonzero(before != after), len(after)) for _, before, after in tensors(old, new)]
    return sum(moved for moved, _ in counts) / max(1, sum(count for _, count in counts))


def time_over_hashing(old: Bundle, new: Bundle, names: list[str], folder: Path) -> float | None:
    """How many times longer applying the deltas takes than hashing what they make; None without a delta."""
    ratios, out = [], folder / "out"
    with_delta = [name for name in names if (folder / f"{name}.delta").exists()]
    for _ in range(RUNS if with_delta else 0):
        begun = time.process_time()
        for name in with_delta:
            files = old.manifest.files[name], new.manifest.files[name]
            delta.apply(old.file(name), files[0], folder / f"{name}.delta", out, files[1])
            out.unlink()
        applied = time.process_time()
        for name in with_delta:
            hashlib.sha256(new.file(name).read_bytes()).digest()
        ratios.append((applied - begun) / (time.process_time() - applied))
    return statistics.median(ratios) if ratios else None


# -- how differences are written ---------------------------------------------------------------------------------------


def deflated(data: bytes, strategy: int) -> int:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, strategy)
    return len(packer.compress(data)) + len(packer.flush())


WAYS: dict[str, Callable[[bytes], int]] = {
    "zlib": lambda data: deflated(data, zlib.Z_DEFAULT_STRATEGY),
    "zlib, runs": lambda data: deflated(data, zlib.Z_RLE),
    "zlib, Huffman": lambda data: deflated(data, zlib.Z_HUFFMAN_ONLY),
    "bz2": lambda data: len(bz2.compress(data)),
    "lzma": lambda data: len(lzma.compress(data, lzma.FORMAT_RAW, filters=delta.lzma_filters())),
}


def codings(width: int, before: np.ndarray, after: np.ndarray) -> dict[str, list[bytes]]:
    """The streams of one sequence of numbers, by how what changed is written."""
    moved = (after - before).view(f"<i{width}")
    folded = ((moved << 1) ^ (moved >> (8 * width - 1))).view(np.uint8)
    both = (before ^ after).view(np.uint8)
    if width == 1:
        return {
            "exclusive or": [both.tobytes()],
            **{f"difference, digits of {bits} bits": digits(folded, 1, bits) for bits in (8, 4, 2)},
        }
    return {
        "exclusive or, digits apart": digits(both, width, 8),
        "difference, digits together": [folded.tobytes()],
        "difference, digits apart": digits(folded, width, 8),
    }


def ways(work: Path) -> list[dict[str, Any]]:
    """Bytes of each coding with each codec, over all tensors of 1,000 bytes and more; ``best`` chooses by stream."""
    rows = []
    network, *releases = WAYS_OF
    for precision, width in (("int8", 1), ("float16", 2), ("float32", 4)):
        for release in releases:
            old, new = (bundle(work, network, item, "onnx", precision) for item in ("first", release))
            pairs = [pair for pair in tensors(old, new) if pair[0] == width and pair[2].nbytes >= 1000]
            before, after = (np.concatenate([pair[side] for pair in pairs]) for side in (1, 2))
            for coding, streams in codings(width, before, after).items():
                sizes = {name: [pack(stream) for stream in streams] for name, pack in WAYS.items()}
                best = sum(min(len(stream), *column) for stream, *column in zip(streams, *sizes.values(), strict=True))
                rows.append(
                    {"precision": precision, "retraining": release, "coding": coding, "full": after.nbytes}
                    | {name: sum(column) for name, column in sizes.items()}
                    | {"best": best}
                )
    return rows


# -- the page ----------------------------------------------------------------------------------------------------------


def share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %"


def page(rows: list[dict[str, Any]], found: list[dict[str, Any]], accuracy: dict[str, float]) -> str:
    columns = ("delta", *PEERS, "rsync")
    head = ["network", "retraining", "artifact", "numbers moved>", "full>", *(f"{name}>" for name in columns), "time>"]
    lines = [
        "# What an update takes to send",
        "",
        "Made by `python scripts/bench_delta.py --docs`, which says what is counted. Bytes in percent of the files",
        f"that changed. A delta of {WORTHWHILE:.0%} or more is not sent: the file then goes whole, and is counted so.",
        "",
        *pages.markdown(
            head,
            [
                [
                    item["network"], item["retraining"], f"{item['format']} {item['precision']}",
                    f"{item['moved']:.0%}", f"{item['full']:,}",
                    *(f"**{share(item[name], item['full'])}**" if name == "delta" else share(item[name], item["full"])
                      for name in columns),
                    f"{item['time']:.1f}" if item["time"] else "",
                ]
                for item in rows
            ],
        ),
        "",
        "`numbers moved` are those of the tensors that are not what they were: units that never fire are not trained.",
        "`time` is how long the device's code takes to put the files together, over how long to hash them, on a",
        "processor that has instructions for SHA-256.",
        "",
        "## The retrainings",
        "",
        "`scripts/delta_models.py` trains on scikit-learn's digits. Share of the 500 test digits that are right:",
        "",
        *pages.markdown(
            ["network", *(f"{release}>" for release in delta_models.RELEASES)],
            [
                [network, *(f"{accuracy[f'{network}-{release}']:.1%}" for release in delta_models.RELEASES)]
                for network in delta_models.NETWORKS
            ],
        ),
        "",
        "## How the differences are written",
        "",
        "The digits network's tensors of 1,000 bytes and more in ONNX: percent of their bytes by how what changed is",
        "written, by what it is packed with, and with the smallest of these for each stream. Deltas take differences:",
        "of int8 in whichever digits are smallest, of floats with the digits apart. They have all of these codecs but",
        "bz2, which never gained enough to be one more thing that a device must have.",
        "",
        *pages.markdown(
            ["precision", "retraining", "written as", *(f"{name}>" for name in (*WAYS, "best"))],
            [
                [item["precision"], item["retraining"], item["coding"]]
                + [share(item[name], item["full"]) for name in (*WAYS, "best")]
                for item in found
            ],
        ),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "delta", help="what it makes is kept there")
    parser.add_argument("--docs", action="store_true", help="write docs/delta.md and docs/delta.json")
    args = parser.parse_args()
    lacking = [tool for tool in TOOLS if shutil.which(tool) is None]
    if lacking:
        raise SystemExit(f"{', '.join(lacking)} is not installed; apt-get install {' '.join(lacking)}")
    work = args.work.resolve()
    os.environ.setdefault("EDGE_INFER_CACHE", str(work / "cache"))
    (work / "bundles").mkdir(parents=True, exist_ok=True)
    accuracy = delta_models.make(work)
    rows = []
    for network, release, forms in CASES:
        for format, precision in forms:
            rows.append(row(work, network, release, format, precision))
            print(json.dumps(rows[-1]), flush=True)
    found = ways(work)
    text = page(rows, found, accuracy)
    print(text)
    if args.docs:
        (ROOT / "docs" / "delta.md").write_text(text)
        (ROOT / "docs" / "delta.json").write_text(json.dumps({"rows": rows, "ways": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
