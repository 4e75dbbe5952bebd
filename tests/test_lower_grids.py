"""Lowered graphs: weights and biases, grids that training chose, nodes kept float, and what must hold for every graph."""

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
from networks import (
    Net,
    annotate,
    block,
    changed,
    get_params_of,
    grids,
    lowered,
    mixed_net,
    random_net,
    residual_net,
    samples,
    simulate,
    text,
    token_net,
    trained,
    worst,
)

TARGETS = ("x86-onnxruntime", "arm-onnxruntime", "x86-openvino", "cuda-tensorrt")
ALWAYS, CONSUMED = "x86-onnxruntime", "x86-openvino"


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


def test_kept_activations_and_pools_stay_where_they_are() -> None:
    assert "a.relu_y = Relu(a_y)" in lowered(block(), ALWAYS, "a.relu")
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
