"""Which samples calibrate, and which are held back to verify exports with."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgekit.data import Batch, BoundData
from edgekit.data.samples import LABELS
from edgekit.errors import DataError
from edgekit.graph.sizes import samples_at_once

HELD_BACK_SAMPLES = 64
MOST_HELD_BACK = 256
"""Where samples are small: a share of 0.98 is better told by many."""
HELD_BACK_BYTES = 32 * 2**20
"""That so many may take."""
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
    batches = _some(data, calibrating)
    note = "" if batches else "no samples were left to verify exports with: they are verified on those that calibrated"
    batches = batches or _some(data, 0)
    first = batches[0]
    calls = first.single or _at_a_time(data) > 1
    skipped = 0 if calls else 1
    shapes = {name: array.shape[skipped:] for name, array in first.feeds.items()}
    fitting = [b for b in batches if all(b.feeds[name].shape[skipped:] == shape for name, shape in shapes.items())]
    join = np.stack if calls else np.concatenate
    arrays: Arrays = {name: join([batch.feeds[name] for batch in fitting]) for name in shapes}
    labels = [batch.labels for batch in fitting if batch.labels is not None]
    if len(labels) == len(fitting) and LABELS not in arrays:
        arrays[LABELS] = join(labels)
    if len(fitting) < len(batches):
        note = f"{len(batches) - len(fitting)} of {len(batches)} batches of held-back samples have another shape and are left out"
    return arrays, sum(map(len, fitting)), note


def _some(data: BoundData, start: int) -> list[Batch]:
    """The samples to hold back, from `start` on: more of small ones."""
    unit = _at_a_time(data)
    least, most = (-(-count // unit) * unit for count in (HELD_BACK_SAMPLES, MOST_HELD_BACK))
    found: list[Batch] = []
    count = size = 0
    for batch in data.batches(BATCH_SIZE, start, start + most):
        own = sum(array.nbytes for array in batch.feeds.values())
        if count >= least and size + own > HELD_BACK_BYTES:
            break
        found.append(batch)
        count, size = count + len(batch), size + own
    return found


def save_arrays(path: Path, arrays: Mapping[str, NDArray[np.generic]]) -> None:
    """An `.npz` file, the same bytes each time. `np.savez` would take an input named `file` for its own argument."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)


def _at_a_time(data: BoundData) -> int:
    """How many samples the model takes at least: the size of a static batch axis, else 1."""
    return max((len(batch) for batch in islice(data.batches(1), 1)), default=1)
