from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from edgekit.errors import DataError
from edgekit.quant.observers import (
    BINS,
    CHUNK,
    COARSE,
    FINE,
    RARE,
    SPAN,
    Histogram,
    HistogramObserver,
    MinMaxObserver,
)

LARGEST = float(np.finfo(np.float32).max)
SMALLEST = 2.0**-149

scaled = st.builds(
    lambda mantissa, exponent: math.ldexp(mantissa, exponent),
    st.sampled_from([-1.0, 1.0, 0.75, -0.875, 1.0 + 2.0**-12, -1.0 - 2.0**-11, 0.0, -0.0]),
    st.integers(-149, 126),
)
values = st.one_of(scaled, st.floats(-LARGEST, LARGEST, width=32), st.floats(-4, 4, width=32))
arrays = hnp.arrays(np.float32, st.integers(0, 12), elements=values.map(np.float32).map(float))


def seen(*batches: NDArray[np.generic]) -> HistogramObserver:
    observer = HistogramObserver()
    for batch in batches:
        observer.update(batch)
    return observer


def assert_same(a: Histogram, b: Histogram) -> None:
    np.testing.assert_array_equal(a.counts, b.counts)
    assert (a.first_edge, a.width, a.min, a.max, a.count) == (b.first_edge, b.width, b.min, b.max, b.count)


def counted_exactly(x: NDArray[np.float32], width: float) -> NDArray[np.int64]:
    """The same bins by rational arithmetic."""
    counts = np.zeros(2 * BINS, np.int64)
    for value in x.tolist():
        counts[BINS + math.floor(Fraction(value) / Fraction(width))] += 1
    return counts


@settings(max_examples=300, deadline=None)
@given(arrays)
@example(np.array([-SMALLEST, LARGEST], np.float32))
@example(np.array([-SMALLEST, SMALLEST, 0.0], np.float32))
@example(np.array([-SMALLEST, 4095.0], np.float32))
@example(np.array([-SMALLEST, 4096.0], np.float32))
@example(np.array([-SMALLEST, 2.0**-114], np.float32))
@example(np.array([-1.0, -0.5, 1.0], np.float32))
def test_every_value_is_in_the_bin_that_exact_arithmetic_gives(x: NDArray[np.float32]) -> None:
    histogram = seen(x).histogram()
    np.testing.assert_array_equal(histogram.counts, counted_exactly(x, histogram.width))
    assert histogram.count == histogram.counts.sum() == x.size
    assert histogram.zero_bin == BINS and histogram.first_edge == -BINS * histogram.width
    if x.any():
        assert (histogram.min, histogram.max) == (x.min(), x.max())
        assert 2048 <= float(np.abs(x).max()) / histogram.width < 4096


@settings(max_examples=300, deadline=None)
@given(st.lists(arrays, min_size=1, max_size=6), st.randoms(use_true_random=False))
@example([np.array([-SMALLEST], np.float32), np.array([LARGEST], np.float32)], None)
def test_order_and_split_of_batches_change_nothing(batches: list[NDArray[np.float32]], random: object) -> None:
    whole = seen(np.concatenate(batches)).histogram()
    assert_same(seen(*batches).histogram(), whole)
    assert_same(seen(*reversed(batches)).histogram(), whole)
    if hasattr(random, "shuffle"):
        random.shuffle(batches)
    assert_same(seen(*batches).histogram(), whole)


@settings(max_examples=200, deadline=None)
@given(st.lists(arrays, min_size=1, max_size=5), st.integers(0, 5))
def test_merging_workers_is_one_observer_that_saw_everything(batches: list[NDArray[np.float32]], cut: int) -> None:
    left, right = seen(*batches[:cut]), seen(*batches[cut:])
    kept = right.histogram()
    left.merge(right)
    assert_same(left.histogram(), seen(*batches).histogram())
    assert_same(right.histogram(), kept)
    left.update(np.array([LARGEST, -1.0], np.float32))
    assert_same(right.histogram(), kept)


@pytest.mark.parametrize("size", [CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
@pytest.mark.parametrize("low", [-7.0, 0.0], ids=["signed", "after_relu"])
def test_chunks_leave_no_seam(size: int, low: float) -> None:
    x = np.maximum(np.random.default_rng(size).normal(0, 3, size), low).astype(np.float32)
    histogram = seen(x.reshape(1, -1)).histogram()
    edges = histogram.first_edge + np.arange(2 * BINS + 1) * histogram.width
    np.testing.assert_array_equal(histogram.counts, np.histogram(x, edges)[0])


def test_a_float16_or_strided_batch_counts_as_its_float32_copy() -> None:
    x = np.random.default_rng(0).normal(0, 3, (8, 8)).astype(np.float16)
    wanted = seen(x.astype(np.float32)).histogram()
    assert_same(seen(x).histogram(), wanted)
    assert_same(seen(x.astype(np.float64)).histogram(), wanted)
    assert_same(seen(np.repeat(x, 2, axis=1)[:, ::2]).histogram(), wanted)


@pytest.mark.parametrize("observer_class", [HistogramObserver, MinMaxObserver])
@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_broken_batch_is_counted_and_leaves_no_trace(
    observer_class: type[HistogramObserver | MinMaxObserver], broken: float
) -> None:
    observer = observer_class()
    observer.update(np.array([1.0, -2.0], np.float32))
    with pytest.raises(DataError, match="found 2 NaN or infinite values among 4"):
        observer.update(np.array([[broken, 9.0], [-9.0, broken]], np.float32))
    assert (observer.min, observer.max, observer.count) == (-2.0, 1.0, 2)
    if isinstance(observer, HistogramObserver):
        assert observer.histogram().counts.sum() == 2


def test_doubles_beyond_float32_are_refused() -> None:
    with pytest.raises(DataError, match="found 1 NaN or infinite values among 2"):
        seen(np.array([1e300, 1.0]))


def test_nothing_seen_is_an_empty_histogram() -> None:
    observer = seen(np.zeros((0, 3), np.float32))
    assert (observer.min, observer.max, observer.count) == (math.inf, -math.inf, 0)
    histogram = observer.histogram()
    assert (histogram.min, histogram.max, histogram.count, histogram.counts.sum()) == (0.0, 0.0, 0, 0)


def test_zeros_wait_for_the_first_number() -> None:
    zeros = np.array([0.0, -0.0, 0.0], np.float32)
    number = np.array([-1e-42], np.float32)
    assert seen(zeros).histogram().counts[BINS] == 3
    assert_same(seen(zeros, number, zeros).histogram(), seen(np.concatenate([number, zeros, zeros])).histogram())


@settings(max_examples=100, deadline=None)
@given(st.lists(arrays, min_size=1, max_size=5))
def test_minmax_sees_the_extremes_of_all(batches: list[NDArray[np.float32]]) -> None:
    one, other = MinMaxObserver(), MinMaxObserver()
    for batch in batches:
        one.update(batch)
    other.update(batches[0])
    rest = MinMaxObserver()
    for batch in batches[1:]:
        rest.update(batch)
    other.merge(rest)
    everything = np.concatenate(batches)
    wanted = (everything.min(initial=np.inf), everything.max(initial=-np.inf), everything.size)
    assert (one.min, one.max, one.count) == (other.min, other.max, other.count) == wanted


def test_centers_stand_in_the_middle_of_their_bins() -> None:
    histogram = seen(np.array([3.0], np.float32)).histogram()
    assert histogram.width == 4.0 / BINS
    np.testing.assert_array_equal(histogram.centers[[0, BINS]], [-4.0 + 2.0 / BINS, 2.0 / BINS])


SAMPLED: dict[str, Callable[[np.random.Generator, int], NDArray[np.float64]]] = {
    "gauss": lambda rng, n: rng.normal(0, 1, n),
    "relu": lambda rng, n: np.maximum(rng.normal(0, 1, n), 0),
    "heavy": lambda rng, n: rng.standard_t(2, n),
    "uniform": lambda rng, n: rng.uniform(-3, 5, n),
    "negative": lambda rng, n: -rng.lognormal(0, 1.5, n),
    "constant": lambda rng, n: np.full(n, 0.7),
    "huge": lambda rng, n: rng.normal(0, 5e37, n),
    "denormal": lambda rng, n: rng.normal(0, 1e-40, n),
    "one number": lambda rng, n: np.eye(1, n, 5)[0],
    "zeros": lambda rng, n: np.zeros(n),
}


@pytest.mark.parametrize("stride", [FINE, COARSE])
@pytest.mark.parametrize("size", [CHUNK + 1, SPAN, 3 * SPAN + 5])
@pytest.mark.parametrize("name", SAMPLED)
def test_sampling_is_exact_in_the_tails_and_close_in_the_bulk(name: str, size: int, stride: int) -> None:
    x = SAMPLED[name](np.random.default_rng(size), size).astype(np.float32)
    sampled, full = HistogramObserver(stride=stride), seen(x).histogram()
    sampled.update(x)
    found = sampled.histogram()
    assert (found.min, found.max, found.width, sampled.count) == (full.min, full.max, full.width, size)
    assert (found.average_min, found.average_max) == (full.min, full.max)
    picked = [x[i : i + SPAN][i // SPAN :: stride].astype(np.float64) for i in range(0, size, SPAN)]
    limit = RARE * max(float(np.sqrt(np.mean(np.square(values)))) for values in picked)
    tails = np.abs(found.centers) > limit + found.width
    np.testing.assert_array_equal(found.counts[tails], full.counts[tails])
    assert abs(found.count - size) <= 0.01 * size
    distance = np.abs(np.cumsum(found.counts) - np.cumsum(full.counts)).max() / size
    assert distance <= 2.5 * np.sqrt(stride / size)


def test_few_values_are_all_counted_by_a_sampled_observer() -> None:
    x = np.random.default_rng(0).normal(0, 1, CHUNK).astype(np.float32)
    sampled = HistogramObserver(stride=COARSE)
    sampled.update(x)
    assert_same(sampled.histogram(), seen(x).histogram())


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_sampled_observer_finds_every_broken_value(broken: float) -> None:
    x = np.ones(2 * SPAN, np.float32)
    x[SPAN + 3] = broken
    sampled = HistogramObserver(stride=COARSE)
    with pytest.raises(DataError, match=f"found 1 NaN or infinite values among {2 * SPAN}"):
        sampled.update(x)
    assert (sampled.count, sampled.histogram().counts.sum()) == (0, 0)


@settings(max_examples=100, deadline=None)
@given(st.lists(arrays.filter(lambda x: x.size > 0), min_size=1, max_size=6), st.integers(0, 5))
def test_averages_are_exact_means_over_samples_in_any_order(batches: list[NDArray[np.float32]], cut: int) -> None:
    left, right = seen(*batches[cut:]), seen(*reversed(batches[:cut]))
    left.merge(right)
    histogram = left.histogram()
    count = len(batches)
    assert histogram.average_min == float(sum(Fraction(float(x.min())) for x in batches) / count)
    assert histogram.average_max == float(sum(Fraction(float(x.max())) for x in batches) / count)
