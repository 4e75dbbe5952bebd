"""A module as a graph that can be trained: it computes the same, is called the same, and its modes are alive."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekit.errors import SourceError
from edgekit.training.capture import capture


def images(count: int = 2, size: int = 8, channels: int = 3) -> tuple[np.ndarray, ...]:
    return (np.random.default_rng(0).normal(0, 1, (count, channels, size, size)).astype(np.float32),)


def shaken(module: nn.Module) -> nn.Module:
    """With BatchNorms that do something."""
    torch.manual_seed(1)
    for child in module.modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(child.weight, 0.5, 2)
            nn.init.normal_(child.bias)
            child.running_mean.normal_()
            child.running_var.uniform_(0.5, 2)
    return module.eval()


class Everything(nn.Module):
    """In-place operators, a residual, attention, Dropout, BatchNorms of two kinds, nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.drop, self.head, self.last = nn.Dropout(0.5), nn.Linear(8, 10), nn.BatchNorm1d(10)

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Any]:
        y = F.relu_(self.bn(self.conv(x)))
        z = self.second(y)
        z += y
        z = F.relu_(z)
        tokens = z.flatten(2).transpose(1, 2)
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        pooled = self.drop(tokens.mean(1))
        return {"scores": self.last(self.head(pooled)), "rest": (pooled, [tokens])}


def test_a_captured_graph_is_the_module_in_another_form() -> None:
    module = shaken(Everything())
    before = {name: value.clone() for name, value in module.state_dict().items()}
    graph = capture(module, images())
    x = torch.randn(5, 3, 8, 8)
    for call in (lambda m: m(x), lambda m: m(x=x)):
        ours, theirs = call(graph), call(module)
        assert (
            list(ours) == ["scores", "rest"] and isinstance(ours["rest"], tuple) and isinstance(ours["rest"][1], list)
        )
        torch.testing.assert_close(ours["scores"], theirs["scores"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours["rest"][1][0], theirs["rest"][1][0], rtol=1e-5, atol=1e-6)
    names = {name for name, _ in graph.named_parameters()}
    assert names == {name for name, _ in module.named_parameters() if "bn" not in name and "last" not in name} | {
        "conv.bias"
    }
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    with pytest.raises(SourceError, match="'scale'"):
        graph(x, scale=2.0)


def test_modes_are_alive() -> None:
    graph = capture(Everything().train(), images())
    x = torch.randn(64, 3, 8, 8)
    assert not graph.training
    calm = graph(x)["rest"][0]
    assert (calm == 0).float().mean() < 0.1
    dropped = graph.train()(x)["rest"][0]
    assert 0.3 < (dropped == 0).float().mean() < 0.7
    torch.testing.assert_close(graph.eval()(x)["rest"][0], calm)
    torch.testing.assert_close(copy.deepcopy(graph)(x)["rest"][0], calm)


def test_it_trains() -> None:
    torch.manual_seed(0)
    graph = capture(Everything(), images()).eval()  # without Dropout, whose half of eight features is noise
    optimizer = torch.optim.Adam(graph.parameters(), 1e-2)
    x, labels = torch.randn(32, 3, 8, 8), torch.arange(32) % 10
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(graph(x)["scores"], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert all(parameter.grad is not None for parameter in graph.parameters())


def test_a_batchnorm_that_no_layer_takes_in_obeys_train_and_freezes() -> None:
    module = shaken(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)))
    graph = capture(module, images())
    x = torch.randn(64, 3, 8, 8) * 3 + 5
    torch.testing.assert_close(graph(x), module(x))
    torch.testing.assert_close(graph.train()(x), module.train()(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(graph.get_buffer("1.running_mean"), module[1].running_mean)
    [norm] = [child for child in graph.modules() if type(child).__name__ == "_BatchNorm"]
    norm.freeze()
    before = graph.get_buffer("1.running_mean").clone()
    torch.testing.assert_close(graph(x), module.eval()(x))
    assert torch.equal(graph.get_buffer("1.running_mean"), before)


class Shared(nn.Module):
    """One layer in two places, with a BatchNorm behind one of them, and a weight that two layers have."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.other = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1)
        self.other.weight = self.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.conv(self.bn(self.conv(x))))


def test_a_batchnorm_stays_where_its_layer_is_used_elsewhere_too() -> None:
    module = shaken(Shared())
    graph = capture(module, images())
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(graph(x), module(x), rtol=1e-4, atol=1e-5)
    assert sum(1 for _ in graph.parameters()) == sum(1 for _ in module.parameters())


@pytest.mark.parametrize(
    "layers",
    [
        (nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6)),
        (nn.ConvTranspose1d(3, 6, 3), nn.BatchNorm1d(6)),
        (nn.Conv1d(3, 6, 3, groups=3, bias=False), nn.BatchNorm1d(6, affine=False)),
    ],
    ids=["conv", "transposed", "grouped"],
)
def test_batchnorms_of_one_dimension_fold(layers: tuple[nn.Module, ...]) -> None:
    module = nn.Sequential(*layers).eval()
    module[1].running_mean.normal_()
    module[1].running_var.uniform_(0.5, 2)
    x = np.random.default_rng(0).normal(0, 1, (2, 3, 16)).astype(np.float32)
    graph = capture(module, (x,))
    assert not [node for node in graph.graph.nodes if "norm" in node.name]
    torch.testing.assert_close(graph(torch.from_numpy(x)), module(torch.from_numpy(x)), rtol=1e-4, atol=1e-5)


def test_taps_show_what_layers_make() -> None:
    module = shaken(Everything())
    graph = capture(module, images(), taps=("second", "attention"))
    seen: dict[str, Tensor] = {}
    for name in ("second", "attention"):
        tap = graph.get_submodule(f"taps.{name}")
        tap.register_forward_hook(lambda module, args, result, name=name: seen.__setitem__(name, result))
    x = torch.randn(3, 3, 8, 8)
    graph(x)
    wanted: dict[str, Any] = {}
    module.second.register_forward_hook(lambda module, args, result: wanted.__setitem__("second", result.clone()))
    module.attention.register_forward_hook(lambda module, args, result: wanted.__setitem__("attention", result[0]))
    module(x)
    torch.testing.assert_close(seen["second"], wanted["second"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen["attention"], wanted["attention"], rtol=1e-4, atol=1e-5)
    with pytest.raises(SourceError, match="did you mean 'second'"):
        capture(module, images(), taps=("secnd",))


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:
            return x + 1
        return x * 2


def test_what_cannot_be_captured_names_its_line() -> None:
    with pytest.raises(
        SourceError, match=r"branches on the values in a tensor .*test_capture.py, line \d+.*torch.where"
    ):
        capture(Branches(), images())
