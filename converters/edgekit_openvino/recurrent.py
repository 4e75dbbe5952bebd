"""Weights of LSTM, GRU and RNN as codes, in a form that OpenVINO makes floats of when it compiles the model."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgekit.graph.annotations import fresh_name
from edgekit.graph.rules import RECURRENT, RECURRENT_WEIGHTS
from edgekit.lowering.writer import node_name

FLOAT, INT32 = ir.DataType.FLOAT, ir.DataType.INT32


def widen_codes(model: ir.Model) -> ir.Model:
    """Put `Cast -> Cast -> Mul` in the place of a DequantizeLinear that a recurrent operator reads.

    Beside layers in int8 OpenVINO keeps what it takes for dequantization, and its LSTM then refuses weights that are no constants. It
    does not take codes for dequantized that are int32 in between.
    """
    model = model.clone()
    graph = model.graph
    taken = {value.name for node in graph for value in node.outputs} | set(graph.initializers)
    for node in list(graph):
        if node.op_type not in RECURRENT or node.domain:
            continue
        for index in RECURRENT_WEIGHTS:
            weight = node.inputs[index]
            dequantize = None if weight is None else weight.producer()
            if dequantize is not None and dequantize.op_type == "DequantizeLinear":
                node.replace_input_with(index, _widened(graph, dequantize, taken))
                if not dequantize.outputs[0].uses():
                    graph.remove(dequantize, safe=True)
    return model


def _widened(graph: ir.Graph, dequantize: ir.Node, taken: set[str | None]) -> ir.Value:
    codes, scale = dequantize.inputs[:2]
    assert codes is not None and scale is not None and scale.const_value is not None and codes.const_value is not None
    name = node_name(dequantize)
    rank = len(codes.const_value.shape)
    numbers = scale.const_value.numpy()
    shape = [-1 if axis == 1 and numbers.ndim else 1 for axis in range(rank)]
    column = np.ascontiguousarray(numbers.reshape(shape))
    factor = ir.val(fresh_name(f"{name}/scale", taken), const_value=ir.tensor(column))
    graph.register_initializer(factor)
    wide = ir.node("Cast", [codes], {"to": int(INT32)}, name=f"{name}/wide")
    floats = ir.node("Cast", [wide.outputs[0]], {"to": int(FLOAT)}, name=f"{name}/floats")
    scaled = ir.node("Mul", [floats.outputs[0], factor], name=f"{name}/scaled")
    for each in (wide, floats, scaled):
        each.outputs[0].name = fresh_name(each.name or "", taken)
    graph.insert_before(dequantize, [wide, floats, scaled])
    return scaled.outputs[0]
