"""Rounding weights so that a layer's output moves least: errors of one input are made up for by the ones still to be rounded.

With the Hessian H, the sum over samples of x^T x, the output of `x @ W` moves by `tr((W - Wq)^T H (W - Wq))`. Nearest rounding
minimizes it only where inputs are uncorrelated.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import GraphError
from edgekit.quant.affine import CODE_DTYPES, dequantize, quantize
from edgekit.quant.spec import QuantParams

BLOCK = 128
"""Rows rounded between two matrix products with all the others: their part of the Hessian stays in the second-level cache."""


def gptq(
    weight: NDArray[np.float32],
    hessian: NDArray[np.floating],
    params: QuantParams,
    *,
    damping: float = 0.01,
    order: bool = True,
) -> NDArray[np.generic]:
    """Codes `(K, N)` of a weight `(K, N)`, rounded input by input, each error spread over the inputs still to be rounded.

    In the quadratic objective no output channel ends worse than with the nearest codes.

    Args:
        weight: `(K, N)`: K inputs, N output channels of `y = x @ weight`.
        hessian: `(K, K)`: the sum over samples of `x^T x`, of the inputs that the layer will see: the quantized ones.
        params: the grid of the weight: per tensor, per channel (`axis=1`) or in blocks of inputs (`axis=0`).
        damping: this share of the mean diagonal is added to the diagonal; ten times more until the Hessian can be factorized.
        order: round the inputs of greatest energy first, while most others can still make up for them.

    Raises:
        GraphError: the Hessian holds NaN or infinity.

    Reference: Frantar, Ashkboos, Hoefler, Alistarh (2022), "GPTQ", arXiv:2210.17323, Algorithm 1. The factor of the Hessian
        itself, worked through backwards, gives the same codes as that of its inverse, and saves the inversion: Chen,
        Shabanzadeh, Crnčević, Hoefler, Alistarh (2025), "The Geometry of LLM Quantization", arXiv:2507.18553.
    """
    nearest = quantize(weight, params)
    scaled = _scaled(hessian)
    energy = scaled.diagonal()
    # The last row goes first: back substitution with the lower factor runs upwards.
    rows = np.argsort(energy, kind="stable") if order else np.arange(len(energy))[::-1]
    factor = _factorize(scaled[np.ix_(rows, rows)], damping)
    scale, zero_point = broadcast_grid(params, weight.shape)
    codes = np.empty_like(nearest)
    codes[rows] = _round_rows(weight[rows], factor, scale[rows], zero_point[rows], params)
    return _better_channels(weight, scaled, params, nearest, codes)


def broadcast_grid(params: QuantParams, shape: tuple[int, ...]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Scale and zero point of each element of an array of `shape`; views where one serves many."""
    scale, zero_point = params.scale, params.zero_point
    if params.axis is not None and params.block_size:
        element = np.arange(shape[params.axis]) // params.block_size
        scale, zero_point = scale.take(element, params.axis), zero_point.take(element, params.axis)
    elif params.axis is not None:
        against = [1] * len(shape)
        against[params.axis] = -1
        scale, zero_point = scale.reshape(against), zero_point.reshape(against)
    return np.broadcast_to(scale, shape), np.broadcast_to(zero_point, shape)


def _scaled(hessian: NDArray[np.floating]) -> NDArray[np.float32]:
    """The Hessian as float32, its mean diagonal brought to 1: codes do not depend on its scale, overflow would."""
    mean = float(np.mean(hessian.diagonal(), dtype=np.float64))
    scaled = np.asarray(hessian / (mean if mean > 0.0 else 1.0), np.float32)
    if not np.isfinite(scaled).all():
        raise GraphError(
            f"the sums of products of a layer's {len(hessian)} inputs hold NaN or infinity; expected finite activations: "
            "check the calibration data, or round this layer's weights to the nearest code"
        )
    return scaled


def _factorize(hessian: NDArray[np.float32], damping: float) -> NDArray[np.float32]:
    """The lower factor C of the damped Hessian, H = C C^T. An input that was always 0 stands alone: nothing makes up for it."""
    energy = np.where(hessian.diagonal() > 0.0, hessian.diagonal(), 1.0)
    while True:
        np.fill_diagonal(hessian, energy + damping)
        try:
            return np.asarray(np.linalg.cholesky(hessian))
        except np.linalg.LinAlgError:
            assert damping < len(hessian), "a sum of x^T x is positive semidefinite: it never needs so much"
            damping = max(damping * 10.0, 1e-6)


def _round_rows(
    weight: NDArray[np.float32],
    factor: NDArray[np.float32],
    scale: NDArray[np.float32],
    zero_point: NDArray[np.int64],
    params: QuantParams,
) -> NDArray[np.generic]:
    """Codes from the last row to the first: each is chosen so that its row of `C^T (W - Wq)` is nearest to 0."""
    low, high = (params.qmin - zero_point).astype(np.float32), (params.qmax - zero_point).astype(np.float32)
    levels, error = np.empty_like(weight), np.empty_like(weight)
    for stop in range(len(weight), 0, -BLOCK):
        start = max(stop - BLOCK, 0)
        pivot = factor.diagonal()[start:stop, None]
        wanted = weight[start:stop] + factor[stop:, start:stop].T @ error[stop:] / pivot
        inside = factor[start:stop, start:stop].T / pivot
        for row in range(stop - 1, start - 1, -1):
            i = row - start
            target = wanted[i] + inside[i, i + 1 :] @ error[row + 1 : stop]
            levels[row] = np.clip(np.rint(target / scale[row]), low[row], high[row])
            levels[row][weight[row] == 0.0] = 0.0  # pruned, and to stay so
            error[row] = weight[row] - levels[row] * scale[row]
    return (levels.astype(np.int64) + zero_point).astype(CODE_DTYPES[params.dtype])


def _better_channels(
    weight: NDArray[np.float32],
    hessian: NDArray[np.float32],
    params: QuantParams,
    nearest: NDArray[np.generic],
    codes: NDArray[np.generic],
) -> NDArray[np.generic]:
    """`codes` where they lower a channel's objective, else `nearest`.

    The difference of two quadratic forms is one product, (a - b)^T H (a + b), and loses no digits where they are close.
    """
    a, b = weight - dequantize(codes, params), weight - dequantize(nearest, params)
    change = np.einsum("kn,kn->n", a - b, hessian @ (a + b), dtype=np.float64)
    return np.where(change < 0.0, codes, nearest)
