"""Debian's packages for arm64, fetched as this machine's apt is set up to, beside the packages of this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

SUITE = "bookworm"
#: Beyond debootstrap's minbase: what a device has before edge_infer comes, an init, and tools to make faults with.
INCLUDE = ("busybox-static", "iproute2", "openssh-server", "procps", "python3", "python3-venv")
#: Programs of this machine, and the Debian packages that they come in.
NEEDED = {
    "apt-get": "apt",
    "debootstrap": "debootstrap",
    "dpkg-deb": "dpkg",
    "fakeroot": "fakeroot",
    "mke2fs": "e2fsprogs",
    "qemu-system-aarch64": "qemu-system-arm",
    "qemu-img": "qemu-utils",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
}


def missing() -> list[str]:
    """Debian packages that this machine lacks for the lab."""
    places = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    return sorted({package for program, package in NEEDED.items() if shutil.which(program, path=places) is None})


def run(*command: str | os.PathLike[str], log: Path, cwd: Path | None = None, **environment: str) -> None:
    """Run a command with what it prints in ``log``; SystemExit with its last lines when it fails."""
    with log.open("ab") as stream:
        path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
        done = subprocess.run(
            command,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            env={**os.environ, "LC_ALL": "C", "PATH": path, **environment},
            check=False,
        )
    if done.returncode:
        lines = log.read_text("utf-8", "replace").splitlines()[-15:]
        raise SystemExit(
            "\n".join([*lines, f"{command[0]} ended with {done.returncode}; all that it said is in {log}"])
        )


def unpack_root(root: Path, ownership: Path, log: Path) -> None:
    """The first half of a Debian in ``root``: packages downloaded, the essential ones unpacked, nothing of them run.

    ``ownership``: where fakeroot keeps who owns what, as the files themselves belong to who runs this.
    """
    run(
        *("fakeroot", "-s", ownership, "debootstrap", "--foreign", "--arch=arm64", "--variant=minbase"),
        *(f"--include={','.join(INCLUDE)}", SUITE, root),
        log=log,
    )


def expand(archives: Path, log: Path) -> None:
    """Write packages anew without compression, which costs an emulated processor more than anything else."""
    again = 'for one in *.deb; do dpkg-deb -R "$one" files; dpkg-deb -b -Znone files "$one"; rm -r files; done'
    run("fakeroot", "sh", "-e", "-c", again, log=log, cwd=archives)


class Apt:
    """apt for arm64 with lists and caches of its own in ``folder`` and the sources of this machine."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.folder = folder
        self.log = log
        for name in ("state/lists/partial", "cache/archives/partial"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / "apt.conf").write_text(
            'APT::Architecture "arm64";\nAPT::Architectures "arm64";\nDebug::NoLocking "1";\nAPT::Sandbox::User "";\n'
            f'Dir::State "{folder}/state";\nDir::State::status "/dev/null";\nDir::Cache "{folder}/cache";\n'
        )
        self._run("apt-get", "update")

    def _run(self, *command: str) -> None:
        run(*command, log=self.log, cwd=self.folder, APT_CONFIG=str(self.folder / "apt.conf"))

    def fetch_kernel(self, package: str) -> Path:
        """The unpacked folder of the kernel that the empty package ``package`` depends on."""
        answer = subprocess.run(
            ["apt-cache", "depends", package],
            env={**os.environ, "LC_ALL": "C", "APT_CONFIG": str(self.folder / "apt.conf")},
            capture_output=True,
            text=True,
            check=True,
        )
        names = [line.split()[1] for line in answer.stdout.splitlines() if line.split()[0] == "Depends:"]
        if not names:
            raise SystemExit(
                f"Debian has no kernel {package} here; its sources must have {SUITE} and its security updates"
            )
        self._run("apt-get", "download", names[0])
        (archive,) = self.folder.glob(f"{names[0]}_*.deb")
        unpacked = self.folder / names[0]
        run("dpkg-deb", "-x", archive, unpacked, log=self.log)
        archive.unlink()
        return unpacked
