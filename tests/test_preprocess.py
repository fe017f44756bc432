"""How an image becomes an input: on the command line, in the manifest, and computed, held to Pillow."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from handmade import FILES, manifest_for
from PIL import Image

from edge_infer.cli.preprocess import parse_preprocess
from edge_infer.convert import spec_from_json, spec_to_json
from edge_infer.errors import BundleError, InputError, UsageError
from edge_infer.manifest import Manifest, Preprocessing, TensorSpec, parse, seal
from edge_infer.runtime.preprocess import check, decode, preprocess, resize
from edge_infer.samples import with_preprocessing

IMAGENET = "resize=256,crop=224,scale=1/255,mean=0.485:0.456:0.406,std=0.229:0.224:0.225,layout=NCHW"


def spec(steps: Preprocessing | None, *shape: int | None, dtype: str = "float32") -> TensorSpec:
    return TensorSpec("image", dtype, shape or (None, None, None, 3), steps)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, shape, dtype=np.uint8)


# -- computed ------------------------------------------------------------------------------------------------------


def pillow_resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


@pytest.mark.parametrize("channels", [1, 3])
def test_resize_is_pillows_within_1_of_255(channels: int) -> None:
    """Sizes up, down, odd, of one pixel, in noise; Pillow 13 takes rows before columns where that is faster."""
    rng = np.random.default_rng(0)
    different = pixels = 0
    sizes = [*rng.integers(1, 160, (60, 4)).tolist(), [1, 1, 9, 7], [99, 98, 1, 1]]
    for height, width, new_height, new_width in sizes:
        image = noise(height, width, channels)
        expected = pillow_resize(image if channels == 3 else image[:, :, 0], new_height, new_width)
        observed = resize(image, (new_height, new_width))
        assert observed.dtype == np.uint8 and observed.shape == (new_height, new_width, channels)
        difference = np.abs(observed.reshape(expected.shape).astype(int) - expected)
        assert difference.max() <= 1
        different += np.count_nonzero(difference)
        pixels += difference.size
    assert different < pixels / 10


@pytest.mark.parametrize(("size", "new"), [((50, 77), (50, 31)), ((50, 77), (121, 77)), ((640, 480), (224, 224))])
def test_resize_is_exactly_pillows_where_the_order_of_passes_is_the_same(
    size: tuple[int, int], new: tuple[int, int]
) -> None:
    """A single pass, or columns first; a tall image goes in several blocks."""
    image = noise(*size, 3)
    one_by_one = pillow_resize(pillow_resize(image, size[0], new[1]), *new)
    np.testing.assert_array_equal(resize(image, new), one_by_one)


def test_a_large_photo_goes_in_blocks_of_constant_memory() -> None:
    image = np.repeat(np.repeat(noise(60, 80, 3), 40, axis=0), 40, axis=1)
    assert np.abs(resize(image, (180, 300)).astype(int) - pillow_resize(image, 180, 300)).max() <= 1


def imagenet_by_hand(image: Image.Image) -> np.ndarray:
    """The usual steps with Pillow and numpy: shorter side 256, middle 224, scaled and normalized, NCHW."""
    width, height = image.size
    size = (256, 256 * height // width) if width < height else (256 * width // height, 256)
    image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = round((size[0] - 224) / 2), round((size[1] - 224) / 2)
    array = np.asarray(image.crop((left, top, left + 224, top + 224))).astype(np.float64) / 255
    return ((array - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).transpose(2, 0, 1)[None]


@pytest.mark.parametrize("size", [(300, 401), (401, 300), (256, 256), (100, 90)])
def test_the_usual_steps_of_image_classifiers(size: tuple[int, int]) -> None:
    _, steps = parse_preprocess(IMAGENET)
    image = noise(*size, 3)
    observed = preprocess(image, spec(steps, None, 3, 224, 224))
    expected = imagenet_by_hand(Image.fromarray(image))
    assert observed.dtype == np.float32 and observed.shape == (1, 3, 224, 224) and observed.flags.c_contiguous
    one_step_of_255 = 1 / 255 / 0.224
    np.testing.assert_allclose(observed, expected, atol=one_step_of_255 * 1.001)
    assert np.mean(np.abs(observed - expected) > 1e-5) < 0.02


def test_a_gray_image_for_a_model_without_a_channel_axis() -> None:
    image = noise(28, 28)
    observed = preprocess(image, spec(Preprocessing(color="L", scale=1 / 255), None, 28, 28))
    np.testing.assert_array_equal(observed, (image[None] / 255).astype(np.float32))


def test_colors_become_what_the_model_takes() -> None:
    image = noise(5, 6, 4)
    rgb = image[:, :, :3]
    np.testing.assert_array_equal(preprocess(image, spec(Preprocessing()))[0], rgb)
    np.testing.assert_array_equal(preprocess(image, spec(Preprocessing(color="BGR")))[0], rgb[:, :, ::-1])
    gray = np.asarray(Image.fromarray(rgb).convert("L"))
    np.testing.assert_array_equal(preprocess(rgb, spec(Preprocessing(color="L"), None, 5, 6, 1))[0, :, :, 0], gray)
    np.testing.assert_array_equal(preprocess(gray, spec(Preprocessing()))[0], np.stack([gray] * 3, axis=2))


def test_mean_and_std_are_in_the_order_of_the_color() -> None:
    red = np.zeros((1, 1, 3), np.uint8)
    red[0, 0, 0] = 200
    steps = Preprocessing(color="BGR", mean=(1.0, 2.0, 100.0), std=(1.0, 1.0, 50.0))
    assert preprocess(red, spec(steps)).ravel().tolist() == [-1.0, -2.0, 2.0]


def test_whole_numbers_larger_than_numpys_are_numbers_too() -> None:
    steps = Preprocessing(color="L", scale=2**63, mean=(2**70,), std=(2**65,))
    given = preprocess(np.full((1, 1), 255, np.uint8), TensorSpec("x", "float32", (None, 1, 1, 1), steps))
    assert given.item() == pytest.approx((255 * 2.0**63 - 2.0**70) / 2.0**65)


def test_whole_numbered_inputs_are_rounded_into_their_range() -> None:
    image = np.array([[[0], [127], [255]]], np.uint8)
    signed = spec(Preprocessing(color="L", mean=(128,)), None, 1, 3, 1, dtype="int8")
    assert preprocess(image, signed).ravel().tolist() == [-128, -1, 127]
    with pytest.raises(UsageError, match="gives -128 to 127, which uint8 does not hold"):
        check(dataclasses.replace(signed, dtype="uint8"))


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp", "jpg"])
def test_files_are_decoded_as_pillow_decodes_them(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(noise(40, 30, 3)).save(path)
    np.testing.assert_array_equal(preprocess(path, spec(Preprocessing()))[0], np.asarray(Image.open(path)))
    np.testing.assert_array_equal(preprocess(str(path), spec(Preprocessing()))[0], decode(path))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_files_of_other_modes(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.fromarray(noise(9, 8, 3)).convert(mode).save(path)
    np.testing.assert_array_equal(
        preprocess(path, spec(Preprocessing()))[0], np.asarray(Image.open(path).convert("RGB"))
    )


FITTING = spec(Preprocessing(), None, 8, 8, 3)
BAD_IMAGES = {
    "floats": (np.zeros((8, 8, 3), np.float32), FITTING, "float32[8, 8, 3], expected uint8"),
    "two channels": (noise(8, 8, 2), FITTING, "uint8[8, 8, 2]"),
    "a batch": (noise(1, 8, 8, 3), FITTING, "uint8[1, 8, 8, 3]"),
    "no pixels": (noise(0, 8, 3), FITTING, "at least one pixel"),
    "another size": (noise(9, 8, 3), FITTING, "9x8 pixels after preprocessing, the input is image float32[?, 8, 8, 3]"),
    "too small to crop": (noise(9, 3, 3), spec(Preprocessing(crop=(8, 8)), None, 8, 8, 3), "9x3 pixels, expected at"),
    "no preprocessing": (noise(8, 8, 3), spec(None, None, 8, 8, 3), "'image' has no preprocessing"),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_an_image_that_does_not_fit_is_refused(kind: str) -> None:
    image, wanted, words = BAD_IMAGES[kind]
    with pytest.raises(UsageError) as refusal:
        preprocess(image, wanted)
    assert words in str(refusal.value)


def test_a_file_that_is_no_8_bit_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("dear diary")
    Image.fromarray(noise(20, 20, 3)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:300])
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "deep.png")
    for name, words in (
        ("text.png", "is not an image that Pillow can read"),
        ("cut.png", "is not an image that Pillow can read"),
        ("deep.png", "more than 8 bits a channel"),
        ("absent.png", "there is no image file"),
    ):
        with pytest.raises(InputError, match=words) as refusal:
            decode(tmp_path / name)
        assert name in str(refusal.value)


BAD_STEPS = {
    "size": (spec(Preprocessing(resize=(9, 8)), None, 8, 8, 3), "gives 9x8 pixels in layout NHWC, the input is"),
    "layout": (spec(Preprocessing(resize=(8, 8)), None, 3, 8, 8), "gives 3 channels (RGB) in layout NHWC"),
    "color": (spec(Preprocessing(color="L"), None, 8, 8, 3), "gives 1 channels (L)"),
    "no image": (spec(Preprocessing(), None, 10), "takes no batch of RGB images"),
    "text": (spec(Preprocessing(), dtype="bool"), "is bool, expected numbers"),
    "crop": (spec(Preprocessing(resize=(8, 8), crop=(9, 8))), "crops 9x8 out of 8x8"),
    "mean": (spec(Preprocessing(color="L", mean=(1.0, 2.0, 3.0)), None, 8, 8, 1), "mean and std of 3 and 0 numbers"),
    "mode alone": (spec(Preprocessing(mode="shortest-side")), "'shortest-side' and no resize"),
}


@pytest.mark.parametrize("kind", BAD_STEPS)
def test_steps_that_cannot_give_what_the_input_takes_are_refused(kind: str) -> None:
    wanted, words = BAD_STEPS[kind]
    with pytest.raises(UsageError) as refusal:
        check(wanted)
    assert words in str(refusal.value)


def test_neither_pillow_nor_any_framework_is_imported_for_an_array() -> None:
    code = """
import json, sys, numpy as np
before = set(sys.modules)
from edge_infer.manifest import Preprocessing, TensorSpec
from edge_infer.runtime.preprocess import preprocess
spec = TensorSpec("x", "float32", (None, 4, 4, 3), Preprocessing(resize=(4, 4)))
preprocess(np.zeros((9, 9, 3), np.uint8), spec)
own = set(sys.stdlib_module_names) | {"edge_infer"}
print(json.dumps(sorted({name.split(".")[0] for name in set(sys.modules) - before} - own)))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert json.loads(done.stdout) == []


# -- on the command line -------------------------------------------------------------------------------------------


def test_the_usual_steps_are_parsed() -> None:
    assert parse_preprocess(IMAGENET) == (
        None,
        Preprocessing(
            resize=(256, 256),
            mode="shortest-side",
            crop=(224, 224),
            scale=1 / 255,
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            layout="NCHW",
        ),
    )


@pytest.mark.parametrize("name", ["image", "serving_default_x:0", "left hand/in.0", "a=b"])
def test_a_name_stands_before_the_steps(name: str) -> None:
    found, steps = parse_preprocess(f"{name}:resize=96x128,color=BGR,mean=127.5,std=127.5")
    assert found == name
    assert steps == Preprocessing(resize=(96, 128), color="BGR", mean=(127.5,), std=(127.5,))


def test_the_mode_may_be_said_otherwise() -> None:
    assert parse_preprocess("resize=224,mode=stretch")[1] == Preprocessing(resize=(224, 224))
    assert parse_preprocess("resize=9x8,mode=shortest-side")[1] == Preprocessing(resize=(9, 8), mode="shortest-side")


BAD_TEXTS = {
    "": "expected [NAME:]resize=256,crop=224",
    "224": "expected [NAME:]resize=256,crop=224",
    "resize=0": "resize '0', expected N or HEIGHTxWIDTH in pixels, each 1 to",
    "resize=224x": "resize '224x'",
    "resize=9x9x3": "resize '9x9x3'",
    "crop=-3": "crop '-3'",
    "resize=224,size=3": "'size=3', expected KEY=VALUE with resize, mode, fill, crop",
    "resize=224,": "'', expected KEY=VALUE",
    "resize=224,resize=225": "gives resize twice",
    "scale=1/0": "scale '1/0', expected a number above zero",
    "scale=-1": "scale '-1', expected a number above zero",
    "mean=nan": "mean 'nan', expected a number",
    "mean=0.4:0.5": "mean '0.4:0.5', expected one number, or three",
    "mean=0.4:layout=NCHW": "mean 'layout=NCHW', expected a number",
    "std=0": "std '0', expected a number above zero",
    "color=rgb": "color 'rgb', expected RGB, BGR, L",
    "layout=CHW": "layout 'CHW', expected NHWC, NCHW",
    "mode=stretch": "mode without resize",
}


@pytest.mark.parametrize("text", BAD_TEXTS)
def test_what_cannot_be_meant_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as refusal:
        parse_preprocess(text)
    assert str(refusal.value).startswith(f"--preprocess {text!r}")
    assert BAD_TEXTS[text] in str(refusal.value)


TWO = [TensorSpec("a", "float32", (None, 8, 8, 3)), TensorSpec("b", "float32", (None, 4))]


def test_preprocessing_joins_the_input_it_names() -> None:
    steps = Preprocessing(resize=(8, 8))
    assert [spec.preprocessing for spec in with_preprocessing(TWO, [("a", steps)])] == [steps, None]
    assert with_preprocessing(TWO[:1], [(None, steps)])[0].preprocessing == steps
    assert with_preprocessing(TWO, []) == tuple(TWO)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([(None, Preprocessing())], "the model has the inputs ['a', 'b']"),
        ([("c", Preprocessing())], "names 'c'"),
        ([("a", Preprocessing()), ("a", Preprocessing())], "twice for 'a'"),
        ([("b", Preprocessing())], "takes no batch of RGB images"),
    ],
)
def test_preprocessing_for_no_such_input_is_refused(given: list, words: str) -> None:
    with pytest.raises(UsageError) as refusal:
        with_preprocessing(TWO, given)
    assert words in str(refusal.value)


# -- in the manifest -----------------------------------------------------------------------------------------------


@pytest.fixture
def plain(tmp_path: Path) -> Manifest:
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)
    return manifest_for(tmp_path, FILES)


def test_a_manifest_carries_it_and_one_without_says_nothing(plain: Manifest) -> None:
    assert b"preprocessing" not in plain.to_bytes()
    _, steps = parse_preprocess(IMAGENET)
    for given in (steps, Preprocessing(), Preprocessing(mean=(127,), std=(2,), scale=2)):
        inputs = (dataclasses.replace(plain.inputs[0], preprocessing=given), *plain.inputs[1:])
        manifest = dataclasses.replace(plain, inputs=inputs)
        assert parse(manifest.to_bytes()) == manifest
        assert manifest.digest != plain.digest


def test_what_a_newer_version_adds_to_it_survives(plain: Manifest) -> None:
    steps = Preprocessing(resize=(3, 4), extra={"rotate": 90})
    manifest = dataclasses.replace(plain, inputs=(dataclasses.replace(plain.inputs[0], preprocessing=steps),))
    assert parse(manifest.to_bytes()).inputs[0].preprocessing == steps


@pytest.mark.parametrize(
    "row",
    [
        {"resize": [1]},
        {"resize": [0, 5]},
        {"resize": [5.0, 5]},
        {"resize": 5},
        {"crop": [5, 10**9]},
        {"scale": 0},
        {"std": [0]},
        {"mean": [True]},
        {"mean": [1, 2, 3, 4]},
        {"color": "YUV"},
        {"layout": "HWC"},
        {"mode": "fit"},
        [],
    ],
)
def test_a_manifest_with_steps_that_mean_nothing_is_refused(plain: Manifest, row: object) -> None:
    data = json.loads(plain.to_bytes())
    data["inputs"][0]["preprocessing"] = row
    with pytest.raises(BundleError, match=r"inputs\[0\].preprocessing"):
        parse(seal(data))


def test_specs_travel_with_it_as_json() -> None:
    _, steps = parse_preprocess(IMAGENET)
    wanted = spec(steps, None, 3, 224, 224)
    assert spec_from_json(json.loads(json.dumps(spec_to_json(wanted)))) == wanted
    assert spec_to_json(TWO[1]) == {"name": "b", "dtype": "float32", "shape": [None, 4]}
