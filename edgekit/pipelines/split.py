"""Which samples calibrate, and which are held back to verify exports with."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgekit.data import Batch, BoundData
from edgekit.data.samples import LABELS
from edgekit.errors import DataError
from edgekit.graph.run import Session
from edgekit.graph.sizes import samples_at_once

HELD_BACK_SAMPLES = 64
MOST_HELD_BACK = 256
"""Where samples are small: a share of 0.98 is better told by many."""
HELD_BACK_BYTES = 32 * 2**20
"""That so many may take."""
MOST_DECIDING = 512
DECIDING_BYTES = 256 * 2**20
"""Of samples, and what the model makes of them, that decide whether a quantized one is good enough."""
STORED_BYTES = 128 * 2**20
"""Of samples, that an export may judge by."""
BATCH_SIZE = 8
AT_ONCE_BYTES = 1 << 20
"""Of samples that are run together where every activation of theirs may be held: a network's are a hundred times as large, or more."""

Arrays = dict[str, NDArray[np.generic]]


def first_batch(data: BoundData, count: int) -> Arrays:
    """The first `count` samples, or as many as the model takes at a time.

    Raises:
        DataError: there are none.
    """
    batch = next(data.batches(count), None)
    if batch is None:
        raise DataError("the calibration data holds no samples; give at least one (a few hundred make good ranges)")
    return batch.feeds


def feeds_of(data: BoundData, graph: ir.Model, start: int = 0, stop: int | None = None) -> list[Arrays]:
    """Samples to run, as many together as are cheap to hold with the activations that `graph` makes of them."""
    first = next(data.batches(1), None)
    if first is None:
        return []
    size = sum(array.nbytes for array in first.feeds.values()) // max(1, len(first))
    together = samples_at_once(graph, first.feeds, max(1, min(BATCH_SIZE, AT_ONCE_BYTES // max(1, size))))
    return [batch.feeds for batch in data.batches(together, start, stop)]


def deciding(held: BoundData, data: BoundData, calibrating: int, graph: ir.Model) -> list[Arrays]:
    """What decides whether a quantized model is good enough: the samples held back, and some of the first `calibrating` ones of `data`.

    Ranges are a few numbers chosen by many samples: they flatter these by little. (Of what a detector finds, both sides counted: 0.971
    of 417 the same in those that calibrated, 0.988 of 164 in those held back, which was luck, and 0.960 of 1,114 in others.)
    """
    feeds = feeds_of(held, graph)
    if not feeds or _all_calibrate(data, calibrating):
        return feeds
    count = sum(map(len, held.batches(BATCH_SIZE)))
    first = next(held.batches(1))
    made = Session(graph, optimize=True).run(first.feeds).values()
    size = sum(array.nbytes for array in (*first.feeds.values(), *made) if isinstance(array, np.ndarray))
    more = min(calibrating, MOST_DECIDING - count, DECIDING_BYTES * len(first) // max(1, size) - count)
    more -= more % _at_a_time(data)
    return feeds + feeds_of(data, graph, 0, more) if more > 0 else feeds


def save_deciding(path: Path, data: BoundData, calibrating: int, most: int, held: Arrays) -> int:
    """Write `most` of the first `calibrating` samples, to judge exports by beside those `held` back, while there is room; returns how many.

    None where those that are held back calibrated too.
    """
    if most <= 0 or _all_calibrate(data, calibrating):
        return 0
    room = STORED_BYTES - sum(array.nbytes for array in held.values())
    joined = _Joined(data, least=0, most=min(most, calibrating), size=room)
    count = joined.fill(0)
    if count:
        save_arrays(path, joined.arrays)
    return count


def _all_calibrate(data: BoundData, calibrating: int) -> bool:
    """Whether nothing is left to hold back: then what is held back calibrated too."""
    return next(data.batches(1, calibrating), None) is None


def calibrating_samples(data: BoundData, wished: int) -> int:
    """How many samples calibrate: as many as wished, or where there is too little, all but a quarter; in whole batches."""
    count, unit = wished, _at_a_time(data)
    size = data.size
    if size is None:  # a function: it is read once to know
        size = sum(len(batch) for batch in data.batches(BATCH_SIZE, 0, wished + HELD_BACK_SAMPLES))
    if size < wished + HELD_BACK_SAMPLES:
        count = min(wished, size - max(unit, min(HELD_BACK_SAMPLES, size // 4)))
    return max(unit, count - count % unit)


def held_back(data: BoundData, calibrating: int) -> tuple[Arrays, int, str]:
    """Samples that calibration does not see, as arrays that `open_data` reads back, how many, and a note if there is one.

    There are only calibration's own where nothing is left, and only those that have one shape fit into arrays. Where the model takes
    so many at a time, each row is a call as it came: its first axis may be time, whose order matters.
    """
    note, joined = "", _Joined(data)
    held = joined.fill(calibrating)
    if not held:
        note = "no samples were left to verify exports with: they are verified on those that calibrated"
        held = joined.fill(0)
    if joined.left_out:
        note = f"{joined.left_out} of {joined.batches} batches of held-back samples have another shape and are left out"
    return joined.arrays, held, note


class _Joined:
    """Batches written one behind the other into arrays: at no time is there a second copy of them.

    There are `most` of them, in no more than `size` bytes where they are more than the `least`.

    Attributes:
        arrays: by input, and labels where every batch has some. Where the model takes so many samples at a time, a row is a batch.
        batches, left_out: how many were read, and how many of them have another shape than the first.
    """

    def __init__(
        self,
        data: BoundData,
        *,
        least: int = HELD_BACK_SAMPLES,
        most: int = MOST_HELD_BACK,
        size: int = HELD_BACK_BYTES,
    ) -> None:
        self.arrays: Arrays = {}
        self.batches = self.left_out = 0
        self._data, self._unit, self._size = data, _at_a_time(data), size
        self._least, self._most = (-(-count // self._unit) * self._unit for count in (least, most))

    def fill(self, start: int) -> int:
        """Take samples from `start` on, more of small ones; returns how many they are."""
        held = rows = 0
        names: set[str] = set()
        for batch in self._enough(start):
            self.batches += 1
            row = self._row(batch)
            if not rows:
                # Of what is never written the system keeps no pages.
                room = self._room(batch, start)
                self.arrays = {name: np.empty((room, *one.shape[1:]), one.dtype) for name, one in row.items()}
                names = set(row)
            if any(name in row and row[name].shape[1:] != self.arrays[name].shape[1:] for name in batch.feeds):
                self.left_out += 1
                continue
            names &= set(row)
            count = len(next(iter(row.values())))
            for name in names:
                wide = np.promote_types(self.arrays[name].dtype, row[name].dtype)  # text may get longer
                self.arrays[name] = self.arrays[name].astype(wide, copy=False)
                self.arrays[name][rows : rows + count] = row[name]
            rows, held = rows + count, held + len(batch)
        self.arrays = {name: self.arrays[name][:rows] for name in self.arrays if name in names}
        return held

    def _room(self, batch: Batch, start: int) -> int:
        """Samples that there may be, by the size of the first ones."""
        own = sum(array.nbytes for array in batch.feeds.values()) // max(1, len(batch))
        enough = max(self._least, self._size // max(1, own)) + max(BATCH_SIZE, self._unit)
        found = min(self._most, enough)
        return found if self._data.size is None else min(found, self._data.size - start)

    def _row(self, batch: Batch) -> Arrays:
        """What goes into the arrays of a batch: its samples, or the whole batch as one row."""
        found: Arrays = dict(batch.feeds)
        if batch.labels is not None and LABELS not in found:
            found[LABELS] = np.asarray(batch.labels)
        calls = batch.single or self._unit > 1
        return {name: array[None] for name, array in found.items()} if calls else found

    def _enough(self, start: int) -> Iterator[Batch]:
        count = size = 0
        for batch in self._data.batches(BATCH_SIZE, start, start + self._most):
            own = sum(array.nbytes for array in batch.feeds.values())
            if count >= self._least and size + own > self._size:
                return
            yield batch
            count, size = count + len(batch), size + own


def save_arrays(path: Path, arrays: Mapping[str, NDArray[np.generic]]) -> None:
    """An `.npz` file, the same bytes each time. `np.savez` would take an input named `file` for its own argument."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)


def _at_a_time(data: BoundData) -> int:
    """How many samples the model takes at least: the size of a static batch axis, else 1."""
    return max((len(batch) for batch in islice(data.batches(1), 1)), default=1)
