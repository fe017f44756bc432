"""Deltas made on the host: of any two files right, and of releases of the same network small."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import FORMS, calibration_for
from handmade import make_bundle, rebuild
from test_delta import entry

from edge_infer import delta
from edge_infer.bundle import Bundle, open_bundle
from edge_infer.deploy.difference import WORTHWHILE, digits, make, refusal, write_blocks
from edge_infer.deploy.tensor_places import Place, places
from edge_infer.runtime.arrays import read_npz

BOTH = ("zlib", "lzma")
Array = np.ndarray


def made(
    tmp_path: Path,
    old: bytes,
    new: bytes,
    old_places: list[Place] | tuple[()] = (),
    new_places: list[Place] | tuple[()] = (),
    codecs: tuple[str, ...] = BOTH,
) -> int:
    """Make a delta, apply it and compare; gives its length."""
    file = io.BytesIO(delta.Header(entry(old), entry(new)).to_bytes())
    file.seek(0, io.SEEK_END)
    arrays = [np.frombuffer(data, np.uint8) for data in (old, new)]
    assert write_blocks(arrays[0], arrays[1], old_places, new_places, codecs, file, 2**62)
    (tmp_path / "base").write_bytes(old)
    (tmp_path / "out").unlink(missing_ok=True)
    size = file.tell()
    file.seek(0)
    delta.apply(tmp_path / "base", entry(old), file, tmp_path / "out", entry(new))
    assert (tmp_path / "out").read_bytes() == new
    return size


# -- any two files ---------------------------------------------------------------------------------------------------


def random_files(rng: random.Random) -> tuple[bytes, bytes, list[Place], list[Place]]:
    """Two files of tensors that moved, changed a little or a lot, came or went, with other bytes between them."""
    numbers = np.random.default_rng(rng.getrandbits(32))
    files, listed = [bytearray(), bytearray()], [[], []]
    tensors = []
    for index in range(rng.randint(0, 12)):
        width, count = rng.choice((1, 2, 4)), rng.choice((1, 7, 100, 5000, 70000))
        old = numbers.integers(0, 256, width * count + rng.choice((0, 0, 1)), np.uint8)
        new = old.copy()
        change = rng.choice(("none", "little", "all"))
        if change == "all":
            new = numbers.integers(0, 256, len(old), np.uint8)
        elif change == "little":
            new[:: rng.randint(1, 9)] += numbers.integers(0, 3, len(new[:: rng.randint(1, 1)]), np.uint8)[0]
        tensors.append((f"t{index}", width, old, new, rng.choice(("both", "both", "both", "old", "new"))))
    for side in (0, 1):
        for name, width, *contents, where in sorted(tensors, key=lambda item: rng.random()):
            files[side] += rng.randbytes(rng.randint(0, 40)) if rng.random() < 0.5 else bytes(rng.randint(0, 64))
            if where in ("both", ("old", "new")[side]):
                shown = name if rng.random() < 0.8 else ""
                listed[side].append(Place(shown, len(files[side]), len(contents[side]), width))
                files[side] += contents[side].tobytes()
    return bytes(files[0]) or b"a", bytes(files[1]) or b"b", listed[0], listed[1]


@pytest.mark.parametrize("seed", range(24))
def test_what_is_made_of_any_two_files_is_right(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    old, new, old_places, new_places = random_files(rng)
    for codecs in ((), ("zlib",), ("lzma",), BOTH):
        made(tmp_path, old, new, old_places, new_places, codecs)
    made(tmp_path, old, new)
    made(tmp_path, new, old, new_places, old_places)


def test_digits_are_put_together_as_they_were_taken_apart() -> None:
    data = np.random.default_rng(0).integers(0, 256, 1001, np.uint8)
    for bits in (4, 2):
        assert delta.join_digits(digits(data, 1, bits), len(data), bits) == data.tobytes()


@pytest.mark.parametrize("width", [1, 2, 4])
def test_adding_is_what_numpy_adds(width: int) -> None:
    rng = np.random.default_rng(width)
    count = 3 * delta.SLICE_BYTES // width + 1
    old, new = (rng.integers(0, 256, count * width, np.uint8).view(f"<u{width}") for _ in range(2))
    moved = (new - old).view(f"<i{width}")
    folded = (moved << 1) ^ (moved >> 8 * width - 1)
    assert delta.add(old.tobytes(), folded.tobytes(), width) == new.tobytes()


def test_tensors_that_moved_are_found_by_name(tmp_path: Path) -> None:
    """In another order and elsewhere, and each a little changed: only by name does the delta stay small."""
    rng = np.random.default_rng(3)
    tensors = {name: rng.integers(-127, 128, 20_000, np.int8) for name in "abcd"}
    files, listed = [b"", b""], [[], []]
    for side, order in enumerate(("abcd", "dbca")):
        for name in order:
            step = rng.integers(-1, 2, 20_000, np.int8) if side else 0
            listed[side].append(Place(name, len(files[side]), 20_000, 1))
            files[side] += (tensors[name] + step).astype(np.int8).tobytes() + bytes(3 + side)
    assert made(tmp_path, files[0], files[1], listed[0], listed[1]) < 0.25 * len(files[1])
    assert made(tmp_path, files[0], files[1]) > 0.9 * len(files[1])


def test_tensors_without_a_common_name_are_taken_in_order_when_they_are_alike(tmp_path: Path) -> None:
    data = np.random.default_rng(4).bytes(9000)
    old_places = [Place("x", 0, 5000, 1), Place("y", 5000, 4000, 1)]
    new_places = [Place("p", 0, 5000, 1), Place("q", 5100, 4000, 1)]
    new = data[:5000] + b"-" * 100 + data[5000:]
    assert made(tmp_path, data, new, old_places, new_places) < 300


def test_bytes_put_in_or_taken_out_once_cost_only_themselves(tmp_path: Path) -> None:
    data = np.random.default_rng(5).bytes(50_000)
    for old, new in ((data, data[:20_000] + b"hello" + data[20_000:]), (data, data[:20_000] + data[20_017:])):
        assert made(tmp_path, old, new) < 250


def test_a_release_that_is_longer_than_its_base(tmp_path: Path) -> None:
    data = np.random.default_rng(6).bytes(3_000_000)
    assert made(tmp_path, data[:10], data) > len(data)
    assert made(tmp_path, data, data[:10]) < 300
    assert made(tmp_path, data, data) < 400


# -- where tensors lie -------------------------------------------------------------------------------------------------


def found(bundle: Bundle, name: str) -> dict[str, bytes]:
    data = bundle.file(name).read_bytes()
    return {place.name: data[place.start : place.start + place.size] for place in places(bundle, name)}


def test_places_in_tflite_are_those_that_the_schemas_own_code_finds(packaged: Callable[..., Bundle]) -> None:
    from edge_infer.convert import tflite_files

    bundle = packaged("keras.keras", "tflite", "int8")
    model = tflite_files.read(bundle.file("model.tflite"))
    have = found(bundle, "model.tflite")
    checked = 0
    for index, tensor in enumerate(model.subgraphs[0].tensors):
        data = model.buffers[tensor.buffer].data
        name = f"0.{tensor.name.decode()}"
        if data is not None and len(data):
            assert have[name] == bytes(data)
            checked += 1
        if tensor.quantization is not None and tensor.quantization.scale is not None:
            assert have[f"{name}#{index}.scale"] == np.array(tensor.quantization.scale, "<f4").tobytes()
            checked += 1
    assert checked > 20
    covered = sum(map(len, have.values()))
    assert covered > 0.85 * bundle.manifest.files["model.tflite"].size


def test_places_in_onnx_are_those_that_onnx_finds(packaged: Callable[..., Bundle]) -> None:
    import onnx
    from onnx import numpy_helper

    bundle = packaged("torch.onnx", "onnx", "int8")
    model = onnx.load(bundle.file("model.onnx"))
    have = {**found(bundle, "model.onnx"), **found(bundle, "weights.bin")}
    raw = [tensor for tensor in model.graph.initializer if tensor.HasField("raw_data")]
    assert len(raw) > 5
    for tensor in raw:
        assert have[tensor.name] == numpy_helper.to_array(tensor).tobytes()
    widths = {place.name: place.width for name in ("model.onnx", "weights.bin") for place in places(bundle, name)}
    for tensor in raw:
        assert widths[tensor.name] == min(4, numpy_helper.to_array(tensor).itemsize)
    assert sum(map(len, found(bundle, "weights.bin").values())) > 0.95 * bundle.manifest.files["weights.bin"].size


def test_places_in_torchscript_are_those_that_the_runtime_maps(packaged: Callable[..., Bundle]) -> None:
    from edge_infer.runtime.engines.torchscript import load_mapped

    bundle = packaged("torch_script.pt", "torchscript", "float32")
    have = found(bundle, "weights.bin")
    module = load_mapped(bundle)
    tensors = [*module.named_parameters(), *module.named_buffers()]
    assert tensors
    for name, tensor in tensors:
        # As they lie in memory, whatever the order of the axes.
        assert np.sort(np.frombuffer(have[name], "<f4")).tolist() == np.sort(tensor.detach().numpy().ravel()).tolist()


def test_places_of_packed_torchscript_weights_and_of_golden_answers(packaged: Callable[..., Bundle]) -> None:
    bundle = packaged("torch_script.pt", "torchscript", "int8")
    weights = places(bundle, "weights.bin")
    assert sum(place.size for place in weights) > 0.9 * bundle.manifest.files["weights.bin"].size
    assert {place.width for place in weights} == {1, 2, 4}
    assert {"model/data.pkl", "model/extra/tensors.json"} <= set(found(bundle, "model.torchscript"))
    arrays = read_npz(bundle.file("golden.npz"))
    have = found(bundle, "golden.npz")
    assert have == {f"{name}.npy": array.tobytes() for name, array in arrays.items()}


@pytest.mark.parametrize(
    ("format", "form", "model"),
    [
        ("tflite", "keras.keras", "model.tflite"),
        ("onnx", "torch.onnx", "model.onnx"),
        ("torchscript", "torch_script.pt", "model.torchscript"),
    ],
)
def test_a_damaged_model_has_no_places_or_others_but_fails_nothing(
    format: str, form: str, model: str, packaged: Callable[..., Bundle], tmp_path: Path
) -> None:
    bundle = packaged(form, format, "int8")
    rng = random.Random(9)
    data = bundle.file(model).read_bytes()
    for number in range(60):
        changed = bytearray(data[: rng.choice((len(data), len(data), rng.randint(1, len(data))))])
        for _ in range(rng.randint(1, 40)):
            changed[rng.randrange(min(len(changed), 4000))] = rng.randrange(256)
        names = {name: bundle.file(name).read_bytes() for name in bundle.manifest.files} | {model: bytes(changed)}
        broken = rebuild(bundle, tmp_path / f"{number}.edge", lambda folder, names=names: write(folder, names))
        for name in names:
            last = 0
            for place in places(broken, name):
                assert place.start >= last
                last = place.start + place.size
            assert last <= broken.manifest.files[name].size


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).write_bytes(data)


# -- releases of the same network --------------------------------------------------------------------------------------

CASES = [("tflite", "int8"), ("tflite", "float32"), ("onnx", "int8"), ("onnx", "float16"), ("torchscript", "int8")]


@pytest.fixture(scope="module")
def releases(
    packaged: Callable[..., Bundle], models: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], tuple[Bundle, Bundle]]:
    """``releases(format, precision)``: the digits network, and the same after each weight moved by 0.2 % of the
    deviation of its tensor."""
    import torch

    from edge_infer.package import Request, package

    folder = tmp_path_factory.mktemp("releases")
    torch.manual_seed(1)
    state = torch.load(models / "torch_state.pth")
    moved = {
        name: value + 0.002 * value.std() * torch.randn_like(value) if value.dim() > 1 else value
        for name, value in state.items()
    }
    torch.save(moved, folder / "torch_state.pth")

    def make_both(format: str, precision: str) -> tuple[Bundle, Bundle]:
        path = folder / f"{format}-{precision}.edge"
        if not path.exists():
            request = Request(
                folder / "torch_state.pth",
                "cpu-x86_64",
                path,
                format,
                precision,
                calibration=calibration_for("torch_state.pth"),
                name="digits",
                **FORMS["torch_state.pth"],  # type: ignore[arg-type]
            )
            package(request)
        return packaged("torch_state.pth", format, precision), open_bundle(path)

    return make_both


@pytest.mark.parametrize(("format", "precision"), CASES)
def test_a_release_that_moved_a_little_is_small_to_send(
    format: str, precision: str, releases: Callable[[str, str], tuple[Bundle, Bundle]], tmp_path: Path
) -> None:
    old, new = releases(format, precision)
    names = [name for name, file in new.manifest.files.items() if file.sha256 != old.manifest.files[name].sha256]
    sent = full = 0
    for name in names:
        one = make(old, new, name, BOTH, tmp_path / name)
        again = make(old, new, name, BOTH, tmp_path / f"{name}-again")
        size = new.manifest.files[name].size
        full += size
        sent += one.size if one else size
        if one is None or again is None:
            assert one == again
            continue
        assert (one.name, one.base, one.full_size) == (name, old.digest, size)
        assert one.size == one.path.stat().st_size < WORTHWHILE * size
        assert one.path.read_bytes() == again.path.read_bytes()
        for side, file in (("base", old), ("result", new)):
            with one.path.open("rb") as stream:
                assert getattr(delta.read_header(stream), side).sha256 == file.manifest.files[name].sha256
    assert full > 80_000
    assert sent < {"int8": 0.25, "float16": 0.6, "float32": 0.6}[precision] * full
    assert refusal(old, BOTH, sent, full) is None


def test_a_network_learned_anew_is_not_worth_a_delta(
    packaged: Callable[..., Bundle], tmp_path: Path, releases: Callable[[str, str], tuple[Bundle, Bundle]]
) -> None:
    """The Keras and the PyTorch network have nothing in common but their form."""
    other = packaged("keras.keras", "tflite", "int8")
    _, new = releases("tflite", "int8")
    assert make(other, new, "model.tflite", BOTH, tmp_path / "delta") is None
    assert list(tmp_path.iterdir()) == []


def test_a_device_without_codecs_gets_what_can_do_without(
    releases: Callable[[str, str], tuple[Bundle, Bundle]], tmp_path: Path
) -> None:
    old, new = releases("tflite", "int8")
    sizes = {
        codecs: made.size if (made := make(old, new, "model.tflite", codecs, tmp_path / "delta")) else None
        for codecs in (BOTH, ("zlib",), ("lzma",), ())
    }
    full = new.manifest.files["model.tflite"].size
    assert sizes[BOTH] <= min(sizes["zlib",], sizes["lzma",]) < 0.25 * full
    assert sizes[()] is None or sizes["zlib",] < sizes[()] < WORTHWHILE * full


def test_a_file_that_the_base_lacks_or_that_is_empty_has_no_delta(tmp_path: Path) -> None:
    old = make_bundle(tmp_path / "old.edge")
    names = {name: old.file(name).read_bytes() for name in old.manifest.files}
    new = make_bundle(tmp_path / "new.edge", {**names, "labels.txt": b"a\nb\n", "empty.txt": b""})
    for name in ("labels.txt", "empty.txt"):
        assert make(old, new, name, BOTH, tmp_path / "delta") is None


def test_the_sentences_of_delta_only(tmp_path: Path) -> None:
    base = make_bundle(tmp_path / "old.edge")
    assert "name the bundle of one with --base" in str(refusal(None, BOTH, 0, 100))
    assert "takes 60 of 100 bytes to send, expected less than 60%" in str(refusal(base, BOTH, 60, 100))
    assert "(the device's Python has neither zlib nor lzma)" in str(refusal(base, (), 100, 100))
    assert refusal(base, BOTH, 59, 100) is None
    assert refusal(base, BOTH, 0, 0) is None
