"""Bias correction: with the shift taken off, outputs are right in the mean."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from edgekit.quant.affine import choose_params, fake_quantize, weight_params
from edgekit.quant.bias_correction import bias_shift, sampled_bias_shift
from edgekit.quant.spec import QuantSpec

INT4 = QuantSpec("int4", symmetric=True, per_channel=True, narrow_range=True)


def rows(*shape: int) -> NDArray[np.float32]:
    """Inputs that are never negative, as after a Relu: their means are not 0."""
    return np.maximum(np.random.default_rng(0).normal(0.5, 1, shape), 0).astype(np.float32)


def rounded(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    return fake_quantize(weight, weight_params(weight, INT4, axis=weight.ndim - 1))


def mean_outputs(x: NDArray[np.float32], weight: NDArray[np.float32]) -> NDArray[np.float64]:
    """`(C_out,)`, group by group."""
    return np.asarray(np.matmul(x.astype(np.float64), weight).mean(-2).reshape(-1))


@pytest.mark.parametrize("groups", [(), (1,), (3,)])
def test_the_mean_output_is_right_once_the_shift_is_taken_off(groups: tuple[int, ...]) -> None:
    x, weight = rows(*groups, 200, 24), np.random.default_rng(1).normal(0, 1, (*groups, 24, 5)).astype(np.float32)
    shift = bias_shift(weight, rounded(weight), x.mean(-2))
    wrong = mean_outputs(x, rounded(weight)) - mean_outputs(x, weight)
    assert shift.shape == (5 * int(np.prod(groups)),)
    assert shift.dtype == np.float32
    assert np.abs(wrong).min() > 1e-3
    np.testing.assert_allclose(wrong - shift, 0, rtol=0, atol=1e-5)


@pytest.mark.parametrize("groups", [(), (3,)])
def test_the_sampled_shift_holds_what_quantized_inputs_add(groups: tuple[int, ...]) -> None:
    x, weight = rows(*groups, 200, 24), np.random.default_rng(1).normal(0, 1, (*groups, 24, 5)).astype(np.float32)
    quantized = fake_quantize(
        x, choose_params(0.0, 1.0, QuantSpec("uint8"))
    )  # clips: the mean of the inputs moves as well
    shift = sampled_bias_shift(weight, rounded(weight), x, quantized)
    wrong = mean_outputs(quantized, rounded(weight)) - mean_outputs(x, weight)
    np.testing.assert_allclose(wrong - shift, 0, rtol=0, atol=1e-5)
    of_weights_alone = bias_shift(weight, rounded(weight), x.mean(-2))
    assert np.abs(shift - of_weights_alone).max() > 0.1


def test_both_agree_where_inputs_are_not_quantized() -> None:
    x, weight = rows(50, 24), np.random.default_rng(1).normal(0, 1, (24, 5)).astype(np.float32)
    np.testing.assert_allclose(
        sampled_bias_shift(weight, rounded(weight), x, x),
        bias_shift(weight, rounded(weight), x.mean(0)),
        rtol=0,
        atol=1e-5,
    )


def test_groups_are_corrected_each_with_its_own_inputs() -> None:
    weight = np.random.default_rng(1).normal(0, 1, (2, 24, 5)).astype(np.float32)
    means = rows(2, 24)
    alone = [bias_shift(weight[g], rounded(weight)[g], means[g]) for g in range(2)]
    np.testing.assert_array_equal(bias_shift(weight, rounded(weight), means), np.concatenate(alone))
