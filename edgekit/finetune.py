"""Training before the export, as asked for on the command line, in the recipe and from Python."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from edgekit.distillation import Distillation
from edgekit.schedule import Augment, Schedule
from edgekit.toml_file import Table


class Finetune(Table):
    """What a torch model is trained for before it is exported.

    Attributes:
        qat: quantization-aware training: the model is rounded, while it trains, wherever the target rounds it.
        scales: of its quantizers: "learned" by gradient, or "tracked" by moving averages of extremes.
        freeze: share of all steps after which quantizers, and BatchNorms that are not part of a layer, move no more.
        data: what `edgekit.training.train_data.open_train_data` opens; None is the calibration data.
        teacher: what makes the teacher, `FILE.py:factory` with its weights loaded; None is the model itself, in float.
        distill: what is learned from the teacher; None is the labels alone or, where there are none, the teacher's answers; with fewer
            than 8 bits, its answers and features, and labels where there are some.
        schedule, augment: how it is trained.
    """

    qat: bool = False
    scales: Literal["learned", "tracked"] = "learned"
    freeze: Annotated[float, Field(ge=0, le=1)] = 0.8
    data: Any = None
    teacher: Any = None
    distill: Distillation | None = None
    schedule: Schedule = Schedule()
    augment: Augment = Augment()

    @property
    def summary(self) -> str:
        """The main choices in a few words."""
        kind = f"quantization-aware training, {self.scales} scales" if self.qat else "fine-tuning"
        length = f"{self.schedule.steps} steps" if self.schedule.steps else f"{self.schedule.epochs} epochs"
        return f"{kind}, {length} of {self.schedule.optimizer} at {self.schedule.learning_rate:g}"


class Finetuned(Table):
    """What a training came to.

    Attributes:
        summary: what was asked for, in words.
        learned_from: labels, or what of a teacher.
        samples: that it trained on; None where the data does not say.
        steps, resumed_from, kept_step, seconds: see `edgekit.training.loop.Trained`.
        first_loss, last_loss: mean over the first and last tenth of the steps.
        before, start, after: what `--evaluate` gave for the model as it came, for what training began with (rounded, for
            quantization-aware training) and for what it ended with; None without a metric.
        remarks: what the user should know.
    """

    summary: str
    learned_from: str
    samples: int | None
    steps: int
    resumed_from: int
    kept_step: int
    seconds: float
    first_loss: float
    last_loss: float
    before: float | None = None
    start: float | None = None
    after: float | None = None
    remarks: tuple[str, ...] = ()

    @property
    def told(self) -> str:
        """What it did, in one sentence."""
        return self._told(f" in {self.seconds:.0f} s")

    @property
    def repeatable(self) -> str:
        """The same without the time, which is another one when it runs again: for files that are not."""
        return self._told("")

    def _told(self, time: str) -> str:
        samples = f" on {self.samples:,} samples" if self.samples is not None else ""
        again = f" (from step {self.resumed_from} on)" if self.resumed_from else ""
        best = f", the weights of step {self.kept_step}" if self.kept_step != self.steps else ""
        text = (
            f"{self.summary}{samples}, from {self.learned_from}: {self.steps} steps{again}{time}{best}; "
            f"loss {self.first_loss:.4g}, then {self.last_loss:.4g}"
        )
        if self.before is None or self.start is None or self.after is None:
            return text
        return f"{text}; metric {self.before:.4f} as it came, {self.start:.4f} when training began, {self.after:.4f} after it"
