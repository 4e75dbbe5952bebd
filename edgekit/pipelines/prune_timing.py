"""`--speedup`, `--latency`: channels are cut until a runtime here was measured to be so fast."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgekit.allocation import NEAR, WITHIN, Reached, meet_goal
from edgekit.backend import Artifact, Backend, get_backend
from edgekit.channel_choice import (
    BALANCE,
    FLOOR,
    Chosen,
    Multiples,
    allowed_counts,
    fitting_multiples,
    multiple_of,
    rounding_remarks,
)
from edgekit.channels import Choice, Group, LayerCost
from edgekit.errors import BackendError, GoalError, TargetError
from edgekit.frontier import Frontier, widths_to_measure
from edgekit.graph.io import save_onnx
from edgekit.latency_table import LatencyTable, time_layers
from edgekit.layer_shape import layer_shapes
from edgekit.measure import Candidate, Comparison, bootstrap_median, measure, ratio
from edgekit.pipelines.sources import EXAMPLES, canonicalize, rewrite
from edgekit.pipelines.targets import missing
from edgekit.progress import Progress
from edgekit.pruning import Prune
from edgekit.records import MODEL
from edgekit.target import Pruning, Target, load_target

BEFORE, AFTER = "unpruned", "pruned"
FLOAT = "f32"
PROCESSES, MOST_PROCESSES = 3, 9
"""A pruned model is compared in so many fresh pairs of processes, as one that got its memory by luck is fast to its end; in more of
them as long as their interval does not say whether the goal is met."""
BURSTS, BURST_SECONDS = 3, 0.15


@dataclass(frozen=True, slots=True)
class Timed:
    """What was measured of a pruned model: how many times faster it is, and its time (ms), with their 95 % intervals."""

    speedup: float
    low: float
    high: float
    ms: float
    low_ms: float
    high_ms: float


class Timing:
    """Chooses channels by measured time, float against float, one sample at a time.

    Attributes:
        rules: the target that the goal names.
        trainable: what is cut can be trained, as an ONNX graph cannot: its layers become less unequal.
        found: of what was measured last.
    """

    def __init__(self, plan: Prune, on_progress: Progress, *, trainable: bool) -> None:
        """Raises BackendError where the target's runtime is not here, TargetError where there is no such target."""
        assert plan.timed is not None, "the goal is a time"
        self.kind, self.value, name = plan.timed
        self.plan, self.on_progress, self.trainable = plan, on_progress, trainable
        self.rules: Target = load_target(name)
        if not self.rules.backend:
            raise TargetError(
                f"--{self.kind} is to be measured on {name!r}, which has no runtime; name one of `edgekit targets`"
            )
        self.backend: Backend = get_backend(self.rules.backend)
        available = self.backend.available(self.rules)
        if not available.can_run:
            raise BackendError(f"--{self.kind} is to be measured on {name!r}: {missing(available)}")
        self.found: Timed | None = None
        self._first: ir.Model | None = None
        self._feeds: dict[str, Any] = {}

    def choose(self, groups: Sequence[Group], costs: Sequence[LayerCost], share: float, model: Any) -> Chosen:
        """What to keep of a model so that it is as fast as asked, or a `share` of the way there.

        Args:
            groups, costs: what can go, and what layers cost.
            share: of the way, 0 to 1.
            model: gives float graphs: `graph(choice)` that with the chosen units, `source()` that of the model as it came, None where
                all units are just that, and `sample(graph, count)` samples of its inputs.

        Raises:
            GoalError: that fast is more than pruning can do; the message says what it can.
        """
        whole = model.graph({})
        first = self._first = self._first or model.source() or whole
        multiples = multiples_for(self.plan, groups, self.rules.pruning)
        if all(len(allowed_counts(group, multiple_of(multiples, group))) == 1 for group in groups):
            raise GoalError(
                f"no layer can lose channels: {'; '.join(rounding_remarks(groups, multiples))}; round to less"
            )
        feeds = self._feeds = model.sample(whole)
        table = self._table(groups, costs, multiples, whole, feeds)
        with tempfile.TemporaryDirectory(prefix="edgekit-") as folder:
            before = Candidate(BEFORE, self._built(first, Path(folder) / BEFORE), self.rules)
            now = None if whole is first else self._against(before, whole, Path(folder) / "now", feeds)
            base = self._compare([before], feeds).timings[0].median_ms
            total = base if now is None else base / now.speedup
            goal = self._goal(base, share)
            frontiers = [
                Frontier(groups, costs, table.time, total_ms=total, multiples=multiples, floor=floor)
                for floor in self._floors(goal / total)
            ]
            decides = self._decides(base / goal if self.kind == "speedup" else goal)
            # What is known is not measured again: a second time it may seem fast enough.
            known = {tuple(group.units for group in groups): total}
            results = {total: now or Timed(1.0, 1.0, 1.0, base, base, base)}

            def tried(choice: Choice) -> float:
                kept = tuple(len(choice[group.name]) for group in groups)
                if kept not in known:
                    place = Path(folder) / f"{AFTER}-{len(known)}"
                    one = self._against(before, model.graph(choice), place, feeds, decides)
                    self.on_progress(f"prune: {one.speedup:.2f}x as fast on {self.rules.name}", len(known), None)
                    # Both drift alike: the ratio is what counts where a ratio was asked for.
                    known[kept] = base / one.speedup if self.kind == "speedup" else one.ms
                    results[known[kept]] = one
                return known[kept]

            reached = self._met(frontiers, tried, goal, results)
        self.found = results[reached.measured_ms]
        return Chosen(reached.choice, (*reached.remarks, *table.remarks))

    def again(self, graph: ir.Model) -> tuple[str, ...]:
        """Measure what was chosen once more, when time has passed and its weights are others; a remark where it misses the goal by now."""
        assert self._first is not None and self.found is not None, "it chose"
        with tempfile.TemporaryDirectory(prefix="edgekit-") as folder:
            before = Candidate(BEFORE, self._built(self._first, Path(folder) / BEFORE), self.rules)
            decides = self._decides(self.value)
            chosen, self.found = self.found, self._against(before, graph, Path(folder) / AFTER, self._feeds, decides)
        if self.kind == "speedup":
            missed, unit, pair = self.value / self.found.speedup, "x", (chosen.speedup, self.found.speedup)
        else:
            missed, unit, pair = self.found.ms / self.value, " ms", (chosen.ms, self.found.ms)
        if missed <= 1 + WITHIN:
            return ()
        return (
            f"{pair[1]:.3g}{unit} when it was measured at the end, {pair[0]:.3g}{unit} when it was chosen, and {self.value:g}{unit} was "
            "asked for: this machine's speed changes; close other programs and prune again",
        )

    @property
    def told(self) -> dict[str, Any]:
        """What a record says of measured times."""
        assert self.found is not None, "it chose"
        return {
            "target": self.rules.name,
            "speedup": self.found.speedup,
            "speedup_low": self.found.low,
            "speedup_high": self.found.high,
            "latency_ms": self.found.ms,
        }

    def _goal(self, base: float, share: float) -> float:
        """The time (ms) that is to be reached, a share of the way from that of the model as it came."""
        if self.kind == "speedup":
            return base / (1 + (self.value - 1) * share)
        if base <= self.value:
            raise GoalError(
                f"the model takes {base:.3f} ms on {self.rules.name} as it came, and {self.value:g} ms are asked for: nothing is to be cut"
            )
        return base + (self.value - base) * share

    def _floors(self, left: float) -> tuple[float, ...]:
        """The shares of its units that each layer keeps at least where a share of the time is left, in the order in which they are tried.

        (ResNet-20's file with 65 % of its MACs, which stand in for time, fitted to 512 images: 0.64 top-1 with the first, 0.50 with the
        last.)
        """
        balanced = BALANCE * math.sqrt(min(1.0, left))  # inputs and outputs go alike
        return (FLOOR,) if self.trainable or balanced <= FLOOR else (balanced, FLOOR)

    def _met(
        self,
        frontiers: Sequence[Frontier],
        tried: Callable[[Choice], float],
        goal: float,
        results: dict[float, Timed],
    ) -> Reached:
        *balanced, last = frontiers
        for frontier in balanced:
            if frontier.fastest_ms <= goal:
                with suppress(GoalError):
                    reached = meet_goal(frontier, tried, goal)
                    if reached.met:
                        return reached
        try:
            return meet_goal(last, tried, goal)
        except GoalError as error:
            if self.kind != "speedup":
                raise
            best = max(one.speedup for one in results.values())
            raise GoalError(
                f"{self.value:g}x is asked for on {self.rules.name}, and {best:.2f}x is the most that was measured with as few channels as "
                "pruning these layers can keep; ask for less, ignore fewer layers, or round to less"
            ) from error

    def _table(
        self,
        groups: Sequence[Group],
        costs: Sequence[LayerCost],
        multiples: Multiples,
        whole: ir.Model,
        feeds: dict[str, Any],
    ) -> LatencyTable:
        """The times of the model's layers with some of their channels."""
        shapes = layer_shapes(whole, sizes=_symbols(whole, {name: array.shape for name, array in feeds.items()}))
        widths = widths_to_measure(groups, costs, multiples)
        return time_layers(
            shapes,
            {name: widths[name] for name in shapes if name in widths},
            self.rules,
            self.backend,
            on_progress=self.on_progress,
        )

    def _against(
        self,
        before: Candidate,
        graph: ir.Model,
        folder: Path,
        feeds: dict[str, Any],
        decides: Callable[[Timed], bool] = lambda _: True,
    ) -> Timed:
        both = before, Candidate(AFTER, self._built(graph, folder), self.rules)
        bursts: tuple[list[float], list[float]] = [], []
        for count in range(1, MOST_PROCESSES + 1):
            for some, timing in zip(bursts, self._compare(both, feeds).timings, strict=True):
                some.extend(timing.bursts)
            found = _timed(*map(np.array, bursts))
            if count >= PROCESSES and decides(found):
                break
        return found

    def _decides(self, goal: float) -> Callable[[Timed], bool]:
        """Says of a measurement whether its interval is on one side of a goal (times, or ms), or as narrow as matters."""

        def decides(found: Timed) -> bool:
            low, high = (found.low, found.high) if self.kind == "speedup" else (found.low_ms, found.high_ms)
            return not low < goal < high or high - low <= NEAR * goal

        return decides

    def _built(self, graph: ir.Model, folder: Path) -> Artifact:
        folder.mkdir()
        save_onnx(graph, folder / MODEL)
        return self.backend.convert(folder / MODEL, self.rules, folder, precision=FLOAT)

    def _compare(self, candidates: Sequence[Candidate], feeds: dict[str, Any]) -> Comparison:
        found = measure(candidates, feeds, bursts=BURSTS, burst_seconds=BURST_SECONDS)
        if found.failures:
            raise BackendError(f"target {self.rules.name!r}: {next(iter(found.failures.values()))}")
        return found


def _timed(whole: NDArray[np.float64], pruned: NDArray[np.float64]) -> Timed:
    """Of the bursts' medians (ms)."""
    times = ratio(whole, pruned)
    return Timed(times.median, times.ci_low, times.ci_high, float(np.median(pruned)), *bootstrap_median(pruned))


def multiples_for(plan: Prune, groups: Sequence[Group], liked: Pruning) -> Multiples:
    """What numbers of channels are rounded to."""
    return fitting_multiples(groups, liked.channels) if plan.round_to == "auto" else plan.round_to


def _symbols(model: ir.Model, sizes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """What the open dimensions of a model's inputs are for one sample, by their names."""
    found = {}
    for value in model.graph.inputs:
        for dim, size in zip(value.shape or (), sizes[value.name or ""], strict=True):
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
                found[dim.value] = size
    return found


class TorchModel:
    """A torch module whose channels are cut and that is then exported.

    Args:
        module: what is cut.
        source: the same as it came, where something of it was replaced to be cut; else None.
        arrays: samples of the inputs.
        ignore: what keeps its channels.
        opset: to export to.
    """

    def __init__(self, module: Any, source: Any, arrays: Any, ignore: Sequence[str], opset: int) -> None:
        self._module, self._source, self._arrays, self._ignore, self._opset = module, source, arrays, ignore, opset

    def source(self) -> ir.Model | None:
        """The float graph as it came; None where it is that of `graph` with all units."""
        return None if self._source is None else float_graph(self._source, self._arrays, self._opset)

    def graph(self, choice: Choice) -> ir.Model:
        """The float graph with the chosen units."""
        from edgekit.training.prune.groups import find_groups

        prunable = find_groups(self._module, self._arrays, ignore=self._ignore)
        return float_graph(prunable.cut(choice) if choice else prunable.module, self._arrays, self._opset)

    def sample(self, model: ir.Model, count: int = 1) -> dict[str, np.ndarray[Any, Any]]:
        """Samples by the names of a model's inputs."""
        return _samples(model, self._arrays, count)


def float_graph(module: Any, arrays: Any, opset: int) -> ir.Model:
    """A torch module as it is timed; `arrays` are samples of its inputs, two at least."""
    from edgekit.training.checkpoint import unwrapped
    from edgekit.training.export_onnx import export_onnx
    from edgekit.training.forward import exportable

    few = (
        {name: array[:EXAMPLES] for name, array in arrays.items()}
        if isinstance(arrays, dict)
        else tuple(array[:EXAMPLES] for array in arrays)
    )
    model = export_onnx(exportable(unwrapped(module)), few, opset=opset)
    examples = _samples(model, arrays, EXAMPLES)
    return rewrite(canonicalize(model, examples, opset=opset), examples)


def _samples(model: ir.Model, arrays: Any, count: int) -> dict[str, np.ndarray[Any, Any]]:
    names = [value.name or "" for value in model.graph.inputs]
    given = arrays if isinstance(arrays, dict) else dict(zip(names, arrays, strict=True))
    return {name: np.asarray(given[name])[:count] for name in names}
