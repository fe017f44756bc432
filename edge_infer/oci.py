"""Bundles as OCI artifacts in an image layout: a folder of blobs by their SHA-256, which registries' tools know.

    oci-layout                  the layout's version
    index.json                  what is there, by tag
    blobs/sha256/<digest>       files and manifests, each once

Each file of a bundle is a blob, under the same SHA-256 as in the bundle's manifest; the manifest is one too, so that
its digest is the bundle's, and so is a signature. The OCI manifest names them as its layers (image-spec 1.1, an
artifact: ``artifactType`` and the empty config). Nothing is compressed, and the same bundle gives the same bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edge_infer.bundle import (
    CHUNK_BYTES,
    Bundle,
    read_plain_file,
    refuse_to_overwrite,
    replace_file,
    sync_directory,
    verify,
    write_bundle,
)
from edge_infer.errors import BundleError, UsageError
from edge_infer.manifest import MANIFEST_MAX_BYTES, MANIFEST_NAME, SIGNATURE_NAME, Manifest, parse
from edge_infer.trust import read_signature

ARTIFACT = "application/vnd.edge-infer.bundle.v1"
BUNDLE_MANIFEST = "application/vnd.edge-infer.bundle.manifest.v1+json"
SIGNATURE = "application/vnd.edge-infer.bundle.signature.v1"
FILE = "application/octet-stream"
IMAGE_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
IMAGE_INDEX = "application/vnd.oci.image.index.v1+json"
EMPTY = "application/vnd.oci.empty.v1+json"
EMPTY_BLOB = b"{}"

TAG = "org.opencontainers.image.ref.name"
TITLE = "org.opencontainers.image.title"
VERSION = "org.opencontainers.image.version"
TARGET = "io.edge-infer.target"
FORMAT = "io.edge-infer.format"

LAYOUT = b'{"imageLayoutVersion":"1.0.0"}'
PREFIX = "sha256:"
DIGEST = re.compile(PREFIX + r"([0-9a-f]{64})\Z")


def tag_of(manifest: Manifest) -> str:
    """``NAME:VERSION-TARGET``: one model of one version is built for several targets."""
    return f"{manifest.name}:{manifest.version}-{manifest.target.name}"


def export(bundle: Bundle, layout: Path, tag: str | None = None) -> str:
    """Add ``bundle`` to the image layout at ``layout``, which is made where there is none; gives its OCI digest.

    Blobs that are there stay; the index is replaced last, so that it never names what is not there. A ``tag``
    (default: ``tag_of``) that was another bundle's is then this one's. Raises BundleError for a damaged bundle,
    UsageError for a folder that is something else.
    """
    verify(bundle, mode="full")
    blobs = _make_layout(layout)
    with _locked(layout):
        document = _canonical(_artifact(bundle))
        for descriptor in _layers(bundle):
            _add_file(blobs, bundle.file(descriptor["annotations"][TITLE]), descriptor["digest"].removeprefix(PREFIX))
        _add(blobs, EMPTY_BLOB)
        digest = _add(blobs, document)
        sync_directory(blobs)
        row = _descriptor(IMAGE_MANIFEST, digest, len(document), {TAG: tag or tag_of(bundle.manifest)})
        _add_to_index(layout, {**row, "artifactType": ARTIFACT})
    return PREFIX + digest


def _artifact(bundle: Bundle) -> dict[str, Any]:
    """The OCI manifest."""
    return {
        "schemaVersion": 2,
        "mediaType": IMAGE_MANIFEST,
        "artifactType": ARTIFACT,
        "config": _descriptor(EMPTY, hashlib.sha256(EMPTY_BLOB).hexdigest(), len(EMPTY_BLOB)),
        "layers": _layers(bundle),
        "annotations": {
            TITLE: bundle.manifest.name,
            VERSION: bundle.manifest.version,
            TARGET: bundle.manifest.target.name,
            FORMAT: bundle.manifest.artifact.format,
        },
    }


def _layers(bundle: Bundle) -> list[dict[str, Any]]:
    files = sorted(bundle.manifest.files.items())
    own = bundle.file(MANIFEST_NAME).stat().st_size
    layers = [_descriptor(FILE, entry.sha256, entry.size, {TITLE: name}) for name, entry in files]
    layers.append(_descriptor(BUNDLE_MANIFEST, bundle.digest, own, {TITLE: MANIFEST_NAME}))
    signature = read_signature(bundle.path)
    if signature is not None:
        digest = hashlib.sha256(signature).hexdigest()
        layers.append(_descriptor(SIGNATURE, digest, len(signature), {TITLE: SIGNATURE_NAME}))
    return layers


def import_bundle(layout: Path, name: str, path: Path) -> Bundle:
    """Write the bundle that ``layout`` holds under the tag or OCI digest ``name`` to ``path``.

    Every blob is checked against its digest. Raises UsageError when it is not there, BundleError when it is damaged or
    no bundle.
    """
    refuse_to_overwrite(path)
    descriptor = _find(layout, name)
    blobs = layout / "blobs" / "sha256"
    document = _read_json(blobs / _sha256(descriptor, layout), _sha256(descriptor, layout))
    layers = document.get("layers") if document.get("artifactType") == ARTIFACT else None
    if not isinstance(layers, list):
        raise BundleError(f"{name} in {layout} is no bundle, expected an artifact of type {ARTIFACT}")
    found = _of_kind(layers, BUNDLE_MANIFEST, layout)
    if len(found) != 1:
        raise BundleError(f"{name} in {layout} has {len(found)} bundle manifests, expected one; export it again")
    digest = found[0]
    manifest = parse(_checked(blobs / digest, digest))
    signatures = [_checked(blobs / each, each) for each in _of_kind(layers, SIGNATURE, layout)]
    with tempfile.TemporaryDirectory(prefix="edge-infer-import-") as folder:
        for file, entry in manifest.files.items():
            _copy(blobs / entry.sha256, Path(folder) / file, entry.sha256)
        bundle = write_bundle(manifest, Path(folder), path)
    for signature in signatures[:1]:
        replace_file(path / SIGNATURE_NAME, signature)
    if bundle.digest != digest:
        raise BundleError(f"{path} has the digest {bundle.digest[:16]}..., expected {digest[:16]}...; export it again")
    return bundle


def tags(layout: Path) -> dict[str, str]:
    """OCI digests by tag. Raises UsageError when ``layout`` is no image layout, BundleError for a damaged index."""
    return {_tag(row): str(row.get("digest")) for row in _index(layout)["manifests"] if _tag(row)}


# -- the layout ------------------------------------------------------------------------------------------------------


def _make_layout(layout: Path) -> Path:
    blobs = layout / "blobs" / "sha256"
    if layout.exists() and not (layout / "oci-layout").is_file() and (not layout.is_dir() or any(layout.iterdir())):
        raise UsageError(f"{layout} is no OCI image layout and not empty; name a new folder with --oci")
    blobs.mkdir(parents=True, exist_ok=True)
    if not (layout / "oci-layout").exists():
        replace_file(layout / "oci-layout", LAYOUT)
    return blobs


@contextlib.contextmanager
def _locked(layout: Path) -> Iterator[None]:
    """Two exports into one layout take turns: both replace the index."""
    descriptor = os.open(layout, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _index(layout: Path) -> dict[str, Any]:
    if not (layout / "oci-layout").is_file():
        raise UsageError(f"{layout} is no OCI image layout: it holds no oci-layout; name its folder with --oci")
    path = layout / "index.json"
    if not path.exists():
        return {"schemaVersion": 2, "mediaType": IMAGE_INDEX, "manifests": []}
    index = _object(read_plain_file(path, MANIFEST_MAX_BYTES), path)
    rows = index.get("manifests")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise BundleError(f"{path} lists no manifests, expected an OCI image index")
    return index


def _tag(row: Mapping[str, Any]) -> str:
    annotations = row.get("annotations")
    return str(annotations.get(TAG, "")) if isinstance(annotations, dict) else ""


def _add_to_index(layout: Path, descriptor: dict[str, Any]) -> None:
    """Put a descriptor into the index in place of the one with its tag; others, of other tools too, stay."""
    index = _index(layout)
    tag = descriptor["annotations"][TAG]
    others = [row for row in index["manifests"] if _tag(row) != tag]
    rows = sorted(
        [*others, descriptor], key=lambda row: (row.get("annotations", {}).get(TAG, ""), row.get("digest", ""))
    )
    replace_file(layout / "index.json", _canonical({**index, "manifests": rows}))


def _find(layout: Path, name: str) -> dict[str, Any]:
    rows = _index(layout)["manifests"]
    found = [row for row in rows if name in (_tag(row), row.get("digest"))]
    if not found:
        there = ", ".join(sorted(tags(layout))) or "nothing"
        raise UsageError(f"{layout} holds no {name!r}, only {there}")
    return dict(found[0])


# -- blobs -----------------------------------------------------------------------------------------------------------


def _descriptor(kind: str, sha256: str, size: int, annotations: Mapping[str, str] | None = None) -> dict[str, Any]:
    row: dict[str, Any] = {"mediaType": kind, "digest": PREFIX + sha256, "size": size}
    return {**row, "annotations": dict(annotations)} if annotations else row


def _of_kind(layers: list[Any], kind: str, layout: Path) -> list[str]:
    """Digests of the layers of that media type."""
    return [_sha256(layer, layout) for layer in layers if isinstance(layer, dict) and layer.get("mediaType") == kind]


def _sha256(descriptor: Mapping[str, Any], layout: Path) -> str:
    """The digest's hex digits, which are a plain file name."""
    match = DIGEST.match(str(descriptor.get("digest")))
    if match is None:
        raise BundleError(f"{layout} has a digest {descriptor.get('digest')!r}, expected sha256: and 64 hex digits")
    return match[1]


def _canonical(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _add(blobs: Path, data: bytes) -> str:
    digest = hashlib.sha256(data).hexdigest()
    if not (blobs / digest).exists():
        replace_file(blobs / digest, data)
    return digest


def _add_file(blobs: Path, source: Path, sha256: str) -> None:
    if (blobs / sha256).exists() and (blobs / sha256).stat().st_size == source.stat().st_size:
        return
    descriptor, aside = tempfile.mkstemp(dir=blobs.parent.parent, prefix=".blob.")
    os.close(descriptor)
    try:
        _copy(source, Path(aside), sha256)
        Path(aside).chmod(0o644)
        os.replace(aside, blobs / sha256)
    except BaseException:
        os.unlink(aside)
        raise


def _copy(source: Path, path: Path, sha256: str) -> None:
    """Copy a plain file piece by piece and make it last. Raises BundleError when its content is not ``sha256``."""
    digest = hashlib.sha256()
    try:
        descriptor = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise BundleError(f"{source} cannot be read ({error.strerror}); export the bundle again") from None
    with os.fdopen(descriptor, "rb") as taken, path.open("wb") as written:
        while data := taken.read(CHUNK_BYTES):
            digest.update(data)
            written.write(data)
        written.flush()
        os.fsync(written.fileno())
    if digest.hexdigest() != sha256:
        raise BundleError(
            f"{source} has SHA-256 {digest.hexdigest()[:16]}..., expected {sha256[:16]}...: the file is damaged; "
            "export the bundle again"
        )


def _checked(path: Path, sha256: str) -> bytes:
    data = read_plain_file(path, MANIFEST_MAX_BYTES)
    observed = hashlib.sha256(data).hexdigest()
    if observed != sha256:
        raise BundleError(
            f"{path} has SHA-256 {observed[:16]}..., which is not its name: it is damaged; export it again"
        )
    return data


def _read_json(path: Path, sha256: str) -> dict[str, Any]:
    return _object(_checked(path, sha256), path)


def _object(data: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise BundleError(f"{path} is no JSON object, as OCI has it; export the bundle again")
    return value
