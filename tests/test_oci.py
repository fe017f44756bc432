"""Bundles in an OCI image layout: skopeo, a standard tool, reads them with the digests that the bundle has."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SOURCES
from sshd import make_key

from edge_infer.bundle import Bundle, open_bundle
from edge_infer.cli import main
from edge_infer.deploy.signing import sign
from edge_infer.errors import BundleError, UsageError
from edge_infer.oci import export, import_bundle, tags

TAG = "digits:1-cpu-x86_64"


@pytest.fixture(scope="session")
def onnx(packaged) -> Bundle:  # type: ignore[no-untyped-def]
    return packaged(SOURCES["onnx"], "onnx", "float32")


@pytest.fixture
def layout(onnx: Bundle, tmp_path: Path) -> Path:
    export(onnx, tmp_path / "layout")
    return tmp_path / "layout"


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def skopeo(*arguments: str) -> str:
    done = subprocess.run(["skopeo", *arguments], check=True, capture_output=True, text=True)
    return done.stdout


def test_skopeo_reads_back_every_file_under_the_digest_of_the_manifest(layout, onnx, tmp_path):
    out = tmp_path / "out"
    skopeo("copy", f"oci:{layout}:{TAG}", f"dir:{out}")
    for name, entry in onnx.manifest.files.items():
        assert (out / entry.sha256).read_bytes() == onnx.file(name).read_bytes()
    assert (out / onnx.digest).read_bytes() == onnx.file("manifest.json").read_bytes()


def test_skopeo_copies_it_to_another_layout_from_which_it_is_imported(layout, onnx, tmp_path):
    skopeo("copy", f"oci:{layout}:{TAG}", f"oci:{tmp_path / 'store'}:digits:new")
    assert import_bundle(tmp_path / "store", "digits:new", tmp_path / "back.edge").digest == onnx.digest
    assert content(tmp_path / "back.edge") == content(onnx.path)


def test_a_signed_bundle_comes_back_signed(onnx, tmp_path):
    copy = tmp_path / "signed.edge"
    shutil.copytree(onnx.path, copy)
    make_key(tmp_path / "key")
    sign(open_bundle(copy), tmp_path / "key")
    export(open_bundle(copy), tmp_path / "layout")
    skopeo("copy", f"oci:{tmp_path / 'layout'}:{TAG}", f"oci:{tmp_path / 'store'}:{TAG}")
    back = import_bundle(tmp_path / "store", TAG, tmp_path / "back.edge")
    assert back.digest == onnx.digest and content(back.path) == content(copy)
    assert "manifest.sig" in content(back.path)


def test_the_oci_manifest_is_an_artifact_by_image_spec_1_1(layout, onnx):
    raw = skopeo("inspect", "--raw", f"oci:{layout}:{TAG}")
    manifest = json.loads(raw)
    assert manifest["schemaVersion"] == 2 and manifest["mediaType"] == "application/vnd.oci.image.manifest.v1+json"
    assert manifest["artifactType"] == "application/vnd.edge-infer.bundle.v1"
    assert manifest["config"]["mediaType"] == "application/vnd.oci.empty.v1+json"
    assert manifest["config"]["digest"] == f"sha256:{hashlib.sha256(b'{}').hexdigest()}"
    titles = [layer["annotations"]["org.opencontainers.image.title"] for layer in manifest["layers"]]
    assert titles == [*sorted(onnx.manifest.files), "manifest.json"]
    assert hashlib.sha256(raw.encode()).hexdigest() == tags(layout)[TAG].removeprefix("sha256:")


def test_the_same_bundle_gives_the_same_bytes_and_a_second_export_changes_none(layout, onnx, tmp_path):
    export(onnx, tmp_path / "again")
    before = content(layout)
    assert content(tmp_path / "again") == before
    export(onnx, layout)
    assert content(layout) == before


def test_bundles_in_one_layout_share_their_blobs_and_keep_their_tags(layout, onnx, packaged):
    pi = packaged(SOURCES["onnx"], "onnx", "float32", "raspberry-pi-4")
    before = set(content(layout))
    export(pi, layout)
    shared = {entry.sha256 for entry in onnx.manifest.files.values()} & {
        entry.sha256 for entry in pi.manifest.files.values()
    }
    assert shared
    # Its own manifest and its OCI manifest are new, besides the files that differ.
    added = set(content(layout)) - before
    assert len(added) == len(pi.manifest.files) - len(shared) + 2
    assert list(tags(layout)) == [TAG, "digits:1-raspberry-pi-4"]


def test_a_tag_moves_to_the_bundle_exported_last(layout, onnx, packaged, tmp_path):
    int8 = packaged(SOURCES["onnx"], "onnx", "int8")
    export(int8, layout)
    assert list(tags(layout)) == [TAG]
    assert import_bundle(layout, TAG, tmp_path / "back.edge").digest == int8.digest


def test_what_other_tools_put_into_the_index_stays(layout, onnx):
    index = json.loads((layout / "index.json").read_bytes())
    other = {"mediaType": "application/vnd.oci.image.index.v1+json", "digest": f"sha256:{'0' * 64}", "size": 3}
    (layout / "index.json").write_text(json.dumps({**index, "manifests": [*index["manifests"], other]}))
    export(onnx, layout, "digits:latest")
    rows = json.loads((layout / "index.json").read_bytes())["manifests"]
    assert other in rows and len(rows) == 3


def test_an_export_killed_at_any_write_leaves_a_layout_that_still_answers(layout, onnx, packaged, tmp_path):
    """Its own files are what it renames: after each rename but the last, the index is the one before."""
    int8 = packaged(SOURCES["onnx"], "onnx", "int8")
    script = """
import os, sys
from pathlib import Path
from edge_infer import oci
from edge_infer.bundle import open_bundle
left, rename = int(sys.argv[3]), os.replace
def replace(*paths):
    global left
    if not left:
        os._exit(9)
    left -= 1
    rename(*paths)
os.replace = replace
oci.export(open_bundle(Path(sys.argv[1])), Path(sys.argv[2]))
"""
    for renames in range(20):
        copy = tmp_path / f"copy-{renames}"
        shutil.copytree(layout, copy)
        command = [sys.executable, "-c", script, str(int8.path), str(copy), str(renames)]
        status = subprocess.run(command, check=False).returncode
        digest = import_bundle(copy, TAG, tmp_path / f"back-{renames}.edge").digest
        assert digest == (onnx.digest if status else int8.digest)
        if not status:
            assert renames > 3
            return
    raise AssertionError("the export never came to its end")


@pytest.mark.parametrize("damage", ["file", "bundle manifest", "oci manifest", "missing", "link"])
def test_a_damaged_blob_is_refused_and_nothing_is_written(layout, onnx, tmp_path, damage):
    blobs = layout / "blobs" / "sha256"
    name = {
        "bundle manifest": onnx.digest,
        "oci manifest": tags(layout)[TAG].removeprefix("sha256:"),
    }.get(damage, onnx.manifest.files["weights.bin"].sha256)
    data = (blobs / name).read_bytes()
    (blobs / name).unlink()
    if damage == "link":
        (tmp_path / "victim").write_bytes(data)
        (blobs / name).symlink_to(tmp_path / "victim")
    elif damage != "missing":
        (blobs / name).write_bytes(data[:-2] + bytes([data[-2] ^ 1, data[-1]]))
    with pytest.raises(BundleError):
        import_bundle(layout, TAG, tmp_path / "back.edge")
    assert not (tmp_path / "back.edge").exists()


def test_a_digest_cannot_lead_out_of_the_layout(layout, tmp_path):
    index = json.loads((layout / "index.json").read_bytes())
    index["manifests"][0]["digest"] = "sha256:../../../secret"
    (layout / "index.json").write_text(json.dumps(index))
    with pytest.raises(BundleError, match="expected sha256"):
        import_bundle(layout, TAG, tmp_path / "back.edge")


def test_a_container_image_is_no_bundle(layout, tmp_path):
    blobs = layout / "blobs" / "sha256"
    text = b'{"schemaVersion":2,"layers":[]}'
    digest = hashlib.sha256(text).hexdigest()
    (blobs / digest).write_bytes(text)
    row = {"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": f"sha256:{digest}", "size": len(text)}
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [row]}))
    with pytest.raises(BundleError, match="no bundle"):
        import_bundle(layout, f"sha256:{digest}", tmp_path / "back.edge")


def test_a_folder_that_is_something_else_is_left_alone(onnx, tmp_path):
    (tmp_path / "photo.jpg").write_text("mine")
    with pytest.raises(UsageError, match="no OCI image layout and not empty"):
        export(onnx, tmp_path)
    assert os.listdir(tmp_path) == ["photo.jpg"]


def test_a_damaged_bundle_is_not_exported(onnx, tmp_path):
    copy = tmp_path / "copy.edge"
    shutil.copytree(onnx.path, copy)
    with (copy / "weights.bin").open("r+b") as file:
        file.write(b"\xff")
    with pytest.raises(BundleError, match="SHA-256"):
        export(open_bundle(copy), tmp_path / "layout")
    assert not (tmp_path / "layout").exists()


# -- the command line --------------------------------------------------------------------------------------------------


def test_export_and_import_by_command(onnx, packaged, tmp_path, capsys):
    pi = packaged(SOURCES["onnx"], "onnx", "float32", "raspberry-pi-4")
    layout = ["--oci", str(tmp_path / "layout")]
    assert main(["export", str(onnx.path), str(pi.path), *layout, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["bundles"]
    assert [(row["tag"], row["digest"]) for row in rows] == [
        (TAG, onnx.digest),
        ("digits:1-raspberry-pi-4", pi.digest),
    ]
    assert main(["import", rows[1]["oci_digest"], *layout, "-o", str(tmp_path / "pi.edge")]) == 0
    assert content(tmp_path / "pi.edge") == content(pi.path)
    assert main(["import", "digits:2", *layout, "-o", str(tmp_path / "x.edge")]) == 2
    assert TAG in capsys.readouterr().err
    assert main(["import", TAG, "--oci", str(tmp_path), "-o", str(tmp_path / "x.edge")]) == 2
    assert main(["export", str(onnx.path), str(pi.path), *layout, "--tag", "x"]) == 2
