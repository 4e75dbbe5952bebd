"""The two records that quantization is about: `QuantSpec`, the wish, and `QuantParams`, the result."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

INTEGER_RANGES: dict[str, tuple[int, int]] = {
    "int2": (-2, 1),
    "uint2": (0, 3),
    "int4": (-8, 7),
    "uint4": (0, 15),
    "int8": (-128, 127),
    "uint8": (0, 255),
    "int16": (-32768, 32767),
    "uint16": (0, 65535),
    "int32": (-(2**31), 2**31 - 1),
}
"""The representable codes of each quantized type, both ends included."""

BITS = {name: (highest - lowest).bit_length() for name, (lowest, highest) in INTEGER_RANGES.items()}
"""The width of each type."""

WIDE = {"uint8": "uint16", "int8": "int16", "uint16": "uint16", "int16": "int16"}
"""The same kind of grid in 16 bits."""


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """How a kind of tensor is to be quantized.

    Attributes:
        dtype: one of `INTEGER_RANGES`.
        symmetric: the zero point is the middle code (0 for signed types).
        per_channel: one scale per channel instead of one per tensor; the axis is the operator's business.
        narrow_range: leave the lowest code unused (int8: -127 to 127).
        block_size: one scale for each so many elements along the axis that a constant is summed over; 0 is one for all.
    """

    dtype: str = "uint8"
    symmetric: bool = False
    per_channel: bool = False
    narrow_range: bool = False
    block_size: int = 0

    @property
    def qmin(self) -> int:
        """The lowest code in use."""
        return INTEGER_RANGES[self.dtype][0] + (1 if self.narrow_range else 0)

    @property
    def qmax(self) -> int:
        """The highest code in use."""
        return INTEGER_RANGES[self.dtype][1]


@dataclass(frozen=True, slots=True, eq=False)
class QuantParams:
    """The quantization grid of one tensor: `real = (code - zero_point) * scale`.

    Attributes:
        dtype: type of the codes, one of `INTEGER_RANGES`.
        scale: float32, shape `()` per tensor, `(C,)` per channel or, in blocks, the tensor's own with `axis` divided by the
            block size, rounded up; positive and finite.
        zero_point: int64 here (stored as `dtype` in files), the shape of `scale`.
        axis: the channel axis, or the axis that is cut in blocks; None per tensor.
        narrow_range: the lowest code is not used.
        observer: what chose the range ("minmax", "kld", "fake_quant", ...).
        low, high: the range that the grid was chosen for, before it was rounded to codes; NaN when not known.
            `export` re-grids from it.
        fixed: the grid was trained, or came with the source: it is re-expressed losslessly or not at all.
        block_size: elements of `axis` that share a scale; 0 when no axis is cut in blocks.
        codes: of a constant, the codes that were chosen for it, of its shape; None where they are the nearest ones.
        shift: of a constant weight, float32 `(C_out,)`: what quantization adds to each output of its layer in the mean. Lowering
            takes it off the bias.
        limits: the first and last code in use, of a grid of fewer bits in the codes of a wider type; None for all of the type's.
    """

    dtype: str
    scale: NDArray[np.float32]
    zero_point: NDArray[np.int64]
    axis: int | None = None
    narrow_range: bool = False
    observer: str = ""
    low: float = float("nan")
    high: float = float("nan")
    fixed: bool = False
    block_size: int = 0
    codes: NDArray[np.generic] | None = None
    shift: NDArray[np.float32] | None = None
    limits: tuple[int, int] | None = None

    @property
    def qmin(self) -> int:
        """The lowest code in use."""
        lowest = INTEGER_RANGES[self.dtype][0] if self.limits is None else self.limits[0]
        return lowest + (1 if self.narrow_range else 0)

    @property
    def qmax(self) -> int:
        """The highest code in use."""
        return INTEGER_RANGES[self.dtype][1] if self.limits is None else self.limits[1]

    def __eq__(self, other: object) -> bool:
        """Equal in every field; arrays by value, NaN equal to NaN."""
        if not isinstance(other, QuantParams):
            return NotImplemented
        plain = ("dtype", "axis", "narrow_range", "observer", "fixed", "block_size", "limits")
        return (
            all(getattr(self, name) == getattr(other, name) for name in plain)
            and same_grid(self, other)
            and _same(self.codes, other.codes)
            and _same(self.shift, other.shift)
            and np.array_equal([self.low, self.high], [other.low, other.high], equal_nan=True)
        )

    __hash__ = None  # type: ignore[assignment]


def same_grid(a: QuantParams, b: QuantParams) -> bool:
    """Whether two parameters put the same codes on the same real numbers."""
    return (
        a.dtype == b.dtype
        and a.axis == b.axis
        and a.block_size == b.block_size
        and a.limits == b.limits
        and np.array_equal(a.scale, b.scale)
        and np.array_equal(a.zero_point, b.zero_point)
    )


def _same(a: NDArray[np.generic] | None, b: NDArray[np.generic] | None) -> bool:
    return (a is None and b is None) or (a is not None and b is not None and np.array_equal(a, b))
