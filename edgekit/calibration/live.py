"""What readers of a tensor can tell apart: to a HardSwish all numbers below -3 are one, and need no codes.

It counts where a target wants codes between a layer and its activation function, as ONNX Runtime does: what convolutions make reaches
far below zero, where SiLU, GELU and HardSwish have ended.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

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
"""Of a step, where 8 bits cover all that the readers make."""
WORTH = 1 / 20
"""Of a range is cut from an end, or nothing."""

Part: TypeAlias = tuple[list[ir.Node], ir.Value]
"""Nodes, and the one value of theirs that others read."""


def live(value: ir.Value, histogram: Histogram, model: ir.Model) -> Histogram:
    """What was seen of a tensor, less the ends that readers take for one number: what lies there is moved to where they begin."""
    part = _readers(value) if histogram.min < histogram.max else None
    if part is None:
        return histogram
    numbers = np.linspace(histogram.min, histogram.max, STEPS + 1, dtype=np.float32)
    made = Session(_function(value, part, model), optimize=False).run({"x": numbers[:, None]})["y"]
    made = made.astype(np.float64).reshape(len(numbers), -1)
    if not np.isfinite(made).all():
        return histogram
    least = WITHIN * float(made.max() - made.min()) / 255
    low, high = _flat(made, least), STEPS - _flat(made[::-1], least)
    low, high = (low if low > WORTH * STEPS else 0), (high if high < STEPS - WORTH * STEPS else STEPS)
    if low > high or high - low == STEPS:  # all is one number to them, or none is
        return histogram
    return histogram.within(float(numbers[low]), float(numbers[high]))


def _readers(value: ir.Value) -> Part | None:
    """All nodes that turn single numbers of a value into others, as far as they end in one value; None where they never do."""
    reached, nodes, found = {value}, list[ir.Node](), None
    while len(nodes) < MOST_NODES:
        waiting = [node for one in reached for node in one.consumers() if node not in nodes]
        ready = next((node for node in waiting if _makes_numbers(node, reached)), None)
        if ready is None:
            break
        nodes.append(ready)
        reached.add(ready.outputs[0])
        last = [one for one in reached if one.is_graph_output() or any(node not in nodes for node in one.consumers())]
        if len(last) == 1 and last[0] is not value:
            found = list(nodes), last[0]
    return found


def _makes_numbers(node: ir.Node, reached: Collection[ir.Value]) -> bool:
    """Whether each number that a node makes comes of one that was reached, and of constants, one for each channel at most."""
    if node.domain or len(node.outputs) != 1:
        return False
    if node.op_type in MOVES:
        return node.inputs[0] in reached
    given = [one for one in node.inputs if one is not None]
    return node.op_type in ELEMENTWISE and all(one in reached or _of_channels(one) for one in given)


def _of_channels(value: ir.Value) -> bool:
    tensor = value.const_value
    return is_constant(value) and tensor is not None and tensor.size == max(tensor.shape.numpy(), default=1)


def _function(value: ir.Value, part: Part, model: ir.Model) -> ir.Model:
    """From `x`, a column of numbers, to `y`: what the nodes make of each, a column for each channel where channels differ."""
    nodes, last = part
    x = ir.Value(name="x", shape=ir.Shape([None, 1]), type=ir.TensorType(ir.DataType.FLOAT))
    known, constants, copies = {value: x}, list[ir.Value](), list[ir.Node]()
    for node in nodes:
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
    known[last].name = "y"
    known[last].type = ir.TensorType(ir.DataType.FLOAT)
    opsets = dict(model.graph.opset_imports)
    graph = ir.Graph([x], [known[last]], nodes=copies, initializers=constants, opset_imports=opsets, name="function")
    return ir.Model(graph, ir_version=model.ir_version)


def _flat(made: NDArray[np.float64], least: float) -> int:
    """The last row that no row before it differs from by more than `least`."""
    apart = np.maximum(np.maximum.accumulate(made) - made, made - np.minimum.accumulate(made))
    return int(np.flatnonzero((apart <= least).all(axis=1))[-1])
