"""``edge-infer package``: a trained model becomes the bundle that fits a target best."""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from edge_infer.cli import console
from edge_infer.cli.devices import add_ssh_options, ssh_options
from edge_infer.cli.options import byte_count, milliseconds, parse_input, share
from edge_infer.cli.postprocess import parse_postprocess
from edge_infer.cli.preprocess import parse_preprocess
from edge_infer.errors import ConversionError, LimitError
from edge_infer.manifest import FORMATS, PRECISIONS
from edge_infer.report import text


def add_command(commands: Any) -> None:
    parser = commands.add_parser("package", help="turn a trained model into the bundle that fits a target best")
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="SavedModel directory, .keras, .h5, .pth, .safetensors, TorchScript, .pt2, .onnx or .tflite",
    )
    parser.add_argument("--target", required=True, metavar="NAME|FILE.toml", help="see `edge-infer targets`")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="BUNDLE", help="the bundle to write")
    _add_source_options(parser.add_argument_group("the source"))
    _add_data_options(parser.add_argument_group("data"))
    _add_search_options(parser.add_argument_group("the search"))
    _add_limit_options(parser.add_argument_group("limits, beside those of the target"))
    _add_device_options(parser.add_argument_group("measuring on a device"))
    parser.add_argument("--name", help="the model's name on devices (default: from the bundle's)")
    parser.add_argument("--model-version", "--version", dest="model_version", default="1", metavar="V")
    parser.add_argument("--attach", action="append", default=[], type=Path, metavar="FILE", help="a file to go along")
    parser.add_argument("--no-cache", action="store_true", help="make everything anew and keep nothing for next time")
    parser.add_argument("-v", "--verbose", action="store_true", help="show the converters' own output")
    parser.add_argument("--json", action="store_true", help="the result for programs, on one line")
    parser.set_defaults(call=call, show=show)


def _add_source_options(group: Any) -> None:
    group.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="NAME=DTYPE:D0,D1,...",
        help="an input of the source; ? for a dynamic dimension, no dimensions for a scalar; repeat for each",
    )
    group.add_argument("--factory", metavar="module:callable", help="builds the network of a PyTorch state dict")
    group.add_argument("--signature", metavar="NAME", help="which signature of a SavedModel or TFLite model")
    group.add_argument("--trust-pickle", action="store_true", help="open a pickled PyTorch module, running its code")
    group.add_argument(
        "--preprocess",
        action="append",
        default=[],
        metavar="[INPUT:]resize=256,crop=224,...",
        help="how an image becomes the input; kept in the bundle",
    )
    group.add_argument(
        "--postprocess",
        metavar="classes:...|boxes:...",
        help="what `predict` makes of the answers, such as classes:activation=softmax,top=3,labels=labels.txt",
    )


def _add_data_options(group: Any) -> None:
    group.add_argument(
        "--calibration",
        metavar="DATA",
        help="real samples: an .npz (one array an input), a folder of .npy or of images, module:callable; or `random`",
    )
    group.add_argument("--ranges", default="minmax", metavar="HOW", help="minmax (default), percentile or entropy")
    group.add_argument("--evaluate", metavar="DATA", help="samples to judge by, with labels for --metric")
    group.add_argument(
        "--metric",
        default="agreement",
        help="top1, top5, mae, rmse, auc, module:callable; default: agreement with the source, which needs no labels "
        "(by the kind of output agreement-top1, agreement-equal, agreement-sqnr-db; or name one)",
    )
    group.add_argument(
        "--scored", metavar="OUTPUT", help="the output that the metric is about, where there are several"
    )


def _add_search_options(group: Any) -> None:
    group.add_argument("--format", choices=("auto", *FORMATS), default="auto")
    group.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto")
    group.add_argument(
        "--prefer", default="target", metavar="WHAT", help="target (its own order), size, latency, accuracy"
    )
    group.add_argument("--prune", default="0", metavar="SHARE", help="set this share of the weights to zero, as 50%%")
    group.add_argument("--prune-scope", default="global", metavar="SCOPE", help="global (default) or layer")


def _add_limit_options(group: Any) -> None:
    group.add_argument("--max-size", metavar="SIZE", help="of all files of the bundle, such as 500KB")
    group.add_argument("--max-ram", metavar="SIZE", help="peak memory of a process that runs it, engine included")
    group.add_argument("--max-latency", metavar="TIME", help="median of one run, such as 20ms")
    group.add_argument("--max-load-time", metavar="TIME", help="opening the bundle, such as 100ms")
    group.add_argument("--min-accuracy", metavar="FIGURE", help="in the metric's unit (for errors: the most allowed)")
    group.add_argument("--max-accuracy-drop", metavar="SHARE", help="of the source's own figure, such as 1%%")


def _add_device_options(group: Any) -> None:
    group.add_argument("--on", metavar="DEVICE", help="measure the candidates there: local:PATH, user@host or an alias")
    group.add_argument("--python", help="the device's Python with edge-infer and an engine")
    group.add_argument(
        "--self-test-timeout", type=float, metavar="SECONDS", help="for each self-test and timing there (default: 120)"
    )
    add_ssh_options(group)


def call(args: argparse.Namespace) -> dict[str, Any]:
    from edge_infer.package import package

    # A factory module may lie where the command is run.
    sys.path.insert(0, str(Path.cwd()))
    request = _request(args)
    with (
        tempfile.NamedTemporaryFile(prefix="edge-infer-", suffix=".log") as log,
        _explained(Path(log.name), args.verbose),
        console.progress_line() as progress,
    ):
        packaged = package(request, progress, Path(log.name))
    return {
        "bundle": str(packaged.bundle.path),
        "name": packaged.bundle.manifest.name,
        "digest": packaged.bundle.digest,
        "report": str(packaged.report),
        "blind": list(packaged.bundle.manifest.golden.blind),
        **packaged.record,
    }


def _request(args: argparse.Namespace) -> Any:
    from edge_infer.request import Request

    postprocess, files = parse_postprocess(args.postprocess) if args.postprocess else (None, ())
    return Request(
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
        attach=(*args.attach, *(path for path in files if path not in args.attach)),
        postprocess=postprocess,
        preprocess=tuple(parse_preprocess(text) for text in args.preprocess),
        evaluation=args.evaluate,
        metric=args.metric,
        scored=args.scored,
        ranges=args.ranges,
        max_size=None if args.max_size is None else byte_count(args.max_size),
        max_ram=None if args.max_ram is None else byte_count(args.max_ram),
        max_latency=None if args.max_latency is None else milliseconds(args.max_latency),
        max_load_time=None if args.max_load_time is None else milliseconds(args.max_load_time),
        min_score=None if args.min_accuracy is None else share(args.min_accuracy),
        max_drop=None if args.max_accuracy_drop is None else share(args.max_accuracy_drop),
        prefer=args.prefer,
        sparsity=share(args.prune),
        prune_scope=args.prune_scope,
        device=args.on,
        python=args.python,
        self_test_timeout=args.self_test_timeout,
        ssh_options=ssh_options(args),
        cache=not args.no_cache,
    )


@contextlib.contextmanager
def _explained(log: Path, verbose: bool) -> Any:
    """On standard error: the converters' output (with -v, or its end when a failure says nothing else), and the
    candidates when none of them fits."""
    try:
        yield
    except ConversionError as error:
        if error.log and not verbose:
            print(error.log[-4000:], file=sys.stderr)
        raise
    except LimitError as error:
        if error.record is not None:
            _print_candidates(error.record, sys.stderr)
        raise
    finally:
        if verbose:
            print(log.read_text("utf-8", "replace"), file=sys.stderr)


def show(answer: dict[str, Any]) -> None:
    _print_candidates(answer, sys.stdout)
    print(f"{answer['bundle']}: {text.summary(answer)}")
    for row in answer["candidates"]:
        if row["status"] == "chosen" and row["kept_float"]:
            layers = row["kept_float"]["layers"]
            print(f"in float: {', '.join(layers)}; {row['kept_float']['share_of_weights']:.1%} of the weights")
    for name in answer["blind"]:
        print(
            f"note: the self-test is blind for output {name!r}: it hardly changes between the golden inputs; "
            "give real samples with --calibration, or see whether the model ignores its input"
        )
    print(f"report: {answer['report']}")


def _print_candidates(record: Mapping[str, Any], file: TextIO) -> None:
    console.print_table(*text.table(record), file=file)
    print(*text.notes(record), "", sep="\n", file=file)
