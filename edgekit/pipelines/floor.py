"""`--max-drop`: which layers hurt, and the fewest of them to leave in float so that the model is good enough."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from edgekit.errors import DataError, OutputError
from edgekit.lift import keep_float, lift, parse_floor
from edgekit.metric import Evaluate
from edgekit.output import write_text
from edgekit.pipelines.quantize import Calibrating
from edgekit.pipelines.split import Arrays
from edgekit.progress import Progress
from edgekit.records import LayerSensitivity, Lifted, LiftState, read_record
from edgekit.sensitivity import rank, sensitivity
from edgekit.target import Target

SAMPLES = 64
"""Calibration samples that errors are measured on."""
DEFAULT_BUDGET_S = 600.0


@dataclass(frozen=True, slots=True)
class Goal:
    """What was asked for.

    Attributes:
        max_drop: see `edgekit.lift.parse_floor`.
        budget_s: seconds for the search.
        state: file in which an interrupted search is remembered.
    """

    max_drop: str
    budget_s: float
    state: Path


def make_goal(max_drop: str, budget_s: float | None, out: Path, *, has_metric: bool) -> Goal:
    """What `--max-drop` and `--time-budget` ask for; an interrupted search is remembered beside `out`.

    Raises:
        DataError: `max_drop` is no floor, or one in points without a metric.
    """
    if parse_floor(max_drop).kind == "points" and not has_metric:
        raise DataError(
            f"--max-drop {max_drop} is in points of a metric, and there is none: give --evaluate, or a floor of the outputs "
            "such as 30dB or cos0.999"
        )
    return Goal(max_drop, budget_s or DEFAULT_BUDGET_S, out.parent / f".{out.name}.search.json")


def explain(
    graph: ir.Model, rules: Target, batches: Calibrating, on_progress: Progress
) -> tuple[LayerSensitivity, ...]:
    """What quantizing each layer alone does."""
    return tuple(sensitivity(graph, rules, _feeds(batches), on_progress=on_progress))


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
    floor = parse_floor(goal.max_drop)

    def remember(state: LiftState) -> None:
        write_text(goal.state, json.dumps(state.model_dump(mode="json")) + "\n")

    lifted = lift(
        graph,
        rules,
        _feeds(batches),
        floor,
        ranking=rank(found),
        metric=metric,
        time_budget_s=goal.budget_s,
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


def _feeds(batches: Calibrating) -> list[Arrays]:
    feeds, seen = [], 0
    for batch in batches.named("take samples"):
        feeds.append(batch.feeds)
        seen += len(batch)
        if seen >= SAMPLES:
            break
    return feeds


def lift_notes(lifted: Lifted | None) -> Iterator[str]:
    """What to tell of a search for a floor."""
    if lifted is None:
        return
    outcome = "is met" if lifted.met else "is not met"
    kept = f"with {', '.join(lifted.lifted)} in float" if lifted.lifted else "with everything in int8"
    more = "" if lifted.finished else "; time was up before the search was over: run the same again to go on"
    numbers = f"{lifted.before:.4g} before, {lifted.after:.4g} now, {lifted.needed:.4g} needed"
    yield f"the floor {lifted.floor} {outcome} {kept}: {numbers}{more}"
