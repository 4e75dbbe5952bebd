"""Which channels are kept, for a share of the channels or of the multiply-accumulates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgekit.channels import Choice, Group, LayerCost, total_macs
from edgekit.errors import DataError, GoalError
from edgekit.words import some

Scope = Literal["global", "layer"]
Multiples = Mapping[str, int] | int
"""What numbers of channels are multiples of, for all groups or by a group's name; a group that is not named is not rounded."""
Counts = tuple[int, ...]
"""How many units are kept of each group, in the order of the groups."""
Pressing = Callable[[int, int], float]
"""From the index of a group and how many units it keeps to a number that is the higher, the sooner it gets more."""

FLOOR = 0.1
"""Where groups compete, each keeps this share of its units at least,"""
BALANCE = 2 / 3
"""and, where the goal can be met so, this part of the share that it would keep if all lost the same. (ResNet-20, half of the MACs cut at
once: with fresh BatchNorm statistics 0.43 top-1 by l1 and 0.47 by hessian; 0.32 and 0.44 without, 0.36 and 0.38 where all lose nearly
the same.)"""
FEWEST_MULTIPLES = 2
"""Of a multiple that fits a group, the group has so many at least: it can lose a half."""
_RATIO_STEPS = 4096


@dataclass(frozen=True, slots=True)
class Chosen:
    """What is kept.

    Attributes:
        choice: the units, of every group.
        remarks: what did not go as asked, one sentence each.
    """

    choice: Choice
    remarks: tuple[str, ...] = ()


def by_ratio(groups: Sequence[Group], ratio: float, *, scope: Scope = "global", multiples: Multiples = 0) -> Chosen:
    """Let a share of the channels go, those of least score, as close to it as rounding allows.

    Args:
        groups: their scores are comparable where `scope` is "global".
        ratio: the share that goes, 0 to 1.
        scope: "layer" takes the same share of each group, of which one multiple stays at least; "global" the least of all, and leaves
            each group what `FLOOR` and `BALANCE` say.
        multiples: see `Multiples`. Of a group whose number of channels is no multiple, all or a multiple are kept.

    Raises:
        DataError: a score is not finite.
        GoalError: there are no groups, `ratio` is not between 0 and 1, or rounding leaves every group as it is.
    """
    if not 0 < ratio < 1:
        raise GoalError(f"the ratio of channels to prune is {ratio:g}; expected a number between 0 and 1")
    total = sum(group.units * group.width for group in groups)

    def left(counts: Counts) -> float:
        return sum(count * group.width for count, group in zip(counts, groups, strict=True)) / total

    def gone(position: int) -> float:
        return 1 - left(ladder.counts(position))

    ladder = _ladder(groups, scope, multiples, 1 - ratio, lambda counts: left(counts) <= 1 - ratio)
    position = _first(ladder.positions, lambda at: gone(at) >= ratio)
    if position and abs(gone(position - 1) - ratio) < abs(gone(position) - ratio):
        position -= 1
    if gone(position) == 0:
        position = _first(ladder.positions, lambda at: gone(at) > 0)
        least = f"the least that can go is {gone(position):.1%}" if gone(position) else "no channel can go"
        raise GoalError(
            f"nothing is pruned by a ratio of {ratio:g}: with numbers of channels rounded, {least}; ask for more, or round to less"
        )
    counts = ladder.counts(position)
    return Chosen(choose(groups, counts), _remarks(groups, ladder, ladder.wanted(position), counts, multiples))


def by_macs(
    groups: Sequence[Group],
    costs: Sequence[LayerCost],
    share: float,
    *,
    scope: Scope = "global",
    multiples: Multiples = 0,
) -> Chosen:
    """Keep no more than a share of the multiply-accumulates, and as much of it as rounding allows.

    What rounding leaves of the budget is given back: the units of highest score first, or in `scope` "layer" to the groups that
    were rounded down most.

    Args:
        groups, scope, multiples: as in `by_ratio`.
        costs: of all layers.
        share: of the multiply-accumulates of all layers, 0 to 1.

    Raises:
        DataError: a score is not finite.
        GoalError: there are no groups, or the least that can be kept needs more.
    """
    whole = total_macs(costs, {})

    def fits(counts: Counts) -> bool:
        return total_macs(costs, shares(groups, counts)) <= share * whole * (1 + 1e-12)

    ladder = _ladder(groups, scope, multiples, math.sqrt(share), fits)  # inputs and outputs go alike
    position = _first(ladder.positions, lambda at: fits(ladder.counts(at)))
    if not fits(ladder.counts(position)):
        raise too_few_macs(share, total_macs(costs, shares(groups, ladder.counts(position))) / whole)
    wanted = ladder.wanted(position)
    pressing = best_next(groups) if scope == "global" else lambda at, n: (wanted[at] - n) / groups[at].units
    counts = given_back(ladder.allowed, ladder.counts(position), fits, pressing)
    return Chosen(choose(groups, counts), _remarks(groups, ladder, wanted, counts, multiples))


def too_few_macs(share: float, floor: float) -> GoalError:
    """What is said where a share of the multiply-accumulates is less than pruning can leave."""
    return GoalError(
        f"{share:.1%} of the multiply-accumulates are asked for, and {floor:.1%} is the least that pruning these layers can leave; "
        "ask for more, ignore fewer layers, or round to less"
    )


def best_next(groups: Sequence[Group]) -> Pressing:
    """The score of the best unit that a group, by its index, does not have where it keeps so many."""
    best_first = [np.sort(group.scores)[::-1] for group in groups]
    return lambda at, count: float(best_first[at][count])


def given_back(
    allowed: Sequence[NDArray[np.intp]], counts: Counts, fits: Callable[[Counts], bool], pressing: Pressing
) -> Counts:
    """Numbers of units raised by single steps, the most pressing first, as long as any step fits.

    Args:
        allowed: the numbers that each group may keep, ascending.
        counts: what to begin with.
        fits: whether numbers are within the budget.
        pressing: how much a group needs more than it has.
    """
    while True:
        open_groups = [index for index, few in enumerate(allowed) if counts[index] < few[-1]]
        for index in sorted(open_groups, key=lambda index: pressing(index, counts[index]), reverse=True):
            few = allowed[index]
            more = int(few[np.searchsorted(few, counts[index], side="right")])
            raised = (*counts[:index], more, *counts[index + 1 :])
            if fits(raised):
                counts = raised
                break
        else:
            return counts


def allowed_counts(group: Group, multiple: int, *, floor: float = 0.0) -> NDArray[np.intp]:
    """How many units of a group may be kept, ascending: whole multiples of channels, and all.

    One unit, and a share `floor` of the units, stays at least.
    """
    step = unit_step(group, multiple)
    counts = np.arange(step, group.units + 1, step, dtype=np.intp)
    counts = np.union1d(counts, [group.units]).astype(np.intp)
    return counts[counts >= min(group.units, math.ceil(floor * group.units - 1e-9))]


def unit_step(group: Group, multiple: int) -> int:
    """How many units make a multiple of `multiple` channels, or nearly one where the group has no such number of units."""
    if multiple <= 1:
        return 1
    exact = multiple // math.gcd(multiple, group.width)
    return exact if exact <= group.units else max(1, round(multiple / group.width))


def fitting_multiples(groups: Sequence[Group], preferred: Sequence[int]) -> dict[str, int]:
    """For each group the largest of the `preferred` multiples that it has `FEWEST_MULTIPLES` of, or the smallest of them."""
    multiples = sorted(preferred, reverse=True)
    return {
        group.name: next(
            (one for one in multiples if group.units * group.width >= FEWEST_MULTIPLES * one), multiples[-1]
        )
        for group in groups
    }


def choose(groups: Sequence[Group], counts: Sequence[int]) -> dict[str, NDArray[np.intp]]:
    """The best units of each group, so many as `counts` says; of equal ones those that come first."""
    return {
        group.name: np.sort(np.argsort(-group.scores, kind="stable")[:count]).astype(np.intp)
        for group, count in zip(groups, counts, strict=True)
    }


def shares(groups: Sequence[Group], counts: Sequence[int]) -> dict[str, float]:
    """What `counts` leaves of each group, 0 to 1."""
    return {group.name: count / group.units for group, count in zip(groups, counts, strict=True)}


def multiple_of(multiples: Multiples, group: Group) -> int:
    """What a group's number of channels is a multiple of; 0 where it is not rounded."""
    return multiples if isinstance(multiples, int) else multiples.get(group.name, 0)


def check_groups(groups: Sequence[Group]) -> None:
    """Make sure that there is something to choose from.

    Raises:
        DataError: a score is not finite.
        GoalError: there are no groups.
    """
    if not groups:
        raise GoalError("no layer has channels that can be pruned; ignore fewer layers")
    for group in groups:
        count = int((~np.isfinite(group.scores)).sum())
        if count:
            raise DataError(
                f"layer {group.name!r}: {count} of {group.units} importance scores are not finite; check the weights and the criterion"
            )


def rounding_remarks(groups: Sequence[Group], multiples: Multiples) -> tuple[str, ...]:
    """Which groups cannot be rounded as asked."""
    fixed, near = [], []
    for group in groups:
        multiple, step = multiple_of(multiples, group), unit_step(group, multiple_of(multiples, group))
        channels = group.units * group.width
        if group.units > 1 and len(allowed_counts(group, multiple)) == 1:
            fixed.append(f"{group.name} ({channels} channels, multiples of {multiple})")
        elif multiple > 1 and step * group.width % multiple:
            near.append(f"{group.name} ({step * group.width} instead of {multiple})")
    found = []
    if fixed:
        found.append(f"too few channels to keep a multiple of them, so all are kept: {some(fixed)}")
    if near:
        found.append(f"channels go in units that make no such multiple, so they are rounded to others: {some(near)}")
    return tuple(found)


@dataclass(frozen=True, slots=True)
class _Ladder:
    """Numbers of units that fall, group by group, from position 0, where all are kept, to `positions`.

    Attributes:
        wanted: the numbers at a position before they are rounded, `(groups,)`.
        allowed: the numbers that each group may keep, ascending.
        positions: the last position.
        floor: the share of its units that each group keeps at least; None where scores of groups are not compared.
    """

    wanted: Callable[[int], NDArray[np.float64]]
    allowed: tuple[NDArray[np.intp], ...]
    positions: int
    floor: float | None

    def counts(self, position: int) -> Counts:
        """The allowed numbers next to the wanted ones; the larger where two are as near."""
        return tuple(_nearest(few, want) for few, want in zip(self.allowed, self.wanted(position), strict=True))


def _ladder(
    groups: Sequence[Group], scope: Scope, multiples: Multiples, alike: float, meets: Callable[[Counts], bool]
) -> _Ladder:
    """The way down, to the goal at least where that is possible.

    Args:
        groups, scope, multiples: as in `by_ratio`.
        alike: the share of its units that each group keeps where all lose the same.
        meets: whether numbers of units are as few as is asked for.
    """
    check_groups(groups)
    units = np.array([group.units for group in groups])
    if scope != "global":
        allowed = _allowed(groups, multiples, 0.0)
        return _Ladder(lambda at: units * (1 - at / _RATIO_STEPS), allowed, _RATIO_STEPS, None)
    allowed, floor = _allowed(groups, multiples, BALANCE * alike), BALANCE * alike
    if floor < FLOOR or not meets(tuple(int(counts[0]) for counts in allowed)):
        allowed, floor = _allowed(groups, multiples, FLOOR), FLOOR
    owners = np.repeat(np.arange(len(groups)), units)
    order = owners[np.argsort(np.concatenate([group.scores for group in groups]), kind="stable")]

    def wanted(position: int) -> NDArray[np.float64]:
        return units - np.bincount(order[:position], minlength=len(groups)).astype(np.float64)

    return _Ladder(wanted, allowed, len(order), floor)


def _allowed(groups: Sequence[Group], multiples: Multiples, floor: float) -> tuple[NDArray[np.intp], ...]:
    return tuple(allowed_counts(group, multiple_of(multiples, group), floor=floor) for group in groups)


def _nearest(allowed: NDArray[np.intp], wanted: float) -> int:
    falling = allowed[::-1]
    return int(falling[np.argmin(np.abs(falling - wanted))])


def _first(last: int, holds: Callable[[int], bool]) -> int:
    """The first position from 0 to `last` where something holds that goes on to hold; `last` where it never does."""
    low, high = 0, last
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def _remarks(
    groups: Sequence[Group], ladder: _Ladder, wanted: NDArray[np.float64], counts: Counts, multiples: Multiples
) -> tuple[str, ...]:
    limited = [
        f"{group.name} ({count * group.width} channels)"
        for group, few, want, count in zip(groups, ladder.allowed, wanted, counts, strict=True)
        if want < few[0] == count < group.units
    ]
    told = limited and (ladder.floor is None or ladder.floor == FLOOR)
    least = [floor_remark(limited, alike=ladder.floor is None)] if told else []
    return (*rounding_remarks(groups, multiples), *least)


def floor_remark(limited: Sequence[str], *, alike: bool) -> str:
    """Which layers would lose more, but for what stays of each."""
    floor = "one multiple" if alike else f"{FLOOR:.0%} of the channels, or one multiple,"
    return f"no fewer than {floor} stay of a layer: {some(limited)}"
