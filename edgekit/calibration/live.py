"""What readers of a tensor can tell apart: to a HardSwish all numbers below -3 are one, and need no codes.

It counts where a target wants codes between a layer and its activation function, as ONNX Runtime does: what convolutions make reaches
far below zero, where SiLU, GELU and HardSwish have ended.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgekit.errors import GraphError
from edgekit.graph.operators import is_constant
from edgekit.graph.run import Session
from edgekit.quant.observers import Histogram

ELEMENTWISE = frozenset(
    {"Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Clip", "Neg", "Relu", "LeakyRelu", "Elu", "Celu", "Selu"}
    | {"HardSigmoid", "HardSwish", "Sigmoid", "Swish", "Mish", "Gelu", "Tanh", "Erf"}
)
"""Of whose results an absolute error counts: not Exp, of which small ones may be sizes."""
MOVES = frozenset({"Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice"})
"""They make no numbers of their own."""
MOST_NODES = 16
STEPS = 4096
WITHIN = 1 / 64
"""Of a step, where the grid covers all that the readers make."""
WORTH = 1 / 20
"""Of a range is cut from an end, or nothing."""

QUANTIZED = frozenset(
    {"Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Sub", "Mul", "Concat", "Split", "Pad", "Resize"}
    | {"AveragePool", "GlobalAveragePool", "MaxPool", "GlobalMaxPool", "ReduceMean"}
    | MOVES
)
"""Readers of results that take them in codes, or could: to them an absolute error is one. A Log, a TopK sees more."""
MOST_CHANNELS = 1024

Way: TypeAlias = tuple[ir.Node, ...]
"""The moves that numbers have gone through: those that went the same way stand where they stood."""


@dataclass(frozen=True, slots=True)
class _Part:
    """Nodes that turn single numbers of a value into others, in order, and the one value of theirs that others read."""

    nodes: tuple[ir.Node, ...]
    last: ir.Value


def live(value: ir.Value, histogram: Histogram, model: ir.Model, *, steps: int = 255) -> Histogram:
    """What was seen of a tensor, less the ends that readers take for one number: what lies there is moved to where they begin.

    Args:
        value: of the model.
        histogram: of its numbers.
        model: in float.
        steps: of the grid to come, from end to end.
    """
    part = _readers(value) if histogram.min < histogram.max else None
    if part is None:
        return histogram
    numbers = np.linspace(histogram.min, histogram.max, STEPS + 1, dtype=np.float32)
    try:
        made = Session(_function(value, part, model), optimize=False).run({"x": numbers[:, None]})["y"]
    except GraphError:  # an operator that ONNX Runtime has not for floats of this opset
        return histogram
    made = made.astype(np.float64).reshape(len(numbers), -1)
    if not np.isfinite(made).all():
        return histogram
    least = WITHIN * float(made.max() - made.min()) / steps
    low, high = _flat(made, least), STEPS - _flat(made[::-1], least)
    low, high = (low if low > WORTH * STEPS else 0), (high if high < STEPS - WORTH * STEPS else STEPS)
    if low > high or high - low == STEPS:  # all is one number to them, or none is
        return histogram
    return histogram.within(float(numbers[low]), float(numbers[high]))


def _readers(value: ir.Value) -> _Part | None:
    """As many readers, and theirs, as end in one value that is quantized or could be; None where they never do."""
    ways: dict[ir.Value, Way] = {value: ()}
    nodes, channels, found = list[ir.Node](), set[tuple[Way, int, int]](), None
    while len(nodes) < MOST_NODES:
        waiting = [node for one in ways for node in one.consumers() if node not in nodes]
        ready = next((node for node in waiting if _makes_numbers(node, ways)), None)
        if ready is None:
            break
        way = next(ways[one] for one in ready.inputs if one in ways)
        nodes.append(ready)
        ways[ready.outputs[0]] = (*way, ready) if ready.op_type in MOVES else way
        if ready.op_type in ELEMENTWISE:
            channels |= {(way, *place) for one in ready.inputs if one not in ways and (place := _channels(one))}
        if len(channels) > 1:  # that make rows and columns of numbers
            break
        open_ended = [one for one in ways if one.is_graph_output() or any(n not in nodes for n in one.consumers())]
        if len(open_ended) == 1 and open_ended[0] is not value and _is_quantized(open_ended[0], nodes):
            found = _Part(tuple(nodes), open_ended[0])
    return found


def _is_quantized(value: ir.Value, nodes: Collection[ir.Node]) -> bool:
    others = [node for node in value.consumers() if node not in nodes]
    return not value.is_graph_output() and all(node.op_type in QUANTIZED and not node.domain for node in others)


def _makes_numbers(node: ir.Node, ways: Mapping[ir.Value, Way]) -> bool:
    """Whether each number that a node makes comes of one that was reached, where it stood, and of constants for channels at most."""
    if node.domain or len(node.outputs) != 1:
        return False
    if node.op_type in MOVES:
        return node.inputs[0] in ways
    given = [one for one in node.inputs if one is not None]
    same = len({ways[one] for one in given if one in ways}) == 1
    return node.op_type in ELEMENTWISE and same and all(one in ways or _is_small(one) for one in given)


def _is_small(value: ir.Value) -> bool:
    """Whether a constant holds one number, or one for each channel."""
    tensor = value.const_value
    if not is_constant(value) or tensor is None or not 0 < tensor.size <= MOST_CHANNELS:
        return False
    return tensor.size == max(tensor.shape.numpy(), default=1)


def _channels(value: ir.Value | None) -> tuple[int, int] | None:
    """The axis of a constant's channels, from the last one on, and how many they are; None of a single number."""
    if value is None or value.const_value is None or value.const_value.size == 1:
        return None
    sizes = value.const_value.shape.numpy()
    return int(np.argmax(sizes)) - len(sizes), max(sizes)


def _function(value: ir.Value, part: _Part, model: ir.Model) -> ir.Model:
    """From `x`, a column of numbers, to `y`: what the nodes make of each, a column for each channel where channels differ."""
    x = ir.Value(name="x", shape=ir.Shape([None, 1]), type=ir.TensorType(ir.DataType.FLOAT))
    known, constants, copies = {value: x}, list[ir.Value](), list[ir.Node]()
    for node in part.nodes:
        moves = node.op_type in MOVES
        inputs = node.inputs[:1] if moves else node.inputs
        for one in inputs:
            if one is not None and one not in known:
                assert one.const_value is not None
                row = one.const_value.numpy().astype(np.float32).reshape(-1)
                tensor = ir.tensor(row if row.size > 1 else row[0], name=f"c{len(constants)}")
                known[one] = ir.Value(name=tensor.name, const_value=tensor)
                constants.append(known[one])
        given = [None if one is None else known[one] for one in inputs]
        copy = ir.Node("", "Identity", given) if moves else ir.Node("", node.op_type, given, node.attributes.values())
        copy.outputs[0].name = f"v{len(copies)}"
        copies.append(copy)
        known[node.outputs[0]] = copy.outputs[0]
    known[part.last].name = "y"
    known[part.last].type = ir.TensorType(ir.DataType.FLOAT)
    opsets = dict(model.graph.opset_imports)
    graph = ir.Graph([x], [known[part.last]], nodes=copies, initializers=constants, opset_imports=opsets, name="f")
    return ir.Model(graph, ir_version=model.ir_version)


def _flat(made: NDArray[np.float64], least: float) -> int:
    """The last row that no row before it differs from by more than `least`."""
    apart = np.maximum(np.maximum.accumulate(made) - made, made - np.minimum.accumulate(made))
    return int(np.flatnonzero((apart <= least).all(axis=1))[-1])
