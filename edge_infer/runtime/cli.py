"""The device's command line: parse, call one function, print. The host's command line offers the same verbs."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge_infer import __version__
from edge_infer.admission import describe
from edge_infer.errors import EXIT_DONE, EXIT_UNEXPECTED, EdgeInferError, UsageError


def add_commands(commands: Any, info_name: str = "info") -> None:
    """Add the verbs on one bundle to an argument parser's subcommands."""
    info = commands.add_parser(info_name, help="what a bundle is: inputs, outputs, engine, files")
    info.set_defaults(call=lambda args: _commands().info(args.bundle))
    verify = commands.add_parser("verify", help="hash every file, then ask the golden questions")
    verify.set_defaults(call=lambda args: _commands().verify(args.bundle))
    run = commands.add_parser("run", help="run once")
    run.add_argument("--input", type=Path, metavar="FILE.npz", help="arrays by input name (default: a golden case)")
    run.add_argument("--output", type=Path, metavar="FILE.npz", help="where to store the answers")
    run.set_defaults(call=lambda args: _commands().run(args.bundle, args.input, args.output, args.max_memory))
    predict = commands.add_parser("predict", help="an image becomes classes or boxes, as the bundle says")
    predict.set_defaults(call=lambda args: _commands().predict(args.bundle, args.image))
    bench = commands.add_parser("bench", help="load time, latency and memory on this machine")
    bench.add_argument(
        "--threads", type=positive, help="threads of the engine (default: as tuned, else the usable cores)"
    )
    bench.add_argument("--runs", type=positive, default=200, help="runs at most")
    bench.add_argument("--seconds", type=float, default=2.0, help="it also ends after so long")
    bench.add_argument("--spinning", action="store_true", default=None, help="let ONNX Runtime's idle threads spin")
    bench.add_argument(
        "--profile", type=Path, nargs="?", const=True, metavar="FILE.json",
        help="which operators the time goes to as well, and a Chrome trace of them in FILE.json",
    )  # fmt: skip
    bench.add_argument(
        "--throughput", action="store_true",
        help="answers a second of a Pool instead: by its sessions, the threads of each, the size of a batch",
    )  # fmt: skip
    bench.add_argument("--setting", help=argparse.SUPPRESS)  # how tune and --throughput ask their children
    bench.add_argument("--pool", type=positive, nargs=3, help=argparse.SUPPRESS)
    bench.set_defaults(call=_bench)
    for parser in (run, bench):
        parser.add_argument(
            "--max-memory", type=positive, metavar="BYTES", help="private memory that opening and one run may add"
        )
    tune = commands.add_parser("tune", help="find how a model runs fastest on this machine, and keep that")
    tune.add_argument("--max-memory", type=positive, metavar="BYTES", help="of the process, mapped files included")
    tune.add_argument("--by", choices=("p95", "p50"), help="what counts: slow runs (default) or the median")
    tune.add_argument("--throughput", action="store_true", help="how a Pool gives the most answers a second instead")
    tune.set_defaults(call=_tune)
    for parser in (info, verify, run, predict, bench, tune):
        parser.add_argument("bundle", help="a bundle's path, or the name of a model in this device's store")
        parser.add_argument("--json", action="store_true", help="the same facts for programs, on one line")
        parser.set_defaults(show=print_plain)
    for parser in (bench, tune):
        parser.set_defaults(show=_print_bench)
    predict.add_argument("image", type=Path, help="an image file, which Pillow reads")
    predict.set_defaults(show=_print_predictions)


def _bench(args: argparse.Namespace) -> Any:
    from edge_infer.runtime.plan import PoolSetting, Setting

    if args.pool:
        return _commands().throughput_of(args.bundle, PoolSetting(*args.pool), args.seconds)
    if args.throughput:
        _require_alone(args, "threads", "spinning", "profile", "max_memory")
        return _commands().throughput(args.bundle, progress=_progress)
    trace = args.profile if isinstance(args.profile, Path) else None
    setting = Setting.from_row(json.loads(args.setting)) if args.setting else None
    return _commands().bench(
        args.bundle,
        args.threads,
        args.runs,
        args.seconds,
        args.spinning,
        profile=bool(args.profile),
        trace=trace,
        setting=setting,
        max_memory=args.max_memory,
    )


def _tune(args: argparse.Namespace) -> Any:
    if args.throughput:
        _require_alone(args, "max_memory", "by")
        return _commands().throughput(args.bundle, keep=True, progress=_progress)
    return _commands().tune(args.bundle, args.max_memory, args.by or "p95", _progress)


def _require_alone(args: argparse.Namespace, *names: str) -> None:
    """Raise UsageError for an option that --throughput would not heed: it tries its own settings."""
    for name in names:
        if getattr(args, name) is not None:
            raise UsageError(f"--throughput tries its own settings, expected no --{name.replace('_', '-')} beside it")


def _print_bench(answer: dict[str, Any]) -> None:
    tables = {name: answer.pop(name) for name in ("profile", "throughput") if name in answer}
    print_plain(answer)
    if "profile" in tables:
        from edge_infer.runtime.profile import table

        print("\n".join(["", *table(tables["profile"])]))
    if "throughput" in tables:
        _print_throughput(tables["throughput"])


def _print_throughput(rows: list[dict[str, Any]]) -> None:
    print(f"\n{'sessions':>8}  {'threads':>7}  {'batch':>5}  {'answers/s':>9}  {'p50 ms':>7}  {'peak MB':>7}")
    for row in rows:
        print(
            f"{row['sessions']:8}  {row['threads']:7}  {row['batch']:5}  {row['per_second']:9.4g}  "
            f"{row['p50_ms']:7.3g}  {row['peak_bytes'] / 1e6:7.3g}"
        )


def _print_predictions(answer: dict[str, Any]) -> None:
    """One line a class or box, best first."""
    if "outputs" in answer:
        print_plain(answer["outputs"])
    for row in answer.get("predictions", ()):
        name = row["label"] if row["label"] is not None else row["index"]
        sides = [f"{side} {row[side]:.1f}" for side in ("left", "top", "right", "bottom") if side in row]
        print("  ".join([f"{row['score']:.4f}", str(name), *sides]))


def _progress(step: str) -> None:
    print(f"  {step}", file=sys.stderr, flush=True)


def _commands() -> Any:
    from edge_infer.runtime import commands  # numpy comes with it, so not before a command needs it

    return commands


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("expected a whole number of at least 1")
    return value


def print_plain(answer: dict[str, Any], indent: str = "") -> None:
    """One line a fact; nested facts indented."""
    width = max((len(key) for key in answer), default=0)
    for key, value in answer.items():
        if isinstance(value, dict):
            print(f"{indent}{key}")
            print_plain(value, indent + "  ")
        elif isinstance(value, (list, tuple)):
            if any(" " in str(item) for item in value[1:]):  # sentences: one a line
                print("\n".join([f"{indent}{key}", *(f"{indent}  {item}" for item in value)]))
            else:
                print(f"{indent}{key:<{width}}  {', '.join(map(str, value)) or '-'}")
        else:
            shown = "-" if value is None else f"{value:.4g}" if isinstance(value, float) else value
            print(f"{indent}{key:<{width}}  {shown}")


def report(args: argparse.Namespace) -> int:
    """Call the parsed command and print its answer or its error; gives the exit status."""
    try:
        answer = args.call(args)
        if args.json:
            print(json.dumps(answer))
        else:
            args.show(answer)
        sys.stdout.flush()
        return int(answer.get("exit_status", EXIT_DONE)) if isinstance(answer, dict) else EXIT_DONE
    except EdgeInferError as error:
        return _fail(args, error, error.exit_status)
    except BrokenPipeError:  # whoever reads this has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_UNEXPECTED
    except (MemoryError, OSError) as error:
        return _fail(args, error, EXIT_UNEXPECTED)


def _fail(args: argparse.Namespace, error: BaseException, status: int) -> int:
    if args.json:
        print(json.dumps({"error": {**describe(error), "exit_status": status}}))
    print(f"{args.program}: {error or type(error).__name__}", file=sys.stderr)
    return status


def _prepare(args: argparse.Namespace) -> Any:
    _commands().memory.be_killed_first()
    return _commands().prepare(args.bundle, args.folder, args.provider, args.prepack)


def _confirm(args: argparse.Namespace) -> Any:
    from edge_infer.runtime.confirmation import confirm

    return {"name": args.name, "digest": confirm(args.name)}


def _selftest(args: argparse.Namespace) -> Any:
    _commands().memory.be_killed_first()
    return _commands().selftest(args.bundle, args.max_memory)


def main(argv: Sequence[str] | None = None) -> int:
    program = "python -m edge_infer"
    parser = argparse.ArgumentParser(prog=program, description="Look at, verify, run and time model bundles.")
    parser.add_argument("--version", action="version", version=__version__)
    parser.set_defaults(program=program)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_commands(commands)
    selftest = commands.add_parser("selftest", help="open with this device's engine and ask the golden questions")
    selftest.add_argument("bundle", type=Path)
    selftest.add_argument("--json", action="store_true")
    selftest.add_argument("--max-memory", type=positive, metavar="BYTES", help="private memory, Python's own included")
    selftest.set_defaults(call=_selftest, show=print_plain)
    confirm = commands.add_parser("confirm", help="keep the release of a model that a push put on trial")
    confirm.add_argument("name", help="of a model in this device's store")
    confirm.add_argument("--json", action="store_true")
    confirm.set_defaults(call=_confirm, show=lambda answer: print(f"{answer['name']} stays {answer['digest'][:12]}"))
    prepare = commands.add_parser("prepare", help="make what the engine maps from then on (`load` does it by itself)")
    prepare.add_argument("bundle", type=Path)
    prepare.add_argument("folder", type=Path)
    prepare.add_argument("--json", action="store_true")
    prepare.add_argument("--prepack", action=argparse.BooleanOptionalAction, help="not as the bundle says")
    prepare.add_argument("--provider", choices=("tensorrt",), help="make what this one keeps (default: the processor)")
    prepare.set_defaults(call=_prepare, show=print_plain)
    return report(parser.parse_args(argv))
