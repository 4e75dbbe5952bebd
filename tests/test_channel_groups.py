"""Which channels go together is known for these graphs, and why others stay."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from edgekit.channels import kept_shares, total_macs
from edgekit.errors import GraphError
from edgekit.graph.annotations import set_params
from edgekit.graph.channel_groups import Channels, channel_groups
from edgekit.graph.filter_scores import fpgm
from edgekit.quant.spec import QuantParams
from networks import Net
from prune_graphs import array_of, head, inferred, made, picture
from transformer_graphs import FEED_FORWARD, HEADS, SIZE, bert, vit


def members(channels: Channels) -> dict[str, tuple[int, int, tuple[str, ...]]]:
    """Of each group how many units, channels of each, and who makes them."""
    return {group.name: (group.units, group.width, group.makers) for group in channels.groups}


def test_a_chain_has_a_group_for_each_layer_but_the_last() -> None:
    net = Net()
    x = net.conv_relu(net.conv_relu(picture(net), "a", 3, 8), "b", 8, 6)
    channels = channel_groups(made(net, head(net, x, 6)))
    assert members(channels) == {"a": (8, 1, ("a",)), "b": (6, 1, ("b",))}
    assert channels.fixed == {"head": "graph output 'head_y'"}
    a, b, last = channels.costs
    assert (a.name, a.macs, a.channels, a.reads, a.makes) == ("a", 8 * 36 * 27, (3, 8), (), (("a", 1.0),))
    assert (b.macs, b.parameters, b.reads, b.makes) == (6 * 36 * 72, 6 * 72 + 6, (("a", 1.0),), (("b", 1.0),))
    assert (last.macs, last.channels, last.reads, last.makes) == (30, (6, 5), (("b", 1.0),), ())


def test_what_is_added_goes_together() -> None:
    net = Net()
    x = net.conv_relu(picture(net), "stem", 3, 8)
    y = net.conv(net.conv_relu(x, "inner", 8, 4), "outer", 4, 8)
    channels = channel_groups(made(net, head(net, net.op("Add", [x, y], "add"), 8)))
    assert members(channels) == {"stem": (8, 1, ("stem", "outer")), "inner": (4, 1, ("inner",))}


def test_a_sum_with_an_input_stays_and_the_input_is_named() -> None:
    net = Net()
    x = picture(net, 8)
    y = net.conv(net.conv_relu(x, "inner", 8, 4), "outer", 4, 8)
    channels = channel_groups(made(net, head(net, net.op("Add", [x, y], "add"), 8)))
    assert list(members(channels)) == ["inner"]
    assert channels.fixed["outer"] == "graph input 'x'"


def test_concatenated_channels_keep_their_groups_and_readers_have_shares_of_each() -> None:
    net = Net()
    x = picture(net)
    y = net.op("Concat", [net.conv(x, "a", 3, 4), net.conv(x, "b", 3, 12)], "concat", axis=1)
    channels = channel_groups(made(net, head(net, net.conv(y, "c", 16, 6), 6)))
    assert members(channels) == {"a": (4, 1, ("a",)), "b": (12, 1, ("b",)), "c": (6, 1, ("c",))}
    assert channels.costs[2].reads == (("a", 0.25), ("b", 0.75))
    assert channels.costs[2].shares({"a": 0.5, "b": 1 / 3}) == pytest.approx((0.375, 1.0))


def test_parts_that_go_different_ways_are_groups_of_one_layer() -> None:
    net = Net()
    one, other = net.op("Split", [net.conv(picture(net), "a", 3, 8)], "split", outputs=2, axis=1, num_outputs=2)
    y = net.op("Concat", [other, net.conv(one, "b", 4, 4)], "concat", axis=1)
    channels = channel_groups(made(net, head(net, y, 8)))
    assert members(channels) == {"a": (4, 1, ("a",)), "a:2": (4, 1, ("a",)), "b": (4, 1, ("b",))}
    assert channels.costs[0].makes == (("a", 0.5), ("a:2", 0.5))


def test_a_gate_and_what_it_gates_are_units_of_two() -> None:
    net = Net()
    one, other = net.op("Split", [net.conv(picture(net), "a", 3, 8)], "split", outputs=2, axis=1, num_outputs=2)
    y = net.op("Mul", [one, net.op("Sigmoid", [other], "gate")], "mul")
    channels = channel_groups(made(net, head(net, y, 4)))
    assert members(channels) == {"a": (4, 2, ("a",))}


def test_a_depthwise_layer_makes_the_channels_that_it_reads() -> None:
    net = Net()
    y = net.conv(net.conv_relu(picture(net), "a", 3, 8), "depthwise", 8, 8, group=8)
    channels = channel_groups(made(net, head(net, y, 8)))
    assert members(channels) == {"a": (8, 1, ("a", "depthwise"))}
    assert (channels.costs[1].reads, channels.costs[1].makes) == ((), (("a", 1.0),))


def test_groups_of_a_convolution_lose_as_many_channels_each() -> None:
    net = Net()
    y = net.conv(net.conv_relu(picture(net), "a", 3, 8), "grouped", 8, 12, group=4)
    model = made(net, head(net, y, 12))
    channels = channel_groups(model)
    assert members(channels) == {"a": (2, 4, ("a",)), "grouped": (3, 4, ("grouped",))}
    assert channels.units["a.weight"][0].tolist() == [0, 1] * 4  # type: ignore[union-attr]
    rows = np.abs(array_of(model, "a.weight").astype(np.float64)).reshape(4, 2, -1).sum((0, 2))
    np.testing.assert_allclose(channels.groups[0].scores, rows / rows.mean())


def test_padded_shortcuts_share_the_middle_of_a_wider_stage() -> None:
    """Option A of ResNets for small pictures."""
    net = Net()
    x = net.conv_relu(picture(net), "narrow", 3, 4)
    short = net.slice(x, "slice", starts=[0, 0], ends=[99, 99], axes=[2, 3], steps=[2, 2])
    short = net.pad(short, "pad", [0, 2, 0, 0, 0, 2, 0, 0])
    y = net.op("Add", [net.conv(x, "wide", 4, 8, strides=[2, 2]), short], "add")
    channels = channel_groups(made(net, head(net, y, 8)))
    assert members(channels) == {"narrow": (4, 1, ("narrow", "wide")), "wide": (4, 1, ("wide",))}
    assert channels.units["wide.weight"][0].tolist() == [4, 5, 0, 1, 2, 3, 6, 7]  # type: ignore[union-attr]


def test_a_gate_of_squeeze_and_excitation_goes_with_its_channels() -> None:
    net = Net()
    x = net.conv_relu(picture(net), "a", 3, 8)
    y = net.op("Relu", [net.conv(net.op("GlobalAveragePool", [x], "squeeze"), "down", 8, 2, 1)], "relu")
    gate = net.op("Sigmoid", [net.conv(y, "up", 2, 8, 1)], "gate")
    channels = channel_groups(made(net, head(net, net.op("Mul", [x, gate], "mul"), 8)))
    assert members(channels) == {"a": (8, 1, ("a", "up")), "down": (2, 1, ("down",))}


def test_a_weight_that_two_layers_share_ties_what_they_make() -> None:
    net = Net()
    weight = net.weight("shared", 6, 6, 1, 1)
    x = net.conv_relu(picture(net), "a", 3, 6)
    x = net.op("Conv", [x, weight], "first", kernel_shape=[1, 1])
    x = net.op("Conv", [net.op("Relu", [x], "between"), weight], "second", kernel_shape=[1, 1])
    channels = channel_groups(made(net, head(net, x, 6)))
    assert members(channels) == {"a": (6, 1, ("a", "first", "second"))}


def test_heads_and_hidden_widths_of_a_transformer_are_groups_and_its_stream_stays() -> None:
    channels = channel_groups(inferred(bert()))
    names = ("layer0.query", "layer0.key", "layer0.value")
    assert members(channels)["layer0.query"] == (HEADS, SIZE, names)
    assert members(channels)["layer0.up"] == (FEED_FORWARD, 1, ("layer0.up",))
    assert len(channels.groups) == 4
    assert channels.fixed["layer0.out"] == "graph input 'x'"
    costs = {cost.name: cost for cost in channels.costs}
    assert costs["layer0.scores"].reads == (("layer0.query", 1.0),)
    assert costs["layer0.out"].reads == (("layer0.query", 1.0),)


def test_a_stream_behind_layer_normalization_stays_because_of_it() -> None:
    net = Net()
    x = net.matmul(net.input("x", ["n", 4, 6]), "in", 6, 8)
    scale = net.constant("scale", np.ones(8, np.float32))
    y = net.op("LayerNormalization", [x, scale], "norm", axis=-1)
    channels = channel_groups(made(net, net.matmul(y, "out", 8, 3)))
    assert channels.groups == ()
    assert channels.fixed["in"] == "LayerNormalization 'norm' takes statistics over them"


def test_queries_keys_and_values_of_one_product_are_heads_of_three_parts() -> None:
    channels = channel_groups(inferred(vit()))
    assert members(channels)["qkv"] == (HEADS, 3 * SIZE, ("qkv",))


def test_an_embedding_is_as_wide_as_its_reader_needs() -> None:
    net = Net()
    rows = net.op("Gather", [net.weight("table", 20, 8), net.input("ids", ["n", 4], TensorProto.INT64)], "words")
    channels = channel_groups(made(net, net.matmul(net.op("Relu", [rows], "relu"), "out", 8, 3)))
    assert members(channels) == {"words": (8, 1, ("words",))}
    assert (channels.costs[0].macs, channels.costs[0].parameters) == (0, 160)


@pytest.mark.parametrize(
    ("op_type", "attributes", "reason"),
    [
        ("DepthToSpace", {"blocksize": 2}, "DepthToSpace 'odd' is not followed"),
        ("Softmax", {"axis": 1}, "Softmax 'odd' works across them"),
        ("LpNormalization", {"axis": 1}, "LpNormalization 'odd' works across them"),
        ("ReduceMean", {"axes": [1]}, "ReduceMean 'odd' reduces them"),
        ("Shape", {}, "Shape 'odd' reads how many they are"),
        ("Squeeze", {}, "Squeeze 'odd' takes out whatever is of size 1"),
    ],
)
def test_operators_that_need_all_channels_are_named(op_type: str, attributes: dict[str, object], reason: str) -> None:
    net = Net()
    x = net.conv(picture(net), "a", 3, 8)
    inputs = [x]
    if op_type == "ReduceMean":
        inputs.append(net.constant("axes", np.array(attributes.pop("axes"))))
    net.op(op_type, inputs, "odd", **attributes)
    dtypes = {"odd_y": TensorProto.INT64} if op_type == "Shape" else None
    model = inferred(ir.from_proto(net.proto("odd_y", head(net, x, 8), dtypes=dtypes)))
    found = channel_groups(model)
    assert found.groups == ()
    assert found.fixed["a"] == reason


def test_axes_of_unknown_size_keep_what_is_added_to_them() -> None:
    net = Net()
    y = net.op("Add", [net.gemm(net.input("x", ["n", 4]), "a", 4, 8), net.input("z", ["n", "k"])], "add")
    model = ir.from_proto(net.proto(net.gemm(y, "b", 8, 3)))
    for value, size in zip((value for node in model.graph for value in node.outputs), (8, 8, 3), strict=True):
        value.shape = ir.Shape(["n", size])
    assert channel_groups(model).fixed["a"] == "an axis whose size is not known before the model runs"


def test_features_that_a_convolution_takes_for_space_stay() -> None:
    net = Net()
    y = net.op("Conv", [net.matmul(net.input("x", ["n", 4, 6]), "a", 6, 8), net.weight("w", 5, 4, 3)], "b")
    model = made(net, net.op("GlobalAveragePool", [net.op("Conv", [y, net.weight("v", 3, 5, 1)], "c")], "pool"))
    channels = channel_groups(model)
    assert list(members(channels)) == ["b"]
    assert channels.fixed["a"] == "Conv 'b' works across them"


def test_of_two_axes_that_are_joined_the_first_can_be_cut() -> None:
    net = Net()
    y = net.matmul(net.conv(picture(net), "a", 3, 4), "b", 6, 5)
    y = net.gemm(net.op("Flatten", [y], "flatten", axis=1), "head", 4 * 6 * 5, 3)
    channels = channel_groups(made(net, y))
    assert list(members(channels)) == ["a"]
    assert channels.fixed["b"] == "Flatten 'flatten' joins them with others"


def test_what_is_reshaped_to_a_number_that_is_computed_stays() -> None:
    net = Net()
    x = net.conv_relu(picture(net), "a", 3, 4)
    sizes = net.op("Shape", [net.input("z", [1, 144])], "sizes")
    rest = net.op("Gather", [sizes, net.constant("one", np.array([1]))], "rest")
    given = net.op("Concat", [net.constant("all", np.array([-1])), rest], "given", axis=0)
    model = made(net, net.gemm(net.op("Reshape", [x, given], "flat"), "head", 144, 5))
    [flat] = [node.outputs[0] for node in model.graph if node.name == "flat"]
    flat.shape = ir.Shape(["n", 144])
    assert channel_groups(model).fixed["a"] == "Reshape 'flat' is given their number"


def test_a_product_of_two_activations_needs_the_rows_of_the_first() -> None:
    net = Net()
    left = net.op("Conv", [net.input("x", ["n", 3, 6]), net.weight("w", 8, 3, 1)], "a")
    y = net.op("MatMul", [left, net.input("z", ["n", 6, 5])], "product")
    channels = channel_groups(made(net, net.op("Conv", [y, net.weight("v", 2, 8, 1)], "b")))
    assert channels.groups == ()
    assert channels.fixed["a"] == "MatMul 'product' works across them"


def test_where_a_cost_grows_with_three_axes_one_of_them_stays() -> None:
    net = Net()
    y = net.conv(picture(net), "a", 3, 4)
    for name, reads, makes in (("b", 6, 5), ("c", 5, 7), ("d", 7, 2)):
        y = net.matmul(y, name, reads, makes)
    channels = channel_groups(made(net, net.conv(y, "head", 4, 3)))
    assert list(members(channels)) == ["b", "c"]
    assert channels.fixed["a"] == "MatMul 'c' has channels along two other axes"


def test_places_of_maxima_and_statistics_of_batches_are_of_all_channels() -> None:
    net = Net()
    x = net.conv(picture(net), "a", 3, 4)
    y, places = net.op("MaxPool", [x], "maxima", outputs=2, kernel_shape=[2, 2])
    model = ir.from_proto(net.proto(head(net, y, 4), places, dtypes={places: TensorProto.INT64}))
    assert channel_groups(inferred(model)).fixed["a"] == "MaxPool 'maxima' gives places that count all channels"
    net = Net()
    parameters = [net.weight(name, 4) for name in ("gamma", "beta", "mean", "var")]
    inputs = [net.conv(picture(net), "a", 3, 4), *parameters]
    y, *_ = net.op("BatchNormalization", inputs, "norm", outputs=3, training_mode=1)
    fixed = channel_groups(made(net, head(net, y, 4))).fixed
    assert fixed["a"] == "BatchNormalization 'norm' takes statistics over a batch"


@pytest.mark.parametrize("read", ["b_y", "b.bias"])
@pytest.mark.parametrize("nested", [False, True])
def test_what_a_branch_reads_stays(read: str, nested: bool) -> None:
    net = Net()
    y = net.conv(net.conv(picture(net), "a", 3, 8), "b", 8, 8)
    flag = net.input("flag", [], TensorProto.BOOL)
    out = helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)
    then, other = (
        helper.make_graph([helper.make_node(kind, [read], ["inner"])], kind, [], [out]) for kind in ("Abs", "Neg")
    )
    if nested:
        inner = helper.make_node("If", [flag], ["outer"], then_branch=then, else_branch=other)
        out = helper.make_tensor_value_info("outer", TensorProto.FLOAT, None)
        then, other = (helper.make_graph([inner], kind, [], [out]) for kind in ("yes", "no"))
    z = net.op("If", [flag], "branch", then_branch=then, else_branch=other)
    channels = channel_groups(made(net, head(net, y, 8), z))
    assert list(members(channels)) == ["a"]
    assert channels.fixed["b"] == "If 'branch' reads them in a subgraph"


def test_ignored_layers_keep_their_channels_and_unknown_ones_are_refused() -> None:
    net = Net()
    x = net.conv_relu(net.conv_relu(picture(net), "stage.a", 3, 8), "stage.b", 8, 6)
    model = made(net, head(net, x, 6))
    channels = channel_groups(model, ignore=["*.a"])
    assert list(members(channels)) == ["stage.b"]
    assert channels.fixed["stage.a"] == "Conv 'stage.a' is to keep its channels"
    with pytest.raises(GraphError, match=r"no layer with weights is called 'stage.c'; did you mean 'stage.[ab]'"):
        channel_groups(model, ignore=["stage.c"])


def test_scores_are_of_all_layers_that_make_a_unit_and_1_in_the_mean() -> None:
    net = Net()
    x = net.conv_relu(picture(net), "a", 3, 8)
    model = made(net, head(net, net.op("Add", [x, net.conv(x, "b", 8, 8)], "add"), 8))
    filters = np.concatenate(
        [array_of(model, f"{name}.weight").astype(np.float64).reshape(8, -1) for name in ("a", "b")], axis=1
    )
    expected = {
        "l1": np.abs(filters).sum(1),
        "l2": np.linalg.norm(filters, axis=1),
        "fpgm": np.linalg.norm(filters[:, None] - filters, axis=2).sum(1),
    }
    for criterion, scores in expected.items():
        [group] = channel_groups(model, criterion=criterion).groups
        np.testing.assert_allclose(group.scores, scores / scores.mean(), rtol=1e-9)
    [group] = channel_groups(model, criterion=lambda filters: filters[:, 0] ** 2).groups
    np.testing.assert_allclose(group.scores, filters[:, 0] ** 2 / (filters[:, 0] ** 2).mean())
    first, again, other = (channel_groups(model, criterion="random", seed=s).groups[0].scores for s in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).all()


def test_a_filter_in_the_middle_of_others_is_worth_least() -> None:
    np.testing.assert_allclose(fpgm(np.array([[0.0, 0], [3, 4], [6, 8]])), [15, 10, 15])


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        ("bn", "criterion 'bn' needs BatchNorm, which is folded,: choose"),
        ("taylor", "criterion 'taylor' needs gradients"),
        ("l3", "criterion is 'l3'; an ONNX graph can be pruned by l1, l2, fpgm, random"),
        (lambda filters: filters, r"the criterion gave scores of shape \(48, 32\) for 48 units"),
    ],
)
def test_criteria_that_a_graph_cannot_serve(criterion: object, message: str) -> None:
    net = Net()
    y = net.gemm(net.input("x", ["n", 32]), "a", 32, 48)
    model = made(net, net.gemm(net.op("Relu", [y], "relu"), "b", 48, 4))
    with pytest.raises(GraphError, match=message):
        channel_groups(model, criterion=criterion)  # type: ignore[arg-type]


def test_models_with_grids_or_of_old_opsets_are_refused() -> None:
    net = Net()
    model = made(net, net.gemm(net.input("x", ["n", 4]), "a", 4, 4))
    set_params(model.graph.inputs[0], QuantParams("uint8", np.array(0.1, np.float32), np.array(0)))
    with pytest.raises(GraphError, match=r"tensor 'x' has a quantization grid.*prune first, then quantize"):
        channel_groups(model)
    old = Net(opset=11)
    with pytest.raises(GraphError, match="of opset 11; channels are followed from opset 13 on"):
        channel_groups(made(old, old.gemm(old.input("x", ["n", 4]), "a", 4, 4)))


def test_costs_follow_a_choice() -> None:
    net = Net()
    x = net.conv_relu(net.conv_relu(picture(net), "a", 3, 8), "b", 8, 6)
    channels = channel_groups(made(net, head(net, x, 6)))
    kept = kept_shares(channels.groups, {"a": np.arange(2), "b": np.arange(3)})
    assert total_macs(channels.costs, kept) == 36 * 27 * 2 + 36 * 18 * 3 + 15
    assert [cost.parameters for cost in channels.costs] == [224, 438, 35]
