"""Write the locks of converters that have environments of their own: exact versions and the hashes of their wheels.

    python scripts/lock_converters.py

Asks the package index that pip is set up for; downloads only what has no metadata of its own there.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

LOCKS = Path(__file__).parent.parent / "edge_infer" / "convert" / "environments"

#: Wheels are taken for these; each tag also admits older glibc.
PLATFORMS = {
    "x86_64": ["manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64"],
    "aarch64": ["manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64"],
}


@dataclass(frozen=True)
class Lock:
    """``pythons``: one file for each; an empty one stands for a file that serves every Python."""

    name: str
    head: tuple[str, ...]
    pythons: tuple[str, ...]
    packages: tuple[str, ...]


#: What onnx2tf 2.6.9 imports on the way to a .tflite, in the versions that it pins. Left out are what it only runs
#: as programs, tests with or loads for other outputs. OpenCV comes without its windows, which need libraries of the
#: system; psutil is newer, for the wheel that it has for aarch64.
ONNX2TF = Lock(
    "onnx2tf",
    (
        "does: ONNX to TFLite",
        "takes: a download of {download}, {disk} on disk and a quarter of a minute on a fast line",
    ),
    ("3.11", "3.12", "3.13"),
    (
        "ai-edge-litert==2.1.2",
        "backports.strenum==1.2.8",
        "flatbuffers==25.12.19",
        "ml-dtypes==0.5.4",
        "numpy==2.2.6",
        "onnx==1.20.1",
        "onnx2tf==2.6.9",
        "onnxruntime==1.26.0",
        "opencv-python-headless==4.13.0.92",
        "protobuf==7.35.1",
        "psutil==7.2.2",
        "sne4onnx==2.0.1",
        "sng4onnx==2.0.1",
        "tqdm==4.67.1",
        "typing_extensions==4.16.0",
    ),
)
#: Runs in the host's own Python, with the torch and the onnx that are there.
ONNX2FX = Lock(
    "onnx2fx",
    ("does: ONNX to TorchScript", "takes: a download of {download}, {disk} on disk and a few seconds"),
    ("",),
    ("onnx2fx==0.0.1",),
)
#: The maker of onnx2tf declares Python 3.12; the code and its files are the same with 3.11.
OUTSIDE = {("onnx2tf", "3.11"): "last: its maker names Python 3.12 and later; used where no such Python is found"}
SIZES = {"onnx2tf": ("131 MB", "500 MB"), "onnx2fx": ("0.1 MB", "20 MB")}


def main() -> None:
    for lock in (ONNX2TF, ONNX2FX):
        for python in lock.pythons:
            write(lock, python)


def write(lock: Lock, python: str) -> None:
    hashes: dict[str, set[str]] = {}
    for tags in PLATFORMS.values():
        for package, digest in wheels(lock.packages, python or "3.12", tags):
            hashes.setdefault(package, set()).add(digest)
    download, disk = SIZES[lock.name]
    head = [f"# {line.format(download=download, disk=disk)}" for line in lock.head]
    if (lock.name, python) in OUTSIDE:
        head.append(f"# {OUTSIDE[lock.name, python]}")
    lines = [
        " \\\n".join([package, *(f"    --hash=sha256:{digest}" for digest in sorted(digests))])
        for package, digests in sorted(hashes.items())
    ]
    suffix = f"-py{python.replace('.', '')}" if python else ""
    (LOCKS / f"{lock.name}{suffix}.txt").write_text("\n".join([*head, *lines]) + "\n")


def wheels(packages: tuple[str, ...], python: str, tags: list[str]) -> list[tuple[str, str]]:
    """(name==version, SHA-256) of the wheels that pip would install on such a machine."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"]
        command += ["--only-binary=:all:", "--ignore-requires-python", f"--python-version={python}"]
        command += ["--implementation=cp", "--report", str(report), "--target", folder]
        command += [f"--platform={tag}" for tag in tags]
        subprocess.run([*command, *packages], check=True)
        found = json.loads(report.read_text())["install"]
    return [
        (
            f"{item['metadata']['name']}=={item['metadata']['version']}",
            item["download_info"]["archive_info"]["hashes"]["sha256"],
        )
        for item in found
    ]


if __name__ == "__main__":
    main()
