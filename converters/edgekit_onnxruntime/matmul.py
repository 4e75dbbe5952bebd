"""Linear layers and residual sums as the operators that ONNX Runtime runs fastest."""

from __future__ import annotations

import onnx_ir as ir

from edgekit.graph.operators import is_constant
from edgekit.lowering.units import Operand, constant, only_reader, operand, other_input
from edgekit.lowering.writer import Writer, remove_dead, replace_value

DOMAIN = "com.microsoft"
"""Of ONNX Runtime's own operators."""
PRODUCT = "MatMulIntegerToFloat"
_ACTIVATIONS = (ir.DataType.UINT8, ir.DataType.INT8)


def fuse_matmuls(model: ir.Model) -> ir.Model:
    """Each MatMul of codes by int8 weights, and the bias behind it, as one `MatMulIntegerToFloat` of the MatMul's name.

    1. ONNX Runtime fuses them by itself too, but not the bias where it finds a Gelu behind it, and no int8 activations that
       several layers share.
    2. Zero points of the weights that are all 0 are left out: one for each column costs time.
    3. A product that a QuantizeLinear reads stays: it becomes a `QLinearMatMul`, with codes as its output.
    """
    model = model.clone()
    model.opset_imports.setdefault(DOMAIN, 1)
    for node in list(model.graph):
        if node.op_type == "MatMul" and not node.domain:
            _fuse(model.graph, node)
    remove_dead(model)
    return model


def keep_residual_sums(model: ir.Model) -> ir.Model:
    """Residual Adds before a LayerNormalization as `Sum`, which computes the same.

    ONNX Runtime would make one `SkipLayerNormalization` of an Add and its LayerNormalization, and that takes several times as
    long as the two do.
    """
    model = model.clone()
    for node in list(model.graph):
        added = (
            node.inputs[0].producer() if node.op_type == "LayerNormalization" and node.inputs[0] is not None else None
        )
        if added is None or added.op_type != "Add" or added.domain or any(map(is_constant, added.inputs)):
            continue
        replace_value(added.outputs[0], Writer(model.graph, added).node("Sum", added.inputs))
    remove_dead(model)
    return model


def _fuse(graph: ir.Graph, node: ir.Node) -> None:
    left, right = (None if value is None else operand(value) for value in node.inputs)
    if left is None or right is None or not (_suits_left(left) and _suits_right(right)):
        return
    reader = only_reader(node.outputs[0])
    if reader is not None and reader.op_type == "QuantizeLinear":
        return
    bias = None if reader is None else _row(reader, node.outputs[0], right.codes)
    inputs = [left.codes, right.codes, left.scale, right.scale, left.zero_point]
    inputs.append(right.zero_point if right.zero_points.any() else None)
    result = node if bias is None or reader is None else reader
    writer = Writer(graph, node)
    replace_value(result.outputs[0], writer.node(PRODUCT, [*inputs, bias], domain=DOMAIN))


def _suits_left(codes: Operand) -> bool:
    return codes.dtype in _ACTIVATIONS and codes.scales.ndim == 0 and codes.scale.dtype == ir.DataType.FLOAT


def _suits_right(codes: Operand) -> bool:
    stored = codes.constant_codes
    return (
        stored is not None
        and stored.ndim == 2
        and codes.dtype == ir.DataType.INT8
        and codes.axis in (None, 1, -1)
        and codes.scale.dtype == ir.DataType.FLOAT
    )


def _row(add: ir.Node, product: ir.Value, weight: ir.Value) -> ir.Value | None:
    """The constant row of the weight's width that an Add adds to a product."""
    if add.op_type != "Add" or add.domain:
        return None
    value = other_input(add, product)
    numbers, codes = constant(value), constant(weight)
    if value is None or numbers is None or codes is None or numbers.dtype.name != "float32":
        return None
    return value if numbers.shape == codes.shape[1:] else None
