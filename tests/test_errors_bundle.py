"""What is wrong with a bundle, through the command line: exit status 4 and one sentence, nothing run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SOURCES

from edge_infer.cli import main
from edge_infer.manifest import seal

Damage = Callable[[Path], None]


def edit_manifest(**changes: object) -> Damage:
    def damage(path: Path) -> None:
        manifest = json.loads((path / "manifest.json").read_bytes())
        (path / "manifest.json").write_bytes(seal({**manifest, **changes}))

    return damage


def rename_in_manifest(new: str) -> Damage:
    """The manifest of a bundle that would have the reader open ``new``."""

    def damage(path: Path) -> None:
        manifest = json.loads((path / "manifest.json").read_bytes())
        manifest["files"][new] = manifest["files"].pop("weights.bin")
        manifest["artifact"]["weights"] = new
        (path / "manifest.json").write_bytes(seal(manifest))

    return damage


def flip(name: str) -> Damage:
    def damage(path: Path) -> None:
        data = bytearray((path / name).read_bytes())
        data[len(data) // 2] ^= 1
        (path / name).write_bytes(data)

    return damage


def link(path: Path) -> None:
    (path / "weights.bin").rename(path.parent / "elsewhere")
    (path / "weights.bin").symlink_to(path.parent / "elsewhere")


def reformat(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_bytes())
    (path / "manifest.json").write_text(json.dumps(manifest))


CASES: dict[str, tuple[Damage, str]] = {
    "a flipped byte in the weights": (flip("weights.bin"), "weights.bin has SHA-256"),
    "a flipped byte in the model": (flip("model.onnx"), "model.onnx has SHA-256"),
    "a flipped byte in the golden answers": (flip("golden.npz"), "golden.npz has SHA-256"),
    "a missing file": (lambda path: (path / "weights.bin").unlink(), "lacks 'weights.bin'"),
    "an extra file": (lambda path: (path / "extra").touch(), "holds 'extra', which its manifest does not list"),
    "a file cut short": (lambda path: os.truncate(path / "weights.bin", 10), "has 10 bytes, expected"),
    "a link": (link, "is not a plain file"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "holds no manifest.json, so it is not a bundle"),
    "a manifest cut short": (
        lambda path: os.truncate(path / "manifest.json", 100),
        "the manifest is not canonical JSON",
    ),
    "a manifest written by hand": (reformat, "not in its canonical form"),
    "a newer schema": (edit_manifest(schema=2), "has schema 2, this edge_infer reads up to 1; upgrade"),
    "a parent folder": (rename_in_manifest("../weights.bin"), "expected a plain name"),
    "an absolute path": (rename_in_manifest("/etc/passwd"), "expected a plain name"),
    "a hidden file": (rename_in_manifest(".weights"), "expected a plain name"),
    "a field of the wrong type": (edit_manifest(name=7), "name is 7, expected a plain name"),
}


#: ``inspect`` reads the manifest and the folder's listing, no content.
COMMANDS = [
    (command, case)
    for case in CASES
    for command in ("inspect", "verify", "run", "bench")
    if not (command == "inspect" and case.startswith("a flipped byte"))
]


@pytest.mark.parametrize(("command", "case"), COMMANDS)
def test_a_damaged_bundle_is_refused(packaged, tmp_path, capsys, command, case):
    damage, words = CASES[case]
    path = tmp_path / "digits.edge"
    shutil.copytree(packaged(SOURCES["onnx"], "onnx", "float32").path, path)
    damage(path)
    assert main([command, str(path)]) == 4
    error = capsys.readouterr().err
    assert words in error and len(error.strip().splitlines()) == 1


def test_a_bundle_that_is_not_there(tmp_path, capsys):
    assert main(["verify", str(tmp_path / "none.edge")]) == 2
    assert "there is no bundle at" in capsys.readouterr().err


def test_a_model_that_was_never_pushed(capsys):
    assert main(["run", "kitten"]) == 4
    assert "no model 'kitten' in the store" in capsys.readouterr().err


def test_json_errors_carry_type_and_status(tmp_path, capsys):
    assert main(["verify", str(tmp_path / "none.edge"), "--json"]) == 2
    answer = json.loads(capsys.readouterr().out)
    assert answer["error"]["type"] == "UsageError" and answer["error"]["exit_status"] == 2
