"""ResNet-20 pruned by measured time, and uniformly until it is as fast: what accuracy each has after the same recovery."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean

import resnet20
from claims import Claim, as_text
from latency import Effort, Latency, latencies
from prune_resnet20 import FEATURES, RECOVERY
from prune_speed import TIMED, UNIFORM, UNPRUNED, one_sample
from prune_subject import Shape, fewer, float_entry, resnet20_shape, say, trained_resnet20
from qat_part import Part, holds
from qat_resnet20 import FLIPPED, SEEDS, _Work
from qat_resnet20 import FLOAT as FIRST
from scoring import Entry
from subject import X86_ONNXRUNTIME, X86_OPENVINO, here

from edgekit.errors import GoalError
from edgekit.finetune import Finetune
from edgekit.pruning import Prune, Pruned

GOALS = {X86_ONNXRUNTIME: 1.5, X86_OPENVINO: 1.3}
STEP, MOST_SHARE = 0.03, 0.15
"""Shares of the MACs that are tried for uniform pruning: their distance, and how far above that of measured time they begin."""
EFFORT = Effort(rounds=5, bursts=7, burst_seconds=0.15)


@dataclass(frozen=True, slots=True)
class _Row:
    """One way of pruning for one runtime: what it came to with each seed, and the latency of the first."""

    where: str
    label: str
    found: Sequence[Pruned]
    latency: Latency


def one_speed_section(zoo: Path, folder: Path) -> Part:
    """Each seed of measured time is the whole command, with times of its own; uniform pruning is chosen once for each runtime."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")  # else an earlier run's times of layers would be taken
    work = _Work(zoo, folder)
    start = work.fit(trained_resnet20(zoo), FIRST, "fine-tune")
    shape = resnet20_shape(zoo, start)
    rows, claims = list[_Row](), list[Claim]()
    for name, goal in GOALS.items():
        place = folder / name
        place.mkdir()
        found = list(_Runtime(shape, here(name, place), zoo, place).rows(goal))
        rows += found
        claims.append(_claim(found))
    note = (
        f"From {work.score(start):.4f}. In float, one sample at a time. Uniform pruning takes the same share of each layer; of shares of "
        f"the MACs, {STEP:.0%} apart, it is the largest that is as fast as what measured time came to. Recovery: {RECOVERY.epochs} epochs "
        f"of {RECOVERY.optimizer} at {RECOVERY.learning_rate:g}, {FEATURES.summary}, features with the weight {FEATURES.weight:g}; "
        f"{len(SEEDS)} seeds. Latency of the first seed's file, {EFFORT.rounds} rounds of fresh processes."
    )
    heads = ["runtime", "what goes", "MACs", "ms", f"{TIMED} is faster", "top-1, recovered", "mean"]
    return Part("Accuracy at one speed", note, heads, list(map(_told, rows)), claims)


@dataclass(frozen=True, slots=True)
class _Runtime:
    """What is pruned for one target, into folders of `folder`; `made` is what was timed of it, by folder."""

    shape: Shape
    target: str
    zoo: Path
    folder: Path
    made: dict[str, Entry] = field(default_factory=dict)

    def rows(self, goal: float) -> Iterator[_Row]:
        timed = [self._recovered(Prune(speedup=f"{goal}@{self.target}"), seed, f"timed-{seed}") for seed in SEEDS]
        self.shape.pruned(None, self.folder / "unpruned")
        share = self._as_fast(timed[0].macs[1] / timed[0].macs[0])
        plan = Prune(macs=share, scope="layer")
        uniform = [self._recovered(plan, seed, f"uniform-{seed}") for seed in SEEDS]
        labels = {UNPRUNED: "unpruned", TIMED: f"timed-{SEEDS[0]}", UNIFORM: f"uniform-{SEEDS[0]}"}
        times = self._times(labels)
        found: dict[str, list[Pruned]] = {UNPRUNED: [], TIMED: timed, UNIFORM: uniform}
        for label, made in found.items():
            yield _Row(Path(self.target).stem, label, made, times[label])

    def _recovered(self, prune: Prune, seed: int, name: str) -> Pruned:
        say(f"{Path(self.target).stem}: {name}")
        schedule = RECOVERY.model_copy(update={"seed": seed})
        plan = Finetune(data=str(self.zoo / resnet20.TRAIN), distill=FEATURES, schedule=schedule, augment=FLIPPED)
        found = self.shape.pruned(
            prune, self.folder / name, finetune=plan, evaluate=self.zoo / resnet20.TEST, target=self.target
        )
        assert found is not None, "it was pruned"
        return found

    def _as_fast(self, share: float) -> float:
        """The largest share of the MACs with which uniform pruning is as fast as the first that measured time came to."""
        tried = share + MOST_SHARE
        while True:
            name = f"try-{tried:.3f}"
            try:
                self.shape.pruned(
                    Prune(macs=tried, scope="layer", recover=False), self.folder / name, target=self.target
                )
            except GoalError as error:
                say(str(error))
            else:
                ours = self._times({TIMED: f"timed-{SEEDS[0]}", UNIFORM: name})[UNIFORM].ours
                say(f"uniform with {tried:.1%} of the MACs: measured time is {as_text(ours)} as fast")
                if ours.median <= 1:
                    return tried
            tried -= STEP

    def _times(self, places: Mapping[str, str]) -> dict[str, Latency]:
        for place in set(places.values()) - set(self.made):
            self.made[place] = float_entry(self.folder / place, self.target, place)
        entries = [replace(self.made[place], label=label) for label, place in places.items()]
        return latencies(entries, TIMED, one_sample(self.shape), EFFORT, say)


def _told(row: _Row) -> list[str]:
    ms, ours = f"{row.latency.ms:.3f}", as_text(row.latency.ours)
    if not row.found:
        return [row.where, row.label, "", ms, ours, "", ""]
    macs = ", ".join(dict.fromkeys(fewer(one.macs) for one in row.found))
    scores = _scores(row)
    return [row.where, row.label, macs, ms, ours, ", ".join(f"{one:.4f}" for one in scores), f"{mean(scores):.4f}"]


def _scores(row: _Row) -> list[float]:
    return [one.after for one in row.found if one.after is not None]


def _claim(rows: Sequence[_Row]) -> Claim:
    by_label = {row.label: row for row in rows}
    timed, uniform = _scores(by_label[TIMED]), _scores(by_label[UNIFORM])
    return holds(
        f"{rows[0].where}: at one speed, measured time keeps more accuracy than uniform pruning, with every seed",
        f"{min(timed):.4f} to {max(timed):.4f}, uniform {min(uniform):.4f} to {max(uniform):.4f}",
        min(timed) > max(uniform),
    )
