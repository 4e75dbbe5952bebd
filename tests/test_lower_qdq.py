"""Lowered Quantize/DequantizeLinear graphs: what each target gets, as text, and what must hold for all of them."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgekit.graph.annotations import annotated_values, get_params, set_params
from edgekit.lowering.qdq import lower_qdq
from edgekit.target import load_target
from edgekit_tensorrt.rules import broken_rules
from networks import (
    Net,
    annotate,
    block,
    changed,
    get_params_of,
    grids,
    lowered,
    mixed_net,
    residual_net,
    samples,
    simulate,
    text,
    token_net,
    worst,
)

TARGETS = ("x86-onnxruntime", "arm-onnxruntime", "x86-openvino", "cuda-tensorrt")
ALWAYS, CONSUMED = "x86-onnxruntime", "x86-openvino"


# What each target gets.


@pytest.mark.parametrize("target", ["x86-onnxruntime", "arm-onnxruntime"])
def test_onnxruntime_gets_q_on_every_output_and_no_relu(target: str) -> None:
    assert lowered(block(), target) == [
        "a.relu_y = Conv(q(x), q(a.weight), q(a_bias))",
        "b_y = Conv(q(a.relu_y), q(b.weight), q(b_bias))",
        "relu_y = Add(q(b_y), q(a.relu_y))",
        "max_y = MaxPool(q(relu_y))",
        "flat_y = Flatten(q(max_y))",
        "head_y = Gemm(q(flat_y), q(head.weight), q(head_bias))",
        "return head_y",
    ]


def test_openvino_gets_one_q_before_what_moves_numbers_and_float_biases() -> None:
    assert lowered(block(), "x86-openvino") == [
        "a_y = Conv(q(x), q(a.weight), a.bias)",
        "a.relu_y = Relu(a_y)",
        "b_y = Conv(q(a.relu_y), q(b.weight), b.bias)",
        "add_y = Add(b_y, q(a.relu_y))",
        "relu_y = Relu(add_y)",
        "max_y = MaxPool(q(relu_y))",
        "flat_y = Flatten(max_y)",
        "head_y = Gemm(flat_y, q(head.weight), head.bias)",
        "return head_y",
    ]


def test_tensorrt_gets_q_on_the_skip_only_and_around_what_moves_numbers() -> None:
    assert lowered(block(), "cuda-tensorrt") == [
        "a_y = Conv(q(x), q(a.weight), a.bias)",
        "a.relu_y = Relu(a_y)",
        "b_y = Conv(q(a.relu_y), q(b.weight), b.bias)",
        "add_y = Add(b_y, q(a.relu_y))",
        "relu_y = Relu(add_y)",
        "max_y = MaxPool(q(relu_y))",
        "flat_y = Flatten(q(max_y))",
        "head_y = Gemm(q(flat_y), q(head.weight), head.bias)",
        "return head_y",
    ]


@pytest.mark.parametrize("target", TARGETS)
def test_activations_and_weights_are_on_the_grids_that_the_target_names(target: str) -> None:
    rules = load_target(target).quantization
    for node, scale, zero_point in grids(lower_qdq(annotate(block()), load_target(target))):
        constant = node.inputs[0] is not None and node.inputs[0].const_value is not None
        if not constant:
            assert scale.shape == () == zero_point.shape, (
                "ONNX Runtime leaves an Add float when a scale has the shape (1,)"
            )
            assert zero_point.dtype == rules.activation.dtype
            assert zero_point == 0 or not rules.activation.symmetric
        elif zero_point.dtype == np.int32:
            assert rules.bias == "int32"
        else:
            assert zero_point.dtype == np.int8 and not zero_point.any()
            assert scale.ndim == 1, "one scale an output channel"


def test_arm_has_the_zero_point_at_the_lowest_code_after_a_relu() -> None:
    found = {
        str(node.name): zero_point
        for node, _, zero_point in grids(lower_qdq(annotate(block()), load_target("arm-onnxruntime")))
    }
    assert found["a.relu_y/QuantizeLinear"] == -128 and found["relu_y/QuantizeLinear"] == -128
    assert found["x/QuantizeLinear"] not in (-128, 0, 127)


def test_tensorrt_breaks_none_of_its_rules() -> None:
    for model in (residual_net(), mixed_net(), token_net()):
        assert broken_rules(lower_qdq(annotate(model), load_target("cuda-tensorrt"))) == []


def test_a_residual_add_of_two_convolutions_has_one_q_for_targets_that_fuse_it() -> None:
    lines = lowered(residual_net(), "cuda-tensorrt")
    assert "c.add_y = Add(c2_y, q(c.short_y))" in lines
    assert "a.add_y = Add(a2_y, q(stem.relu_y))" in lines
    assert "c.add_y = Add(q(c2_y), q(c.short_y))" in [
        line.replace("c.relu_y = Add", "c.add_y = Add") for line in lowered(residual_net(), ALWAYS)
    ]


def test_an_add_that_no_quantized_convolution_feeds_has_q_on_both_sides() -> None:
    assert "c.add_y = Add(q(c2_y), c.short_y)" in lowered(residual_net(), "cuda-tensorrt", "c2")
    net = Net()
    x = net.conv_relu(net.input("x", ["n", 3, 8, 8]), "a", 3, 4)
    y = net.op("Tanh", [x], "tanh")
    assert "add_y = Add(q(a.relu_y), q(tanh_y))" in lowered(
        net.model(net.conv(net.op("Add", [x, y], "add"), "b", 4, 4)), "cuda-tensorrt"
    )


def test_an_attention_block_keeps_softmax_norm_and_float_bias_adds() -> None:
    for target in (ALWAYS, CONSUMED):
        lines = lowered(token_net(), target)
        assert "norm_y = LayerNormalization(x, norm.gain, norm.shift)" in lines, "the norm reads x in float"
        for name in ("query", "key", "value"):
            assert f"{name}_y = MatMul(q(norm_y), q({name}.weight))" in lines
            assert f"{name}.add_y = Add({name}_y, {name}.bias)" in lines


# Pads.


def padded(*, relu: bool, float_reader: bool = False) -> ir.Model:
    net = Net()
    x = net.input("x", ["n", 3, 8, 8])
    x = net.conv_relu(x, "a", 3, 4) if relu else net.conv(x, "a", 3, 4)
    y = net.pad(x, "pad", [0, 2, 0, 0, 0, 2, 0, 0])
    outputs = [net.conv(y, "b", 8, 4), *([net.op("Tanh", [y], "tanh")] if float_reader else [])]
    return net.model(*outputs)


def test_a_pad_runs_on_codes_with_the_zero_point() -> None:
    model = lower_qdq(annotate(padded(relu=False)), load_target(ALWAYS))
    assert "codes(pad_y) = Pad(codes(a_y), pad.pads, pad_y_zero_point)" in text(model)
    pad = next(node for node in model.graph if node.op_type == "Pad")
    assert pad.inputs[2] is not None and pad.inputs[2].const_value is not None
    assert (
        pad.name == "pad"
        and pad.inputs[2].const_value.numpy() == get_params_of(annotate(padded(relu=False)), "pad_y").zero_point
    )


def test_openvino_gets_a_pad_on_codes_only_where_the_zero_point_is_zero() -> None:
    assert "codes(pad_y) = Pad(codes(a.relu_y), pad.pads, pad_y_zero_point)" in lowered(padded(relu=True), CONSUMED)
    lines = lowered(padded(relu=False), CONSUMED)
    assert "pad_y = Pad(a_y, pad.pads)" in lines and "b_y = Conv(q(pad_y), q(b.weight), b.bias)" in lines


def test_tensorrt_gets_every_pad_in_float_with_q_behind_it() -> None:
    lines = lowered(padded(relu=True), "cuda-tensorrt")
    assert "pad_y = Pad(a.relu_y, pad.pads)" in lines and "b_y = Conv(q(pad_y), q(b.weight), b.bias)" in lines


def test_a_pad_with_readers_of_both_kinds_exists_twice_under_two_names() -> None:
    model = lower_qdq(annotate(padded(relu=True, float_reader=True)), load_target(CONSUMED))
    lines = text(model)
    assert "codes(pad_y) = Pad(codes(a.relu_y), pad.pads, pad_y_zero_point)" in lines
    assert "pad_y = Pad(a.relu_y, pad.pads)" in lines and "tanh_y = Tanh(pad_y)" in lines
    names = [node.name for node in model.graph]
    assert len(names) == len(set(names)) and {"pad", "pad/float"} <= set(names)
    always = lower_qdq(annotate(padded(relu=True, float_reader=True)), load_target(ALWAYS))
    assert [node.name for node in always.graph if node.op_type == "Pad"] == ["pad"]


def test_a_pad_that_is_kept_float_stays_float() -> None:
    assert "pad_y = Pad(q(a.relu_y), pad.pads)" in lowered(padded(relu=True), ALWAYS, "pad")


def test_a_pad_between_two_grids_stays_float() -> None:
    model = annotate(padded(relu=True))
    value = next(value for value in annotated_values(model.graph) if value.name == "pad_y")
    set_params(value, dataclasses.replace(get_params_of(model, "pad_y"), high=9.0))
    assert "pad_y = Pad(q(a.relu_y), pad.pads)" in text(lower_qdq(model, load_target(ALWAYS)))


def test_a_pad_with_another_number_than_zero_stays_float() -> None:
    net = Net()
    x = net.conv_relu(net.input("x", ["n", 3, 8, 8]), "a", 3, 4)
    one = [net.constant("pads", np.array([0, 0, 1, 1, 0, 0, 1, 1])), net.constant("one", np.float32(1))]
    model = net.model(net.conv(net.op("Pad", [x, *one], "pad"), "b", 4, 4))
    assert "pad_y = Pad(q(a.relu_y), pads, one)" in lowered(model, ALWAYS)
    assert "pad_y = Pad(a.relu_y, pads, one)" in lowered(model, CONSUMED)


@pytest.mark.parametrize("op_type", ["MaxPool", "AveragePool", "GlobalAveragePool"])
def test_no_dequantize_stands_before_a_float_pad_for_openvino(op_type: str) -> None:
    net = Net()
    x = net.conv(net.input("x", ["n", 3, 8, 8]), "a", 3, 4)
    window = {} if op_type == "GlobalAveragePool" else {"kernel_shape": [2, 2], "strides": [2, 2]}
    y = net.op(op_type, [x], "pool", **window)
    z = net.conv(net.pad(y, "pad", [0, 2, 0, 0, 0, 2, 0, 0]), "b", 8, 4)
    lines = lowered(net.model(z, net.conv(y, "c", 4, 4)), CONSUMED)
    assert f"pool_y = {op_type}(a_y)" in lines
    assert "pad_y = Pad(pool_y, pad.pads)" in lines
    assert "c_y = Conv(q(pool_y), q(c.weight), c.bias)" in lines


# Activation functions.


def clipped(low: float, high: float, *, grid: tuple[float, float]) -> list[str]:
    """A Conv with a Clip and a Conv behind it, whose range was seen to be `grid`, for x86 ONNX Runtime."""
    net = Net()
    x = net.clip(net.conv(net.input("x", ["n", 3, 8, 8]), "a", 3, 4), "clip", low, high)
    model = annotate(net.model(net.conv(x, "b", 4, 4)))
    value = next(value for value in annotated_values(model.graph) if value.name == "clip_y")
    params = get_params(value)
    assert params is not None
    set_params(value, dataclasses.replace(params, low=grid[0], high=grid[1]))
    return text(lower_qdq(model, load_target(ALWAYS)))


@pytest.mark.parametrize(
    ("low", "high", "grid"),
    [(0, 6, (0, 6)), (0, 6, (0, 5.2)), (-1, 1, (-0.7, 0.4)), (0, 6, (0, 6.01)), (-3, 3, (-3, 2.9))],
)
def test_a_clip_goes_where_saturation_does_the_same(low: float, high: float, grid: tuple[float, float]) -> None:
    assert "clip_y = Conv(q(x), q(a.weight), q(a_bias))" in clipped(low, high, grid=grid)


@pytest.mark.parametrize(
    ("low", "high", "grid"), [(0, 6, (0, 6.1)), (0, 6, (-0.5, 6)), (-1, 1, (-1, 1.2)), (0, 6, (-6, 6)), (1, 6, (0, 6))]
)
def test_a_clip_stays_where_the_grid_reaches_beyond_it(low: float, high: float, grid: tuple[float, float]) -> None:
    lines = clipped(low, high, grid=grid)
    assert "a_y = Conv(q(x), q(a.weight), q(a_bias))" in lines
    assert "clip_y = Clip(a_y, clip.low, clip.high)" in lines


def test_a_removed_clip_changes_no_code() -> None:
    net = Net()
    x = net.clip(net.conv(net.input("x", ["n", 3, 8, 8]), "a", 3, 4), "clip", 0.0, 1.0)
    model = annotate(net.model(net.conv(x, "b", 4, 4)))
    feeds = samples(model, 32, seed=5)
    without = lower_qdq(model, load_target(ALWAYS))
    kept = lower_qdq(model, changed(ALWAYS, drop_redundant=()))
    assert [node.op_type for node in kept.graph].count("Clip") == 1
    assert "Clip" not in [node.op_type for node in without.graph]
    assert np.array_equal(simulate(without, feeds)["b_y"], simulate(kept, feeds)["b_y"])


def test_a_relu_and_a_clip_behind_one_another_both_go() -> None:
    net = Net()
    x = net.clip(net.conv_relu(net.input("x", ["n", 3, 8, 8]), "a", 3, 4), "clip", 0.0, 3.0)
    lines = lowered(net.model(net.conv(x, "b", 4, 4)), ALWAYS)
    assert lines[0] == "clip_y = Conv(q(x), q(a.weight), q(a_bias))"


def test_a_relu_that_a_symmetric_grid_follows_stays() -> None:
    symmetric = changed("arm-onnxruntime", activation=load_target("cuda-tensorrt").quantization.activation)
    assert "a.relu_y = Relu(a_y)" in text(lower_qdq(annotate(block()), symmetric))


def test_a_clip_with_a_computed_bound_stays() -> None:
    net = Net()
    x = net.input("x", ["n", 3, 8, 8])
    high = net.op("ReduceMax", [x], "bound", keepdims=0)
    y = net.op("Clip", [net.conv(x, "a", 3, 4), net.constant("low", np.float32(0)), high], "clip")
    lines = lowered(net.model(net.conv(y, "b", 4, 4)), ALWAYS)
    assert "clip_y = Clip(a_y, low, bound_y)" in lines


def test_a_relu_behind_a_value_with_two_readers_stays() -> None:
    net = Net()
    y = net.conv(net.input("x", ["n", 3, 8, 8]), "a", 3, 4)
    lines = lowered(net.model(net.conv(net.op("Relu", [y], "relu"), "b", 4, 4), net.conv(y, "c", 4, 4)), ALWAYS)
    assert "relu_y = Relu(q(a_y))" in lines


# Who reads what.


def two_kinds_of_reader() -> ir.Model:
    net = Net()
    y = net.conv(net.input("x", ["n", 3, 8, 8]), "a", 3, 4)
    return net.model(net.conv(y, "b", 4, 4), net.op("Tanh", [y], "tanh"))


def test_with_always_float_readers_of_a_kernels_output_read_behind_its_q() -> None:
    assert "tanh_y = Tanh(q(a_y))" in lowered(two_kinds_of_reader(), ALWAYS)


def test_with_when_consumed_float_readers_read_floats() -> None:
    lines = lowered(two_kinds_of_reader(), CONSUMED)
    assert "tanh_y = Tanh(a_y)" in lines and "b_y = Conv(q(a_y), q(b.weight), b.bias)" in lines


@pytest.mark.parametrize("target", TARGETS)
def test_float_readers_of_a_float_value_never_read_codes(target: str) -> None:
    net = Net()
    x = net.input("x", ["n", 3, 8, 8])
    y = net.op("Tanh", [x], "tanh")
    lines = lowered(net.model(net.conv(y, "a", 3, 4), net.op("Exp", [y], "exp"), net.op("Exp", [x], "exp2")), target)
    assert "exp_y = Exp(tanh_y)" in lines and "exp2_y = Exp(x)" in lines


def test_a_graph_output_that_is_read_inside() -> None:
    net = Net()
    y = net.conv_relu(net.input("x", ["n", 3, 8, 8]), "a", 3, 4)
    model = net.model(y, net.conv(y, "b", 4, 4))
    feeds = samples(model, 3)
    for target in TARGETS:
        result = lower_qdq(annotate(model), load_target(target))
        assert [value.name for value in result.graph.outputs] == ["a.relu_y", "b_y"]
        assert worst(simulate(result, feeds), simulate(model, feeds)) < 0.05
    assert text(lower_qdq(annotate(model), load_target(ALWAYS)))[-1] == "return q(a.relu_y_float), q(b_y_float)"
    assert text(lower_qdq(annotate(model), load_target(CONSUMED)))[-1] == "return a.relu_y, b_y"


@pytest.mark.parametrize("target", TARGETS)
def test_a_graph_input_keeps_its_name_and_may_be_padded_pooled_or_joined_at_once(target: str) -> None:
    net = Net()
    x, z = net.input("x", ["n", 4, 8, 8]), net.input("z", ["n", 4, 8, 8])
    pooled = net.op("MaxPool", [x], "max", kernel_shape=[2, 2], strides=[2, 2])
    a = net.conv(pooled, "a", 4, 4)
    b = net.conv(net.pad(z, "pad", [0, 0, 1, 1, 0, 0, 1, 1]), "b", 4, 4, pads=[0, 0, 0, 0], strides=[2, 2])
    model = net.model(net.op("Add", [a, b], "add"), net.op("Exp", [x], "exp"))
    result = lower_qdq(annotate(model), load_target(target))
    assert [value.name for value in result.graph.inputs] == ["x", "z"]
    assert "exp_y = Exp(x)" in text(result)
    feeds = samples(model, 3)
    assert worst(simulate(result, feeds), simulate(model, feeds)) < 0.05


def test_a_concat_of_a_value_with_itself() -> None:
    net = Net()
    y = net.conv(net.input("x", ["n", 3, 8, 8]), "a", 3, 4)
    model = net.model(net.conv(net.op("Concat", [y, y], "cat", axis=1), "b", 8, 4))
    for target in TARGETS:
        assert "cat_y = Concat(q(a_y), q(a_y))" in lowered(model, target)


def split_net(*, use_second: bool) -> ir.Model:
    net = Net()
    halves = net.op(
        "Split", [net.conv(net.input("x", ["n", 3, 8, 8]), "a", 3, 8)], "split", outputs=2, axis=1, num_outputs=2
    )
    second = [net.op("Exp", [halves[1]], "exp")] if use_second else []
    return net.model(net.conv(halves[0], "b", 4, 4), *second)


def test_a_split_with_one_quantized_reader() -> None:
    lines = lowered(split_net(use_second=True), ALWAYS)
    assert "split_y, split_y1 = Split(q(a_y))" in lines and "exp_y = Exp(q(split_y1))" in lines
    lines = lowered(split_net(use_second=True), CONSUMED)
    assert "exp_y = Exp(split_y1)" in lines and "b_y = Conv(q(split_y), q(b.weight), b.bias)" in lines


@pytest.mark.parametrize("target", TARGETS)
def test_an_output_that_nobody_reads_gets_no_q(target: str) -> None:
    result = lower_qdq(annotate(split_net(use_second=False)), load_target(target))
    quantized = [node.inputs[0].name for node in result.graph if node.op_type == "QuantizeLinear" and node.inputs[0]]
    assert "split_y" in quantized or target == CONSUMED
    assert "split_y1" not in quantized


def test_operators_that_move_numbers_in_a_row() -> None:
    net = Net()
    y = net.conv_relu(net.input("x", ["n", 3, 8, 8]), "a", 3, 4)
    y = net.op("MaxPool", [y], "max", kernel_shape=[2, 2], strides=[2, 2])
    y = net.op("Transpose", [y], "turn", perm=[0, 1, 3, 2])
    model = net.model(net.conv(net.slice(y, "slice", starts=[0], ends=[2], axes=[1], steps=[1]), "b", 2, 4))
    moved = ["max_y = MaxPool(q(a.relu_y))", "turn_y = Transpose(q(max_y))"]
    assert lowered(model, ALWAYS)[1:3] == moved
    assert lowered(model, "cuda-tensorrt")[2:4] == moved
    assert lowered(model, CONSUMED)[2:] == [
        "max_y = MaxPool(q(a.relu_y))",
        "turn_y = Transpose(max_y)",
        "slice_y = Slice(turn_y, slice.starts, slice.ends, slice.axes, slice.steps)",
        "b_y = Conv(slice_y, q(b.weight), b.bias)",
        "return b_y",
    ]


def test_an_average_stays_float_where_no_q_follows_it_for_openvino() -> None:
    net = Net()
    y = net.conv(net.input("x", ["n", 3, 8, 8]), "a", 3, 4)
    model = net.model(net.op("Tanh", [net.op("GlobalAveragePool", [y], "pool")], "tanh"))
    assert "pool_y = GlobalAveragePool(a_y)" in lowered(model, CONSUMED)
    assert "pool_y = GlobalAveragePool(q(a_y))" in lowered(model, ALWAYS)


def captured() -> ir.Model:
    """A quantized value that only the branches of an If read, beside a quantized reader."""
    net = Net()
    y = net.conv_relu(net.input("x", ["n", 3, 8, 8]), "a", 3, 4)
    flag = net.op("Greater", [net.op("ReduceMax", [y], "top", keepdims=0), net.constant("zero", np.float32(0))], "flag")
    branches = {}
    for name, op_type in (("then_branch", "Exp"), ("else_branch", "Neg")):
        node = onnx.helper.make_node(op_type, [y], [f"{name}_y"], name=f"{name}_node")
        info = onnx.helper.make_tensor_value_info(f"{name}_y", onnx.TensorProto.FLOAT, None)
        branches[name] = onnx.helper.make_graph([node], name, [], [info])
    return net.model(net.op("If", [flag], "if", **branches), net.conv(y, "b", 4, 4))


@pytest.mark.parametrize("target", TARGETS)
def test_a_value_that_a_subgraph_captures(target: str) -> None:
    model = captured()
    result = lower_qdq(annotate(model), load_target(target))
    onnx.checker.check_model(ir.to_proto(result), full_check=True)
    feeds = samples(model, 2)
    assert worst(simulate(result, feeds), simulate(model, feeds)) < 0.05
