"""A release on trial: a command on the device says whether it does its work there.

Standard library only, Python >= 3.8: a push sends this file along.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from typing import Tuple

from edge_infer.errors import EdgeInferError, SelfTestFailed
from edge_infer.store import Store

#: How often a health command that failed is tried again.
AGAIN_S = 1.0
#: How long the store may be held by others when the trial ends.
LOCK_S = 30.0
#: How much of the end of a command's output is looked at.
WORDS_BYTES = 8 * 1024


def wait_for_health(store: Store, name: str, digest: str, command: str) -> None:
    """Run ``command`` until it succeeds, then confirm the release; go back when its time is over.

    The command runs in a shell, with ``EDGE_INFER_HOME``, ``EDGE_INFER_MODEL`` and ``EDGE_INFER_DIGEST`` set. Raises
    SelfTestFailed with its last words when it did not succeed in time. Does nothing where the application has
    confirmed the release by itself. Called without the store's lock.
    """
    words = "it was not started"
    while True:
        if _is_confirmed(store, name, digest):
            return
        pointer = store.pointer(name)
        left_s = pointer.pending.left_s() if pointer.pending and pointer.digests[:1] == (digest,) else 0.0
        if not left_s:
            break
        passed, words = _run(store, name, digest, command, left_s)
        if passed:
            _confirm(store, name, digest)
            return
        time.sleep(min(AGAIN_S, left_s))
    with store.lock(LOCK_S, f"the trial of {name}"):
        if _is_confirmed(store, name, digest):  # at the last moment
            return
        store.reject(name, digest, f"the health command did not pass: {words}")
        now = store.digests(name)
        store.collect()
    still = f"the release {now[0][:12]} is in use again" if now else "no release is in use"
    raise SelfTestFailed(f"the health command did not pass in time: {words}; {still}")


def _is_confirmed(store: Store, name: str, digest: str) -> bool:
    pointer = store.pointer(name)
    return pointer.digests[:1] == (digest,) and not pointer.pending


def _confirm(store: Store, name: str, digest: str) -> None:
    with store.lock(LOCK_S, f"the trial of {name}"):
        try:
            store.confirm(name, digest, "the health command")
        except EdgeInferError as error:
            raise SelfTestFailed(f"the health command passed too late: {error}") from None


def _run(store: Store, name: str, digest: str, command: str, timeout_s: float) -> Tuple[bool, str]:
    """Whether the command succeeded, and what it said last."""
    environment = {
        **os.environ,
        "EDGE_INFER_HOME": str(store.root.absolute()),
        "EDGE_INFER_MODEL": name,
        "EDGE_INFER_DIGEST": digest,
    }
    with tempfile.TemporaryFile() as said:  # not a pipe: what the command leaves running would keep that open
        child = subprocess.Popen(
            ["/bin/sh", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            cwd="/",
            env=environment,
            start_new_session=True,
        )
        try:
            status = f"status {child.wait(timeout_s)}"
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            status = "it still ran"
        said.seek(max(0, said.seek(0, os.SEEK_END) - WORDS_BYTES))
        lines = said.read().decode("utf-8", "replace").strip().splitlines()
    return status == "status 0", f"{status}{': ' + lines[-1][:200] if lines else ''}"
