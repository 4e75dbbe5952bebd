"""A teacher beside a training loop: frozen or trained, of any forward; and students that really learn from it."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgekit.data.samples import LABELS
from edgekit.distillation import Distillation
from edgekit.errors import DataError, SourceError
from edgekit.schedule import Schedule
from edgekit.training.capture import capture
from edgekit.training.loop import train
from edgekit.training.taps import FEATURE, Taps
from edgekit.training.teacher import Teacher, open_distiller


def perceptron(width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Linear(8, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(width, 4)]
    return nn.Sequential(OrderedDict(zip(("first", "norm", "relu", "drop", "head"), layers, strict=True)))


def quarters(count: int, seed: int) -> dict[str, Tensor]:
    """Points whose class is the signs of two products of their coordinates: no linear model can tell."""
    x = torch.randn((count, 8), generator=torch.Generator().manual_seed(seed))
    return {"x": x, LABELS: 2 * (x[:, 0] * x[:, 1] > 0).long() + (x[:, 2] * x[:, 3] > 0).long()}


def fit(
    student: nn.Module, loss: Any, extra: list[nn.Parameter], batches: list[dict[str, Tensor]], rate: float = 1e-2
) -> None:
    optimizer = torch.optim.Adam([*student.parameters(), *extra], rate)
    student.train()
    for batch in batches:
        optimizer.zero_grad()
        torch.autograd.backward(loss(student, batch))
        optimizer.step()
    student.eval()


def ordinary(student: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(student(batch["x"]), batch[LABELS])


def agreement(a: nn.Module, b: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((a.eval()(x).argmax(1) == b.eval()(x).argmax(1)).float().mean())


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def taught() -> nn.Module:
    teacher = perceptron(64, 0)
    fit(teacher, ordinary, [], [quarters(128, 100 + step) for step in range(400)])
    data = quarters(1000, 1)
    with torch.no_grad():
        assert float((teacher(data["x"]).argmax(1) == data[LABELS]).float().mean()) > 0.8
    return teacher


def unlabelled(count: int = 250) -> list[dict[str, Tensor]]:
    return [{"x": quarters(64, 1000 + step)["x"]} for step in range(count)]


@pytest.mark.parametrize("kind", ["response", "response,feature", "response,rkd,similarity"])
def test_a_student_learns_from_a_teacher_without_labels(taught: nn.Module, kind: str) -> None:
    student, unseen = perceptron(32, 7), quarters(1000, 2)
    before = agreement(student, taught, unseen["x"])
    batches = unlabelled()
    distiller = open_distiller(
        Distillation.model_validate({"kind": kind}), student, copy.deepcopy(taught), batches[0], has_labels=False
    )
    fit(student, distiller, distiller.parameters(), batches)
    assert before < 0.5
    assert agreement(student, taught, unseen["x"]) > 0.8
    with torch.no_grad():
        assert float((student(unseen["x"]).argmax(1) == unseen[LABELS]).float().mean()) > 0.7, "labels it never saw"


def test_online_one_optimizer_and_one_backward_train_both() -> None:
    student, peer, unseen = perceptron(32, 7), perceptron(64, 8), quarters(1000, 2)
    batches = [quarters(64, 1000 + step) for step in range(250)]
    distiller = open_distiller(
        Distillation(scheme="online", temperature=1.0), student, peer, batches[0], has_labels=True
    )
    assert distiller.trainable == (distiller.teacher,)
    assert {id(p) for p in distiller.parameters()} == {id(p) for p in peer.parameters()}
    fit(student, distiller, distiller.parameters(), batches)
    peer.eval()
    for network in (student, peer):
        with torch.no_grad():
            assert float((network(unseen["x"]).argmax(1) == unseen[LABELS]).float().mean()) > 0.7


def test_a_frozen_teacher_stays_as_it_is_whatever_the_loop_does() -> None:
    teacher = perceptron(16, 0)
    before = copy.deepcopy(teacher.state_dict())
    beside = Teacher(teacher.train(), ["relu"])
    beside.train()
    assert beside.training and not any(child.training for child in teacher.modules())
    x = torch.randn(6, 8)
    found = beside({"x": x, LABELS: torch.zeros(6)})
    assert list(found) == ["output", FEATURE + "relu"]
    assert not any(one.requires_grad for one in found.values())
    assert not beside({"x": x.clone().requires_grad_()})["output"].requires_grad
    assert not any(parameter.requires_grad for parameter in beside.parameters())
    torch.testing.assert_close(beside({"x": x})["output"], found["output"], rtol=0, atol=0)  # no Dropout
    assert all(torch.equal(before[name], now) for name, now in teacher.state_dict().items())  # no new statistics
    assert not teacher.relu._forward_hooks


def test_a_trained_teacher_follows_the_loop_and_has_gradients() -> None:
    teacher = perceptron(16, 0).eval()
    beside = Teacher(teacher, ["relu"], trained=True)
    assert beside.train() is beside and teacher.drop.training and not beside.eval().module.drop.training
    assert all(one.requires_grad for one in beside({"x": torch.randn(6, 8)}).values())
    with torch.no_grad():
        assert not beside({"x": torch.randn(6, 8)})["output"].requires_grad


def test_a_captured_teacher_that_refuses_eval_is_fine() -> None:
    exported = torch.export.export(perceptron(16, 0).eval(), (torch.randn(4, 8),)).module()
    with pytest.raises(NotImplementedError):
        exported.eval()
    assert Teacher(exported)({"x": torch.randn(4, 8)})["output"].shape == (4, 4)


@pytest.mark.parametrize("scheme", ["offline", "online"])
def test_the_loop_trains_what_is_beside_the_student(tmp_path: Path, scheme: str) -> None:
    student, teacher, data = perceptron(16, 0), perceptron(24, 1), quarters(64, 0)
    wanted = Distillation.model_validate({"kind": "response,feature", "scheme": scheme})
    distiller = open_distiller(wanted, student, teacher, {"input": data["x"]}, has_labels=True)
    before = {name: value.clone() for name, value in distiller.loss.state_dict().items()}
    frozen = copy.deepcopy(teacher.state_dict())
    arrays = {"input": data["x"].numpy(), LABELS: data[LABELS].numpy()}
    done = train(
        student, arrays, distiller.loss, schedule=Schedule(steps=80, batch_size=16, learning_rate=1e-2), folder=tmp_path,
        teacher=distiller.teacher, taps=distiller.taps, extra=distiller.trainable,
    )  # fmt: skip
    assert sum(done.losses[-4:]) < 0.8 * sum(done.losses[:4])
    assert not any(torch.equal(before[name], now) for name, now in distiller.loss.state_dict().items())
    same = [torch.equal(frozen[name], now) for name, now in teacher.state_dict().items()]
    assert all(same) if scheme == "offline" else not all(same)


def test_the_float_model_teaches_its_captured_copy() -> None:
    batch = {"input": torch.randn(6, 8)}
    model = perceptron(16, 0).eval()
    graph = capture(model, {"input": batch["input"].numpy()}, taps=["relu"])
    wanted = Distillation(kind=("response", "feature"), scheme="self", pairs=(("relu", "relu"),))
    distiller = open_distiller(wanted, graph, model, batch, has_labels=False)
    assert float(distiller(graph, batch).detach()) == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        graph.get_parameter("first.weight").mul_(1.1)
    torch.autograd.backward(distiller(graph, batch))
    gradient = graph.get_parameter("first.weight").grad
    assert gradient is not None and gradient.abs().sum() > 0


def test_what_is_trained_beside_the_student() -> None:
    batch = {"x": torch.randn(6, 8)}
    student, wider = perceptron(16, 0), perceptron(24, 1)
    plain = open_distiller(Distillation(), student, wider, batch, has_labels=False)
    assert plain.trainable == () and plain.parameters() == []
    projected = open_distiller(Distillation(kind=("feature",)), student, wider, batch, has_labels=False)
    assert projected.trainable == (projected.loss,)
    assert [tuple(p.shape) for p in projected.parameters()] == [(24, 16), (24,)]
    assert projected.loss.learns == ("feature of 'drop' to 'drop'",)
    named = open_distiller(
        Distillation(kind=("feature",), pairs=(("relu", "norm"),)), student, wider, batch, has_labels=False
    )
    assert named.loss.learns == ("feature of 'relu' to 'norm'",)


def test_self_distillation_copies_the_student_as_it_is() -> None:
    student, batch = perceptron(16, 0).eval(), {"x": torch.randn(6, 8)}
    distiller = open_distiller(
        Distillation(scheme="self", kind=("response", "feature")), student, None, batch, has_labels=False
    )
    assert float(distiller(student, batch).detach()) == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        student.head.weight.mul_(-1)
    assert float(distiller(student, batch).detach()) > 0.01, "the copy does not follow"
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_opening_leaves_the_student_as_it_was() -> None:
    student = perceptron(16, 0).train()
    before = copy.deepcopy(student.state_dict())
    state = torch.random.get_rng_state()
    open_distiller(
        Distillation(),
        student,
        perceptron(16, 1),
        {"x": torch.randn(6, 8, generator=torch.Generator())},
        has_labels=False,
    )
    torch.random.set_rng_state(state)
    assert student.training and student.drop.training
    assert all(torch.equal(before[name], now) for name, now in student.state_dict().items())
    assert not any(child._forward_hooks for child in student.modules())


def test_a_loop_of_one_s_own_takes_the_parts() -> None:
    student, teacher, batch = perceptron(16, 0), perceptron(16, 1), quarters(6, 0)
    distiller = open_distiller(Distillation(kind=("rkd",)), student.eval(), teacher, batch, has_labels=True)
    with Taps(student, distiller.taps.layers) as taps:
        scores = student(batch["x"])
        mine = distiller.loss({"output": scores, **taps.take()}, distiller.teacher(batch), batch)
    torch.testing.assert_close(mine, distiller(student, batch), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "offline distillation needs a teacher; give one, or choose scheme 'self'"),
        ({"scheme": "online"}, "online distillation needs a teacher"),
    ],
)
def test_a_missing_teacher_is_asked_for(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        open_distiller(Distillation(**options), perceptron(16, 0), None, {"x": torch.randn(6, 8)}, has_labels=True)


def test_a_teacher_that_is_the_student_is_refused() -> None:
    student = perceptron(16, 0)
    with pytest.raises(SourceError, match=r"the teacher shares 'first.weight' with the student .* give a copy"):
        open_distiller(Distillation(), student, nn.Sequential(student), {"x": torch.randn(6, 8)}, has_labels=True)
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_a_teacher_of_other_inputs_is_explained() -> None:
    with pytest.raises(SourceError, match="the teacher does not run on the batch: RuntimeError"):
        open_distiller(Distillation(), perceptron(16, 0), nn.Linear(5, 4), {"x": torch.randn(6, 8)}, has_labels=False)
    with pytest.raises(SourceError, match="no layer of the teacher is called 'reluu'; did you mean 'relu'"):
        wrong = Distillation(kind=("rkd",), pairs=(("relu", "reluu"),))
        open_distiller(wrong, perceptron(16, 0), perceptron(16, 1), {"x": torch.randn(6, 8)}, has_labels=False)
    with pytest.raises(DataError, match="online distillation needs labels"):
        open_distiller(
            Distillation(scheme="online"),
            perceptron(16, 0),
            perceptron(16, 1),
            {"x": torch.randn(6, 8)},
            has_labels=False,
        )
