"""ResNet-20 on CIFAR-10 as JPEG with half of its multiply-accumulates: cut, recovered from labels, and with a teacher."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import resnet20
from claims import Claim
from prune_subject import Shape, fewer, resnet20_shape, say, trained_resnet20
from qat_part import Part, holds
from qat_resnet20 import EPOCHS, FLIPPED, VARIED, _Work
from qat_resnet20 import FLOAT as FIRST

from edgekit.distillation import Distillation
from edgekit.finetune import Finetune
from edgekit.pruning import Prune, Pruned
from edgekit.schedule import Augment, Schedule

MACS = 0.5
INSIDE = Prune(macs=MACS, round_to=4, ignore=("conv1", "layer?.*.conv2"))
"""Of all blocks by l1; what residual additions join keeps its channels."""
ALIKE = Prune(macs=MACS, scope="layer", round_to=4, ignore=INSIDE.ignore)
"""As much of each block."""
MANY_EPOCHS = 40
RECOVERY = Schedule(epochs=EPOCHS, optimizer="adamw", learning_rate=3e-3, batch_size=64, track="none", save_every=0)
LONG = RECOVERY.model_copy(
    update={"epochs": MANY_EPOCHS, "optimizer": "sgd", "learning_rate": 0.02, "weight_decay": 5e-4}
)
ANSWERS = Distillation(hard=0.1)
FEATURES = Distillation(kind=("response", "feature"), hard=0.1, weight=3)
TEACHING = {
    "labels": Distillation(hard=1),
    "and answers of the unpruned model": ANSWERS,
    "and its answers and features": FEATURES,
}
"""What is learned from."""
LEAST, MOST_LOST, MOST_MINUTES = 0.835, 0.010, 20.0
BY_HAND = "Torch-Pruning by hand, the widths inside blocks only, gave 0.14 when cut, 0.787 after three epochs, and 0.818 with distillation."


@dataclass(frozen=True, slots=True)
class _Row:
    """One way of pruning: what it came to, and how long training took (s)."""

    label: str
    found: Pruned
    seconds: float


def resnet20_section(zoo: Path, folder: Path) -> Part:
    """All rows begin with one float network that was fine-tuned on the JPEG images."""
    work = _Work(zoo, folder)
    start = work.fit(trained_resnet20(zoo), FIRST, "fine-tune")
    before = work.score(start)
    longer = work.score(work.fit(start, FIRST, f"float, {EPOCHS} more"))
    shape = resnet20_shape(zoo, start)
    rows = [
        _pruned(f"inside blocks, {how}", shape, INSIDE, taught, RECOVERY, FLIPPED, zoo, folder)
        for how, taught in TEACHING.items()
    ]
    others = {
        "as much of each block": ALIKE,
        "everywhere by l1": Prune(macs=MACS, round_to=4),
        "everywhere by hessian": Prune(macs=MACS, round_to=4, criterion="hessian"),
    }
    for label, prune in others.items():
        rows.append(_pruned(f"{label}, the same", shape, prune, FEATURES, RECOVERY, FLIPPED, zoo, folder))
    rows.append(_pruned("inside blocks, long", shape, INSIDE, FEATURES, LONG, VARIED, zoo, folder))
    note = (
        f"The checkpoint, fine-tuned for {EPOCHS} epochs on the 10,000 JPEG training images, scores {before:.4f} on the 2,000 test images: "
        f"there all rows begin; as many epochs more in float come to {longer:.4f}. "
        f"Recovery: {RECOVERY.optimizer} at {RECOVERY.learning_rate:g}, batches of {RECOVERY.batch_size}, images flipped; in the long run "
        f"{LONG.optimizer} at {LONG.learning_rate:g} with a weight decay of {LONG.weight_decay:g}, images shifted too. "
        f"{FEATURES.summary}, features with the weight {FEATURES.weight:g}. {BY_HAND}"
    )
    heads = ["what goes, learned from", "epochs", "MACs", "parameters", "cut", "recovered", "seconds in all"]
    return Part("ResNet-20, half of the MACs", note, heads, list(map(_told, rows)), list(_claims(rows, before)))


def _pruned(
    label: str,
    shape: Shape,
    prune: Prune,
    taught: Distillation,
    schedule: Schedule,
    augment: Augment,
    zoo: Path,
    folder: Path,
) -> _Row:
    say(f"ResNet-20: {label}")
    plan = Finetune(
        data=str(zoo / resnet20.TRAIN),
        distill=taught,
        schedule=schedule,
        augment=augment,
    )
    out = folder / label.replace(",", "").replace(" ", "-") / "out"
    out.parent.mkdir()
    begin = time.monotonic()
    found = shape.pruned(prune, out, finetune=plan, evaluate=zoo / resnet20.TEST)
    assert found is not None, "it was pruned"
    return _Row(label, found, time.monotonic() - begin)


def _told(row: _Row) -> list[str]:
    found = row.found
    epochs = MANY_EPOCHS if row.label.endswith("long") else EPOCHS
    return [
        row.label,
        str(epochs),
        fewer(found.macs),
        f"{found.parameters[0]:,} to {found.parameters[1]:,}",
        f"{found.cut:.4f}",
        f"{found.after:.4f}",
        f"{row.seconds:.0f}",
    ]


def _claims(rows: list[_Row], before: float) -> Iterator[Claim]:
    by_label = {row.label: row for row in rows}
    short = by_label["inside blocks, and its answers and features"]
    alone, long = by_label["inside blocks, labels"], rows[-1]
    assert short.found.after and alone.found.after and long.found.after, "they were evaluated"
    yield holds(
        f"l1, {EPOCHS} epochs with distillation: at least {LEAST:.3f}",
        f"{short.found.after:.4f}",
        short.found.after >= LEAST,
    )
    yield holds(
        "l1: half of the MACs, or less",
        f"{short.found.macs[1]:,} of {short.found.macs[0]:,}",
        short.found.macs[1] <= MACS * short.found.macs[0],
    )
    won = short.found.after - alone.found.after
    yield holds("l1: distillation wins something over labels alone", f"{100 * won:+.2f} points", won > 0)
    lost = before - long.found.after
    yield holds(
        f"l1, {MANY_EPOCHS} epochs: no more than {100 * MOST_LOST:.1f} points under the float network that it was",
        f"{long.found.after:.4f}, float {before:.4f}, {-100 * lost:+.2f} points",
        lost <= MOST_LOST,
    )
    minutes = long.seconds / 60
    yield holds(
        f"l1, {MANY_EPOCHS} epochs: in at most {MOST_MINUTES:.0f} minutes", f"{minutes:.1f}", minutes <= MOST_MINUTES
    )
