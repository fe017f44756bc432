"""Environments on devices: made, checked, switched like a model, rolled back; and what is refused.

The first part uses real engines, offline, from the wheelhouse that scripts/test fills; the second an engine of no size,
by the same pip on the same way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import SOURCES
from sshd import SshServer
from test_push import small_disk
from wheels import WHEELHOUSE, make_wheel, small_engine

from edge_infer.bundle import hash_file
from edge_infer.cli import main
from edge_infer.deploy.checkup import platform_facts
from edge_infer.deploy.conversation import Conversation, open_transport
from edge_infer.deploy.platforms import Platform
from edge_infer.deploy.provision import (
    MORE,
    Provisioned,
    ProvisionOptions,
    check_device,
    default_engines,
    provision,
    switch_back,
)
from edge_infer.deploy.push import push
from edge_infer.deploy.transport import Transport
from edge_infer.deploy.venvs import Venvs
from edge_infer.deploy.wheelhouse import prepare
from edge_infer.errors import BundleError, DeviceError, EngineMissing, SelfTestFailed

#: A Python that is no virtual environment itself.
BASE_PYTHON = Path(getattr(sys, "_base_executable", sys.executable)).resolve()


@pytest.fixture
def no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip, here and on a local device, reaches nothing."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)


def provisioned(transport: Transport, dry_run: bool = False, **options: object) -> Provisioned:
    with contextlib.closing(transport):
        return provision(transport, ProvisionOptions(**options), dry_run=dry_run)  # type: ignore[arg-type]


# -- real engines, offline ---------------------------------------------------------------------------------------------


def test_a_bare_device_gets_an_environment_and_a_model_that_answers(no_index, packaged, tmp_path, capsys):
    address, folder = f"local:{tmp_path / 'store'}", str(WHEELHOUSE)
    assert main(["provision", address, "--offline", "--wheelhouse", folder, "--dry-run"]) == 0
    planned = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert set(planned[1:]) == {"send", "install", "import", "switch"} and not (tmp_path / "store" / "venv").exists()
    assert main(["provision", address, "--offline", "--wheelhouse", folder, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["engines"] == ["tflite"] and {"ai-edge-litert", "edge-infer", "numpy"} <= answer["packages"].keys()
    assert os.readlink(tmp_path / "store" / "venv") == f"venvs/{answer['environment']}"
    assert not any((tmp_path / "store" / "staging").iterdir())  # the wheels are gone
    bundle = packaged(SOURCES["tflite"], "tflite", "float32")
    assert main(["push", str(bundle.path), address]) == 0
    python = tmp_path / "store" / "venv" / "bin" / "python"
    done = subprocess.run(
        [python, "-I", "-m", "edge_infer", "run", "digits", "--json"],
        env={"EDGE_INFER_HOME": str(tmp_path / "store"), "PATH": os.environ["PATH"]},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert json.loads(done.stdout)["digit"]["shape"][1] == 10
    assert subprocess.run([python, "-c", "import pip"], check=False, capture_output=True).returncode == 1
    # An engine that a model in use needs cannot be left out, and is known before anything is sent.
    with pytest.raises(DeviceError, match="models in use there need tflite; add --engine tflite"):
        provisioned(open_transport(address), engines=("onnx",), offline=True, wheelhouse=WHEELHOUSE)


def test_an_empty_home_behind_ssh(no_index, packaged, tmp_path):
    """A Python without packages of its own, no HOME to speak of, and no index: all over one SSH connection."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").symlink_to(BASE_PYTHON)
    (tmp_path / "home").mkdir()
    settings = (
        f"SetEnv HOME={tmp_path / 'home'} PATH={tmp_path / 'bin'}:/usr/bin:/bin PIP_INDEX_URL=http://127.0.0.1:9/"
    )
    bundle = packaged(SOURCES["onnx"], "onnx", "float32")
    with SshServer(tmp_path / "sshd", options=[settings]) as server:
        transport = open_transport(server.alias, ssh_config=server.ssh_config)
        done = provisioned(transport, engines=("onnx", "tflite"), offline=True, wheelhouse=WHEELHOUSE)
        assert {"onnxruntime", "ai-edge-litert", "numpy", "edge-infer"} <= done.packages.keys()
        store = tmp_path / "home" / ".edge-infer"
        assert os.readlink(store / "venv") == f"venvs/{done.environment}"
        with contextlib.closing(open_transport(server.alias, ssh_config=server.ssh_config)) as transport:
            pushed = push(bundle, transport)
    assert pushed.report["engine"]["package"] == "onnxruntime"
    golden = np.load(bundle.file("golden.npz"))
    script = "import edge_infer, json, sys; s = edge_infer.load('digits'); print(json.dumps(s(INPUT).tolist()))"
    script = f"import numpy; INPUT = numpy.load({str(bundle.file('golden.npz'))!r})['in.0.0']; {script}"
    answered = subprocess.run(
        [store / "venv" / "bin" / "python", "-I", "-c", script],
        env={"EDGE_INFER_HOME": str(store)}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    np.testing.assert_allclose(json.loads(answered.stdout), golden["out.0.0"], atol=1e-4)


# -- an engine of no size ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def houses(tmp_path_factory) -> Callable[..., Path]:
    """``houses(version, code="")``: a wheelhouse for this machine with that version of the small engine, made once."""
    here = Platform.from_facts(platform_facts(sys.executable))
    made: dict[tuple[str, str], Path] = {}

    def make(version: str, code: str = "") -> Path:
        if (version, code) not in made:
            folder = tmp_path_factory.mktemp("house")
            small_engine(folder / "index", version, code)
            with pytest.MonkeyPatch.context() as patch:
                only_this_index(patch, folder / "index")
                prepare(here, ["tflite"], folder / "house")
            made[version, code] = folder / "house"
        return made[version, code]

    return make


def only_this_index(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setenv("PIP_CONFIG_FILE", os.devnull)
    patch.setenv("PIP_NO_INDEX", "1")
    patch.setenv("PIP_FIND_LINKS", str(folder))


@dataclasses.dataclass
class Device:
    """A local device and where its wheels come from."""

    store: Path
    house: Path
    houses: Callable[..., Path]

    @property
    def venvs(self) -> Venvs:
        return Venvs(self.store)

    def transport(self) -> Transport:
        return open_transport(f"local:{self.store}")

    def provision(self, **options: object) -> Provisioned:
        usual = {"offline": True, "wheelhouse": self.house, "engines": ("tflite",)}
        return provisioned(self.transport(), **{**usual, **options})

    def next(self, version: str, code: str = "") -> Provisioned:
        return self.provision(wheelhouse=self.houses(version, code))

    def versions(self) -> str:
        return str((self.venvs.facts(self.venvs.current() or "") or {})["packages"]["ai-edge-litert"])


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, houses: Callable[..., Path]) -> Device:
    """One that nothing was done to, with a wheelhouse of its own."""
    shutil.copytree(houses("2.0"), tmp_path / "house")
    only_this_index(monkeypatch, houses("2.0").parent / "index")
    return Device(tmp_path / "store", tmp_path / "house", houses)


def test_environments_are_switched_kept_and_rolled_back_like_models(device):
    first = device.provision()
    assert device.versions() == "2.0" and first.replaced is None
    again = device.provision()
    assert (again.sent_bytes, again.environment, again.replaced) == (0, first.environment, None)
    assert [step.action for step in again.steps] == ["keep", "import"]
    second = device.next("2.1")
    assert device.versions() == "2.1" and second.replaced == first.environment
    with contextlib.closing(device.transport()) as transport:
        assert switch_back(transport)["environment"] == first.environment
        assert device.versions() == "2.0"
        assert switch_back(transport)["environment"] == second.environment
    third = device.next("2.2")
    assert device.venvs.names() == sorted([second.environment, third.environment])  # the oldest is gone
    assert device.venvs.previous() == second.environment


def test_nothing_to_go_back_to(device, capsys):
    device.provision()
    assert main(["provision", f"local:{device.store}", "--rollback", "--engine", "onnx"]) == 2
    assert "--rollback makes no environment" in capsys.readouterr().err
    with contextlib.closing(device.transport()) as transport, pytest.raises(DeviceError, match="holds no environment"):
        switch_back(transport)


def test_an_engine_that_cannot_be_imported_leaves_the_old_environment(device):
    first = device.provision()
    for code, words in (
        ("raise ImportError('libhexagon.so: no such file')", "ImportError: libhexagon.so: no such file"),
        (
            "import os; os.kill(os.getpid(), 4)",
            "SIGILL, illegal instruction: this engine build does not fit the proces",
        ),
    ):
        with pytest.raises(SelfTestFailed) as caught:
            device.next("2.1", code)
        assert f"ai_edge_litert.interpreter cannot be imported: {words}" in str(caught.value)
        assert str(caught.value).endswith(f"the environment {first.environment} stays in use")
        assert device.venvs.names() == [first.environment] and device.versions() == "2.0"


def test_a_model_that_would_stop_answering_keeps_the_old_environment(device, packaged, monkeypatch):
    """The old environment is this Python itself, made by hand: it has engines that work, the new one has not."""
    device.store.mkdir()
    (device.store / "venv" / "bin").mkdir(parents=True)
    (device.store / "venv" / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (device.store / "venv" / "bin" / "python").chmod(0o755)
    with contextlib.closing(device.transport()) as transport:
        push(packaged(SOURCES["tflite"], "tflite", "float32"), transport)
    with pytest.raises(SelfTestFailed, match="digits does not answer with the new environment"):
        device.provision(replace=True)
    assert device.venvs.is_by_hand() and device.venvs.names() == []
    # What does not answer now either does not keep the device from what may mend it.
    (device.store / "venv" / "bin" / "python").write_text("#!/bin/sh\nexit 1\n")
    done = device.provision(replace=True)
    assert [(row["name"], row["answers"]) for row in done.models] == [("digits", False)]


def test_an_environment_made_by_hand_is_moved_aside_only_when_told_to(device):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", device.store / "venv"], check=True)
    with pytest.raises(DeviceError, match=r"store/venv was made by hand; --replace moves it aside"):
        device.provision()
    done = device.provision(replace=True)
    assert device.venvs.current() == done.environment and device.venvs.previous() == "by-hand-1"
    with contextlib.closing(device.transport()) as transport, pytest.raises(SelfTestFailed) as caught:
        switch_back(transport)  # to an empty one: the check is the same as for a new one
    assert "edge_infer cannot be imported" in str(caught.value)
    assert device.venvs.current() == done.environment


def test_a_process_keeps_the_environment_that_it_was_started_with(device):
    first = device.provision()
    code = "import sys; input(); import ai_edge_litert.interpreter as m; print(m.__file__)"
    process = subprocess.Popen(
        [device.store / "venv" / "bin" / "python", "-I", "-c", code],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    device.next("2.1")
    out, _ = process.communicate("go on\n", timeout=60)
    assert out.startswith(str(device.venvs.path(first.environment).resolve()))


def test_an_interrupted_transfer_goes_on_where_it_stopped(device):
    total = device.provision(dry_run=True)
    sizes = {step.subject: step.size for step in total.steps if step.action == "send"}
    wheel = next(name for name in sizes if name.startswith("pip-"))
    _send_part(device, wheel, 1_500_000)
    done = device.provision()
    assert done.sent_bytes == sum(sizes.values()) - 1_500_000
    assert device.versions() == "2.0"


def test_what_was_damaged_meanwhile_is_sent_anew(device):
    sizes = {step.subject: step.size for step in device.provision(dry_run=True).steps if step.action == "send"}
    wheel = next(name for name in sizes if name.startswith("pip-"))
    _send_part(device, wheel, 1_500_000)
    (part,) = device.store.glob(f"staging/*/{wheel}")
    with part.open("r+b") as file:
        file.seek(1_200_000)
        file.write(b"#")
    assert device.provision().sent_bytes == sum(sizes.values()) - 1024 * 1024  # the first piece was right


def _begin(device: Device, conversation: Conversation) -> dict[str, object]:
    """As provision does, by hand."""
    facts = conversation.ask("look", python=None)
    house = prepare(Platform.from_facts(facts["platform"]), ["tflite"], device.house)
    pins = [*house.pins, house.pip]
    return {
        "requirements": house.requirements,
        "engines": ["tflite"],
        "files": [[pin.file, house.path(pin).stat().st_size, pin.sha256] for pin in pins],
        "python": None,
        "who": "the tests",
        "wait_s": 0,
    }


def _send_part(device: Device, wheel: str, size: int) -> None:
    """Begin an installation and break off in the middle of a wheel."""
    with contextlib.closing(device.transport()) as transport, Conversation(transport, None, MORE) as conversation:
        conversation.ask("install-begin", **_begin(device, conversation))
        conversation.send("wheel", name=wheel, offset=0, size=(device.house / wheel).stat().st_size)
        conversation._write((device.house / wheel).read_bytes()[:size])
        conversation.end()


FINISH = {
    "imports": ["ai_edge_litert.interpreter"], "online": False, "replace": False, "timeout_s": 60, "install_s": 60
}  # fmt: skip


def test_a_damaged_wheel_is_refused_on_the_device(device):
    with contextlib.closing(device.transport()) as transport, Conversation(transport, None, MORE) as conversation:
        begin = _begin(device, conversation)
        conversation.ask("install-begin", **begin)
        for name, size, _ in begin["files"]:  # type: ignore[attr-defined]
            conversation.send("wheel", name=name, offset=0, size=size)
            conversation._write(bytes(size) if name.startswith("numpy") else (device.house / name).read_bytes())
        with pytest.raises(DeviceError, match=r"numpy-2.0.0-py3-none-any.whl arrived damaged or not at all"):
            conversation.ask("install-finish", **FINISH)
    assert device.venvs.names() == []
    assert device.provision().sent_bytes == (device.house / "numpy-2.0.0-py3-none-any.whl").stat().st_size


@pytest.mark.parametrize(
    ("op", "request_", "words"),
    [
        ("wheel", {"name": "x.whl", "offset": 0, "size": 1}, "at the wrong moment of an installation"),
        ("install-finish", FINISH, "at the wrong moment of an installation"),
        ("install-begin", {"files": [["../x.whl", 1, "0" * 64]]}, "an entry '../x.whl' that is none"),
        ("install-begin", {"files": [["x.whl", -1, "0" * 64]]}, "an entry 'x.whl' that is none"),
        ("install-begin", {"files": [["x.whl", True, "0" * 64]]}, "is not one of names, sizes and hashes"),
        ("install-begin", {"files": [["x.whl", 1, "0"]]}, "an entry 'x.whl' that is none"),
        ("install-begin", {"files": [["x.whl", 1, "0" * 64]]}, "has no pip in it"),
        ("install-begin", {"files": "x.whl"}, "has no valid 'files'"),
        ("install-begin", {"requirements": None, "files": []}, "has no valid 'requirements'"),
    ],
)  # fmt: skip
def test_a_request_that_makes_no_sense_is_refused(tmp_path, op, request_, words):
    begin = {"requirements": "", "engines": [], "python": None, "who": "the tests", "wait_s": 0}
    request = {**begin, **request_} if op == "install-begin" else request_
    transport = open_transport(f"local:{tmp_path}")
    with Conversation(transport, None, MORE) as conversation, pytest.raises(DeviceError, match=words):
        conversation.ask(op, **request)
    assert not list(tmp_path.glob("venvs/*"))


def test_a_disk_with_too_little_space_is_refused_before_a_byte_is_sent(device, tmp_path):
    with small_disk(tmp_path / "disk", "20m"):
        store = tmp_path / "disk" / "store"
        with pytest.raises(DeviceError, match=r"the environment needs [\d,]+ bytes, the device has [\d,]+ free"):
            dataclasses.replace(device, store=store).provision()
        assert not (store / "staging").exists() and not (store / "venvs").exists()


def test_a_disk_that_fills_up_keeps_what_was_sent(device, tmp_path):
    with small_disk(tmp_path / "disk", "64m"):
        full = dataclasses.replace(device, store=tmp_path / "disk" / "store")

        def fill(step: str) -> None:
            if step.startswith("install"):
                with contextlib.suppress(OSError), (tmp_path / "disk" / "filler").open("ab", buffering=0) as file:
                    while True:
                        file.write(bytes(4096))

        options = ProvisionOptions(("tflite",), offline=True, wheelhouse=device.house)
        with pytest.raises(DeviceError, match=r"storage.* is full; free some space"):
            provision(full.transport(), options, progress=fill)
        assert full.venvs.names() == [] and full.venvs.current() is None
        (tmp_path / "disk" / "filler").unlink()
        assert full.provision().sent_bytes == 0


def test_the_device_downloads_by_itself_what_the_host_locked(device, monkeypatch, tmp_path):
    """From an index on this machine that both ask; the device is sent edge-infer and pip alone."""
    index = tmp_path / "index"
    small_engine(index, "2.0")
    shutil.rmtree(device.house)
    with simple_index(index) as (url, asked):
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.delenv("PIP_FIND_LINKS")
        monkeypatch.setenv("PIP_INDEX_URL", url)
        done = device.provision(offline=False)
        assert [step.action for step in done.steps] == ["send", "send", "download there", "install", "import", "switch"]
        assert device.versions() == "2.0"
        assert any(path.endswith(".whl") for path in asked)
        # The index has something else under the same name by now, which the lock does not have.
        make_wheel(index, "numpy", "2.0.0", files={"numpy/__init__.py": "evil = True"})
        other = dataclasses.replace(device, store=tmp_path / "other")
        with pytest.raises(DeviceError, match="has another file than the lock names"):
            other.provision(offline=False)
        assert other.venvs.names() == []
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(DeviceError, match="the device reaches no package index, so use --offline"):
        other.provision(offline=False)


@contextlib.contextmanager
def simple_index(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """A package index on a loopback port (PEP 503), and the paths that were asked of it."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            if not self.path.startswith("/simple/"):
                super().do_GET()
                return
            project = self.path.split("/")[2].replace("-", "_")
            links = [
                f'<a href="/{path.name}#sha256={hash_file(path)}">{path.name}</a>'
                for path in folder.glob(f"{project}-*")
            ]
            page = f"<!DOCTYPE html><html><body>{''.join(links)}</body></html>".encode()
            self.send_response(200 if links else 404)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/simple/", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_an_interrupted_installation_is_made_anew(device):
    name = device.provision(dry_run=True).environment
    (device.venvs.path(name) / "lib").mkdir(parents=True)  # without the marker that is written last
    assert device.venvs.current() is None
    assert device.provision().environment == name and device.versions() == "2.0"


def test_an_environment_that_was_damaged_is_made_anew_beside_it(device):
    first = device.provision()
    engine = next(device.venvs.path(first.environment).glob("lib/python3*/site-packages/ai_edge_litert/interpreter.py"))
    engine.write_bytes(bytes(4096))  # as a card has it after a power cut
    planned = device.provision(dry_run=True)
    assert {step.action for step in planned.steps} >= {"send", "install", "switch"}
    mended = device.provision()
    assert mended.environment == f"{first.environment}-2" == device.venvs.current()
    assert mended.replaced == first.environment
    again = device.provision()
    assert (again.sent_bytes, again.environment) == (0, mended.environment)
    with contextlib.closing(device.transport()) as transport, pytest.raises(SelfTestFailed, match="cannot be imported"):
        switch_back(transport)
    device.next("2.1")  # the damaged one goes, and the mended one is what a rollback finds
    assert device.venvs.previous() == mended.environment and first.environment not in device.venvs.names()
    assert device.provision().environment == mended.environment


def test_an_installation_that_lost_its_host_keeps_others_out(device):
    device.store.mkdir()
    with device.venvs.hold(), pytest.raises(DeviceError, match="an installation that lost its host still runs"):
        device.provision()
    assert device.provision().environment == device.venvs.current()


def test_a_lock_for_another_device_installs_nothing_there(device, monkeypatch, tmp_path):
    """Wheels are matched with the device's own facts, whatever the folder is called."""
    device.provision()
    lock = next(device.house.glob("*.txt"))
    foreign = "ai_edge_litert-2.0-cp38-cp38-manylinux2014_s390x"
    lock.write_text(lock.read_text().replace("ai_edge_litert-2.0-py3-none-any", foreign))
    only_this_index(monkeypatch, tmp_path)
    with pytest.raises(EngineMissing, match=r"no wheel of \S+ is made for CPython"):
        device.provision()


# -- pure decisions ----------------------------------------------------------------------------------------------------

FACTS = {
    "platform": {
        "python": "3.11.2", "implementation": "cpython", "abi": "cp311", "machine": "aarch64", "bits": 64,
        "libc": "glibc", "libc_version": "2.36", "venv": True,
    },
    "by_hand": False, "store": "/home/pi/.edge-infer", "engines": [], "formats": [],
}  # fmt: skip


@pytest.mark.parametrize(
    ("engines", "formats", "chosen"),
    [
        ([], [], ["tflite"]),
        ([], ["onnx", "torchscript"], ["onnx", "torch"]),
        (["tflite-runtime"], ["tflite", "onnx"], ["tflite-runtime", "onnx"]),
        (["onnx"], [], ["onnx"]),
        (["of-a-later-version"], ["onnx"], ["onnx"]),
    ],
)
def test_engines_where_none_is_named(engines, formats, chosen):
    assert default_engines({**FACTS, "engines": engines, "formats": formats}) == chosen


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"python": "3.9.2", "abi": "cp39"}, r"its Python is 3.9.2, expected 3.10 or later"),
        ({"venv": False}, r"has no venv module; install it there \(Debian: sudo apt install python3-venv\)"),
        ({"implementation": "pypy"}, "pi: the device's Python is pypy"),
    ],
)
def test_devices_on_which_no_environment_can_be_made(changes, words):
    with pytest.raises(DeviceError, match=words):
        check_device("pi", {**FACTS, "platform": {**FACTS["platform"], **changes}}, ProvisionOptions())


def test_a_damaged_wheelhouse_is_told_before_the_device_is_asked_for_anything_more(device):
    device.provision()
    wheel = next(device.house.glob("numpy-*.whl"))
    wheel.write_bytes(wheel.read_bytes() + b"#")
    with pytest.raises(BundleError, match="remove that file"):
        device.provision()
