"""Reading features of modules and captured graphs, and finding the layers of two networks that belong together."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekit.errors import SourceError
from edgekit.training.taps import FEATURE, Taps, channel_axis, match_layers, outputs_of, stages


class Block(nn.Module):
    """Widens before it goes to the next resolution, as mobile networks do."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.expand = nn.Conv2d(inputs, 4 * inputs, 1)
        self.shrink = nn.Conv2d(4 * inputs, outputs, 3, stride, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shrink(self.expand(x)))


class Cnn(nn.Module):
    """Three resolutions: 8, 4 and 2 for images of 8."""

    def __init__(self, width: int, depth: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.Sequential(
            *(Block(width, width) for _ in range(depth)), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2)
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(4 * width, 5)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.pool(self.blocks(self.stem(image))).flatten(1))


class Attending(nn.Module):
    """A transformer's block, whose attention is a module with an output of shape (N, heads, T, T)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.weights = nn.Softmax(-1)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (part.unflatten(2, (2, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, 2))
        weights = self.weights(q @ k.transpose(2, 3))
        x = x + (weights @ v).transpose(1, 2).flatten(2)
        return x + self.mlp(x), weights


class Transformer(nn.Module):
    """Patches of an image, blocks, a norm."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.layers = nn.ModuleList(Attending(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x, _ = layer(x)
        return self.head(self.norm(x).mean(1))


def images(count: int = 3, size: int = 8) -> dict[str, Tensor]:
    return {"image": torch.randn((count, 1, size, size), generator=torch.Generator().manual_seed(0))}


def test_features_are_what_layers_put_out_and_gradients_flow_through_them() -> None:
    torch.manual_seed(0)
    network, batch = Cnn(2), images()
    with Taps(network, ["blocks.0", "stem", "stem"]) as taps:
        outputs = outputs_of(network, batch, taps)
    assert list(outputs) == ["output", FEATURE + "blocks.0", FEATURE + "stem"]
    stem = network.stem(batch["image"])
    torch.testing.assert_close(outputs[FEATURE + "stem"], stem, rtol=0, atol=0)
    torch.testing.assert_close(outputs[FEATURE + "blocks.0"], network.blocks[0](stem), rtol=0, atol=0)
    torch.autograd.backward(outputs[FEATURE + "blocks.0"].sum())
    assert network.stem.weight.grad is not None and network.head.weight.grad is None


def test_features_are_given_once_and_hooks_go_when_it_closes() -> None:
    network = Cnn(2)
    with Taps(network, ["stem"]) as taps:
        network(**images())
        assert list(taps.take()) == [FEATURE + "stem"]
        with pytest.raises(SourceError, match="the model's layer 'stem' did not run in forward"):
            taps.take()
        network(**images())
    assert not network.stem._forward_hooks
    with pytest.raises(SourceError, match="did not run"):
        taps.take()


def test_what_the_next_operator_overwrites_was_recorded_before() -> None:
    network = nn.Sequential(OrderedDict(linear=nn.Linear(4, 4), relu=nn.ReLU(inplace=True), head=nn.Linear(4, 2)))
    x = torch.randn(6, 4)
    with Taps(network, ["linear"]) as taps:
        network(x)
        assert (taps.take()[FEATURE + "linear"] < 0).any()


def test_of_several_tensors_it_is_the_first_and_of_several_runs_the_last() -> None:
    class Looped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(self.lstm(x)[0])[0]

    network, x = Looped(), torch.randn(2, 3, 4)
    with Taps(network, ["lstm"]) as taps:
        y = network(x)
        torch.testing.assert_close(taps.take()[FEATURE + "lstm"], y, rtol=0, atol=0)


class Captured(nn.Module):
    """As a graph of operators is: modules that hold parameters and do not run, and taps."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.taps = nn.ModuleDict({"stem": nn.Identity(), "blocks__1": nn.Identity()})
        self.quantizers = nn.ModuleDict({"mean": nn.ReLU6()})

    def forward(self, image: Tensor) -> Tensor:
        x = self.taps["stem"](F.conv2d(image, self.stem.weight, self.stem.bias, padding=1))
        return self.quantizers["mean"](self.taps["blocks__1"](F.avg_pool2d(x, 2))).mean((2, 3))


def test_in_a_captured_graph_the_taps_are_read_by_the_layers_names() -> None:
    torch.manual_seed(0)
    graph, batch = Captured(2), images()
    with Taps(graph, ["blocks.1", "stem"]) as taps:
        features = outputs_of(graph, batch, taps)
    stem = graph.stem(batch["image"])
    torch.testing.assert_close(features[FEATURE + "stem"], stem)
    torch.testing.assert_close(features[FEATURE + "blocks.1"], F.avg_pool2d(stem, 2))
    with pytest.raises(SourceError, match=r"'block.1'; did you mean 'blocks.1'"):
        Taps(graph, ["block.1"])


def test_stages_of_a_captured_graph_are_its_taps() -> None:
    assert match_layers(Captured(2), Cnn(4), images()) == (("stem", "blocks.0"), ("blocks.1", "blocks.1"))


def test_a_layer_that_does_not_run_is_named() -> None:
    graph = Captured(2)
    graph.forward = lambda image: image.mean((2, 3))  # type: ignore[method-assign]
    with Taps(graph, ["stem"], who="student") as taps, pytest.raises(SourceError) as caught:
        outputs_of(graph, images(), taps)
    assert "the student's layer 'stem' did not run in forward" in str(caught.value)
    assert "a captured graph has only those that it was captured with" in str(caught.value)


def test_a_plain_module_may_have_layers_called_taps() -> None:
    network = nn.Sequential(OrderedDict(taps=nn.Sequential(nn.Linear(4, 4)), head=nn.Linear(4, 2)))
    with Taps(network, ["taps.0"]) as taps:
        network(torch.zeros(2, 4))
        assert taps.take()[FEATURE + "taps.0"].shape == (2, 4)


def test_wrappers_are_looked_through() -> None:
    network = Cnn(2)
    wrapped = torch.optim.swa_utils.AveragedModel(network)
    with Taps(wrapped, ["stem"]) as taps:
        assert outputs_of(wrapped, images(), taps)[FEATURE + "stem"].shape == (3, 2, 8, 8)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("block.1", "no layer of the student is called 'block.1'; did you mean 'blocks.1'?"),
        ("zzz", "no layer of the student is called 'zzz'; known: stem, blocks, blocks.0"),
        ("", "no layer of the student is called ''"),
    ],
)
def test_unknown_layers_are_suggested(layer: str, message: str) -> None:
    with pytest.raises(SourceError) as caught:
        Taps(Cnn(2), [layer], who="student")
    assert message in str(caught.value)


def test_inputs_go_by_name_or_in_order_and_labels_only_where_they_are_needed() -> None:
    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor, labels: Tensor | None = None) -> Tensor:
            assert labels is None
            return a - b

    class Needing(nn.Module):
        def forward(self, a: Tensor, labels: Tensor) -> Tensor:
            return a + labels

    one, two = torch.ones(2, 1), torch.full((2, 1), 2.0)
    labels = torch.zeros(2, 1)
    assert float(outputs_of(Two(), {"b": two, "a": one, "labels": labels})["output"][0]) == -1
    assert float(outputs_of(Two(), {"x": two, "y": one, "labels": labels})["output"][0]) == 1
    assert float(outputs_of(Needing(), {"a": two, "labels": labels})["output"][0]) == 2
    with pytest.raises(SourceError, match=r"the inputs \(x\) do not fit Two.forward.*missing a required argument: 'b'"):
        outputs_of(Two(), {"x": one})


def test_a_cnn_s_stages_end_at_blocks_not_within_the_next_one() -> None:
    network = Cnn(2, depth=2)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert stages(network.train(), images()) == {(8, 8): "blocks.1", (4, 4): "blocks.2", (2, 2): "blocks"}
    assert network.training and all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_networks_of_other_depth_meet_by_resolution() -> None:
    pairs = match_layers(Cnn(2), Cnn(4, depth=3), images())
    assert pairs == (("blocks.0", "blocks.2"), ("blocks.1", "blocks.3"), ("blocks", "blocks"))


def test_without_a_common_resolution_they_meet_from_the_last() -> None:
    odd = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 4, 4), nn.Flatten(), nn.Linear(36, 5))  # 6 and 3
    assert match_layers(odd, Cnn(2), images()) == (("0", "blocks.1"), ("1", "blocks"))


def test_a_transformer_is_one_stage_and_its_patches_and_attention_are_none() -> None:
    assert match_layers(Transformer(8, 2), Transformer(16, 4), images()) == (("norm", "norm"),)


def test_stages_of_perceptrons_and_of_rows() -> None:
    perceptron = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    assert stages(perceptron, {"x": torch.zeros(2, 4)}) == {(): "3"}
    rows = nn.Sequential(
        nn.Conv1d(1, 4, 3, 2, 1), nn.ReLU(), nn.Conv1d(4, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten()
    )
    assert stages(rows, {"x": torch.zeros(2, 1, 16)}) == {(8,): "1", (4,): "3"}


def test_networks_without_stages_and_those_that_do_not_run_are_explained() -> None:
    with pytest.raises(
        SourceError,
        match="no layer of the teacher gives features between its inputs and outputs; name layers in 'pairs'",
    ):
        match_layers(Cnn(2), nn.Sequential(nn.Flatten(0)), images())
    with pytest.raises(SourceError, match="the student does not run on the batch: RuntimeError"):
        match_layers(Cnn(2), Cnn(2), {"image": torch.zeros(2, 3, 8, 8)})


@pytest.mark.parametrize(
    ("shapes", "others", "axis"),
    [
        ([(2, 8)], [(2, 16)], 1),
        ([(2, 8, 4, 4)], [], 1),
        ([(2, 9, 8)], [], 2),
        ([(2, 9, 8)], [(2, 9, 16)], 2),  # tokens of another width
        ([(2, 8, 9)], [(2, 16, 9)], 1),  # channels of rows
        ([(2, 4, 16), (2, 8, 8)], [], 1),  # rows that get shorter
        ([(2, 16, 4), (2, 4, 8)], [], 2),  # tokens that get fewer
        ([(2, 8, 8, 16), (2, 4, 4, 32)], [], 3),  # images, channels last
        ([(2, 8, 8, 16)], [(2, 8, 8, 64)], 3),
        ([(2, 8, 8, 16)], [(2, 16, 8, 16)], 1),
        ([(2, 16, 8, 8)], [(2, 16, 4, 4)], 1),
    ],
)  # fmt: skip
def test_channels_are_where_networks_differ_or_grow(
    shapes: list[tuple[int, ...]], others: list[tuple[int, ...]], axis: int
) -> None:
    assert channel_axis(shapes, others) == axis
