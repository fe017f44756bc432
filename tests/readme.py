"""Runs what the README shows: its commands against a real SSH server named kitchen, its Python on that device.

`python tests/readme.py` writes the output of today's code into README.md; test_readme.py compares the two.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from sshd import SshServer

from edge_infer.deploy.conversation import myself

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
CONSOLE = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Tour:
    """The README's surroundings: a host whose ssh_config knows kitchen, and kitchen's store with its own Python."""

    def __init__(self, folder: Path) -> None:
        self.store = folder / "kitchen"
        self.server = SshServer(folder / "sshd", alias="kitchen", options=[f"SetEnv EDGE_INFER_HOME={self.store}"])
        self.home = folder / "home"

    def __enter__(self) -> Tour:
        self.server.start()
        (self.home / ".ssh").mkdir(parents=True)
        shutil.copy(self.server.ssh_config, self.home / ".ssh" / "config")
        # What pip would download: scripts/test has.
        (self.home / ".edge-infer").mkdir()
        (self.home / ".edge-infer" / "wheelhouse").symlink_to(ROOT / "build" / "wheelhouse")
        shutil.rmtree(ROOT / "build" / "tour", ignore_errors=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stop()

    def shell(self, command: str) -> str:
        """What a command of the README prints: its answer, and its one sentence when it fails."""
        environment = {
            **os.environ,
            "HOME": str(self.home),
            "PATH": os.pathsep.join([str(ROOT / ".venv" / "bin"), os.environ["PATH"]]),
            "COLUMNS": "120",
        }
        environment.pop("EDGE_INFER_HOME", None)
        environment.pop("SSH_AUTH_SOCK", None)
        done = subprocess.run(
            ["bash", "-c", command], cwd=ROOT, env=environment, text=True, capture_output=True, check=False
        )
        sentences = [line for line in done.stderr.splitlines() if line.startswith("edge-infer:")]
        lines = [line.rstrip() for line in [*done.stdout.splitlines(), *sentences]]
        return self._anonymous("\n".join(lines) + "\n")

    def python(self, source: str) -> str:
        """What the README's Python prints on the device."""
        done = subprocess.run(
            [str(self.store / "venv" / "bin" / "python"), "-c", source], cwd=ROOT, text=True, check=True,
            stdout=subprocess.PIPE, env={**os.environ, "EDGE_INFER_HOME": str(self.store)},
        )  # fmt: skip
        return done.stdout

    def _anonymous(self, text: str) -> str:
        """The paths of this run as a reader would have them."""
        text = text.replace(str(self.store), "/home/me/.edge-infer").replace(str(ROOT) + "/", "")
        return text.replace(str(self.home), "/home/me").replace(myself(), "me@laptop")


def run_block(tour: Tour, block: str) -> str:
    """A console block with each command followed by what it prints now."""
    commands = re.findall(r"^\$ ((?:.*\\\n)*.*)\n", block, re.MULTILINE)
    return "".join(f"$ {command}\n{tour.shell(command)}" for command in commands)


def between(name: str, text: str, content: str) -> str:
    """``text`` with what lies between the marks of ``name`` replaced."""
    pattern = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    return pattern.sub(lambda match: f"{match[1]}{content}{match[2]}", text)


def section(name: str, text: str) -> str:
    found = re.search(f"<!-- {name} -->\n(.*?)<!-- /{name} -->", text, re.DOTALL)
    assert found is not None, f"the README has no section {name}"
    return found[1]


def masked(text: str) -> str:
    """Output without what differs from run to run: numbers and their units, hashes, alignment."""
    text = re.sub(r"SHA256:[A-Za-z0-9+/]{43}", "KEY", text)
    text = re.sub(r"\b[0-9a-f]{12,64}\b", "HASH", text)
    text = re.sub(r"\d[\d.,]*(e-\d+)? ?([KMG]?B|ms|µs)?\b", "N", text)
    return re.sub(r"[ \t]+", " ", text)


def rerun(text: str, tour: Tour) -> str:
    """The README with the output that its commands and its Python give now, in the order they stand."""
    parts = re.split(r"(^```(?:console|python)\n.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)
    output = ""
    for index, part in enumerate(parts):
        if part.startswith("```console"):
            parts[index] = f"```console\n{run_block(tour, part.removeprefix('```console').removesuffix('```'))}```"
        elif part.startswith("```python"):
            output = tour.python(part.removeprefix("```python\n").removesuffix("```"))
    return between("python output", "".join(parts), f"```text\n{output}```\n")


def quickstart_table() -> str:
    """The table at the end of scripts/quickstart."""
    done = subprocess.run([str(ROOT / "scripts" / "quickstart")], text=True, stdout=subprocess.PIPE, check=True)
    lines = done.stdout.splitlines()
    start = max(index for index, line in enumerate(lines) if line.startswith("bundle "))
    return "```text\n" + "\n".join(line.rstrip() for line in lines[start:-1]) + "\n```\n"


def bench_table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """The benchmark's result for the large float32 networks as a Markdown table."""
    rows = [
        "| 100 MB, float32 | open | open and first answer | private memory | latency, best setting |",
        "|---|---:|---:|---:|---:|",
    ]
    for case, ways in results.items():
        net, format, precision = case.split("-")
        if not net.endswith("100") or precision != "float32":
            continue
        for way, row in ways.items():
            kind = {"conv100": "convolutions", "dense100": "dense layers"}[net]
            label = f"{format}, {kind}, {'plain engine' if way == 'plain' else 'edge_infer'}"
            opened = row["load_ms"] + row["first_ms"]
            latency = row.get("best_p50_ms", row["p50_ms"])
            rows.append(
                f"| {label} | {row['load_ms']:.1f} ms | {opened:.0f} ms | {row['private_bytes'] / 1e6:.1f} MB "
                f"| {latency:.2f} ms |"
            )
    return "\n".join(rows) + "\n"


def main() -> None:
    text = README.read_text()
    text = between("quickstart", text, quickstart_table())
    bench = ROOT / "docs" / "benchmark.json"
    if bench.is_file():
        text = between("bench", text, bench_table(json.loads(bench.read_text())["results"]))
    with tempfile.TemporaryDirectory() as folder, Tour(Path(folder)) as tour:
        text = rerun(text, tour)
    README.write_text(text)


if __name__ == "__main__":
    sys.exit(main())
