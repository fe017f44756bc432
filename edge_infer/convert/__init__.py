"""From a source model to a float model in an engine's own form: a graph of small conversions.

A *reader* opens the source with its own framework, asks it the probe inputs and leaves it in a *form*; *steps* lead
from form to form; the forms ``tflite``, ``onnx`` and ``torchscript`` are those that engines run. Each reader and each
step is one file here, and its function runs in a child process.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_infer import probe
from edge_infer.convert.source import Source, hash_files
from edge_infer.errors import ConversionError, EdgeInferError, UsageError
from edge_infer.manifest import Preprocessing, TensorSpec, canonical_json, optional, struct, to_json
from edge_infer.samples import Samples, with_preprocessing
from edge_infer.steps import Made, Steps

#: Family of the source -> the module of its reader, and the form that it leaves the model in.
READERS = {
    "tensorflow": ("edge_infer.convert.read_tensorflow", "saved-model"),
    "torch": ("edge_infer.convert.read_torch", "torch"),
    "onnx": ("edge_infer.convert.read_onnx", "onnx"),
    "tflite": ("edge_infer.convert.read_tflite", "tflite"),
}
#: (form, form) -> the modules that convert, in the order in which they are tried.
STEPS = {
    ("saved-model", "tflite"): ("edge_infer.convert.saved_model_to_tflite",),
    ("saved-model", "onnx"): ("edge_infer.convert.saved_model_to_onnx",),
    ("torch", "tflite"): ("edge_infer.convert.torch_to_tflite",),
    ("torch", "onnx"): (
        "edge_infer.convert.torch_to_onnx",
        "edge_infer.convert.torch_to_onnx_legacy",
        "edge_infer.convert.torch_to_onnx_program",
    ),
    ("torch", "torchscript"): ("edge_infer.convert.torch_to_torchscript",),
    ("onnx", "tflite"): ("edge_infer.convert.onnx_to_tflite",),
    ("onnx", "torchscript"): ("edge_infer.convert.onnx_to_torchscript",),
    ("torchscript", "tflite"): ("edge_infer.convert.torchscript_to_tflite",),
    ("tflite", "onnx"): ("edge_infer.convert.tflite_to_onnx",),
}
#: Longer ways add nothing but rounding and time; a SavedModel's LSTM needs this many.
MOST_STEPS = 3

#: The options that samples come with, for messages.
WHAT = {"calibration": "calibration", "evaluation": "evaluate"}

INPUTS_FILE, ANSWERS_FILE, EXAMPLES_FILE, SAMPLE_ANSWERS_FILE = (
    "probe_inputs.npz",
    "probe_answers.npz",
    "examples.npz",
    "sample_answers.npz",
)


@dataclass(frozen=True)
class ReadOptions:
    """What a user may say about the source and its data.

    ``inputs`` overrides names, dtypes and shapes of its inputs. ``calibration`` and ``evaluation`` are sources of
    samples as ``edge_infer.samples`` takes them; the latter with labels.
    """

    inputs: tuple[TensorSpec, ...] = ()
    preprocess: tuple[tuple[str | None, Preprocessing], ...] = ()
    factory: str | None = None
    signature: str | None = None
    trust_pickle: bool = False
    calibration: str | None = None
    evaluation: str | None = None
    labels: bool = False


@dataclass(frozen=True)
class Read:
    """A source that was opened and asked: its contract, the probe inputs and its own answers to them.

    ``identity`` is what stands for its files in the keys of later steps.
    """

    source: Source
    form: str
    made: Made
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    identity: dict[str, str]

    @property
    def precision(self) -> str:
        """What the source is in already; only a file of an engine's own format is not in float32."""
        return str(self.made.answer["details"].get("precision", "float32"))

    def probe_inputs(self) -> list[probe.Feed]:
        return probe.load_feeds(self.made.folder / INPUTS_FILE)

    def answers(self) -> list[probe.Feed]:
        return probe.load_feeds(self.made.folder / ANSWERS_FILE)

    def samples(self, kind: str) -> Samples | None:
        """``calibration`` or ``evaluation`` data; None where there is none."""
        if self.made.answer["samples"][kind] is None:
            return None
        return Samples(self.made.folder / kind, self.inputs)


@dataclass(frozen=True)
class Converted:
    """A float model in the form of an engine, and the forms that it went through."""

    format: str
    details: dict[str, Any]
    way: tuple[str, ...]
    tools: dict[str, str]
    identity: dict[str, str]


@dataclass(frozen=True)
class Way:
    """Modules to run one after the other, and the forms between them: one more."""

    modules: tuple[str, ...]
    forms: tuple[str, ...]

    def __str__(self) -> str:
        return " -> ".join(self.forms)


def ways(form: str, format: str) -> list[Way]:
    """Every way from a form to an engine's format, the shortest first; none visits a form twice."""
    found: list[Way] = []
    reached = [Way((), (form,))]
    while reached:
        found += [way for way in reached if way.forms[-1] == format]
        reached = [
            Way((*way.modules, module), (*way.forms, there))
            for way in reached
            if way.forms[-1] != format and len(way.modules) < MOST_STEPS
            for (here, there), modules in STEPS.items()
            if here == way.forms[-1] and there not in way.forms
            for module in modules
        ]
    return found


def formats_for(source: Source) -> list[str]:
    """Formats that a way leads to, those with the shortest way first."""
    form = READERS[source.family][1]
    reachable = {format: ways(form, format) for format in ("tflite", "onnx", "torchscript")}
    return sorted((name for name, found in reachable.items() if found), key=lambda n: len(reachable[n][0].modules))


def read(source: Source, options: ReadOptions, steps: Steps) -> Read:
    """Open the source and ask it, in a child. Raises UsageError, ConversionError."""
    module, form = READERS[source.family]
    said = {
        "source": str(source.path),
        "kind": source.kind,
        "inputs": [spec_to_json(spec) for spec in options.inputs],
        "factory": options.factory,
        "signature": options.signature,
        "trust_pickle": options.trust_pickle,
    }
    request = {
        **said,
        "preprocess": [[name, to_json(row)] for name, row in options.preprocess],
        "calibration": options.calibration,
        "evaluation": options.evaluation,
        "labels": options.labels,
    }
    identity = {str(source.path): source.sha256, **_identity_of_data(options)}
    made = steps.run(f"{module}:read", request, f"reading {source.path.name}", identity)
    answer = made.answer
    # What later steps start from depends on the source and on what was said about it, but not on the samples.
    own = {
        "said": {**said, "source": source.sha256},
        "code": answer["depends_on"],
        "examples": answer["examples_sha256"],
    }
    key = hashlib.sha256(canonical_json(own)).hexdigest()
    return Read(
        source,
        form,
        made,
        tuple(map(spec_from_json, answer["inputs"])),
        tuple(map(spec_from_json, answer["outputs"])),
        {str(source.path): source.sha256, str(made.folder): key},
    )


def _identity_of_data(options: ReadOptions) -> dict[str, str]:
    """Files of samples by what they hold; code that gives samples is known once it was imported."""
    named = [Path(item) for item in (options.calibration, options.evaluation) if item]
    return {str(path): hash_files(path) for path in named if path.exists()}


def convert(model: Read, way: Way, steps: Steps) -> Converted:
    """Go a way, each step in a child. Raises ConversionError."""
    details, tools = model.made.answer["details"], dict(model.made.answer["tools"])
    identity = dict(model.identity)
    for module, here, there in zip(way.modules, way.forms, way.forms[1:], strict=False):
        request = {
            "from": details,
            "inputs": [spec_to_json(spec) for spec in model.inputs],
            "outputs": [spec_to_json(spec) for spec in model.outputs],
            "feeds": str(model.made.folder / EXAMPLES_FILE),
        }
        made = steps.run(f"{module}:convert", request, f"converting {here} to {there}", identity)
        details, tools = made.answer["details"], {**tools, **made.answer["tools"]}
    return Converted(way.forms[-1], details, way.forms, tools, identity)


def ask_source(
    request: dict[str, Any], inputs: list[TensorSpec], run: Callable[[probe.Feed], probe.Feed]
) -> dict[str, Any]:
    """Gather the samples, make the probe inputs, and let ``run(feed)`` answer both with the source framework.

    Used by the readers, inside their child. The outputs are in the order in which ``run`` gives them. Gives the
    part of the reader's answer that all readers share; the reader adds ``details`` and ``tools``.
    """
    if not inputs:
        raise ConversionError("the model has no inputs, so it always answers the same; there is nothing to package")
    folder = Path(request["out"])
    said = [(name, struct(Preprocessing)(row, "preprocessing")) for name, row in request["preprocess"]]
    inputs = list(with_preprocessing(inputs, said))
    gathered, spooled, depends_on = _gather(request, inputs, folder)
    calibration = gathered["calibration"] or gathered["evaluation"]
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
    probe.save_feeds(folder / INPUTS_FILE, feeds)
    probe.save_feeds(folder / ANSWERS_FILE, answers)
    probe.save_feeds(folder / EXAMPLES_FILE, probe.examples(inputs, feeds))
    judged = gathered["evaluation"] or gathered["calibration"]
    if judged is not None:
        probe.save_feeds(folder / SAMPLE_ANSWERS_FILE, (_ask(feed, run) for feed in judged.feeds()))
    outputs = probe.observed_specs(list(answers[0]), answers)
    return {
        "inputs": [spec_to_json(spec) for spec in inputs],
        "outputs": [spec_to_json(spec) for spec in outputs],
        "samples": spooled,
        "examples_sha256": hashlib.sha256((folder / EXAMPLES_FILE).read_bytes()).hexdigest(),
        "depends_on": depends_on,
    }


def _gather(
    request: dict[str, Any], inputs: Sequence[TensorSpec], folder: Path
) -> tuple[dict[str, Samples | None], dict[str, Any], dict[str, str]]:
    """Calibration and evaluation data in the reader's folder, what is known of them, and the user's code so far."""
    from edge_infer import samples, user_code

    found: dict[str, Samples | None] = {"calibration": None, "evaluation": None}
    spooled: dict[str, Any] = dict.fromkeys(found)
    for kind in found:
        if request[kind] is None:
            continue
        (folder / kind).mkdir()
        spooled[kind] = samples.spool(
            {
                "source": request[kind],
                "inputs": [spec_to_json(spec) for spec in inputs],
                "labels": kind == "evaluation" and request["labels"],
                "out": str(folder / kind),
                "what": WHAT[kind],
            }
        )
        if kind == "evaluation" and request["labels"] and not spooled[kind]["labels"]:
            raise UsageError(
                f"{request[kind]} holds no labels, which the metric needs; add an array `label`, or leave --metric away"
            )
        found[kind] = Samples(folder / kind, inputs)
    return found, spooled, user_code.imported_files()


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
    row = {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)}
    return {**row, "preprocessing": to_json(spec.preprocessing)} if spec.preprocessing else row


def spec_from_json(row: dict[str, Any]) -> TensorSpec:
    preprocessing = optional(struct(Preprocessing))(row.get("preprocessing"), "preprocessing")
    return TensorSpec(row["name"], row["dtype"], tuple(row["shape"]), preprocessing)
