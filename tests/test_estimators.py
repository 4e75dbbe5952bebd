from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from edgekit.errors import TargetError
from edgekit.quant.affine import choose_params, fake_quantize, quantize
from edgekit.quant.estimators import (
    ADMM_STARTS,
    CANDIDATES,
    ESTIMATORS,
    MSE_LEAST,
    MSE_ROUNDS,
    MSE_STEPS,
    Estimator,
    admm,
    divergences,
    get_estimator,
    kld,
    minmax,
    moving_average,
    mse,
    percentile,
)
from edgekit.quant.least_squares import FIRST_STEPS, LAST_STEPS
from edgekit.quant.observers import Histogram, HistogramObserver
from edgekit.quant.spec import QuantSpec

AFFINE, SYMMETRIC = QuantSpec("uint8"), QuantSpec("int8", symmetric=True)
AFFINE4, SYMMETRIC4 = QuantSpec("uint4"), QuantSpec("int4", symmetric=True)
LEVELS = {AFFINE: 256, SYMMETRIC: 128, AFFINE4: 16, SYMMETRIC4: 8}
on_every_grid = pytest.mark.parametrize("spec", LEVELS, ids=["affine8", "symmetric8", "affine4", "symmetric4"])


def distribution(name: str) -> NDArray[np.float32]:
    rng = np.random.default_rng(0)
    normal = rng.standard_normal(20_000)
    data = {
        "normal": normal,
        "relu": np.maximum(normal, 0),
        "sparse_relu": np.maximum(normal - 1.28, 0),
        "relu6": np.clip(4 * normal, 0, 6),
        "negative": -np.abs(normal),
        "silu": 2 * normal / (1 + np.exp(-2 * normal)),
        "student": rng.standard_t(3, 20_000),
        "bimodal": np.concatenate([rng.normal(-3, 0.3, 9_000), rng.normal(8, 1, 9_000)]),
        "outlier": np.append(normal, 60.0),
        "negative_outlier": np.append(normal, -60.0),
        "constant": np.full(1000, 5.0),
        "negative_constant": np.full(1000, -5.0),
        "zeros": np.zeros(1000),
        "one_number": np.append(np.zeros(1000), 0.3),
        "denormal": normal * 1e-41,
        "huge": normal * 1e37,
        "pixels": rng.integers(0, 256, 20_000) / 255,
        "empty": np.zeros(0),
    }[name]
    return np.asarray(data, np.float32)


SIGNED = ["normal", "silu", "student", "bimodal", "outlier", "negative_outlier", "denormal", "huge"]
ONE_SIDED = ["relu", "sparse_relu", "relu6", "negative", "pixels", "one_number"]
NAMES = [*SIGNED, *ONE_SIDED, "constant", "negative_constant", "zeros", "empty"]

HARD = ["constant", "outlier", "zeros", "one_number", "sparse_relu", "bimodal", "denormal", "empty"]


def histogram_of(x: NDArray[np.float32]) -> Histogram:
    observer = HistogramObserver()
    observer.update(x)
    return observer.histogram()


@pytest.mark.parametrize("name", NAMES)
@on_every_grid
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_ranges_stay_within_what_was_seen_and_make_a_grid(estimator: str, spec: QuantSpec, name: str) -> None:
    histogram = histogram_of(distribution(name))
    low, high = get_estimator(estimator)(histogram, spec)
    assert histogram.min <= low <= high <= histogram.max
    choose_params(low, high, spec)


@pytest.mark.parametrize("name", NAMES)
def test_minmax_is_exact(name: str) -> None:
    x = distribution(name)
    assert minmax(histogram_of(x), AFFINE) == (x.min(initial=np.inf), x.max()) if x.size else (0.0, 0.0)


def reference_percentile(x: NDArray[np.float32], width: float, spec: QuantSpec, p: float) -> tuple[float, float]:
    """From sorted values: the bin's outer edge around the last value that must be kept, no wider than the data."""
    outside = math.floor(x.size * (100 - Fraction(str(p))) / 100)
    low, high = float(x.min()), float(x.max())

    def outer_edge(values: NDArray[np.float64], drop: int) -> float:
        return (math.floor(float(np.sort(values)[values.size - 1 - drop]) / width) + 1) * width

    if spec.symmetric:
        # A negative bin's far edge belongs to it, so its magnitudes count one bin nearer to zero.
        magnitude = np.abs(x.astype(np.float64))
        magnitude[(x < 0) & (magnitude % width == 0)] -= width / 2
        reach = outer_edge(magnitude, outside)
        return max(low, -reach), min(high, reach)
    drops = (outside // 2, outside // 2) if low < 0 < high else (outside, 0) if high <= 0 else (0, outside)
    start = math.floor(float(np.sort(x)[drops[0]]) / width) * width
    return max(low, start), min(high, outer_edge(x.astype(np.float64), drops[1]))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "empty"])
@pytest.mark.parametrize("spec", [AFFINE, SYMMETRIC], ids=["affine", "symmetric"])
@pytest.mark.parametrize("p", [100, 99.99, 99.9, 90, 1])
def test_percentile_equals_sorting(p: float, spec: QuantSpec, name: str) -> None:
    x = distribution(name)
    histogram = histogram_of(x)
    assert percentile(histogram, spec, p) == reference_percentile(x, histogram.width, spec, p)


@settings(max_examples=200, deadline=None)
@given(
    hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-9, 9, width=32)),
    st.floats(0, 100, exclude_min=True),
    st.booleans(),
)
def test_percentile_of_few_values_equals_sorting(x: NDArray[np.float32], p: float, symmetric: bool) -> None:
    spec, histogram = SYMMETRIC if symmetric else AFFINE, histogram_of(x)
    low, high = percentile(histogram, spec, p)
    assert (low, high) == reference_percentile(x, histogram.width, spec, p)
    assert np.count_nonzero((x < low) | (x > high)) <= x.size * (100 - Fraction(str(p))) / 100


@pytest.mark.parametrize("p", [0, -1, 100.1, math.nan])
def test_an_impossible_percentile_is_refused(p: float) -> None:
    with pytest.raises(TargetError, match="above 0 and at most 100"):
        percentile(histogram_of(distribution("normal")), AFFINE, p)


def reference_divergence(counts: NDArray[np.int64], start: int, stop: int, levels: int) -> float:
    """The definition, written out: P, then Q level by level, both normalized, then the sum."""
    inside = counts[start:stop].astype(np.float64)
    p = inside.copy()
    p[0] += counts[:start].sum()
    p[-1] += counts[stop:].sum()
    edges = np.arange(levels + 1) * inside.size // levels
    level = np.add.reduceat(inside, edges[:-1])
    holding = np.maximum(np.add.reduceat((p > 0).astype(int), edges[:-1]), 1)
    q = np.where(p > 0, np.repeat(level / holding, np.diff(edges)), 0.0)
    some = p > 0
    if np.any(q[some] == 0):
        return math.inf
    return float(np.sum(p[some] / p.sum() * np.log(p[some] / p.sum() / (q[some] / q.sum()))))


@settings(max_examples=200, deadline=None)
@given(
    hnp.arrays(np.int64, st.integers(20, 80), elements=st.sampled_from([0, 0, 1, 2, 7, 100, 10**6, 10**9])),
    st.integers(0, 10),
    st.integers(2, 10),
)
def test_divergences_equal_their_definition(counts: NDArray[np.int64], start: int, levels: int) -> None:
    if not counts.any():
        return
    stops = np.arange(start + levels, counts.size + 1)
    wanted = [reference_divergence(counts, start, stop, levels) for stop in stops.tolist()]
    np.testing.assert_allclose(divergences(counts, start, stops, levels), wanted, rtol=1e-9, atol=1e-9)


def reference_stop(counts: NDArray[np.int64], start: int, lowest: int, stop: int, levels: int) -> int:
    lowest = max(lowest, start + levels)
    if stop <= lowest:
        return stop
    ends = range(stop, lowest - 1, -math.ceil((stop - lowest + 1) / CANDIDATES))
    return min(ends, key=lambda end: reference_divergence(counts, start, end, levels))


def reference_kld(histogram: Histogram, spec: QuantSpec) -> tuple[float, float]:
    """Candidate by candidate, on dictionaries of bins (bin 0 starts at zero) and without any shared sums."""
    counts = {i - histogram.zero_bin: int(n) for i, n in enumerate(histogram.counts) if n}
    if spec.symmetric:
        magnitudes = {max(i, -i - 1): 0 for i in counts}
        for i, n in counts.items():
            magnitudes[max(i, -i - 1)] += n
        counts = magnitudes
    first, stop = min([*counts, 0]), max([*counts, -1]) + 1
    if 0 in counts:
        counts[0] = min(counts[0], max(counts.get(1, 0), counts.get(-1, 0)))
    array = np.array([counts.get(i, 0) for i in range(first, stop)])
    mirrored, size, zero, levels = array[::-1], array.size, -first, LEVELS[spec]
    if size - zero >= zero:
        end = reference_stop(array, 0, zero, size, levels)
        start = size - reference_stop(mirrored, size - end, size - zero, size, levels)
    else:
        start = size - reference_stop(mirrored, 0, size - zero, size, levels)
        end = reference_stop(array, start, zero, size, levels)
    low, high = (start - zero) * histogram.width, (end - zero) * histogram.width
    return max(histogram.min, -high if spec.symmetric else low), min(histogram.max, high)


@pytest.mark.parametrize(
    "spec, name", [(spec, name) for spec in LEVELS for name in (NAMES if LEVELS[spec] > 16 else HARD)], ids=str
)
def test_kld_equals_trying_every_candidate(spec: QuantSpec, name: str) -> None:
    histogram = histogram_of(distribution(name))
    assert kld(histogram, spec) == reference_kld(histogram, spec)


@on_every_grid
def test_kld_is_not_misled_by_the_zeros_of_a_relu(spec: QuantSpec) -> None:
    x = distribution("relu")
    positive_only = histogram_of(x[x > 0])
    _, high = kld(histogram_of(x), spec)
    assert high == kld(positive_only, spec)[1]
    assert high > (3.5 if LEVELS[spec] > 16 else 2.5)


def test_kld_clips_where_minmax_wastes_the_grid() -> None:
    x = np.append(np.random.default_rng(1).standard_normal(100_000), 30.0).astype(np.float32)
    histogram = histogram_of(x)

    def typical_error(bounds: tuple[float, float]) -> float:
        return float(np.median(np.abs(fake_quantize(x, choose_params(*bounds, AFFINE)) - x)))

    low, high = kld(histogram, AFFINE)
    assert 3.5 < high < 5 and -5 < low < -3.5
    assert typical_error((low, high)) < typical_error(minmax(histogram, AFFINE)) / 3


@pytest.mark.parametrize("name", ["constant", "negative_constant", "relu6", "pixels"])
def test_kld_keeps_what_gathers_at_the_end(name: str) -> None:
    histogram = histogram_of(distribution(name))
    assert kld(histogram, AFFINE) == minmax(histogram, AFFINE)


def test_kld_leaves_sixteen_bits_alone() -> None:
    histogram = histogram_of(distribution("student"))
    assert kld(histogram, QuantSpec("uint16")) == minmax(histogram, AFFINE)


def test_kld_of_four_bits_clips_more_than_of_eight() -> None:
    histogram = histogram_of(distribution("student"))
    assert kld(histogram, QuantSpec("uint4"))[1] < kld(histogram, AFFINE)[1]


def test_a_misspelt_estimator_is_answered_with_its_name() -> None:
    with pytest.raises(
        TargetError,
        match=r"unknown calibrator 'kl'; did you mean 'kld'\? known calibrators: minmax, moving-average, perc",
    ):
        get_estimator("kl")
    with pytest.raises(TargetError, match="unknown calibrator 'xyz'; known calibrators"):
        get_estimator("xyz")


def squared_error(x: NDArray[np.float32], ends: tuple[float, float], spec: QuantSpec) -> float:
    return float(np.mean((fake_quantize(x, choose_params(*ends, spec)).astype(np.float64) - x) ** 2))


def bins(histogram: Histogram) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    seen = histogram.counts > 0
    return histogram.centers[seen].astype(np.float32), histogram.counts[seen].astype(np.float64)


def binned_error(histogram: Histogram, ends: tuple[float, float], spec: QuantSpec) -> float:
    values, counts = bins(histogram)
    return float(counts @ (fake_quantize(values, choose_params(*ends, spec)).astype(np.float64) - values) ** 2)


def within(histogram: Histogram, low: float, high: float) -> tuple[float, float]:
    limits = histogram.min, histogram.max
    return (float(np.clip(low, *limits)), float(np.clip(high, *limits))) if histogram.count else (0.0, 0.0)


def reference_mse(histogram: Histogram, spec: QuantSpec) -> tuple[float, float]:
    """One candidate after the other, every turn taken in full."""
    shares = np.linspace(1.0, MSE_LEAST, MSE_STEPS).tolist()
    extent = [min(histogram.min, 0.0), max(histogram.max, 0.0)]
    if spec.symmetric:
        reach = max(-extent[0], extent[1])
        best = min(shares, key=lambda share: binned_error(histogram, (-share * reach, share * reach), spec))
        return within(histogram, -best * reach, best * reach)
    ends, order = list(extent), (0, 1) if -extent[0] > extent[1] else (1, 0)
    for end in order * MSE_ROUNDS:
        tried = [(share * extent[0], ends[1]) if end == 0 else (ends[0], share * extent[1]) for share in shares]
        ends = list(min(tried, key=lambda range_: binned_error(histogram, range_, spec)))
    return within(histogram, *ends)


@pytest.mark.parametrize("name", NAMES)
@on_every_grid
def test_mse_equals_trying_every_candidate(spec: QuantSpec, name: str) -> None:
    histogram = histogram_of(distribution(name))
    assert mse(histogram, spec) == reference_mse(histogram, spec)


def fitted(histogram: Histogram, ends: tuple[float, float], spec: QuantSpec) -> tuple[float, float]:
    """The range of the grid that fits the codes of `ends` best, by numpy's own least squares, within what was seen."""
    values, counts = bins(histogram)
    params = choose_params(*ends, spec)
    codes = quantize(values, params).astype(np.float64) - params.zero_point
    first, last = params.qmin - int(params.zero_point), params.qmax - int(params.zero_point)
    if not codes.any():
        return ends
    moves = not spec.symmetric and ends[0] < 0 < ends[1] and np.unique(codes).size > 1
    columns = np.stack([codes, np.ones_like(codes)] if moves else [codes], axis=1)
    unit = float(np.abs(values).max())
    root = np.sqrt(counts)[:, None]
    solution = (
        np.linalg.lstsq(columns * root, (values / np.float64(unit))[:, None] * root, rcond=None)[0].ravel() * unit
    )
    scale, offset = solution if moves else (solution[0], 0.0)
    limit = max(-histogram.min, histogram.max)
    limits = (-limit, limit) if spec.symmetric else (min(histogram.min, 0.0), max(histogram.max, 0.0))
    low = -scale * last if spec.symmetric else scale * first + offset
    return float(np.clip(low, limits[0], 0.0)), float(np.clip(scale * last + offset, 0.0, limits[1]))


def alternated(
    histogram: Histogram, ends: tuple[float, float], spec: QuantSpec, steps: int
) -> tuple[float, tuple[float, float]]:
    least = (math.inf, ends)
    for _ in range(steps):
        error = binned_error(histogram, ends, spec)
        if error >= least[0]:
            break
        least = (error, ends)
        ends = fitted(histogram, ends, spec)
    return least


def reference_admm(histogram: Histogram, spec: QuantSpec) -> float:
    """The least error that alternating reaches, one start after the other."""
    low, high = min(histogram.min, 0.0), max(histogram.max, 0.0)
    if spec.symmetric:
        low, high = -max(-low, high), max(-low, high)
    starts = [(low * share, high * share) for share in ADMM_STARTS.tolist()]
    _, best = min(alternated(histogram, start, spec, FIRST_STEPS) for start in starts)
    return alternated(histogram, best, spec, LAST_STEPS)[0]


@pytest.mark.parametrize("name", [name for name in NAMES if "constant" not in name and name != "empty"])
@on_every_grid
def test_admm_equals_alternating_from_one_start_after_the_other(spec: QuantSpec, name: str) -> None:
    histogram = histogram_of(distribution(name))
    energy = binned_error(histogram, (0.0, 0.0), spec)
    found, wanted = binned_error(histogram, admm(histogram, spec), spec), reference_admm(histogram, spec)
    assert found == pytest.approx(wanted, rel=1e-3, abs=1e-12 * energy)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "empty"])
@on_every_grid
@pytest.mark.parametrize("estimator", [mse, admm])
def test_least_squares_is_as_good_as_the_best_range_of_a_grid_search_on_the_values(
    estimator: Estimator, spec: QuantSpec, name: str
) -> None:
    x = distribution(name)
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    shares = np.linspace(1.0, 0.3, 15)
    tried = [(low * a, high * b) for a in shares for b in (shares if not spec.symmetric else (a,))]
    best = min(squared_error(x, ends, spec) for ends in tried)
    histogram = histogram_of(x)
    found = squared_error(x, estimator(histogram, spec), spec)
    assert found <= 1.10 * best + (histogram.width / 2) ** 2  # a histogram knows numbers to half a bin


@pytest.mark.parametrize("name", NAMES)
@on_every_grid
def test_admm_is_no_worse_than_minmax(spec: QuantSpec, name: str) -> None:
    histogram = histogram_of(distribution(name))
    assert binned_error(histogram, admm(histogram, spec), spec) <= binned_error(
        histogram, minmax(histogram, spec), spec
    )


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("denormal", "huge")])
@on_every_grid
@pytest.mark.parametrize("estimator", ["minmax", "mse", "kld", "admm"])
def test_ranges_grow_with_the_numbers(estimator: str, spec: QuantSpec, name: str) -> None:
    x, choose = distribution(name), get_estimator(estimator)
    low, high = choose(histogram_of(x), spec)
    assert choose(histogram_of(x * np.float32(1024)), spec) == (1024 * low, 1024 * high)


def test_moving_average_lies_between_the_means_of_the_samples_ends() -> None:
    histogram = dataclasses.replace(histogram_of(distribution("outlier")), average_min=-3.0, average_max=4.0)
    assert moving_average(histogram, AFFINE) == (-3.0, 4.0) == moving_average(histogram, SYMMETRIC)


def test_moving_average_is_never_wider_than_what_was_seen() -> None:
    histogram = dataclasses.replace(histogram_of(distribution("relu6")), average_min=-1e-9, average_max=6.0000001)
    assert moving_average(histogram, AFFINE) == (0.0, 6.0)


def test_mse_clips_a_lone_outlier_that_costs_more_than_it_is_worth() -> None:
    x = np.concatenate([np.random.default_rng(0).normal(size=200_000), [30.0]]).astype(np.float32)
    low, high = mse(histogram_of(x), AFFINE)
    assert high < 25.0
    assert squared_error(x, (low, high), AFFINE) < 0.9 * squared_error(x, (float(x.min()), 30.0), AFFINE)
