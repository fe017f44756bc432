"""The plain way onto a device: by SFTP alone, where nothing can be run there.

For a device without Python, or whose SSH server offers nothing but SFTP (``ForceCommand internal-sftp``). The result
is the same store as an ordinary push leaves (see ``edge_infer.store``), but the device has no part in it: ``PROMISES``
says what is missing. A device that has Python at all is better served by an ordinary push.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import stat
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from edge_infer.bundle import Bundle, verify
from edge_infer.deploy.device import RESERVE_BYTES
from edge_infer.deploy.plan import Step
from edge_infer.deploy.ssh import SshTransport
from edge_infer.errors import BundleError, DeviceError
from edge_infer.manifest import MANIFEST_MAX_BYTES, MANIFEST_NAME, SIGNATURE_NAME
from edge_infer.pointer import Pointer, parse_pointer
from edge_infer.store import KEEP
from edge_infer.trust import read_signature

# After ssh, which says how to install it when it is missing.
import paramiko  # isort: skip
from paramiko.sftp import CMD_EXTENDED, CMD_EXTENDED_REPLY, CMD_READ, CMD_STATUS, int64  # isort: skip

#: Where the store is, from the folder that SFTP begins in: the same as ``store.default_root`` in a home folder.
STORE = ".edge-infer"
#: What every SFTP server takes as one request.
PLAIN_REQUEST_BYTES = 32 * 1024
#: More makes no difference; OpenSSH takes this much and says so.
LARGEST_REQUEST_BYTES = 255 * 1024
#: How many requests to read are under way at once.
READ_AHEAD = 32
#: A pointer file is a few lines.
POINTER_BYTES = 4096
#: SSH_FXE_STATVFS_ST_RDONLY (OpenSSH, PROTOCOL, 4.4).
STATVFS_READ_ONLY = 1

PROMISES = (
    "no self-test: nothing has run the model there, the first load will be the first try",
    "no check of the device: architecture, memory, Python and engine may not be what the bundle needs",
    "no lock: another push at the same time may interfere",
    "no durable renames: SFTP cannot sync folders, a power cut in the next seconds may bring the release before back",
)
UNREAD = "no look at what arrived: only sizes were compared, the first load there checks the hashes"
UNSYNCED = "no durable files: the server has no fsync@openssh.com, a power cut soon after may leave a damaged release"


@dataclass(frozen=True)
class PushedBySftp:
    """What a push by SFTP did, and in ``not_promised`` what an ordinary push would have done as well."""

    address: str
    digest: str
    steps: tuple[Step, ...]
    sent_bytes: int
    replaced: str | None
    not_promised: tuple[str, ...]


def push_by_sftp(
    bundle: Bundle,
    transport: SshTransport,
    *,
    store: str = STORE,
    dry_run: bool = False,
    read_back: bool = True,
    progress: Callable[[str], None] = lambda step: None,
) -> PushedBySftp:
    """Put ``bundle`` into the store on the device and make it the release in use, by SFTP alone.

    ``store`` is a path from the folder that SFTP begins in, or an absolute one. What an interrupted push left is gone
    on with. ``read_back`` reads every file again and compares its hash before the release is put to use. Raises
    BundleError when the bundle here is damaged, DeviceError when the device refuses; it then has the release it had.
    """
    verify(bundle, mode="full")
    progress("asking the device")
    with _Device(transport) as device:
        push = _Push(bundle, device, store)
        steps = push.plan(read_back)
        before = push.history[0] if push.history else None
        sent = 0 if dry_run else push.run(steps, read_back, progress)
        missing = (*PROMISES, *(() if read_back else (UNREAD,)), *(() if device.syncs else (UNSYNCED,)))
    return PushedBySftp(transport.address, bundle.digest, tuple(steps), sent, before, missing)


class _Push:
    """One bundle on its way into one store."""

    def __init__(self, bundle: Bundle, device: _Device, store: str) -> None:
        self._bundle = bundle
        self._device = device
        signature = read_signature(bundle.path)
        #: What lies in a release beside the manifest's files; the manifest is written last.
        self._beside = {} if signature is None else {SIGNATURE_NAME: signature}
        self._beside[MANIFEST_NAME] = bundle.manifest.to_bytes()
        self._root = store.rstrip("/") or "/"
        self._name = bundle.manifest.name
        self._staging = f"{self._root}/staging/{bundle.digest}"
        self._release = self._release_of(bundle.digest)
        self._pointer = f"{self._root}/current/{self._name}"
        self.history = self._read_history()
        self._present = False

    def _release_of(self, digest: str) -> str:
        return f"{self._root}/releases/{self._name}/{digest}"

    def _read_history(self) -> list[str]:
        """Digests as ``Store.digests`` has them; a damaged pointer is replaced by the push.

        Whether the time of a release on trial is over, only the device knows; nobody goes back to that one.
        """
        try:
            pointer = parse_pointer(self._device.read(self._pointer, POINTER_BYTES), Path(self._pointer))
        except BundleError:
            return []
        return list(pointer.digests[1 if pointer.pending else 0 :])

    def plan(self, read_back: bool) -> list[Step]:
        """The steps. Raises DeviceError when the server cannot write, or rename in one step, or has no room."""
        storage = self._device.storage(self._root)
        if storage and storage[1]:
            raise self._device.error(
                f"the storage at {self._root} is read-only, so what it serves stays as it is; make it writable there "
                "and push again"
            )
        if not self._device.renames():
            raise self._device.error(
                "its SFTP server has no posix-rename@openssh.com, so no release can be put to use in one step; "
                "use one that has it, such as OpenSSH's"
            )
        steps = []
        self._present = self._is_present(read_back)
        if self._present:
            steps.append(Step("keep", f"release {self._bundle.digest[:12]}"))
        else:
            steps += self._sends(storage[0] if storage else None)
            if read_back:
                steps.append(Step("read back", self._bundle.digest[:12]))
        return [*steps, Step("activate", self._name)]

    def _is_present(self, read_back: bool) -> bool:
        """Whether the release is there already: manifest, names and sizes, and with ``read_back`` every hash."""
        manifest, device = self._bundle.manifest, self._device
        for name, data in self._beside.items():
            if device.read(f"{self._release}/{name}", MANIFEST_MAX_BYTES) != data:
                return False
        sizes = {name: entry.size for name, entry in manifest.files.items()}
        if device.sizes(self._release) != {**sizes, **{name: len(data) for name, data in self._beside.items()}}:
            return False
        return not read_back or all(
            device.hash(f"{self._release}/{name}", entry.size) == entry.sha256 for name, entry in manifest.files.items()
        )

    def _sends(self, free: int | None) -> list[Step]:
        have = self._device.sizes(self._staging)
        steps = []
        for name, entry in sorted(self._bundle.manifest.files.items()):
            offset = have.get(name, 0) if 0 < have.get(name, 0) <= entry.size else 0
            is_there = have.get(name) == entry.size
            steps.append(Step("keep", name) if is_there else Step("send", name, entry.size - offset, offset))
        needed = sum(step.size for step in steps)
        if free is not None and needed > free - RESERVE_BYTES:
            raise self._device.error(
                f"the push needs {needed:,} bytes, the device has {max(0, free - RESERVE_BYTES):,} free beyond its "
                "reserve; free some space there"
            )
        return steps

    def run(self, steps: list[Step], read_back: bool, progress: Callable[[str], None]) -> int:
        """Take the steps; gives the bytes of files that were sent."""
        sent = 0
        for folder in (self._staging, f"{self._root}/releases/{self._name}", f"{self._root}/current"):
            self._device.make_folders(folder)
        for step in steps:
            progress(str(step))
            if step.action == "send":
                self._send(step)
                sent += step.size
            elif step.action == "read back":
                self._read_back()
        if self._present:
            self._device.remove_tree(self._staging)
        else:
            self._admit()
        self._activate()
        self._collect()
        return sent

    def _send(self, step: Step) -> None:
        with self._bundle.file(step.subject).open("rb") as source:
            self._device.write(f"{self._staging}/{step.subject}", source, step.offset)

    def _read_back(self) -> None:
        for name, entry in sorted(self._bundle.manifest.files.items()):
            observed = self._device.hash(f"{self._staging}/{name}", entry.size)
            if observed != entry.sha256:
                self._device.remove_tree(f"{self._staging}/{name}")
                raise self._device.error(
                    f"{name} reads back with SHA-256 {observed[:16]}..., expected {entry.sha256[:16]}...; it is "
                    "removed there, push again"
                )

    def _admit(self) -> None:
        """The manifest comes last, then the whole folder moves among the releases."""
        for name, data in self._beside.items():
            self._device.write_bytes(f"{self._staging}/{name}", data)
        manifest = self._bundle.manifest
        expected = {name: entry.size for name, entry in manifest.files.items()}
        found = self._device.sizes(self._staging)
        for name in sorted(found.keys() - expected.keys() - self._beside.keys()):
            self._device.remove_tree(f"{self._staging}/{name}")
        for name, size in expected.items():
            if found.get(name) != size:
                raise self._device.error(
                    f"{name} has {found.get(name, 0):,} bytes there, expected {size:,}; see whether its disk is full, "
                    "then push again"
                )
        self._discard(self._bundle.digest)  # a damaged copy: a sound one would have been kept
        self._device.rename(self._staging, self._release)

    def _activate(self) -> None:
        older = [digest for digest in self.history if digest != self._bundle.digest]
        self.history = [self._bundle.digest, *older][:KEEP]
        aside = f"{self._root}/current/.{self._name}.sftp"
        self._device.write_bytes(aside, Pointer(tuple(self.history)).to_bytes())
        self._device.rename(aside, self._pointer)

    def _collect(self) -> None:
        """Releases of this model that nothing refers to any more; on such a device nobody else removes them."""
        for digest in self._device.names(f"{self._root}/releases/{self._name}"):
            if digest not in self.history:
                self._discard(digest)

    def _discard(self, digest: str) -> None:
        """As in the store, a release leaves its place in one step, before it is taken apart."""
        doomed = f"{self._root}/staging/removed-{digest}"
        self._device.remove_tree(doomed)
        if self._device.exists(self._release_of(digest)):
            self._device.rename(self._release_of(digest), doomed)
            self._device.remove_tree(doomed)


class _Device:
    """The files of a device, as SFTP shows them. Use it as a context manager; every failure is a DeviceError."""

    def __init__(self, transport: SshTransport) -> None:
        self._address = transport.address
        self._sftp = transport.open_sftp()
        #: Whether files can be synced to disk, as far as is known.
        self.syncs = True
        self._request_bytes = self._largest_request()

    def __enter__(self) -> _Device:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
            self._sftp.close()

    def error(self, text: str) -> DeviceError:
        return DeviceError(f"{self._address}: {text}")

    @contextlib.contextmanager
    def _reported(self, what: str) -> Iterator[None]:
        try:
            yield
        except DeviceError:
            raise
        except (OSError, EOFError, ValueError, paramiko.SSHException, paramiko.SFTPError) as error:
            if isinstance(error, (EOFError, paramiko.SSHException)) or self._sftp.sock.closed:
                raise self.error("the connection is lost; check that the device is on, and push again") from error
            # To SFTP, a full disk is a failure like others.
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise self.error(
                f"{what} failed by SFTP ({reason}); see that the user may do that and that the disk there is not full"
            ) from error

    # -- what the server can do ----------------------------------------------------------------------------------

    def _extended(self, request: str, *arguments: Any) -> paramiko.Message | None:
        """A question that only some servers know; None from the others."""
        with self._reported(request):
            try:
                kind, message = self._sftp._request(CMD_EXTENDED, request, *arguments)
            except OSError:
                return None
        return message if kind == CMD_EXTENDED_REPLY else None

    def _largest_request(self) -> int:
        """How much may be read or written at once: the server says, or it is what every server takes."""
        answer = self._extended("limits@openssh.com")
        if answer is None:
            return PLAIN_REQUEST_BYTES
        _packet, read, write = (int(answer.get_int64()) for _ in range(3))
        return min([LARGEST_REQUEST_BYTES, *(limit for limit in (read, write) if limit)])

    def storage(self, path: str) -> tuple[int, bool] | None:
        """What the user may still write below ``path``, which need not exist yet, and whether it is read-only.

        None when the server does not say.
        """
        answer = self._extended("statvfs@openssh.com", path if self.exists(path) else ".")
        if answer is None:
            return None
        numbers = [int(answer.get_int64()) for _ in range(10)]
        # Block and fragment size, blocks: all, free, and for this user; three for inodes, an identity, flags.
        return numbers[1] * numbers[4], bool(numbers[9] & STATVFS_READ_ONLY)

    def renames(self) -> bool:
        """Whether the server can put one file in another's place in one step."""
        with self._reported("a rename"):
            try:
                self._sftp.posix_rename(".edge-infer-no-such-file", ".edge-infer-no-such-file")
            except FileNotFoundError:
                return True
            except OSError:
                return False
        return False

    # -- looking -------------------------------------------------------------------------------------------------

    def _attributes(self, path: str) -> paramiko.SFTPAttributes | None:
        with self._reported(f"a look at {path}"):
            try:
                found: paramiko.SFTPAttributes = self._sftp.lstat(path)
            except FileNotFoundError:
                return None
        return found

    def exists(self, path: str) -> bool:
        return self._attributes(path) is not None

    def sizes(self, path: str) -> dict[str, int]:
        """The plain files in a folder by name, with -1 for anything else there; empty when there is none."""
        with self._reported(f"listing {path}"):
            try:
                entries = self._sftp.listdir_attr(path)
            except FileNotFoundError:
                return {}
        return {
            entry.filename: int(entry.st_size or 0) if stat.S_ISREG(entry.st_mode or 0) else -1 for entry in entries
        }

    def names(self, path: str) -> list[str]:
        return sorted(self.sizes(path))

    def read(self, path: str, most: int) -> bytes:
        """A small file's content; empty when it is missing, no plain file, or longer than ``most``."""
        found = self._attributes(path)
        if found is None or not stat.S_ISREG(found.st_mode or 0) or (found.st_size or 0) > most:
            return b""
        return b"".join(self._pieces(path, int(found.st_size or 0)))

    def hash(self, path: str, size: int) -> str:
        """SHA-256 of the first ``size`` bytes."""
        digest = hashlib.sha256()
        for piece in self._pieces(path, size):
            digest.update(piece)
        return digest.hexdigest()

    def _pieces(self, path: str, size: int) -> Iterator[bytes]:
        """A file's bytes, asked for ahead. paramiko's own way takes a thread, which outlives a lost connection."""
        answers, waiting, offset = _Answers(), deque[int](), 0
        with self._reported(f"reading {path}"), self._sftp.open(path, "rb") as file:
            while offset < size or waiting:
                while offset < size and len(waiting) < READ_AHEAD:
                    length = min(self._request_bytes, size - offset)
                    request = (CMD_READ, file.handle, int64(offset), length)
                    waiting.append(self._sftp._async_request(answers, *request))
                    offset += length
                number = waiting.popleft()
                while number not in answers.found:
                    self._sftp._read_response()
                kind, message = answers.found.pop(number)
                if kind == CMD_STATUS:
                    self._sftp._convert_status(message)
                yield message.get_binary()

    # -- changing ------------------------------------------------------------------------------------------------

    def make_folders(self, path: str) -> None:
        parent = path.rpartition("/")[0]
        if self.exists(path):
            return
        if parent:
            self.make_folders(parent)
        with self._reported(f"making the folder {path}"):
            self._sftp.mkdir(path, 0o755)

    def write(self, path: str, source: IO[bytes], offset: int) -> None:
        """Write the rest of ``source`` from ``offset`` on, where the file there ends, and sync it if possible."""
        source.seek(offset)
        with self._reported(f"writing {path}"), self._sftp.open(path, "r+b" if offset else "wb") as file:
            file.MAX_REQUEST_SIZE = self._request_bytes
            file.seek(offset)
            data = source.read(self._request_bytes)
            while data:
                following = source.read(self._request_bytes)
                # After the last piece the answers to all are read: one may say that the disk is full.
                file.set_pipelined(bool(following))
                file.write(data)
                data = following
            self._sync(file)

    def write_bytes(self, path: str, data: bytes) -> None:
        self.write(path, io.BytesIO(data), 0)

    def _sync(self, file: paramiko.SFTPFile) -> None:
        if not self.syncs:
            return
        try:
            self._sftp._request(CMD_EXTENDED, "fsync@openssh.com", file.handle)
        except OSError as error:
            # Unknown to the server, or forbidden by its administrator.
            if error.errno != errno.EACCES and "unsupported" not in str(error).lower():
                raise
            self.syncs = False

    def rename(self, old: str, new: str) -> None:
        with self._reported(f"renaming {old} to {new}"):
            self._sftp.posix_rename(old, new)

    def remove_tree(self, path: str) -> None:
        """Remove a file, or a folder with all that is in it; nothing when it is not there. Links are not followed."""
        found = self._attributes(path)
        if found is None:
            return
        is_folder = stat.S_ISDIR(found.st_mode or 0)
        for name in self.names(path) if is_folder else ():
            self.remove_tree(f"{path}/{name}")
        with self._reported(f"removing {path}"):
            if is_folder:
                self._sftp.rmdir(path)
            else:
                self._sftp.remove(path)


class _Answers:
    """Takes the answers to requests sent ahead, in whatever order they come; paramiko calls it."""

    def __init__(self) -> None:
        self.found: dict[int, tuple[int, paramiko.Message]] = {}

    def _async_response(self, kind: int, message: paramiko.Message, number: int) -> None:
        self.found[number] = (kind, message)
