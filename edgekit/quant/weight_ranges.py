"""The grid of a constant from its own numbers: one range for all of it, one a channel, or one a block of each channel."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import TargetError
from edgekit.quant.affine import choose_params
from edgekit.quant.least_squares import Rows, alternate_from, best_shares, bins_of
from edgekit.quant.observers import BINS, HistogramObserver
from edgekit.quant.spec import QuantParams, QuantSpec

WEIGHT_ESTIMATORS = ("minmax", "mse", "admm")
"""The ways to choose the range of a constant."""

WEIGHT_SHARES = np.concatenate([np.linspace(1.0, 0.4, 31), np.geomspace(0.38, 0.03, 25)])
"""The shares of an end that "mse" tries: two bits clip normal numbers to a third of their reach, heavy tails to far less."""

ADMM_WEIGHT_STARTS = np.linspace(1.0, 0.1, 10)
"""The shares of a range that "admm" starts from."""


def weight_range(
    weight: NDArray[np.generic], spec: QuantSpec, *, axis: int | None, estimator: str = "minmax"
) -> QuantParams:
    """The grid of a constant, each range chosen from the numbers that it covers.

    Args:
        weight: finite numbers of any shape.
        spec: with a `block_size`, each so many elements along `axis` have a range of their own (the last block may be shorter);
            `per_channel` without it, each index of `axis`; else there is one range.
        axis: the axis that is cut in blocks, or the channel axis; not used where there is one range.
        estimator: "minmax" covers all numbers; "mse" tries `WEIGHT_SHARES` of either end for the least squared error; "admm"
            fits codes and grid to each other in turns.

    Raises:
        TargetError: there is no such estimator.
        GraphError: it holds NaN or infinity.

    Reference: Nagel et al. 2021, arXiv:2106.08295, section 3.1 ("mse"); Leng et al. 2018, arXiv:1707.09870 ("admm").
    """
    if estimator not in WEIGHT_ESTIMATORS:
        raise TargetError(f"unknown weight estimator {estimator!r}; expected one of {', '.join(WEIGHT_ESTIMATORS)}")
    values = np.asarray(weight, np.float32)
    if spec.block_size or spec.per_channel:
        assert axis is not None, "ranges per channel or per block need their axis"
        axis %= values.ndim
    else:
        axis = None
    table = _table(values, axis, spec.block_size)
    low, high = (end.astype(np.float64) for end in (table.min(axis=1, initial=0.0), table.max(axis=1, initial=0.0)))
    params = choose_params(low, high, spec, axis=0, observer=estimator)  # refuses NaN and infinity
    if estimator == "minmax":
        return _shaped(params, values.shape, axis, spec.block_size)
    rows = _rows(table)
    if estimator == "mse":
        low, high = best_shares(rows, low, high, spec, shares=WEIGHT_SHARES, rounds=2)
    else:
        low, high = alternate_from(rows, low, high, spec, shares=ADMM_WEIGHT_STARTS)
    params = choose_params(low, high, spec, axis=0, observer=estimator)
    return _shaped(params, values.shape, axis, spec.block_size)


def _table(values: NDArray[np.float32], axis: int | None, block: int) -> NDArray[np.float32]:
    """One row for each range: `(1, all)`, `(C, rest)`, or `(rest times blocks, block)`, a short block filled up with zeros."""
    if axis is None:
        return values.reshape(1, -1)
    if not block:
        return np.ascontiguousarray(np.moveaxis(values, axis, 0)).reshape(values.shape[axis], -1)
    last = np.moveaxis(values, axis, -1)
    missing = -values.shape[axis] % block
    padded = np.pad(last, [(0, 0)] * (values.ndim - 1) + [(0, missing)])
    return padded.reshape(-1, block)


def _rows(table: NDArray[np.float32]) -> Rows:
    """The numbers that ranges are searched with: a single row of very many is as well known by its histogram."""
    if table.shape[0] > 1 or table.shape[1] <= 2 * BINS:
        return Rows(table, np.ones(table.shape[1]))
    observer = HistogramObserver()
    observer.update(table)
    return bins_of(observer.histogram())


def _shaped(params: QuantParams, shape: tuple[int, ...], axis: int | None, block: int) -> QuantParams:
    """The grids of a table's rows, as those of the constant that it was made from."""
    if axis is None:
        return replace(params, axis=None, scale=params.scale.reshape(()), zero_point=params.zero_point.reshape(()))
    if not block:
        return replace(params, axis=axis)
    others = (*shape[:axis], *shape[axis + 1 :], -(-shape[axis] // block))
    scale = np.ascontiguousarray(np.moveaxis(params.scale.reshape(others), -1, axis))
    zero_point = np.ascontiguousarray(np.moveaxis(params.zero_point.reshape(others), -1, axis))
    return replace(params, axis=axis, block_size=block, scale=scale, zero_point=zero_point)
