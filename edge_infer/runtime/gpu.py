"""Which GPU is here and what drives it, asked of NVIDIA's own libraries: what a TensorRT engine is only good for."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path

#: Numbers of CUdevice_attribute, https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__TYPES.html
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76
#: The driver's own words on a desktop, and Jetson Linux's.
DRIVER_FILES = (Path("/proc/driver/nvidia/version"), Path("/etc/nv_tegra_release"))
TENSORRT_LIBRARIES = ("libnvinfer.so.11", "libnvinfer.so.10", "libnvinfer.so.8")


def facts() -> dict[str, str] | None:
    """Name, compute capability and driver of the first GPU; None where there is none, or no driver."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, version = ctypes.c_int(), ctypes.c_int()
    major, minor, name = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(256)
    failed = (
        cuda.cuInit(0)
        or cuda.cuDriverGetVersion(ctypes.byref(version))
        or cuda.cuDeviceGet(ctypes.byref(device), 0)
        or cuda.cuDeviceGetName(name, len(name), device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(major), CAPABILITY_MAJOR, device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(minor), CAPABILITY_MINOR, device)
    )
    if failed:
        return None
    return {
        "gpu": name.value.decode("utf-8", "replace"),
        "capability": f"{major.value}.{minor.value}",
        "driver": " ".join([str(version.value), *_driver_words()]),
    }


def _driver_words() -> list[str]:
    words = []
    for path in DRIVER_FILES:
        with contextlib.suppress(OSError):
            words.append(path.read_text("utf-8", "replace").strip())
    return words


def tensorrt_version() -> str | None:
    """The number that TensorRT's library gives itself; None where it is not installed."""
    for name in TENSORRT_LIBRARIES:
        try:
            return str(ctypes.CDLL(name).getInferLibVersion())
        except (OSError, AttributeError):
            continue
    return None
