"""How many channels each layer keeps so that a model is foretold to be as fast as asked, and loses the least importance.

From all channels a path goes down to the floor, always by the step that loses the least for each millisecond won. Remembered is every
choice on the path, beside it, or with all layers cut alike that no other beats; no goal takes part in this. So a harder goal never
gets a slower choice or one that loses less, and no choice loses more than cutting all layers alike for the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np

from edgekit.channel_choice import (
    FLOOR,
    Chosen,
    Counts,
    Multiples,
    allowed_counts,
    best_next,
    check_groups,
    choose,
    floor_remark,
    given_back,
    multiple_of,
    rounding_remarks,
    shares,
    too_few_macs,
)
from edgekit.channels import Choice, Group, LayerCost, total_macs
from edgekit.errors import GoalError

LayerTime: TypeAlias = Callable[[str, int, int], float]
"""The time of a layer (ms) with so many input and output channels."""

MOST_LEVELS = 24
"""Of wide groups only so many numbers of units are tried."""
WIDE = 128
"""Channels of a wide layer."""
_QUARTERS = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, slots=True)
class Allocated:
    """A choice, and what is foretold of it.

    Attributes:
        choice: the units that are kept, of every group.
        predicted_ms: of the model.
        lost: the scores of the units that go, summed up.
        remarks: what did not go as asked, one sentence each.
    """

    choice: Choice
    predicted_ms: float
    lost: float
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A point of the frontier: the levels of all groups, by index into what they allow."""

    time: float
    lost: float
    levels: Counts


class Frontier:
    """Choices of which none is both faster and less of a loss than another, by foretold times.

    Attributes:
        fastest_ms: the least time that is foretold (ms).
        slowest_ms: the time with all channels (ms).
    """

    def __init__(
        self,
        groups: Sequence[Group],
        costs: Sequence[LayerCost],
        layer_time: LayerTime,
        *,
        total_ms: float | None = None,
        multiples: Multiples = 0,
        floor: float = FLOOR,
    ) -> None:
        """Walk the path.

        Args:
            groups: their scores are comparable, and at least 0.
            costs: of all layers.
            layer_time: see `LayerTime`.
            total_ms: the time of the whole model as measured (ms). What its layers do not explain never changes; where they are
                foretold to take longer than all, all foretold times are scaled down. None: the layers are all.
            multiples: what numbers of channels are multiples of.
            floor: the share of its units that each group keeps at least.

        Raises:
            DataError: a score is not finite.
            GoalError: there are no groups.
        """
        check_groups(groups)
        self._groups = groups
        self._remarks = rounding_remarks(groups, multiples)
        self._model = _Model(groups, costs, layer_time, multiples, floor)
        layers_ms = self._model.time(self._model.full)
        total = layers_ms if total_ms is None else total_ms
        self._scale = min(1.0, total / layers_ms) if layers_ms > 0 else 1.0
        self._rest = total - self._scale * layers_ms
        self._candidates = _frontier(self._model)
        self.fastest_ms = self._foretold(self._candidates[-1])
        self.slowest_ms = total

    def at_most(self, goal_ms: float) -> Allocated:
        """The choice that loses the least of those that are foretold to take no longer than `goal_ms`; the fastest of equals.

        Raises:
            GoalError: none is; the message says the floor.
        """
        fits = [one for one in self._candidates if self._foretold(one) <= goal_ms * (1 + 1e-12)]
        if not fits:
            raise GoalError(
                f"{goal_ms:.3g} ms are asked for, and {self.fastest_ms:.3g} ms is the least that pruning is foretold to reach "
                f"({self.slowest_ms:.3g} ms with all channels); ask for more time, ignore fewer layers, or round to less"
            )
        return self._allocated(fits[0])

    def fastest(self) -> Allocated:
        """The choice with the least time."""
        return self._allocated(self._candidates[-1])

    def next_slower(self, than_ms: float) -> Allocated | None:
        """The fastest choice that is foretold to take longer than that; None where there is none."""
        slower = [one for one in self._candidates if self._foretold(one) > than_ms * (1 + 1e-12)]
        return self._allocated(slower[-1]) if slower else None

    def _foretold(self, candidate: _Candidate) -> float:
        return self._rest + self._scale * candidate.time

    def _allocated(self, candidate: _Candidate) -> Allocated:
        counts = self._model.counts(candidate.levels)
        return Allocated(choose(self._groups, counts), self._foretold(candidate), candidate.lost, self._remarks)


def by_time(
    groups: Sequence[Group],
    costs: Sequence[LayerCost],
    layer_time: LayerTime,
    goal_ms: float,
    *,
    total_ms: float | None = None,
    multiples: Multiples = 0,
    floor: float = FLOOR,
) -> Allocated:
    """The choice of a `Frontier` for one goal; raises as its methods do."""
    frontier = Frontier(groups, costs, layer_time, total_ms=total_ms, multiples=multiples, floor=floor)
    return frontier.at_most(goal_ms)


def by_price(groups: Sequence[Group], costs: Sequence[LayerCost], share: float, *, multiples: Multiples = 0) -> Chosen:
    """Keep no more than a share of the multiply-accumulates and lose the least importance: they stand in for times.

    Layers become very unequal, which training makes up for and a fit of the weights does not. (ResNet-20 on CIFAR-10 JPEGs with half
    of them by l1: after three epochs 0.846 and 0.845 top-1, two seeds, where `by_macs` came to 0.8345 and 0.827; an ONNX file fitted to
    512 images 0.25, and 0.40.)

    Args:
        groups, costs, multiples: as of `Frontier`.
        share: of the multiply-accumulates of all layers, 0 to 1.

    Raises:
        DataError: a score is not finite.
        GoalError: there are no groups, or the least that can be kept needs more.
    """
    layers = {cost.name: cost for cost in costs}

    def macs(name: str, inputs: int, outputs: int) -> float:
        whole_inputs, whole_outputs = layers[name].channels
        return layers[name].macs * (inputs / whole_inputs) * (outputs / whole_outputs)

    frontier, whole = Frontier(groups, costs, macs, multiples=multiples), total_macs(costs, {})
    if frontier.fastest_ms > share * whole * (1 + 1e-12):
        raise too_few_macs(share, frontier.fastest_ms / whole)
    found = frontier.at_most(share * whole)
    allowed = [allowed_counts(group, multiple_of(multiples, group), floor=FLOOR) for group in groups]
    counts = given_back(
        allowed,
        tuple(len(found.choice[group.name]) for group in groups),
        lambda more: total_macs(costs, shares(groups, more)) <= share * whole * (1 + 1e-12),
        best_next(groups),
    )
    least = [
        f"{group.name} ({count * group.width} channels)"
        for group, some, count in zip(groups, allowed, counts, strict=True)
        if count == some[0] < group.units
    ]
    return Chosen(choose(groups, counts), (*found.remarks, *([floor_remark(least, alike=False)] if least else [])))


def widths_to_measure(
    groups: Sequence[Group], costs: Sequence[LayerCost], multiples: Multiples
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """For each layer the numbers of input and of output channels with a quarter, a half, three quarters and all units kept.

    Three quarters are left out of `WIDE` layers: there, times between a half and all are linear to a few per cent.
    """
    parts = []
    for share in _QUARTERS:
        counts = []
        for group in groups:
            some = allowed_counts(group, multiple_of(multiples, group))[::-1]
            counts.append(int(some[np.argmin(np.abs(some - share * group.units))]))
        parts.append(shares(groups, counts))
    found = {}
    for cost in costs:
        pairs = [_channels(cost, kept) for kept in parts]
        inputs, outputs = (
            _some(side, channels) for side, channels in zip(zip(*pairs, strict=True), cost.channels, strict=True)
        )
        found[cost.name] = inputs, outputs
    return found


def _some(quarters: Sequence[int], channels: int) -> tuple[int, ...]:
    kept = [*quarters[:2], quarters[-1]] if channels >= WIDE else quarters
    return tuple(sorted(set(kept)))


def _channels(cost: LayerCost, kept: Mapping[str, float]) -> tuple[int, int]:
    read, made = cost.shares(kept)
    return max(1, round(cost.channels[0] * read)), max(1, round(cost.channels[1] * made))


class _Model:
    """Times and losses by the levels of groups: level 0 keeps the fewest units, the last all."""

    def __init__(
        self,
        groups: Sequence[Group],
        costs: Sequence[LayerCost],
        layer_time: LayerTime,
        multiples: Multiples,
        floor: float,
    ) -> None:
        self.groups, self._layer_time = groups, layer_time
        self.allowed = [_levels(group, multiple_of(multiples, group), floor) for group in groups]
        self.full = tuple(len(some) - 1 for some in self.allowed)
        places = {group.name: index for index, group in enumerate(groups)}
        self._costs = costs
        self._layers: list[list[int]] = [[] for _ in groups]
        for layer, cost in enumerate(costs):
            for name in sorted({name for name, _ in (*cost.reads, *cost.makes)} & set(places)):
                self._layers[places[name]].append(layer)
        neighbours = [{places[name] for name, _ in (*cost.reads, *cost.makes) if name in places} for cost in costs]
        self.near = [
            set[int]().union({g}, *(neighbours[layer] for layer in some)) for g, some in enumerate(self._layers)
        ]
        self._lost = [
            [float(np.sort(group.scores)[: group.units - count].sum()) for count in some]
            for group, some in zip(groups, self.allowed, strict=True)
        ]
        self._known: dict[tuple[int, int, int], float] = {}

    def counts(self, levels: Counts) -> Counts:
        """How many units are kept of each group."""
        return tuple(some[level] for some, level in zip(self.allowed, levels, strict=True))

    def lost(self, levels: Counts) -> float:
        """The scores of the units that go."""
        return sum(some[level] for some, level in zip(self._lost, levels, strict=True))

    def loss(self, group: int, level: int) -> float:
        """The scores of the units of one group that go."""
        return self._lost[group][level]

    def time(self, levels: Counts) -> float:
        """The sum of all layers' times (ms)."""
        kept = shares(self.groups, self.counts(levels))
        return sum(self._time(layer, kept) for layer in range(len(self._costs)))

    def changes(self, levels: Counts, group: int) -> list[float]:
        """By how much the time changes (ms) when one group goes to each of its levels."""
        kept = shares(self.groups, self.counts(levels))
        layers, name, units = self._layers[group], self.groups[group].name, self.groups[group].units
        now = sum(self._time(layer, kept) for layer in layers)
        found = []
        for count in self.allowed[group]:
            kept[name] = count / units
            found.append(sum(self._time(layer, kept) for layer in layers) - now)
        return found

    def _time(self, layer: int, kept: Mapping[str, float]) -> float:
        cost = self._costs[layer]
        key = (layer, *_channels(cost, kept))
        if key not in self._known:
            self._known[key] = self._layer_time(cost.name, *key[1:])
        return self._known[key]


def _levels(group: Group, multiple: int, floor: float) -> list[int]:
    some = allowed_counts(group, multiple, floor=floor)
    if len(some) > MOST_LEVELS:
        some = some[np.unique(np.linspace(0, len(some) - 1, MOST_LEVELS).round().astype(int))]
    return [int(count) for count in some]


def _frontier(model: _Model) -> list[_Candidate]:
    """What is not beaten on the path, one exchange away from it, and of all groups cut alike; least lost first, fastest last."""
    found = [*_uniform(model)]
    levels = model.full
    time = model.time(levels)
    changes = [model.changes(levels, group) for group in range(len(levels))]
    while True:
        found.append(_Candidate(time, model.lost(levels), levels))
        found += _beside(model, found[-1], changes)
        if len(found) > 20_000:
            found = _unbeaten(found)
        step = _best_step(model, levels, changes)
        if step is None:
            return _unbeaten(found)
        group, level = step
        levels = (*levels[:group], level, *levels[group + 1 :])
        time = model.time(levels)
        for near in model.near[group]:
            changes[near] = model.changes(levels, near)


def _best_step(model: _Model, levels: Counts, changes: Sequence[Sequence[float]]) -> tuple[int, int] | None:
    """The group and its new level with the least lost for each ms won, however far down; where none wins time, the least lost."""
    rated = []
    for group, level in enumerate(levels):
        for lower in range(level):
            loss = model.loss(group, lower) - model.loss(group, level)
            won = -changes[group][lower]
            rated.append((0, loss / won, -won, group, lower) if won > 1e-12 else (1, loss, 0.0, group, lower))
    return min(rated)[3:] if rated else None


def _beside(model: _Model, here: _Candidate, changes: Sequence[Sequence[float]]) -> list[_Candidate]:
    """Choices that differ from one in a single group."""
    found = []
    for group, now in enumerate(here.levels):
        for level, change in enumerate(changes[group]):
            if level != now:
                lost = here.lost + model.loss(group, level) - model.loss(group, now)
                levels = (*here.levels[:group], level, *here.levels[group + 1 :])
                found.append(_Candidate(here.time + change, lost, levels))
    return found


def _uniform(model: _Model) -> Iterator[_Candidate]:
    """The same share of each group, for all shares that make a difference."""
    edges = {0.0, 1.0}
    for group, some in zip(model.groups, model.allowed, strict=True):
        edges |= {(low + high) / 2 / group.units for low, high in pairwise(some)}
    ordered = sorted(edges)
    for low, high in pairwise(ordered):
        share = (low + high) / 2
        levels = tuple(
            int(np.argmin([abs(count - share * group.units) for count in some]))
            for group, some in zip(model.groups, model.allowed, strict=True)
        )
        yield _Candidate(model.time(levels), model.lost(levels), levels)


def _unbeaten(found: Sequence[_Candidate]) -> list[_Candidate]:
    """Those that no other is as fast as with as little lost; least lost first."""
    best: list[_Candidate] = []
    for one in sorted(found, key=lambda one: (one.lost, one.time, one.levels)):
        if not best or one.time < best[-1].time:
            best.append(one)
    return best
