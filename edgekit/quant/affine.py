"""The arithmetic of affine grids: choose one for a range, put numbers on it, re-express it for another target."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgekit.errors import GraphError
from edgekit.quant.spec import INTEGER_RANGES, QuantParams, QuantSpec

TINY = np.finfo(np.float32).tiny
"""The smallest scale: the smallest normal float32, 2**-126. Devices flush smaller ones to zero."""

CODE_DTYPES: dict[str, np.dtype[np.generic]] = {
    name: np.dtype(re.sub("int[24]$", "int8", name)) for name in INTEGER_RANGES
}
"""The numpy type that holds the codes of each quantized type; codes of 2 and 4 bits stand one a byte."""


def middle_code(dtype: str) -> int:
    """The zero point of a symmetric grid: 0 for signed types, 128 for uint8."""
    qmin, qmax = INTEGER_RANGES[dtype]
    return (qmin + qmax + 1) // 2


def choose_params(
    low: ArrayLike, high: ArrayLike, spec: QuantSpec, *, axis: int | None = None, observer: str = ""
) -> QuantParams:
    """The grid of `spec` that covers the ranges from `low` to `high`, of shape `()` per tensor or `(C,)` per channel.

    Ranges are widened to contain 0, so that 0 is a point of the grid. A scale is never below `TINY`. Where a range is
    only the number 0, any scale is right; it is the largest one of the other channels, so that a bias on the grid
    `input scale * weight scale` stays as precise as theirs, and 1 where there is no other.
    `QuantParams.low` and `.high` record the widened range; per channel, the lowest low and the highest high.

    Raises:
        GraphError: a bound is NaN or infinite, or a low lies above its high.
    """
    lo, hi = np.asarray(low, np.float64), np.asarray(high, np.float64)
    assert lo.shape == hi.shape and lo.ndim == (axis is not None), "one range a tensor, or one a channel with its axis"
    if not np.all(np.isfinite(lo) & np.isfinite(hi) & (lo <= hi)):
        raise GraphError(f"found a range from {lo} to {hi}; expected finite numbers, low before high: check the data")
    lo, hi = np.asarray(np.minimum(lo, 0.0) + 0.0), np.asarray(np.maximum(hi, 0.0) + 0.0)  # + 0.0 unsigns -0.0
    if spec.symmetric:
        middle = middle_code(spec.dtype)
        scale = _storable_scale(np.maximum(-lo, hi) / (spec.qmax - middle))
        zero_point = np.full(lo.shape, middle, np.int64)
    else:
        scale = _storable_scale((hi - lo) / (spec.qmax - spec.qmin))
        zero_point = np.asarray(np.clip(np.rint(spec.qmin - lo / scale), spec.qmin, spec.qmax), np.int64)
    return QuantParams(
        dtype=spec.dtype,
        scale=scale,
        zero_point=zero_point,
        axis=axis,
        narrow_range=spec.narrow_range,
        observer=observer,
        low=float(lo.min(initial=0.0)),
        high=float(hi.max(initial=0.0)),
    )


def _storable_scale(exact: NDArray[np.float64]) -> NDArray[np.float32]:
    """Float64 scales as positive normal float32; see `choose_params` for those that are 0."""
    largest = exact.max(initial=0.0)
    filled = np.where(exact == 0.0, largest if largest > 0.0 else 1.0, exact)
    return np.asarray(np.maximum(filled, TINY), np.float32)


def weight_params(
    weight: NDArray[np.generic], spec: QuantSpec, *, axis: int | None, observer: str = "minmax"
) -> QuantParams:
    """The grid of a constant from its own minima and maxima: one for each index of `axis` when `spec.per_channel`.

    Raises:
        GraphError: it holds NaN or infinity.
    """
    values = np.asarray(weight, np.float32)
    broken = values.size - int(np.count_nonzero(np.isfinite(values)))
    if broken:
        raise GraphError(
            f"a constant of shape {values.shape} holds {broken} NaN or infinite values; expected finite weights: "
            "the source model is broken or overflows in its float type"
        )
    if not spec.per_channel:
        return choose_params(values.min(initial=0.0), values.max(initial=0.0), spec, observer=observer)
    assert axis is not None, "per-channel weights need their channel axis"
    axis %= values.ndim
    others = tuple(i for i in range(values.ndim) if i != axis)
    low, high = values.min(axis=others, initial=0.0), values.max(axis=others, initial=0.0)
    return choose_params(low, high, spec, axis=axis, observer=observer)


def quantize(x: NDArray[np.generic], params: QuantParams) -> NDArray[np.generic]:
    """The codes of `x` (any float type, any shape): ONNX `QuantizeLinear`, bit for bit as ONNX Runtime computes it.

    Float32 division, round half to even, saturation; NaN becomes the lowest code. One difference is wanted: a grid of
    narrow range saturates at its own lowest code (int8: -127), where `QuantizeLinear` knows only -128.
    """
    values = np.asarray(x, np.float32)
    scale, zero_point = _grid_against(values.shape, params)
    # float32 holds every bound of up to 16 bits exactly; int32's upper one only float64 does.
    working = np.float64 if params.dtype == "int32" else np.float32
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        scaled = np.asarray(values / scale, working)
    # fmax, unlike maximum, lets the bound win over NaN.
    np.fmax(scaled, (params.qmin - zero_point).astype(working), out=scaled)
    np.minimum(scaled, (params.qmax - zero_point).astype(working), out=scaled)
    np.rint(scaled, out=scaled)
    np.add(scaled, zero_point.astype(working), out=scaled)
    return scaled.astype(CODE_DTYPES[params.dtype])


def dequantize(codes: NDArray[np.generic], params: QuantParams) -> NDArray[np.float32]:
    """The float32 numbers that `codes` stand for: ONNX `DequantizeLinear`, bit for bit as ONNX Runtime computes it."""
    scale, zero_point = _grid_against(codes.shape, params)
    with np.errstate(over="ignore", under="ignore"):
        return np.asarray((codes.astype(np.int32) - zero_point.astype(np.int32)).astype(np.float32) * scale)


def fake_quantize(x: NDArray[np.generic], params: QuantParams) -> NDArray[np.float32]:
    """`x` rounded to the grid, as float32."""
    return dequantize(quantize(x, params), params)


def _grid_against(shape: tuple[int, ...], params: QuantParams) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Scale and zero point shaped to stand against an array of `shape`: per channel `(1, C, 1, ...)`, each block repeated."""
    axis = params.axis
    if axis is None:
        return params.scale, params.zero_point
    if params.block_size:
        element = np.arange(shape[axis]) // params.block_size
        return params.scale.take(element, axis), params.zero_point.take(element, axis)
    against = [1] * len(shape)
    against[axis] = -1
    return params.scale.reshape(against), params.zero_point.reshape(against)


def constant_codes(constant: NDArray[np.generic], params: QuantParams) -> NDArray[np.generic]:
    """The codes of a constant: those that were chosen for it, else the nearest ones."""
    return quantize(constant, params) if params.codes is None else params.codes


def regrid(params: QuantParams, spec: QuantSpec) -> QuantParams:
    """An activation's grid, re-expressed for the target whose grid is `spec`.

    A calibrated grid is chosen anew from its recorded range; between uint8 and int8 affine that changes nothing but
    the zero point, by 128. A grid that is `fixed`, per channel or without a recorded range stays where it is: its
    codes may be renumbered (uint8 zero point 128 is int8 zero point 0), never moved.

    Raises:
        GraphError: such a grid does not fit `spec`.
    """
    movable = not params.fixed and params.axis is None and np.isfinite(params.low) and np.isfinite(params.high)
    if movable:
        return choose_params(params.low, params.high, spec, observer=params.observer)
    shift = middle_code(spec.dtype) - middle_code(params.dtype)
    zero_point = params.zero_point + shift
    fits = (
        _size(spec.dtype) == _size(params.dtype)
        and (params.axis is None or spec.per_channel)
        and (params.narrow_range or not spec.narrow_range)
        and (not spec.symmetric or bool(np.all(zero_point == middle_code(spec.dtype))))
    )
    if not fits:
        raise GraphError(
            f"found a grid of {_describe(params)} that must not be moved, because "
            f"{'it was trained or came with the source' if params.fixed else 'its float range is not known'}; expected "
            f"{_describe_spec(spec)}, which cannot hold the same points: compress the float model again with the --target to export for"
        )
    return replace(params, dtype=spec.dtype, zero_point=zero_point)


def widened(params: QuantParams, spec: QuantSpec) -> QuantParams:
    """A grid of fewer bits in the codes of `spec`: the same points, and no more of them, which every wider type has."""
    first, last = INTEGER_RANGES[params.dtype]
    lowest = INTEGER_RANGES[spec.dtype][0]
    start = middle_code(spec.dtype) - params.zero_point if spec.symmetric else lowest - first + 0 * params.zero_point
    low = int(start.max())
    return replace(
        params,
        dtype=spec.dtype,
        zero_point=params.zero_point + start,
        limits=(first + low, last + low),
        narrow_range=False,
    )


def _size(dtype: str) -> int:
    """How many codes a type has."""
    qmin, qmax = INTEGER_RANGES[dtype]
    return qmax - qmin + 1


def _describe(params: QuantParams) -> str:
    points = np.unique(params.zero_point)
    zero_point = str(points[0]) if points.size == 1 else f"{points[0]} to {points[-1]}"
    where = "per tensor" if params.axis is None else f"per channel of axis {params.axis}"
    narrow = ", narrow range" if params.narrow_range else ""
    return f"{params.dtype}, zero point {zero_point}, {where}{narrow}"


def _describe_spec(spec: QuantSpec) -> str:
    kind = f"symmetric (zero point {middle_code(spec.dtype)})" if spec.symmetric else "affine"
    where = "per channel" if spec.per_channel else "per tensor"
    return f"{spec.dtype}, {kind}, {where}{', narrow range' if spec.narrow_range else ''}"
