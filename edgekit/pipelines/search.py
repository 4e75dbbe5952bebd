"""`--search`: what there is to choose for a model, what a choice is worth, and the best method that the time allows to find."""

from __future__ import annotations

import importlib.util
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from edgekit import __version__
from edgekit.calibration.layer_rows import LinearLayer, linear_layers
from edgekit.calibration.smooth import smoothable
from edgekit.errors import DataError, OutputError
from edgekit.graph.annotations import all_values, get_params, get_wish
from edgekit.graph.fingerprint import fingerprint
from edgekit.graph.operators import is_constant
from edgekit.graph.run import Session
from edgekit.lift import Floor, judge_outputs, key_of, parse_floor
from edgekit.lowering.qdq import lower_qdq
from edgekit.method import CALIBRATORS, Method
from edgekit.metric import Evaluate, Runner
from edgekit.output import write_text
from edgekit.passes.assign_specs import assign_precisions, assign_specs
from edgekit.passes.equalize import equalize
from edgekit.pipelines.floor import DEFAULT_BUDGET_S
from edgekit.pipelines.quantize import Calibrating, quantize
from edgekit.pipelines.split import BATCH_SIZE, feeds_of
from edgekit.progress import Progress
from edgekit.records import read_record
from edgekit.search import Choice, Option, search
from edgekit.target import Target
from edgekit.trials import Searched, SearchTrial, difference

SAMPLES = 64
"""Samples set apart to compare outputs with float on, at most; a quarter where there are few."""
ROUNDING_SHARE = 0.2
"""Of the time budget, for AdaRound in a trial; the winner takes it again."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What was asked for.

    Attributes:
        max_drop: a floor that ends the search when it is met; see `edgekit.lift.parse_floor`.
        budget_s: seconds.
        seed: of the order of options; 0 leaves it as it is.
        state: file in which an interrupted search is remembered.
    """

    max_drop: str | None
    budget_s: float
    seed: int
    state: Path


def make_plan(
    out: Path, *, search: bool, seed: int, time_budget: float | None, max_drop: str | float | None, judged: bool
) -> Plan | None:
    """What `--search` asks for; an interrupted search is remembered beside `out`. With `max_drop`, half the time is for that.

    Raises:
        DataError: a seed or a time budget for no search.
    """
    if not search:
        if seed:
            raise DataError(
                f"--seed {seed} is the order in which --search tries methods, and there is no search: give --search too"
            )
        if time_budget is not None and max_drop is None and not judged:
            raise DataError(
                f"--time-budget {time_budget:g} is for a search, and there is none: give --search or --max-drop too"
            )
        return None
    budget, state = time_budget or DEFAULT_BUDGET_S, _state(out)
    return Plan(None, budget, seed, state) if max_drop is None else Plan(str(max_drop), budget / 2, seed, state)


def _state(out: Path) -> Path:
    return out.parent / f".{out.name}.methods.json"


def find_method(
    graph: ir.Model,
    rules: Target,
    method: Method,
    plan: Plan | None,
    batches: Calibrating,
    metric: Evaluate | None,
    on_progress: Progress,
) -> tuple[Method, Searched | None]:
    """The best method for the float `graph` and the search's record; what the user chose in `method` stays. Without a plan, `method`.

    A method is worth what decides about `--max-drop` or, without one, the metric or, without one, the SQNR of the worst output. Outputs
    are compared on samples that do not calibrate meanwhile. What was tried is written down after each trial.

    Raises:
        DataError: the metric fails.
        GraphError: no output of the model is a float, and there is no metric.
    """
    if plan is None:
        return method, None
    begin = time.monotonic()
    floor = None if plan.max_drop is None else parse_floor(plan.max_drop)
    by_metric = metric is not None if floor is None else floor.kind == "points"
    stop = batches.stop if by_metric else _calibrating(batches)
    judge = _by_metric(graph, metric, floor) if by_metric and metric else _by_outputs(graph, batches, stop, floor)
    choices, last = options(graph, rules, method, plan)
    key, state = _key(graph, rules, method, judge, batches), plan.state

    def value_of(candidate: Method, number: int) -> float:
        def tell(step: str, done: int, total: int | None) -> None:
            on_progress(f"trial {number}: {step}", done, total)

        quantized = quantize(graph, rules, candidate, Calibrating(batches.data, stop, tell))
        return judge.value_of(Session(lower_qdq(quantized, rules), optimize=True).run)

    def remember(so_far: Searched) -> None:
        write_text(state, json.dumps(so_far.model_dump(mode="json")) + "\n")

    searched = search(
        method,
        choices,
        value_of,
        last=last,
        time_budget_s=plan.budget_s - (time.monotonic() - begin),
        blank=Searched(key=key, judged_by=judge.name, judged_on=judge.data, needed=judge.needed),
        known=_remembered(state, key),
        on_trial=remember,
        on_progress=on_progress,
    )
    return searched.best.method, searched


def forget(out: Path, searched: Searched | None) -> None:
    """Remove what was remembered beside `out`, when there is nothing left to search."""
    if searched is not None and searched.finished:
        _state(out).unlink(missing_ok=True)


def options(graph: ir.Model, rules: Target, method: Method, plan: Plan) -> tuple[list[Choice], list[Option]]:
    """What can matter for a model and was not chosen by the user: cheap choices, and dear options for the end."""
    free = Method.model_fields.keys() - method.model_fields_set
    graph = assign_precisions(graph, method)
    wished = [
        value
        for value in all_values(assign_specs(graph, rules, method).graph)
        if get_wish(value) and get_params(value) is None
    ]
    names = {value.name for value in wished}
    layers = [layer for layer in linear_layers(graph.graph) if layer.weight.name in names]
    found: dict[str, Sequence[object]] = {}
    if not all(is_constant(value) for value in wished):
        found["calibrator"] = CALIBRATORS
    if method.activations == "static" and smoothable(graph, rules):
        found["smooth"] = (True, False)
    if fingerprint(equalize(graph)) != fingerprint(graph):
        found["equalize"] = (False, True)
    if layers:
        found["bias_correction"] = (True, False)
        found["rounding"] = _roundings(layers, method)
    choices = [
        _ordered([{name: value} for value in values], plan.seed)
        for name, values in found.items()
        if name in free and len(values) > 1
    ]
    trained = layers and "rounding" in free and importlib.util.find_spec("torch") is not None
    return choices, [_adaround(method, free, plan)] if trained else []


def _ordered(choice: list[Option], seed: int) -> Choice:
    if seed:
        random.Random(seed).shuffle(choice)
    return choice


def _roundings(layers: Sequence[LinearLayer], method: Method) -> list[str]:
    """The default, and what differs from it for these layers."""
    by_gptq = [method.weights != "int8" or layer.geometry.kind == "rows" for layer in layers]
    return ["auto", *(["nearest"] if any(by_gptq) else []), *([] if all(by_gptq) else ["gptq"])]


def _adaround(method: Method, free: set[str], plan: Plan) -> Option:
    seconds = plan.budget_s * ROUNDING_SHARE if "rounding_budget" in free else method.rounding_budget
    return {"rounding": "adaround", "rounding_budget": min(seconds, method.rounding_budget)}


@dataclass(frozen=True, slots=True)
class _Judge:
    """What decides.

    Attributes:
        name: of the number.
        data: what it is measured on.
        identity: tells it from others.
        needed: what is good enough.
    """

    name: str
    data: str
    identity: str
    value_of: Callable[[Runner], float]
    needed: float | None


def _by_metric(graph: ir.Model, metric: Evaluate, floor: Floor | None) -> _Judge:
    before = metric(Session(graph, optimize=True).run)
    needed = None if floor is None else floor.needed(before.value)
    identity = f"{before.name} {before.value!r}"
    return _Judge(before.name, "the metric's own data", identity, lambda run: metric(run).value, needed)


def _by_outputs(graph: ir.Model, batches: Calibrating, start: int, floor: Floor | None) -> _Judge:
    apart = feeds_of(batches.data, graph, start, batches.stop)
    feeds = apart or feeds_of(batches.data, graph, 0, batches.stop)
    data = f"{batches.stop - start} samples set apart" if apart else "the samples that calibrate, for want of others"
    cosine = floor is not None and floor.kind == "cosine"
    value_of = judge_outputs(graph, feeds, cosine=cosine)
    name = "cosine of the worst output" if cosine else "SQNR (dB) of the worst output"
    return _Judge(name, data, f"{name} on {data}", value_of, None if floor is None else floor.value)


def _calibrating(batches: Calibrating) -> int:
    """How many samples calibrate in trials, in whole batches."""
    unit = len(next(batches.data.batches(1)))  # of a static batch axis
    apart = max(unit, min(SAMPLES, batches.stop // 4))
    return max(unit, batches.stop - (apart - apart % unit))


def _key(graph: ir.Model, rules: Target, method: Method, judge: _Judge, batches: Calibrating) -> str:
    """Stands for all that the value of a trial depends on, but the metric's own code."""
    about = (
        __version__,
        fingerprint(graph),
        rules.quantization.model_dump_json(),
        method.model_dump_json(),
        judge.identity,
    )
    return key_of(" ".join(about), (batch.feeds for batch in batches.data.batches(BATCH_SIZE, 0, batches.stop)))


def _remembered(path: Path, key: str) -> tuple[SearchTrial, ...]:
    try:
        found = read_record(path, Searched, remedy="search again")
    except OutputError:
        return ()
    return found.trials if found.key == key else ()


def search_notes(searched: Searched | None) -> Iterator[str]:
    """What to tell of a search for a method."""
    if searched is None:
        return
    first, best, count = searched.trials[0], searched.best, len(searched.trials)
    begun = f"the method to begin with ({first.value:.4g})"
    enough = searched.needed is not None and best.value >= searched.needed
    if best != first:
        found = f"{difference(first.method, best.method)} is better ({best.value:.4g}) than {begun}"
    else:
        found = f"{begun} is good enough" if enough else f"nothing was better than {begun}"
    more = "" if searched.finished else "; time was up before the search was over: run the same again to go on"
    trials = f"{count} trial{'s' if count > 1 else ''}"
    yield f"search: {found}, by {searched.judged_by} on {searched.judged_on}, in {trials}{more}"
