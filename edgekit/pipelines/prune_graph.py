"""`--prune` and its like for an ONNX file: channels are cut from the graph, in one go and without training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgekit.calibration.refit import refit
from edgekit.channels import Choice, kept_shares, total_macs
from edgekit.errors import GraphError, SourceError
from edgekit.graph.channel_groups import Channels, channel_groups
from edgekit.graph.equal import prove_equal
from edgekit.graph.operators import layers
from edgekit.graph.run import Session
from edgekit.passes.prune_channels import masked, prune_channels
from edgekit.pipelines.prune_amount import Amount
from edgekit.pipelines.prune_timing import Timing
from edgekit.pipelines.quantize import Calibrating
from edgekit.progress import Progress
from edgekit.proxy import choose_proxy, open_proxy
from edgekit.pruning import ONE_SHOT, Prune, Pruned, pruned_layers
from edgekit.target import Target
from edgekit.words import some

Arrays = dict[str, NDArray[np.generic]]

FITTED = "a fit of each layer to the calibration data, without training"
COMPARED = 128
"""Calibration samples, about, that the decisions of the unpruned model are looked at on."""


def prune_graph(
    model: ir.Model,
    plan: Prune,
    examples: Arrays,
    rules: Target,
    batches: Calibrating,
    *,
    measure: Callable[[ir.Model], float] | None,
    on_progress: Progress,
) -> tuple[ir.Model, Pruned]:
    """A float graph in canonical form without some channels, the weights behind them fitted to what is left; and the record of it.

    It is proven to compute what the whole graph does with these channels masked.

    Args:
        model: not changed.
        plan: what to cut.
        examples: a few samples of the inputs.
        rules: whose numbers of channels are liked, where `plan` leaves that open.
        batches: calibration data, that weights are fitted to unless `plan` leaves what was cut as it is.
        measure: the metric of a graph; None without one.
        on_progress: told of each step.

    Raises:
        SourceError: the plan needs training.
        GraphError: nothing can be cut, or the criterion needs more than weights.
        GoalError: the goal cannot be met.
    """
    _check(plan)
    on_progress("prune", 0, None)
    channels = channel_groups(model, criterion=plan.criterion, ignore=plan.ignore)
    if not channels.groups:
        why = some([f"{name}: {reason}" for name, reason in channels.fixed.items()])
        raise GraphError(f"the graph has no channels that can be cut: {why}")
    timing = Timing(plan, on_progress, trainable=False) if plan.timed else None
    if timing is None:
        chosen = Amount(plan, rules.pruning, trainable=False).choose(channels.groups, channels.costs, 1.0)
    else:
        chosen = timing.choose(channels.groups, channels.costs, 1.0, GraphModel(model, channels, examples))
    cut = whole = masked(model, channels, chosen.choice)
    if plan.recover:
        whole = refit(cut, model, batches.named("fit what is left"), samples=batches.stop)
    pruned = prune_channels(whole, channels, chosen.choice)
    prove_equal(whole, pruned, examples)
    missed = timing.again(pruned) if timing is not None and plan.recover else ()
    left = kept_shares(channels.groups, chosen.choice)
    before, at_cut, after = [None if measure is None else measure(one) for one in (model, cut, pruned)]
    record = Pruned(
        summary=plan.summary,
        layers=tuple(pruned_layers(channels.costs, channels.costs, left)),
        macs=(round(total_macs(channels.costs, {})), round(total_macs(channels.costs, left))),
        parameters=(_parameters(model), _parameters(pruned)),
        **(timing.told if timing else {}),
        before=before,
        cut=at_cut,
        after=after if plan.recover else None,
        recovered=FITTED if plan.recover else "",
        remarks=(*chosen.remarks, *missed, *([] if measure else _compared(model, pruned, batches)), *_told(channels)),
    )
    return pruned, record


def _check(plan: Prune) -> None:
    if plan.blocks is not None:
        raise SourceError(
            f"--blocks {plan.blocks} needs a model with its layers as modules, which an ONNX file does not have; give the checkpoint "
            "that it was exported from, with --model, or cut channels with --macs"
        )
    if plan.sparsity is not None or plan.schedule != ONE_SHOT:
        asked = f"--sparsity {plan.sparsity}" if plan.sparsity is not None else f"--schedule {plan.schedule}"
        raise SourceError(
            f"{asked} needs training, which an ONNX file cannot have; give the checkpoint that it was exported from, with --model"
        )


def _parameters(model: ir.Model) -> int:
    return sum(layer.parameters for layer in layers(model))


def _compared(model: ir.Model, pruned: ir.Model, batches: Calibrating) -> Iterator[str]:
    """What is left of the decisions, where nobody gave a metric."""
    feeds, count = list[Arrays](), 0
    for batch in batches.named("compare with the unpruned model"):
        feeds.append(dict(batch.feeds))
        count += len(batch)
        if count >= COMPARED:
            break
    session = Session(model, optimize=True)
    floats = [session.run(one) for one in feeds]
    proxy = choose_proxy(floats, feeds)
    if proxy is not None:
        kept = open_proxy(proxy, feeds, floats)(Session(pruned, optimize=True).run)
        yield f"{kept.name} with the unpruned model: {kept.value:.4g}, on {count} of the calibration samples"


def _told(channels: Channels) -> Iterator[str]:
    yield "not trained after pruning, which an ONNX file cannot be: check the accuracy"
    if channels.fixed:
        kept = [f"{name} ({reason})" for name, reason in channels.fixed.items()]
        yield f"layers that keep their channels: {some(kept)}"


class GraphModel:
    """A graph whose channels are cut, as `Timing` measures it."""

    def __init__(self, model: ir.Model, channels: Channels, examples: Arrays) -> None:
        self.model, self.channels, self.examples = model, channels, examples

    def source(self) -> None:
        """The graph as it came is that of `graph` with all units."""

    def graph(self, choice: Choice) -> ir.Model:
        """The graph with the chosen units."""
        return prune_channels(self.model, self.channels, choice) if choice else self.model

    def sample(self, model: ir.Model, count: int = 1) -> dict[str, Any]:
        """Samples by the names of the inputs."""
        return {name: array[:count] for name, array in self.examples.items()}
