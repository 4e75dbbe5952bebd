"""Streaming statistics of one tensor, in constant memory, equal for every order of the samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import DataError

BINS = 4096
"""Bins on either side of zero. The largest magnitude lies in their upper half, so 2048 to 4096 bins are in use."""

CHUNK = 32768
"""Values binned at once: the scratch arrays of a chunk (384 KB) stay in the second-level cache."""

SPAN = 131072
"""Values sampled at once: they (512 KB) stay in the second-level cache, so memory is read once."""

EVERY, FINE, COARSE = 1, 5, 17
"""Strides. Primes, so that a sample meets all columns of most images. On a ResNet-50-shaped network clip ranges by least squared
error were the same from a coarse sample as from all values, within 3 %; those by divergence moved by 4 % with a fine one, less than
by another set of images (5 %)."""

RARE = 4.0
"""Values beyond so many root mean squares are rare: at most about a ninth, usually one in a hundred. The root mean square is
that of the sample of a span."""

COLUMN = 16
"""Values of a span that are looked at together for rare ones."""

_BITS = BINS.bit_length() - 1
_TINY = 2.0**-149  # every float32 is a whole multiple


@dataclass(frozen=True, eq=False)
class Histogram:
    """What was seen of a tensor; zero is an edge between two bins.

    Attributes:
        counts: int64 `(N,)`; bin i holds `first_edge + i * width <= x < first_edge + (i + 1) * width`.
        first_edge: lower edge of bin 0, a multiple of `width`.
        width: of every bin, positive.
        min, max: exact extremes of what was seen; 0 when nothing was.
        count: how many values were seen, the sum of `counts`.
        average_min, average_max: means of the smallest and of the largest value of each sample, in exact arithmetic: an
            exponential moving average (Jacob et al. 2018, arXiv:1712.05877, section 3.1) would depend on their order.
    """

    counts: NDArray[np.int64]
    first_edge: float
    width: float
    min: float
    max: float
    count: int
    average_min: float
    average_max: float

    @property
    def zero_bin(self) -> int:
        """The index of the bin whose lower edge is zero; N when all bins lie below."""
        return round(-self.first_edge / self.width)

    @property
    def centers(self) -> NDArray[np.float64]:
        """The middle of each bin, `(N,)`."""
        return np.asarray(self.first_edge + (np.arange(self.counts.size) + 0.5) * self.width, np.float64)

    def within(self, low: float, high: float) -> Histogram:
        """The same with all values outside moved to the nearest end."""
        low, high = max(low, self.min), min(high, self.max)
        first, last = (min(int((end - self.first_edge) / self.width), self.counts.size - 1) for end in (low, high))
        counts = np.zeros_like(self.counts)
        counts[first : last + 1] = self.counts[first : last + 1]
        counts[first] += self.counts[:first].sum()
        counts[last] += self.counts[last + 1 :].sum()
        averages = (min(max(average, low), high) for average in (self.average_min, self.average_max))
        return Histogram(counts, self.first_edge, self.width, low, high, self.count, *averages)


class MinMaxObserver:
    """Exact minimum and maximum; `inf` and `-inf` before the first value."""

    def __init__(self) -> None:
        self.count = 0
        self.min = math.inf
        self.max = -math.inf

    def update(self, x: NDArray[np.generic]) -> None:
        """Take in the values of `x`, of any shape and float type.

        Raises:
            DataError: some are NaN or infinite; then nothing of `x` is taken in.
        """
        flat = np.asarray(x).reshape(-1)
        if flat.size:
            low, high = _extremes(flat)
            self._extend(low, high, flat.size)

    def merge(self, other: MinMaxObserver) -> None:
        """Take in all that `other` saw."""
        self._extend(other.min, other.max, other.count)

    def _extend(self, low: float, high: float, count: int) -> None:
        self.min, self.max, self.count = min(self.min, low), max(self.max, high), self.count + count


class HistogramObserver:
    """Exact minimum and maximum, and a histogram whose bins widen to fit the data.

    Bin widths are powers of two and bins start at multiples of their width, so narrow bins nest exactly in wide ones:
    when a larger value arrives, bins merge in pairs, and what results is what one pass over all data with the final
    width would have counted. Memory: 64 KB.

    Args:
        stride: of more than `CHUNK` values in a call, count exactly those that are rare (the tails, which decide where to clip), and
            every `stride`-th of the rest with that weight; `EVERY` counts all. Which ones these are depends on the values and their
            positions in this call alone.
    """

    def __init__(self, *, stride: int = EVERY) -> None:
        self.range = MinMaxObserver()
        self.stride = stride
        self._counts = np.zeros(2 * BINS, np.int64)
        self._exponent: int | None = None  # the bins cover [-2**exponent, 2**exponent); None: only zeros so far
        self._samples = 0
        self._sum_min = self._sum_max = 0  # over samples, in units of _TINY: exact

    @property
    def count(self) -> int:
        """How many values were seen."""
        return self.range.count

    @property
    def min(self) -> float:
        """The smallest value seen; `inf` before the first."""
        return self.range.min

    @property
    def max(self) -> float:
        """The largest value seen; `-inf` before the first."""
        return self.range.max

    def update(self, x: NDArray[np.generic]) -> None:
        """Take in the values of `x`, one sample of any shape and float type (more than float32 holds is rounded to it).

        Raises:
            DataError: some are NaN or infinite; then nothing of `x` is taken in.
        """
        flat = np.asarray(x).reshape(-1)
        if flat.dtype != np.float32:
            with np.errstate(over="ignore"):
                flat = flat.astype(np.float32)
        if not flat.size:
            return
        if self.stride > 1 and flat.size > CHUNK:
            low, high, rare, picked, both = _sample(flat, self.stride)
        else:
            (low, high), rare, picked, both = _extremes(flat), flat, flat[:0], flat[:0]
        self.range._extend(low, high, flat.size)
        self._samples += 1
        self._sum_min += int(low / _TINY)
        self._sum_max += int(high / _TINY)
        largest = max(-low, high)
        if largest:
            self._widen(math.frexp(largest)[1])
        self._bin(rare, 1, negative=low < 0.0)
        self._bin(picked, self.stride, negative=low < 0.0)
        self._bin(both, -self.stride, negative=low < 0.0)

    def merge(self, other: HistogramObserver) -> None:
        """Take in all that `other` saw; the result is that of one observer that saw everything."""
        self.range.merge(other.range)
        self._samples += other._samples
        self._sum_min += other._sum_min
        self._sum_max += other._sum_max
        if other._exponent is None:
            self._counts += other._counts
            return
        self._widen(other._exponent)
        assert self._exponent is not None
        self._counts += _merge_bins(other._counts, self._exponent - other._exponent)

    def histogram(self) -> Histogram:
        """What was seen so far, as a copy."""
        exponent = 0 if self._exponent is None else self._exponent
        low, high = (self.min, self.max) if self.count else (0.0, 0.0)
        edge = math.ldexp(1.0, exponent)
        average_min, average_max = (
            float(_TINY * Fraction(total, self._samples or 1)) for total in (self._sum_min, self._sum_max)
        )
        count = int(self._counts.sum())
        return Histogram(self._counts.copy(), -edge, edge / BINS, low, high, count, average_min, average_max)

    def _widen(self, exponent: int) -> None:
        """Cover at least [-2**exponent, 2**exponent)."""
        if self._exponent is None:
            self._exponent = exponent  # zeros stay in their bin
        elif exponent > self._exponent:
            self._counts = _merge_bins(self._counts, exponent - self._exponent)
            self._exponent = exponent

    def _bin(self, flat: NDArray[np.float32], weight: int, *, negative: bool) -> None:
        if self._exponent is None:  # only zeros so far
            self._counts[BINS] += weight * flat.size
            return
        shift = _BITS - self._exponent
        # The product must neither overflow nor vanish (a tiny negative number belongs below zero): float32 has room
        # for that while the width is between 2**-126 and 1; float64 always has.
        working = np.float32 if 0 <= shift <= 126 else np.float64
        scale = working(math.ldexp(1.0, shift))
        scaled, index = np.empty(min(CHUNK, flat.size), working), np.empty(min(CHUNK, flat.size), np.intp)
        first = BINS if not negative else 0
        for start in range(0, flat.size, CHUNK):
            chunk = flat[start : start + CHUNK]
            s, i = scaled[: chunk.size], index[: chunk.size]
            np.multiply(chunk, scale, out=s)
            if negative:  # without negative values the cast to integers is the floor
                np.floor(s, out=s)
                np.add(s, working(BINS), out=s)
            i[...] = s
            self._counts[first:] += weight * np.bincount(i, minlength=2 * BINS - first)


class _Sample(NamedTuple):
    """Of some values: see `HistogramObserver`."""

    low: float
    high: float
    rare: NDArray[np.float32]
    picked: NDArray[np.float32]
    both: NDArray[np.float32]  # rare and picked


def _sample(flat: NDArray[np.float32], stride: int) -> _Sample:
    try:
        parts = [_sample_span(flat[i : i + SPAN], i // SPAN % stride, stride) for i in range(0, flat.size, SPAN)]
    except DataError:
        _extremes(flat)  # tells how many in all
        raise
    low, high = min(part.low for part in parts), max(part.high for part in parts)
    return _Sample(low, high, *(np.concatenate([part[i] for part in parts]) for i in (2, 3, 4)))


def _sample_span(span: NDArray[np.float32], first: int, stride: int) -> _Sample:
    """Rare values lie in few columns, so that one reading finds the extremes and nearly says where those are."""
    height = COLUMN if span.size >= COLUMN else 1
    columns = span[: span.size // height * height].reshape(height, -1)
    rest = span[columns.size :]
    lows, highs = columns.min(axis=0), columns.max(axis=0)
    low = float(min(lows.min(), rest.min(initial=np.inf)))
    high = float(max(highs.max(), rest.max(initial=-np.inf)))
    if not (math.isfinite(low) and math.isfinite(high)):
        _extremes(span)  # raises
    picked = span[min(first, span.size - 1) :: stride].copy()
    mean_square = float(np.square(picked, dtype=np.float64).mean())  # a dot product would wake up the threads of BLAS
    limit = np.float32(min(RARE * math.sqrt(mean_square), max(-low, high)))
    near = np.concatenate([columns[:, np.flatnonzero((highs > limit) | (lows < -limit))].reshape(-1), rest])
    both = picked[np.flatnonzero(np.abs(picked) > limit)]
    return _Sample(low, high, near[np.abs(near) > limit], picked, both)


def _extremes(flat: NDArray[np.generic]) -> tuple[float, float]:
    """The smallest and largest of at least one value; they also show NaN and infinity, at no further cost."""
    low, high = float(flat.min()), float(flat.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        values = np.asarray(flat, np.float64)
        broken = values.size - int(np.count_nonzero(np.isfinite(values)))
        raise DataError(
            f"found {broken} NaN or infinite values among {values.size}; expected finite numbers: "
            "check the calibration data and the model's float output on it"
        )
    return low, high


def _merge_bins(counts: NDArray[np.int64], doublings: int) -> NDArray[np.int64]:
    """The counts in bins of `2**doublings` times the width, around the same zero."""
    group = 1 << min(doublings, _BITS)  # after that, only the two bins beside zero are left
    if group == 1:
        return counts.copy()
    merged = np.zeros_like(counts)
    half = BINS // group
    merged[BINS - half : BINS + half] = counts.reshape(-1, group).sum(axis=1)
    return merged
