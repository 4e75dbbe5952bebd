"""`to_float16`: valid, computing the same, float32 where it must be."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgekit.errors import GraphError
from edgekit.graph.run import Session
from edgekit.lowering.half import MASK, to_float16

RNG = np.random.default_rng(7)
F16, F32 = ir.DataType.FLOAT16, ir.DataType.FLOAT


def model_of(text: str, *, opset: int = 21, **initializers: Any) -> ir.Model:
    """ONNX text with initializers put in, nodes named after their outputs, shapes inferred."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}]> {text}')
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in initializers.items())
    for node in proto.graph.node:
        node.name = f"{node.op_type}_{node.output[0]}"
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True))


def types(model: ir.Model) -> dict[str, ir.DataType | None]:
    return {value.name or "": value.dtype for node in model.graph for value in node.outputs}


def results(model: ir.Model, **feeds: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """What ONNX Runtime computes, after the checker has accepted the model."""
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return Session(model, optimize=False, threads=1).run(feeds)


def conv_relu_pool() -> ir.Model:
    return model_of(
        """g (float[N,3,8,8] x) => (float[N,4] y) {
            c = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(c) p = GlobalAveragePool(r) f = Flatten(p)
            k = Constant<value_floats=[1.0, 2.0, 3.0, 4.0]>() y = Mul(f, k) }""",
        w=RNG.normal(size=(4, 3, 3, 3)).astype(np.float32),
        b=RNG.normal(size=4).astype(np.float32),
    )


def qdq_conv(x_scale: float = 0.02, w_scale: float = 0.01, *, opset: int = 21) -> ir.Model:
    return model_of(
        """g (float[N,3,8,8] x) => (float[N,4,8,8] y) {
            q = QuantizeLinear(x, xs, z) d = DequantizeLinear(q, xs, z) dw = DequantizeLinear<axis=0>(w, ws)
            c = Conv<pads=[1,1,1,1]>(d, dw, b) y = Relu(c) }""",
        opset=opset,
        xs=np.float32(x_scale),
        z=np.int8(0),
        ws=np.full(4, w_scale, np.float32),
        w=RNG.integers(-127, 128, (4, 3, 3, 3)).astype(np.int8),
        b=RNG.normal(size=4).astype(np.float32),
    )


def test_computes_in_float16_behind_float32_inputs_and_outputs() -> None:
    model = conv_relu_pool()
    half = to_float16(model)
    assert [(v.name, v.dtype) for v in (*half.graph.inputs, *half.graph.outputs)] == [("x", F32), ("y", F32)]
    assert {types(half)[name] for name in ("c", "r", "p", "f")} == {F16}
    assert {name: v.dtype for name, v in half.graph.initializers.items() if name in "wb"} == {"w": F16, "b": F16}
    x = RNG.normal(size=(2, 3, 8, 8)).astype(np.float32)
    np.testing.assert_allclose(results(half, x=x)["y"], results(model, x=x)["y"], rtol=4e-3, atol=4e-3)


def test_leaves_its_argument_alone_and_is_deterministic() -> None:
    model = conv_relu_pool()
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    first, second = (ir.to_proto(to_float16(model)).SerializeToString(deterministic=True) for _ in range(2))
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    assert first == second != before


def test_scales_become_float16_and_codes_stay() -> None:
    model = qdq_conv()
    half = to_float16(model)
    kept = {name: value.dtype for name, value in half.graph.initializers.items()}
    assert kept == {"xs": F16, "ws": F16, "b": F16, "w": ir.DataType.INT8, "z": ir.DataType.INT8}
    assert sum(node.op_type == "Cast" for node in half.graph) == 2
    x = RNG.normal(size=(2, 3, 8, 8)).astype(np.float32)
    np.testing.assert_allclose(results(half, x=x)["y"], results(model, x=x)["y"], rtol=1e-2, atol=3e-2)


@pytest.mark.parametrize(("x_scale", "w_scale"), [(5e-5, 0.01), (0.02, 1e-8), (0.02, 1e5)])
def test_a_scale_that_is_no_normal_float16_stays_float32_behind_casts(x_scale: float, w_scale: float) -> None:
    model = qdq_conv(x_scale, w_scale)
    half = to_float16(model)
    kept, converted = ("xs", "ws") if x_scale == 5e-5 else ("ws", "xs")
    assert half.graph.initializers[kept].dtype == F32
    assert half.graph.initializers[converted].dtype == F16
    assert types(half)["c"] == (F16 if w_scale < 1 else F32)
    if w_scale < 1:
        x = RNG.normal(size=(2, 3, 8, 8)).astype(np.float32) * np.float32(x_scale * 30)
        np.testing.assert_allclose(results(half, x=x)["y"], results(model, x=x)["y"], rtol=1e-2, atol=5e-3)


def test_before_opset_19_quantize_linear_stays_float32() -> None:
    half = to_float16(qdq_conv(opset=17))
    assert half.graph.initializers["xs"].dtype == F32
    assert types(half)["c"] == F16
    assert results(half, x=np.ones((1, 3, 8, 8), np.float32))["y"].shape == (1, 4, 8, 8)


def test_what_reads_a_constant_beyond_float16_stays_float32() -> None:
    model = model_of(
        "g (float[4] x) => (float[4] y) { a = Mul(x, gain) b = Mul(a, loss) y = Relu(b) }",
        gain=np.array([1, 70000, 2, 3], np.float32),
        loss=np.array([1, 1e-4, 1, 1], np.float32),
    )
    half = to_float16(model)
    assert half.graph.initializers["gain"].dtype == F32
    assert (types(half)["a"], types(half)["b"]) == (F32, F16)
    x = np.array([1, 0.5, 1, 1], np.float32)
    np.testing.assert_allclose(results(half, x=x)["y"], results(model, x=x)["y"], rtol=2e-3, atol=0)


def test_a_mask_of_float32s_lowest_becomes_one_of_float16() -> None:
    lowest = np.finfo(np.float32).min
    model = model_of(
        "g (float[1,4] x) => (float[1,4] y) { m = Add(x, mask) y = Softmax<axis=-1>(m) }",
        mask=np.array([[0, lowest, 0, -np.inf]], np.float32),
    )
    half = to_float16(model)
    mask = half.graph.initializers["mask"].const_value
    assert mask is not None
    assert mask.numpy().tolist() == [[0, -MASK, 0, -np.inf]]
    x = np.array([[-20, 3, 1, 2]], np.float32)
    np.testing.assert_allclose(results(half, x=x)["y"], results(model, x=x)["y"], rtol=0, atol=1e-3)


def test_a_layer_norm_in_single_operators_keeps_its_squares_and_its_epsilon() -> None:
    model = model_of(
        """g (float[N,16] x) => (float[N,16] y) {
            m = ReduceMean<keepdims=1>(x, axes) d = Sub(x, m) s = Pow(d, two) v = ReduceMean<keepdims=1>(s, axes)
            e = Add(v, eps) r = Sqrt(e) n = Div(d, r) y = Mul(n, gamma) }""",
        axes=np.array([-1], np.int64),
        two=np.float32(2),
        eps=np.float32(1e-12),
        gamma=RNG.normal(size=16).astype(np.float32),
    )
    half = to_float16(model)
    assert {types(half)[name] for name in ("s", "v", "e", "r", "n")} == {F32}
    assert {types(half)[name] for name in ("m", "d")} == {F16}
    x = (RNG.normal(size=(3, 16)) * 1000).astype(np.float32)
    x[2] = 5
    np.testing.assert_allclose(results(half, x=x)["y"], results(model, x=x)["y"], rtol=0, atol=2e-2)


def test_what_the_standard_wants_in_float32_stays_so() -> None:
    model = model_of(
        """g (float[1,2,4,4] x, float[1,5,4] boxes) => (float[1,2,8,8] y, int64[K,3] kept) {
            r = Relu(x) y = Resize<mode="linear">(r, , scales)
            b = Abs(boxes) s = Slice(b, zero, one, two) t = Transpose<perm=[0,2,1]>(s)
            kept = NonMaxSuppression(b, t, limit, iou) }""",
        scales=np.array([1, 1, 2, 2], np.float32),
        zero=np.array([0]),
        one=np.array([1]),
        two=np.array([2]),
        limit=np.array([3]),
        iou=np.array([0.5], np.float32),
    )
    half = to_float16(model)
    assert half.graph.initializers["scales"].dtype == half.graph.initializers["iou"].dtype == F32
    assert types(half)["r"] == types(half)["b"] == F16
    feeds = {"x": RNG.normal(size=(1, 2, 4, 4)).astype(np.float32), "boxes": RNG.random((1, 5, 4)).astype(np.float32)}
    np.testing.assert_allclose(results(half, **feeds)["y"], results(model, **feeds)["y"], rtol=0, atol=1e-2)


def test_casts_and_filled_constants_follow() -> None:
    model = model_of(
        """g (int64[4] i) => (float[4] y, int64[4] back) {
            f = Cast<to=1>(i) shape = Shape(i) o = ConstantOfShape<value=float[1]{2.0}>(shape)
            y = Mul(f, o) back = Cast<to=7>(y) }"""
    )
    half = to_float16(model)
    assert types(half)["f"] == F16
    got = results(half, i=np.array([1, 2, 3, 5]))
    assert got["y"].dtype == np.float32
    assert got["y"].tolist() == got["back"].tolist() == [2, 4, 6, 10]


def test_subgraphs_stay_float32_and_read_what_they_read_before() -> None:
    model = model_of(
        """g (float[4] x, bool c) => (float[4] y) {
            a = Relu(x)
            b = If(c) <then_branch = t () => (float[4] p) { p = Add(a, w) },
                       else_branch = e () => (float[4] q) { q = Neg(a) }>
            y = Add(a, b) }""",
        w=np.arange(4, dtype=np.float32),
    )
    half = to_float16(model)
    assert types(half)["a"] == F16
    for condition in (True, False):
        feeds = {"x": np.array([-1, 2, 3, 4], np.float32), "c": np.array(condition)}
        np.testing.assert_array_equal(results(half, **feeds)["y"], results(model, **feeds)["y"])


def test_an_unknown_element_type_is_named() -> None:
    model = model_of("g (float[4] x) => (float[4] y) { y = Relu(x) }")
    relu = model.graph[0]
    relu.replace_input_with(0, ir.node("Mystery", [model.graph.inputs[0]], domain="lab").outputs[0])
    producer = relu.inputs[0]
    assert producer is not None
    producer.name = "secret"
    source = producer.producer()
    assert source is not None
    model.graph.insert_before(relu, source)
    model.opset_imports["lab"] = 1
    with pytest.raises(GraphError, match=r"'secret', read by node 'Relu_y'"):
        to_float16(model)


def test_a_value_that_is_an_output_and_read_inside_is_both() -> None:
    model = model_of("g (float[4] x) => (float[4] a, float[4] y) { a = Abs(x) y = Pow(a, two) }", two=np.float32(2))
    half = to_float16(model)
    x = np.array([-300, 1, 2, 3], np.float32)
    got = results(half, x=x)
    assert got["a"].tolist() == [300, 1, 2, 3]
    assert got["y"].tolist() == [90000, 1, 4, 9]


@given(st.lists(st.sampled_from(["Relu", "Exp", "Abs", "Square", "Mean", "Halve", "Div"]), min_size=1, max_size=7))
def test_any_chain_stays_valid_and_close(ops: list[str]) -> None:
    bodies = {
        "Relu": "Relu({0})",
        "Exp": "Exp({0})",
        "Abs": "Abs({0})",
        "Square": "Mul({0}, {0})",
        "Mean": "ReduceMean<keepdims=1>({0}, axes)",
        "Halve": "Mul({0}, half)",
        "Div": "Div(x, {0})",
    }
    lines = [f"v{i + 1} = {bodies[op].format(f'v{i}')}" for i, op in enumerate(ops)]
    text = f"g (float[1,4] x) => (float[1,4] y) {{ v0 = Abs(x) {' '.join(lines)} y = Add(v{len(ops)}, x) }}"
    model = model_of(text, axes=np.array([-1]), half=np.float32(0.5))
    x = np.array([[0.5, 0.75, 1.0, 1.25]], np.float32)
    expected = results(model, x=x)["y"].astype(np.float64)
    representable = np.abs(expected) < 60000
    got = results(to_float16(model), x=x)["y"].astype(np.float64)
    np.testing.assert_allclose(got[representable], expected[representable], rtol=0.1, atol=0.01)
