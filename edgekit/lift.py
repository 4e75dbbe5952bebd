"""Meet an accuracy floor: keep in float the fewest layers without which the quantized model is not good enough."""

from __future__ import annotations

import hashlib
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgekit.errors import DataError
from edgekit.graph.fingerprint import fingerprint
from edgekit.graph.rules import PRECISION
from edgekit.graph.run import Session
from edgekit.lowering.qdq import lower_qdq
from edgekit.metric import Evaluate, Runner
from edgekit.progress import Progress, silent
from edgekit.sensitivity import Fidelity, check_batches, check_float_output
from edgekit.target import Target
from edgekit.trials import Lifted, LiftState, LiftTrial

Arrays = Mapping[str, NDArray[np.generic]]

WORTH = 4
"""How many times as many layers an aim above the floor may take as the floor itself does."""


@dataclass(frozen=True, slots=True)
class Floor:
    """How good a quantized model must be.

    Attributes:
        kind: "points" of the user's metric that may be lost, or the least SQNR ("dB") or cosine of the worst output against float.
        value: of that; a point is 0.01 of a metric that is a share (at most 1 for the float model), else 1.
    """

    kind: Literal["points", "dB", "cosine"]
    value: float

    def needed(self, float_value: float | None) -> float:
        """The least number that meets the floor, given what the metric says of the float model where points of it count."""
        if float_value is None:
            return self.value
        return float_value - self.value * (0.01 if abs(float_value) <= 1 else 1.0)

    def __str__(self) -> str:
        """As `parse_floor` reads it."""
        return {"points": f"{self.value:g}", "dB": f"{self.value:g}dB", "cosine": f"cos{self.value:g}"}[self.kind]


@dataclass(frozen=True, slots=True)
class Known:
    """What a metric says of the float model, and of the quantized one with nothing lifted."""

    of_float: float
    before: float


@dataclass(frozen=True, slots=True)
class Search:
    """How the fewest layers are looked for.

    Attributes:
        first: how many of the ranking are thought to be enough; see `edgekit.sensitivity.how_many_hurt`.
        aim: more than the floor, of its kind: gone for, and taken where it needs no more than `WORTH` times as many layers.
        known: what the metric says of the float model, and of the model with nothing lifted, where somebody has asked already.
        give_back: take the second step of `lift`. Not for decisions on few samples: who asks that often finds a set that decides
            rightly by chance.
        budget_s: seconds.
    """

    first: int = 1
    aim: Floor | None = None
    known: Known | None = None
    give_back: bool = True
    budget_s: float = math.inf


def parse_floor(text: str) -> Floor:
    """What `--max-drop` says: "0.5" (points of the metric), "30dB" (SQNR of the outputs) or "cos0.999" (their cosine).

    Raises:
        DataError: it is none of them, or out of range.
    """
    match = re.fullmatch(r"\s*(cos)?\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(db)?\s*", text, re.IGNORECASE)
    if match is None or (match[1] and match[3]):
        raise DataError(
            f"--max-drop {text!r} is no floor; give points of the metric that may be lost (0.5), the least SQNR of the outputs "
            "(30dB) or their least cosine with float (cos0.999)"
        )
    value = float(match[2])
    if match[1] and not value < 1:
        raise DataError(f"--max-drop {text!r}: a cosine is below 1; give one such as cos0.999")
    return Floor("cosine" if match[1] else "dB" if match[3] else "points", value)


def lift(
    model: ir.Model,
    target: Target,
    batches: Sequence[Arrays],
    floor: Floor,
    *,
    ranking: Sequence[str],
    search: Search = Search(),
    metric: Evaluate | None = None,
    state: LiftState | None = None,
    on_trial: Callable[[LiftState], None] | None = None,
    threads: int = 0,
    on_progress: Progress = silent,
) -> Lifted:
    """Find the fewest layers to keep in float so that the simulated model meets `floor`.

    1. The `first` layers of the ranking, twice, four times, ... as many, until the floor is met; then bisection. Where there is an aim,
       for that first, and for the floor where the aim is out of reach or not worth it.
    2. Layers that turn out not to be needed are given back, in halves, quarters, ... and one by one, the mildest first.

    It ends within the time budget, judged by the longest trial so far, with the best that it found: the smallest set that meets the
    floor or, where none does, the set that comes closest. One trial is always made.

    Args:
        model: float, with quant attributes.
        target: its quantization is simulated.
        batches: feeds on which outputs are compared with float; not read for points of a metric.
        floor: the goal.
        ranking: names of nodes, the worst first; see `edgekit.sensitivity.rank`.
        search: where to begin, what to go for, and for how long.
        metric: the user's; needed for a floor in points.
        state: of an earlier search; what it tried is not tried again, unless the model, the target or the samples are others.
        on_trial: given the state after each trial, to be stored.
        threads: of inference; 0 lets ONNX Runtime choose.
        on_progress: told of each trial.

    Raises:
        DataError: a floor in points without a metric, one in dB or as a cosine without batches, or the metric fails.
        GraphError: no output of the model is a float.
    """
    known = search.known
    judge = _by_metric(floor, metric) if floor.kind == "points" else _by_outputs(model, floor, batches, threads)
    key = _key(model, target, floor, batches if floor.kind != "points" else ())
    float_value = None
    if floor.kind == "points":
        float_value = known.of_float if known else judge(Session(model, optimize=True, threads=threads).run)
    needed = floor.needed(float_value)
    tried = {frozenset(trial.lifted): trial.value for trial in state.trials} if state and state.key == key else {}
    if known and not tried:
        tried[frozenset()] = known.before

    def value_of(lifted: frozenset[str]) -> float:
        return judge(Session(lower_qdq(model, target, keep_float=lifted), optimize=True, threads=threads).run)

    aimed = max(needed, (search.aim or floor).needed(float_value))
    trials = _Trials(
        key, value_of, needed, aimed, search.budget_s, on_trial, on_progress, tried, _estimate(len(ranking))
    )
    try:
        trials.find(ranking, search)
        finished = True
    except _TimeIsUp:
        finished = False
    best = trials.best()
    return Lifted(
        floor=str(floor),
        met=trials.known[best] >= needed,
        float_value=float_value,
        needed=needed,
        before=trials.known[frozenset()],
        after=trials.known[best],
        lifted=tuple(name for name in ranking if name in best),
        finished=finished,
        state=trials.state(),
    )


def keep_float(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """The annotated `model` with some of its nodes marked to stay float for every target."""
    model = model.clone()
    for node in model.graph:
        if node.name in names:
            node.metadata_props[PRECISION] = "float"
    return model


class _TimeIsUp(Exception):
    """The next trial would not end within the budget."""


@dataclass(slots=True)
class _Trials:
    """What was tried, and what they may cost; they go for what is `aimed` at, and `needed` will do."""

    key: str
    value_of: Callable[[frozenset[str]], float]
    needed: float
    aimed: float
    budget_s: float
    on_trial: Callable[[LiftState], None] | None
    on_progress: Progress
    known: dict[frozenset[str], float]
    expected: int
    start: float = field(default_factory=time.monotonic)
    longest: float = 0.0

    def find(self, ranking: Sequence[str], search: Search) -> None:
        """Try sets until the smallest that such a search finds is known: for the aim or, where that is not worth it, for the floor."""
        least = self.aimed
        count = self._first_of(ranking, search.first, least)
        if self.known[self.best()] < self.aimed:
            least = self.needed
            count = self._first_of(ranking, search.first, least)
        if count and search.give_back:
            self._give_back(list(ranking[:count]), least)

    def _first_of(self, ranking: Sequence[str], first: int, least: float) -> int | None:
        """How many of the ranking, the worst, have to go; None where all are not enough."""
        if self.value((), least) >= least:
            return 0
        low, high = 0, min(first, len(ranking))
        while self.value(ranking[:high], least) < least:
            if high == len(ranking):
                return None
            low, high = high, min(2 * high, len(ranking))
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.value(ranking[:middle], least) >= least else (middle, high)
        return high

    def _give_back(self, kept: list[str], least: float) -> None:
        size = len(kept) // 2
        while size >= 1:
            end = len(kept)
            while end > 0:
                start = max(0, end - size)
                fewer = kept[:start] + kept[end:]
                if self.value(fewer, least) >= least:
                    kept = fewer
                end = start
            size //= 2

    def value(self, lifted: Sequence[str], least: float) -> float:
        """What the model is worth with some layers in float, where `least` is looked for: by trial, where it is not known."""
        wanted = frozenset(lifted)
        if wanted not in self.known:
            begin = time.monotonic()
            if frozenset() in self.known and begin - self.start + self.longest > self.budget_s:
                raise _TimeIsUp
            self.known[wanted] = self.value_of(wanted)
            self.longest = max(self.longest, time.monotonic() - begin)
            if self.on_trial is not None:
                self.on_trial(self.state())
            done = len(self.known)
            self.on_progress(
                f"lift: {self.known[wanted]:.5g} with {len(wanted)} layers in float, {least:.5g} wanted",
                done,
                max(done, self.expected),
            )
        return self.known[wanted]

    def best(self) -> frozenset[str]:
        """The smallest set that meets the aim, if it is worth it, or the floor; where none does, the best, of equal ones the smaller."""
        enough, ideal = self._smallest(self.needed), self._smallest(self.aimed)
        if enough is None:
            return max(self.known, key=lambda lifted: (self.known[lifted], -len(lifted)))
        return ideal if ideal is not None and len(ideal) <= WORTH * max(1, len(enough)) else enough

    def _smallest(self, least: float) -> frozenset[str] | None:
        """The smallest set that is worth so much, of equal ones the better."""
        met = [lifted for lifted, value in self.known.items() if value >= least]
        return min(met, key=lambda lifted: (len(lifted), -self.known[lifted], sorted(lifted)), default=None)

    def state(self) -> LiftState:
        """All trials, in order."""
        trials = (LiftTrial(lifted=tuple(sorted(lifted)), value=value) for lifted, value in self.known.items())
        return LiftState(key=self.key, trials=tuple(trials))


def _by_metric(floor: Floor, metric: Evaluate | None) -> Callable[[Runner], float]:
    if metric is None:
        raise DataError(
            f"--max-drop {floor} is in points of a metric, and none is given; add --evaluate, or give a floor in dB or a cosine"
        )
    return lambda run: metric(run).value


def _by_outputs(model: ir.Model, floor: Floor, batches: Sequence[Arrays], threads: int) -> Callable[[Runner], float]:
    check_batches(batches, f"--max-drop {floor}")
    return judge_outputs(model, batches, cosine=floor.kind == "cosine", threads=threads)


def judge_outputs(
    model: ir.Model, batches: Sequence[Arrays], *, cosine: bool, threads: int = 0
) -> Callable[[Runner], float]:
    """What tells the worst output's SQNR (dB), or cosine, of a quantized model against the float `model` on `batches`.

    Raises:
        GraphError: no output of the model is a float.
    """
    check_float_output(model)
    session = Session(model, optimize=True, threads=threads)
    expected = [session.run(feeds) for feeds in batches]

    def judge(run: Runner) -> float:
        found = Fidelity()
        for feeds, wanted in zip(batches, expected, strict=True):
            found.update(run(feeds), wanted)
        return found.cosine if cosine else found.sqnr_db

    return judge


def _estimate(layers: int) -> int:
    """Trials of a search: doubling, bisection, and giving back a few."""
    return 2 + 3 * math.ceil(math.log2(layers + 1))


def _key(model: ir.Model, target: Target, floor: Floor, batches: Sequence[Arrays]) -> str:
    """Stands for all that the value of a trial depends on, but the metric's own data."""
    return key_of(f"{fingerprint(model)} {target.quantization.model_dump_json()} {floor.kind}", batches)


def key_of(about: str, batches: Iterable[Arrays]) -> str:
    """Stands for a text and for the content of feeds."""
    digest = hashlib.sha256(about.encode())
    for feeds in batches:
        for name, array in sorted(feeds.items()):
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
