"""Run the device command line in a child process, and turn however it ends into a result or a typed error.

A new bundle is opened and self-tested this way first: a crash, a hang, an illegal instruction or the kernel's
out-of-memory killer then ends the child and not the caller. Standard library only, Python >= 3.8: a push sends
this file along.
"""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

from edge_infer import errors
from edge_infer.errors import DeviceError, EdgeInferError, EngineMissing, OutOfMemory, SelfTestFailed

#: A model of few megabytes that has not answered its few golden questions by then never will.
TIMEOUT_S = 120.0

#: What a slow card and processor get through of a model while it is read, laid out, written and read again. Cards of
#: speed class 10 promise 10 MB a second of writing: https://www.sdcard.org/developers/sd-standard-overview/speed-class/
SLOW_BYTES_PER_S = 4_000_000

#: How long the child may take that asks the golden questions, for what it starts itself.
PATIENCE = "EDGE_INFER_PATIENCE_S"

#: An error may quote what it was given, which may be megabytes.
MESSAGE_CHARS = 4000

#: Lets an engine write what it likes to standard error: a crash's last words are read there.
ENGINE_WORDS = "EDGE_INFER_ENGINE_WORDS"

SIGNALS = {
    signal.SIGKILL: "it was killed, most likely for lack of memory",
    signal.SIGILL: "illegal instruction: this engine build does not fit the processor",
    signal.SIGSEGV: "segmentation fault in the engine",
    signal.SIGBUS: "bus error: a mapped file shrank or the storage failed",
    signal.SIGABRT: "the engine aborted",
    signal.SIGFPE: "arithmetic error in the engine",
}


def self_test(
    bundle: Path, python: str, timeout_s: float = TIMEOUT_S, memory_bytes: Optional[int] = None
) -> Dict[str, Any]:
    """Let ``python`` open the bundle with its own engine and ask the golden questions; gives its report.

    ``timeout_s`` is how long that may take, beside a second for each SLOW_BYTES_PER_S of the bundle. ``memory_bytes``
    is the most private memory that the child may take, Python and engine included; mapped files do not count. Raises
    SelfTestFailed, OutOfMemory, EngineMissing, or what the child itself raised.
    """
    limit = [] if memory_bytes is None else ["--max-memory", str(memory_bytes)]
    patience_s = timeout_s + slow_s(bundle)
    arguments = ["selftest", str(bundle.absolute()), *limit]
    return run_child(python, arguments, patience_s, {PATIENCE: str(patience_s)})


def slow_s(folder: Path) -> int:
    """Seconds that a slow card needs for the files in ``folder``; 0 for a small model, and where there is nothing."""
    try:
        return sum(path.stat().st_size for path in folder.iterdir()) // SLOW_BYTES_PER_S
    except OSError:
        return 0


def patience_s() -> float:
    """How long the process that asks the golden questions may take, if this is it or one that it started; else 0."""
    try:
        return float(os.environ[PATIENCE])
    except (KeyError, ValueError):
        return 0.0


def run_child(
    python: str, arguments: List[str], timeout_s: float = TIMEOUT_S, environment: Optional[Mapping[str, str]] = None
) -> Dict[str, Any]:
    """``python -m edge_infer ARGUMENTS --json`` and its JSON answer. Raises as ``self_test``."""
    import subprocess  # here, since its import takes longer than opening a model

    from edge_infer.store import default_root

    command = [python, "-m", "edge_infer", *arguments, "--json"]
    try:
        # From the root folder: the current one is on the child's module path and may hold anything.
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/",
            timeout=timeout_s,
            env={
                **os.environ,
                ENGINE_WORDS: "1",
                "EDGE_INFER_HOME": str(default_root().absolute()),  # it may be relative, to another folder
                **(environment or {}),
            },
            check=False,
        )
    except OSError as error:
        raise DeviceError(f"cannot start {python}: {error.strerror}; name the device's Python with --python") from None
    except subprocess.TimeoutExpired:
        raise SelfTestFailed(f"no answer within {timeout_s:g} s; the engine hangs or the device is too slow") from None
    words = done.stderr.decode("utf-8", "replace")
    if done.returncode < 0:
        raise _killed(-done.returncode, words)
    answer = _answer(done.stdout)
    if answer is not None and "error" in answer:
        raise rebuild(answer["error"])
    if answer is None or done.returncode:
        raise _no_answer(python, done.returncode, words)
    return answer


def _killed(number: int, words: str) -> EdgeInferError:
    try:
        name = signal.Signals(number).name
        reason = SIGNALS.get(signal.Signals(number), "it was stopped from outside")
    except ValueError:
        name, reason = f"signal {number}", "it was stopped from outside"
    kind = OutOfMemory if number == signal.SIGKILL or _short_of_memory(words) else SelfTestFailed
    return kind(f"the process that opened the model ended with {name}: {reason}{_tail(words)}")


def _answer(output: bytes) -> Optional[Dict[str, Any]]:
    """The last line that is a JSON object: engines may print before it."""
    for line in reversed(output.splitlines()):
        if line.startswith(b"{"):
            try:
                value = json.loads(line)
            except ValueError:
                continue
            return value if isinstance(value, dict) else None
    return None


def _no_answer(python: str, status: int, words: str) -> EdgeInferError:
    absent = re.search(r"No module named '?(edge_infer|numpy)\b", words)
    if absent:
        name = absent.group(1).replace("_", "-")
        return EngineMissing(f"{name} is not installed for {python}; install it: {python} -m pip install edge-infer")
    kind = OutOfMemory if _short_of_memory(words) else SelfTestFailed
    return kind(f"{python} -m edge_infer ended with status {status} and no answer{_tail(words)}")


def _short_of_memory(words: str) -> bool:
    """What Python, C++ and the dynamic linker say when they get no memory."""
    return bool(re.search(r"MemoryError|bad_alloc|[Cc]annot allocate memory|failed to map segment", words))


def _tail(words: str) -> str:
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    return f" ({lines[-1][:300]})" if lines else ""


def describe(error: BaseException) -> Dict[str, str]:
    """An error as JSON can carry it to another process; ``rebuild`` is the way back."""
    return {"type": type(error).__name__, "message": str(error)[:MESSAGE_CHARS]}


def rebuild(row: Mapping[str, Any]) -> EdgeInferError:
    """The typed error behind ``describe``'s row; DeviceError for a type that this version does not know."""
    if row.get("type") == "MemoryError":
        return OutOfMemory(
            f"the process that opened the model got no memory: {row.get('message') or 'no more is left'}"
        )
    kind = getattr(errors, str(row.get("type")), None)
    if not (isinstance(kind, type) and issubclass(kind, EdgeInferError)):
        return DeviceError(f"{row.get('type')}: {row.get('message')}")
    return kind(str(row.get("message")))
