from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgekit.quant.affine import choose_params, fake_quantize
from edgekit.quant.estimators import get_estimator
from edgekit.quant.observers import Histogram, HistogramObserver
from edgekit.quant.output_error import (
    EASY_SHARES,
    NEAR,
    Range,
    Reader,
    choose_by_output,
    easyquant,
    output_error,
)
from edgekit.quant.spec import QuantSpec

UINT8, INT8 = QuantSpec("uint8"), QuantSpec("int8", symmetric=True)
UINT4, INT4 = QuantSpec("uint4"), QuantSpec("int4", symmetric=True)
WEIGHT8 = QuantSpec("int8", symmetric=True, per_channel=True, narrow_range=True)
WEIGHT4 = QuantSpec("int4", symmetric=True, per_channel=True)
on_every_grid = pytest.mark.parametrize("spec", [UINT8, INT8, UINT4, INT4], ids=["uint8", "int8", "uint4", "int4"])


def histogram_of(x: NDArray[np.float32]) -> Histogram:
    observer = HistogramObserver()
    observer.update(x)
    return observer.histogram()


def inputs(groups: int = 1, n: int = 60, k: int = 12, seed: int = 0, size: float = 1.0) -> NDArray[np.float32]:
    """Skewed, heavy-tailed, channels of unlike sizes: what a LayerNorm or a GELU leaves."""
    rng = np.random.default_rng(seed)
    x = np.maximum(rng.standard_t(3, (groups, n, k)), -1.5) * rng.gamma(2, 1, (groups, 1, k))
    return (size * x).astype(np.float32)


def reader(
    rows: NDArray[np.float32], outputs: int = 8, spec: QuantSpec = WEIGHT8, seed: int = 1, size: float = 1.0
) -> Reader:
    groups, _, k = rows.shape
    weight = (size * np.random.default_rng(seed).standard_normal((groups, k, outputs))).astype(np.float32)
    grids = [choose_params(w.min(axis=0), w.max(axis=0), spec, axis=1) for w in weight]
    return Reader(rows, weight, np.stack([fake_quantize(w, grid) for w, grid in zip(weight, grids, strict=True)]))


def candidates(histogram: Histogram, spec: QuantSpec) -> dict[str, Range]:
    return {name: get_estimator(name)(histogram, spec) for name in ("minmax", "percentile", "mse", "kld", "admm")}


def relative_error(readers: list[Reader], ends: Range, spec: QuantSpec) -> float:
    """By the definition, in float64."""
    total = 0.0
    for rows, weight, quantized in readers:
        exact = rows.astype(np.float64) @ weight.astype(np.float64)
        found = fake_quantize(rows, choose_params(*ends, spec)).astype(np.float64) @ quantized.astype(np.float64)
        total += float(np.square(found - exact).sum() / np.square(exact).sum())
    return total


def test_output_error_is_the_mean_square_over_all_outputs() -> None:
    rows, weight, quantized = reader(inputs(groups=2, n=5, k=3), outputs=4)
    rounded = fake_quantize(rows, choose_params(-4.0, 4.0, INT4))
    terms = []
    for g in range(2):
        for i in range(5):
            for j in range(4):
                exact = sum(float(rows[g, i, k]) * float(weight[g, k, j]) for k in range(3))
                terms.append((sum(float(rounded[g, i, k]) * float(quantized[g, k, j]) for k in range(3)) - exact) ** 2)
    assert output_error(rows, weight, rounded, quantized) == pytest.approx(sum(terms) / len(terms), rel=1e-5)
    assert output_error(rows, weight, rows, weight) == 0.0


def reference_choice(readers: list[Reader], spec: QuantSpec, tried: dict[str, Range]) -> tuple[Range, str]:
    errors = {ends: relative_error(readers, ends, spec) for ends in tried.values()}
    names = {ends: name for name, ends in reversed(tried.items())}
    good = [ends for ends in errors if errors[ends] <= (1 + NEAR) * min(errors.values())]
    best = max(good, key=lambda ends: max(-ends[0], ends[1]) if spec.symmetric else max(ends[1], 0) - min(ends[0], 0))
    return best, names[best]


@on_every_grid
@pytest.mark.parametrize("shape", [(1, 60, 12, 8), (1, 60, 8, 24), (3, 40, 9, 1), (2, 30, 4, 6)], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_the_choice_is_that_of_computing_every_output(
    seed: int, shape: tuple[int, int, int, int], spec: QuantSpec
) -> None:
    groups, n, k, outputs = shape
    rows = inputs(groups, n, k, seed)
    readers = [reader(rows, outputs), reader(rows, 5, WEIGHT4, seed=2)]
    histogram = histogram_of(rows)
    tried = candidates(histogram, spec)
    assert choose_by_output(readers, histogram, spec, tried) == reference_choice(readers, spec, tried)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([UINT8, INT8, UINT4, INT4]), st.integers(1, 9), st.integers(1, 12))
def test_the_choice_is_never_wider_than_what_was_seen_nor_worse_than_a_candidate(
    seed: int, spec: QuantSpec, k: int, outputs: int
) -> None:
    rows = inputs(1, 20, k, seed)
    readers, histogram = [reader(rows, outputs, seed=seed)], histogram_of(inputs(1, 40, k, seed + 1))
    tried = candidates(histogram, spec)
    (low, high), name = choose_by_output(readers, histogram, spec, tried)
    assert histogram.min <= low <= high <= histogram.max
    assert name in tried
    least = min(relative_error(readers, ends, spec) for ends in tried.values())
    assert relative_error(readers, (low, high), spec) <= (1 + NEAR) * least * (1 + 1e-3)


@on_every_grid
@pytest.mark.parametrize("power", [-70, -3, 60])
def test_the_choice_grows_with_the_numbers(power: int, spec: QuantSpec) -> None:
    rows = inputs()
    histogram, grown = histogram_of(rows), histogram_of(np.ldexp(rows, power))
    (low, high), name = choose_by_output([reader(rows)], histogram, spec, candidates(histogram, spec))
    scaled = Reader(np.ldexp(rows, power), *reader(rows)[1:])
    assert choose_by_output([scaled], grown, spec, candidates(grown, spec)) == (
        (float(np.ldexp(low, power)), float(np.ldexp(high, power))),
        name,
    )


def test_readers_count_by_their_own_energy() -> None:
    rows = inputs()
    histogram = histogram_of(rows)
    tried = candidates(histogram, UINT4)
    alike = choose_by_output([reader(rows), reader(rows, seed=3)], histogram, UINT4, tried)
    assert alike == choose_by_output([reader(rows), reader(rows, seed=3, size=1024.0)], histogram, UINT4, tried)


def test_a_reader_that_does_not_look_at_the_outlier_channel_does_not_pay_for_it() -> None:
    rows = inputs()
    rows[0, :, 0] = 40 * np.abs(rows[0, :, 0])
    blind, weight = reader(rows), reader(rows).weight.copy()
    weight[:, 0] = 0.0
    blind = Reader(rows, weight, weight)
    histogram = histogram_of(rows)
    tried = {
        "minmax": (histogram.min, histogram.max),
        "narrow": (float(rows[..., 1:].min()), float(rows[..., 1:].max())),
    }
    assert choose_by_output([blind], histogram, UINT8, tried)[1].startswith("narrow")
    assert choose_by_output([reader(rows)], histogram, UINT8, tried)[1].startswith("minmax")


def test_near_ties_go_to_the_wider_range() -> None:
    rows = inputs()
    seen = histogram_of(np.append(rows, [[[1.003 * rows.max()] * 12]], axis=1).astype(np.float32))
    tried = {"tight": (float(rows.min()), float(rows.max())), "wide": (seen.min, seen.max)}
    errors = {name: relative_error([reader(rows)], ends, QuantSpec("uint16")) for name, ends in tried.items()}
    assert max(errors.values()) < (1 + NEAR) * min(errors.values())
    assert choose_by_output([reader(rows)], seen, QuantSpec("uint16"), tried) == (tried["wide"], "wide")


@pytest.mark.parametrize("value", [0.0, 5.0, -5.0])
def test_constant_inputs_have_a_choice(value: float) -> None:
    rows = np.full((1, 10, 4), value, np.float32)
    histogram = histogram_of(rows)
    ends, _ = choose_by_output([reader(rows)], histogram, UINT8, candidates(histogram, UINT8))
    assert ends == (value, value)


def cosine(
    rows: NDArray[np.float32], weight: NDArray[np.float32], ends: Range, low: NDArray[np.float64],
    high: NDArray[np.float64], spec: QuantSpec, weight_spec: QuantSpec,
) -> float:  # fmt: skip
    """Between the float and the quantized output, in float64, channel by channel."""
    quantized = fake_quantize(rows, choose_params(*ends, spec)).astype(np.float64)
    outputs = []
    for g in range(weight.shape[0]):
        for j in range(weight.shape[2]):
            place = (g * weight.shape[2] + j,) if low.ndim else ()
            grid = choose_params(low[place], high[place], weight_spec)
            exact = rows[g].astype(np.float64) @ weight[g, :, j].astype(np.float64)
            outputs.append((exact, quantized[g] @ fake_quantize(weight[g, :, j], grid).astype(np.float64)))
    exact, found = (np.concatenate(side) for side in zip(*outputs, strict=True))
    return float(exact @ found / np.sqrt((exact @ exact) * (found @ found)))


def whole(weight: NDArray[np.float32], spec: QuantSpec) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    axes = 1 if spec.per_channel else None
    low, high = (np.asarray(end, np.float64) for end in (weight.min(axis=axes), weight.max(axis=axes)))
    return np.minimum(low, 0.0).reshape(-1 if spec.per_channel else ()), np.maximum(high, 0.0).reshape(
        low.size if spec.per_channel else ()
    )


@pytest.mark.parametrize("weight_spec", [WEIGHT8, WEIGHT4, INT4, QuantSpec("uint4", per_channel=True)], ids=str)
@pytest.mark.parametrize("spec", [UINT8, INT4], ids=["uint8", "int4"])
def test_easyquant_ends_where_no_single_range_can_do_better(spec: QuantSpec, weight_spec: QuantSpec) -> None:
    rows = inputs(2, 50, 9)
    weight = reader(rows, 3).weight
    histogram = histogram_of(rows)
    ends, low, high = easyquant(rows, weight, histogram, spec, weight_spec)
    reached = cosine(rows, weight, ends, low, high, spec, weight_spec)
    full_low, full_high = whole(weight, weight_spec)
    reach = max(-histogram.min, histogram.max)
    for share in EASY_SHARES:
        other = (-share * reach, share * reach) if spec.symmetric else (share * histogram.min, share * histogram.max)
        other = max(other[0], histogram.min), min(other[1], histogram.max)
        assert cosine(rows, weight, other, low, high, spec, weight_spec) <= reached + 1e-6
        for place in np.ndindex(low.shape):
            moved_low, moved_high = low.copy(), high.copy()
            moved_low[place], moved_high[place] = share * full_low[place], share * full_high[place]
            assert cosine(rows, weight, ends, moved_low, moved_high, spec, weight_spec) <= reached + 1e-6


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6), st.sampled_from([UINT8, INT8, UINT4]), st.sampled_from([WEIGHT8, WEIGHT4, INT4]),
    st.integers(1, 3), st.integers(1, 4),
)  # fmt: skip
def test_easyquant_is_never_worse_than_minmax_nor_wider(
    seed: int, spec: QuantSpec, weight_spec: QuantSpec, groups: int, outputs: int
) -> None:
    rows = inputs(groups, 20, 6, seed)
    weight, histogram = reader(rows, outputs, seed=seed).weight, histogram_of(rows)
    ends, low, high = easyquant(rows, weight, histogram, spec, weight_spec)
    full_low, full_high = whole(weight, weight_spec)
    assert histogram.min <= ends[0] <= ends[1] <= histogram.max
    assert low.shape == full_low.shape and np.all((full_low <= low) & (low <= high) & (high <= full_high))
    before = cosine(rows, weight, (histogram.min, histogram.max), full_low, full_high, spec, weight_spec)
    assert cosine(rows, weight, ends, low, high, spec, weight_spec) >= before - 1e-6


def test_easyquant_gains_at_few_bits() -> None:
    rows = inputs(1, 200, 40)
    weight, histogram = reader(rows, 16).weight, histogram_of(rows)
    ends, low, high = easyquant(rows, weight, histogram, UINT4, WEIGHT4)
    reached = cosine(rows, weight, ends, low, high, UINT4, WEIGHT4)
    before = cosine(rows, weight, (histogram.min, histogram.max), *whole(weight, WEIGHT4), UINT4, WEIGHT4)
    assert 1 - reached < 0.5 * (1 - before)


def test_easyquant_of_silent_rows_or_weights_keeps_the_full_range() -> None:
    rows, zeros = inputs(), np.zeros((1, 12, 3), np.float32)
    histogram = histogram_of(rows)
    ends, low, high = easyquant(rows, zeros, histogram, UINT8, WEIGHT8)
    assert ends == (histogram.min, histogram.max) and not low.any() and not high.any()
    silent = np.zeros_like(rows)
    weight = reader(rows, 3).weight
    assert easyquant(silent, weight, histogram_of(silent), UINT8, WEIGHT8).activation == (0.0, 0.0)
