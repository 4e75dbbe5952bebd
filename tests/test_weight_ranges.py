from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from edgekit.errors import GraphError, TargetError
from edgekit.quant.affine import choose_params, fake_quantize, weight_params
from edgekit.quant.least_squares import rounded
from edgekit.quant.spec import QuantParams, QuantSpec
from edgekit.quant.weight_ranges import WEIGHT_ESTIMATORS, WEIGHT_SHARES, weight_range

INT8 = QuantSpec("int8", symmetric=True, per_channel=True, narrow_range=True)
INT4, UINT4 = QuantSpec("int4", symmetric=True, per_channel=True), QuantSpec("uint4", per_channel=True)
INT2, UINT2 = QuantSpec("int2", symmetric=True, per_channel=True), QuantSpec("uint2", per_channel=True)
SPECS = [INT8, INT4, UINT4, INT2, UINT2]
on_every_grid = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.dtype)
by_every_estimator = pytest.mark.parametrize("estimator", WEIGHT_ESTIMATORS)


def weights(shape: tuple[int, ...] = (12, 40), seed: int = 0) -> NDArray[np.float32]:
    """Channels of very different sizes and shapes: normal, heavy tails, one-sided, constant, zero, one outlier."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(shape) * rng.gamma(1, 1, (shape[0], *[1] * (len(shape) - 1)))
    w[1] = rng.standard_t(2, shape[1:])
    w[2], w[3], w[4], w[5] = np.abs(w[2]), -np.abs(w[3]), 0.7, 0.0
    w[6].reshape(-1)[0] = 50.0
    return w.astype(np.float32)


def squared_errors(weight: NDArray[np.float32], params: QuantParams) -> NDArray[np.float64]:
    """Of each channel, axis 0."""
    return np.square(fake_quantize(weight, params).astype(np.float64) - weight).reshape(weight.shape[0], -1).sum(axis=1)


@on_every_grid
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_minmax_is_what_weight_params_gives(axis: int, spec: QuantSpec) -> None:
    w = weights((12, 5, 3, 3))
    assert weight_range(w, spec, axis=axis, estimator="minmax") == weight_params(w, spec, axis=axis)
    whole = QuantSpec(spec.dtype, spec.symmetric, narrow_range=spec.narrow_range)
    assert weight_range(w, whole, axis=axis, estimator="minmax") == weight_params(w, whole, axis=None)


@on_every_grid
@by_every_estimator
@pytest.mark.parametrize("axis", [0, 1])
def test_a_channel_is_quantized_as_if_it_were_alone(axis: int, estimator: str, spec: QuantSpec) -> None:
    w = np.moveaxis(weights(), 0, axis)
    together = fake_quantize(w, weight_range(w, spec, axis=axis, estimator=estimator))
    whole = QuantSpec(spec.dtype, spec.symmetric, narrow_range=spec.narrow_range)
    for index in range(w.shape[axis]):
        alone = w.take(index, axis)
        wanted = fake_quantize(alone, weight_range(alone, whole, axis=None, estimator=estimator))
        np.testing.assert_array_equal(together.take(index, axis), wanted)


@on_every_grid
@by_every_estimator
@pytest.mark.parametrize(
    "shape, axis, block", [((12, 40), 1, 8), ((12, 40), 0, 4), ((12, 38), 1, 16), ((12, 3, 10), 2, 4)]
)
def test_a_block_is_quantized_as_if_it_were_alone(
    shape: tuple[int, ...], axis: int, block: int, estimator: str, spec: QuantSpec
) -> None:
    w = weights(shape)
    blocked = QuantSpec(spec.dtype, spec.symmetric, narrow_range=spec.narrow_range, block_size=block)
    params = weight_range(w, blocked, axis=axis, estimator=estimator)
    count = -(-shape[axis] // block)
    assert params.scale.shape == params.zero_point.shape == (*shape[:axis], count, *shape[axis + 1 :])
    assert (params.axis, params.block_size) == (axis, block)
    together = np.moveaxis(fake_quantize(w, params), axis, -1)
    rows = np.moveaxis(w, axis, -1)
    for place in itertools.product(*map(range, rows.shape[:-1]), range(count)):
        part = (*place[:-1], slice(place[-1] * block, (place[-1] + 1) * block))
        alone = np.zeros(block, np.float32)  # a short last block counts as filled up with zeros
        alone[: rows[part].size] = rows[part]
        grid = weight_range(
            alone, QuantSpec(spec.dtype, spec.symmetric, narrow_range=spec.narrow_range), axis=None, estimator=estimator
        )
        np.testing.assert_array_equal(together[part], fake_quantize(rows[part], grid))


@on_every_grid
@pytest.mark.parametrize("seed", range(3))
def test_mse_is_the_best_share_of_each_channel(seed: int, spec: QuantSpec) -> None:
    w = weights(seed=seed)
    found = squared_errors(w, weight_range(w, spec, axis=0, estimator="mse"))
    low, high = np.minimum(w.min(axis=1), 0.0).astype(np.float64), np.maximum(w.max(axis=1), 0.0).astype(np.float64)
    shares = WEIGHT_SHARES if spec.symmetric else WEIGHT_SHARES[::3]
    pairs = [(a, a) for a in shares] if spec.symmetric else itertools.product(shares, shares)
    tried = [squared_errors(w, choose_params(a * low, b * high, spec, axis=0)) for a, b in pairs]
    best = np.min(tried, axis=0)
    if spec.symmetric:
        np.testing.assert_allclose(found, best, rtol=1e-9, atol=1e-12)
    else:  # ends that take turns stop at a local optimum
        assert np.all(found <= 1.3 * best + 1e-12)
        assert found.sum() <= 1.05 * best.sum()


@on_every_grid
def test_admm_is_about_as_good_as_mse_and_often_better(spec: QuantSpec) -> None:
    w = weights((200, 96))
    mse, admm = (squared_errors(w, weight_range(w, spec, axis=0, estimator=name)) for name in ("mse", "admm"))
    some = mse > 1e-9
    assert np.median(admm[some] / mse[some]) < 1.02
    assert np.count_nonzero(admm < mse) > 40


@pytest.mark.parametrize("spec, decibels", [(INT4, 1.5), (INT2, 5.0), (UINT2, 1.5)], ids=["int4", "int2", "uint2"])
@pytest.mark.parametrize("estimator", ["mse", "admm"])
def test_few_bits_gain_much_by_clipping(estimator: str, spec: QuantSpec, decibels: float) -> None:
    w = np.random.default_rng(0).standard_normal((32, 576)).astype(np.float32)
    full = squared_errors(w, weight_range(w, spec, axis=0)).sum()
    clipped = squared_errors(w, weight_range(w, spec, axis=0, estimator=estimator)).sum()
    assert 10 * np.log10(full / clipped) > decibels


@pytest.mark.parametrize("estimator", ["mse", "admm"])
@pytest.mark.parametrize("spec", [QuantSpec("int4", symmetric=True), QuantSpec("uint4")], ids=["int4", "uint4"])
def test_a_large_weight_with_one_range_is_searched_as_well_as_a_small_one(spec: QuantSpec, estimator: str) -> None:
    w = np.random.default_rng(0).standard_t(4, 30_000).astype(np.float32)
    low, high = float(w.min()), float(w.max())
    pairs = (
        [(a, a) for a in WEIGHT_SHARES] if spec.symmetric else itertools.product(WEIGHT_SHARES[::3], WEIGHT_SHARES[::3])
    )
    reach = max(-low, high)
    ends = (-reach, reach) if spec.symmetric else (low, high)
    best = min(squared_errors(w[None], choose_params(a * ends[0], b * ends[1], spec)).item() for a, b in pairs)
    found = squared_errors(w[None], weight_range(w, spec, axis=None, estimator=estimator)).item()
    assert found <= 1.03 * best


small_arrays = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=9),
    elements=st.floats(-100, 100, width=32, allow_subnormal=False),
)


@settings(max_examples=100, deadline=None)
@given(small_arrays, st.sampled_from(SPECS), st.sampled_from(["mse", "admm"]), st.integers(0, 4))
def test_a_search_is_never_worse_than_minmax_nor_wider(
    w: NDArray[np.float32], spec: QuantSpec, estimator: str, block: int
) -> None:
    spec = QuantSpec(spec.dtype, spec.symmetric, not block, spec.narrow_range, block)
    full, found = (weight_range(w, spec, axis=1, estimator=name) for name in ("minmax", estimator))
    assert found.scale.shape == full.scale.shape
    holding = w.any(axis=0) if not block else np.ones(full.scale.shape, bool)
    assert np.all(found.scale[holding] <= full.scale.max() if block else found.scale[holding] <= full.scale[holding])
    energy = np.square(w.astype(np.float64)).sum()
    assert squared_errors(w, found).sum() <= squared_errors(w, full).sum() + 1e-12 * energy


@on_every_grid
@by_every_estimator
@pytest.mark.parametrize("power", [-40, -7, 60])
def test_scales_grow_with_the_numbers(power: int, estimator: str, spec: QuantSpec) -> None:
    w = weights()
    small, large = (weight_range(a, spec, axis=0, estimator=estimator) for a in (w, np.ldexp(w, power)))
    np.testing.assert_array_equal(np.ldexp(small.scale, power), large.scale)
    np.testing.assert_array_equal(small.zero_point, large.zero_point)


@on_every_grid
@by_every_estimator
@pytest.mark.parametrize("size", [1e-41, 1e-30, 1e37])
def test_tiny_and_huge_numbers_have_grids(size: float, estimator: str, spec: QuantSpec) -> None:
    w = (weights().astype(np.float64) * size / 50).astype(np.float32)
    full, found = (weight_range(w, spec, axis=0, estimator=name) for name in ("minmax", estimator))
    assert np.all(np.isfinite(found.scale) & (found.scale > 0))
    assert np.all(squared_errors(w, found) <= squared_errors(w, full) * (1 + 1e-9))


@on_every_grid
@pytest.mark.parametrize("size", [1e-41, 1e-3, 1.0, 1e36])
def test_rounding_without_integers_is_fake_quantize(size: float, spec: QuantSpec) -> None:
    w = (weights().astype(np.float64) * size).astype(np.float32)
    params = choose_params(0.6 * w.min(), 0.7 * w.max(), spec)
    np.testing.assert_array_equal(rounded(w, params), fake_quantize(w, params))


def test_a_weight_of_zeros_has_a_grid() -> None:
    zeros = np.zeros((3, 4), np.float32)
    for estimator in WEIGHT_ESTIMATORS:
        params = weight_range(zeros, INT4, axis=0, estimator=estimator)
        np.testing.assert_array_equal(fake_quantize(zeros, params), zeros)


@by_every_estimator
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_broken_weights_are_refused(bad: float, estimator: str) -> None:
    w = weights()
    w[3, 5] = bad
    with pytest.raises(GraphError, match="finite"):
        weight_range(w, INT4, axis=0, estimator=estimator)


def test_an_unknown_estimator_is_answered_with_the_known_ones() -> None:
    with pytest.raises(TargetError, match="unknown weight estimator 'kld'; expected one of minmax, mse, admm"):
        weight_range(weights(), INT4, axis=0, estimator="kld")
