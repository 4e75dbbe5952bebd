"""Fold multiplications and additions of constants into the linear operator before or behind them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from edgekit.graph.annotations import get_params, set_params
from edgekit.graph.constants import give_constant
from edgekit.graph.operators import LINEAR, copy_type, dims, int_attribute, is_constant, is_float, roles

F64 = NDArray[np.float64]

_AFFINE = ("Mul", "Div", "Add", "Sub")
_LAYOUT = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten")
_ROUNDING = {2: 2.0**-8, 4: 2.0**-22, 8: 2.0**-51}
"""By the bytes of an element: how far, as a share of its largest number, a constant may be rounded when it is stored."""


def fold_affine(model: ir.Model) -> ir.Model:
    """Mul, Div, Add and Sub with a constant, one number or one a channel, become part of a weight and bias.

    1. Behind Conv, ConvTranspose, Gemm or MatMul, when nothing else reads their output. The bias of a MatMul is the Add of a
       constant behind it, and stays one; a MatMul without bias takes up factors only.
    2. Before Conv, Gemm or MatMul, when all readers of the result are such. An offset goes through a Conv only where it pads
       nothing (what is padded has no offset), and through a MatMul only where that has a bias to take it.
    3. One factor for all behind Reshape and Transpose, or behind a MatMul of two activations: it goes to the linear operator
       that made them (attention's `q @ k^T / sqrt(d)` into the weights of q, else of k), when each tensor between has one reader.

    All is computed in float64, and exact up to rounding. The node stays where a tensor that would change, or a weight, has a
    grid, is a graph output, or where the constant would broadcast, is not finite, divides by zero, or does not fit the type of
    the weight. It stays, too, behind a product or quotient of activations: that is how a decomposed GELU, LayerNorm or HardSwish
    ends, which runtimes fuse as a whole. A weight that others read is folded into a copy.
    """
    model = model.clone()
    graph = model.graph
    with np.errstate(over="ignore", invalid="ignore"):  # what does not fit is found by `_fits`
        for node in list(graph):
            _fold_behind(graph, node)
        for node in reversed(list(graph)):
            _fold_before(graph, node)
    common.RemoveUnusedNodesPass()(model)
    return model


@dataclass(frozen=True, slots=True)
class _Linear:
    """A linear operator with a constant weight, and where its bias is.

    Attributes:
        node: the operator.
        axis: the output-channel axis of its weight, input 1.
        holder, bias: the input that holds the bias, of the operator itself or of the Add behind a MatMul; `bias` is None where
            there is none yet.
        output: with the bias.
    """

    node: ir.Node
    axis: int
    holder: ir.Node
    bias: int | None
    output: ir.Value

    def rows(self) -> F64:
        """The weight as `(groups, outputs a group, inputs a group, positions)`."""
        weight = _array(self.node.inputs[1])
        weight = weight.swapaxes(0, 1) if self.axis == 1 else weight
        groups = int_attribute(self.node, "group", 1)
        return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)

    def weight(self, rows: F64) -> F64:
        """What `rows` gave, in the weight's own form."""
        shape = list(_array(self.node.inputs[1]).shape)
        if self.axis == 1:
            shape[:2] = shape[1], shape[0]
            return rows.reshape(shape).swapaxes(0, 1)
        return rows.reshape(shape)


@dataclass(frozen=True, slots=True)
class _Affine:
    """`factor * data + offset`, each one number or one a channel."""

    data: ir.Value
    factor: F64
    offset: F64


def _fold_behind(graph: ir.Graph, node: ir.Node) -> None:
    data = _data_of(node)
    linear = _linear_before(data)
    if linear is not None and linear.holder is not node:
        rows = linear.rows()
        channels = rows.shape[0] * rows.shape[1]
        affine = _affine(node, _channel_axis(linear, data), channels)
    else:
        affine = _affine(node, None, 1)
        linear = _scalable(data) if affine is not None and not affine.offset.any() else None
    if affine is None or linear is None or linear.holder is node:
        return
    rows = linear.rows()
    factor = np.broadcast_to(affine.factor, rows.shape[0] * rows.shape[1])
    weight = linear.weight(rows * factor.reshape(*rows.shape[:2], 1, 1))
    if _store(graph, linear, weight, _bias(linear, factor.size) * factor + affine.offset):
        _leave_place(graph, node, affine.data)


def _fold_before(graph: ir.Graph, node: ir.Node) -> None:
    data, result = _data_of(node), node.outputs[0]
    if data is None or result.is_graph_output() or get_params(result) is not None or _ends_a_product(data):
        return
    folded = []
    for use in result.uses():
        linear = _linear(use.node) if use.node.graph is graph else None
        if linear is None or linear.node.op_type == "ConvTranspose":
            return
        rows = linear.rows()
        affine = _affine(node, _channel_axis(linear, data), rows.shape[0] * rows.shape[2])
        if affine is None or (affine.offset.any() and not _takes_offset(linear)):
            return
        factor, offset = (
            np.broadcast_to(term, rows.shape[0] * rows.shape[2]).reshape(rows.shape[0], 1, rows.shape[2], 1)
            for term in (affine.factor, affine.offset)
        )
        bias = _bias(linear, rows.shape[0] * rows.shape[1]) + (rows * offset).sum((2, 3)).reshape(-1)
        folded.append((linear, linear.weight(rows * factor), bias))
    if folded and all(_fits(graph, *parts) for parts in folded):
        for parts in folded:
            _store(graph, *parts)
        result.replace_all_uses_with(data)
        graph.remove(node, safe=True)


def _data_of(node: ir.Node) -> ir.Value | None:
    """What a constant is multiplied with or added to."""
    if node.domain or node.op_type not in _AFFINE:
        return None
    left, right = node.inputs
    if is_constant(left) == is_constant(right) or not is_float(node.outputs[0]):
        return None
    return right if is_constant(left) else left


def _affine(node: ir.Node, axis: int | None, channels: int) -> _Affine | None:
    """What a node computes, where its constant is one number or, along `axis` of the data, one a channel."""
    data = _data_of(node)
    shape = dims(data)
    if data is None or shape is None:
        return None
    from_left = node.inputs[1] is data
    constant = _array(node.inputs[0 if from_left else 1])
    own = (1,) * (len(shape) - constant.ndim) + constant.shape
    spread = [i for i, size in enumerate(own) if size != 1]
    if len(own) > len(shape) or not np.isfinite(constant).all():
        return None
    if get_params(node.inputs[0 if from_left else 1]) is not None:
        return None
    if spread and (spread != [axis] or own[spread[0]] != channels or shape[spread[0]] != channels):
        return None
    c, one, zero = constant.reshape(-1), np.ones(1), np.zeros(1)
    match node.op_type:
        case "Mul":
            return _Affine(data, c, zero)
        case "Div":
            return _Affine(data, 1 / c, zero) if not from_left and c.all() else None
        case "Add":
            return _Affine(data, one, c)
        case _:
            return _Affine(data, -one, c) if from_left else _Affine(data, one, -c)


def _linear(node: ir.Node | None) -> _Linear | None:
    """A linear operator whose weight, and bias if it has one, are constants without grids."""
    parts = roles(node) if node is not None and not node.domain and node.op_type in LINEAR else None
    if node is None or parts is None or parts.weight is None or parts.weight_axis is None:
        return None
    if get_params(node.inputs[parts.weight]) is not None:
        return None
    if node.op_type == "MatMul":
        return _with_add(node)
    scaled = any(name in node.attributes and node.attributes[name].as_float() != 1.0 for name in ("alpha", "beta"))
    given = node.inputs[2] if len(node.inputs) > 2 else None
    if scaled or (given is not None and (parts.bias is None or get_params(given) is not None)):
        return None
    return _Linear(node, parts.weight_axis, node, parts.bias, node.outputs[0])


def _with_add(matmul: ir.Node) -> _Linear:
    """A MatMul and, where nothing else reads it, the Add of one constant a column behind it."""
    output, weight = matmul.outputs[0], matmul.inputs[1]
    add = _only_reader(output)
    columns = dims(weight)
    if add is not None and add.op_type == "Add" and _data_of(add) is output and columns is not None:
        index = 1 if add.inputs[0] is output else 0
        shape, rank = dims(add.inputs[index]), len(dims(output) or ())
        is_row = shape is not None and len(shape) <= rank and shape[-1:] in ((), (1,), columns[1:])
        is_row = is_row and get_params(add.inputs[index]) is None
        if shape is not None and is_row and all(size == 1 for size in shape[:-1]):
            return _Linear(matmul, 1, add, index, add.outputs[0])
    return _Linear(matmul, 1, matmul, None, output)


def _linear_before(value: ir.Value | None) -> _Linear | None:
    """The linear operator whose output `value` is, if there is only one reader."""
    producer = value.producer() if value is not None and _only_reader(value) is not None else None
    if producer is not None and producer.op_type == "Add":
        data = _data_of(producer)
        producer = data.producer() if data is not None else None
    linear = _linear(producer)
    return linear if linear is not None and linear.output is value else None


def _scalable(value: ir.Value | None) -> _Linear | None:
    """The linear operator whose scaling scales all of `value`."""
    producer = value.producer() if value is not None and _only_reader(value) is not None else None
    if producer is None or producer.domain:
        return None
    if producer.op_type in _LAYOUT:
        return _linear_before(producer.inputs[0]) or _scalable(producer.inputs[0])
    if producer.op_type == "MatMul" and not any(is_constant(operand) for operand in producer.inputs):
        found = (_linear_before(operand) or _scalable(operand) for operand in producer.inputs)
        return next((linear for linear in found if linear is not None), None)
    return None


def _only_reader(value: ir.Value) -> ir.Node | None:
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output() or get_params(value) is not None:
        return None
    reader = next(iter(uses)).node
    return reader if reader.graph is value.graph else None  # not one inside an If or Loop


def _ends_a_product(value: ir.Value) -> bool:
    """Whether a value is a product or quotient of two activations, perhaps scaled and shifted."""
    producer = value.producer()
    if producer is None or producer.domain or producer.op_type not in _AFFINE:
        return False
    data = _data_of(producer)
    return producer.op_type in ("Mul", "Div") if data is None else _ends_a_product(data)


def _channel_axis(linear: _Linear, data: ir.Value | None) -> int:
    """The channel axis of a tensor that the operator reads or makes."""
    return len(dims(data) or ()) - 1 if linear.node.op_type == "MatMul" else 1


def _takes_offset(linear: _Linear) -> bool:
    """Whether an offset of all inputs is an offset of all outputs, and has where to go."""
    node = linear.node
    if node.op_type != "Conv":
        return node.op_type == "Gemm" or linear.bias is not None
    pads = node.attributes.get("pads")
    mode = node.attributes["auto_pad"].as_string() if "auto_pad" in node.attributes else "NOTSET"
    return mode == "VALID" or (mode == "NOTSET" and (pads is None or not any(pads.as_ints())))


def _bias(linear: _Linear, channels: int) -> F64:
    bias = _array(linear.holder.inputs[linear.bias]).reshape(-1) if linear.bias is not None else np.zeros(1)
    return np.broadcast_to(bias, channels)


def _fits(graph: ir.Graph, linear: _Linear, weight: F64, bias: F64) -> bool:
    """Whether weight and bias can be stored in the weight's type, and the bias has a place."""
    value = linear.node.inputs[1]
    assert value is not None and value.const_value is not None
    dtype = value.const_value.dtype.numpy()
    for array in (weight, bias):
        stored = array.astype(dtype).astype(np.float64)
        if not np.abs(stored - array).max(initial=0.0) <= _ROUNDING[dtype.itemsize] * np.abs(array).max(initial=0.0):
            return False
    return linear.bias is not None or linear.node.op_type != "MatMul" or not bias.any()


def _store(graph: ir.Graph, linear: _Linear, weight: F64, bias: F64) -> bool:
    """Give an operator a new weight and bias; False, and nothing done, where they do not fit."""
    if not _fits(graph, linear, weight, bias):
        return False
    give_constant(graph, linear.node, 1, weight)
    place = (linear.node, 2) if linear.bias is None else (linear.holder, linear.bias)
    if linear.bias is not None or bias.any():
        give_constant(graph, *place, bias, like=linear.node.inputs[1], name=f"{linear.node.name}.bias")
    return True


def _leave_place(graph: ir.Graph, node: ir.Node, result: ir.Value) -> None:
    """Take `node` out; its output's name, type and readers go to `result`."""
    output = node.outputs[0]
    name = output.name
    copy_type(result, output)
    set_params(result, get_params(output))
    output.replace_all_uses_with(result, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    result.name = name


def _array(value: ir.Value | None) -> F64:
    assert value is not None and value.const_value is not None
    return value.const_value.numpy().astype(np.float64)
