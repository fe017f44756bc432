"""The manifest's canonical bytes, and what is refused."""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from handmade import FILES, as_json, manifest_for

from edge_infer.errors import BundleError
from edge_infer.manifest import MANIFEST_MAX_BYTES, SCHEMA, SEAL_LINE, Manifest, parse, seal

#: Fields with a default, which may be missing.
OPTIONAL = {"weights", "signature", "prepack", "blind", "provenance"}

HASH = "0123456789abcdef" * 4

LITERAL = (
    """{
 "artifact": {
  "format": "onnx",
  "model": "model.onnx",
  "operators": [
   "Gemm"
  ],
  "precision": "float32",
  "prepack": true,
  "providers": [
   "cuda",
   "cpu"
  ],
  "requires": [
   {
    "package": "onnxruntime",
    "version": "1.18.0"
   }
  ],
  "weights": "weights.bin"
 },
 "checks": [],
 "files": {
  "golden.npz": {
   "sha256": "HASH",
   "size": 3
  },
  "model.onnx": {
   "sha256": "HASH",
   "size": 20
  },
  "weights.bin": {
   "sha256": "HASH",
   "size": 100
  }
 },
 "golden": {
  "cases": 2,
  "file": "golden.npz",
  "tolerance": {
   "größe": 0.25
  }
 },
 "inputs": [
  {
   "dtype": "int8",
   "name": "x",
   "shape": [
    null,
    7
   ]
  }
 ],
 "name": "tiny",
 "outputs": [
  {
   "dtype": "float32",
   "name": "größe",
   "shape": []
  }
 ],
 "schema": 1,
 "sha256": "d0869d45042b42c94891d09b60455d91780f45e2d40bad1c6d7e0abc904f85f6",
 "target": {
  "architecture": "aarch64",
  "cpu_features": [],
  "name": "pi",
  "page_size_bytes": 16384,
  "python": "3.11",
  "ram_bytes": 1024
 },
 "version": "1.0"
}
"""
).replace("HASH", HASH)


@pytest.fixture
def plain(tmp_path: Path) -> Any:
    """A manifest as JSON data, to be spoiled."""
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)
    return as_json(manifest_for(tmp_path, FILES))


def refused(value: Any) -> str:
    """The words with which a manifest is refused."""
    with pytest.raises(BundleError) as caught:
        parse(value if isinstance(value, bytes) else seal(value))
    return str(caught.value)


def test_canonical_form_byte_by_byte() -> None:
    manifest = parse(LITERAL.encode())
    assert manifest.to_bytes() == LITERAL.encode()
    assert manifest.digest == "d755a91fed80c73264a9b150af8cae52cb87a32b9d6a89fb5ccf7b72aaa80fdf"
    assert manifest.size == 123
    assert (manifest.artifact.providers, manifest.artifact.prepack) == (("cuda", "cpu"), True)
    assert str(manifest.inputs[0]) == "x int8[?, 7]"
    assert str(manifest.outputs[0]) == "größe float32[]"
    assert str(manifest.artifact.requires[0]) == "onnxruntime>=1.18.0"


def test_a_manifest_made_in_python_is_read_back_equal(plain: Any) -> None:
    manifest = parse(seal(plain))
    assert parse(manifest.to_bytes()) == manifest


def objects(value: Any) -> Iterator[dict[str, Any]]:
    """The objects whose fields the schema names."""
    yield value
    for name in ("target", "artifact", "golden"):
        yield value[name]
    for items in (value["inputs"], value["outputs"], value["checks"], value["artifact"]["requires"]):
        yield from items
    yield from value["files"].values()


def test_unknown_fields_survive_at_every_level(plain: Any) -> None:
    for number, item in enumerate(list(objects(plain))):
        item["from_the_future"] = {"number": number, "list": [1, None, "ä", 0.5]}
        item["extra"] = "not the field of the dataclass"
    data = seal(plain)
    assert data.count(b"from_the_future") == 11
    assert parse(data).to_bytes() == data


def test_a_flipped_bit_anywhere_is_refused(plain: Any) -> None:
    """Many would leave another sound manifest: another threshold, tolerance or mean."""
    data = seal(plain)
    for place in range(len(data)):
        for bit in range(0, 8, 3):
            spoilt = bytearray(data)
            spoilt[place] ^= 1 << bit
            refused(bytes(spoilt))
    assert "as it says itself" in refused(data.replace(b"0.5", b"8.5"))


def test_a_newer_schema_is_refused_with_advice(plain: Any) -> None:
    plain["schema"] = SCHEMA + 1
    assert "upgrade edge-infer" in refused(plain)


def test_a_newer_schema_may_lack_todays_fields() -> None:
    assert "schema 7" in refused({"schema": 7})


@pytest.mark.parametrize("where", range(11))
def test_every_missing_field_is_refused(plain: Any, where: int) -> None:
    for name in list(list(objects(plain))[where]):
        spoilt = copy.deepcopy(plain)
        del list(objects(spoilt))[where][name]
        if name in OPTIONAL:
            assert parse(seal(spoilt)).to_bytes() == seal(spoilt)
        else:
            assert refused(spoilt)


@pytest.mark.parametrize("name", ["weights", "signature"])
def test_a_field_at_its_default_is_not_written(plain: Any, name: str) -> None:
    """So that a field that a later version adds leaves the digests of older bundles as they are."""
    plain["artifact"][name] = None
    assert "canonical" in refused(plain)


@pytest.mark.parametrize("wrong", [None, True, -1, 0.5, "", "\0", [], [[]], {}, {"a": {}}, 2**63, "x" * 5000])
def test_a_value_of_the_wrong_type_is_refused_or_fits(plain: Any, wrong: Any) -> None:
    """Some values fit some fields; what is taken must be written back as it was."""
    taken = 0
    for index, item in enumerate(list(objects(plain))):
        for name in item:
            spoilt = copy.deepcopy(plain)
            list(objects(spoilt))[index][name] = wrong
            data = seal(spoilt)
            try:
                manifest = parse(data)
            except BundleError:
                continue
            assert manifest.to_bytes() == data
            taken += 1
    assert taken <= 12


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        ("schema", True),
        ("schema", 1.0),
        ("schema", "1"),
        ("artifact.format", "coreml"),
        ("artifact.precision", "int4"),
        ("artifact.prepack", 1),
        ("artifact.providers", ["npu"]),
        ("artifact.requires", []),
        ("artifact.operators", "CONV_2D"),
        ("inputs", []),
        ("inputs.0.dtype", "complex64"),
        ("inputs.0.shape", [-1, 2]),
        ("inputs.0.shape", [True]),
        ("inputs.0.shape", [None] * 33),
        ("golden.cases", 0),
        ("golden.cases", 10**30),
        ("golden.tolerance", {}),
        ("golden.tolerance", {"another": 1.0}),
        ("golden.tolerance", {"y": -1.0}),
        ("golden.tolerance", {"y": 10**400}),
        ("checks.0.observed", "0"),
        ("files", {}),
        ("files.labels.txt.size", 1.5),
        ("files.labels.txt.sha256", HASH.upper()),
        ("files.labels.txt.sha256", HASH[:-1]),
        ("files.labels.txt.sha256", HASH + "\n"),
        ("provenance", []),
        ("artifact.operators", ["x"] * 1025),
        ("provenance", {str(number): number for number in range(1025)}),
    ],
)
def test_wrong_values_are_refused(plain: Any, path: str, wrong: Any) -> None:
    item = plain
    *parents, last = path.replace("labels.txt", "labels txt").split(".")
    for name in parents:
        item = item[int(name) if name.isdigit() else name.replace(" ", ".")]
    item[last] = wrong
    assert refused(plain)


BAD_NAMES = [
    "../x",
    "..",
    ".",
    "/etc/passwd",
    "a/b",
    "a\\b",
    ".hidden",
    "",
    "a\0b",
    "a b",
    "a\n",
    "-rf",
    "ä",
    "x" * 200,
    7,
    None,
    "\N{FULLWIDTH SOLIDUS}",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_file_name_that_is_not_plain_is_refused(plain: Any, name: Any) -> None:
    spoilt = copy.deepcopy(plain)
    spoilt["files"][str(name)] = {"size": 1, "sha256": HASH}
    if isinstance(name, str):
        assert "plain name" in refused(spoilt)
    plain["artifact"]["model"] = name
    assert "artifact.model" in refused(plain)


@pytest.mark.parametrize("name", [name for name in BAD_NAMES if name is not None])
@pytest.mark.parametrize("field", ["name", "version"])
def test_a_model_name_that_is_not_plain_is_refused(plain: Any, field: str, name: Any) -> None:
    plain[field] = name
    assert f"manifest's {field} is" in refused(plain)


def test_the_longest_plain_name_is_taken(plain: Any) -> None:
    plain["name"] = "x" * 100
    assert parse(seal(plain)).name == "x" * 100


@pytest.mark.parametrize("field", ["model", "weights"])
def test_a_file_that_is_named_but_not_listed_is_refused(plain: Any, field: str) -> None:
    plain["artifact"][field] = "absent.bin"
    assert "'absent.bin'" in refused(plain)


def test_a_golden_file_that_is_not_listed_is_refused(plain: Any) -> None:
    del plain["files"]["golden.npz"]
    assert "'golden.npz'" in refused(plain)


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sig"])
def test_a_manifest_that_lists_itself_or_its_signature_is_refused(plain: Any, name: str) -> None:
    plain["files"][name] = {"size": 1, "sha256": HASH}
    assert f"lists {name}, whose hash it cannot hold" in refused(plain)


@pytest.mark.parametrize("kind", ["inputs", "outputs"])
def test_a_tensor_name_used_twice_is_refused(plain: Any, kind: str) -> None:
    plain[kind] *= 2
    assert "each name once" in refused(plain)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data.replace(b'"version": "1"', b'"version": "1",\n "version": "1"'),
        lambda data: data.replace(b'"name": "tiny"', b'"name": "other",\n "name": "tiny"'),
        lambda data: json.dumps(json.loads(data)).encode(),
        lambda data: json.dumps(json.loads(data), indent=2, sort_keys=True).encode() + b"\n",
        lambda data: json.dumps(dict(reversed(json.loads(data).items())), indent=1).encode() + b"\n",
        lambda data: data[:-1],
        lambda data: data + b"\n",
        lambda data: data + b"{}\n",
        lambda data: b" " + data,
        lambda data: b"\xef\xbb\xbf" + data,
        lambda data: data.replace(b"\n", b"\r\n"),
        lambda data: data.replace(b"tiny", b"\\u0074iny"),
        lambda data: data.replace(b'"size": 700', b'"size": 7e2'),
        lambda data: data.replace(b'"allowed": 0.5', b'"allowed": 0.50'),
        lambda data: data.decode().encode("utf-16"),
        lambda data: data.replace(b"tiny", b"t\xffny"),
        lambda data: b"",
        lambda data: b"null\n",
        lambda data: b"[]\n",
    ],
)
def test_bytes_that_are_not_canonical_are_refused(plain: Any, spoil: Callable[[bytes], bytes]) -> None:
    data = seal(plain)
    assert spoil(data) != data
    refused(spoil(data))


def with_provenance(plain: Any, raw: bytes) -> bytes:
    plain["provenance"] = {"value": "HERE"}
    return sealed_again(seal(plain).replace(b'"HERE"', raw))


def sealed_again(data: bytes) -> bytes:
    """With its hash made right, whatever it is."""
    found = SEAL_LINE.search(data)
    assert found
    rest = data[: found.start()] + data[found.end() :]
    return data.replace(found[1], hashlib.sha256(rest).hexdigest().encode())


@pytest.mark.parametrize("raw", [b"NaN", b"Infinity", b"-Infinity", b"1e999", b'"\\ud800"', b"9" * 5000])
def test_what_json_can_say_and_the_canonical_form_cannot_is_refused(plain: Any, raw: bytes) -> None:
    assert "canonical" in refused(with_provenance(plain, raw))


@pytest.mark.parametrize("depth", [200, 300, 450, 600, 900, 950, 980, 990, 1000, 100_000])
@pytest.mark.parametrize("path", ["provenance", "name", "unknown"])
def test_deep_nesting_is_refused_or_written_back(plain: Any, depth: int, path: str) -> None:
    plain[path] = {"value": "HERE"} if path == "provenance" else "HERE"
    spaces = 2 if path == "provenance" else 1
    opened = b"".join(b"[\n" + b" " * (spaces + level) for level in range(1, min(depth, 1000)))
    closed = b"".join(b"\n" + b" " * (spaces + level) + b"]" for level in reversed(range(min(depth, 1000) - 1)))
    nested = b"[" * depth + b"]" * depth if depth > 1000 else opened + b"[]" + closed
    data = sealed_again(seal(plain).replace(b'"HERE"', nested))
    try:
        manifest = parse(data)
    except BundleError:
        assert path == "name" or depth > 200
    else:
        assert path != "name"
        assert manifest.to_bytes() == data


def test_an_integer_beyond_64_bits_survives_where_people_read_it(plain: Any) -> None:
    data = with_provenance(plain, b"1" + b"0" * 30)
    assert parse(data).provenance["value"] == 10**30


def test_a_manifest_of_more_than_4_mib_is_refused_before_it_is_read() -> None:
    assert str(MANIFEST_MAX_BYTES) in refused(b"[" * (MANIFEST_MAX_BYTES + 1))


def test_a_manifest_of_4_mib_is_read(plain: Any) -> None:
    room = MANIFEST_MAX_BYTES - len(with_provenance(plain, b'""'))
    data = with_provenance(plain, b'"' + b"x" * room + b'"')
    assert len(data) == MANIFEST_MAX_BYTES
    assert parse(data).to_bytes() == data


REPLACEMENTS: list[Any] = [None, True, 0, -1, 2**64, 1.5, 1e308, "", "../x", "x" * 4097, [], [None], {}, {"": 0}]


def places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Each (container, key) in ``value``."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found.append((value, key))
        places(item, found)
    return found


def mutate_value(plain: Any, chance: random.Random) -> bytes:
    spoilt = copy.deepcopy(plain)
    for _ in range(chance.randint(1, 2)):
        container, key = chance.choice(places(spoilt, []))
        if chance.random() < 0.3:
            del container[key]
        else:
            container[key] = chance.choice(REPLACEMENTS)
    return seal(spoilt)


def mutate_bytes(data: bytes, chance: random.Random) -> bytes:
    spoilt = bytearray(data)
    position = chance.randrange(len(spoilt))
    match chance.randrange(4):
        case 0:
            spoilt[position] ^= 1 << chance.randrange(8)
        case 1:
            del spoilt[position : position + chance.randint(1, 20)]
        case 2:
            del spoilt[position:]
        case _:
            spoilt[position:position] = bytes(chance.choices(b'{}[]",:0123456789eE+-.\\u\n ', k=chance.randint(1, 4)))
    return bytes(spoilt)


def outcome(data: bytes) -> Manifest | None:
    try:
        manifest = parse(data)
    except BundleError:
        return None
    assert manifest.to_bytes() == data
    return manifest


def test_thousands_of_mutations_are_refused_or_written_back(plain: Any) -> None:
    chance = random.Random(20261123)
    good = seal(plain)
    outcomes = [outcome(mutate_value(plain, chance)) for _ in range(2500)]
    outcomes += [outcome(mutate_bytes(good, chance)) for _ in range(2500)]
    taken = [manifest for manifest in outcomes if manifest is not None]
    # Both ends are met: some mutations only change a value that may be anything.
    assert 50 < len(taken) < 2500
    assert any(manifest.to_bytes() != good for manifest in taken)
