"""TFLite in every precision, from a float32 file; and whether the engines that it is said to run on run it."""

from __future__ import annotations

import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_models
import tflite_models
from ai_edge_litert.interpreter import Interpreter
from tflite_models import Net, weights

from edge_infer import worker
from edge_infer.convert import tflite_files, tflite_precision
from edge_infer.errors import ConversionError, UsageError
from edge_infer.quantize import large_tensors, ranges, tflite, tflite_releases, tflite_versions
from edge_infer.quantize.ranges import Ranges

Arrays = dict[str, np.ndarray]
PRECISIONS = ("float32", "float16", "int8-dynamic", "int8-weights", "int4-weights", "int16x8", "int8")


def request(
    model: Path, out: Path, precision: str, samples: list[Arrays], shapes: dict[str, list[int | None]], **more: Any
) -> dict[str, Any]:
    """A builder's request; ``samples`` are full inputs of one size."""
    folder = out.parent / f"{out.name}-samples"
    folder.mkdir(exist_ok=True)
    out.mkdir(exist_ok=True)
    for index, name in enumerate(shapes):
        np.save(folder / f"{index}.npy", np.stack([sample[name] for sample in samples]))
    inputs = [{"name": name, "dtype": str(samples[0][name].dtype), "shape": shape} for name, shape in shapes.items()]
    calibration = {"samples": str(folder), "indices": list(range(len(samples))), "ranges": "minmax"}
    return {
        "from": {"model": str(model), "signature": "serving_default"},
        "out": str(out),
        "inputs": inputs,
        "outputs": [],
        "precision": precision,
        "calibration": calibration,
        "keep_float": [],
        "target": {},
        **more,
    }


def run(model: Path, feed: Arrays) -> Arrays:
    interpreter = Interpreter(model_path=str(model), num_threads=1)
    return dict(interpreter.get_signature_runner("serving_default")(**feed))


def error(answer: np.ndarray, exact: np.ndarray) -> float:
    """Noise power over signal power."""
    return float(np.square(answer - exact).sum() / np.square(exact).sum())


def types(model: Path) -> dict[str, int]:
    return {tensor.name.decode(): tensor.type for tensor in tflite_files.read(model).subgraphs[0].tensors}


# the digits, from a SavedModel to each precision


@pytest.fixture(scope="module")
def digits(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    start = {"saved_model": str(models / "keras_saved_model"), "signature": "serving_default"}
    answer = worker.run(
        "edge_infer.convert.saved_model_to_tflite:convert", {"from": start, "out": str(folder)}, folder / "log.txt"
    )
    assert answer["details"]["signature"] == "serving_default"
    assert "tensorflow" in answer["tools"]
    return Path(answer["details"]["model"])


@pytest.fixture(scope="module")
def digits_request(digits: Path, models: Path) -> Callable[..., dict[str, Any]]:
    with np.load(models / "calibration.npz") as data:
        samples = [{"image": image[None]} for image in data["image"][:100]]

    def make(out: Path, precision: str, **more: Any) -> dict[str, Any]:
        return request(digits, out, precision, samples, {"image": [None, 8, 8, 1]}, **more)

    return make


#: The least accuracy on the test set (float32 has 0.978), the most bytes, tflite-runtime's oldest release.
DIGITS = {
    "float32": (0.977, 345_000, "1.5.0"),
    "float16": (0.975, 177_500, "1.15.0"),
    "int8-dynamic": (0.970, 95_000, None),
    "int8-weights": (0.970, 95_000, "2.7.0"),
    "int4-weights": (0.960, 53_000, None),
    "int16x8": (0.970, 96_000, "2.14.0"),
    "int8": (0.970, 95_500, "2.14.0"),
}


@pytest.fixture(scope="module")
def digits_built(
    digits_request: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("digits-built")
    built = {}
    for precision in PRECISIONS:
        out = folder / precision
        facts = tflite.build(digits_request(out, precision))
        assert [path.name for path in out.iterdir()] == ["model.tflite"]
        built[precision] = (out / facts["model"], facts)
    return built


@pytest.mark.parametrize("precision", PRECISIONS)
def test_digits_keep_their_accuracy(
    precision: str, digits_built: dict[str, tuple[Path, dict[str, Any]]], models: Path
) -> None:
    model, facts = digits_built[precision]
    accuracy, size, runtime = DIGITS[precision]
    with np.load(models / "test.npz") as data:
        answers = run(model, {"image": data["image"]})["output_0"]  # a batch of another size than it was calibrated on
        assert (answers.argmax(1) == data["label"]).mean() >= accuracy
    assert answers.dtype == np.float32
    assert model.stat().st_size <= size
    assert dict(facts["requires"]) == {"ai-edge-litert": "1.4.0"} | ({"tflite-runtime": runtime} if runtime else {})
    assert facts["signature"] == "serving_default"


@pytest.mark.parametrize("method", ["percentile", "entropy"])
def test_narrower_ranges_keep_the_accuracy_too(
    method: str, digits_request: Callable[..., dict[str, Any]], models: Path, tmp_path: Path
) -> None:
    wish = digits_request(tmp_path / "out", "int8")
    wish["calibration"] |= {"ranges": method, "indices": list(range(20))}
    tflite.build(wish)
    with np.load(models / "test.npz") as data:
        answers = run(tmp_path / "out" / "model.tflite", {"image": data["image"]})["output_0"]
        assert (answers.argmax(1) == data["label"]).mean() >= 0.96


def test_same_request_gives_the_same_bytes(
    digits_request: Callable[..., dict[str, Any]],
    digits_built: dict[str, tuple[Path, dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    wish = digits_request(tmp_path / "another", "int8")
    facts = worker.run("edge_infer.quantize.tflite:build", wish, tmp_path / "log.txt")
    model, expected = digits_built["int8"]
    assert (tmp_path / "another" / "model.tflite").read_bytes() == model.read_bytes()
    assert facts == expected


def test_operators_that_tflite_lacks_are_named(tmp_path: Path) -> None:
    start = {"saved_model": str(tensorflow_models.made() / "beyond_tflite"), "signature": "serving_default"}
    with pytest.raises(ConversionError, match=r"no built-in operator for Betainc in layer 'likelihood"):
        worker.run(
            "edge_infer.convert.saved_model_to_tflite:convert",
            {"from": start, "out": str(tmp_path)},
            tmp_path / "log.txt",
        )


# contracts


def lookup_request(folder: Path, precision: str) -> dict[str, Any]:
    rng = np.random.default_rng(5)
    samples = [
        {"ids": rng.integers(0, 64, (1, 9), np.int32), "features": rng.standard_normal((1, 48), np.float32)}
        for _ in range(30)
    ]
    model = tflite_models.lookup(folder / "float.tflite")
    return request(model, folder / precision, precision, samples, {"ids": [None, None], "features": [None, 48]})


@pytest.mark.parametrize("precision", PRECISIONS)
def test_dynamic_sizes_integers_and_ties_survive(precision: str, tmp_path: Path) -> None:
    wish = lookup_request(tmp_path, precision)
    tflite.build(wish)
    model = tmp_path / precision / "model.tflite"
    rng = np.random.default_rng(6)
    for batch, length in ((1, 9), (3, 4), (2, 1)):
        feed = {
            "ids": rng.integers(0, 64, (batch, length), np.int32),
            "features": rng.standard_normal((batch, 48), np.float32),
        }
        exact, answer = run(tmp_path / "float.tflite", feed), run(model, feed)
        assert sorted(answer) == ["each", "score"]
        for name, array in answer.items():
            assert (array.dtype, array.shape) == (np.float32, exact[name].shape)
            assert error(array, exact[name]) < (4e-2 if precision == "int4-weights" else 1e-3)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_tied_weights_are_stored_once(precision: str, tmp_path: Path) -> None:
    tflite.build(lookup_request(tmp_path, precision))
    size = (tmp_path / precision / "model.tflite").stat().st_size
    each = 2 if precision == "float16" else 4
    assert size < (64 * 48 + 2 * 48 * 48) * each + 6000  # the table once, the other two layers


def test_weights_beyond_float16_stay_float32(tmp_path: Path) -> None:
    net = Net()
    x = net.input("x", (None, 64))
    y = net.dense(net.dense(x, "large", weights(1, 64, 64) * 1e6), "small", weights(2, 64, 64) * 1e-6)
    model = net.finish(tmp_path / "float.tflite", {"x": x}, {"y": y})
    samples = [{"x": weights(3, 1, 64)}]
    tflite.build(request(model, tmp_path / "out", "float16", samples, {"x": [None, 64]}))
    made = types(tmp_path / "out" / "model.tflite")
    assert made["large/weights"] == tflite.TYPES.FLOAT32
    assert made["small/weights"] == tflite.TYPES.FLOAT16


def test_only_the_read_half_of_a_split(tmp_path: Path) -> None:
    """An output that nothing reads stays float in the quantizer, and the engine refuses such a mix."""
    net = Net()
    x = net.input("x", (1, 64))
    axis = net.constant("axis", np.array(1, np.int32))
    hidden = net.dense(x, "hidden", weights(1, 64, 64))
    options = tflite_models.schema.SplitOptionsT()
    options.numSplits = 2
    half = net.call("SPLIT", [axis, hidden], [net.tensor("left", (1, 32)), net.tensor("right", (1, 32))], options)
    model = net.finish(tmp_path / "float.tflite", {"x": x}, {"y": net.dense(half, "last", weights(2, 32, 32))})
    samples = [{"x": weights(seed, 1, 64)} for seed in range(3, 9)]
    tflite.build(request(model, tmp_path / "out", "int8", samples, {"x": [1, 64]}))
    feed = samples[0]
    assert error(run(tmp_path / "out" / "model.tflite", feed)["y"], run(model, feed)["y"]) < 1e-3


# refusals


def plain(path: Path, operator: str = "SIN") -> Path:
    net = Net()
    x = net.input("x", (None, 4))
    y = net.call(operator, [x], [net.tensor("y", (None, 4))])
    return net.finish(path, {"x": x}, {"y": y})


@pytest.mark.parametrize("precision", PRECISIONS[1:])
def test_a_precision_that_changes_nothing_is_refused(precision: str, tmp_path: Path) -> None:
    wish = request(
        plain(tmp_path / "m.tflite"), tmp_path / "out", precision, [{"x": weights(1, 1, 4)}], {"x": [None, 4]}
    )
    with pytest.raises(ConversionError, match=rf"{precision} changes nothing .*operators: SIN"):
        tflite.build(wish)
    assert not list((tmp_path / "out").iterdir())


def test_custom_operators_are_refused_by_name(tmp_path: Path) -> None:
    model = plain(tmp_path / "m.tflite", "FlexErf")
    with pytest.raises(ConversionError, match="custom operators FlexErf"):
        tflite_files.scan(model.read_bytes())
    wish = request(model, tmp_path / "out", "float32", [{"x": weights(1, 1, 4)}], {"x": [None, 4]})
    with pytest.raises(ConversionError, match="custom operators FlexErf"):
        tflite.build(wish)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_was_made_tells_its_precision(
    precision: str, digits_built: dict[str, tuple[Path, dict[str, Any]]]
) -> None:
    assert tflite_precision.precision_of(tflite_files.read(digits_built[precision][0])) == precision


def test_static_precisions_need_samples(tmp_path: Path) -> None:
    wish = stack_request(tmp_path, "int8") | {"calibration": None}
    with pytest.raises(UsageError, match="int8 needs real samples"):
        tflite.build(wish)


# layers


def stack_request(folder: Path, precision: str, spread: float = 1.0, **more: Any) -> dict[str, Any]:
    model = tflite_models.stack(folder / "float.tflite", spread=spread)
    samples = [{"x": weights(seed, 1, 32)} for seed in range(10, 60)]
    return request(model, folder / precision, precision, samples, {"x": [None, 32]}, **more)


def test_sensitivity_finds_the_layer_that_suffers(tmp_path: Path) -> None:
    found = tflite.sensitivity(stack_request(tmp_path, "int8", spread=3000.0))["layers"]
    assert [row["name"] for row in found] == ["first", "second", "third", "fourth"]
    assert {row["kind"] for row in found} == {"FULLY_CONNECTED"}
    assert [row["bytes"] for row in found] == [
        4 * (outs * ins + outs) for outs, ins in ((64, 32), (64, 64), (64, 64), (16, 64))
    ]
    assert all(row["error"] >= 0 for row in found)
    # One output of ``second`` is 3000 times the others, so one scale for all of them tells nothing of those.
    assert max(found, key=lambda row: row["error"])["name"] == "third"
    assert not list((tmp_path / "int8").iterdir())


def test_layers_kept_in_float(tmp_path: Path) -> None:
    answers = {}
    for precision, keep in (("int8", []), ("int8-mixed", ["second", "third"])):
        tflite.build(stack_request(tmp_path, precision, spread=3000.0, keep_float=keep))
        path = tmp_path / precision / "model.tflite"
        made = types(path)
        assert made["second/weights"] == (tflite.TYPES.FLOAT32 if keep else tflite.TYPES.INT8)
        assert made["fourth/weights"] == tflite.TYPES.INT8
        exact, feed = tmp_path / "float.tflite", {"x": weights(99, 8, 32)}
        answers[precision] = error(run(path, feed)["y"], run(exact, feed)["y"])
    assert answers["int8-mixed"] < answers["int8"] / 10


def test_unknown_layers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no layer 'secnod'"):
        tflite.build(stack_request(tmp_path, "int8-mixed", keep_float=["secnod"]))


# engines

#: Run by a device's Python: model files and questions in, answers or the engine's words out.
DEVICE = """
import json, pickle, sys
from tflite_runtime.interpreter import Interpreter
answers = []
for model, feed in pickle.load(open(sys.argv[1], "rb")):
    try:
        interpreter = Interpreter(model_content=model, num_threads=1)
        answers.append(interpreter.get_signature_runner()(**feed) if feed else True)
    except (RuntimeError, ValueError) as error:
        answers.append(str(error))
pickle.dump(answers, open(sys.argv[2], "wb"))
"""


def ask_runtime(python: Path, folder: Path, questions: list[tuple[bytes, Arrays | None]]) -> list[Any]:
    (folder / "questions").write_bytes(pickle.dumps(questions, protocol=4))
    subprocess.run(
        [python, "-c", DEVICE, folder / "questions", folder / "answers"], check=True, capture_output=True, cwd=folder
    )
    answers: list[Any] = pickle.loads((folder / "answers").read_bytes())
    return answers


def test_tflite_runtime_runs_what_it_is_said_to(
    device_python: Callable[[str], Path], digits_built: dict[str, tuple[Path, dict[str, Any]]], tmp_path: Path
) -> None:
    image = np.random.default_rng(1).random((2, 8, 8, 1), np.float32)
    cases = [(model, facts, {"image": image}) for model, facts in digits_built.values()]
    for precision in PRECISIONS:
        wish = lookup_request(tmp_path, precision)
        cases.append((tmp_path / precision / "model.tflite", tflite.build(wish), {**sample(wish)}))
    # A scale for all weights of a layer is what that engine knows, and what a build for it makes.
    wish = stack_request(tmp_path, "int8-dynamic", target={"engine": "tflite-runtime"})
    wish["out"] = str(tmp_path)
    cases.append((tmp_path / "model.tflite", tflite.build(wish), {"x": weights(3, 2, 32)}))
    assert dict(cases[-1][1]["requires"])["tflite-runtime"] == "1.14.0"
    answers = ask_runtime(
        device_python("tflite-runtime"), tmp_path, [(model.read_bytes(), feed) for model, _, feed in cases]
    )
    for (model, facts, feed), answer in zip(cases, answers, strict=True):
        if "tflite-runtime" in dict(facts["requires"]):
            assert isinstance(answer, dict), (model, answer)
            for name, exact in run(model, feed).items():
                assert error(answer[name], exact) < 1e-3, model
            assert tflite_versions.oldest_engines(tflite_files.read(model)).why is None
        else:
            # int16x8 layers of three dimensions are taken, and answered with whatever was in memory.
            assert "Didn't find op" in str(answer) or model.parent.name == "int16x8", model
            assert "the last tflite-runtime" in str(tflite_versions.oldest_engines(tflite_files.read(model)).why)


def sample(wish: dict[str, Any]) -> Arrays:
    return next(tflite._feeds(wish))


def test_releases_have_the_versions_that_the_tables_say(device_python: Callable[[str], Path], tmp_path: Path) -> None:
    rows = [
        (name, version, release)
        for name, releases in tflite_releases.RELEASES.items()
        for version, release in enumerate(releases, 1)
        if (name, version) != ("BROADCAST_TO", 1)  # taken back before any release
    ]
    rows += [(*row, "3") for row in tflite_releases.LITERT_SINCE if row[1] > len(tflite_releases.RELEASES[row[0]])]
    models = [tflite_models.one_operator(name, version) for name, version, _ in rows]
    for (name, version, _), model in zip(rows, models, strict=True):
        assert Interpreter(model_content=model), (name, version)
    answers = ask_runtime(device_python("tflite-runtime"), tmp_path, [(model, None) for model in models])
    wrong = [
        (*row, answer)
        for row, answer in zip(rows, answers, strict=True)
        if (answer is True) != tflite_versions._at_most(row[2], tflite_releases.RUNTIME_LAST)
    ]
    assert not wrong


def test_the_file_says_what_it_needs(digits_built: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    for precision, expected in (("float32", b"1.5.0"), ("int8-dynamic", b"2.17.0"), ("int8", b"2.14.0")):
        model = tflite_files.read(digits_built[precision][0])
        assert [entry.name for entry in model.metadata] == [b"min_runtime_version"]
        assert bytes(model.buffers[model.metadata[0].buffer].data).rstrip(b"\0") == expected


def test_versions_that_are_too_high_are_lowered(tmp_path: Path) -> None:
    model = tflite_files.read(tflite_models.stack(tmp_path / "m.tflite"))
    for code in model.operatorCodes:
        code.version = 12
    tflite_versions.set_versions(model)
    assert tflite_versions.used_versions(model) == {("FULLY_CONNECTED", 1)}


# files


def test_files_are_written_the_same_again(digits: Path) -> None:
    content = digits.read_bytes()
    model = tflite_files.read(content)
    assert tflite_files.to_bytes(model) == content
    start = np.frombuffer(content, np.uint8).__array_interface__["data"][0]
    places = [buffer.data.__array_interface__["data"][0] - start for buffer in model.buffers if buffer.data is not None]
    assert places and all(place % tflite_files.ALIGNMENT == 0 for place in places)


def test_weights_behind_the_flatbuffer(digits: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The layout of files beyond 2 GiB."""
    monkeypatch.setattr(tflite_files, "LARGEST_FLATBUFFER", 2**26)
    far = tmp_path / "far.tflite"
    tflite_files.write(tflite_files.read(digits), far)
    monkeypatch.undo()
    feed = {"image": np.random.default_rng(1).random((1, 8, 8, 1), np.float32)}
    assert np.array_equal(run(far, feed)["output_0"], run(digits, feed)["output_0"])
    assert tflite_files.to_bytes(tflite_files.read(far)) == digits.read_bytes()


def test_signatures_are_renamed(tmp_path: Path) -> None:
    content = tflite_models.lookup(tmp_path / "m.tflite").read_bytes()
    renamed = tflite_files.rename_signature(
        content, {"ids": "tokens", "features": "ids"}, {"each": "score", "score": "each"}, "main"
    )
    known = Interpreter(model_content=renamed).get_signature_list()
    assert known == {"main": {"inputs": ["ids", "tokens"], "outputs": ["each", "score"]}}
    with pytest.raises(ConversionError, match="inputs are features, ids, expected to rename ids"):
        tflite_files.rename_signature(content, {"ids": "x"}, {}, "main")


def test_a_model_without_a_signature_gets_one(tmp_path: Path) -> None:
    model = tflite_files.read(tflite_models.stack(tmp_path / "m.tflite"))
    model.signatureDefs = None
    named = tflite_files.rename_signature(tflite_files.to_bytes(model), {"x": "in"}, {"fourth": "out"})
    interpreter = Interpreter(model_content=named)
    assert interpreter.get_signature_list() == {"serving_default": {"inputs": ["in"], "outputs": ["out"]}}


@pytest.mark.parametrize("content", [b"", b"TFL3", b"PK\3\4TFL3", b"\x10\0\0\0TFL3" + b"\xff" * 40])
def test_what_is_no_model_is_refused(content: bytes) -> None:
    with pytest.raises(ConversionError, match=r"not a TFLite model|damaged TFLite model"):
        tflite_files.read(content)


# ranges


def test_minmax_is_what_was_seen() -> None:
    seen = Ranges("minmax")
    for part in (np.array([1.0, -2.0]), np.array([[np.inf, 7.0], [np.nan, -np.inf]]), np.zeros((0, 3))):
        seen.update({"a": part, "b": part * 0.5})
    assert seen.result() == {"a": (-2.0, 7.0), "b": (-1.0, 3.5)}


def test_percentile_leaves_the_rarest_out() -> None:
    values = np.random.default_rng(1).standard_normal(200_000).astype(np.float32)
    values[:2] = (-90.0, 70.0)
    seen = Ranges("percentile")
    for part in np.split(values, 50):
        seen.update({"x": part})
    low, high = seen.result()["x"]
    expected = np.percentile(values, [0.005, 99.995])
    assert np.allclose([low, high], expected, atol=0.1)


def test_entropy_agrees_with_another_search() -> None:
    """ONNX Runtime's rounds the spread counts to integers, so it lands nearby and not on the same bin."""
    from onnxruntime.quantization.calibrate import HistogramCollector

    rng = np.random.default_rng(2)
    seen = Ranges("entropy")
    for _ in range(5):
        seen.update({"x": rng.laplace(size=4000).astype(np.float32)})
    held = seen._seen["x"]
    peer = HistogramCollector("entropy", False, len(held.bins), ranges.STEPS, 100, "same")
    edges = np.linspace(-held.reach, held.reach, len(held.bins) + 1, dtype=np.float32)
    histogram = (held.bins, edges, np.float32(held.least), np.float32(held.largest), np.float32(held.reach))
    low, high = peer.get_entropy_threshold(histogram, ranges.STEPS)
    assert np.allclose(seen.result()["x"], (low, high), rtol=0.2)
    assert seen.result()["x"][1] < 0.9 * held.largest


@pytest.mark.parametrize("method", ["percentile", "entropy"])
def test_memory_does_not_grow_with_what_is_seen(method: str) -> None:
    seen = Ranges(method)
    for exponent in range(-20, 20):
        seen.update({"x": np.full(10, 10.0**exponent, np.float32), "zero": np.zeros(3, np.float32)})
    assert len(seen._seen["x"].bins) == ranges.BINS[method]
    assert seen._seen["x"].bins.sum() == 400
    assert seen.result()["zero"] == (0.0, 0.0)


def test_unknown_ranges_are_refused() -> None:
    with pytest.raises(UsageError, match="no 'kl' ranges, expected one of minmax"):
        Ranges("kl")


@pytest.mark.parametrize("channels_first", [True, False])
def test_weights_of_large_convolutions_are_quantized_as_small_ones_are(
    channels_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The quantizer itself fails on more than 32 MiB; here on pieces of 1 KiB, with a scale for each channel."""
    from ai_edge_quantizer import qtyping
    from ai_edge_quantizer.algorithms.uniform_quantize import uniform_quantize_tensor

    monkeypatch.setattr(uniform_quantize_tensor, "uniform_quantize", uniform_quantize_tensor.uniform_quantize)
    rng = np.random.default_rng(4)
    weights = rng.standard_normal((37, 3, 3, 8)).astype(np.float32)
    axis = 0 if channels_first else 3
    scales = (rng.random(weights.shape[axis]) / 50 + 0.01).astype(np.float32)
    parameters = qtyping.UniformQuantParams(
        num_bits=8, quantized_dimension=axis, scale=scales, zero_point=np.zeros(len(scales), np.int32)
    )
    whole = uniform_quantize_tensor.uniform_quantize(weights, parameters)
    monkeypatch.setattr(large_tensors, "PIECE_BYTES", 1024)
    large_tensors.mend()
    large_tensors.mend()
    np.testing.assert_array_equal(uniform_quantize_tensor.uniform_quantize(weights, parameters), whole)
    large = np.zeros((1100, 3, 3, 1100), np.float32)
    monkeypatch.setattr(large_tensors, "PIECE_BYTES", 32 * 1024 * 1024)
    one = qtyping.UniformQuantParams(
        num_bits=8, quantized_dimension=0, scale=np.ones(1100, np.float32), zero_point=np.zeros(1100, np.int32)
    )
    assert uniform_quantize_tensor.uniform_quantize(large, one).shape == large.shape
