"""Reading back what `compress` and `export` wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgekit.data import BoundData, open_data
from edgekit.errors import DataError, OutputError
from edgekit.graph.io import load_annotated
from edgekit.pipelines.sources import input_specs
from edgekit.records import DECIDING, HELD_BACK, MODEL, Compressed, read_compressed

_AGAIN = "run `edgekit compress` again"


@dataclass(frozen=True, slots=True)
class Stored:
    """A compressed model: its folder, record, annotated graph and held-back samples."""

    folder: Path
    record: Compressed
    model: ir.Model
    held_back: BoundData

    def deciding(self) -> list[BoundData]:
        """The samples that decisions are compared on: those held back, and some that calibrated.

        Raises:
            OutputError: they are not there, or cannot be read.
        """
        calibrated = [_samples(self.folder / DECIDING, self.model)] if self.record.deciding else []
        return [self.held_back, *calibrated]


def open_stored(folder: Path) -> Stored:
    """What `compress` left in a folder.

    Raises:
        OutputError: it is not there, or was changed since.
    """
    record = read_compressed(folder)
    model = load_annotated(folder / MODEL)
    return Stored(folder, record, model, _samples(folder / HELD_BACK, model))


def _samples(path: Path, model: ir.Model) -> BoundData:
    try:
        return open_data(path).bind(input_specs(model))
    except DataError as error:
        raise OutputError(f"{path}: the samples of `compress` cannot be read ({error}); {_AGAIN}") from error


def samples_of_size(stored: Stored, size: int) -> Mapping[str, NDArray[Any]]:
    """A batch of `size` held-back samples, repeated when there are fewer; of the model's own size where that is static."""
    batch = next(iter(stored.held_back.batches(size)))
    if (
        batch.single
        or len(batch) == size
        or any(spec.shape and spec.shape[0] is not None for spec in stored.held_back.inputs)
    ):
        return batch.feeds
    return {name: np.resize(array, (size, *array.shape[1:])) for name, array in batch.feeds.items()}
