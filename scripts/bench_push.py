"""A push beside scp, rsync and SFTP, over a real OpenSSH server behind a link with a delay (tests/link.py).

100 MB    one bundle of 100 MB
200 files one bundle of 200 files of 64 KiB each
again     the 100 MB once more, when they are there already

The ways take turns, each run begins with another, and each figure is the median over runs. All use the same server, the
same key and the same link. What the seconds contain:

edge_infer whole     hashing the bundle here, connection, the receiver that is sent along, the device's facts, the
                     bytes, hashing and fsync there, the self-test with the real engine in a child, the pointer
edge_infer transfer  the same until the last byte was at the device, and half a round trip to know it
scp -r, rsync -rtW   the whole program: connection and bytes. Nothing is hashed, tested or brought to the disk by fsync
SFTP                 paramiko's put, file after file, with its defaults
sync                 what `sync` takes after them, which they leave to the reader
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bench_push_docs
import paramiko
from bench import CORES, processor
from bench_cases import ROOT, bundle_of

sys.path.insert(0, str(ROOT / "tests"))
from handmade import rebuild
from link import LinkProcess
from sshd import SshServer

from edge_infer.bundle import Bundle, open_bundle
from edge_infer.deploy.plan import PushOptions
from edge_infer.deploy.push import push
from edge_infer.deploy.ssh import SshTransport

ROUND_TRIPS_MS = (0, 40, 200)
#: The digits network, whose self-test is real, and files beside it that make the size.
MODEL = "digits-tflite-float32"
CASES = ("100 MB", "200 files", "again")
ATTACHED = {"100 MB": (1, 100_000_000), "200 files": (198, 64 * 1024)}
WAYS = ("edge_infer", "scp", "rsync", "SFTP")
#: scp and SFTP have no notion of what is there already.
WAYS_OF = {"again": ("edge_infer", "rsync")}

Figures = dict[str, float]


class Course:
    """The server, the link before it, and a folder there that stands for the device's disk."""

    def __init__(self, server: SshServer, link: LinkProcess, delay_s: float, store: Path) -> None:
        self.server, self.link, self.delay_s, self.store = server, link, delay_s, store
        self.config = server.directory / f"link_config-{link.port}"
        self.config.write_text(
            server.alias_block(f"Port {link.port}", f"HostKeyAlias {server.known_name}", "BatchMode yes"), "utf-8"
        )

    def run(self, way: str, bundle: Bundle) -> Figures:
        """The seconds of one way, and of the `sync` after it."""
        figures = self._push(bundle) if way == "edge_infer" else self._copy(PEERS[way], bundle)
        begin = time.perf_counter()
        os.sync()
        return {**figures, "sync_s": time.perf_counter() - begin}

    def _push(self, bundle: Bundle) -> Figures:
        begin = time.monotonic_ns()
        with contextlib.closing(SshTransport(self.server.alias, ssh_config=self.config)) as transport:
            push(open_bundle(bundle.path), transport, PushOptions(python=sys.executable))
        whole_s = (time.monotonic_ns() - begin) / 1e9
        arrived_s = (self.link.counts()["bulk_ns"] - begin) / 1e9
        return {"whole_s": whole_s, "transfer_s": arrived_s + self.delay_s}

    def _copy(self, send: Callable[[Course, Path, Path], None], bundle: Bundle) -> Figures:
        folder = self.store / "copy"
        folder.mkdir(parents=True, exist_ok=True)
        begin = time.monotonic_ns()
        send(self, bundle.path, folder)
        return {"whole_s": (time.monotonic_ns() - begin) / 1e9}


def scp(course: Course, source: Path, folder: Path) -> None:
    subprocess.run(["scp", "-qr", "-F", course.config, source, f"{course.server.alias}:{folder}/"], check=True)


def rsync(course: Course, source: Path, folder: Path) -> None:
    shell = f"ssh -F {course.config}"
    subprocess.run(["rsync", "-rtW", "-e", shell, source, f"{course.server.alias}:{folder}/"], check=True)


def sftp(course: Course, source: Path, folder: Path) -> None:
    server, port = course.server, course.link.port
    known_hosts = course.config.with_suffix(".known")
    known_hosts.write_text(f"[{server.host}]:{port} {server.host_key()}\n", "ascii")
    with paramiko.SSHClient() as client:
        client.load_host_keys(str(known_hosts))
        identity = str(server.identity)
        client.connect(server.host, port, server.user, key_filename=identity, allow_agent=False, look_for_keys=False)
        files = client.open_sftp()
        files.mkdir(str(folder / source.name))
        for path in sorted(source.iterdir()):
            files.put(str(path), str(folder / source.name / path.name))


PEERS = {"scp": scp, "rsync": rsync, "SFTP": sftp}


def measure(course: Course, case: str, bundle: Bundle, runs: int) -> dict[str, Figures]:
    """Medians by way."""
    ways = WAYS_OF.get(case, WAYS)
    figures: dict[str, list[Figures]] = {way: [] for way in ways}
    for number in range(runs):
        for way in (*ways[number % len(ways) :], *ways[: number % len(ways)]):
            shutil.rmtree(course.store, ignore_errors=True)
            if case == "again":
                course.run(way, bundle)
            figures[way].append(course.run(way, bundle))
            print(f"  {way} {figures[way][-1]['whole_s']:.2f} s", file=sys.stderr, flush=True)
    return {
        way: {name: statistics.median(row[name] for row in rows) for name in rows[0]} for way, rows in figures.items()
    }


def make_bundles(folder: Path) -> dict[str, Bundle]:
    """By case."""
    model = open_bundle(bundle_of(MODEL))
    made = {
        case: rebuild(model, folder / f"{case.replace(' ', '-')}.edge", partial(attach, count=count, size=size))
        for case, (count, size) in ATTACHED.items()
    }
    return {**made, "again": made["100 MB"]}


def attach(folder: Path, count: int, size: int) -> None:
    source = random.Random(1)
    for number in range(count):
        (folder / f"attached-{number:03}.bin").write_bytes(source.randbytes(size))


@contextlib.contextmanager
def courses(folder: Path, round_trips_ms: list[int]) -> Iterator[dict[int, Course]]:
    """By round trip in ms."""
    store = folder / "device"
    with contextlib.ExitStack() as stack:
        # A plain account: what this machine's own start-up files take would be in every figure.
        home = folder / "home"
        home.mkdir()
        options = [f"SetEnv HOME={home} PATH=/usr/bin:/bin EDGE_INFER_HOME={store / 'store'}"]
        server = stack.enter_context(SshServer(folder / "sshd", options=options))
        yield {
            ms: Course(server, stack.enter_context(LinkProcess(server.port, delay_s=ms / 2e3)), ms / 2e3, store)
            for ms in round_trips_ms
        }


def surroundings(runs: int) -> dict[str, Any]:
    """What the figures depend on."""
    ssh = subprocess.run(["ssh", "-V"], check=True, capture_output=True, text=True).stderr.split(",")[0]
    rsync = subprocess.run(["rsync", "--version"], check=True, capture_output=True, text=True).stdout.split()[2]
    return {
        "processor": processor(),
        "cores": CORES,
        "python": platform.python_version(),
        "versions": {"paramiko": version("paramiko"), "OpenSSH": ssh.split("_")[1].split()[0], "rsync": rsync},
        "runs": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, metavar="CASE")
    parser.add_argument("--round-trips", nargs="+", type=int, default=ROUND_TRIPS_MS, metavar="MS")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--docs", action="store_true", help="write docs/push.json and the tables of push-benchmark.md")
    args = parser.parse_args()
    for program in ("scp", "rsync"):
        if shutil.which(program) is None:
            sys.exit(f"{program} is not installed (Debian: apt-get install openssh-client rsync)")
    results: dict[str, dict[str, dict[str, Figures]]] = {}
    with tempfile.TemporaryDirectory(prefix="edge-infer-bench-push-") as name:
        folder = Path(name)
        bundles = make_bundles(folder)
        sizes = {case: bundles[case].manifest.size for case in args.cases}
        with courses(folder, args.round_trips) as each:
            for case in args.cases:
                for ms, course in each.items():
                    print(f"{case}, {ms} ms ...", file=sys.stderr, flush=True)
                    results.setdefault(case, {})[str(ms)] = measure(course, case, bundles[case], args.runs)
    report = {"surroundings": surroundings(args.runs), "sizes": sizes, "results": results}
    bench_push_docs.show(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.docs:
        bench_push_docs.write(report)


if __name__ == "__main__":
    main()
