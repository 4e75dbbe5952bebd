"""The integer format: `edgekit::Requantize` against exact integers, and each operator against the QDQ graph."""

from __future__ import annotations

from fractions import Fraction
from math import floor
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import GraphError
from edgekit.lowering.functions import add_functions
from edgekit.lowering.integer import lower_integer
from edgekit.quant.requantize import requantize, requantize_multiplier, shared_shift_multipliers
from networks import needs_vnni
from qdq_graphs import QdqGraph, op_types, run
from test_qoperator import TYPES, images, residual_network

INT32 = st.integers(-(2**31), 2**31 - 1)
REALS = st.floats(2.0**-45, 2.0**20)


@given(real=st.floats(2.0**-70, 2.0**30))
def test_the_multiplier_is_real_to_31_bits(real: float) -> None:
    multiplier, shift = (int(part) for part in requantize_multiplier(real))
    assert 0 <= shift <= 62
    assert 0 <= multiplier < 2**31
    assert multiplier >= 2**30 or shift == 62
    error = abs(Fraction(multiplier, 2**shift) - Fraction(real))
    assert error <= max(Fraction(real) / 2**31, Fraction(1, 2**63))


@given(accumulators=st.lists(INT32, min_size=1, max_size=9), real=REALS, zero_point=st.integers(-128, 127))
def test_requantize_is_exact_for_negatives_ties_and_saturation(
    accumulators: list[int], real: float, zero_point: int
) -> None:
    multiplier, shift = requantize_multiplier(real)
    found = requantize(np.array(accumulators), multiplier, shift, zero_point=zero_point, low=-128, high=127)
    factor = Fraction(int(multiplier), 2 ** int(shift))
    exact = [min(max(floor(one * factor + Fraction(1, 2)) + zero_point, -128), 127) for one in accumulators]
    assert found.tolist() == exact


def test_per_channel_multipliers_keep_their_shape_and_values() -> None:
    reals = np.array([0.75, 1e-6, 3.0])
    multiplier, shift = requantize_multiplier(reals)
    singles = [requantize_multiplier(real) for real in reals]
    assert multiplier.tolist() == [int(one[0]) for one in singles]
    assert shift.tolist() == [int(one[1]) for one in singles]


@pytest.mark.parametrize("real", [0.0, -0.5, float("nan"), float("inf"), 2.0**31, np.nextafter(2.0**31, 0)])
def test_numbers_that_fixed_point_cannot_hold_are_refused(real: float) -> None:
    with pytest.raises(GraphError, match="cannot requantize by"):
        requantize_multiplier(real)


@given(a=st.floats(2.0**-20, 2.0**10), b=st.floats(2.0**-20, 2.0**10), subtract=st.booleans())
def test_shared_shift_scales_both_terms(a: float, b: float, subtract: bool) -> None:
    signed = -b if subtract else b
    (first, second), shift = shared_shift_multipliers([a, signed])
    unit = Fraction(1, 2**shift)
    assert abs(first * unit - Fraction(a)) <= unit
    assert abs(second * unit - Fraction(signed)) <= unit
    assert max(abs(first), abs(second)) >= 2**30 - 1


def function_model(op_type: str, inputs: dict[str, Any], size: int) -> ir.Model:
    """One call of a model-local function; the first input is fed, the others are initializers."""
    first, *rest = inputs
    x = ir.val(first, ir.DataType.INT32, [size])
    node = ir.node(op_type, [x, *(ir.val(name, const_value=ir.tensor(inputs[name], name=name)) for name in rest)],
                   domain="edgekit")  # fmt: skip
    node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = "y", ir.DataType.INT8, ir.Shape([size])
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=node.inputs[1:], opset_imports={"": 21}, name="g")
    model = ir.Model(graph, ir_version=10)
    add_functions(model)
    return model


@settings(max_examples=30, deadline=None)
@given(
    accumulators=st.lists(INT32, min_size=5, max_size=5),
    reals=st.lists(REALS, min_size=5, max_size=5),
    zero_point=st.integers(-128, 127),
    bounds=st.tuples(st.integers(-128, 0), st.integers(0, 127)),
)
def test_onnx_runtime_executes_requantize_exactly(
    accumulators: list[int], reals: list[float], zero_point: int, bounds: tuple[int, int]
) -> None:
    multiplier, shift = requantize_multiplier(reals)
    edges = [-(2**31), 2**31 - 1, -1, 0, 1]
    for values in (np.array(accumulators, np.int32), np.array(edges, np.int32)):
        codes = {"zero_point": np.int8(zero_point), "low": np.int8(bounds[0]), "high": np.int8(bounds[1])}
        inputs = {"x": None, "multiplier": multiplier, "shift": shift, **{k: np.asarray(v) for k, v in codes.items()}}
        found = run(function_model("Requantize", inputs, 5), {"x": values})[0]
        expected = requantize(values, multiplier, shift, zero_point=zero_point, low=bounds[0], high=bounds[1])
        assert found.dtype == np.int8
        assert found.tolist() == expected.tolist()


def test_ties_round_up_and_negative_numbers_round_to_the_nearest() -> None:
    values = np.array([-5, -3, -2, -1, 1, 2, 3, 5], np.int32)
    multiplier, shift = requantize_multiplier(0.5)
    zero = np.asarray(0, np.int8)
    inputs = {"x": None, "multiplier": multiplier, "shift": shift, "zero_point": zero}
    inputs |= {"low": np.asarray(-128, np.int8), "high": np.asarray(127, np.int8)}
    found = run(function_model("Requantize", inputs, 8), {"x": values})[0]
    assert found.tolist() == [-2, -1, -1, 0, 1, 1, 2, 3]


# --- operators ---------------------------------------------------------------------------------------------------


def assert_one_code(graph: QdqGraph, out: str, shapes: dict[str, tuple[int, ...]], seed: int = 0) -> ir.Model:
    """The lowered graph agrees with the QDQ graph within one code, and not by being constant; returns it."""
    model = graph.model(out)
    lowered = lower_integer(model)
    feeds = {name: images(seed + index, shape) for index, (name, shape) in enumerate(shapes.items())}
    reference, result = run(model, feeds)[0], run(lowered, feeds)[0]
    assert result.shape == reference.shape
    assert len(np.unique(reference)) > 2
    steps = np.rint((result.astype(np.float64) - reference) / graph.scales[out])
    assert np.abs(steps).max() <= 1
    # Ties go up here and to even there; networks this small may have many.
    assert np.count_nonzero(steps) <= max(2, 0.08 * steps.size)
    return lowered


@settings(max_examples=25, deadline=None)
@given(
    dtype=st.sampled_from(TYPES),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    group=st.sampled_from([1, 2, 4]),
    pads=st.tuples(*[st.integers(0, 2)] * 4),
    stored=st.booleans(),
    per_channel=st.booleans(),
    clip=st.sampled_from([None, "Relu", "Clip"]),
    low=st.sampled_from([-6.0, -1.0, 0.0]),
    seed=st.integers(0, 10**6),
)
def test_conv(
    dtype: str, kernel: int, stride: int, dilation: int, group: int, pads: tuple[int, ...], stored: bool,
    per_channel: bool, clip: str | None, low: float, seed: int,
) -> None:  # fmt: skip
    g = QdqGraph(dtype, seed=seed)
    x = g.input("x", ["n", 4, 6, 7])
    w = g.weight("w", [8, 4 // group, kernel, kernel], axis=0 if per_channel else None)
    options = {"pads": list(pads), "strides": [stride] * 2, "dilations": [dilation] * 2, "group": group}
    value = g.float_op("Conv", "c", [x, w, g.bias("b", 8, x, w, stored=stored)], **options)
    bounds = (
        [g.constant("clip_low", np.float32(-0.7)), g.constant("clip_high", np.float32(3))] if clip == "Clip" else []
    )
    out = g.op(clip, "act", [value, *bounds], low, 6) if clip else g.quantized(value, low, 6)
    lowered = assert_one_code(g, out, {"x": (2, 4, 6, 7)}, seed)
    assert {node.name: node.op_type for node in lowered.graph}["c"] == "ConvInteger"
    assert not {"Relu", "Clip"} & set(op_types(lowered))


@settings(max_examples=20, deadline=None)
@given(
    dtype=st.sampled_from(TYPES),
    op_type=st.sampled_from(["Add", "Sub", "Mul"]),
    high=st.floats(0.2, 50),
    out=st.floats(0.5, 30),
    constant=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_binary_operators(dtype: str, op_type: str, high: float, out: float, constant: bool, seed: int) -> None:
    g = QdqGraph(dtype, seed=seed)
    x, shapes = g.input("x", ["n", 3, 4, 5]), {"x": (2, 3, 4, 5)}
    if constant:
        y = g.constant("y", (high * g.rng.normal(0, 1, (3, 1, 1))).astype(np.float32))
    else:
        y, shapes["y"] = g.input("y", ["n", 3, 4, 5], -high / 3, high), (2, 3, 4, 5)
    result = g.op(op_type, "op", [x, y], -out, out)
    model, feeds = g.model(result), {name: 3 * images(seed, shape) for name, shape in shapes.items()}
    steps = np.rint((run(lower_integer(model), feeds)[0] - run(model, feeds)[0]) / g.scales[result])
    assert np.abs(steps).max() <= 1


UNARY: dict[str, dict[str, Any]] = {
    "Sigmoid": {},
    "Tanh": {},
    "LeakyRelu": {"alpha": 0.2},
    "HardSwish": {},
    "HardSigmoid": {},
    "Elu": {},
    "Gelu": {},
    "Relu": {},
    "Softplus": {},
}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("op_type", UNARY)
def test_functions_of_one_code_are_tables_and_exact_on_all_codes(op_type: str, dtype: str) -> None:
    g = QdqGraph(dtype)
    out = g.op(op_type, "f", [g.input("x", [256], -4, 3)], -1, 2.5, **UNARY[op_type])
    model, feeds = g.model(out), {"x": np.linspace(-4.5, 3.5, 256).astype(np.float32)}
    lowered = lower_integer(model)
    assert op_types(lowered) == ["QuantizeLinear", "Cast", "Gather", "DequantizeLinear"]
    np.testing.assert_array_equal(run(lowered, feeds)[0], run(model, feeds)[0])


POOLS: list[dict[str, Any]] = [
    {"kernel_shape": [2, 3]},
    {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]},
    {"kernel_shape": [3, 3], "pads": [1, 0, 1, 2], "count_include_pad": 1},
    {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [2, 2], "ceil_mode": 1},
    {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [2, 2], "ceil_mode": 1, "count_include_pad": 1},
    {"kernel_shape": [1, 2], "strides": [3, 3], "pads": [0, 0, 0, 1], "ceil_mode": 1},
    {"kernel_shape": [3, 2], "strides": [2, 2], "auto_pad": "SAME_LOWER"},
    {"kernel_shape": [3, 2], "strides": [2, 2], "auto_pad": "SAME_UPPER"},
    {"kernel_shape": [2, 2], "auto_pad": "VALID"},
    {"kernel_shape": [3, 2], "dilations": [2, 3]},
]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("options", POOLS)
def test_average_pool(options: dict[str, Any], dtype: str) -> None:
    g = QdqGraph(dtype)
    out = g.op("AveragePool", "p", [g.input("x", ["n", 3, 8, 9])], -1, 2, **options)
    lowered = assert_one_code(g, out, {"x": (3, 3, 8, 9)})
    assert op_types(lowered) == ["QuantizeLinear", "ConvInteger", "Requantize", "DequantizeLinear"]


@pytest.mark.parametrize("dtype", TYPES)
def test_mean_concat_where_and_moves(dtype: str) -> None:
    g = QdqGraph(dtype)
    x, y = g.input("x", ["n", 4, 6, 6]), g.input("y", ["n", 2, 6, 6], -1, 3)
    joined = g.op("Concat", "cat", [x, y], -2, 3, axis=1)
    pooled = g.same("MaxPool", "max", [joined], joined, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    moved = g.same("Transpose", "t", [pooled], pooled, perm=[0, 2, 3, 1])
    padding = g.constant("pads", np.array([0, 1, 0, 0, 0, 0, 2, 0], np.int64))
    padded = g.same("Pad", "pad", [moved, padding], moved)
    axes = g.constant("axes", np.array([1, 2], np.int64))
    out = g.op("ReduceMean", "mean", [padded, axes], -1, 1.5, keepdims=0)
    lowered = assert_one_code(g, out, {"x": (3, 4, 6, 6), "y": (3, 2, 6, 6)})
    assert {"Concat", "MaxPool", "Transpose", "Pad", "ReduceSum"} <= set(op_types(lowered))
    gap = QdqGraph(dtype)
    assert_one_code(
        gap, gap.op("GlobalAveragePool", "gap", [gap.input("x", ["n", 4, 6, 6])], -0.5, 0.6), {"x": (5, 4, 6, 6)}
    )


@needs_vnni
@settings(max_examples=20, deadline=None)
@given(
    dtype=st.sampled_from(TYPES),
    trans_a=st.booleans(),
    trans_b=st.booleans(),
    alpha=st.sampled_from([1.0, 0.3]),
    beta=st.sampled_from([1.0, 1.7]),
    stored=st.booleans(),
    per_channel=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_gemm(
    dtype: str, trans_a: bool, trans_b: bool, alpha: float, beta: float, stored: bool, per_channel: bool, seed: int
) -> None:
    g = QdqGraph(dtype, seed=seed)
    x = g.input("x", [16, "n"] if trans_a else ["n", 16])
    axis = (0 if trans_b else 1) if per_channel else None
    w = g.weight("w", [6, 16] if trans_b else [16, 6], axis=axis)
    options = {"alpha": alpha, "beta": beta, "transA": int(trans_a), "transB": int(trans_b)}
    out = g.op("Gemm", "fc", [x, w, g.bias("b", 6, x, w, stored=stored)], -6, 6, **options)
    lowered = assert_one_code(g, out, {"x": (16, 9) if trans_a else (9, 16)}, seed)
    assert {node.name: node.op_type for node in lowered.graph}["fc"] == "MatMulInteger"


@needs_vnni
@pytest.mark.parametrize("dtype", TYPES)
def test_matmul_of_weights_with_a_bias_behind_it_and_of_two_activations(dtype: str) -> None:
    g = QdqGraph(dtype)
    x, w = g.input("x", ["n", 7, 16]), g.weight("w", [16, 5], axis=1)
    product = g.float_op("MatMul", "m", [x, w])
    out = g.op("Add", "a", [product, g.constant("row", np.arange(5, dtype=np.float32))], -5, 9)
    lowered = assert_one_code(g, out, {"x": (3, 7, 16)})
    assert op_types(lowered) == ["QuantizeLinear", "MatMulInteger", "Add", "Requantize", "DequantizeLinear"]
    two = QdqGraph(dtype)
    scores = two.op("MatMul", "m", [two.input("x", ["n", 7, 16]), two.input("y", ["n", 16, 7], -1, 3)], -9, 9)
    assert_one_code(two, scores, {"x": (3, 7, 16), "y": (3, 16, 7)})


@needs_vnni
@pytest.mark.parametrize("dtype", TYPES)
def test_a_last_layer_without_output_q_leaves_through_dequantize_linear(dtype: str) -> None:
    g = QdqGraph(dtype)
    x, w = g.input("x", ["n", 16]), g.weight("w", [5, 16], axis=0)
    model = g.model(g.float_op("Gemm", "fc", [x, w, g.bias("b", 5, x, w)], transB=1))
    lowered, feeds = lower_integer(model), {"x": images(0, (4, 16))}
    assert op_types(lowered) == ["QuantizeLinear", "MatMulInteger", "Add", "DequantizeLinear"]
    assert lowered.graph.outputs[0].name == model.graph.outputs[0].name
    assert np.abs(run(lowered, feeds)[0] - run(model, feeds)[0]).max() < 2e-6


@needs_vnni
@pytest.mark.parametrize("dtype", TYPES)
def test_a_network_is_integer_throughout_at_any_batch_size(dtype: str) -> None:
    model, step = residual_network(dtype)
    lowered = lower_integer(model)
    kinds = op_types(lowered)
    assert (kinds.count("QuantizeLinear"), kinds.count("DequantizeLinear")) == (1, 1)
    assert {(function.domain, function.name) for function in lowered.functions.values()} == {
        ("edgekit", "Requantize"),
        ("edgekit", "RequantizeAdd"),
    }
    for batch in (1, 5):
        feeds = {"x": images(batch, (batch, 4, 8, 8))}
        reference, result = run(model, feeds)[0], run(lowered, feeds)[0]
        assert reference.std() > 10 * step
        assert np.abs(result - reference).max() < 2 * step


def test_lowering_is_deterministic_and_leaves_its_input_alone() -> None:
    model, _ = residual_network("uint8")
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    once, again = (ir.to_proto(lower_integer(model)).SerializeToString(deterministic=True) for _ in range(2))
    assert once == again
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


# --- refusals ----------------------------------------------------------------------------------------------------


def softmax(g: QdqGraph, x: str) -> str:
    return g.op("Softmax", "attention.softmax", [x], 0, 1)


def float_tail(g: QdqGraph, x: str) -> str:
    return g.float_op("Sigmoid", "head.score", [x])


def float_conv(g: QdqGraph, x: str) -> str:
    w = g.constant("w", np.ones((2, 3, 1, 1), np.float32))
    return g.float_op("Conv", "stem.conv", [g.float_op("Tanh", "stem.tanh", [x]), w])


def wrong_axis(g: QdqGraph, x: str) -> str:
    return g.op("Conv", "c", [x, g.weight("w", [2, 3, 1, 1], axis=1)], -1, 1)


def resize_linear(g: QdqGraph, x: str) -> str:
    scales = g.constant("scales", np.array([1, 1, 2, 2], np.float32))
    return g.same("Resize", "up", [x, "", scales], x, mode="linear")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            softmax,
            "Softmax 'attention.softmax' would stay float in the integer format: this operator has no integer form",
        ),
        (float_tail, "Sigmoid 'head.score' would stay float .* QuantizeLinear after it"),
        (float_conv, "Tanh 'stem.tanh' would stay float"),
        (wrong_axis, "Conv 'c' would stay float .* each entry of axis 1; expected axis 0"),
        (resize_linear, "Resize 'up' would stay float"),
    ],
)
def test_a_float_operator_is_refused_by_name(build: Any, message: str) -> None:
    g = QdqGraph()
    out = build(g, g.input("x", ["n", 3, 4, 4]))
    with pytest.raises(GraphError, match=message):
        lower_integer(g.model(out))


def test_a_mean_over_a_dynamic_axis_is_refused_with_its_shape() -> None:
    g = QdqGraph()
    out = g.op("GlobalAveragePool", "gap", [g.input("x", ["n", 3, "h", "w"])], -1, 1)
    with pytest.raises(GraphError, match=r"GlobalAveragePool 'gap' .* expected static sizes there"):
        lower_integer(g.model(out))


def test_a_scale_ratio_beyond_fixed_point_is_refused_by_name() -> None:
    g = QdqGraph()
    out = g.op("MaxPool", "pool", [g.input("x", ["n", 3, 4, 4], -1e30, 1e30)], -1e-3, 1e-3, kernel_shape=[2, 2])
    with pytest.raises(GraphError, match=r"QuantizeLinear 'pool_y/q': cannot requantize by .* below 2\*\*31"):
        lower_integer(g.model(out))
