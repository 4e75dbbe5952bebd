"""Ranges of least squared error, for many rows of numbers at once, each row with a grid of its own.

The rows are the channels or blocks of a weight, or the bins of one histogram, which are tried on many grids.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekit.quant.affine import choose_params
from edgekit.quant.observers import Histogram
from edgekit.quant.spec import QuantParams, QuantSpec

Floats = NDArray[np.float32]
Ends = NDArray[np.float64]
"""One end of the range of each row, `(R,)`."""

FIRST_STEPS, LAST_STEPS = 3, 20
"""The steps that alternating takes from every start, and the most that it takes from the best one."""

_CHUNK = 32768  # numbers computed at once: their arrays (0.4 MB) stay in the second-level cache


@dataclass(frozen=True, eq=False)
class Rows:
    """Numbers to be put on grids.

    Attributes:
        values: float32 `(R, n)`, or `(1, n)` where every row holds the same numbers.
        counts: float64 `(n,)`, how often the number in each column counts.
    """

    values: Floats
    counts: NDArray[np.float64]


def bins_of(histogram: Histogram) -> Rows:
    """One row: the middles of the bins that hold something, counted as often as the numbers that they hold."""
    some = histogram.counts > 0
    return Rows(histogram.centers[some].astype(np.float32)[None], histogram.counts[some].astype(np.float64))


def rounded(values: Floats, params: QuantParams) -> Floats:
    """What `fake_quantize` makes of finite `values`, without its detour through integers; scales stand against them as they are."""
    steps = _steps(values, params.scale, params.zero_point, params)
    with np.errstate(over="ignore", under="ignore"):
        return np.multiply(steps, params.scale, out=steps)


def squared_errors(rows: Rows, low: Ends, high: Ends, spec: QuantSpec) -> NDArray[np.float64]:
    """The sum of squared rounding and clipping errors of each row, `(R,)`, on the grid of `spec` that covers its range."""
    return np.asarray(_sums(rows, low, high, spec)[0])


def best_shares(
    rows: Rows, low: Ends, high: Ends, spec: QuantSpec, *, shares: NDArray[np.float64], rounds: int
) -> tuple[Ends, Ends]:
    """The part of each row's range that has the least squared error; the wider one of equals.

    Each end is tried at all `shares` (descending, from 1) of its full extent, the other one fixed, the longer end first, `rounds`
    times over. A symmetric grid has only one end to try: both move together.
    """
    extent = np.stack([np.minimum(low, 0.0), np.maximum(high, 0.0)])
    each = np.arange(extent.shape[1])
    if spec.symmetric:
        reach = np.maximum(-extent[0], extent[1])
        best = shares[np.argmin(_tried(rows, -shares[:, None] * reach, shares[:, None] * reach, spec), axis=0)]
        return -best * reach, best * reach
    ends, longer = extent.copy(), np.where(-extent[0] > extent[1], 0, 1)
    answered = np.full(
        extent.shape, np.nan
    )  # what each turn's ends were last tried against; the same gives the same answer
    for turn in range(2 * rounds):
        end = longer if turn % 2 == 0 else 1 - longer
        other = ends[1 - end, each]
        if not extent[end, each].any() or np.array_equal(answered[turn % 2], other):
            continue
        answered[turn % 2] = other
        tried = np.repeat(ends[:, None], shares.size, axis=1)
        tried[end, :, each] = extent[end, each][:, None] * shares
        ends[end, each] = extent[end, each] * shares[np.argmin(_tried(rows, tried[0], tried[1], spec), axis=0)]
    return ends[0], ends[1]


def alternate_from(
    rows: Rows, low: Ends, high: Ends, spec: QuantSpec, *, shares: NDArray[np.float64]
) -> tuple[Ends, Ends]:
    """The best range, for each row, that fitting codes and grid to each other in turns leads to from `shares` of its range.

    Each start takes `FIRST_STEPS` steps, and the best of them goes on until nothing gets better.
    """
    seen = np.stack([np.minimum(low, 0.0), np.maximum(high, 0.0)])
    if spec.symmetric:
        reach = np.maximum(-seen[0], seen[1])
        seen = np.stack([-reach, reach])
    starts = seen[:, None] * shares[:, None]
    if rows.values.shape[0] == seen.shape[1] == 1:
        flat, bounds = starts[..., 0], np.repeat(seen, shares.size, axis=1)
        ends, errors = _alternate(rows, flat, bounds, spec, steps=FIRST_STEPS)
        best = ends[:, [np.argmin(errors)]]
    else:
        best, least = starts[:, 0], np.full(seen.shape[1], np.inf)
        for index in range(shares.size):
            ends, errors = _alternate(rows, starts[:, index], seen, spec, steps=FIRST_STEPS)
            best, least = np.where(errors < least, ends, best), np.minimum(errors, least)
    best, _ = _alternate(rows, best, seen, spec, steps=LAST_STEPS)
    return best[0], best[1]


def _alternate(
    rows: Rows, ends: NDArray[np.float64], bounds: NDArray[np.float64], spec: QuantSpec, *, steps: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The best ends `(2, R)` met in so many steps from `ends`, never outside the bounds, and their squared errors `(R,)`.

    Given the codes, the grid is their least-squares fit: the scale alone, or for an affine grid with numbers on both sides of
    zero, the scale and the zero point. Given the grid, the codes are the nearest.
    """
    best, least = ends, np.full(ends.shape[1], np.inf)
    for _ in range(steps):
        errors, fitted = _refit(rows, ends, spec)
        better = errors < least
        if not better.any():
            break
        best, least = np.where(better, ends, best), np.minimum(errors, least)
        ends = np.stack([np.clip(fitted[0], bounds[0], 0.0), np.clip(fitted[1], 0.0, bounds[1])])
    return best, least


def _refit(rows: Rows, ends: NDArray[np.float64], spec: QuantSpec) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The squared error of each row on its grid, `(R,)`, and the ends `(2, R)` of the grid that fits its codes best."""
    low, high = ends
    errors, x, c, xc, cc = _sums(rows, low, high, spec, moments=True)
    params = choose_params(low, high, spec, axis=0)
    total = rows.counts.sum()
    scale = np.divide(xc, cc, out=params.scale.astype(np.float64), where=cc > 0)
    if spec.symmetric:
        reach = scale * (spec.qmax - params.zero_point)
        return errors, np.stack([-reach, reach])
    spread = cc * total - c * c
    moves = (low < 0) & (high > 0) & (spread > 0)
    scale = np.divide(xc * total - x * c, spread, out=scale, where=moves)
    offset = np.where(moves, (x - scale * c) / max(total, 1.0), 0.0)
    codes = np.stack([spec.qmin - params.zero_point, spec.qmax - params.zero_point])
    return errors, scale * codes + offset


def _tried(rows: Rows, low: NDArray[np.float64], high: NDArray[np.float64], spec: QuantSpec) -> NDArray[np.float64]:
    """The squared errors of ever narrower ranges `(S, R)` for each row; infinite once clipping alone costs every row too much.

    No number inside a range is further than half a step from the grid, and what lies outside costs more in a narrower range.
    """
    if low.shape[1] == 1:
        return squared_errors(rows, low[:, 0], high[:, 0], spec)[:, None]
    errors = np.full(low.shape, np.inf)
    total = rows.counts.sum()
    for index in range(low.shape[0]):
        errors[index] = squared_errors(rows, low[index], high[index], spec)
        half = choose_params(low[index], high[index], spec, axis=0).scale.astype(np.float64) / 2
        if np.all(errors[index] - total * half**2 > errors.min(axis=0)):
            break
    return errors


def _sums(rows: Rows, low: Ends, high: Ends, spec: QuantSpec, *, moments: bool = False) -> NDArray[np.float64]:
    """Sums over each row: the squared errors, `(1, R)`; with `moments`, also x, c, x c and c c, `(5, R)`.

    x are the numbers and c their codes less the zero point.
    """
    params = choose_params(low, high, spec, axis=0)
    sums = np.zeros((5 if moments else 1, low.size))
    for some, columns in _chunks(low.size, rows.values.shape[1]):
        values = rows.values[some if rows.values.shape[0] > 1 else slice(None), columns]
        counts = rows.counts[columns]
        scale = params.scale[some, None]
        steps = _steps(values, scale, params.zero_point[some, None], params)
        if moments:
            wide = steps.astype(np.float64)
            terms: tuple[NDArray[np.floating], ...] = (values, wide, wide * values, np.square(wide))
            for moment, term in enumerate(terms, start=1):
                sums[moment, some] += _weighed(term, counts)
        with np.errstate(over="ignore", under="ignore"):
            errors = np.subtract(np.multiply(steps, scale, out=steps), values, dtype=np.float64)
        sums[0, some] += _weighed(np.square(errors, out=errors), counts)
    return sums


def _weighed(table: NDArray[np.floating], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sum of each row, column by column as often as it counts; on one thread, whose order of summing is always the same."""
    return np.asarray(np.einsum("rn,n->r", table, counts), np.float64)


def _steps(values: Floats, scale: Floats, zero_point: NDArray[np.int64], params: QuantParams) -> Floats:
    """Codes less the zero point, as float32; scale and zero point stand against the values."""
    with np.errstate(over="ignore", under="ignore"):
        steps = np.asarray(values / scale, np.float32)
    np.maximum(steps, (params.qmin - zero_point).astype(np.float32), out=steps)
    np.minimum(steps, (params.qmax - zero_point).astype(np.float32), out=steps)
    return np.rint(steps, out=steps)


def _chunks(rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    """Parts of a table of about `_CHUNK` numbers each."""
    height = max(1, _CHUNK // max(columns, 1))
    for top in range(0, rows, height):
        for left in range(0, columns, _CHUNK):
            yield slice(top, top + height), slice(left, left + _CHUNK)
