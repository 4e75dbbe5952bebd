"""Whether a quantized model still decides as the float one does, where nobody said how to measure that; and what to do when not."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from edgekit.data import BoundData, open_data
from edgekit.errors import GraphError, TargetError
from edgekit.graph.operators import is_constant, is_float
from edgekit.graph.rules import quantized_nodes
from edgekit.graph.run import Session
from edgekit.graph.sizes import give_back
from edgekit.lift import Floor, Known, judge_outputs
from edgekit.lowering.qdq import lower_qdq
from edgekit.metric import Evaluate
from edgekit.pipelines.floor import Goal, explain, make_goal, meet
from edgekit.pipelines.quantize import Calibrating
from edgekit.pipelines.sources import input_specs
from edgekit.pipelines.stored import Stored
from edgekit.progress import Progress
from edgekit.proxy import AUTO, NONE, Proxy, are_shares, choose_proxy, count_decisions, in_focus, open_proxy
from edgekit.records import Metric, ProxyRecord
from edgekit.sensitivity import LARGEST_DB, MOST, SEGMENTS
from edgekit.target import Target, load_target
from edgekit.trials import Lifted

Arrays = Mapping[str, NDArray[Any]]

MOST_LOST = 2.0
"""Points of a metric that may be lost where nobody said how many."""
FLOOR, FLOOR_DB = 0.98, 20.0
"""The share of decisions that must be kept; where outputs hold no decision, the least SQNR of the worst of them (dB)."""
AIM = 0.99
"""The share that layers are lifted for: what holds on some samples keeps less on others. Where the floor holds with no layer in float,
no more than `FEW_LAYERS` are lifted for it."""
FEW_LAYERS = 2
BUDGET_S = 120.0
"""For looking for layers to leave in float that nobody asked for."""
RANKED_BY = 8
"""The most samples that tell which layers hurt: nobody asked for the numbers, only their order counts."""
COMPARED, COMPARING_S = 16, 5.0
"""Samples whose outputs are compared as signals, or all that the float model runs in so many seconds, where they are more: a search runs
them a dozen times."""
FEW_DECISIONS = 100
"""Of fewer, a share of 0.98 is a guess."""
RIGHT_OR_WRONG = {"boxes": "boxes"} | dict.fromkeys(("equal", "text", "threshold", "argmax"), "samples")
"""What is counted where a decision is the same as the float model's or another, by the kind of proxy."""
SQNR = "SQNR of the outputs (dB)"


@dataclass(frozen=True, slots=True)
class Decision:
    """How a model is judged.

    Attributes:
        proxy: None where outputs are only compared as signals, or a metric decides.
        evaluate: the number, higher is better.
        floor: the least that is good enough.
        floor_text: the floor as `--max-drop` would say it, in points that are lost.
        aim: what layers are lifted for, the same way; at least the floor.
        aimed: the same as a number like the floor.
        samples: how many decide.
        decisions: how many these make; several of each where they are boxes.
        shares: see `edgekit.proxy.are_shares`.
        float_metric: of the float model, where a metric decides.
    """

    proxy: Proxy | None
    evaluate: Evaluate
    floor: float
    floor_text: str
    aim: str
    aimed: float
    samples: int
    float_metric: Metric | None = None
    decisions: int = 0
    shares: bool = False

    def focus(self, outputs: Arrays) -> Arrays:
        """What of the outputs the decision hangs on."""
        return outputs if self.proxy is None else in_focus(self.proxy, outputs, shares=self.shares)

    def stricter(self, by: float) -> Decision:
        """The same, where so much more has to be kept."""
        floor, aimed = (min(1.0, max(0.0, share + by)) for share in (self.floor, self.aimed))
        return replace(self, floor=floor, aimed=aimed, floor_text=_points(floor), aim=_points(aimed))

    def known(self, before: float) -> Known | None:
        """What a search need not ask again; None of a user's metric, which may give another answer each time, and that is told."""
        if self.float_metric is not None:
            return None
        return Known(LARGEST_DB if self.proxy is None else 1.0, before)

    def hurting(self, before: float) -> float:
        """The share of the noise's energy that has to go, as far as it tells.

        Of signals, what is above the floor. Decisions are lost about as often as noise is large, which is the root of its energy.
        """
        if self.float_metric is not None:
            return MOST
        if self.proxy is None:
            return max(0.0, 1 - 10 ** ((before - self.aimed) / 10))
        return max(0.0, 1 - ((1 - self.aimed) / (1 - before)) ** 2) if before < 1 else MOST

    def judge(self, graph: ir.Model, rules: Target) -> float:
        """What the simulation of the annotated graph is worth."""
        return self.evaluate(Session(lower_qdq(graph, rules), optimize=True).run).value


def open_decision(
    graph: ir.Model, feeds: Sequence[Arrays], kind: str = AUTO, *, known: ProxyRecord | None = None
) -> Decision | None:
    """The decision to judge by, on samples batch by batch; None where `kind` is "none" or no output is a number to compare.

    Args:
        graph: float.
        feeds: inputs.
        kind: of decision.
        known: the decision that was found on other samples; these need not show it.

    Raises:
        DataError: no such proxy, or no output suits it.
    """
    if kind == NONE:
        return None
    session = Session(graph, optimize=True)
    begin = time.monotonic()
    floats = [session.run(batch) for batch in feeds]
    sample_s = (time.monotonic() - begin) / max(1, _count(feeds))
    give_back()
    if known is None:
        proxy = choose_proxy(floats, feeds, kind)
    else:
        proxy = Proxy(known.kind, known.outputs) if known.kind else None
    if proxy is not None:
        floats = [{name: batch[name] for name in proxy.outputs} for batch in floats]  # the others may be large
        evaluate, decisions = open_proxy(proxy, feeds, floats), count_decisions(proxy, floats)
        return Decision(
            proxy,
            evaluate,
            FLOOR,
            _points(FLOOR),
            _points(AIM),
            AIM,
            _count(feeds),
            decisions=decisions,
            shares=are_shares(proxy, floats),
        )
    if not any(array.dtype.kind == "f" for array in floats[0].values()):
        return None
    feeds = _first(feeds, max(COMPARED, int(COMPARING_S / sample_s)))
    judge = judge_outputs(graph, feeds, cosine=False)
    lost = f"{LARGEST_DB - FLOOR_DB:g}"
    return Decision(
        None, lambda run: Metric(name=SQNR, value=judge(run)), FLOOR_DB, lost, lost, FLOOR_DB, _count(feeds)
    )


def _count(feeds: Iterable[Arrays]) -> int:
    """How many samples they are."""
    return sum(next((len(array) for array in batch.values() if array.ndim), 1) for batch in feeds)


def _first(feeds: Sequence[Arrays], most: int) -> Sequence[Arrays]:
    """The first batches, of no more than so many samples; one at least."""
    sizes = accumulate(_count([batch]) for batch in feeds)
    return feeds[: max(1, sum(size <= most for size in sizes))]


def beside_all(decision: Decision | None, stored: Stored) -> Decision | None:
    """A decision on stored samples that counts what the compressed model keeps of these, and of all that `compress` judged it by.

    Where it keeps more of these, more of them is asked for, and where less, less: what a target loses beside is what counts, and few
    samples are chance.
    """
    record = stored.record.proxy
    if decision is None or decision.proxy is None or record is None:
        return decision
    try:
        here = decision.judge(stored.model, load_target(stored.record.target))
    except (GraphError, TargetError):  # of rules that are not here any more
        return decision
    return decision.stricter(here - record.after)


def metric_decision(graph: ir.Model, metric: Evaluate, samples: int, *, lift: bool) -> Decision:
    """The user's own metric as the judge; with `lift`, of which no more than `MOST_LOST` points may be lost unasked.

    Args:
        graph: float.
        metric: the number, higher is better.
        samples: about how many it takes.
        lift: leave layers in float where more is lost.
    """
    found = metric(Session(graph, optimize=True).run)
    floor = Floor("points", MOST_LOST).needed(found.value) if lift else -math.inf
    return Decision(None, metric, floor, f"{MOST_LOST:g}", f"{MOST_LOST:g}", floor, samples, found)


def bound(samples: Arrays, graph: ir.Model) -> BoundData:
    """Held-back samples as data for a graph."""
    return open_data(dict(samples)).bind(input_specs(graph))


def settle(
    graph: ir.Model,
    rules: Target,
    decision: Decision | None,
    lifted: Lifted | None,
    calibrating: Calibrating,
    budget_s: float | None,
    out: Path,
    on_progress: Progress,
) -> tuple[ir.Model, Lifted | None, ProxyRecord | None]:
    """Leave layers in float until the simulated model decides as float does; not where that was done for another goal (`lifted`).

    A few of them, too, where it decides so well enough, but by a hair.
    """
    if decision is None:
        return graph, lifted, None
    on_progress("evaluate" if decision.float_metric else "compare decisions with float", 0, None)
    begin, budget_s = time.monotonic(), budget_s or BUDGET_S
    try:
        before = after = decision.judge(graph, rules)
    except GraphError:  # grids that came with the source and that these rules cannot express: an export for others may
        if decision.float_metric is not None:
            raise
        return graph, lifted, None
    if lifted is None and before < decision.aimed:
        samples = _affordable(graph, rules, (time.monotonic() - begin) / decision.samples, budget_s)
        seen = _with_numbers(graph)
        found = explain(seen, rules, calibrating, on_progress, samples=samples, focus=decision.focus) if seen else ()
        if found:
            left = max(budget_s - (time.monotonic() - begin), budget_s / 4)
            goal = _goal(decision, before, make_goal(decision.floor_text, left, out, has_metric=True, aim=decision.aim))
            graph, lifted = meet(graph, rules, goal, found, calibrating, decision.evaluate, on_progress)
            after = lifted.after if goal.known else decision.judge(graph, rules)
            lifted = lifted if lifted.lifted or goal.most is None else None
    return graph, lifted, _record(decision, before, after)


def _goal(decision: Decision, before: float, goal: Goal) -> Goal:
    """The same goal, with how a decision's layers are looked for, where it is worth `before` with none in float."""
    return replace(
        goal,
        known=decision.known(before),
        give_back=decision.proxy is None,
        hurting=decision.hurting(before),
        most=None if before < decision.floor else FEW_LAYERS,
    )


def settle_target(
    stored: Stored, target: Target, decision: Decision | None, on_progress: Progress
) -> tuple[Stored, Lifted | None]:
    """Leave more layers in float where a target's own grids lose decisions that the compressed model keeps.

    Not where `compress` could not keep them either, or was told to meet another floor.
    """
    record = stored.record
    if decision is None or record.proxy is None or record.proxy.after < record.proxy.floor:
        return stored, None
    usual = decision.floor_text if decision.proxy is None else _points(FLOOR)
    if record.lifted is not None and record.lifted.floor != usual:
        return stored, None
    count = len(next(iter(stored.held_back.batches(RANKED_BY))))
    samples = Calibrating(stored.held_back, max(count, RANKED_BY), on_progress)
    model, lifted, _ = settle(
        stored.model, target, decision, None, samples, None, stored.folder / target.name, on_progress
    )
    return replace(stored, model=model), lifted


def _points(share: float) -> str:
    """What may be lost, as `--max-drop` says it."""
    return f"{100 * (1 - share):.6f}".rstrip("0").rstrip(".")


def _with_numbers(graph: ir.Model) -> ir.Model | None:
    """A model whose outputs are floats: where one is an index or a label, what that is chosen from. None where there is none."""
    graph = graph.clone()
    found: dict[ir.Value, None] = {}
    waiting = list(graph.graph.outputs)
    while waiting:
        value = waiting.pop(0)
        producer = value.producer()
        if producer is None:
            continue
        inputs = [each for each in producer.inputs if each is not None and not is_constant(each)]
        labels = producer.op_type == "Cast" and not any(map(is_float, inputs))
        if is_float(value) and not labels:
            found[value] = None
        else:
            waiting += inputs
    graph.graph.outputs[:] = found
    return graph if found else None


def _affordable(graph: ir.Model, rules: Target, sample_s: float, budget_s: float) -> int:
    """How many samples may tell which layers hurt, in half the time.

    On each sample a layer runs on average half the graph, and each segment of `sensitivity` runs about half of it, once as it is and,
    not optimized, beside what is on codes.
    """
    cost = (len(quantized_nodes(graph, rules)) / 2 + 2 * SEGMENTS) * sample_s
    return max(1, min(RANKED_BY, int(budget_s / 2 / max(cost, 1e-9))))


def _record(decision: Decision, before: float, after: float) -> ProxyRecord:
    """What to write down."""
    proxy = decision.proxy
    return ProxyRecord(
        name=proxy.name if proxy else decision.float_metric.name if decision.float_metric else SQNR,
        kind=proxy.kind if proxy else "",
        outputs=proxy.outputs if proxy else (),
        floor=decision.floor,
        before=before,
        after=after,
        decisions=decision.decisions,
    )


def decision_notes(record: ProxyRecord | None) -> Iterator[str]:
    """What to tell of it: nothing where all is well."""
    if record is not None and record.kind in RIGHT_OR_WRONG and record.decisions < FEW_DECISIONS:
        yield (
            f"{record.name} is judged by {record.decisions} {RIGHT_OR_WRONG[record.kind]} only, so that each counts up to "
            f"{100 / max(record.decisions, 1):.1f} points: --evaluate makes it surer, or more samples of --calibration"
        )
    if record is not None and record.after < record.floor:
        yield (
            f"{record.name} with float is {record.after:.4g}, under {record.floor:g}: check the accuracy before you ship it "
            "(--evaluate measures it; more --time-budget leaves more layers in float; --weights and --activations choose other types)"
        )
