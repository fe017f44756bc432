"""A bundle's inputs and outputs are its source's: names, dtypes, dynamic dimensions, and the answers themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_models
import onnxruntime
import pytest
import tensorflow_models
import torch
import torch_models

from edge_infer import load
from edge_infer.bundle import Bundle
from edge_infer.cli.options import parse_input
from edge_infer.errors import ConversionError
from edge_infer.package import Request, package
from edge_infer.runtime.golden import self_test

Arrays = dict[str, np.ndarray]
Cases = Sequence[tuple[Arrays, Arrays]]


@dataclass(frozen=True)
class Contract:
    """A model as it is packaged, the specs its bundle must have, and the source framework's own answers."""

    source: Path
    format: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    cases: Cases
    options: dict[str, Any] = field(default_factory=dict)


def keep(contract: Contract, folder: Path) -> Bundle:
    """Package the model, and hold the bundle against the contract."""
    request = Request(
        contract.source, "cpu-x86_64", folder / "kept.edge", contract.format, "float32", **contract.options
    )
    bundle = package(request).bundle
    assert sorted(map(str, bundle.manifest.inputs)) == sorted(contract.inputs)
    assert sorted(map(str, bundle.manifest.outputs)) == sorted(contract.outputs)
    assert bundle.manifest.golden.blind == ()
    assert len(contract.cases) > 1
    with load(bundle.path) as session:
        for asked, expected in contract.cases:
            assert_same(session.run(asked), expected)
    return bundle


def assert_same(answered: Arrays, expected: Arrays) -> None:
    assert answered.keys() == expected.keys()
    for name, want in expected.items():
        have = answered[name]
        assert (have.dtype, have.shape) == (want.dtype, want.shape), name
        if want.dtype.kind == "f":
            np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-5, err_msg=name)
        else:
            np.testing.assert_array_equal(have, want, err_msg=name)


# --- TensorFlow


def from_tensorflow(name: str) -> tuple[Path, Cases]:
    folder = tensorflow_models.made()
    return folder, tensorflow_models.questions(folder, name)


def test_keras_with_two_named_inputs_and_outputs(tmp_path: Path) -> None:
    folder, cases = from_tensorflow("two_named_inputs")
    inputs, outputs = ("tokens int32[?, ?]", "features float32[?, 4]"), ("topic float32[?, 3]", "each float32[?, ?, 2]")
    keep(Contract(folder / "two_named_inputs.keras", "tflite", inputs, outputs, cases), tmp_path)


def test_keras_names_that_are_no_python_names(tmp_path: Path) -> None:
    folder, cases = from_tensorflow("sequential")
    inputs, outputs = ("row of five float32[?, 5]",), ("two.columns float32[?, 2]",)
    keep(Contract(folder / "sequential.keras", "tflite", inputs, outputs, cases), tmp_path)


def test_one_of_two_signatures(tmp_path: Path) -> None:
    folder, cases = from_tensorflow("squared")
    source = folder / "two_signatures"
    keep(
        Contract(source, "tflite", ("x float32[?, 6]",), ("y float32[?, 3]",), cases, {"signature": "squared"}),
        tmp_path,
    )


def test_saved_model_with_sizes_that_the_user_fixes(tmp_path: Path) -> None:
    """The way through a SavedModel written anew, where weights were once lost without a word."""
    folder, cases = from_tensorflow("rooted")
    options = {"signature": "rooted", "inputs": (parse_input("x=float32:2,5,6"),)}
    inputs, outputs = ("x float32[2, 5, 6]",), ("root float32[2, 3]",)
    keep(Contract(folder / "two_signatures", "tflite", inputs, outputs, cases, options), tmp_path)


def test_bytes_booleans_and_scalars_in_tflite(tmp_path: Path) -> None:
    folder, cases = from_tensorflow("many_dtypes")
    inputs = ("image uint8[?, 6]", "keep bool[?, 6]", "gain float32[]")
    outputs = ("scores float32[?, 3]", "best int64[?]", "total float32[]")
    bundle = keep(Contract(folder / "many_dtypes", "tflite", inputs, outputs, cases), tmp_path)
    # TensorFlow itself gives them in another order in every process.
    assert [spec.name for spec in bundle.manifest.inputs] == ["gain", "image", "keep"]


@pytest.mark.parametrize("format", ["tflite", "onnx"])
def test_keras_recurrent_layers_with_a_batch_of_any_size(format: str, tmp_path: Path) -> None:
    folder, cases = from_tensorflow("recurrent")
    source = folder / "recurrent.keras"
    bundle = keep(Contract(source, format, ("steps float32[?, 9, 3]",), ("last float32[?, 2]",), cases), tmp_path)
    assert not {"WHILE", "Loop"} & set(bundle.manifest.artifact.operators)


def test_a_saved_model_that_loops_is_refused_with_its_layer(tmp_path: Path) -> None:
    """What it was made from is not known any more; the way over ONNX needs a converter that is not installed."""
    request = Request(
        from_tensorflow("recurrent")[0] / "recurrent", "cpu-x86_64", tmp_path / "x.edge", "tflite", "float32"
    )
    with pytest.raises(ConversionError, match=r"loops over steps, .* give the .keras file .* or dynamic dimensions"):
        package(request)


# --- PyTorch

SEEDED = np.random.default_rng(11)


def tokens(batch: int, length: int, most: int = 16) -> np.ndarray:
    return SEEDED.integers(0, most, (batch, length))


def real(*shape: int) -> np.ndarray:
    return SEEDED.standard_normal(shape).astype(np.float32)


@dataclass(frozen=True)
class TorchSource:
    """A network of ``torch_models``, what it is told about its inputs, and questions of several sizes."""

    given: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    flat: Callable[[Any], Arrays]
    questions: tuple[Arrays, ...]


def _nested(answer: Any) -> Arrays:
    pooled = answer["pooled"]
    return {
        "scores": answer["scores"],
        "best": answer["best"],
        "pooled_mean": pooled["mean"],
        "pooled_pair_0": pooled["pair"][0],
        "pooled_pair_1": pooled["pair"][1],
    }


TORCH = {
    "TokensAndFeatures": TorchSource(
        ("tokens=int64:?,?", "features=float32:?,4"),
        ("tokens int64[?, ?]", "features float32[?, 4]"),
        (
            "scores float32[?, ?, 4]",
            "pooled_mean float32[?, 4]",
            "pooled_pair_0 float32[?]",
            "pooled_pair_1 float32[?, 4]",
            "best int64[?, ?]",
        ),
        _nested,
        tuple(
            {"tokens": tokens(batch, length), "features": real(batch, 4)} for batch, length in ((1, 1), (2, 9), (5, 33))
        ),
    ),
    "GainAndMask": TorchSource(
        ("x=float32:?,6", "gain=float32", "keep=bool:?,6"),
        ("x float32[?, 6]", "gain float32[]", "keep bool[?, 6]"),
        ("output_0 float32[?, 3]", "output_1 bool[?, 3]"),
        lambda answer: {"output_0": answer[0], "output_1": answer[1]},
        tuple({"x": real(n, 6), "gain": np.asarray(np.float32(n - 4)), "keep": real(n, 6) > 0} for n in (1, 3, 8)),
    ),
    "Pixels": TorchSource(
        ("image=uint8:?,3,?,?",),
        ("image uint8[?, 3, ?, ?]",),
        ("brightness float32[?]", "edges float32[?, 2, ?, ?]"),
        lambda answer: answer._asdict(),
        tuple({"image": SEEDED.integers(0, 256, size).astype(np.uint8)} for size in ((1, 3, 8, 8), (2, 3, 5, 11))),
    ),
    "TiedWords": TorchSource(
        ("tokens=int64:?,?",),
        ("tokens int64[?, ?]",),
        ("output float32[?, ?, 256]",),
        lambda answer: {"output": answer},
        tuple({"tokens": tokens(batch, length, 256)} for batch, length in ((1, 2), (3, 40))),
    ),
}


def torch_contract(name: str, format: str, folder: Path) -> Contract:
    """The network as a state dict and the factory that builds it."""
    row = TORCH[name]
    torch.manual_seed(5)
    network = getattr(torch_models, name)().eval()
    torch.save(network.state_dict(), folder / "network.pth")
    factory = f"{torch_models.__file__}:{name}"
    options = {"factory": factory, "inputs": tuple(map(parse_input, row.given))}
    cases = []
    for asked in row.questions:
        with torch.no_grad():
            answer = row.flat(network(**{key: torch.from_numpy(array) for key, array in asked.items()}))
        cases.append((asked, {key: tensor.numpy() for key, tensor in answer.items()}))
    return Contract(folder / "network.pth", format, row.inputs, row.outputs, cases, options)


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("TokensAndFeatures", "torchscript"),
        ("GainAndMask", "onnx"),
        ("GainAndMask", "torchscript"),
        ("Pixels", "onnx"),
    ],
)
def test_pytorch_contracts(name: str, format: str, tmp_path: Path) -> None:
    keep(torch_contract(name, format, tmp_path), tmp_path)


@pytest.mark.parametrize("format", ["onnx", "torchscript"])
def test_tied_weights_are_stored_once(format: str, tmp_path: Path) -> None:
    bundle = keep(torch_contract("TiedWords", format, tmp_path), tmp_path)
    table = 256 * 64 * 4
    assert table <= bundle.manifest.files["weights.bin"].size < 1.5 * table


def halving(folder: Path) -> tuple[Path, Cases]:
    torch.manual_seed(5)
    scripted = torch.jit.script(torch_models.Halving().eval())
    scripted.save(str(folder / "halving.pt"))
    rows = (np.ones((1, 4), np.float32), real(3, 4) * 1000, -np.ones((5, 4), np.float32) * 30)
    with torch.no_grad():
        return folder / "halving.pt", [({"x": x}, {"output": scripted(torch.from_numpy(x)).numpy()}) for x in rows]


@pytest.mark.parametrize("format", ["onnx", "torchscript"])
def test_scripted_control_flow_stays(format: str, tmp_path: Path) -> None:
    source, cases = halving(tmp_path)
    options = {"inputs": (parse_input("x=float32:?,4"),)}
    bundle = keep(Contract(source, format, ("x float32[?, 4]",), ("output float32[?, 4]",), cases, options), tmp_path)
    if format == "torchscript":
        code = torch.jit.load(str(bundle.file("model.torchscript"))).code
        assert "while" in code and "if" in code


@pytest.mark.parametrize("count", [1, 2])
def test_torchscript_whose_answers_are_all_int8_inside(count: int, tmp_path: Path) -> None:
    """They become float one by one: at once, the converter makes a list of them that no module may return."""

    class Rectified(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            hidden = torch.relu(self.first(x))
            return (torch.relu(self.second(hidden)), hidden)[:count]

    torch.manual_seed(3)
    rows = torch.export.Dim("rows")
    program = torch.export.export(Rectified().eval(), (torch.ones(2, 16),), dynamic_shapes=({0: rows},))
    torch.export.save(program, tmp_path / "net.pt2")
    np.savez(tmp_path / "samples.npz", x=np.random.default_rng(9).standard_normal((16, 16)).astype(np.float32))
    request = Request(
        tmp_path / "net.pt2",
        "cpu-x86_64",
        tmp_path / "net.edge",
        "torchscript",
        "int8",
        calibration=tmp_path / "samples.npz",
        max_drop=0.99,  # of a network that learned nothing
    )
    bundle = package(request).bundle
    assert len(bundle.manifest.outputs) == count
    with load(bundle.path) as session:
        self_test(session)


def test_a_program_exported_with_keywords_containers_and_constants(tmp_path: Path) -> None:
    class Weighed(torch.nn.Module):
        def forward(
            self, batch: dict[str, torch.Tensor], power: int, shift: torch.Tensor | None = None
        ) -> torch.Tensor:
            y = (batch["x"] * batch["weight"]) ** power
            return y if shift is None else y + shift

    x, weight = torch.ones(2, 4), torch.ones(())
    rows = torch.export.Dim("rows")
    program = torch.export.export(
        Weighed(),
        ({"x": x, "weight": weight},),
        {"power": 3, "shift": torch.ones(4)},
        dynamic_shapes={"batch": {"x": {0: rows}, "weight": None}, "power": None, "shift": None},
    )
    torch.export.save(program, tmp_path / "weighed.pt2")
    cases = []
    for count in (1, 4):
        asked = {"batch_x": real(count, 4), "batch_weight": np.asarray(np.float32(1.5)), "shift": real(4)}
        cases.append((asked, {"output": (asked["batch_x"] * np.float32(1.5)) ** 3 + asked["shift"]}))
    inputs = ("batch_x float32[?, 4]", "batch_weight float32[]", "shift float32[4]")
    keep(Contract(tmp_path / "weighed.pt2", "onnx", inputs, ("output float32[?, 4]",), cases), tmp_path)


# --- ONNX


def onnx_cases(source: Path, questions: Sequence[Arrays]) -> Cases:
    session = onnxruntime.InferenceSession(str(source), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return [
        (asked, {name: np.asarray(array) for name, array in zip(names, session.run(names, asked), strict=True)})
        for asked in questions
    ]


def test_onnx_with_two_inputs_and_weights_in_a_file_beside_it(tmp_path: Path) -> None:
    source = onnx_models.two_inputs_with_weights_beside(tmp_path)
    assert (tmp_path / "two inputs.weights").is_file()
    questions = [{"left hand/in.0": real(rows, 64), "right::in": real(rows, 48)} for rows in (1, 2, 7)]
    inputs = ("left hand/in.0 float32[?, 64]", "right::in float32[?, 48]")
    outputs = ("sum/out.0 float32[?, 48]", "the largest float32[?]")
    bundle = keep(Contract(source, "onnx", inputs, outputs, onnx_cases(source, questions), {"name": "two"}), tmp_path)
    assert bundle.manifest.files["weights.bin"].size >= 64 * 48 * 4


@pytest.mark.parametrize(("given", "shape"), [((), "?, 8"), (("x=float32:2,8",), "2, 8")])
def test_onnx_with_initializers_among_its_inputs(given: tuple[str, ...], shape: str, tmp_path: Path) -> None:
    source = onnx_models.initializers_among_inputs(tmp_path)
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(source).graph.initializer}
    rows = [real(2, 8), real(2, 8)] if given else [real(1, 8), real(6, 8)]
    cases = [({"x": x}, {"y": x @ weights["w"] + weights["b"]}) for x in rows]
    options = {"inputs": tuple(map(parse_input, given))}
    outputs = (f"y float32[{shape.replace('8', '4')}]",)
    keep(Contract(source, "onnx", (f"x float32[{shape}]",), outputs, cases, options), tmp_path)


def test_an_old_opset_is_quantized_too(tmp_path: Path) -> None:
    source = onnx_models.initializers_among_inputs(tmp_path)
    np.savez(tmp_path / "samples.npz", x=real(40, 8))
    request = Request(source, "cpu-x86_64", tmp_path / "old.edge", "onnx", "int8", calibration=tmp_path / "samples.npz")
    assert "QuantizeLinear" in package(request).bundle.manifest.artifact.operators


def test_onnx_with_bytes_a_scalar_integers_and_booleans(tmp_path: Path) -> None:
    source = onnx_models.bytes_to_classes(tmp_path)
    questions = [
        {"pixels": SEEDED.integers(0, 256, (n, 12)).astype(np.uint8), "threshold": np.asarray(np.float32(9 * n))}
        for n in (1, 4)
    ]
    inputs = ("pixels uint8[?, 12]", "threshold float32[]")
    outputs = ("class int64[?]", "above bool[?, 5]", "brightness float32[]")
    keep(Contract(source, "onnx", inputs, outputs, onnx_cases(source, questions)), tmp_path)


def test_a_length_that_calibration_data_has_only_once_stays_dynamic(tmp_path: Path) -> None:
    program = torch.export.export(
        torch_models.TokensAndFeatures().eval(),
        (torch.zeros(2, 10, dtype=torch.int64), torch.zeros(2, 4)),
        dynamic_shapes={
            "tokens": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},
            "features": {0: torch.export.Dim.AUTO},
        },
    )
    torch.onnx.export(program, (), tmp_path / "network.onnx", external_data=False, verbose=False)
    np.savez(tmp_path / "samples.npz", tokens=tokens(30, 10), features=real(30, 4))
    request = Request(
        tmp_path / "network.onnx", "cpu-x86_64", tmp_path / "k.edge", "onnx", "float32", tmp_path / "samples.npz"
    )
    bundle = package(request).bundle
    shapes = {spec.shape for spec in bundle.manifest.outputs}
    assert shapes == {parse_input(f"x=float32:{row}").shape for row in ("?,?,4", "?,4", "?", "?,?")}
    assert sorted(map(str, bundle.manifest.inputs)) == sorted(TORCH["TokensAndFeatures"].inputs)
