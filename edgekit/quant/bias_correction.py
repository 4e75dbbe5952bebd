"""What quantization adds to a layer's outputs in the mean, to be taken off its bias."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def bias_shift(
    weight: NDArray[np.float32], quantized_weight: NDArray[np.float32], mean_input: NDArray[np.floating]
) -> NDArray[np.float32]:
    """What rounding the weight adds to each output in the mean, `(C_out,)`: `E[x] @ (Wq - W)`.

    Args:
        weight: `(K, N)`, or of a grouped layer `(groups, K, N)` with `C_out = groups * N`, group by group.
        quantized_weight: the numbers its codes stand for, of the same shape.
        mean_input: `(K,)` or `(groups, K)`: the mean of each input over samples and positions.

    Reference: Nagel, van Baalen, Blankevoort, Welling (2019), "Data-Free Quantization Through Weight Equalization and Bias
        Correction", arXiv:1906.04721, equation 17.
    """
    rounding = np.asarray(quantized_weight, np.float64) - weight
    return _outputs(np.asarray(mean_input, np.float64), rounding)


def sampled_bias_shift(
    weight: NDArray[np.float32],
    quantized_weight: NDArray[np.float32],
    inputs: NDArray[np.float32],
    quantized_inputs: NDArray[np.float32],
) -> NDArray[np.float32]:
    """What quantizing weight and inputs adds to each output in the mean over rows, `(C_out,)`: `mean(xq @ Wq - x @ W)`.

    Shapes are those of `bias_shift`; rows of inputs, float and quantized, are `(n, K)` or `(groups, n, K)`, n at least 1.

    Reference: Finkelstein, Almog, Grobman (2019), "Fighting Quantization Bias With Bias", arXiv:1906.03193, section 3.
    """
    assert inputs.shape == quantized_inputs.shape and inputs.shape[-2] > 0, "the same rows, before and after"
    mean, quantized_mean = (rows.mean(axis=-2, dtype=np.float64) for rows in (inputs, quantized_inputs))
    return _outputs(quantized_mean, np.asarray(quantized_weight, np.float64)) - _outputs(mean, weight)


def _outputs(mean: NDArray[np.float64], weight: NDArray[np.floating]) -> NDArray[np.float32]:
    """`(C_out,)`: mean outputs of mean inputs; a linear layer's mean output needs no other."""
    return np.asarray(np.matmul(mean[..., None, :], weight), np.float32).reshape(-1)
