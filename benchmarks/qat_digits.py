"""Distillation on handwritten digits: each kind and scheme beside the same student that learns alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from qat_part import Part, holds
from sklearn.datasets import load_digits
from torch import Tensor, nn

from edgekit.distillation import Distillation
from edgekit.training.teacher import open_distiller

SEEDS = range(5)
TEST, LABELLED, BATCH = 700, 256, 64
TEACHER_EPOCHS, EPOCHS, RATE = 15, 200, 3e-3
WAYS: dict[str, dict[str, Any]] = {
    "response": {"kind": "response"},
    "response, 10 % on labels": {"kind": "response", "hard": 0.1},
    "response, no labels": {"kind": "response"},
    "feature": {"kind": "feature"},
    "attention": {"kind": "attention"},
    "rkd": {"kind": "rkd"},
    "similarity": {"kind": "similarity"},
    "online": {"kind": "response", "scheme": "online", "temperature": 1.0},
    "self": {"kind": "response", "scheme": "self", "temperature": 1.0},
}
"""What is tried; "self" has a teacher of the student's own kind, trained alone first."""


def digits_section(zoo: Path, folder: Path) -> Part:
    """A narrow network on few labels; the wide teacher has seen all."""
    torch.set_num_threads(1)
    digits = load_digits()
    images, labels = torch.tensor(digits.images[:, None] / 16.0, dtype=torch.float32), torch.tensor(digits.target)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(labels)))
    work = _Work(images, labels, order[:TEST], order[TEST:])
    teacher = work.alone(32, 0, work.train, TEACHER_EPOCHS)
    few = work.train[:LABELLED]
    alone = [work.score(work.alone(4, 10 + seed, few, EPOCHS, seed)) for seed in SEEDS]
    rows = [["alone", f"{mean(alone):.2%} ± {stdev(alone):.2%}", "", ""]]
    claims = []
    for name, options in WAYS.items():
        found = [
            work.score(work.taught(options, seed, few, teacher, labelled="no labels" not in name)) for seed in SEEDS
        ]
        won = [100 * (ours - theirs) for ours, theirs in zip(found, alone, strict=True)]
        better = sum(one > 0 for one in won)
        rows.append([name, f"{mean(found):.2%} ± {stdev(found):.2%}", f"{mean(won):+.2f}", f"{better} of {len(won)}"])
        claims.append(
            holds(f"{name}: better than alone, mean of {len(won)} seeds", f"{mean(won):+.2f} points", mean(won) > 0)
        )
    note = (
        f"scikit-learn's digits; students of width 4 on {LABELLED} labelled images, {EPOCHS} epochs; {TEST} images test. The teacher, of "
        f"width 32, scores {work.score(teacher):.2%}. ±: the standard deviation over seeds."
    )
    return Part("Distillation", note, ["way", "top-1", "points over alone", "seeds won"], rows, claims)


class _Work:
    def __init__(self, images: Tensor, labels: Tensor, test: Tensor, train: Tensor) -> None:
        self.images, self.labels, self.test, self.train = images, labels, test, train

    def score(self, module: nn.Module) -> float:
        with torch.no_grad():
            return float((module.eval()(self.images[self.test]).argmax(1) == self.labels[self.test]).float().mean())

    def alone(self, width: int, seed: int, chosen: Tensor, epochs: int, order: int = 0) -> nn.Module:
        module = _net(width, seed)

        def loss(student: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
            return nn.functional.cross_entropy(student(batch["x"]), batch["labels"])

        return self._fit(module, loss, [], chosen, epochs, order, labelled=True)

    def taught(
        self, options: Mapping[str, Any], seed: int, chosen: Tensor, teacher: nn.Module, *, labelled: bool
    ) -> nn.Module:
        way, student = Distillation.model_validate(dict(options)), _net(4, 10 + seed)
        other = copy.deepcopy(teacher)
        if way.scheme == "self":
            other = self.alone(4, 50 + seed, chosen, EPOCHS, 100 + seed)
        elif way.scheme == "online":
            other = _net(4, 50 + seed)
        distiller = open_distiller(way, student, other, {"x": self.images[chosen[:BATCH]]}, has_labels=labelled)
        distiller.teacher.train()
        return self._fit(student, distiller, distiller.parameters(), chosen, EPOCHS, seed, labelled=labelled)

    def _fit(
        self,
        module: nn.Module,
        loss: Callable[..., Tensor],
        extra: list[nn.Parameter],
        chosen: Tensor,
        epochs: int,
        order: int,
        *,
        labelled: bool,
    ) -> nn.Module:
        steps = epochs * (len(chosen) // BATCH)
        optimizer = torch.optim.AdamW([*module.parameters(), *extra], RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
        module.train()
        for batch in self._batches(chosen, epochs, order, labelled=labelled):
            optimizer.zero_grad()
            loss(module, batch).backward()
            optimizer.step()
            schedule.step()
        return module.eval()

    def _batches(self, chosen: Tensor, epochs: int, order: int, *, labelled: bool) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(order)
        for _ in range(epochs):
            shuffled = chosen[torch.randperm(len(chosen), generator=generator)]
            for start in range(0, len(shuffled) - BATCH + 1, BATCH):
                some = shuffled[start : start + BATCH]
                yield {"x": self.images[some]} | ({"labels": self.labels[some]} if labelled else {})


def _net(width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)

    def layer(before: int, after: int, stride: int = 1) -> nn.Module:
        return nn.Sequential(nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU())

    wide = 2 * width
    body = [layer(1, width), layer(width, wide, 2), layer(wide, wide, 2)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(wide, 10))
