"""The one timing protocol, the same for every runtime.

Each candidate runs in a worker of its own, and only one runs at any time; the others wait for their next request. After
a warm-up that lasts until the times are stable, bursts of inferences are interleaved, A B B A A B ..., so that a drift of
the machine's speed meets all candidates alike. Within a burst inferences resemble one another more than they do across
bursts, so the burst, not the inference, is the unit that confidence intervals resample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekit.backend import Artifact, Feeds
from edgekit.errors import BackendError, DataError
from edgekit.target import Target
from edgekit.worker import Worker

NOISY_SPREAD = 0.15
"""Burst medians of one candidate that lie further apart than this share of their median make a comparison noisy."""
FEWEST_BURSTS = 3
"""With fewer bursts than these, an interval says nothing."""
STABLE_SHARE = 0.03
"""The warm-up ends when the medians of two bursts in a row differ by no more than this share."""
MOST_WARMUP_BURSTS = 20
WARMUP_SHARE = 0.2
"""A burst of the warm-up takes this share of a measured one; half of it is spent warming up again before each burst."""
RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Candidate:
    """One thing to time: an artifact and the target whose backend runs it. Labels tell candidates apart."""

    label: str
    artifact: Artifact
    target: Target


@dataclass(frozen=True, slots=True)
class Timing:
    """How fast one candidate is.

    Attributes:
        label: of the candidate.
        median_ms: latency of one inference (ms), the median of the bursts' medians.
        p90_ms, p99_ms: percentiles of all inferences (ms).
        ci_low_ms, ci_high_ms: 95 % bootstrap confidence interval of the median (ms).
        throughput: samples per second at the median, one inference at a time.
        load_ms: cold load time of the artifact (ms).
        peak_rss_bytes: the most memory that the process held (bytes), Python and its packages included; 0 if unknown.
        iterations: how many inferences were timed.
        bursts: the median of each burst (ms), in order.
    """

    label: str
    median_ms: float
    p90_ms: float
    p99_ms: float
    ci_low_ms: float
    ci_high_ms: float
    throughput: float
    load_ms: float
    peak_rss_bytes: int
    iterations: int
    bursts: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times faster than the baseline a candidate is: the median over pairs of bursts, and its 95 % interval."""

    median: float
    ci_low: float
    ci_high: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """What `measure` found.

    Attributes:
        timings: of the candidates that ran, in their order.
        ratios: by label, of each candidate but the first, which is the baseline; empty when the baseline failed.
        failures: by label, why a candidate could not be timed.
        noisy: the numbers are not to be trusted much.
        message: why not; empty when not noisy.
    """

    timings: tuple[Timing, ...]
    ratios: dict[str, Ratio]
    failures: dict[str, str]
    noisy: bool
    message: str


def measure(
    candidates: Sequence[Candidate],
    feeds: Feeds,
    *,
    bursts: int = 7,
    burst_seconds: float = 0.25,
    iterations: int | None = None,
    timeout_s: float = 300.0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Time `candidates` against the first of them.

    Args:
        candidates: what to time; their labels must differ.
        feeds: arrays by input name, for every inference; the leading dimension of the first counts the samples.
        bursts: how many bursts each candidate gets.
        burst_seconds: how long a burst lasts (s).
        iterations: how many inferences a burst has instead, exactly.
        timeout_s: the longest that loading, or one burst of `iterations`, may take (s).
        on_progress: called with the number of bursts done and the number of all bursts.

    Raises:
        DataError: `feeds` cannot be sent to a runtime, no bursts are asked for, or two candidates share a label.
    """
    _check(candidates, bursts, burst_seconds, iterations)
    seconds = burst_seconds if iterations is None else None
    samples: dict[str, list[NDArray[np.int64]]] = {}
    failures: dict[str, str] = {}
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        warmups: dict[str, int] = {}
        for each in candidates:
            try:
                worker = stack.enter_context(Worker(each.artifact, each.target, timeout_s=timeout_s))
                warmups[each.label] = warm_up(worker, feeds, seconds=burst_seconds, iterations=iterations)
            except BackendError as error:
                failures[each.label] = str(error)
            else:
                workers[each.label], samples[each.label] = worker, []
        for done, label in enumerate(interleaved([each.label for each in candidates], bursts), 1):
            if label not in failures:
                try:
                    burst = workers[label].time(feeds, seconds=seconds, iterations=iterations, warmup=warmups[label])
                    samples[label].append(np.array(burst, np.int64))
                except BackendError as error:
                    failures[label] = str(error)
            if on_progress:
                on_progress(done, bursts * len(candidates))
        ran = {label: worker for label, worker in workers.items() if label not in failures}
        batch = samples_in(feeds)
        timings = tuple(
            summarize(label, samples[label], batch, load_ms=worker.load_ms, peak_rss_bytes=worker.peak_rss_bytes())
            for label, worker in ran.items()
        )
    return compare(timings, candidates[0].label, failures)


def _check(candidates: Sequence[Candidate], bursts: int, burst_seconds: float, iterations: int | None) -> None:
    labels = [each.label for each in candidates]
    if not labels:
        raise DataError("there is nothing to measure: give one candidate at least")
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise DataError(f"more than one candidate is called {twice[0]!r}; give each a label of its own")
    if bursts < 1 or burst_seconds <= 0 or (iterations is not None and iterations < 1):
        raise DataError(
            f"bursts={bursts}, burst_seconds={burst_seconds}, iterations={iterations}: each must be more than 0"
        )


def warm_up(worker: Worker, feeds: Feeds, *, seconds: float, iterations: int | None) -> int:
    """Run short bursts until two in a row agree, or `MOST_WARMUP_BURSTS` are done.

    Returns how many inferences warm the worker up again before each burst, after it was idle.
    """
    before = np.inf
    for _ in range(MOST_WARMUP_BURSTS):
        burst = worker.time(feeds, seconds=seconds * WARMUP_SHARE, iterations=iterations, warmup=1)
        median = float(np.median(burst))
        if abs(median - before) <= STABLE_SHARE * median:
            break
        before = median
    return max(1, len(burst) // 2)


def interleaved(labels: Sequence[str], rounds: int) -> list[str]:
    """The order of bursts: A B C, C B A, A B C, ..."""
    return [label for index in range(rounds) for label in (labels if index % 2 == 0 else reversed(labels))]


def samples_in(feeds: Feeds) -> int:
    """The leading dimension of the first array that has one, else 1."""
    return next((array.shape[0] for array in feeds.values() if array.ndim), 1)


def bootstrap_median(values: NDArray[np.float64], *, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile-bootstrap confidence interval of the median of `values`, shape `(N,)`.

    Reference: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    picks = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(np.median(values[picks], axis=1), [2.5, 97.5])
    return float(low), float(high)


def spread(values: NDArray[np.float64]) -> float:
    """How far apart the ends of `values` lie, as a share of their median."""
    return float((values.max() - values.min()) / np.median(values))


def summarize(
    label: str, bursts: Sequence[NDArray[np.int64]], batch: int, *, load_ms: float, peak_rss_bytes: int
) -> Timing:
    """The statistics of one candidate from the durations (ns) in each of its bursts; `batch` samples an inference."""
    medians = np.array([np.median(burst) for burst in bursts]) / 1e6
    inferences = np.concatenate(bursts) / 1e6
    median = float(np.median(medians))
    p90, p99 = np.percentile(inferences, [90, 99])
    low, high = bootstrap_median(medians)
    return Timing(
        label=label,
        median_ms=median,
        p90_ms=float(p90),
        p99_ms=float(p99),
        ci_low_ms=low,
        ci_high_ms=high,
        throughput=batch * 1000 / median,
        load_ms=load_ms,
        peak_rss_bytes=peak_rss_bytes,
        iterations=len(inferences),
        bursts=tuple(medians.tolist()),
    )


def compare(timings: tuple[Timing, ...], baseline: str, failures: dict[str, str]) -> Comparison:
    """Set the candidates against the one called `baseline`, round by round."""
    base = next((timing for timing in timings if timing.label == baseline), None)
    others = [timing for timing in timings if timing.label != baseline] if base else []
    ratios = {timing.label: ratio(np.array(base.bursts), np.array(timing.bursts)) for timing in others if base}
    complaints = [complaint for timing in timings if (complaint := _complaint(timing))]
    return Comparison(timings, ratios, failures, noisy=bool(complaints), message="; ".join(complaints))


def ratio(baseline: NDArray[np.float64], candidate: NDArray[np.float64]) -> Ratio:
    """Baseline over candidate for the burst medians of each round, shape `(rounds,)`; more than 1 is faster."""
    pairs = baseline / candidate
    return Ratio(float(np.median(pairs)), *bootstrap_median(pairs))


def _complaint(timing: Timing) -> str:
    if len(timing.bursts) < FEWEST_BURSTS:
        return f"{timing.label}: {len(timing.bursts)} bursts are too few for an interval; run {FEWEST_BURSTS} or more"
    share = spread(np.array(timing.bursts))
    if share <= NOISY_SPREAD:
        return ""
    return (
        f"{timing.label}: burst medians differ by {share:.0%} (more than {NOISY_SPREAD:.0%}); "
        "close other programs and measure again"
    )
