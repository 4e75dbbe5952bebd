"""Placement by measured time: which layers a runtime runs faster in float than in int8, found by timing, a group of layers at a time.

Whether int8 pays is a matter of kernels and of the conversions at the borders between int8 and float, which no rule of thumb foretells: a
thin stem and its depthwise convolutions may each be slower in float alone, and faster together. So what is tried are regions as well
as single layers, each as a whole artifact, timed against the best so far.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

import edgekit
from edgekit.backend import Artifact, Backend, Feeds
from edgekit.errors import BackendError, OutputError
from edgekit.graph.fingerprint import fingerprint
from edgekit.graph.io import save_onnx
from edgekit.graph.operators import LINEAR, int_attribute, layers
from edgekit.graph.rules import quantized_nodes
from edgekit.measure import Candidate, Comparison, Ratio, measure
from edgekit.output import write_text
from edgekit.progress import Progress, silent
from edgekit.records import PlacementStep, TunedPlacement, read_record
from edgekit.target import Target

MOST_AT_ONCE = 3
"""Changes that are timed against the best so far in one go; each takes a process of its own."""
BURSTS, BURST_SECONDS = 7, 0.1
"""With fewer bursts than 7, one that another program disturbed decides the 95 % interval."""
FINAL_BURSTS, FINAL_BURST_SECONDS = 11, 0.2
"""Of the check of the result against the start."""
FEWEST_CHANNELS = 4
"""A convolution of no more input channels than these is a stem."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A quantized layer, with the lighter quantized operators up to the next one.

    Attributes:
        names: of its nodes, the layer's first.
        kind: "stem", "depthwise", "conv" or "product".
        shape: of the layer's output, without the batch.
        channels: of the output.
        intensity: multiply-accumulates for each element of the output: the less, the less int8 has to gain.
    """

    names: tuple[str, ...]
    kind: str
    shape: tuple[int | None, ...]
    channels: int
    intensity: float


@dataclass(frozen=True, slots=True)
class Change:
    """What is tried: some units in float where they are in int8 now, and the other way round, or in float and nothing else."""

    what: str
    units: frozenset[Unit]
    alone: bool = False


def tune_placement(
    model: ir.Model,
    target: Target,
    backend: Backend,
    feeds: Feeds,
    *,
    keep_float: frozenset[str] = frozenset(),
    time_budget_s: float = 120.0,
    on_progress: Progress = silent,
) -> TunedPlacement:
    """Find which layers `backend` runs faster in float, by timing artifacts against each other.

    1. Tried are: everything in float; only the first 1, 2, 4, 8, ... layers; then layers next to the border between float and int8,
       convolutions up to a width, and runs of layers with one output size or of equal ones, in or out. Those with the least work for
       each element go to float first, those with the most to int8.
    2. Up to `MOST_AT_ONCE` changes are timed in one go, interleaved with the best so far. The fastest is kept if the 95 % interval of
       its ratio is above 1; others that were faster are timed again on top of it.
    3. At the end the result is timed against the start, longer; where that does not show it faster, the start is the result.

    Args:
        model: float, with quant attributes.
        target, backend: what it is lowered, converted and run with.
        feeds: of one inference; their leading dimension is the batch size that matters.
        keep_float: names of nodes that are not to be quantized whatever the time.
        time_budget_s: seconds for all of it. A change is tried only if what one took so far leaves time for the last check, which is always
            made; only the first change, of which nothing is known yet, may take longer than there is time.
        on_progress: told of each change, with the seconds gone and the seconds allowed.

    Raises:
        BackendError: the runtime does not take or run the model that this starts from.
    """
    key = placement_key(model, target, backend, feeds, keep_float=keep_float)
    runtime = backend.available(target).version
    with tempfile.TemporaryDirectory(prefix="edgekit-") as folder:
        bench = _Bench(model, target, backend, feeds, keep_float, Path(folder))
        tuning = _Tuning(units(model, target, keep_float=keep_float), bench, time_budget_s, on_progress)
        finished = tuning.run()
        chosen, final = tuning.check()
    names = sorted(keep_float | chosen)
    record = TunedPlacement(
        key=key,
        target=target.name,
        runtime=runtime,
        keep_float=tuple(names),
        steps=tuple(tuning.steps),
        finished=finished,
    )
    if final is None:
        return record
    ratio = final.ratios["tuned"]
    baseline_ms, tuned_ms = (timing.median_ms for timing in final.timings)
    kept = {"ratio": ratio.median, "ci_low": ratio.ci_low, "ci_high": ratio.ci_high, "tuned_ms": tuned_ms}
    return record.model_copy(update={"baseline_ms": baseline_ms} | (kept if chosen else {"tuned_ms": baseline_ms}))


def units(model: ir.Model, target: Target, *, keep_float: frozenset[str] = frozenset()) -> list[Unit]:
    """The quantized layers of the annotated `model`, in graph order, each with the lighter quantized operators behind it."""
    costs = {layer.name: layer for layer in layers(model)}
    groups: list[list[ir.Node]] = []
    for node in quantized_nodes(model, target, keep_float=keep_float):
        if node.op_type in LINEAR or not groups:
            groups.append([])
        groups[-1].append(node)
    found = []
    for nodes in groups:
        layer = costs.get(nodes[0].name or "")
        shape = (layer.output_shape or ())[1:] if layer is not None else ()
        elements = math.prod(size or 1 for size in shape)
        channels = (shape[0] if nodes[0].op_type.startswith("Conv") else shape[-1]) if shape else 1
        names = tuple(node.name or "" for node in nodes)
        intensity = (layer.macs if layer is not None else 0) / elements
        found.append(Unit(names, _kind(nodes[0]), shape, channels or 1, intensity))
    return found


def _kind(node: ir.Node) -> str:
    if not node.op_type.startswith("Conv"):
        return "product"
    source = node.inputs[0]
    width = source.shape[1] if source is not None and source.shape is not None and len(source.shape) > 1 else None
    group = int_attribute(node, "group", 1)
    if group > 1 and group == width:
        return "depthwise"
    return "stem" if isinstance(width, int) and width <= FEWEST_CHANNELS else "conv"


def fronts(found: Sequence[Unit]) -> list[Change]:
    """Everything in float; then the first half of the layers alone, a quarter, ..., in powers of 2."""
    if not found:
        return []
    counts = [2**i for i in range(len(found).bit_length()) if 2**i < len(found)]
    first = (Change(f"the first {count} layers alone", frozenset(found[:count]), alone=True) for count in counts[::-1])
    return [Change("all layers", frozenset(found), alone=True), *first]


def regions(found: Sequence[Unit]) -> list[Change]:
    """Thin convolutions, and runs of like layers, each once; those with the least work for each element first."""
    distinct: dict[frozenset[Unit], Change] = {}
    for change in (*_runs(found), *_thin(found)):
        distinct.setdefault(change.units, change)
    distinct.pop(frozenset(found), None)
    return sorted(distinct.values(), key=lambda change: _intensity(change.units))


def _thin(found: Sequence[Unit]) -> Iterator[Change]:
    widest = max((unit.channels for unit in found), default=0)
    for width in (2**i for i in range(3, widest.bit_length() + 1)):
        for kind in ("depthwise", "conv"):
            thin = frozenset(unit for unit in found if unit.kind == kind and unit.channels <= width)
            if thin:
                yield Change(f"{kind} layers of at most {width} channels", thin)


def _runs(found: Sequence[Unit]) -> Iterator[Change]:
    """Layers in a row of one output size, and of one kind and shape."""
    for signature in (lambda unit: unit.shape[1:], lambda unit: (unit.kind, unit.shape, unit.intensity)):
        start = 0
        for end in range(1, len(found) + 1):
            if end == len(found) or signature(found[end]) != signature(found[start]):
                yield Change(_called(found[start:end]), frozenset(found[start:end]))
                start = end


def _called(run: Sequence[Unit]) -> str:
    return run[0].names[0] if len(run) == 1 else f"{run[0].names[0]} to {run[-1].names[0]}"


def _intensity(some: frozenset[Unit]) -> float:
    elements = {unit: math.prod(size or 1 for size in unit.shape) for unit in some}
    return sum(unit.intensity * elements[unit] for unit in some) / max(1, sum(elements.values()))


@dataclass(slots=True)
class _Bench:
    """Builds artifacts and times them."""

    model: ir.Model
    target: Target
    backend: Backend
    feeds: Feeds
    keep_float: frozenset[str]
    folder: Path
    built: dict[frozenset[str], Artifact | str] = field(default_factory=dict)

    def build(self, floats: frozenset[str]) -> Artifact | str:
        """The artifact with some nodes in float, or why there is none."""
        if floats not in self.built:
            folder = self.folder / str(len(self.built))
            folder.mkdir()
            lowered = self.backend.lower(self.model, self.target, keep_float=self.keep_float | floats)
            save_onnx(lowered, folder / "model.onnx")
            try:
                self.built[floats] = self.backend.convert(folder / "model.onnx", self.target, folder, precision="int8")
            except BackendError as error:
                self.built[floats] = str(error)
        return self.built[floats]

    def time(self, artifacts: dict[str, Artifact], *, bursts: int, burst_seconds: float) -> Comparison:
        """Time artifacts, by label, against the first; raises BackendError where that does not run."""
        candidates = [Candidate(label, artifact, self.target) for label, artifact in artifacts.items()]
        found = measure(candidates, self.feeds, bursts=bursts, burst_seconds=burst_seconds)
        if candidates[0].label in found.failures:
            raise BackendError(found.failures[candidates[0].label])
        return found


@dataclass(slots=True)
class _Tuning:
    """The search: what is in float now, what is still to be tried, and what was."""

    units: Sequence[Unit]
    bench: _Bench
    time_budget_s: float
    on_progress: Progress
    floats: frozenset[Unit] = frozenset()
    steps: list[PlacementStep] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)
    longest: float = 0.0
    tried: set[frozenset[Unit]] = field(default_factory=lambda: {frozenset()})

    def run(self) -> bool:
        """Try changes until there are none left (True) or the time is up."""
        near, far = fronts(self.units), regions(self.units)
        at_once = 1  # the first time alone: nothing is known yet of how long it takes
        while batch := self._pick(near, far, at_once):
            if self._gone() + self.longest * (len(batch) + 1) + self._expected_check() > self.time_budget_s:
                return False
            near[:0] = self._try(batch)
            at_once = MOST_AT_ONCE
        return True

    def _pick(self, near: list[Change], far: list[Change], count: int) -> list[Change]:
        """Take changes that lead to something new: fronts first, then of `near` in turn and, at least one, of `far` by promise."""
        batch: list[Change] = []
        while len(batch) < count and (near or far):
            turn = near and (near[0].alone or not far or len(batch) < count - 1)
            change = near.pop(0) if turn or not far else far.pop(self._most_promising(far))
            after = self._after(change)
            if after not in self.tried:
                self.tried.add(after)
                batch.append(change)
        return batch

    def _most_promising(self, far: Sequence[Change]) -> int:
        """The index of what has the least work for each element among changes to float, or the most among those to int8."""
        last = len(far) - 1
        return min(range(len(far)), key=lambda i: i if self._precision(far[i]) == "float" else last - i)

    def check(self) -> tuple[frozenset[str], Comparison | None]:
        """The names of what is to be float, and its timing against the start; nothing where that does not show it to be faster."""
        names = _names(self.floats)
        if not names:
            return names, None
        start, tuned = self.bench.build(frozenset()), self.bench.build(names)
        assert isinstance(start, Artifact) and isinstance(tuned, Artifact), "both ran already"
        found = self.bench.time(
            {"start": start, "tuned": tuned}, bursts=FINAL_BURSTS, burst_seconds=FINAL_BURST_SECONDS
        )
        if "tuned" not in found.ratios:
            return frozenset(), None
        return (names if found.ratios["tuned"].ci_low > 1 else frozenset()), found

    def _try(self, batch: Sequence[Change]) -> list[Change]:
        """Time some changes, keep the best one if it is faster, and say what is to be tried next."""
        begin = time.monotonic()
        now = self.bench.build(_names(self.floats))
        if isinstance(now, str):
            raise BackendError(now)
        artifacts = {"the best so far": now}
        failures: dict[str, str] = {}
        labels = {change: f"{change.what} in {self._precision(change)}" for change in batch}
        for change, label in labels.items():
            built = self.bench.build(_names(self._after(change)))
            if isinstance(built, str):
                failures[label] = built
            else:
                artifacts[label] = built
        found = self.bench.time(artifacts, bursts=BURSTS, burst_seconds=BURST_SECONDS)
        failures |= found.failures
        ratios = {change: found.ratios[label] for change, label in labels.items() if label in found.ratios}
        faster = sorted((one for one in ratios if ratios[one].ci_low > 1), key=lambda one: -ratios[one].median)
        for change, label in labels.items():
            kept = faster[:1] == [change]
            self.steps.append(self._step(change, ratios.get(change), failures.get(label, ""), kept))
        if faster:
            self.floats = self._after(faster[0])
        self.longest = max(self.longest, (time.monotonic() - begin) / (len(batch) + 1))
        self.on_progress("time placements", round(self._gone()), round(self.time_budget_s))
        return [*faster[1:], *self._borders()] if faster else []

    def _after(self, change: Change) -> frozenset[Unit]:
        """What is in float after a change: its units come in or, where all are in float already, go out."""
        if change.alone:
            return change.units
        return self.floats - change.units if change.units <= self.floats else self.floats | change.units

    def _precision(self, change: Change) -> str:
        """What a change makes of its layers."""
        return "int8" if change.units <= self.floats and not change.alone else "float"

    def _borders(self) -> Iterator[Change]:
        """The layers on both sides of each border between float and int8, those with the least work first."""
        beside = {
            unit
            for left, right in zip(self.units, self.units[1:], strict=False)
            if (left in self.floats) != (right in self.floats)
            for unit in (left, right)
        }
        ordered = sorted(beside, key=lambda unit: (unit in self.floats, unit.intensity, self.units.index(unit)))
        return (Change(unit.names[0], frozenset([unit])) for unit in ordered)

    def _step(self, change: Change, ratio: Ratio | None, failure: str, kept: bool) -> PlacementStep:
        names = tuple(unit.names[0] for unit in self.units if unit in change.units)
        step = PlacementStep(
            what=change.what, layers=names, precision=self._precision(change), kept=kept, failure=failure
        )
        if ratio is None:
            return step
        return step.model_copy(update={"ratio": ratio.median, "ci_low": ratio.ci_low, "ci_high": ratio.ci_high})

    def _gone(self) -> float:
        return time.monotonic() - self.start

    def _expected_check(self) -> float:
        """Seconds for the last check, by what a candidate took that ran for less."""
        more = FINAL_BURSTS * FINAL_BURST_SECONDS - BURSTS * BURST_SECONDS
        return 2 * (self.longest + more)


def _names(some: frozenset[Unit]) -> frozenset[str]:
    return frozenset(name for unit in some for name in unit.names)


def placement_key(
    model: ir.Model, target: Target, backend: Backend, feeds: Feeds, *, keep_float: frozenset[str] = frozenset()
) -> str:
    """Stands for all that the timing depends on, but the machine: model, target, versions, batch size, what has to be float."""
    parts = {
        "edgekit": edgekit.__version__,
        "model": fingerprint(model),
        "target": target.model_dump(mode="json"),
        "runtime": backend.available(target).version,
        "feeds": sorted((name, array.dtype.name, array.shape) for name, array in feeds.items()),
        "keep_float": sorted(keep_float),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read_placement(folder: Path, key: str) -> TunedPlacement | None:
    """What an earlier run stored in `folder` for the same key; None where there is nothing that can be read."""
    try:
        found = read_record(_path(folder, key), TunedPlacement, remedy="tune again")
    except OutputError:
        return None
    return found if found.key == key else None


def write_placement(folder: Path, placement: TunedPlacement) -> None:
    """Store a result in `folder`, by its key.

    Raises:
        OutputError: it cannot be written.
    """
    write_text(_path(folder, placement.key), json.dumps(placement.model_dump(mode="json"), indent=2) + "\n")


def _path(folder: Path, key: str) -> Path:
    return folder / f"placement-{key[:16]}.json"
