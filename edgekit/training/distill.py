"""The loss of distillation, `loss(student_outputs, teacher_outputs, batch)`: one for fine-tuning, quantization and recovery."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from edgekit.data.samples import LABELS
from edgekit.distillation import ATTENTION, FEATURE, RESPONSE, RKD, SIMILARITY, Distillation
from edgekit.errors import DataError, SourceError
from edgekit.training.distill_losses import (
    LOSSES,
    are_probabilities,
    as_logits,
    class_axis,
    cross_entropy,
    labels_of,
    relative_error,
    response_loss,
    same_size,
    scores_in,
    variance,
    wide,
)
from edgekit.training.distill_pairs import (
    channel_axes,
    feature_pairs,
    listed,
    output_pairs,
    score_names,
    without_features,
)
from edgekit.training.taps import FEATURE as KEY
from edgekit.training.taps import Outputs


class Loss(Protocol):
    """What a training loop minimizes."""

    def __call__(self, student_outputs: Outputs, teacher_outputs: Outputs, batch: Outputs, /) -> Tensor:
        """One number, to be differentiated.

        Args:
            student_outputs: of the model that is trained, by name (`named_tensors`), with features by `FEATURE` + layer.
            teacher_outputs: the teacher's, the same way; empty when there is none.
            batch: inputs by name, and class numbers under `LABELS` when there are any.
        """
        ...


def task_loss(student_outputs: Outputs, teacher_outputs: Outputs, batch: Outputs) -> Tensor:
    """The ordinary loss: cross entropy of the labels, for the first output whose scores fit them; the teacher is not asked.

    Scores are logits or probabilities, `(N, C)`, `(N, C, ...)` or `(N, T, C)`; labels have that shape without C.

    Raises:
        DataError: there are no labels, no output fits them, or one is out of range.
    """
    labels = labels_of(batch)
    outputs = without_features(student_outputs)
    for name in (*scores_in(outputs), *outputs):
        value, axis = outputs[name], class_axis(outputs[name], labels) if outputs[name].dim() > 1 else None
        if axis is not None and value.is_floating_point() and value.shape[axis] > 1:
            logits = as_logits(value, probabilities=are_probabilities(value.detach(), axis))
            return cross_entropy(logits, labels, axis, name)
    raise DataError(
        f"no output scores the classes of labels {tuple(labels.shape)} (found {listed(outputs)}); expected scores (N, C) for labels "
        "(N,), with two classes or more: give labels of that shape, or train without them"
    )


class DistillLoss(nn.Module):
    """The loss of a `Distillation`, with the projectors it needs, which are to be trained as the student is.

    `hard · labels + (1 - hard) · (response + weight · features)`; with the scheme "online" also the teacher's own, the same way.

    Attributes:
        learns: what is compared with what, in words, for reports.
        parts: of the last call, the sum's terms by kind, without gradients; "peer" is all of the teacher's own.
    """

    def __init__(self, student: _Lesson, peer: _Lesson | None) -> None:
        super().__init__()
        self.student = student
        self.peer = peer
        self.learns = student.learns
        self.parts: dict[str, Tensor] = {}

    def forward(self, student_outputs: Outputs, teacher_outputs: Outputs, batch: Outputs) -> Tensor:
        """See `Loss`.

        Raises:
            DataError: labels are missing or out of range.
        """
        device = next(iter(student_outputs.values())).device.type
        with torch.autocast(device, enabled=False):
            parts = self.student(student_outputs, _detached(teacher_outputs), batch)
            if self.peer is not None:
                parts["peer"] = _total(self.peer(teacher_outputs, _detached(student_outputs), batch))
        self.parts = {name: part.detach() for name, part in parts.items()}
        return _total(parts)


def open_loss(
    distillation: Distillation, student_example: Outputs, teacher_example: Outputs, has_labels: bool
) -> DistillLoss:
    """The loss for models whose outputs for one batch look like these.

    Args:
        distillation: without `pairs`, features are paired in the order in which the examples hold them, and "rkd" and
            "similarity" look at the last pair alone.
        student_example, teacher_example: outputs and features for the same batch, one of many samples when it can be: errors of
            numbers that are no scores are measured in units of the teacher's variance there.
        has_labels: each batch will have labels. Without them `hard` counts as 0.

    Raises:
        DataError: "online" without labels; no output scores classes, though there are labels.
        SourceError: outputs or features that do not match.
    """
    online = distillation.scheme == "online"
    if online and not has_labels:
        raise DataError(
            "online distillation needs labels: two models that learn from each other alone learn nothing; give labelled data, or a "
            "trained teacher and scheme 'offline'"
        )
    pairs = feature_pairs(distillation, student_example, teacher_example)
    names = output_pairs(student_example, teacher_example) if RESPONSE in distillation.kind else ()
    lesson = _lesson(distillation, student_example, teacher_example, names, pairs, has_labels=has_labels, who="student")
    if not online:
        return DistillLoss(lesson, None)
    back = [(theirs, ours) for ours, theirs in names], [(theirs, ours) for ours, theirs in pairs]
    peers = distillation.model_copy(update={"scores": _renamed(distillation.scores, dict(names))})
    return DistillLoss(
        lesson, _lesson(peers, teacher_example, student_example, *back, has_labels=has_labels, who="teacher")
    )


@dataclass(frozen=True, slots=True)
class _Answer:
    """An output of each model, to be compared.

    Attributes:
        own, others: names.
        scores: it holds class scores; otherwise errors are measured in units of `unit` (see `relative_error`).
        probabilities: of the own one and of the other one, whether the scores are probabilities.
    """

    own: str
    others: str
    scores: bool
    probabilities: tuple[bool, bool]
    unit: float | None

    def loss(self, own: Outputs, others: Outputs, labels: Tensor | None, temperature: float) -> Tensor:
        ours, theirs = own[self.own], others[self.others]
        if not self.scores:
            return relative_error(wide(ours), wide(theirs), self.unit)
        axis = class_axis(ours, labels) if labels is not None else None
        own_logits = as_logits(ours, probabilities=self.probabilities[0])
        others_logits = as_logits(theirs, probabilities=self.probabilities[1])
        return response_loss(own_logits, others_logits, temperature, axis or class_axis(ours) or 1)


class _Layer(nn.Module):
    """A layer of each model, to be compared.

    Attributes:
        own, others: keys of the features.
        axes: which count channels, of the own feature and of the other one.
        projector: from the own channels to the others', where they differ and features are compared one by one.
    """

    def __init__(self, own: str, others: str, axes: tuple[int, int], channels: tuple[int, int] | None) -> None:
        super().__init__()
        self.own, self.others, self.axes = own, others, axes
        self.projector = nn.Linear(*channels) if channels else None

    def features(self, own: Outputs, others: Outputs) -> tuple[Tensor, Tensor]:
        """Of both models, channels in axis 1."""
        ours, theirs = self.axes
        return wide(own[self.own]).movedim(ours, 1), wide(others[self.others]).movedim(theirs, 1)

    def error(self, own: Outputs, others: Outputs) -> Tensor:
        """How far features are from the other model's, through the projector.

        Reference: Romero, Ballas, Kahou, Chassang, Gatta, Bengio (2015), "FitNets: Hints for Thin Deep Nets", arXiv:1412.6550,
            equation 3, relative to the teacher's features, so that one weight serves any network.
        """
        ours, theirs = same_size(*self.features(own, others))
        if self.projector is not None:
            ours = self.projector(ours.movedim(1, -1)).movedim(-1, 1)
        return relative_error(ours, theirs)


class _Lesson(nn.Module):
    """What one model learns from another.

    Attributes:
        scored: the own output that labels are for; None without labels.
        answers, layers: what is compared.
    """

    def __init__(
        self,
        distillation: Distillation,
        scored: tuple[str, bool] | None,
        answers: Sequence[_Answer],
        layers: Sequence[_Layer],
    ) -> None:
        super().__init__()
        self.distillation = distillation
        self.hard = distillation.hard if scored else 0.0
        self.scored = scored
        self.answers = tuple(answers)
        self.layers = nn.ModuleList(layers)

    @property
    def learns(self) -> tuple[str, ...]:
        """What is compared, in words."""
        said = [f"labels by {self.scored[0]!r}"] if self.scored and self.hard else []
        for answer in self.answers:
            how = "response" if answer.scores else "squared error"
            said.append(f"{how} of {answer.own!r} to {answer.others!r}")
        for kind in self._layer_kinds:
            said += [
                f"{kind} of {one.own.removeprefix(KEY)!r} to {one.others.removeprefix(KEY)!r}"
                for one in self._read(kind)
            ]
        return tuple(said)

    def forward(self, own: Outputs, others: Outputs, batch: Outputs) -> dict[str, Tensor]:
        """The terms of the loss by kind, which sum up to it."""
        wanted, share = self.distillation, 1 - self.hard
        parts: dict[str, Tensor] = {}
        if self.hard and self.scored is not None:
            parts["labels"] = self.hard * self._task(own, batch)
        if self.answers and share:
            labels = batch.get(LABELS) if self.scored else None
            losses = [one.loss(own, others, labels, wanted.temperature) for one in self.answers]
            parts[RESPONSE] = share * _mean(losses)
        for kind in self._layer_kinds if share else ():
            losses = [_compared(kind, one, own, others) for one in self._read(kind)]
            parts[kind] = share * wanted.weight * _mean(losses)
        return parts

    def _task(self, own: Outputs, batch: Outputs) -> Tensor:
        assert self.scored is not None
        name, probabilities = self.scored
        labels = labels_of(batch)
        axis = class_axis(own[name], labels)
        if axis is None:
            raise DataError(
                f"labels {tuple(labels.shape)} do not fit output {name!r} {tuple(own[name].shape)}; expected one for each of its scores"
            )
        return cross_entropy(as_logits(own[name], probabilities=probabilities), labels, axis, name)

    @property
    def _layer_kinds(self) -> list[str]:
        return [kind for kind in self.distillation.kind if kind != RESPONSE]

    def _read(self, kind: str) -> list[_Layer]:
        """The layers that a kind looks at."""
        layers = [one for one in self.layers if isinstance(one, _Layer)]
        return layers[-1:] if kind in (RKD, SIMILARITY) and not self.distillation.pairs else layers


def _compared(kind: str, layer: _Layer, own: Outputs, others: Outputs) -> Tensor:
    return layer.error(own, others) if kind == FEATURE else LOSSES[kind](*layer.features(own, others))


def _lesson(
    distillation: Distillation,
    own: Outputs,
    others: Outputs,
    names: Sequence[tuple[str, str]],
    pairs: Sequence[tuple[str, str]],
    *,
    has_labels: bool,
    who: str,
) -> _Lesson:
    outputs = without_features(own)
    scores = score_names(distillation, outputs, who)
    if has_labels and distillation.hard and not scores:
        raise DataError(
            f"there are labels, but no output of the {who} scores classes (found {listed(outputs)}); set 'hard' to 0 to learn from "
            "the teacher alone, or name outputs in 'scores'"
        )
    scored = (scores[0], _probabilities(own[scores[0]])) if has_labels and scores else None
    settled = distillation.scheme != "online"
    answers = [_answer(a, own[a], b, others[b], scores=a in scores, settled=settled) for a, b in names]
    layers = [
        _layer(distillation, ours, own[ours], theirs, others[theirs], channel_axes(own, others, pairs, (ours, theirs)))
        for ours, theirs in pairs
    ]
    return _Lesson(distillation, scored, answers, layers)


def _answer(name: str, own: Tensor, others_name: str, others: Tensor, *, scores: bool, settled: bool) -> _Answer:
    """`settled`: the other model's numbers vary as they do now, because it does not learn."""
    if scores:
        return _Answer(name, others_name, True, (_probabilities(own), _probabilities(others)), 1.0)
    return _Answer(name, others_name, False, (False, False), variance(wide(others)) if settled else None)


def _layer(
    distillation: Distillation, name: str, own: Tensor, others_name: str, others: Tensor, axes: tuple[int, int]
) -> _Layer:
    layers = (
        f"the layers {name.removeprefix(KEY)!r} {tuple(own.shape)} of one model and {others_name.removeprefix(KEY)!r} "
        f"{tuple(others.shape)} of the other"
    )
    positional = [kind for kind in distillation.kind if kind in (FEATURE, ATTENTION)]
    if positional and own.dim() != others.dim():
        raise SourceError(
            f"{layers} differ in their number of axes, so that {positional[0]!r} cannot compare them; name others in 'pairs'"
        )
    if ATTENTION in positional and own.dim() < 3:
        raise SourceError(
            f"{layers} have no positions, which 'attention' compares; name feature maps in 'pairs', or choose 'feature'"
        )
    channels = own.shape[axes[0]], others.shape[axes[1]]
    projected = FEATURE in distillation.kind and channels[0] != channels[1]
    return _Layer(name, others_name, axes, channels if projected else None)


def _renamed(scores: tuple[str, ...] | None, names: Mapping[str, str]) -> tuple[str, ...] | None:
    return None if scores is None else tuple(names.get(name, name) for name in scores)


def _probabilities(value: Tensor) -> bool:
    return are_probabilities(value, class_axis(value) or 1)


def _detached(outputs: Outputs) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in outputs.items()}


def _total(parts: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(list(parts.values())).sum()


def _mean(losses: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(losses)).mean()
