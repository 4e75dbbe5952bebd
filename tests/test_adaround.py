"""AdaRound: it beats nearest rounding on rows it has and has not seen, stops in time, and never ends worse than it began."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from edgekit.quant.affine import choose_params, dequantize, fake_quantize, quantize, weight_params
from edgekit.quant.gptq import gptq
from edgekit.quant.spec import QuantParams, QuantSpec
from edgekit.training.adaround import Activation, adaround

INT4 = QuantSpec("int4", symmetric=True, per_channel=True, narrow_range=True)
FOREVER = 1e9

Array = NDArray[np.float32]


def correlated_rows(*shape: int, seed: int = 0) -> Array:
    """Inputs that share a third as many causes, never negative, as after a Relu."""
    rng, k = np.random.default_rng(seed), shape[-1]
    causes = rng.normal(0, 1, (*shape[:-1], k // 3)) @ rng.normal(0, 1, (k // 3, k))
    return np.maximum(causes + rng.normal(0, 0.3, shape), 0).astype(np.float32)


def weights(*shape: int) -> Array:
    return np.random.default_rng(1).normal(0, 1, shape).astype(np.float32)


def quantized(x: Array) -> Array:
    return fake_quantize(x, choose_params(x.min(), x.max(), QuantSpec("uint8")))


def error(
    x: Array, y: Array, weight: Array, bias: Array | float = 0.0, activation: Activation = None
) -> NDArray[np.float64]:
    """The mean squared error of each output channel."""
    found, wanted = x.astype(np.float64) @ weight + bias, y.astype(np.float64)
    if activation == "relu":
        found, wanted = np.maximum(found, 0), np.maximum(wanted, 0)
    return np.asarray(np.square(found - wanted).mean(-2))


def test_it_takes_a_third_of_nearest_s_error_and_more_also_on_rows_it_has_not_seen() -> None:
    x, weight = correlated_rows(1200, 48), weights(48, 8)
    y, xq = x @ weight, quantized(x)
    params = weight_params(weight, INT4, axis=1)
    codes = adaround(weight, xq[:800], y[:800], params, time_budget_s=FOREVER, iterations=400)
    nearest = quantize(weight, params)
    assert codes.dtype == nearest.dtype and codes.shape == nearest.shape
    assert codes.min() >= params.qmin and codes.max() <= params.qmax
    for rows in (slice(0, 800), slice(800, 1200)):
        found, before = (error(xq[rows], y[rows], dequantize(c, params)) for c in (codes, nearest))
        assert found.sum() < 0.67 * before.sum()


def test_each_weight_goes_to_one_of_its_two_neighbours() -> None:
    x, weight = correlated_rows(300, 24), weights(24, 4)
    params = weight_params(weight, INT4, axis=1)
    codes = adaround(weight, x, x @ weight, params, time_budget_s=FOREVER, iterations=200)
    assert np.all(np.abs(dequantize(codes, params) - weight) < params.scale * (1 + 1e-5))


def grouped_params(weight: Array) -> QuantParams:
    """A grid for each output channel of each group."""
    grids = [weight_params(group, INT4, axis=1) for group in weight]
    scale, zero_point = (np.stack([getattr(grid, name) for grid in grids])[:, None] for name in ("scale", "zero_point"))
    return QuantParams("int4", scale, zero_point, axis=1, narrow_range=True, block_size=weight.shape[1])


def test_groups_are_rounded_as_if_each_were_alone() -> None:
    x, weight = correlated_rows(3, 400, 24), weights(3, 24, 4)
    bias = np.random.default_rng(2).normal(0, 1, (3, 4)).astype(np.float32)
    y = x @ weight + bias[:, None]
    codes = adaround(weight, x, y, grouped_params(weight), bias=bias, time_budget_s=FOREVER, iterations=300)
    assert codes.shape == weight.shape
    for group in range(3):
        params = weight_params(weight[group], INT4, axis=1)
        alone = adaround(
            weight[group], x[group], y[group], params, bias=bias[group], time_budget_s=FOREVER, iterations=300
        )
        assert (alone != quantize(weight[group], params)).any()
        assert (alone == codes[group]).mean() > 0.95  # sums in another order may tip a code


def test_a_relu_spares_it_the_errors_below_zero() -> None:
    x, weight = correlated_rows(600, 36), weights(36, 8)
    bias = np.asarray(-(x @ weight).mean(0) - 2 * (x @ weight).std(0) * 0.5, np.float32)  # most outputs are cut off
    y, params = x @ weight + bias, weight_params(weight, INT4, axis=1)
    relu, linear = (
        adaround(weight, x, y, params, bias=bias, activation=name, time_budget_s=FOREVER, iterations=300)
        for name in ("relu", None)
    )
    found, other = (error(x, y, dequantize(codes, params), bias, "relu").sum() for codes in (relu, linear))
    assert found < other


@pytest.mark.parametrize("iterations", [0, 1, 50])
@pytest.mark.parametrize("learning_rate", [1e-2, 30.0])
def test_no_channel_ends_worse_than_nearest(iterations: int, learning_rate: float) -> None:
    x, weight = correlated_rows(100, 24), weights(24, 16)
    y, xq, params = x @ weight, quantized(x), weight_params(weight, INT4, axis=1)
    codes = adaround(weight, xq, y, params, time_budget_s=FOREVER, iterations=iterations, learning_rate=learning_rate)
    before = error(xq, y, dequantize(quantize(weight, params), params))
    assert np.all(error(xq, y, dequantize(codes, params)) <= before * (1 + 1e-4))


def test_from_gptq_s_codes_no_channel_ends_worse_than_they() -> None:
    x, weight = correlated_rows(400, 48), weights(48, 8)
    y, params = x @ weight, weight_params(weight, INT4, axis=1)
    start = gptq(weight, x.T @ x, params)
    codes = adaround(weight, x, y, params, start=start, time_budget_s=FOREVER, iterations=300)
    found, before = (error(x, y, dequantize(c, params)) for c in (codes, start))
    assert np.all(found <= before * (1 + 1e-4))
    assert np.all(np.abs(codes.astype(int) - start) <= 1)


def test_the_seed_decides() -> None:
    x, weight = correlated_rows(600, 48), weights(48, 8)
    params = weight_params(weight, INT4, axis=1)

    def codes(seed: int) -> NDArray[np.generic]:
        return adaround(weight, x, x @ weight, params, time_budget_s=FOREVER, iterations=60, seed=seed)

    state = torch.random.get_rng_state()
    np.testing.assert_array_equal(codes(0), codes(0))
    assert (codes(0) != codes(1)).any()
    assert torch.equal(torch.random.get_rng_state(), state), "torch's own generator is the caller's"


def test_it_stops_in_time_with_what_it_has() -> None:
    x, weight = correlated_rows(600, 48), weights(48, 8)
    params, y = weight_params(weight, INT4, axis=1), x @ weights(48, 8)
    started = time.monotonic()
    codes = adaround(weight, x, y, params, time_budget_s=0.3, iterations=10**9)
    assert 0.3 <= time.monotonic() - started < 3
    before = error(x, y, dequantize(quantize(weight, params), params))
    assert np.all(error(x, y, dequantize(codes, params)) <= before * (1 + 1e-4))


def test_what_lies_on_the_grid_stays_there() -> None:
    params = weight_params(weights(24, 4), INT4, axis=1)
    on_grid = fake_quantize(weights(24, 4), params)
    x = correlated_rows(200, 24)
    codes = adaround(on_grid, x, x @ on_grid, params, time_budget_s=FOREVER, iterations=50)
    np.testing.assert_array_equal(codes, quantize(on_grid, params))
