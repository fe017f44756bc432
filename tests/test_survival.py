"""What a load and a running session survive: disks that cannot be written, builders that die, bundles that go."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handmade import rebuild, settle

from edge_infer import Pool, admission, load
from edge_infer.bundle import Bundle, open_bundle
from edge_infer.errors import BundleError
from edge_infer.runtime import engine_cache, tidy
from edge_infer.runtime.golden import read_golden, self_test
from edge_infer.store import Store

Array = np.ndarray[Any, Any]
SOURCES = {"tflite": "keras.keras", "onnx": "torch.onnx", "torchscript": "torch_script.pt"}
#: TorchScript maps the bundle's own file and keeps nothing else.
CACHED = ("tflite", "onnx")

each_format = pytest.mark.parametrize("bundle", SOURCES, indirect=True)
each_cached = pytest.mark.parametrize("bundle", CACHED, indirect=True)


@pytest.fixture
def bundle(request: pytest.FixtureRequest, packaged: Callable[..., Bundle], tmp_path: Path) -> Bundle:
    """The digits network with a file beside it that makes the bundle large enough for the engine cache."""
    return grown(packaged(SOURCES[request.param], request.param, "float32"), tmp_path / "digits.edge")


def grown(bundle: Bundle, path: Path, mark: str = "") -> Bundle:
    """A copy with a megabyte beside it; ``mark`` makes it another bundle."""

    def add(folder: Path) -> None:
        (folder / "padding.bin").write_bytes(bytes(2**20) + mark.encode())

    made = settle(rebuild(bundle, path, add))
    assert made.manifest.size > engine_cache.SMALLEST_BYTES
    return made


def entries(cache: Path) -> list[str]:
    """What lies in a cache but stamps."""
    return sorted(path.name for path in cache.iterdir() if not path.name.endswith(".verified"))


def in_child(code: str, *arguments: object, mounts: str = "") -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own; with ``mounts``, shell commands, in a mount namespace of its own too."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    if mounts:
        namespace = ["unshare", "--mount", *(["--map-root-user"] if os.getuid() else [])]
        command = [*namespace, "sh", "-c", f'{mounts} && exec "$@"', "sh", *command]
    return subprocess.run(command, capture_output=True, text=True, check=False)


OPEN = """
import json, os, sys
from pathlib import Path
from edge_infer import load
from edge_infer.runtime.golden import self_test
LIMIT
def opened():
    with load(Path(sys.argv[1]), threads=1, cache_dir=sys.argv[2]) as session:
        self_test(session)
        return list(session.info.notes)
rows = [opened()]
if os.path.isdir(sys.argv[2]):
    rows.append(sorted(name for name in os.listdir(sys.argv[2]) if not name.endswith(".verified")))
print(json.dumps(rows))
"""


def opened(bundle: Bundle, cache: Path, mounts: str = "", limit: str = "") -> Any:
    """Notes of a load in a child that answers its golden questions, and what lies in the cache then."""
    done = in_child(OPEN.replace("LIMIT", limit), bundle.path, cache, mounts=mounts)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def says(notes: list[str], words: str) -> bool:
    """TorchScript needs no cache and so has nothing to say."""
    return not notes or words in notes[0]


# -- disks -------------------------------------------------------------------------------------------------------------


@each_format
@pytest.mark.parametrize("where", ["cache", "cache/that/is/not/there"])
def test_a_read_only_disk_is_no_hindrance(bundle: Bundle, tmp_path: Path, where: str) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    notes, *listed = opened(
        bundle, tmp_path / where, f"mount --bind {cache} {cache} && mount -o remount,bind,ro {cache}"
    )
    assert says(notes, "private memory: [Errno 30] Read-only file system") and listed in ([], [[]])
    assert bool(notes) == (bundle.manifest.artifact.format in CACHED)


@each_format
def test_a_store_that_became_read_only_is_used_as_it_is(bundle: Bundle, tmp_path: Path) -> None:
    """With what was made while it could be written."""
    cache = tmp_path / "cache"
    load(bundle.path, cache_dir=cache).close()
    made = entries(cache)
    mounts = f"mount --bind {tmp_path} {tmp_path} && mount -o remount,bind,ro {tmp_path}"
    assert opened(bundle, cache, mounts) == [[], made]


@each_cached
@pytest.mark.parametrize("size", ["8k", "200k"])
def test_a_full_disk_leaves_nothing_half_written_and_is_forgotten(bundle: Bundle, tmp_path: Path, size: str) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    again = f"""
os.system("mount -o remount,size=100m {cache}")
print(json.dumps([opened(), []]))
"""
    done = in_child(
        OPEN.replace("LIMIT", "") + again, bundle.path, cache, mounts=f"mount -t tmpfs -o size={size} none {cache}"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (notes, listed), (later, _) = (json.loads(line) for line in done.stdout.splitlines())
    assert "private memory: [Errno 28] No space left on device" in notes[0] and listed == []
    assert later == []  # there was room again, and it was made


@each_cached
def test_a_file_that_may_not_grow_so_large_is_no_fault_of_the_model(bundle: Bundle, tmp_path: Path) -> None:
    """As a quota: small files still fit, so that a lasting failure could be noted. It must not."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))"
    notes, listed = opened(bundle, tmp_path / "cache", limit=limit)
    assert "private memory: [Errno 27] File too large" in notes[0] and listed == []
    notes, listed = opened(bundle, tmp_path / "cache")
    assert notes == [] and len(listed) == 1


@each_format
def test_a_file_in_place_of_the_cache_is_no_hindrance(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    notes, *_ = opened(bundle, tmp_path / "cache")
    assert says(notes, "private memory: ")


@each_cached
def test_a_relative_cache_folder_is_the_same_one_to_the_child(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with load(bundle.path, cache_dir="cache") as session:
        assert session.info.notes == ()
    assert len(entries(tmp_path / "cache")) == 1


# -- builders ----------------------------------------------------------------------------------------------------------


@contextmanager
def killing(folder: Path) -> Iterator[list[int]]:
    """Kill the first process that prepares a model in ``folder``; gives a list that it is noted in."""
    killed: list[int] = []
    done = threading.Event()

    def hunt() -> None:
        while not done.is_set() and not killed:
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    words = path.read_bytes().split(b"\0")
                    if b"prepare" in words and any(word.startswith(bytes(folder)) for word in words):
                        os.kill(int(path.parent.name), signal.SIGKILL)
                        killed.append(int(path.parent.name))
                except (OSError, ProcessLookupError):
                    continue

    thread = threading.Thread(target=hunt)
    thread.start()
    try:
        yield killed
    finally:
        done.set()
        thread.join()


@each_cached
def test_a_builder_that_is_killed_costs_that_load_the_cache_and_no_later_one(bundle: Bundle, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with killing(cache) as killed, load(bundle.path, threads=1, cache_dir=cache) as session:
        assert len(killed) == 1
        assert "private memory: " in session.info.notes[0] and "SIGKILL" in session.info.notes[0]
        self_test(session)
    assert entries(cache) == []
    with load(bundle.path, threads=1, cache_dir=cache) as session:
        assert session.info.notes == ()
        self_test(session)
    assert len(entries(cache)) == 1


@pytest.mark.parametrize(("given", "expected"), [({}, 60), ({"EDGE_INFER_PATIENCE_S": "600.0"}, 300)])
def test_a_builder_has_half_the_time_of_the_self_test_that_it_is_part_of(
    packaged: Callable[..., Bundle],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, str],
    expected: int,
) -> None:
    """And where it is part of none, a minute for a small model."""
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    limits: list[float] = []
    monkeypatch.setattr(admission, "run_child", lambda python, arguments, seconds: limits.append(seconds))
    bundle = packaged(SOURCES["onnx"], "onnx", "float32")
    assert engine_cache.prepare_in_child(bundle, tmp_path, engine_cache.Build()) == ""
    assert limits == [expected]


def test_processes_that_make_the_same_at_once_all_answer(packaged: Callable[..., Bundle], tmp_path: Path) -> None:
    """For ONNX; test_litert.py has it for TFLite."""
    bundle = grown(packaged(SOURCES["onnx"], "onnx", "float32"), tmp_path / "digits.edge")
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", OPEN.replace("LIMIT", ""), str(bundle.path), str(cache)]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for child in children:
        assert json.loads(child.communicate()[0])[0] == [] and child.returncode == 0
    assert len(entries(cache)) == 1


def test_what_was_made_of_another_onnx_model_is_not_used(packaged: Callable[..., Bundle], tmp_path: Path) -> None:
    """ONNX Runtime would answer with the other's weights. test_litert.py has it for TFLite."""
    cache = tmp_path / "cache"
    bundles = [packaged(SOURCES["onnx"], "onnx", precision) for precision in ("float32", "int8")]
    grew = [grown(bundle, tmp_path / f"{number}.edge") for number, bundle in enumerate(bundles)]
    for bundle in grew:
        load(bundle.path, cache_dir=cache).close()
    first, second = (next(path for path in cache.glob(f"{bundle.digest}.*") if path.is_dir()) for bundle in grew)
    shutil.rmtree(second)
    shutil.copytree(first, second)
    with load(grew[1].path, cache_dir=cache) as session:
        assert session.info.notes == ()
        self_test(session)
    assert json.loads((second / engine_cache.ENTRY_NAME).read_text())["facts"]["bundle"] == grew[1].digest


# -- bundles that go ---------------------------------------------------------------------------------------------------


def remove(bundle: Bundle, tmp_path: Path) -> None:
    shutil.rmtree(bundle.path)
    assert not bundle.path.exists()


def replace(bundle: Bundle, tmp_path: Path) -> None:
    """As a new version is put in place: the folder is renamed away and another one to its name."""
    other = grown(bundle, tmp_path / "other.edge", "other")
    bundle.path.rename(tmp_path / "old.edge")
    other.path.rename(bundle.path)
    shutil.rmtree(tmp_path / "old.edge")
    assert open_bundle(bundle.path).digest != bundle.digest


def replace_each_file(bundle: Bundle, tmp_path: Path) -> None:
    """As rsync does: a new file is renamed over each old one."""
    for name, entry in bundle.manifest.files.items():
        (tmp_path / "aside").write_bytes(bytes(entry.size))
        (tmp_path / "aside").replace(bundle.file(name))


def empty_the_cache(bundle: Bundle, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "cache")


def asks(bundle: Bundle) -> Callable[[Callable[..., dict[str, Array]]], None]:
    """Something that asks the golden questions from memory, in several batch sizes."""
    cases, allowed = read_golden(bundle), bundle.manifest.golden.tolerance

    def ask(run: Callable[..., dict[str, Array]]) -> None:
        for asked, expected in [*cases, *((both(a, a), both(e, e)) for a, e in cases)]:
            for name, answer in run(asked).items():
                np.testing.assert_allclose(answer, expected[name], rtol=0, atol=allowed[name])

    return ask


def both(one: Any, other: Any) -> dict[str, Array]:
    return {name: np.concatenate([one[name], other[name]]) for name in one}


@each_format
@pytest.mark.parametrize("go", [remove, replace, replace_each_file, empty_the_cache])
@pytest.mark.parametrize("opens", [1, 2])
def test_a_session_goes_on_when_its_files_go(
    bundle: Bundle, tmp_path: Path, go: Callable[[Bundle, Path], None], opens: int
) -> None:
    """The first to open has made the cache, the second has found it; both have mapped it."""
    ask, cache = asks(bundle), tmp_path / "cache"
    for _ in range(opens - 1):
        load(bundle.path, cache_dir=cache).close()
    with load(bundle.path, threads=1, cache_dir=cache) as session:
        go(bundle, tmp_path)
        for _ in range(3):
            ask(session.run)


@each_format
def test_a_session_goes_on_when_its_files_go_without_a_cache(bundle: Bundle, tmp_path: Path) -> None:
    ask = asks(bundle)
    (tmp_path / "cache").write_text("in the way")
    with load(bundle.path, threads=1, cache_dir=tmp_path / "cache") as session:
        remove(bundle, tmp_path)
        ask(session.run)


@each_format
def test_a_pool_goes_on_when_its_files_go(bundle: Bundle, tmp_path: Path) -> None:
    ask = asks(bundle)
    with Pool(bundle.path, sessions=2, threads=1, cache_dir=tmp_path / "cache") as pool:
        remove(bundle, tmp_path)
        empty_the_cache(bundle, tmp_path)
        for _ in range(4):
            ask(pool.run)


@each_format
def test_a_session_goes_on_when_the_store_collects_its_release(
    bundle: Bundle, tmp_path: Path, packaged: Callable[..., Bundle]
) -> None:
    store = Store(tmp_path / "store")
    push(store, bundle)
    ask = asks(bundle)
    with load(store.release("digits", bundle.digest), threads=1) as session:
        for number in (1, 2):
            push(store, grown(bundle, tmp_path / f"{number}.edge", f"push {number}"))
        with store.lock():
            store.collect()
        assert not store.release("digits", bundle.digest).exists()
        assert not any(path.name.startswith(bundle.digest) for path in store.cache.glob("*"))
        ask(session.run)


def push(store: Store, bundle: Bundle) -> None:
    staged = store.staging(bundle.digest)
    for file in bundle.path.iterdir():
        (staged / file.name).write_bytes(file.read_bytes())
    store.admit(staged, "digits", bundle.digest)
    store.activate("digits", bundle.digest)


# -- files changed in place, which nobody should do --------------------------------------------------------------------

#: What docs/loading.md says of it: opened, files cut off or overwritten by somebody, asked again.
IN_PLACE = """
import os, sys
from pathlib import Path
import numpy as np
from edge_infer import EdgeInferError, load
change, where, source, cache, residency = sys.argv[1:]
with load(Path(source), threads=1, cache_dir=cache, residency=residency) as session:
    (spec,) = session.inputs
    x = np.random.default_rng(1).random((2, *spec.shape[1:]), dtype=np.float32)
    expected = session(x)
    for path in Path(source if where == "bundle" else cache).rglob("*"):
        size = path.stat().st_size
        if path.is_file() and change == "cut":
            os.truncate(path, 0)
        elif path.is_file():
            with path.open("r+b") as file:
                file.seek(size // 4)
                file.write(bytes(byte ^ 0x15 for byte in path.read_bytes()[size // 4 :]))
    for asked in (x, np.concatenate([x, x])):
        try:
            print("right" if np.allclose(session(asked)[:2], expected, atol=1e-5) else "wrong", flush=True)
        except EdgeInferError as error:
            print("raised", type(error).__name__, flush=True)
"""


def in_place(bundle: Bundle, cache: Path, change: str, where: str, residency: str = "lazy") -> list[str]:
    """What the same question gives afterwards, and a larger one; or the signal that ended the process."""
    load(bundle.path, cache_dir=cache).close()
    done = in_child(IN_PLACE, change, where, bundle.path, cache, residency)
    ends = [signal.Signals(-done.returncode).name] if done.returncode < 0 else []
    assert done.returncode <= 0, done.stderr[-2000:]
    return [*done.stdout.splitlines(), *ends]


WHERE = [*((format, "bundle") for format in SOURCES), *((format, "cache") for format in CACHED)]


@pytest.mark.parametrize(("bundle", "where"), WHERE, indirect=["bundle"])
@pytest.mark.parametrize("residency", ["lazy", "lock"])
def test_files_cut_off_give_no_wrong_answer(bundle: Bundle, tmp_path: Path, where: str, residency: str) -> None:
    """But they may end the process."""
    seen = in_place(bundle, tmp_path / "cache", "cut", where, residency)
    assert "wrong" not in seen and set(seen) <= {"right", "raised EngineError", "SIGBUS", "SIGSEGV"}
    mapped = {"tflite": ("bundle", "cache"), "onnx": ("cache",), "torchscript": ("bundle",)}
    if where in mapped[bundle.manifest.artifact.format]:
        assert seen[-1] == "SIGBUS"


@pytest.mark.parametrize(("bundle", "where"), WHERE, indirect=["bundle"])
def test_files_overwritten_may_give_wrong_answers_and_are_found_at_the_next_load(
    bundle: Bundle, tmp_path: Path, where: str
) -> None:
    seen = in_place(bundle, tmp_path / "cache", "overwrite", where)
    if (bundle.manifest.artifact.format, where) in (("onnx", "cache"), ("torchscript", "bundle")):
        assert seen == ["wrong", "wrong"]
    if where == "bundle":
        with pytest.raises(BundleError, match="package or push the model again"):
            load(bundle.path, cache_dir=tmp_path / "cache")
        return
    with load(bundle.path, cache_dir=tmp_path / "cache") as session:
        self_test(session)
        assert session.info.notes == ()


# -- many times --------------------------------------------------------------------------------------------------------

CYCLES = """
import gc, json, os, sys
from pathlib import Path
import edge_infer.runtime.session
from edge_infer.runtime.golden import read_golden
from edge_infer.runtime.memory import private_bytes

def state():
    gc.collect()
    maps = Path("/proc/self/maps").read_text()
    mapped = [path for path in sys.argv[1:] if path in maps]
    return [len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), mapped, private_bytes()]

asked = read_golden(edge_infer.runtime.session.find_bundle(Path(sys.argv[1])))[0][0]
states = []
for number in range(1000):
    with edge_infer.load(Path(sys.argv[1]), threads=2, cache_dir=sys.argv[2]) as session:
        session.run(asked)
        if number % 500 == 0:
            assert not session.info.notes, session.info.notes
    if number in (99, 499, 999):
        states.append(state())
print(json.dumps(states))
"""


@each_format
def test_a_thousand_sessions_leave_nothing_behind(bundle: Bundle, tmp_path: Path) -> None:
    if bundle.manifest.artifact.format == "torchscript":
        bundle = rebuild(bundle, tmp_path / "dense.edge", make_dense)
    done = in_child(CYCLES, bundle.path, tmp_path / "cache")
    assert done.returncode == 0, done.stderr[-2000:]
    early, middle, late = json.loads(done.stdout.splitlines()[-1])
    assert early[:3] == middle[:3] == late[:3] and early[2] == []
    # Each has at least 340 KB of weights; 4 KB that stay of each open would be 2 MB of 500.
    assert late[3] - middle[3] < 2**21, (early, middle, late)


def make_dense(folder: Path) -> None:
    """Torch compiles convolutions anew for each module that it loads, which takes 40 ms."""
    import torch

    from edge_infer.quantize.torchscript import save_mapped

    class Dense(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4096), torch.nn.Linear(4096, 10))

        def forward(self, image: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.layers(image),)

    (folder / "model.torchscript").unlink()
    (folder / "weights.bin").unlink()
    assert save_mapped(torch.jit.trace(Dense().eval(), torch.zeros(2, 1, 8, 8)), folder, 65536) > 10**6


# -- a cache that nobody tidies ----------------------------------------------------------------------------------------


@pytest.fixture
def cached(packaged: Callable[..., Bundle], tmp_path: Path) -> tuple[Bundle, Path]:
    """An ONNX bundle outside a store, and its entry."""
    bundle = grown(packaged(SOURCES["onnx"], "onnx", "float32"), tmp_path / "digits.edge")
    load(bundle.path, cache_dir=tmp_path / "cache").close()
    (name,) = entries(tmp_path / "cache")
    return bundle, tmp_path / "cache" / name


def make_another(bundle: Bundle, tmp_path: Path) -> Bundle:
    """Another bundle is opened for the first time, and so its entry is made."""
    other = grown(bundle, tmp_path / "another.edge", "another")
    load(other.path, cache_dir=tmp_path / "cache").close()
    return other


def age(entry: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(entry / engine_cache.ENTRY_NAME, (then, then))


HOURS, MONTHS = 2 * tidy.RECENT_S, 2 * tidy.UNUSED_S


def test_an_entry_goes_when_its_bundle_has_gone(cached: tuple[Bundle, Path], tmp_path: Path) -> None:
    bundle, entry = cached
    age(entry, HOURS)
    bundle.path.rename(tmp_path / "elsewhere.edge")
    other = make_another(open_bundle(tmp_path / "elsewhere.edge"), tmp_path)
    assert [name.split(".")[0] for name in entries(tmp_path / "cache")] == [other.digest]
    assert not entry.with_name(f"{entry.name}.verified").exists()
    with load(tmp_path / "elsewhere.edge", cache_dir=tmp_path / "cache") as session:
        assert session.info.notes == ()  # made anew for the other place


def test_an_entry_goes_when_another_bundle_took_its_place(cached: tuple[Bundle, Path], tmp_path: Path) -> None:
    bundle, entry = cached
    age(entry, HOURS)
    replace(bundle, tmp_path)
    make_another(open_bundle(bundle.path), tmp_path)
    assert not entry.exists()


def test_an_entry_that_was_not_used_for_a_month_goes(cached: tuple[Bundle, Path], tmp_path: Path) -> None:
    bundle, entry = cached
    age(entry, MONTHS)
    make_another(bundle, tmp_path)
    assert not entry.exists()


def test_an_entry_of_a_bundle_that_is_there_stays(cached: tuple[Bundle, Path], tmp_path: Path) -> None:
    bundle, entry = cached
    age(entry, HOURS)
    made = entry.stat().st_mtime_ns
    make_another(bundle, tmp_path)
    assert len(entries(tmp_path / "cache")) == 2 and entry.stat().st_mtime_ns == made


def test_an_entry_that_was_just_used_stays(cached: tuple[Bundle, Path], tmp_path: Path) -> None:
    bundle, entry = cached
    age(entry, MONTHS)
    load(bundle.path, cache_dir=tmp_path / "cache").close()
    remove_later = bundle.path.rename(tmp_path / "elsewhere.edge")
    make_another(open_bundle(remove_later), tmp_path)
    assert entry.exists()


def test_an_entry_that_another_process_has_mapped_stays(cached: tuple[Bundle, Path], tmp_path: Path) -> None:
    bundle, entry = cached
    code = "import sys, edge_infer; held = edge_infer.load(sys.argv[1], cache_dir=sys.argv[2]); print(1, flush=True)"
    command = [sys.executable, "-c", f"{code}; input()", str(bundle.path), str(tmp_path / "cache")]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None and child.stdout.readline() == "1\n"
        age(entry, MONTHS)
        make_another(bundle, tmp_path)
        assert entry.exists()
    finally:
        child.communicate("\n")
    third = grown(bundle, tmp_path / "third.edge", "third")
    load(third.path, cache_dir=tmp_path / "cache").close()
    assert not entry.exists()


def test_what_died_half_made_goes_after_an_hour_and_other_files_stay(
    cached: tuple[Bundle, Path], tmp_path: Path
) -> None:
    bundle, entry = cached
    fresh, old, foreign = (entry.with_name(name) for name in (f".{entry.name}.one", f".{entry.name}.two", "foreign"))
    for path in (fresh, old, foreign):
        path.mkdir()
        (path / "file").write_text("half")
    for path in (old, foreign):
        os.utime(path, (0, 0))
    make_another(bundle, tmp_path)
    assert fresh.exists() and foreign.exists() and not old.exists()


# -- what is locked ----------------------------------------------------------------------------------------------------


@each_format
def test_locked_weights_are_still_shared(bundle: Bundle, tmp_path: Path) -> None:
    """The system would copy each page of a mapping that may be written, if it were locked the plain way."""
    load(bundle.path, cache_dir=tmp_path / "cache").close()
    with load(bundle.path, threads=1, cache_dir=tmp_path / "cache", residency="lock") as session:
        memory = session.memory()
    assert memory.mapped - memory.resident < resource.getpagesize()
    assert memory.resident - memory.shared < 64 * 1024
