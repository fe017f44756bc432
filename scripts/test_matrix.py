#!/usr/bin/env python3
"""The device half on each supported Python, numpy and engine; `scripts/test_matrix` calls this.

    scripts/test_matrix [--rows NAME...] [--python PATH...] [--keep] [--docs]
    scripts/test_matrix --list

For each row a fresh environment gets the built wheel with one engine in exactly the row's versions, and no more. In it
each bundle of the engine's format goes through `scripts/device_probe.py` and `python -m edge_infer verify`, `run` and
`bench`: the digits network in four precisions, and one of 17 MB, which is large enough for the engine cache. A bundle
whose manifest asks for a newer engine must be refused with the sentence that says so.

Python X.Y is the first of these that starts and is of that version: those of `--python`, `pythonX.Y` on the PATH,
`~/.pyenv/versions/X.Y*/bin/pythonX.Y`. A row whose Python is not there is not run, and the table says so. Environments
lie in `build/matrix` and are removed after their row.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bench_cases

from edge_infer.bundle import Bundle, open_bundle
from edge_infer.manifest import Requirement
from edge_infer.runtime.engine_cache import SMALLEST_BYTES
from edge_infer.runtime.engines import EXTRAS, at_least
from edge_infer.runtime.engines.litert import LIBRARY_SINCE

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "matrix"
DATA, PAGE = ROOT / "docs" / "matrix.json", ROOT / "docs" / "matrix.md"
PROBE = ROOT / "scripts" / "device_probe.py"
FORMATS = {"ai-edge-litert": "tflite", "tflite-runtime": "tflite", "onnxruntime": "onnx", "torch": "torchscript"}
PRECISIONS = {
    "tflite": ("float32", "float16", "int8-dynamic", "int8"),
    "onnx": ("float32", "float16", "int8-dynamic", "int8"),
    "torchscript": ("float32", "int8-dynamic", "int8"),
}
SMALL, LARGE = "digits", "conv17"
#: Engine -> the oldest release tried that maps what it made of a large model; onnxruntime 1.14 does not find it again.
CACHED_SINCE = {"ai-edge-litert": LIBRARY_SINCE, "onnxruntime": "1.17"}
#: Of the test digits the network gets 97.6 % right.
ACCURACY = 0.96
#: PyPI's torch brings CUDA's packages. Bytes of free disk for their archives and what is in them.
TORCH_BYTES = 15_000_000_000
#: Seconds for an installation, and for one command in the environment.
INSTALL_S, COMMAND_S = 1200, 300


@dataclass(frozen=True)
class Row:
    """An environment: Python's minor version, the engine's package, exact versions of it and of numpy."""

    python: str
    package: str
    engine: str
    numpy: str

    @property
    def name(self) -> str:
        return f"py{self.python}-{self.package}-{self.engine}-numpy-{self.numpy}"

    @property
    def cached(self) -> bool:
        """Whether a large model is mapped from the engine cache: TFLite's interpreters and torch know no such thing."""
        since = CACHED_SINCE.get(self.package)
        return since is not None and at_least(self.engine, since)


ROWS = (
    # The newest engines, as constraints.txt has them, on each Python with the newest numpy for it.
    Row("3.10", "ai-edge-litert", "2.3.0", "2.2.6"),
    Row("3.11", "ai-edge-litert", "2.3.0", "2.4.6"),
    Row("3.12", "ai-edge-litert", "2.3.0", "2.5.5"),
    Row("3.13", "ai-edge-litert", "2.3.0", "2.5.5"),
    Row("3.10", "onnxruntime", "1.23.2", "2.2.6"),  # the last for 3.10
    Row("3.11", "onnxruntime", "1.32.0", "2.4.6"),
    Row("3.12", "onnxruntime", "1.32.0", "2.5.5"),
    Row("3.13", "onnxruntime", "1.32.0", "2.5.5"),
    Row("3.10", "torch", "2.13.0", "2.2.6"),
    Row("3.11", "torch", "2.13.0", "2.4.6"),
    Row("3.12", "torch", "2.13.0", "2.5.5"),
    Row("3.13", "torch", "2.13.0", "2.5.5"),
    # The oldest numpy.
    Row("3.11", "ai-edge-litert", "2.3.0", "1.26.0"),
    Row("3.11", "onnxruntime", "1.32.0", "1.26.0"),
    Row("3.11", "torch", "2.13.0", "1.26.0"),
    # The engines that targets/*.toml name.
    Row("3.11", "ai-edge-litert", "2.1.0", "2.4.6"),
    Row("3.11", "onnxruntime", "1.20.1", "2.4.6"),
    Row("3.11", "torch", "2.8.0", "2.4.6"),
    # The oldest LiteRT with a library of compiled models as it is today.
    Row("3.11", "ai-edge-litert", "2.1.6", "2.4.6"),
    # The oldest engines; 1.17 is the oldest onnxruntime tried that knows the engine cache.
    Row("3.10", "ai-edge-litert", "1.4.0", "1.26.0"),
    Row("3.12", "ai-edge-litert", "1.4.0", "2.5.5"),
    Row("3.10", "tflite-runtime", "2.14.0", "1.26.4"),
    Row("3.11", "tflite-runtime", "2.14.0", "1.26.0"),
    Row("3.10", "onnxruntime", "1.14.0", "1.26.0"),
    Row("3.10", "onnxruntime", "1.17.0", "1.26.0"),
    Row("3.10", "torch", "2.1.0", "1.26.0"),
)


class NotRun(Exception):
    """Why a row could not be tried here."""


class Failed(Exception):
    """What was wrong, in one sentence."""


@dataclass
class Result:
    """``outcome``: passed, failed or not run. ``bundles``: passed, "refused: SENTENCE" or "failed: SENTENCE" by name.
    ``large``: where the weights of the large model are when it is opened again."""

    row: str
    outcome: str = "passed"
    reason: str = ""
    python: str = ""
    large: str = ""
    bundles: dict[str, str] = field(default_factory=dict)


# -- what is run -------------------------------------------------------------------------------------------------------


def make_wheel() -> Path:
    folder = FOLDER / "wheel"
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "build", "-q", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (wheel,) = folder.glob("*.whl")
    return wheel


def make_bundles(formats: Sequence[str]) -> dict[str, list[Bundle]]:
    """The bundles of each format, packaged anew; steps that are known come from the packager's cache."""
    folder = FOLDER / "bundles"
    folder.mkdir(parents=True, exist_ok=True)
    made: dict[str, list[Bundle]] = {}
    for format in formats:
        cases = [*((SMALL, precision) for precision in PRECISIONS[format]), (LARGE, "float32")]
        made[format] = [make_bundle(folder, net, format, precision) for net, precision in cases]
        if made[format][-1].manifest.size < SMALLEST_BYTES:
            raise SystemExit(f"{made[format][-1].path} is too small for the engine cache; make {LARGE} larger")
    return made


def make_bundle(folder: Path, net: str, format: str, precision: str) -> Bundle:
    name = f"{net}-{format}-{precision}"
    print(f"packaging {name}", file=sys.stderr, flush=True)
    model, samples = bench_cases.source_of(net, format)
    command = [
        sys.executable, "-m", "edge_infer.cli", "package", str(model), "--target", f"cpu-{platform.machine()}",
        "--format", format, "--precision", precision, "--calibration", str(samples), "--name", name,
        "-o", str(folder / f"{name}.edge"),
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return open_bundle(folder / f"{name}.edge")


# -- one row -----------------------------------------------------------------------------------------------------------


def run_row(row: Row, wheel: Path, bundles: Sequence[Bundle], pythons: Sequence[Path], keep: bool) -> Result:
    result, folder = Result(row.name), FOLDER / row.name
    shutil.rmtree(folder, ignore_errors=True)
    try:
        python = make_environment(row, folder, wheel, pythons)
        result.python = said(python, "import platform; print(platform.python_version())")
        for bundle in bundles:
            result.bundles[bundle.manifest.name] = try_bundle(row, python, bundle, result)
    except NotRun as error:
        result.outcome, result.reason = "not run", str(error)
    except Failed as error:
        result.outcome, result.reason = "failed", str(error)
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    wrong = [f"{name}: {text}" for name, text in result.bundles.items() if text.startswith("failed")]
    if wrong:
        result.outcome, result.reason = "failed", "; ".join(wrong)
    return result


def try_bundle(row: Row, python: Path, bundle: Bundle, result: Result) -> str:
    try:
        newer = refusal(row, bundle)
        with tempfile.TemporaryDirectory(dir=FOLDER, prefix="store-") as store:
            device = Device(python, Path(store))
            if newer:
                return f"refused: {device.refuses(bundle, newer)}"
            answer = device.runs(row, bundle)
            if bundle.manifest.name.startswith(LARGE):
                result.large = where(row, answer)
    except (Failed, subprocess.TimeoutExpired) as error:
        return f"failed: {error}"
    return "passed"


def refusal(row: Row, bundle: Bundle) -> list[Requirement]:
    """What the bundle needs where the row's engine is not that or is too old for it; empty where it will do."""
    wanted = bundle.manifest.artifact.requires
    own = [item for item in wanted if item.package == row.package]
    if not own:
        return list(wanted)
    return [] if at_least(row.engine, own[0].version) else own


def where(row: Row, answer: dict[str, Any]) -> str:
    """Where the large model's weights are; raises Failed where they should be somewhere else."""
    if answer["mapped_of_cache_bytes"] > SMALLEST_BYTES:
        found = "mapped from the engine cache"
    elif row.package == "torch" and answer["mapped_bytes"] > SMALLEST_BYTES:
        found = "mapped from the bundle"
    else:
        found = "repacked in private memory"
    if (found == "mapped from the engine cache") != row.cached or (row.package == "torch" and "bundle" not in found):
        raise Failed(f"the large model's weights are {found} ({'; '.join(answer['notes']) or 'no notes'})")
    return found


@dataclass(frozen=True)
class Device:
    """The environment's Python, and a store of its own."""

    python: Path
    store: Path

    def runs(self, row: Row, bundle: Bundle) -> dict[str, Any]:
        """See that all verbs work; gives what the probe saw."""
        data = ["--data", str(test_set(bundle))] if bundle.manifest.name.startswith(SMALL) else []
        probed = self._json("the probe", [str(PROBE), str(bundle.path), *data])
        versions = {"package": row.package, "version": row.engine, "numpy": row.numpy}
        seen = {**probed, "version": probed["version"].split("+")[0]}  # +cpu, +cu130
        for key, wanted in versions.items():
            expect(seen[key] == wanted, f"{key} is {seen[key]}, the row says {wanted}")
        expect(not Path(probed["file"]).is_relative_to(ROOT / "edge_infer"), "the checkout was run, not the wheel")
        expect(not data or probed["accuracy"] > ACCURACY, f"{probed['accuracy']} of the test digits are right")
        verified = self._verb("verify", bundle)
        expect(verified["engine"]["package"] == row.package, f"verify ran {verified['engine']}")
        outputs = {spec.name for spec in bundle.manifest.outputs}
        expect(self._verb("run", bundle).keys() == outputs, "run gave other outputs than the manifest has")
        timed = self._verb("bench", bundle, "--runs", "20")
        expect(timed["runs"] >= 1 and timed["p50_ms"] > 0, f"bench says {timed}")
        return probed

    def refuses(self, bundle: Bundle, needed: Sequence[Requirement]) -> str:
        """See that the bundle is refused for the engine's age; gives the sentence."""
        done = self._run(["-m", "edge_infer", "verify", str(bundle.path)])
        sentence = (done.stderr.strip().splitlines() or [""])[-1]
        wanted = f"{bundle.manifest.name} needs {' or '.join(map(str, needed))}"
        expect(done.returncode == 5 and wanted in sentence, f"not refused as too new but {status(done)}")
        return sentence.removeprefix("python -m edge_infer: ")

    def _verb(self, verb: str, bundle: Bundle, *options: str) -> dict[str, Any]:
        return self._json(verb, ["-m", "edge_infer", verb, str(bundle.path), *options, "--json"])

    def _json(self, what: str, arguments: Sequence[str]) -> dict[str, Any]:
        done = self._run(arguments)
        expect(done.returncode == 0, f"{what}: {status(done)}")
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer

    def _run(self, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """In isolated mode, without what our own environment says of Python's modules, in a folder with nothing."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        return subprocess.run(
            [str(self.python), "-I", *arguments], env={**environment, "EDGE_INFER_HOME": str(self.store)},
            cwd=self.store, capture_output=True, text=True, check=False, timeout=COMMAND_S,
        )  # fmt: skip


def expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise Failed(otherwise)


def status(done: subprocess.CompletedProcess[str]) -> str:
    last = (done.stderr.strip().splitlines() or ["no word"])[-1]
    return f"status {done.returncode}, {last}".replace(f"{ROOT}/", "")


def test_set(bundle: Bundle) -> Path:
    return bench_cases.MODELS / ("test.npz" if bundle.manifest.artifact.format == "tflite" else "test_nchw.npz")


# -- environments ------------------------------------------------------------------------------------------------------


def make_environment(row: Row, folder: Path, wheel: Path, pythons: Sequence[Path]) -> Path:
    """A fresh environment; gives its Python. Raises NotRun, Failed."""
    base = find_python(row.python, pythons)
    free = shutil.disk_usage(FOLDER).free
    if row.package == "torch" and free < TORCH_BYTES:
        raise NotRun(f"{free / 1e9:.0f} GB of disk are free, torch may take {TORCH_BYTES / 1e9:.0f} GB")
    subprocess.run([str(base), "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    pins = [f"{row.package}=={row.engine}", f"numpy=={row.numpy}"]
    done = subprocess.run(
        [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", "--only-binary=:all:",
         f"{wheel}[{EXTRAS[row.package]}]", *pins],
        capture_output=True, text=True, check=False, timeout=INSTALL_S,
    )  # fmt: skip
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise Failed(f"pip: {' '.join(errors)[:500] or status(done)}")
    return python


def find_python(version: str, given: Sequence[Path]) -> Path:
    for path in candidates(version, given):
        if said(path, "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])") == version:
            return path
    raise NotRun(f"there is no Python {version} with its venv module here; name one with --python")


def candidates(version: str, given: Sequence[Path]) -> Iterator[Path]:
    yield from given
    found = shutil.which(f"python{version}")
    if found:
        yield Path(found)
    yield from sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}*/bin/python{version}"))


def said(python: Path, program: str) -> str:
    """What ``python`` prints; nothing where it does not start, as pyenv's stand-ins for what is not chosen."""
    try:
        done = subprocess.run([str(python), "-c", program], capture_output=True, text=True, check=False, timeout=60)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


# -- the page ----------------------------------------------------------------------------------------------------------


ABOUT = (
    "Made by `scripts/test_matrix --docs`, on x86-64. Each row is a fresh environment with the wheel, one engine and",
    "numpy in exactly these versions. There the digits network in each precision and a network of 17 MB went through",
    "`python -m edge_infer verify`, `run` and `bench`, and through `scripts/device_probe.py`: loaded, asked the golden",
    "questions by `run`, in buffers and in a `Pool`, closed, opened again, with nothing imported but the device half,",
    "numpy and the engine. torch is the build that pip chooses for the version, run on the processor.",
)
FLOORS = (
    "What is older than these or lies between them:",
    "",
    "* ai-edge-litert 1.0.1 fails under numpy 2, 1.1.0 opens nothing, 1.0.1 to 1.2.0 crash on `int8-dynamic` when the",
    "  batch grows, and 1.1.2 to 1.3.0 answer NaN in `float16` on a processor with AVX512-FP16.",
    "* ai-edge-litert 1.4.0 to 2.1.5 run all of these, but have no library whose weights can be kept: a large model is",
    "  repacked in private memory each time it is opened. Install 2.1.6 or later where that matters.",
    "* onnxruntime 1.14 runs all of these, but does not find again what it kept of a large model; 1.17 does.",
    "* onnxruntime 1.17 and tflite-runtime fail beside numpy 2; onnxruntime 1.19 does not.",
)


def merged(results: Sequence[Result]) -> list[dict[str, Any]]:
    """``results`` in place of those of the same rows in the docs, in the order of ROWS."""
    known = {row["row"]: row for row in json.loads(DATA.read_text())} if DATA.exists() else {}
    known |= {result.row: dataclasses.asdict(result) for result in results}
    return [known[row.name] for row in ROWS if row.name in known]


def page(results: Sequence[dict[str, Any]]) -> str:
    rows = {row.name: row for row in ROWS}
    lines = [
        "# Pythons, numpys, engines",
        "",
        *ABOUT,
        "",
        "| Python | engine | numpy | outcome | the large network, opened again | refused |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        row = rows[result["row"]]
        reason = f": {result['reason']}" if result["reason"] else ""
        refused = [precision_of(name) for name, text in result["bundles"].items() if text.startswith("refused")]
        lines.append(
            f"| {result['python'] or row.python} | {row.package} {row.engine} | {row.numpy} "
            f"| {result['outcome']}{reason} | {result['large'] or '-'} | {', '.join(refused) or '-'} |"
        )
    lines += ["", "Refused is what needs another engine than the row's, in these words:", ""]
    lines += [f"* {sentence}" for sentence in refusals(results)]
    lines += ["", *FLOORS]
    return "\n".join(lines) + "\n"


def precision_of(name: str) -> str:
    """``digits-tflite-int8-dynamic``: int8-dynamic."""
    return name.split("-", 2)[2]


def refusals(results: Sequence[dict[str, Any]]) -> list[str]:
    texts = [text for result in results for text in result["bundles"].values() if text.startswith("refused")]
    return sorted({text.removeprefix("refused: ") for text in texts})


def write_docs(results: Sequence[Result]) -> None:
    found = merged(results)
    DATA.write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text(page(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=[row.name for row in ROWS], metavar="NAME", help="only these")
    parser.add_argument("--list", action="store_true", help="print the rows' names")
    parser.add_argument("--python", nargs="+", type=Path, default=[], metavar="PATH", help="where Pythons are, too")
    parser.add_argument("--keep", action="store_true", help="leave the environments in build/matrix")
    parser.add_argument("--docs", action="store_true", help="write docs/matrix.*; with --rows, change those rows")
    args = parser.parse_args()
    if args.list:
        print("\n".join(row.name for row in ROWS))
        return
    os.chdir(ROOT)
    rows = [row for row in ROWS if not args.rows or row.name in args.rows]
    wheel, bundles = make_wheel(), make_bundles(sorted({FORMATS[row.package] for row in rows}))
    results = []
    for row in rows:
        result = run_row(row, wheel, bundles[FORMATS[row.package]], args.python, args.keep)
        print(f"{row.name}: {result.outcome}{': ' * bool(result.reason)}{result.reason}", flush=True)
        results.append(result)
        if args.docs:  # after each row: whoever is interrupted keeps what was found
            write_docs(results)
    counts = {
        outcome: sum(result.outcome == outcome for result in results) for outcome in ("passed", "failed", "not run")
    }
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    raise SystemExit(bool(counts["failed"]))


if __name__ == "__main__":
    main()
