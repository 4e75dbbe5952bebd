"""A teacher that runs beside any training loop, and all that such a loop needs to distill."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from edgekit.distillation import Distillation
from edgekit.errors import SourceError
from edgekit.training.checkpoint import evaluating
from edgekit.training.distill import DistillLoss, open_loss
from edgekit.training.taps import Outputs, Taps, match_layers, outputs_of, running


class Teacher(nn.Module):
    """Runs the teacher on a batch: `teacher(batch)` gives its outputs by name, and the features that are asked for.

    Frozen, it has no gradients and stays in eval mode; its module is put so. Trained, for the scheme "online", its parameters belong
    to the optimizer beside the student's.

    Args:
        module: the teacher, nothing of which is the student's.
        layers: whose features are read.
        trained: it learns too.

    Raises:
        SourceError: there is no such layer.
    """

    def __init__(self, module: nn.Module, layers: Sequence[str] = (), *, trained: bool = False) -> None:
        super().__init__()
        self.module = module
        self.trained = trained
        self._features = Taps(module, layers, who="teacher")
        if not trained:
            for parameter in module.parameters():
                parameter.requires_grad_(False)
            self.train(False)

    def train(self, mode: bool = True) -> Self:
        """As of any module, but that a frozen teacher stays in eval mode."""
        self.training = mode
        if self.trained:
            self.module.train(mode)
        else:
            for child in self.module.modules():
                child.training = False  # graphs of torch.export refuse eval()
        return self

    def forward(self, batch: Outputs) -> dict[str, Tensor]:
        """Outputs and features for inputs by name; labels are left out."""
        with torch.set_grad_enabled(self.trained and torch.is_grad_enabled()), self._features as taps:
            return outputs_of(self.module, batch, taps)


@dataclass(frozen=True, slots=True)
class Distiller:
    """A loss, a teacher, and what reads the student's features: all that a training loop adds to distill.

    ::

        distiller = open_distiller(Distillation(), student, teacher, batch, has_labels=True)
        optimizer = torch.optim.SGD([*student.parameters(), *distiller.parameters()], 0.1)
        for batch in loader:
            loss = distiller(student, batch)
            ...

    A loop that calls the student itself takes the parts: `loss(student_outputs, teacher(batch), batch)`.
    """

    loss: DistillLoss
    teacher: Teacher
    taps: Taps

    def __call__(self, student: nn.Module, batch: Outputs) -> Tensor:
        """The loss of a batch: inputs by name, and labels."""
        with self.taps as taps:
            outputs = outputs_of(student, batch, taps)
        return self.loss(outputs, self.teacher(batch), batch)  # type: ignore[no-any-return]

    @property
    def trainable(self) -> tuple[nn.Module, ...]:
        """The modules beside the student that are to be trained, and prepared for several devices: projectors, an online teacher."""
        return tuple(one for one in (self.loss, self.teacher) if any(p.requires_grad for p in one.parameters()))

    def parameters(self) -> list[nn.Parameter]:
        """Of `trainable`: what the optimizer must see beside the student's."""
        return [parameter for module in self.trainable for parameter in module.parameters() if parameter.requires_grad]


def open_distiller(
    distillation: Distillation, student: nn.Module, teacher: nn.Module | None, batch: Outputs, *, has_labels: bool
) -> Distiller:
    """Match layers, read outputs on one batch, and open the loss.

    Args:
        distillation: what is wanted.
        student: the model to train, as it will be trained (after quantization is prepared), on its device.
        teacher: another model, on the same device; for the scheme "self" the float model of a quantized student, or None for a copy of
            the student as it is now.
        batch: of training data: inputs by name.
        has_labels: each batch will have labels.

    Raises:
        DataError: see `open_loss`.
        SourceError: there is no teacher, or it shares parameters with the student; a model does not run on the batch; layers or
            outputs do not match.
    """
    if teacher is None:
        if distillation.scheme != "self":
            raise SourceError(f"{distillation.scheme} distillation needs a teacher; give one, or choose scheme 'self'")
        teacher = copy.deepcopy(student)
    _check_apart(student, teacher)
    pairs = distillation.pairs
    if distillation.reads_features and not pairs:
        pairs = match_layers(student, teacher, batch)
    taps = Taps(student, [ours for ours, _ in pairs], who="student")
    taught = Teacher(teacher, [theirs for _, theirs in pairs], trained=distillation.scheme == "online")
    with torch.no_grad(), evaluating(student), taps, running("student"):
        ours = outputs_of(student, batch, taps)
    with torch.no_grad(), evaluating(teacher), running("teacher"):
        theirs = taught(batch)
    loss = open_loss(distillation, ours, theirs, has_labels)
    return Distiller(loss.to(next(iter(ours.values())).device), taught, taps)


def _check_apart(student: nn.Module, teacher: nn.Module) -> None:
    owned = {id(parameter): name for name, parameter in student.named_parameters()}
    shared = next((owned[id(parameter)] for parameter in teacher.parameters() if id(parameter) in owned), None)
    if shared is not None:
        raise SourceError(
            f"the teacher shares {shared!r} with the student and would change with it; give a copy (copy.deepcopy)"
        )
