"""From a source model to a float model in an engine's own form: one file a route.

Each route has ``convert(request)``, run in a child process: loads the source with its own framework, asks it the
probe inputs, converts it, and leaves in ``work`` what the builders of ``quantize`` start from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_infer import probe, worker
from edge_infer.convert.source import Source
from edge_infer.errors import ConversionError, EdgeInferError, UsageError
from edge_infer.manifest import TensorSpec

#: (framework of the source, format) -> the module of the route.
ROUTES = {
    ("tensorflow", "tflite"): "edge_infer.convert.tensorflow_to_tflite",
    ("torch", "torchscript"): "edge_infer.convert.torch_to_torchscript",
    ("torch", "onnx"): "edge_infer.convert.torch_to_onnx",
    ("onnx", "onnx"): "edge_infer.convert.onnx_to_onnx",
}

INPUTS_FILE, ANSWERS_FILE = "probe_inputs.npz", "probe_answers.npz"


@dataclass(frozen=True)
class ConvertOptions:
    """What a user may say about the source. ``inputs`` overrides names, dtypes and shapes of its inputs."""

    inputs: tuple[TensorSpec, ...] = ()
    factory: str | None = None
    signature: str | None = None
    trust_pickle: bool = False
    calibration: Path | None = None


@dataclass(frozen=True)
class Converted:
    """A float model in ``work``: the source's contract, the probe inputs and the source's own answers to them."""

    work: Path
    format: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    details: dict[str, Any]

    def probe_inputs(self) -> list[probe.Feed]:
        return probe.load_feeds(self.work / INPUTS_FILE)

    def source_answers(self) -> list[probe.Feed]:
        return probe.load_feeds(self.work / ANSWERS_FILE)


def formats_for(source: Source) -> list[str]:
    """Formats that a route leads to."""
    return [format for family, format in ROUTES if family == source.family]


def convert(source: Source, format: str, options: ConvertOptions, work: Path, log: Path) -> Converted:
    """Run the route from ``source`` to ``format`` in a child. Raises UsageError, ConversionError."""
    module = ROUTES.get((source.family, format))
    if module is None:
        known = " or ".join(formats_for(source))
        raise ConversionError(f"there is no way from {source.kind} models to {format}; choose --format {known}")
    work.mkdir(parents=True, exist_ok=True)
    request = {
        "source": str(source.path),
        "kind": source.kind,
        "work": str(work),
        "inputs": [spec_to_json(spec) for spec in options.inputs],
        "factory": options.factory,
        "signature": options.signature,
        "trust_pickle": options.trust_pickle,
        "calibration": str(options.calibration) if options.calibration else None,
    }
    answer = worker.run(f"{module}:convert", request, log)
    return Converted(
        work,
        format,
        tuple(map(spec_from_json, answer["inputs"])),
        tuple(map(spec_from_json, answer["outputs"])),
        answer["details"],
    )


def ask_source(
    request: dict[str, Any], inputs: list[TensorSpec], run: Callable[[probe.Feed], probe.Feed]
) -> tuple[list[probe.Feed], dict[str, Any]]:
    """Make the probe inputs, let ``run(feed)`` answer them with the source framework, keep both in ``work``.

    Used by the routes, inside their child. The outputs are in the order in which ``run`` gives them. Gives the feeds
    and the answer the route returns.
    """
    if not inputs:
        raise ConversionError("the model has no inputs, so it always answers the same; there is nothing to package")
    calibration = Path(request["calibration"]) if request["calibration"] else None
    feeds = probe.make_feeds(inputs, calibration)
    answers = [_ask(feed, run) for feed in feeds]
    if not answers[0]:
        raise ConversionError("the model returns no tensors, expected at least one output")
    for factor in probe.STRETCHES:
        more = probe.stretched(inputs, feeds, factor)
        with contextlib.suppress(ConversionError):  # a model may have a longest or a shortest input
            answers += [_ask(feed, run) for feed in more]
            feeds += more
            break
    probe.save_feeds(Path(request["work"]) / INPUTS_FILE, feeds)
    probe.save_feeds(Path(request["work"]) / ANSWERS_FILE, answers)
    outputs = probe.observed_specs(list(answers[0]), answers)
    return feeds, {
        "inputs": [spec_to_json(spec) for spec in inputs],
        "outputs": [spec_to_json(spec) for spec in outputs],
    }


def _ask(feed: probe.Feed, run: Callable[[probe.Feed], probe.Feed]) -> probe.Feed:
    try:
        answer: probe.Feed = run(feed)
    except EdgeInferError:
        raise
    except Exception as error:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in feed.items())
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ConversionError(
            f"the source model itself fails on inputs {shapes}: {lines[0][:300]}; "
            "give the shapes it takes with --input NAME=DTYPE:D0,D1"
        ) from error
    return answer


def override(inputs: list[TensorSpec], given: list[TensorSpec]) -> list[TensorSpec]:
    """The source's inputs with the shapes that the user gave; a name or dtype it does not have is refused."""
    known = {spec.name: spec for spec in inputs}
    for spec in given:
        if spec.name not in known:
            raise UsageError(f"--input names {spec.name!r}, the model's inputs are: {', '.join(sorted(known))}")
        have = known[spec.name]
        fits = len(spec.shape) == len(have.shape) and all(
            size is None or size == want for size, want in zip(have.shape, spec.shape, strict=True)
        )
        if spec.dtype != have.dtype or not fits:
            raise UsageError(f"--input gives {spec}, which the model's own {have} does not admit")
    return [next((spec for spec in given if spec.name == have.name), have) for have in inputs]


def spec_to_json(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)}


def spec_from_json(row: dict[str, Any]) -> TensorSpec:
    return TensorSpec(row["name"], row["dtype"], tuple(row["shape"]))
