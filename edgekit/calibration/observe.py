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
from queue import SimpleQueue

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgekit.calibration.padding import padding_mask, without_padding
from edgekit.data import Batch
from edgekit.errors import DataError
from edgekit.graph.run import Session, with_outputs
from edgekit.quant.observers import EVERY, HistogramObserver

Observers = dict[ir.Value, HistogramObserver]

WORKERS = 4
"""The most samples under way at once: each holds the activations of one sample. More threads go into each inference."""


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
    threads = threads or os.cpu_count() or 1
    workers = min(threads, WORKERS)
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
        for size in _in_order(pool, workers, count, batches, cut=open_batch_axis(model)):
            seen += size
            if on_batch is not None and size:
                on_batch(size)
    if not seen:
        raise DataError("the calibration data holds no samples; give at least one (a few hundred make good ranges)")
    for team in teams[1:]:
        for value, observer in team.items():
            teams[0][value].merge(observer)
    return teams[0]


class _Watch:
    """A session that shows the values of a graph; several threads may use it at once, with observers of their own."""

    def __init__(self, model: ir.Model, values: list[ir.Value], *, threads: int) -> None:
        self._inputs = [value for value in values if value.is_graph_input()]
        self._computed = [value for value in values if not value.is_graph_input()]
        self._names = [value.name or "" for value in self._computed]
        if self._computed:
            self._session = Session(with_outputs(model, set(self._names)), optimize=True, threads=threads)

    def update(self, observers: Observers, feeds: dict[str, NDArray[np.generic]]) -> None:
        """Run one sample and let the observers see it; each activation is let go of as soon as it was seen."""
        for value in self._inputs:
            _update(observers[value], feeds[value.name or ""], value)
        if not self._computed:
            return
        arrays = self._session.run(feeds, outputs=self._names)
        mask = padding_mask(feeds)
        for value, name in zip(self._computed, self._names, strict=True):
            _update(observers[value], without_padding(arrays.pop(name), None if _has_maps(value) else mask), value)


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
        samples = _samples(batch) if cut and not batch.single else [batch.feeds]
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


def _samples(batch: Batch) -> list[dict[str, NDArray[np.generic]]]:
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
