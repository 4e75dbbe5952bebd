from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.channel_choice import allowed_counts, by_ratio
from edgekit.channels import Choice, Group, LayerCost, kept_shares
from edgekit.errors import DataError, GoalError
from edgekit.frontier import Frontier, LayerTime, by_time, widths_to_measure


def ramp(name: str, units: int, *, scale: float = 1.0, width: int = 1) -> Group:
    return Group(name, (name,), scale * np.arange(1.0, units + 1), width)


def layer(name: str, inputs: int, outputs: int, reads: str = "", makes: str = "") -> LayerCost:
    return LayerCost(
        name, inputs * outputs, 1, (inputs, outputs), ((reads, 1.0),) if reads else (), ((makes, 1.0),) if makes else ()
    )


def predicted(costs: list[LayerCost], groups: list[Group], choice: Choice, layer_time: LayerTime) -> float:
    kept = kept_shares(groups, choice)
    total = 0.0
    for cost in costs:
        read, made = cost.shares(kept)
        total += layer_time(cost.name, max(1, round(cost.channels[0] * read)), max(1, round(cost.channels[1] * made)))
    return total


def lost(groups: list[Group], choice: Choice) -> float:
    return sum(float(group.scores.sum() - group.scores[choice[group.name]].sum()) for group in groups)


def counts(choice: Choice) -> dict[str, int]:
    return {name: len(units) for name, units in choice.items()}


def linear(name: str, inputs: int, outputs: int) -> float:
    return inputs * outputs / 100


def blocks_of_16(name: str, inputs: int, outputs: int) -> float:
    return math.ceil(inputs / 16) * math.ceil(outputs / 16)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Group], list[LayerCost], LayerTime, int]:
    """A chain with a skip over two layers; times that grow with blocks of channels, plus noise that is fixed by the shape."""
    widths = draw(st.lists(st.integers(1, 24), min_size=2, max_size=4))
    groups = [
        Group(f"g{i}", (f"l{i}",), np.array(draw(st.lists(st.floats(0, 5), min_size=width, max_size=width))))
        for i, width in enumerate(widths)
    ]
    costs = [layer("l0", 3, widths[0], makes="g0")]
    costs += [layer(f"l{i}", widths[i - 1], widths[i], f"g{i - 1}", f"g{i}") for i in range(1, len(widths))]
    costs.append(layer("back", widths[-1], widths[0], f"g{len(widths) - 1}", "g0"))
    costs.append(layer("head", widths[0], 10, reads="g0"))
    block, noise = draw(st.sampled_from([1, 4, 16])), draw(st.sampled_from([0.0, 0.5]))

    def layer_time(name: str, inputs: int, outputs: int) -> float:
        disturbed = 1 + noise * ((7 * inputs + 3 * outputs + len(name)) % 5) / 5
        return (0.1 + math.ceil(inputs / block) * math.ceil(outputs / block)) * disturbed

    return groups, costs, layer_time, draw(st.sampled_from([0, 4, 8]))


def test_the_channels_that_cost_time_go() -> None:
    groups = [ramp("slow", 8), ramp("fast", 8)]
    costs = [layer("slow", 100, 8, makes="slow"), layer("fast", 10, 8, makes="fast")]
    found = by_time(groups, costs, linear, 4.8)  # 8 + 0.8 ms; each slow channel is worth 1 ms
    assert counts(found.choice) == {"slow": 4, "fast": 8}
    assert found.choice["slow"].tolist() == [4, 5, 6, 7]
    assert found.predicted_ms == pytest.approx(4.8)
    assert found.lost == 1 + 2 + 3 + 4
    assert found.remarks == ()


def test_it_looks_ahead_to_where_time_drops() -> None:
    groups = [ramp("a", 32), ramp("b", 32, scale=100)]
    costs = [layer("a", 16, 32, makes="a"), layer("b", 16, 32, makes="b")]
    found = by_time(groups, costs, blocks_of_16, 3.0)
    assert counts(found.choice) == {"a": 16, "b": 32}  # 31 to 17 channels take as long as 32


def test_it_goes_on_where_only_two_groups_together_win_time() -> None:
    groups = [ramp("a", 4), ramp("b", 4)]
    costs = [layer("x", 4, 4, "a", "b")]
    found = by_time(groups, costs, lambda name, inputs, outputs: max(inputs, outputs), 2.0, floor=0.0)
    assert found.predicted_ms <= 2
    assert max(counts(found.choice).values()) <= 2


def test_what_layers_do_not_explain_never_changes() -> None:
    groups, costs = [ramp("a", 10)], [layer("a", 100, 10, makes="a")]
    assert by_time(groups, costs, linear, 17.0, total_ms=20.0).predicted_ms == pytest.approx(17)  # 10 are the layer's
    assert counts(by_time(groups, costs, linear, 17.0, total_ms=20.0).choice) == {"a": 7}
    faster = by_time(groups, costs, linear, 2.5, total_ms=5.0)  # layers foretold at 10 ms take 5 in all
    assert counts(faster.choice) == {"a": 5}
    with pytest.raises(GoalError, match=r"9 ms are asked for, and 11 ms is the least .* \(20 ms with all channels\)"):
        by_time(groups, costs, linear, 9.0, total_ms=20.0)


def test_no_pruning_where_the_goal_is_met() -> None:
    found = by_time([ramp("a", 10)], [layer("a", 100, 10, makes="a")], linear, 10.0)
    assert (counts(found.choice), found.lost) == ({"a": 10}, 0.0)


def test_multiples_and_remarks() -> None:
    groups = [ramp("a", 64), ramp("b", 5)]
    costs = [layer("a", 100, 64, makes="a"), layer("b", 100, 5, makes="b")]
    found = by_time(groups, costs, linear, 40.0, multiples=16)
    assert counts(found.choice) == {"a": 32, "b": 5}
    assert "b (5 channels, multiples of 16)" in found.remarks[0]


def test_bad_groups_are_refused() -> None:
    with pytest.raises(GoalError, match="no layer"):
        Frontier([], [], linear)
    with pytest.raises(DataError, match="'a': 1 of 2 importance scores are not finite"):
        Frontier([Group("a", ("a",), np.array([1.0, math.inf]))], [], linear)


@given(problems(), st.floats(0.3, 1.0), st.floats(0.3, 1.0))
@settings(max_examples=80, deadline=None)
def test_goals_are_met_and_harder_ones_lose_more(
    problem: tuple[list[Group], list[LayerCost], LayerTime, int], first: float, second: float
) -> None:
    groups, costs, layer_time, multiple = problem
    frontier = Frontier(groups, costs, layer_time, multiples=multiple)
    again = Frontier(groups, costs, layer_time, multiples=multiple)
    found = []
    for share in sorted((first, second)):
        goal = share * frontier.slowest_ms
        try:
            one = frontier.at_most(goal)
        except GoalError as error:
            assert goal < frontier.fastest_ms
            assert f"{frontier.fastest_ms:.3g} ms is the least" in str(error)
            continue
        assert one.predicted_ms <= goal * (1 + 1e-9)
        assert one.predicted_ms == pytest.approx(predicted(costs, groups, one.choice, layer_time), rel=1e-9)
        assert one.lost == pytest.approx(lost(groups, one.choice), rel=1e-9, abs=1e-12)
        for group in groups:
            kept = one.choice[group.name]
            assert len(kept) in allowed_counts(group, multiple, floor=0.1)
            gone = np.setdiff1d(np.arange(group.units), kept)
            assert len(gone) == 0 or group.scores[gone].max() <= group.scores[kept].min()
        assert all(np.array_equal(again.at_most(goal).choice[name], units) for name, units in one.choice.items())
        found.append(one)
    if len(found) == 2:
        assert found[0].predicted_ms <= found[1].predicted_ms
        assert found[0].lost >= found[1].lost


@given(problems(), st.floats(0.05, 0.95))
@settings(max_examples=80, deadline=None)
def test_never_more_is_lost_than_by_cutting_all_layers_alike(
    problem: tuple[list[Group], list[LayerCost], LayerTime, int], ratio: float
) -> None:
    groups, costs, layer_time, multiple = problem
    try:
        alike = by_ratio(groups, ratio, scope="layer", multiples=multiple).choice
    except GoalError:
        return
    goal = predicted(costs, groups, alike, layer_time)
    found = by_time(groups, costs, layer_time, goal, multiples=multiple, floor=0.0)
    assert found.lost <= lost(groups, alike) * (1 + 1e-9) + 1e-12


def test_widths_to_measure_are_quarters_of_what_can_go() -> None:
    groups = [ramp("a", 64), ramp("b", 16), ramp("heads", 12, width=8), ramp("wide", 128)]
    costs = [
        layer("first", 3, 64, makes="a"),
        LayerCost("both", 1, 1, (80, 16), (("a", 0.8), ("b", 0.2)), (("b", 1.0),)),
        layer("heads", 20, 96, makes="heads"),
        layer("wide", 64, 128, "a", "wide"),
    ]
    found = widths_to_measure(groups, costs, {"a": 16, "b": 8})
    assert found["first"] == ((3,), (16, 32, 48, 64))
    assert found["both"] == ((24, 40, 64, 80), (8, 16))
    assert found["heads"] == ((20,), (24, 48, 72, 96))
    assert found["wide"] == ((16, 32, 48, 64), (32, 64, 128))


def test_a_network_of_resnet50s_size_is_allocated_in_seconds() -> None:
    groups, costs, width = [], [], 64
    for stage, (inner, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        groups.append(ramp(f"s{stage}", 4 * inner))
        costs.append(layer(f"s{stage}.short", width, 4 * inner, f"s{stage - 1}" if stage else "", f"s{stage}"))
        for block in range(blocks):
            name = f"s{stage}.{block}"
            groups += [ramp(f"{name}.1", inner), ramp(f"{name}.2", inner)]
            costs.append(layer(f"{name}.1", 4 * inner, inner, f"s{stage}", f"{name}.1"))
            costs.append(layer(f"{name}.2", inner, inner, f"{name}.1", f"{name}.2"))
            costs.append(layer(f"{name}.3", inner, 4 * inner, f"{name}.2", f"s{stage}"))
        width = 4 * inner
    frontier = Frontier(groups, costs, linear, multiples=16)
    found = frontier.at_most(frontier.slowest_ms / 1.8)
    assert 0.95 < found.predicted_ms / (frontier.slowest_ms / 1.8) <= 1 + 1e-9
