"""Fold BatchNormalization into the operator before it."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgekit.graph.annotations import all_values, fresh_name, get_params, set_params
from edgekit.graph.operators import LINEAR, Roles, copy_type, int_attribute, is_constant, roles
from edgekit.quant.spec import QuantParams

F64 = NDArray[np.float64]


def fold_batchnorm(model: ir.Model) -> ir.Model:
    """BatchNorm after Conv, ConvTranspose, Gemm or MatMul becomes part of its weight and bias.

    With `y = gamma * (x - mean) / sqrt(var + eps) + beta` and `factor = gamma / sqrt(var + eps)` per channel:

    1. `weight' = weight * factor` along the weight's output-channel axis;
    2. `bias' = (bias - mean) * factor + beta`, with bias 0 where there is none.

    It is exact up to float rounding, and computed in float64. A BatchNorm stays where the linear operator's output has another
    reader, a grid, or is a graph output, or where a parameter is not constant. A MatMul becomes one followed by an Add of the
    bias. Weights that several operators share are folded into a copy for each. A trained symmetric grid of the weight is
    scaled along: the codes stay, but for the sign of channels with a negative factor.

    Reference: Ioffe and Szegedy 2015, arXiv:1502.03167; folding as in Jacob et al. 2017, arXiv:1712.05877, section 3.2.
    """
    model = model.clone()
    for node in list(model.graph):
        if node.op_type == "BatchNormalization" and node.domain == "":
            linear = _foldable(node)
            if linear is not None:
                _fold(model.graph, linear, node)
    return model


def _foldable(batchnorm: ir.Node) -> ir.Node | None:
    data = batchnorm.inputs[0]
    linear = data.producer() if data is not None else None
    if linear is None or linear.op_type not in LINEAR or linear.domain or data is None:
        return None
    if len(data.uses()) != 1 or data.is_graph_output() or any(out.uses() for out in batchnorm.outputs[1:]):
        return None
    if (
        get_params(data) is not None
        or int_attribute(batchnorm, "training_mode", 0)
        or not all(is_constant(v) for v in batchnorm.inputs[1:5])
    ):
        return None
    parts = roles(linear)
    if parts is None or parts.weight is None:
        return None
    if len(linear.inputs) > 2 and linear.inputs[2] is not None and parts.bias is None:
        return None
    if not _can_scale(get_params(linear.inputs[parts.weight]), parts):
        return None
    if linear.op_type == "Gemm" and (_float(linear, "alpha") != 1.0 or _float(linear, "beta") != 1.0):
        return None
    rank = len(data.shape) if data.shape is not None else None
    if linear.op_type == "MatMul" and (parts.weight_axis is None or rank != 2):
        return None  # BatchNorm's channel axis is 1: only of a 2-D MatMul is that the last one
    return linear


def _fold(graph: ir.Graph, linear: ir.Node, batchnorm: ir.Node) -> None:
    parts = roles(linear)
    assert parts is not None and parts.weight is not None
    parameters = {value for value in (*linear.inputs[1:], *batchnorm.inputs[1:]) if value is not None}
    gamma, beta, mean, variance = (_array(batchnorm.inputs[i]) for i in range(1, 5))
    epsilon = batchnorm.attributes["epsilon"].as_float() if "epsilon" in batchnorm.attributes else 1e-5
    factor = gamma / np.sqrt(variance + epsilon)
    weight_value = linear.inputs[parts.weight]
    assert weight_value is not None and weight_value.const_value is not None
    weight = _scaled(linear, _array(weight_value), parts.weight_axis, factor)
    bias = _array(linear.inputs[parts.bias]).reshape(-1) if parts.bias is not None else np.zeros_like(mean)
    bias = (bias - mean) * factor + beta
    dtype = weight_value.const_value.dtype
    folded = _constant(graph, f"{weight_value.name}.folded", weight, dtype)
    set_params(folded, _scaled_params(get_params(weight_value), parts.weight_axis, factor))
    linear.replace_input_with(parts.weight, folded)
    # Named after the linear operator: a bias may be shared, or be named after what it was before.
    bias_value = _constant(graph, f"{linear.name or weight_value.name}.bias.folded", bias, dtype)
    _attach_bias(graph, linear, batchnorm, bias_value)
    for value in parameters:
        if value.is_initializer() and not value.uses() and not value.is_graph_output():
            del graph.initializers[value.name or ""]


def _attach_bias(graph: ir.Graph, linear: ir.Node, batchnorm: ir.Node, bias: ir.Value) -> None:
    """Give `linear` its bias and the place, name and shape of `batchnorm`, which goes."""
    result, output = linear.outputs[0], batchnorm.outputs[0]
    if linear.op_type == "MatMul":
        add = ir.node("Add", [result, bias], name=f"{linear.name}/bias")
        graph.insert_after(linear, add)
        result = add.outputs[0]
    else:
        if len(linear.inputs) < 3:
            linear.resize_inputs(3)
        linear.replace_input_with(2, bias)
    copy_type(result, output)
    set_params(result, get_params(output))
    name = output.name
    output.replace_all_uses_with(result, replace_graph_outputs=True)
    graph.remove(batchnorm, safe=True)
    result.name = name


def _can_scale(params: QuantParams | None, parts: Roles) -> bool:
    if params is None:
        return True
    along = parts.weight_axis is not None and params.axis in (None, parts.weight_axis)
    return along and params.dtype.startswith("int") and not params.zero_point.any()


def _scaled_params(params: QuantParams | None, axis: int | None, factor: F64) -> QuantParams | None:
    if params is None:
        return None
    scale = (params.scale * np.abs(factor)).astype(np.float32)
    scale = np.where(scale > 0, scale, params.scale).astype(np.float32)  # channels that a factor of 0 clears
    unknown = float("nan")
    return dataclasses.replace(
        params, scale=scale, zero_point=np.zeros(scale.shape, np.int64), axis=axis, low=unknown, high=unknown
    )


def _scaled(linear: ir.Node, weight: F64, axis: int | None, factor: F64) -> F64:
    if axis is None:  # grouped ConvTranspose (C_in, C_out / group, ...): its output channels are spread over both axes
        group = int_attribute(linear, "group", 1)
        grouped = weight.reshape(group, weight.shape[0] // group, *weight.shape[1:])
        shaped = factor.reshape(group, 1, weight.shape[1], *[1] * (weight.ndim - 2))
        result: F64 = (grouped * shaped).reshape(weight.shape)
        return result
    return weight * factor.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])


def _constant(graph: ir.Graph, name: str, array: F64, dtype: ir.DataType) -> ir.Value:
    name = fresh_name(name, {value.name for value in all_values(graph)})
    value = ir.Value(name=name, const_value=ir.tensor(array.astype(dtype.numpy()), dtype=dtype, name=name))
    value.shape, value.dtype = ir.Shape(array.shape), dtype
    graph.register_initializer(value)
    return value


def _array(value: ir.Value | None) -> F64:
    assert value is not None and value.const_value is not None
    return value.const_value.numpy().astype(np.float64)


def _float(node: ir.Node, name: str) -> float:
    attribute = node.attributes.get(name)
    return 1.0 if attribute is None else attribute.as_float()
