from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.channel_choice import (
    allowed_counts,
    by_macs,
    by_ratio,
    choose,
    fitting_multiples,
    shares,
    unit_step,
)
from edgekit.channels import Choice, Group, LayerCost, kept_shares, total_macs
from edgekit.errors import DataError, GoalError
from edgekit.frontier import by_price


def group(name: str, *scores: float, width: int = 1) -> Group:
    return Group(name, (name,), np.array(scores, np.float64), width)


def ramp(name: str, units: int, *, scale: float = 1.0, width: int = 1) -> Group:
    return group(name, *(scale * np.arange(1, units + 1)), width=width)


def kept(choice: Choice) -> dict[str, int]:
    return {name: len(units) for name, units in choice.items()}


def chain(*widths: int) -> list[LayerCost]:
    """Layers `0`, `1`, ... from width to width, whose channels inside are the groups `0`, `1`, ..."""
    last = len(widths) - 2
    return [
        LayerCost(
            str(i),
            1000 * widths[i] * widths[i + 1],
            widths[i] * widths[i + 1],
            (widths[i], widths[i + 1]),
            reads=((str(i - 1), 1.0),) if i else (),
            makes=((str(i), 1.0),) if i < last else (),
        )
        for i in range(len(widths) - 1)
    ]


@st.composite
def networks(draw: st.DrawFn) -> tuple[list[Group], list[LayerCost]]:
    widths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=5))
    scores = [draw(st.lists(st.floats(0, 10), min_size=width, max_size=width)) for width in widths]
    return [group(str(i), *some) for i, some in enumerate(scores)], chain(3, *widths, 10)


SCOPES = st.sampled_from(["global", "layer"])
MULTIPLES = st.sampled_from([0, 1, 4, 8])


def test_the_least_scores_of_all_go() -> None:
    found = by_ratio([group("a", 5, 1, 4, 6), group("b", 2, 9, 3, 8)], 0.5)
    assert found.choice["a"].tolist() == [0, 3]
    assert found.choice["b"].tolist() == [1, 3]
    assert found.choice["a"].dtype == np.intp
    uneven = by_ratio([group("a", 1, 2, 3, 9), group("b", 7, 8, 6, 5)], 0.375)
    assert {name: units.tolist() for name, units in uneven.choice.items()} == {"a": [2, 3], "b": [0, 1, 2]}
    assert uneven.remarks == ()


def test_the_same_share_goes_of_each_layer_whatever_their_scores() -> None:
    found = by_ratio([ramp("a", 8), ramp("b", 16, scale=100)], 0.25, scope="layer")
    assert found.choice["a"].tolist() == list(range(2, 8))
    assert found.choice["b"].tolist() == list(range(4, 16))


def test_of_equal_units_the_first_are_kept() -> None:
    assert choose([group("a", 1, 1, 2, 1)], [2])["a"].tolist() == [0, 2]


def test_units_count_with_their_channels() -> None:
    heads, plain = group("heads", 1, 2, 3, 4, width=8), group("plain", *np.linspace(5, 6, 32))
    found = by_ratio([heads, plain], 0.375)  # of 64 channels 24: two heads, as two stay, and eight others
    assert kept(found.choice) == {"heads": 2, "plain": 24}


@pytest.mark.parametrize(
    ("units", "width", "multiple", "expected"),
    [
        (16, 1, 8, [8, 16]),
        (61, 1, 16, [16, 32, 48, 61]),
        (5, 1, 8, [5]),
        (12, 64, 8, list(range(1, 13))),
        (16, 2, 8, [4, 8, 12, 16]),
        (10, 12, 8, [2, 4, 6, 8, 10]),  # 24 channels are the least that 12 and 8 divide
        (3, 12, 16, [1, 2, 3]),  # 4 units would be 48 channels: of 16 channels one unit is the nearest
        (4, 1, 0, [1, 2, 3, 4]),
    ],
)
def test_numbers_of_units_that_make_multiples_of_channels(
    units: int, width: int, multiple: int, expected: list[int]
) -> None:
    assert allowed_counts(ramp("a", units, width=width), multiple).tolist() == expected


def test_the_floor_is_rounded_up() -> None:
    assert allowed_counts(ramp("a", 64), 8, floor=0.1).tolist() == [8, 16, 24, 32, 40, 48, 56, 64]
    assert allowed_counts(ramp("a", 100), 8, floor=0.1)[0] == 16
    assert allowed_counts(ramp("a", 30), 1, floor=0.1)[0] == 3


def test_rounding_goes_to_the_nearest_multiple() -> None:
    found = by_ratio([ramp("a", 64)], 0.3, scope="layer", multiples=16)  # 44.8 of 64
    assert kept(found.choice) == {"a": 48}
    mixed = by_ratio([ramp("a", 64), ramp("b", 64)], 0.4, scope="layer", multiples={"a": 32})
    assert kept(mixed.choice)["a"] == 32
    assert kept(mixed.choice)["b"] in (38, 39, 44, 45)


def test_what_cannot_be_rounded_is_kept_and_told() -> None:
    found = by_ratio([ramp("small", 5), ramp("wide", 64), ramp("one", 1)], 0.5, scope="layer", multiples=8)
    assert kept(found.choice)["small"] == 5
    [fixed] = found.remarks
    assert "small (5 channels, multiples of 8)" in fixed
    assert "one" not in fixed
    assert kept(found.choice)["wide"] == 32
    near = by_ratio([ramp("heads", 3, width=12), ramp("wide", 64)], 0.3, scope="layer", multiples=16)
    assert "heads (12 instead of 16)" in near.remarks[0]
    assert unit_step(ramp("heads", 3, width=12), 16) == 1


def test_a_group_whose_number_is_no_multiple_keeps_it_when_nothing_goes() -> None:
    found = by_ratio([group("a", *[1000.0] * 61), ramp("b", 61)], 0.24, multiples=16)
    assert kept(found.choice) == {"a": 61, "b": 32}


def test_a_group_keeps_two_thirds_of_what_it_would_if_all_lost_the_same() -> None:
    weak, strong = group("weak", *np.linspace(0, 1, 40)), group("strong", *np.linspace(5, 6, 40))
    found = by_ratio([weak, strong], 0.6)
    assert kept(found.choice) == {"weak": 11, "strong": 21}
    assert found.remarks == ()
    costs = [
        LayerCost("one", 100, 1, (1, 40), (), (("weak", 1.0),)),
        LayerCost("two", 100, 1, (1, 40), (), (("strong", 1.0),)),
    ]
    assert kept(by_macs([weak, strong], costs, 0.64).choice) == {"weak": 22, "strong": 29}


def test_by_price_macs_go_where_they_cost_the_least_importance() -> None:
    """Of units of equal worth those of the dearer layer, and of equally dear ones those of less worth."""
    groups = [group("one", *np.ones(40)), group("two", *np.ones(40))]
    costs = [
        LayerCost("one", 200, 1, (1, 40), (), (("one", 1.0),)),
        LayerCost("two", 100, 1, (1, 40), (), (("two", 1.0),)),
    ]
    assert kept(by_price(groups, costs, 0.5).choice) == {"one": 10, "two": 40}
    assert kept(by_macs(groups, costs, 0.5, scope="layer").choice) == {"one": 20, "two": 20}
    alike = [replace(cost, macs=100) for cost in costs]
    weak, strong = group("one", *np.linspace(0, 1, 40)), group("two", *np.linspace(5, 6, 40))
    found = by_price([weak, strong], alike, 0.52)
    assert kept(found.choice) == {"one": 4, "two": 37}
    assert found.choice["one"].tolist() == [36, 37, 38, 39]
    assert "no fewer than 10% of the channels" in found.remarks[0] and "one (4 channels)" in found.remarks[0]
    with pytest.raises(GoalError, match=r"5\.0% of the multiply-accumulates .* 10\.0% is the least"):
        by_price(groups, costs, 0.05)


def test_no_group_is_emptied_and_the_limited_ones_are_named() -> None:
    weak, strong = group("weak", *np.linspace(0, 1, 40)), group("strong", *np.linspace(5, 6, 40))
    costs = [
        LayerCost("fixed", 40, 1, (1, 1)),
        LayerCost("one", 30, 1, (1, 40), (), (("weak", 1.0),)),
        LayerCost("two", 30, 1, (1, 40), (), (("strong", 1.0),)),
    ]
    found = by_macs([weak, strong], costs, 0.5)
    assert kept(found.choice) == {"weak": 4, "strong": 9}
    assert found.choice["weak"].tolist() == [36, 37, 38, 39]
    assert "weak (4 channels)" in found.remarks[0]
    assert "strong" not in found.remarks[0]
    everything = by_ratio([ramp("a", 16), ramp("b", 16)], 0.99, scope="layer", multiples=8)
    assert kept(everything.choice) == {"a": 8, "b": 8}
    assert "a (8 channels), b (8 channels)" in everything.remarks[0]


def test_nothing_pruned_is_an_error() -> None:
    with pytest.raises(GoalError, match=r"nothing is pruned .* the least that can go is 50\.0%"):
        by_ratio([ramp("a", 16)], 0.2, multiples=8)
    with pytest.raises(GoalError, match="no channel can go"):
        by_ratio([ramp("a", 16)], 0.5, multiples=16)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, float("nan")])
def test_a_ratio_that_is_none_is_refused(ratio: float) -> None:
    with pytest.raises(GoalError, match="between 0 and 1"):
        by_ratio([ramp("a", 16)], ratio)


def test_bad_groups_are_refused() -> None:
    with pytest.raises(GoalError, match="no layer"):
        by_ratio([], 0.5)
    with pytest.raises(DataError, match=r"'b': 1 of 3 importance scores are not finite"):
        by_macs([ramp("a", 3), group("b", 1, float("nan"), 2)], chain(3, 3, 3, 4), 0.5)


def test_macs_by_hand() -> None:
    groups, costs = [ramp("0", 8)], chain(4, 8, 4)  # 4*8 + 8*4: half of them with 4 of 8 channels
    assert kept(by_macs(groups, costs, 0.5).choice) == {"0": 4}
    assert kept(by_macs(groups, costs, 0.49).choice) == {"0": 3}
    assert kept(by_macs(groups, costs, 0.9, multiples=4).choice) == {"0": 4}


def test_a_budget_that_cannot_be_met_says_the_floor() -> None:
    with pytest.raises(GoalError, match=r"20\.0% of the multiply-accumulates .* 50\.0% is the least"):
        by_macs([ramp("0", 8)], chain(4, 8, 4), 0.2, multiples=4)


def test_what_rounding_leaves_is_given_back_where_most_is_missing() -> None:
    groups = [ramp(str(i), 16) for i in range(3)]
    costs = [LayerCost(str(i), 100, 1, (3, 16), makes=((str(i), 1.0),)) for i in range(3)]
    found = by_macs(groups, costs, 0.7, scope="layer", multiples=8)  # all to 8 would be half
    assert sorted(kept(found.choice).values()) == [8, 8, 16]
    scored = [ramp("0", 16), ramp("1", 16, scale=2), ramp("2", 16)]
    assert kept(by_macs(scored, costs, 0.7, multiples=8).choice) == {"0": 8, "1": 16, "2": 8}


@given(networks(), st.floats(0.05, 0.95), st.sampled_from(["global", "layer", "price"]), MULTIPLES)
@settings(max_examples=200, deadline=None)
def test_macs_are_within_budget_and_no_step_more_fits(
    network: tuple[list[Group], list[LayerCost]], share: float, scope: str, multiple: int
) -> None:
    groups, costs = network
    whole = total_macs(costs, {})
    by = by_price if scope == "price" else partial(by_macs, scope=scope)
    try:
        found = by(groups, costs, share, multiples=multiple)
    except GoalError as error:
        assert "is the least" in str(error)
        floor = 0.0 if scope == "layer" else 0.1
        least = [int(allowed_counts(one, multiple, floor=floor)[0]) for one in groups]
        assert total_macs(costs, shares(groups, least)) > share * whole
        return
    counts = [len(found.choice[one.name]) for one in groups]
    assert total_macs(costs, kept_shares(groups, found.choice)) <= share * whole * (1 + 1e-9)
    for index, one in enumerate(groups):
        some = allowed_counts(one, multiple)
        assert counts[index] in some
        units = found.choice[one.name]
        gone = np.setdiff1d(np.arange(one.units), units)
        assert len(gone) == 0 or one.scores[units].min() >= one.scores[gone].max()
        higher = some[some > counts[index]]
        if len(higher):
            raised = [*counts[:index], int(higher[0]), *counts[index + 1 :]]
            assert total_macs(costs, shares(groups, raised)) > share * whole


@given(networks(), st.tuples(st.floats(0.05, 0.9), st.floats(0.05, 0.9)), SCOPES)
@settings(max_examples=100, deadline=None)
def test_a_larger_ratio_takes_more(
    network: tuple[list[Group], list[LayerCost]], ratios: tuple[float, float], scope: str
) -> None:
    groups, _ = network
    try:
        less, more = (by_ratio(groups, ratio, scope=scope).choice for ratio in sorted(ratios))  # type: ignore[arg-type]
    except GoalError:
        return
    assert sum(map(len, more.values())) <= sum(map(len, less.values()))
    for one in groups if scope == "layer" else ():  # else the floor falls with the ratio, and a group may be better off
        assert 1 <= len(more[one.name]) <= len(less[one.name])
        assert set(more[one.name]) <= set(less[one.name])


def test_multiples_that_leave_a_choice() -> None:
    groups = [ramp("thin", 8), ramp("narrow", 16), ramp("middle", 32), ramp("heads", 12, width=64)]
    assert fitting_multiples(groups, (8, 16)) == {"thin": 8, "narrow": 8, "middle": 16, "heads": 16}
    assert fitting_multiples(groups, (4, 8, 16)) == {"thin": 4, "narrow": 8, "middle": 16, "heads": 16}
