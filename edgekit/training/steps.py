"""One step of training after another, with what a run knows of itself: losses, metrics, the best weights, its checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgekit.data.samples import LABELS
from edgekit.errors import DataError, EdgekitError, GoalError
from edgekit.progress import Progress
from edgekit.schedule import Schedule
from edgekit.training.batches import Tensors
from edgekit.training.checkpoint import evaluating, users_error
from edgekit.training.feed import Feed
from edgekit.training.forward import named_tensors
from edgekit.training.optimizer import trained
from edgekit.training.processes import average, average_buffers, gathered, send_from_first
from edgekit.training.resume import Checkpoints, Record, copied, module_state, restore_module
from edgekit.training.taps import Outputs, Taps
from edgekit.words import some

if TYPE_CHECKING:
    from accelerate import Accelerator

Loss = Callable[[Outputs, Outputs, Tensors], Tensor]
Teacher = Callable[[Tensors], Outputs]
Metric = Callable[[nn.Module], float]

SETTLE_EVERY = 16
"""Steps whose losses are read together where reading one waits for the device."""
CURVE_EVERY = 10
"""Steps between two points of the curves."""
REPORT_EVERY_S = 0.5
SMOOTHED = 20
"""Steps whose mean loss is told."""
NOTHING: Outputs = {}


class Stepper:
    """A training run in progress.

    Attributes:
        step: updates of the weights so far.
        losses: of each of them that was read.
        metrics: step and value of each evaluation.
        finished: nothing is left to do.
        remarks: what the user should know.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        modules: Sequence[nn.Module],
        loss: Loss,
        teacher: Teacher | None,
        taps: Taps | None,
        feed: Feed,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        checkpoints: Checkpoints,
    ) -> None:
        """The first of the modules is the student, and all are on the accelerator's device."""
        self.step, self.finished = 0, False
        self.losses: list[float] = []
        self.metrics: list[tuple[int, float]] = []
        self.remarks: list[str] = []
        self._accelerator, self._device, self._schedule = accelerator, accelerator.device, schedule
        self._modules, self._module = modules, modules[0]
        self._loss, self._teacher, self._taps = loss, teacher, taps
        self._feed, self._optimizer, self._checkpoints = feed, optimizer, checkpoints
        self._trained = trained(optimizer.param_groups)
        optimizer.zero_grad()  # whatever the caller computed before
        self._mixed = schedule.mixed_precision != "no"
        self._best_step = 0
        self._best: dict[str, Any] | None = None
        self._pending: list[tuple[Tensor, int, int]] = []
        self._began = self._told = time.monotonic()
        self._first = self._drawn = 0

    # ---- one step

    def update(self) -> None:
        """Take the batches of one step, and update the weights.

        Raises:
            DataError: the data is at fault, or the module or the loss fails.
            GoalError: a loss is not finite.
        """
        for _ in range(self._schedule.accumulate):
            value = self._loss_of(self._feed.next())
            self._accelerator.backward(value)
            self._pending.append((value.detach(), self._feed.epoch, self._feed.batch - 1))
        if self._device.type == "cpu" or len(self._pending) >= SETTLE_EVERY * self._schedule.accumulate:
            self._settle()  # before the weights change
        average(self._accelerator, [one.grad for one in self._trained if one.grad is not None])
        average_buffers(self._accelerator, self._modules)
        self._apply_gradients()
        self.step += 1

    def _loss_of(self, batch: Tensors) -> Tensor:
        if self._device.type != "cpu":
            batch = {name: tensor.to(self._device, non_blocking=True) for name, tensor in batch.items()}
        inputs = {name: batch[name] for name in self._feed.inputs if name in batch}
        student: Outputs = NOTHING
        try:
            with self._accelerator.autocast() if self._mixed else nullcontext():
                student = self._learn(inputs)
                value = self._loss(student, self._teach(inputs), batch)
        except EdgekitError:
            raise
        except Exception as error:  # whatever the user's code raises
            where = self._place(self._feed.epoch, self._feed.batch - 1)
            raise DataError(
                f"training failed at {where}: {users_error(error)}{_hint(error, student, batch)}"
            ) from error
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            raise DataError(
                f"the loss returned {_told(value)}; expected one number that depends on a trained parameter"
            )
        return value.reshape(())

    def _learn(self, inputs: Tensors) -> Outputs:
        if self._taps is None:
            return self._wide(named_tensors(self._module(**inputs)))
        with self._taps as taps:
            return self._wide(named_tensors(self._module(**inputs)) | taps.take())

    def _teach(self, inputs: Tensors) -> Outputs:
        if self._teacher is None:
            return NOTHING
        frozen = isinstance(self._teacher, nn.Module) and self._teacher not in self._modules
        with torch.no_grad() if frozen else nullcontext():
            return self._wide(self._teacher(inputs))

    def _wide(self, outputs: Outputs) -> Outputs:
        if not self._mixed:
            return outputs
        return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in outputs.items()}

    def _apply_gradients(self) -> None:
        scaler, longest = self._accelerator.scaler, self._schedule.clip_norm
        if scaler is not None and longest:
            scaler.unscale_(self._optimizer)
        if longest:
            nn.utils.clip_grad_norm_(self._trained, longest)
        if scaler is None:
            self._optimizer.step()
        else:
            scaler.step(self._optimizer)
            scaler.update()
        self._optimizer.zero_grad()

    def _settle(self) -> None:
        """Read the losses of the steps since, and stop where one is no number."""
        if not self._pending:
            return
        together = self._schedule.accumulate
        values = torch.stack([value for value, _, _ in self._pending])
        average(self._accelerator, [values])
        found = values.tolist()
        for number, (value, (_, epoch, batch)) in enumerate(zip(found, self._pending, strict=True)):
            if not math.isfinite(value):
                where = self._place(epoch, batch, len(self.losses) + number // together)
                raise GoalError(
                    f"training stopped at {where}: the loss is {value}; {self._checkpoints.kept()}; lower learning_rate, set clip_norm, "
                    "or look at these samples"
                )
        self.losses += [sum(found[first : first + together]) / together for first in range(0, len(found), together)]
        self._pending.clear()
        if len(self.losses) - self._drawn >= CURVE_EVERY and self._accelerator.trackers:
            told = {
                "loss": self._mean_loss(len(self.losses) - self._drawn),
                "learning_rate": self._optimizer.param_groups[0]["lr"],
            }
            self._accelerator.log(told, step=len(self.losses))
            self._drawn = len(self.losses)

    def _place(self, epoch: int, batch: int, step: int | None = None) -> str:
        number = self.step if step is None else step
        samples = self._feed.samples(epoch, batch)
        named = f", samples {some([str(sample) for sample in samples])}" if samples else ""
        return f"step {number + 1} (epoch {epoch + 1}, batch {batch + 1}{named})"

    # ---- what a run knows of itself

    def measure(self, evaluate: Metric, name: str) -> None:
        """Ask for the metric of the module in eval mode; where it is the best so far and that matters, keep the weights.

        Raises:
            DataError: it is no finite number.
        """
        self._settle()
        with evaluating(self._module), torch.no_grad():
            value = float(evaluate(self._module))
        number: float = gathered(self._accelerator, value)[0]
        if not math.isfinite(number):
            raise DataError(
                f"the metric {name} is {number} after step {self.step}; expected a finite number, higher is better"
            )
        if not self.metrics or number > self.best_metric:
            self._best_step = self.step
            self._best = copied(module_state(self._module)) if self._schedule.patience else None
        self.metrics.append((self.step, number))
        if self._accelerator.trackers:
            self._accelerator.log({name: number}, step=self.step)

    @property
    def best_metric(self) -> float:
        """The highest value so far."""
        return max(value for _, value in self.metrics)

    @property
    def has_no_patience_left(self) -> bool:
        """Whether so many evaluations in a row brought nothing better that training is to end."""
        patience = self._schedule.patience
        return bool(patience) and sum(step > self._best_step for step, _ in self.metrics) >= patience

    def take_best(self) -> int:
        """Where the schedule has patience, give the module its best weights; the step that its weights are of."""
        self._settle()
        if self._best is None:
            return self.step
        restore_module(self._module, self._best)
        return self._best_step

    def report(self, on_progress: Progress, total: int, name: str) -> None:
        """Say how far training is, twice a second."""
        now = time.monotonic()
        if now - self._told < REPORT_EVERY_S and not self.finished:
            return
        self._told = now
        left = (now - self._began) / max(self.step - self._first, 1) * (total - self.step)
        parts = [f"loss {self._mean_loss(SMOOTHED):.4g}"] if self.losses else []
        parts += [f"{name} {self.metrics[-1][1]:.4g}"] if self.metrics else []
        parts += [f"{_duration(left)} left"] if not self.finished else []
        on_progress(f"train: {', '.join(parts)}", total if self.finished else self.step, total)

    def _mean_loss(self, count: int) -> float:
        last = self.losses[-count:]
        return sum(last) / len(last)

    # ---- checkpoints

    def save(self) -> None:
        """Write a checkpoint.

        Raises:
            GoalError: a weight is not finite.
            OutputError: it cannot be written.
        """
        self._settle()
        self._check_weights()
        random = gathered(self._accelerator, (self._feed.state(), self._feed.before))
        if self._accelerator.is_main_process:
            record = Record(
                step=self.step,
                epoch=self._feed.epoch,
                batch=self._feed.batch,
                finished=self.finished,
                metrics=tuple(self.metrics),
                best_step=self._best_step,
                key=self._checkpoints.key,
            )
            scaler = self._accelerator.scaler
            state = {
                "modules": [module_state(module) for module in self._modules],
                "optimizer": self._optimizer.state_dict(),
                "scaler": scaler.state_dict() if scaler is not None else None,
                "losses": torch.tensor(self.losses, dtype=torch.float64),
                "best": self._best,
                "random": random,
            }
            self._checkpoints.save(record, state)
        self._accelerator.wait_for_everyone()

    def resume(self, *, anew: bool) -> int:
        """Go on from the newest checkpoint, or remove them all when `anew`; the step that was gone on from.

        Raises:
            OutputError: it is of another run.
            SourceError: none can be read.
        """
        if anew and self._accelerator.is_main_process:
            self._checkpoints.clear()
        self._accelerator.wait_for_everyone()
        saved = self._checkpoints.newest()
        if saved is None:
            return 0
        record, state = saved.record, saved.state
        for module, part in zip(self._modules, state["modules"], strict=True):
            restore_module(module, part)
        self._optimizer.load_state_dict(state["optimizer"])
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(state["scaler"])
        self.step = self._first = record.step
        self._drawn = record.step // CURVE_EVERY * CURVE_EVERY
        self.losses, self.metrics = state["losses"].tolist(), list(record.metrics)
        self._best_step, self._best, self.finished = record.best_step, state["best"], record.finished
        self.remarks += [
            f"{path} could not be read; {record.step} steps were taken from an older checkpoint"
            for path in saved.damaged
        ]
        if not self.finished:
            now, before = state["random"][self._accelerator.process_index]
            self._feed.go_to(record.epoch, record.batch, before)
            self._feed.restore(now)
        return record.step

    def share_weights(self) -> None:
        """Give every process the first one's weights."""
        with torch.no_grad():
            for module in self._modules:
                send_from_first(self._accelerator, [*module.parameters(), *module.buffers()])

    def _check_weights(self) -> None:
        for module in self._modules:
            for name, parameter in module.named_parameters():
                if parameter.requires_grad and not bool(parameter.isfinite().all()):
                    raise GoalError(
                        f"training stopped at step {self.step}: {name!r} is not finite any more; {self._checkpoints.kept()}; "
                        "lower learning_rate, or set clip_norm"
                    )


def _hint(error: Exception, student: Outputs, batch: Tensors) -> str:
    """What an error of the loss probably comes from."""
    labels = batch.get(LABELS)
    if isinstance(error, torch.OutOfMemoryError):
        return "; lower batch_size, and set accumulate for as many samples in a step"
    if isinstance(error, IndexError) and labels is not None and not labels.is_floating_point() and labels.numel():
        outputs = ", ".join(f"{name!r} {tuple(tensor.shape)}" for name, tensor in student.items())
        return f"; labels run from {int(labels.min())} to {int(labels.max())}, and the outputs are {outputs}"
    return ""


def _told(value: object) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"a tensor of shape {tuple(value.shape)}" + ("" if value.requires_grad else " without a gradient")


def _duration(seconds: float) -> str:
    """Two digits of seconds, minutes or hours."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.1f} {unit}" if seconds < 10 * length else f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
