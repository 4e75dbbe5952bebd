"""Moving data on codes: DequantizeLinear sinks through operators that only move or select elements."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgekit.lowering.units import Operand, constant, operand, same_grid
from edgekit.lowering.writer import Writer, node_name, replace_value

MOVES = frozenset(
    {
        "DepthToSpace",
        "Dropout",
        "Expand",
        "Flatten",
        "Gather",
        "GatherElements",
        "GatherND",
        "Identity",
        "MaxPool",
        "Pad",
        "ReduceMax",
        "ReduceMin",
        "Reshape",
        "Resize",
        "Slice",
        "SpaceToDepth",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    }
)
"""Operators whose result holds elements of their first input (or the padding), in the codes as in the numbers."""


def sink_dequantize(graph: ir.Graph) -> None:
    """Turn DequantizeLinear -> move into move -> DequantizeLinear, and drop Q after DQ of the same grid.

    The numbers do not change: DequantizeLinear is monotone and per element, and its grid is one for the tensor.
    """
    for node in graph:
        if node.op_type == "QuantizeLinear":
            _cancel(node)
        elif node.op_type in MOVES and node.domain in ("", "ai.onnx"):
            _sink(graph, node)


def _cancel(quantize: ir.Node) -> None:
    value, scale = quantize.inputs[0], quantize.inputs[1]
    assert value is not None
    assert scale is not None
    before = operand(value)
    zero_point = quantize.inputs[2] if len(quantize.inputs) > 2 else None
    if before is None or constant(scale) is None or quantize.outputs[0].is_graph_output():
        return
    after = Operand(quantize.outputs[0], scale, zero_point)
    if before.per_tensor and same_grid(before, after):
        ir.convenience.replace_all_uses_with(quantize.outputs[0], before.codes)


def _sink(graph: ir.Graph, node: ir.Node) -> None:
    data = None if node.inputs[0] is None else operand(node.inputs[0])
    if data is None or not data.per_tensor or not _moves_codes(node):
        return
    writer = Writer(graph, node)
    inputs: list[ir.Value | None] = [data.codes, *node.inputs[1:]]
    if node.op_type == "Pad" and node.attributes.get_string("mode", "constant") == "constant":
        axes = node.inputs[3] if len(node.inputs) > 3 else None
        inputs = [data.codes, node.inputs[1], _padding(writer, data), axes]
    moved = ir.node(
        node.op_type,
        inputs,
        dict(node.attributes),
        num_outputs=len(node.outputs),
        name=node.name,
        metadata_props=dict(node.metadata_props),
    )
    graph.insert_before(node, moved)
    for index, (old, new) in enumerate(zip(node.outputs, moved.outputs, strict=True)):
        new.name, new.shape = f"{old.name or node_name(node)}/codes", old.shape
        if data.dtype is not None:
            new.dtype = data.dtype
        real = writer.node(
            "DequantizeLinear", [new, data.scale, data.zero_point], suffix=f"dequantize{index}", dtype=old.dtype
        )
        replace_value(old, real)


def _padding(writer: Writer, data: Operand) -> ir.Value:
    """The code of zero."""
    if data.zero_point is not None:
        return data.zero_point
    assert data.dtype is not None
    return writer.constant("padding", np.zeros((), data.dtype.numpy()))


def _moves_codes(node: ir.Node) -> bool:
    """Whether this node selects elements; some operators do so only with some attributes."""
    if node.op_type in ("MaxPool", "Dropout"):
        return all(not value.uses() and not value.is_graph_output() for value in node.outputs[1:])
    if node.op_type == "Resize":
        return (
            node.attributes.get_string("mode", "nearest") == "nearest"
            and node.attributes.get_string("coordinate_transformation_mode", "half_pixel") != "tf_crop_and_resize"
        )
    if node.op_type == "Pad":
        value = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        absent = len(node.inputs) <= 2 or node.inputs[2] is None
        return absent or (value is not None and float(value.item()) == 0.0)
    return True
