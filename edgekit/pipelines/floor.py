"""`--explain` and `--max-drop`: which layers hurt and why, and the fewest of them to leave in float so that the model is good enough."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import onnx_ir as ir

from edgekit.calibration.observe import Observers, observe
from edgekit.data import Batch
from edgekit.distribution import Distribution, LayerDistributions, of_activation, of_weight
from edgekit.errors import DataError, OutputError
from edgekit.graph.annotations import get_params
from edgekit.graph.operators import Roles
from edgekit.graph.rules import quantized_nodes
from edgekit.lift import Known, Search, keep_float, lift, parse_floor
from edgekit.metric import Evaluate
from edgekit.output import write_text
from edgekit.pipelines.quantize import Calibrating
from edgekit.pipelines.split import BATCH_SIZE, feeds_of
from edgekit.progress import Progress
from edgekit.records import LayerSensitivity, Metric, read_record
from edgekit.sensitivity import MOST, Arrays, how_many_hurt, rank, sensitivity
from edgekit.target import Target
from edgekit.trials import Lifted, LiftState
from edgekit.words import some

SAMPLES = 64
"""Calibration samples that errors are measured on."""
LOOKED_AT = 12
"""The layers, the worst ones, whose tensors are described."""
DEFAULT_BUDGET_S = 600.0


@dataclass(frozen=True, slots=True)
class Goal:
    """What was asked for, and how it is looked for.

    Attributes:
        max_drop: see `edgekit.lift.parse_floor`.
        budget_s: seconds for the search.
        state: file in which an interrupted search is remembered.
        aim: the same as `max_drop` for what the search goes for, if it is worth it.
        known, give_back: see `edgekit.lift.Search`.
        hurting: it begins with the layers that make this share of the noise.
        most: no more than so many of the worst layers are lifted; None is no limit.
    """

    max_drop: str
    budget_s: float
    state: Path
    aim: str
    known: Known | None = None
    give_back: bool = True
    hurting: float = MOST
    most: int | None = None


def make_goal(max_drop: str, budget_s: float | None, out: Path, *, has_metric: bool, aim: str = "") -> Goal:
    """What `--max-drop` and `--time-budget` ask for; an interrupted search is remembered beside `out`.

    Raises:
        DataError: `max_drop` is no floor, or one in points without a metric.
    """
    if parse_floor(max_drop).kind == "points" and not has_metric:
        raise DataError(
            f"--max-drop {max_drop} is in points of a metric, and there is none: give --evaluate, or a floor of the outputs "
            "such as 30dB or cos0.999"
        )
    return Goal(max_drop, budget_s or DEFAULT_BUDGET_S, out.parent / f".{out.name}.search.json", aim or max_drop)


def explain(
    graph: ir.Model,
    rules: Target,
    batches: Calibrating,
    on_progress: Progress,
    *,
    samples: int = SAMPLES,
    focus: Callable[[Arrays], Arrays] = lambda outputs: outputs,
) -> tuple[LayerSensitivity, ...]:
    """What quantizing each layer alone does to what `focus` picks from the outputs, on the first `samples`."""
    return tuple(sensitivity(graph, rules, _feeds(graph, batches, samples), focus=focus, on_progress=on_progress))


def look_at_worst(
    graph: ir.Model, rules: Target, found: tuple[LayerSensitivity, ...], batches: Calibrating
) -> tuple[LayerDistributions, ...]:
    """What the layers read that hurt the model's output most, the worst one first; on the samples that they were judged by."""
    nodes = {node.name or "": (node, parts) for node, parts in quantized_nodes(graph, rules).items()}
    known = [
        layer for layer in found if layer.name in nodes
    ]  # not operators with a memory: their weights alone are on grids
    worst = sorted(known, key=lambda layer: layer.output_sqnr_db)[:LOOKED_AT]
    chosen = [nodes[layer.name] for layer in worst]
    values = {value: None for node, parts in chosen for value in _on_grids(node, parts)}
    observed = observe(graph, list(values), _first(batches.named("look at the worst")), threads=0, on_batch=None)
    return tuple(_layer(node, parts, observed) for node, parts in chosen)


def _on_grids(node: ir.Node, parts: Roles) -> list[ir.Value]:
    """The activations that a node reads on codes, each once."""
    read = dict.fromkeys(node.inputs[index] for index in parts.activations)
    return [value for value in read if value is not None and get_params(value) is not None]


def _layer(node: ir.Node, parts: Roles, observed: Observers) -> LayerDistributions:
    activations = tuple(_activation(value, observed) for value in _on_grids(node, parts))
    return LayerDistributions(name=node.name or "", activations=activations, weight=_weight(node, parts))


def _activation(value: ir.Value, observed: Observers) -> Distribution:
    params = get_params(value)
    assert params is not None
    return of_activation(value.name or "", observed[value].histogram(), params)


def _weight(node: ir.Node, parts: Roles) -> Distribution | None:
    value = None if parts.weight is None else node.inputs[parts.weight]
    params = get_params(value)
    if value is None or value.const_value is None or params is None:
        return None
    numbers = value.const_value.numpy().astype(np.float32)
    return of_weight(value.name or "", numbers, params, axis=parts.weight_axis)


def meet(
    graph: ir.Model,
    rules: Target,
    goal: Goal,
    found: tuple[LayerSensitivity, ...],
    batches: Calibrating,
    metric: Evaluate | None,
    on_progress: Progress,
) -> tuple[ir.Model, Lifted]:
    """The `graph` with the layers left in float that `goal` takes, and the search's record.

    What was tried is written down after each trial, and forgotten when the search is over.
    """
    search = Search(
        how_many_hurt(found, goal.hurting), parse_floor(goal.aim), goal.known, goal.give_back, goal.budget_s
    )

    def remember(state: LiftState) -> None:
        write_text(goal.state, json.dumps(state.model_dump(mode="json")) + "\n")

    lifted = lift(
        graph,
        rules,
        _feeds(graph, batches),
        parse_floor(goal.max_drop),
        ranking=rank(found)[: goal.most],
        search=search,
        metric=metric,
        state=_remembered(goal.state),
        on_trial=remember,
        on_progress=on_progress,
    )
    if lifted.finished:
        goal.state.unlink(missing_ok=True)
    return keep_float(graph, lifted.lifted), lifted


def _remembered(path: Path) -> LiftState | None:
    try:
        return read_record(path, LiftState, remedy="search again")
    except OutputError:
        return None


def _feeds(graph: ir.Model, batches: Calibrating, samples: int = SAMPLES) -> Sequence[Arrays]:
    """The first samples; more where the model takes only more at a time."""
    found = feeds_of(batches.data, graph, 0, min(samples, batches.stop))
    return found or [batch.feeds for batch in islice(batches.data.batches(BATCH_SIZE, 0, batches.stop), 1)]


def _first(batches: Calibrating) -> Iterator[Batch]:
    """The batches of the first `SAMPLES`."""
    seen = 0
    for batch in batches:
        yield batch
        seen += len(batch)
        if seen >= SAMPLES:
            return


def lift_notes(lifted: Lifted | None, decision: str = "") -> Iterator[str]:
    """What to tell of a search for a floor; of a `decision`, where nobody asked for the floor."""
    if lifted is None:
        return
    subject = f"{decision} at least {lifted.needed:.4g}" if decision else f"the floor {lifted.floor}"
    hair = lifted.before >= lifted.needed and bool(lifted.lifted)
    outcome = "is met by more than a hair" if hair else "is met" if lifted.met else "is not met"
    kept = f"with {some(lifted.lifted)} in float" if lifted.lifted else "with everything in int8"
    more = "" if lifted.finished else "; time was up before the search was over: run the same again to go on"
    numbers = f"{lifted.before:.4g} before, {lifted.after:.4g} now, {lifted.needed:.4g} needed"
    yield f"{subject} {outcome} {kept}: {numbers}{more}"


def changed_answer(lifted: Lifted | None, again: Metric | None) -> Iterator[str]:
    """Whether the metric of the float model was another one when the search for a floor began."""
    before = None if lifted is None else lifted.float_value
    if before is not None and again is not None and not math.isclose(before, again.value, rel_tol=1e-6):
        yield (
            f"--evaluate {again.name} gave {before:.6g} and then {again.value:.6g} for the same float model, so what was found with it "
            "is chance: make it deterministic (a fixed seed, the same samples each time)"
        )
