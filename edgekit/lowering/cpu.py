"""What this machine's CPU computes as a target's does: nothing here needs a graph."""

from __future__ import annotations

from pathlib import Path

from edgekit.target import Target

VNNI = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})
"""Instruction sets that add these products in 32 bits."""
SATURATES = (
    "this machine's CPU has no VNNI, which the target's has: results are checked here with weights of 7 bits, "
    "latency is not measured"
)
SATURATES_REMEDY = (
    "run `edgekit benchmark` on a CPU with VNNI, or export for a target file of this CPU, with reduce_range = true in "
    "[quantization]"
)
CPUINFO = Path("/proc/cpuinfo")


def saturates_here(target: Target) -> bool:
    """Whether this machine's CPU saturates products of 8-bit weights that the device of `target`, an ARM CPU or one with VNNI, does not."""
    device = target.device
    exact = device.arch == "aarch64" or (device.arch == "x86_64" and bool(VNNI & set(device.isa)))
    return exact and not target.quantization.reduce_range and cpu_saturates()


def with_reduced_range(target: Target) -> Target:
    """The same target for a CPU without VNNI."""
    rules = target.quantization.model_copy(update={"reduce_range": True})
    return target.model_copy(update={"quantization": rules})


def cpu_saturates() -> bool:
    """Whether this machine's CPU is an x86 one without VNNI, as far as Linux tells."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), None)  # only on x86
    return flags is not None and not VNNI & set(flags)
