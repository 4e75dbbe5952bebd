"""Pruning by a plan: find what can go, choose, cut, recover, as often as the plan says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgekit.channel_choice import Chosen
from edgekit.channels import LayerCost, kept_shares, total_macs
from edgekit.data.samples import LABELS
from edgekit.errors import DataError, GoalError
from edgekit.pruning import DURING, SCRATCH, Prune, PrunedLayer, pruned_layers
from edgekit.schedule import Schedule
from edgekit.training.checkpoint import copied, unwrapped
from edgekit.training.distill import task_loss
from edgekit.training.forward import exportable, plain_call
from edgekit.training.prune.costs import costs_of
from edgekit.training.prune.depth import leave_out
from edgekit.training.prune.groups import Examples, Prunable, device_of, few, find_groups
from edgekit.training.prune.importance import Loss
from edgekit.training.prune.padding import is_selection

Choose = Callable[[Prunable, float], Chosen]
"""What to keep, so that a share (0 to 1) of all that is to go is gone."""
Recover = Callable[[nn.Module, Schedule, str], nn.Module]
"""Trains a module by a schedule; the text names the training."""
COMPARED = 64
"""Samples whose outputs say which blocks go."""
MOST_ROUNDS = 4
"""Of pruning during training."""


@dataclass(frozen=True, slots=True)
class Cutting:
    """What pruning came to.

    Attributes:
        module: cut, and recovered where it was to be.
        layers: that lost channels, as they were and as they are.
        macs, parameters: of all layers, before and after; shortcuts that choose channels count for nothing.
        remarks: what the user should know.
        blocks: that were left out, in that order.
    """

    module: nn.Module
    layers: tuple[PrunedLayer, ...]
    macs: tuple[int, int]
    parameters: tuple[int, int]
    remarks: tuple[str, ...]
    blocks: tuple[str, ...] = ()


def prune(
    module: nn.Module,
    plan: Prune,
    examples: Examples,
    *,
    score: Callable[[Prunable], None],
    choose: Choose,
    recover: Recover,
    schedule: Schedule,
) -> Cutting:
    """A pruned copy of `module`.

    Args:
        module: eager; it stays as it was.
        plan: its `schedule` says in how many rounds, `ignore` what keeps its channels.
        examples: of forward.
        score: gives the groups of what is to be cut their scores.
        choose: what to keep of them.
        recover: trains what was cut.
        schedule: of the recovery: of each round, or of all together where pruning goes on during training.

    Raises:
        EdgekitError: see `find_groups`, `choose` and `recover`.
    """
    remarks: dict[str, None] = {}
    before = _parameters(module)
    first: tuple[LayerCost, ...] = ()
    for number, (share, part) in enumerate(_rounds(plan, schedule)):
        prunable = find_groups(module, examples, ignore=plan.ignore)
        score(prunable)
        groups, costs = prunable.groups, prunable.costs
        first = first or costs
        chosen = choose(prunable, share)
        module = prunable.cut(chosen.choice)
        left = kept_shares(groups, chosen.choice)
        remarks |= dict.fromkeys((*prunable.remarks, *chosen.remarks))
        if plan.schedule == SCRATCH:
            _forget(module, schedule.seed)
        module = recover(module, part, f"round {number + 1}")
    layers = tuple(pruned_layers(first, costs, left))
    if not layers:
        raise GoalError(f"pruning by {plan.summary} cut nothing: {'; '.join(remarks) or 'no channel is left to go'}")
    macs = round(total_macs(first, {})), round(total_macs(costs, left))
    return Cutting(module, layers, macs, (before, _parameters(module)), tuple(remarks))


def shorten(module: nn.Module, plan: Prune, examples: Examples, *, recover: Recover, schedule: Schedule) -> Cutting:
    """A copy of `module` without some of its blocks; arguments as of `prune`.

    Raises:
        EdgekitError: see `leave_out` and `recover`.
    """
    assert plan.blocks is not None, "the goal"
    device = device_of(module)
    module = copied(exportable(unwrapped(module))).to("cpu")
    call = plain_call(module, few(examples, COMPARED))
    before = round(total_macs(costs_of(module, call), {})), _parameters(module)
    gone: tuple[str, ...] = ()
    for number, (share, part) in enumerate(_rounds(plan, schedule)):
        count = round(share * plan.blocks) - len(gone)
        gone += leave_out(module, count, call, ignore=plan.ignore) if count else ()
        if plan.schedule == SCRATCH:
            _forget(module, schedule.seed)
        module = recover(module, part, f"round {number + 1}")
    module = module.to("cpu")
    after = round(total_macs(costs_of(module, call), {})), _parameters(module)
    return Cutting(module.to(device), (), (before[0], after[0]), (before[1], after[1]), (), gone)


def _rounds(plan: Prune, schedule: Schedule) -> Iterator[tuple[float, Schedule]]:
    """What is to be gone after each round, and how it is recovered from."""
    if plan.schedule != DURING:
        yield from ((number / plan.rounds, schedule) for number in range(1, plan.rounds + 1))
        return
    length = schedule.steps or schedule.epochs or 0
    rounds = min(MOST_ROUNDS, length // 2)
    if not rounds:
        raise DataError(f"pruning during training takes two epochs or steps at least; found {length}: train longer")
    each = length // (2 * rounds)
    for number in range(1, rounds):
        yield number / rounds, _lasting(schedule, each).model_copy(update={"decay": "constant"})
    yield 1.0, _lasting(schedule, length - each * (rounds - 1))


def _lasting(schedule: Schedule, length: int) -> Schedule:
    return schedule.model_copy(update={"steps" if schedule.steps else "epochs": length})


def _forget(module: nn.Module, seed: int) -> None:
    """New weights, as each layer begins with; but for those that were made to choose channels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for child in module.modules():
            if not is_selection(child) and callable(begin := getattr(child, "reset_parameters", None)):
                begin()


def _parameters(module: nn.Module) -> int:
    """How many there are; shortcuts that choose channels have none of their own."""
    chosen = {id(one.weight) for one in module.modules() if is_selection(one)}
    return sum(one.numel() for one in module.parameters() if id(one) not in chosen)


def reaction_or_task(batch: Mapping[str, Tensor]) -> Loss:
    """What gradients are taken of: the loss on labels or, without labels, how far the outputs move.

    For that each output counts with a random sign: the expected square of a weight's gradient is then the sum over all outputs of
    the squares of theirs.
    """
    if LABELS in batch:
        return lambda outputs, labelled: task_loss(outputs, {}, labelled)
    signs = torch.Generator().manual_seed(0)

    def moved(outputs: Mapping[str, Tensor], _: Mapping[str, Tensor]) -> Tensor:
        floats = [one.float() for one in outputs.values() if one.is_floating_point()]
        drawn = [torch.randint(0, 2, one.shape, generator=signs).to(one) * 2 - 1 for one in floats]
        return torch.stack(
            [(one * sign).sum() / (len(one) if one.dim() else 1) for one, sign in zip(floats, drawn, strict=True)]
        ).sum()

    return moved
