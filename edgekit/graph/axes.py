"""Positions along the axes of a graph's tensors: which can only be cut together, and which have to stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgekit.graph.operators import dims, is_constant

Ids = NDArray[np.intp]
"""One number for each position along an axis; the same number means the same fate."""


class NoRule(Exception):
    """A node takes the positions of its tensors for more than numbers; the text says in which way."""


@dataclass(frozen=True, slots=True)
class Maker:
    """A node whose constant makes channels.

    Attributes:
        node: a layer, or a Gather from a table.
        weight: its constant.
        axis: of the weight, along which channels are.
        ids: of the node's output.
    """

    node: ir.Node
    weight: ir.Value
    axis: int
    ids: Ids


@dataclass(slots=True)
class Split:
    """A Reshape that takes one axis apart: one of the axes that come of it can be cut.

    Attributes:
        candidates: how many there are.
        chosen: which it is.
        ids: of that one.
    """

    candidates: int
    chosen: int
    ids: Ids


class Axes:
    """What is known of a graph's axes, as the nodes are gone through one after the other.

    Attributes:
        of: for each value seen, for each axis: the ids of its positions, or None where the size is not known before the model runs.
        makers: what makes channels, in graph order.
        readers: constants, each with the axis along which it weighs channels: those that are cut add nothing.
        layers: for each node that costs something, the axes that its cost grows with: of the channels that it reads and makes, and of what
            they are repeated for. Where one is None, its size does not count.
        splits: by the name of the Reshape.
    """

    def __init__(self, choices: Mapping[str, int]) -> None:
        self.of: dict[ir.Value, tuple[Ids | None, ...]] = {}
        self.makers: list[Maker] = []
        self.readers: list[tuple[ir.Value, int]] = []
        self.layers: dict[ir.Node, tuple[Ids | None, ...]] = {}
        self.splits: dict[str, Split] = {}
        self._choices = choices
        self._count = 0
        self._tied: list[tuple[Ids, Ids]] = []
        self._reasons: list[tuple[Ids, str]] = []
        self._fixed = np.zeros(1024, np.bool_)

    def fresh(self, size: int) -> Ids:
        """Positions that nothing is known of."""
        ids = np.arange(self._count, self._count + size, dtype=np.intp)
        self._count += size
        if self._count > len(self._fixed):
            self._fixed = np.concatenate([self._fixed, np.zeros(self._count, np.bool_)])
        return ids

    def tie(self, a: Ids | None, b: Ids | None) -> None:
        """Pairs of positions share their fate; those along an axis of unknown size stay.

        Raises:
            NoRule: their numbers differ.
        """
        if a is None or b is None:
            for ids in (a, b):
                self.fix(ids, "an axis whose size is not known before the model runs")
        elif len(a) != len(b):
            raise NoRule(f"has {len(a)} and {len(b)} channels where it needs as many")
        elif a is not b:
            self._tied.append((a, b))

    def fix(self, ids: Ids | None, reason: str) -> None:
        """Positions stay, because of `reason`."""
        if ids is not None and len(ids):
            self._reasons.append((ids, reason))
            self._fixed[ids] = True

    def fresh_fixed(self, size: int | None, reason: str) -> Ids | None:
        """Positions that stay, along an axis of `size`."""
        if size is None:
            return None
        ids = self.fresh(size)
        self.fix(ids, reason)
        return ids

    def seems_fixed(self, ids: Ids) -> bool:
        """Whether all positions were fixed themselves; that they are tied to fixed ones may show later."""
        return bool(self._fixed[ids].all())

    def choose(self, name: str, candidates: int) -> int:
        """Which way to go on at a node that leaves a choice: the first one, unless that was tried."""
        return min(self._choices.get(name, 0), candidates - 1)

    def get(self, value: ir.Value | None) -> tuple[Ids | None, ...]:
        """The ids of a value, axis by axis.

        Raises:
            NoRule: its rank is unknown, or it is missing.
        """
        if value is not None and value not in self.of:
            constant = value.const_value
            shape = dims(value) if constant is None else constant.shape.numpy()
            if shape is None:
                raise NoRule("reads a tensor of unknown rank")
            self.of[value] = tuple(None if size is None else self.fresh(size) for size in shape)
            if not is_constant(value):
                self.fix_value(value, f"graph input {value.name!r}")
        if value is None:
            raise NoRule("lacks an input")
        return self.of[value]

    def fix_value(self, value: ir.Value, reason: str) -> None:
        """All positions of a value stay."""
        for ids in self.get(value):
            self.fix(ids, reason)

    def components(self) -> tuple[Ids, dict[int, str]]:
        """For each id the smallest one that it is tied to, and why the components stay that do."""
        roots = _smallest(self._count, self._tied)
        first = np.full(self._count, len(self._reasons))
        for index in reversed(range(len(self._reasons))):
            first[roots[self._reasons[index][0]]] = index
        reasons = {int(i): self._reasons[first[i]][1] for i in np.flatnonzero(first < len(self._reasons))}
        return roots, reasons


def _smallest(count: int, tied: Sequence[tuple[Ids, Ids]]) -> Ids:
    """The smallest number of the connected component of each of `count` numbers."""
    roots = np.arange(count, dtype=np.intp)
    if not tied:
        return roots
    a, b = (np.concatenate(side) for side in zip(*tied, strict=True))
    while True:
        left, right = roots[a], roots[b]
        apart = left != right
        if not apart.any():
            return roots
        a, b, left, right = a[apart], b[apart], left[apart], right[apart]
        np.minimum.at(roots, np.maximum(left, right), np.minimum(left, right))
        while not np.array_equal(shorter := roots[roots], roots):
            roots = shorter


def constant_array(value: ir.Value | None) -> NDArray[np.generic] | None:
    """The numbers of a constant; None for what is computed or missing."""
    if value is None or not is_constant(value) or value.const_value is None:
        return None
    return value.const_value.numpy()


def shape_entries(value: ir.Value | None) -> list[int | None] | None:
    """A shape that a node is given, with None for what is computed: a constant, or a Concat of constants and computed numbers.

    None where it is neither.
    """
    array = constant_array(value)
    if array is not None:
        return [int(size) for size in array.reshape(-1)]
    producer = value.producer() if value is not None else None
    if producer is None or producer.domain or producer.op_type != "Concat":
        return None
    entries: list[int | None] = []
    for part in producer.inputs:
        array, shape = constant_array(part), dims(part)
        if array is not None:
            entries += [int(size) for size in array.reshape(-1)]
        elif shape is not None and len(shape) == 1 and shape[0] is not None:
            entries += [None] * shape[0]
        else:
            return None
    return entries
