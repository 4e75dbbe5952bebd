"""Channels last in memory while training: where a module's code allows it, and gone when it ends."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import edgekit
from edgekit.distillation import Distillation
from edgekit.finetune import Finetune
from edgekit.schedule import Schedule
from edgekit.training.memory_format import channels_last

FORMATS: list[bool] = []
"""Whether channels were last in what the first convolution made, call by call."""


class Net(nn.Module):
    def __init__(self, *, views: bool) -> None:
        super().__init__()
        self.views = views
        self.first, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8 * 6 * 6, 4)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.first(image))
        if self.training:
            FORMATS.append(x.is_contiguous(memory_format=torch.channels_last))
        return self.head(x.view(x.shape[0], -1) if self.views else x.flatten(1))


@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("distill", [None, Distillation(kind=("response", "feature"))])
@pytest.mark.parametrize("qat", [False, True])
def test_a_module_trains_with_channels_last_unless_its_code_forbids_it(
    views: bool, distill: Distillation | None, qat: bool, tmp_path: Path
) -> None:
    FORMATS.clear()
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    data = {"image": rng.normal(size=(32, 3, 8, 8)).astype(np.float32), "labels": rng.integers(0, 4, 32)}
    net = Net(views=views)
    before = net.first.weight.detach().clone()
    plan = Finetune(
        qat=qat, data=data, distill=distill, schedule=Schedule(steps=3, batch_size=8, learning_rate=1e-2, track="none")
    )
    edgekit.compress(net, tmp_path / "out", calibration={"image": data["image"]}, finetune=plan)
    if not qat:  # the graph that is rounded is not the module's code any more
        assert set(FORMATS) == {not views}
    assert net.first.weight.is_contiguous()
    assert torch.equal(net.first.weight, before)


def test_training_computes_the_same_in_both_formats() -> None:
    net, image = Net(views=False).double(), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    plain = torch.autograd.grad(net(image).square().sum(), list(net.parameters()))
    with channels_last([net], {"image": image}):
        assert net.first.weight.is_contiguous(memory_format=torch.channels_last)
        fast = torch.autograd.grad(net(image).square().sum(), list(net.parameters()))
    assert net.first.weight.is_contiguous()
    for one, other in zip(plain, fast, strict=True):
        torch.testing.assert_close(one, other)


class Auxiliary(nn.Module):
    """Asks for its own format only where it trains; normalizes, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn, self.calls = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), 0

    def forward(self, image: Tensor) -> Tensor:
        self.calls += 1
        x = self.bn(self.first(image))
        return x.view(x.shape[0], -1) if self.training else x.flatten(1)


@pytest.mark.parametrize("count", [1, 4])
def test_what_only_training_asks_for_counts_and_trying_leaves_no_trace(count: int) -> None:
    net, image = Auxiliary().train(), torch.randn(count, 3, 8, 8)
    statistics = net.bn.running_mean.clone()
    with channels_last([net], {"image": image}):
        assert net.first.weight.is_contiguous()
        net(image)
    assert net.calls == 1 and net.training
    fresh = Auxiliary().train()
    with channels_last([fresh], {"image": image}):
        pass
    assert torch.equal(fresh.bn.running_mean, statistics) and fresh.calls == 0


def test_modules_without_images_are_left_alone() -> None:
    net = nn.Sequential(nn.Conv1d(3, 4, 3), nn.Flatten(), nn.Linear(24, 2))
    strides = [one.stride() for one in net.parameters()]
    with channels_last([net], {"input": torch.randn(2, 3, 8)}):
        assert [one.stride() for one in net.parameters()] == strides
