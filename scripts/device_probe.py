#!/usr/bin/env python3
"""What a session does on a device, seen from inside an environment with the wheel, one engine and nothing else.

    python -I scripts/device_probe.py BUNDLE [--data FILE.npz]

Opens the bundle, asks its golden questions in each way that a session has (`run`, buffers, `Pool`), closes it and
opens it again. Prints one JSON object: versions, the largest difference of each output, whether the second open mapped
what the first had put into the engine cache, and with `--data` the share of its `label` that the answers to its `image`
hit. Ends with status 1 and a sentence where anything is wrong, a module of the host half among what was imported too.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

#: Modules of the engines. The device half may import one of them.
ENGINES = ("ai_edge_litert", "tflite_runtime", "onnxruntime", "torch")
HOST_PACKAGES = ("tensorflow", "onnx", "onnxscript", "tf2onnx", "litert_torch", "paramiko", "rich", "sklearn")
HOST_MODULES = ("package", "convert", "quantize", "deploy", "cli", "target", "measure", "worker")

Arrays = dict[str, Any]


def probe(source: str, data: Path | None) -> dict[str, Any]:
    import edge_infer

    expect(not {"numpy", *ENGINES} & set(sys.modules), "importing edge_infer imported numpy or an engine")
    worst: dict[str, float] = {}
    with edge_infer.load(source) as session:
        import numpy as np

        before = cached(session)
        ask(session, "run", session.run, worst)
        ask(session, "run_buffers", lambda asked: through_buffers(session, asked), worst)
        info, accuracy = session.info, hits(session, data) if data else None
    expect_closed(session)
    with edge_infer.Pool(source, sessions=2) as pool:
        ask(session, "Pool", lambda asked: pool.submit(asked).result(), worst)
    with edge_infer.load(source) as session:
        ask(session, "run of the second open", session.run, worst)
        expect(cached(session) == before, "the second open made anew what the first had put into the engine cache")
        mapped, of_cache = session.memory().mapped, mapped_bytes(tuple(before))
        expect(session.info.notes == info.notes, f"the second open notes {session.info.notes}, the first {info.notes}")
    expect_light()
    return {
        "file": edge_infer.__file__, "python": platform.python_version(), "numpy": np.__version__,
        "package": info.package, "version": info.version, "notes": list(info.notes), "accuracy": accuracy,
        "largest_difference": worst, "mapped_bytes": mapped, "mapped_of_cache_bytes": of_cache,
    }  # fmt: skip


def expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise SystemExit(otherwise)


def ask(session: Any, how: str, answer: Callable[[Arrays], Mapping[str, Any]], worst: dict[str, float]) -> None:
    """Put the golden questions to ``answer``; notes the largest differences in ``worst``."""
    from edge_infer.runtime.golden import largest_difference, read_golden

    for asked, expected in read_golden(session.bundle):
        answered = answer(dict(asked))
        for name, allowed in session.bundle.manifest.golden.tolerance.items():
            difference = largest_difference(expected[name], answered[name])
            expect(difference <= allowed, f"{how}: {name} differs by {difference:.3g}, allowed is {allowed:.3g}")
            worst[name] = max(worst.get(name, 0.0), difference)


def through_buffers(session: Any, asked: Arrays) -> Arrays:
    session.bind({name: array.shape for name, array in asked.items()})
    for name, array in asked.items():
        session.input_buffers[name][...] = array
    session.run_buffers()
    return {name: array.copy() for name, array in session.output_buffers.items()}


def hits(session: Any, data: Path) -> float:
    """The share of the labels that are the likeliest class of the only output."""
    import numpy as np

    with np.load(data) as arrays:
        return float((session(arrays["image"]).argmax(1) == arrays["label"]).mean())


def expect_closed(session: Any) -> None:
    from edge_infer.errors import SessionClosed

    try:
        session.run({})
    except SessionClosed:
        return
    raise SystemExit("a closed session ran")


def cached(session: Any) -> dict[Path, tuple[int, int]]:
    """What the engine made of the bundle, and what would tell that it was made again."""
    entries = [path for path in session.files[1:] if path.is_dir()]
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in entries}


def mapped_bytes(files: tuple[Path, ...]) -> int:
    from edge_infer.runtime.residency import mappings

    return sum(mapping.end - mapping.start for mapping in mappings(files)) if files else 0


def expect_light() -> None:
    """No host package, no module of the host half, and one engine."""
    roots = {name.split(".")[0] for name in sys.modules}
    heavy = sorted({*roots.intersection(HOST_PACKAGES), *(sys.modules.keys() & host_modules())})
    expect(not heavy, f"the device half imported {', '.join(heavy)}")
    engines = sorted(roots.intersection(ENGINES))
    expect(len(engines) == 1, f"the device half imported the engines {', '.join(engines)}")


def host_modules() -> set[str]:
    return {f"edge_infer.{name}" for name in HOST_MODULES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--data", type=Path)
    args = parser.parse_args()
    print(json.dumps(probe(args.bundle, args.data)))


if __name__ == "__main__":
    main()
