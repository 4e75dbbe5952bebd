"""Ranges judged by what they do to the output of the linear layers that read a tensor, not to the tensor itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgekit.quant.affine import choose_params
from edgekit.quant.least_squares import Floats, rounded
from edgekit.quant.observers import Histogram
from edgekit.quant.spec import QuantSpec

Range = tuple[float, float]

NEAR = 0.01
"""Ranges whose errors are within this part of the least are as good: samples tell no more, and the widest clips the fewest tails."""

EASY_SHARES, EASY_ROUNDS = np.linspace(1.0, 0.2, 41), 4
"""The shares of a range that EasyQuant tries, and how often it goes around weight and input."""

EASY_GAINS = np.linspace(0.7, 1.7, 201)
"""The common gains of the quantized output under which EasyQuant chooses the shares of a weight's channels."""


class Reader(NamedTuple):
    """A linear layer that reads the tensor whose range is sought.

    Attributes:
        rows: float32 `(groups, n, K)`, sampled inputs: of a convolution, its patches, laid out as its weight is.
        weight: float32 `(groups, K, N)`.
        quantized_weight: the same, rounded to its grid.
    """

    rows: Floats
    weight: Floats
    quantized_weight: Floats


def output_error(rows: Floats, weight: Floats, quantized_rows: Floats, quantized_weight: Floats) -> float:
    """The mean squared error of a layer's output, for rows `(groups, n, K)` and weights `(groups, K, N)`."""
    error = np.matmul(quantized_rows, quantized_weight) - np.matmul(rows, weight)
    return float(np.mean(np.square(error, dtype=np.float64)))


def choose_by_output(
    readers: Sequence[Reader | tuple[Floats, Floats, Floats]],
    histogram: Histogram,
    spec: QuantSpec,
    candidates: Mapping[str, Range],
) -> tuple[Range, str]:
    """The range of an activation that harms the outputs of its readers least, and what it comes from.

    A range's error is the sum over readers of the output's squared error, their weights already quantized, relative to that
    output's energy. Among ranges as good as the best (see `NEAR`) the widest is taken: clipped tails of a LayerNorm cost more in
    deeper layers than they show here.

    Args:
        readers: at least one.
        histogram: of the tensor; no range is wider than what was seen.
        spec: its grid, per tensor.
        candidates: the ranges to choose from, at least one, by the names of what made them.

    Returns:
        The range, and its name.
    """
    assert readers and candidates, "a choice needs readers and candidates"
    layers = [_expand(Reader(*reader)) for reader in readers]
    errors: dict[Range, float] = {}
    names: dict[Range, str] = {}

    def consider(low: float, high: float, name: str) -> None:
        ends = _within(histogram, low, high)
        if ends not in errors:
            errors[ends], names[ends] = sum(layer.error(ends, spec) for layer in layers), name

    for name, ends in candidates.items():
        consider(*ends, name)
    enough = (1.0 + NEAR) * min(errors.values())
    best = max((ends for ends in errors if errors[ends] <= enough), key=lambda ends: _width(ends, spec))
    return best, names[best]


def _within(histogram: Histogram, low: float, high: float) -> Range:
    """A range with both ends brought to where values were seen."""
    return min(max(low, histogram.min), histogram.max), max(min(high, histogram.max), histogram.min)


def _width(ends: Range, spec: QuantSpec) -> float:
    """What a grid has to cover: of a symmetric one, the longer side."""
    low, high = min(ends[0], 0.0), max(ends[1], 0.0)
    return max(-low, high) if spec.symmetric else high - low


@dataclass(frozen=True, eq=False)
class _Expansion:
    """A layer's output error as a function of D, what rounding adds to its rows: `|D Wq + R|^2`, with `R = x (Wq - W)`.

    Where the layer has more outputs than inputs, `<D G, D> + 2 <D, P> + |R|^2` with `G = Wq Wq'` and `P = R Wq'` is less work.

    Attributes:
        rows: `(groups, n, K)`, as they are.
        unit: a power of two that brings them near 1: squares of float32 neither overflow nor vanish.
        factor: Wq `(groups, K, N)`, or G `(groups, K, K)`.
        drift: R `(groups, n, N)`, or 2 P `(groups, n, K)`.
        rest: `|R|^2`; None without G.
        energy: `|x W|^2`, or 1 where that is 0.
    """

    rows: Floats
    unit: np.float32
    factor: Floats
    drift: Floats
    rest: float | None
    energy: float

    def error(self, ends: Range, spec: QuantSpec) -> float:
        """The squared error of the output, relative to its energy, when the rows are on the grid of that range."""
        noise = rounded(self.rows, choose_params(*ends, spec))
        noise -= self.rows
        noise *= self.unit
        through = np.matmul(noise, self.factor)
        through += self.drift
        if self.rest is None:
            return _dot(through, through) / self.energy
        return max(_dot(through, noise) + self.rest, 0.0) / self.energy


def _expand(reader: Reader) -> _Expansion:
    rows_unit, weight_unit = _unit(reader.rows), _unit(reader.weight)
    rows, weight, quantized = (
        reader.rows * rows_unit,
        reader.weight * weight_unit,
        reader.quantized_weight * weight_unit,
    )
    exact = np.matmul(rows, weight)
    drift = np.matmul(rows, quantized - weight)
    energy = _dot(exact, exact) or 1.0
    if weight.shape[2] <= weight.shape[1]:
        return _Expansion(reader.rows, rows_unit, quantized, drift, None, energy)
    transposed = np.swapaxes(quantized, 1, 2)
    gram, cross = np.matmul(quantized, transposed), 2 * np.matmul(drift, transposed)
    return _Expansion(reader.rows, rows_unit, gram, cross, _dot(drift, drift), energy)


def _unit(array: Floats) -> np.float32:
    """A power of two by which the largest magnitude comes near 1."""
    largest = max(float(array.max(initial=0.0)), -float(array.min(initial=0.0)))
    return np.float32(math.ldexp(1.0, min(max(-math.frexp(largest)[1], -126), 126)))


def _dot(a: Floats, b: Floats) -> float:
    """The inner product of two arrays, all axes."""
    return float(np.vdot(a, b))


class EasyRanges(NamedTuple):
    """What `easyquant` finds.

    Attributes:
        activation: the range of the layer's input.
        weight_low, weight_high: of the weight, `(groups * N,)` in the order of output channels, or `()` per tensor.
    """

    activation: Range
    weight_low: NDArray[np.float64]
    weight_high: NDArray[np.float64]


def easyquant(
    rows: Floats, weight: Floats, histogram: Histogram, activation_spec: QuantSpec, weight_spec: QuantSpec
) -> EasyRanges:
    """Ranges of a layer's input and weight, sought in turns for the greatest cosine between float and quantized output.

    Both start from all that was seen and try `EASY_SHARES` of it, the input's on both ends at once, until neither moves or
    `EASY_ROUNDS` are over; the cosine never falls. Each channel of a weight has its own share: the greatest cosine of the whole
    output is the least squared error under one common gain, and given a gain (`EASY_GAINS`) channels do not depend on each other.

    Args:
        rows: float32 `(groups, n, K)`, sampled inputs.
        weight: float32 `(groups, K, N)`.
        histogram: of the input.
        activation_spec: the input's grid, per tensor.
        weight_spec: the weight's grid, per tensor or per output channel.

    Reference: Wu et al. 2020, "EasyQuant: Post-training Quantization via Scale Optimization", arXiv:2006.16669, section 3.
    """
    rows_unit, weight_unit = _unit(rows), _unit(weight)
    exact = np.matmul(rows * rows_unit, weight * weight_unit)
    low, high = _weight_ends(weight, weight_spec)

    def quantized_rows(share: float) -> Floats:
        return (
            rounded(rows, choose_params(*_activation_range(histogram, share, activation_spec), activation_spec))
            * rows_unit
        )

    def quantized_weight(share: NDArray[np.float64]) -> Floats:
        params = choose_params((share * low).ravel(), (share * high).ravel(), weight_spec, axis=0)
        grids = replace(params, scale=params.scale.reshape(low.shape), zero_point=params.zero_point.reshape(low.shape))
        return rounded(weight, grids) * weight_unit

    share, shares = 1.0, np.ones(low.shape)
    for _ in range(EASY_ROUNDS):
        before = share, shares
        given_rows = quantized_rows(share)
        tables = [
            _agreement(exact, given_rows, quantized_weight(np.full(low.shape, s)), low.shape) for s in EASY_SHARES
        ]
        shares = _best_channel_shares(np.stack(tables), shares)
        given_weight = quantized_weight(shares)
        sums = [_agreement(exact, quantized_rows(s), given_weight, (1, 1, 1)) for s in EASY_SHARES.tolist()]
        share = float(EASY_SHARES[np.argmax([_cosine(*terms.ravel()) for terms in sums])])
        if share == before[0] and np.array_equal(shares, before[1]):
            break
    shape = (low.size,) if weight_spec.per_channel else ()
    activation = _activation_range(histogram, share, activation_spec)
    return EasyRanges(activation, (shares * low).reshape(shape), (shares * high).reshape(shape))


def _weight_ends(weight: Floats, spec: QuantSpec) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The full range of a weight `(groups, K, N)`: per channel `(groups, 1, N)`, else `(1, 1, 1)`."""
    axes = 1 if spec.per_channel else (0, 1, 2)
    low, high = (
        np.asarray(end, np.float64)
        for end in (
            weight.min(axis=axes, keepdims=True, initial=0.0),
            weight.max(axis=axes, keepdims=True, initial=0.0),
        )
    )
    return low, high


def _activation_range(histogram: Histogram, share: float, spec: QuantSpec) -> Range:
    """A share of what was seen, at both ends."""
    low, high = share * histogram.min, share * histogram.max
    if spec.symmetric:
        high = max(-low, high)
        low = -high
    return _within(histogram, low, high)


def _agreement(exact: Floats, rows: Floats, weight: Floats, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """`<Y, Yq>` and `|Yq|^2`, each of the shape of the weight's ranges: `(2, groups, 1, N)` or `(2, 1, 1, 1)`."""
    output = np.matmul(rows, weight)
    terms = np.stack([np.einsum("gnc,gnc->gc", a, output)[:, None] for a in (exact, output)]).astype(np.float64)
    return terms if terms.shape[1:] == shape else terms.sum(axis=(1, 2, 3), keepdims=True)


def _cosine(product: float, energy: float) -> float:
    """The cosine between both outputs, times the length of the exact one."""
    return product / math.sqrt(energy) if energy else 0.0


def _best_channel_shares(tables: NDArray[np.float64], shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """The share of each channel that makes the cosine of the whole output greatest, from `(S, 2, ...)` of `_agreement`."""
    product, energy = tables[:, 0], tables[:, 1]
    best = np.abs(EASY_SHARES.reshape(-1, 1, 1, 1) - shares).argmin(axis=0)[None]
    greatest = _cosine(*_totals(tables, best))
    for gain in EASY_GAINS.tolist():
        chosen = (gain * gain * energy - 2 * gain * product).argmin(axis=0)[None]
        cosine = _cosine(*_totals(tables, chosen))
        if cosine > greatest:
            best, greatest = chosen, cosine
    return np.asarray(EASY_SHARES[best[0]])


def _totals(tables: NDArray[np.float64], chosen: NDArray[np.intp]) -> tuple[float, float]:
    """`<Y, Yq>` and `|Yq|^2` of the whole output, each channel at its chosen share."""
    product, energy = (np.take_along_axis(tables[:, side], chosen, axis=0).sum() for side in (0, 1))
    return float(product), float(energy)
