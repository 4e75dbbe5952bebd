"""How a tensor's numbers are spread, against the ends of its grid, in few enough figures to write down and to draw."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgekit.quant.affine import dequantize
from edgekit.quant.observers import Histogram, HistogramObserver
from edgekit.quant.spec import QuantParams
from edgekit.toml_file import Table

POINTS = 128
"""The most bins of a histogram, and the most ranges of channels, that are written down."""


class ChannelRanges(Table):
    """What the output channels of a weight hold and can hold: one point for every `step` neighbours.

    Attributes:
        channels, step: how many there are, and how many share a point.
        min, max: the extremes of the weights.
        grid_low, grid_high: the ends of the grid, the widest of the neighbours'.
    """

    channels: int
    step: int
    min: tuple[float, ...]
    max: tuple[float, ...]
    grid_low: tuple[float, ...]
    grid_high: tuple[float, ...]


class Distribution(Table):
    """A quantized tensor's numbers, as they are in float.

    Attributes:
        name: of the value.
        dtype: of its codes.
        min, max: its extremes.
        grid_low, grid_high: the lowest and the highest number on the grid; with several scales, on the widest.
        clipped: the share of its numbers that lie more than half a step beyond the grid.
        first_edge, width, counts: a histogram; bin i holds `first_edge + i * width <= x < first_edge + (i + 1) * width`.
        channels: of a weight with output channels.
    """

    name: str
    dtype: str
    min: float
    max: float
    grid_low: float
    grid_high: float
    clipped: float
    first_edge: float
    width: float
    counts: tuple[int, ...]
    channels: ChannelRanges | None = None


class LayerDistributions(Table):
    """What a layer reads on codes: its activations that have a grid, and its weight."""

    name: str
    activations: tuple[Distribution, ...] = ()
    weight: Distribution | None = None


def of_activation(name: str, histogram: Histogram, params: QuantParams) -> Distribution:
    """Of an activation; its share beyond the grid is exact to a bin of `histogram`."""
    low, high = (float(end) for end in (_real(params.qmin, params).min(), _real(params.qmax, params).max()))
    half = float(params.scale.max()) / 2
    beyond = (histogram.centers < low - half) | (histogram.centers > high + half)
    clipped = int(histogram.counts[beyond].sum()) / max(1, histogram.count)
    return _distribution(name, histogram, params, (low, high), clipped)


def of_weight(name: str, weight: NDArray[np.float32], params: QuantParams, *, axis: int | None) -> Distribution:
    """Of a constant; `axis` is that of its output channels, None where it has none."""
    observer = HistogramObserver()
    observer.update(weight)
    low, high = (dequantize(np.broadcast_to(np.int32(end), weight.shape), params) for end in (params.qmin, params.qmax))
    half = (high - low) / (2 * (params.qmax - params.qmin))
    clipped = float(np.mean((weight < low - half) | (weight > high + half)))
    ends = float(low.min()), float(high.max())
    found = _distribution(name, observer.histogram(), params, ends, clipped)
    return found if axis is None else found.model_copy(update={"channels": _channels(weight, low, high, axis)})


def _real(code: int, params: QuantParams) -> NDArray[np.float64]:
    """The number that a code stands for, on each scale."""
    return np.asarray((code - params.zero_point) * np.asarray(params.scale, np.float64))


def _distribution(
    name: str, histogram: Histogram, params: QuantParams, ends: tuple[float, float], clipped: float
) -> Distribution:
    used = np.flatnonzero(histogram.counts)
    first, last = (int(used[0]), int(used[-1])) if used.size else (0, 0)
    group = -(-(last + 1 - first) // POINTS)
    counts = np.add.reduceat(histogram.counts[first : last + 1], np.arange(0, last + 1 - first, group))
    return Distribution(
        name=name,
        dtype=params.dtype,
        min=histogram.min,
        max=histogram.max,
        grid_low=ends[0],
        grid_high=ends[1],
        clipped=clipped,
        first_edge=histogram.first_edge + first * histogram.width,
        width=group * histogram.width,
        counts=tuple(map(int, counts)),
    )


def _channels(
    weight: NDArray[np.generic], low: NDArray[np.float32], high: NDArray[np.float32], axis: int
) -> ChannelRanges:
    count = weight.shape[axis]
    step = -(-count // POINTS)
    others = tuple(i for i in range(weight.ndim) if i != axis % weight.ndim)
    starts = np.arange(0, count, step)

    def lowest(array: NDArray[np.generic]) -> tuple[float, ...]:
        return _short(np.minimum.reduceat(array.min(axis=others), starts))

    def highest(array: NDArray[np.generic]) -> tuple[float, ...]:
        return _short(np.maximum.reduceat(array.max(axis=others), starts))

    return ChannelRanges(
        channels=count,
        step=step,
        min=lowest(weight),
        max=highest(weight),
        grid_low=lowest(low),
        grid_high=highest(high),
    )


def _short(array: NDArray[np.generic]) -> tuple[float, ...]:
    """Six digits are more than a picture shows."""
    return tuple(float(f"{value:.6g}") for value in array.tolist())
