"""A model that would take more memory than is allowed, or than there is, is refused before the system kills."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from handmade import manifest_for, settle
from onnx import TensorProto, helper, numpy_helper
from tflite_models import Net

from edge_infer import Pool, load
from edge_infer.bundle import Bundle, write_bundle
from edge_infer.errors import OutOfMemory, UsageError
from edge_infer.manifest import Artifact, Golden, Requirement, TensorSpec
from edge_infer.runtime import engine_cache, memory
from edge_infer.runtime.engines import engine_error
from edge_infer.runtime.golden import self_test, write_golden

SOURCES = {"tflite": "keras.keras", "onnx": "torch.onnx", "torchscript": "torch_script.pt"}
MEGABYTE = 2**20
WIDTH, LAYERS = 2048, 4
WEIGHTS = WIDTH * WIDTH * 4 * LAYERS  # 64 MB


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Four dense layers of ONNX, 64 MB, which the engine repacks."""
    folder = tmp_path_factory.mktemp("dense")
    (folder / "parts").mkdir()
    rng = np.random.default_rng(1)
    arrays = [rng.standard_normal((WIDTH, WIDTH), np.float32) * WIDTH**-0.5 for _ in range(LAYERS)]
    graph = helper.make_graph(
        [helper.make_node("MatMul", [f"x{n}" if n else "x", f"w{n}"], [f"x{n + 1}"]) for n in range(LAYERS)],
        "dense",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", WIDTH])],
        [helper.make_tensor_value_info(f"x{LAYERS}", TensorProto.FLOAT, ["n", WIDTH])],
        [numpy_helper.from_array(array, f"w{number}") for number, array in enumerate(arrays)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save_model(model, folder / "parts" / "model.onnx", save_as_external_data=True, location="weights.bin")
    inputs, outputs = (TensorSpec("x", "float32", (None, WIDTH)),), (TensorSpec("x4", "float32", (None, WIDTH)),)
    x = rng.random((2, WIDTH), dtype=np.float32)
    cases = [({"x": a}, {"x4": a @ arrays[0] @ arrays[1] @ arrays[2] @ arrays[3]}) for a in (x, x[:1])]
    write_golden(folder / "parts" / "golden.npz", inputs, outputs, cases)
    artifact = Artifact("onnx", "float32", "model.onnx", (Requirement("onnxruntime", "1.17"),), (), ("cpu",))
    manifest = manifest_for(
        folder / "parts",
        dict.fromkeys(["model.onnx", "weights.bin", "golden.npz"], b""),
        artifact=Artifact(**{**vars(artifact), "weights": "weights.bin", "prepack": True}),
        inputs=inputs,
        outputs=outputs,
        golden=Golden("golden.npz", 2, {"x4": 1e-3}),
        checks=(),
    )
    return settle(write_bundle(manifest, folder / "parts", folder / "dense.edge"))


@pytest.fixture
def no_cache(tmp_path: Path) -> Path:
    """Where no cache can be, so that the model is opened the plain way."""
    (tmp_path / "file").write_text("in the way")
    return tmp_path / "file"


# -- what is allowed ---------------------------------------------------------------------------------------------------


def test_what_is_known_to_take_more_is_refused_at_once(dense: Bundle, no_cache: Path) -> None:
    load(dense.path, cache_dir=no_cache, max_memory=4 * WEIGHTS).close()  # the engine is imported then
    before = memory.private_bytes()
    with pytest.raises(OutOfMemory, match=r"tiny takes at least 33,\d+,\d+ bytes .* allowed are 10,485,760 \(max_mem"):
        load(dense.path, cache_dir=no_cache, max_memory=10 * MEGABYTE)
    assert memory.private_bytes() - before < 4 * MEGABYTE


def test_what_turned_out_to_take_more_is_closed_again(dense: Bundle, no_cache: Path) -> None:
    """In a process of its own: what others left to be freed there would be taken off."""
    done = in_child(
        f"""
import onnxruntime
from edge_infer import load
from edge_infer.errors import OutOfMemory
from edge_infer.runtime import memory
before = memory.private_bytes()
try:
    load({str(dense.path)!r}, cache_dir={str(no_cache)!r}, max_memory={40 * MEGABYTE})
except OutOfMemory as error:
    print(error)
memory.give_back()
print(memory.private_bytes() - before, "stay")
"""
    )
    assert "allowed are 41,943,040 (max_memory); it is closed again" in done.stdout, done.stderr
    taken = re.findall(r"answering one golden question took ([0-9,]+) bytes", done.stdout)[0]
    assert int(taken.replace(",", "")) > WEIGHTS * 0.9
    assert int(re.findall(r"(-?\d+) stay", done.stdout)[0]) < 8 * MEGABYTE


def test_what_was_freed_before_is_not_taken_off(dense: Bundle, no_cache: Path) -> None:
    done = in_child(
        f"""
from edge_infer import load
from edge_infer.errors import OutOfMemory
freed = [bytearray(100_000) for _ in range(600)]  # 60 MB, each too small for a mapping of its own
kept = bytearray(1000)
del freed
try:
    load({str(dense.path)!r}, cache_dir={str(no_cache)!r}, max_memory={40 * MEGABYTE})
except OutOfMemory as error:
    print(error)
"""
    )
    taken = re.findall(r"answering one golden question took ([0-9,]+) bytes", done.stdout)
    assert taken, done.stdout + done.stderr
    assert int(taken[0].replace(",", "")) > WEIGHTS * 0.9


def test_mapped_weights_do_not_count(dense: Bundle, tmp_path: Path) -> None:
    with load(dense.path, cache_dir=tmp_path, max_memory=40 * MEGABYTE) as session:
        assert session.info.notes == () and session.stats().count == 0


@pytest.mark.parametrize("format", SOURCES)
def test_every_engine_is_measured(packaged: Callable[..., Bundle], tmp_path: Path, format: str) -> None:
    bundle = packaged(SOURCES[format], format, "float32")
    done = in_child(
        f"""
from edge_infer import load
from edge_infer.errors import OutOfMemory
load({str(bundle.path)!r}, cache_dir={str(tmp_path)!r}, max_memory=300_000_000).close()
try:
    load({str(bundle.path)!r}, cache_dir={str(tmp_path / "other")!r}, max_memory=1)
except OutOfMemory as error:
    print(error)
"""
    )
    assert "allowed are 1 (max_memory)" in done.stdout, done.stderr


def test_each_session_of_a_pool_is_measured(dense: Bundle, no_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(OutOfMemory, match="max_memory"):
        Pool(dense.path, sessions=2, threads=1, cache_dir=no_cache, max_memory=40 * MEGABYTE)
    with Pool(dense.path, sessions=2, threads=1, cache_dir=tmp_path, max_memory=40 * MEGABYTE) as pool:
        assert pool.run({"x": np.zeros((1, WIDTH), np.float32)})["x4"].shape == (1, WIDTH)


@pytest.mark.parametrize("allowed", [0, -1, 1.5, "1GB"])
def test_no_sensible_amount_is_refused(packaged: Callable[..., Bundle], allowed: Any) -> None:
    with pytest.raises(UsageError, match="expected a whole number of bytes above 0"):
        load(packaged(SOURCES["onnx"], "onnx", "float32").path, max_memory=allowed)


@pytest.mark.parametrize("verb", ["run", "bench"])
def test_the_command_line_takes_it(packaged: Callable[..., Bundle], verb: str) -> None:
    bundle = packaged(SOURCES["onnx"], "onnx", "float32")
    for allowed, status in ((300_000_000, 0), (1, 5)):
        command = [sys.executable, "-m", "edge_infer", verb, str(bundle.path), "--max-memory", str(allowed), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr
    assert json.loads(done.stdout)["error"]["type"] == "OutOfMemory"


# -- what there is -----------------------------------------------------------------------------------------------------


def in_child(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_weights_that_there_is_no_memory_to_repack_are_mapped_as_they_are(
    dense: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No child is started for it, which the system would kill; the next load where there is room repacks them."""
    with monkeypatch.context() as patch:
        patch.setattr(memory, "available_bytes", lambda: WEIGHTS + 16 * MEGABYTE)
        before = memory.private_bytes()
        with load(dense.path, cache_dir=tmp_path) as session:
            (note,) = session.info.notes
            assert "weights are not repacked, which is slower: it takes 134,217,728 bytes of private" in note
            self_test(session)
            assert memory.private_bytes() - before < WEIGHTS / 2
    with load(dense.path, cache_dir=tmp_path) as session:
        assert session.info.notes == ()
    kept = [json.loads(path.read_text())["facts"].get("prepack") for path in tmp_path.glob("*/entry.json")]
    assert sorted(map(str, kept)) == ["False", "None"]


def test_where_the_child_that_repacks_is_killed_for_memory_the_caller_does_not_try(
    dense: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = engine_cache.prepare_in_child

    def prepare(bundle: Bundle, folder: Path, build: engine_cache.Build) -> str:
        if build.private_bytes:
            raise OutOfMemory("the process that opened the model ended with SIGKILL")
        return whole(bundle, folder, build)

    monkeypatch.setattr(engine_cache, "prepare_in_child", prepare)
    with load(dense.path, cache_dir=tmp_path) as session:
        (note,) = session.info.notes
        assert note == "weights are not repacked, which is slower: the process that opened the model ended with SIGKILL"
        self_test(session)


def test_without_a_cache_weights_are_mapped_where_there_is_no_memory_to_repack_them(
    dense: Bundle, no_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: WEIGHTS + 16 * MEGABYTE)
    before = memory.private_bytes()
    with load(dense.path, cache_dir=no_cache) as session:
        assert (
            "not repacked, which is slower: it takes 67,108,864 bytes of private memory, the system has 83,886,080"
            in session.info.notes[0]
        )
        self_test(session)
        assert memory.private_bytes() - before < WEIGHTS / 2


def test_a_model_that_the_process_may_not_hold_is_refused(dense: Bundle, no_cache: Path, tmp_path: Path) -> None:
    """A real limit, which the engine would run into: what an interpreter repacks is known beforehand."""
    net = Net()
    x = net.input("x", (None, WIDTH))
    y = net.dense(x, "layer", np.eye(WIDTH, dtype=np.float32))
    (tmp_path / "parts").mkdir()
    net.finish(tmp_path / "parts" / "model.tflite", {"x": x}, {"y": y})
    shutil.copyfile(dense.file("golden.npz"), tmp_path / "parts" / "golden.npz")
    artifact = Artifact(
        "tflite", "float32", "model.tflite", (Requirement("ai-edge-litert", "1.4.0"),), ("FULLY_CONNECTED",), ("cpu",),
        signature="serving_default",
    )  # fmt: skip
    names = ("model.tflite", "golden.npz")
    manifest = manifest_for(tmp_path / "parts", dict.fromkeys(names, b""), artifact=artifact)
    bundle = write_bundle(manifest, tmp_path / "parts", tmp_path / "eye.edge")
    done = in_child(
        f"""
import resource
import ai_edge_litert.interpreter
from edge_infer import load
from edge_infer.errors import OutOfMemory
from edge_infer.runtime import memory
limit = memory._kilobytes("/proc/self/status")["VmData"] * 1024 + 8 * 2**20
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    load({str(bundle.path)!r}, threads=1, cache_dir={str(no_cache)!r})
except OutOfMemory as error:
    print(error)
"""
    )
    assert "tiny takes at least 16," in done.stdout and "the system has " in done.stdout, done.stderr
    assert done.returncode == 0


def test_a_child_that_is_held_to_an_amount_may_map_more(dense: Bundle, tmp_path: Path) -> None:
    """The system counts maps that may be written as data."""
    load(dense.path, cache_dir=tmp_path).close()
    done = in_child(
        f"""
from pathlib import Path
import onnxruntime
from edge_infer import load
from edge_infer.bundle import open_bundle
from edge_infer.errors import OutOfMemory
from edge_infer.runtime import memory, room
bundle = open_bundle(Path({str(dense.path)!r}))
room.limit(bundle, memory._kilobytes("/proc/self/status")["VmData"] * 1024 + 24 * 2**20)
with load(bundle.path, threads=1, cache_dir={str(tmp_path)!r}) as session:
    session.warm_up()
    print("answered", *session.info.notes)
    room.require_within(bundle, memory.private_bytes() + 2**20)
    try:
        room.require_within(bundle, memory.private_bytes() - 2**20)
    except OutOfMemory as error:
        print(error)
try:
    bytearray(200 * 2**20)
except MemoryError:
    print("limited")
"""
    )
    answered, refused, limited = done.stdout.splitlines()
    assert answered == "answered" and limited == "limited", done.stderr
    assert "with tiny open the process has " in refused


def test_an_engine_that_the_linker_finds_no_memory_for_is_a_lack_of_memory() -> None:
    error = engine_error(OSError("libLiteRt.so: failed to map segment from shared object"), "cannot open it")
    assert isinstance(error, OutOfMemory)


def groups(tmp_path: Path, own: str, files: dict[str, str]) -> int:
    """``available_bytes`` of a process in the control groups ``own``, with the files under /sys/fs/cgroup."""
    (tmp_path / "own").write_text(own)
    (tmp_path / "meminfo").write_text("MemTotal: 1000000 kB\nMemAvailable: 800000 kB\nHugePages_Total: 0\n")
    for name, text in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return memory.available_bytes(str(tmp_path / "meminfo"), str(tmp_path / "own"), tmp_path / "groups")


MACHINE = 800000 * 1024
STAT = "anon 5\nactive_file 30\ninactive_file 20\n"
STAT_1 = "total_active_file 300\ntotal_inactive_file 200\nactive_file 1\n"


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/\n", {}, MACHINE),
        ("", {}, MACHINE),
        ("0::/a/b\n", {"a/b/memory.max": "max\n"}, MACHINE),
        (
            "0::/a/b\n",
            {"a/b/memory.max": "1000\n", "a/b/memory.current": "400\n", "a/b/memory.stat": STAT},
            1000 - 400 + 50,
        ),
        # the tighter limit of a group above
        (
            "0::/a/b\n",
            {
                "a/b/memory.max": "1000\n", "a/b/memory.current": "400\n", "a/b/memory.stat": STAT,
                "a/memory.max": "500\n", "a/memory.current": "450\n", "a/memory.stat": STAT,
            },
            100,
        ),
        # in a container the group is at the root
        (
            "0::/../../docker/x\n",
            {"memory.max": "700\n", "memory.current": "100\n", "memory.stat": STAT},
            650,
        ),
        # version 1
        (
            "5:cpu:/a\n4:memory:/a\n0::/\n",
            {
                "memory/a/memory.limit_in_bytes": "9000\n", "memory/a/memory.usage_in_bytes": "8000\n",
                "memory/a/memory.stat": STAT_1,
            },
            1500,
        ),
        # already over
        ("0::/\n", {"memory.max": "100\n", "memory.current": "900\n", "memory.stat": STAT}, 0),
    ],
)  # fmt: skip
def test_the_tightest_limit_counts(tmp_path: Path, own: str, files: dict[str, str], expected: int) -> None:
    assert groups(tmp_path, own, files) == expected


def test_this_machine_says_what_it_has() -> None:
    assert 0 < memory.available_bytes() <= memory.total_bytes()


def test_a_child_that_builds_offers_itself(dense: Bundle, tmp_path: Path) -> None:
    """Seen from outside while it builds."""
    (tmp_path / "made").mkdir()
    command = [sys.executable, "-m", "edge_infer", "prepare", str(dense.path), str(tmp_path / "made")]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    seen = set()
    while child.poll() is None:
        try:
            seen.add(Path(f"/proc/{child.pid}/oom_score_adj").read_text().strip())
        except OSError:
            break
    assert child.wait() == 0 and "1000" in seen and os.listdir(tmp_path / "made")
