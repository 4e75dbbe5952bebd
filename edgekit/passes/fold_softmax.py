"""A Softmax over two classes becomes a Sigmoid of the difference of their scores, which the head computes at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from edgekit.graph.annotations import all_values, fresh_name, get_params
from edgekit.graph.constants import give_constant
from edgekit.graph.operators import copy_type, dims, int_attribute, is_constant, is_float, roles


def fold_softmax(model: ir.Model) -> ir.Model:
    """`softmax(z0, z1) = (1 - p, p)` with `p = sigmoid(z1 - z0)`, where a linear layer makes `z1 - z0` with half the channels.

    1. The Softmax (opset 13 or later) is over an axis of size 2, whose two places are one bit of the number of an output channel
       of Conv (one group), Gemm or MatMul; their weights and biases are subtracted.
    2. Between head and Softmax: Transpose, Reshape to a constant shape, an Add of a constant row (the bias of a MatMul), and Concat of
       several such heads along another axis. The detector's `Conv(2A) -> Transpose -> Reshape(N, -1, 2) -> Concat -> Softmax` is one.
    3. Each tensor between has one reader, no grid, and is no graph output: the scores themselves are gone afterwards.
    4. The weights have no grid. One that others read is replaced by a difference for this layer only.
    5. A head with just the two channels and no positions (a binary classifier) stays: three small nodes cost more than they save.

    Both classes are joined by a Concat under the Softmax's name; where only one is read, `drop_concat_split` takes that out.
    Exact up to rounding: of `p` relative to itself, of `1 - p` relative to 1.
    """
    model = model.clone()
    if model.opset_imports.get("", 0) < 13:
        return model
    for node in list(model.graph):
        if node.op_type == "Softmax" and node.domain == "":
            _fold(model.graph, node)
    common.RemoveUnusedNodesPass()(model)
    return model


@dataclass(frozen=True, slots=True)
class _Step:
    """A tensor between head and Softmax whose channels come in pairs.

    Attributes:
        value: the tensor.
        axis: of size `n * 2 * inner`: channel `(k * 2 + c) * inner + i` belongs to class c.
        inner: how many channels of one class lie side by side.
    """

    value: ir.Value
    axis: int
    inner: int


def _fold(graph: ir.Graph, softmax: ir.Node) -> None:
    scores, shape = softmax.inputs[0], dims(softmax.inputs[0])
    if scores is None or not shape or get_params(softmax.outputs[0]) is not None:
        return
    axis = int_attribute(softmax, "axis", -1) % len(shape)
    steps = _plan(scores, axis, 1) if shape[axis] == 2 else None
    if steps is None or (len(shape) == 2 and len(steps) <= 2):  # a Gemm, or MatMul and Add
        return
    taken = {value.name for value in all_values(graph)}
    for step in steps:
        _halve(graph, step, taken)
    _replace(graph, softmax, axis, taken)


def _plan(value: ir.Value | None, axis: int, inner: int) -> list[_Step] | None:
    """All that changes when the pairs of `value` become differences, from the Softmax up; None where it cannot be."""
    node = value.producer() if value is not None else None
    if value is None or node is None or node.domain or len(value.uses()) != 1:
        return None
    if value.is_graph_output() or get_params(value) is not None or not is_float(value):
        return None
    before: list[_Step] | None
    match node.op_type:
        case "Conv" | "Gemm" | "MatMul":
            before = [] if _is_head(node, axis, inner) else None
        case "Transpose":
            rank = len(dims(value) or ())
            perm = node.attributes["perm"].as_ints() if "perm" in node.attributes else range(rank)[::-1]
            before = _plan(node.inputs[0], perm[axis], inner)
        case "Concat":
            before = _plan_all(node, axis, inner)
        case "Add":
            row = _row(node, axis)
            before = None if row is None else _plan(node.inputs[1 - row], axis, inner)
        case "Reshape":
            found = _before_reshape(node, axis, inner)
            before = None if found is None else _plan(node.inputs[0], *found)
        case _:
            before = None
    return None if before is None else [_Step(value, axis, inner), *before]


def _plan_all(concat: ir.Node, axis: int, inner: int) -> list[_Step] | None:
    shape = dims(concat.outputs[0])
    if shape is None or int_attribute(concat, "axis", 0) % len(shape) == axis:
        return None
    steps: list[_Step] = []
    for value in concat.inputs:
        found = _plan(value, axis, inner)
        if found is None:
            return None
        steps += found
    return steps


def _is_head(node: ir.Node, axis: int, inner: int) -> bool:
    parts = roles(node)
    if parts is None or parts.weight is None or parts.weight_axis is None or int_attribute(node, "group", 1) != 1:
        return False
    given = len(node.inputs) > 2 and node.inputs[2] is not None
    if (given and parts.bias is None) or not all(value is None or _is_plain(value) for value in node.inputs[1:]):
        return False
    rank, channels = len(dims(node.outputs[0]) or ()), (dims(node.inputs[1]) or ())[parts.weight_axis]
    return (
        axis == (rank - 1 if node.op_type == "MatMul" else 1) and channels is not None and channels % (2 * inner) == 0
    )


def _row(add: ir.Node, axis: int) -> int | None:
    """Which input of an Add is a constant with one number for each place of the last axis, if that is `axis`."""
    shape = dims(add.outputs[0])
    for index, value in enumerate(add.inputs):
        row = dims(value)
        if shape is None or axis != len(shape) - 1 or not row or value is None or not _is_plain(value):
            continue
        if row[-1] == shape[-1] and all(size == 1 for size in row[:-1]) and dims(add.inputs[1 - index]) == shape:
            return index
    return None


def _is_plain(value: ir.Value) -> bool:
    """Whether a value is a constant of finite numbers without a grid."""
    tensor = _tensor(value)
    return tensor is not None and get_params(value) is None and bool(np.isfinite(tensor.numpy().astype(float)).all())


def _before_reshape(reshape: ir.Node, axis: int, inner: int) -> tuple[int, int] | None:
    """Where the pairs along `axis` of what a Reshape makes are in what it reads: axis, and inner.

    Row-major order: the class is bit `inner * (what lies behind the axis)` of the flat index, whatever the shape.
    """
    before, after = dims(reshape.inputs[0]), dims(reshape.outputs[0])
    wanted = _tensor(reshape.inputs[1])
    if before is None or after is None or wanted is None or int_attribute(reshape, "allowzero", 0):
        return None
    stride = inner
    for size in after[axis + 1 :]:
        if size is None:
            return None
        stride *= size
    behind = 1
    for index in reversed(range(len(before))):
        size = before[index]
        if size is None or stride % behind or behind > stride:
            return None
        if size % (2 * (stride // behind)) == 0:
            copied = [i for i, dim in enumerate(wanted.numpy()) if dim == 0]
            moves = index != axis and (axis in copied or index in copied)
            return None if moves else (index, stride // behind)
        behind *= size
    return None


def _halve(graph: ir.Graph, step: _Step, taken: set[str | None]) -> None:
    """Let a node make the differences of its pairs; its output gets another name, because it holds other numbers."""
    value, node = step.value, step.value.producer()
    assert node is not None and value.shape is not None
    match node.op_type:
        case "Conv" | "Gemm" | "MatMul":
            parts = roles(node)
            assert parts is not None and parts.weight_axis is not None
            _subtract(graph, node, 1, parts.weight_axis, step.inner, taken)
            if parts.bias is not None:
                _subtract(graph, node, parts.bias, -1, step.inner, taken)
        case "Add":
            row = _row(node, step.axis)
            assert row is not None
            _subtract(graph, node, row, -1, step.inner, taken)
        case "Reshape":
            tensor = _tensor(node.inputs[1])
            assert tensor is not None
            wanted = tensor.numpy().copy()
            wanted[step.axis] = wanted[step.axis] // 2 if wanted[step.axis] > 0 else wanted[step.axis]
            give_constant(graph, node, 1, wanted, taken=taken)
    size = value.shape[step.axis]
    value.shape = value.shape.copy()
    value.shape[step.axis] = size // 2 if isinstance(size, int) else size
    value.name = fresh_name(f"{value.name}.difference", taken)


def _subtract(graph: ir.Graph, node: ir.Node, index: int, axis: int, inner: int, taken: set[str | None]) -> None:
    """Replace a constant by the differences of its pairs along `axis`."""
    tensor = _tensor(node.inputs[index])
    assert tensor is not None
    array = tensor.numpy().astype(np.float64)
    axis %= array.ndim
    shape = array.shape
    pairs = array.reshape(*shape[:axis], -1, 2, inner, *shape[axis + 1 :])
    difference = pairs.take(1, axis + 1) - pairs.take(0, axis + 1)
    halved = difference.reshape(*shape[:axis], shape[axis] // 2, *shape[axis + 1 :])
    give_constant(graph, node, index, halved, taken=taken)


def _replace(graph: ir.Graph, softmax: ir.Node, axis: int, taken: set[str | None]) -> None:
    """Sigmoid, its complement, and both side by side under the name of the Softmax's output."""
    difference, output = softmax.inputs[0], softmax.outputs[0]
    assert difference is not None and difference.dtype is not None
    array = np.ones((), difference.dtype.numpy())
    name = fresh_name(f"{softmax.name}.one", taken)
    one = ir.Value(name=name, const_value=ir.tensor(array, dtype=difference.dtype, name=name))
    one.shape, one.type = ir.Shape(()), ir.TensorType(difference.dtype)
    graph.register_initializer(one)
    sigmoid = ir.node("Sigmoid", [difference], name=softmax.name)
    other = ir.node("Sub", [one, sigmoid.outputs[0]], name=f"{softmax.name}/complement")
    both = ir.node("Concat", [other.outputs[0], sigmoid.outputs[0]], {"axis": axis}, name=f"{softmax.name}/both")
    for node, label in ((sigmoid, "second"), (other, "first")):
        copy_type(node.outputs[0], difference)
        node.outputs[0].name = fresh_name(f"{output.name}.{label}", taken)
    copy_type(both.outputs[0], output)
    graph.insert_before(softmax, [sigmoid, other, both])
    name = output.name or ""
    output.replace_all_uses_with(both.outputs[0], replace_graph_outputs=True)
    graph.remove(softmax, safe=True)
    both.outputs[0].name = name


def _tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    return value.const_value if value is not None and is_constant(value) else None
