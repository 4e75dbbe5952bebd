"""Each loss of distillation against the paper's formula, written out in float64 and loops, and against a value worked out by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgekit.data.samples import LABELS
from edgekit.errors import DataError
from edgekit.training.distill_losses import (
    ANGLE_SAMPLES,
    are_probabilities,
    as_logits,
    attention_loss,
    class_axis,
    cross_entropy,
    labels_of,
    relative_error,
    response_loss,
    rkd_angle_loss,
    rkd_distance_loss,
    rkd_loss,
    same_size,
    scores_in,
    similarity_loss,
    variance,
    wide,
)

Array = NDArray[np.float64]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 1, shape)).requires_grad_()


def softmax(x: Array, axis: int) -> Array:
    e = np.exp(x - x.max(axis, keepdims=True))
    return np.asarray(e / e.sum(axis, keepdims=True))


def huber(difference: Array) -> float:
    size = np.abs(difference)
    return float(np.where(size < 1, 0.5 * size**2, size - 0.5).mean())


def number(x: Tensor) -> float:
    return float(x.detach())


def array(x: Tensor) -> Array:
    return np.asarray(x.detach().numpy())


# Response


def test_response_by_hand() -> None:
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2 * math.log(3.0), 0.0]])
    # At temperature 2 the teacher says 3/4 and 1/4, the student a half each.
    expected = 4 * (0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5))
    assert number(response_loss(student, teacher, 2.0)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("shape", "axis"), [((5, 7), 1), ((3, 4, 2, 6), 1), ((3, 6, 4), 2)])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_response_is_the_mean_divergence_of_softened_classes(
    shape: tuple[int, ...], axis: int, temperature: float
) -> None:
    student, teacher = normal(*shape), normal(*shape, seed=1)
    p, q = (softmax(array(x) / temperature, axis) for x in (teacher, student))
    expected = (p * np.log(p / q)).sum(axis).mean() * temperature**2
    assert number(response_loss(student, teacher, temperature, axis)) == pytest.approx(expected, rel=1e-10)


def test_the_size_of_response_s_gradient_hardly_hangs_on_the_temperature() -> None:
    student, teacher = normal(64, 10), normal(64, 10, seed=1).detach()
    norms = [number(torch.autograd.grad(response_loss(student, teacher, t), student)[0].norm()) for t in (4.0, 40.0)]
    assert norms[0] == pytest.approx(norms[1], rel=0.15)


def test_scores_of_the_largest_size_stay_finite() -> None:
    student, teacher = torch.tensor([[1e4, -1e4]], requires_grad=True), torch.tensor([[-1e4, 1e4]])
    loss = response_loss(student, teacher, 1.0)
    assert number(loss) == pytest.approx(2e4)
    assert torch.autograd.grad(loss, student)[0].isfinite().all()


def test_probabilities_teach_as_their_logits_do() -> None:
    student, teacher = normal(6, 5), normal(6, 5, seed=1)
    wanted = response_loss(student, teacher, 3.0)
    assert are_probabilities(student.softmax(1), 1) and not are_probabilities(student, 1)
    logits = (as_logits(x.softmax(1), probabilities=True) for x in (student, teacher))
    assert number(response_loss(*logits, 3.0)) == pytest.approx(number(wanted), rel=1e-9)
    none = torch.tensor([[1.0, 0.0]], requires_grad=True)
    loss = response_loss(as_logits(none, probabilities=True), torch.zeros(1, 2), 1.0)
    assert torch.autograd.grad(loss, none)[0].isfinite().all(), "a probability of 0 has a gradient"


# Labels


@pytest.mark.parametrize(("shape", "axis"), [((6, 4), 1), ((2, 4, 3, 5), 1), ((2, 7, 4), 2)])
def test_cross_entropy_is_the_mean_negative_log_of_the_label_s_probability(shape: tuple[int, ...], axis: int) -> None:
    logits = normal(*shape)
    labels = torch.from_numpy(np.random.default_rng(1).integers(0, 4, shape[:axis] + shape[axis + 1 :]))
    labels.view(-1)[0] = -100
    p = np.moveaxis(softmax(array(logits), axis), axis, -1).reshape(-1, 4)
    flat = labels.reshape(-1).numpy()
    expected = -np.mean([math.log(row[label]) for row, label in zip(p, flat, strict=True) if label >= 0])
    assert number(cross_entropy(logits, labels, axis, "y")) == pytest.approx(expected, rel=1e-10)


def test_a_batch_without_a_label_that_counts_has_the_loss_0() -> None:
    logits = normal(2, 4)
    loss = cross_entropy(logits, torch.tensor([-100, -100]), 1, "y")
    assert number(loss) == 0 and not torch.autograd.grad(loss, logits)[0].any()


@pytest.mark.parametrize("wrong", [4, -1, 255])
def test_a_label_out_of_range_is_named_with_the_classes(wrong: int) -> None:
    with pytest.raises(DataError, match=rf"label {wrong} is out of range: output 'y' scores 4 classes, 0 to 3"):
        cross_entropy(normal(3, 4), torch.tensor([0, wrong, 1]), 1, "y")


def test_labels_are_whole_numbers_and_there() -> None:
    assert labels_of({LABELS: torch.tensor([1, 2], dtype=torch.uint8)}).dtype == torch.int64
    with pytest.raises(
        DataError, match=r"the batch has no labels \(found 'x'\); add an array 'labels' of class numbers"
    ):
        labels_of({"x": torch.zeros(2)})
    with pytest.raises(DataError, match="the labels are float32; expected class numbers"):
        labels_of({LABELS: torch.zeros(2)})


def test_classes_are_in_the_axis_that_labels_lack() -> None:
    assert class_axis(torch.zeros(5, 3)) == 1 and class_axis(torch.zeros(5, 3, 8, 8)) == 1
    assert class_axis(torch.zeros(5, 7, 3)) == 2, "tokens"
    assert class_axis(torch.zeros(5, 7, 3), torch.zeros(5, 7)) == 2
    assert class_axis(torch.zeros(5, 7, 3), torch.zeros(5, 3)) == 1, "positions last"
    assert class_axis(torch.zeros(5, 8, 8, 3), torch.zeros(5, 8, 8)) == 3
    assert class_axis(torch.zeros(5, 3), torch.zeros(5, 3)) is None


def test_scores_are_told_from_other_outputs() -> None:
    x = normal(8, 10).detach()
    outputs = {
        "logits": x, "probabilities": x.softmax(1), "sure": torch.eye(10)[:8], "maps": x.reshape(8, 10, 1, 1), "tokens": x.reshape(8, 2, 5),
        "last_hidden_state": x, "image_embeds": x, "boxes": x.reshape(8, 2, 5), "unit": x / x.norm(dim=1, keepdim=True),
        "number": x[:, :1], "loss": x.sum(), "classes": x.argmax(1), "which": x.long(),
    }  # fmt: skip
    assert scores_in(outputs) == ("logits", "probabilities", "sure", "maps", "tokens")


# Features


def test_errors_are_measured_in_variances() -> None:
    teacher = torch.tensor([[1.0, 10.0], [3.0, 10.0]])
    assert variance(teacher) == pytest.approx(0.5)  # 1 in the first column, 0 in the second
    assert number(relative_error(teacher.mean(0).expand(2, 2), teacher, variance(teacher))) == pytest.approx(1.0)
    assert number(relative_error(torch.zeros(2, 2), teacher)) == 1.0
    assert number(relative_error(torch.ones(2, 2), torch.zeros(2, 2))) < torch.inf, "a layer that is dead"
    assert variance(torch.tensor([[3.0, 4.0]])) == pytest.approx(12.5), "one sample has no variance"
    assert variance(torch.zeros(4, 2)) == 1.0
    assert variance(torch.full((8, 3), 1e6)) == pytest.approx(1e12)


def test_attention_by_hand() -> None:
    student = torch.tensor([[[[1.0, 1.0]], [[1.0, 1.0]]]])  # (1, 2, 1, 2): even
    teacher = torch.tensor([[[[2.0, 0.0]], [[1.0, 0.0]]]])  # all on the left
    even = 1 / math.sqrt(2)
    assert number(attention_loss(student, teacher)) == pytest.approx((even - 1) ** 2 + even**2, rel=1e-6)


def test_attention_is_the_difference_of_normalized_maps_of_squares() -> None:
    student, teacher = normal(3, 4, 5, 2), normal(3, 7, 5, 2, seed=1)
    maps = [(array(x) ** 2).sum(1).reshape(3, -1) for x in (student, teacher)]
    ours, theirs = (m / np.sqrt((m**2).sum(1, keepdims=True)) for m in maps)
    assert number(attention_loss(student, teacher)) == pytest.approx(((ours - theirs) ** 2).sum(1).mean(), rel=1e-10)


def test_attention_compares_at_the_smaller_resolution() -> None:
    small = normal(2, 3, 4, 4)
    large = small.repeat_interleave(2, 2).repeat_interleave(3, 3)
    assert number(attention_loss(large, small)) == pytest.approx(0, abs=1e-15)
    assert number(attention_loss(small, large)) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("positions", [(6,), (4, 6), (2, 4, 6)])
def test_features_meet_at_the_smaller_size_of_each_axis(positions: tuple[int, ...]) -> None:
    coarse = (*positions[:-1], positions[-1] // 2)
    ours, theirs = same_size(normal(2, 3, *positions), normal(2, 5, *coarse))
    assert ours.shape == (2, 3, *coarse) and theirs.shape == (2, 5, *coarse)
    means = array(normal(2, 3, *positions)).reshape(2, 3, *coarse, 2).mean(-1)
    np.testing.assert_allclose(array(ours), means, rtol=1e-12)


# Relations


def test_distances_by_hand() -> None:
    student = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    teacher = torch.tensor([[0.0], [1.0], [2.0]])
    ours, theirs = np.array([1, 1, math.sqrt(2)]), np.array([1.0, 2.0, 1.0])  # 0-1, 0-2, 1-2
    expected = huber(ours / ours.mean() - theirs / theirs.mean())
    assert number(rkd_distance_loss(student, teacher)) == pytest.approx(expected, rel=1e-6)


def test_distances_are_compared_in_units_of_their_mean() -> None:
    student, teacher = normal(6, 4), normal(6, 9, seed=1)
    wanted = []
    for rows in (array(student), array(teacher)):
        distances = np.array([np.linalg.norm(a - b) for a, b in itertools.permutations(rows, 2)])
        wanted.append(distances / distances.mean())
    assert number(rkd_distance_loss(student, teacher)) == pytest.approx(huber(wanted[0] - wanted[1]), rel=1e-10)


def test_angles_by_hand() -> None:
    corner = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])  # 90, 45 and 45 degrees
    line = torch.tensor([[0.0], [1.0], [2.0]])  # 0, 180 and 0 degrees
    half = math.sqrt(0.5)
    expected = huber(np.array([0.0, half, half]) - np.array([1.0, -1.0, 1.0]))
    assert number(rkd_angle_loss(corner, line)) == pytest.approx(expected, rel=1e-6)


def test_angles_are_those_of_all_triples() -> None:
    student, teacher = normal(6, 4), normal(6, 9, seed=1)
    wanted = []
    for rows in (array(student), array(teacher)):
        cosines = []
        for i, j, k in itertools.permutations(range(6), 3):
            a, b = rows[i] - rows[j], rows[k] - rows[j]
            cosines.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        wanted.append(np.array(cosines))
    assert number(rkd_angle_loss(student, teacher)) == pytest.approx(huber(wanted[0] - wanted[1]), rel=1e-10)


def test_relations_do_not_see_turns_shifts_and_scales() -> None:
    x = normal(8, 5)
    turn = np.linalg.qr(np.random.default_rng(2).normal(0, 1, (5, 5)))[0]
    moved = 3 * x @ torch.from_numpy(turn) + 7
    assert number(rkd_loss(x, moved)) == pytest.approx(0, abs=1e-12)
    assert number(rkd_loss(x, moved.square())) > 0.01


def test_maps_are_related_by_their_means_over_positions() -> None:
    x, y = normal(5, 4, 3, 2), normal(5, 6, 2, 2, seed=1)
    means = x.mean((2, 3)), y.mean((2, 3))
    expected = number(rkd_distance_loss(*means)) + 2 * number(rkd_angle_loss(*means))
    assert number(rkd_loss(x, y)) == pytest.approx(expected, rel=1e-10)


def test_of_a_large_batch_some_angles_are_compared() -> None:
    x, y = normal(ANGLE_SAMPLES + 40, 3), normal(ANGLE_SAMPLES + 40, 3, seed=1)
    assert number(rkd_angle_loss(x, y)) == number(rkd_angle_loss(x[:ANGLE_SAMPLES], y[:ANGLE_SAMPLES]))


@pytest.mark.parametrize("loss", [rkd_distance_loss, rkd_angle_loss, similarity_loss, attention_loss])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_and_equal_samples_have_finite_losses_and_gradients(loss: object, count: int) -> None:
    assert callable(loss)
    shape = (count, 3, 2, 2) if loss is attention_loss else (count, 3)
    for student in (
        torch.zeros(shape),
        torch.ones(shape),
        torch.randn(shape, generator=torch.Generator().manual_seed(0)),
    ):
        student.requires_grad_()
        found = loss(student, torch.ones(shape))
        assert found.isfinite() and torch.autograd.grad(found, student)[0].isfinite().all()


def test_similarity_by_hand() -> None:
    student = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # unlike each other: rows (1, 0) and (0, 1)
    teacher = torch.tensor([[1.0], [2.0]])  # inner products 1, 2 and 2, 4: rows (1, 2) / √5
    one, two = 1 / math.sqrt(5), 2 / math.sqrt(5)
    expected = ((1 - one) ** 2 + two**2 + one**2 + (1 - two) ** 2) / 2
    assert number(similarity_loss(student, teacher)) == pytest.approx(expected, rel=1e-6)


def test_similarity_is_of_normalized_rows_of_inner_products() -> None:
    student, teacher = normal(5, 4, 3, 2), normal(5, 6, seed=1)
    wanted = []
    for rows in (array(student).reshape(5, -1), array(teacher)):
        products = rows @ rows.T
        wanted.append(products / np.sqrt((products**2).sum(1, keepdims=True)))
    expected = ((wanted[0] - wanted[1]) ** 2).sum() / 5
    assert number(similarity_loss(student, teacher)) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("loss", [attention_loss, rkd_loss, similarity_loss, lambda s, t: response_loss(s, t, 2.0)])
def test_gradients_are_those_of_finite_differences(loss: object) -> None:
    assert callable(loss)
    teacher = normal(5, 3, 2, 2, seed=1).detach()
    assert torch.autograd.gradcheck(lambda student: loss(student, teacher), (normal(5, 3, 2, 2),))


def test_half_precision_is_widened_and_nothing_else() -> None:
    kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    assert [wide(torch.zeros(1, dtype=kind)).dtype for kind in kinds] == [torch.float32] * 3 + [torch.float64]
