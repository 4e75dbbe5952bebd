"""Measuring what a frontier of choices foretells until a model is as fast as asked."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgekit.channels import Choice
from edgekit.errors import GoalError
from edgekit.frontier import Allocated, Frontier

WITHIN = 0.1
"""A choice that meets its goal by less than this share of it is as good as was asked for."""
NEAR = 0.04
"""One that meets it by less than this is not improved on: measurements scatter by as much."""


@dataclass(frozen=True, slots=True)
class Try:
    """One measurement: what was foretold with what was known, and what came out (ms), and the importance lost."""

    predicted_ms: float
    measured_ms: float
    lost: float


@dataclass(frozen=True, slots=True)
class Reached:
    """What `meet_goal` came to.

    Attributes:
        choice: the units that are kept, of every group.
        measured_ms: with them.
        lost: the scores of the units that go, summed up.
        met: whether that is no slower than the goal.
        tries: all that was measured, in order.
        remarks: what did not go as asked, one sentence each.
    """

    choice: Choice
    measured_ms: float
    lost: float
    met: bool
    tries: tuple[Try, ...]
    remarks: tuple[str, ...]


def meet_goal(
    frontier: Frontier, measure: Callable[[Choice], float], goal_ms: float, *, most: int = 5, within: float = WITHIN
) -> Reached:
    """Measure choices until one is no slower than the goal, and hardly faster.

    What is foretold is corrected by the last measurement's ratio to it. Choices that are slower than one that was too slow, or faster
    than one that was fast enough, are not measured any more. The slowest that is fast enough is the result.

    Args:
        frontier: of the model.
        measure: prunes so and measures the whole model (ms).
        goal_ms: what it is to take (ms).
        most: the most measurements.
        within: a share of the goal, by which the result may miss it.

    Raises:
        GoalError: none was within `within` above the goal; the message says the fastest that was measured.
    """
    tries: list[tuple[Allocated, float]] = []
    too_slow, enough, ratio = math.inf, 0.0, 1.0
    while len(tries) < most:
        following = _following(frontier, goal_ms / ratio, too_slow=too_slow, enough=enough)
        if following is None:
            break
        measured = measure(following.choice)
        tries.append((following, measured))
        ratio = measured / following.predicted_ms
        if measured > goal_ms:
            too_slow = min(too_slow, following.predicted_ms)
        elif measured >= goal_ms * (1 - min(NEAR, within)):
            break
        else:
            enough = max(enough, following.predicted_ms)
    return _reached(frontier, tries, goal_ms, within)


def _following(frontier: Frontier, goal_ms: float, *, too_slow: float, enough: float) -> Allocated | None:
    """The choice for a corrected goal, between one that was too slow and one that was fast enough; None if there is none."""
    ceiling = too_slow * (1 - 1e-9)
    if frontier.fastest_ms > ceiling:
        return None
    if goal_ms < frontier.fastest_ms and not enough:
        return frontier.fastest()
    bisected = ((enough + ceiling) / 2, ceiling) if ceiling < math.inf else ()
    for limit in (min(goal_ms, ceiling), *bisected):
        if limit >= frontier.fastest_ms:
            found = frontier.at_most(limit)
            if found.predicted_ms > enough:
                return found
    return frontier.next_slower(enough) if ceiling == math.inf else None


def _reached(frontier: Frontier, tries: Sequence[tuple[Allocated, float]], goal_ms: float, within: float) -> Reached:
    records = tuple(Try(one.predicted_ms, measured, one.lost) for one, measured in tries)
    met = [(one, measured) for one, measured in tries if measured <= goal_ms]
    near = [(one, measured) for one, measured in tries if measured <= goal_ms * (1 + within)]
    if not near:
        measured = min(measured for _, measured in tries)
        at_floor = any(one.predicted_ms <= frontier.fastest_ms for one, _ in tries)
        why = "with as few channels as pruning these layers can keep" if at_floor else f"in {len(tries)} measurements"
        raise GoalError(
            f"{goal_ms:.3g} ms are asked for, and the fastest that was measured takes {measured:.3g} ms, {why}; ask for more time, "
            "ignore fewer layers, or round to less"
        )
    chosen, measured = min(met, key=lambda pair: pair[0].lost) if met else min(near, key=lambda pair: pair[1])
    remarks = list(chosen.remarks)
    if not met:
        remarks.append(f"{measured:.3g} ms is {measured / goal_ms - 1:.1%} slower than the {goal_ms:.3g} ms asked for")
    elif measured < goal_ms * (1 - within):
        remarks.append(
            f"{measured:.3g} ms is {1 - measured / goal_ms:.1%} faster than the {goal_ms:.3g} ms asked for: the choices next to it "
            "were too slow, or were not tried"
        )
    return Reached(chosen.choice, measured, chosen.lost, bool(met), records, tuple(remarks))
