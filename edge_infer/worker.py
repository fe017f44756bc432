"""Call a function in a child process of its own: frameworks crash, clash and keep memory; their children end.

    run("edge_infer.quantize.onnx:build", {...}, log) -> dict

The function takes and gives plain JSON data; large things travel as files. What it prints goes to the log file.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from edge_infer.admission import describe, rebuild
from edge_infer.errors import ConversionError, EdgeInferError
from edge_infer.runtime.engines import OUT_OF_MEMORY_WORDS

M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES = -3, 2**20
#: The frameworks' own chatter, switched off where a variable does it.
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0", "PYTHONWARNINGS": "ignore"}


def run(call: str, request: dict[str, Any], log: Path) -> dict[str, Any]:
    """Call ``module:function`` with ``request`` in a child; gives its answer.

    Raises what the function raised when that is one of edge_infer's errors, which explains itself; ConversionError
    with the log when it raised anything else or the child died. Either way ``log`` holds what it printed.
    """
    with tempfile.TemporaryDirectory(prefix="edge-infer-") as folder:
        answer_file = Path(folder) / "answer.json"
        (Path(folder) / "request.json").write_text(json.dumps({"call": call, "request": request}))
        with log.open("ab") as output:
            done = subprocess.run(
                [sys.executable, "-m", "edge_infer.worker", folder],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=_environment(folder),
                check=False,
            )
        if not answer_file.is_file():
            words = f"{call} {_death(done.returncode)}; run again with -v to see its output"
            raise ConversionError(words, _text(log), lasting=False)
        answer: dict[str, Any] = json.loads(answer_file.read_text())
    if "error" not in answer:
        return answer
    error = rebuild(answer["error"])
    if isinstance(error, ConversionError) and not answer["explained"]:
        raise ConversionError(str(error), _text(log), lasting=False)
    if isinstance(error, ConversionError):
        error.lasting = answer["lasting"]
    raise error


def _environment(folder: str) -> dict[str, str]:
    """The parent's import path goes along, so that both run the same edge_infer and find the same factory.

    What the frameworks leave in the temporary folder goes with ``folder``.
    """
    return {**os.environ, **QUIET, "TMPDIR": folder, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def _death(status: int) -> str:
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}" + (
            " (out of memory?)" if status == -signal.SIGKILL else ""
        )
    return f"ended with status {status} and no answer"


def _text(log: Path) -> str:
    return log.read_text("utf-8", "replace")[-20_000:]


def _free_at_once() -> None:
    """Let the C library give large blocks back to the system when they are freed.

    It keeps them otherwise, and converters make several copies of all weights one after the other: a SavedModel of
    500 MB left 1 GB behind. https://man7.org/linux/man-pages/man3/mallopt.3.html
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)


def main(folder: str) -> None:
    _free_at_once()
    request = json.loads((Path(folder) / "request.json").read_text())
    module, function = request["call"].split(":")
    try:
        answer = getattr(importlib.import_module(module), function)(request["request"])
    except EdgeInferError as error:
        traceback.print_exc()
        answer = {"error": describe(error), "explained": True, "lasting": not _passing(error)}
    except Exception as error:  # a framework's own, whatever it is
        traceback.print_exc()
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        words = f"{type(error).__name__}: {lines[0][:400]}"
        answer = {"error": describe(ConversionError(words)), "explained": False}
    Path(folder, "answer.json").write_text(json.dumps(answer))
    sys.stdout.flush()
    sys.stderr.flush()
    # Frameworks that share a process may crash in their own clean-up, after the work is done and answered.
    os._exit(0)


def _passing(error: BaseException) -> bool:
    """Whether the machine was at fault and not the model: the same may succeed another time."""
    causes = [error]
    # Code may name an error as its own cause.
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)
    return any(
        isinstance(item, (MemoryError, OSError, ImportError)) or any(word in str(item) for word in OUT_OF_MEMORY_WORDS)
        for item in causes
    )


if __name__ == "__main__":
    main(sys.argv[1])
