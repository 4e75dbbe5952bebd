"""Finding attention in a graph: queries, keys and values seen as heads, their scores, and what is added to these."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from edgekit.graph.operators import dims, int_attribute
from edgekit.lowering.units import Operand, constant, only_reader, operand, same_grid

_HEADS, _HEADS_TURNED = (0, 2, 1, 3), (0, 2, 3, 1)
"""What makes (B, heads, S, size), or (B, heads, size, S), of (B, S, heads, size)."""
_TRIPLE = {0: 0, 1: 1, 3: 2, 4: 3}
"""Axes of (B, S, 3, heads, size) as axes of (B, S, heads, size)."""


@dataclass(frozen=True, slots=True)
class Part:
    """Some columns of a tensor of shape `(B, S, N)`, seen as heads.

    Attributes:
        source: the tensor.
        start: the first column.
        heads, size: how many heads, and how many columns each has.
        value: those columns as a tensor of their own; None where the graph has none.
    """

    source: ir.Value
    start: int
    heads: int
    size: int
    value: ir.Value | None

    @property
    def width(self) -> int:
        """The number of columns."""
        return self.heads * self.size


@dataclass(frozen=True, slots=True)
class Attention:
    """`softmax(query @ key.T * scale + mask) @ value`, with its heads side by side again.

    Attributes:
        context: the product with the values.
        result: of shape `(B, S, heads * size)`.
    """

    query: Part
    key: Part
    value: Part
    scale: float
    mask: ir.Value | None
    context: ir.Node
    result: ir.Value


def find_attention(softmax: ir.Node) -> Attention | None:
    """The attention around a Softmax, or None where the graph is not of that form or others read what is inside."""
    if softmax.op_type != "Softmax" or softmax.domain or int_attribute(softmax, "axis", -1) not in (-1, 3):
        return None
    context = only_reader(softmax.outputs[0])
    scores = _scores(softmax.inputs[0])
    if scores is None or context is None or context.op_type != "MatMul" or context.inputs[0] is not softmax.outputs[0]:
        return None
    product, scale, mask = scores
    query, key = _part(product.inputs[0], _HEADS), _part(product.inputs[1], _HEADS_TURNED)
    value, result = _part(context.inputs[1], _HEADS), _result(context)
    if query is None or key is None or value is None or result is None:
        return None
    scale *= query[1] * key[1]
    same = query[0].heads == key[0].heads == value[0].heads and query[0].size == key[0].size
    plain = value[1] == 1.0 and scale > 0 and (mask is None or len(dims(mask) or (0,) * 5) <= 4)
    width = (dims(result) or (None,))[-1]
    if not (same and plain and width == value[0].width):
        return None
    return Attention(query[0], key[0], value[0], scale, mask, context, result)


def same_size(a: ir.Value, axis: int, b: ir.Value, other: int) -> bool:
    """Whether axes of two tensors are known to be of one size."""
    left, right = _size(a, axis), _size(b, other)
    return left is not None and left == right


def _size(value: ir.Value, axis: int) -> int | str | None:
    if value.shape is None or not -len(value.shape) <= axis < len(value.shape):
        return None
    size = value.shape[axis]
    return size if isinstance(size, int) else size.value


def _scores(value: ir.Value | None) -> tuple[ir.Node, float, ir.Value | None] | None:
    """The product of queries and keys behind a Softmax's input, what scales it, and the mask that is added after that."""
    scale, mask = 1.0, None
    while value is not None and (node := value.producer()) is not None and only_reader(value) is not None:
        if node.op_type == "MatMul":
            return node, scale, mask
        factor = _factor(node)
        if factor is not None:
            scale, value = scale * factor, _scaled(node)
        elif node.op_type == "Add" and not node.domain and mask is None and scale == 1.0:
            left, right = node.inputs
            value, mask = (left, right) if _scores_alone(left) else (right, left)
        else:
            return None
    return None


def _scores_alone(value: ir.Value | None) -> bool:
    """Whether a value is a product of two activations, perhaps scaled: not a mask."""
    node = None if value is None else value.producer()
    while node is not None and _factor(node) is not None:
        scaled = _scaled(node)
        node = None if scaled is None else scaled.producer()
    return node is not None and node.op_type == "MatMul" and all(constant(one) is None for one in node.inputs)


def _factor(node: ir.Node) -> float | None:
    """What a Mul or Div by a constant multiplies with."""
    if node.op_type not in ("Mul", "Div") or node.domain:
        return None
    number = constant(node.inputs[1])
    if node.op_type == "Mul" and number is None:
        number = constant(node.inputs[0])
    if number is None or number.size != 1 or not float(number.item()):
        return None
    return float(number.item()) if node.op_type == "Mul" else 1 / float(number.item())


def _scaled(node: ir.Node) -> ir.Value | None:
    """The input of a Mul or Div that is not its constant."""
    return node.inputs[0] if constant(node.inputs[1]) is not None else node.inputs[1]


def _part(value: ir.Value | None, wanted: tuple[int, ...]) -> tuple[Part, float] | None:
    """The heads that a value of rank 4 is, with its axes in the order `wanted` of (B, S, heads, size), and what scales them."""
    order: tuple[int, ...] = (0, 1, 2, 3)
    factor = 1.0
    while value is not None and (node := value.producer()) is not None and not node.domain:
        turned = _order(node)
        if (scale := _factor(node)) is not None:
            factor, value = factor * scale, _scaled(node)
        elif turned is not None:
            source, axes = turned
            value, order = source, tuple(axes[axis] for axis in order)
        elif node.op_type == "Reshape":
            part = _split(node) if order == wanted else None
            return None if part is None else (part, factor)
        else:
            part = _third(value, order, wanted)
            return None if part is None else (part, factor)
    return None


def _order(node: ir.Node) -> tuple[ir.Value, tuple[int, ...]] | None:
    """What a node permutes, and how: a Transpose of rank 4, or one of rank 3 between two Reshapes that keep the last two axes."""
    source = node.inputs[0] if node.inputs else None
    if source is None:
        return None
    if node.op_type == "Transpose":
        perm = tuple(node.attributes.get_ints("perm", ()))
        return (source, perm) if len(perm) == 4 else None
    turn = source.producer() if node.op_type == "Reshape" else None
    if turn is None or turn.op_type != "Transpose" or tuple(turn.attributes.get_ints("perm", ())) != (0, 2, 1):
        return None
    flat = None if turn.inputs[0] is None else turn.inputs[0].producer()
    outer = flat.inputs[0] if flat is not None and flat.op_type == "Reshape" else None
    if outer is None or len(dims(outer) or ()) != 4:
        return None
    kept = all(same_size(outer, axis, node.outputs[0], other) for axis, other in ((0, 0), (1, 1), (2, 3), (3, 2)))
    return (outer, (0, 1, 3, 2)) if kept and _keeps_rows(outer, turn.inputs[0]) else None


def _keeps_rows(outer: ir.Value, flat: ir.Value | None) -> bool:
    return flat is not None and same_size(outer, 2, flat, 1) and same_size(outer, 3, flat, 2)


def _split(reshape: ir.Node) -> Part | None:
    """The heads that a Reshape makes of (B, S, heads * size), which may be an output of a Split of the last axis."""
    columns, shape = reshape.inputs[0], dims(reshape.outputs[0]) or ()
    if columns is None or len(shape) != 4 or len(dims(columns) or ()) != 3 or not _keeps_leading(reshape, columns):
        return None
    heads, size = shape[2:]
    if heads is None or size is None or (dims(columns) or (None,))[-1] != heads * size:
        return None
    split = columns.producer()
    if split is not None and split.op_type == "Split" and split.attributes.get_int("axis", 0) in (-1, 2):
        widths = [(dims(output) or (None,))[-1] for output in split.outputs]
        before = widths[: list(split.outputs).index(columns)]
        source = split.inputs[0]
        if source is not None and None not in before:
            return Part(source, sum(width or 0 for width in before), heads, size, columns)
    return Part(columns, 0, heads, size, columns)


def _third(value: ir.Value, order: tuple[int, ...], wanted: tuple[int, ...]) -> Part | None:
    """One of the three that a Reshape to (B, S, 3, heads, size) makes, taken from the first axis of its transpose."""
    taken = _taken(value)
    transpose = None if taken is None else taken[0].producer()
    if taken is None or transpose is None or transpose.op_type != "Transpose":
        return None
    perm = tuple(transpose.attributes.get_ints("perm", ()))
    reshape = None if transpose.inputs[0] is None else transpose.inputs[0].producer()
    if len(perm) != 5 or perm[0] != 2 or reshape is None or reshape.op_type != "Reshape":
        return None
    columns, shape = reshape.inputs[0], dims(reshape.outputs[0]) or ()
    if tuple(_TRIPLE[perm[axis + 1]] for axis in order) != wanted or columns is None or shape[2] != 3:
        return None
    heads, size = shape[3:]
    whole = (dims(columns) or (None,))[-1]
    if heads is None or size is None or whole != 3 * heads * size or not _keeps_leading(reshape, columns):
        return None
    return Part(columns, taken[1] * heads * size, heads, size, None)


def _taken(value: ir.Value) -> tuple[ir.Value, int] | None:
    """The tensor whose entry along the first axis a value is, and which one."""
    node = value.producer()
    if node is not None and node.op_type == "Gather":
        index = constant(node.inputs[1])
        plain = node.attributes.get_int("axis", 0) == 0 and index is not None and index.ndim == 0
        return (node.inputs[0], int(index.item()) % 3) if plain and index is not None and node.inputs[0] else None
    if node is None or node.op_type != "Squeeze" or len(node.inputs) < 2 or node.inputs[0] is None:
        return None
    axes, inner = constant(node.inputs[1]), node.inputs[0].producer()
    if axes is None or axes.reshape(-1).tolist() != [0] or inner is None or inner.inputs[0] is None:
        return None
    if inner.op_type == "Split" and inner.attributes.get_int("axis", 0) == 0 and len(inner.outputs) == 3:
        return inner.inputs[0], list(inner.outputs).index(node.inputs[0])
    numbers = [constant(one) for one in inner.inputs[1:4]]
    if inner.op_type != "Slice" or len(numbers) < 3 or any(one is None or one.size != 1 for one in numbers):
        return None
    start, end, axis = (int(one.item()) for one in numbers if one is not None)
    return (inner.inputs[0], start) if axis == 0 and end == start + 1 and start >= 0 else None


def _keeps_leading(reshape: ir.Node, source: ir.Value) -> bool:
    """Whether a Reshape of (B, S, ...) leaves B and S as they are: one of the two is enough, where the rest keeps its size too."""
    if len(dims(source) or ()) not in (3, 4):
        return False
    target = constant(reshape.inputs[1])
    copied = target is not None and not int_attribute(reshape, "allowzero", 0)
    for axis in (0, 1):
        if copied and target is not None and target[axis] == 0:
            return True
        if same_size(source, axis, reshape.outputs[0], axis):
            return True
    return False


def _result(context: ir.Node) -> ir.Value | None:
    """The heads side by side again, behind a Transpose and a Reshape, with Q/DQ pairs between them only if one follows anyway."""
    value = context.outputs[0]
    pairs: list[Operand] = []
    for op_type in ("Transpose", "Reshape"):
        node = only_reader(value)
        if node is not None and node.op_type == "QuantizeLinear":
            dequantize = only_reader(node.outputs[0])
            pair = None if dequantize is None else operand(dequantize.outputs[0])
            if dequantize is None or pair is None:
                return None
            pairs.append(pair)
            value = dequantize.outputs[0]
            node = only_reader(value)
        if node is None or node.op_type != op_type or node.domain:
            return None
        if op_type == "Transpose" and tuple(node.attributes.get_ints("perm", ())) != _HEADS:
            return None
        if op_type == "Reshape" and not (len(dims(node.outputs[0]) or ()) == 3 and _keeps_leading(node, value)):
            return None
        value = node.outputs[0]
    if pairs and (
        value.is_graph_output() or not all(_repeats(use.node, pair) for use in value.uses() for pair in pairs)
    ):
        return None
    return value


def _repeats(node: ir.Node, pair: Operand) -> bool:
    """Whether a node quantizes on the grid that its input went through before."""
    if node.op_type != "QuantizeLinear" or node.inputs[1] is None:
        return False
    return same_grid(Operand(node.outputs[0], node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None), pair)
