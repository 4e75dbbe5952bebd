"""Fold fake-quantization into tensor quant attributes."""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir

from edgekit.errors import GraphError
from edgekit.graph.annotations import get_params, set_params
from edgekit.graph.operators import is_constant
from edgekit.quant.affine import dequantize
from edgekit.quant.spec import INTEGER_RANGES, QuantParams, same_grid

METADATA = "edgekit.quant"
_CODES_PASS = (
    "MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Gather", "Split", "Identity", "Pad", "Concat",
    "DepthToSpace", "SpaceToDepth", "Resize", "Expand", "Tile",
)  # fmt: skip


def fold_fake_quant(model: ir.Model) -> ir.Model:
    """Any Quantize/DequantizeLinear graph becomes a float graph whose tensors carry the grids.

    1. `x -> Q -> DQ`: both nodes go, the grid becomes an attribute of `x`.
    2. constant codes -> DQ: the constant becomes float, on its grid; int32 codes (biases) become plain floats.
    3. `Q -> Pad / Reshape / MaxPool / ... on codes -> DQ`: the operator runs on floats, and its output is on the same grid.

    Grids found this way are marked fixed: they were trained, or chosen by somebody, and are not moved later.

    Raises:
        GraphError: two grids on one tensor, a Q and a DQ that differ, or an operator that computes on codes (QLinearConv ...).
    """
    model = model.clone()
    graph = model.graph
    floats: dict[ir.Value, ir.Value] = {}  # a value that holds codes -> the float value that it stands for
    for node in list(graph):
        kind = node.op_type if node.domain in ("", "com.microsoft") else ""
        if kind == "QuantizeLinear":
            _annotate(node.inputs[0], _grid(node), node)
            floats[node.outputs[0]] = _required(node, 0)
        elif kind == "DequantizeLinear":
            _fold_dequantize(graph, node, floats)
        elif any(value in floats for value in node.inputs if value is not None):
            _run_on_floats(graph, node, floats)
    _remove_dead(graph)
    return model


def _fold_dequantize(graph: ir.Graph, node: ir.Node, floats: dict[ir.Value, ir.Value]) -> None:
    codes, output = _required(node, 0), node.outputs[0]
    params = _grid(node)
    if codes in floats:
        value = floats[codes]
        _annotate(value, params, node)
    elif is_constant(codes):
        value = _dequantized_constant(graph, codes, params)
    else:
        raise GraphError(
            f"DequantizeLinear {node.name!r} reads {codes.name!r}, which no QuantizeLinear made; only Quantize/DequantizeLinear graphs "
            "can be folded, not integer operators"
        )
    if not output.is_graph_output():
        output.replace_all_uses_with(value)
        return
    if value.is_graph_input() or value.is_graph_output():
        identity = ir.node("Identity", [value], name=f"{node.name}/Identity")
        graph.insert_after(node, identity)
        identity.outputs[0].shape, identity.outputs[0].dtype = output.shape, output.dtype
        value = identity.outputs[0]
    name = output.name
    output.replace_all_uses_with(value, replace_graph_outputs=True)
    output.name, value.name = None, name


def _run_on_floats(graph: ir.Graph, node: ir.Node, floats: dict[ir.Value, ir.Value]) -> None:
    """Let an operator that moved codes around move floats instead."""
    if node.op_type not in _CODES_PASS or node.domain:
        raise GraphError(
            f"node {node.name!r} ({node.op_type}) computes on codes; only Quantize/DequantizeLinear graphs can be folded, not QOperator files"
        )
    params = None
    for index, value in enumerate(node.inputs):
        if value is not None and value in floats:
            params = get_params(floats[value])
            node.replace_input_with(index, floats[value])
    assert params is not None
    if node.op_type == "Pad" and len(node.inputs) > 2 and node.inputs[2] is not None:
        _pad_with_real_number(graph, node, params)
    for output in node.outputs:
        output.dtype = ir.DataType.FLOAT
        floats[output] = output
        set_params(output, params)


def _pad_with_real_number(graph: ir.Graph, node: ir.Node, params: QuantParams) -> None:
    value = _required(node, 2)
    if not is_constant(value) or value.const_value is None:
        raise GraphError(f"Pad {node.name!r} pads codes with a value computed at run time; it cannot be folded")
    real = dequantize(value.const_value.numpy().astype(np.int64), params).astype(np.float32)
    name = f"{value.name}_float"
    if name not in graph.initializers:
        graph.register_initializer(ir.Value(name=name, const_value=ir.tensor(real, name=name)))
    node.replace_input_with(2, graph.initializers[name])


def _dequantized_constant(graph: ir.Graph, codes: ir.Value, params: QuantParams) -> ir.Value:
    assert codes.const_value is not None and codes.name is not None
    real = dequantize(codes.const_value.numpy().astype(np.int64), params).astype(np.float32)
    name = codes.name.removesuffix("_quantized")
    if name == codes.name or name in graph.initializers:
        name = f"{codes.name}_float"
    known = graph.initializers.get(name)
    if known is not None:
        _annotate(known, params, None)
        return known
    value = ir.Value(name=name, const_value=ir.tensor(real, name=name))
    value.shape, value.dtype = ir.Shape(real.shape), ir.DataType.FLOAT
    graph.register_initializer(value)
    if params.dtype != "int32":
        set_params(value, params)
    return value


def _annotate(value: ir.Value | None, params: QuantParams, node: ir.Node | None) -> None:
    assert value is not None
    old = get_params(value)
    if old is not None and not same_grid(old, params):
        raise GraphError(
            f"tensor {value.name!r} is quantized on two grids: scale {old.scale}, zero point {old.zero_point} ({old.dtype}) and scale "
            f"{params.scale}, zero point {params.zero_point} ({params.dtype}) at {node.name if node else 'another node'!r}; give it one"
        )
    if old is None:
        set_params(value, params)


def _grid(node: ir.Node) -> QuantParams:
    """The grid that a Quantize- or DequantizeLinear node states."""
    scale = _constant(node, 1).astype(np.float32)
    has_zero_point = len(node.inputs) > 2 and node.inputs[2] is not None
    if has_zero_point:
        zero_value = _required(node, 2)
        assert zero_value.const_value is not None
        dtype = zero_value.const_value.dtype.name.lower()
        zero_point = _constant(node, 2).astype(np.int64)
    else:
        codes = node.inputs[0] if node.op_type == "DequantizeLinear" else node.outputs[0]
        dtype = codes.dtype.name.lower() if codes is not None and codes.dtype is not None else "uint8"
        zero_point = np.zeros(scale.shape, np.int64)
    if dtype not in INTEGER_RANGES:
        raise GraphError(f"node {node.name!r} ({node.op_type}) has codes of type {dtype}; edgekit folds {', '.join(INTEGER_RANGES)}")
    if "block_size" in node.attributes and node.attributes["block_size"].as_int():
        raise GraphError(f"node {node.name!r} ({node.op_type}) is quantized in blocks; blocked grids cannot be folded yet")
    if scale.size == 1:
        scale, zero_point, axis = scale.reshape(()), zero_point.reshape(()), None
    else:
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
        axis = axis % len(node.inputs[0].shape) if axis < 0 and node.inputs[0] is not None and node.inputs[0].shape is not None else axis
    extra = json.loads(node.metadata_props.get(METADATA, "{}"))
    low, high = extra.get("range", (float("nan"), float("nan")))
    return QuantParams(
        dtype=dtype,
        scale=scale,
        zero_point=zero_point,
        axis=axis,
        narrow_range=extra.get("narrow_range", False),
        observer=extra.get("observer", "" if extra else "fake_quant"),
        low=low,
        high=high,
        fixed=extra.get("fixed", not extra),
    )


def _constant(node: ir.Node, index: int) -> np.ndarray:
    value = node.inputs[index]
    if value is None or not is_constant(value) or value.const_value is None:
        raise GraphError(
            f"node {node.name!r} ({node.op_type}) takes its {'scale' if index == 1 else 'zero point'} from a computed value: dynamic "
            "quantization cannot be folded into attributes"
        )
    return value.const_value.numpy()


def _required(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _remove_dead(graph: ir.Graph) -> None:
    for node in reversed(list(graph)):
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and not any(o.uses() or o.is_graph_output() for o in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
            del graph.initializers[name]
