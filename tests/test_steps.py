"""The cache of packaging steps: found by content, redone when what it depends on changed, never believed blindly."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edge_infer import steps
from edge_infer.errors import ConversionError, ConverterMissing, UsageError
from edge_infer.steps import Steps

#: Runs in the children, which get this process's import path.
MODULE = """
import os
from pathlib import Path
from edge_infer.errors import ConversionError, ConverterMissing, UsageError

def copy(request):
    target = Path(request["out"]) / "copy.txt"
    target.write_text(Path(request["source"]).read_text())
    with open(os.environ["CALLS"], "a") as file:
        file.write("copy\\n")
    return {"file": str(target), "depends_on": request.get("depends_on", {})}

def refuse(request):
    with open(os.environ["CALLS"], "a") as file:
        file.write("refuse\\n")
    if request["kind"] == "memory":
        try:
            raise MemoryError("cannot allocate")
        except MemoryError as error:
            error.__context__ = error  # some code does that, and following it must end
            raise ConversionError("no, since ...") from error
    kinds = {"conversion": ConversionError, "missing": ConverterMissing, "usage": UsageError}
    raise kinds[request["kind"]]("no, since ...")

def crash(request):
    with open(os.environ["CALLS"], "a") as file:
        file.write("crash\\n")
    (Path(request["out"]) / "half").write_text("half")
    os.abort()
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "step_functions.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    (tmp_path / "calls").touch()
    return tmp_path / "calls"


def new(root: Path) -> Steps:
    return Steps(root / "cache", root / "log", lambda step: None)


def source(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "source.txt").write_text(text)
    return folder / "source.txt"


def copy(run: Steps, path: Path, digest: str, **more: object) -> steps.Made:
    return run.run("step_functions:copy", {"source": str(path), **more}, "copying", {str(path): digest})


def test_the_same_content_elsewhere_is_found(tmp_path: Path, calls: Path) -> None:
    first = copy(new(tmp_path), source(tmp_path / "a", "text"), "d1")
    second = copy(new(tmp_path), source(tmp_path / "b", "text"), "d1")
    assert first == second
    assert Path(second.answer["file"]).read_text() == "text"
    assert calls.read_text() == "copy\n"


def test_other_content_or_options_are_made_anew(tmp_path: Path, calls: Path) -> None:
    path = source(tmp_path / "a", "text")
    keys = {copy(new(tmp_path), path, "d1").key, copy(new(tmp_path), path, "d2").key}
    keys.add(copy(new(tmp_path), path, "d1", option=1).key)
    assert len(keys) == 3
    assert calls.read_text() == "copy\n" * 3


def test_a_later_step_is_known_by_the_step_before(tmp_path: Path, calls: Path) -> None:
    run = new(tmp_path)
    first = copy(run, source(tmp_path / "a", "text"), "d1")
    other = copy(run, source(tmp_path / "b", "other"), "d2")
    following = [run.run("step_functions:copy", {"source": made.answer["file"]}, "again") for made in (first, other)]
    assert [Path(made.answer["file"]).read_text() for made in following] == ["text", "other"]


@pytest.mark.parametrize("damage", ["gone", "shorter", "no answer"])
def test_a_damaged_entry_is_made_anew(tmp_path: Path, calls: Path, damage: str) -> None:
    path = source(tmp_path / "a", "text")
    made = copy(new(tmp_path), path, "d1")
    file = made.folder / "copy.txt"
    if damage == "gone":
        file.unlink()
    elif damage == "shorter":
        file.write_text("te")
    else:
        (made.folder / steps.ANSWER).write_text("{")
    assert Path(copy(new(tmp_path), path, "d1").answer["file"]).read_text() == "text"
    assert calls.read_text() == "copy\n" * 2


def test_code_that_a_step_imported_counts(tmp_path: Path, calls: Path) -> None:
    path, code = source(tmp_path / "a", "text"), tmp_path / "user.py"
    code.write_text("x = 1")
    depends = {str(code): steps.hash_file(code)}
    copy(new(tmp_path), path, "d1", depends_on=depends)
    copy(new(tmp_path), path, "d1", depends_on=depends)
    assert calls.read_text() == "copy\n"
    code.write_text("x = 2")
    copy(new(tmp_path), path, "d1", depends_on=depends)
    assert calls.read_text() == "copy\n" * 2


@pytest.mark.parametrize(
    ("kind", "error", "times"),
    [
        ("conversion", ConversionError, 1),
        ("memory", ConversionError, 2),
        ("missing", ConverterMissing, 2),
        ("usage", UsageError, 2),
    ],
)
def test_an_explained_failure_is_remembered_and_what_may_be_mended_is_not(
    tmp_path: Path, calls: Path, kind: str, error: type[Exception], times: int
) -> None:
    for _ in range(2):
        with pytest.raises(error, match=r"^no, since \.\.\.$"):
            new(tmp_path).run("step_functions:refuse", {"kind": kind}, "refusing")
    assert calls.read_text() == "refuse\n" * times


def test_a_crash_leaves_nothing_and_is_tried_again(tmp_path: Path, calls: Path) -> None:
    for _ in range(2):
        with pytest.raises(ConversionError, match="SIGABRT"):
            new(tmp_path).run("step_functions:crash", {}, "crashing")
    assert calls.read_text() == "crash\n" * 2
    assert list((tmp_path / "cache").iterdir()) == []


def test_trim_removes_what_was_not_used_for_longest(tmp_path: Path, calls: Path) -> None:
    run = new(tmp_path)
    made = [copy(run, source(tmp_path / name, name * 1000), name) for name in "abc"]
    for age, item in enumerate(made):
        os.utime(item.folder, (1000 + age, 1000 + age))
    copy(new(tmp_path), source(tmp_path / "a", "a" * 1000), "a")  # used again, so it is now the youngest
    before = steps.usage(run.root)
    assert before.steps == 3
    removed = steps.trim(run.root, before.size - 1)
    assert not made[1].folder.exists()
    assert made[0].folder.exists() and made[2].folder.exists()
    assert steps.usage(run.root).size == before.size - removed
    assert steps.trim(run.root, 0, keep=[made[2].key]) > 0
    assert [folder.name for folder in run.root.iterdir()] == [made[2].key]


def test_trim_leaves_the_scratch_of_a_packaging_beside_this_one(tmp_path: Path) -> None:
    running, abandoned = tmp_path / ".running", tmp_path / ".abandoned"
    for folder in (running, abandoned):
        folder.mkdir()
        (folder / "draft").write_text("x" * 1000)
    os.utime(abandoned, (1000, 1000))
    assert steps.trim(tmp_path, 0) == 1000
    assert running.exists() and not abandoned.exists()


def test_the_code_of_the_package_is_part_of_the_key(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, calls: Path
) -> None:
    path = source(tmp_path / "a", "text")
    copy(new(tmp_path), path, "d1")
    monkeypatch.setattr(steps, "_environment", lambda: {"edge-infer": "other"})
    copy(new(tmp_path), path, "d1")
    assert calls.read_text() == "copy\n" * 2
