"""The first pass over the calibration data: what range each tensor has over the samples.

Memory is flat in the number of samples: samples run one at a time in each worker, and their activations are folded into
histograms and forgotten. A sample counts the same whatever stood beside it in its batch, and the histograms add up exactly, so
they depend neither on the order of the samples nor on how they are cut into batches.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from queue import SimpleQueue

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgekit.calibration.padding import padding_mask, without_padding
from edgekit.data import Batch
from edgekit.errors import DataError
from edgekit.graph.probe import Probe
from edgekit.graph.sizes import WATCHED_BYTES
from edgekit.quant.observers import EVERY, HistogramObserver

Observers = dict[ir.Value, HistogramObserver]

NO_SAMPLES = "the calibration data holds no samples; give at least one (a few hundred make good ranges)"

WORKERS = 4
"""The most samples under way at once: each holds the activations of one sample. More threads go into each inference, and where samples
are large, fewer are under way.
"""


def observe(
    model: ir.Model,
    values: list[ir.Value],
    batches: Iterable[Batch],
    *,
    threads: int,
    on_batch: Callable[[int], None] | None,
    stride: int = EVERY,
) -> Observers:
    """Run `model` over the batches and observe the values of graph `values`: see the module.

    A sample is an index of axis 0 of a batch where the model's inputs leave that axis open, else a batch.

    Args:
        model: float.
        values: of its graph, activations.
        batches: in any order, of any sizes and shapes; read from the calling thread.
        threads: that infer and count; 0 uses all processors.
        on_batch: told the number of samples of each batch once it is counted, from the calling thread.
        stride: of the sample that histograms are made of; extremes and rare values are exact: see `HistogramObserver`.

    Raises:
        DataError: no samples, or a tensor becomes NaN or Inf.
        GraphError: ONNX Runtime cannot load or run the model.
    """
    if not values:
        return {}
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise DataError(NO_SAMPLES)
    cut = open_batch_axis(model)
    threads = threads or os.cpu_count() or 1
    workers = _workers(model, values, next(iter(_samples(first, cut=cut)), first.feeds), threads)
    watch = _Watch(model, values, threads=threads // workers)
    idle: SimpleQueue[Observers] = SimpleQueue()
    teams = [{value: HistogramObserver(stride=stride) for value in values} for _ in range(workers)]
    for team in teams:
        idle.put(team)

    def count(feeds: dict[str, NDArray[np.generic]]) -> None:
        team = idle.get()
        try:
            watch.update(team, feeds)
        finally:  # or the others would wait for it for ever
            idle.put(team)

    seen = 0
    with ThreadPoolExecutor(workers) as pool:
        for size in _in_order(pool, workers, count, chain([first], batches), cut=cut):
            seen += size
            if on_batch is not None and size:
                on_batch(size)
    if not seen:
        raise DataError(NO_SAMPLES)
    for team in teams[1:]:
        for value, observer in team.items():
            teams[0][value].merge(observer)
    return teams[0]


def _workers(model: ir.Model, values: list[ir.Value], feeds: dict[str, NDArray[np.generic]], threads: int) -> int:
    """How many samples like `feeds` may be under way."""
    held = _probe(model, values, threads=1).bytes_at_once(feeds)
    return max(1, min(threads, WORKERS, WATCHED_BYTES // max(1, held)))


def _probe(model: ir.Model, values: list[ir.Value], *, threads: int) -> Probe:
    names = [value.name or "" for value in values]
    return Probe(model, names, optimize=True, threads=threads)


class _Watch:
    """What shows the values of a graph; several threads may use it at once, with observers of their own."""

    def __init__(self, model: ir.Model, values: list[ir.Value], *, threads: int) -> None:
        self._values = {value.name or "": value for value in values}
        self._probe = _probe(model, values, threads=threads)

    def update(self, observers: Observers, feeds: dict[str, NDArray[np.generic]]) -> None:
        """Run one sample and let the observers see it; each activation is let go of as soon as it was seen."""
        mask = padding_mask(feeds)
        for arrays in self._probe.run(feeds):
            for name in list(arrays):
                value = self._values[name]
                whole = value.is_graph_input() or _has_maps(value)
                _update(observers[value], without_padding(arrays.pop(name), None if whole else mask), value)


def _in_order(
    pool: ThreadPoolExecutor,
    workers: int,
    count: Callable[[dict[str, NDArray[np.generic]]], None],
    batches: Iterable[Batch],
    *,
    cut: bool,
) -> Iterator[int]:
    """Have the pool count all samples, few of them waiting; the number of samples of each batch, once all are counted."""
    running: deque[tuple[Future[None], int]] = deque()
    for batch in batches:
        samples = _samples(batch, cut=cut)
        for index, feeds in enumerate(samples):
            last = index == len(samples) - 1
            running.append((pool.submit(count, feeds), len(batch) if last else 0))
            if len(running) > workers:
                yield _finished(running)
    while running:
        yield _finished(running)


def _finished(running: deque[tuple[Future[None], int]]) -> int:
    future, size = running.popleft()
    future.result()
    return size


def _samples(batch: Batch, *, cut: bool) -> list[dict[str, NDArray[np.generic]]]:
    if not cut or batch.single:
        return [batch.feeds]
    return [{name: array[i : i + 1] for name, array in batch.feeds.items()} for i in range(len(batch))]


def open_batch_axis(model: ir.Model) -> bool:
    """Whether every input leaves the size of axis 0 open."""
    return all(value.shape and not isinstance(value.shape[0], int) for value in model.graph.inputs)


def _has_maps(value: ir.Value) -> bool:
    """Whether axis 1 of a value is that of the channels of a convolution, not of tokens."""
    nodes = [value.producer(), *(use.node for use in value.uses())]
    return any(
        node is not None and (node.op_type.startswith("Conv") or node.op_type.endswith("Pool")) for node in nodes
    )


def _update(observer: HistogramObserver, array: NDArray[np.generic], value: ir.Value) -> None:
    try:
        observer.update(array)
    except DataError as error:
        raise DataError(
            f"tensor {value.name!r} becomes NaN or Inf during calibration ({error}); check the checkpoint and the preprocessing"
        ) from error
