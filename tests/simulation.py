"""The annotated model with its quantization made visible: every grid becomes a Quantize/DequantizeLinear pair on floats.

A second, independent way from grids to nodes, for the tests of the passes that go the other way.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgekit.graph.annotations import (
    DTYPES,
    METADATA,
    all_values,
    annotated_values,
    code_tensor,
    describe,
    fresh_name,
    get_params,
    set_params,
)
from edgekit.graph.operators import copy_type
from edgekit.quant.spec import QuantParams


def insert_qdq(model: ir.Model) -> ir.Model:
    """A Q/DQ pair on every annotated tensor, weights included: float arithmetic on the numbers that integers would have.

    The inverse of `fold_fake_quant`: what the nodes cannot say of a grid (where it came from) goes into their metadata.
    A graph output is the quantized value, unless it is an input or a constant at the same time.
    """
    model = model.clone()
    graph = model.graph
    taken = {value.name for value in all_values(graph)}
    for value in annotated_values(graph):
        _insert_pair(graph, value, taken)
    return model


def _insert_pair(graph: ir.Graph, value: ir.Value, taken: set[str | None]) -> None:
    params, name = get_params(value), value.name
    assert params is not None and name is not None
    readers = list(value.uses())
    float_type = value.dtype or ir.DataType.FLOAT
    grid = [
        _initializer(graph, fresh_name(f"{name}_scale", taken), params.scale, float_type),
        _initializer(graph, fresh_name(f"{name}_zero_point", taken), params.zero_point, DTYPES[params.dtype]),
    ]
    attributes = {} if params.axis is None else {"axis": params.axis}
    nodes = []
    source = value
    if params.narrow_range and _may_fall_below(value, params):
        floor = _initializer(graph, fresh_name(f"{name}_lowest", taken), _lowest(value, params), float_type)
        nodes.append(_node("Max", [value, floor], {}, f"{name}/Max", fresh_name(f"{name}_saturated", taken), value))
        source = nodes[0].outputs[0]
    quantized = fresh_name(f"{name}_quantized", taken)
    nodes.append(_node("QuantizeLinear", [source, *grid], attributes, f"{name}/QuantizeLinear", quantized, value))
    codes = nodes[-1].outputs[0]
    codes.dtype = DTYPES[params.dtype]
    dequantized = fresh_name(f"{name}_dequantized", taken)
    nodes.append(_node("DequantizeLinear", [codes, *grid], attributes, f"{name}/DequantizeLinear", dequantized, value))
    output = nodes[-1].outputs[0]
    for node in nodes:
        node.metadata_props[METADATA] = describe(params)
    _insert_after(graph, value, nodes)
    for use in readers:
        use.node.replace_input_with(use.idx, output)
    if value.producer() is not None and value.is_graph_output():
        for index, graph_output in enumerate(graph.outputs):
            if graph_output is value:
                graph.outputs[index] = output
        value.name = fresh_name(f"{name}_float", taken)
        output.name = name
    set_params(value, None)


def _node(
    op_type: str, inputs: list[ir.Value], attributes: dict[str, int], name: str, output_name: str, like: ir.Value
) -> ir.Node:
    node = ir.node(op_type, inputs, attributes, name=name)
    node.outputs[0].name = output_name
    copy_type(node.outputs[0], like)
    return node


def _lowest(value: ir.Value, params: QuantParams) -> NDArray[np.float32]:
    """The number that the lowest code in use stands for, shaped to stand against the tensor.

    QuantizeLinear knows no narrow range: it would saturate one code lower.
    """
    lowest = ((params.qmin - params.zero_point) * params.scale).astype(np.float32)
    if params.axis is None:
        return lowest
    assert value.shape is not None, "a channel axis needs a known rank"
    return lowest.reshape([-1 if axis == params.axis else 1 for axis in range(len(value.shape))])


def _may_fall_below(value: ir.Value, params: QuantParams) -> bool:
    """Whether numbers below the lowest code can occur: constants are looked at."""
    if value.const_value is None or value.is_graph_input():
        return True
    return bool((value.const_value.numpy().astype(np.float32) < _lowest(value, params)).any())


def _insert_after(graph: ir.Graph, value: ir.Value, nodes: list[ir.Node]) -> None:
    producer = value.producer()
    first = next(iter(graph), None)
    if producer is not None:
        graph.insert_after(producer, nodes)
    elif first is not None:
        graph.insert_before(first, nodes)
    else:
        graph.extend(nodes)


def _initializer(graph: ir.Graph, name: str, array: NDArray[np.generic], dtype: ir.DataType) -> ir.Value:
    value = ir.Value(name=name, const_value=code_tensor(array, dtype, name))
    value.shape, value.dtype = ir.Shape(array.shape), dtype
    graph.register_initializer(value)
    return value
