"""What operators do to the positions along the axes of their tensors: pass, tie or weigh them, or need all of them.

Each rule gives the ids of a node's outputs, from those of its inputs; see `edgekit.graph.axes`. What has no rule keeps all positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from edgekit.graph.axes import Axes, Ids, Maker, NoRule, constant_array
from edgekit.graph.layout_rules import LAYOUT_RULES, Outputs, ints
from edgekit.graph.operators import dims, int_attribute, is_constant

_UNARY = (
    "Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BitwiseNot", "Cast", "Ceil", "Celu", "Cos", "Cosh",
    "Dropout", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN",
    "LeakyRelu", "Log", "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign",
    "Sin", "Sinh", "Softplus", "Softsign", "Sqrt", "Swish", "Tan", "Tanh", "ThresholdedRelu",
)  # fmt: skip
_BINARY = (
    "Add", "And", "Clip", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Mean", "Min",
    "Mod", "Mul", "Or", "PRelu", "Pow", "Sub", "Sum", "Where", "Xor",
)  # fmt: skip
_POOLS = ("AveragePool", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "LpPool", "MaxPool")
_REDUCTIONS = (
    "ArgMax", "ArgMin", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean",
    "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare",
)  # fmt: skip
_OVER_AXIS = ("Softmax", "LogSoftmax", "Hardmax", "LpNormalization")


def spread(node: ir.Node, axes: Axes) -> Outputs:
    """Element by element, shapes broadcast: axes of one size are tied."""
    given = [axes.get(value) for value in node.inputs if value is not None]
    rank = max(map(len, given))
    result: list[Ids | None] = []
    for back in range(-rank, 0):
        # An axis of one position is repeated, whatever the others are.
        wide = [one[back] for one in given if len(one) >= -back and not _is_one(one[back])]
        ones = [one[back] for one in given if len(one) >= -back and _is_one(one[back])]
        for other in wide[1:]:
            axes.tie(wide[0], other)
        result.append(
            (wide or ones)[0] if None not in [*map(type, wide)] and all(w is not None for w in wide) else None
        )
    return [tuple(result)] * len(node.outputs)


def _is_one(ids: Ids | None) -> bool:
    return ids is not None and len(ids) == 1


def conv(node: ir.Node, axes: Axes) -> Outputs:
    """Conv with weight `(C_out, C_in / groups, ...)`. In a grouped one, each group keeps as many channels."""
    x, weight = axes.get(node.inputs[0]), _weight(node, 1)
    w, groups = axes.get(weight), int_attribute(node, "group", 1)
    outputs, inputs = w[0], x[1]
    if inputs is None or outputs is None or len(x) < 3:
        raise NoRule("reads channels whose number is not known")
    if groups == len(inputs) and groups > 1:
        axes.tie(outputs, inputs.repeat(len(outputs) // groups))
        axes.layers[node] = None, outputs
    else:
        rows = inputs.reshape(groups, -1)
        _tie_rows(axes, rows)
        axes.tie(w[1], rows[0])
        _tie_rows(axes, outputs.reshape(groups, -1))
        axes.readers.append((weight, 1))
        axes.layers[node] = inputs, outputs
    axes.makers.append(Maker(node, weight, 0, outputs))
    return _convolved(node, axes, outputs, 2)


def conv_transpose(node: ir.Node, axes: Axes) -> Outputs:
    """ConvTranspose with weight `(C_in, C_out / groups, ...)`."""
    x, weight = axes.get(node.inputs[0]), _weight(node, 1)
    w, groups = axes.get(weight), int_attribute(node, "group", 1)
    inputs, outputs = x[1], w[1]
    if inputs is None or outputs is None or len(x) < 3:
        raise NoRule("reads channels whose number is not known")
    axes.tie(inputs, w[0])
    if groups == len(inputs) and groups > 1:
        axes.fix(outputs, f"{described(node)} has as many outputs for each input")
        made = inputs.repeat(len(outputs))
        axes.layers[node] = None, made
        axes.makers.append(Maker(node, weight, 0, made))
    else:
        _tie_rows(axes, inputs.reshape(groups, -1))
        made = np.tile(outputs, groups)
        axes.readers.append((weight, 0))
        axes.layers[node] = inputs, made
        axes.makers.append(Maker(node, weight, 1, made))
    return _convolved(node, axes, made, 2)


def _tie_rows(axes: Axes, rows: Ids) -> None:
    for row in rows[1:]:
        axes.tie(rows[0], row)


def _convolved(node: ir.Node, axes: Axes, outputs: Ids, bias: int) -> Outputs:
    """Outputs whose channels are known; the bias goes with them, and space stays."""
    x = axes.get(node.inputs[0])
    for ids in x[2:]:
        axes.fix(ids, f"{described(node)} works across them")
    if len(node.inputs) > bias and node.inputs[bias] is not None:
        axes.tie(axes.get(node.inputs[bias])[0], outputs)
    return [(x[0], outputs, *_space(node, axes))]


def _space(node: ir.Node, axes: Axes) -> list[Ids | None]:
    """The axes of an output from the third on, anew."""
    shape = dims(node.outputs[0])
    if shape is None:
        raise NoRule("makes a tensor of unknown rank")
    return [axes.fresh_fixed(size, f"{described(node)} works across them") for size in shape[2:]]


def _weight(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    if value is None or not is_constant(value):
        raise NoRule("has a weight that is no constant")
    return value


def gemm(node: ir.Node, axes: Axes) -> Outputs:
    """`A @ B + C`, where B may be stored transposed."""
    if int_attribute(node, "transA", 0):
        raise NoRule("transposes what it reads")
    a, b = axes.get(node.inputs[0]), axes.get(node.inputs[1])
    inner = 1 if int_attribute(node, "transB", 0) else 0
    made = _product(node, axes, a[1], b[inner], b[1 - inner], inner)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        for ids, other in zip(reversed(axes.get(node.inputs[2])), (made, a[0]), strict=False):
            if not _is_one(ids):
                axes.tie(ids, other)
    return [(a[0], made)]


def matmul(node: ir.Node, axes: Axes) -> Outputs:
    """The last two axes are multiplied, those before are broadcast. What is summed over stays, but for a matrix of weights."""
    a, b = axes.get(node.inputs[0]), axes.get(node.inputs[1])
    if min(len(a), len(b)) < 2:
        raise NoRule("multiplies by a vector")
    if is_constant(node.inputs[1]) and len(b) == 2 and not is_constant(node.inputs[0]):
        made = _product(node, axes, a[-1], b[0], b[1], 0)
        _repeat(node, axes, a[:-1], axes.layers[node])
        return [(*a[:-1], made)]
    axes.tie(a[-1], b[-2])
    axes.fix(a[-1], f"{described(node)} sums over products of activations")
    axes.fix(a[-2], f"{described(node)} works across them")
    batch = _batch(node, axes, a[:-2], b[:-2])
    _repeat(node, axes, batch, (None, b[-1]))
    return [(*batch, a[-2], b[-1])]


def _repeat(node: ir.Node, axes: Axes, batch: Sequence[Ids | None], product: tuple[Ids | None, ...]) -> None:
    """A product is computed for all positions of the axes before it. Where too many axes would change, those stay."""
    if axes.choose(node.name or "", 2) == 1:
        for ids in batch[1:]:
            axes.fix(ids, f"{described(node)} has channels along two other axes")
    axes.layers[node] = (*product, *batch[1:])


def _batch(node: ir.Node, axes: Axes, a: tuple[Ids | None, ...], b: tuple[Ids | None, ...]) -> list[Ids | None]:
    """The axes before a matrix, broadcast."""
    rank = max(len(a), len(b))
    ones = [axes.fresh(1) for _ in range(rank)]
    left, right = ([*ones[: rank - len(side)], *side] for side in (a, b))
    result = []
    for one, other in zip(left, right, strict=True):
        if not _is_one(one) and not _is_one(other):
            axes.tie(one, other)
        result.append(other if _is_one(one) else one if one is None or other is not None else None)
    return result


def _product(node: ir.Node, axes: Axes, read: Ids | None, inner: Ids | None, made: Ids | None, axis: int) -> Ids | None:
    """The channels that a matrix makes of those that it reads along `axis`; those of activations cannot be cut."""
    weight = node.inputs[1]
    axes.tie(read, inner)
    if weight is None or not is_constant(weight) or made is None:
        axes.fix(read, f"{described(node)} sums over products of activations")
        axes.layers[node] = None, made
        return made
    axes.readers.append((weight, axis))
    axes.layers[node] = read, made
    axes.makers.append(Maker(node, weight, 1 - axis, made))
    return made


def batch_normalization(node: ir.Node, axes: Axes) -> Outputs:
    """Each channel has its own parameters."""
    if int_attribute(node, "training_mode", 0):
        raise NoRule("takes statistics over a batch")
    x = axes.get(node.inputs[0])
    for value in node.inputs[1:]:
        axes.tie(axes.get(value)[0], x[1])
    return [x] * len(node.outputs)


def instance_normalization(node: ir.Node, axes: Axes) -> Outputs:
    """Each channel has its own parameters and statistics."""
    result = batch_normalization(node, axes)
    for ids in result[0][2:]:
        axes.fix(ids, f"{described(node)} takes statistics over them")
    return result


def layer_normalization(node: ir.Node, axes: Axes) -> Outputs:
    """Statistics are of all channels: one less would change the others."""
    x = axes.get(node.inputs[0])
    axis = int_attribute(node, "axis", -1) % len(x)
    for ids in x[axis:]:
        axes.fix(ids, f"{described(node)} takes statistics over them")
    if len(node.outputs) > 1:
        raise NoRule("gives its statistics")
    spread(node, axes)
    return [x]


def over_axis(node: ir.Node, axes: Axes) -> Outputs:
    """All along one axis is needed."""
    x = axes.get(node.inputs[0])
    axes.fix(x[int_attribute(node, "axis", -1) % len(x)], f"{described(node)} works across them")
    return [x]


def pool(node: ir.Node, axes: Axes) -> Outputs:
    """Channels pass, and space stays."""
    if len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output()):
        raise NoRule("gives places that count all channels")
    x = axes.get(node.inputs[0])
    for ids in x[2:]:
        axes.fix(ids, f"{described(node)} works across them")
    return [(*x[:2], *_space(node, axes))] * len(node.outputs)


def reduction(node: ir.Node, axes: Axes) -> Outputs:
    """What is reduced stays."""
    x = axes.get(node.inputs[0])
    if node.op_type in ("ArgMax", "ArgMin"):
        over: Sequence[int] | None = [int_attribute(node, "axis", 0)]
    else:
        over = ints(node, "axes", 1)
        if over is None and len(node.inputs) > 1 and node.inputs[1] is not None:
            raise NoRule("is given axes that are computed")
    if not over:
        if over is None and int_attribute(node, "noop_with_empty_axes", 0):
            return [x]
        over = range(len(x))
    reduced = {axis % len(x) for axis in over}
    for axis in reduced:
        axes.fix(x[axis], f"{described(node)} reduces them")
    if int_attribute(node, "keepdims", 1):
        return [tuple(axes.fresh(1) if axis in reduced else ids for axis, ids in enumerate(x))]
    return [tuple(ids for axis, ids in enumerate(x) if axis not in reduced)]


def gather(node: ir.Node, axes: Axes) -> Outputs:
    """The axis that is picked from stays; a table of constants makes channels."""
    data, indices = axes.get(node.inputs[0]), axes.get(node.inputs[1])
    axis = int_attribute(node, "axis", 0) % len(data)
    axes.fix(data[axis], f"{described(node)} picks from them")
    table, width = node.inputs[0], data[1] if len(data) == 2 else None
    if table is not None and is_constant(table) and axis == 0 and width is not None:
        axes.makers.append(Maker(node, table, 1, width))
    return [(*data[:axis], *indices, *data[axis + 1 :])]


def shape(node: ir.Node, axes: Axes) -> Outputs:
    """The sizes that somebody reads stay."""
    x = axes.get(node.inputs[0])
    start, end, _ = slice(int_attribute(node, "start", 0), int_attribute(node, "end", len(x))).indices(len(x))
    given = list(range(start, max(start, end)))
    for place in _read_places(node.outputs[0], len(given)):
        axes.fix(x[given[place]], f"{described(node)} reads how many they are")
    return [(axes.fresh(len(given)),)]


def _read_places(value: ir.Value, count: int) -> set[int]:
    """Which elements of a vector its readers pick, as far as they are Gather or Slice with constants."""
    every = np.arange(count)
    read: set[int] = set()
    for use in value.uses():
        first, second = (constant_array(v) for v in (*use.node.inputs[1:], None, None)[:2])
        picks = every
        if use.node.op_type == "Cast":
            read |= _read_places(use.node.outputs[0], count)
            continue
        if use.node.op_type == "Gather" and first is not None:
            picks = every[first.astype(np.intp)]
        elif use.node.op_type == "Slice" and first is not None and second is not None:
            picks = every[int(first[0]) : int(second[0])]
        read |= {int(place) for place in picks.reshape(-1)}
    return set(range(count)) if value.is_graph_output() else read


def described(node: ir.Node) -> str:
    """Operator and name, as errors and reasons speak of a node."""
    return f"{node.op_type} {node.name!r}"


Rule = Callable[[ir.Node, Axes], Outputs]
RULES: dict[str, Rule] = {
    **LAYOUT_RULES,
    **dict.fromkeys(_UNARY + _BINARY, spread),
    **dict.fromkeys(_POOLS, pool),
    **dict.fromkeys(_REDUCTIONS, reduction),
    **dict.fromkeys(_OVER_AXIS, over_axis),
    "BatchNormalization": batch_normalization,
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "Gather": gather,
    "Gemm": gemm,
    "InstanceNormalization": instance_normalization,
    "LayerNormalization": layer_normalization,
    "RMSNormalization": layer_normalization,
    "MatMul": matmul,
    "Shape": shape,
}
"""By operator of the standard's own domain."""
