"""A push's plan as a pure function: each file in data/plans is a device's facts and the steps or refusal they give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_infer import errors
from edge_infer.deploy.plan import Delta, PushOptions, make_plan
from edge_infer.manifest import Artifact, FileEntry, Golden, Manifest, Requirement, TargetFacts, TensorSpec

PLANS = sorted((Path(__file__).parent / "data" / "plans").glob("*.json"))
DIGEST = "0123456789abcdef" * 4

MANIFEST = Manifest(
    schema=1,
    name="digits",
    version="1",
    target=TargetFacts("raspberry-pi-4", "aarch64", ("asimd", "crc32"), 2_147_483_648, 4096, "3.11"),
    artifact=Artifact(
        format="onnx",
        precision="int8",
        model="model.onnx",
        requires=(Requirement("onnxruntime", "1.18.0"), Requirement("onnxruntime-gpu", "1.18.0")),
        operators=("Conv",),
        providers=("cpu",),
        weights="weights.bin",
    ),
    inputs=(TensorSpec("image", "float32", (None, 1, 8, 8)),),
    outputs=(TensorSpec("digit", "float32", (None, 10)),),
    golden=Golden("golden.npz", 4, {"digit": 0.05}),
    checks=(),
    files={
        "golden.npz": FileEntry(100, "0" * 64),
        "model.onnx": FileEntry(1_000, "1" * 64),
        "weights.bin": FileEntry(50_000, "2" * 64),
    },
)

#: A Raspberry Pi 4 with all that the bundle needs; a case changes some of it.
FACTS = {
    "architecture": "aarch64",
    "cpu_features": ["fp", "asimd", "evtstrm", "crc32", "cpuid"],
    "ram_bytes": 2_000_000_000,
    "page_size_bytes": 4096,
    "free_bytes": 10_000_000_000,
    "serving_python": "/usr/bin/python3",
    "python": "3.11",
    "packages": {"edge-infer": "0.1.0", "onnxruntime": "1.20.1"},
}
ANSWER = {
    "present": False,
    "have": {},
    "have_deltas": {},
    "codecs": [],
    "copies": [],
    "releases": [],
    "on_trial": False,
    "reclaimable_bytes": 0,
}


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_plan(path: Path) -> None:
    case = json.loads(path.read_text())
    answer = {**ANSWER, **case.get("answer", {}), "facts": {**FACTS, **case.get("facts", {})}}
    deltas = {name: Delta(**row) for name, row in case.get("deltas", {}).items()}
    asked = (MANIFEST, DIGEST, answer, case.get("starts", {}), PushOptions(**case.get("options", {})), deltas)
    if "refused" in case:
        with pytest.raises(getattr(errors, case["type"])) as caught:
            make_plan(*asked)
        assert str(caught.value) == case["refused"]
        assert caught.value.exit_status == 5
    else:
        assert [str(step) for step in make_plan(*asked)] == case["expect"]


def test_there_are_plans() -> None:
    assert len(PLANS) >= 15
