"""The demo's network: pruned, int8, and both, and whether the two speed-ups multiply."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from claims import Claim, as_text
from latency import Effort, Latency, latencies
from prune_subject import RUNTIMES, fewer, say
from qat_part import Part, holds
from scoring import Entry, Feeds
from subject import Subject, float_entries, here, prepare
from torch import nn

import edgekit
from edgekit.finetune import Finetune
from edgekit.pruning import Prune, Pruned
from edgekit.records import read_compressed
from edgekit.schedule import Schedule
from edgekit.training.digits import train
from edgekit.training.digits_net import digits_net
from edgekit.worker import Worker

EFFORT = Effort(rounds=5, bursts=7, burst_seconds=0.25)
MACS = 0.5
BATCHES = (1, 8)
APART = 0.25
FLOAT, PRUNED, INT8, BOTH = "float", "pruned", "int8", "pruned, int8"
RECOVERY = Finetune(
    schedule=Schedule(epochs=30, optimizer="adamw", learning_rate=1e-3, batch_size=32, track="none", save_every=0)
)


@dataclass(frozen=True, slots=True)
class _Row:
    """One file on one runtime: how much slower than pruned int8 it is, by batch size."""

    entry: Entry
    top1: float
    latency: Mapping[int, Latency]


def int8_section(zoo: Path, folder: Path) -> Part:
    """Half of the MACs go, then both networks are compressed as the demo does it."""
    checkpoint, calibration, test = folder / "digits.pt", folder / "calibration.npz", folder / "test.npz"
    train(checkpoint, calibration, test)
    network = digits_net().eval()
    network.load_state_dict(torch.load(checkpoint, weights_only=True))
    targets = {name: here(name, folder) for name in RUNTIMES}
    whole = _compressed(network, calibration, test, None, folder / "whole", list(targets.values()))
    small = _compressed(network, calibration, test, Prune(macs=MACS), folder / "small", list(targets.values()))
    with np.load(calibration) as file:
        feeds = {"image": file["image"]}
    rows, claims, pruned = list[_Row](), list[Claim](), _record(small)
    for name, target in targets.items():
        say(f"demo network: {name}")
        entries = {
            FLOAT: next(float_entries(target, whole.float_model)),
            PRUNED: next(float_entries(target, small.float_model)),
            INT8: whole.entry(target, INT8),
            BOTH: small.entry(target, BOTH),
        }
        found = _timed(entries, feeds, test)
        rows += found
        claims += _claims(name, found, feeds)
    note = (
        f"The demo's network on scikit-learn's digits, {fewer(pruned.macs)} MACs, recovered for {RECOVERY.schedule.epochs} epochs on the "
        f"320 calibration images with the unpruned network as teacher: {pruned.before:.4f} as it came, {pruned.cut:.4f} cut, "
        f"{pruned.after:.4f} recovered. Ratios are over {EFFORT.rounds} rounds of fresh processes."
    )
    heads = ["runtime", "file", "top-1", "bytes"]
    heads += [text for batch in BATCHES for text in (f"batch {batch}", f"{BOTH} is faster")]
    return Part("Pruned, then int8", note, heads, list(map(_told, rows)), claims)


def _compressed(
    network: nn.Module, calibration: Path, test: Path, prune: Prune | None, folder: Path, targets: Sequence[str]
) -> Subject:
    return prepare(
        lambda out: edgekit.compress(
            network, out, calibration=calibration, evaluate=test, prune=prune, finetune=RECOVERY if prune else None
        ),
        folder,
        targets,
    )


def _record(subject: Subject) -> Pruned:
    found = read_compressed(subject.folder).pruned
    assert found is not None, "it was pruned"
    return found


def _timed(entries: Mapping[str, Entry], feeds: Feeds, test: Path) -> list[_Row]:
    """All four in one comparison for each batch size."""
    labelled = {label: replace(entry, label=label) for label, entry in entries.items()}
    times = {}
    for batch in BATCHES:
        few = {name: array[:batch] for name, array in feeds.items()}
        times[batch] = latencies(list(labelled.values()), BOTH, few, EFFORT, say)
    return [
        _Row(entry, _top1(entry, test), {batch: times[batch][label] for batch in BATCHES})
        for label, entry in labelled.items()
    ]


def _top1(entry: Entry, test: Path) -> float:
    with np.load(test) as file, Worker(entry.artifact, entry.target) as worker:
        images, labels = file["image"], file["labels"]
        scores = next(iter(worker.run({"image": images}).values()))
    return float((scores.argmax(1) == labels).mean())


def _claims(target: str, rows: Sequence[_Row], feeds: Feeds) -> Iterator[Claim]:
    by_label = {row.entry.label: row for row in rows}
    for batch in BATCHES:
        slower = {label: row.latency[batch].ms for label, row in by_label.items()}
        pruned, int8, both = (slower[FLOAT] / slower[label] for label in (PRUNED, INT8, BOTH))
        text = f"{target}, batch {batch}: the speed-ups multiply to within {APART:.0%}"
        found = f"{pruned:.2f} x of pruning, {int8:.2f} x of int8, {both:.2f} x of both: {both / (pruned * int8):.0%} of their product"
        good = abs(both / (pruned * int8) - 1) <= APART
        yield holds(text, found if good else f"{found}; {_why(by_label, feeds)}", good)


def _why(rows: Mapping[str, _Row], feeds: Feeds) -> str:
    """The layers whose kernels the smaller network does not get."""
    few = {name: array[:1] for name, array in feeds.items()}
    kernels = {label: _kernels(rows[label].entry, few) for label in (INT8, BOTH)}
    other = [
        f"{name}: {kernels[INT8][name]} in {INT8}, {kernel} in {BOTH}"
        for name, kernel in kernels[BOTH].items()
        if name in kernels[INT8] and kernels[INT8][name] != kernel
    ]
    return "; ".join(other) or f"all layers have the same kernels in both files ({len(kernels[BOTH])})"


def _kernels(entry: Entry, feeds: Feeds) -> dict[str, str]:
    """What each layer runs as."""
    with Worker(entry.artifact, entry.target) as worker:
        records = worker.kernels(feeds)
    return {layer: f"{record.kernel} ({record.precision})" for record in records for layer in record.layers}


def _told(row: _Row) -> list[str]:
    told = [row.entry.group, row.entry.label, f"{row.top1:.4f}", f"{row.entry.artifact.size_bytes:,}"]
    for batch in BATCHES:
        latency = row.latency[batch]
        told += [f"{latency.ms:.4f} ms", as_text(latency.ours)]
    return told
