"""Models of half and double precision compute in float32, beside which runtimes have integer kernels, and keep their types outside."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import edgekit
from edgekit.errors import DataError
from edgekit.graph.contract import contract
from edgekit.graph.io import load_annotated, load_onnx
from edgekit.graph.run import Session
from edgekit.passes.to_float32 import computes_in_others, to_float32
from edgekit.pipelines.sources import canonicalize
from graphs import Array, GraphBuilder, normal

TYPES = {TensorProto.FLOAT16: np.float16, TensorProto.BFLOAT16: ml_dtypes.bfloat16, TensorProto.DOUBLE: np.float64}


def two_layers(dtype: int, *, outside: int, seed: int = 0) -> onnx.ModelProto:
    """Weights of a type, one of them in a Constant node; inputs and outputs of another where `outside` is."""
    build = GraphBuilder(opset=17)
    x = build.input("x", ["n", 8], outside)
    x = build.op("Cast", [x], "inside", to=dtype) if outside != dtype else x
    stored = ir.tensor(normal(8, 16, seed=seed).astype(TYPES[dtype]), name="w")
    build.initializers.append(ir.to_proto(stored))
    bias = ir.to_proto(ir.tensor(normal(16, seed=seed + 1).astype(TYPES[dtype]), name="b"))
    build.nodes.append(helper.make_node("Constant", [], ["b"], name="bias", value=bias))
    y = build.op("Relu", [build.op("Add", [build.op("MatMul", [x, "w"], "first"), "b"], "add")], "relu")
    head = ir.tensor(normal(16, 4, seed=seed + 2).astype(TYPES[dtype]), name="v")
    build.initializers.append(ir.to_proto(head))
    y = build.op("MatMul", [y, "v"], "second")
    y = build.op("Cast", [y], "out", to=outside) if outside != dtype else y
    return build.proto(y, dtypes={y: outside})


def in_float32(proto: onnx.ModelProto, x: Array) -> Array:
    """What the same numbers make in numpy."""
    constants = {t.name: np.asarray(ir.from_proto(t).numpy(), np.float32) for t in proto.graph.initializer}
    node = next(node for node in proto.graph.node if node.op_type == "Constant")
    bias = np.asarray(ir.from_proto(node.attribute[0].t).numpy(), np.float32)
    return np.asarray(np.maximum(x.astype(np.float32) @ constants["w"] + bias, 0) @ constants["v"])


@pytest.mark.parametrize(
    ("dtype", "outside"),
    [
        (TensorProto.FLOAT16, TensorProto.FLOAT16),
        (TensorProto.FLOAT16, TensorProto.FLOAT),
        (TensorProto.BFLOAT16, TensorProto.FLOAT),
        (TensorProto.DOUBLE, TensorProto.DOUBLE),
    ],
)
def test_every_precision_is_quantized_and_keeps_its_types_outside(dtype: int, outside: int, tmp_path: Path) -> None:
    proto = two_layers(dtype, outside=outside)
    onnx.save(proto, tmp_path / "net.onnx")
    x = normal(64, 8)
    record = edgekit.compress(tmp_path / "net.onnx", tmp_path / "out", calibration={"x": x}).record
    assert [layer.name for layer in record.layers] == ["first", "second"]
    model = load_annotated(tmp_path / "out/model.onnx")
    assert [str(port) for port in contract(model).inputs] == [f"{TensorProto.DataType.Name(outside).lower()} of n x 8"]
    given = x.astype(np.dtype(TYPES.get(outside, np.float32)))
    [found] = Session(model, optimize=False).run({"x": given}).values()
    expected = in_float32(proto, given)
    assert found.dtype == given.dtype
    assert np.abs(found.astype(np.float64) - expected).max() < 2e-3 * np.abs(expected).max()
    for target in ("x86-onnxruntime", "x86-openvino"):
        [result] = edgekit.export(tmp_path / "out", target)
        assert result.manifest.proof.agrees is True
        if target == "x86-onnxruntime":
            assert result.manifest.proof.int8_macs_share == 1.0


def test_subgraphs_follow() -> None:
    """Both branches of an If have constants and a Cast of their own."""

    def branch(name: str, number: float) -> onnx.GraphProto:
        value = numpy_helper.from_array(np.array(number, np.float16), f"{name}_value")
        nodes = [
            helper.make_node("Cast", ["x"], [f"{name}_x"], to=TensorProto.FLOAT16),
            helper.make_node("Mul", [f"{name}_x", f"{name}_value"], [f"{name}_y"]),
        ]
        output = helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT16, ["n", 4])
        return helper.make_graph(nodes, name, [], [output], [value])

    build = GraphBuilder(opset=17)
    x = build.input("x", ["n", 4])
    positive = build.op(
        "Greater", [build.op("ReduceSum", [x], "sum", keepdims=0), build.constant("zero", np.float32(0))]
    )
    y = build.op("If", [positive], "choose", then_branch=branch("yes", 2.0), else_branch=branch("no", -1.5))
    proto = build.proto(y, dtypes={y: TensorProto.FLOAT16})
    model = to_float32(ir.from_proto(proto))
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    for feeds in ({"x": np.ones((2, 4), np.float32)}, {"x": -np.ones((2, 4), np.float32)}):
        [found] = Session(model, optimize=False).run(feeds).values()
        expected = feeds["x"] * (2.0 if feeds["x"].sum() > 0 else -1.5)
        assert found.dtype == np.float16
        np.testing.assert_array_equal(found, expected.astype(np.float16))


def test_double_precision_that_is_needed_stays() -> None:
    """A small difference of large numbers, of which float32 would leave nothing."""
    build = GraphBuilder(opset=17)
    x = build.input("x", ["n", 4], TensorProto.DOUBLE)
    large = build.constant("large", np.float64(1e12))
    y = build.op("Sub", [build.op("Add", [x, large], "up"), large], "down")
    model = ir.from_proto(build.proto(y, dtypes={y: TensorProto.DOUBLE}))
    feeds = {"x": normal(4, 4).astype(np.float64)}
    canonical = canonicalize(model, feeds, opset=21)
    assert "Cast" not in {node.op_type for node in canonical.graph}
    [found] = Session(canonical, optimize=False).run(feeds).values()
    assert np.abs(found - feeds["x"]).max() < 1e-3


def test_an_input_that_is_an_output_too_keeps_its_type() -> None:
    build = GraphBuilder(opset=17)
    x = build.input("x", ["n", 4], TensorProto.FLOAT16)
    y = build.op("Relu", [x], "relu")
    proto = build.proto(y, dtypes={y: TensorProto.FLOAT16})
    model = to_float32(ir.from_proto(proto))
    feeds = {"x": normal(3, 4).astype(np.float16)}
    [found] = Session(model, optimize=False).run(feeds).values()
    np.testing.assert_array_equal(found, np.maximum(feeds["x"], 0))


def test_float32_is_left_alone(tmp_path: Path) -> None:
    build = GraphBuilder(opset=17)
    y = build.op("MatMul", [build.input("x", ["n", 8]), build.weight("w", 8, 4)], "fc")
    onnx.save(build.proto(y), tmp_path / "net.onnx")
    assert not computes_in_others(load_onnx(tmp_path / "net.onnx"))


def test_inputs_that_no_array_can_hold_are_refused(tmp_path: Path) -> None:
    onnx.save(two_layers(TensorProto.BFLOAT16, outside=TensorProto.BFLOAT16), tmp_path / "net.onnx")
    with pytest.raises(
        DataError, match="'x' of the model is bfloat16, which arrays cannot hold; export it with float32"
    ):
        edgekit.compress(tmp_path / "net.onnx", tmp_path / "out", calibration={"x": normal(64, 8)})
