"""Sets of channels that go together, found along the edges of Torch-Pruning's dependency graph."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from edgekit.training.prune.heads import Attention
from edgekit.training.prune.index_maps import Repairs, mapped
from edgekit.training.prune.slots import Indices, Side, bound_channels, is_tied, width

OUTPUTS = "they are outputs of the model"

Key = tuple[Any, Side]
"""A node of the dependency graph, and a side of it."""


def side_width(layer: Any, side: Side, attentions: Mapping[nn.Module, Attention]) -> int | None:
    """How many channels a layer has at a side; None for one that cannot be cut."""
    if layer in attentions:
        return attentions[layer].width(side)
    return width(layer, side)


class Units:
    """Channels of the sides of nodes, in sets of those that go together."""

    def __init__(self) -> None:
        self.numbers: dict[Key, dict[int, int]] = defaultdict(dict)
        self._parents: list[int] = []
        self._frozen: dict[int, str] = {}

    def number(self, key: Key, channel: int) -> tuple[int, bool]:
        """The number of a channel, and whether it is a new one."""
        known = self.numbers[key]
        if channel in known:
            return known[channel], False
        known[channel] = len(self._parents)
        self._parents.append(known[channel])
        return known[channel], True

    def find(self, number: int) -> int:
        """What stands for all that a channel goes with."""
        while self._parents[number] != number:
            self._parents[number] = self._parents[self._parents[number]]
            number = self._parents[number]
        return number

    def join(self, one: int, other: int) -> None:
        """Two go together."""
        first, second = self.find(one), self.find(other)
        if first == second:
            return
        self._parents[max(first, second)] = min(first, second)
        reason = self._frozen.pop(max(first, second), None)
        if reason is not None:
            self._frozen.setdefault(min(first, second), reason)

    def freeze(self, number: int, reason: str) -> None:
        """One stays, and all that goes with it."""
        self._frozen.setdefault(self.find(number), reason)

    def frozen(self, number: int) -> str | None:
        """Why one stays."""
        return self._frozen.get(self.find(number))


@dataclass(slots=True)
class Walk:
    """Follows channels along the edges of a dependency graph."""

    graph: Any
    repairs: Repairs
    attentions: Mapping[nn.Module, Attention]
    units: Units = field(default_factory=Units)

    def run(self, kept: Mapping[nn.Module, str]) -> Units:
        """All sets of channels that go together; those of the layers in `kept` stay, for the reason given there."""
        for node in list(self.graph.module2node.values()):
            for side in self.sides(node):
                size = self.width(node, side)
                if size is not None:
                    self._spread((node, side), np.arange(size))
        for node in self.graph.module2node.values():
            for side in self.sides(node):
                self._hold((node, side), kept.get(node.module, "") if side != "in" else "")
        return self.units

    def sides(self, node: Any) -> tuple[Side, ...]:
        """Which sides a node has."""
        pruner = self.graph.get_pruner_of_module(node.module)
        return ("both",) if pruner.prune_in_channels == pruner.prune_out_channels else ("in", "out")

    def width(self, node: Any, side: Side) -> int | None:
        """Channels at a side of a layer; None for operators."""
        if isinstance(node.module, nn.Parameter):
            return int(node.module.shape[node.pruning_dim])
        return side_width(node.module, side, self.attentions)

    def is_layer(self, node: Any) -> bool:
        """Whether a node is no operator: one whose width must be known."""
        name = type(node.module).__name__
        return not (type(node.module).__module__.startswith("torch_pruning") and name.startswith("_"))

    def _side(self, node: Any, function: Any) -> Side:
        pruner = self.graph.get_pruner_of_module(node.module)
        if pruner.prune_in_channels == pruner.prune_out_channels:
            return "both"
        return "in" if function == pruner.prune_in_channels else "out"

    def _spread(self, key: Key, channels: Indices) -> None:
        queue = [(key, channels)]
        for channel in channels:
            self.units.number(key, int(channel))
        while queue:
            (node, side), channels = queue.pop()
            for edge in node.dependencies:
                if self._side(node, edge.trigger) == side:
                    fresh = self._cross((node, side), channels, edge)
                    if len(fresh):
                        queue.append(((edge.target, self._side(edge.target, edge.handler)), fresh))

    def _cross(self, key: Key, channels: Indices, edge: Any) -> Indices:
        """Join channels to those at the other end of an edge; returns the ones that were not known there."""
        positions, found = mapped(edge, channels)
        target: Key = (edge.target, self._side(edge.target, edge.handler))
        size, own = self.width(*target), self.width(*key)
        if 1 in (size, own):  # spread over all channels: belongs to none
            return np.array([], np.intp)
        if size is None and self.is_layer(edge.target):
            size = 0
        if size is not None and len(found) and found.max() >= size:
            reason = _cannot_follow(key[0], edge.target)
            for channel in channels:
                self.units.freeze(self.units.number(key, int(channel))[0], reason)
            return np.array([], np.intp)
        fresh = []
        for position, channel in zip(positions.tolist(), found.tolist(), strict=True):
            number, is_new = self.units.number(target, channel)
            self.units.join(number, self.units.number(key, int(channels[position]))[0])
            if is_new:
                fresh.append(channel)
        return np.array(fresh, np.intp)

    def _hold(self, key: Key, kept: str) -> None:
        """Join what goes together within a node, and freeze what stays."""
        node, side = key
        known = self.units.numbers.get(key, {})
        reason = kept or self.repairs.frozen.get(node, "")
        if type(node.module).__name__ == "_OutputOp":
            reason = OUTPUTS
        for number in known.values() if reason else ():
            self.units.freeze(number, reason)
        bundles = self.repairs.bundles.get(node)
        if bundles is None and node.module in self.attentions:
            bundles = self.attentions[node.module].bundles(side)
        elif bundles is None and isinstance(node.module, nn.Module):
            bundles = bound_channels(node.module, side)
        for bundle in bundles if bundles is not None else ():
            numbers = [known[channel] for channel in bundle.tolist() if channel in known]
            for number in numbers[1:]:
                self.units.join(numbers[0], number)
        if side == "in" and is_tied(node.module) and bundles is not None:
            outs = self.units.numbers.get((node, "out"), {})
            per_group = node.module.out_channels // node.module.groups
            for channel, number in known.items():
                if channel * per_group in outs:
                    self.units.join(number, outs[channel * per_group])


def _cannot_follow(source: Any, target: Any) -> str:
    names = [one._name or type(one.module).__name__.strip("_") for one in (source, target)]
    return f"their number does not fit between {names[0]} and {names[1]}"
