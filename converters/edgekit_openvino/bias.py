"""A way around OpenVINO: int8 convolutions without a bias are computed wrongly when codes and floats are read from them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgekit.graph.operators import int_attribute
from edgekit.lowering.writer import node_name

NEARLY_ZERO = 1e-30
"""Vanishes in every sum of float32 numbers that matter, and is no zero, which OpenVINO would drop."""
NEARLY_ZERO_HALF = 2.0**-24
"""The same in float16, whose least number this is."""


def add_biases(model: ir.Model) -> ir.Model:
    """Give every quantized Conv and ConvTranspose whose bias is missing or zero one that is nearly zero.

    With OpenVINO 2026.4 such a convolution was off by 90 % of its range at readers of the float result, when a QuantizeLinear
    read it too.
    """
    model = model.clone()
    for node in list(model.graph):
        if node.op_type not in ("Conv", "ConvTranspose") or node.domain or not _reads_codes(node):
            continue
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is None or (bias.const_value is not None and not bias.const_value.numpy().any()):
            node.resize_inputs(3)
            node.replace_input_with(2, _register(model.graph, node))
    return model


def _reads_codes(node: ir.Node) -> bool:
    producer = node.inputs[1].producer() if node.inputs[1] is not None else None
    return producer is not None and producer.op_type == "DequantizeLinear"


def _register(graph: ir.Graph, node: ir.Node) -> ir.Value:
    weight = node.inputs[1]
    assert weight is not None and weight.shape is not None
    transposed = node.op_type == "ConvTranspose"
    per_group = weight.shape.numpy()[1 if transposed else 0]
    channels = per_group * int_attribute(node, "group", 1) if transposed else per_group
    name = f"{node_name(node)}/nearly_zero"
    dtype = weight.dtype or ir.DataType.FLOAT
    number = NEARLY_ZERO_HALF if dtype == ir.DataType.FLOAT16 else NEARLY_ZERO
    value = ir.Value(name=name, shape=ir.Shape([channels]), type=ir.TensorType(dtype))
    value.const_value = ir.tensor(np.full(channels, number, dtype.numpy()), dtype=dtype, name=name)
    graph.register_initializer(value)
    return value
