"""Bundles on disk: opening, verifying, stamps, writing."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from handmade import FILES, make_bundle, manifest_for, settle

from edge_infer import bundle as bundles
from edge_infer.bundle import Bundle, hash_file, open_bundle, replace_file, verify, write_bundle
from edge_infer.errors import BundleError, UsageError
from edge_infer.manifest import MANIFEST_MAX_BYTES, MANIFEST_NAME


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "tiny.edge")


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def refused(path: Path) -> str:
    with pytest.raises(BundleError) as caught:
        open_bundle(path)
    return str(caught.value)


# -- opening -----------------------------------------------------------------------------------------------------


def test_a_sound_bundle_opens_and_verifies(bundle: Bundle) -> None:
    opened = open_bundle(bundle.path)
    assert opened == bundle
    assert opened.digest == hash_file(bundle.path / MANIFEST_NAME) == opened.manifest.digest
    assert verify(opened) is True
    assert {file.name: file.read_bytes() for file in bundle.path.iterdir() if file.name != MANIFEST_NAME} == FILES


def test_a_bundle_opens_through_a_link_to_its_folder(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "link.edge").symlink_to(bundle.path)
    assert open_bundle(tmp_path / "link.edge").digest == bundle.digest


@pytest.mark.parametrize("name", ["nothing.edge", "nothing/at/all", "a\0b"])
def test_nothing_there_is_a_wrong_request(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="there is no bundle at"):
        open_bundle(tmp_path / name)


def test_a_file_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "model.edge").write_bytes(b"PK")
    assert "is a file, expected a bundle directory" in refused(tmp_path / "model.edge")


def test_an_empty_folder_is_no_bundle(tmp_path: Path) -> None:
    assert f"holds no {MANIFEST_NAME}" in refused(tmp_path)


def test_a_lost_manifest_is_named(bundle: Bundle) -> None:
    (bundle.path / MANIFEST_NAME).unlink()
    assert MANIFEST_NAME in refused(bundle.path)


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_missing_file_is_named(bundle: Bundle, name: str) -> None:
    bundle.file(name).unlink()
    assert f"lacks {name!r}" in refused(bundle.path)


@pytest.mark.parametrize("name", ["extra.bin", ".hidden", "MODEL.TFLITE"])
def test_an_extra_file_is_named(bundle: Bundle, name: str) -> None:
    bundle.file(name).write_bytes(b"")
    assert f"holds {name!r}" in refused(bundle.path)


def test_an_extra_folder_is_named(bundle: Bundle) -> None:
    bundle.file("assets").mkdir()
    assert "holds 'assets'" in refused(bundle.path)


@pytest.mark.parametrize("data", [b"", FILES["model.tflite"][:-1], FILES["model.tflite"] + b"x"])
def test_a_wrong_length_is_refused_with_both_lengths(bundle: Bundle, data: bytes) -> None:
    bundle.file("model.tflite").write_bytes(data)
    assert f"has {len(data)} bytes, expected {len(FILES['model.tflite'])}" in refused(bundle.path)


def replace_by_link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def replace_by_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("replace", [replace_by_link, replace_by_fifo, replace_by_folder])
def test_a_file_that_is_no_plain_file_is_refused(bundle: Bundle, replace: Callable[[Path], None]) -> None:
    replace(bundle.file("model.tflite"))
    assert "is not a plain file" in refused(bundle.path)


@pytest.mark.parametrize("replace", [replace_by_link, replace_by_fifo, replace_by_folder])
def test_a_manifest_that_is_no_plain_file_is_refused(bundle: Bundle, replace: Callable[[Path], None]) -> None:
    replace(bundle.path / MANIFEST_NAME)
    assert MANIFEST_NAME in refused(bundle.path)


def test_a_huge_manifest_is_refused_unread(bundle: Bundle) -> None:
    os.truncate(bundle.path / MANIFEST_NAME, MANIFEST_MAX_BYTES + 1)
    assert f"at most {MANIFEST_MAX_BYTES}" in refused(bundle.path)


# -- verifying ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("mode", ["auto", "full"])
def test_a_flipped_byte_is_found_in_every_file(bundle: Bundle, name: str, mode: str, tmp_path: Path) -> None:
    flip_a_byte(bundle.file(name))
    opened = open_bundle(bundle.path)
    with pytest.raises(BundleError, match=f"{name} has SHA-256 .* expected {bundle.manifest.files[name].sha256[:16]}"):
        verify(opened, mode, tmp_path / "stamps")


def test_an_unknown_mode_is_refused(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="expected one of auto, full"):
        verify(bundle, "fast")


def test_the_second_check_is_cheap_until_told_otherwise(bundle: Bundle, tmp_path: Path) -> None:
    settle(bundle)
    stamps = tmp_path / "deep" / "stamps"
    assert verify(bundle, stamp_dir=stamps) is True
    assert verify(bundle, stamp_dir=stamps) is False
    assert verify(bundle, "full", stamps) is True
    assert verify(bundle) is True
    assert verify(bundle, stamp_dir=tmp_path / "others") is True
    assert [file.name for file in stamps.iterdir()] == [f"{bundle.digest}.verified"]


def test_a_file_written_a_moment_ago_earns_no_stamp(bundle: Bundle, tmp_path: Path) -> None:
    now = bundles.time.time_ns() + bundles.SETTLED_NS
    os.utime(bundle.file("model.tflite"), ns=(now, now))
    assert verify(bundle, stamp_dir=tmp_path / "stamps") is True
    assert not (tmp_path / "stamps").exists()


def same_bytes_in_place(path: Path) -> None:
    path.write_bytes(path.read_bytes())


def equal_copy_renamed_over(path: Path) -> None:
    copy = path.parent.parent / "copy"
    shutil.copy2(path, copy)
    copy.rename(path)


def old_times(path: Path) -> None:
    os.utime(path, ns=(0, 0))


@pytest.mark.parametrize("touch", [same_bytes_in_place, equal_copy_renamed_over, Path.touch, old_times])
@pytest.mark.parametrize("name", sorted(FILES))
def test_a_touched_file_is_hashed_again(
    bundle: Bundle, tmp_path: Path, touch: Callable[[Path], None], name: str
) -> None:
    settle(bundle)
    verify(bundle, stamp_dir=tmp_path / "stamps")
    touch(bundle.file(name))
    assert verify(bundle, stamp_dir=tmp_path / "stamps") is True
    settle(bundle)
    assert verify(bundle, stamp_dir=tmp_path / "stamps") is True
    assert verify(bundle, stamp_dir=tmp_path / "stamps") is False


def test_a_change_that_keeps_length_and_mtime_is_found(bundle: Bundle, tmp_path: Path) -> None:
    settle(bundle)
    verify(bundle, stamp_dir=tmp_path / "stamps")
    path = bundle.file("model.tflite")
    before = path.stat()
    flip_a_byte(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(BundleError, match="damaged"):
        verify(open_bundle(bundle.path), stamp_dir=tmp_path / "stamps")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b"\xff", b'{"model.tflite": [1, 2, 3, 4, 5]}', b"[" * 50_000]
)
def test_a_damaged_stamp_means_nothing(bundle: Bundle, tmp_path: Path, content: bytes) -> None:
    settle(bundle)
    (tmp_path / f"{bundle.digest}.verified").write_bytes(content)
    assert verify(bundle, stamp_dir=tmp_path) is True
    assert verify(bundle, stamp_dir=tmp_path) is False


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_stamp_that_is_no_file_means_nothing(bundle: Bundle, tmp_path: Path, make: Callable[[Path], None]) -> None:
    settle(bundle)
    make(tmp_path / f"{bundle.digest}.verified")
    assert verify(bundle, stamp_dir=tmp_path) is True


def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert hash_file(tmp_path / "pipe") == hashlib.sha256(b"").hexdigest()


def test_without_a_place_for_stamps_every_check_hashes(bundle: Bundle, tmp_path: Path) -> None:
    settle(bundle)
    (tmp_path / "stamps").write_bytes(b"a file where the folder should be")
    assert verify(bundle, stamp_dir=tmp_path / "stamps") is True
    assert verify(bundle, stamp_dir=tmp_path / "stamps") is True


def test_a_full_disk_under_the_stamps_costs_only_a_hash(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(bundle)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundles.os, "replace", full)
    assert verify(bundle, stamp_dir=tmp_path / "stamps") is True
    assert list((tmp_path / "stamps").iterdir()) == []


def test_content_that_was_refused_is_refused_again(bundle: Bundle, tmp_path: Path) -> None:
    settle(bundle)
    asked = []

    def refuse(opened: Bundle) -> None:
        asked.append(opened.digest)
        raise BundleError("refers outside")

    for _ in range(2):
        with pytest.raises(BundleError, match="refers outside"):
            verify(bundle, stamp_dir=tmp_path / "stamps", inspect=refuse)
    assert asked == [bundle.digest] * 2


def test_content_is_inspected_after_the_hashes_and_once(bundle: Bundle, tmp_path: Path) -> None:
    settle(bundle)
    asked: list[Bundle] = []
    for _ in range(2):
        verify(bundle, stamp_dir=tmp_path / "stamps", inspect=asked.append)
    assert asked == [bundle]
    flip_a_byte(bundle.file("model.tflite"))
    with pytest.raises(BundleError, match="SHA-256"):
        verify(bundle, stamp_dir=tmp_path / "stamps", inspect=asked.append)
    assert asked == [bundle]


# -- writing -----------------------------------------------------------------------------------------------------


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def parts(folder: Path, **changes: bytes) -> Path:
    folder.mkdir()
    for name, data in FILES.items():
        (folder / name).write_bytes(changes.get(name.split(".")[0], data))
    return folder


def test_the_same_files_give_the_same_bundle_anywhere(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, two = make_bundle(tmp_path / "a" / "one.edge"), make_bundle(tmp_path / "b" / "two.edge")
    assert one.digest == two.digest
    assert content(one.path) == content(two.path)


def test_another_byte_gives_another_digest(tmp_path: Path) -> None:
    one = make_bundle(tmp_path / "one.edge")
    two = make_bundle(tmp_path / "two.edge", {**FILES, "labels.txt": b"zero\none\ntwo\n"})
    assert one.digest != two.digest


def test_missing_parent_folders_are_made(tmp_path: Path) -> None:
    folder = parts(tmp_path / "parts")
    assert write_bundle(manifest_for(folder, FILES), folder, tmp_path / "a" / "b" / "c.edge").path.is_dir()


def test_files_not_in_the_manifest_stay_out(tmp_path: Path) -> None:
    folder = parts(tmp_path / "parts")
    (folder / "notes.txt").write_bytes(b"not for the bundle")
    bundle = write_bundle(manifest_for(folder, FILES), folder, tmp_path / "tiny.edge")
    assert set(content(bundle.path)) == {*FILES, MANIFEST_NAME}


def test_an_older_bundle_is_replaced(bundle: Bundle, tmp_path: Path) -> None:
    folder = parts(tmp_path / "parts", model=b"better")
    newer = write_bundle(manifest_for(folder, FILES), folder, bundle.path)
    assert newer.digest != bundle.digest
    assert open_bundle(bundle.path).file("model.tflite").read_bytes() == b"better"
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.edge", "tiny.edge-parts", "parts"}


def fail_at(monkeypatch: pytest.MonkeyPatch, function: str, number: int) -> None:
    """Let the ``number``-th call of ``os.<function>`` fail as a broken disk does."""
    real, calls = getattr(os, function), []

    def failing(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == number:
            raise OSError(5, "Input/output error")
        return real(*arguments)

    monkeypatch.setattr(os, function, failing)


@pytest.mark.parametrize(
    ("function", "number"),
    [("rename", 1), ("rename", 2), *(("fsync", number) for number in range(1, 6)), ("link", 0)],
)
def test_a_failure_keeps_the_older_bundle_and_leaves_nothing_else(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, number: int
) -> None:
    folder = parts(tmp_path / "parts", model=b"better")
    manifest = manifest_for(folder, FILES)
    if not number:
        flip_a_byte(folder / "model.tflite")  # what is written must be what the manifest says
    fail_at(monkeypatch, function, number)
    with pytest.raises((OSError, BundleError)):
        write_bundle(manifest, folder, bundle.path)
    monkeypatch.undo()
    assert verify(open_bundle(bundle.path), "full")
    assert open_bundle(bundle.path).digest == bundle.digest
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.edge", "tiny.edge-parts", "parts"}


def test_a_failure_without_an_older_bundle_leaves_nothing(tmp_path: Path) -> None:
    folder = parts(tmp_path / "parts")
    manifest = manifest_for(folder, FILES)
    (folder / "labels.txt").unlink()
    with pytest.raises(FileNotFoundError):
        write_bundle(manifest, folder, tmp_path / "new.edge")
    assert [path.name for path in tmp_path.iterdir()] == ["parts"]


def a_folder(path: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").write_bytes(b"years of work")


def a_folder_with_a_manifest_of_something_else(path: Path) -> None:
    a_folder(path)
    (path / MANIFEST_NAME).write_bytes(b'{"manifest_version": 3, "name": "a browser extension"}')


def a_bundle_with_notes_in_it(path: Path) -> None:
    make_bundle(path)
    (path / "notes.txt").write_bytes(b"mine")


def a_file(path: Path) -> None:
    path.write_bytes(b"mine")


def a_link_to_nowhere(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize(
    "make",
    [a_folder, a_folder_with_a_manifest_of_something_else, a_bundle_with_notes_in_it, a_file, a_link_to_nowhere],
)
def test_what_is_no_bundle_is_not_overwritten(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "mine"
    make(path)
    before = content(tmp_path), os.readlink(path) if path.is_symlink() else None
    folder = parts(tmp_path.parent / f"{tmp_path.name}-parts")
    with pytest.raises(UsageError, match="choose another name with -o or remove it"):
        write_bundle(manifest_for(folder, FILES), folder, path)
    assert (content(tmp_path), os.readlink(path) if path.is_symlink() else None) == before


# -- one file ----------------------------------------------------------------------------------------------------


def test_a_replaced_file_can_be_read_by_other_users(tmp_path: Path) -> None:
    replace_file(tmp_path / "pointer", b"one")
    replace_file(tmp_path / "pointer", b"two")
    assert (tmp_path / "pointer").read_bytes() == b"two"
    assert (tmp_path / "pointer").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(("function", "number"), [("replace", 1), ("fsync", 1)])
def test_a_file_that_cannot_be_replaced_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, number: int
) -> None:
    replace_file(tmp_path / "pointer", b"one")
    fail_at(monkeypatch, function, number)
    with pytest.raises(OSError, match="Input/output"):
        replace_file(tmp_path / "pointer", b"two")
    assert content(tmp_path) == {"pointer": b"one"}
