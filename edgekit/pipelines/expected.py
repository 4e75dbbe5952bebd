"""What all exports of a model are held against: held-back samples, and what the float model makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from edgekit.graph.run import Session
from edgekit.graph.sizes import samples_at_once
from edgekit.pipelines.decision import Decision, beside_all, open_decision
from edgekit.pipelines.resized import Resized, resize
from edgekit.pipelines.split import feeds_of
from edgekit.pipelines.stored import Stored, samples_of_size
from edgekit.proof import Arrays, run_batches

BATCH_SIZES = (7, 33, 1)
"""Of the proof: no batch that models are traced or calibrated with. Kernels change with it, and so do their faults: one of
OpenVINO's is right up to a batch of 8, and wrong from 9 on.
"""
PROVEN_ON = 64
"""The most held-back samples that an artifact is held against the simulation on; decisions are compared on all."""
SINGLES = 4
RESIZED = 2
"""Samples in another size than calibration's."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What all targets are held against: held-back samples, and what the float model makes of them.

    Attributes:
        decision: what judges, where no metric does.
        batches, floats: outputs by batch.
        resized: see `edgekit.pipelines.resized.resize`.
    """

    decision: Decision | None
    batches: Sequence[Arrays]
    floats: Sequence[Arrays]
    resized: Resized | None


def what_is_expected(stored: Stored, *, judged: bool) -> Expected:
    """Run the float model on held-back samples; where `judged`, the compressed model's proxy does so on some that calibrated too, else a
    metric judges.
    """
    proxied = stored.record.proxy if judged else None
    decision = None
    if proxied:
        feeds = [batch for part in stored.deciding() for batch in feeds_of(part, stored.model)]
        decision = beside_all(open_decision(stored.model, feeds, known=proxied), stored)
    sizes = _batch_sizes(stored)
    batches = _batches(stored, sizes)
    session = Session(stored.model, optimize=False)
    few = next(iter(stored.held_back.batches(min(RESIZED, sizes[1]))))
    floats = run_batches(session.run, batches)
    return Expected(decision, batches, floats, resize(few, stored.held_back.inputs, session))


def _batch_sizes(stored: Stored) -> tuple[int, int, int]:
    """`BATCH_SIZES`, smaller where so many samples' activations are too much to hold."""
    few, many, single = BATCH_SIZES
    first = next(iter(stored.held_back.batches(single)))
    most = samples_at_once(stored.model, first.feeds, many)
    return min(few, most), most, single


def _batches(stored: Stored, sizes: tuple[int, int, int]) -> list[Arrays]:
    few, many, single = sizes
    batches = chain(stored.held_back.batches(few, 0, PROVEN_ON), stored.held_back.batches(single, 0, SINGLES))
    return [*(batch.feeds for batch in batches), samples_of_size(stored, many)]
