"""A machine is called emulated only where that is certain; what was measured on one says so wherever it is shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_infer import emulation, load, measure
from edge_infer.bundle import Bundle
from edge_infer.deploy import receiver
from edge_infer.deploy.receiver import Receiver
from edge_infer.errors import LimitError
from edge_infer.package import Request, package
from edge_infer.report import html, text
from edge_infer.runtime import cli, plan
from edge_infer.runtime.plan import Measured, PoolMeasured, PoolSetting, Setting
from edge_infer.search import Candidate, Limit, decide
from edge_infer.store import Store, default_root

QEMU = "QEMU's virt machine imitating a cortex-a53"
ARM_CPUINFO = "processor\t: 0\nFeatures\t: fp asimd crc32\nCPU implementer\t: {}\nCPU part\t: 0xd03\n"
X86_CPUINFO = "processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: some processor\nflags\t: fpu sse avx2\n"
TREE, CORE = "proc/device-tree/compatible", "proc/device-tree/cpus/cpu@0/compatible"
VENDOR, PRODUCT = "sys/class/dmi/id/sys_vendor", "sys/class/dmi/id/product_name"


def machine(root: Path, files: dict[str, str], runs: str = "/usr/bin/python3.11") -> Path:
    """A folder with what /proc and /sys show of a machine; ``runs`` is the program that the kernel runs."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (root / "proc/thread-self").mkdir(parents=True)
    (root / "proc/thread-self/exe").symlink_to(runs)
    return root


@pytest.mark.parametrize(
    ("files", "said"),
    [
        # As QEMU 7.2 shows them, with TCG.
        ({TREE: "linux,dummy-virt\0", CORE: "arm,cortex-a53\0", "proc/cpuinfo": ARM_CPUINFO.format("0x41")}, QEMU),
        (
            {TREE: "linux,dummy-virt\0", CORE: "arm,neoverse-n1\0", "proc/cpuinfo": ARM_CPUINFO.format("0x41")},
            "QEMU's virt machine imitating a neoverse-n1",
        ),
        (
            {TREE: "linux,dummy-virt\0", CORE: "arm,arm-v8\0", "proc/cpuinfo": ARM_CPUINFO.format("0x00")},
            "QEMU's virt machine",
        ),
        (
            {VENDOR: "QEMU\n", PRODUCT: "QEMU Virtual Machine\n", "proc/cpuinfo": ARM_CPUINFO.format("0x41")},
            "QEMU's virt machine",
        ),
    ],
    ids=["cortex-a53", "neoverse-n1", "max", "started by firmware"],
)
def test_an_emulated_machine_is_told(tmp_path: Path, files: dict[str, str], said: str) -> None:
    assert emulation.here(machine(tmp_path, files), "aarch64") == said


@pytest.mark.parametrize(
    "files",
    [
        {TREE: "raspberrypi,4-model-b\0brcm,bcm2711\0", CORE: "arm,cortex-a72\0"},
        {TREE: "linux,dummy-virt\0", CORE: "arm,arm-v8\0", "proc/cpuinfo": ARM_CPUINFO.format("0x41")},
        {TREE: "linux,dummy-virt\0", CORE: "arm,armv8\0", "proc/cpuinfo": ARM_CPUINFO.format("0x41")},
        {VENDOR: "QEMU\n", PRODUCT: "KVM Virtual Machine\n", "proc/cpuinfo": ARM_CPUINFO.format("0x41")},
        {VENDOR: "QEMU\n", PRODUCT: "QEMU Virtual Machine\n", "proc/cpuinfo": ARM_CPUINFO.format("0x61")},
        {VENDOR: "Amazon EC2\n", PRODUCT: "t4g.micro\n", "proc/cpuinfo": ARM_CPUINFO.format("0x41")},
        {},
    ],
    ids=["a Pi", "KVM", "KVM, newer", "KVM, by firmware", "Apple's hypervisor", "a cloud", "nothing known"],
)
def test_a_board_and_a_virtual_machine_are_not_called_emulated(tmp_path: Path, files: dict[str, str]) -> None:
    assert emulation.here(machine(tmp_path, files), "aarch64") is None


@pytest.mark.parametrize(
    "files",
    [
        {"proc/cpuinfo": X86_CPUINFO},
        {"proc/cpuinfo": X86_CPUINFO, VENDOR: "QEMU\n", PRODUCT: "Standard PC (Q35 + ICH9, 2009)\n"},
    ],
    ids=["a PC or a container", "a virtual one"],
)
def test_an_x86_machine_is_not_called_emulated(tmp_path: Path, files: dict[str, str]) -> None:
    assert emulation.here(machine(tmp_path, files), "x86_64") is None


def test_a_program_of_another_processor_is_told(tmp_path: Path) -> None:
    under_qemu = machine(tmp_path / "a", {"proc/cpuinfo": X86_CPUINFO}, runs="/usr/bin/qemu-aarch64-static")
    assert emulation.here(under_qemu, "aarch64") == "qemu-aarch64"
    newer = machine(tmp_path / "b", {"proc/cpuinfo": ARM_CPUINFO.format("0x41")}, runs="/usr/bin/qemu-aarch64")
    assert emulation.here(newer, "aarch64") == "qemu-aarch64"
    other = machine(tmp_path / "c", {"proc/cpuinfo": X86_CPUINFO}, runs="/tmp/prooted-12-abc")
    assert emulation.here(other, "aarch64") == "a program for ARM on an x86 processor"


def test_the_machine_that_runs_these_tests_is_none() -> None:
    assert emulation.here() is None and emulation.mark() == {}


# -- benchmarks and plans --------------------------------------------------------------------------------------------


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulation, "here", lambda: QEMU)


def test_a_benchmark_says_that_the_machine_is_emulated(
    packaged: Callable[..., Bundle], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(packaged("keras.keras", "tflite", "float32").path)
    asked = ["bench", path, "--runs", "2", "--json"]
    assert cli.main(asked) == 0 and "emulated" not in json.loads(capsys.readouterr().out)
    monkeypatch.setattr(emulation, "here", lambda: QEMU)
    assert cli.main(asked) == 0 and json.loads(capsys.readouterr().out)["emulated"] == QEMU
    assert cli.main(asked[:-1]) == 0 and f"emulated       {QEMU}\n" in capsys.readouterr().out


def test_a_plan_found_on_an_emulated_machine_counts_there_alone(
    packaged: Callable[..., Bundle], emulated: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, cache = packaged("torch.onnx", "onnx", "float32"), Store(default_root()).cache
    assert plan.keep(bundle, cache, Measured(Setting(3), 1.0, 2.0, 100))
    assert plan.keep_pool(bundle, cache, PoolMeasured(PoolSetting(2, 1), 5.0, 1.0, 100))
    kept, pool = plan.read(bundle, cache), plan.read_pool(bundle, cache)
    assert kept is not None and pool is not None and (kept.emulated, pool.emulated) == (QEMU, QEMU)
    with load(bundle.path) as session:
        assert session.info.threads == 3
    assert cli.main(["info", str(bundle.path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["tuned"] == f"3 threads: 2 ms at 95 %, emulated ({QEMU})"
    assert said["tuned pool"] == f"2 x 1, batch 1: 5 answers a second, emulated ({QEMU})"
    # The same card in a board.
    monkeypatch.setattr(emulation, "here", lambda: None)
    assert plan.read(bundle, cache) is None and plan.read_pool(bundle, cache) is None


def test_a_plan_of_a_board_is_not_marked(packaged: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, cache = packaged("torch.onnx", "onnx", "float32"), Store(default_root()).cache
    assert plan.keep(bundle, cache, Measured(Setting(3), 1.0, 2.0, 100))
    monkeypatch.setattr(emulation, "here", lambda: QEMU)
    assert plan.read(bundle, cache) == Measured(Setting(3), 1.0, 2.0, 100)


def test_what_a_device_measures_is_marked_whatever_is_installed_there(
    tmp_path: Path, emulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {"bench": {"p50_ms": 1.0}, "tune": {"chosen": "2 threads", "kept": True}}
    monkeypatch.setattr(receiver.admission, "run_child", lambda python, asked, timeout_s: answers[asked[0]])
    monkeypatch.setattr(Receiver, "coming", replace_coming())
    device = Receiver(None, None)  # type: ignore[arg-type]
    device.present = True
    measured = device.measure({"timeout_s": 1, "runs": 1})["measured"]
    assert measured == {"emulated": QEMU, "p50_ms": 1.0}
    assert device._tune(tmp_path) == f"2 threads, on an emulated machine ({QEMU})"
    monkeypatch.setattr(emulation, "here", lambda: None)
    assert device._tune(tmp_path) == "2 threads"


def replace_coming() -> property:
    class Manifest:
        name = "digits"

    class Coming:
        manifest, digest = Manifest(), "a" * 64

    return property(lambda self: Coming())


# -- packaging -------------------------------------------------------------------------------------------------------

FIGURES = {"p50_ms": 93.4, "p95_ms": 99.0, "load_ms": 40.0, "peak_bytes": 60_000_000, "private_bytes": 1, "runs": 10}


@pytest.mark.parametrize(
    ("limit", "clause"),
    [
        (Limit("latency", 20, "ms", "--max-latency"), "latency is 93.4 ms as emulated, allowed is at most 20 ms"),
        (Limit("load time", 20, "ms", "x"), "load time is 40 ms as emulated, allowed is at most 20 ms"),
        (Limit("memory", 20, "bytes", "x"), "memory is 60,000,000 bytes as emulated, allowed is at most 20 bytes"),
        (Limit("size", 2, "bytes", "x"), "size is 10 bytes, allowed is at most 2 bytes"),
    ],
)
def test_a_limit_is_missed_in_words_that_carry_the_mark(limit: Limit, clause: str) -> None:
    one = Candidate("onnx", "int8", size=10, measured={**FIGURES, "emulated": QEMU})
    verdict = decide([one], [limit], "target")
    assert verdict.reasons["onnx int8"].startswith(clause)
    assert verdict.nothing_fits is not None
    assert ("as emulated" in verdict.nothing_fits.relax) == ("as emulated" in clause)
    board = replace(one, measured=FIGURES)
    assert "emulated" not in decide([board], [limit], "target").reasons["onnx int8"]


@pytest.fixture
def asked(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Request:
    """A packaging whose device says that it is emulated."""
    monkeypatch.setattr(measure, "bench_on", lambda *_: {**FIGURES, "first_look": False, "emulated": QEMU})
    return Request(
        models / "keras.keras", "cpu-x86_64", tmp_path / "d.edge", "tflite", "float32", device="kitchen",
        max_latency=100,
    )  # fmt: skip


def test_candidates_measured_on_an_emulated_device_are_marked_in_all_that_is_shown(asked: Request) -> None:
    done = package(asked)
    assert done.chosen.measured_on == "kitchen, emulated"
    (row,) = done.record["candidates"]
    assert (row["emulated"], row["measured_on"], row["status"]) == (QEMU, "kitchen, emulated", "chosen")
    notes = " ".join(text.notes(done.record))
    assert notes.startswith("Time and memory: kitchen, emulated.") and f"emulated ({QEMU})" in notes
    said = text.summary(done.record)
    assert "It keeps all 3 limits. Its times and memory are those of an emulated machine." in said
    page = html.render(done.record)
    assert "Its times and memory are those of an emulated machine." in page
    assert "imitating a cortex-a53" in page
    assert "imitating" not in (asked.output / "manifest.json").read_text()


def test_a_limit_on_latency_is_judged_and_the_refusal_carries_the_mark(asked: Request) -> None:
    with pytest.raises(LimitError, match=r"latency is 93\.4 ms as emulated.*allow latency 93\.4 ms as emulated") as got:
        package(replace(asked, max_latency=20))
    record: Any = got.value.record
    assert "the nearest, tflite float32, has 93.4 ms as emulated, allowed is 20 ms" in text.summary(record)


def test_candidates_measured_on_a_board_are_not_marked(asked: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "bench_on", lambda *_: {**FIGURES, "first_look": False})
    done = package(asked)
    assert done.chosen.measured_on == "kitchen" and done.record["candidates"][0]["emulated"] is None
    assert "emulated" not in "".join([*text.notes(done.record), text.summary(done.record)])
