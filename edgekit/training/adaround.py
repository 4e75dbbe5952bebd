"""Rounding weights by gradient descent on what the layer puts out, with its activation and its real rows; dear next to GPTQ."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgekit.quant.affine import dequantize, quantize
from edgekit.quant.gptq import broadcast_grid
from edgekit.quant.spec import QuantParams

Activation = Literal["relu"] | None

BATCH = 256
"""Rows seen by one iteration."""

STRETCH_LOW, STRETCH_HIGH = -0.1, 1.1
"""The rectified sigmoid reaches below 0 and above 1 before it is clipped, so that it gets to either."""

PULL = 30.0
"""Weight of the pull towards whole codes against the reconstruction error, which is 1 for the starting codes. Chosen on ResNet-20:
a tenth of it leaves roundings undecided, and rounding them undoes what was gained."""

WARM_UP, SHARP_FIRST, SHARP_LAST = 0.2, 20.0, 2.0
"""Share of the iterations without the pull; then its exponent falls: first near-whole codes feel it, at last all."""


@dataclass(frozen=True)
class _Layer:
    """A layer's weight on its grid, and what it should put out; the first dimension is the group.

    Attributes:
        inputs, outputs: `(groups, n, K)` and `(groups, n, N)`; outputs after the activation.
        bias: `(groups, 1, N)`.
        scale: `(groups, K, N)`.
        base: `(groups, K, N)`: the lower of the two levels (codes less their zero point) that each weight may take.
        fraction: `(groups, K, N)`: how far above it, 0 to 1, the descent starts.
    """

    inputs: Tensor
    outputs: Tensor
    bias: Tensor
    scale: Tensor
    base: Tensor
    fraction: Tensor
    activation: Activation

    def error(self, rows: Tensor, up: Tensor) -> Tensor:
        """The mean squared error `(groups, N)` over the rows when each weight lies so much of a step above its base."""
        weight = (self.base + up) * self.scale
        found = _activate(torch.baddbmm(self.bias, self.inputs[:, rows], weight), self.activation)
        return (found - self.outputs[:, rows]).square().mean(1)


def adaround(
    weight: NDArray[np.float32],
    inputs: NDArray[np.float32],
    outputs: NDArray[np.float32],
    params: QuantParams,
    *,
    time_budget_s: float,
    bias: NDArray[np.float32] | None = None,
    activation: Activation = None,
    start: NDArray[np.generic] | None = None,
    iterations: int = 1000,
    learning_rate: float = 0.1,
    seed: int = 0,
) -> NDArray[np.generic]:
    """Codes of a weight `(K, N)` or `(groups, K, N)`, each rounded up or down as brings the layer's outputs nearest to `outputs`.

    On the given rows no output channel ends worse than it started. It stops after so many iterations or
    seconds, whichever comes first, and rounds what it has by then; stopped by the iterations, its result depends on the
    arguments and torch's number of threads alone.

    Args:
        weight: `(K, N)` or `(groups, K, N)`: K inputs, N output channels of `y = x @ weight`.
        inputs: `(n, K)` or `(groups, n, K)`: rows as the quantized model will see them.
        outputs: `(n, N)` or `(groups, n, N)`: what the float layer makes of the float rows, bias included.
        params: the grid of the weight. Per channel it is `axis=1` of `(K, N)`; of `(groups, K, N)`, one block of K inputs:
            scale `(groups, 1, N)`, `axis=1`, `block_size=K`.
        time_budget_s: seconds.
        bias: `(N,)` or `(groups, N)`.
        start: codes to start from, such as GPTQ's; the nearest when None. A code that is neither of the weight's two neighbours
            on the grid may stay or take one step towards them.
        activation: what the model applies to the outputs; with "relu", errors below 0 do not count.

    Reference: Nagel, Amjad, van Baalen, Louizos, Blankevoort (2020), "Up or Down? Adaptive Rounding for Post-Training
        Quantization", arXiv:2004.10568, equations 21 to 25.
    """
    deadline = time.monotonic() + time_budget_s
    first = quantize(weight, params) if start is None else start
    layer = _layer(weight, inputs, outputs, params, bias, activation, start)
    levels = layer.base + _descend(layer, iterations, learning_rate, seed, deadline)
    zero_point = broadcast_grid(params, weight.shape)[1]
    codes = levels.to(torch.int64).numpy().reshape(weight.shape) + zero_point
    codes = np.where(weight == 0.0, zero_point, codes).astype(first.dtype)  # what was pruned stays so
    better = _error(layer, dequantize(codes, params)) < _error(layer, dequantize(first, params))
    return np.where(better.reshape(*weight.shape[:-2], 1, -1), codes, first)


def _layer(
    weight: NDArray[np.float32],
    inputs: NDArray[np.float32],
    outputs: NDArray[np.float32],
    params: QuantParams,
    bias: NDArray[np.float32] | None,
    activation: Activation,
    start: NDArray[np.generic] | None,
) -> _Layer:
    grouped = (-1, *weight.shape[-2:])
    scale, zero_point = broadcast_grid(params, weight.shape)
    channels = weight.shape[-1]
    added = np.zeros(scale[..., 0, :].shape, np.float32) if bias is None else bias
    base = np.clip(np.floor(weight / scale), params.qmin - zero_point, params.qmax - zero_point - 1)
    if start is not None:
        levels = start.astype(np.int64) - zero_point
        base = np.clip(base, levels - 1, levels)
    fraction = np.clip(weight / scale - base, 0.0, 1.0)
    if start is not None:
        fraction = (fraction + (levels - base)) / 2
    return _Layer(
        inputs=_tensor(inputs, (-1, *inputs.shape[-2:])),
        outputs=_activate(_tensor(outputs, (-1, *outputs.shape[-2:])), activation),
        bias=_tensor(added, (-1, 1, channels)),
        scale=_tensor(scale, grouped),
        base=_tensor(base, grouped),
        fraction=_tensor(fraction, grouped),
        activation=activation,
    )


def _tensor(array: NDArray[np.generic], shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.array(array, np.float32, copy=True).reshape(shape))


def _activate(x: Tensor, activation: Activation) -> Tensor:
    return torch.relu(x) if activation == "relu" else x


def _descend(layer: _Layer, iterations: int, learning_rate: float, seed: int, deadline: float) -> Tensor:
    """For each weight 1.0 where it is rounded up, 0.0 where down."""
    slope = torch.logit((layer.fraction - STRETCH_LOW) / (STRETCH_HIGH - STRETCH_LOW)).requires_grad_()
    optimizer = torch.optim.Adam([slope], learning_rate)
    generator = torch.Generator().manual_seed(seed)
    count = layer.inputs.shape[1]
    with torch.no_grad():
        start = layer.error(torch.arange(count), torch.round(layer.fraction))
        unit = torch.where(start > 0, start, 1.0)
    for iteration in range(iterations):
        if time.monotonic() >= deadline:
            break
        chosen = torch.randint(count, (min(BATCH, count),), generator=generator)
        up = _rectified_sigmoid(slope)
        loss = (layer.error(chosen, up) / unit).sum()
        progress = (iteration / iterations - WARM_UP) / (1 - WARM_UP)
        if progress >= 0:
            loss = loss + PULL * _pull(up, progress)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return torch.round(_rectified_sigmoid(slope.detach()))


def _rectified_sigmoid(slope: Tensor) -> Tensor:
    return torch.clamp(torch.sigmoid(slope) * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW, 0.0, 1.0)


def _pull(up: Tensor, progress: float) -> Tensor:
    """How far the roundings are from whole, 0 to 1 a channel, summed over channels."""
    sharpness = SHARP_LAST + (SHARP_FIRST - SHARP_LAST) * (1 - progress)
    return (1 - (2 * up - 1).abs().pow(sharpness)).mean(1).sum()


def _error(layer: _Layer, weight: NDArray[np.float32]) -> NDArray[np.float64]:
    """The mean squared error `(groups, N)` of a quantized weight over all rows."""
    found = torch.baddbmm(layer.bias, layer.inputs, _tensor(weight, tuple(layer.scale.shape)))
    error = _activate(found, layer.activation) - layer.outputs
    return np.asarray(error.square().mean(1, dtype=torch.float64).numpy())
