#!/usr/bin/env python3
"""Ask bundles questions and keep the answers. For scripts/device_answers.py, on this machine and on a board.

    python ask_bundles.py FOLDER FORMAT ANSWERS [--threads N]

FOLDER has NAME.edge bundles, of which those of FORMAT are asked, and an images.npz with what they are asked under the
shapes of their inputs: ``nhwc`` and ``nchw``. The first questions go one by one and the rest in batches, since engines
have other kernels for one than for many. ANSWERS is an .npz of NAME.edge/OUTPUT; the last line printed is JSON:
the engine's package and version.

Needs edge_infer and nothing else of this folder.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

import edge_infer
from edge_infer.bundle import open_bundle

#: How many questions go one by one, and how many at once after these.
SINGLE, BATCH = 60, 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("format")
    parser.add_argument("answers", type=Path)
    parser.add_argument("--threads", type=int, help="default: what edge_infer takes")
    args = parser.parse_args()
    found, engine = {}, ["", ""]
    with np.load(args.folder / "images.npz") as data:
        images = {layout: data[layout] for layout in data.files}
    for path in sorted(args.folder.glob("*.edge")):
        if open_bundle(path).manifest.artifact.format == args.format:
            answers, engine = ask(path, images, args.threads)
            found.update({f"{path.name}/{name}": array for name, array in answers.items()})
            print(path.name, flush=True)
    np.savez(args.answers, **found)
    print(json.dumps(engine))


def ask(path: Path, images: dict[str, np.ndarray], threads: int | None) -> tuple[dict[str, np.ndarray], list[str]]:
    with tempfile.TemporaryDirectory() as cache, edge_infer.load(path, threads=threads, cache_dir=cache) as session:
        (given,) = session.inputs
        layout = next(array for array in images.values() if array.shape[1:] == tuple(given.shape[1:]))
        ends = [*range(1, SINGLE + 1), *range(SINGLE + BATCH, len(layout) + 1, BATCH)]
        parts = [session.run({given.name: layout[start:end]}) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        answers = {spec.name: np.concatenate([part[spec.name] for part in parts]) for spec in session.outputs}
        return answers, [session.info.package, session.info.version]


if __name__ == "__main__":
    main()
