"""Lowered Quantize/DequantizeLinear graphs: what each target gets, as text, and what must hold for all of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import GraphError
from edgekit.graph.annotations import annotated_values, get_params, set_params
from edgekit.graph.io import load_annotated, save_annotated
from edgekit.lowering.qdq import lower_qdq
from edgekit.lowering.saturation import saturation_warnings
from edgekit.quant.spec import QuantParams
from edgekit.target import Device, Target, load_target
from edgekit_tensorrt.rules import broken_rules
from networks import Net, annotate, mixed_net, random_net, residual_net, samples, simulate, text, token_net, worst

TARGETS = ("x86-onnxruntime", "arm-onnxruntime", "x86-openvino", "cuda-tensorrt")
ALWAYS, CONSUMED = "x86-onnxruntime", "x86-openvino"


def lowered(model: ir.Model, target: str, *keep_float: str) -> list[str]:
    return text(lower_qdq(annotate(model), load_target(target), keep_float=frozenset(keep_float)))


def changed(target: str, **rules: object) -> Target:
    """A shipped target with some rules changed."""
    base = load_target(target)
    return base.model_copy(update={"quantization": base.quantization.model_copy(update=rules)})


def grids(model: ir.Model) -> list[tuple[ir.Node, np.ndarray, np.ndarray]]:
    """Each Quantize/DequantizeLinear with its scale and zero point."""
    found = []
    for node in model.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale, zero_point = node.inputs[1], node.inputs[2]
            assert scale is not None and scale.const_value is not None
            assert zero_point is not None and zero_point.const_value is not None
            found.append((node, scale.const_value.numpy(), zero_point.const_value.numpy()))
    return found


def trained(model: ir.Model, name: str, dtype: str, zero_point: int, scale: float = 0.05) -> ir.Model:
    """The annotated model with one activation on a grid that training chose."""
    model = model.clone()
    value = next(value for value in annotated_values(model.graph) if value.name == name)
    set_params(value, QuantParams(dtype, np.array(scale, np.float32), np.array(zero_point), fixed=True))
    return model


def block() -> ir.Model:
    """Conv, Relu, a Conv with a skip connection, MaxPool, Flatten, Gemm."""
    net = Net()
    x = net.conv_relu(net.input("x", ["n", 3, 8, 8]), "a", 3, 4)
    y = net.op("Relu", [net.op("Add", [net.conv(x, "b", 4, 4), x], "add")], "relu")
    y = net.op("MaxPool", [y], "max", kernel_shape=[2, 2], strides=[2, 2])
    return net.model(net.gemm(net.op("Flatten", [y], "flat"), "head", 64, 3))


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


def get_params_of(model: ir.Model, name: str) -> QuantParams:
    params = get_params(next(value for value in annotated_values(model.graph) if value.name == name))
    assert params is not None
    return params


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


# Weights and biases.


def test_a_conv_without_a_bias() -> None:
    net = Net()
    model = net.model(net.conv(net.input("x", ["n", 3, 8, 8]), "a", 3, 4, bias=False))
    assert lowered(model, ALWAYS) == ["a_y_float = Conv(q(x), q(a.weight))", "return q(a_y_float)"]


def shared_weights(*, same_input: bool) -> ir.Model:
    net = Net()
    x = net.input("x", ["n", 4, 8, 8])
    z = x if same_input else net.op("Tanh", [x], "tanh")
    weight = net.weight("w", 4, 4, 3, 3)
    a = net.op("Conv", [x, weight], "a", pads=[1, 1, 1, 1])
    b = net.op("Conv", [z, weight], "b", pads=[1, 1, 1, 1])
    top = net.op("Mul", [net.op("ReduceMax", [x], "top", keepdims=0), weight], "float")
    return net.model(net.op("Exp", [a], "ea"), net.op("Exp", [b], "eb"), top)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("same_input", [True, False])
def test_weights_that_two_layers_share_are_stored_once(target: str, same_input: bool) -> None:
    model = shared_weights(same_input=same_input)
    result = lower_qdq(annotate(model), load_target(target))
    codes = [
        name for name, v in result.graph.initializers.items() if v.dtype == ir.DataType.INT8 and len(v.shape or ()) == 4
    ]
    assert codes == ["w_quantized"]
    assert "float_y = Mul(top_y, w)" in text(result), "a float reader keeps the floats"
    feeds = samples(model, 3)
    assert worst(simulate(result, feeds), simulate(model, feeds)) < 0.1


def test_shared_weights_with_biases_that_need_different_scales_are_stored_twice() -> None:
    net = Net()
    x = net.input("x", ["n", 2, 4, 4])
    weight = net.constant("w", np.full((2, 2, 1, 1), 1e-7, np.float32))
    a = net.op("Conv", [x, weight, net.constant("small", np.zeros(2, np.float32))], "a")
    b = net.op("Conv", [x, weight, net.constant("large", np.full(2, 5, np.float32))], "b")
    model = net.model(a, b)
    result = lower_qdq(annotate(model), load_target(ALWAYS))
    feeds = samples(model, 3)
    assert np.abs(simulate(result, feeds)["b_y"] - 5).max() < 0.05
    assert worst(simulate(result, feeds), simulate(model, feeds)) < 0.05


@pytest.mark.parametrize("tiny", [1e-9, 1e-20, 1e-37, 0.0])
@pytest.mark.parametrize("target", ["x86-onnxruntime", "arm-onnxruntime"])
def test_a_dead_channel_with_a_large_bias_does_not_overflow_int32(target: str, tiny: float) -> None:
    net = Net(seed=7)
    weight = net.rng.normal(0, 1, (4, 3, 1, 1)).astype(np.float32)
    weight[1] *= np.float32(tiny)
    bias = np.array([0.5, -8, 3, 0], np.float32)
    inputs = [net.input("x", ["n", 3, 8, 8]), net.constant("w", weight), net.constant("b", bias)]
    model = net.model(net.op("Conv", inputs, "a"))
    result = lower_qdq(annotate(model), load_target(target))
    for node, scale, _ in grids(result):
        assert np.all(scale >= np.finfo(np.float32).tiny), node.name
    feeds = samples(model, 16)
    ours, exact = simulate(result, feeds)["a_y"], simulate(model, feeds)["a_y"]
    assert np.abs(ours - exact)[:, 1].max() < 0.05, "the dead channel is its bias"
    assert np.abs(ours - exact).max() < 0.2


def test_a_trained_weight_with_a_tiny_scale_does_not_overflow_either() -> None:
    net = Net()
    inputs = [
        net.input("x", ["n", 2, 4, 4]),
        net.constant("w", np.full((2, 2, 1, 1), 1e-12, np.float32)),
        net.constant("b", np.array([4, -4], np.float32)),
    ]
    model = annotate(net.model(net.op("Conv", inputs, "a")))
    weight = model.graph.initializers["w"]
    set_params(weight, dataclasses.replace(get_params_of(model, "w"), fixed=True))
    ours = simulate(lower_qdq(model, load_target(ALWAYS)), samples(model, 2))["a_y"]
    assert np.abs(ours - np.array([4, -4]).reshape(1, 2, 1, 1)).max() < 0.05


@pytest.mark.parametrize("shape", [(), (1,), (6,), (1, 6)])
def test_the_bias_of_a_gemm_in_every_shape_that_is_one_row(shape: tuple[int, ...]) -> None:
    net = Net()
    bias = net.constant(
        "b", np.full(shape, 0.3, np.float32) if shape in ((), (1,)) else net.rng.normal(0, 1, shape).astype(np.float32)
    )
    model = net.model(net.op("Gemm", [net.input("x", ["n", 8]), net.weight("w", 8, 6), bias], "g"))
    result = lower_qdq(annotate(model), load_target(ALWAYS))
    assert text(result)[0] == "g_y = Gemm(q(x), q(w), q(g_bias))"
    feeds = samples(model, 9)
    assert worst(simulate(result, feeds), simulate(model, feeds)) < 0.03


@pytest.mark.parametrize("factor", ["alpha", "beta"])
def test_a_gemm_with_factors_keeps_a_float_bias(factor: str) -> None:
    net = Net()
    model = net.model(net.gemm(net.input("x", ["n", 8]), "g", 8, 6, **{factor: 0.5}))
    result = lower_qdq(annotate(model), load_target(ALWAYS))
    assert text(result)[0] == "g_y = Gemm(q(x), q(g.weight), g.bias)"
    feeds = samples(model, 9)
    assert worst(simulate(result, feeds), simulate(model, feeds)) < 0.03


def test_a_gemm_whose_bias_has_a_row_a_sample_keeps_it_float() -> None:
    net = Net()
    model = net.model(net.op("Gemm", [net.input("x", [3, 8]), net.weight("w", 8, 6), net.weight("b", 3, 6)], "g"))
    assert lowered(model, ALWAYS)[0] == "g_y = Gemm(q(x), q(w), b)"


@pytest.mark.parametrize("group", [1, 2])
def test_a_transposed_convolution_has_its_bias_on_its_output_channels(group: int) -> None:
    net = Net()
    inputs = [net.input("x", ["n", 4, 5, 5]), net.weight("w", 4, 3, 2, 2), net.weight("b", 3 * group)]
    model = net.model(net.op("ConvTranspose", inputs, "up", strides=[2, 2], kernel_shape=[2, 2], group=group))
    target = changed(ALWAYS, quantize=("ConvTranspose",))
    result = lower_qdq(annotate(model), target)
    assert text(result)[0] == "up_y_float = ConvTranspose(q(x), q(w), q(up_bias))"
    feeds = samples(model, 3)
    assert worst(simulate(result, feeds), simulate(model, feeds)) < 0.03


def test_a_target_without_channel_scales_gets_one_scale_a_weight() -> None:
    plain = load_target(ALWAYS).quantization.weight.model_copy(update={"per_channel": False})
    model = annotate(block())
    result = lower_qdq(model, changed(ALWAYS, weight=plain))
    assert all(scale.ndim == 0 for _, scale, _ in grids(result))
    feeds = samples(model, 3)
    assert worst(simulate(result, feeds), simulate(block(), feeds)) < 0.1


def test_names_that_the_model_has_already_are_left_alone() -> None:
    net = Net()
    x = net.op(
        "Mul", [net.input("x", ["n", 3, 8, 8]), net.constant("y_scale", np.full((3, 1, 1), 0.5, np.float32))], "pre"
    )
    y = net.op("Mul", [x, net.constant("pre_y_scale", np.full((3, 1, 1), 2.0, np.float32))], "post")
    z = net.op(
        "Add", [net.conv(y, "a", 3, 4), net.constant("post_y_quantized", np.full((4, 1, 1), 9.0, np.float32))], "shift"
    )
    model = net.model(z, net.conv(x, "b", 3, 4))
    feeds = samples(model, 3)
    for target in TARGETS:
        assert worst(simulate(lower_qdq(annotate(model), load_target(target)), feeds), simulate(model, feeds)) < 0.05


# Grids that training chose.


def test_a_trained_uint8_grid_in_the_middle_becomes_int8_around_zero_without_loss() -> None:
    model = trained(annotate(block()), "x", "uint8", 128)
    feeds = samples(model, 3)
    found = {}
    for target in ("x86-openvino", "cuda-tensorrt", "arm-onnxruntime", "x86-onnxruntime"):
        result = lower_qdq(model, load_target(target))
        _, scale, zero_point = next(entry for entry in grids(result) if entry[0].name == "x/QuantizeLinear")
        found[target] = (float(scale), int(zero_point))
        codes = result.clone()
        codes.graph.outputs[:] = [
            value for node in codes.graph for value in node.outputs if value.name == "x_dequantized"
        ]
        assert np.array_equal(
            simulate(codes, feeds)["x_dequantized"],
            np.clip(np.rint(feeds["x"] / np.float32(0.05)), -128, 127) * np.float32(0.05),
        )
    assert {points for _, points in found.values()} == {0, 128}
    assert {scale for scale, _ in found.values()} == {float(np.float32(0.05))}


def test_a_trained_int8_grid_around_zero_becomes_uint8() -> None:
    model = trained(annotate(block()), "x", "int8", 0)
    _, _, zero_point = grids(lower_qdq(model, load_target(CONSUMED)))[0]
    assert (zero_point, zero_point.dtype) == (128, np.uint8)


def test_a_trained_grid_that_the_target_cannot_hold_is_refused_with_tensor_and_target() -> None:
    with pytest.raises(GraphError) as caught:
        lower_qdq(trained(annotate(block()), "a.relu_y", "uint8", 0), load_target("cuda-tensorrt"))
    message = str(caught.value)
    assert "tensor 'a.relu_y' cannot be quantized for target 'cuda-tensorrt'" in message
    assert "uint8, zero point 0" in message and "--target" in message


def test_a_trained_weight_that_the_target_cannot_hold_is_refused() -> None:
    model = annotate(block())
    weight = model.graph.initializers["b.weight"]
    set_params(weight, QuantParams("uint8", np.array(0.01, np.float32), np.array(7), fixed=True))
    with pytest.raises(
        GraphError, match=r"tensor 'b\.weight' cannot be quantized for target 'x86-openvino'.*zero point 7"
    ):
        lower_qdq(model, load_target(CONSUMED))


def test_trained_weights_that_use_the_lowest_code_are_kept() -> None:
    model = annotate(block())
    weight = model.graph.initializers["b.weight"]
    set_params(weight, dataclasses.replace(get_params_of(model, "b.weight"), fixed=True, narrow_range=False))
    result = lower_qdq(model, load_target(CONSUMED))
    scale = result.graph.initializers["b.weight_scale"].const_value
    assert scale is not None and np.array_equal(scale.numpy(), get_params_of(model, "b.weight").scale)


def test_calibrated_grids_move_to_what_the_target_needs() -> None:
    model = annotate(block())
    params = get_params_of(model, "x")
    _, scale, _ = grids(lower_qdq(model, load_target("cuda-tensorrt")))[0]
    assert scale == np.float32(max(-params.low, params.high) / 127)
    _, scale, zero_point = grids(lower_qdq(model, load_target("arm-onnxruntime")))[0]
    assert scale == params.scale and zero_point == params.zero_point - 128


# Keeping nodes float.


def test_a_node_that_is_kept_float_reads_and_makes_floats() -> None:
    lines = lowered(block(), ALWAYS, "b")
    assert "b_y = Conv(q(a.relu_y), b.weight, b.bias)" in lines, "what a kernel makes has a Q, whoever reads it"
    assert "relu_y = Add(q(b_y), q(a.relu_y))" in lines, "its reader is quantized all the same"
    lines = lowered(block(), CONSUMED, "b")
    assert "b_y = Conv(a.relu_y, b.weight, b.bias)" in lines
    assert "add_y = Add(q(b_y), q(a.relu_y))" in lines


def test_a_kept_add_leaves_its_neighbours_quantized() -> None:
    lines = lowered(block(), ALWAYS, "add")
    assert "a.relu_y = Conv(q(x), q(a.weight), q(a_bias))" in lines
    assert "add_y = Add(q(b_y), q(a.relu_y))" in lines and "relu_y = Relu(add_y)" in lines
    assert "add_y = Add(b_y, a.relu_y)" in lowered(block(), CONSUMED, "add")


def test_kept_activations_and_pads_stay_where_they_are() -> None:
    assert "a.relu_y = Relu(a_y)" in lowered(block(), ALWAYS, "a.relu")
    assert "pad_y = Pad(q(a.relu_y), pad.pads)" in lowered(padded(relu=True), ALWAYS, "pad")
    assert "max_y = MaxPool(relu_y)" in lowered(block(), CONSUMED, "max")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("make", [residual_net, mixed_net, token_net])
def test_keeping_everything_gives_the_float_model(target: str, make: object) -> None:
    assert callable(make)
    model = annotate(make())
    names = frozenset(str(node.name) for node in model.graph)
    result = lower_qdq(model, load_target(target), keep_float=names)
    assert {node.op_type for node in result.graph} & {"QuantizeLinear", "DequantizeLinear"} == set()
    feeds = samples(model, 2)
    ours, exact = simulate(result, feeds), simulate(model, feeds)
    assert all(np.array_equal(ours[name], exact[name]) for name in exact)


# The file, and all graphs.


def test_lowering_leaves_its_source_alone_and_repeats_itself() -> None:
    model = annotate(mixed_net())
    before = ir.to_proto(model).SerializeToString()
    grids_before = {value.name: get_params(value) for value in annotated_values(model.graph)}
    first = ir.to_proto(lower_qdq(model, load_target(ALWAYS))).SerializeToString()
    assert ir.to_proto(lower_qdq(model, load_target(ALWAYS))).SerializeToString() == first
    assert ir.to_proto(model).SerializeToString() == before
    assert {value.name: get_params(value) for value in annotated_values(model.graph)} == grids_before


def test_lowering_from_a_file_is_lowering_from_memory(tmp_path: Path) -> None:
    model = annotate(mixed_net())
    save_annotated(model, tmp_path / "model.onnx")
    for target in TARGETS:
        from_file = lower_qdq(load_annotated(tmp_path / "model.onnx"), load_target(target))
        assert text(from_file) == text(lower_qdq(model, load_target(target)))


def test_source_nodes_keep_their_names_and_metadata() -> None:
    model = annotate(residual_net())
    for node in model.graph:
        node.metadata_props["pkg.torch.onnx.name_scopes"] = f"scope of {node.name}"
    result = lower_qdq(model, load_target(ALWAYS))
    kept = {
        node.name: node.metadata_props
        for node in result.graph
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear")
    }
    assert {"stem", "a1", "b.pad", "pool", "head"} <= set(kept)
    assert all(props["pkg.torch.onnx.name_scopes"] == f"scope of {name}" for name, props in kept.items())


def test_a_float16_model_gets_float16_scales() -> None:
    text_of = """<ir_version: 10, opset_import: ["": 21]> g (float16[n,3,8,8] x) => (float16[n,4,8,8] y) {
        a = Conv<pads=[1,1,1,1]>(x, w, b) y = Tanh(a) }"""
    proto = onnx.parser.parse_model(text_of)
    for name, shape in (("w", (4, 3, 3, 3)), ("b", (4,))):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.full(shape, 0.5, np.float16), name))
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    grid = QuantParams("uint8", np.array(0.05, np.float32), np.array(100), low=-5.0, high=7.75)
    for value in (model.graph.inputs[0], model.graph[0].outputs[0]):
        set_params(value, grid)
    weight = QuantParams("int8", np.full(4, 0.01, np.float32), np.zeros(4, np.int64), axis=0, narrow_range=True)
    set_params(model.graph.initializers["w"], weight)
    for target in TARGETS:
        onnx.checker.check_model(ir.to_proto(lower_qdq(model, load_target(target))), full_check=True)


def test_an_old_opset_is_refused() -> None:
    model = annotate(block())
    model.opset_imports[""] = 12
    with pytest.raises(GraphError, match="opset 12; expected 13 or later"):
        lower_qdq(model, load_target(ALWAYS))


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_every_lowered_graph_is_whole_and_close_to_float(seed: int) -> None:
    model = random_net(seed)
    annotated = annotate(model, count=8)
    for name in TARGETS:
        target = load_target(name)
        result = lower_qdq(annotated, target)
        onnx.checker.check_model(ir.to_proto(result), full_check=True)
        assert annotated_values(result.graph) == []
        assert [value.name for value in result.graph.outputs] == [value.name for value in model.graph.outputs]
        assert [value.name for value in result.graph.inputs] == [value.name for value in model.graph.inputs]
        names = [node.name for node in result.graph]
        assert len(set(names)) == len(names)
        dead = [
            node.name for node in result.graph if not any(out.uses() or out.is_graph_output() for out in node.outputs)
        ]
        assert dead == []
        feeds = samples(model, 3, seed=1)
        assert {key: value.shape for key, value in simulate(result, feeds).items()} == {
            key: value.shape for key, value in simulate(model, feeds).items()
        }
        if name == "cuda-tensorrt":
            assert broken_rules(result) == []


# Saturation.


def with_isa(*isa: str) -> Target:
    return load_target("x86-onnxruntime").model_copy(update={"device": Device(arch="x86_64", isa=isa)})


def test_wide_weights_are_warned_of_on_x86_without_vnni() -> None:
    model = lower_qdq(annotate(block()), with_isa("avx2"))
    (warning,) = saturation_warnings(model, with_isa("avx2"))
    assert "3 weights" in warning and "'a.weight_quantized'" in warning and "avx512_vnni" in warning
    for isa in ("avx512_vnni", "avx_vnni", "amx_int8"):
        assert saturation_warnings(model, with_isa(isa)) == []
    assert saturation_warnings(model, load_target("arm-onnxruntime")) == []


def test_seven_bit_weights_are_not_warned_of() -> None:
    model = annotate(block())
    for name in ("a.weight", "b.weight", "head.weight"):
        params = get_params_of(model, name)
        set_params(model.graph.initializers[name], dataclasses.replace(params, scale=params.scale * np.float32(2)))
    assert saturation_warnings(lower_qdq(model, with_isa("avx2")), with_isa("avx2")) == []
