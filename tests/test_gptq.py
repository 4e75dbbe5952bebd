"""GPTQ against the textbook's algorithm, code for code, and against nearest rounding in the objective that it lowers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgekit.errors import GraphError
from edgekit.quant import gptq as gptq_module
from edgekit.quant.affine import choose_params, dequantize, quantize, weight_params
from edgekit.quant.gptq import gptq
from edgekit.quant.spec import QuantParams, QuantSpec

INT4 = QuantSpec("int4", symmetric=True, per_channel=True, narrow_range=True)


def correlated_rows(n: int, k: int, seed: int = 0) -> NDArray[np.float32]:
    """Inputs that share a third as many causes, never negative, as after a Relu."""
    rng = np.random.default_rng(seed)
    causes = rng.normal(0, 1, (n, max(1, k // 3))) @ rng.normal(0, 1, (max(1, k // 3), k))
    return np.maximum(causes + rng.normal(0, 0.3, (n, k)), 0).astype(np.float32)


def weights(k: int, n: int, seed: int = 1) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 1, (k, n)).astype(np.float32)


def blocks_of(size: int, weight: NDArray[np.float32], spec: QuantSpec) -> QuantParams:
    """A grid for each `size` inputs of each channel."""
    grids = [weight_params(rows, spec, axis=1) for rows in np.split(weight, range(size, len(weight), size))]
    scale, zero_point = (np.stack([getattr(grid, name) for grid in grids]) for name in ("scale", "zero_point"))
    return QuantParams(spec.dtype, scale, zero_point, axis=0, narrow_range=spec.narrow_range, block_size=size)


def objective(
    weight: NDArray[np.float32], hessian: NDArray[np.floating], params: QuantParams, codes: NDArray[np.generic]
) -> NDArray[np.float64]:
    error = (weight - dequantize(codes, params)).astype(np.float64)
    return np.asarray(np.einsum("kn,kj,jn->n", error, hessian, error))


def textbook(
    weight: NDArray[np.float32], hessian: NDArray[np.float32], params: QuantParams, order: bool
) -> NDArray[np.int64]:
    """Algorithm 1 of the paper without its blocks, in float64: rounds a row, then moves all rows behind it."""
    h, w = hessian.astype(np.float64), weight.astype(np.float64)
    rows = np.argsort(-h.diagonal()) if order else np.arange(len(h))
    h, w = h[np.ix_(rows, rows)] + 0.01 * np.mean(h.diagonal()) * np.eye(len(h)), w[rows]
    inverse = np.linalg.cholesky(np.linalg.inv(h)).T
    scale = np.repeat(np.atleast_2d(params.scale), params.block_size or len(w), axis=0)[: len(w)][rows]
    zero = np.repeat(np.atleast_2d(params.zero_point), params.block_size or len(w), axis=0)[: len(w)][rows]
    codes = np.empty(w.shape, np.int64)
    for i in range(len(w)):
        codes[rows[i]] = np.clip(np.rint(w[i] / scale[i]) + zero[i], params.qmin, params.qmax)
        error = (w[i] - (codes[rows[i]] - zero[i]) * scale[i]) / inverse[i, i]
        w[i:] -= np.outer(inverse[i, i:], error)
    return codes


GRIDS = {
    "per channel": lambda w: weight_params(w, INT4, axis=1),
    "per tensor": lambda w: choose_params(w.min(), w.max(), QuantSpec("uint4")),
    "affine": lambda w: weight_params(w, QuantSpec("uint8", per_channel=True), axis=1),
    "blocks": lambda w: blocks_of(16, w, QuantSpec("uint4", per_channel=True)),
    "clipped": lambda w: choose_params(-1.0, 1.0, QuantSpec("int4", symmetric=True)),
}


@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("grid", GRIDS)
def test_codes_are_the_textbook_s(grid: str, order: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq_module, "BLOCK", 16)
    weight, x = weights(40, 6), correlated_rows(200, 40)
    params, hessian = GRIDS[grid](weight), x.T @ x
    expected, codes = textbook(weight, hessian, params, order), gptq(weight, hessian, params, order=order)
    nearest = quantize(weight, params)
    better = objective(weight, hessian, params, expected) < objective(weight, hessian, params, nearest)
    assert better.any()
    assert codes.dtype == nearest.dtype
    np.testing.assert_array_equal(codes, np.where(better, expected, nearest))


@pytest.mark.parametrize("k", [1, 127, 128, 300])
def test_blocks_change_no_code(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = weights(k, 8), correlated_rows(2 * k, k)
    params = weight_params(weight, INT4, axis=1)
    blocked = gptq(weight, x.T @ x, params)
    monkeypatch.setattr(gptq_module, "BLOCK", 10_000)
    np.testing.assert_array_equal(blocked, gptq(weight, x.T @ x, params))


@settings(max_examples=60, deadline=None)
@given(
    k=st.integers(1, 40),
    n=st.integers(1, 8),
    rows=st.integers(1, 80),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(["int4", "uint4", "int8", "uint8"]),
    order=st.booleans(),
    size=st.sampled_from([1e-12, 1.0, 1e12]),
)
def test_no_channel_is_worse_than_nearest(
    k: int, n: int, rows: int, seed: int, dtype: str, order: bool, size: float
) -> None:
    weight, x = weights(k, n, seed), correlated_rows(rows, k, seed).astype(np.float64) * size
    params = weight_params(weight, QuantSpec(dtype, per_channel=True), axis=1)
    codes = gptq(weight, x.T @ x, params, order=order)
    assert codes.min() >= params.qmin and codes.max() <= params.qmax
    nearest = objective(weight, x.T @ x, params, quantize(weight, params))
    assert np.all(objective(weight, x.T @ x, params, codes) <= nearest * (1 + 1e-5))


@pytest.mark.parametrize("dtype", ["int4", "int8"])
def test_correlated_inputs_lose_half_the_error_and_more(dtype: str) -> None:
    weight, x, unseen = weights(96, 16), *np.split(correlated_rows(2000, 96), 2)
    params = weight_params(weight, QuantSpec(dtype, symmetric=True, per_channel=True), axis=1)
    codes, nearest = gptq(weight, x.T @ x, params), quantize(weight, params)
    for hessian, most in ((x.T @ x, 0.5), (unseen.T @ unseen, 0.55)):
        error, before = (objective(weight, hessian, params, c).sum() for c in (codes, nearest))
        assert error < most * before


def test_uncorrelated_inputs_leave_the_nearest_codes() -> None:
    weight = weights(50, 6)
    params = weight_params(weight, INT4, axis=1)
    hessian = np.diag(np.random.default_rng(0).uniform(0, 5, 50))
    np.testing.assert_array_equal(gptq(weight, hessian, params), quantize(weight, params))


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_inputs_that_were_always_zero_keep_the_nearest_codes(damping: float) -> None:
    weight, x = weights(30, 6), correlated_rows(400, 30)
    x[:, [0, 7, 29]] = 0
    params = weight_params(weight, INT4, axis=1)
    codes, nearest = gptq(weight, x.T @ x, params, damping=damping), quantize(weight, params)
    np.testing.assert_array_equal(codes[[0, 7, 29]], nearest[[0, 7, 29]])
    assert (codes != nearest).any()
    np.testing.assert_array_equal(gptq(weight, np.zeros((30, 30)), params, damping=damping), nearest)


def test_a_singular_hessian_is_damped_until_it_factorizes() -> None:
    weight, x = weights(60, 6), correlated_rows(5, 60)
    params, hessian = weight_params(weight, INT4, axis=1), x.T @ x
    codes = gptq(weight, hessian, params, damping=0.0)
    before = objective(weight, hessian, params, quantize(weight, params)).sum()
    assert objective(weight, hessian, params, codes).sum() < 0.1 * before


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_broken_hessian_is_explained(broken: float) -> None:
    weight, hessian = weights(4, 2), np.eye(4)
    hessian[1, 2] = hessian[2, 1] = broken
    with pytest.raises(GraphError, match="4 inputs hold NaN or infinity; expected finite activations"):
        gptq(weight, hessian, weight_params(weight, INT4, axis=1))


def test_neither_argument_is_written_to() -> None:
    weight, x = weights(20, 4), correlated_rows(100, 20)
    hessian = (x.T @ x).astype(np.float32)
    hessian /= np.float32(np.mean(hessian.diagonal(), dtype=np.float64))
    kept, kept_weight = hessian.copy(), weight.copy()
    gptq(weight, hessian, weight_params(weight, INT4, axis=1))
    np.testing.assert_array_equal(hessian, kept)
    np.testing.assert_array_equal(weight, kept_weight)
