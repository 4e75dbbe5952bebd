"""ResNet-20 on CIFAR-10 as JPEG: 8 and 4 bits after training and while training, with labels and without; the exported files are scored."""

from __future__ import annotations

import copy
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import onnx
import resnet20
from claims import Claim, as_text
from latency import Effort, latencies
from qat_part import Part, holds
from scoring import Entry
from subject import exported, threaded
from torch import nn

import edgekit
from edgekit.data import open_data
from edgekit.distillation import Distillation
from edgekit.finetune import Finetune
from edgekit.graph.run import Session
from edgekit.method import Method
from edgekit.pipelines.sources import input_specs
from edgekit.records import MODEL
from edgekit.reference import resolve_reference
from edgekit.schedule import Augment, Schedule
from edgekit.target import load_target
from edgekit.training.checkpoint import load_checkpoint
from edgekit.training.finetune import finetune
from edgekit.worker import Worker

EPOCHS = 3
INPUT = "image"
SEEDS = (0, 1, 2)
TARGETS = ("x86-onnxruntime", "x86-openvino")
SYMMETRIC = "cuda-tensorrt"
"""It takes symmetric grids only, which have to be trained for it."""
CALIBRATION = 512
FLOAT = Schedule(
    epochs=EPOCHS, optimizer="sgd", learning_rate=0.01, batch_size=128, track="none", save_every=0, clip_norm=0
)
QAT8 = FLOAT.model_copy(update={"learning_rate": 1e-3})
QAT4 = FLOAT.model_copy(update={"learning_rate": 2e-2, "clip_norm": 1.0})
FREE4 = QAT4.model_copy(update={"learning_rate": 1e-2, "epochs": 2 * EPOCHS})
"""Without labels: gentler, and for longer."""
VARIED, FLIPPED = Augment(flip=True, crop=4), Augment(flip=True)
"""Three epochs are few for a network that has much to learn anew: its images are not shifted."""
FOUR = Method(weights="int4", precision="int4")
TAUGHT = Distillation(kind=("response", "feature"))
"""Answers and features of the float network."""
MOST_LOST_8, LEAST_4, LEAST_WON_4 = 0.002, 0.850, 0.06
EFFORT = Effort(rounds=3, bursts=5, burst_seconds=0.2)


@dataclass(frozen=True, slots=True)
class _Run:
    """One way of getting a file: top-1 by target, seconds of training, folder of the compressed model."""

    label: str
    top1: Mapping[str, float]
    seconds: float
    folder: Path


def resnet20_section(zoo: Path, folder: Path) -> Part:
    """All runs from one float network that was fine-tuned on the JPEG images first."""
    begin = time.monotonic()
    work = _Work(zoo, folder)
    factory = resolve_reference(str(resnet20.FACTORY), error=RuntimeError, what="factory")
    assert callable(factory)
    came = load_checkpoint(zoo / resnet20.CHECKPOINT, factory=factory)
    start = work.fit(came, FLOAT, "fine-tune")
    runs = [work.ptq("float and PTQ before", start, Method())]
    longer = [work.score(work.fit(start, _seeded(FLOAT, seed), f"float, seed {seed}")) for seed in SEEDS]
    eight = [work.qat(f"W8A8 QAT, seed {seed}", start, Method(), _seeded(QAT8, seed)) for seed in SEEDS]
    four = [
        work.qat(
            f"W4A4 QAT, float teaches, seed {seed}", start, FOUR, _seeded(QAT4, seed), distill=TAUGHT, augment=FLIPPED
        )
        for seed in SEEDS
    ]
    free = [
        work.qat(
            f"W4A4 QAT, no labels, seed {seed}",
            start,
            FOUR,
            _seeded(FREE4, seed),
            labels=False,
            distill=TAUGHT,
            augment=FLIPPED,
        )
        for seed in SEEDS
    ]
    alone = work.qat("W4A4 QAT, labels alone", start, FOUR, _seeded(QAT4, 0), augment=FLIPPED)
    apart = work.qat("W8A8 QAT for TensorRT", start, Method(), _seeded(QAT8, 0), target=SYMMETRIC)
    ptq4 = work.ptq("W4A4 PTQ", start, FOUR)
    runs += [*eight, apart, ptq4, *four, alone, *free]
    minutes = (time.monotonic() - begin) / 60
    note = (
        f"The checkpoint scores {work.score(came):.4f} on the 2,000 JPEG test images, {work.score(start):.4f} after {EPOCHS} epochs of "
        f"fine-tuning on the 10,000 training images: there all rows begin. {EPOCHS} epochs more in float: {_spread(longer)} over "
        f"{len(SEEDS)} seeds. Each row is what the exported file scores on its runtime; TensorRT's is its simulation, of a graph that its "
        f"builder takes. In all {minutes:.0f} minutes."
    )
    columns = (*TARGETS, SYMMETRIC)
    heads = ["file", *columns, "seconds of training"]
    rows = [
        [run.label, *(f"{run.top1[name]:.4f}" if name in run.top1 else "" for name in columns), f"{run.seconds:.0f}"]
        for run in runs
    ]
    claims = list(_claims(work, runs[0], longer, eight, ptq4, four, free, work.score(start)))
    return Part("ResNet-20", note, heads, rows, claims)


def _claims(
    work: _Work,
    ptq8: _Run,
    longer: Sequence[float],
    eight: Sequence[_Run],
    ptq4: _Run,
    four: Sequence[_Run],
    free: Sequence[_Run],
    start: float,
) -> Iterator[Claim]:
    for name in TARGETS:
        found = mean(run.top1[name] for run in eight)
        text = f"{name}: W8A8 QAT no more than 0.2 points under float of as many epochs, means of {len(SEEDS)} seeds"
        yield holds(text, f"{found:.4f}, float {mean(longer):.4f}", found >= mean(longer) - MOST_LOST_8)
        found = mean(run.top1[name] for run in four)
        yield holds(f"{name}: W4A4 QAT at least {LEAST_4:.3f}", f"{found:.4f}", found >= LEAST_4)
        won = found - ptq4.top1[name]
        yield holds(f"{name}: at least 6 points above W4A4 PTQ", f"{100 * won:+.2f} points", won >= LEAST_WON_4)
        back, lost = mean(run.top1[name] for run in free) - ptq4.top1[name], start - ptq4.top1[name]
        yield holds(
            f"{name}: training without labels wins back half of what W4A4 PTQ lost",
            f"{back / lost:.0%}",
            back >= lost / 2,
        )
    convs, integer = work.convolutions(eight[0])
    yield holds(
        "ONNX Runtime: every Conv of the W8A8 QAT file is an integer kernel", f"{integer} of {convs}", integer == convs
    )
    ratio = work.speed(eight[0], ptq8)
    yield holds("ONNX Runtime: as fast as the PTQ file", as_text(ratio), ratio.ci_high >= 1)


def _seeded(schedule: Schedule, seed: int) -> Schedule:
    return schedule.model_copy(update={"seed": seed})


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.4f} ± {stdev(values):.4f}"


class _Work:
    """Data, and the ways of making files."""

    def __init__(self, zoo: Path, folder: Path) -> None:
        self.zoo, self.folder = zoo, folder
        images = open_data(zoo / resnet20.TRAIN, preprocess=resnet20.PREPROCESS).examples(CALIBRATION)
        [array] = images.values() if isinstance(images, dict) else images
        self.calibration: dict[str, Any] = {INPUT: array}
        self.batches: list[Any] = []

    def fit(self, module: nn.Module, schedule: Schedule, label: str) -> nn.Module:
        """A float copy that was trained."""
        click_say(label)
        trained, _ = finetune(
            copy.deepcopy(module),
            Finetune(data=str(self.zoo / resnet20.TRAIN), schedule=schedule, augment=VARIED),
            load_target("portable"),
            Method(),
            (self.calibration[INPUT],),
            preprocess=resnet20.PREPROCESS,
            metric=None,
            folder=self.folder / label.replace(" ", "-"),
            key=label,
            on_progress=lambda step, done, total: None,
        )
        return trained

    def ptq(self, label: str, module: nn.Module, method: Method) -> _Run:
        """After training only."""
        return self._made(label, module, method, None)

    def qat(
        self,
        label: str,
        module: nn.Module,
        method: Method,
        schedule: Schedule,
        *,
        labels: bool = True,
        distill: Distillation | None = None,
        target: str = "",
        augment: Augment = VARIED,
    ) -> _Run:
        """While training; without labels on the same images, whose labels the float network's answers stand in for."""
        data = str(self.zoo / resnet20.TRAIN) if labels else self._unlabelled()
        plan = Finetune(qat=True, data=data, schedule=schedule, augment=augment, distill=distill)
        return self._made(label, module, method, plan, target)

    def _unlabelled(self) -> str:
        """The training images without the folders that are their labels."""
        path = self.folder / "unlabelled.zip"
        with zipfile.ZipFile(self.zoo / resnet20.TRAIN) as source, zipfile.ZipFile(path, "w") as out:
            for info in source.infolist():
                if not info.is_dir():
                    out.writestr(info.filename.replace("/", "-"), source.read(info))
        return str(path)

    def _made(self, label: str, module: nn.Module, method: Method, plan: Finetune | None, target: str = "") -> _Run:
        click_say(label)
        out = self.folder / f"{label} {target}".replace(" ", "-").replace(",", "") / "out"
        record = edgekit.compress(
            copy.deepcopy(module),
            out,
            calibration=self.zoo / resnet20.TRAIN,
            samples=CALIBRATION,
            preprocess=resnet20.PREPROCESS,
            method=method,
            finetune=plan,
            proxy="none",
            target=target or "portable",
        ).record
        manifests = {one.manifest.target: one.manifest for one in edgekit.export(out, target or TARGETS)}
        top1 = {}
        for name, manifest in manifests.items():
            if manifest.proof.ran_on:
                with Worker(exported(out, manifest), load_target(name), exact=True) as worker:
                    top1[name] = self._top1(worker.run)
            else:
                top1[name] = self._top1(Session(out / name / MODEL, optimize=False).run)
        click_say(f"{label}: {top1}")
        return _Run(label, top1, record.finetuned.seconds if record.finetuned else 0.0, out)

    def score(self, module: nn.Module) -> float:
        """Top-1 of a float module."""
        import torch

        def run(feeds: Mapping[str, Any]) -> dict[str, Any]:
            with torch.no_grad():
                return {"y": module.eval()(torch.from_numpy(next(iter(feeds.values())))).numpy()}

        return self._top1(run)

    def _top1(self, run: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> float:
        if not self.batches:
            from edgekit.data import InputSpec

            spec = InputSpec(INPUT, np.dtype(np.float32), (None, *self.calibration[INPUT].shape[1:]))
            data = open_data(self.zoo / resnet20.TEST, preprocess=resnet20.PREPROCESS).bind([spec])
            self.batches = list(data.batches(250))
        right = [next(iter(run(batch.feeds).values())).argmax(1) == batch.labels for batch in self.batches]
        return float(np.concatenate(right).mean())

    def convolutions(self, run: _Run) -> tuple[int, int]:
        """Of the file for ONNX Runtime: all convolutions, and those that its optimizer makes integer kernels of."""
        import onnxruntime

        path = run.folder / TARGETS[0] / MODEL
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(self.folder / "optimized.onnx")
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        nodes = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
        plain = sum(node.op_type == "Conv" for node in onnx.load(str(path)).graph.node)
        return plain, sum("QLinearConv" in kind for kind in nodes)

    def speed(self, ours: _Run, theirs: _Run) -> Any:
        """How many times faster the first file is than the second, in ONNX Runtime, one image at a time."""
        entries = []
        for run in (ours, theirs):
            [result] = edgekit.export(run.folder, TARGETS[0])
            entries.append(
                Entry("ONNX Runtime", run.label, exported(run.folder, result.manifest), threaded(TARGETS[0]))
            )
        name = input_specs(_loaded(ours.folder / MODEL))[0].name
        feeds = {name: self.calibration[INPUT][:1]}
        return latencies(entries, ours.label, feeds, EFFORT, click_say)[theirs.label].ours


def _loaded(path: Path) -> Any:
    from edgekit.graph.io import load_annotated

    return load_annotated(path)


def click_say(text: str) -> None:
    """Where it is, on stderr."""
    import click

    click.echo(text, err=True)
