"""Rules of OpenVINO's that it does not enforce."""

from __future__ import annotations

import onnx_ir as ir

from edgekit.graph.annotations import DTYPES
from edgekit.lowering.saturation import saturation_warnings
from edgekit.target import Target


def broken_rules(model: ir.Model, target: Target) -> list[str]:
    """Graphs that OpenVINO accepts and computes wrongly, or silently runs in float.

    1. Pad between a DequantizeLinear and its reader, and Pad of codes with a number other than 0.
    2. Weights with a zero point run in f32.
    3. 16-bit grids are stripped, their clamp too.
    4. Weights that saturate on CPUs without VNNI.
    """
    found = []
    for node in model.graph:
        if node.op_type == "Pad":
            found += _pad_rules(node)
        if node.op_type == "DequantizeLinear":
            found += _grid_rules(node)
    return found + saturation_warnings(model, target)


def _pad_rules(pad: ir.Node) -> list[str]:
    source, filling = pad.inputs[0], pad.inputs[2] if len(pad.inputs) > 2 else None
    producer = source.producer() if source is not None else None
    if producer is not None and producer.op_type == "DequantizeLinear":
        return [f"Pad {pad.name!r} reads a DequantizeLinear: OpenVINO pads codes with 0, not with the zero point"]
    codes = source is not None and source.dtype in (DTYPES["int8"], DTYPES["uint8"])
    if codes and filling is not None and filling.const_value is not None and filling.const_value.numpy().any():
        return [f"Pad {pad.name!r} pads codes with a zero point other than 0: OpenVINO pads channels with 0"]
    return []


def _grid_rules(dequantize: ir.Node) -> list[str]:
    codes, zero_point = dequantize.inputs[0], dequantize.inputs[2] if len(dequantize.inputs) > 2 else None
    if codes is None or zero_point is None or zero_point.const_value is None:
        return []
    found = []
    eight_bits = zero_point.const_value.dtype in (DTYPES["int8"], DTYPES["uint8"])
    if codes.const_value is not None and eight_bits and zero_point.const_value.numpy().any():
        found.append(f"weight {codes.name!r} has a zero point other than 0: OpenVINO runs its layer in f32")
    if zero_point.const_value.dtype in (DTYPES["int16"], DTYPES["uint16"]):
        found.append(f"{dequantize.name!r} is a 16-bit grid: OpenVINO drops it, its clamp too")
    return found
