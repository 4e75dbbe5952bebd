"""Writing codes, grids and Quantize/DequantizeLinear nodes into a graph, under names that nothing else has."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgekit.graph.annotations import DTYPES, code_tensor, fresh_name
from edgekit.graph.operators import bias_place
from edgekit.lowering.writer import node_name
from edgekit.quant.spec import QuantParams


class GridWriter:
    """Writes into one graph; node names and value names stay unique."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        values = (value for node in graph.all_nodes() for value in (*node.inputs, *node.outputs) if value is not None)
        self.values = {value.name for value in (*graph.inputs, *graph.initializers.values(), *values)}
        self.nodes = {node.name for node in graph.all_nodes()}

    def constant(
        self, node: ir.Node, name: str, codes: NDArray[np.generic], params: QuantParams, like: ir.Value
    ) -> ir.Value:
        """Codes as an initializer, and a DequantizeLinear before `node` that makes floats of them, of the type of `like`."""
        stored = self.initializer(f"{name}_quantized", codes, DTYPES[params.dtype])
        attributes = {} if params.axis is None else {"axis": params.axis}
        if params.block_size:
            attributes["block_size"] = params.block_size
        dequantize = self.node("DequantizeLinear", [stored, *self.grid(name, params, like)], name, attributes)
        self.graph.insert_before(node, dequantize)
        result = dequantize.outputs[0]
        result.name = fresh_name(f"{name}_dequantized", self.values)
        result.shape, result.dtype = ir.Shape(codes.shape), like.dtype or ir.DataType.FLOAT
        return result

    def grid(self, name: str, params: QuantParams, like: ir.Value) -> list[ir.Value]:
        """Scale, of the float type of `like`, and zero point; blocks have none where all are 0."""
        scale = self.initializer(f"{name}_scale", params.scale, like.dtype or ir.DataType.FLOAT)
        if params.block_size and not params.zero_point.any():
            return [scale]
        zero_point = np.broadcast_to(params.zero_point, params.scale.shape)
        return [scale, self.initializer(f"{name}_zero_point", zero_point, DTYPES[params.dtype])]

    def initializer(self, name: str, array: NDArray[np.generic], dtype: ir.DataType) -> ir.Value:
        """A new initializer."""
        name = fresh_name(name, self.values)
        value = ir.Value(name=name, const_value=code_tensor(np.asarray(array), dtype, name))
        value.shape, value.dtype = ir.Shape(array.shape), dtype
        self.graph.register_initializer(value)
        return value

    def node(
        self, op_type: str, inputs: Sequence[ir.Value], name: str, attributes: dict[str, int] | None = None
    ) -> ir.Node:
        """A node `<name>/<op_type>`, not yet in the graph."""
        return ir.node(op_type, inputs, attributes or {}, name=fresh_name(f"{name}/{op_type}", self.nodes))

    def node_after(self, value: ir.Value, node: ir.Node) -> ir.Value:
        """Insert a node right behind whatever makes `value`; returns its first output."""
        producer = value.producer()
        if producer is not None:
            self.graph.insert_after(producer, node)
        else:
            self.graph.insert_before(self.graph[0], node)
        return node.outputs[0]

    def take_off(self, node: ir.Node, shift: NDArray[np.float32], like: ir.Value) -> None:
        """Subtract from a layer's bias what quantization adds to its output in the mean."""
        place = bias_place(node)
        assert place is not None, "a shift is known only where there is a place for it"
        reader, index = place
        old = reader.inputs[index] if len(reader.inputs) > index else None
        bias = -shift if old is None else (numbers(old).astype(np.float64) - shift).astype(np.float32)
        if len(reader.inputs) <= index:
            reader.resize_inputs(index + 1)
        name = f"{node_name(node)}_bias" if old is None else f"{old.name}_corrected"
        reader.replace_input_with(index, self.initializer(name, bias, like.dtype or ir.DataType.FLOAT))


def numbers(constant: ir.Value) -> NDArray[np.float32]:
    """A constant as float32."""
    assert constant.const_value is not None
    return np.asarray(constant.const_value.numpy(), np.float32)
