"""Whole comparisons, repeated: what differs from process to process counts as noise, as what differs from burst to burst does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scoring import Array, Entry, Feeds

from edgekit.measure import Candidate, Comparison, Ratio, bootstrap_median, measure, ratio


@dataclass(frozen=True, slots=True)
class Latency:
    """One entry over all rounds.

    Attributes:
        ms: the median over rounds of the median latency (ms).
        ours: how many times faster the subject is than this entry: the median over rounds, with its 95 % bootstrap interval
            (over bursts, when there is one round only).
        noisy: rounds in which the bursts of some entry were too far apart; see `edgekit.measure.NOISY_SPREAD`.
    """

    ms: float
    ours: Ratio
    noisy: int


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to measure: rounds of a whole comparison, each with so many bursts of so many seconds for each entry."""

    rounds: int = 5
    bursts: int = 7
    burst_seconds: float = 0.25


def latencies(
    entries: Sequence[Entry], subject: str, feeds: Feeds, effort: Effort, say: Callable[[str], None]
) -> dict[str, Latency]:
    """Time `entries`, in fresh processes each round and beginning with another one each time; by label."""
    rounds = []
    for index in range(effort.rounds):
        say(f"round {index + 1} of {effort.rounds}")
        shift = index % len(entries)
        rounds.append(_measured([*entries[shift:], *entries[:shift]], feeds, effort))
    noisy = sum(comparison.noisy for comparison in rounds)
    bursts = [_bursts(comparison) for comparison in rounds]
    return {entry.label: _latency(entry.label, subject, bursts, noisy) for entry in entries}


def _measured(entries: Sequence[Entry], feeds: Feeds, effort: Effort) -> Comparison:
    candidates = [Candidate(entry.label, entry.artifact, entry.target) for entry in entries]
    return measure(candidates, feeds, bursts=effort.bursts, burst_seconds=effort.burst_seconds)


def _bursts(comparison: Comparison) -> dict[str, Array]:
    """The medians of each entry's bursts (ms), in the order of the bursts, by label."""
    assert not comparison.failures, comparison.failures
    return {timing.label: np.array(timing.bursts) for timing in comparison.timings}


def _latency(label: str, subject: str, rounds: Sequence[dict[str, Array]], noisy: int) -> Latency:
    ms = float(np.median([np.median(bursts[label]) for bursts in rounds]))
    ratios = [ratio(bursts[label], bursts[subject]) for bursts in rounds]
    if len(ratios) == 1:
        return Latency(ms, ratios[0], noisy)
    each = np.array([one.median for one in ratios])
    return Latency(ms, Ratio(float(np.median(each)), *bootstrap_median(each)), noisy)
