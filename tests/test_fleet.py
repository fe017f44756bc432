"""Rollouts to an inventory of devices behind a real OpenSSH server: each ends with the old or the new model."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from conftest import SOURCES
from fleet import Fleet
from sshd import SshServer, free_port
from test_push import rewritten

from edge_infer.bundle import Bundle
from edge_infer.cli import main

ROOT = Path(__file__).parents[1]
PYTHON = sys.executable
NAMES = ("pi-1", "pi-2", "pi-3", "pi-4", "pi-5", "pi-6")


@pytest.fixture(scope="session")
def onnx(packaged) -> Bundle:  # type: ignore[no-untyped-def]
    return packaged(SOURCES["onnx"], "onnx", "float32")


@pytest.fixture(scope="session")
def onnx_int8(packaged) -> Bundle:  # type: ignore[no-untyped-def]
    return packaged(SOURCES["onnx"], "onnx", "int8")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with Fleet(tmp_path_factory.mktemp("fleet"), NAMES) as started:
        yield started


@pytest.fixture
def fleet(server: Fleet) -> Iterator[Fleet]:
    yield server
    shutil.rmtree(server.directory / "stores", ignore_errors=True)


def python_that(folder: Path, does: str) -> Path:
    """A device's Python that runs the shell command ``does`` in place of, or before, a self-test."""
    path = folder / f"python-{len(list(folder.iterdir()))}"
    path.write_text(f'#!/bin/sh\ncase "$*" in *" selftest "*) {does};; esac\nexec {PYTHON} "$@"\n')
    path.chmod(0o755)
    return path


def wrong_engine(folder: Path) -> Path:
    return python_that(folder, "echo 'golden case 0: the answer is off by 1' >&2; exit 1")


def toml(value: object) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {toml(inner)}" for key, inner in value.items()) + " }"
    return json.dumps(value)


Tables = Mapping[str, Mapping[str, object]]


@pytest.fixture
def inventory(tmp_path: Path) -> Callable[..., Path]:
    """``inventory({"pi-3": {...}}, kitchen={...})``: a file with all devices, these keys of theirs, these groups."""

    def write(devices: Tables | None = None, **groups: Mapping[str, object]) -> Path:
        lines = ["[groups.all]", f"python = {json.dumps(PYTHON)}"]
        for name, table in groups.items():
            lines += [f"[groups.{name}]", *(f"{key} = {toml(value)}" for key, value in table.items())]
        for name in NAMES:
            table = (devices or {}).get(name, {})
            lines += [f"[devices.{name}]", *(f"{key} = {toml(value)}" for key, value in table.items())]
        path = tmp_path / "fleet.toml"
        path.write_text("\n".join(lines))
        return path

    return write


@pytest.fixture
def push(fleet: Fleet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict]]:
    """``push(bundle, inventory, ...)``: exit status and the report, which is also in ``report.json``."""

    def run(bundle: Bundle | Path, inventory: Path, *options: str) -> tuple[int, dict]:
        path = bundle.path if isinstance(bundle, Bundle) else bundle
        report = [] if "--resume" in options else ["--report", str(tmp_path / "report.json")]
        where = [] if {"--group", "--select"} & set(options) else ["--group", "all"]
        ssh = ["--ssh-config", str(fleet.ssh_config)]
        status = main(["push", str(path), "--inventory", str(inventory), *where, *report, *ssh, *options, "--json"])
        answer = json.loads(capsys.readouterr().out)
        if "counts" in answer and not answer["dry_run"]:
            written = json.loads(Path(answer["report"]).read_bytes())
            assert {key: answer[key] for key in written} == written
        return status, answer

    return run


def states(report: dict) -> dict[str, str]:
    return {row["device"]: row["state"] for row in report["devices"]}


def serving(fleet: Fleet) -> list[str | None]:
    return [fleet.digest(name) for name in NAMES]


# -- what each device ends with ----------------------------------------------------------------------------------------


def test_every_device_gets_the_bundle_and_a_second_time_nothing_is_sent(fleet, onnx, inventory, push):
    status, report = push(onnx, inventory())
    assert status == 0 and report["counts"] == {"done": 6} and serving(fleet) == [onnx.digest] * 6
    assert [row["group"] for row in report["devices"]] == [0, 1, 1, 1, 1, 1]
    assert all(row["pushed"]["sent_bytes"] == onnx.manifest.size for row in report["devices"])
    status, report = push(onnx, inventory())
    assert status == 0 and {row["pushed"]["sent_bytes"] for row in report["devices"]} == {0}
    assert {row["pushed"]["replaced"] for row in report["devices"]} == {onnx.digest}


def test_an_unreachable_and_a_failing_device_are_counted_apart_and_keep_nothing_or_the_old(
    fleet, onnx, onnx_int8, inventory, push, tmp_path
):
    push(onnx, inventory(), "--select", "pi-1,pi-2,pi-3")
    devices = {
        "pi-3": {"python": str(wrong_engine(tmp_path))},
        "pi-4": {"address": f"localhost:{free_port()}"},
    }
    status, report = push(onnx_int8, inventory(devices), "--abort-after", "1")
    assert status == 5 and report["counts"] == {"done": 4, "failed": 1, "unreachable": 1} and not report["reason"]
    new = onnx_int8.digest
    assert serving(fleet) == [new, new, onnx.digest, None, new, new]
    rows = {row["device"]: row for row in report["devices"]}
    assert "off by 1" in rows["pi-3"]["error"] and "nothing listens" in rows["pi-4"]["error"]


def test_a_refused_login_has_failed_and_is_not_unreachable(fleet, onnx, inventory, push, tmp_path):
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "stranger")], check=True)
    _, report = push(onnx, inventory({"pi-2": {"identity": "stranger"}}), "--abort-after", "100%")
    assert report["counts"] == {"done": 5, "failed": 1} and states(report)["pi-2"] == "failed"


def test_each_target_gets_its_bundle(fleet, onnx, inventory, push, tmp_path, capsys):
    bundles = {}
    for name in ("raspberry-pi-4", "raspberry-pi-5"):
        (tmp_path / name).mkdir()
        target = dataclasses.replace(onnx.manifest.target, name=name)
        bundles[name] = rewritten(onnx, tmp_path / name, target=target)
        shutil.copytree(bundles[name].path, tmp_path / "bundles" / f"{name}.edge")
    devices = {
        name: {"target": "raspberry-pi-4" if number % 2 else "raspberry-pi-5"} for number, name in enumerate(NAMES)
    }
    status, report = push(tmp_path / "bundles", inventory(devices))
    four, five = bundles["raspberry-pi-4"].digest, bundles["raspberry-pi-5"].digest
    assert status == 0 and serving(fleet) == [five, four] * 3 and set(report["bundles"]) == set(bundles)
    # One that is built for neither is said before anything is sent.
    devices["pi-6"] = {"target": "jetson-orin-nano"}
    status, answer = push(tmp_path / "bundles", inventory(devices))
    assert status == 2 and "pi-6 is a jetson-orin-nano" in answer["error"]["message"]


def test_a_jump_host_of_the_inventory_is_gone_through(fleet, onnx, inventory, tmp_path, capsys):
    with SshServer(tmp_path / "jump", alias="gateway") as jump:
        config = tmp_path / "config"
        config.write_text(fleet.ssh_config.read_text() + jump.alias_block())
        path = inventory(
            {"pi-2": {"groups": ["cellar"]}, "pi-3": {"groups": ["cellar"], "jump": "none"}}, cellar={"jump": "gateway"}
        )
        arguments = ["--inventory", str(path), "--select", "cellar", "--ssh-config", str(config)]
        assert main(["push", str(onnx.path), *arguments, "--report", str(tmp_path / "report.json")]) == 0
        assert jump.log().count("Accepted publickey") == 1
    assert fleet.digest("pi-2") == fleet.digest("pi-3") == onnx.digest
    # The jump host is gone now, and the device behind it cannot be reached.
    assert main(["fleet", "status", *arguments]) == 5
    assert re.search(r"pi-2 +unreachable", capsys.readouterr().out)


# -- when it ends ------------------------------------------------------------------------------------------------------


def test_a_canary_that_fails_keeps_the_others_from_it(fleet, onnx, inventory, push, tmp_path):
    status, report = push(onnx, inventory({"pi-1": {"python": str(wrong_engine(tmp_path))}}))
    assert status == 5 and report["counts"] == {"failed": 1, "not started": 5}
    assert "of the canary failed" in report["reason"] and serving(fleet) == [None] * 6


def test_more_failures_in_a_batch_than_allowed_end_it(fleet, onnx, inventory, push, tmp_path):
    wrong = {"python": str(wrong_engine(tmp_path))}
    devices = dict.fromkeys(("pi-2", "pi-4", "pi-5"), wrong)
    options = ("--canary", "1", "--batch", "2", "--abort-after", "1", "--parallel", "1")
    status, report = push(onnx, inventory(devices), *options)
    # Of pi-2 and pi-3, one may fail; pi-4 and pi-5 are more than one; pi-6 is not started.
    assert status == 5 and report["reason"] == "2 of the 2 devices of batch 2 failed, allowed are 1"
    assert serving(fleet) == [onnx.digest, None, onnx.digest, None, None, None]
    assert states(report)["pi-6"] == "not started"


def test_resume_tries_the_unreachable_and_the_rest_and_the_failed_if_told(fleet, onnx, inventory, push, tmp_path):
    devices = {"pi-2": {"address": f"localhost:{free_port()}"}, "pi-3": {"python": str(wrong_engine(tmp_path))}}
    options = ("--batch", "2", "--abort-after", "0", "--parallel", "1")
    status, report = push(onnx, inventory(devices), *options)
    assert report["counts"] == {"done": 1, "failed": 1, "unreachable": 1, "not started": 3}
    resume = ("--resume", str(tmp_path / "report.json"))
    status, report = push(onnx, inventory(), *options, *resume)
    assert status == 5 and report["counts"] == {"done": 5, "failed": 1}
    assert [row["device"] for row in report["devices"] if row["kept"]] == ["pi-1", "pi-3"]
    status, report = push(onnx, inventory(), *options, *resume, "--retry-failed")
    assert status == 0 and serving(fleet) == [onnx.digest] * 6
    assert [row["device"] for row in report["devices"] if not row["kept"]] == ["pi-3"]


def test_a_connection_lost_in_the_middle_is_unreachable_and_resumed(fleet, onnx, inventory, push, tmp_path):
    started = tmp_path / "started"
    slow = {"python": str(python_that(tmp_path, f"touch {started}; sleep 60"))}

    def cut() -> None:
        while not started.exists():
            time.sleep(0.02)
        fleet.drop_connections()

    cutter = threading.Thread(target=cut)
    cutter.start()
    _, report = push(onnx, inventory({"pi-2": slow}), "--select", "pi-1,pi-2")
    cutter.join()
    assert states(report) == {"pi-1": "done", "pi-2": "unreachable"} and fleet.digest("pi-2") is None
    status, report = push(onnx, inventory(), "--select", "pi-1,pi-2", "--resume", str(tmp_path / "report.json"))
    assert status == 0 and fleet.digest("pi-2") == onnx.digest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_leaves_every_device_whole(fleet, onnx, onnx_int8, inventory, push, tmp_path, number):
    push(onnx, inventory())
    started = tmp_path / "started"
    slow = {"python": str(python_that(tmp_path, f"echo $$ >>{started}; exec sleep 60"))}
    path = inventory(dict.fromkeys(("pi-3", "pi-4"), slow))
    command = [PYTHON, "-m", "edge_infer.cli", "push", str(onnx_int8.path), "--inventory", str(path), "--group", "all"]
    options = ["--ssh-config", str(fleet.ssh_config), "--report", str(tmp_path / "stopped.json"), "--parallel", "2"]
    child = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True)
    while not (started.exists() and len(started.read_text().splitlines()) == 2):
        assert child.poll() is None
        time.sleep(0.02)
    begun = time.monotonic()
    child.send_signal(number)
    out, err = child.communicate(timeout=30)
    assert child.returncode == 128 + number and time.monotonic() - begun < 10
    report = json.loads((tmp_path / "stopped.json").read_bytes())
    assert report["reason"] == f"stopped by {number.name}" and report["ended"]
    assert report["counts"] == {"done": 2, "stopped": 2, "not started": 2}
    assert "2 stopped" in out and "--resume" in err and "Traceback" not in err
    old, new = onnx.digest, onnx_int8.digest
    assert serving(fleet) == [new, new, old, old, old, old]
    for name in NAMES:
        fleet.store(name).open_current("digits")
    # A self-test may outlast its connection; the device is busy until it ends.
    for pid in started.read_text().split():
        os.kill(int(pid), signal.SIGKILL)
    status, report = push(onnx_int8, inventory(), "--resume", str(tmp_path / "stopped.json"), "--wait", "20")
    assert status == 0 and serving(fleet) == [new] * 6
    assert [row["kept"] for row in report["devices"]] == [True, True, False, False, False, False]


def test_a_host_that_dies_leaves_a_report_to_resume_from(fleet, onnx, inventory, push, tmp_path):
    started = tmp_path / "started"
    path = inventory({"pi-2": {"python": str(python_that(tmp_path, f"echo $$ >>{started}; exec sleep 60"))}})
    command = [PYTHON, "-m", "edge_infer.cli", "push", str(onnx.path), "--inventory", str(path), "--select", "pi-[123]"]
    options = ["--ssh-config", str(fleet.ssh_config), "--report", str(tmp_path / "report.json"), "--parallel", "1"]
    child = subprocess.Popen([*command, *options], stderr=subprocess.DEVNULL, cwd=ROOT)
    while not (started.exists() and started.read_text()):
        assert child.poll() is None
        time.sleep(0.02)
    child.kill()
    child.wait()
    report = json.loads((tmp_path / "report.json").read_bytes())
    assert states(report)["pi-1"] == "done" and report["ended"] is None
    os.kill(int(started.read_text()), signal.SIGKILL)
    options = ("--resume", str(tmp_path / "report.json"), "--wait", "20")
    status, report = push(onnx, inventory(), "--select", "pi-[123]", *options)
    assert status == 0 and [row["kept"] for row in report["devices"]] == [True, False, False]


def test_no_more_pushes_at_once_than_parallel_says(fleet, onnx, inventory, push, tmp_path):
    log = tmp_path / "log"
    timed = python_that(tmp_path, f'echo + >>{log}; {PYTHON} "$@"; status=$?; sleep 0.3; echo - >>{log}; exit $status')
    status, _ = push(
        onnx, inventory(None, timed={"python": str(timed)}), "--canary", "0", "--parallel", "2", "--python", str(timed)
    )
    assert status == 0
    running = most = 0
    for sign in log.read_text().split():
        running += 1 if sign == "+" else -1
        most = max(most, running)
    assert most == 2


# -- the command line --------------------------------------------------------------------------------------------------


def test_a_dry_run_asks_every_device_and_writes_nothing(fleet, onnx, inventory, push, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = inventory({"pi-1": {"address": f"localhost:{free_port()}"}})
    ssh = ["--ssh-config", str(fleet.ssh_config)]
    assert main(["push", str(onnx.path), "--inventory", str(path), "--group", "all", "--dry-run", *ssh]) == 5
    out = capsys.readouterr().out
    assert out.count(": would") == 5 and "pi-1: nothing listens" in out
    assert [item.name for item in tmp_path.iterdir()] == ["fleet.toml"] and serving(fleet) == [None] * 6


def test_variables_are_put_into_the_health_command(fleet, onnx, inventory, push, tmp_path):
    path = inventory(
        {"pi-1": {"variables": {"file": str(tmp_path / "one")}}, "pi-2": {"variables": {"file": str(tmp_path / "two")}}}
    )
    health = ("--health", "echo {name} ${HOME:+home} > {file}")
    status, _ = push(onnx, path, "--select", "pi-1,pi-2", *health)
    assert status == 0
    assert ((tmp_path / "one").read_text(), (tmp_path / "two").read_text()) == ("pi-1 home\n", "pi-2 home\n")
    status, answer = push(onnx, path, *health)
    assert status == 2 and "device pi-3: {file}" in answer["error"]["message"]


def test_a_device_may_have_a_store_of_its_own(fleet, onnx, inventory, push, tmp_path, capsys):
    path = inventory({"pi-1": {"store": str(tmp_path / "own-{name}")}})
    assert push(onnx, path, "--select", "pi-1")[0] == 0
    assert fleet.digest("pi-1") is None and (tmp_path / "own-pi-1" / "current" / "digits").exists()
    arguments = ["--inventory", str(path), "--select", "pi-1", "--ssh-config", str(fleet.ssh_config)]
    assert main(["fleet", "status", *arguments]) == 0
    assert onnx.digest[:12] in capsys.readouterr().out


def test_a_release_on_trial_is_confirmed_on_the_whole_group(fleet, onnx, inventory, push, capsys):
    path = inventory()
    status, report = push(onnx, path, "--select", "pi-1,pi-2", "--confirm-within", "600")
    assert status == 0 and all(row["pushed"]["pending_s"] for row in report["devices"])
    arguments = ["--inventory", str(path), "--select", "pi-1,pi-2", "--ssh-config", str(fleet.ssh_config)]
    assert main(["fleet", "confirm", "digits", *arguments]) == 0
    assert capsys.readouterr().out.splitlines() == [f"pi-{n}: digits is {onnx.digest[:12]} now" for n in (1, 2)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["BUNDLE", "--inventory", "FLEET"], "say which devices are meant"),
        (["BUNDLE", "--inventory", "FLEET", "--group", "cellar"], "has no group 'cellar', only all"),
        (["BUNDLE", "--inventory", "FLEET", "--select", "pi-1,!pi-9"], "'pi-9' fits no device"),
        (["BUNDLE", "--inventory", "FLEET", "--group", "all", "--batch", "0"], "a batch of no devices"),
        (["BUNDLE", "--inventory", "FLEET", "--group", "all", "--canary", "few"], "'few' is no amount"),
        (["BUNDLE", "--inventory", "FLEET", "--group", "all", "--retry-failed"], "name that with --resume"),
        (["BUNDLE", "--inventory", "FLEET", "--group", "all", "--resume", "FLEET"], "is no report of a rollout"),
        (["BUNDLE", "--inventory", "/no/file", "--group", "all"], "cannot be read as an inventory"),
        (["BUNDLE", "nothing.edge", "--inventory", "FLEET", "--group", "all"], "there is no bundle"),
        (["BUNDLE", "--inventory", "FLEET", "--group", "all", "--sftp"], "which --sftp has none of"),
        (["BUNDLE", "local:/x", "--canary", "1"], "--canary is for the devices of an inventory"),
    ],
)  # fmt: skip
def test_a_request_that_is_wrong_has_status_2_and_sends_nothing(onnx, inventory, capsys, arguments, words):
    names = {"BUNDLE": str(onnx.path), "FLEET": str(inventory())}
    assert main(["push", *(names.get(word, word) for word in arguments)]) == 2
    assert words in capsys.readouterr().err


def test_devices_and_bundles_may_stand_after_options(fleet, onnx, inventory, push, tmp_path, capsys):
    store = f"local:{tmp_path / 'store'}"
    assert main(["push", str(onnx.path), "--python", PYTHON, store]) == 0
    ssh = ["--ssh-config", str(fleet.ssh_config), "--report", str(tmp_path / "report.json")]
    path = str(inventory())
    assert main(["push", str(onnx.path), "--inventory", path, "--select", "pi-1", *ssh, str(onnx.path)]) == 0
    assert main(["push", "--inventory", path, "--select", "pi-1", *ssh, str(onnx.path)]) == 0
    with pytest.raises(SystemExit, match="2"):
        main(["push", str(onnx.path)])
    assert "required: DEVICE" in capsys.readouterr().err


def test_an_identity_that_is_not_there_is_named_with_file_and_device(onnx, inventory, capsys):
    path = inventory({"pi-2": {"identity": "no-key"}})
    assert main(["push", str(onnx.path), "--inventory", str(path), "--group", "all"]) == 2
    assert f"{path}: device pi-2: identity: there is no file" in capsys.readouterr().err


# -- a terminal --------------------------------------------------------------------------------------------------------


def test_on_a_terminal_there_is_a_line_for_each_device_under_way(fleet, onnx, inventory, tmp_path):
    """A real pseudo-terminal: lines are drawn over and over, and what is through stays above them."""
    import pty

    main_end, child_end = pty.openpty()
    command = [PYTHON, "-m", "edge_infer.cli", "push", str(onnx.path), "--inventory", str(inventory())]
    options = ["--group", "all", "--ssh-config", str(fleet.ssh_config), "--report", str(tmp_path / "report.json")]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
    child = subprocess.Popen(
        [*command, *options], stdout=subprocess.DEVNULL, stderr=child_end, stdin=child_end, env=environment, cwd=ROOT
    )
    os.close(child_end)
    shown = b""
    while True:
        try:
            data = os.read(main_end, 65536)
        except OSError:  # the other end is closed
            break
        shown += data
    os.close(main_end)
    assert child.wait() == 0
    text = shown.decode()
    assert re.search(r"\x1b\[\d*A", text), "nothing was drawn over"
    for name in NAMES:
        assert f"{name}: done, sent" in text
    assert "self-test" in text and "0 of 6" in text


# -- the page ----------------------------------------------------------------------------------------------------------


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", (ROOT / "docs" / "fleet.md").read_text(), re.DOTALL)


def test_every_command_of_the_page_does_what_it_says(onnx, onnx_int8, tmp_path, monkeypatch):
    """Its own inventory, with aliases of the names that lead to this machine, and its commands in their order."""
    folder = tmp_path / "work"
    (folder / "bundles").mkdir(parents=True)
    (folder / "fleet.toml").write_text(blocks("toml")[0])
    for name, short in (("raspberry-pi-4", "pi4"), ("raspberry-pi-5", "pi5")):
        target = dataclasses.replace(onnx.manifest.target, name=name)
        for bundle, version, path in (
            (onnx, "1", folder / f"digits-{short}.edge"),
            (onnx_int8, "2", folder / "bundles" / f"digits-{short}.edge"),
        ):
            scratch = tmp_path / f"{short}-{version}"
            scratch.mkdir()
            shutil.move(rewritten(bundle, scratch, target=target, version=version).path, path)
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "edge-infer"
    program.write_text(f'#!/bin/sh\nexec {PYTHON} -m edge_infer.cli "$@"\n')
    program.chmod(0o755)
    names = ("kitchen-1", "kitchen-2", "attic-1")
    with (
        Fleet(tmp_path / "sshd", [f"{name}.local" for name in names]) as fleet,
        SshServer(tmp_path / "jump", alias="gateway.local") as jump,
    ):
        (tmp_path / "home" / ".ssh").mkdir(parents=True)
        (tmp_path / "home" / ".ssh" / "config").write_text(fleet.ssh_config.read_text() + jump.alias_block())
        for name in names:
            own = fleet.store(f"{name}.local").root / "venv" / "bin"
            own.mkdir(parents=True)
            (own / "python").write_text(f'#!/bin/sh\nexec {PYTHON} "$@"\n')
            (own / "python").chmod(0o755)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        done = {}
        for command in [line for block in blocks("sh") for line in block.splitlines()]:
            shown = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, check=False)
            assert shown.returncode == 0, (command, shown.stderr)
            done[command] = shown.stdout
        assert jump.log().count("Accepted publickey") >= 2
    outputs = list(done.values())
    assert [line.split()[0] for line in outputs[1].splitlines()] == ["device", "kitchen-1", "attic-1"]
    assert "on 3 devices: 3 done" in next(text for command, text in done.items() if "--batch 10%" in command)
    assert all("done earlier" in text for command, text in done.items() if "--resume" in command)
    assert next(text for command, text in done.items() if "rollback" in command).count("digits is") == 2
    assert (folder / "back.edge" / "manifest.json").exists() and (folder / "out" / "version").exists()
    programs = {shlex.split(command)[0] for command in done}
    assert programs == {"edge-infer", "skopeo"}
