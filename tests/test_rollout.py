"""The rules of a rollout, on many devices at once: what starts when, what ends it, what the report keeps."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from pathlib import Path

import pytest
from conftest import SOURCES

from edge_infer.bundle import Bundle
from edge_infer.deploy.conversation import open_transport
from edge_infer.deploy.inventory import Device
from edge_infer.deploy.push import Pushed
from edge_infer.deploy.rollout import Amount, Job, Policy, Rollout, assign
from edge_infer.deploy.rollout_report import Report, Row, resume
from edge_infer.errors import DeviceError, SelfTestFailed, Unreachable, UsageError


@pytest.fixture(scope="session")
def bundle(packaged) -> Bundle:  # type: ignore[no-untyped-def]
    return packaged(SOURCES["onnx"], "onnx", "float32")


def device(name: str, target: str | None = None) -> Device:
    return Device(name, f"local:/tmp/{name}", ("all",), target, None, None, None, None, {})


class Quiet:
    def step(self, row: Row, step: str) -> None:
        pass

    def ended(self, row: Row) -> None:
        pass


class Devices:
    """Answers as ``wrong`` says, by device, and notes who was asked, and how many at once."""

    def __init__(self, bundle: Bundle, count: int, wrong: dict[str, Exception] | None = None) -> None:
        self.jobs = [Job(device(f"pi-{number}"), bundle) for number in range(count)]
        self.rows = [Row(job.device.name, job.device.address, bundle.digest) for job in self.jobs]
        self.wrong = wrong or {}
        self.asked: list[str] = []
        self.most = self._now = 0
        self.at_first_end = 0
        self._lock = threading.Lock()
        self.pause_s = 0.0

    def send(self, job: Job, way: object, progress: object) -> Pushed:
        with self._lock:
            self.asked.append(job.device.name)
            self._now += 1
            self.most = max(self.most, self._now)
        time.sleep(self.pause_s)
        with self._lock:
            self.at_first_end = self.at_first_end or self._now
            self._now -= 1
        if job.device.name in self.wrong:
            raise self.wrong[job.device.name]
        return Pushed(job.device.address, job.bundle.digest, (), 7, None, {})

    def roll_out(self, path: Path | None = None, **policy: object) -> Report:
        report = Report(path, self.rows, {})
        rules = Policy(**{"parallel": 1, **policy})  # type: ignore[arg-type]
        Rollout(self.jobs, rules, report, lambda device: open_transport(device.address), self.send, Quiet()).run()
        return report


def amount(text: str) -> Amount:
    return Amount.parse(text)


# -- amounts and groups ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "total", "expected"),
    [("3", 200, 3), ("10%", 200, 20), ("10%", 5, 1), ("33.3%", 10, 4), ("100%", 7, 7), ("0", 7, 0), ("0%", 7, 0)],
)
def test_an_amount_is_rounded_up(text, total, expected):
    assert amount(text).of(total) == expected


@pytest.mark.parametrize("text", ["", "x", "-1", "10 %%", "101%", "1.5", "%"])
def test_what_is_no_amount_is_refused(text):
    with pytest.raises(UsageError, match="is no amount of devices"):
        amount(text)


@pytest.mark.parametrize(
    ("text", "failed", "total", "exceeded"),
    [
        ("5%", 1, 20, False),
        ("5%", 2, 20, True),
        ("5%", 1, 19, True),
        ("0", 1, 20, True),
        ("2", 2, 9, False),
        ("2", 3, 9, True),
    ],
)
def test_a_threshold_is_exceeded_by_more_than_it(text, failed, total, exceeded):
    assert amount(text).is_exceeded(failed, total) is exceeded


def test_the_canary_and_batches_of_a_share_of_all_devices():
    groups = Policy(canary=amount("1"), batch=amount("10%")).groups(25)
    assert [len(group) for group in groups] == [1, *[3] * 8]
    assert [place for group in groups for place in group] == list(range(25))
    assert [len(group) for group in Policy().groups(25)] == [1, 24]
    assert [len(group) for group in Policy(canary=amount("0")).groups(25)] == [0, 25]
    assert [len(group) for group in Policy(canary=amount("30")).groups(25)] == [25]


@pytest.mark.parametrize("wrong", [{"parallel": 0}, {"batch": Amount(0, True)}, {"batch": Amount(0, False)}])
def test_a_policy_that_means_nothing_is_refused(wrong):
    with pytest.raises(UsageError):
        Policy(**wrong)


# -- bundles -----------------------------------------------------------------------------------------------------------


def for_target(bundle: Bundle, name: str, model: str = "digits") -> Bundle:
    target = dataclasses.replace(bundle.manifest.target, name=name)
    manifest = dataclasses.replace(bundle.manifest, target=target, name=model)
    return Bundle(Path(f"{model}-{name}.edge"), manifest, f"{model}-{name}")


def test_each_device_gets_the_bundle_built_for_it(bundle):
    four, five = for_target(bundle, "pi-4"), for_target(bundle, "pi-5")
    jobs = assign([device("a", "pi-5"), device("b", "pi-4"), device("c", "pi-5")], [four, five])
    assert [job.bundle for job in jobs] == [five, four, five]
    assert assign([device("a")], [four])[0].bundle is four


@pytest.mark.parametrize(
    ("target", "bundles", "words"),
    [
        (
            "jetson",
            [("pi-4", "digits"), ("pi-5", "digits")],
            "a is a jetson, and the bundles are for pi-4, pi-5",
        ),
        (None, [("pi-4", "digits"), ("pi-5", "digits")], "device a has no target"),
        ("pi-4", [("pi-4", "digits"), ("pi-5", "faces")], "expected one model"),
    ],
)
def test_bundles_that_do_not_fit_the_devices_are_refused(bundle, target, bundles, words):
    with pytest.raises(UsageError, match=words):
        assign([device("a", target)], [for_target(bundle, *names) for names in bundles])


def test_two_bundles_for_one_target_are_refused(bundle):
    other = dataclasses.replace(for_target(bundle, "pi-4"), digest="another")
    with pytest.raises(UsageError, match="are both for pi-4"):
        assign([device("a", "pi-4")], [for_target(bundle, "pi-4"), other])


# -- thresholds --------------------------------------------------------------------------------------------------------


def test_devices_are_started_in_the_order_of_the_inventory(bundle):
    devices = Devices(bundle, 40)
    report = devices.roll_out(batch=amount("10%"))
    assert devices.asked == [row.device for row in devices.rows]
    assert report.counts() == {"done": 40} and report.reason is None
    assert [row.group for row in devices.rows][:9] == [0, 1, 1, 1, 1, 2, 2, 2, 2]


def test_never_more_at_once_than_asked_for(bundle):
    devices = Devices(bundle, 60)
    devices.pause_s = 0.01
    devices.roll_out(parallel=7)
    assert devices.most == 7


def test_it_begins_with_few_at_once(bundle):
    devices = Devices(bundle, 8)
    devices.pause_s = 0.2
    devices.roll_out(parallel=100, canary=amount("0"))
    assert devices.at_first_end == 4


def test_a_canary_that_fails_ends_it(bundle):
    devices = Devices(bundle, 20, {"pi-1": SelfTestFailed("wrong")})
    report = devices.roll_out(canary=amount("3"))
    assert devices.asked == ["pi-0", "pi-1"]
    assert report.counts() == {"done": 1, "failed": 1, "not started": 18}
    assert report.reason == "1 of the 3 devices of the canary failed, allowed are 0"


def test_an_unreachable_canary_proves_nothing(bundle):
    devices = Devices(bundle, 20, {"pi-0": Unreachable("gone")})
    report = devices.roll_out()
    assert report.counts() == {"unreachable": 1, "not started": 19}
    assert "canary pi-0 is unreachable" in str(report.reason)


def test_it_ends_as_soon_as_more_of_a_batch_failed_than_allowed(bundle):
    """Batches of 20 of 201: the second, pi-21 to pi-40, loses two, where 5 % are one."""
    wrong = {f"pi-{number}": SelfTestFailed("wrong") for number in (5, 25, 30)}
    devices = Devices(bundle, 201, wrong)
    report = devices.roll_out(batch=amount("20"))
    assert devices.asked[-1] == "pi-30" and len(devices.asked) == 31
    assert report.reason == "2 of the 20 devices of batch 2 failed, allowed are 5%"


def test_pushes_under_way_come_to_their_end(bundle):
    devices = Devices(bundle, 41, {f"pi-{number}": SelfTestFailed("wrong") for number in range(1, 41)})
    devices.pause_s = 0.02
    report = devices.roll_out(parallel=8)
    # Three failures are more than 5 % of 40; by then some more had been started, and they are through.
    assert set(report.counts()) == {"done", "failed", "not started"}
    assert 3 <= report.counts()["failed"] <= 2 + 8


def test_unreachable_devices_end_nothing(bundle):
    wrong = {f"pi-{number}": Unreachable("gone") for number in range(1, 20)}
    report = Devices(bundle, 20, wrong).roll_out(abort_after=amount("0"))
    assert report.counts() == {"done": 1, "unreachable": 19} and report.reason is None


def test_a_lost_connection_is_unreachable_whatever_is_made_of_it(bundle):
    def lost() -> DeviceError:
        try:
            try:
                raise Unreachable("the connection is lost")
            except DeviceError as error:
                raise DeviceError(f"pi-1: {error}") from None
        except DeviceError as error:
            return error

    report = Devices(bundle, 2, {"pi-1": lost()}).roll_out()
    assert report.counts() == {"done": 1, "unreachable": 1}


def test_an_unexpected_error_ends_it_and_is_raised(bundle, tmp_path):
    devices = Devices(bundle, 20, {"pi-3": ZeroDivisionError("bug")})
    with pytest.raises(ZeroDivisionError):
        devices.roll_out(tmp_path / "report.json")
    written = json.loads((tmp_path / "report.json").read_bytes())
    assert written["counts"] == {"done": 3, "failed": 1, "not started": 16}
    assert "ZeroDivisionError('bug')" in written["reason"]


# -- the report --------------------------------------------------------------------------------------------------------


def test_the_report_is_whole_after_every_device(bundle, tmp_path):
    path = tmp_path / "report.json"
    devices = Devices(bundle, 10)
    seen = []
    send = devices.send

    def looking(*arguments: object) -> Pushed:
        seen.append(json.loads(path.read_bytes())["counts"].get("done", 0))
        return send(*arguments)  # type: ignore[arg-type]

    devices.send = looking  # type: ignore[method-assign]
    devices.roll_out(path)
    assert seen == list(range(10))
    assert list(tmp_path.iterdir()) == [path]
    assert json.loads(path.read_bytes())["ended"]


def resumed(bundle: Bundle, path: Path, count: int, retry_failed: bool = False) -> Devices:
    devices = Devices(bundle, count)
    resume(devices.rows, path, retry_failed)
    return devices


def test_resuming_tries_what_was_unreachable_or_not_started(bundle, tmp_path):
    path = tmp_path / "report.json"
    wrong = {"pi-2": Unreachable("gone"), "pi-3": SelfTestFailed("wrong"), "pi-4": SelfTestFailed("wrong")}
    assert Devices(bundle, 12, wrong).roll_out(path, abort_after=amount("1")).reason
    again = resumed(bundle, path, 12)
    report = again.roll_out(path)
    assert again.asked == ["pi-2", *[f"pi-{number}" for number in range(5, 12)]]
    # Failures of the run before are known: they do not end this one.
    assert report.reason is None and report.counts() == {"done": 10, "failed": 2}
    last = resumed(bundle, path, 12, retry_failed=True)
    assert last.roll_out(path).counts() == {"done": 12} and last.asked == ["pi-3", "pi-4"]


def test_resuming_with_another_bundle_tries_every_device(bundle, tmp_path):
    Devices(bundle, 3).roll_out(tmp_path / "report.json")
    other = Bundle(bundle.path, bundle.manifest, "f" * 64)
    again = resumed(other, tmp_path / "report.json", 3)
    again.roll_out()
    assert len(again.asked) == 3


def test_resuming_goes_no_further_while_the_canary_has_failed(bundle, tmp_path):
    path = tmp_path / "report.json"
    Devices(bundle, 5, {"pi-0": SelfTestFailed("wrong")}).roll_out(path)
    again = resumed(bundle, path, 5)
    assert "--retry-failed" in str(again.roll_out(path).reason) and not again.asked
    assert resumed(bundle, path, 5, retry_failed=True).roll_out(path).counts() == {"done": 5}


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "devices": [{}]}', '{"format": 1, "devices": [3]}']
)
def test_what_is_no_report_is_refused(tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(UsageError, match="is no report of a rollout"):
        resume([], tmp_path / "report.json", False)


# -- stopping ----------------------------------------------------------------------------------------------------------


def test_stopping_notes_what_is_through_and_gives_up_the_rest(bundle, tmp_path):
    devices = Devices(bundle, 6)
    report = Report(tmp_path / "report.json", devices.rows, {})
    hanging = threading.Event()

    def send(job: Job, way: object, progress: object) -> Pushed:
        if job.device.name == "pi-2":
            rollout.stop("stopped by SIGINT")
            hanging.wait(30)
        return devices.send(job, way, progress)

    policy = Policy(parallel=1)
    rollout = Rollout(devices.jobs, policy, report, lambda device: open_transport(device.address), send, Quiet())
    begun = time.monotonic()
    rollout.run()
    hanging.set()
    assert time.monotonic() - begun < 10
    written = json.loads((tmp_path / "report.json").read_bytes())
    assert written["counts"] == {"done": 2, "stopped": 1, "not started": 3}
    assert written["reason"] == "stopped by SIGINT" and written["ended"]
