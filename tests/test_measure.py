from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgekit.backend import Artifact
from edgekit.errors import DataError
from edgekit.measure import (
    Candidate,
    Timing,
    bootstrap_median,
    compare,
    interleaved,
    measure,
    ratio,
    samples_in,
    spread,
    summarize,
)
from edgekit.target import Target, load_target

PLUGIN = Path(__file__).parent / "plugin"
FEEDS = {"x": np.ones((4, 3), np.float32)}
MEDIANS = hnp.arrays(np.float64, st.integers(1, 12), elements=st.floats(0.01, 1000))


@pytest.fixture(autouse=True)
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PLUGIN))


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    graph = onnx.parser.parse_graph("relu (float[N, 3] x) => (float[N, 3] y) { y = Relu(x) }")
    path = tmp_path / "relu.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10), path)
    return Artifact(path, (path,), "f32")


def numpy_target(**options: str) -> Target:
    target = load_target(str(PLUGIN / "numpy.toml"))
    return target.model_copy(update={"runtime": target.runtime.model_copy(update={"options": options})})


def timing(label: str, *bursts_ms: float) -> Timing:
    bursts = [np.array([round(burst * 1e6)] * 3, np.int64) for burst in bursts_ms]
    return summarize(label, bursts, 1, load_ms=1.0, peak_rss_bytes=1)


def test_tells_a_slow_candidate_from_a_fast_one(artifact: Artifact) -> None:
    progress: list[tuple[int, int]] = []
    slow = Candidate("slow", artifact, numpy_target(on_run="dawdle"))  # sleeps 20 ms
    fast = Candidate("fast", artifact, numpy_target())
    found = measure([slow, fast], FEEDS, bursts=3, iterations=5, on_progress=lambda *step: progress.append(step))
    assert found.failures == {}
    assert [each.label for each in found.timings] == ["slow", "fast"]
    assert [each.iterations for each in found.timings] == [15, 15]
    assert [len(each.bursts) for each in found.timings] == [3, 3]
    slow_timing, fast_timing = found.timings
    assert slow_timing.median_ms >= 20 > fast_timing.median_ms
    for each in found.timings:
        assert each.ci_low_ms <= each.median_ms <= each.ci_high_ms
        assert each.median_ms <= each.p90_ms <= each.p99_ms
        assert each.throughput == pytest.approx(4 * 1000 / each.median_ms, rel=1e-12)
        assert each.load_ms > 0
        assert each.peak_rss_bytes > 20e6
    assert list(found.ratios) == ["fast"]
    assert found.ratios["fast"].ci_low > 1
    assert progress == [(done, 6) for done in range(1, 7)]


def test_bursts_last_the_asked_seconds(artifact: Artifact) -> None:
    dawdling = Candidate("a", artifact, numpy_target(on_run="dawdle"))
    found = measure([dawdling], FEEDS, bursts=3, burst_seconds=0.1)
    assert 3 <= found.timings[0].iterations <= 15  # 20 ms each and a little, 100 ms a burst
    assert found.ratios == {}


def test_goes_on_without_candidates_that_fail(artifact: Artifact) -> None:
    candidates = [
        Candidate("baseline", artifact, numpy_target()),
        Candidate("does not load", artifact, numpy_target(on_load="crash")),
        Candidate("does not run", artifact, numpy_target(on_run="raise")),
        Candidate("runs", artifact, numpy_target()),
    ]
    found = measure(candidates, FEEDS, bursts=3, iterations=3)
    assert [each.label for each in found.timings] == ["baseline", "runs"]
    assert list(found.ratios) == ["runs"]
    assert list(found.failures) == ["does not load", "does not run"]
    assert "SIGSEGV" in found.failures["does not load"]
    assert "the cheese is out" in found.failures["does not run"]


def test_a_candidate_that_dies_between_bursts_fails_alone(artifact: Artifact) -> None:
    # The warm-up takes at most 20 bursts of 51 inferences; 20 bursts of 75 follow.
    dying = Candidate("dying", artifact, numpy_target(on_run="crash", healthy_runs="1100"))
    found = measure([Candidate("baseline", artifact, numpy_target()), dying], FEEDS, bursts=20, iterations=50)
    assert [each.label for each in found.timings] == ["baseline"]
    assert len(found.timings[0].bursts) == 20
    assert "SIGSEGV during 'time'" in found.failures["dying"]


def test_without_the_baseline_there_are_no_ratios(artifact: Artifact) -> None:
    broken = Candidate("baseline", artifact, numpy_target(on_load="raise"))
    found = measure([broken, Candidate("other", artifact, numpy_target())], FEEDS, bursts=3, iterations=2)
    assert [each.label for each in found.timings] == ["other"]
    assert found.ratios == {}
    assert list(found.failures) == ["baseline"]


def test_mistakes_in_the_request_are_refused(artifact: Artifact) -> None:
    one = Candidate("one", artifact, numpy_target())
    with pytest.raises(DataError, match="nothing to measure"):
        measure([], FEEDS)
    with pytest.raises(DataError, match="called 'one'"):
        measure([one, one], FEEDS)
    with pytest.raises(DataError, match="bursts=0"):
        measure([one], FEEDS, bursts=0)
    with pytest.raises(DataError, match="iterations=0"):
        measure([one], FEEDS, iterations=0)
    with pytest.raises(DataError, match="'x' has the type"):
        measure([one], {"x": np.array(["text"])})


def test_rounds_alternate_their_order() -> None:
    assert interleaved(["a", "b", "c"], 3) == ["a", "b", "c", "c", "b", "a", "a", "b", "c"]


@pytest.mark.parametrize(
    ("feeds", "expected"),
    [
        ({"x": np.zeros((8, 3))}, 8),
        ({"s": np.array(1.0), "x": np.zeros((5, 2))}, 5),
        ({"s": np.array(1.0)}, 1),
        ({}, 1),
    ],
)
def test_the_leading_dimension_counts_the_samples(feeds: dict[str, np.ndarray], expected: int) -> None:
    assert samples_in(feeds) == expected


def test_summary_of_known_durations() -> None:
    bursts = [np.arange(1, 101) * 1_000_000, np.arange(1, 101) * 1_000_000, np.arange(101, 201) * 1_000_000]
    found = summarize("a", bursts, 8, load_ms=3.0, peak_rss_bytes=7)
    assert found.bursts == (50.5, 50.5, 150.5)
    assert found.median_ms == 50.5
    assert found.throughput == pytest.approx(8 / 0.0505, rel=1e-12)
    assert found.p90_ms == pytest.approx(np.percentile(np.concatenate(bursts), 90) / 1e6, rel=1e-12)
    assert found.p99_ms == pytest.approx(np.percentile(np.concatenate(bursts), 99) / 1e6, rel=1e-12)
    assert (found.ci_low_ms, found.ci_high_ms) == (50.5, 150.5)
    assert (found.iterations, found.load_ms, found.peak_rss_bytes) == (300, 3.0, 7)


def test_the_interval_covers_the_true_median_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    intervals = [bootstrap_median(rng.normal(10, 1, 25)) for _ in range(300)]
    covered = np.mean([low <= 10 <= high for low, high in intervals])
    assert 0.90 <= covered <= 0.99


def test_the_interval_narrows_with_more_bursts() -> None:
    rng = np.random.default_rng(2)
    low, high = bootstrap_median(rng.normal(10, 1, 10))
    low_many, high_many = bootstrap_median(rng.normal(10, 1, 1000))
    assert high_many - low_many < (high - low) / 3


@given(MEDIANS)
def test_the_interval_holds_the_median_within_the_data_and_is_repeatable(values: np.ndarray) -> None:
    low, high = bootstrap_median(values)
    assert values.min() <= low <= np.median(values) <= high <= values.max()
    assert (low, high) == bootstrap_median(values)


@given(MEDIANS, st.floats(0.01, 100))
def test_ratios_and_spread_do_not_depend_on_units(values: np.ndarray, factor: float) -> None:
    found = ratio(values * factor, values)
    assert (found.median, found.ci_low, found.ci_high) == pytest.approx((factor,) * 3, rel=1e-12)
    assert spread(values * factor) == pytest.approx(spread(values), rel=1e-9, abs=1e-12)


def test_a_drift_that_meets_both_candidates_leaves_the_ratio_alone() -> None:
    drift = np.array([1.0, 1.5, 2.0, 3.0])
    found = ratio(10 * drift, 5 * drift)
    assert (found.median, found.ci_low, found.ci_high) == (2.0, 2.0, 2.0)


def test_a_noisy_candidate_is_named() -> None:
    quiet, noisy = timing("quiet", 10.0, 10.5, 11.0), timing("noisy", 10.0, 10.0, 12.0)
    assert not compare((quiet,), "quiet", {}).noisy
    assert compare((quiet,), "quiet", {}).message == ""
    found = compare((quiet, noisy), "quiet", {})
    assert found.noisy
    assert found.message.startswith("noisy: burst medians differ by 20% (more than 15%)")


def test_too_few_bursts_are_said_to_be_too_few() -> None:
    found = compare((timing("a", 10.0, 10.0),), "a", {})
    assert found.noisy
    assert "2 bursts are too few" in found.message
