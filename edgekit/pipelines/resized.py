"""Samples in another size than the model was calibrated with, where it leaves sizes besides the batch open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekit.data import Batch, InputSpec
from edgekit.errors import GraphError
from edgekit.graph.run import Session
from edgekit.proof import Arrays

RATIOS = ((1, 2), (2, 1), (3, 2))
"""Of the sizes that are tried, one after the other, to those of the samples: halves of what networks are made for mostly divide well."""


@dataclass(frozen=True, slots=True)
class Resized:
    """A batch in another size, and what the float model makes of it.

    Attributes:
        feeds, floats: empty where the float model takes no size that was tried.
        sizes: of the inputs, for people; of the samples where nothing was found.
    """

    feeds: Arrays
    floats: Arrays
    sizes: tuple[str, ...]


def resize(batch: Batch, inputs: Sequence[InputSpec], session: Session) -> Resized | None:
    """The samples of `batch` cut or repeated along all open axes, in the first of `RATIOS` that the float `session` computes.

    None where no axis besides the batch is open.
    """
    axes = {spec.name: _open_axes(spec, single=batch.single) for spec in inputs}
    if not any(axes.values()):
        return None
    for up, down in RATIOS:
        feeds = {name: _resized(array, axes[name], up, down) for name, array in batch.feeds.items()}
        if _sizes(feeds) == _sizes(batch.feeds):
            continue
        try:
            floats = session.run(feeds)
        except GraphError:  # sizes that do not divide, longer than its table of positions, ...
            continue
        if all(array.size for array in floats.values()):
            return Resized(feeds, floats, _sizes(feeds))
    return Resized({}, {}, _sizes(batch.feeds))


def _open_axes(spec: InputSpec, *, single: bool) -> tuple[int, ...]:
    """The axes, but the batch's, whose size the model leaves open."""
    return tuple(axis for axis, size in enumerate(spec.shape) if size is None and (axis or single))


def _resized(array: NDArray[np.generic], axes: Sequence[int], up: int, down: int) -> NDArray[np.generic]:
    for axis in axes:
        size = array.shape[axis]
        wanted = max(1, size * up // down)
        array = np.take(array, np.arange(wanted) % max(size, 1), axis=axis) if size else array
    return array


def _sizes(feeds: Mapping[str, NDArray[np.generic]]) -> tuple[str, ...]:
    return tuple(f"{name} {'x'.join(map(str, array.shape))}" for name, array in feeds.items())
