"""One contract for every engine: open a bundle, check what goes in, run, close."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handmade import make_bundle, manifest_for, rebuild, settle

import edge_infer
from edge_infer import Session, load
from edge_infer.bundle import Bundle, write_bundle
from edge_infer.errors import (
    BundleError,
    EngineError,
    EngineMissing,
    InputError,
    ReleaseNotFound,
    SessionClosed,
    UsageError,
)
from edge_infer.manifest import Artifact, Golden, Requirement, TensorSpec
from edge_infer.runtime.arrays import write_npz
from edge_infer.runtime.golden import read_golden, self_test
from edge_infer.runtime.threads import default_threads
from edge_infer.store import Store, default_root

Array = np.ndarray[Any, Any]
SOURCES = {"tflite": "keras.keras", "onnx": "torch.onnx", "torchscript": "torch_script.pt"}
LIBRARIES = {"tflite": "ai_edge_litert", "onnx": "onnxruntime", "torchscript": "torch"}
VARIANTS = [(format, precision) for precision in ("float32", "int8") for format in SOURCES]

each_format = pytest.mark.parametrize("bundle", [(format, "float32") for format in SOURCES], indirect=True, ids=SOURCES)


@pytest.fixture(params=VARIANTS, ids="-".join)
def bundle(request: pytest.FixtureRequest, packaged: Callable[..., Bundle]) -> Bundle:
    format, precision = request.param
    return packaged(SOURCES[format], format, precision)


@pytest.fixture
def session(bundle: Bundle) -> Iterator[Session]:
    with load(bundle.path, threads=2) as opened:
        yield opened


def images(session: Session | Bundle, count: int, seed: int = 0) -> Array:
    bundle = session.bundle if isinstance(session, Session) else session
    shape = [count, *bundle.manifest.inputs[0].shape[1:]]
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


# -- running -----------------------------------------------------------------------------------------------------


def test_run_and_call_give_the_same_answers_by_name(session: Session) -> None:
    x = images(session, 2)
    answers = session.run({"image": x})
    assert list(answers) == ["digit"]
    assert (answers["digit"].shape, answers["digit"].dtype) == ((2, 10), np.float32)
    assert np.allclose(answers["digit"].sum(axis=1), 1, atol=0.02)
    assert np.array_equal(session(x), answers["digit"])
    assert not np.array_equal(session(images(session, 2, seed=1)), answers["digit"])


def test_a_session_describes_itself(session: Session, bundle: Bundle) -> None:
    assert (session.inputs, session.outputs) == (bundle.manifest.inputs, bundle.manifest.outputs)
    assert session.bundle.digest == bundle.digest
    assert (session.info.provider, session.info.threads, session.info.notes) == ("cpu", 2, ())
    assert session.info.package in [requirement.package for requirement in bundle.manifest.artifact.requires]


def test_every_digit_network_still_knows_its_digits(
    session: Session, bundle: Bundle, digits_test_set: Callable[[str], tuple[Array, Array]]
) -> None:
    x, labels = digits_test_set(SOURCES[bundle.manifest.artifact.format])
    assert len(labels) == 500
    assert np.mean(session(x).argmax(axis=1) == labels) >= 0.97


def test_the_golden_questions_are_answered_and_tell_inputs_apart(session: Session) -> None:
    worst = self_test(session)
    allowed = session.bundle.manifest.golden.tolerance
    assert worst.keys() == allowed.keys() == {"digit"}
    assert worst["digit"] <= allowed["digit"]
    cases = [answers["digit"] for _, answers in read_golden(session.bundle)]
    assert np.abs(cases[0][:1] - cases[1][:1]).max() > 10 * allowed["digit"]
    assert session.bundle.manifest.golden.blind == ()


def test_the_batch_may_change_from_run_to_run(session: Session) -> None:
    x = images(session, 7)
    one = session(x[:1])
    whole = session(x)
    for count in (2, 7, 1):
        answers = session(x[:count])
        assert answers.shape == (count, 10)
        assert np.allclose(answers, whole[:count], atol=1e-6)
    assert np.array_equal(session(x[:1]), one)


def by_signature_runner(bundle: Bundle, x: Array, threads: int) -> Array:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(bundle.file("model.tflite")), num_threads=threads)
    answer: Array = interpreter.get_signature_runner("serving_default")(image=x)["digit"]
    return answer


def by_inference_session(bundle: Bundle, x: Array, threads: int) -> Array:
    import onnxruntime

    from edge_infer.runtime.engines.onnx import session_options

    options = session_options(bundle, threads)
    plain = onnxruntime.InferenceSession(str(bundle.file("model.onnx")), options, providers=["CPUExecutionProvider"])
    answer: Array = plain.run(["digit"], {"image": x})[0]
    return answer


def by_mapped_module(bundle: Bundle, x: Array, threads: int) -> Array:
    import torch

    from edge_infer.runtime.engines.torchscript import load_mapped

    torch.set_num_threads(threads)
    with torch.inference_mode():
        answer: Array = load_mapped(bundle)(torch.from_numpy(x))[0].numpy()
    return answer


PLAIN = {"tflite": by_signature_runner, "onnx": by_inference_session, "torchscript": by_mapped_module}


@pytest.mark.parametrize("threads", [1, 2])
def test_answers_equal_the_plain_engines_bit_for_bit(bundle: Bundle, threads: int) -> None:
    x = images(bundle, 3)
    with load(bundle.path, threads=threads) as session:
        answer = session(x)
    assert np.array_equal(answer, PLAIN[bundle.manifest.artifact.format](bundle, x, threads))


def test_eight_bits_for_a_device_are_computed_here_as_the_model_says(
    packaged: Callable[..., Bundle], models: Path
) -> None:
    """And as the kernels of ARM do. Those of x86 without VNNI saturate: by a third of the largest value, here."""
    import onnxruntime

    bundle = packaged("torch.onnx", "onnx", "int8", "raspberry-pi-4")
    with np.load(models / "test_nchw.npz") as data:
        x = data["image"]
    in_float = onnxruntime.SessionOptions()
    in_float.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    plain = onnxruntime.InferenceSession(str(bundle.file("model.onnx")), in_float, providers=["CPUExecutionProvider"])
    (expected,) = plain.run(None, {"image": x})
    with load(bundle.path, threads=1) as session:
        assert np.abs(session(x) - expected).max() <= 0.01 * np.abs(expected).max()


def test_mapped_torchscript_equals_the_model_it_was_made_from(packaged: Callable[..., Bundle], models: Path) -> None:
    import torch

    bundle = packaged("torch_script.pt", "torchscript", "float32")
    x = images(bundle, 3)
    source = torch.jit.load(str(models / "torch_script.pt")).eval()
    with load(bundle.path, threads=1) as session, torch.inference_mode():
        expected = source(torch.from_numpy(x))["digit"].numpy()
        # Its normalisations are folded, which rounds otherwise.
        np.testing.assert_allclose(session(x), expected, rtol=1e-4, atol=1e-6)


def test_outputs_belong_to_the_caller(session: Session) -> None:
    x, other = images(session, 2), images(session, 2, seed=1)
    first = session(x)
    kept = first.copy()
    second = session(other)
    assert not np.shares_memory(first, second)
    assert np.array_equal(first, kept)
    first[:] = -1
    assert np.array_equal(session(x), kept)
    kept = second.copy()
    session.close()
    assert np.array_equal(second, kept)


def test_inputs_are_left_alone(session: Session) -> None:
    x = images(session, 2)
    kept = x.copy()
    session(x)
    assert np.array_equal(x, kept)


# -- arrays ------------------------------------------------------------------------------------------------------


def strided(x: Array) -> Array:
    return np.repeat(x, 2, axis=0)[::2]


def reversed_twice(x: Array) -> Array:
    return x[::-1].copy()[::-1]


def read_only(x: Array) -> Array:
    copy = x.copy()
    copy.flags.writeable = False
    return copy


def unaligned(x: Array) -> Array:
    raw = np.zeros(x.nbytes + 1, np.uint8)
    raw[1:] = x.reshape(-1).view(np.uint8)
    return raw[1:].view(np.float32).reshape(x.shape)


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("arrange", [strided, reversed_twice, np.asfortranarray, read_only, unaligned])
def test_any_arrangement_of_the_same_values_gives_the_same_answer(
    session: Session, arrange: Callable[[Array], Array]
) -> None:
    x = images(session, 3)
    arranged = arrange(x)
    flags = arranged.flags
    assert not (flags.c_contiguous and flags.writeable and flags.aligned)
    assert np.array_equal(session(arranged), session(x))


def test_a_reversed_batch_of_one(session: Session) -> None:
    x = images(session, 1)
    assert x[::-1].strides[0] < 0
    assert np.array_equal(session(x[::-1]), session(x))


@each_format
@pytest.mark.parametrize(
    ("inputs", "observed", "expected"),
    [
        ({}, "[]", "['image']"),
        ({"picture": 0}, "['picture']", "['image']"),
        ({"image": 0, "mask": 0}, "['image', 'mask']", "['image']"),
        ({1: 0, "image": 0}, "['1', 'image']", "['image']"),
        ([0], "list", "['image']"),
        (None, "NoneType", "['image']"),
    ],
)
def test_wrong_names_are_refused(session: Session, inputs: Any, observed: str, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        session.run(inputs)
    assert observed in str(caught.value)
    assert expected in str(caught.value)


@each_format
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x.astype(np.float64), "dtype float64, expected float32"),
        (lambda x: x.astype(np.uint8), "dtype uint8, expected float32"),
        (lambda x: x.astype(object), "dtype object, expected float32"),
        (lambda x: x.byteswap().view(x.dtype.newbyteorder()), "dtype >f4, expected float32"),
        (lambda x: x[0], "expected image float32[?, "),
        (lambda x: x[None], "expected image float32[?, "),
        (lambda x: x[:, :, :7], "expected image float32[?, "),
        (lambda x: x.swapaxes(1, 2)[..., :1, :], "expected image float32[?, "),
        (lambda x: np.float32(1), "is a float32, expected a numpy array"),
        (lambda x: x.tolist(), "is a list, expected a numpy array of float32"),
        (lambda x: None, "is a NoneType, expected a numpy array"),
        (memoryview, "is a memoryview, expected a numpy array"),
    ],
)
def test_a_wrong_array_is_refused(session: Session, change: Callable[[Array], Any], words: str) -> None:
    x = images(session, 2)
    for ask in (session, lambda array: session.run({"image": array})):
        with pytest.raises(InputError) as caught:
            ask(change(x))
        assert "input 'image'" in str(caught.value)
        assert words in str(caught.value)
    assert session(x).shape == (2, 10)


def test_an_empty_batch_gives_an_empty_answer_or_is_refused(session: Session) -> None:
    x = images(session, 2)
    before = session(x)
    if session.bundle.manifest.artifact.format == "tflite":
        with pytest.raises(InputError, match="empty"):
            session(x[:0])
    else:
        assert session(x[:0]).shape == (0, 10)
    assert np.array_equal(session(x), before)


# -- closing -----------------------------------------------------------------------------------------------------


@each_format
def test_a_closed_session_says_so(bundle: Bundle) -> None:
    with load(bundle.path) as session:
        x = images(session, 1)
        session(x)
    session.close()
    session.close()
    for use in (lambda: session(x), lambda: session.run({"image": x}), lambda: session.info):
        with pytest.raises(SessionClosed, match="session of digits is closed"):
            use()


@each_format
def test_an_error_in_the_block_closes_the_session(bundle: Bundle) -> None:
    with pytest.raises(KeyError), load(bundle.path) as session:
        raise KeyError
    with pytest.raises(SessionClosed):
        session(images(session, 1))


# -- threads -----------------------------------------------------------------------------------------------------


def test_eight_threads_share_one_session(session: Session) -> None:
    feeds = [images(session, 1 + seed % 3, seed) for seed in range(8)]
    expected = [session(x) for x in feeds]
    start = threading.Barrier(8, timeout=60)

    def ask(number: int) -> bool:
        start.wait()
        return all(np.array_equal(session(feeds[number]), expected[number]) for _ in range(25))

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == [True] * 8


@each_format
def test_closing_under_running_threads_gives_answers_or_session_closed(bundle: Bundle) -> None:
    x = images(bundle, 2)
    with load(bundle.path, threads=1) as session:
        expected = session(x)
    for _ in range(25):
        with ThreadPoolExecutor(4) as pool:
            session, running = load(bundle.path, threads=1), threading.Barrier(5, timeout=60)
            asked = [pool.submit(ask_until_closed, session, x, expected, running) for _ in range(4)]
            running.wait()
            session.close()
            assert ["is closed" in answer.result() for answer in asked] == [True] * 4


def ask_until_closed(session: Session, x: Array, expected: Array, running: threading.Barrier) -> str:
    session(x)
    running.wait()
    try:
        while True:
            assert np.array_equal(session(x), expected)
    except SessionClosed as error:
        return str(error)


@pytest.mark.parametrize(
    ("quota", "most"), [("50000 100000\n", 1), ("100000 100000\n", 1), ("max 100000\n", 10**6), ("damaged", 10**6)]
)
def test_default_threads_stay_below_the_quota(tmp_path: Path, quota: str, most: int) -> None:
    (tmp_path / "cpu.max").write_text(quota)
    cores = len(os.sched_getaffinity(0))
    assert default_threads(tmp_path / "cpu.max") == min(cores, most)
    assert default_threads(tmp_path / "absent") == cores


# -- finding the bundle ------------------------------------------------------------------------------------------


def push(bundle: Bundle) -> Store:
    store = Store(default_root())
    staged = store.staging(bundle.digest)
    for file in bundle.path.iterdir():
        (staged / file.name).write_bytes(file.read_bytes())
    store.admit(staged, bundle.manifest.name, bundle.digest)
    store.activate(bundle.manifest.name, bundle.digest)
    return store


@each_format
def test_load_by_name_by_path_and_by_text(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    store = push(bundle)
    monkeypatch.chdir(bundle.path.parent)
    for source in ("digits", bundle.path, str(bundle.path), bundle.path.name, f"./{bundle.path.name}"):
        with load(source) as session:
            assert session.bundle.digest == bundle.digest
            expected = store.release("digits", bundle.digest) if source == "digits" else Path(source)
            assert session.bundle.path == expected


def test_a_plain_word_is_a_name_and_never_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_bundle(tmp_path / "digits")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ReleaseNotFound, match="no model 'digits'"):
        load("digits")


@pytest.mark.parametrize("source", ["", "nowhere/digits", "nowhere.edge", Path("nowhere")])
def test_nothing_there_is_a_wrong_request(source: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((UsageError, BundleError)):
        load(source)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"threads": 0}, "threads=0, expected a whole number of at least 1"),
        ({"threads": -1}, "threads=-1"),
        ({"threads": 1.5}, "threads=1.5"),
        ({"threads": "2"}, "threads='2'"),
        ({"verify": "none"}, "verify='none' is not known, expected one of auto, full"),
        ({"providers": "cpu"}, "providers='cpu', expected a tuple"),
        ({"providers": ("npu",)}, "expected a tuple of tensorrt, cuda, cpu"),
    ],
)
@each_format
def test_a_wrong_option_is_refused(bundle: Bundle, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(bundle.path, **options)
    assert words in str(caught.value)


@each_format
def test_an_accelerator_that_is_not_there_is_refused_and_the_cpu_is_not(bundle: Bundle) -> None:
    with load(bundle.path, providers=("cpu",)) as session:
        assert session.info.provider == "cpu"
    with pytest.raises(EngineError):
        load(bundle.path, providers=("tensorrt",))


def test_an_accelerator_the_bundle_prefers_may_be_absent(packaged: Callable[..., Bundle], tmp_path: Path) -> None:
    bundle = packaged("torch.onnx", "onnx", "float32")
    artifact = replace(bundle.manifest.artifact, providers=("tensorrt", "cpu"))
    with load(rebuild(bundle, tmp_path / "b.edge", artifact=artifact).path) as session:
        assert (session.info.provider, session.info.notes) == ("cpu", ("tensorrt is not in this build of onnxruntime",))


# -- trust -------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


LOAD_IN_A_CHILD = """
import json, sys
from pathlib import Path
from edge_infer import EdgeInferError, load
try:
    load(Path(sys.argv[1])).close()
    answer = "opened"
except EdgeInferError as error:
    answer = f"{type(error).__name__}: {error}"
print(json.dumps([answer, sys.argv[2] in sys.modules]))
"""


@each_format
def test_a_flipped_byte_is_refused_before_the_engine_is_even_imported(bundle: Bundle, tmp_path: Path) -> None:
    library = LIBRARIES[bundle.manifest.artifact.format]
    for name in bundle.manifest.files:
        path = tmp_path / f"{name}.edge"
        flip(rebuild(bundle, path).file(name))
        command = [sys.executable, "-c", LOAD_IN_A_CHILD, str(path), library]
        answer, imported = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        assert answer.startswith(f"BundleError: {path / name} has SHA-256")
        assert not imported


@each_format
def test_a_bundle_that_was_verified_is_hashed_again_when_a_file_changes(bundle: Bundle, tmp_path: Path) -> None:
    copy = settle(rebuild(bundle, tmp_path / "copy.edge"))
    for _ in range(2):
        load(copy.path, cache_dir=tmp_path / "cache").close()
    assert (tmp_path / "cache" / f"{copy.digest}.verified").is_file()
    flip(copy.file("golden.npz"))
    for mode in ("auto", "full"):
        with pytest.raises(BundleError, match=r"golden\.npz"):
            load(copy.path, verify=mode, cache_dir=tmp_path / "cache")


def test_the_stamp_lies_in_the_store_a_release_belongs_to(packaged: Callable[..., Bundle], tmp_path: Path) -> None:
    store = push(packaged("torch.onnx", "onnx", "float32"))
    release = settle(store.open_current("digits"))
    load("digits").close()
    assert (store.cache / f"{release.digest}.verified").is_file()


def point_outside(location: str) -> Callable[[Path], None]:
    """An edit of ``model.onnx`` that moves the first external tensor elsewhere."""

    def change(folder: Path) -> None:
        import onnx

        model = onnx.load(folder / "model.onnx", load_external_data=False)
        tensor = next(item for item in model.graph.initializer if item.external_data)
        next(entry for entry in tensor.external_data if entry.key == "location").value = location
        (folder / "model.onnx").write_bytes(model.SerializeToString())

    return change


@pytest.mark.parametrize(
    "location", ["../weights.bin", "/etc/passwd", "./weights.bin", "other.bin", "", "*/_ORT_MEM_ADDR_/*"]
)
def test_onnx_weights_outside_the_bundle_are_refused_every_time(
    packaged: Callable[..., Bundle], tmp_path: Path, location: str
) -> None:
    bundle = packaged("torch.onnx", "onnx", "float32")
    (tmp_path / "weights.bin").write_bytes(bundle.file("weights.bin").read_bytes())
    evil = settle(rebuild(bundle, tmp_path / "evil.edge", point_outside(location)))
    for _ in range(2):
        with pytest.raises(BundleError, match=r"refers to the file .* not part of the bundle; refused"):
            load(evil.path, cache_dir=tmp_path / "cache")


def test_an_onnx_model_compiled_for_an_accelerator_is_refused(packaged: Callable[..., Bundle], tmp_path: Path) -> None:
    def change(folder: Path) -> None:
        import onnx

        model = onnx.load(folder / "model.onnx", load_external_data=False)
        node = onnx.helper.make_node(
            "EPContext", ["image"], ["digit"], domain="com.microsoft", embed_mode=0, ep_cache_context="../engine"
        )
        del model.graph.node[:]
        model.graph.node.append(node)
        (folder / "model.onnx").write_bytes(model.SerializeToString())

    evil = rebuild(packaged("torch.onnx", "onnx", "float32"), tmp_path / "evil.edge", change)
    with pytest.raises(BundleError, match="EPContext"):
        load(evil.path)


def test_onnx_weights_in_the_bundle_under_another_name_are_taken(
    packaged: Callable[..., Bundle], tmp_path: Path
) -> None:
    bundle = packaged("torch.onnx", "onnx", "float32")

    def change(folder: Path) -> None:
        (folder / "more.bin").write_bytes((folder / "weights.bin").read_bytes())
        point_outside("more.bin")(folder)

    moved = rebuild(bundle, tmp_path / "moved.edge", change)
    x = images(bundle, 2)
    with load(moved.path, threads=1) as session, load(bundle.path, threads=1) as original:
        assert np.array_equal(session(x), original(x))


# -- engines -----------------------------------------------------------------------------------------------------


@each_format
def test_an_engine_that_is_too_old_is_refused_with_both_versions(bundle: Bundle, tmp_path: Path) -> None:
    with load(bundle.path) as session:
        package, version = session.info.package, session.info.version
    artifact = replace(bundle.manifest.artifact, requires=(Requirement(package, "99.1"),))
    newer = rebuild(bundle, tmp_path / "newer.edge", artifact=artifact)
    with pytest.raises(EngineError) as caught:
        load(newer.path)
    assert f"digits needs {package}>=99.1, installed is {version}" in str(caught.value)


@each_format
def test_an_absent_engine_is_named_with_the_command_that_installs_it(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ai_edge_litert.interpreter", "tflite_runtime.interpreter", "onnxruntime", "torch"):
        monkeypatch.setitem(sys.modules, name, None)
    extra = {"tflite": "tflite", "onnx": "onnx", "torchscript": "torch"}[bundle.manifest.artifact.format]
    with pytest.raises(EngineMissing) as caught:
        load(bundle.path)
    assert f"-m pip install 'edge-infer[{extra}]'" in str(caught.value)
    assert str(bundle.manifest.artifact.requires[0]) in str(caught.value)


def not_a_model(bundle: Bundle) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / bundle.manifest.artifact.model).write_bytes(b"")

    return change


@each_format
def test_a_model_that_the_engine_refuses_is_an_engine_error(bundle: Bundle, tmp_path: Path) -> None:
    empty = rebuild(bundle, tmp_path / "empty.edge", not_a_model(bundle))
    with pytest.raises(EngineError) as caught:
        load(empty.path)
    assert str(empty.path) in str(caught.value)


@pytest.mark.parametrize("bundle", [("tflite", "float32"), ("onnx", "float32")], indirect=True, ids="-".join)
def test_names_the_model_does_not_have_are_an_engine_error(bundle: Bundle, tmp_path: Path) -> None:
    """No engine may guess. (TorchScript goes by position: the names are the manifest's alone.)"""
    wrong = rebuild(bundle, tmp_path / "wrong.edge", inputs=(replace(bundle.manifest.inputs[0], name="picture"),))

    def ask() -> None:
        with load(wrong.path) as session:
            session.run({"picture": images(session, 1)})

    with pytest.raises(EngineError, match="picture"):
        ask()


# -- models made for one purpose ---------------------------------------------------------------------------------


def torch_bundle(
    path: Path, module: Any, examples: tuple[Any, ...], inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
) -> Bundle:
    """A TorchScript bundle as the packager writes it, without golden answers of its own."""
    import torch

    from edge_infer.quantize.torchscript import OLDEST, save_mapped

    folder = path.parent / f"{path.name}-parts"
    folder.mkdir()
    size = save_mapped(torch.jit.trace(module.eval(), examples, check_trace=False), folder, 65536)
    write_npz(folder / "golden.npz", {})
    artifact = Artifact(
        "torchscript",
        "float32",
        "model.torchscript",
        (Requirement("torch", OLDEST),),
        (),
        ("cpu",),
        "weights.bin" if size else None,
    )
    manifest = manifest_for(
        folder,
        dict.fromkeys([file.name for file in folder.iterdir()], b""),
        artifact=artifact,
        inputs=inputs,
        outputs=outputs,
        golden=Golden("golden.npz", 1, {spec.name: 0.0 for spec in outputs}),
        checks=(),
    )
    return write_bundle(manifest, folder, path)


def vector(name: str) -> TensorSpec:
    return TensorSpec(name, "float32", (None, 40))


def test_tied_torchscript_weights_stay_tied(tmp_path: Path) -> None:
    import torch

    from edge_infer.runtime.engines.torchscript import load_mapped

    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode = torch.nn.Linear(40, 400, bias=False)
            self.decode = torch.nn.Linear(400, 40, bias=False)
            self.part = torch.nn.Linear(40, 200, bias=False)
            self.encode.weight = torch.nn.Parameter(torch.randn(400, 40, generator=torch.Generator().manual_seed(1)))
            self.decode.weight.data = self.encode.weight.data.t()
            self.part.weight.data = self.encode.weight.data[200:]

        def forward(self, x: Any) -> Any:
            return (self.decode(torch.tanh(self.encode(x))) + self.part(x).sum(),)

    x = np.random.default_rng(0).random((2, 40), dtype=np.float32)
    module = Tied()
    with torch.no_grad():
        expected = module(torch.from_numpy(x))[0].numpy()
    bundle = torch_bundle(tmp_path / "tied.edge", module, (torch.zeros(2, 40),), (vector("x"),), (vector("y"),))
    assert bundle.manifest.files["weights.bin"].size == 400 * 40 * 4
    mapped = dict(load_mapped(bundle).named_parameters())
    start = mapped["encode.weight"].data_ptr()
    assert mapped["decode.weight"].data_ptr() == start
    assert mapped["part.weight"].data_ptr() == start + 200 * 40 * 4
    assert len({tensor.untyped_storage().data_ptr() for tensor in mapped.values()}) == 1
    with load(bundle.path) as session:
        assert np.allclose(session(x), expected, atol=1e-4)


def test_a_module_that_works_in_place_does_not_reach_the_callers_array(tmp_path: Path) -> None:
    import torch

    class InPlace(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return (x.add_(1),)

    bundle = torch_bundle(tmp_path / "b.edge", InPlace(), (torch.zeros(2, 40),), (vector("x"),), (vector("y"),))
    assert bundle.manifest.artifact.weights is None
    x = read_only(np.zeros((2, 40), np.float32))
    with load(bundle.path) as session:
        assert np.array_equal(session(x), x + 1)
        assert not x.any()


def test_an_output_that_is_a_weight_belongs_to_the_caller(tmp_path: Path) -> None:
    import torch

    class Table(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Parameter(torch.ones(40))

        def forward(self, x: Any) -> Any:
            return (self.table,)

    outputs = (TensorSpec("y", "float32", (40,)),)
    bundle = torch_bundle(tmp_path / "b.edge", Table(), (torch.zeros(2, 40),), (vector("x"),), outputs)
    x = np.zeros((2, 40), np.float32)
    with load(bundle.path) as session:
        session(x)[:] = 7
        assert (session(x) == 1).all()


def test_outputs_that_are_views_of_inputs_belong_to_the_caller(tmp_path: Path) -> None:
    import torch

    class Views(torch.nn.Module):
        def forward(self, x: Any, y: Any) -> Any:
            return y, x[:, :3]

    specs = (vector("x"), vector("y"))
    outputs = (TensorSpec("same", "float32", (None, 40)), TensorSpec("part", "float32", (None, 3)))
    bundle = torch_bundle(tmp_path / "b.edge", Views(), (torch.zeros(1, 40), torch.zeros(1, 40)), specs, outputs)
    x, y = np.zeros((2, 40), np.float32), np.ones((2, 40), np.float32)
    with load(bundle.path) as session:
        answers = session.run({"y": y, "x": x})
        with pytest.raises(InputError, match="2 inputs and 2 outputs"):
            session(x)
    assert [(name, array.shape) for name, array in answers.items()] == [("same", (2, 40)), ("part", (2, 3))]
    y[:] = x[:] = 7
    assert (answers["same"] == 1).all()
    assert (answers["part"] == 0).all()


def test_onnx_inputs_of_other_types_go_by_name(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    kinds = {"flag": ("bool", []), "count": ("int64", [None]), "scale": ("float16", [2])}
    number = {"bool": TensorProto.BOOL, "int64": TensorProto.INT64, "float16": TensorProto.FLOAT16}
    graph = helper.make_graph(
        [helper.make_node("Identity", [name], [f"{name}_out"]) for name in kinds],
        "identities",
        [helper.make_tensor_value_info(name, number[dtype], shape) for name, (dtype, shape) in kinds.items()],
        [helper.make_tensor_value_info(f"{name}_out", number[dtype], shape) for name, (dtype, shape) in kinds.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    inputs = tuple(TensorSpec(name, dtype, tuple(shape)) for name, (dtype, shape) in reversed(kinds.items()))
    outputs = tuple(TensorSpec(f"{name}_out", dtype, tuple(shape)) for name, (dtype, shape) in kinds.items())
    bundle = make_bundle(
        tmp_path / "b.edge",
        {"model.onnx": model.SerializeToString(), "golden.npz": b""},
        artifact=Artifact("onnx", "float32", "model.onnx", (Requirement("onnxruntime", "1.17"),), (), ("cpu",)),
        inputs=inputs,
        outputs=outputs,
        golden=Golden("golden.npz", 1, {spec.name: 0.0 for spec in outputs}),
    )
    asked = {"flag": np.array(True), "count": np.arange(5), "scale": np.array([0.5, 2], np.float16)}
    with load(bundle.path) as session:
        answers = session.run(asked)
        for name, array in asked.items():
            assert np.array_equal(answers[f"{name}_out"], array)
            assert answers[f"{name}_out"].dtype == array.dtype
        with pytest.raises(InputError, match=r"input 'flag' has shape \[1\], expected flag bool\[\]"):
            session.run({**asked, "flag": np.array([True])})
        with pytest.raises(BundleError, match="does not hold the golden cases"):
            self_test(session)


# -- golden files ------------------------------------------------------------------------------------------------


def save_one_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def save_pickle(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, **{"in.0.0": np.array([{}], dtype=object)})


def save_other_names(path: Path) -> None:
    write_npz(path, {"in.0.0": np.zeros(1, np.float32)})


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"PK\x03\x04"),
        lambda path: path.write_bytes(path.read_bytes()[:-30]),
        lambda path: path.write_bytes(path.read_bytes().replace(b"descr", b"dEscr")),
        save_one_array,
        save_pickle,
        save_other_names,
    ],
)
def test_a_golden_file_of_something_else_is_refused(
    packaged: Callable[..., Bundle], tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    bundle = packaged("torch.onnx", "onnx", "float32")
    spoilt = rebuild(bundle, tmp_path / "b.edge", lambda folder: damage(folder / "golden.npz"))
    with pytest.raises(BundleError, match="does not hold the golden cases its manifest lists"):
        read_golden(spoilt)


# -- memory ------------------------------------------------------------------------------------------------------

MAPPINGS = """
import re, sys
from pathlib import Path
import edge_infer, edge_infer.runtime.golden
session = edge_infer.load(Path(sys.argv[1]))
session.run(edge_infer.runtime.golden.read_golden(session.bundle)[0][0])
file = str(session.bundle.file("weights.bin"))
blocks = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
for block in blocks:
    if block.split("\\n")[0].endswith(file):
        print(*(re.search(name + r": +(\\d+) kB", block)[1] for name in ("Size", "Rss", "Anonymous", "Private_Dirty")))
"""


@pytest.mark.parametrize("format", ["onnx", "torchscript"])
def test_weights_are_a_mapping_of_their_file(packaged: Callable[..., Bundle], tmp_path: Path, format: str) -> None:
    bundle = packaged(SOURCES[format], format, "float32")
    # The packager lets ONNX Runtime repack small models, which then copies; without that it must map.
    plain = rebuild(bundle, tmp_path / "b.edge", artifact=replace(bundle.manifest.artifact, prepack=False))
    command = [sys.executable, "-c", MAPPINGS, str(plain.path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    rows = [[int(word) for word in line.split()] for line in done.stdout.splitlines()]
    # ONNX Runtime lays out convolutions anew all the same; the dense layer alone has 256 KiB.
    assert sum(size for size, *_ in rows) >= 256
    assert sum(resident for _, resident, *_ in rows) > 0
    assert all(anonymous == dirty == 0 for *_, anonymous, dirty in rows)


def test_every_torchscript_tensor_lies_in_the_mapping(packaged: Callable[..., Bundle]) -> None:
    bundle = packaged("torch_script.pt", "torchscript", "float32")
    with load(bundle.path) as session:
        module = session._engine._module
        lines = Path("/proc/self/maps").read_text().splitlines()
        ranges = [line.split()[0].split("-") for line in lines if line.endswith(str(bundle.file("weights.bin")))]
        ((start, end),) = [(int(low, 16), int(high, 16)) for low, high in ranges]
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        assert (
            len(tensors) == 7
        )  # of two convolutions and two dense layers, but for the last bias, which is in the graph
        for tensor in tensors.values():
            assert start <= tensor.data_ptr() < tensor.data_ptr() + tensor.nbytes <= end


CYCLES = """
import gc, json, os, sys
from pathlib import Path
import edge_infer.runtime.session
from edge_infer.runtime.golden import read_golden
from edge_infer.runtime.memory import private_bytes

def cycle():
    with edge_infer.load(Path(sys.argv[1]), threads=1) as session:
        session.run(asked)

def state():
    gc.collect()
    maps = Path("/proc/self/maps").read_text()
    return [len(os.listdir("/proc/self/fd")), private_bytes(), maps.count(sys.argv[1])]

asked = read_golden(edge_infer.runtime.session.find_bundle(Path(sys.argv[1])))[0][0]
for _ in range(50):
    cycle()
before = state()
for _ in range(150):
    cycle()
print(json.dumps([before, state()]))
"""


@each_format
def test_two_hundred_sessions_leave_nothing_behind(bundle: Bundle) -> None:
    command = [sys.executable, "-c", CYCLES, str(bundle.path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    before, after = json.loads(done.stdout.splitlines()[-1])
    assert after[0] == before[0]
    assert after[2] == before[2] == 0
    # Each model has 340 KB of weights: 150 of them that stay would be 50 MB.
    assert after[1] - before[1] < 12 * 2**20


def test_the_package_root_offers_what_it_says() -> None:
    assert edge_infer.__all__ == ["EdgeInferError", "Pool", "Session", "__version__", "confirm", "load", "verify"]
    assert all(getattr(edge_infer, name) for name in edge_infer.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        edge_infer.nothing  # noqa: B018
