"""Pruning to a measured speed-up, beside uniform pruning with as many multiply-accumulates, and half of them, in both runtimes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import resnet50
from claims import Claim, as_text
from latency import Effort, Latency, latencies
from prune_subject import RUNTIMES, Shape, fewer, float_entry, resnet20_shape, say, trained_resnet20
from prune_torch_resnet50 import torch_resnet50
from qat_part import Part, holds
from scoring import Entry
from subject import X86_ONNXRUNTIME, X86_OPENVINO, here

from edgekit.data import open_data
from edgekit.measure import Ratio
from edgekit.pruning import Prune, Pruned

EFFORT = Effort(rounds=5, bursts=7, burst_seconds=0.25)
WITHIN = 0.10
MACS, LEAST_AT_HALF = 0.5, 1.5
UNPRUNED, TIMED, UNIFORM, UNROUNDED, HALF = (
    "unpruned",
    "by measured time",
    "uniform",
    "uniform, not rounded",
    "half of the MACs",
)
IMAGES = 4


@dataclass(frozen=True, slots=True)
class _Row:
    """One file in a comparison, and what made it."""

    where: str
    entry: Entry
    found: Pruned | None
    latency: Latency


def speed_section(zoo: Path, folder: Path) -> Part:
    """Float against float, one sample at a time."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")  # else an earlier run's times of layers would be taken
    small = resnet20_shape(zoo, trained_resnet20(zoo))
    image = np.concatenate([batch.feeds["image"] for batch in resnet50.images(IMAGES, 1)])
    large = Shape("ResNet-50's shape", torch_resnet50(), {"image": image}, IMAGES)
    rows, claims = list[_Row](), list[Claim]()
    for shape, goal, name in ((small, 1.5, X86_ONNXRUNTIME), (large, 1.8, X86_OPENVINO)):
        found = _to_a_goal(shape, goal, here(name, folder), folder / name)
        rows += found
        claims += _goal_claims(shape, goal, name, found)
    for name in RUNTIMES:
        found = _at_half(small, here(name, folder), folder / f"half-{name}")
        rows += found
        claims.append(_half_claim(name, found))
    note = (
        f"In float, one sample at a time, {EFFORT.rounds} rounds of fresh processes. "
        f'"{UNIFORM}" takes the same share of each layer, with as many MACs left as "{TIMED}"; "{UNROUNDED}" does not round the numbers '
        f'of channels to what the runtime likes. The subject is "{TIMED}", or "{HALF}" where that is all. The '
        "network of ResNet-50's shape has random weights: only time matters."
    )
    heads = ["network, runtime", "file", "MACs", "ms", "the subject is faster", "measured while pruning"]
    return Part("Speed", note, heads, list(map(_told, rows)), claims)


def _to_a_goal(shape: Shape, goal: float, target: str, folder: Path) -> list[_Row]:
    """The unpruned network, the one that a goal was set for, and two that are as small."""
    folder.mkdir()
    say(f"{shape.name}: {goal}x in {target}")
    timed = shape.pruned(Prune(speedup=f"{goal}@{target}", recover=False), folder / "timed", target=target)
    assert timed is not None, "it was pruned"
    share = timed.macs[1] / timed.macs[0]
    plans = {
        UNIFORM: Prune(macs=share, scope="layer", recover=False),
        UNROUNDED: Prune(macs=share, scope="layer", round_to=0, recover=False),
    }
    return _compared(shape, target, folder, {TIMED: timed}, plans)


def _at_half(shape: Shape, target: str, folder: Path) -> list[_Row]:
    folder.mkdir()
    say(f"{shape.name}: half of the MACs in {target}")
    return _compared(shape, target, folder, {}, {HALF: Prune(macs=MACS, recover=False)})


def _compared(
    shape: Shape, target: str, folder: Path, made: Mapping[str, Pruned], plans: Mapping[str, Prune]
) -> list[_Row]:
    """Everything that was made, and what `plans` make, beside the unpruned network."""
    found: dict[str, Pruned | None] = {UNPRUNED: None, **made}
    shape.pruned(None, folder / "unpruned")
    places = {UNPRUNED: folder / "unpruned", TIMED: folder / "timed"}
    for index, (label, plan) in enumerate(plans.items()):
        places[label] = folder / f"plan{index}"
        found[label] = shape.pruned(plan, places[label], target=target)
    entries = [float_entry(places[label], target, label) for label in found]
    feeds = one_sample(shape)
    subject = next(iter(made), next(iter(plans)))
    times = latencies(entries, subject, feeds, EFFORT, say)
    where = f"{shape.name}, {entries[0].group}"
    return [_Row(where, entry, found[entry.label], times[entry.label]) for entry in entries]


def one_sample(shape: Shape) -> dict[str, Any]:
    """What is timed."""
    found = open_data(shape.calibration, preprocess=shape.preprocess).examples(1)
    [array] = found.values() if isinstance(found, dict) else found
    return {"image": array[:1]}


def _goal_claims(shape: Shape, goal: float, target: str, rows: Sequence[_Row]) -> Iterator[Claim]:
    by_label = {row.entry.label: row for row in rows}
    whole = by_label[UNPRUNED].latency.ours
    yield holds(
        f"{shape.name}: {goal}x in {target} reached within {WITHIN:.0%}",
        as_text(whole),
        abs(whole.median / goal - 1) <= WITHIN,
    )
    for label in (UNIFORM, UNROUNDED):
        ours = by_label[label].latency.ours
        yield holds(f"{shape.name}, {target}: faster than {label}, at as many MACs", as_text(ours), ours.ci_low > 1)


def _half_claim(target: str, rows: Sequence[_Row]) -> Claim:
    ours = next(row.latency.ours for row in rows if row.entry.label == UNPRUNED)
    text = f"ResNet-20, {target}: half of the MACs at least {LEAST_AT_HALF}x as fast"
    return holds(text, as_text(ours), ours.median >= LEAST_AT_HALF)


def _told(row: _Row) -> list[str]:
    found = row.found
    ms, ours = f"{row.latency.ms:.3f}", row.latency.ours
    if found is None:
        return [row.where, row.entry.label, "", ms, as_text(ours), ""]
    while_pruning = (
        "" if found.speedup is None else as_text(Ratio(found.speedup, found.speedup_low or 0, found.speedup_high or 0))
    )
    return [row.where, row.entry.label, fewer(found.macs), ms, as_text(ours), while_pruning]
