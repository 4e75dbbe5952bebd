"""Where channels go in operators that join, split and flatten them.

Torch-Pruning guesses this from the widths of the layers around an operator, for channels on axis 1. Here it is read from what
autograd saved: the axis, the sizes, and which output of a split goes where.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from edgekit.training.prune.slots import CONV, NORM, Indices, width

_THEIRS = ("_SliceOp", "_UnbindOp")

Pairs = tuple[Indices, Indices]
"""Positions among the given channels, and the channel that each becomes; one may become several."""


@dataclass(frozen=True, slots=True)
class IndexMap:
    """How channels of one node are numbered in the next."""

    pairs: Callable[[Indices], Pairs]


@dataclass(frozen=True, slots=True)
class Repairs:
    """What is known of a dependency graph beside its edges.

    Attributes:
        bundles: for a node, channels that can only go together, `(bundles, k)`: those at one place of equal parts.
        frozen: nodes whose channels stay, with the reason.
    """

    bundles: Mapping[Any, Indices]
    frozen: Mapping[Any, str]


def mapped(dependency: Any, channels: Indices) -> Pairs:
    """Where channels go along an edge of the dependency graph."""
    positions, current = np.arange(len(channels)), channels
    for mapping in dependency.index_mapping:
        if mapping is None:
            continue
        chosen, current = mapping.pairs(current) if isinstance(mapping, IndexMap) else _theirs(mapping, current)
        positions = positions[chosen]
    return positions, current


def _theirs(mapping: Any, channels: Indices) -> Pairs:
    """Torch-Pruning's own mapping, which wants pairs of numbers."""
    from torch_pruning._helpers import _HybridIndex  # type: ignore[import-untyped]

    found = mapping([_HybridIndex(idx=int(one), root_idx=position) for position, one in enumerate(channels)])
    return np.array([one.root_idx for one in found], np.intp), np.array([one.idx for one in found], np.intp)


def repair(graph: Any, owners: Mapping[Any, Any]) -> Repairs:
    """Give the edges around concatenations, splits and reshapes the mapping that they have, in place.

    Args:
        graph: Torch-Pruning's, built.
        owners: the module that made a node of autograd's graph.
    """
    nodes = {node.grad_fn: node for node in graph.module2node.values() if node.grad_fn is not None}
    nodes.update({fn: graph.module2node[owner] for fn, owner in owners.items() if owner in graph.module2node})
    bundles: dict[Any, Indices] = {}
    frozen: dict[Any, str] = {}
    _clear(graph)
    for node in graph.module2node.values():
        kind = type(node.module).__name__
        if kind == "_ConcatOp":
            _concat(node, nodes)
        elif kind == "_SplitOp":
            _split(node, nodes, bundles, frozen)
        elif kind == "_ReshapeOp":
            _reshape(node)
        elif "GluBackward" in str(getattr(node.module, "_grad_fn", "")):
            _glu(node)
        elif "ConstantPad" in str(getattr(node.module, "_grad_fn", "")) and _pads_channels(node.grad_fn):
            frozen[node] = "their channels are padded with zeros"
    return Repairs(bundles, frozen)


def _concat(node: Any, nodes: Mapping[Any, Any]) -> None:
    shape = _shape(node.grad_fn, 0)
    axis = _axis(node.grad_fn, len(shape))
    inputs = [(fn, _shape(fn, number) if fn is not None else None) for fn, number in node.grad_fn.next_functions]
    known = sum(one[axis] for _, one in inputs if one is not None)
    sizes = [one[axis] if one is not None else shape[axis] - known for _, one in inputs]
    if sum(sizes) != shape[axis]:  # several inputs without gradients
        return
    offset = 0
    used: set[int] = set()
    for (fn, one), size in zip(inputs, sizes, strict=True):
        source = nodes.get(fn)
        if source is not None and one is not None:
            joins = _is_channel_axis(source, one, axis)
            maps = (_shift(0, size, offset), _shift(offset, offset + size, -offset)) if joins else None
            _connect(source, node, maps, at=node, used=used)
        offset += size


def _split(node: Any, nodes: Mapping[Any, Any], bundles: dict[Any, Indices], frozen: dict[Any, str]) -> None:
    shape = tuple(node.grad_fn._saved_self_sym_sizes)
    axis = _axis(node.grad_fn, len(shape))
    parts = len(node.grad_fn._input_metadata)
    sizes = [_shape(node.grad_fn, number)[axis] for number in range(parts)]
    source = next(iter(node.inputs), None)
    used: set[int] = set()
    splits = source is not None and _is_channel_axis(source, shape, axis)
    if splits and len(set(sizes)) > 1:
        frozen[node] = "they are split into parts of different sizes"
    elif splits:
        bundles[node] = np.arange(shape[axis]).reshape(parts, -1).T
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    for consumer in dict.fromkeys(node.outputs):
        for fn in [fn for fn, owner in nodes.items() if owner is consumer]:
            for previous, number in fn.next_functions:
                if previous is node.grad_fn:
                    low, high = int(offsets[number]), int(offsets[number + 1])
                    maps = (_shift(low, high, -low), _shift(0, high - low, low)) if splits else None
                    _connect(node, consumer, maps, at=node, used=used)


def _glu(node: Any) -> None:
    """Half of the channels times a function of the other half; the node's numbers are those of the output."""
    shape = _shape(node.grad_fn, 0)
    axis = _axis(node.grad_fn, len(shape))
    used: set[int] = set()
    for source in node.inputs:
        if _is_channel_axis(source, shape[:axis] + (2 * shape[axis],) + shape[axis + 1 :], axis):
            _connect(source, node, (_untile(shape[axis]), _tile(2, shape[axis])), at=node, used=used)


def _reshape(node: Any) -> None:
    if not hasattr(node.grad_fn, "_saved_self_sym_sizes"):
        return
    before, after = tuple(node.grad_fn._saved_self_sym_sizes), _shape(node.grad_fn, 0)
    source = next(iter(node.inputs), None)
    if source is None:
        return
    maps = _reshape_maps(node, source, before, after)
    used: set[int] = set()
    for one in node.inputs:
        _connect(one, node, maps, at=node, used=used)


def _reshape_maps(
    node: Any, source: Any, before: tuple[int, ...], after: tuple[int, ...]
) -> tuple[IndexMap, IndexMap] | None:
    """The mappings into the reshaped channels and back; None where channels keep their numbers, or nothing is known."""
    if len(after) == 2 and len(before) > 2 and before[0] == after[0]:  # (N, C, ...) -> (N, C * ...)
        if len(before) == 3 and not _is_channel_axis(source, before, 1):
            return _tile(before[1], before[2]), _untile(before[2])
        return _spread(math.prod(before[2:])), _merge(math.prod(before[2:]))
    if len(before) == 2 and len(after) > 2 and before[0] == after[0]:  # (N, C * ...) -> (N, C, ...)
        if before[1] == math.prod(after[1:]):
            return _merge(math.prod(after[2:])), _spread(math.prod(after[2:]))
        return None
    if len(after) == len(before) + 1 and before[1] == after[1] * after[2] and before[2:] == after[3:]:
        return _untile(after[2]), _tile(after[1], after[2])  # (N, groups * C, ...) -> (N, groups, C, ...)
    if len(after) == len(before) - 1 and after[1] == before[1] * before[2] and after[2:] == before[3:]:
        previous = node.grad_fn.next_functions[0][0]
        while previous is not None and "Clone" in previous.name():
            previous = previous.next_functions[0][0]
        if previous is not None and "Transpose" in previous.name():  # channels are in front of groups
            return _spread(before[2]), _merge(before[2])
        return _tile(before[1], before[2]), _untile(before[2])
    return None


def _shift(low: int, high: int, offset: int) -> IndexMap:
    def pairs(channels: Indices) -> Pairs:
        chosen = np.flatnonzero((channels >= low) & (channels < high))
        return chosen, channels[chosen] + offset

    return IndexMap(pairs)


def _spread(times: int) -> IndexMap:
    """Channel c becomes `c * times` and the following ones."""

    def pairs(channels: Indices) -> Pairs:
        return np.repeat(np.arange(len(channels)), times), (channels[:, None] * times + np.arange(times)).reshape(-1)

    return IndexMap(pairs)


def _merge(times: int) -> IndexMap:
    return IndexMap(lambda channels: (np.arange(len(channels)), channels // times))


def _tile(times: int, size: int) -> IndexMap:
    """Channel c becomes `c`, `c + size` and so on."""

    def pairs(channels: Indices) -> Pairs:
        steps = np.arange(times) * size
        return np.repeat(np.arange(len(channels)), times), (channels[:, None] + steps).reshape(-1)

    return IndexMap(pairs)


def _untile(size: int) -> IndexMap:
    return IndexMap(lambda channels: (np.arange(len(channels)), channels % size))


def _connect(source: Any, target: Any, maps: tuple[IndexMap, IndexMap] | None, *, at: Any, used: set[int]) -> None:
    """Put mappings on the next edge between two nodes and on the one back, for the numbering of the node `at` one of its ends."""
    for ends, mapping in zip(((source, target), (target, source)), maps or (None, None), strict=True):
        for dependency in ends[0].dependencies:
            if dependency.target is ends[1] and id(dependency) not in used:
                dependency.index_mapping[0 if ends[0] is at else 1] = mapping
                used.add(id(dependency))
                break


def _clear(graph: Any) -> None:
    """Leave Torch-Pruning's mappings only on slices and unbindings: first out of the source's numbering, then into the target's."""
    for node in graph.module2node.values():
        for dependency in node.dependencies:
            theirs = dependency.index_mapping[0]
            ends = (type(node.module).__name__, type(dependency.target.module).__name__)
            dependency.index_mapping = [theirs if end in _THEIRS else None for end in ends]


def _shape(fn: Any, number: int) -> tuple[int, ...]:
    """Of an output of a node of autograd's graph."""
    return tuple(int(size) for size in fn._input_metadata[number].shape)


def _axis(fn: Any, rank: int) -> int:
    axis = int(fn._saved_dim)
    return (axis - 2**64 if axis >= 2**63 else axis) % rank


def _is_channel_axis(source: Any, shape: tuple[int, ...], axis: int) -> bool:
    """Whether an axis counts channels: axis 1, and of three axes the one that fits the layer before."""
    if len(shape) != 3:
        return axis == 1
    for node in _before(source):
        module = node.module
        size = width(module, "out") if isinstance(module, nn.Module) else None
        if size is not None:
            if size in shape[1:] and shape[1] != shape[2]:
                return shape[axis] == size
            return axis == (1 if isinstance(module, (CONV, *NORM, nn.GroupNorm)) else 2)
    return axis == 2


def _pads_channels(fn: Any) -> bool:
    pads = list(getattr(fn, "_saved_pad", ()))
    rank = len(_shape(fn, 0))
    at = 2 * (rank - 2)
    return any(pads[at : at + 2])


def _before(node: Any) -> Iterator[Any]:
    """The nodes before one, nearest first."""
    seen, queue = {node}, [node]
    while queue:
        one = queue.pop(0)
        yield one
        for previous in one.inputs:
            if previous not in seen:
                seen.add(previous)
                queue.append(previous)
