from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.allocation import meet_goal
from edgekit.channels import Choice, Group, LayerCost
from edgekit.errors import GoalError
from edgekit.frontier import Frontier

UNITS = 20


@pytest.fixture(scope="module")
def frontier() -> Frontier:
    return frontier_of(multiple=1)


def frontier_of(*, multiple: int) -> Frontier:
    """One layer of 20 channels, foretold to take 0.5 ms for each."""
    groups = [Group("a", ("a",), np.arange(1.0, UNITS + 1))]
    costs = [LayerCost("a", UNITS, UNITS, (1, UNITS), makes=(("a", 1.0),))]
    return Frontier(groups, costs, lambda name, inputs, outputs: outputs / 2, multiples=multiple)


def truth(factor: float, rest: float) -> tuple[Callable[[Choice], float], list[int]]:
    measured: list[int] = []

    def measure(choice: Choice) -> float:
        measured.append(len(choice["a"]))
        return rest + factor * len(choice["a"]) / 2

    return measure, measured


def test_what_is_foretold_rightly_is_measured_once(frontier: Frontier) -> None:
    measure, measured = truth(1.0, 0.0)
    found = meet_goal(frontier, measure, 5.0)
    assert measured == [10]
    assert (found.met, found.measured_ms, len(found.choice["a"]), found.remarks) == (True, 5.0, 10, ())
    assert found.lost == sum(range(1, 11))
    assert [(one.predicted_ms, one.measured_ms) for one in found.tries] == [(5.0, 5.0)]


def test_a_wrong_prophecy_is_corrected_from_both_sides(frontier: Frontier) -> None:
    slower, measured = truth(1.3, 0.0)
    found = meet_goal(frontier, slower, 5.0)
    assert measured == [10, 7, 8]
    assert found.met and 4.5 <= found.measured_ms <= 5.0
    faster, measured = truth(0.7, 0.0)
    found = meet_goal(frontier, faster, 5.0)
    assert measured == [10, 14]
    assert found.met and 4.5 <= found.measured_ms <= 5.0


def test_what_is_faster_than_asked_for_gets_channels_back() -> None:
    """4.6 ms are within a tenth of 5, and take one channel more than 4.95 do."""
    frontier, measured = frontier_of(multiple=1), list[int]()

    def measure(choice: Choice) -> float:
        measured.append(len(choice["a"]))
        return {10: 4.6, 11: 4.95}.get(len(choice["a"]), 5.5)

    found = meet_goal(frontier, measure, 5.0)
    assert found.measured_ms == 4.95
    assert measured[0] == 10 and measured[-1] == 11


def test_what_does_not_shrink_is_found_out(frontier: Frontier) -> None:
    measure, measured = truth(1.0, 2.0)
    found = meet_goal(frontier, measure, 5.0, most=8)
    assert found.met and 4.5 <= found.measured_ms <= 5.0
    assert len(measured) == len(set(measured)) <= 5


def test_a_goal_below_the_floor_says_what_was_measured(frontier: Frontier) -> None:
    measure, measured = truth(1.0, 4.0)
    with pytest.raises(GoalError, match=r"3 ms are asked for, .* takes 5 ms, with as few channels as"):
        meet_goal(frontier, measure, 3.0)
    assert measured[-1] == 2
    measure, measured = truth(1.0, 0.0)
    with pytest.raises(GoalError, match="takes 1 ms, with as few channels as"):
        meet_goal(frontier, measure, 0.5)
    assert measured == [2]


def test_too_few_measurements_are_told(frontier: Frontier) -> None:
    measure, _ = truth(2.0, 0.0)
    with pytest.raises(GoalError, match="takes 10 ms, in 1 measurements"):
        meet_goal(frontier, measure, 5.0, most=1)


def test_nearly_met_is_a_result_with_a_remark(frontier: Frontier) -> None:
    measure, _ = truth(1.05, 0.0)
    found = meet_goal(frontier, measure, 5.0, most=1)
    assert not found.met
    assert "5.0% slower than the 5 ms asked for" in found.remarks[0]


def test_between_two_steps_the_faster_one_is_the_result() -> None:
    coarse = frontier_of(multiple=10)
    measure, measured = truth(1.2, 0.0)
    found = meet_goal(coarse, measure, 10.0)
    assert measured == [20, 10]
    assert found.met and found.measured_ms == 6.0
    assert "40.0% faster than the 10 ms asked for" in found.remarks[0]


@given(st.floats(0.4, 2.5), st.floats(0.0, 3.0), st.floats(1.0, 9.0))
@settings(max_examples=150, deadline=None)
def test_the_goal_is_met_or_the_floor_is_named(factor: float, rest: float, goal: float) -> None:
    frontier = frontier_of(multiple=1)
    measure, measured = truth(factor, rest)
    floor = rest + factor
    try:
        found = meet_goal(frontier, measure, goal, most=12)
    except GoalError:
        assert floor > goal
        return
    assert len(measured) == len(set(measured))
    assert found.measured_ms <= goal * 1.1
    if found.met:
        best = max(count for count in range(2, UNITS + 1) if rest + factor * count / 2 <= goal)
        assert found.measured_ms >= 0.9 * goal or len(found.choice["a"]) == best
    else:
        assert floor > goal
