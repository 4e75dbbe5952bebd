"""Pruning in rounds: what is cut and trained when, from what, and what is left of the module that was given."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekit.channel_choice import Chosen
from edgekit.errors import DataError, EdgekitError, GoalError
from edgekit.pipelines.prune_amount import Amount
from edgekit.pruning import Prune
from edgekit.schedule import Schedule
from edgekit.target import Pruning
from edgekit.training.prune.flow import Cutting, prune, reaction_or_task
from edgekit.training.prune.groups import Prunable
from edgekit.training.prune.importance import l1
from prune_nets import Chain, Dense, OptionA, Residual

IMAGES = (np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32),)
STEPS = Schedule(steps=8)


class Flow:
    """Prunes, and writes down what is asked of it."""

    def __init__(self) -> None:
        self.shares: list[float] = []
        self.trained: list[tuple[str, Schedule]] = []
        self.cut: list[nn.Module] = []
        self.units: list[dict[str, int]] = []

    def run(self, module: nn.Module, plan: Prune, *, schedule: Schedule = STEPS, train: bool = True) -> Cutting:
        """By the sums of magnitudes, and rounded to nothing unless the plan says so."""
        amount = Amount(plan, Pruning(channels=(1,)), trainable=True)

        def choose(prunable: Prunable, share: float) -> Chosen:
            self.shares.append(share)
            self.units.append({group.name: group.units for group in prunable.groups})
            return amount.choose(prunable.groups, prunable.costs, share)

        def recover(cut: nn.Module, part: Schedule, label: str) -> nn.Module:
            self.trained.append((label, part))
            self.cut.append(copy.deepcopy(cut))
            if not train:
                return cut
            moved = copy.deepcopy(cut)
            with torch.no_grad():
                for parameter in moved.parameters():
                    parameter.mul_(1.01)
            return moved

        return prune(
            module,
            plan,
            IMAGES,
            score=lambda prunable: prunable.score(l1) and None,
            choose=choose,
            recover=recover,
            schedule=schedule,
        )


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return make().eval()


def widths(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(layer.weight.shape[:2])
        for name, layer in module.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear))
    }


def parameters(module: nn.Module) -> int:
    return sum(one.numel() for one in module.parameters())


def plan(**given: object) -> Prune:
    return Prune.model_validate({"ratio": 0.5, "round_to": 0, "scope": "layer", **given})


def test_one_shot_cuts_once_and_trains_once() -> None:
    flow, net = Flow(), seeded(Chain)
    found = flow.run(net, plan())
    assert flow.shares == [1.0]
    assert flow.trained == [("round 1", STEPS)]
    assert widths(found.module) == {"conv1": (4, 3), "conv2": (6, 4), "fc1": (5, 96), "fc2": (5, 5)}
    assert [(layer.name, layer.before, layer.after) for layer in found.layers] == [
        ("conv1", (3, 8), (3, 4)),
        ("conv2", (8, 12), (4, 6)),
        ("fc1", (192, 10), (96, 5)),
        ("fc2", (10, 5), (5, 5)),
    ]


def test_what_a_layer_costs_is_counted() -> None:
    """By hand: 64 positions of the first convolution, 16 of the second, and what normalizations and slopes have."""
    net = seeded(Chain)
    found = Flow().run(net, plan())
    before = 64 * 27 * 8 + 16 * 72 * 12 + 192 * 10 + 10 * 5
    after = 64 * 27 * 4 + 16 * 36 * 6 + 96 * 5 + 5 * 5
    assert found.macs == (before, after)
    assert [layer.macs for layer in found.layers] == [(13824, 6912), (13824, 3456), (1920, 480), (50, 25)]
    assert found.parameters == (parameters(net), parameters(found.module))
    assert found.parameters[1] == (27 * 4 + 4 + 8) + (36 * 6 + 12 + 6) + (96 * 5 + 5) + (25 + 5)


@pytest.mark.parametrize("schedule", ["one-shot", "iterative:2", "during-training", "from-scratch"])
@pytest.mark.parametrize("make", [Chain, Residual, Dense])
def test_the_module_that_was_given_stays_as_it_was(make: Callable[[], nn.Module], schedule: str) -> None:
    net = seeded(make).train()
    before = copy.deepcopy(net.state_dict())
    found = Flow().run(net, plan(schedule=schedule))
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(one.requires_grad and one.grad is None for one in net.parameters())
    assert not {id(one) for one in net.parameters()} & {id(one) for one in found.module.parameters()}
    found.module(torch.zeros(3, 3, 8, 8))


def test_rounds_cut_what_the_round_before_left() -> None:
    flow = Flow()
    found = flow.run(seeded(Chain), plan(schedule="iterative:4"))
    assert flow.shares == [0.25, 0.5, 0.75, 1.0]
    assert flow.trained == [(f"round {number}", STEPS) for number in (1, 2, 3, 4)]
    assert [units["conv1"] for units in flow.units] == [8, 7, 6, 5]
    assert [units["conv2"] for units in flow.units] == [12, 10, 9, 7]
    assert widths(found.module)["conv1"] == (4, 3)
    assert [(one.before, one.after) for one in found.layers][1] == ((8, 12), (4, 6))
    assert found.macs[0] == 64 * 27 * 8 + 16 * 72 * 12 + 192 * 10 + 10 * 5
    # What was trained is what the next round cuts: weights have grown by a hundredth, four times.
    kept = found.module.get_parameter("conv1.bias") / 1.01**4
    original = seeded(Chain).get_parameter("conv1.bias")
    assert all(any(torch.isclose(one, other, rtol=1e-4) for other in original) for one in kept)


@pytest.mark.parametrize("goal", [{"ratio": 0.5}, {"macs": 0.4}])
@pytest.mark.parametrize("schedule", ["iterative:2", "iterative:3", "during-training"])
def test_rounds_come_to_what_was_asked_for(goal: dict[str, float], schedule: str) -> None:
    asked = Prune.model_validate({"round_to": 0, "schedule": schedule, **goal})
    found = Flow().run(seeded(Residual), asked)
    once = Flow().run(seeded(Residual), asked.model_copy(update={"schedule": "one-shot"}))
    if "macs" in goal:
        assert found.macs[1] <= 0.4 * found.macs[0]
        assert found.macs[1] > 0.3 * found.macs[0]
    assert abs(found.parameters[1] - once.parameters[1]) < 0.15 * once.parameters[0]


@pytest.mark.parametrize(
    ("schedule", "lengths"),
    [
        (Schedule(steps=8), [1, 1, 1, 5]),
        (Schedule(steps=80), [10, 10, 10, 50]),
        (Schedule(steps=5), [1, 4]),
        (Schedule(steps=2), [2]),
        (Schedule(steps=3), [3]),
        (Schedule(epochs=3), [3]),
        (Schedule(epochs=4), [1, 3]),
        (Schedule(epochs=17), [2, 2, 2, 11]),
    ],
)
def test_during_training_all_rounds_together_last_as_long_as_asked(schedule: Schedule, lengths: list[int]) -> None:
    """Cut in equal parts over the first half at most; the learning rate falls after the last cut only."""
    flow = Flow()
    found = flow.run(seeded(Chain), plan(schedule="during-training"), schedule=schedule)
    parts = [part for _, part in flow.trained]
    assert [part.steps or part.epochs for part in parts] == lengths
    assert [part.decay for part in parts] == ["constant"] * (len(parts) - 1) + ["cosine"]
    assert sum(lengths[:-1]) <= sum(lengths) / 2
    assert flow.shares == [(number + 1) / len(parts) for number in range(len(parts))]
    assert widths(found.module)["conv2"] == (6, 4)


@pytest.mark.parametrize("schedule", [Schedule(steps=1), Schedule(epochs=1)])
def test_during_training_takes_two_steps(schedule: Schedule) -> None:
    with pytest.raises(DataError, match="at least; found 1: train longer"):
        Flow().run(seeded(Chain), plan(schedule="during-training"), schedule=schedule)


def test_from_scratch_keeps_the_structure_and_no_weight() -> None:
    flow, net = Flow(), seeded(Chain)
    state = torch.get_rng_state()
    found = flow.run(net, plan(schedule="from-scratch"), train=False)
    assert torch.equal(torch.get_rng_state(), state)  # the user's random numbers are the user's
    pruned = Flow().run(net, plan(), train=False)
    assert widths(found.module) == widths(pruned.module)
    theirs = pruned.module.state_dict()
    layers = [name for name in theirs if name.startswith(("conv", "fc"))]
    assert layers
    assert not any(
        torch.equal(value, theirs[name]) for name, value in found.module.state_dict().items() if name in layers
    )
    assert torch.equal(found.module.get_buffer("norm1.running_mean"), torch.zeros(4))
    torch.rand(7)
    again = Flow().run(net, plan(schedule="from-scratch"), train=False)
    assert all(torch.equal(value, again.module.state_dict()[name]) for name, value in found.module.state_dict().items())
    other = Flow().run(net, plan(schedule="from-scratch"), schedule=Schedule(steps=8, seed=1), train=False)
    assert not torch.equal(other.module.get_parameter("conv1.weight"), found.module.get_parameter("conv1.weight"))


@pytest.mark.parametrize("inside", [True, False])
def test_from_scratch_leaves_padded_shortcuts_what_they_are(inside: bool) -> None:
    """A shortcut that became a choice of channels is no layer to be trained; new weights would break it."""
    net = seeded(lambda: OptionA(inside=inside))
    scratch = Flow().run(net, plan(schedule="from-scratch"), train=False).module
    once = Flow().run(net, plan(), train=False).module
    frozen = {name: one for name, one in once.named_parameters() if not one.requires_grad}
    assert {name for name, one in scratch.named_parameters() if not one.requires_grad} == set(frozen)
    assert all(torch.equal(scratch.get_parameter(name), one) for name, one in frozen.items())


def test_layers_that_are_ignored_keep_their_channels() -> None:
    found = Flow().run(seeded(Chain), plan(ignore=("conv2",), schedule="iterative:2"))
    assert widths(found.module) == {"conv1": (4, 3), "conv2": (12, 4), "fc1": (5, 192), "fc2": (5, 5)}


def test_nothing_that_goes_is_an_error() -> None:
    def all_of_it(prunable: Prunable, share: float) -> Chosen:
        return Chosen({}, ("every layer is too narrow",))

    with pytest.raises(GoalError, match="cut nothing: every layer is too narrow"):
        prune(
            seeded(Chain),
            plan(),
            IMAGES,
            score=lambda prunable: None,
            choose=all_of_it,
            recover=lambda cut, part, label: cut,
            schedule=STEPS,
        )


def test_a_round_that_cuts_nothing_is_no_error() -> None:
    """Multiples of 4 leave nothing to cut a quarter of the way; what is asked for is reached all the same."""
    flow = Flow()
    found = flow.run(seeded(Chain), plan(round_to=4, schedule="iterative:2", ratio=0.25, ignore=("fc1",)))
    assert sum(layer.after[1] for layer in found.layers if layer.name.startswith("conv")) < 20


def test_remarks_are_about_what_was_asked_for_in_all() -> None:
    """Not about the parts of the way: 8 channels in multiples of 4 lose half, or nothing."""
    found = Flow().run(
        seeded(Residual), plan(round_to=8, ratio=0.3, scope="global", schedule="iterative:2", ignore=("a",))
    )
    shares = [remark for remark in found.remarks if "%" in remark and "instead of" in remark]
    assert len(shares) <= 1
    assert all("70.0%" in remark or "30.0%" in remark for remark in shares)


def test_by_the_least_magnitude() -> None:
    """The filters that are nearly zero go."""
    net = seeded(Chain)
    with torch.no_grad():
        net.get_parameter("conv1.weight")[[1, 2, 5, 7]] *= 1e-3
        net.get_parameter("conv2.weight")[:, [1, 2, 5, 7]] *= 1e-3
    kept = Flow().run(net, plan(), train=False).module.get_parameter("conv1.bias")
    assert torch.equal(kept, net.get_parameter("conv1.bias")[[0, 3, 4, 6]])


def test_the_choice_is_cut() -> None:
    """Whatever chooses: here the last units of each group."""
    net = seeded(Chain)

    def last(prunable: Prunable, share: float) -> Chosen:
        scored = [np.arange(group.units) for group in prunable.groups]
        return Chosen({g.name: scores[-2:] for g, scores in zip(prunable.groups, scored, strict=True)})

    found = prune(
        net, plan(), IMAGES, score=lambda prunable: None, choose=last, recover=lambda c, p, n: c, schedule=STEPS
    )
    assert torch.equal(found.module.get_parameter("conv1.weight"), net.get_parameter("conv1.weight")[-2:])


def test_errors_of_a_recovery_reach_the_user() -> None:
    def failing(cut: nn.Module, part: Schedule, label: str) -> nn.Module:
        raise DataError(f"{label}: no data")

    with pytest.raises(EdgekitError, match="round 1: no data"):
        prune(
            seeded(Chain),
            plan(),
            IMAGES,
            score=lambda prunable: None,
            choose=lambda prunable, share: Chosen({prunable.groups[0].name: np.arange(2)}),
            recover=failing,
            schedule=STEPS,
        )


def test_gradients_are_of_the_loss_on_labels_where_there_are_any() -> None:
    scores = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    labels = torch.tensor([0, 0])
    batch: dict[str, Tensor] = {"x": torch.zeros(2, 3), "labels": labels}
    expected = F.cross_entropy(scores, labels)
    assert torch.allclose(reaction_or_task(batch)({"y": scores}, batch), expected, rtol=1e-6)


def test_without_labels_gradients_are_of_how_far_the_outputs_move() -> None:
    """Each with a random sign, so that squares of gradients add up: of (2, 3) on average 4 + 9, and of no whole numbers."""
    batch = {"x": torch.zeros(1, 3)}
    outputs = {"y": torch.tensor([[2.0, 3.0]]), "ids": torch.tensor([7])}
    loss, again = reaction_or_task(batch), reaction_or_task(batch)
    found = [float(loss(outputs, batch)) for _ in range(256)]
    assert set(found) == {5.0, 1.0, -1.0, -5.0}
    assert abs(np.mean(np.square(found)) - 13.0) < 2.0
    assert found == [float(again(outputs, batch)) for _ in range(256)]


def test_outputs_of_any_rank_move() -> None:
    batch = {"x": torch.zeros(2, 3)}
    outputs = {"flat": torch.tensor([2.0, 2.0]), "none": torch.tensor(8.0)}
    assert abs(float(reaction_or_task(batch)(outputs, batch))) in (6.0, 8.0, 10.0)
