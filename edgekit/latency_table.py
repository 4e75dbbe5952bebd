"""How long each layer of a model takes on a target with other numbers of channels, by measurement.

A layer alone is a model of a few copies of its node, which read one input side by side: enough of them that what surrounds a layer,
the call and the change of memory layout, weighs little. All such models go through one worker, one after the other, in
rounds of bursts, forwards and backwards, as the benchmark's candidates do. Times are kept in the user's cache.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from edgekit.backend import Artifact, Backend
from edgekit.errors import BackendError, OutputError
from edgekit.graph.io import save_onnx
from edgekit.layer_shape import LayerShape, one_layer
from edgekit.measure import NOISY_SPREAD, bootstrap_median
from edgekit.output import write_text
from edgekit.progress import Progress, silent
from edgekit.records import read_record
from edgekit.target import Target
from edgekit.toml_file import Table
from edgekit.worker import Worker, usable_cpus

Widths = tuple[tuple[int, ...], tuple[int, ...]]
"""Numbers of input channels and of output channels to measure a layer with, each ascending."""
MACS_AT_ONCE = 16_000_000
"""So many copies of a layer are measured at once that they have these multiply-accumulates, ..."""
FEWEST_COPIES, MOST_COPIES = 2, 16
"""... but no fewer and no more than these."""
MOST_FILES = 16
"""So many models are on disk at a time, and take turns."""
WARMUP = 5
"""Inferences in front of each burst that do not count: the worker never rests, so only the model is cold."""
QUARTILE = 25
"""Of a burst's inferences so many per cent are faster than the time it stands for: what other programs take comes on top, and a burst
is short."""
_PRECISION = "f32"
_Points = dict[str, tuple[LayerShape, tuple[int, int]]]
"""Layers and their channels, by key."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to measure: `rounds` of a burst of `seconds` for each point; up to three times as many where they differ."""

    rounds: int = 3
    seconds: float = 0.04


class PointTime(Table):
    """How long a layer takes.

    Attributes:
        median_ms: of its bursts (ms).
        low_ms, high_ms: the 95 % interval of that (ms).
    """

    median_ms: float
    low_ms: float
    high_ms: float

    @property
    def noisy(self) -> bool:
        """Whether the interval is wide."""
        return self.high_ms - self.low_ms > NOISY_SPREAD * self.median_ms


class _Stored(Table):
    """A file of the cache: what the times depend on, and the times by layer and channels."""

    setup: dict[str, str]
    times: dict[str, PointTime]


@dataclass(frozen=True, slots=True)
class LatencyTable:
    """Times of layers by their numbers of channels.

    Attributes:
        grids: for each layer the numbers of channels that were measured, and the times (ms), `(inputs, outputs)`.
        points: every time, by layer and its channels.
        measured: how many of them are new.
        remarks: what is doubtful, one sentence each.
    """

    grids: Mapping[str, tuple[Widths, NDArray[np.float64]]]
    points: Mapping[tuple[str, int, int], PointTime]
    measured: int
    remarks: tuple[str, ...]

    def time(self, layer: str, inputs: int, outputs: int) -> float:
        """The time of a layer (ms) with so many input and output channels, linear between those that were measured.

        Fewer channels than were measured are said to take as long as the fewest. A layer that the table does not know takes no
        time: it is in what all layers together leave of the whole model's time.
        """
        if layer not in self.grids:
            return 0.0
        (some_inputs, some_outputs), times = self.grids[layer]
        rows = [float(np.interp(outputs, some_outputs, row)) for row in times]
        return float(np.interp(inputs, some_inputs, rows))


def time_layers(
    shapes: Mapping[str, LayerShape],
    widths: Mapping[str, Widths],
    target: Target,
    backend: Backend,
    *,
    cache: Path | None = None,
    effort: Effort = Effort(),
    on_progress: Progress = silent,
) -> LatencyTable:
    """Measure, in float32 and one sample at a time, what the cache does not have.

    Args:
        shapes: of the layers, by name; see `layer_shapes`.
        widths: for each layer the numbers of channels to measure; a layer that is not named is measured as it is, and one that has no
            shape is remarked on.
        target, backend: where.
        cache: a folder; None is the user's own, see `cache_folder`. A damaged file in it is made anew, and noisy times are not kept.
        effort: how long; what was measured with another effort is not reused.
        on_progress: told of each layer that is measured.

    A layer that the runtime refuses is left out of the table, with a remark.

    Raises:
        BackendError: the runtime, or the device, is not here.
    """
    here = backend.available(target)
    if not here.can_run:
        raise BackendError(f"layers cannot be timed for target {target.name!r}: {here.reason}; {here.remedy}")
    grids = {name: _widths(shape, widths.get(name)) for name, shape in shapes.items()}
    setup = _setup(target, backend, effort)
    store = _Store((cache or cache_folder()) / f"{_digest(setup)}.json", setup)
    known, remarks = store.read(), _unknown([name for name in widths if name not in shapes])
    missing = _missing(shapes, grids, known)
    with (
        tempfile.TemporaryDirectory(prefix="edgekit-") as folder,
        _Bench(target, backend, effort, Path(folder)) as bench,
    ):
        for done, points in enumerate(missing):
            on_progress("time layers", done, len(missing))
            try:
                found = bench.time(points)
            except BackendError as error:
                remarks.append(f"a layer could not be timed ({next(iter(points.values()))[0].summary}): {error}")
                continue
            known |= found
            try:
                store.add({key: point for key, point in found.items() if not point.noisy})
            except OutputError as error:
                remarks.append(f"the times of layers are not kept for the next run: {error}")
    on_progress("time layers", len(missing), len(missing))
    return _table(shapes, grids, known, sum(map(len, missing)), remarks)


def _unknown(names: Sequence[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"not timed, because the graph has no such layer or leaves its size open: {', '.join(names[:3])}{more}"]


def cache_folder() -> Path:
    """Where times are kept: in `$XDG_CACHE_HOME`, or `~/.cache`."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if root else Path.home() / ".cache") / "edgekit" / "latency"


def _widths(shape: LayerShape, widths: Widths | None) -> Widths:
    inputs, outputs = widths or ((shape.inputs,), (shape.outputs,))
    return ((shape.inputs,) if shape.depthwise else inputs), outputs


def _points(widths: Widths) -> list[tuple[int, int]]:
    return [(inputs, outputs) for inputs in widths[0] for outputs in widths[1]]


def _missing(
    shapes: Mapping[str, LayerShape], grids: Mapping[str, Widths], known: Mapping[str, PointTime]
) -> list[_Points]:
    """What is to be measured, in parts: layers that differ in channels only, some at a time."""
    kinds: dict[str, _Points] = {}
    for name, shape in shapes.items():
        for channels in _points(grids[name]):
            key = shape.key(*channels)
            if key not in known:
                kinds.setdefault(shape.text, {}).setdefault(key, (shape, channels))
    lists = (list(points.items()) for points in kinds.values())
    return [dict(some[i : i + MOST_FILES]) for some in lists for i in range(0, len(some), MOST_FILES)]


def _table(
    shapes: Mapping[str, LayerShape],
    grids: Mapping[str, Widths],
    known: Mapping[str, PointTime],
    measured: int,
    remarks: Sequence[str],
) -> LatencyTable:
    points = {
        (name, *channels): known[key]
        for name, shape in shapes.items()
        for channels in _points(grids[name])
        if (key := shape.key(*channels)) in known
    }
    times = {
        name: (
            widths,
            np.array([[points[name, i, o].median_ms for o in widths[1]] for i in widths[0]], np.float64),
        )
        for name, widths in grids.items()
        if all((name, *channels) in points for channels in _points(widths))
    }
    noisy = [f"{name} {i} to {o}" for (name, i, o), point in points.items() if point.noisy]
    if noisy:
        more = f" and {len(noisy) - 3} more" if len(noisy) > 3 else ""
        remarks = [
            *remarks,
            f"{len(noisy)} of {len(points)} times of layers are noisy (intervals wider than {NOISY_SPREAD:.0%}): "
            f"{', '.join(noisy[:3])}{more}; close other programs and measure again",
        ]
    return LatencyTable(times, points, measured, tuple(remarks))


@dataclass(slots=True)
class _Bench:
    """Builds models of one layer and times them, all in one worker."""

    target: Target
    backend: Backend
    effort: Effort
    folder: Path
    slot: Worker | None = None
    converts: bool | None = None

    def __enter__(self) -> _Bench:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    def time(self, points: _Points) -> dict[str, PointTime]:
        """The times of one layer, by key."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            built = {key: _built(Path(folder) / str(i), *point) for i, (key, point) in enumerate(points.items())}
            try:
                artifacts = {key: self._artifact(one) for key, one in built.items()}
                bursts: dict[str, list[NDArray[np.int64]]] = {key: [] for key in points}
                for index in range(3 * self.effort.rounds):
                    again = [key for key in points if index < self.effort.rounds or _point(bursts[key], 1).noisy]
                    for key in again if index % 2 == 0 else reversed(again):
                        bursts[key].append(self._burst(artifacts[key], built[key].feeds))
            except BackendError:
                self._end()
                raise
        return {key: _point(bursts[key], one.copies) for key, one in built.items()}

    def _artifact(self, one: _Built) -> Artifact:
        """What the runtime loads: the ONNX file where it takes that, because a conversion takes seconds; else what it converts that to."""
        as_it_is = Artifact(one.path, (one.path,), _PRECISION)
        if self.converts is None:
            try:
                self._load(as_it_is)
                self.converts = False
            except BackendError:
                self._end()
                self.converts = True
        if not self.converts:
            return as_it_is
        return self.backend.convert(one.path, self.target, one.path.parent, precision=_PRECISION)

    def _burst(self, artifact: Artifact, feeds: Mapping[str, NDArray[np.float32]]) -> NDArray[np.int64]:
        return np.array(
            self._load(artifact).time(feeds, seconds=self.effort.seconds, iterations=None, warmup=WARMUP), np.int64
        )

    def _load(self, artifact: Artifact) -> Worker:
        if self.slot is None:
            self.slot = Worker(artifact, self.target, exact=True)
        else:
            self.slot.load(artifact)
        return self.slot

    def _end(self) -> None:
        if self.slot is not None:
            self.slot.close()
            self.slot = None


@dataclass(frozen=True, slots=True)
class _Built:
    path: Path
    copies: int
    feeds: Mapping[str, NDArray[np.float32]]


def _built(folder: Path, shape: LayerShape, channels: tuple[int, int]) -> _Built:
    folder.mkdir()
    copies = max(FEWEST_COPIES, min(MOST_COPIES, math.ceil(MACS_AT_ONCE / max(1, shape.macs(*channels)))))
    model = one_layer(shape, *channels, copies=copies)
    save_onnx(model, folder / "model.onnx")
    x = np.random.default_rng(0).normal(size=shape.input_shape(channels[0], channels[1])).astype(np.float32)
    return _Built(folder / "model.onnx", copies, {"x": x})


def _point(bursts: Sequence[NDArray[np.int64]], copies: int) -> PointTime:
    times = np.array([np.percentile(burst, QUARTILE) for burst in bursts]) / (1e6 * copies)
    low, high = bootstrap_median(times)
    return PointTime(median_ms=float(np.median(times)), low_ms=low, high_ms=high)


@dataclass(frozen=True, slots=True)
class _Store:
    """A file of the cache."""

    path: Path
    setup: dict[str, str] = field(hash=False)

    def read(self) -> dict[str, PointTime]:
        """What is known; nothing where there is no file, or one that cannot be read."""
        try:
            found = read_record(self.path, _Stored, remedy="measure again")
        except OutputError:
            return {}
        return dict(found.times) if found.setup == self.setup else {}

    def add(self, times: Mapping[str, PointTime]) -> None:
        """Write more times to the file, beside what other runs wrote meanwhile."""
        everything = _Stored(setup=self.setup, times={**self.read(), **times})
        write_text(self.path, json.dumps(everything.model_dump(mode="json"), indent=1, sort_keys=True) + "\n")


def _setup(target: Target, backend: Backend, effort: Effort) -> dict[str, str]:
    """All that a layer's time depends on but the layer."""
    return {
        "target": target.name,
        "backend": target.backend,
        "runtime": backend.available(target).version,
        "options": json.dumps(target.runtime.options, sort_keys=True),
        "threads": str(min(target.runtime.threads, usable_cpus())),
        "cpu": _cpu(),
        "effort": f"{effort.rounds} x {effort.seconds:g} s",
    }


def _digest(setup: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(setup, sort_keys=True).encode()).hexdigest()[:16]


def _cpu() -> str:
    """The CPU's model, as the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "CPU part")))
    return f"{platform.machine()} {next(named, platform.processor())}"
