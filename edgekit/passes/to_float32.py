"""Let a model of half or double precision compute in float32, which is what the runtimes have integer kernels beside."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from edgekit.graph.annotations import fresh_name

FLOAT = ir.DataType.FLOAT
OTHERS = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "output_datatype")


def computes_in_others(model: ir.Model) -> bool:
    """Whether a constant, or an input, of a model is of another floating-point type than float32."""
    stored = (value.dtype for graph in model.graphs() for value in graph.initializers.values())
    return any(dtype in OTHERS for dtype in (*stored, *(value.dtype for value in model.graph.inputs)))


def to_float32(model: ir.Model) -> ir.Model:
    """The same computation in float32, in subgraphs too; inputs and outputs keep their types, with a Cast behind or in front.

    1. Constants are converted, as initializers and as attributes of nodes.
    2. A Cast to another floating-point type becomes one to float32; so does whatever a node says of its output's type.
    3. Types of values follow.

    Numbers of half precision are float32 numbers, but sums come out more exact. Of double precision they are rounded: the caller
    proves that nothing is lost by it.
    """
    model = model.clone()
    ports = {value: value.dtype for value in (*model.graph.inputs, *model.graph.outputs) if value.dtype in OTHERS}
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None and value.const_value.dtype in OTHERS:
                value.const_value = _converted(value.const_value, value.name)
    for node in model.graph.all_nodes():
        _retype(node)
    for value in _values(model):
        if value.dtype in OTHERS:
            value.type = ir.TensorType(FLOAT)
    taken = {value.name for value in _values(model)}
    for value, dtype in ports.items():
        if dtype is not None and value.is_graph_input():
            _cast_input(model.graph, value, dtype, taken)
        elif dtype is not None:
            _cast_output(model.graph, value, dtype, taken)
    return model


def _values(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        yield from graph.inputs
        yield from graph.initializers.values()
        for node in graph:
            yield from node.outputs


def _converted(tensor: ir.TensorProtocol, name: str | None) -> ir.TensorProtocol:
    with np.errstate(over="ignore"):  # double numbers that float32 has no room for: the caller's proof finds that
        return ir.tensor(tensor.numpy().astype(np.float32), name=name)


def _retype(node: ir.Node) -> None:
    for name, attribute in list(node.attributes.items()):
        if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype in OTHERS:
            tensor = attribute.as_tensor()
            node.attributes[name] = ir.AttrTensor(name, _converted(tensor, tensor.name))
        elif name in _TYPE_ATTRIBUTES and attribute.type == ir.AttributeType.INT and attribute.as_int() in OTHERS:
            node.attributes[name] = ir.AttrInt64(name, FLOAT)


def _cast_input(graph: ir.Graph, value: ir.Value, dtype: ir.DataType, taken: set[str | None]) -> None:
    """Let the caller give the type that the source takes."""
    uses = list(value.uses())
    value.type = ir.TensorType(dtype)
    cast = ir.node("Cast", [value], {"to": int(FLOAT)}, name=fresh_name(f"{value.name}/float32", taken))
    output = cast.outputs[0]
    output.name, output.shape, output.type = cast.name, value.shape, ir.TensorType(FLOAT)
    for use in uses:
        use.node.replace_input_with(use.idx, output)
    first = next(iter(graph), None)
    if first is None:
        graph.append(cast)
    else:
        graph.insert_before(first, cast)


def _cast_output(graph: ir.Graph, value: ir.Value, dtype: ir.DataType, taken: set[str | None]) -> None:
    """Give the caller the type that the source gives."""
    name, value.name = value.name, fresh_name(f"{value.name}/float32", taken)
    cast = ir.node("Cast", [value], {"to": int(dtype)}, name=f"{name}/cast")
    output = cast.outputs[0]
    output.name, output.shape, output.type = name, value.shape, ir.TensorType(dtype)
    graph.append(cast)
    graph.outputs[:] = [output if each is value else each for each in graph.outputs]
