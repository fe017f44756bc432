"""The zoo: its index says what the packager needs, its networks are alive, and dead ones are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from edge_infer.cli.package import parse_input
from edge_infer.convert.source import read_source

SCRIPTS = Path(__file__).parent.parent / "scripts"
FORMS = {
    "keras": {"keras", "saved-model", "tflite"},
    "torch": {"torch-state", "torch-module", "torchscript", "torch-export", "onnx"},
}
#: What the packager calls the forms that it does not call as the zoo does.
KINDS = {"torch-state": "torch-pickle", "torch-module": "torch-pickle"}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of the cheapest networks, each in the forms of one framework, written by two runs."""
    folder = tmp_path_factory.mktemp("zoo")
    script = [sys.executable, str(SCRIPTS / "zoo_models.py"), "--out", str(folder), "--small"]
    subprocess.run([*script, "--only", "two_in_two_out", "--framework", "torch"], check=True, capture_output=True)
    subprocess.run([*script, "--only", "mlp", "--framework", "keras"], check=True, capture_output=True)
    return folder


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))


def rows(zoo: Path, architecture: str) -> list[dict]:
    return [row for row in json.loads((zoo / "index.json").read_text()) if row["architecture"] == architecture]


def test_the_index_lists_each_form_once_and_keeps_those_of_earlier_runs(zoo: Path) -> None:
    assert sorted(row["form"] for row in rows(zoo, "mlp")) == sorted(FORMS["keras"])
    assert sorted(row["form"] for row in rows(zoo, "two_in_two_out")) == sorted(FORMS["torch"])


def test_the_files_are_what_the_index_says(zoo: Path) -> None:
    for row in json.loads((zoo / "index.json").read_text()):
        if row["form"] == "tflite":
            assert (zoo / row["file"]).read_bytes()[4:8] == b"TFL3"
        else:
            assert read_source(zoo / row["file"]).kind == KINDS.get(row["form"], row["form"])
        assert (row["factory"] is not None) == (row["form"] == "torch-state")
        assert row["trust_pickle"] == (row["form"] == "torch-module")
        if row["factory"]:
            assert (zoo / row["factory"].split(":")[0]).is_file()


def test_the_calibration_samples_fit_the_inputs_as_the_packager_reads_them(zoo: Path) -> None:
    for row in json.loads((zoo / "index.json").read_text()):
        specs = {spec.name: spec for spec in map(parse_input, row["inputs"])}
        with np.load(zoo / row["calibration"]) as samples:
            assert set(samples.files) == set(specs)
            for name, spec in specs.items():
                assert samples[name].dtype == spec.dtype
                assert samples[name].shape[1:] == spec.shape[1:]
                assert spec.shape[0] is None


def test_the_onnx_form_tells_inputs_apart_as_much_as_the_index_says(zoo: Path, scripts: None) -> None:
    from zoo_forms import MIN_SPREAD, spread

    (row,) = [row for row in rows(zoo, "two_in_two_out") if row["form"] == "onnx"]
    session = onnxruntime.InferenceSession(str(zoo / row["file"]), providers=["CPUExecutionProvider"])
    with np.load(zoo / row["calibration"]) as samples:
        answers = dict(zip(row["outputs"], session.run(row["outputs"], dict(samples)), strict=True))
    assert spread(answers) == pytest.approx(row["spread"], rel=1e-3)
    assert set(row["spread"]) == {"kind", "place"}
    assert min(row["spread"].values()) >= MIN_SPREAD


def test_a_dead_network_is_refused_and_nothing_of_it_is_written(
    tmp_path: Path, scripts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small weights over larger biases: as a network is that nobody made alive."""
    import torch
    import zoo_torch
    from zoo_models import ARCHITECTURES, build_torch

    def shrink(net: torch.nn.Module) -> None:
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.05 if parameter.ndim > 1 else 1.0)

    monkeypatch.setattr(zoo_torch, "randomize", shrink)
    with pytest.raises(SystemExit, match="mlp in PyTorch: two different inputs change output 'scores' by only"):
        build_torch(ARCHITECTURES["mlp"], tmp_path, 96)
    assert not (tmp_path / "index.json").exists()


@pytest.mark.parametrize(
    "dead",
    [np.ones((3, 4)), np.zeros((3, 4)), np.full((3, 4), np.nan), np.array([[1.0, 0], [0, 1.0], [0, 1.001]])],
    ids=["constant", "zero", "nan", "two alike"],
)
def test_one_dead_output_among_living_ones_is_refused(dead: np.ndarray, scripts: None) -> None:
    from zoo_forms import check_alive

    living = np.eye(3)
    assert check_alive("net", {"good": living})["good"] == pytest.approx(np.sqrt(2))
    with pytest.raises(SystemExit, match="output 'bad'"):
        check_alive("net", {"good": living, "bad": dead})


def test_a_form_that_answers_otherwise_than_its_network_is_refused(scripts: None) -> None:
    from zoo_forms import Alive, Input, check_alive

    samples = {"x": np.eye(3, dtype=np.float32)}
    alive = Alive("net", (Input("x", (3,)),), samples, {"y": samples["x"]}, check_alive("net", {"y": samples["x"]}))
    alive.check_form("net.onnx", lambda feed: [feed["x"]])
    with pytest.raises(SystemExit, match=r"net\.onnx answers 'y'"):
        alive.check_form("net.onnx", lambda feed: [feed["x"] * 1.01])


def test_the_wild_network_answers_as_before_while_its_channels_differ_by_thousands(scripts: None) -> None:
    import torch
    import zoo_torch
    from train_nets import WILD_SCALES, _make_wild_torch, nchw, split_digits

    torch.manual_seed(0)
    net = zoo_torch.digits_wild()
    images = torch.from_numpy(nchw(split_digits()["calibration"][0]))
    zoo_torch.randomize(net)
    zoo_torch.calibrate(net, [images])
    with torch.no_grad():
        before = net(images)["digit"]
        _make_wild_torch(net)
        after = net(images)["digit"]
        wild = net.body[:6](images)
    assert torch.allclose(before, after, atol=1e-6)
    largest = wild.amax((0, 2, 3))
    assert largest[:2].min() > 1000 * largest[len(WILD_SCALES) :].max()


def test_the_digits_to_calibrate_and_to_evaluate_are_no_training_digits(tmp_path: Path, scripts: None) -> None:
    from train_nets import save_data, split_digits

    save_data(tmp_path)
    seen = {image.tobytes() for image in split_digits()["train"][0]}
    for name, count in (("calibration", 200), ("evaluate", 500)):
        with np.load(tmp_path / f"{name}.npz") as last, np.load(tmp_path / f"{name}_nchw.npz") as first:
            assert last["image"].shape == (count, 8, 8, 1)
            assert len(last["label"]) == count
            assert np.array_equal(last["image"].transpose(0, 3, 1, 2), first["image"])
            images = {image.tobytes() for image in last["image"]}
        assert not images & seen
        seen |= images
