"""Criteria against numbers worked out by hand, and the gradients that some of them need."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import prune_nets as nets
from edgekit.errors import DataError
from edgekit.pruning import CRITERIA
from edgekit.training.prune import GRADIENTS, IMPORTANCE, Part, TensorGroup, find_groups, gather_gradients
from edgekit.training.prune.importance import bn, fpgm, hessian, l1, l2, seeded, taylor

IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
CONV, NORM, LINEAR = nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.Linear(3, 1)

MADE = torch.tensor([[1.0, -2.0], [0.0, 3.0], [6.0, 0.0]])
READ = torch.tensor([[2.0], [-4.0], [0.0]])
SCALES = torch.tensor([[0.5], [-1.0], [1.5]])


def group(gradients: tuple[Tensor | None, Tensor | None] = (None, None)) -> TensorGroup:
    """Three units that a convolution makes, a BatchNorm scales and a linear layer reads."""
    parts = (
        Part("conv", CONV, "makes", MADE, gradients[0]),
        Part("norm", NORM, "follows", SCALES, None),
        Part("fc", LINEAR, "reads", READ, gradients[1]),
    )
    return TensorGroup("conv", 3, 1, parts)


def test_there_is_a_function_for_each_criterion_that_users_can_name() -> None:
    assert tuple(IMPORTANCE) == CRITERIA
    assert GRADIENTS.keys() <= IMPORTANCE.keys()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("l1", [3 / 4 + 2 / 2, 3 / 4 + 4 / 2, 6 / 4]),
        ("l2", [5 / (50 / 3) + 4 / (20 / 3), 9 / (50 / 3) + 16 / (20 / 3), 36 / (50 / 3)]),
        ("bn", [0.5, 1.0, 1.5]),
    ],
)
def test_weights(name: str, expected: list[float]) -> None:
    """Each layer's share is divided by its mean: 4 of the magnitudes made, 2 of those read; 50/3 and 20/3 of the squares."""
    torch.testing.assert_close(IMPORTANCE[name](group()), torch.tensor(expected, dtype=torch.float64))


def test_bn_without_a_normalization_is_l1() -> None:
    plain = TensorGroup("conv", 3, 1, (group().parts[0], group().parts[2]))
    assert torch.equal(bn(plain), l1(plain))


def test_distance_to_the_other_filters() -> None:
    distances = [26**0.5 + 29**0.5, 26**0.5 + 45**0.5, 29**0.5 + 45**0.5]
    expected = torch.tensor(distances, dtype=torch.float64) / np.mean(distances)
    torch.testing.assert_close(fpgm(group()), expected, rtol=0, atol=1e-6)


def test_weight_times_gradient() -> None:
    """(1 * 2)^2 + (-2 * 1)^2 = 8, (3 * 1)^2 = 9, 6^2 / 4 = 9; read: 4, 0, 0."""
    gradients = torch.tensor([[2.0, 1.0], [5.0, 1.0], [0.5, 7.0]]), torch.tensor([[1.0], [0.0], [3.0]])
    expected = torch.tensor([8 / (26 / 3) + 3, 9 / (26 / 3), 9 / (26 / 3)], dtype=torch.float64)
    torch.testing.assert_close(taylor(group(gradients)), expected)
    torch.testing.assert_close(hessian(group(gradients)), expected)
    with pytest.raises(DataError, match="group 'conv' has no gradients in conv"):
        taylor(group())


def test_units_without_any_weight_do_not_divide_by_zero() -> None:
    zeros = TensorGroup("conv", 3, 1, (Part("conv", CONV, "makes", torch.zeros(3, 2), torch.zeros(3, 2)),))
    for name in CRITERIA:
        assert torch.isfinite(IMPORTANCE[name](zeros)).all()


def test_random_scores_depend_on_the_seed_and_the_group() -> None:
    other = TensorGroup("other", 3, 1, ())
    assert torch.equal(seeded(1)(group()), seeded(1)(group()))
    assert not torch.equal(seeded(1)(group()), seeded(2)(group()))
    assert not torch.equal(seeded(1)(group()), seeded(1)(other))


def loss(outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(outputs["output"], batch["labels"])


def batches() -> list[dict[str, Tensor]]:
    labels = torch.arange(6) % 5
    return [{"x": IMAGES[start : start + 2], "labels": labels[start : start + 2]} for start in (0, 2, 4)]


def test_gradients_over_batches() -> None:
    """The mean of the batches is the gradient of all at once; the other kind is the root of the mean square."""
    net = nets.Chain().double()
    data = [
        {name: value.double() if value.is_floating_point() else value for name, value in one.items()}
        for one in batches()
    ]
    module = find_groups(net, [IMAGES.double()]).module
    assert gather_gradients(module, data, loss) == 3
    mean = module.conv1.weight.grad.clone()

    net.eval()
    singles = []
    for one in data:
        net.zero_grad()
        loss({"output": net(one["x"])}, one).backward()
        singles.append(net.conv1.weight.grad.clone())
    torch.testing.assert_close(mean, torch.stack(singles).mean(0), rtol=0, atol=1e-12)
    gather_gradients(module, data, loss, kind=GRADIENTS["hessian"])
    torch.testing.assert_close(module.conv1.weight.grad, (torch.stack(singles) ** 2).mean(0).sqrt(), rtol=0, atol=1e-12)


def test_gathering_says_what_it_lacks() -> None:
    module = find_groups(nets.Chain(), [IMAGES]).module
    with pytest.raises(DataError, match="there are no batches"):
        gather_gradients(module, [], loss)
    with pytest.raises(DataError, match="loss of batch 0 is nan"):
        gather_gradients(module, batches(), lambda outputs, batch: outputs["output"].sum() * float("nan"))


def test_what_a_criterion_gets_to_see_of_a_network() -> None:
    """Of a flattened convolution: 12 filters of 8 * 9 numbers, and of the linear layer 16 columns of 10 for each."""
    prunable = find_groups(nets.Chain(), [IMAGES])
    seen = prunable.tensors("conv2")
    assert (seen.units, seen.width) == (12, 1)
    assert [(part.layer, part.role, tuple(part.weight.shape)) for part in seen.parts] == [
        ("conv2", "makes", (12, 72)),
        ("norm2", "follows", (12, 1)),
        ("act2", "follows", (12, 1)),
        ("fc1", "reads", (12, 160)),
    ]
    assert torch.equal(seen.parts[0].weight, prunable.module.conv2.weight.detach().flatten(1))
    columns = prunable.module.fc1.weight.detach().reshape(10, 12, 16)
    assert torch.equal(seen.parts[3].weight.reshape(12, 16, 10), columns.permute(1, 2, 0))
    assert all(part.gradient is None for part in seen.parts)
    gather_gradients(prunable.module, batches(), loss)
    part = prunable.tensors("conv2").parts[0]
    assert part.gradient is not None and torch.equal(part.gradient, prunable.module.conv2.weight.grad.flatten(1))


@pytest.mark.parametrize("name", CRITERIA)
def test_channels_that_do_nothing_are_worth_least(name: str) -> None:
    """Two of eight channels have tiny filters, scales and readers."""
    net = nets.Chain()
    with torch.no_grad():
        for weight in (net.conv1.weight, net.norm1.weight, net.conv1.bias):
            weight[[2, 5]] *= 1e-3
        net.conv2.weight[:, [2, 5]] *= 1e-3
        net.conv1.weight[5] += 1e-4  # not the geometric median of the others
    prunable = find_groups(net, [IMAGES])
    if name in GRADIENTS:
        gather_gradients(prunable.module, batches(), loss, kind=GRADIENTS[name])
    scores = {one.name: one.scores for one in prunable.score(IMPORTANCE[name])}["conv1"]
    assert scores.shape == (8,)
    if name not in ("random", "fpgm"):
        assert set(np.argsort(scores)[:2]) == {2, 5}
    normalized = {one.name: one.scores for one in prunable.score(IMPORTANCE[name], normalize=True)}["conv1"]
    np.testing.assert_allclose(normalized, scores / scores.mean(), rtol=1e-12)


def test_criteria_of_users() -> None:
    prunable = find_groups(nets.Chain(), [IMAGES])
    groups = prunable.score(lambda one: torch.arange(one.units))
    assert groups[0].scores.tolist() == list(range(8)) and prunable.groups is groups
    with pytest.raises(
        DataError, match=r"importance of group 'conv1' is of shape \(9,\); expected a finite score for each of 8"
    ):
        prunable.score(lambda one: torch.zeros(one.units + 1))
    with pytest.raises(DataError, match="numbers that are not finite"):
        prunable.score(lambda one: torch.full((one.units,), torch.nan))


def test_squares_are_squares() -> None:
    only = TensorGroup("conv", 3, 1, (group().parts[0],))
    torch.testing.assert_close(l2(only) * (50 / 3), torch.tensor([5.0, 9.0, 36.0], dtype=torch.float64))
