"""A program in a foreign environment: JSON in, JSON out, with a cap on its memory and its time.

The program is one file that imports nothing of edge_infer. It is called with a folder, reads ``request.json`` there
and leaves ``answer.json``: the answer, or {"refused": sentence} when it explains itself to the user, or
{"failed": words} when its converter raised something.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_infer.errors import ConversionError, UsageError

#: Environment variables that override the caps.
MEMORY_VARIABLE, SECONDS_VARIABLE = "EDGE_INFER_CONVERTER_MEMORY_MB", "EDGE_INFER_CONVERTER_SECONDS"
#: Of the machine's memory; a converter that needs more would drive the machine into swapping.
MEMORY_SHARE = 0.75
#: Networks of some megabytes take seconds; a converter that has not ended by then is lost.
SECONDS = 1800.0
#: How often the memory is looked at.
POLL_S = 0.1

#: What leads an interpreter to modules that are not its own.
FOREIGN = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")


@dataclass(frozen=True)
class Limits:
    """``memory_bytes``: resident memory of the program and its children; ``seconds``: wall clock."""

    memory_bytes: int
    seconds: float


def limits() -> Limits:
    """Three quarters of the machine's memory and half an hour, or what the two variables say. Raises UsageError."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    megabytes = _number(MEMORY_VARIABLE, total * MEMORY_SHARE / 1e6)
    return Limits(int(megabytes * 1e6), _number(SECONDS_VARIABLE, SECONDS))


def _number(variable: str, default: float) -> float:
    text = os.environ.get(variable)
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise UsageError(f"{variable} is {text!r}, expected a number above 0")
    return value


def run(
    name: str, python: Path, main_file: Path, request: Mapping[str, Any], log: Path, limits: Limits
) -> dict[str, Any]:
    """Run ``main_file`` with ``python`` in a process group of its own; gives its answer.

    Raises ConversionError: the program's own sentence where it refused; where it failed, died or was ended for a cap,
    one that says so, with the end of ``log``, which holds what it printed.
    """
    with tempfile.TemporaryDirectory(prefix="edge-infer-") as folder:
        (Path(folder) / "request.json").write_text(json.dumps(request))
        with log.open("ab") as output:
            process = subprocess.Popen(
                [str(python), "-I", str(main_file), folder],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=folder,
                env={**clean_environment(), "TMPDIR": folder},
                start_new_session=True,
            )
            try:
                broken = _watch(process, limits)
            finally:
                status = end(process)
        answer = _answer(Path(folder) / "answer.json")
    if broken or answer is None:
        raise ConversionError(f"the converter {name} {broken or _death(status)}", _text(log))
    if "refused" in answer:
        raise ConversionError(answer["refused"])
    if "failed" in answer:
        raise ConversionError(f"the converter {name} failed: {answer['failed']}", _text(log))
    return answer


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in FOREIGN}


def _watch(process: subprocess.Popen[Any], limits: Limits) -> str:
    """Wait for the end; gives which cap was broken, in words, or nothing."""
    deadline = time.monotonic() + limits.seconds
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(POLL_S)
            return ""
        if time.monotonic() > deadline:
            return f"had not ended after {limits.seconds:g} s and was stopped; allow more with {SECONDS_VARIABLE}"
        if (used := group_memory(process.pid)) > limits.memory_bytes:
            return (
                f"took {used / 1e6:.0f} MB of memory, {limits.memory_bytes / 1e6:.0f} MB are allowed, and was stopped; "
                f"allow more with {MEMORY_VARIABLE}, or use a machine with more memory"
            )


def group_memory(group: int) -> int:
    """Resident bytes of all processes of a group. Pages they share count for each, so it is rather too much.

    https://www.man7.org/linux/man-pages/man5/proc_pid_stat.5.html
    """
    pages = 0
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError, ValueError, IndexError):
            # The second field, the program's name in parentheses, may hold anything; counted from behind it, the
            # third is the group and the 22nd the resident pages.
            fields = (entry / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()
            if int(fields[2]) == group:
                pages += int(fields[21])
    return pages * os.sysconf("SC_PAGE_SIZE")


def end(process: subprocess.Popen[Any]) -> int:
    """End a process, if it has not ended, and what it left running in its group; gives its status."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.stdout is not None:
        process.stdout.close()
    return process.wait()


def _answer(path: Path) -> dict[str, Any] | None:
    """What the program left; None when it left nothing or broke off."""
    try:
        answer = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return answer if isinstance(answer, dict) else None


def _death(status: int) -> str:
    if status >= 0:
        return f"ended with status {status} and no answer; run again with -v to see its output"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    reason = " (out of memory?)" if status == -signal.SIGKILL else ""
    return f"was ended by {name}{reason}; run again with -v to see its output"


def _text(log: Path) -> str:
    return log.read_text("utf-8", "replace")[-20_000:]
