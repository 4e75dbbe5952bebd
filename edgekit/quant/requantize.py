"""Scaling int32 accumulators by a real number with integers only: a fixed-point multiplier and a shift."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgekit.errors import GraphError

MULTIPLIER_BITS = 31
MAX_SHIFT = 62
"""With |accumulator| <= 2**31 and multiplier < 2**31, product and rounding term stay below 2**63."""


def requantize_multiplier(real: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The `(multiplier, shift)` with `real = multiplier * 2**-shift`, to 31 bits; shapes as `real`, e.g. `(C_out,)`.

    The multiplier lies in `[2**30, 2**31)`, unless `real` is below 2**-32: then the shift stays at 62 and the
    multiplier gets smaller, which changes no result (the product rounds to zero or is at most one).

    >>> requantize_multiplier(0.75)
    (array(1610612736), array(31))

    Raises:
        GraphError: a number that is not finite and positive, or not below 2**31.

    Reference: Jacob et al. 2018, arXiv:1712.05877, section 2.2, equations 5 and 6.
    """
    numbers = np.asarray(real, dtype=np.float64)
    _refuse_unscalable(numbers)
    exponent = np.frexp(numbers)[1].astype(np.int64)
    shift = np.minimum(MULTIPLIER_BITS - exponent, MAX_SHIFT)
    multiplier = np.rint(np.ldexp(numbers, shift.astype(np.int32))).astype(np.int64)
    carried = multiplier == 2**MULTIPLIER_BITS
    if np.any(carried & (shift == 0)):
        raise GraphError(
            f"cannot requantize by {float(numbers.max())!r}: it rounds to 2**31; use a larger output scale"
        )
    multiplier, shift = np.where(carried, multiplier // 2, multiplier), np.where(carried, shift - 1, shift)
    return np.asarray(multiplier, np.int64), np.asarray(shift, np.int64)


def shared_shift_multipliers(reals: Sequence[float]) -> tuple[list[int], int]:
    """Multipliers with one shift for all, set by the largest, so that scaled terms can be added before rounding.

    Numbers may be negative (a subtraction).

    Raises:
        GraphError: a number that is zero, not finite, or not below 2**31.
    """
    _refuse_unscalable(np.abs(np.asarray(reals, dtype=np.float64)))
    _, shift = requantize_multiplier(max(abs(real) for real in reals))
    return [int(np.rint(np.ldexp(real, int(shift)))) for real in reals], int(shift)


def requantize(
    accumulator: NDArray[np.integer],
    multiplier: NDArray[np.int64] | int,
    shift: NDArray[np.int64] | int,
    *,
    zero_point: int,
    low: int,
    high: int,
) -> NDArray[np.int64]:
    """`clip(accumulator * multiplier * 2**-shift + zero_point, low, high)`, ties rounded up; shapes broadcast.

    Ties go toward plus infinity, where ONNX QuantizeLinear takes the even code: exactly at a tie the two may differ
    by one code.
    """
    half = np.left_shift(np.int64(1), np.asarray(shift, np.int64)) >> 1
    scaled = (accumulator.astype(np.int64) * np.asarray(multiplier, np.int64) + half) >> np.asarray(shift, np.int64)
    return np.asarray(np.clip(scaled + zero_point, low, high), np.int64)


def _refuse_unscalable(numbers: NDArray[np.float64]) -> None:
    bad = ~(np.isfinite(numbers) & (numbers > 0) & (numbers < 2.0**MULTIPLIER_BITS))
    if np.any(bad):
        raise GraphError(
            f"cannot requantize by {float(np.atleast_1d(numbers)[np.atleast_1d(bad)][0])!r}: "
            "expected a finite number above 0 and below 2**31; look at the scales of the input, weight and output"
        )
