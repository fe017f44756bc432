"""Every form, format and precision through the packager, on a network whose accuracy is known."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import FORMS, MODELS, calibration_for

from edge_infer import load
from edge_infer.bundle import Bundle, open_bundle
from edge_infer.errors import EXIT_NOTHING_FITS, LimitError
from edge_infer.package import Request, package
from edge_infer.quantize import PRECISIONS
from edge_infer.runtime.golden import read_golden
from edge_infer.target import read_target

Packaged = Callable[..., Bundle]
Digits = Callable[[str], tuple[np.ndarray, np.ndarray]]

#: Of all combinations so many that each form, each format and each precision of each format is there.
COMBINATIONS = [
    ("keras.keras", "tflite", "int8"),
    ("keras.h5", "tflite", "float16"),
    ("keras_saved_model", "tflite", "int8-dynamic"),
    ("keras.keras", "tflite", "float32"),
    ("torch_state.pth", "onnx", "int8-dynamic"),
    ("torch_module.pth", "torchscript", "int8-dynamic"),
    ("torch_script.pt", "torchscript", "int8"),
    ("torch_script.pt", "onnx", "float32"),
    ("torch_export.pt2", "torchscript", "float32"),
    ("torch.onnx", "onnx", "float32"),
    ("torch.onnx", "onnx", "float16"),
    ("torch.onnx", "onnx", "int8-dynamic"),
    ("torch.onnx", "onnx", "int8"),
    ("torch.onnx", "onnx", "int4-weights"),
    ("torch.onnx", "onnx", "int8-mixed"),
    ("keras.keras", "tflite", "int8-weights"),
    ("keras.keras", "tflite", "int4-weights"),
    ("keras.keras", "tflite", "int16x8"),
    ("keras.keras", "tflite", "int8-mixed"),
    ("keras.keras", "onnx", "int8"),
    ("torch_export.pt2", "tflite", "int8"),
]
#: A float32 bundle of each format, to hold the quantized ones against.
FLOAT32 = {format: form for form, format, precision in COMBINATIONS if precision == "float32"}


def output_of(form: str) -> str:
    """Keras gives the outputs of a SavedModel names of its own."""
    return "output_0" if form == "keras_saved_model" else "digit"


def test_nothing_is_left_out() -> None:
    assert {form for form, _, _ in COMBINATIONS} == set(FORMS)
    # The profiles' onnxruntime is too old for 8-bit blocks: test_onnx_quantize.py runs those.
    assert {(format, precision) for _, format, precision in COMBINATIONS} | {("onnx", "int8-weights")} == {
        (format, precision) for format, precisions in PRECISIONS.items() for precision in precisions
    }


@pytest.mark.parametrize(("form", "format", "precision"), COMBINATIONS)
class TestDigits:
    def test_the_contract_is_the_sources(self, packaged: Packaged, form: str, format: str, precision: str) -> None:
        manifest = packaged(form, format, precision).manifest
        image = "image float32[?, 8, 8, 1]" if form.startswith("keras") else "image float32[?, 1, 8, 8]"
        assert [str(spec) for spec in manifest.inputs] == [image]
        assert [str(spec) for spec in manifest.outputs] == [f"{output_of(form)} float32[?, 10]"]
        assert (manifest.artifact.format, manifest.artifact.precision) == (format, precision)

    def test_accuracy_stays(
        self, packaged: Packaged, digits_test_set: Digits, form: str, format: str, precision: str
    ) -> None:
        images, labels = digits_test_set(form)
        with load(packaged(form, format, precision).path) as session:
            observed = float((session(images).argmax(1) == labels).mean())
        trained = json.loads((MODELS / "accuracy.json").read_text())
        assert observed >= 0.99 * trained["keras" if form.startswith("keras") else "torch"]

    def test_any_batch_gives_the_same_rows(
        self, packaged: Packaged, digits_test_set: Digits, form: str, format: str, precision: str
    ) -> None:
        images, _ = digits_test_set(form)
        # Where activations are quantized while running, the range is that of the whole batch.
        tolerance = 0.1 if precision == "int8-dynamic" else 1e-2 if precision != "float32" else 1e-5
        with load(packaged(form, format, precision).path) as session:
            alone = [session(images[row : row + 1])[0] for row in range(5)]
            np.testing.assert_allclose(session(images[:5]), alone, atol=tolerance)

    def test_checks_are_recorded(self, packaged: Packaged, form: str, format: str, precision: str) -> None:
        checks = packaged(form, format, precision).manifest.checks
        expected = ["float32 against the source"]
        expected += [f"{precision} against float32"] if precision != "float32" else []
        assert [(check.what, check.output) for check in checks] == [(what, output_of(form)) for what in expected]
        assert all(check.observed <= check.allowed for check in checks)
        assert precision == "float32" or checks[-1].observed > 0

    def test_golden_cases_differ(self, packaged: Packaged, form: str, format: str, precision: str) -> None:
        bundle = packaged(form, format, precision)
        golden = bundle.manifest.golden
        answers = [answer[output_of(form)][0] for _, answer in read_golden(bundle)]
        assert golden.blind == () and len(answers) == golden.cases > 1
        apart = [float(np.abs(a - b).max()) for index, a in enumerate(answers) for b in answers[:index]]
        assert max(apart) > 10 * golden.tolerance[output_of(form)]

    def test_provenance_names_source_and_tools(
        self, packaged: Packaged, form: str, format: str, precision: str
    ) -> None:
        provenance = packaged(form, format, precision).manifest.provenance
        assert provenance["source"]["file"] == form
        assert {"tflite": "ai-edge-quantizer", "torchscript": "torch", "onnx": "onnx"}[format] in provenance["tools"]
        source = "tensorflow" if form.startswith("keras") else "onnx" if form.endswith(".onnx") else "torch"
        assert source in provenance["tools"]


@pytest.mark.parametrize(
    ("form", "format", "precision"),
    [row for row in COMBINATIONS if row[2].startswith("int8") and row[1] != "torchscript"],
)
def test_int8_is_less_than_half_of_float32(packaged: Packaged, form: str, format: str, precision: str) -> None:
    assert model_bytes(packaged(form, format, precision)) < 0.5 * model_bytes(
        packaged(FLOAT32[format], format, "float32")
    )


@pytest.mark.parametrize(("form", "precision"), [("torch_script.pt", "int8"), ("torch_module.pth", "int8-dynamic")])
def test_int8_torchscript_is_less_than_half_of_float32(packaged: Packaged, form: str, precision: str) -> None:
    """The dense layer of 256 KB becomes int8 in both; what int8-dynamic leaves in float are the convolutions."""
    assert model_bytes(packaged(form, "torchscript", precision)) < 0.5 * model_bytes(
        packaged(FLOAT32["torchscript"], "torchscript", "float32")
    )


@pytest.mark.parametrize(("form", "format"), [("keras.h5", "tflite"), ("torch.onnx", "onnx")])
def test_float16_is_little_more_than_half_of_float32(packaged: Packaged, form: str, format: str) -> None:
    whole = model_bytes(packaged(FLOAT32[format], format, "float32"))
    assert 0.4 * whole < model_bytes(packaged(form, format, "float16")) < 0.65 * whole


def model_bytes(bundle: Bundle) -> int:
    """Model and weights without the golden questions, which all precisions share."""
    return bundle.manifest.size - bundle.manifest.files["golden.npz"].size


def digits_request(source: Path, output: Path, **options: object) -> Request:
    """As ``packaged`` makes it."""
    options = {"target": "cpu-x86_64", "name": "digits", "calibration": calibration_for(source.name), **options}
    return Request(source, output=output, **FORMS[source.name], **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("form", "format", "precision"),
    [
        ("keras.keras", "tflite", "float32"),
        ("torch.onnx", "onnx", "int8"),
        ("torch_module.pth", "torchscript", "int8-dynamic"),
    ],
)
def test_the_same_inputs_give_the_same_bytes(
    packaged: Packaged, models: Path, tmp_path: Path, form: str, format: str, precision: str
) -> None:
    """In another folder, from a copy of the source, by other processes."""
    elsewhere = tmp_path / "another folder"
    elsewhere.mkdir()
    shutil.copy(models / form, elsewhere / form)
    shutil.copy(models / "digits_net.py", elsewhere)
    again = package(digits_request(elsewhere / form, elsewhere / "x.edge", format=format, precision=precision))
    first = packaged(form, format, precision)
    assert again.bundle.manifest == first.manifest
    assert again.bundle.digest == first.digest


def test_torchscript_holds_no_path_of_this_machine(packaged: Packaged) -> None:
    import zipfile

    with zipfile.ZipFile(packaged("torch_export.pt2", "torchscript", "float32").file("model.torchscript")) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    assert "model/data.pkl" in contents
    assert not [name for name, data in contents.items() if str(MODELS.parent.parent).encode() in data]


def test_auto_takes_the_first_preference_of_the_target_that_passes(models: Path, tmp_path: Path) -> None:
    done = package(digits_request(models / "torch.onnx", tmp_path / "d.edge", format="onnx"))
    engine = read_target("cpu-x86_64").engines[0]
    assert (done.chosen.format, done.chosen.precision) == (engine.format, engine.precisions[0]) == ("onnx", "int8")
    assert [item.precision for item in done.candidates if item.error is None][:2] == ["int8", "float32"]
    assert done.chosen.measured["p50_ms"] > 0
    assert done.chosen.size == sum(file.stat().st_size for file in done.bundle.path.iterdir())


def test_without_calibration_auto_passes_over_int8(models: Path, tmp_path: Path) -> None:
    done = package(digits_request(models / "torch.onnx", tmp_path / "d.edge", format="onnx", calibration=None))
    assert (done.chosen.format, done.chosen.precision) == ("onnx", "float32")
    assert done.bundle.manifest.provenance["samples_sha256"] == {}
    assert done.bundle.manifest.scores == ()


def test_what_is_asked_for_goes_over_the_targets_preference(packaged: Packaged) -> None:
    """The target's first precision is int8, and its first format is not TorchScript."""
    target = read_target("cpu-x86_64")
    assert target.engines[0].format != "torchscript"
    assert target.engine("onnx").precisions[0] != "float16"
    assert packaged("torch_export.pt2", "torchscript", "float32").manifest.artifact.format == "torchscript"
    assert packaged("torch.onnx", "onnx", "float16").manifest.artifact.precision == "float16"


def test_name_version_and_attachments_land_in_the_bundle(models: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("zero one two")
    request = digits_request(
        models / "torch.onnx",
        tmp_path / "deep" / "d.edge",
        precision="float32",
        name="reader",
        version="2.1",
        attach=(labels,),
    )
    bundle = package(request).bundle
    assert bundle.path == request.output
    assert (bundle.manifest.name, bundle.manifest.version) == ("reader", "2.1")
    assert bundle.file("labels.txt").read_text() == "zero one two"
    assert bundle.manifest.files["labels.txt"].size == 12
    assert bundle.manifest.target == read_target("cpu-x86_64").facts()


def test_each_step_is_told(models: Path, tmp_path: Path) -> None:
    steps: list[str] = []
    request = digits_request(
        models / "torch.onnx", tmp_path / "d.edge", format="onnx", precision="float32", cache=False
    )
    package(request, steps.append)
    assert steps == [
        "reading torch.onnx",
        "scoring the source model",
        "building onnx float32",
        "checking onnx float32",
        "measuring onnx float32",
    ]


#: A share of the target that no model fits, and what is said about it.
TINY = {
    "storage": (
        "model_storage_share = 0.25",
        "model_storage_share = 0.000001",
        r"whose size is [\d,]{6,} bytes, allowed is at most 32,000 bytes \(target cpu-x86_64\); allow size",
    ),
    "ram": (
        "model_ram_share = 0.5",
        "model_ram_share = 0.001",
        r"whose memory is [\d,]{9,} bytes, allowed is at most 4,294,967 bytes \(target cpu-x86_64\); allow memory",
    ),
}


@pytest.mark.parametrize("limit", TINY)
def test_what_does_not_fit_is_refused_with_figure_and_limit(
    packaged: Packaged, models: Path, tmp_path: Path, limit: str
) -> None:
    sound, tiny, words = TINY[limit]
    profile = (MODELS.parent.parent / "targets" / "cpu-x86_64.toml").read_text()
    (tmp_path / "tiny.toml").write_text(profile.replace(sound, tiny))
    older = tmp_path / "out" / "d.edge"
    shutil.copytree(packaged("torch.onnx", "onnx", "float16").path, older)
    before = open_bundle(older)
    options = {"target": str(tmp_path / "tiny.toml"), "format": "onnx", "precision": "float32"}
    for output in (older, older.with_name("fresh.edge")):
        with pytest.raises(LimitError, match=words) as refusal:
            package(digits_request(models / "torch.onnx", output, **options))
        assert refusal.value.exit_status == EXIT_NOTHING_FITS
    assert open_bundle(older) == before
    assert [path.name for path in older.parent.iterdir()] == ["d.edge"]


def test_an_older_bundle_is_replaced_by_one_that_passes(packaged: Packaged, models: Path, tmp_path: Path) -> None:
    older = tmp_path / "d.edge"
    shutil.copytree(packaged("torch.onnx", "onnx", "float16").path, older)
    package(digits_request(models / "torch.onnx", older, format="onnx", precision="float32"))
    assert open_bundle(older).digest == packaged("torch.onnx", "onnx", "float32").digest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.edge", "d.report.html"]


def test_onnx_weights_beside_the_model_count_in_its_hash(models: Path, tmp_path: Path) -> None:
    import onnx

    from edge_infer.convert.source import read_source

    onnx.save_model(
        onnx.load(models / "torch.onnx"), str(tmp_path / "m.onnx"), save_as_external_data=True, location="m.data"
    )
    before = read_source(tmp_path / "m.onnx").sha256
    with (tmp_path / "m.data").open("r+b") as file:
        file.write(b"\x01")
    assert read_source(tmp_path / "m.onnx").sha256 != before


def test_an_onnx_model_of_todays_exporter_runs_on_the_oldest_engine_of_its_operators(packaged: Packaged) -> None:
    """The exporter declares opset 20 and a newer IR version; the operators mean the same in opset 18."""
    requires = packaged("torch.onnx", "onnx", "float32").manifest.artifact.requires
    assert [str(item) for item in requires] == ["onnxruntime>=1.14.0", "onnxruntime-gpu>=1.14.0"]


OLD_ENGINE = """
[[engines]]
format = "{format}"
package = "{package}"
version = "{version}"
providers = ["cpu"]
precisions = {precisions}
"""


def target_with(folder: Path, **engine: object) -> str:
    """A profile of cpu-x86_64 with this one engine."""
    profile = (MODELS.parent.parent / "targets" / "cpu-x86_64.toml").read_text()
    path = folder / "old.toml"
    path.write_text(profile.split("# In order of preference.")[0] + OLD_ENGINE.format(**engine))
    return str(path)


def test_an_engine_that_is_too_old_for_every_precision_is_named(models: Path, tmp_path: Path) -> None:
    target = target_with(
        tmp_path, format="onnx", package="onnxruntime", version="1.13.0", precisions='["int8-dynamic", "float16"]'
    )
    with pytest.raises(LimitError) as refused:
        calibration = calibration_for("torch.onnx")
        package(Request(models / "torch.onnx", target, tmp_path / "d.edge", calibration=calibration))
    # The same sentence for both precisions is said once.
    assert str(refused.value).startswith("the artifact needs onnxruntime>=1.14.0, cpu-x86_64 has onnxruntime 1.13.0")
    assert not (tmp_path / "d.edge").exists()


def test_a_precision_that_the_targets_engine_cannot_run_is_passed_over(models: Path, tmp_path: Path) -> None:
    """tflite-runtime has no 4-bit weights; dynamic int8 it has with one scale a layer."""
    target = target_with(
        tmp_path,
        format="tflite",
        package="tflite-runtime",
        version="2.14.0",
        precisions='["int4-weights", "int8-dynamic"]',
    )
    packaged = package(Request(models / "keras.keras", target, tmp_path / "d.edge"))
    (dropped,) = packaged.dropped
    assert dropped.precision == "int4-weights"
    assert "needs ai-edge-litert>=" in str(dropped.error) and "has tflite-runtime 2.14.0" in str(dropped.error)
    assert packaged.bundle.manifest.artifact.precision == "int8-dynamic"
    assert str(packaged.bundle.manifest.artifact.requires[0]).startswith("tflite-runtime>=")
