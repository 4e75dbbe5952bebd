"""How many weights of a layer are zero, and whether they are zero in the pattern that hardware skips."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgekit.graph.operators import LINEAR, int_attribute

OF, ZEROS = 4, 2
"""Of each four weights in a row, two are zero."""
# Where integer operators have the codes of their weight, and its zero point.
_INTEGER = {"QLinearConv": (3, 5), "QLinearMatMul": (3, 5), "ConvInteger": (1, 3), "MatMulInteger": (1, 3)}


@dataclass(frozen=True, slots=True)
class LayerSparsity:
    """Zeros in the weight of a layer.

    Attributes:
        name: of the layer.
        weights: how many there are.
        zeros: the share of them that is zero, 0 to 1.
        two_four: whether of each four consecutive ones along the axis that the layer sums over (input channels of a convolution)
            two or more are zero: what NVIDIA's sparse tensor cores want.
    """

    name: str
    weights: int
    zeros: float
    two_four: bool


def graph_sparsity(model: ir.Model) -> tuple[LayerSparsity, ...]:
    """The zeros of each convolution and matrix product with a constant weight, in the order of the graph.

    A weight may be float, or codes behind a DequantizeLinear or of an integer operator: zero is then what the zero point stands for.
    In an annotated model it is float, and what rounding makes of it is seen once the model is lowered.
    """
    found = []
    for node in model.graph:
        if node.domain or node.op_type not in (*LINEAR, *_INTEGER):
            continue
        for index in (_INTEGER[node.op_type][0],) if node.op_type in _INTEGER else (1, 0):
            zero = _zero(node, index)
            if zero is not None and zero.size:
                axis, groups = _summed(node, index, zero.ndim)
                found.append(describe(node.name or "", zero, axis=axis, groups=groups))
                break
    return tuple(found)


def describe(name: str, zero: NDArray[np.bool_], *, axis: int, groups: int = 1) -> LayerSparsity:
    """A layer of which it is known where its weight is zero; `axis` and `groups` as in `is_two_four`."""
    return LayerSparsity(name, zero.size, float(zero.mean()), is_two_four(zero, axis=axis, groups=groups))


def is_two_four(zero: NDArray[np.bool_], *, axis: int, groups: int = 1) -> bool:
    """Whether of each four consecutive elements along `axis` two or more are zero; not so where fours do not fit into the axis.

    Args:
        zero: where a weight is zero, of the weight's shape.
        axis: that the layer sums over.
        groups: that share the axis, each for itself.

    Reference: Mishra et al. (2021), "Accelerating Sparse Deep Neural Networks", arXiv:2104.08378, section 3.

    >>> is_two_four(np.array([[True, False, False, True, True, True, True, False]]), axis=1)
    True
    >>> is_two_four(np.array([[False, False, False, True, True, True, True, False]]), axis=1)
    False
    """
    if zero.shape[axis] // groups % OF:
        return False
    fours = np.moveaxis(zero, axis, -1).reshape(-1, OF)
    return bool((fours.sum(axis=1) >= ZEROS).all())


def _summed(node: ir.Node, index: int, rank: int) -> tuple[int, int]:
    """The axis of a weight that a node sums over, and how many groups share it."""
    match node.op_type:
        case "Conv" | "QLinearConv" | "ConvInteger":
            return 1, 1
        case "ConvTranspose":
            return 0, int_attribute(node, "group", 1)
        case "Gemm":
            turned = int_attribute(node, "transB" if index else "transA", 0)
            return int(bool(turned) == bool(index)), 1
        case _:
            return (max(rank - 2, 0) if index else rank - 1), 1


def _zero(node: ir.Node, index: int) -> NDArray[np.bool_] | None:
    """Where a constant input of a node is zero; None for what is computed."""
    value = node.inputs[index]
    maker = None if value is None else value.producer()
    if node.op_type in _INTEGER:
        return _is_point(value, _input(node, _INTEGER[node.op_type][1]), axis=0 if "Conv" in node.op_type else -1)
    if maker is not None and maker.op_type == "DequantizeLinear":
        axis, block = int_attribute(maker, "axis", 1), int_attribute(maker, "block_size", 0)
        return _is_point(maker.inputs[0], _input(maker, 2), axis=axis, block=block)
    numbers = _numbers(value)
    return None if numbers is None else np.asarray(numbers == 0)


def _is_point(value: ir.Value | None, point: ir.Value | None, *, axis: int, block: int = 0) -> NDArray[np.bool_] | None:
    """Where codes are their zero point, which is 0 when there is none; one for all, for each place on an axis, or for each block."""
    codes, points = _numbers(value), np.zeros((), np.int64) if point is None else _numbers(point)
    if codes is None or points is None:
        return None
    if block and points.ndim:
        points = np.repeat(points, block, axis=axis).take(np.arange(codes.shape[axis]), axis=axis)
    elif points.ndim == 1:
        points = np.expand_dims(points, [place for place in range(codes.ndim) if place != axis % codes.ndim])
    return np.asarray(codes.astype(np.int64) == points.astype(np.int64))


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if len(node.inputs) > index else None


def _numbers(value: ir.Value | None) -> NDArray[np.generic] | None:
    if value is None or value.is_graph_input():
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()
