"""What a student may learn from a teacher, each as a function of two tensors; all are means over samples.

Papers sum or average over pairs, positions and channels as they like, and give weights from 1 to 3000 to match. Here every loss of features
is about 1 for a student that knows nothing, whatever the batch, resolution and network, so that they can be added up.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from edgekit.data.samples import LABELS
from edgekit.distillation import ATTENTION, RKD, SIMILARITY
from edgekit.errors import DataError
from edgekit.training.taps import Outputs

IGNORED = -100
"""The label of what is left out of the ordinary loss, as in torch."""

UNIT = 1e-3
"""How far sums and norms may be from 1."""

SMALLEST = 1e-7
"""Probabilities count as no smaller than that, for their logarithms."""

ANGLE_SAMPLES = 64
"""Of a batch, how many are looked at for angles: their number grows with the third power."""

_OTHER_THAN_SCORES = ("hidden", "embed", "pool", "feature", "box", "state")
"""In an output's name: it holds no class scores."""


def wide(x: Tensor) -> Tensor:
    """A tensor in float32, where it was in half precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def scores_in(outputs: Outputs) -> tuple[str, ...]:
    """The names of outputs that seem to hold class scores, `(N, C, ...)` or `(N, T, C)`.

    All of at least two classes, but those that are named as something else and those whose rows have the norm 1.
    """
    return tuple(name for name, value in outputs.items() if _could_score(name, value))


def class_axis(value: Tensor, labels: Tensor | None = None) -> int | None:
    """The axis of scores that counts classes: what labels lack; without them 1, or the last of three as in `(N, T, C)`.

    None when the labels' shape is not that of the scores without an axis.
    """
    if labels is None:
        return 2 if value.dim() == 3 else 1
    shape = tuple(value.shape)
    fitting = (axis for axis in (1, value.dim() - 1) if shape[:axis] + shape[axis + 1 :] == tuple(labels.shape))
    return next(fitting, None)


def are_probabilities(value: Tensor, axis: int) -> bool:
    """Whether numbers are between 0 and 1 and sum to 1 along an axis."""
    sums = value.sum(axis)
    return bool((value >= 0).all() and ((sums - 1).abs() <= UNIT).all())


def as_logits(value: Tensor, *, probabilities: bool) -> Tensor:
    """Scores whose softmax they are: the logarithms of probabilities, anything else as it is."""
    return wide(value).clamp_min(SMALLEST).log() if probabilities else wide(value)


def labels_of(batch: Outputs) -> Tensor:
    """The class numbers of a batch.

    Raises:
        DataError: there are none, or they are no whole numbers.
    """
    labels = batch.get(LABELS)
    if labels is None:
        found = ", ".join(map(repr, batch)) or "nothing"
        raise DataError(
            f"the batch has no labels (found {found}); add an array {LABELS!r} of class numbers, or train without them"
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise DataError(
            f"the labels are {str(labels.dtype).removeprefix('torch.')}; expected class numbers, whole and from 0"
        )
    return labels.long()


def cross_entropy(logits: Tensor, labels: Tensor, axis: int, name: str) -> Tensor:
    """The mean negative log likelihood of the labels; those that are -100 do not count.

    Args:
        logits: of the output `name`; axis `axis` counts classes.
        labels: int64, of the shape of `logits` without that axis.

    Raises:
        DataError: a label is out of range.
    """
    classes = logits.shape[axis]
    counted = labels != IGNORED
    wrong = counted & ((labels < 0) | (labels >= classes))
    if bool(wrong.any()):
        raise DataError(
            f"label {int(labels[wrong][0])} is out of range: output {name!r} scores {classes} classes, 0 to {classes - 1}; number the "
            f"labels so ({IGNORED} for what is not to count), or give a model with more classes"
        )
    total = F.cross_entropy(logits.movedim(axis, 1), labels, ignore_index=IGNORED, reduction="sum")
    return total / counted.sum().clamp_min(1)


def response_loss(student: Tensor, teacher: Tensor, temperature: float, axis: int = 1) -> Tensor:
    """The Kullback-Leibler divergence of the student's softened classes from the teacher's, times the temperature squared.

    Of `(N, C, ...)` logits the mean over samples and positions.

    Reference: Hinton, Vinyals, Dean (2015), "Distilling the Knowledge in a Neural Network", arXiv:1503.02531, equation 1 and
        section 2 (the square keeps the size of gradients when the temperature changes).
    """
    ours, theirs = (F.log_softmax(logits / temperature, axis) for logits in (student, teacher))
    return (theirs.exp() * (theirs - ours)).sum(axis).mean() * temperature**2


def relative_error(student: Tensor, teacher: Tensor, unit: float | None = None) -> Tensor:
    """The mean squared error in some unit, such as a variance; None is the teacher's mean square: 1 for a student that says 0."""
    known = teacher.detach().square().mean().clamp_min(SMALLEST) if unit is None else unit
    return (student - teacher).square().mean() / known


def variance(value: Tensor) -> float:
    """The mean variance of numbers `(N, ...)` over samples, to measure errors by; their mean square when samples are all alike."""
    known = value.detach()
    spread, square = float((known - known.mean(0)).square().mean()), float(known.square().mean())
    return spread if spread > 1e-12 * square else square or 1.0


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """How differently two features `(N, C, ...)` are large in some places and small in others.

    The mean over channels of their squares, at the smaller resolution, of norm 1 for each sample; then the squared distance.

    Reference: Zagoruyko, Komodakis (2017), "Paying More Attention to Attention", arXiv:1612.03928, section 3.1 (F²sum) and
        equation 2, as the square of its norm.
    """
    ours, theirs = same_size(*(x.square().mean(1, keepdim=True) for x in (student, teacher)))
    return (F.normalize(ours.flatten(1)) - F.normalize(theirs.flatten(1))).square().sum(1).mean()


def rkd_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Distances between samples, and twice the angles; features `(N, C, ...)` are taken as their means over positions.

    Reference: Park, Kim, Lu, Cho (2019), "Relational Knowledge Distillation", arXiv:1904.05068, section 4.2 has the angles count
        twice.
    """
    ours, theirs = (x.flatten(2).mean(2) if x.dim() > 2 else x for x in (student, teacher))
    return rkd_distance_loss(ours, theirs) + 2 * rkd_angle_loss(ours, theirs)


def rkd_distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The Huber loss between the distances of all pairs of rows `(N, D)`, in units of their mean; 0 for a single row.

    Reference: Park et al. (2019), arXiv:1904.05068, equations 4 to 8.
    """
    if len(student) < 2:
        return student.sum() * 0
    return F.huber_loss(_distances(student), _distances(teacher))


def rkd_angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The Huber loss between the cosines of the angles that three rows of `(N, D)` make; 0 for fewer than three.

    Of a larger batch, the first `ANGLE_SAMPLES` rows are compared.

    Reference: Park et al. (2019), arXiv:1904.05068, equations 9 to 11.
    """
    if len(student) < 3:
        return student.sum() * 0
    return F.huber_loss(_cosines(student[:ANGLE_SAMPLES]), _cosines(teacher[:ANGLE_SAMPLES]))


def similarity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """How differently samples `(N, ...)` are like each other: the squared distance of a sample's inner products with all, of norm 1.

    Reference: Tung, Mori (2019), "Similarity-Preserving Knowledge Distillation", arXiv:1907.09682, equations 1 to 4, times N: the
        mean over samples, not pairs, does not hang on the size of the batch.
    """
    return (_likeness(student) - _likeness(teacher)).square().sum(1).mean()


def same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Features `(N, C, ...)` at one resolution: the larger one is averaged down to the smaller, axis by axis."""
    size = [min(ours, theirs) for ours, theirs in zip(student.shape[2:], teacher.shape[2:], strict=True)]
    return _pooled(student, size), _pooled(teacher, size)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    ATTENTION: attention_loss,
    RKD: rkd_loss,
    SIMILARITY: similarity_loss,
}
"""The kinds that compare features `(N, C, ...)` as they are."""


def _could_score(name: str, value: Tensor) -> bool:
    if not value.is_floating_point() or value.dim() < 2 or any(word in name.lower() for word in _OTHER_THAN_SCORES):
        return False
    axis = class_axis(value) or 1
    unit = ((wide(value).square().sum(axis) - 1).abs() <= UNIT).all()
    return value.shape[axis] >= 2 and (not bool(unit) or are_probabilities(value, axis))


def _distances(rows: Tensor) -> Tensor:
    """`(N (N - 1) / 2,)`, in units of their mean."""
    distances = F.pdist(rows)
    return distances / distances.mean().clamp_min(torch.finfo(rows.dtype).tiny)


def _cosines(rows: Tensor) -> Tensor:
    """At each row, of the angle between each two of the others."""
    units = F.normalize(rows[None] - rows[:, None], dim=2)
    cosines = units @ units.transpose(1, 2)
    other = ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    return cosines[(other[:, :, None] & other[:, None, :]).triu(1)]


def _likeness(features: Tensor) -> Tensor:
    """`(N, N)` inner products of samples, each row of norm 1."""
    rows = features.flatten(1)
    return F.normalize(rows @ rows.T)


def _pooled(features: Tensor, size: list[int]) -> Tensor:
    if list(features.shape[2:]) == size:
        return features
    if len(size) == 1:
        return F.adaptive_avg_pool1d(features, size[0])
    if len(size) == 2:
        return F.adaptive_avg_pool2d(features, (size[0], size[1]))
    return F.adaptive_avg_pool3d(features, (size[0], size[1], size[2]))
