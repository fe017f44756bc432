"""Pruning: the masks, and what it does to real files of each format, run by their own engines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pruning_models
import pytest
import torch
from ai_edge_litert.interpreter import Interpreter
from onnx import numpy_helper

from edge_infer.errors import ConversionError, UsageError
from edge_infer.quantize import prune_onnx, prune_tflite, prune_torchscript, pruning
from edge_infer.transfer import transfer_size

Arrays = dict[str, np.ndarray]


def drawn(seed: int = 1) -> Arrays:
    rng = np.random.default_rng(seed)
    scales = {"conv": (0.1, (8, 4, 3, 3)), "dense": (1.0, (50, 30)), "half": (0.3, (31, 7))}
    weights = {name: (scale * rng.standard_normal(shape)).astype(np.float32) for name, (scale, shape) in scales.items()}
    weights["half"] = weights["half"].astype(np.float16)
    return weights


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 1 / 3, 0.5, 0.999])
def test_masks_hold_the_smallest_weights_exactly(sparsity: float) -> None:
    weights = drawn()
    for name, mask in pruning.masks(weights, sparsity, "layer").items():
        assert mask.shape == weights[name].shape
        assert np.count_nonzero(~mask) == round(sparsity * mask.size)
        assert np.abs(weights[name][~mask]).max(initial=0) <= np.abs(weights[name][mask]).min(initial=np.inf)
    found = pruning.masks(weights, sparsity, "global")
    gone = np.concatenate([np.abs(weights[name][~mask]).ravel().astype(float) for name, mask in found.items()])
    stays = np.concatenate([np.abs(weights[name][mask]).ravel().astype(float) for name, mask in found.items()])
    assert len(gone) == round(sparsity * (len(gone) + len(stays)))
    assert gone.max(initial=0) <= stays.min()


def test_global_takes_more_where_weights_are_small() -> None:
    shares = {name: 1 - mask.mean() for name, mask in pruning.masks(drawn(), 0.5, "global").items()}
    assert shares["conv"] > 0.95 > shares["half"] > 0.5 > shares["dense"]


@pytest.mark.parametrize("scope", pruning.SCOPES)
def test_of_equal_weights_the_first_go(scope: str) -> None:
    weights = {"a": np.full((3, 5), -0.5, np.float32), "b": np.full((2, 4), 0.5, np.float32)}
    masks = pruning.masks(weights, 0.4, scope)
    if scope == "layer":
        assert masks["a"].ravel().tolist() == [False] * 6 + [True] * 9
        assert masks["b"].ravel().tolist() == [False] * 3 + [True] * 5
    else:
        assert masks["a"].ravel().tolist() == [False] * 9 + [True] * 6
        assert masks["b"].all()


def test_weights_that_are_no_numbers_stay_and_zeros_go_first() -> None:
    weights = {"a": np.array([[np.nan, 0.0, 3.0], [np.inf, -0.0, 1e-45]], np.float32)}
    assert pruning.masks(weights, 0.5, "layer")["a"].tolist() == [[True, False, True], [True, False, False]]


def test_pieces_of_large_arrays_fit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {"a": np.round(np.random.default_rng(2).standard_normal((64, 100)), 1)}
    whole = pruning.masks(weights, 0.6, "global")
    monkeypatch.setattr(pruning, "CHUNK", 77)
    assert np.array_equal(pruning.masks(weights, 0.6, "global")["a"], whole["a"])
    assert np.count_nonzero(~whole["a"]) == 3840


def test_masks_take_little_memory() -> None:
    weights = {str(i): np.random.default_rng(i).standard_normal((2048, 2048), np.float32) for i in range(4)}
    tracemalloc.start()
    pruning.masks(weights, 0.5, "global")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # A byte a weight for the masks themselves, and some arrays of 8 bytes for each weight of a chunk.
    assert peak < 4 * 2048 * 2048 + 40 * pruning.CHUNK


@pytest.mark.parametrize(
    ("sparsity", "scope", "words"), [(1.0, "layer", "less than 1"), (0.5, "all", "global or layer")]
)
def test_what_makes_no_sense_is_refused(sparsity: float, scope: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        pruning.masks(drawn(), sparsity, scope)


def test_a_model_without_weights_to_prune_is_refused() -> None:
    with pytest.raises(ConversionError, match="no convolution, dense or recurrent layer"):
        pruning.prune({}, 0.5, "layer")


# Real files. ``run(path, images)`` is the engine's answer, ``weights(path)`` what the file holds.


def run_onnx(path: Path, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: images})[0])


def run_tflite(path: Path, images: np.ndarray) -> np.ndarray:
    runner = Interpreter(model_path=str(path), num_threads=1).get_signature_runner("serving_default")
    (name,) = runner.get_input_details()
    return next(iter(runner(**{name: images}).values()))


def run_torch(path: Path, images: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        answer = torch.jit.load(str(path))(torch.from_numpy(images))
    return (answer["digit"] if isinstance(answer, dict) else answer).numpy()


def onnx_weights(path: Path) -> Arrays:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def tflite_weights(path: Path) -> Arrays:
    interpreter = Interpreter(model_path=str(path), num_threads=1)
    constant = {}
    for row in interpreter.get_tensor_details():
        try:
            constant[row["name"]] = interpreter.get_tensor(row["index"])
        except ValueError:  # computed, so not there yet
            continue
    return constant


def torch_weights(path: Path) -> Arrays:
    module = torch.jit.load(str(path))
    return {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}


Forms = dict[str, tuple[Path, Any, Callable[[Path, np.ndarray], np.ndarray], Callable[[Path], Arrays], str]]


@pytest.fixture(scope="module")
def tflite_models(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by TensorFlow, which shares no process with the tests."""
    folder = tmp_path_factory.mktemp("tflite")
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"}
    command = [sys.executable, pruning_models.__file__, str(models), str(folder)]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def forms(models: Path, tflite_models: Path) -> Forms:
    return {
        "onnx": (models / "torch.onnx", prune_onnx, run_onnx, onnx_weights, "test_nchw.npz"),
        "tflite": (tflite_models / "digits.tflite", prune_tflite, run_tflite, tflite_weights, "test.npz"),
        "torchscript": (models / "torch_script.pt", prune_torchscript, run_torch, torch_weights, "test_nchw.npz"),
    }


def pruned(module: Any, path: Path, work: Path, sparsity: float = 0.5, scope: str = "layer") -> dict[str, Any]:
    work.mkdir()
    details = {"model": str(path), "signature": "serving_default"}
    result = module.prune({"from": details, "out": str(work), "sparsity": sparsity, "scope": scope})
    json.dumps(result)
    return result


FORMATS = ("onnx", "tflite", "torchscript")


@pytest.mark.parametrize("scope", pruning.SCOPES)
@pytest.mark.parametrize("format", FORMATS)
def test_the_digits_network_at_half_its_weights(
    forms: Forms, models: Path, tmp_path: Path, format: str, scope: str
) -> None:
    source, module, run, weights, test_set = forms[format]
    result = pruned(module, source, tmp_path / "work", 0.5, scope)
    path = Path(result["details"]["model"])
    assert result["sparsity"] == pytest.approx(0.5, abs=4 / 84896)
    assert sum(layer["weights"] for layer in result["layers"]) == 288 + 18432 + 65536 + 640
    before, after = weights(source), weights(path)
    zeros = 0
    for name, array in after.items():
        changed = before[name] != array
        zeros += np.count_nonzero(array[changed] == 0)
        assert not array[changed].any()  # nothing else changed
        if array.ndim < 2:
            assert not changed.any()
    assert zeros == round(0.5 * 84896)
    with np.load(models / test_set) as data:
        images, labels = data["image"], data["label"]
    answers, old = run(path, images), run(source, images)
    assert answers.shape == old.shape == (500, 10)
    assert np.isfinite(answers).all()
    assert not np.array_equal(answers, old)
    accuracy, old_accuracy = ((array.argmax(axis=1) == labels).mean() for array in (answers, old))
    assert old_accuracy > 0.97
    # The first convolution has 288 weights and needs them: of all layers alike it loses half, of all together few.
    assert accuracy > old_accuracy - (0.02 if scope == "global" else 0.15)


@pytest.mark.parametrize("format", FORMATS)
def test_the_same_request_gives_the_same_bytes_and_less_to_send(forms: Forms, tmp_path: Path, format: str) -> None:
    source, module, *_ = forms[format]
    first, second = (pruned(module, source, tmp_path / name, 0.7, "global") for name in ("a", "another folder"))
    paths = [Path(result["details"]["model"]) for result in (first, second)]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert str(tmp_path).encode() not in paths[0].read_bytes()
    assert transfer_size([paths[0]]) < 0.6 * transfer_size([source])


@pytest.mark.parametrize("format", FORMATS)
def test_pruning_by_nothing_changes_no_answer(forms: Forms, models: Path, tmp_path: Path, format: str) -> None:
    source, module, run, _, test_set = forms[format]
    result = pruned(module, source, tmp_path / "work", 0.0)
    with np.load(models / test_set) as data:
        images = data["image"][:50]
    assert result["sparsity"] < 0.01
    assert np.array_equal(run(Path(result["details"]["model"]), images), run(source, images))


def test_onnx_weights_in_branches_constants_and_outside_are_found_and_tables_left(tmp_path: Path) -> None:
    source = pruning_models.make_onnx(tmp_path)
    result = pruned(prune_onnx, source, tmp_path / "work")
    path = Path(result["details"]["model"])
    names = {"shared", "outer", "inline", "then own", "else own"}
    assert {layer["name"] for layer in result["layers"]} == names
    assert all((layer["weights"], layer["zeros"]) == (64, 32) for layer in result["layers"])
    after = onnx_weights(path)
    assert np.array_equal(after["table"], onnx_weights(source)["table"])
    assert np.array_equal(after["grid"], onnx_weights(source)["grid"])
    assert np.count_nonzero(after["shared"]) == 32
    for gain in (1.0, -1.0):
        session, old = (onnxruntime.InferenceSession(p, providers=["CPUExecutionProvider"]) for p in (path, source))
        feed = {"tokens": np.array([3, 7]), "gain": np.array(gain, np.float32)}
        answer = session.run(None, feed)[0]
        assert answer.shape == (2, 12)
        assert not np.array_equal(answer, old.run(None, feed)[0])


def test_tflite_weights_in_loops_are_found_and_tables_left(tflite_models: Path, tmp_path: Path) -> None:
    source = tflite_models / "words.tflite"
    result = pruned(prune_tflite, source, tmp_path / "work", 0.25)
    assert [(layer["weights"], layer["zeros"]) for layer in result["layers"]] == [(1024, 256), (1024, 256)]
    path = Path(result["details"]["model"])
    tokens = np.array([[3, 1, 4, 1, 5]], np.int32)
    answer, old = run_tflite(path, tokens), run_tflite(source, tokens)
    assert answer.shape == old.shape == (5, 24)
    assert not np.array_equal(answer, old)
    table = next(array for array in tflite_weights(source).values() if array.shape == (24, 16))
    assert np.array_equal(next(array for array in tflite_weights(path).values() if array.shape == (24, 16)), table)


@pytest.mark.parametrize("how", ["traced", "scripted", "frozen"])
def test_torchscript_weights_of_any_layer_are_found_and_tied_ones_stay_tied(tmp_path: Path, how: str) -> None:
    torch.manual_seed(3)
    tokens = torch.arange(10).reshape(2, 5)
    words = pruning_models.Words().eval()
    with torch.no_grad():
        module = torch.jit.script(words) if how == "scripted" else torch.jit.trace(words, tokens)
        module = torch.jit.freeze(module) if how == "frozen" else module
    module.save(str(tmp_path / "words.pt"))
    result = pruned(prune_torchscript, tmp_path / "words.pt", tmp_path / "work")
    path = Path(result["details"]["model"])
    assert sorted(layer["weights"] for layer in result["layers"]) == [256, 256, 768, 768, 1024, 1024, 1024, 1024]
    assert result["sparsity"] == 0.5
    loaded = torch.jit.load(str(path))
    with torch.inference_mode():
        answer = loaded(tokens)
        # The same network with the same zeros, layer by layer.
        for name, tensor in words.named_parameters():
            if tensor.dim() > 1 and not name.startswith(("table", "norm")):
                tensor[torch.from_numpy(~pruning.masks({"w": tensor.numpy()}, 0.5, "layer")["w"])] = 0
        words.turn[torch.from_numpy(~pruning.masks({"w": words.turn.numpy()}, 0.5, "layer")["w"])] = 0
        assert torch.allclose(answer, words(tokens), atol=1e-6)
    if how != "frozen":
        state = dict(loaded.named_parameters(remove_duplicate=False))
        assert state["first.weight"].data_ptr() == state["second.weight"].data_ptr()
        assert state["out.weight"].data_ptr() == state["table.weight"].data_ptr()
        assert torch.count_nonzero(state["table.weight"]) == 320


def test_torchscript_attention_is_pruned_on_the_fast_path_too(tmp_path: Path) -> None:
    torch.backends.mha.set_fastpath_enabled(True)  # the packager's loader switches it off
    torch.manual_seed(4)
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        module = torch.jit.trace(pruning_models.Attention().eval(), x)
    assert "_transformer_encoder_layer_fwd" in str(module.inlined_graph)
    module.save(str(tmp_path / "attention.pt"))
    result = pruned(prune_torchscript, tmp_path / "attention.pt", tmp_path / "work", 0.5)
    assert sorted(layer["weights"] for layer in result["layers"]) == [256, 512, 512, 768]
    assert run_torch(Path(result["details"]["model"]), x.numpy()).shape == (2, 5, 16)


def test_transfer_size_is_zlibs_of_each_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    contents = [bytes(3_000_000), rng.bytes(100_000), b"", rng.integers(0, 4, 2_500_000).astype(np.uint8).tobytes()]
    files = [tmp_path / str(index) for index in range(len(contents))]
    for file, content in zip(files, contents):
        file.write_bytes(content)
    assert transfer_size(files) == sum(len(zlib.compress(content, 6)) for content in contents)
