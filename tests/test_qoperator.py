"""The QOperator format against ONNX Runtime: the QDQ graph as it stands, and what the optimizer makes of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import GraphError
from edgekit.lowering.qoperator import lower_qoperator
from networks import needs_vnni
from qdq_graphs import QdqGraph, op_types, run

TYPES = ["uint8", "int8"]
CONTRIB = "com.microsoft"


def images(seed: int, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


def residual_network(dtype: str) -> tuple[ir.Model, float]:
    """Conv -> Conv with a skip, Concat, both kinds of pooling, Flatten and a Gemm with float output."""
    g = QdqGraph(dtype, seed=3)
    x = g.input("x", ["n", 4, 8, 8])
    w1, w2, w3 = g.weight("w1", [8, 4, 3, 3]), g.weight("w2", [8, 8, 3, 3]), g.weight("w3", [8, 1, 3, 3])
    c1 = g.op("Conv", "c1", [x, w1, g.bias("b1", 8, x, w1)], 0, 8, pads=[1] * 4)
    c2 = g.op("Conv", "c2", [c1, w2, g.bias("b2", 8, c1, w2)], -12, 12, pads=[1] * 4)
    added = g.op("Add", "add", [c2, c1], 0, 14)
    c3 = g.op("Conv", "c3", [added, w3, g.bias("b3", 8, added, w3)], -9, 9, pads=[1] * 4, strides=[2, 2], group=8)
    pooled = g.same("MaxPool", "pool", [added], added, kernel_shape=[2, 2], strides=[2, 2])
    joined = g.op("Concat", "cat", [c3, pooled], -9, 14, axis=1)
    gap = g.op("GlobalAveragePool", "gap", [joined], -2, 7)
    flat = g.same("Flatten", "flat", [gap], gap)
    fc = g.weight("fc", [5, 16], axis=0)
    logits = g.float_op("Gemm", "fc", [flat, fc, g.bias("fcb", 5, flat, fc)], transB=1)
    return g.model(logits), 0.05


def unit_graph(op_type: str, dtype: str) -> tuple[ir.Model, float, tuple[int, ...]]:
    g = QdqGraph(dtype, seed=5)
    if op_type in ("Gemm", "MatMul"):
        x, w = g.input("x", ["n", 12]), g.weight("w", [12, 6], axis=1)
        inputs = [x, w, g.bias("b", 6, x, w)] if op_type == "Gemm" else [x, w]
        out, shape = g.op(op_type, "op", inputs, -5, 5), (4, 12)
    elif op_type == "Conv":
        x, w = g.input("x", ["n", 4, 9, 8]), g.weight("w", [6, 2, 3, 3])
        options = {"pads": [1, 0, 2, 1], "strides": [2, 1], "dilations": [1, 2], "group": 2}
        out, shape = g.op("Conv", "op", [x, w, g.bias("b", 6, x, w)], -5, 6, **options), (3, 4, 9, 8)
    elif op_type in ("Add", "Mul", "Concat"):
        x = g.input("x", ["n", 4, 9, 8])
        y = g.op("Sigmoid", "side", [x], 0, 1)
        out, shape = g.op(op_type, "op", [x, y], -2, 3, **({"axis": 1} if op_type == "Concat" else {})), (3, 4, 9, 8)
    else:
        options = {
            "AveragePool": {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [2, 2]},
            "LeakyRelu": {"alpha": 0.1},
            "Softmax": {"axis": 1},
        }
        x = g.input("x", ["n", 4, 9, 8])
        out, shape = g.op(op_type, "op", [x], -1, 2, **options.get(op_type, {})), (3, 4, 9, 8)
    return g.model(out), g.scales[out], shape


LOWERED = {
    "Conv": "QLinearConv",
    "MatMul": "QLinearMatMul",
    "Gemm": "QGemm",
    "Add": "QLinearAdd",
    "Mul": "QLinearMul",
    "Concat": "QLinearConcat",
    "AveragePool": "QLinearAveragePool",
    "GlobalAveragePool": "QLinearGlobalAveragePool",
    "LeakyRelu": "QLinearLeakyRelu",
    "Sigmoid": "QLinearSigmoid",
    "Softmax": "QLinearSoftmax",
}


@needs_vnni
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("op_type", LOWERED)
def test_each_operator_equals_the_optimized_qdq_graph_and_stays_within_one_code(op_type: str, dtype: str) -> None:
    model, scale, shape = unit_graph(op_type, dtype)
    lowered = lower_qoperator(model)
    feeds = {"x": images(1, shape)}
    reference, optimized, result = run(model, feeds)[0], run(model, feeds, optimized=True)[0], run(lowered, feeds)[0]
    assert LOWERED[op_type] in op_types(lowered)
    assert op_type not in op_types(lowered)
    assert len(np.unique(result)) > 5
    np.testing.assert_array_equal(result, optimized)
    assert np.abs(np.rint((result - reference) / scale)).max() <= 1


@pytest.mark.parametrize("dtype", TYPES)
def test_a_network_equals_the_optimized_qdq_graph(dtype: str) -> None:
    model, _ = residual_network(dtype)
    lowered = lower_qoperator(model)
    for batch in (1, 5):
        feeds = {"x": images(batch, (batch, 4, 8, 8))}
        np.testing.assert_array_equal(run(lowered, feeds)[0], run(model, feeds, optimized=True)[0])
    assert "DequantizeLinear" not in op_types(lowered)
    assert op_types(lowered).count("QuantizeLinear") == 1
    assert {"MaxPool", "Flatten"} <= set(op_types(lowered))


def test_node_names_stay_and_the_input_model_is_untouched() -> None:
    model, _ = residual_network("uint8")
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    first, second = lower_qoperator(model), lower_qoperator(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    kinds = {node.name: node.op_type for node in first.graph}
    assert kinds["c1"] == "QLinearConv"
    assert kinds["add"] == "QLinearAdd"
    assert kinds["fc"] == "QGemm"
    once, again = (ir.to_proto(one).SerializeToString(deterministic=True) for one in (first, second))
    assert once == again


def test_no_dead_initializers_are_left() -> None:
    lowered = lower_qoperator(residual_network("int8")[0])
    read = {value.name for node in lowered.graph for value in node.inputs if value is not None}
    assert set(lowered.graph.initializers) <= read


@settings(max_examples=25, deadline=None)
@given(
    dtype=st.sampled_from(TYPES),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    group=st.sampled_from([1, 2, 4]),
    pads=st.tuples(*[st.integers(0, 2)] * 4),
    stored=st.booleans(),
    per_channel=st.booleans(),
    relu=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_any_conv_equals_the_optimized_qdq_graph(
    dtype: str, kernel: int, stride: int, group: int, pads: tuple[int, ...], stored: bool, per_channel: bool,
    relu: bool, seed: int,
) -> None:  # fmt: skip
    g = QdqGraph(dtype, seed=seed)
    x = g.input("x", ["n", 4, 6, 7])
    w = g.weight("w", [8, 4 // group, kernel, kernel], axis=0 if per_channel else None)
    b = g.bias("b", 8, x, w, stored=stored)
    value = g.float_op("Conv", "c", [x, w, b], pads=list(pads), strides=[stride] * 2, group=group)
    out = g.op("Relu", "r", [value], 0, 6) if relu else g.quantized(value, -6, 6)
    model = g.model(out)
    lowered = lower_qoperator(model)
    assert "QLinearConv" in op_types(lowered)
    feeds = {"x": images(seed, (2, 4, 6, 7))}
    np.testing.assert_array_equal(run(lowered, feeds)[0], run(model, feeds, optimized=True)[0])


@needs_vnni
@pytest.mark.parametrize("dtype", TYPES)
def test_a_clip_that_saturation_does_not_do_becomes_a_clip_of_codes(dtype: str) -> None:
    g = QdqGraph(dtype)
    x, w = g.input("x", ["n", 4, 6, 6]), g.weight("w", [8, 4, 3, 3])
    bounds = [g.constant("low", np.float32(-1.5)), g.constant("high", np.float32(2.5))]
    out = g.op("Clip", "clip", [g.float_op("Conv", "c", [x, w]), *bounds], -4, 6)
    model, feeds = g.model(out), {"x": images(2, (2, 4, 6, 6))}
    lowered = lower_qoperator(model)
    assert op_types(lowered) == ["QuantizeLinear", "QLinearConv", "Clip", "DequantizeLinear"]
    reference, result = run(model, feeds)[0], run(lowered, feeds)[0]
    assert (reference.min(), reference.max()) == (result.min(), result.max())
    assert np.abs(np.rint((result - reference) / g.scales[out])).max() <= 1


def test_a_float_operator_stays_between_dequantize_and_quantize() -> None:
    g = QdqGraph()
    x = g.input("x", ["n", 8])
    out = g.op("Tanh", "t", [x], -1, 1)
    lowered = lower_qoperator(g.model(out))
    middle = ["QuantizeLinear", "DequantizeLinear", "Tanh", "QuantizeLinear", "DequantizeLinear"]
    assert op_types(lowered) == middle


@pytest.mark.parametrize(
    "options", [{"dilations": [2, 2]}, {"ceil_mode": 1, "count_include_pad": 1, "pads": [1] * 4, "strides": [2, 2]}]
)
def test_average_pools_that_the_runtime_gets_wrong_stay_float(options: dict[str, Any]) -> None:
    g = QdqGraph()
    out = g.op("AveragePool", "p", [g.input("x", ["n", 2, 7, 8])], -1, 2, kernel_shape=[3, 3], **options)
    model, feeds = g.model(out), {"x": images(0, (2, 2, 7, 8))}
    lowered = lower_qoperator(model)
    assert "AveragePool" in op_types(lowered)
    np.testing.assert_array_equal(run(lowered, feeds)[0], run(model, feeds)[0])


def test_a_matmul_without_output_q_leaves_as_float() -> None:
    g = QdqGraph("uint8")
    x, w = g.input("x", ["n", 7, 16]), g.weight("w", [16, 5], axis=1)
    model = g.model(g.float_op("MatMul", "m", [x, w]))
    lowered, feeds = lower_qoperator(model), {"x": images(0, (2, 7, 16))}
    assert op_types(lowered) == ["QuantizeLinear", "MatMulIntegerToFloat"]
    np.testing.assert_array_equal(run(lowered, feeds)[0], run(model, feeds, optimized=True)[0])


def test_a_bias_beyond_int32_is_refused_by_name() -> None:
    g = QdqGraph()
    x, w = g.input("x", ["n", 4, 6, 6]), g.weight("w", [8, 4, 3, 3], spread=1e-9)
    bias = g.constant("b", np.full(8, 100, np.float32))
    model = g.model(g.op("Conv", "head.conv", [x, w, bias], -4, 100))
    with pytest.raises(GraphError, match=r"Conv 'head.conv': its bias needs the code .* beyond int32; give the weight"):
        lower_qoperator(model)
