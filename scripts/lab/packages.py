"""Debian's packages for arm64, fetched and unpacked by this machine's apt and dpkg beside its own."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

SUITE = "bookworm"
#: The suite and what is added to it. apt refuses a suite that this machine's sources lack.
RELEASE = f"/^{SUITE}(|-updates|-security)$/"
#: The least Debian that can install more, what a device has before edge_infer comes, an init, and tools to make faults.
INCLUDE = (
    *("?essential", "?priority(required)", "apt", "usr-is-merged"),
    *("busybox-static", "iproute2", "openssh-server", "procps", "python3", "python3-venv"),
)
#: Programs of this machine, and the Debian packages that they come in.
NEEDED = {
    "apt-get": "apt",
    "dpkg": "dpkg",
    "fakeroot": "fakeroot",
    "mke2fs": "e2fsprogs",
    "qemu-system-aarch64": "qemu-system-arm",
    "qemu-img": "qemu-utils",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
}

#: Unpacking runs a package's preinst, which is arm64's, so that it is taken out before. What this machine's own dpkg
#: leaves out (documentation, in many containers) is not left out of a board.
UNPACK = """
for one in *.deb; do
  dpkg-deb -I "$one" preinst > /dev/null 2>&1 || continue
  dpkg-deb -R "$one" files
  mv files/DEBIAN/preinst "$(dpkg-deb -f "$one" Package)".preinst
  dpkg-deb -b -Znone files "$one"
  rm -r files
done
dpkg --root="$1" --force-architecture --force-depends --force-unsafe-io --path-include='*' --unpack *.deb
"""


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


def unpack(archives: Path, root: Path, ownership: Path, log: Path) -> None:
    """All packages of the folder ``archives`` in ``root`` as this machine's dpkg unpacks them, nothing of them run.

    Their preinst scripts lie where dpkg keeps those of what is installed, to be run on a board before all others.

    ``ownership``: where fakeroot keeps who owns what, as the files themselves belong to who runs this.
    """
    for name in ("bin", "sbin", "lib"):
        (root / "usr" / name).mkdir(parents=True)
        (root / name).symlink_to(f"usr/{name}")
    database = root / "var/lib/dpkg"
    for name in ("info", "updates"):
        (database / name).mkdir(parents=True)
    (database / "status").touch()
    run("fakeroot", "-s", ownership, "sh", "-e", "-c", UNPACK, "unpack", root, log=log, cwd=archives)
    kept = database / "info"
    for script in archives.glob("*.preinst"):
        # Of packages that may be there for several architectures, dpkg adds which.
        name = script.stem if (kept / f"{script.stem}.list").is_file() else f"{script.stem}:arm64"
        script.rename(kept / f"{name}.preinst")


class Apt:
    """apt for arm64 with lists and caches of its own in ``folder`` and the sources of this machine."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.folder = folder
        self.log = log
        for name in ("state/lists/partial", "cache/archives/partial"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / "apt.conf").write_text(
            'APT::Architecture "arm64";\nAPT::Architectures "arm64";\nDebug::NoLocking "1";\nAPT::Sandbox::User "";\n'
            f'APT::Default-Release "{RELEASE}";\n'
            f'Dir::State "{folder}/state";\nDir::State::status "/dev/null";\nDir::Cache "{folder}/cache";\n'
        )
        self._run("apt-get", "update")

    def _run(self, *command: str) -> None:
        run(*command, log=self.log, cwd=self.folder, APT_CONFIG=str(self.folder / "apt.conf"))

    def fetch(self, *wanted: str) -> Path:
        """The folder with the archives of the packages ``wanted`` and of all that they depend on."""
        self._run("apt-get", "-y", "--no-install-recommends", "--download-only", "install", *wanted)
        return self.folder / "cache" / "archives"

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
