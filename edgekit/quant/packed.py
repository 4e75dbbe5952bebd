"""Codes of a few bits each, several in a byte."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def unpacked(array: Array, bits: int) -> Array:
    """Codes of 2, 4 or 8 bits `(rows, columns)` out of bytes `(rows, columns * bits / 8)`, the lowest bits first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((array[:, :, None] >> shifts) & np.uint8((1 << bits) - 1)).reshape(len(array), -1)


def with_positive_scales(
    codes: Array, scale: Array, zero_point: Array, *, bits: int, block_size: int
) -> tuple[Array, Array, Array]:
    """The same numbers on grids whose scales are positive, where a negative one stood for codes counted from the other end.

    ONNX Runtime gives the larger side of a block the larger side of the codes so. A scale of 0, of a block of zeros, becomes 1.

    Args:
        codes: `(rows, columns)`, unsigned.
        scale, zero_point: `(rows, blocks)`, blocks along the columns.
        bits: of a code.
        block_size: columns that share a scale.
    """
    last, negative = (1 << bits) - 1, scale < 0
    turned = np.where(negative.repeat(block_size, axis=1)[:, : codes.shape[1]], last - codes, codes)
    return turned, np.where(scale == 0, 1, np.abs(scale)), np.where(negative, last - zero_point, zero_point)
