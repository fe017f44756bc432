"""``edge-infer package``: a trained model becomes a bundle for a target."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any

from edge_infer.cli import console
from edge_infer.errors import ConversionError, UsageError
from edge_infer.manifest import DTYPES, FORMATS, PRECISIONS, TensorSpec


def add_command(commands: Any) -> None:
    parser = commands.add_parser("package", help="turn a trained model into a bundle for a target")
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="SavedModel directory, .keras, .h5, .pth, TorchScript, .pt2 or .onnx",
    )
    parser.add_argument("--target", required=True, metavar="NAME|FILE.toml", help="see `edge-infer targets`")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="BUNDLE", help="the bundle to write")
    parser.add_argument("--format", choices=("auto", *FORMATS), default="auto")
    parser.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto")
    parser.add_argument("--calibration", type=Path, metavar="FILE.npz", help="real samples, one array an input")
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="NAME=DTYPE:D0,D1,...",
        help="an input of the source; ? for a dynamic dimension, no dimensions for a scalar; repeat for each",
    )
    parser.add_argument("--factory", metavar="module:callable", help="builds the network of a PyTorch state dict")
    parser.add_argument("--signature", metavar="NAME", help="which signature of a SavedModel")
    parser.add_argument("--trust-pickle", action="store_true", help="open a pickled PyTorch module, running its code")
    parser.add_argument("--name", help="the model's name on devices (default: from the bundle's)")
    parser.add_argument("--model-version", "--version", dest="model_version", default="1", metavar="V")
    parser.add_argument("--attach", action="append", default=[], type=Path, metavar="FILE", help="a file to go along")
    parser.add_argument("-v", "--verbose", action="store_true", help="show the converters' own output")
    parser.add_argument("--json", action="store_true", help="the result for programs, on one line")
    parser.set_defaults(call=call, show=show)


def call(args: argparse.Namespace) -> dict[str, Any]:
    from edge_infer.package import Request, package

    # A factory module may lie where the command is run.
    sys.path.insert(0, str(Path.cwd()))
    request = Request(
        source=args.source,
        target=args.target,
        output=args.output,
        format=args.format,
        precision=args.precision,
        calibration=args.calibration,
        inputs=tuple(parse_input(text) for text in args.input),
        factory=args.factory,
        signature=args.signature,
        trust_pickle=args.trust_pickle,
        name=args.name,
        version=args.model_version,
        attach=tuple(args.attach),
    )
    with (
        tempfile.NamedTemporaryFile(prefix="edge-infer-", suffix=".log") as log,
        _shown_log(Path(log.name), args.verbose),
        console.progress_line() as progress,
    ):
        packaged = package(request, progress, Path(log.name))
    manifest = packaged.bundle.manifest
    return {
        "bundle": str(packaged.bundle.path),
        "name": manifest.name,
        "digest": packaged.bundle.digest,
        "target": manifest.target.name,
        "blind": list(manifest.golden.blind),
        "chosen": _row(packaged.chosen),
        "dropped": [_row(candidate) for candidate in packaged.dropped],
    }


@contextlib.contextmanager
def _shown_log(log: Path, verbose: bool) -> Any:
    """Converters' output on standard error: all of it with -v, otherwise its end when a failure says nothing else."""
    try:
        yield
    except ConversionError as error:
        if error.log and not verbose:
            print(error.log[-4000:], file=sys.stderr)
        raise
    finally:
        if verbose:
            print(log.read_text("utf-8", "replace"), file=sys.stderr)


def _row(candidate: Any) -> dict[str, Any]:
    return {
        "format": candidate.format,
        "precision": candidate.precision,
        "size": candidate.size,
        "checks": [dataclasses.asdict(check) for check in candidate.checks],
        "measured_here": candidate.measured,
        "dropped_because": str(candidate.error) if candidate.error else None,
    }


def show(answer: dict[str, Any]) -> None:
    chosen = answer["chosen"]
    measured = chosen["measured_here"]
    for row in answer["dropped"]:
        print(f"dropped {row['format']} {row['precision']}: {row['dropped_because']}")
    print(f"{answer['bundle']}: {answer['name']} for {answer['target']}, {chosen['format']} {chosen['precision']}")
    console.print_table(
        ["check", "output", "observed>", "allowed>", "unit"],
        [
            [check["what"], check["output"], f"{check['observed']:.3g}", f"{check['allowed']:.3g}", check["unit"]]
            for check in chosen["checks"]
        ],
    )
    print(
        f"size {console.size(chosen['size'])}; measured on this machine: load {measured['load_ms']:.1f} ms, "
        f"latency {measured['p50_ms']:.3f} ms, private memory {console.size(measured['private_bytes'])}"
    )
    for name in answer["blind"]:
        print(
            f"note: the self-test is blind for output {name!r}: it hardly changes between the golden inputs; "
            "give real samples with --calibration, or see whether the model ignores its input"
        )


def parse_input(text: str) -> TensorSpec:
    """``NAME=DTYPE:D0,D1,...``; no dimensions for a scalar, ``?`` for a dynamic one. Raises UsageError."""
    name, equals, rest = text.rpartition("=")
    dtype, _, dims = rest.partition(":")
    if not equals or not name or dtype not in DTYPES:
        raise UsageError(f"--input {text!r}, expected NAME=DTYPE:D0,D1,... with a dtype of {', '.join(DTYPES)}")
    shape: list[int | None] = []
    for size in dims.split(",") if dims else []:
        if size.strip() == "?":
            shape.append(None)
        elif size.strip().isdecimal() and int(size) > 0:
            shape.append(int(size))
        else:
            raise UsageError(f"--input {text!r}: dimension {size!r}, expected a whole number of at least 1 or ?")
    return TensorSpec(name, dtype, tuple(shape))
