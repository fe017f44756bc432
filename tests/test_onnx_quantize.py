"""ONNX artifacts in every precision: what they answer, what they weigh, and which engines they ask for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_models import save, value, weight
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from torch import nn

from edge_infer import worker
from edge_infer.deploy.device import cpu_features
from edge_infer.errors import ConversionError, UsageError
from edge_infer.quantize import onnx as builder
from edge_infer.quantize.onnx_age import lower_versions, oldest_engine, opset
from edge_infer.quantize.onnx_graph import name_nodes, sort_nodes

IMAGE = {"name": "image", "dtype": "float32", "shape": [None, 1, 8, 8]}
PRECISIONS = ("float32", "float16", "int8-dynamic", "int8-weights", "int4-weights", "int8")
#: These models are run here: where the processor has no VNNI, weights of 8 bits would overflow on it.
HERE = ["avx512_vnni"] if {"avx512_vnni", "avx_vnni"} & set(cpu_features()) else ["avx2"]
Array = np.ndarray[Any, Any]
Build = Callable[..., Path]


def request(model: Path, out: Path, precision: str, inputs: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """A builder's request; ``samples`` is a folder or arrays to calibrate with."""
    out.mkdir(parents=True, exist_ok=True)
    samples = more.pop("samples", None)
    if isinstance(samples, list):
        folder = out.with_name(f"{out.name}-samples")
        folder.mkdir(exist_ok=True)
        for index, array in enumerate(samples):
            np.save(folder / f"{index}.npy", array)
        samples = {"samples": str(folder), "indices": list(range(len(samples[0]))), "ranges": "minmax"}
    target = {"architecture": "x86_64", "cpu_features": HERE, "page_size_bytes": 4096} | more.pop("target", {})
    return {
        "from": {"model": str(model)},
        "out": str(out),
        "inputs": inputs,
        "outputs": [],
        "precision": precision,
        "calibration": samples,
        "keep_float": more.pop("keep_float", []),
        "target": target,
    }


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def answer(path: Path, feed: dict[str, Array]) -> list[Array]:
    return [np.asarray(item) for item in session(path).run(None, feed)]


def noise(exact: Array, rounded: Array) -> float:
    """Root of the mean squared difference, in deviations of the exact values."""
    return float(np.sqrt(np.square(exact - rounded).mean()) / exact.std())


@pytest.fixture(scope="module")
def digits(models: Path) -> dict[str, Array]:
    with np.load(models / "calibration_nchw.npz") as data, np.load(models / "test_nchw.npz") as test:
        return {"calibration": data["image"], "image": test["image"], "label": test["label"]}


@pytest.fixture(scope="module")
def build(models: Path, digits: dict[str, Array], tmp_path_factory: pytest.TempPathFactory) -> Build:
    """``build(precision, ...)``: the folder with the digits network in that precision, its facts in ``facts``."""
    folder = tmp_path_factory.mktemp("digits")
    made: dict[str, Path] = {}

    def make(precision: str, name: str = "", **more: Any) -> Path:
        key = f"{precision}{name}"
        if key not in made:
            made[key] = folder / key
            samples = [digits["calibration"][:64]]
            asked = request(models / "torch.onnx", folder / key, precision, [IMAGE], samples=samples, **more)
            facts[key] = builder.build(asked)
        return made[key]

    return make


facts: dict[str, dict[str, Any]] = {}


# -- the digits network in every precision -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "most_noise", "most_size"),
    [
        ("float32", 1e-6, 1.0),
        ("float16", 1e-3, 0.52),
        ("int8-dynamic", 0.005, 0.28),
        ("int8-weights", 0.005, 0.3),
        ("int4-weights", 0.02, 0.22),
        ("int8", 0.01, 0.3),
    ],
)
def test_each_precision_answers_like_float_and_weighs_what_it_should(
    build: Build, models: Path, digits: dict[str, Array], precision: str, most_noise: float, most_size: float
) -> None:
    folder = build(precision)
    float_scores = answer(models / "torch.onnx", {"image": digits["image"]})[0]
    scores = answer(folder / "model.onnx", {"image": digits["image"]})[0]
    assert scores.dtype == np.float32
    assert noise(float_scores, scores) <= most_noise
    accuracy = [float((each.argmax(1) == digits["label"]).mean()) for each in (float_scores, scores)]
    assert accuracy[1] >= accuracy[0] - 0.006
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert size <= most_size * (models / "torch.onnx").stat().st_size


def test_int8_dynamic_holds_on_noise_too(build: Build, models: Path) -> None:
    """Noise is far from the digits that the network knows, where its answers are least certain."""
    image = np.random.default_rng(5).standard_normal((64, 1, 8, 8)).astype(np.float32)
    exact = answer(models / "torch.onnx", {"image": image})[0]
    assert noise(exact, answer(build("int8-dynamic") / "model.onnx", {"image": image})[0]) < 0.02


class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime is not typed
    def __init__(self, images: Array) -> None:
        self._images = iter(images)

    def get_next(self) -> dict[str, Array] | None:
        image = next(self._images, None)
        return None if image is None else {"image": image[None]}


def test_int8_is_closer_to_float_than_the_engines_own_default(
    build: Build, models: Path, digits: dict[str, Array], tmp_path: Path
) -> None:
    quantize_static(str(models / "torch.onnx"), str(tmp_path / "theirs.onnx"), Reader(digits["calibration"][:64]))
    feed = {"image": digits["image"]}
    exact = answer(models / "torch.onnx", feed)[0]
    ours, theirs = (
        noise(exact, answer(path, feed)[0]) for path in (build("int8") / "model.onnx", tmp_path / "theirs.onnx")
    )
    assert ours < 0.8 * theirs


@pytest.mark.parametrize("ranges", ["percentile", "entropy"])
def test_ranges_are_chosen_as_asked(
    models: Path, digits: dict[str, Array], build: Build, tmp_path: Path, ranges: str
) -> None:
    asked = request(models / "torch.onnx", tmp_path / "out", "int8", [IMAGE], samples=[digits["calibration"][:64]])
    asked["calibration"]["ranges"] = ranges
    builder.build(asked)
    feed = {"image": digits["image"]}
    scores = answer(tmp_path / "out" / "model.onnx", feed)[0]
    assert noise(answer(models / "torch.onnx", feed)[0], scores) < 0.02
    assert (tmp_path / "out" / "model.onnx").read_bytes() != (build("int8") / "model.onnx").read_bytes()


def test_without_vnni_int8_weights_keep_to_seven_bits(build: Build) -> None:
    plain = onnx.load(build("int8", "-avx2", target={"cpu_features": ["avx2"]}) / "model.onnx")
    codes = [numpy_helper.to_array(item) for item in plain.graph.initializer if item.data_type == TensorProto.INT8]
    assert codes and all(np.abs(item.astype(int)).max() <= 64 for item in codes)
    dynamic = onnx.load(build("int8-dynamic", "-avx2", target={"cpu_features": ["avx2"]}) / "model.onnx")
    [dense] = [node for node in dynamic.graph.node if node.op_type == "MatMulInteger"][:1]
    kinds = {item.name: item.data_type for item in dynamic.graph.initializer}
    assert kinds[dense.input[1]] == TensorProto.UINT8


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_same_request_gives_the_same_bytes_anywhere(
    build: Build, models: Path, digits: dict[str, Array], tmp_path: Path, precision: str
) -> None:
    first = build(precision)
    again = tmp_path / "else" / "where"
    builder.build(request(models / "torch.onnx", again, precision, [IMAGE], samples=[digits["calibration"][:64]]))
    assert sorted(file.name for file in first.iterdir()) == sorted(file.name for file in again.iterdir())
    assert all(file.read_bytes() == (again / file.name).read_bytes() for file in first.iterdir())


# -- layers --------------------------------------------------------------------------------------------------------


def chain(folder: Path) -> Path:
    """Four dense layers without names; the third reads a channel a thousand times as large as the others."""
    nodes, weights, source = [], [], "x"
    for index in range(4):
        matrix = np.random.default_rng(index).standard_normal((64, 64)).astype(np.float32) / 8
        if index == 1:
            matrix[:, 7] *= 1000
        if index == 2:
            matrix[7] /= 1000
        weights.append(numpy_helper.from_array(matrix, f"w{index}"))
        nodes.append(helper.make_node("MatMul", [source, f"w{index}"], [f"y{index}"]))
        source = f"y{index}"
    io = [value("x", TensorProto.FLOAT, ["n", 64])], [value(source, TensorProto.FLOAT, ["n", 64])]
    return save(folder / "chain.onnx", nodes, *io, weights)


X64 = {"name": "x", "dtype": "float32", "shape": [None, 64]}


def samples64(seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal((48, 64)).astype(np.float32)


def test_sensitivity_finds_the_planted_layers_and_keeping_them_float_helps(tmp_path: Path) -> None:
    model = chain(tmp_path)
    layers = builder.sensitivity(request(model, tmp_path / "s", "int8", [X64], samples=[samples64(0)]))["layers"]
    assert [layer["kind"] for layer in layers] == ["MatMul"] * 4
    assert [layer["bytes"] for layer in layers] == [64 * 64 * 4] * 4
    by_error = sorted(layers, key=lambda layer: layer["error"], reverse=True)
    assert by_error[0] is layers[2] and by_error[0]["error"] > 10 * layers[0]["error"]
    exact = answer(model, {"x": samples64(1)})[0]
    errors = {}
    for count in (0, 1, 2):
        out = tmp_path / f"mixed{count}"
        # The layer that makes the large channel rounds what the other reads.
        kept = [layers[index]["name"] for index in (2, 1)[:count]]
        builder.build(request(model, out, "int8-mixed", [X64], samples=[samples64(0)], keep_float=kept))
        errors[count] = noise(exact, answer(out / "model.onnx", {"x": samples64(1)})[0])
        assert kept_in_float(out / "model.onnx") == set(kept)
    assert errors[2] < 0.1 * errors[0]


def kept_in_float(path: Path) -> set[str]:
    """Names of the dense layers whose weight is float32."""
    graph = onnx.load(path).graph
    floats = {item.name for item in graph.initializer if item.data_type == TensorProto.FLOAT}
    return {node.name for node in graph.node if node.op_type == "MatMul" and node.input[1] in floats}


def test_sensitivity_lists_the_layers_of_a_network_with_activations_merged(
    models: Path, digits: dict[str, Array], tmp_path: Path
) -> None:
    asked = request(models / "torch.onnx", tmp_path / "s", "int8", [IMAGE], samples=[digits["calibration"][:32]])
    layers = builder.sensitivity(asked)["layers"]
    assert [layer["kind"] for layer in layers] == ["Conv", "Conv", "Gemm", "Gemm"]
    assert all(0 < layer["error"] < 1e-3 for layer in layers)
    assert layers[2]["bytes"] == (1024 * 64 + 64) * 4


def test_a_layer_that_is_none_is_refused(tmp_path: Path) -> None:
    asked = request(chain(tmp_path), tmp_path / "o", "int8-mixed", [X64], samples=[samples64(0)], keep_float=["conv9"])
    with pytest.raises(UsageError, match=r"'conv9', which is no layer .* MatMul:y0"):
        builder.build(asked)


def test_nodes_get_names_of_their_own_and_keep_the_ones_they_have() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"], name="same"),
        helper.make_node("Relu", ["b"], ["c"], name="same"),
    ]
    model = helper.make_model(helper.make_graph(nodes, "g", [], []))
    name_nodes(model)
    assert [node.name for node in model.graph.node] == ["Relu:a", "same", "same:2"]


def test_nodes_are_sorted_and_a_cycle_is_refused() -> None:
    third, first = helper.make_node("Add", ["a", "b"], ["c"]), helper.make_node("Relu", ["x"], ["a"])
    second = helper.make_node("Relu", ["a"], ["b"])
    graph = helper.make_graph([third, second, first], "g", [], [])
    sort_nodes(graph)
    assert [node.output[0] for node in graph.node] == ["a", "b", "c"]
    graph.node.append(helper.make_node("Add", ["e", "c"], ["d"]))
    graph.node.append(helper.make_node("Relu", ["d"], ["e"]))
    with pytest.raises(ConversionError, match="cycle"):
        sort_nodes(graph)


# -- operators with ways of their own ------------------------------------------------------------------------------


def lstm(folder: Path) -> Path:
    """Both directions, a bias, and an initial state left out."""
    node = helper.make_node("LSTM", ["x", "w", "r", "b"], ["y", "h"], hidden_size=32, direction="bidirectional")
    weights = [weight("w", 2, 128, 24), weight("r", 2, 128, 32, seed=2), weight("b", 2, 256, seed=3)]
    for item in weights:
        item.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(item) / 6, item.name))
    x, h = value("x", TensorProto.FLOAT, [5, "n", 24]), value("h", TensorProto.FLOAT, [2, "n", 32])
    return save(folder / "lstm.onnx", [node], [x], [h], weights)


@pytest.mark.parametrize(("precision", "most"), [("int8-dynamic", 0.03), ("int8-weights", 0.02)])
def test_recurrent_layers_shrink(tmp_path: Path, precision: str, most: float) -> None:
    model, out = lstm(tmp_path), tmp_path / "out"
    made = builder.build(request(model, out, precision, [{"name": "x", "dtype": "float32", "shape": [5, None, 24]}]))
    assert ("DynamicQuantizeLSTM" in made["operators"]) == (precision == "int8-dynamic")
    feed = {"x": np.random.default_rng(4).standard_normal((5, 7, 24)).astype(np.float32)}
    assert noise(answer(model, feed)[0], answer(out / "model.onnx", feed)[0]) < most
    assert (out / "weights.bin").stat().st_size < 0.4 * model.stat().st_size


def words(folder: Path) -> Path:
    """A table that is looked up in and, turned, multiplied with."""
    nodes = [
        helper.make_node("Gather", ["words", "tokens"], ["vectors"]),
        helper.make_node("Transpose", ["words"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["vectors", "turned"], ["scores"]),
    ]
    tokens, scores = value("tokens", TensorProto.INT64, ["n", 4]), value("scores", TensorProto.FLOAT, ["n", 4, 300])
    return save(folder / "words.onnx", nodes, [tokens], [scores], [weight("words", 300, 48)])


@pytest.mark.parametrize(
    ("precision", "most"), [("float16", 1e-3), ("int8-dynamic", 0.02), ("int8-weights", 0.02), ("int4-weights", 0.15)]
)
def test_tables_shrink_with_the_layers(tmp_path: Path, precision: str, most: float) -> None:
    model, out = words(tmp_path), tmp_path / "out"
    builder.build(request(model, out, precision, [{"name": "tokens", "dtype": "int64", "shape": [None, 4]}]))
    feed = {"tokens": np.random.default_rng(4).integers(0, 300, (6, 4))}
    assert noise(answer(model, feed)[0], answer(out / "model.onnx", feed)[0]) < most
    assert (out / "weights.bin").stat().st_size < 0.7 * model.stat().st_size


def upscaling(folder: Path, version: int = 17) -> Path:
    """Convolutions only: plain, in groups, and transposed in groups."""
    nodes = [
        helper.make_node("Conv", ["x", "w0", "b0"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Clip", ["a", "least", "most"], ["b"]),
        helper.make_node("ConvTranspose", ["b", "w1", "b1"], ["c"], strides=[2, 2], group=2),
        helper.make_node("Conv", ["c", "w2"], ["y"], group=4),
    ]
    weights = [weight("w0", 16, 3, 3, 3), weight("b0", 16), weight("w1", 16, 24, 2, 2, seed=2), weight("b1", 48)]
    weights += [weight("w2", 32, 12, 3, 3, seed=3)]
    weights += [numpy_helper.from_array(np.float32(limit), name) for name, limit in (("least", 0), ("most", 6))]
    x, y = value("x", TensorProto.FLOAT, ["n", 3, 8, 8]), value("y", TensorProto.FLOAT, ["n", 32, 14, 14])
    return save(folder / f"up{version}.onnx", nodes, [x], [y], weights, version, 10 if version > 20 else 8)


IMAGE8 = {"name": "x", "dtype": "float32", "shape": [None, 3, 8, 8]}


@pytest.mark.parametrize("precision", ["float16", "int8-dynamic", "int8-weights", "int8"])
def test_convolutions_of_every_kind_shrink(tmp_path: Path, precision: str) -> None:
    model, out = upscaling(tmp_path), tmp_path / "out"
    image = np.random.default_rng(4).standard_normal((24, 3, 8, 8)).astype(np.float32)
    builder.build(request(model, out, precision, [IMAGE8], samples=[image]))
    assert noise(answer(model, {"x": image})[0], answer(out / "model.onnx", {"x": image})[0]) < 0.03
    assert (out / "weights.bin").stat().st_size < 0.7 * model.stat().st_size


# -- what is refused -----------------------------------------------------------------------------------------------


def test_four_bits_are_refused_where_only_convolutions_could_take_them(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"no MatMul or Gemm .* has Clip, Conv, .*; choose int8-weights or int8"):
        builder.build(request(upscaling(tmp_path), tmp_path / "o", "int4-weights", [IMAGE8]))


def test_int8_is_refused_where_nothing_computes(tmp_path: Path) -> None:
    io = [value("x", TensorProto.FLOAT, ["n", 64])], [value("y", TensorProto.FLOAT, ["n", 64])]
    model = save(tmp_path / "relu.onnx", [helper.make_node("Relu", ["x"], ["y"])], *io, [])
    with pytest.raises(ConversionError, match="choose another precision"):
        builder.build(request(model, tmp_path / "o", "int8", [X64], samples=[samples64(0)]))


def test_int8_is_refused_without_calibration(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="int8 needs calibration samples"):
        builder.build(request(chain(tmp_path), tmp_path / "o", "int8", [X64]))


def test_a_precision_of_another_engine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="ONNX has no int16x8, it has: float32, "):
        builder.build(request(chain(tmp_path), tmp_path / "o", "int16x8", [X64]))


# -- engines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "float16", "int8-dynamic", "int8-weights", "int8"])
def test_what_a_new_opset_only_adds_types_to_runs_on_an_old_engine(tmp_path: Path, precision: str) -> None:
    image = np.random.default_rng(4).standard_normal((24, 3, 8, 8)).astype(np.float32)
    asked = request(upscaling(tmp_path, 22), tmp_path / "o", precision, [IMAGE8], samples=[image])
    assert builder.build(asked)["requires"] == [["onnxruntime", "1.14.0"], ["onnxruntime-gpu", "1.14.0"]]


def test_no_precision_of_a_plain_model_asks_for_a_newer_engine_but_weights_in_blocks(build: Build) -> None:
    oldest = {}
    for precision in PRECISIONS:
        build(precision)
        oldest[precision] = facts[precision]["requires"][0][1]
    blocks = {"int4-weights": "1.17.0", "int8-weights": "1.22.0"}
    assert oldest == dict.fromkeys(PRECISIONS, "1.14.0") | blocks
    build("int8-weights", "-arm", target={"architecture": "aarch64", "cpu_features": ["asimd"]})
    assert facts["int8-weights-arm"]["requires"][0][1] == "1.23.0"


def declared(node: onnx.NodeProto, version: int, kind: int = TensorProto.FLOAT) -> int:
    """The opset that is left of ``version`` for a model of that node alone."""
    shape = [1, 4, 6, 6]
    inputs = [value(name, kind, shape) for name in node.input if name == "x"]
    weights = [
        numpy_helper.from_array(np.float32([1, 1, 1, 1]), name) for name in node.input if name.startswith("four")
    ]
    weights += [
        numpy_helper.from_array(np.int64([0, 0, 1, 1, 0, 0, 1, 1]), name) for name in node.input if name == "pads"
    ]
    graph = helper.make_graph([node], "g", inputs, [value("y", kind, ["a", "b", "c", "d"])], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)], ir_version=10)
    lower_versions(model)
    return opset(model)


def test_the_opset_is_lowered_as_far_as_the_operators_mean_the_same() -> None:
    def node(operator: str, *more: str, **attributes: Any) -> onnx.NodeProto:
        return helper.make_node(operator, ["x", *more], ["y"], **attributes)

    assert declared(node("Softplus"), 22) == 18
    assert declared(node("Softplus"), 15) == 15  # never raised
    assert declared(node("Softplus"), 22, TensorProto.BFLOAT16) == 22  # a type that came with it
    assert declared(node("Gelu"), 22) == 20  # an operator that came later
    assert declared(node("AveragePool", kernel_shape=[2, 2]), 22) == 18
    assert declared(node("AveragePool", kernel_shape=[2, 2], dilations=[2, 2]), 22) == 19  # an attribute that did
    assert declared(node("Pad", "pads", mode="wrap"), 22) == 21  # means more by the same signature
    assert declared(node("GroupNormalization", "four", "four2", num_groups=2), 22) == 21  # means something else


def test_domains_that_nothing_uses_ask_for_nothing(tmp_path: Path) -> None:
    model = onnx.load(chain(tmp_path))
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 5))
    model.ir_version = 10
    lower_versions(model)
    assert [item.domain for item in model.opset_import] == [""] and model.ir_version == 8
    assert oldest_engine(model, "x86_64") == "1.14.0"


class Encoder(nn.Module):
    """In float16 arithmetic, ONNX Runtime 1.32 crashes while it optimizes this one."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.head(self.encoder(x).mean(1))
        return scores


def test_float16_of_an_encoder_opens_whatever_the_processor_has(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = tmp_path / "encoder.onnx", torch.randn(2, 12, 64)
    dynamic = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    torch.onnx.export(
        Encoder().eval(), (x,), str(model), input_names=["x"], opset_version=18, dynamo=True, external_data=False,
        dynamic_shapes=dynamic, verbose=False,
    )  # fmt: skip
    inputs = [{"name": "x", "dtype": "float32", "shape": [None, None, 64]}]
    target = {"architecture": "aarch64", "cpu_features": ["asimd", "fphp", "asimdhp"]}
    builder.build(request(model, tmp_path / "out", "float16", inputs, target=target))
    path = tmp_path / "out" / "model.onnx"
    worker.run("edge_infer.quantize.onnx_half:open_once", {"model": str(path)}, tmp_path / "log")
    assert noise(answer(model, {"x": x.numpy()})[0], answer(path, {"x": x.numpy()})[0]) < 0.01


# -- memory --------------------------------------------------------------------------------------------------------

PEAK = """
import json, sys
from edge_infer.quantize import onnx
onnx.build(json.loads(sys.argv[1]))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def peak(asked: dict[str, Any]) -> float:
    """Most memory (MB) that a process had in use while it built."""
    import json

    done = subprocess.run([sys.executable, "-c", PEAK, json.dumps(asked)], capture_output=True, check=True, text=True)
    return int(done.stdout) / 1024


def test_memory_does_not_grow_with_the_number_of_samples(tmp_path: Path) -> None:
    """Each sample makes 4 MB of values inside the network."""
    nodes, source = [], "x"
    for index in range(2):
        nodes.append(helper.make_node("Conv", [source, f"w{index}"], [f"y{index}"], pads=[1, 1, 1, 1]))
        source = f"y{index}"
    weights = [weight("w0", 32, 1, 3, 3), weight("w1", 32, 32, 3, 3)]
    x, y = value("x", TensorProto.FLOAT, ["n", 1, 128, 128]), value(source, TensorProto.FLOAT, ["n", 32, 128, 128])
    model = save(tmp_path / "wide.onnx", nodes, [x], [y], weights)
    images = np.random.default_rng(0).standard_normal((64, 1, 128, 128)).astype(np.float32)
    inputs = [{"name": "x", "dtype": "float32", "shape": [None, 1, 128, 128]}]
    asked = request(model, tmp_path / "o", "int8", inputs, samples=[images])
    asked["calibration"]["ranges"] = "entropy"
    few = {**asked, "calibration": {**asked["calibration"], "indices": list(range(8))}}
    assert peak(asked) < peak(few) + 48
