"""The device's side of a push. Sent along by the host and run by any Python >= 3.8; nothing is installed for it.

It speaks lines of JSON on standard input and output. A ``file`` or ``delta`` request is followed by that many raw
bytes; every other request gets one line back: ``{"ok": ...}``, or ``{"error": {"type": ..., "message": ...}}``, after
which it ends.

    begin     manifest, signature, allow_older, python, who, wait_s -> facts, what is here of each file, releases
    make-room -> bytes freed of what other pushes left behind
    file      name, offset, size, then bytes (no answer, so that files stream without waiting)
    delta     name, base, offset, size, then bytes (no answer): the file from that of an older release
    finish    timeout_s, tune, keep, confirm_within_s, health -> verify, self-test in a child, tune, activate, collect
    measure   timeout_s, runs -> verify, self-test and time it; it is thrown away when the conversation ends
    status    python -> facts and rows of the store
    history   name -> what happened to a model
    rollback  name, digest -> the release now in use
    confirm   name -> the release now in use
    collect   name, keep -> bytes freed
    trust     verb, text, format, force -> who may sign what runs here (signers.py)

Any of them may name a ``store``. A host that says nothing for two minutes is taken as gone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import signal
import sys
from pathlib import Path
from typing import Any, BinaryIO, Callable, Dict, Iterator, Mapping, Optional, Tuple, Union

from edge_infer import admission, emulation, trust
from edge_infer.bundle import open_bundle
from edge_infer.delta import codecs
from edge_infer.deploy.device import WRITABLE_AGAIN, facts, read_only_mount, serving_python
from edge_infer.deploy.incoming import Incoming, known_digests
from edge_infer.deploy.signers import trust_request
from edge_infer.deploy.trial import wait_for_health
from edge_infer.errors import BundleError, DeviceError, EdgeInferError, ReleaseNotFound, SelfTestFailed
from edge_infer.manifest import parse, read_json
from edge_infer.store import Store, default_root
from edge_infer.trust import Signed

#: A request line may hold a whole manifest.
MAX_LINE_BYTES = 16 * 1024 * 1024
#: The SSH server writes to a pipe, of 64 KiB by default: a larger one wakes both ends less often.
F_SETPIPE_SZ, PIPE_BYTES = 1031, 1024 * 1024
#: Tuning takes some 20 children of half a second each, and the time it takes a board to import an engine so often.
TUNE_S = 900.0
#: A host that lost its power says no goodbye; its push must not keep the store from others.
SILENCE_S = 120.0

TEXT, TEXT_OR_NONE, NUMBER = (str,), (str, type(None)), (int, float)
NUMBER_OR_NONE = (int, float, type(None))
#: What each request must hold beside ``store``.
FIELDS: Dict[str, Dict[str, Tuple[type, ...]]] = {
    "begin": {
        "manifest": TEXT, "signature": TEXT_OR_NONE, "allow_older": (bool,),
        "python": TEXT_OR_NONE, "who": TEXT, "wait_s": NUMBER,
    },
    "make-room": {},
    "file": {"name": TEXT, "offset": (int,), "size": (int,)},
    "delta": {"name": TEXT, "base": TEXT, "offset": (int,), "size": (int,)},
    "finish": {
        "timeout_s": NUMBER, "tune": (bool,), "keep": (int,),
        "confirm_within_s": NUMBER_OR_NONE, "health": TEXT_OR_NONE,
    },
    "measure": {"timeout_s": NUMBER, "runs": (int,)},
    "status": {"python": TEXT_OR_NONE},
    "history": {"name": TEXT},
    "rollback": {"name": TEXT, "digest": TEXT_OR_NONE, "who": TEXT, "wait_s": NUMBER},
    "confirm": {"name": TEXT, "who": TEXT, "wait_s": NUMBER},
    "trust": {"verb": TEXT, "text": TEXT_OR_NONE, "format": TEXT_OR_NONE, "force": (bool,)},
    "collect": {"name": TEXT_OR_NONE, "keep": (int,), "who": TEXT, "wait_s": NUMBER},
}  # fmt: skip
#: Parts of a push.
AFTER_BEGIN = ("make-room", "file", "delta", "finish", "measure")
#: The longest time that a request may ask for, in seconds: more is a mistake, and clocks have limits.
LONGEST_S = 7 * 24 * 3600


class Receiver:
    """One conversation. ``asked`` and ``told`` are its two streams. ``installer`` adds requests of its own."""

    def __init__(self, asked: Union[BinaryIO, Patient], told: BinaryIO) -> None:
        self.asked, self.told = asked, told
        self.requests: Dict[str, Callable[[Mapping[str, Any]], Optional[Dict[str, Any]]]] = {
            "begin": self.begin,
            "make-room": self.make_room,
            "file": self.file,
            "delta": self.delta,
            "finish": self.finish,
            "measure": self.measure,
            "status": self.status,
            "history": self.history,
            "rollback": self.rollback,
            "confirm": self.confirm,
            "collect": self.collect,
            "trust": self.trust,
        }
        self.fields = dict(FIELDS)
        self.store = Store(default_root())
        self.python = sys.executable
        self.who = ""
        self.incoming: Optional[Incoming] = None
        self.signed: Optional[Signed] = None
        self.present = False  # whether the bundle is among the releases already, by hash
        self.passing = False  # whether the bundle is here to be measured only
        self.locked = contextlib.ExitStack()

    def serve(self) -> None:
        """Answer requests until the host ends the conversation or one fails."""
        try:
            with self.locked:
                try:
                    request = self.read()
                    while request is not None:
                        self.answer(request)
                        request = self.read()
                finally:
                    if self.passing and self.incoming:
                        self.store.discard(self.incoming.manifest.name, self.incoming.digest)
        except EdgeInferError as error:
            self.tell({"error": admission.describe(error)})
        except OSError as error:
            self.tell({"error": admission.describe(_device_error(error, self.store.root))})
        except Exception as error:  # what no request of a host leads to: a path with a NUL, a number of megabytes
            self.tell({"error": admission.describe(DeviceError(f"the device cannot do that: {error!r}"))})

    def read(self) -> Optional[Mapping[str, Any]]:
        line = self.asked.readline(MAX_LINE_BYTES)
        if not line:
            return None
        try:
            value = read_json(line)
        except (ValueError, RecursionError) as error:
            raise DeviceError(
                f"the host sent a line that is not JSON ({error}); use the same edge-infer on both ends"
            ) from None
        op = value.get("op") if isinstance(value, dict) else None
        if not isinstance(op, str) or op not in self.requests:
            raise DeviceError("the host asked for something this receiver does not know")
        request = {"op": op, "store": None, **dict.fromkeys(self.fields[op]), **value}
        for name, kinds in {**self.fields[op], "store": TEXT_OR_NONE}.items():
            if not _is_valid(name, request[name], kinds):
                raise DeviceError(f"the host's request {op!r} has no valid {name!r}")
        if op in AFTER_BEGIN and self.incoming is None:
            raise DeviceError(f"the host's request {op!r} came before it said which bundle it pushes")
        return request

    def answer(self, request: Mapping[str, Any]) -> None:
        if request["op"] not in AFTER_BEGIN:
            if self.incoming is not None:
                raise DeviceError(f"the host's request {request['op']!r} came in the middle of a push")
            self.store = Store(Path(request["store"]).expanduser() if request.get("store") else default_root())
        reply = self.requests[request["op"]](request)
        if reply is not None:
            self.tell({"ok": reply})

    def tell(self, message: Mapping[str, Any]) -> None:
        self.told.write(json.dumps(message).encode() + b"\n")
        self.told.flush()

    @contextlib.contextmanager
    def changing(self, request: Mapping[str, Any], what: str) -> Iterator[None]:
        """The store's lock, for one request."""
        with self.store.lock(request["wait_s"], f"{what} by {request['who']}"):
            yield

    # -- a push ------------------------------------------------------------------------------------------------

    @property
    def coming(self) -> Incoming:
        """The bundle being pushed; ``read`` lets no request that needs it come before it."""
        assert self.incoming is not None
        return self.incoming

    def begin(self, request: Mapping[str, Any]) -> Dict[str, Any]:
        data = request["manifest"].encode("utf-8", "surrogatepass")
        manifest, digest = parse(data), hashlib.sha256(data).hexdigest()
        self.who = request["who"]
        self.python = serving_python(self.store, request.get("python"))
        self.locked.enter_context(self.changing(request, f"a push of {manifest.name}"))
        self.incoming = Incoming(self.store, manifest, digest, _signature(request["signature"]))
        self.signed = self._require_signed(request["allow_older"])
        self.present = self.store.has(manifest.name, digest)
        return {
            "facts": facts(self.store.root, self.python),
            "present": self.present,
            "have": {} if self.present else self.incoming.have(),
            "have_deltas": {} if self.present else self.incoming.have_deltas(),
            "codecs": codecs(),
            "copies": [] if self.present else self.incoming.copies(),
            "reclaimable_bytes": self.store.reclaimable_bytes(digest),
            "releases": known_digests(self.store, manifest.name),
            "on_trial": self._on_trial(),
        }

    def _on_trial(self) -> bool:
        """Whether the release in use waits to be confirmed."""
        try:
            return self.store.pointer(self.coming.manifest.name).pending is not None
        except BundleError:
            return False

    def _require_signed(self, allow_older: bool) -> Optional[Signed]:
        """Who signed the bundle, where this device demands it. Raises BundleError before a file is sent."""
        manifest, digest, signature = self.coming.manifest, self.coming.digest, self.coming.signature
        if signature is not None:
            trust.require_about(trust.parse_signature(signature)[0], manifest.name, digest)
        signed = trust.check(self.store.root, manifest.name, digest, manifest.artifact.format, signature)
        if signed:
            kept = known_digests(self.store, manifest.name)
            trust.check_serial(self.store.root, manifest.name, digest, signed, kept, allow_older)
        return signed

    def make_room(self, request: Mapping[str, Any]) -> None:
        self.store.collect(all_staging=True, spare=self.coming.digest)

    def file(self, request: Mapping[str, Any]) -> None:
        """Append the bytes that follow to the staged file."""
        self.coming.receive(request["name"], request["offset"], request["size"], self.asked)

    def delta(self, request: Mapping[str, Any]) -> None:
        """Make a staged file of an older release's and the bytes that follow."""
        self.coming.receive_delta(request["name"], request["base"], request["offset"], request["size"], self.asked)

    def finish(self, request: Mapping[str, Any]) -> Dict[str, Any]:
        name, digest = self.coming.manifest.name, self.coming.digest
        report = self._self_test(float(request["timeout_s"]))
        release = self.store.release(name, digest)
        tuned = self._tune(release) if request["tune"] else None
        if self.signed:
            trust.keep_serial(self.store.root, name, digest, self.signed)
        self.store.activate(name, digest, request["keep"], request["confirm_within_s"], self.who)
        freed = self.store.collect()
        if request["health"] is not None:
            self.locked.close()  # so that the application may confirm by itself meanwhile
            wait_for_health(self.store, name, digest, request["health"])
        pending = self.store.pointer(name).pending
        self.incoming = None  # what comes after this belongs to no push; the store may be another's by now
        return {
            "report": report,
            "tuned": tuned,
            "freed": freed,
            "digest": digest,
            "pending_s": int(pending.left_s()) if pending else None,
        }

    def _self_test(self, timeout_s: float) -> Dict[str, Any]:
        """Admit the bundle unless it is here, and ask its golden questions. One that fails is removed."""
        name, digest = self.coming.manifest.name, self.coming.digest
        self._admit()
        try:
            return admission.self_test(self.store.release(name, digest), self.python, timeout_s)
        except EdgeInferError as error:
            self.store.note(name, "refused", digest, str(error), self.who)
            self.store.discard(name, digest)
            raise SelfTestFailed(f"{error}; {self._still()}") from None

    def _admit(self) -> None:
        if self.present:
            self.coming.replace_signature()
        else:
            self.coming.admit()
            self.present = True

    def _tune(self, release: Path) -> str:
        """What ``tune`` chose, which later loads take; or why it did not, which keeps no release from serving."""
        try:
            tuned = admission.run_child(self.python, ["tune", str(release)], TUNE_S)
            if not tuned["kept"]:
                return "not tuned: the device's cache cannot be written"
            found = emulation.here()
            return f"{tuned['chosen']}, on an emulated machine ({found})" if found else str(tuned["chosen"])
        except EdgeInferError as error:
            return f"not tuned: {error}"

    def _still(self) -> str:
        digests = known_digests(self.store, self.coming.manifest.name)
        return f"the release {digests[0][:12]} stays in use" if digests else "nothing was activated"

    def measure(self, request: Mapping[str, Any]) -> Dict[str, Any]:
        """Time the bundle that was sent, after a self-test the first time. The store serves what it served."""
        name, timeout_s = self.coming.manifest.name, float(request["timeout_s"])
        release = self.store.release(name, self.coming.digest)
        if not self.present:
            self.passing = True
            self._admit()
            admission.self_test(release, self.python, timeout_s)
        asked = ["bench", str(release), "--runs", str(int(request["runs"]))]
        # Marked here too: the edge_infer that is installed there may be older.
        return {"measured": {**emulation.mark(), **admission.run_child(self.python, asked, timeout_s)}}

    # -- what is here ------------------------------------------------------------------------------------------

    def status(self, request: Mapping[str, Any]) -> Dict[str, Any]:
        python = serving_python(self.store, request.get("python"))
        return {"facts": facts(self.store.root, python), "models": self.store.status()}

    def history(self, request: Mapping[str, Any]) -> Dict[str, Any]:
        name = request["name"]
        return {"events": self.store.events(name), "releases": self.store.digests(name)}

    def rollback(self, request: Mapping[str, Any]) -> Dict[str, Any]:
        with self.changing(request, f"a rollback of {request['name']}"):
            wanted = self.store.older(request["name"], request["digest"])
            trust.require_signed(open_bundle(self.store.release(request["name"], wanted)))
            return {"digest": self.store.rollback(request["name"], wanted, request["who"])}

    def confirm(self, request: Mapping[str, Any]) -> Dict[str, Any]:
        with self.changing(request, f"a confirmation of {request['name']}"):
            return {"digest": self.store.confirm(request["name"], who=request["who"])}

    def trust(self, request: Mapping[str, Any]) -> Dict[str, Any]:
        if request["verb"] == "show":
            return trust_request(self.store, request)
        with self.store.lock(who="a change of who may sign"):
            return trust_request(self.store, request)

    def collect(self, request: Mapping[str, Any]) -> Dict[str, Any]:
        with self.changing(request, "a collection"):
            if request["name"] is not None:
                self.store.keep_only(request["name"], request["keep"])
            for name in self.store.names() if request["name"] is None else ():
                with contextlib.suppress(BundleError, ReleaseNotFound):  # a damaged one keeps no other from it
                    self.store.keep_only(name, request["keep"])
            return {"freed": self.store.collect(all_staging=True)}


def _signature(text: Optional[str]) -> Optional[bytes]:
    return None if text is None else text.encode("utf-8", "surrogatepass")


def _is_valid(name: str, value: Any, kinds: Tuple[type, ...]) -> bool:
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        return False
    return not name.endswith("_s") or value is None or 0 <= float(str(value)) <= LONGEST_S  # which NaN is not


def _device_error(error: OSError, root: Path) -> DeviceError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DeviceError(
            f"the device's storage at {root} is full; free some space there and run the same again (a push goes on "
            "from here)"
        )
    if error.errno == errno.EROFS:
        mend = WRITABLE_AGAIN.format(mount=read_only_mount(root) or "/")
        return DeviceError(
            f"the device's storage at {root} is read-only, so what it serves stays as it is; make it writable and run "
            f"the same again (there: {mend})"
        )
    if error.errno == errno.EIO:
        return DeviceError(
            f"the device's storage at {root} fails ({error}); what it serves stays as it is; see dmesg there, and put "
            "in another card"
        )
    return DeviceError(f"the device reports: {error}")


class Patient:
    """A stream that gives up when nothing comes for ``silence_s`` seconds. For the main thread only."""

    def __init__(self, stream: BinaryIO, silence_s: float) -> None:
        self.stream, self.silence_s = stream, silence_s
        signal.signal(signal.SIGALRM, self._give_up)

    def readline(self, most: int) -> bytes:
        with self._clock():
            return self.stream.readline(most)

    def read1(self, most: int) -> bytes:
        with self._clock():
            return self.stream.read1(most)  # type: ignore[attr-defined,no-any-return]

    @contextlib.contextmanager
    def _clock(self) -> Iterator[None]:
        signal.setitimer(signal.ITIMER_REAL, self.silence_s)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _give_up(self, number: int, frame: object) -> None:
        raise DeviceError(f"the host said nothing for {self.silence_s:g} s; push again, it goes on from here")


def main() -> None:
    with contextlib.suppress(OSError):  # where it is no pipe, or pipes may not be so large
        fcntl.fcntl(sys.stdin.fileno(), F_SETPIPE_SZ, PIPE_BYTES)
    Receiver(Patient(sys.stdin.buffer, SILENCE_S), sys.stdout.buffer).serve()
