"""x86 CPUs without VNNI add pairs of uint8 * int8 products in 16 bits, which saturate when weights use all 8 bits."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgekit.target import Target

VNNI = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})
"""Instruction sets that add these products in 32 bits."""
SAFE_CODE = 64
"""2 * 255 * 64 is the largest sum of two products that fits into 16 bits: 7-bit weights never saturate."""


def saturation_warnings(model: ir.Model, target: Target) -> list[str]:
    """One sentence when weights of the lowered `model` may saturate on the target's CPU; empty when they cannot."""
    if target.device.arch != "x86_64" or VNNI & set(target.device.isa):
        return []
    if target.quantization.activation.dtype != "uint8":
        return []
    names = [name for name, value in model.graph.initializers.items() if _is_wide(value)]
    if not names:
        return []
    return [
        f"{len(names)} weights use codes beyond ±{SAFE_CODE}, the first is {names[0]!r}, and [device] isa names none of "
        f"{', '.join(sorted(VNNI))}: without these a CPU adds two uint8 x int8 products in 16 bits, which saturate, and results "
        "are wrong; name the instruction set if the CPU has one, else keep the layers float that the report finds inaccurate"
    ]


def _is_wide(value: ir.Value) -> bool:
    """Whether a constant holds int8 weights of which some need the eighth bit."""
    tensor = value.const_value
    if tensor is None or tensor.dtype != ir.DataType.INT8 or len(tensor.shape) < 2:
        return False
    return int(np.abs(tensor.numpy().astype(np.int16)).max(initial=0)) > SAFE_CODE
