from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper

from edgekit.errors import GraphError
from edgekit.quant.affine import choose_params, dequantize, fake_quantize, quantize, regrid, weight_params
from edgekit.quant.spec import INTEGER_RANGES, QuantParams, QuantSpec

NORMAL = np.finfo(np.float32).tiny
LARGEST = float(np.finfo(np.float32).max)
EIGHT_AND_SIXTEEN = ("int8", "uint8", "int16", "uint16")

HUGE = 2.0**126  # beyond it, a step after the end of a range overflows
finite = st.floats(-HUGE, HUGE, width=32)
any_float = st.floats(width=32)
ranges = st.tuples(finite, finite).map(lambda ends: (min(ends), max(ends)))
specs = st.builds(QuantSpec, st.sampled_from([*EIGHT_AND_SIXTEEN, "int4", "uint4"]), st.booleans(), st.just(False))
scales = st.one_of(
    st.floats(2.0**-10, 2.0**10, width=32),
    st.floats(0.0, LARGEST, width=32, exclude_min=True),
    st.sampled_from([1.0, 0.5, 0.1, 1e-45, 1e-40, float(NORMAL), 1e38]),
)


@cache
def runtime(dtype: str, axis: int | None) -> ort.InferenceSession:
    """x (float), s, z -> Quantize -> q (codes) -> Dequantize -> d, run by ONNX Runtime as they stand."""
    code = TensorProto.DataType.Value(dtype.upper())
    attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
    narrow = code in (TensorProto.INT4, TensorProto.UINT4)  # Python cannot pass 4-bit arrays: cast them in the graph
    io = TensorProto.INT8 if narrow else code
    nodes = [
        helper.make_node("Cast", ["z"], ["zc"], to=code) if narrow else helper.make_node("Identity", ["z"], ["zc"]),
        helper.make_node("QuantizeLinear", ["x", "s", "zc"], ["qc"], **attributes),
        helper.make_node("DequantizeLinear", ["qc", "s", "zc"], ["d"], **attributes),
        helper.make_node("Cast", ["qc"], ["q"], to=io) if narrow else helper.make_node("Identity", ["qc"], ["q"]),
    ]
    shape = None if axis is None else [None]
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, None),
            helper.make_tensor_value_info("s", TensorProto.FLOAT, shape),
            helper.make_tensor_value_info("z", io, shape),
        ],
        [helper.make_tensor_value_info("q", io, None), helper.make_tensor_value_info("d", TensorProto.FLOAT, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def assert_same_as_runtime(x: NDArray[np.float32], params: QuantParams) -> None:
    z = params.zero_point.astype(np.int8 if "4" in params.dtype else params.dtype)
    codes, numbers = runtime(params.dtype, params.axis).run(None, {"x": x, "s": params.scale, "z": z})
    ours = quantize(x, params)
    assert ours.shape == x.shape and str(ours.dtype) == params.dtype.replace("int4", "int8")
    np.testing.assert_array_equal(ours, codes)
    assert dequantize(ours, params).tobytes() == numbers.tobytes()
    assert fake_quantize(x, params).tobytes() == numbers.tobytes()


def grid(dtype: str, scale: float | list[float], zero_point: int | list[int], axis: int | None = None) -> QuantParams:
    return QuantParams(dtype, np.array(scale, np.float32), np.array(zero_point, np.int64), axis)


HARD = np.array(
    [np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 127.5, -127.5, -128.5]
    + [254.5, 255.5, 32766.5, 32767.5, 65534.5, 1e-45, -1e-45, 1e-38, 1e30, -1e30, LARGEST, -LARGEST],
    np.float32,
)


@pytest.mark.parametrize("repeat", [1, 37], ids=["small", "vectorized"])
@pytest.mark.parametrize("scale", [1.0, 0.1, 1e-45, 1e-40, float(NORMAL), 1e38])
@pytest.mark.parametrize("dtype", [*EIGHT_AND_SIXTEEN, "int4", "uint4"])
def test_hard_values_get_the_codes_of_onnx_runtime(dtype: str, scale: float, repeat: int) -> None:
    low, high = INTEGER_RANGES[dtype]
    for zero_point in (low, (low + high + 1) // 2, 5, high):
        assert_same_as_runtime(np.tile(HARD, repeat), grid(dtype, scale, zero_point))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(EIGHT_AND_SIXTEEN), scales, st.data())
def test_any_float_gets_the_code_of_onnx_runtime(dtype: str, scale: float, data: st.DataObject) -> None:
    low, high = INTEGER_RANGES[dtype]
    zero_point = data.draw(st.integers(low, high))
    drawn = np.array(data.draw(st.lists(any_float, max_size=20)), np.float32)
    steps = np.arange(low - high - 2, high - low + 2, max((high - low) // 300, 1))
    with np.errstate(over="ignore"):
        ties = ((steps + 0.5) * np.float32(scale)).astype(np.float32)  # on, and by rounding just beside, the ties
    assert_same_as_runtime(np.concatenate([drawn, ties]), grid(dtype, scale, zero_point))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2), st.integers(1, 40), st.sampled_from(["int8", "uint8"]), st.data())
def test_each_channel_has_its_own_grid(axis: int, last: int, dtype: str, data: st.DataObject) -> None:
    shape = (3, 4, last)
    count = shape[axis]
    scale = data.draw(st.lists(scales, min_size=count, max_size=count))
    zero = data.draw(st.lists(st.integers(*INTEGER_RANGES[dtype]), min_size=count, max_size=count))
    seed = data.draw(st.integers(0, 1000))
    x = (np.random.default_rng(seed).standard_normal(shape) * 100).astype(np.float32)
    assert_same_as_runtime(x, grid(dtype, scale, zero, axis))


def test_a_scalar_and_an_empty_array_keep_their_shape() -> None:
    params = grid("uint8", 0.5, 3)
    assert_same_as_runtime(np.array(1.25, np.float32), params)
    assert_same_as_runtime(np.zeros((2, 0), np.float32), params)


def test_a_narrow_grid_saturates_above_onnx() -> None:
    params = replace(grid("int8", 1.0, 0), narrow_range=True)
    x = np.array([-128.0, -127.4, np.nan, 200.0], np.float32)
    assert quantize(x, params).tolist() == [-127, -127, -127, 127]


def test_int32_saturates_at_its_own_bounds() -> None:
    params = grid("int32", 1.0, 0)
    x = np.array([3e9, -3e9, 2147483520.0, 16777216.0], np.float32)
    assert quantize(x, params).tolist() == [2**31 - 1, -(2**31), 2147483520, 16777216]


@settings(max_examples=400, deadline=None)
@given(ranges, specs)
@example((0.0, 0.0), QuantSpec("uint8"))
@example((-0.0, -0.0), QuantSpec("int8", symmetric=True))
@example((0.0, 1e-45), QuantSpec("uint8"))
@example((-HUGE, HUGE), QuantSpec("uint4"))
def test_a_grid_covers_its_range_and_holds_zero(bounds: tuple[float, float], spec: QuantSpec) -> None:
    low, high = min(bounds[0], 0.0), max(bounds[1], 0.0)
    params = choose_params(*bounds, spec, observer="me")
    scale, zero_point = params.scale, params.zero_point
    assert isinstance(scale, np.ndarray) and scale.dtype == np.float32 and scale.shape == zero_point.shape == ()
    assert NORMAL <= scale < np.inf and params.qmin <= zero_point <= params.qmax
    assert (params.low, params.high, params.observer) == (low, high, "me")
    assert fake_quantize(np.zeros(1, np.float32), params)[0] == 0.0
    ends = fake_quantize(np.array([low, high], np.float32), params).astype(np.float64)
    # Half a step for rounding, and half a step because the zero point is rounded too.
    assert np.all(np.abs(ends - [low, high]) <= 1.0001 * float(scale))
    wasted = (params.qmax - params.qmin) * float(scale) - (high - low)
    if not spec.symmetric and low < high and scale > NORMAL:
        assert abs(wasted) <= 1e-6 * (high - low)


@pytest.mark.parametrize(
    ("spec", "scale", "zero_point"),
    [
        (QuantSpec("int8", symmetric=True), 3.0 / 127, 0),
        (QuantSpec("int8", symmetric=True, narrow_range=True), 3.0 / 127, 0),
        (QuantSpec("uint8", symmetric=True), 3.0 / 127, 128),
        (QuantSpec("int4", symmetric=True), 3.0 / 7, 0),
        (QuantSpec("int16", symmetric=True), 3.0 / 32767, 0),
        (QuantSpec("uint8"), 4.0 / 255, 64),
        (QuantSpec("int8"), 4.0 / 255, -64),
    ],
)
def test_known_grids_of_minus_one_to_three(spec: QuantSpec, scale: float, zero_point: int) -> None:
    params = choose_params(-1.0, 3.0, spec)
    assert params.scale == np.float32(scale) and params.zero_point == zero_point


def test_the_widest_range_has_a_finite_scale() -> None:
    assert choose_params(-LARGEST, LARGEST, QuantSpec("uint4")).scale == np.float32(2 * LARGEST / 15)


def test_a_relu_puts_the_zero_point_at_the_lowest_code() -> None:
    assert choose_params(0.0, 6.0, QuantSpec("uint8")).zero_point == 0
    assert choose_params(0.25, 6.0, QuantSpec("int8")).zero_point == -128


def test_ranges_without_extent_get_a_sane_scale() -> None:
    assert choose_params(0.0, 0.0, QuantSpec()).scale == 1.0
    low, high = np.array([-1.0, 0.0, 0.0]), np.array([2.54, 0.0, 1e-44])
    params = choose_params(low, high, QuantSpec("int8", symmetric=True, per_channel=True), axis=0)
    np.testing.assert_array_equal(params.scale, np.array([0.02, 0.02, NORMAL], np.float32))
    assert (params.low, params.high) == (-1.0, 2.54)


@pytest.mark.parametrize("bounds", [(np.nan, 1.0), (0.0, np.inf), (2.0, 1.0)])
def test_a_broken_range_is_refused(bounds: tuple[float, float]) -> None:
    with pytest.raises(GraphError, match="expected finite numbers, low before high"):
        choose_params(*bounds, QuantSpec())


WEIGHT = QuantSpec("int8", symmetric=True, per_channel=True, narrow_range=True)


@settings(max_examples=60, deadline=None)
@given(st.integers(-4, 3), st.integers(0, 1000))
def test_weights_use_the_codes_from_end_to_end_in_each_channel(axis: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    spread = np.exp(rng.normal(0, 3, 4)).reshape(4, 1, 1, 1)
    weight = np.moveaxis((rng.standard_normal((4, 3, 2, 5)) * spread).astype(np.float32), 0, axis)
    params = weight_params(weight, WEIGHT, axis=axis)
    assert params.axis == axis % 4 and params.scale.shape == (4,) and params.observer == "minmax"
    codes = np.moveaxis(quantize(weight, params), axis, 0).reshape(4, -1)
    assert np.abs(codes.astype(int)).max(axis=1).tolist() == [127] * 4
    error = np.abs(np.moveaxis(fake_quantize(weight, params) - weight, axis, 0)).reshape(4, -1).max(axis=1)
    assert np.all(error <= 0.501 * params.scale)
    assert_same_as_runtime(weight, params)


def test_a_dead_channel_gets_the_scale_of_the_others_and_codes_zero() -> None:
    weight = np.array([[0.5, -1.27], [0.0, -0.0], [0.3, 0.1]], np.float32)
    params = weight_params(weight, WEIGHT, axis=0)
    assert params.scale[1] == params.scale[0] == np.float32(0.01)
    assert quantize(weight, params)[1].tolist() == [0, 0]


def test_weights_of_one_grid_ignore_the_axis() -> None:
    params = weight_params(np.array([[0.5, -1.27]], np.float32), replace(WEIGHT, per_channel=False), axis=0)
    assert params.axis is None and params.scale == np.float32(0.01)


def test_broken_weights_are_counted() -> None:
    with pytest.raises(GraphError, match=r"shape \(1, 3\) holds 2 NaN or infinite"):
        weight_params(np.array([[np.nan, 1.0, -np.inf]], np.float32), WEIGHT, axis=0)


@settings(max_examples=300, deadline=None)
@given(ranges, st.sampled_from([("uint8", "int8", 128), ("uint16", "int16", 32768), ("uint4", "int4", 8)]))
def test_signed_and_unsigned_affine_are_the_same_grid(bounds: tuple[float, float], pair: tuple[str, str, int]) -> None:
    unsigned, signed, shift = pair
    params = choose_params(*bounds, QuantSpec(unsigned), observer="kld")
    moved = regrid(params, QuantSpec(signed))
    assert moved == replace(params, dtype=signed, zero_point=params.zero_point - shift)
    assert regrid(moved, QuantSpec(unsigned)) == params
    fixed = replace(params, fixed=True)
    assert regrid(fixed, QuantSpec(signed)) == replace(moved, fixed=True)


def test_a_calibrated_grid_becomes_symmetric_from_its_range() -> None:
    params = choose_params(-1.0, 3.0, QuantSpec("uint8"), observer="kld")
    moved = regrid(params, QuantSpec("int8", symmetric=True))
    assert moved.scale == np.float32(3.0 / 127) and moved.zero_point == 0 and moved.observer == "kld"
    assert regrid(moved, QuantSpec("uint8")) == params  # the recorded range is still the one that was observed


def test_a_trained_grid_is_renumbered_but_not_moved() -> None:
    trained = replace(grid("uint8", 0.03, 128), low=-1.0, high=3.0, fixed=True)
    moved = regrid(trained, QuantSpec("int8", symmetric=True))
    assert moved == replace(trained, dtype="int8", zero_point=np.array(0))
    assert regrid(moved, QuantSpec("uint8")) == trained
    x = np.linspace(-5, 5, 500, dtype=np.float32)
    np.testing.assert_array_equal(fake_quantize(x, moved), fake_quantize(x, trained))
    narrow = replace(trained, narrow_range=True)
    assert regrid(narrow, QuantSpec("int8", symmetric=True)).qmin == -127


@pytest.mark.parametrize(
    ("params", "spec", "words"),
    [
        (replace(grid("uint8", 0.03, 37), fixed=True), QuantSpec("int8", symmetric=True), "zero point 37.*trained"),
        (grid("uint8", 0.03, 37), QuantSpec("int8", symmetric=True), "its float range is not known"),
        (replace(grid("uint8", 0.03, 37), fixed=True), QuantSpec("uint16"), "expected uint16, affine, per tensor"),
        (replace(grid("int8", 0.03, 0), fixed=True), QuantSpec("int8", narrow_range=True), "narrow range"),
        (replace(grid("int8", [0.1, 0.2], [0, 1], 1), fixed=True), QuantSpec("uint8"), "0 to 1, per channel of axis 1"),
    ],
)
def test_a_grid_that_cannot_be_moved_names_what_to_do(params: QuantParams, spec: QuantSpec, words: str) -> None:
    with pytest.raises(GraphError, match=f"{words}.*compress the float model again with the --target"):
        regrid(params, spec)
