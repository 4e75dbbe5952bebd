"""A training loop on Hugging Face Accelerate: any module, any loss, with or without a teacher, resumed exactly where it was stopped.

It is what fine-tuning, quantization-aware training, distillation and the recovery of pruned models share; a module that any of these
made can be trained by a loop of the user's as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgekit.errors import DataError
from edgekit.progress import Progress, silent
from edgekit.schedule import Schedule
from edgekit.training.batches import Share, TrainData
from edgekit.training.checkpoint import evaluating
from edgekit.training.feed import Feed
from edgekit.training.optimizer import make_optimizer, set_rate
from edgekit.training.resume import Checkpoints, Key, fingerprint, random_state, set_random_state
from edgekit.training.steps import Loss, Metric, Stepper, Teacher
from edgekit.training.taps import Taps
from edgekit.training.tracking import close_tracking, log_table, open_accelerator, start_tracking
from edgekit.training.train_data import open_train_data

OnStep = Callable[[int, int], None]

_LOOSE = {"save_every", "track"}
"""What may differ in the schedule of a run that goes on: neither changes the weights."""


@dataclass(frozen=True, slots=True)
class Trained:
    """What a training run came to. The module itself holds the weights, and is in eval mode.

    Attributes:
        steps: updates of the weights, all runs together that this one went on from.
        losses: of each step, the mean over its batches and processes.
        metrics: step and value of each evaluation.
        kept_step: the step that the module's weights are of.
        resumed_from: the step of the checkpoint that this run went on from; 0 when it began anew.
        seconds: of this run.
        remarks: what the user should know.
    """

    steps: int
    losses: tuple[float, ...]
    metrics: tuple[tuple[int, float], ...]
    kept_step: int
    resumed_from: int
    seconds: float
    remarks: tuple[str, ...]

    def table(self, metric_name: str = "metric") -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Columns and rows: the mean loss between evaluations, and the metric."""
        rows, before = [], 0
        for step, value in self.metrics or ((self.steps, None),):
            losses = self.losses[before:step]
            mean = f"{sum(losses) / len(losses):.4g}" if losses else ""
            rows.append((str(step), mean, *(() if value is None else (f"{value:.4f}",))))
            before = step
        return ("step", "loss", *((metric_name,) if self.metrics else ())), rows


def train(
    module: nn.Module,
    data: TrainData | Any,
    loss: Loss,
    *,
    schedule: Schedule,
    folder: Path,
    teacher: Teacher | None = None,
    taps: Taps | None = None,
    evaluate: Metric | None = None,
    extra: Sequence[nn.Module] = (),
    on_step: Sequence[OnStep] = (),
    on_progress: Progress = silent,
    metric_name: str = "metric",
    key: str = "",
    restart: bool = False,
    replaces: bool = False,
) -> Trained:
    """Train a module in place, on the devices that `accelerate launch` chose or the best one here.

    When `folder` holds checkpoints of the same run, it goes on from the newest, and computes what the uninterrupted run would have,
    bit for bit on the same machine. A finished run is not repeated. A run with another schedule, data of another size, other
    tensors or another `key` is refused.

    Args:
        module: called with the inputs by name; put into train mode.
        data: what `open_train_data` gives, or anything that it takes.
        loss: `loss(student_outputs, teacher_outputs, batch)`: a scalar. Outputs are tensors by name, see `named_tensors`, and
            float32 in mixed precision as well; the batch has the inputs and `labels`.
        folder: for checkpoints and curves.
        teacher: gives outputs by name for inputs by name, as `edgekit.training.teacher.Teacher` does. A module is frozen and in eval
            mode, unless it is in `extra`. None: teacher outputs are empty.
        taps: of layers of the module, whose features the loss finds among the student's outputs.
        evaluate: the metric of the module in eval mode, higher is better; asked after every epoch and at the end.
        extra: modules that are trained with it, such as a projector that the loss uses, or a teacher that learns too.
        on_step: each is called before a step with its number, counted from 0, and how many there are. What they switch must follow
            from the number alone, by `>=`: a run that goes on does not see the steps before.
        metric_name: for curves and tables.
        key: what else must be the same for a run to go on, such as a digest of the checkpoint that the module came from.
        restart: remove the checkpoints in `folder` and begin anew.
        replaces: remove those of another run that has finished, instead of refusing.

    Raises:
        DataError: the data or the loss does not fit; patience without a metric.
        GoalError: the loss or a weight is not finite; the last good checkpoint is kept.
        BackendError: a package, or a device for the mixed precision, is missing.
        OutputError: `folder` holds another run, or cannot be written.
    """
    started = time.monotonic()
    if schedule.patience and evaluate is None:
        raise DataError(f"patience = {schedule.patience} needs a metric to watch; give evaluate, or set patience = 0")
    accelerator, remarks = open_accelerator(schedule, folder)
    batches = data if isinstance(data, TrainData) else open_train_data(data, module)
    share, per_epoch, total = _extent(batches, schedule, accelerator.process_index, accelerator.num_processes)
    modules = (module, *extra)
    checkpoints = Checkpoints(folder, _key(schedule, batches, modules, key, share), replaces=replaces)
    with ExitStack() as stack:
        stack.enter_context(_placed(modules, teacher, accelerator.device))
        stack.enter_context(_seeded(schedule.seed + share.process, accelerator.device))
        feed = Feed(batches, share, per_epoch and per_epoch * schedule.accumulate, accelerator.device)
        optimizer = make_optimizer(modules, schedule)
        run = Stepper(accelerator, modules, loss, teacher, taps, feed, optimizer, schedule, checkpoints)
        run.share_weights()
        resumed = run.resume(anew=restart)
        if not run.finished:
            start_tracking(accelerator, folder, run.step, schedule)
            stack.callback(close_tracking, accelerator)
        for step in range(run.step, 0 if run.finished else total):
            for callback in on_step:
                callback(step, total)
            set_rate(optimizer, schedule.rate_factor(step, total))
            run.update()
            if evaluate is not None and (run.step == total or (per_epoch and run.step % per_epoch == 0)):
                run.measure(evaluate, metric_name)
            run.finished = run.step == total or run.has_no_patience_left
            if run.finished or (schedule.save_every and run.step % schedule.save_every == 0):
                run.save()
            run.report(on_progress, total, metric_name)
            if run.finished:
                break
        done = _outcome(run, resumed, started, remarks)
        log_table(accelerator, *done.table(metric_name))
    return done


def _outcome(run: Stepper, resumed: int, started: float, remarks: tuple[str, ...]) -> Trained:
    kept_step = run.take_best()
    return Trained(
        steps=run.step,
        losses=tuple(run.losses),
        metrics=tuple(run.metrics),
        kept_step=kept_step,
        resumed_from=resumed,
        seconds=time.monotonic() - started,
        remarks=(*remarks, *run.remarks),
    )


def _extent(data: TrainData, schedule: Schedule, process: int, processes: int) -> tuple[Share, int | None, int]:
    """What this process trains on; steps in an epoch, and in all."""
    size = data.size
    batch_size = schedule.batch_size if size is None else min(schedule.batch_size, size // processes)
    if not batch_size:
        raise DataError(f"{data.name}: holds {size} samples for {processes} processes; give more, or launch fewer")
    share = Share(batch_size, schedule.seed, process, processes)
    length = data.length(share)
    per_epoch = None if length is None else length // schedule.accumulate
    if per_epoch == 0:
        raise DataError(
            f"{data.name}: an epoch has {length} batches for each process, fewer than accumulate = {schedule.accumulate}; "
            "give more data, or lower accumulate or batch_size"
        )
    total = schedule.total_steps(per_epoch)
    if total is None:
        raise DataError(f"{data.name}: does not say how many batches it has, so epochs cannot be counted; give steps")
    return share, per_epoch, total


def _key(schedule: Schedule, data: TrainData, modules: Sequence[nn.Module], key: str, share: Share) -> Key:
    """What must be the same for a run to go on from a checkpoint."""
    chosen: Mapping[str, Any] = schedule.model_dump(exclude=_LOOSE)
    return {**chosen, **data.key, "processes": share.processes, "tensors": fingerprint(modules), "key": key}


@contextmanager
def _placed(modules: Sequence[nn.Module], teacher: Teacher | None, device: torch.device) -> Iterator[None]:
    """Modules on a device and in train mode for a while, a frozen teacher in eval mode; in the end they are where they were."""
    frozen = [teacher] if isinstance(teacher, nn.Module) and teacher not in modules else []
    homes = [
        (one, next((tensor.device for tensor in chain(one.parameters(), one.buffers())), device))
        for one in (*modules, *frozen)
    ]
    with ExitStack() as stack:
        for one in frozen:
            stack.enter_context(evaluating(one))
        try:
            for one, _ in homes:
                one.to(device)
            for one in modules:
                one.train()
            yield
        finally:
            for one, home in homes:
                one.to(home)
            for one in modules:
                one.eval()


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """All random numbers from a seed for a while; then the caller's go on where they were."""
    from accelerate.utils import set_seed

    before = random_state(device)
    set_seed(seed % 2**32)
    try:
        yield
    finally:
        set_random_state(before, device)
