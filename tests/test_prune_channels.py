"""Cut graphs compute what they computed with those channels silenced, at the cost foretold."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from edgekit.errors import GraphError
from edgekit.graph.channel_groups import channel_groups
from edgekit.graph.operators import dims
from edgekit.passes.prune_channels import masked, prune_channels
from graphs import normal, run
from networks import Net, mixed_net, residual_net, token_net
from prune_graphs import array_of, cut, head, inferred, made, picture, random_choice, random_network, shapes
from transformer_graphs import HEADS, SIZE, WIDTH, bert, vit

GRAPHS = 25


@settings(
    max_examples=GRAPHS,
    derandomize=True,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(seed=st.integers(0, 100_000), share=st.sampled_from([0.01, 0.3, 0.5, 0.8]))
def test_random_networks_compute_what_the_masked_ones_do(seed: int, share: float) -> None:
    model = random_network(seed, steps=12)
    channels = channel_groups(model)
    cut(model, channels, random_choice(channels, seed, share), batches=(2,))
    assert channels.groups


def test_constants_shrink_on_the_side_of_makers_and_of_readers() -> None:
    net = Net()
    x = net.conv_relu(net.conv_relu(picture(net), "a", 3, 8), "b", 8, 6)
    model = made(net, head(net, x, 6))
    channels = channel_groups(model)
    pruned = cut(model, channels, {"a": np.array([1, 4, 7]), "b": np.array([0, 5])})
    assert shapes(pruned) == {
        "a.weight": (3, 3, 3, 3),
        "a.bias": (3,),
        "b.weight": (2, 3, 3, 3),
        "b.bias": (2,),
        "head.weight": (5, 2),
        "head.bias": (5,),
    }
    expected = array_of(model, "b.weight")[[0, 5]][:, [1, 4, 7]]
    np.testing.assert_array_equal(array_of(pruned, "b.weight"), expected)
    assert all(one.name == other.name for one, other in zip(model.graph, pruned.graph, strict=True))


def test_the_mask_leaves_the_graph_whole() -> None:
    net = Net()
    model = made(net, head(net, net.conv_relu(picture(net), "a", 3, 4), 4))
    whole = masked(model, channel_groups(model), {"a": np.array([0, 2])})
    expected = array_of(model, "head.weight") * np.array([1, 0, 1, 0], np.float32)
    np.testing.assert_array_equal(array_of(whole, "head.weight"), expected)
    np.testing.assert_array_equal(array_of(whole, "a.weight"), array_of(model, "a.weight"))


def test_all_units_kept_is_the_same_model() -> None:
    net = Net()
    model = made(net, head(net, net.conv_relu(picture(net), "a", 3, 4), 4))
    pruned = cut(model, channel_groups(model), {"a": np.arange(4)})
    assert {k: v.const_value for k, v in pruned.graph.initializers.items()} == {
        k: v.const_value for k, v in model.graph.initializers.items()
    }


def test_a_depthwise_layer_has_fewer_groups() -> None:
    net = Net()
    y = net.conv(net.conv_relu(picture(net), "a", 3, 6), "depthwise", 6, 12, group=6)
    model = made(net, head(net, y, 12))
    pruned = cut(model, channel_groups(model), {"a": np.array([0, 3, 4, 5])})
    [node] = [node for node in pruned.graph if node.name == "depthwise"]
    assert node.attributes["group"].as_int() == 4
    assert shapes(pruned)["depthwise.weight"] == (8, 1, 3, 3)


@pytest.mark.parametrize("network", [residual_net, mixed_net, token_net])
def test_networks_of_other_tests(network: Callable[[], ir.Model]) -> None:
    model = inferred(network())
    channels = channel_groups(model)
    assert channels.groups
    cut(model, channels, random_choice(channels, 0))


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_transposed_convolutions(groups: int) -> None:
    net = Net()
    x = net.conv_relu(picture(net), "a", 3, 6)
    inputs = [x, net.weight("up.weight", 6, 12 // groups, 2, 2), net.weight("up.bias", 12)]
    y = net.op("ConvTranspose", inputs, "up", kernel_shape=[2, 2], strides=[2, 2], group=groups)
    model = made(net, head(net, y, 12))
    channels = channel_groups(model)
    pruned = cut(model, channels, {"a": np.array([1, 2]), **({"up": np.arange(5)} if groups < 6 else {})})
    assert shapes(pruned)["up.weight"] == {1: (2, 5, 2, 2), 2: (4, 5, 2, 2), 6: (2, 2, 2, 2)}[groups]


def test_padded_shortcuts_pad_as_many_channels_as_are_left() -> None:
    net = Net()
    x = net.conv_relu(picture(net), "narrow", 3, 4)
    short = net.slice(x, "slice", starts=[0, 0], ends=[99, 99], axes=[2, 3], steps=[2, 2])
    short = net.pad(short, "pad", [0, 2, 0, 0, 0, 2, 0, 0])
    y = net.op("Add", [net.conv(x, "wide", 4, 8, strides=[2, 2]), short], "add")
    model = made(net, head(net, y, 8))
    # Of "wide", units 0 and 1 are padded before, 2 and 3 behind.
    pruned = cut(model, channel_groups(model), {"narrow": np.array([0, 2, 3]), "wide": np.array([1, 2, 3])})
    [node] = [node for node in pruned.graph if node.op_type == "Pad"]
    assert array_of(pruned, node.inputs[1].name).tolist() == [0, 1, 0, 0, 0, 2, 0, 0]
    assert "pad.pads" not in pruned.graph.initializers


def test_ranges_of_channels_move() -> None:
    net = Net()
    x = net.conv_relu(picture(net), "a", 3, 10)
    y = net.slice(x, "slice", starts=[3, 1], ends=[-1, 99], axes=[1, 2], steps=[1, 1])
    model = made(net, head(net, net.conv(y, "b", 6, 4), 4), head_of_all(net, x))
    channels = channel_groups(model)
    assert {group.name: group.units for group in channels.groups} == {"a": 4, "a:2": 6, "b": 4}
    pruned = cut(model, channels, {"a": np.array([1, 3]), "a:2": np.array([0, 5])})
    [node] = [node for node in pruned.graph if node.op_type == "Slice"]
    assert [array_of(pruned, value.name).tolist() for value in node.inputs[1:3]] == [[1, 1], [3, 99]]


def head_of_all(net: Net, x: str) -> str:
    return net.op("Conv", [x, net.weight("all.weight", 2, 10, 1, 1)], "all", kernel_shape=[1, 1])


@pytest.mark.parametrize("batch", [0, -1])
def test_flattened_pictures_are_read_channel_by_channel(batch: int) -> None:
    net = Net()
    x = net.conv_relu(picture(net), "a", 3, 4)
    model = made(net, net.gemm(net.reshape(x, "flat", batch, 4 * 36), "head", 4 * 36, 5))
    pruned = cut(model, channel_groups(model), {"a": np.array([0, 3])})
    assert shapes(pruned)["head.weight"] == (5, 72)
    [node] = [node for node in pruned.graph if node.op_type == "Reshape"]
    assert array_of(pruned, node.inputs[1].name).tolist() == [batch, 72]


@pytest.mark.parametrize("bias", [(6,), (1, 6), (1,), ()])
def test_a_gemm_s_bias_goes_with_its_columns(bias: tuple[int, ...]) -> None:
    net = Net()
    x = net.input("x", ["n", 4])
    y = net.op("Gemm", [x, net.weight("w", 4, 6), net.constant("bias", np.full(bias, 0.5, np.float32))], "a")
    model = made(net, net.gemm(net.op("Tanh", [y], "tanh"), "b", 6, 3))
    pruned = cut(model, channel_groups(model), {"a": np.array([1, 5])})
    assert shapes(pruned)["w"] == (4, 2)
    assert shapes(pruned)["bias"] == tuple(2 if size == 6 else size for size in bias)


@pytest.mark.parametrize("way", ["Gather", "Slice", "Cast"])
def test_shapes_that_are_put_together_when_the_model_runs(way: str) -> None:
    net = Net()
    x = net.conv_relu(picture(net), "a", 3, 4)
    size = net.op("Shape", [x], "shape")
    if way == "Gather":
        batch = net.op("Gather", [size, net.constant("zero", np.array([0]))], "batch")
    else:
        size = net.op("Cast", [size], "cast", to=TensorProto.INT32) if way == "Cast" else size
        batch = net.op(
            "Slice", [size, net.constant("zero", np.array([0])), net.constant("one", np.array([1]))], "batch"
        )
        batch = net.op("Cast", [batch], "back", to=TensorProto.INT64)
    given = net.op("Concat", [batch, net.constant("rest", np.array([4 * 36]))], "given", axis=0)
    model = made(net, net.gemm(net.op("Reshape", [x, given], "flat"), "head", 4 * 36, 5))
    flat = next(value for node in model.graph for value in node.outputs if value.name == "flat_y")
    flat.shape = ir.Shape(["n", 144])
    channels = channel_groups(model)
    assert [group.name for group in channels.groups] == ["a"]
    choice = {"a": np.array([1, 2, 3])}
    pruned = prune_channels(model, channels, choice)
    for n in (1, 4):
        feeds = {"x": normal(n, 3, 6, 6)}
        expected = run(masked(model, channels, choice), feeds)["head_y"]
        np.testing.assert_allclose(run(pruned, feeds)["head_y"], expected, atol=1e-5)


@pytest.mark.parametrize("length", ["s", 10])
def test_heads_of_attention(length: int | str) -> None:
    model = inferred(bert(length=length))
    channels = channel_groups(model)
    choice = {"layer0.query": np.array([1, 3]), "layer1.query": np.array([0]), "layer1.up": np.arange(7)}
    for n in (1, 3):
        feeds = {"x": normal(n, 10, WIDTH), "attention_mask": np.ones((n, 10), np.int64)}
        expected = run(masked(model, channels, choice), feeds)["head_y"]
        found = run(prune_channels(model, channels, choice), feeds)["head_y"]
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
    pruned = shapes(prune_channels(model, channels, choice))
    assert pruned["layer0.key.weight"] == (WIDTH, 2 * SIZE)
    assert pruned["layer0.out.weight"] == (2 * SIZE, WIDTH)
    assert pruned["layer0.norm.gain"] == (WIDTH,)


def test_heads_of_queries_keys_and_values_in_one_product() -> None:
    model = inferred(vit())
    channels = channel_groups(model)
    pruned = cut(model, channels, {"qkv": np.array([0, 2, 3])})
    assert shapes(pruned)["qkv.weight"] == (WIDTH, 3 * 3 * SIZE)
    assert HEADS == 4


@pytest.mark.parametrize(
    ("make", "units"),
    [
        (lambda net, x: net.op("PRelu", [x, net.weight("slope", 8, 1, 1)], "prelu"), 8),
        (lambda net, x: net.op("Mul", [net.weight("factor", 1, 8, 1, 1), x], "mul"), 8),
        (lambda net, x: net.op("Sub", [net.weight("offsets", 8, 6, 1), x], "sub"), 8),
        (lambda net, x: net.clip(x, "clip", 0.0, 6.0), 8),
        (lambda net, x: net.batchnorm(x, "norm", 8), 8),
        (lambda net, x: net.op("InstanceNormalization", [x, net.weight("s", 8), net.weight("b", 8)], "norm"), 8),
        (lambda net, x: net.op("Softmax", [x], "softmax", axis=3), 8),
        (lambda net, x: net.op("Resize", [x, "", net.constant("by", np.array([1, 1, 2, 2], np.float32))], "up"), 8),
        (lambda net, x: net.pad(x, "pad", [0, 0, 1, 1, 0, 0, 1, 1], mode="reflect"), 8),
        (lambda net, x: net.op("Expand", [x, net.constant("to", np.array([1, 8, 1, 1]))], "expand"), 8),
        (lambda net, x: net.pad(x, "pad", [0, 0, 0, 0, 0, -1, 0, 0]), 0),
    ],
)
def test_what_channels_pass_through(make: Callable[[Net, str], str], units: int) -> None:
    net = Net()
    y = net.conv(make(net, net.conv(picture(net), "a", 3, 8)), "b", 8 if units else 7, 4)
    model = made(net, head(net, y, 4))
    channels = channel_groups(model)
    assert {group.name: group.units for group in channels.groups} == ({"a": 8} if units else {}) | {"b": 4}
    cut(model, channels, random_choice(channels, 1))


def test_a_table_of_words_gets_narrower() -> None:
    net = Net()
    rows = net.op("Gather", [net.weight("table", 20, 8), net.input("ids", ["n", 4], TensorProto.INT64)], "words")
    model = made(net, net.matmul(net.op("Relu", [rows], "relu"), "out", 8, 3))
    assert shapes(cut(model, channel_groups(model), {"words": np.array([2, 6])}))["table"] == (20, 2)


def test_half_precision_stays_half_precision() -> None:
    net = Net()
    x = net.input("x", ["n", 6], TensorProto.FLOAT16)
    for name, rows, columns in (("a", 6, 8), ("b", 8, 3)):
        weight = net.rng.normal(0, 0.3, (rows, columns)).astype(np.float16)
        x = net.op("MatMul", [x, net.constant(f"{name}.weight", weight)], name)
    model = ir.from_proto(net.proto(x, dtypes={x: TensorProto.FLOAT16}))
    for value in (value for node in model.graph for value in node.outputs):
        value.shape = ir.Shape(["n", 8 if value.name == "a_y" else 3])
    pruned = prune_channels(model, channel_groups(model), {"a": np.arange(5)})
    assert array_of(pruned, "a.weight").dtype == np.float16
    assert dims(next(iter(pruned.graph)).outputs[0]) == (None, 5)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"b": np.arange(2)}, "no group of channels is called 'b'; known: a"),
        ({"a": np.arange(0)}, "'a' would keep none of its 4 channels; keep at least one"),
        ({"a": np.array([1, 4])}, "'a' has units 0 to 3; it cannot keep 4"),
    ],
)
def test_impossible_choices(choice: dict[str, np.ndarray], message: str) -> None:
    net = Net()
    model = made(net, head(net, net.conv_relu(picture(net), "a", 3, 4), 4))
    with pytest.raises(GraphError, match=message):
        prune_channels(model, channel_groups(model), choice)
