"""From what was seen of a tensor to the range that its grid should cover; what lies outside is clipped."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import TargetError
from edgekit.quant.affine import middle_code
from edgekit.quant.least_squares import alternate_from, best_shares, bins_of
from edgekit.quant.observers import Histogram
from edgekit.quant.spec import QuantSpec
from edgekit.words import nearest

Estimator = Callable[[Histogram, QuantSpec], tuple[float, float]]
"""From a histogram and the grid to come, the range to cover: (low, high), never wider than what was seen."""

CANDIDATES = 2048
"""The most thresholds that one KLD search tries; with more bins it tries every second or fourth edge."""

MSE_STEPS, MSE_LEAST, MSE_ROUNDS = 71, 0.3, 2
"""An MSE search tries this many shares of an end, from all of it down to the least, and goes around the ends so often."""

ADMM_STARTS = np.linspace(1.0, 0.2, 33)
"""The shares of what was seen that ADMM starts from."""

_BLOCK = 256  # candidates computed at once: their arrays (0.5 MB each) stay in the second-level cache


def minmax(histogram: Histogram, spec: QuantSpec) -> tuple[float, float]:
    """All that was seen, exactly."""
    return histogram.min, histogram.max


def moving_average(histogram: Histogram, spec: QuantSpec) -> tuple[float, float]:
    """From the mean of the samples' least numbers to the mean of their greatest: one odd sample does not set the range.

    Every sample weighs the same, so the order of the samples does not matter; a decaying average would forget the first.

    Reference: Krishnamoorthi 2018, "Quantizing deep convolutional networks for efficient inference", arXiv:1806.08342,
    section 3.1.1, which averages over batches.
    """
    return _clipped(histogram, histogram.average_min, histogram.average_max)


def percentile(histogram: Histogram, spec: QuantSpec, p: float = 99.99) -> tuple[float, float]:
    """The narrowest range, to the bin, that leaves at most `100 - p` percent of the values outside.

    Symmetric grids clip the largest magnitudes. Affine grids clip half of those values at either end, or all of them
    at the far end where no value lies on the other side of zero.

    Raises:
        TargetError: `p` is not above 0 and at most 100.
    """
    if not 0 < p <= 100:
        raise TargetError(f"found percentile {p}; expected a number above 0 and at most 100, such as 99.99")
    outside = int(histogram.count * (100 - Fraction(str(p))) / 100)
    if spec.symmetric:
        reach = _bins_kept(_magnitudes(histogram), outside) * histogram.width
        return _clipped(histogram, -reach, reach)
    if histogram.min < 0.0 < histogram.max:
        low_outside = high_outside = outside // 2
    else:
        low_outside, high_outside = (outside, 0) if histogram.max <= 0.0 else (0, outside)
    start = histogram.counts.size - _bins_kept(histogram.counts[::-1], low_outside)
    stop = _bins_kept(histogram.counts, high_outside)
    return _clipped(histogram, _edge(histogram, start), _edge(histogram, stop))


def mse(histogram: Histogram, spec: QuantSpec) -> tuple[float, float]:
    """The clipping whose rounding and clipping errors together are least, in the mean of squares over the histogram.

    Each end is tried at `MSE_STEPS` shares of what was seen, the other one fixed, the longer end first, `MSE_ROUNDS` times over;
    a symmetric grid has only one end to try. Where two ranges are equally good, the wider one is kept.

    Reference: Nagel et al. 2021, "A White Paper on Neural Network Quantization", arXiv:2106.08295, section 3.1.
    """
    ends = np.array([histogram.min]), np.array([histogram.max])
    shares = np.linspace(1.0, MSE_LEAST, MSE_STEPS)
    low, high = best_shares(bins_of(histogram), *ends, spec, shares=shares, rounds=MSE_ROUNDS)
    return _clipped(histogram, float(low[0]), float(high[0]))


def admm(histogram: Histogram, spec: QuantSpec) -> tuple[float, float]:
    """The grid that codes and scale (of an affine grid, zero point too) agree on, each the best for the other.

    Such agreement is a local optimum: it is sought from `ADMM_STARTS` shares of what was seen, and the best is kept.

    Reference: Leng et al. 2018, "Extremely Low Bit Neural Network: Squeeze the Last Bit Out with ADMM", arXiv:1707.09870.
    """
    seen = np.array([histogram.min]), np.array([histogram.max])
    low, high = alternate_from(bins_of(histogram), *seen, spec, shares=ADMM_STARTS)
    return _clipped(histogram, float(low[0]), float(high[0]))


def kld(histogram: Histogram, spec: QuantSpec) -> tuple[float, float]:
    """The clipping that keeps the distribution closest to itself: least Kullback-Leibler divergence.

    P is the histogram with what lies outside a threshold added to the last bin inside; Q is the inside alone, averaged
    over the bins of each level of the grid that hold anything. Symmetric grids search one threshold on magnitudes;
    affine grids the far end, then the other end given the first (one factor for both ends could not clip the long
    side of a SiLU, whose short side is never worth clipping). The bin of zeros, where a Relu gathers half of all
    values, counts no more than its larger neighbour: zero is exact on every grid, and its spike would drown the rest.
    A threshold is the upper edge of its last bin. Grids of more levels than bins (16 bits) are not clipped.

    Reference: Migacz 2017, "8-bit inference with TensorRT", GTC S7310.
    """
    middle = middle_code(spec.dtype)
    if spec.symmetric:
        magnitudes = _magnitudes(histogram)
        reach = _best_stop(_without_spike(magnitudes, 0), 0, 0, _bins_kept(magnitudes, 0), spec.qmax - middle + 1)
        return _clipped(histogram, -reach * histogram.width, reach * histogram.width)
    levels, zero, size = spec.qmax - spec.qmin + 1, histogram.zero_bin, histogram.counts.size
    counts = _without_spike(histogram.counts, zero)
    start = min(zero, size - _bins_kept(histogram.counts[::-1], 0))
    stop = max(zero, _bins_kept(histogram.counts, 0))
    upper_first = stop - zero >= zero - start
    for upper in (upper_first, not upper_first):
        if upper:
            stop = _best_stop(counts, start, zero, stop, levels)
        else:
            start = size - _best_stop(counts[::-1], size - stop, size - zero, size - start, levels)
    return _clipped(histogram, _edge(histogram, start), _edge(histogram, stop))


ESTIMATORS: dict[str, Estimator] = {
    "minmax": minmax,
    "moving-average": moving_average,
    "percentile": percentile,
    "mse": mse,
    "kld": kld,
    "admm": admm,
}
"""The estimators by the names that recipes and the command line use."""


def get_estimator(name: str) -> Estimator:
    """The estimator of a name.

    Raises:
        TargetError: there is none of that name.
    """
    if name not in ESTIMATORS:
        near = nearest(name, ESTIMATORS)
        hint = f"did you mean {near!r}? " if near else ""
        raise TargetError(f"unknown calibrator {name!r}; {hint}known calibrators: {', '.join(ESTIMATORS)}")
    return ESTIMATORS[name]


def _edge(histogram: Histogram, index: int) -> float:
    """The lower edge of bin `index`."""
    return (index - histogram.zero_bin) * histogram.width


def _clipped(histogram: Histogram, low: float, high: float) -> tuple[float, float]:
    """A range with both ends brought to where values were seen; (0, 0) when none were."""
    if not histogram.count:
        return 0.0, 0.0
    low, high = np.clip([low, high], histogram.min, histogram.max).tolist()
    return low, high


def _magnitudes(histogram: Histogram) -> NDArray[np.int64]:
    """The counts of `|x|`, from zero up."""
    below, above = histogram.counts[: histogram.zero_bin][::-1], histogram.counts[histogram.zero_bin :]
    counts = np.zeros(max(below.size, above.size), np.int64)
    counts[: below.size] += below
    counts[: above.size] += above
    return counts


def _bins_kept(counts: NDArray[np.int64], outside: int) -> int:
    """The fewest first bins that leave at most `outside` values behind them."""
    return int(np.count_nonzero(np.cumsum(counts[::-1]) > outside))


def _without_spike(counts: NDArray[np.int64], zero: int) -> NDArray[np.int64]:
    """The counts, that of bin `zero` no larger than both its neighbours'."""
    capped = counts.copy()
    if zero < counts.size:
        neighbours = (counts[i] for i in (zero - 1, zero + 1) if 0 <= i < counts.size)
        capped[zero] = min(counts[zero], max(neighbours, default=np.int64(0)))
    return capped


def _best_stop(counts: NDArray[np.int64], start: int, lowest: int, stop: int, levels: int) -> int:
    """The end of least divergence for a range of bins from `start` to somewhere between `lowest` and `stop`.

    The widest among equals; `stop` itself where the range has no more bins than `levels`.
    """
    lowest = max(lowest, start + levels)
    if stop <= lowest:
        return stop
    stride = -(-(stop - lowest + 1) // CANDIDATES)
    stops = np.arange(stop, lowest - 1, -stride)
    return int(stops[np.argmin(divergences(counts, start, stops, levels))])


def divergences(counts: NDArray[np.int64], start: int, stops: NDArray[np.int64], levels: int) -> NDArray[np.float64]:
    """The divergence of P from Q (see `kld`), in nats, for the bins from `start` to each of `stops`, `(K,)`.

    With S a level's count and n its bins that hold anything, `sum(P log Q) = sum over levels of S log(S / n)`, so
    cumulative sums over bins give every candidate without touching a bin twice. Infinite where values were added
    to an empty level.
    """
    inner = counts.astype(np.float64)
    total_before = _cumulative(inner)
    bins_before = _cumulative(counts > 0).astype(np.intp)
    entropy_before = _cumulative(_xlogx(inner))
    log_bins = np.log(np.maximum(np.arange(counts.size + 2), 1))
    below = total_before[start]
    result = np.empty(stops.size)
    for block in range(0, stops.size, _BLOCK):
        stop = stops[block : block + _BLOCK]
        above = total_before[-1] - total_before[stop]
        edges = start + (stop - start)[:, None] * np.arange(levels + 1) // levels
        level, bins = np.diff(total_before[edges]), np.diff(bins_before[edges])
        first, last = inner[start], inner[stop - 1]
        bins[:, 0] += (below > 0) & (first == 0)
        bins[:, -1] += (above > 0) & (last == 0)
        log_q = np.log(np.maximum(level, 1.0)) - log_bins[bins]
        cross = np.einsum("kl,kl->k", level, log_q) + below * log_q[:, 0] + above * log_q[:, -1]
        own = entropy_before[stop] - entropy_before[start]
        own += _xlogx(first + below) - _xlogx(first) + _xlogx(last + above) - _xlogx(last)
        inside = total_before[stop] - total_before[start]
        divergence = (own - cross) / total_before[-1] + np.log(np.maximum(inside, 1.0) / total_before[-1])
        impossible = ((below > 0) & (level[:, 0] == 0)) | ((above > 0) & (level[:, -1] == 0))
        result[block : block + _BLOCK] = np.where(impossible, np.inf, divergence)
    return result


def _cumulative(values: NDArray[np.generic]) -> NDArray[np.float64]:
    """Sums of all values before each index, `(N + 1,)`."""
    return np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])


def _xlogx(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """`x log x` of counts, 0 at 0."""
    return np.asarray(values * np.log(np.maximum(values, 1.0)))
