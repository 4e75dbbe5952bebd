"""Attention masks that hide the padding behind a sentence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgekit.graph.operators import dims
from edgekit.lowering.units import constant

_LEAST = -1e3
"""What is added to a score is a mask where it is below: its exponential is 0 in float32 beside any other."""
_INTEGERS = (ir.DataType.BOOL, ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT32, ir.DataType.INT64)
_ELEMENTWISE: dict[str, Callable[..., object]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Where": np.where,
    "Not": np.logical_not,
    "Equal": np.equal,
    "Greater": np.greater,
    "Less": np.less,
}
_Axes = tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class PaddingMask:
    """An additive mask of shape `(B, 1, 1, S)` that is a function of an integer input of shape `(B, S)`.

    Attributes:
        source: the input.
        kept: 1 or 0: what the input holds at positions that are looked at; the other of the two hides a position.
        filter_value: what is added to the scores of hidden positions.
    """

    source: ir.Value
    kept: int
    filter_value: float


def padding_mask(mask: ir.Value, inputs: list[ir.Value]) -> PaddingMask | None:
    """What `mask` is made of, if it follows from an integer or boolean graph input of 0 and 1 element by element.

    Such an input is taken to hold 0 and 1 only, as the masks of tokenizers do; that its numbers are others nothing in a graph can
    exclude.
    """
    for source in inputs:
        if source.dtype not in _INTEGERS or len(dims(source) or ()) != 2:
            continue
        found = [_evaluate(mask, source, number) for number in (0, 1)]
        if any(one is None or one[1] != (0, None, None, 1) for one in found):
            continue
        zero, one = (np.float32(result[0]) for result in found if result is not None)
        for kept, open_value, hidden in ((1, one, zero), (0, zero, one)):
            if open_value == 0 and np.isfinite(hidden) and hidden <= _LEAST:
                return PaddingMask(source, kept, float(hidden))
    return None


def _evaluate(value: ir.Value | None, source: ir.Value, number: int) -> tuple[float, _Axes | None] | None:
    """What `value` is where `source` is `number`, and which axis of the source each of its axes is; no axes for a constant.

    None where it depends on anything else, or not element by element.
    """
    if value is source:
        return float(number), (0, 1)
    known = constant(value)
    if known is not None:
        return (float(known.item()), None) if known.size == 1 else None
    node = None if value is None else value.producer()
    if node is None or node.domain:
        return None
    if node.op_type in _ELEMENTWISE:
        return _combine(node, source, number)
    inner = (
        _evaluate(node.inputs[0], source, number)
        if node.op_type in ("Unsqueeze", "Cast", "Identity", "Expand", "Gather")
        else None
    )
    if inner is None or inner[1] is None or node.op_type == "Identity":
        return inner
    if node.op_type == "Unsqueeze":
        return inner[0], _unsqueezed(inner[1], node)
    if node.op_type == "Gather":
        axes = _picked(inner[1], node)
        return None if axes is None else (inner[0], axes)
    if node.op_type == "Expand":
        return inner if len(dims(node.outputs[0]) or ()) == len(inner[1]) else None
    target = ir.DataType(node.attributes.get_int("to"))
    return (float(bool(inner[0])) if target == ir.DataType.BOOL else inner[0]), inner[1]


def _combine(node: ir.Node, source: ir.Value, number: int) -> tuple[float, _Axes | None] | None:
    parts = [_evaluate(value, source, number) for value in node.inputs]
    found = [part for part in parts if part is not None]
    axes = {part[1] for part in found if part[1] is not None}
    if len(found) != len(parts) or len(axes) != 1:
        return None
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        result = _ELEMENTWISE[node.op_type](*(np.float32(part[0]) for part in found))
    return float(np.asarray(result).item()), axes.pop()


def _picked(axes: _Axes, node: ir.Node) -> _Axes | None:
    """Without the new axis whose only element a Gather picks; None for any other Gather."""
    index, axis = constant(node.inputs[1]), node.attributes.get_int("axis", 0) % max(1, len(axes))
    if index is None or index.shape or int(index) not in (0, -1) or not axes or axes[axis] is not None:
        return None
    return (*axes[:axis], *axes[axis + 1 :])


def _unsqueezed(axes: _Axes, node: ir.Node) -> _Axes:
    """Where the axes of an Unsqueeze's input end up; None for the new ones."""
    new = constant(node.inputs[1])
    if new is None:
        return ()
    rank = len(axes) + new.size
    places = {int(axis) % rank for axis in new.reshape(-1)}
    rest = iter(axes)
    return tuple(None if axis in places else next(rest) for axis in range(rank))
