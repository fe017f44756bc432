"""Every form of a network on disk, each asked again and compared with the network, and the index that lists them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

Feed = dict[str, np.ndarray]

OPSET = 18
#: Two different inputs must change every output by at least this part of its size: far above any tolerance of parity.
MIN_SPREAD = 0.05
#: How far a form may be from the network that it was saved from, relative to the output's size.
FORM_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Input:
    """``dims`` without the batch, channels last; None is dynamic. Integers are below ``high``."""

    name: str
    dims: tuple[int | None, ...]
    high: int | None = None

    def text(self, framework: str, batch: int | None = None) -> str:
        """As the packager's --input takes it."""
        dtype = "float32" if self.high is None else {"keras": "int32", "torch": "int64"}[framework]
        dims = channels_first(self.dims) if framework == "torch" else self.dims
        return f"{self.name}={dtype}:{','.join('?' if size is None else str(size) for size in (batch, *dims))}"


def channels_first(dims: Sequence[int | None]) -> tuple[int | None, ...]:
    return (dims[-1], *dims[:-1]) if len(dims) == 3 else tuple(dims)


@dataclass(frozen=True)
class Row:
    """One line of the index; zoo_models.py tells what each word means."""

    architecture: str
    framework: str
    form: str
    file: str
    inputs: list[str]
    outputs: list[str]
    calibration: str
    spread: dict[str, float]
    parameters: int
    small: bool = False
    factory: str | None = None
    trust_pickle: bool = False
    note: str | None = None


@dataclass(frozen=True)
class Alive:
    """A network that passed ``check_alive``: its samples, its own answers to them, and their spread."""

    name: str
    inputs: tuple[Input, ...]
    samples: Feed
    answers: Feed
    spread: dict[str, float]
    small: bool = False
    #: Answers depend on the whole batch, so samples are asked one by one.
    single: bool = False
    #: The folder's files of samples for the packager by framework; None: ``samples`` are written for that.
    calibration: dict[str, str] | None = None

    def row(self, framework: str, form: str, file: str, parameters: int, batch: int | None = None, **more: Any) -> Row:
        texts = [spec.text(framework, batch) for spec in self.inputs]
        data = self._calibration(framework)
        outputs = list(self.answers)
        return Row(self.name, framework, form, file, texts, outputs, data, self.spread, parameters, self.small, **more)

    def _calibration(self, framework: str) -> str:
        return self.calibration[framework] if self.calibration else f"{self.name}-{framework}.npz"

    def save_samples(self, out: Path, framework: str) -> None:
        if self.calibration is None:
            np.savez(out / self._calibration(framework), **self.samples)

    def ask(self, run: Callable[[Feed], Sequence[np.ndarray]], batch: int) -> Feed:
        """``run`` over the samples, ``batch`` at once; its answers come in the order of the outputs."""
        count = len(next(iter(self.samples.values())))
        parts = [
            run({name: array[start : start + batch] for name, array in self.samples.items()})
            for start in range(0, count, batch)
        ]
        return {name: np.concatenate([part[index] for part in parts]) for index, name in enumerate(self.answers)}

    def check_form(self, file: str, run: Callable[[Feed], Sequence[np.ndarray]], batch: int | None = None) -> None:
        """Raises SystemExit when a form answers otherwise than the network."""
        size = batch or (1 if self.single else len(next(iter(self.samples.values()))))
        for name, got in self.ask(run, size).items():
            wanted = self.answers[name]
            error = float(np.abs(got - wanted).max() / np.sqrt(np.mean(wanted.astype(np.float64) ** 2)))
            if not error <= FORM_TOLERANCE:
                raise SystemExit(
                    f"{file} answers {name!r} {error:.2g} of its size away from the network it was saved from, "
                    f"expected at most {FORM_TOLERANCE}"
                )


def spread(answers: Feed) -> dict[str, float]:
    """For each output [samples, ...]: the least difference of two samples' answers over the size of an answer (RMS)."""
    return {name: _spread(array.reshape(len(array), -1).astype(np.float64)) for name, array in answers.items()}


def _spread(rows: np.ndarray) -> float:
    size = np.sqrt(np.mean(rows**2))
    if not np.isfinite(size) or size == 0:
        return 0.0
    pairs = [np.sqrt(np.mean((rows[i] - rows[j]) ** 2)) for i in range(len(rows)) for j in range(i)]
    return float(min(pairs) / size)


def check_alive(name: str, answers: Feed) -> dict[str, float]:
    """The spread of each output. Raises SystemExit for a network that answers nearly the same to two inputs."""
    found = spread(answers)
    for output, value in found.items():
        if not value >= MIN_SPREAD:
            raise SystemExit(
                f"{name}: two different inputs change output {output!r} by only {value:.2g} of its size, expected at "
                f"least {MIN_SPREAD}; parity on a dead network proves nothing, so give it other weights"
            )
    return found


def add_row(out: Path, row: Row) -> None:
    """Put a row into the index, in place of the one for the same form if there is one."""
    path = out / "index.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    key = ("architecture", "framework", "form")
    new = asdict(row)
    rows = [old for old in rows if any(old[name] != new[name] for name in key)] + [new]
    aside = path.with_suffix(".new")
    aside.write_text(json.dumps(sorted(rows, key=lambda old: [old[name] for name in key]), indent=1) + "\n")
    os.replace(aside, path)


def write_torch(out: Path, net: Any, alive: Alive, exportable: Any = None) -> None:
    """Save ``net`` as state dict, module, TorchScript, exported program and ONNX; a row in the index for each.

    ``exportable`` is the same network in the operators that torch.export has for control flow; ``net`` is then
    scripted, where it is traced otherwise.
    """
    import onnxruntime
    import torch

    name, stem = alive.name, f"{alive.name}-torch"
    alive.save_samples(out, "torch")
    count = sum(parameter.numel() for parameter in net.parameters())
    names = [row.name for row in alive.inputs]
    arguments = tuple(torch.from_numpy(alive.samples[input_name][:2]) for input_name in names)
    # The batch, and for sequences of any length their second axis.
    dynamic = {
        row.name: {axis: torch.export.Dim.DYNAMIC for axis, size in enumerate((None, *row.dims)) if size is None}
        for row in alive.inputs
    }
    note = "a trace of it is wrong: its loop and its branch depend on values" if exportable else None

    def asked(module: Any) -> Callable[[Feed], Sequence[np.ndarray]]:
        def run(feed: Feed) -> Sequence[np.ndarray]:
            with torch.no_grad():
                answer = module(*(torch.from_numpy(feed[input_name]) for input_name in names))
            return [answer[output].numpy() for output in alive.answers]

        return run

    file, factory = f"{stem}-state.pth", f"zoo_torch.py:{name}"
    torch.save(net.state_dict(), out / file)
    add_row(out, alive.row("torch", "torch-state", file, count, factory=factory, note=note))

    file = f"{stem}-module.pth"
    torch.save(net, out / file)
    add_row(out, alive.row("torch", "torch-module", file, count, trust_pickle=True, note=note))

    file = f"{stem}-script.pt"
    # Checked below; torch's own check compares graphs, and attention has another one without gradients.
    script = torch.jit.script(net) if exportable else torch.jit.trace(net, arguments, strict=False, check_trace=False)
    script.save(str(out / file))
    alive.check_form(file, asked(torch.jit.load(str(out / file))))
    add_row(out, alive.row("torch", "torchscript", file, count))

    file = f"{stem}.pt2"
    torch.export.save(torch.export.export(exportable or net, arguments, dynamic_shapes=dynamic), out / file)
    alive.check_form(file, asked(torch.export.load(out / file).module()))
    add_row(out, alive.row("torch", "torch-export", file, count))

    file = f"{stem}.onnx"
    torch.onnx.export(
        exportable or net,
        arguments,
        str(out / file),
        input_names=names,
        output_names=list(alive.answers),
        dynamic_shapes=dynamic,
        opset_version=OPSET,
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(str(out / file), providers=["CPUExecutionProvider"])
    alive.check_form(file, lambda feed: session.run(list(alive.answers), feed))
    add_row(out, alive.row("torch", "onnx", file, count))


def write_keras(out: Path, model: Any, alive: Alive, tflite_batch: int | None = None) -> None:
    """Save ``model`` as .keras, SavedModel and TFLite; a row in the index for each.

    ``tflite_batch`` fixes the number of samples in the TFLite form.
    """
    import keras
    import tensorflow as tf

    stem = f"{alive.name}-keras"
    alive.save_samples(out, "keras")
    count = sum(int(np.prod(variable.shape)) for variable in model.trainable_variables)
    folder = out / f"{stem}-saved-model"
    shutil.rmtree(folder, ignore_errors=True)
    if isinstance(model, keras.Model):
        model.save(out / f"{stem}.keras")
        add_row(out, alive.row("keras", "keras", f"{stem}.keras", count))
        model.export(folder, verbose=False)
    else:
        tf.saved_model.save(model, str(folder))
    saved = tf.saved_model.load(str(folder)).signatures["serving_default"]
    alive.check_form(folder.name, lambda feed: _by_name(alive, saved(**{k: tf.constant(v) for k, v in feed.items()})))
    add_row(out, alive.row("keras", "saved-model", folder.name, count))

    file = f"{stem}.tflite"
    (out / file).write_bytes(_tflite(model, folder, alive, tflite_batch))
    runner = tf.lite.Interpreter(str(out / file)).get_signature_runner("serving_default")
    alive.check_form(file, lambda feed: _by_name(alive, runner(**feed)), tflite_batch)
    note = f"always {tflite_batch} sample(s)" if tflite_batch else None
    add_row(out, alive.row("keras", "tflite", file, count, tflite_batch, note=note))


def _by_name(alive: Alive, answer: dict[str, Any]) -> list[np.ndarray]:
    """Answers in the order of the outputs; a single one may have any name (Keras exports ``output_0``)."""
    if len(answer) == 1:
        return [np.asarray(value) for value in answer.values()]
    return [np.asarray(answer[name]) for name in alive.answers]


def _tflite(model: Any, folder: Path, alive: Alive, batch: int | None) -> bytes:
    """Float32 TFLite with built-in operators only."""
    import tensorflow as tf

    if batch is None:
        converter = tf.lite.TFLiteConverter.from_saved_model(str(folder), signature_keys=["serving_default"])
    else:
        specs = {row.name: tf.TensorSpec((batch, *row.dims), tf.float32, name=row.name) for row in alive.inputs}
        call = tf.function(lambda **tensors: {name: model(*tensors.values()) for name in alive.answers})
        fixed = tf.Module()
        fixed.tracked = [variable.value for variable in model.variables]
        path = folder.with_name(f"{folder.name}-fixed")
        tf.saved_model.save(fixed, str(path), signatures={"serving_default": call.get_concrete_function(**specs)})
        converter = tf.lite.TFLiteConverter.from_saved_model(str(path), signature_keys=["serving_default"])
    content: bytes = converter.convert()
    if batch is not None:
        shutil.rmtree(path)
    return content


def run_child(arguments: Sequence[str], log: Path) -> None:
    """This Python with ``arguments`` and the frameworks' chatter in ``log``, whose end is shown when it fails."""
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "", "TF_ENABLE_ONEDNN_OPTS": "0"}
    with log.open("wb") as file:
        ended = subprocess.run([sys.executable, *arguments], stdout=file, stderr=file, env=environment, check=False)
    if ended.returncode:
        raise SystemExit(f"{log.read_text(errors='replace')[-3000:]}\n{log.stem} failed; all it said is in {log}")
