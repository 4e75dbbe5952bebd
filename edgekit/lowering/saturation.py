"""x86 CPUs without VNNI add pairs of uint8 * int8 products in 16 bits, which saturate when weights use all 8 bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from edgekit.graph.annotations import annotated_values, get_params, set_params
from edgekit.graph.operators import is_constant, roles
from edgekit.graph.rules import ACTIVATIONS, RECURRENT
from edgekit.target import Target

VNNI = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})
"""Instruction sets that add these products in 32 bits."""
SAFE_CODE = 64
"""2 * 255 * 64 is the largest sum of two products that fits into 16 bits: 7-bit weights never saturate."""

SATURATES = (
    "this machine's CPU has no VNNI, which the target's has: results are checked here with weights of 7 bits, "
    "latency is not measured"
)
SATURATES_REMEDY = (
    "run `edgekit benchmark` on a CPU with VNNI, or export for a target file of this CPU, with reduce_range = true in "
    "[quantization]"
)
CPUINFO = Path("/proc/cpuinfo")


def reduce_range(model: ir.Model) -> None:
    """Put 8-bit weights on grids twice as coarse, whose codes lie within ±`SAFE_CODE`: the nearest ones, whatever was chosen before.

    Not trained ones, nor those that only meet floats. In place.
    """
    for value in annotated_values(model.graph):
        params = get_params(value)
        assert params is not None
        movable = params.dtype == "int8" and not params.fixed and not params.block_size
        if is_constant(value) and movable and any(_meets_codes(use.node, value) for use in value.uses()):
            set_params(value, replace(params, scale=params.scale * np.float32(2), codes=None))


def _meets_codes(node: ir.Node, weight: ir.Value) -> bool:
    if node.op_type in RECURRENT:
        return node.metadata_props.get(ACTIVATIONS) == "dynamic"
    parts = roles(node)
    multiplies = parts is not None and parts.weight is not None and node.inputs[parts.weight] is weight
    return multiplies and node.metadata_props.get(ACTIVATIONS) != "none"


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


def saturation_warnings(model: ir.Model, target: Target) -> list[str]:
    """One sentence when weights of the lowered `model` may saturate on the target's CPU; empty when they cannot."""
    if target.device.arch != "x86_64" or VNNI & set(target.device.isa):
        return []
    if target.quantization.activation.dtype != "uint8" or target.quantization.reduce_range:
        return []
    names = [name for name, value in model.graph.initializers.items() if _is_wide(value)]
    if not names:
        return []
    return [
        f"{len(names)} weights use codes beyond ±{SAFE_CODE}, the first is {names[0]!r}, and [device] isa names none of "
        f"{', '.join(sorted(VNNI))}: without these a CPU adds two uint8 x int8 products in 16 bits, which saturate, and results "
        "are wrong; name the instruction set if the CPU has one, else set reduce_range = true in [quantization]"
    ]


def _is_wide(value: ir.Value) -> bool:
    """Whether a constant holds int8 weights of which some need the eighth bit."""
    tensor = value.const_value
    if tensor is None or tensor.dtype != ir.DataType.INT8 or len(tensor.shape) < 2:
        return False
    return int(np.abs(tensor.numpy().astype(np.int16)).max(initial=0)) > SAFE_CODE
