"""A board of 512 MB, and smaller ones: models that are larger, processes that share one, and memory that runs out.

Bytes of memory are counted and not timed, so they are the same on a board that is made of silicon.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from boards import dense
from boards.board import PYTHON, TestBoard
from boards.record import note
from edge_infer.bundle import Bundle

MEGABYTE = 2**20
WHOLE = 512 * MEGABYTE
NO_CACHE = "/proc/no-cache"


@dataclasses.dataclass(frozen=True)
class Case:
    """A network that does not fit beside its engine on a board with so much memory.

    ``processes``: how many are to share it on a board of 512 MB, of which torch's own private memory leaves few.
    """

    format: str
    layers: int
    memory_bytes: int = WHOLE
    processes: int = 4


#: What is smaller is sent sooner. TorchScript comes before the large ONNX, which finds its weights there.
CASES = (
    pytest.param(Case("tflite", 8, 160 * MEGABYTE), id="tflite", marks=pytest.mark.long),
    pytest.param(Case("onnx", 13, 256 * MEGABYTE), id="onnx-small", marks=pytest.mark.long),
    pytest.param(Case("torchscript", 28, processes=2), id="torchscript", marks=pytest.mark.long),
    pytest.param(Case("onnx", 28), id="onnx", marks=pytest.mark.long),
)

#: Bytes of a process as the kernel counts them.
FIGURES = """
def figures(process="self"):
    rows = {}
    for name in ("status", "smaps_rollup"):
        with open(f"/proc/{process}/{name}") as file:
            for words in map(str.split, file):
                if len(words) == 3 and words[2] == "kB":
                    rows[words[0][:-1]] = int(words[1]) * 1024
    return {name: rows[name] for name in ("VmRSS", "RssAnon", "RssFile", "Pss")}
"""
PLAIN = {
    "tflite": """
from ai_edge_litert.interpreter import Interpreter
interpreter = Interpreter(model_path=str(bundle.file("model.tflite")))
interpreter.allocate_tensors()
""",
    "onnx": """
import onnxruntime
onnxruntime.InferenceSession(str(bundle.file("model.onnx")))
""",
    "torchscript": """
import torch
torch.jit.load("whole.pt")
""",
}
FIND = """
from edge_infer.store import Store, default_root
bundle = Store(default_root()).open_current("dense")
"""
#: ``torch.jit.load`` wants the weights in the archive, which is put together there from what was pushed.
WHOLE_ARCHIVE = f"""{FIND}
from edge_infer.runtime.engines.torchscript import load_mapped
load_mapped(bundle).save("whole.pt")
print("null")
"""
OPEN = f"""{FIGURES}
import json, os, sys
import edge_infer
from edge_infer.runtime.engines import engine_module
from edge_infer.runtime.golden import self_test
from edge_infer.runtime.session import find_bundle
bundle = find_bundle("dense")
engine_module(bundle).import_engine(bundle)
engine = figures()
with edge_infer.load("dense", threads=1) as session:
    difference = self_test(session)
    memory = session.memory()
    print(json.dumps({{
        "engine": engine, "open": figures(), "mapped": memory.mapped, "notes": session.info.notes,
        "difference": max(difference.values()),
    }}), flush=True)
    sys.stdin.readline()
"""
REFUSED = f"""
import json
import edge_infer
from edge_infer.errors import OutOfMemory

def said(**how):
    try:
        with edge_infer.load("dense", threads=1, **how) as session:
            session.warm_up()
            return "answered"
    except OutOfMemory as error:
        return str(error)

print(json.dumps({{
    "system": said(cache_dir="{NO_CACHE}"),
    "allowed": said(cache_dir="{NO_CACHE}", max_memory=50_000_000),
    "mapped": said(max_memory=50_000_000),
}}))
"""
#: Starts so many, waits until all have answered, and looks at each.
TOGETHER = f"""{FIGURES}
import json, subprocess, sys
children = [
    subprocess.Popen([sys.executable, "open.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    for _ in range(COUNT)
]
answers = [json.loads(child.stdout.readline()) for child in children]
found = [figures(child.pid) for child in children]
for child in children:
    child.communicate(b"\\n")
print(json.dumps([answers, found, [child.returncode for child in children]]))
"""


ROWS = """
import json
import numpy as np
import edge_infer
from edge_infer.errors import OutOfMemory
with edge_infer.load("greedy", threads=1) as session:
    said = ""
    try:
        session(np.ones((COUNT, 1), np.float32))
    except OutOfMemory as error:
        said = f"OutOfMemory: {error}; then "
    print(json.dumps(said + str(session(np.ones((1, 1), np.float32)).item())))
"""


@dataclasses.dataclass(frozen=True)
class Pushed:
    """A model on a board that has less memory than the model's weights."""

    board: TestBoard
    case: Case
    name: str
    sent_bytes: int

    @property
    def weights(self) -> int:
        return self.case.layers * dense.LAYER_BYTES


@pytest.fixture(scope="module", params=CASES)
def pushed(zero: TestBoard, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pushed:
    case: Case = request.param
    bundle = dense.dense(tmp_path_factory.mktemp("dense"), case.format, case.layers)
    zero.resize(case.memory_bytes)
    (said,) = zero.answer("push", bundle.path, zero.name, "--self-test-timeout", "900")["devices"]
    return Pushed(zero, case, f"{case.format}-{case.layers * dense.LAYER_BYTES // MEGABYTE}", said["sent_bytes"])


def ended(board: TestBoard, code: str) -> str:
    """How Python with ``code`` ended: its status, as a shell has it, and the last line that it wrote."""
    board.put(code.encode(), "plain.py")
    script = f"{PYTHON} plain.py 2>&1; status=$?; echo; echo $status"
    lines = board.shell(script).stdout.decode().split("\n")
    said = [line for line in lines[:-2] if line.strip()]
    return f"{lines[-2]} {said[-1] if said else ''}".strip()


def kills(board: TestBoard) -> list[str]:
    """What the kernel said of processes that it ended for lack of memory, since it started."""
    said = board.shell("dmesg", user="root").stdout.decode()
    return [line for line in said.splitlines() if "Out of memory: Killed process" in line]


def alive(board: TestBoard) -> str:
    """Changes when the board or its SSH server is started anew."""
    return board.shell("cat /proc/sys/kernel/random/boot_id; pgrep -o sshd", user="root").stdout.decode()


# -- larger than the memory --------------------------------------------------------------------------------------------


def test_a_model_that_the_plain_engine_has_no_memory_for_opens_and_answers(pushed: Pushed) -> None:
    board, case, before = pushed.board, pushed.case, alive(pushed.board)
    if case.format == "torchscript":
        board.python(WHOLE_ARCHIVE)
    seen = len(kills(board))
    plain = ended(board, FIND + PLAIN[case.format])
    killed = kills(board)[seen:]
    opened = board.python(OPEN)
    linux_has = board.python("import os; print(os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'))")
    note(
        "memory",
        f"larger-{pushed.name}",
        weights=pushed.weights,
        board=case.memory_bytes,
        linux_has=linux_has,
        sent_bytes=pushed.sent_bytes,
        plain="killed by the kernel" if killed else plain,
        **opened,
    )
    assert plain != "0" and (killed or "emory" in plain or "alloc" in plain), plain
    assert opened["difference"] <= dense.TOLERANCE and opened["mapped"] >= pushed.weights
    assert opened["open"]["RssAnon"] - opened["engine"]["RssAnon"] < pushed.weights / 4
    # ONNX Runtime would have to repack all weights at once; XNNPACK and torch have no need to.
    assert ["weights are not repacked" in said for said in opened["notes"]] == [True] * (case.format == "onnx")
    assert alive(board) == before


def test_processes_share_the_weights(pushed: Pushed) -> None:
    pushed.board.resize(WHOLE)
    pushed.board.put(OPEN.encode(), "open.py")
    ((alone, (one,), _), (answers, together, statuses)) = [
        pushed.board.python(TOGETHER.replace("COUNT", str(count))) for count in (1, pushed.case.processes)
    ]
    note("memory", f"processes-{pushed.name}", weights=pushed.weights, notes=alone[0]["notes"], one=one, each=together)
    assert statuses == [0] * pushed.case.processes
    assert all(answer["difference"] <= dense.TOLERANCE for answer in answers)
    added = sum(process["Pss"] for process in together) - one["Pss"]
    assert added / (pushed.case.processes - 1) < one["RssAnon"] + pushed.weights / 8
    assert all(process["RssAnon"] < 1.25 * one["RssAnon"] for process in together)


@pytest.mark.parametrize("pushed", CASES[:1], indirect=True)
def test_what_has_to_be_private_is_refused_before_it_is_tried(pushed: Pushed) -> None:
    """XNNPACK repacks in private memory where it has no place for a file (ONNX and TorchScript map the bundle's own
    weights then); and what is allowed is heeded."""
    board = pushed.board
    board.resize(pushed.case.memory_bytes)
    seen = len(kills(board))
    refused = board.python(REFUSED)
    note("memory", "refused", **refused)
    assert f"dense takes at least {pushed.weights // 10**6}," in refused["system"]
    assert "the system has " in refused["system"]
    assert "allowed are 50,000,000 (max_memory)" in refused["allowed"]
    assert refused["mapped"] == "answered"
    assert len(kills(board)) == seen


# -- nothing left ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def serving(zero: TestBoard, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A model that takes little for a row, and as much as there are rows."""
    zero.resize(WHOLE)
    bundle = dense.greedy(tmp_path_factory.mktemp("greedy"), "greedy", 10**6)
    zero.edge_infer("push", bundle.path, zero.name, "--self-test-timeout", "600")
    return bundle


@pytest.mark.parametrize(("case", "each"), [("killed", 55_000_000), ("refused", 200_000_000)])
def test_a_model_that_runs_out_of_memory_in_its_self_test_leaves_the_old_one(
    zero: TestBoard, serving: Bundle, tmp_path: Path, case: str, each: int
) -> None:
    """Of several arrays that fit one by one the kernel learns too late; one beyond the memory it refuses."""
    before, seen = alive(zero), len(kills(zero))
    bundle = dense.greedy(tmp_path, "greedy", each)
    (row,) = zero.answer("push", bundle.path, zero.name, "--self-test-timeout", "600", status=5)["devices"]
    killed = kills(zero)[seen:]
    note("memory", f"self-test-{case}", takes=12 * each, said=row["error"], kernel=killed)
    assert ("most likely for lack of memory" if case == "killed" else "not enough memory") in row["error"]
    assert f"the release {serving.digest[:12]} stays in use" in row["error"]
    assert all("(python" in line for line in killed) and len(killed) == (case == "killed")
    serves = {model["name"]: model["digest"] for model in zero.answer("status", zero.name)["models"]}
    assert serves["greedy"] == serving.digest
    assert alive(zero) == before
    assert zero.python(ROWS.replace("COUNT", "2")) == "6.0"


def test_a_run_that_there_is_no_memory_for_is_an_error_and_no_end(zero: TestBoard, serving: Bundle) -> None:
    said = zero.python(ROWS.replace("COUNT", "200"))
    note("memory", "run", takes=12 * 200 * 10**6, said=said)
    assert "OutOfMemory" in said and said.endswith("then 6.0")
