"""A short run of scripts/fuzz_receiver.py: whatever is said to a receiver, it refuses or does what was asked."""

from __future__ import annotations

import importlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_infer.bundle import Bundle
from edge_infer.deploy.receiver import Receiver
from edge_infer.errors import DeviceError

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@pytest.fixture(scope="module")
def fuzz() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield importlib.import_module("fuzz_receiver")


@pytest.fixture(scope="module")
def said(fuzz: Any) -> Any:
    return importlib.import_module("fuzz_conversations")


@pytest.fixture(scope="module")
def bundle(packaged: Callable[..., Bundle]) -> Bundle:
    return packaged("torch.onnx", "onnx", "int8")


@pytest.fixture(scope="module")
def device(fuzz: Any, bundle: Bundle) -> Iterator[Any]:
    with fuzz.device(bundle) as found:
        yield found


def failures(found: dict[str, dict[str, int]]) -> list[str]:
    return [outcome for outcomes in found.values() for outcome in outcomes if outcome.startswith("FAILED")]


def test_conversations_are_answered_or_refused(fuzz: Any, said: Any, device: Any) -> None:
    count = 3 * len(said.TURNS)
    found = fuzz.conversations(device, 7, range(count))
    assert failures(found) == []
    assert set(found) == set(said.FAMILIES)
    refused = sum(n for outcomes in found.values() for outcome, n in outcomes.items() if outcome.startswith("refused"))
    assert count * 0.5 < refused < count * 0.95
    assert found["valid"]["answered"] >= 1


def test_manifests_are_read_or_refused(fuzz: Any, bundle: Bundle) -> None:
    found = fuzz.read_manifests(bundle.manifest.to_bytes(), 7, range(2001))
    assert failures({"": found}) == []
    assert sum(found.values()) == 2001 and found["read"] > 20 and found["refused: BundleError"] > 1000


def test_a_conversation_is_made_again_from_its_number(said: Any, device: Any, bundle: Bundle, fuzz: Any) -> None:
    for number in range(len(said.TURNS)):
        one, two = (said.case(device.host, 3, number) for _ in range(2))
        assert (one.family, one.data, one.planted) == (two.family, two.data, two.planted)
        assert fuzz.manifest_case(bundle.manifest.to_bytes(), 3, number) == fuzz.manifest_case(
            bundle.manifest.to_bytes(), 3, number
        )


def test_every_request_is_among_them_with_all_its_fields(said: Any, device: Any) -> None:
    """A request that is added to the receiver is tried without a word here."""
    asked: dict[str, set[str]] = {}
    for number in range(400):
        for one in device.host.conversation(said.random.Random(number)):
            asked.setdefault(one.request["op"], set()).update(one.request)
    assert {op: {"op", "store", *fields} for op, fields in said.FIELDS.items()} == asked
    assert {"begin", "finish", "rollback", "install-begin"} <= asked.keys()


# -- what it would find ------------------------------------------------------------------------------------------------


def beginning(said: Any, device: Any, silent: bool = False) -> Any:
    return said.Case("valid", device.host.request("begin").to_bytes(), silent=silent)


def unready(self: Receiver, request: dict[str, Any]) -> dict[str, Any]:
    raise KeyError("health")


def outside(self: Receiver, request: dict[str, Any]) -> dict[str, Any]:
    (self.store.root.parent / "escaped").write_bytes(b"x")
    return {}


def by_another_process(self: Receiver, request: dict[str, Any]) -> dict[str, Any]:
    os.system(f"touch {self.store.root.parent}/canary/new")
    return {}


def hanging(self: Receiver, request: dict[str, Any]) -> dict[str, Any]:
    time.sleep(60)
    return {}


def greedy(self: Receiver, request: dict[str, Any]) -> dict[str, Any]:
    return {"size": len([bytes(2**20) for _ in range(1000)])}


def talking(self: Receiver, request: dict[str, Any]) -> dict[str, Any]:
    self.told.write(b"progress: 50 %\n")
    return {}


def warning(self: Receiver, request: dict[str, Any]) -> dict[str, Any]:
    os.write(2, b"a warning\n")
    return {}


def dying(self: Receiver, request: dict[str, Any]) -> dict[str, Any]:
    os.abort()


def spoiling(self: Receiver, request: dict[str, Any]) -> dict[str, Any]:
    (self.store.root / "current" / "digits").write_bytes(b"")
    return {}


def wordless(self: Receiver, request: dict[str, Any]) -> dict[str, Any]:
    raise DeviceError("")


@pytest.mark.parametrize(
    ("wrong", "seen"),
    [
        (unready, "the device cannot do that: KeyError"),
        (outside, "outside the store: open .*/escaped"),
        (by_another_process, "something outside the store was changed"),
        (hanging, "no end within 1 s"),
        (greedy, "the device cannot do that: MemoryError"),
        (talking, "not JSON: b'progress"),
        (warning, "a warning"),
        (dying, "ended with -6"),
        (spoiling, "the store afterwards: BundleError"),
        (wordless, "an error without a word"),
    ],
)
def test_a_wrong_receiver_is_found_out(
    fuzz: Any, said: Any, device: Any, monkeypatch: pytest.MonkeyPatch, wrong: Any, seen: str
) -> None:
    case = beginning(said, device)
    assert device.hold(case) == "answered"
    monkeypatch.setattr(Receiver, "begin", wrong)
    monkeypatch.setattr(fuzz, "SECONDS", 1 if wrong is hanging else 30)
    assert re.match(f"FAILED: {seen}", device.hold(case))


def test_a_silent_host_is_not_waited_for(said: Any, device: Any) -> None:
    assert device.hold(beginning(said, device, silent=True)) == "refused: DeviceError"


def test_a_link_or_pipe_in_the_store_leads_nowhere(said: Any, device: Any) -> None:
    for place in ("staging", "releases", "current", "journal", "cache", "journal/digits", "releases/digits"):
        for kind in ("link", "pipe"):

            def plant(store: Path, place: str = place, kind: str = kind) -> None:
                path = store / place
                if path.exists():
                    path.rename(store / "was")
                path.symlink_to(store.parent / "canary" / "inner") if kind == "link" else os.mkfifo(path)

            case = said.Case("planted", said.join(device.host.push(said.random.Random(1))), plant, f"{place}, {kind}")
            assert not device.hold(case).startswith("FAILED"), (place, kind)


# -- the page ----------------------------------------------------------------------------------------------------------


def test_the_page_is_what_its_figures_give_and_nothing_failed(fuzz: Any, said: Any) -> None:
    report, text = json.loads(fuzz.DATA.read_text()), fuzz.PAGE.read_text()
    assert fuzz.page(report, text) == text
    assert set(report["families"]) == {*said.FAMILIES, "read alone"}
    assert failures(report["families"]) == []
    counts = {family: sum(outcomes.values()) for family, outcomes in report["families"].items()}
    assert counts.pop("read alone") == fuzz.COUNTS["manifests"]
    assert sum(counts.values()) == fuzz.COUNTS["receiver"]
