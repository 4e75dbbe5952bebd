"""Which TensorRT is installed, and whether there is a GPU to run it on."""

from __future__ import annotations

import ctypes
import importlib
import sys
from types import ModuleType

PACKAGES = ("tensorrt", "tensorrt_rtx")
"""In order of preference: TensorRT builds for every GPU since Turing, TensorRT for RTX for those of workstations."""

DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_CAPABILITY = (75, 76)
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR."""

INSTALL = "pip install 'edgekit[tensorrt]', or NVIDIA's tensorrt package"


def import_tensorrt() -> ModuleType | None:
    """The first of `PACKAGES` that imports and has a builder (the public index holds an empty `tensorrt`), or None."""
    for name in PACKAGES:
        try:
            module = importlib.import_module(name)
        except (ImportError, OSError):
            continue
        if hasattr(module, "Builder"):
            return module
    return None


def version_of(module: ModuleType) -> str:
    """The package and its version, for people: "tensorrt_rtx 1.7.1.116"."""
    return f"{module.__name__} {module.__version__}"


def compute_capabilities(module: ModuleType) -> tuple[str, ...]:
    """The GPUs that the package builds for on any machine ("sm86"); empty when it builds for the GPU at hand only."""
    kind = getattr(module, "ComputeCapability", None)
    if kind is None:
        return ()
    return tuple(sorted((n.lower() for n in kind.__members__ if n.startswith("SM")), key=lambda name: int(name[2:])))


def missing_gpu() -> str:
    """Why no CUDA device can be used here; empty when one can. Loads the driver only: nothing of TensorRT can crash."""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return f"no NVIDIA driver ({DRIVER} does not load)"
    status = driver.cuInit(0)
    if status != 0:
        return f"the NVIDIA driver does not start (cuInit returned {status})"
    count = ctypes.c_int(0)
    status = driver.cuDeviceGetCount(ctypes.byref(count))
    if status != 0 or count.value == 0:
        return f"the NVIDIA driver finds no GPU (cuDeviceGetCount returned {status}, {count.value} devices)"
    return ""


def gpu_at_hand() -> str:
    """The compute capability of the first GPU ("sm86"); empty when there is none."""
    if missing_gpu():
        return ""
    driver, parts = ctypes.CDLL(DRIVER), []
    for attribute in _CAPABILITY:
        value = ctypes.c_int(0)
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0)
        parts.append(str(value.value))
    return "sm" + "".join(parts)
