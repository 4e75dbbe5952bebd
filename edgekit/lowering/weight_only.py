"""Weights as codes in layers whose activations have no grid: they stay float, or get theirs at inference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from edgekit.errors import GraphError, TargetError
from edgekit.graph.annotations import fresh_name, get_params, set_params
from edgekit.graph.operators import bias_place, dims, int_attribute, roles
from edgekit.graph.rules import ACTIVATIONS, precision
from edgekit.lowering.dynamic import DynamicWriter, suits
from edgekit.lowering.grid_writer import GridWriter, numbers
from edgekit.lowering.writer import node_name, replace_value
from edgekit.quant.affine import constant_codes
from edgekit.quant.spec import QuantParams
from edgekit.target import Format, Target


def check_format(model: ir.Model, format: Format) -> None:
    """Refuse a model whose activations have no grids in a format that needs them.

    Raises:
        TargetError: with the first such layer's name.
    """
    layer = next((node for node in model.graph if ACTIVATIONS in node.metadata_props and _weight(node)), None)
    if format != "qdq" and layer is not None:
        raise TargetError(
            f"{layer.op_type} {layer.name!r} was compressed with activations = {layer.metadata_props[ACTIVATIONS]!r}, and format "
            f'{format!r} needs a scale for every activation: export with format "qdq", or compress with activations = "static"'
        )


def lower_weights(model: ir.Model, writer: GridWriter, target: Target, keep_float: frozenset[str]) -> None:
    """Turn the weights of all layers without grids for activations into codes, as the target executes them.

    1. A bias makes up for what quantization adds to the layer's output in the mean.
    2. Activations that get their grid at inference: `DynamicWriter`, where the target wants it in the graph and `suits` agrees;
       else the weight's codes alone make the runtime do it.
    3. A MatMul reads its weight `(K, N)` behind a DequantizeLinear; a Gemm becomes a MatMul and an Add.
    4. So does a Conv, where the target executes the type.

    Layers in `keep_float` or marked to stay float, and those without a grid for their weight, stay float. No grid is left on their weights.

    Raises:
        TargetError: the target does not execute a layer's weights; with what it does execute.
        GraphError: the model is of an opset that lacks them.
    """
    dynamic, stored = DynamicWriter(writer), _Stored(writer, target)
    layers = list(_layers(model.graph))
    for node, weight, params, activations in layers:
        if node.name in keep_float or precision(node) == "float" or params is None:
            continue
        if activations == "dynamic" and target.weights.dynamic == "never" and target.backend:
            raise TargetError(
                f"{node.op_type} {node_name(node)!r} wants scales of activations at run time, which target {target.name!r} cannot "
                'compute: compress with activations = "static", or "none" for weights alone'
            )
        in_graph = activations == "dynamic" and (target.weights.dynamic == "graph" or not target.backend)
        convolves = node.op_type in ("Conv", "ConvTranspose")
        if convolves and (in_graph or params.dtype not in target.weights.conv):
            continue
        if params.shift is not None:
            writer.take_off(node, params.shift, weight)
        if in_graph and suits(node, weight, params):
            dynamic.lower(node, weight, params)
        elif convolves:
            _raise_opset(model, node, params)
            node.replace_input_with(1, stored.dequantized(node, weight, params))
        else:
            if target.backend:  # rules without a runtime are for simulation, which takes everything
                _refuse(node, weight, params, target)
            _raise_opset(model, node, params)
            _lower_product(writer, stored, node, weight, params, add_axis=target.weights.add_axis)
    for _, weight, _, _ in layers:
        set_params(weight, None)


def _layers(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Value, QuantParams | None, str]]:
    """The layers without grids for activations: node, weight, its grid, and "dynamic" or "none"; the mark is taken off."""
    for node in list(graph):
        activations = node.metadata_props.pop(ACTIVATIONS, "")
        weight = _weight(node) if activations else None
        if weight is not None:
            yield node, weight, get_params(weight), activations


def _weight(node: ir.Node) -> ir.Value | None:
    parts = roles(node)
    return None if parts is None or parts.weight is None else node.inputs[parts.weight]


def _refuse(node: ir.Node, weight: ir.Value, params: QuantParams, target: Target) -> None:
    """Refuse weights that the target does not multiply with."""
    known = {str(dtype): sizes for dtype, sizes in target.weights.matmul.items()}
    layer, found = f"{node.op_type} {node_name(node)!r}", _described(params.dtype, params.block_size)
    if params.block_size not in known.get(params.dtype, ()):
        wanted = "; ".join(
            f"{dtype} {' or '.join(_sizes(size) for size in sizes)}" for dtype, sizes in known.items() if sizes
        )
        raise TargetError(
            f"{layer} has weights of {found}, which target {target.name!r} does not execute; expected {wanted}: compress with "
            "those for this layer, or keep it in float"
        )
    shape = numbers(weight).shape
    if len(shape) != 2 and params.dtype != "int8":
        raise TargetError(
            f"{layer} has a weight of shape {shape} in {params.dtype}, which only matrices can have: give this layer int8 weights"
        )
    if params.block_size and not target.weights.ragged and shape[params.axis or 0] % params.block_size:
        raise TargetError(
            f"{layer} sums over {shape[params.axis or 0]} inputs, which are no multiple of its blocks of {params.block_size}, and "
            f"target {target.name!r} wants whole blocks: give this layer other blocks, or none"
        )


def _raise_opset(model: ir.Model, node: ir.Node, params: QuantParams) -> None:
    """Weights of 2 bits came with opset 25, which changes no operator of opset 21; those of 4 bits, and blocks, with that."""
    needed = 25 if params.dtype in ("int2", "uint2") else 21 if params.block_size or params.dtype.endswith("4") else 0
    opset = model.opset_imports.get("", 0)
    if opset < min(needed, 21):
        raise GraphError(
            f"{node.op_type} {node_name(node)!r} has weights of {_described(params.dtype, params.block_size)}, which need opset 21; "
            f"the model has {opset}: set opset = 21 in the target's [graph] and compress it again"
        )
    if opset < needed:
        model.opset_imports[""] = needed
        model.ir_version = max(model.ir_version or 0, 13)


def _described(dtype: str, block_size: int) -> str:
    return f"{dtype} {_sizes(block_size)}"


def _sizes(block_size: int) -> str:
    return f"in blocks of {block_size}" if block_size else "with one scale a channel"


class _Stored:
    """The floats behind the DequantizeLinear of weights, made once for all layers that read them, where the target lets them share."""

    def __init__(self, writer: GridWriter, target: Target) -> None:
        self.writer = writer
        self.rules = target.weights
        self.known: dict[tuple[ir.Value, bool], ir.Value] = {}

    def dequantized(self, node: ir.Node, weight: ir.Value, params: QuantParams, *, transpose: bool = False) -> ir.Value:
        """What `node` reads in place of its weight: as it is or, for a matrix, transposed."""
        if self.rules.shared and (weight, transpose) in self.known:
            return self.known[weight, transpose]
        codes = constant_codes(numbers(weight), params)
        if transpose:
            codes, params = np.ascontiguousarray(codes.T), _transposed(params)
        if node.op_type in ("MatMul", "Gemm"):
            params = _in_blocks(params, codes.shape, self.rules.channel_blocks)
        result = self.writer.constant(node, str(weight.name), codes, params, weight)
        return self.known.setdefault((weight, transpose), result) if self.rules.shared else result


def _lower_product(
    writer: GridWriter, stored: _Stored, node: ir.Node, weight: ir.Value, params: QuantParams, *, add_axis: bool
) -> None:
    """Weights `(K, N)` are what runtimes multiply with as codes; of a Gemm with a transposed weight they make floats first."""
    transpose = node.op_type == "Gemm" and int_attribute(node, "transB", 0) == 1
    node.replace_input_with(1, stored.dequantized(node, weight, params, transpose=transpose))
    if node.op_type == "Gemm":
        node.attributes.pop("transB", None)
        if all(node.attributes.get_float(name, 1.0) == 1.0 for name in ("alpha", "beta")):
            _rewrite(writer, node, add_axis=add_axis and len(node.inputs) > 2)
    elif add_axis and len(dims(node.inputs[0]) or ()) == 2 and bias_place(node) is not None:
        _rewrite(writer, node, add_axis=True)


def _rewrite(writer: GridWriter, node: ir.Node, *, add_axis: bool) -> None:
    """A plain Gemm, or a MatMul, as a MatMul that keeps its name, and an Add; between Unsqueeze and Squeeze where asked."""
    name, old, (source, weight, *rest) = node_name(node), node.outputs[0], node.inputs
    assert source is not None and weight is not None
    nodes, axes = [], []
    if add_axis:
        axes = [writer.initializer(f"{name}_axis", np.zeros(1, np.int64), ir.DataType.INT64)]
        nodes.append(writer.node("Unsqueeze", [source, *axes], name))
        source = nodes[-1].outputs[0]
    nodes.append(ir.node("MatMul", [source, weight], name=node.name, metadata_props=node.metadata_props))
    node.name = None
    if rest and rest[0] is not None:
        nodes.append(writer.node("Add", [nodes[-1].outputs[0], rest[0]], name))
    if add_axis:
        nodes.append(writer.node("Squeeze", [nodes[-1].outputs[0], *axes], name))
    for before in nodes[:-1]:
        before.outputs[0].name = fresh_name(f"{before.name}_result", writer.values)
    writer.graph.insert_before(node, nodes)
    replace_value(old, nodes[-1].outputs[0])


def _transposed(params: QuantParams) -> QuantParams:
    """The grid of a transposed matrix."""
    if params.axis is None:
        return params
    turned = replace(params, axis=1 - params.axis)
    if not params.block_size:
        return turned
    return replace(turned, scale=np.ascontiguousarray(params.scale.T), zero_point=params.zero_point.T)


def _in_blocks(params: QuantParams, shape: tuple[int, ...], size: int) -> QuantParams:
    """One scale for each column of a matrix `(K, N)`, written as equal ones for its blocks: no larger than the column needs."""
    if not size or params.block_size or params.axis != 1:
        return params
    while size > 16 and size // 2 >= shape[0]:
        size //= 2
    blocks = (-(-shape[0] // size), shape[1])
    return replace(
        params,
        axis=0,
        block_size=size,
        scale=np.ascontiguousarray(np.broadcast_to(params.scale, blocks)),
        zero_point=np.broadcast_to(params.zero_point, blocks),
    )
