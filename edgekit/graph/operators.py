"""What edgekit knows of ONNX operators: which inputs are activations, weights and biases, and what a layer costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""The operators that have MACs."""
_EVERY_INPUT = ("Add", "Mul", "Concat", "MatMul", "Gemm")


@dataclass(frozen=True, slots=True)
class Roles:
    """The inputs of a node, by index.

    Attributes:
        activations: read as quantized activations.
        weight: the constant weight, or None.
        weight_axis: its output-channel axis, or None where one scale per channel is impossible.
        bias: the constant bias, or None.
    """

    activations: tuple[int, ...]
    weight: int | None = None
    weight_axis: int | None = None
    bias: int | None = None


def is_constant(value: ir.Value | None) -> bool:
    """Whether a value is an initializer that no caller can override."""
    return value is not None and value.const_value is not None and not value.is_graph_input()


def roles(node: ir.Node) -> Roles | None:
    """The roles of a node's inputs, or None when the node cannot be quantized: an input that should be an activation is a
    constant, or a convolution's weight is computed at run time.
    """
    match node.op_type:
        case "Conv" | "ConvTranspose":
            if is_constant(node.inputs[0]) or not is_constant(node.inputs[1]):
                return None
            grouped_transpose = node.op_type == "ConvTranspose" and int_attribute(node, "group", 1) != 1
            axis = None if grouped_transpose else int(node.op_type == "ConvTranspose")
            return Roles((0,), 1, axis, 2 if len(node.inputs) > 2 and is_constant(node.inputs[2]) else None)
        case "Gemm" if is_constant(node.inputs[1]):
            if is_constant(node.inputs[0]) or int_attribute(node, "transA", 0):
                return None
            axis = 0 if int_attribute(node, "transB", 0) else 1
            return Roles((0,), 1, axis, _row_bias(node, axis))
        case "MatMul" if is_constant(node.inputs[1]) and not is_constant(node.inputs[0]):
            rank = _rank(node.inputs[1])
            return Roles((0,), 1, 1 if rank == 2 else None)
        case op_type if op_type in _EVERY_INPUT:
            count = 2 if op_type == "Gemm" else len(node.inputs)
            if any(is_constant(value) or value is None for value in node.inputs[:count]):
                return None
            return Roles(tuple(range(count)))
        case _:
            return None if not node.inputs or is_constant(node.inputs[0]) else Roles((0,))


def bias_place(node: ir.Node) -> tuple[ir.Node, int] | None:
    """The node and input that a layer's bias has, or would have: its own third one or, behind a MatMul, that of the Add.

    None where a bias has no place: no such Add, a Gemm that scales its terms, or a bias that is computed at run time.
    """
    given = node.inputs[2] if node.op_type != "MatMul" and len(node.inputs) > 2 else None
    if given is not None and not is_constant(given):
        return None
    if node.op_type in ("Conv", "ConvTranspose"):
        return node, 2
    if node.op_type == "Gemm":
        scaled = any(node.attributes.get_float(name, 1.0) != 1.0 for name in ("alpha", "beta"))
        return None if scaled else (node, 2)
    uses = list(node.outputs[0].uses())
    if node.op_type != "MatMul" or len(uses) != 1 or uses[0].node.op_type != "Add" or uses[0].node.domain:
        return None
    add, index = uses[0].node, 1 - uses[0].idx
    bias = add.inputs[index]
    is_row = (
        is_constant(bias) and bias is not None and bias.const_value is not None and len(bias.const_value.shape) == 1
    )
    return (add, index) if is_row else None


def int_attribute(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute of a node, or its default."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def is_float(value: ir.Value | None) -> bool:
    """Whether a value's element type is a floating-point one; unknown types count as float."""
    return value is not None and (value.dtype is None or value.dtype in FLOATS)


def dims(value: ir.Value | None) -> tuple[int | None, ...] | None:
    """The shape of a value with None for symbolic dimensions, or None when its rank is unknown."""
    if value is None or value.shape is None:
        return None
    return tuple(d if isinstance(d, int) else None for d in value.shape)


def copy_type(value: ir.Value, like: ir.Value) -> None:
    """Give a value the shape and element type of another. They are copied: `value.dtype = ...` changes a shared type."""
    value.shape = None if like.shape is None else like.shape.copy()
    value.type = None if like.dtype is None else ir.TensorType(like.dtype)


@dataclass(frozen=True, slots=True)
class Layer:
    """A node with weights, or a multiplication of two activations.

    Attributes:
        name: of the node.
        op_type: of the node.
        input_shape, output_shape: with None for symbolic dimensions.
        macs: multiply-accumulates for one sample; symbolic dimensions count as 1.
        parameters: elements of weight and bias.
    """

    name: str
    op_type: str
    input_shape: tuple[int | None, ...] | None
    output_shape: tuple[int | None, ...] | None
    macs: int
    parameters: int


def layers(model: ir.Model) -> list[Layer]:
    """The Conv, ConvTranspose, Gemm and MatMul nodes of a shape-inferred model, in order."""
    return [_layer(node) for node in model.graph if node.domain == "" and node.op_type in LINEAR]


def _layer(node: ir.Node) -> Layer:
    shapes = [dims(value) for value in node.inputs]
    output = dims(node.outputs[0])
    constants = [value.const_value for value in node.inputs if value is not None and is_constant(value)]
    parameters = sum(tensor.size for tensor in constants if tensor is not None)
    return Layer(node.name or "", node.op_type, shapes[0], output, _macs(node, shapes, output), parameters)


def _macs(node: ir.Node, shapes: Sequence[tuple[int | None, ...] | None], output: tuple[int | None, ...] | None) -> int:
    left, right = shapes[0], shapes[1]
    if left is None or right is None or output is None:
        return 0
    match node.op_type:
        case "Conv":
            per_output = _size(right[1:])
            return _size(output[1:]) * per_output
        case "ConvTranspose":
            return _size(left[1:]) * _size(right[1:])
        case "Gemm":
            inner = right[1] if int_attribute(node, "transB", 0) else right[0]
            return _size(output[1:]) * (inner or 1)
        case _:
            batch = output[1:] if len(output) > 1 else output
            return _size(batch) * (left[-1] or right[max(len(right) - 2, 0)] or 1)


def _size(shape: Sequence[int | None]) -> int:
    return math.prod(d if d is not None else 1 for d in shape)


def _row_bias(node: ir.Node, axis: int) -> int | None:
    """The index of a Gemm's C where it is a constant with one value for each output channel."""
    weight, bias = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
    if (
        bias is None
        or not is_constant(bias)
        or bias.const_value is None
        or weight is None
        or weight.const_value is None
    ):
        return None
    channels = weight.const_value.shape[axis]
    return 2 if tuple(bias.const_value.shape) in ((channels,), (1, channels)) else None


def _rank(value: ir.Value | None) -> int:
    assert value is not None and value.const_value is not None
    return len(value.const_value.shape)
