"""The annotated model with its quantization made visible: every grid becomes a Quantize/DequantizeLinear pair on floats."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgekit.graph.annotations import DTYPES, annotated_values, code_tensor, describe, get_params, set_params

_METADATA = "edgekit.quant"


def insert_qdq(model: ir.Model) -> ir.Model:
    """A Q/DQ pair on every annotated tensor, weights included: float arithmetic on the numbers that integers would have.

    The inverse of `fold_fake_quant`: what the nodes cannot say of a grid (where it came from) goes into their metadata.
    """
    model = model.clone()
    graph = model.graph
    for value in annotated_values(graph):
        params = get_params(value)
        assert params is not None and value.name is not None
        name = value.name
        grid = [
            _initializer(graph, f"{name}_scale", np.asarray(params.scale), ir.DataType.FLOAT),
            _initializer(graph, f"{name}_zero_point", np.asarray(params.zero_point), DTYPES[params.dtype]),
        ]
        attributes = {} if params.axis is None else {"axis": params.axis}
        readers = list(value.uses())
        output_index = graph.outputs.index(value) if value.is_graph_output() else None
        quantize = ir.node("QuantizeLinear", [value, *grid], attributes, name=f"{name}/QuantizeLinear")
        quantize.metadata_props[_METADATA] = describe(params)
        quantize.outputs[0].name = f"{name}_quantized"
        dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], *grid], attributes, name=f"{name}/DequantizeLinear")
        output = dequantize.outputs[0]
        output.name = f"{name}_dequantized"
        output.shape, output.dtype = value.shape, value.dtype
        _insert_after(graph, value, [quantize, dequantize])
        for use in readers:
            use.node.replace_input_with(use.idx, output)
        if output_index is not None and not value.is_graph_input():
            graph.outputs[output_index] = output
            value.name, output.name = f"{name}_float", name
        set_params(value, None)
    return model


def _insert_after(graph: ir.Graph, value: ir.Value, nodes: list[ir.Node]) -> None:
    producer = value.producer()
    if producer is not None:
        graph.insert_after(producer, nodes)
        return
    first = next(iter(graph), None)
    if first is None:
        graph.extend(nodes)
    else:
        graph.insert_before(first, nodes)


def _initializer(graph: ir.Graph, name: str, array: np.ndarray, dtype: ir.DataType) -> ir.Value:
    value = ir.Value(name=name, const_value=code_tensor(array, dtype, name))
    value.shape, value.dtype = ir.Shape(array.shape), dtype
    graph.register_initializer(value)
    return value
