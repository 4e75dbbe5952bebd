"""The record of what is to be pruned: goals, their spelling, what fits together, and what is told of the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from edgekit.channels import LayerCost
from edgekit.errors import TargetError
from edgekit.pipelines.recipe import load_recipe, merged_prune
from edgekit.pruning import CRITERIA, GOALS, Prune, Pruned, PrunedLayer, pruned_layers


def refused(**given: Any) -> str:
    """What is said of a wrong choice."""
    with pytest.raises(ValidationError) as caught:
        Prune(**given)
    [error] = caught.value.errors()
    return f"{'.'.join(map(str, error['loc'][:1]))}: {error['msg']}"


def refused_there(**given: Any) -> str:
    """What is said of it on the command line."""
    with pytest.raises(TargetError) as caught:
        merged_prune(None, given)
    text = str(caught.value)
    assert text.startswith("command line: ")
    assert "\n" not in text
    return text


def test_one_goal_is_given() -> None:
    assert "found none of them" in refused()
    assert all(goal in refused() for goal in GOALS)
    assert "found ratio and macs" in refused(ratio=0.5, macs=0.5)
    assert "found speedup and sparsity" in refused(speedup="2@x86-openvino", sparsity=0.5)
    assert "found ratio and latency" in refused_there(ratio="0.5", latency="3ms@x86-openvino")


@pytest.mark.parametrize("goal", ["ratio", "macs", "sparsity"])
@pytest.mark.parametrize("value", [0, 1, -0.5, 2, float("nan"), float("inf"), "half"])
def test_shares_are_between_0_and_1(goal: str, value: Any) -> None:
    assert goal in refused_there(**{goal: value})


def test_sparsity_is_a_share_or_two_of_four() -> None:
    assert Prune(sparsity="2:4").sparsity == "2:4"
    assert merged_prune(None, {"sparsity": "0.25"}) == Prune(sparsity=0.25)
    assert "2:4" in refused_there(sparsity="1:2")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"speedup": "2.0@x86-openvino"}, ("speedup", 2.0, "x86-openvino")),
        ({"speedup": "1.8x@my.toml"}, ("speedup", 1.8, "my.toml")),
        ({"latency": "3ms@x86-openvino"}, ("latency", 3.0, "x86-openvino")),
        ({"latency": "1.5 ms@x86-openvino"}, ("latency", 1.5, "x86-openvino")),
        ({"latency": "250us@a/b@c.toml"}, ("latency", 0.25, "a/b@c.toml")),
        ({"latency": "0.5s@x86-openvino"}, ("latency", 500.0, "x86-openvino")),
        ({"ratio": 0.5}, None),
        ({"sparsity": "2:4"}, None),
    ],
)
def test_goals_in_time_name_their_target(given: dict[str, Any], expected: object) -> None:
    assert Prune(**given).timed == pytest.approx(expected) if expected is None else Prune(**given).timed == expected


@pytest.mark.parametrize(
    "text", ["2", "2.0@", "@x86-openvino", "fast@x86-openvino", "-2@x86-openvino", "2ms@x86-openvino"]
)
def test_a_speedup_is_times_at_a_target(text: str) -> None:
    message = refused_there(speedup=text)
    assert repr(text) in message
    assert "2.0@x86-openvino" in message


@pytest.mark.parametrize(
    "text", ["3ms", "3@x86-openvino", "3 minutes@x86-openvino", "@x86-openvino", "-3ms@x86-openvino"]
)
def test_a_latency_is_a_time_at_a_target(text: str) -> None:
    message = refused_there(latency=text)
    assert repr(text) in message
    assert "3ms@x86-openvino" in message


@pytest.mark.parametrize("text", ["0@x86-openvino", "0.5@x86-openvino", "1.0x@x86-openvino"])
def test_a_speedup_is_more_than_1(text: str) -> None:
    """Nothing has to be measured to know that these ask for no pruning."""
    assert repr(text) in refused(speedup=text)


def test_a_latency_is_more_than_0() -> None:
    assert "'0ms@x86-openvino'" in refused(latency="0ms@x86-openvino")


@pytest.mark.parametrize("schedule", ["iterative", "iterative:0", "iterative:2.5", "sometimes", "", "one-shot "])
def test_schedules_are_known(schedule: str) -> None:
    message = refused(ratio=0.5, schedule=schedule)
    assert repr(schedule) in message
    assert "iterative:N" in message


def test_rounds() -> None:
    rounds = {name: Prune(ratio=0.5, schedule=name).rounds for name in ("one-shot", "iterative:3", "during-training")}
    assert rounds == {"one-shot": 1, "iterative:3": 3, "during-training": 1}


def test_criteria_are_known() -> None:
    assert [Prune(ratio=0.5, criterion=name).criterion for name in CRITERIA] == list(CRITERIA)
    message = refused(ratio=0.5, criterion="l3")
    assert "'l3'" in message
    assert "taylor" in message
    assert "criterion" in refused(ratio=0.5, criterion=3)


def test_a_criterion_may_be_a_function() -> None:
    def mine(group: object) -> list[float]:
        raise NotImplementedError

    assert Prune(ratio=0.5, criterion=mine).summary == "ratio 0.5, by mine, global, one-shot"


@pytest.mark.parametrize(
    "given", [{"criterion": "taylor"}, {"round_to": 8}, {"schedule": "iterative:2"}, {"schedule": "from-scratch"}]
)
def test_what_single_weights_would_ignore_is_refused(given: dict[str, Any]) -> None:
    [name] = given
    assert name in refused(sparsity=0.5, **given)
    assert "sparsity" in refused(sparsity=0.5, **given)


@pytest.mark.parametrize("schedule", ["during-training", "from-scratch"])
def test_schedules_that_are_training_need_it(schedule: str) -> None:
    message = refused(ratio=0.5, schedule=schedule, recover=False)
    assert schedule in message
    assert "recover" in message


def test_what_is_ignored_is_a_list_or_text() -> None:
    assert Prune(ratio=0.5, ignore="stem, layer3.*").ignore == ("stem", "layer3.*")
    assert Prune(ratio=0.5, ignore=["stem", "layer3.*"]).ignore == ("stem", "layer3.*")
    assert Prune(ratio=0.5, ignore="").ignore == ()


def test_channels_are_rounded_to_a_number_or_as_the_target_likes() -> None:
    found = [merged_prune(None, {"ratio": 0.5, "round_to": given}) for given in ("8", 0, "auto")]
    assert [one.round_to for one in found if one] == [8, 0, "auto"]
    for wrong in ("-1", "some", "8.5"):
        assert "round_to" in refused_there(ratio=0.5, round_to=wrong)


def test_a_goal_on_the_command_line_replaces_the_recipes(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text('[prune]\nratio = 0.5\ncriterion = "l2"\nignore = ["stem"]\n')
    recipe = load_recipe(tmp_path / "recipe.toml").prune
    assert recipe == Prune(ratio=0.5, criterion="l2", ignore=("stem",))
    assert merged_prune(recipe, {"macs": 0.4}) == Prune(macs=0.4, criterion="l2", ignore=("stem",))
    assert merged_prune(recipe, {"criterion": "bn"}) == Prune(ratio=0.5, criterion="bn", ignore=("stem",))
    assert merged_prune(recipe, {}) == recipe
    assert merged_prune(None, {}) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[prune]\nration = 0.5\n", ("line 2", "did you mean 'ratio'")),
        ("[prune]\nratio = 1.5\n", ("line 2", "ratio")),
        ("[prune]\nratio = 0.5\nmacs = 0.5\n", ("ratio and macs",)),
        ('[prune]\nsparsity = 0.5\ncriterion = "l1"\n', ("criterion", "sparsity")),
        ("[prune]\nratio = 0.5\ncriterion = 3\n", ("criterion",)),
    ],
)
def test_mistakes_in_a_recipe_are_explained(text: str, said: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(TargetError) as caught:
        load_recipe(tmp_path / "recipe.toml")
    assert "recipe.toml" in str(caught.value)
    assert [word for word in said if word not in str(caught.value)] == []


def test_layers_that_lost_channels() -> None:
    """Of `a` half the outputs stay, which are all that `b` reads; `c` is as it was."""
    first = [
        LayerCost("a", 1000, 10, (3, 8), makes=(("a", 1.0),)),
        LayerCost("b", 800, 10, (8, 4), reads=(("a", 1.0),)),
        LayerCost("c", 400, 10, (4, 4)),
    ]
    found = list(pruned_layers(first, first, {"a": 0.5}))
    assert found == [
        PrunedLayer(name="a", before=(3, 8), after=(3, 4), macs=(1000, 500)),
        PrunedLayer(name="b", before=(8, 4), after=(4, 4), macs=(800, 400)),
    ]
    second = [
        LayerCost("a", 500, 10, (3, 4), makes=(("a", 1.0),)),
        LayerCost("b", 400, 10, (4, 4), reads=(("a", 1.0),)),
        LayerCost("c", 400, 10, (4, 4)),
    ]
    again = list(pruned_layers(first, second, {"a": 0.5}))
    assert [(one.before, one.after, one.macs) for one in again] == [
        ((3, 8), (3, 2), (1000, 250)),
        ((8, 4), (2, 4), (800, 200)),
    ]


def test_what_is_told() -> None:
    layer = PrunedLayer(name="a", before=(3, 8), after=(3, 4), macs=(1000, 500))
    plain = Pruned(
        summary="ratio 0.5, by l1, global, one-shot", layers=(layer,), macs=(2200, 1300), parameters=(100, 50)
    )
    assert plain.told == (
        "ratio 0.5, by l1, global, one-shot: 1 layer lost channels, MACs 2,200 to 1,300 (59%), parameters 100 to 50 (50%)"
    )
    metrics = plain.model_copy(update={"before": 0.9, "cut": 0.25, "after": 0.875}).told
    assert [text for text in ("0.9000 as it came", "0.2500 cut", "0.8750 after recovery") if text not in metrics] == []
    timed = {"target": "x86-openvino", "speedup": 1.8, "speedup_low": 1.75, "speedup_high": 1.85, "latency_ms": 2.0}
    assert "1.80x as fast on x86-openvino (1.75 to 1.85), in float" in plain.model_copy(update=timed).told
    assert Pruned(summary="sparsity 2:4", sparsity=0.5).told == "sparsity 2:4: 50.0% of the weights are zero"
    assert Pruned.model_validate_json(plain.model_dump_json()) == plain


def test_a_goal_in_time_takes_no_scope() -> None:
    with pytest.raises(TargetError, match="a goal in time compares channels of all layers"):
        merged_prune(None, {"speedup": "2@x86-openvino", "scope": "layer"})
