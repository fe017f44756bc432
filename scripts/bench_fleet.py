#!/usr/bin/env python3
"""A rollout to many devices over one slow link: how long, against what the link needs; what it costs the host.

    python scripts/bench_fleet.py [--devices 20 100 200] [--rtt-ms 100] [--mbit 20] [--bundle-mb 4] [--docs]

The devices are accounts of one real OpenSSH server on this machine: each has a key of its own that leads to a store of
its own, and runs the real receiver and a real self-test with the real engine. All connections go through one link
(tests/link.py) with that round trip and that bandwidth, which they share. The bundle is the digits network for ONNX
with a file of random bytes beside it, so that the self-test is short and nothing can be compressed. The pushing process
is `edge-infer push --inventory`, as a user starts it.

All of it shares this machine's cores, and most of the work is the devices', which they would do on processors of their
own. So the processor time is counted apart: of the pushing process, of the devices (sshd, receivers, self-tests), of
the link.

link      the time that the link needs for the bytes that went through it, over the time that the rollout took
host      processor time of the pushing process, for each device
memory    the largest private memory of the pushing process, looked at ten times a second
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from link import LinkProcess  # noqa: E402
from pages import between, markdown  # noqa: E402
from sshd import SshServer, make_key, public_key  # noqa: E402

from edge_infer.bundle import describe_files, open_bundle, write_bundle  # noqa: E402
from edge_infer.cli.console import print_table, size  # noqa: E402

DIGITS = ROOT / "build" / "bundles" / "digits-onnx.edge"
PAGE = ROOT / "docs" / "fleet.md"
FIGURES = ROOT / "docs" / "fleet.json"
#: What the plan is for, and how often each of these devices asks whether there is a new model.
MANY, EVERY_S = 100_000, 300
#: From linux/prctl.h.
PR_SET_CHILD_SUBREAPER = 36
TICKS = os.sysconf("SC_CLK_TCK")
COLUMNS = ["devices", "at once>", "took>", "the link alone>", "link>", "host>", "memory>", "devices' processor time>"]

PLAN_COLUMNS = ["", "a device", f"{MANY:,} devices"]


def make_bundle(folder: Path, megabytes: float) -> Path:
    """The digits network with random bytes beside it, ``megabytes`` in all."""
    digits = open_bundle(DIGITS)
    files = folder / "files"
    shutil.copytree(digits.path, files)
    (files / "manifest.json").unlink()
    padding = int(megabytes * 1e6) - digits.manifest.size
    (files / "random.bin").write_bytes(random.Random(0).randbytes(padding))
    names = [*digits.manifest.files, "random.bin"]
    manifest = dataclasses.replace(digits.manifest, files=describe_files(files, names))
    return write_bundle(manifest, files, folder / "bench.edge").path


class Devices(SshServer):
    """``count`` accounts of one server. The key of each sets the folder of its store."""

    def __init__(self, folder: Path, count: int) -> None:
        super().__init__(folder / "sshd", options=["PermitUserEnvironment yes"])
        self.folder = folder
        self.names = [f"device-{number:03}" for number in range(1, count + 1)]

    def start(self) -> None:
        super().start()
        lines = []
        (self.folder / "keys").mkdir()
        for name in self.names:
            make_key(self.folder / "keys" / name)
            store = self.folder / "stores" / name
            lines.append(f'environment="EDGE_INFER_HOME={store}" {public_key(self.folder / "keys" / name)}\n')
        (self.directory / "authorized_keys").write_text("".join(lines))

    def inventory(self, port: int) -> Path:
        """All devices, at the link's end."""
        self.known_hosts.write_text(f"[{self.host}]:{port} {self.host_key()}\n")
        path = self.folder / "fleet.toml"
        lines = [
            "[groups.all]",
            f'address = "{self.user}@{self.host}:{port}"',
            'identity = "keys/{name}"',
            f'python = "{sys.executable}"',
            *(f"[devices.{name}]" for name in self.names),
        ]
        path.write_text("\n".join(lines))
        return path

    @property
    def pid(self) -> int:
        assert self._child is not None
        return self._child.pid


def processor_s(pid: int) -> float:
    """Processor time of a process and of all that it has waited for."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(ticks) for ticks in fields[11:15]) / TICKS


def adopt_orphans() -> None:
    """Become the parent of processes below this one that lose theirs, so that their time can be counted: a receiver
    ends a moment after its connection."""
    if ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1):
        raise OSError("this process cannot adopt orphans")


def reap_orphans(own: set[int]) -> float:
    """Processor time of adopted processes that have ended; ``own`` are this process's other children."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    ended = 0.0
    for pid in {int(child) for child in children} - own:
        took_s = processor_s(pid)
        if os.waitpid(pid, os.WNOHANG)[0]:
            ended += took_s
    return ended


def private_bytes(pid: int) -> int:
    """Memory that is the process's alone; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private"))


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder, on a disk and not in memory."""
    with tempfile.TemporaryDirectory(prefix="edge-infer-fleet-", dir="/var/tmp") as folder:
        yield Path(folder)


def roll_out(bundle: Path, count: int, parallel: int, rtt_s: float, bytes_per_s: float) -> dict[str, Any]:
    """One rollout to ``count`` fresh devices; raises unless all of them are done."""
    with (
        scratch() as folder,
        Devices(folder, count) as devices,
        LinkProcess(devices.port, delay_s=rtt_s / 2, bytes_per_s=bytes_per_s) as link,
    ):
        command = [sys.executable, "-m", "edge_infer.cli", "push", str(bundle), "--parallel", str(parallel)]
        which = ["--inventory", str(devices.inventory(link.port)), "--group", "all"]
        options = ["--report", str(folder / "report"), "--known-hosts", str(devices.known_hosts)]
        begun = time.monotonic()
        with (folder / "out").open("wb") as out:
            child = subprocess.Popen([*command, *which, *options], stdout=out, stderr=out)
        most, host_s, orphans_s = 0, 0.0, 0.0
        while child.poll() is None:  # an ended child stays in /proc until then
            most = max(most, private_bytes(child.pid))
            host_s = processor_s(child.pid)
            orphans_s += reap_orphans({child.pid, devices.pid, link.pid})
            time.sleep(0.1)
        took_s = time.monotonic() - begun
        if child.returncode:
            raise RuntimeError((folder / "out").read_text())
        report = json.loads((folder / "report").read_bytes())
        carried = link.counts()
        time.sleep(2)  # the last receivers
        orphans_s += reap_orphans({child.pid, devices.pid, link.pid})
        devices_s, link_s = processor_s(devices.pid), processor_s(link.pid)
    return {
        "devices": count,
        "parallel": parallel,
        "took_s": took_s,
        "link_needs_s": carried["up"] / bytes_per_s,
        "up_bytes": carried["up"],
        "down_bytes": carried["down"],
        "median_push_s": sorted(row["seconds"] for row in report["devices"])[count // 2],
        "host_processor_s": host_s,
        "host_private_bytes": most,
        "devices_processor_s": devices_s + orphans_s,
        "link_processor_s": link_s,
    }


def table(report: dict[str, Any]) -> list[list[str]]:
    """Rows for COLUMNS."""
    return [
        [
            str(row["devices"]),
            str(row["parallel"]),
            f"{row['took_s']:.0f} s",
            f"{row['link_needs_s']:.0f} s",
            f"{row['link_needs_s'] / row['took_s']:.0%}",
            f"{row['host_processor_s'] / row['devices'] * 1000:.0f} ms",
            size(row["host_private_bytes"]),
            f"{row['devices_processor_s'] / row['devices']:.2f} s",
        ]
        for row in report["rollouts"]
    ]


def setting_line(setting: dict[str, Any]) -> str:
    return (
        f"{setting['cores']} cores ({setting['machine']}); {setting['rtt_ms']:g} ms round trip, "
        f"{setting['mbit']:g} Mbit/s shared by all; a bundle of {size(setting['bundle_bytes'])}."
    )


def plan(report: dict[str, Any]) -> list[list[str]]:
    """What the largest rollout's figures come to for MANY devices."""
    most = max(report["rollouts"], key=lambda row: row["devices"])
    host_s, sent = (most[name] / most["devices"] for name in ("host_processor_s", "up_bytes"))
    bundle = report["setting"]["bundle_bytes"]
    return [
        ["pushed: processor time of the host", f"{host_s * 1000:.0f} ms", f"{_time(MANY * host_s)} of one core"],
        ["pushed: bytes of the link", size(sent), f"{size(MANY * sent)}, {_time(MANY * sent / 125e6)} at 1 Gbit/s"],
        ["pulled: questions", f"one in {EVERY_S // 60} minutes", f"{MANY / EVERY_S:.0f} a second"],
        ["pulled: bytes within an hour", size(bundle), f"{MANY * bundle * 8 / 3600 / 1e9:.1f} Gbit/s from caches"],
    ]


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.0f} minutes"


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, os.uname().machine)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[20, 100, 200])
    parser.add_argument("--parallel", type=int, default=32)
    parser.add_argument("--rtt-ms", type=float, default=100)
    parser.add_argument("--mbit", type=float, default=20)
    parser.add_argument("--bundle-mb", type=float, default=4)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures")
    parser.add_argument("--docs", action="store_true", help="write docs/fleet.json and the figures in docs/fleet.md")
    args = parser.parse_args()
    adopt_orphans()
    with scratch() as folder:
        bundle = make_bundle(folder, args.bundle_mb)
        setting = {
            "machine": machine(),
            "cores": len(os.sched_getaffinity(0)),
            "rtt_ms": args.rtt_ms,
            "mbit": args.mbit,
            "bundle_bytes": open_bundle(bundle).manifest.size,
        }
        rollouts = []
        # The first with one push at a time, for comparison.
        for count, parallel in [(args.devices[0], 1), *((count, args.parallel) for count in args.devices)]:
            rollouts.append(roll_out(bundle, count, parallel, args.rtt_ms / 1000, args.mbit * 125e3))
            print(json.dumps(rollouts[-1]), file=sys.stderr, flush=True)
    report = {"setting": setting, "rollouts": rollouts}
    print_table(COLUMNS, table(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.docs:
        FIGURES.write_text(json.dumps(report, indent=1) + "\n")
        page = between(PAGE.read_text(), "scale", [setting_line(setting), "", *markdown(COLUMNS, table(report))])
        PAGE.write_text(between(page, "plan", markdown(PLAN_COLUMNS, plan(report))))


if __name__ == "__main__":
    main()
