"""The loss of distillation: what is compared with what, in which shares, where gradients go, and what is refused."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekit.data.samples import LABELS
from edgekit.distillation import Distillation
from edgekit.errors import DataError, SourceError
from edgekit.training.distill import DistillLoss, Loss, open_loss, task_loss
from edgekit.training.distill_losses import (
    attention_loss,
    response_loss,
    rkd_loss,
    similarity_loss,
)
from edgekit.training.taps import FEATURE

T = 4.0


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def wanted(kind: str, **options: Any) -> Distillation:
    return Distillation.model_validate({"kind": kind, **options})


def outputs(seed: int, *, width: int = 4, classes: int = 10, grad: bool = False) -> dict[str, Tensor]:
    """Scores and the features of two stages of a batch of 8."""
    made = {
        "output": normal(8, classes, seed=seed),
        FEATURE + "a": normal(8, width, 4, 4, seed=seed + 1),
        FEATURE + "b": normal(8, 2 * width, 2, 2, seed=seed + 2),
    }
    return {name: value.requires_grad_(grad) for name, value in made.items()}


LABELLED = {LABELS: torch.arange(8)}


def value(loss: Tensor) -> float:
    assert loss.shape == ()
    return float(loss.detach())


# The ordinary loss


def test_the_ordinary_loss_is_cross_entropy_of_the_scores_that_fit_the_labels() -> None:
    scores, labels = normal(8, 10), torch.arange(8) % 10
    expected = F.cross_entropy(scores, labels)
    other = {"boxes": normal(8, 3, 4), "embedding": normal(8, 16), "logits": scores, "other": normal(8, 7)}
    assert value(task_loss(other, {}, {LABELS: labels})) == pytest.approx(value(expected))
    assert value(task_loss({"p": scores.softmax(1)}, {}, {LABELS: labels})) == pytest.approx(value(expected), rel=1e-5)
    tokens = {"logits": scores.reshape(2, 4, 10)}
    assert value(task_loss(tokens, {}, {LABELS: labels.reshape(2, 4)})) == pytest.approx(value(expected))
    odd = {"embedding": scores}
    assert value(task_loss(odd, {}, {LABELS: labels})) == pytest.approx(value(expected)), "the only one that fits"


@pytest.mark.parametrize(
    ("found", "labels", "message"),
    [
        ({"output": normal(8, 10)}, torch.full((8,), 10), "label 10 is out of range: output 'output' scores 10 classes, 0 to 9"),
        ({"output": normal(8, 10)}, None, "the batch has no labels"),
        ({"output": normal(8, 10)}, torch.zeros(8), "the labels are float32"),
        ({"output": normal(8, 10)}, torch.zeros(8, 2, dtype=torch.long),
         "no output scores the classes of labels (8, 2) (found 'output' (8, 10))"),
        ({"output": normal(8, 1)}, torch.zeros(8, dtype=torch.long), "with two classes or more"),
        ({"output": normal(8)}, torch.zeros(8, dtype=torch.long), "expected scores (N, C) for labels (N,)"),
    ],
)  # fmt: skip
def test_labels_that_cannot_be_learned_are_explained(
    found: dict[str, Tensor], labels: Tensor | None, message: str
) -> None:
    with pytest.raises(DataError) as caught:
        task_loss(found, {}, {"x": normal(8, 2)} | ({} if labels is None else {LABELS: labels}))
    assert message in str(caught.value)


def test_both_are_losses_of_the_one_interface() -> None:
    losses: list[Loss] = [task_loss, open_loss(Distillation(), outputs(0), outputs(5), True)]
    assert [value(loss(outputs(0), outputs(5), LABELLED)) > 0 for loss in losses] == [True, True]
    names = [list(inspect.signature(function).parameters) for function in (task_loss, DistillLoss.forward)]
    assert names[0] == names[1][1:] == ["student_outputs", "teacher_outputs", "batch"]


# Shares


@pytest.mark.parametrize("hard", [0.0, 0.3, 1.0])
def test_labels_and_teacher_have_their_shares(hard: float) -> None:
    ours, theirs = outputs(0), outputs(5)
    loss = open_loss(Distillation(hard=hard), ours, theirs, True)
    task, response = (
        F.cross_entropy(ours["output"], LABELLED[LABELS]),
        response_loss(ours["output"], theirs["output"], T),
    )
    assert value(loss(ours, theirs, LABELLED)) == pytest.approx(
        hard * value(task) + (1 - hard) * value(response), rel=1e-6
    )
    assert set(loss.parts) == {"labels", "response"} - ({"labels"} if hard == 0 else set()) - (
        {"response"} if hard == 1 else set()
    )


def test_without_labels_their_share_is_the_teacher_s() -> None:
    ours, theirs = outputs(0), outputs(5)
    loss = open_loss(Distillation(hard=0.9), ours, theirs, False)
    response = value(response_loss(ours["output"], theirs["output"], T))
    assert value(loss(ours, theirs, {})) == pytest.approx(response) == value(loss(ours, theirs, LABELLED))


def test_labels_that_were_promised_are_asked_for() -> None:
    loss = open_loss(Distillation(), outputs(0), outputs(5), True)
    with pytest.raises(DataError, match="the batch has no labels"):
        loss(outputs(0), outputs(5), {})
    with pytest.raises(DataError, match=r"labels \(8, 2\) do not fit output 'output' \(8, 10\)"):
        loss(outputs(0), outputs(5), {LABELS: torch.zeros(8, 2, dtype=torch.long)})
    with pytest.raises(DataError, match="label 10 is out of range"):
        loss(outputs(0), outputs(5), {LABELS: torch.full((8,), 10)})


@pytest.mark.parametrize(
    ("kind", "plain"), [("attention", attention_loss), ("rkd", rkd_loss), ("similarity", similarity_loss)]
)
def test_kinds_of_features_are_weighted_and_averaged_over_pairs(kind: str, plain: Any) -> None:
    ours, theirs = outputs(0), outputs(5, width=6)
    each = [value(plain(ours[FEATURE + name], theirs[FEATURE + name])) for name in "ab"]
    loss = open_loss(wanted(kind, weight=0.5, pairs="a,b"), ours, theirs, False)
    assert value(loss(ours, theirs, {})) == pytest.approx(0.5 * sum(each) / 2, rel=1e-5)
    assert not list(loss.parameters()), "only features that are compared one by one need projectors"
    matched = open_loss(wanted(kind), ours, theirs, False)
    expected = sum(each) / 2 if kind == "attention" else each[1]
    assert value(matched(ours, theirs, {})) == pytest.approx(expected, rel=1e-5)


def test_features_of_one_width_are_compared_as_they_are() -> None:
    ours, theirs = outputs(0), outputs(5)
    loss = open_loss(wanted("feature"), ours, theirs, False)
    errors = []
    for name in (FEATURE + "a", FEATURE + "b"):
        student, teacher = (x[name].double().numpy() for x in (ours, theirs))
        errors.append(((student - teacher) ** 2).mean() / (teacher**2).mean())
    assert value(loss(ours, theirs, {})) == pytest.approx(np.mean(errors), rel=1e-5)
    assert not list(loss.parameters())


@pytest.mark.parametrize(
    ("student", "teacher", "axis"),
    [((8, 4, 6, 6), (8, 7, 6, 6), 1), ((8, 5, 4), (8, 5, 7), 2), ((8, 4, 5), (8, 7, 5), 1), ((8, 4), (8, 7), 1),
     ((8, 3, 3, 4), (8, 3, 3, 7), 3)],
)  # fmt: skip
def test_a_projector_brings_channels_to_the_teacher_s(
    student: tuple[int, ...], teacher: tuple[int, ...], axis: int
) -> None:
    ours, theirs = ({"output": normal(8, 3), FEATURE + "a": normal(*shape)} for shape in (student, teacher))
    loss = open_loss(wanted("feature"), ours, theirs, False)
    weight, bias = loss.parameters()
    assert weight.shape == (7, 4) and bias.shape == (7,)
    mapped = (ours[FEATURE + "a"].movedim(axis, -1) @ weight.T + bias).movedim(-1, axis)
    target = theirs[FEATURE + "a"]
    unit = target.square().mean()
    assert value(loss(ours, theirs, {})) == pytest.approx(value((mapped - target).square().mean() / unit), rel=1e-5)


def test_a_projector_can_learn_a_mapping() -> None:
    torch.manual_seed(0)
    ours = {"output": normal(32, 3), FEATURE + "a": normal(32, 6, 2, 2)}
    mapping = normal(4, 6, seed=1)
    theirs = {"output": normal(32, 3), FEATURE + "a": torch.einsum("oc,nchw->nohw", mapping, ours[FEATURE + "a"])}
    loss = open_loss(wanted("feature"), ours, theirs, False)
    optimizer = torch.optim.Adam(loss.parameters(), 0.1)
    first = value(loss(ours, theirs, {}))
    for _ in range(150):
        optimizer.zero_grad()
        torch.autograd.backward(loss(ours, theirs, {}))
        optimizer.step()
    assert value(loss(ours, theirs, {})) < 1e-3 < 0.5 < first


def test_kinds_add_up_and_say_what_they_compare() -> None:
    ours, theirs = outputs(0), outputs(5, width=6)
    torch.manual_seed(0)
    loss = open_loss(wanted("response,feature,similarity", hard=0.2), ours, theirs, True)
    total = value(loss(ours, theirs, LABELLED))
    assert list(loss.parts) == ["labels", "response", "feature", "similarity"]
    assert sum(map(float, loss.parts.values())) == pytest.approx(total, rel=1e-6)
    assert not any(part.requires_grad for part in loss.parts.values())
    assert loss.learns == (
        "labels by 'output'", "response of 'output' to 'output'", "feature of 'a' to 'a'", "feature of 'b' to 'b'",
        "similarity of 'b' to 'b'",
    )  # fmt: skip


# Outputs


def test_numbers_that_are_no_scores_are_met_as_they_are() -> None:
    theirs = {"boxes": normal(8, 5, 4), "logits": normal(8, 10), "which": torch.arange(8)}
    ours = {"boxes": normal(8, 5, 4, seed=1), "logits": normal(8, 10, seed=1), "which": torch.arange(8)}
    loss = open_loss(Distillation(), ours, theirs, False)
    boxes = theirs["boxes"]
    error = (ours["boxes"] - boxes).square().mean() / (boxes - boxes.mean(0)).square().mean()
    expected = (value(error) + value(response_loss(ours["logits"], theirs["logits"], T))) / 2
    assert value(loss(ours, theirs, {})) == pytest.approx(expected, rel=1e-5)
    assert loss.learns == ("squared error of 'boxes' to 'boxes'", "response of 'logits' to 'logits'")


def test_numbers_of_a_teacher_that_learns_too_are_measured_by_what_they_are_now() -> None:
    ours, theirs = ({"box": normal(8, 4, seed=seed), "output": normal(8, 10)} for seed in (0, 1))
    loss = open_loss(Distillation(scheme="online"), ours, theirs, True)
    grown = {"box": 100 * theirs["box"], "output": theirs["output"]}
    expected = ((ours["box"] - grown["box"]).square().mean() / grown["box"].square().mean()) / 4
    assert value(loss(ours, grown, LABELLED)) > 0
    assert float(loss.parts["response"]) == pytest.approx(value(expected), rel=1e-5)


def test_the_user_can_say_which_outputs_hold_scores() -> None:
    ours, theirs = {"output": normal(8, 10)}, {"output": normal(8, 10, seed=1)}
    assert open_loss(wanted("response", scores=()), ours, theirs, False).learns == (
        "squared error of 'output' to 'output'",
    )
    named = open_loss(wanted("response", scores="boxes"), {"boxes": normal(8, 3)}, {"boxes": normal(8, 3)}, False)
    assert named.learns == ("response of 'boxes' to 'boxes'",)


def test_a_model_of_probabilities_learns_from_one_of_logits() -> None:
    logits = normal(8, 10, seed=1)
    ours, theirs = {"output": normal(8, 10).softmax(1)}, {"output": logits}
    loss = open_loss(Distillation(), ours, theirs, True)
    expected = F.cross_entropy(normal(8, 10), LABELLED[LABELS]) + response_loss(normal(8, 10), logits, T)
    assert value(loss(ours, theirs, LABELLED)) == pytest.approx(value(expected) / 2, rel=1e-4)


def test_outputs_go_by_name_and_in_order_when_names_differ() -> None:
    a, b = normal(8, 10, seed=1), normal(8, 10, seed=2)
    by_name = open_loss(Distillation(), {"x": a}, {"z": normal(8, 3), "x": b}, False)
    assert by_name.learns == ("response of 'x' to 'x'",)
    in_order = open_loss(Distillation(), {"output": a}, {"logits": b, "which": torch.arange(8)}, False)
    assert value(in_order({"output": a}, {"logits": b}, {})) == pytest.approx(value(response_loss(a, b, T)))


def test_labels_show_which_axis_of_scores_counts_classes() -> None:
    ours, theirs = {"output": normal(2, 6, 4)}, {"output": normal(2, 6, 4, seed=1)}
    loss = open_loss(Distillation(), ours, theirs, True)
    for axis, labels in ((1, torch.zeros(2, 4, dtype=torch.long)), (2, torch.zeros(2, 6, dtype=torch.long))):
        expected = F.cross_entropy(ours["output"].movedim(axis, 1), labels) + response_loss(
            ours["output"], theirs["output"], T, axis
        )
        assert value(loss(ours, theirs, {LABELS: labels})) == pytest.approx(value(expected) / 2, rel=1e-5)


# Gradients


@pytest.mark.parametrize("kind", ["response", "feature", "attention", "rkd", "similarity"])
def test_gradients_reach_the_student_and_the_projector_and_never_the_teacher(kind: str) -> None:
    ours, theirs = outputs(0, grad=True), outputs(5, width=6, grad=True)
    loss = open_loss(wanted(kind, pairs="a,b" if kind != "response" else ""), ours, theirs, True)
    torch.autograd.backward(loss(ours, theirs, LABELLED))
    for name in ("output", *([FEATURE + "a", FEATURE + "b"] if kind != "response" else [])):
        gradient = ours[name].grad
        assert gradient is not None and gradient.abs().sum() > 0
    assert all(one.grad is None for one in theirs.values())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in loss.parameters())
    assert len(list(loss.parameters())) == (4 if kind == "feature" else 0)


def test_online_each_learns_from_the_other_s_present_outputs() -> None:
    ours, theirs = outputs(0, grad=True), outputs(5, width=6, grad=True)
    torch.manual_seed(0)
    loss = open_loss(wanted("response,feature", scheme="online", temperature=1.0), ours, theirs, True)
    both = loss(ours, theirs, LABELLED)
    torch.autograd.backward(both)
    found = {name: x["output"].grad for name, x in (("student", ours), ("teacher", theirs))}
    for name, own, other in (("student", ours, theirs), ("teacher", theirs, ours)):
        scores = own["output"].detach().requires_grad_()
        alone = F.cross_entropy(scores, LABELLED[LABELS]) + response_loss(scores, other["output"].detach(), 1.0)
        expected = torch.autograd.grad(alone / 2, scores)[0]
        torch.testing.assert_close(found[name], expected)
    assert all(x[FEATURE + name].grad is not None for x in (ours, theirs) for name in "ab")
    shapes = sorted(tuple(p.shape) for p in loss.parameters() if p.dim() == 2)
    assert shapes == [(4, 6), (6, 4), (8, 12), (12, 8)], "a projector of each, there and back"
    assert float(loss.parts["peer"]) == pytest.approx(
        value(both) - sum(float(loss.parts[k]) for k in ("labels", "response", "feature")), rel=1e-5
    )


def test_online_by_hand() -> None:
    ours = {"output": torch.tensor([[0.0, 0.0]])}
    theirs = {"output": torch.tensor([[math.log(3.0), 0.0]])}
    loss = open_loss(Distillation(scheme="online", temperature=1.0), ours, theirs, True)
    kl_to_student = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    kl_to_teacher = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    expected = (math.log(2) + kl_to_teacher - math.log(0.75) + kl_to_student) / 2
    assert value(loss(ours, theirs, {LABELS: torch.tensor([0])})) == pytest.approx(expected, rel=1e-6)


def test_half_precision_and_autocast_are_computed_in_float32() -> None:
    ours, theirs = outputs(0), outputs(5, width=6)
    torch.manual_seed(0)
    loss = open_loss(wanted("response,feature,rkd,similarity,attention"), ours, theirs, True)
    exact = value(loss(ours, theirs, LABELLED))
    with torch.autocast("cpu", torch.bfloat16):
        assert value(loss(ours, theirs, LABELLED)) == exact
    half = ({name: x.bfloat16() for name, x in one.items()} for one in (ours, theirs))
    assert value(loss(*half, LABELLED)) == pytest.approx(exact, rel=0.05)


# Refusals

SCORES = {"output": normal(8, 10)}


@pytest.mark.parametrize(
    ("distillation", "ours", "theirs", "labels", "message"),
    [
        (wanted("response"), SCORES, {"output": normal(8, 100)}, False,
         "the student's output 'output' has the shape (8, 10), the teacher's 'output' (8, 100); give a teacher of the same classes"),
        (wanted("response"), {"a": normal(8, 2), "b": normal(8, 2)}, {"c": normal(8, 2)}, False,
         "the student's outputs (a, b) are not the teacher's (c), by name or by number"),
        (wanted("response"), {"which": torch.arange(8)}, SCORES, False, "the student has no output of floats"),
        (wanted("response"), SCORES, {}, False, "the teacher has no output of floats"),
        (wanted("response", scores="outptu"), SCORES, SCORES, False,
         "no output of the student is called 'outptu', as 'scores' says; did you mean 'output'?"),
        (wanted("response", scores="n"), {"n": normal(8)}, {"n": normal(8)}, False, "output 'n' of the student has the shape (8,)"),
        (wanted("feature"), SCORES, SCORES, False, "0 features of the student and 0 of the teacher are no pairs"),
        (wanted("feature", pairs="aa=b"), outputs(0), outputs(5), False,
         "no feature of the student's layer 'aa' was read; did you mean 'a'?"),
        (wanted("feature", pairs="a=zzz"), outputs(0), outputs(5), False, "no feature of the teacher's layer 'zzz' was read; known: a, b"),
        (wanted("feature"), {FEATURE + "a": normal(8, 4, 3)}, {FEATURE + "b": normal(8, 4, 3, 3)}, False,
         "the layers 'a' (8, 4, 3) of one model and 'b' (8, 4, 3, 3) of the other differ in their number of axes, so that 'feature'"),
        (wanted("attention"), {FEATURE + "a": normal(8, 4)}, {FEATURE + "b": normal(8, 4)}, False,
         "have no positions, which 'attention' compares"),
    ],
)  # fmt: skip
def test_what_does_not_match_is_explained(
    distillation: Distillation, ours: dict[str, Tensor], theirs: dict[str, Tensor], labels: bool, message: str
) -> None:
    with pytest.raises(SourceError) as caught:
        open_loss(distillation, ours, theirs, labels)
    assert message in str(caught.value)


def test_online_needs_labels_and_labels_need_scores() -> None:
    with pytest.raises(DataError, match="online distillation needs labels"):
        open_loss(Distillation(scheme="online"), SCORES, SCORES, False)
    embedding = {"embedding": normal(8, 10)}
    with pytest.raises(
        DataError, match=r"no output of the student scores classes \(found 'embedding' \(8, 10\)\); set 'hard' to 0"
    ):
        open_loss(Distillation(), embedding, embedding, True)
    assert open_loss(Distillation(hard=0), embedding, embedding, True).learns == (
        "squared error of 'embedding' to 'embedding'",
    )


def test_relations_compare_networks_of_any_shape() -> None:
    ours, theirs = {FEATURE + "a": normal(8, 5, 6)}, {FEATURE + "b": normal(8, 7, 3, 3)}
    for kind in ("rkd", "similarity"):
        assert value(open_loss(wanted(kind), ours, theirs, False)(ours, theirs, {})) > 0


def test_features_alone_do_not_ask_for_the_teacher_s_classes() -> None:
    ours, theirs = outputs(0), outputs(5, classes=1000)
    assert value(open_loss(wanted("feature"), ours, theirs, True)(ours, theirs, LABELLED)) > 0


def test_projectors_are_in_the_state_dict() -> None:
    loss = open_loss(wanted("feature"), outputs(0), outputs(5, width=6), False)
    assert len(loss.state_dict()) == 4 and isinstance(loss, nn.Module)
