"""x86 CPUs without VNNI add pairs of uint8 * int8 products in 16 bits, which saturate when weights use all 8 bits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from edgekit.graph.annotations import annotated_values, get_params, set_params
from edgekit.graph.operators import is_constant, roles
from edgekit.graph.rules import ACTIVATIONS, RECURRENT
from edgekit.lowering.cpu import VNNI
from edgekit.target import Target

SAFE_CODE = 64
"""2 * 255 * 64 is the largest sum of two products that fits into 16 bits: 7-bit weights never saturate."""


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
