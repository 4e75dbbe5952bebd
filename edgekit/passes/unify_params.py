"""Give tensors that must be on one grid one grid."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgekit.graph.annotations import get_params, get_wish, set_params
from edgekit.graph.rules import shares_grid
from edgekit.quant.affine import choose_params
from edgekit.quant.spec import QuantParams
from edgekit.target import Target

MOST_UNLIKE = 16.0
"""How many times larger than the smallest range the largest may be on one grid: the smallest keeps a sixteenth of its codes."""


def unify_params(model: ir.Model, target: Target) -> ir.Model:
    """Inputs and outputs of a Concat, and both sides of pass-through operators, get the union of their ranges.

    A Concat of ranges that differ more than `MOST_UNLIKE` times is left alone: boxes in pixels beside scores would wipe out the scores.

    Values that are wished quantized but were not observed (the output of a pass-through operator holds no new numbers) take the
    grid of their group. A grid that came with the model is never moved: where one is in a group, the others join it. Where several
    are that differ, all stay, and lowering lets the operators between them run in float.
    """
    model = model.clone()
    apart = {node for node in model.graph if node.op_type in target.quantization.unify and _keeps_apart(node)}
    for group in _groups(model, target, apart):
        known = [params for value in group if (params := get_params(value)) is not None]
        if not known:
            continue
        shared = _trained(group) or _union(group, known, target)
        for value in group:
            old = get_params(value)
            if old is None or not old.fixed:
                set_params(value, shared)
    return model


def _keeps_apart(node: ir.Node) -> bool:
    """Whether the ranges of what a node joins differ so much that on one grid nothing would be left of the smallest.

    Its output then gets the union of the ranges all the same, for readers of codes; the node itself stays float.
    """
    known = [params for value in node.inputs if (params := get_params(value)) is not None]
    extents = [extent for params in known if (extent := max(-params.low, params.high)) > 0 and not params.fixed]
    wish = get_wish(node.outputs[0])
    if len(extents) < 2 or max(extents) <= MOST_UNLIKE * min(extents) or wish is None:
        return False
    low, high = min(params.low for params in known), max(params.high for params in known)
    set_params(node.outputs[0], choose_params(low, high, wish[0], observer="union"))
    return True


def _groups(model: ir.Model, target: Target, apart: set[ir.Node]) -> list[list[ir.Value]]:
    """The sets of values that are tied to each other, directly or in a chain, each in graph order."""
    leader: dict[ir.Value, ir.Value] = {}

    def find(value: ir.Value) -> ir.Value:
        while leader.setdefault(value, value) is not value:
            leader[value] = leader[leader[value]]
            value = leader[value]
        return value

    for node in model.graph:
        if node in apart:
            continue
        tied = [
            value for value in shares_grid(node, target) if get_params(value) is not None or get_wish(value) is not None
        ]
        for value in tied[1:]:
            leader[find(value)] = find(tied[0])
    groups: dict[ir.Value, list[ir.Value]] = {}
    for value in list(leader):
        groups.setdefault(find(value), []).append(value)
    return [group for group in groups.values() if len(group) > 1]


def _trained(group: list[ir.Value]) -> QuantParams | None:
    """The grid in a group that came with the model; the widest where there are several, on which the others' numbers fit too."""
    fixed = [params for value in group if (params := get_params(value)) is not None and params.fixed]
    return max(fixed, key=_extent) if fixed else None


def _extent(params: QuantParams) -> float:
    """The largest number on a grid of a tensor, in magnitude."""
    ends = np.array([params.qmin, params.qmax]) - params.zero_point.max()
    return float(np.abs(ends * params.scale.max()).max())


def _union(group: list[ir.Value], known: list[QuantParams], target: Target) -> QuantParams:
    wishes = (wish for value in group if (wish := get_wish(value)) is not None)
    spec, _ = next(wishes, (target.quantization.activation.spec, None))
    low, high = min(params.low for params in known), max(params.high for params in known)
    observers = {params.observer for params in known}
    return choose_params(low, high, spec, observer=observers.pop() if len(observers) == 1 else "union")
