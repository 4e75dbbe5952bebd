"""Silence is no answer: what stays float, and why, is in the record."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import edgekit
from edgekit.errors import BackendError
from edgekit.method import LayerMethod, Method
from graphs import GraphBuilder, normal


def branch(name: str, seed: int) -> onnx.GraphProto:
    """A graph that multiplies the outer `x` with its own weight, the one in front of it a Constant node."""
    weights = np.random.default_rng(seed).normal(0, 0.3, (2, 8, 8)).astype(np.float32)
    stored = numpy_helper.from_array(weights[0], f"{name}_w")
    nodes = [
        helper.make_node("Constant", [], [f"{name}_v"], value=numpy_helper.from_array(weights[1], "v")),
        helper.make_node("MatMul", ["x", f"{name}_w"], [f"{name}_a"], name=f"{name}_a"),
        helper.make_node("MatMul", [f"{name}_a", f"{name}_v"], [f"{name}_y"], name=f"{name}_b"),
    ]
    output = helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, None)
    return helper.make_graph(nodes, name, [], [output], [stored])


def conditional(*, layer_behind: bool) -> onnx.ModelProto:
    """Which product is made depends on the sum of the input, so no constant decides it."""
    build = GraphBuilder(opset=17)
    x = build.input("x", ["n", 8])
    total = build.op("ReduceSum", [x], "total", keepdims=0)
    positive = build.op("Greater", [total, build.constant("zero", np.float32(0))], "positive")
    y = build.op("If", [positive], "choose", then_branch=branch("yes", 1), else_branch=branch("no", 2))
    if layer_behind:
        y = build.op("MatMul", [build.op("Relu", [x], "relu"), build.weight("w", 8, 8)], "outside")
        y = build.op("Add", [y, "choose_y"], "sum")
    return build.proto(y)


def test_layers_inside_if_are_named_and_the_model_still_decides(tmp_path: Path) -> None:
    onnx.save(conditional(layer_behind=True), tmp_path / "net.onnx")
    record = edgekit.compress(tmp_path / "net.onnx", tmp_path / "out", calibration={"x": normal(48, 8)}).record
    assert "4 layers stay float, because they are inside If 'choose'" in record.notes
    assert [layer.name for layer in record.layers] == ["outside"]
    [result] = edgekit.export(tmp_path / "out", "x86-onnxruntime")
    assert result.manifest.proof.agrees is True


def test_a_model_that_is_all_inside_if_is_not_called_quantized(tmp_path: Path) -> None:
    onnx.save(conditional(layer_behind=False), tmp_path / "net.onnx")
    record = edgekit.compress(tmp_path / "net.onnx", tmp_path / "out", calibration={"x": normal(48, 8)}).record
    assert record.notes[0] == (
        "nothing is quantized: the layers of net.onnx are inside If 'choose', where all stays float"
    )


def test_recurrent_operators_that_hold_the_weights_are_told(tmp_path: Path) -> None:
    build = GraphBuilder(opset=17)
    x = build.input("x", [5, "n", 8])
    y = build.op(
        "LSTM", [x, build.weight("w", 1, 64, 8), build.weight("r", 1, 64, 16)], "lstm", outputs=2, hidden_size=16
    )[1]
    y = build.op("MatMul", [y, build.weight("v", 16, 4)], "head")
    onnx.save(build.proto(y), tmp_path / "net.onnx")
    calls = [{"x": normal(5, 1, 8)} for _ in range(40)]
    record = edgekit.compress(tmp_path / "net.onnx", tmp_path / "out", calibration=calls).record
    assert "1 LSTM stay float, with 95 % of the model's numbers" in record.notes
    assert record.stays_float["LSTM"] == 1


@pytest.mark.parametrize(
    "method", [Method(precision="float"), Method(layers=(LayerMethod(match="f*", precision="float"),))]
)
def test_what_was_asked_for_is_not_blamed_on_the_model(method: Method, tmp_path: Path) -> None:
    build = GraphBuilder(opset=17)
    onnx.save(
        build.proto(build.op("MatMul", [build.input("x", ["n", 8]), build.weight("w", 8, 4)], "fc")),
        tmp_path / "n.onnx",
    )
    record = edgekit.compress(
        tmp_path / "n.onnx", tmp_path / "out", calibration={"x": normal(48, 8)}, method=method
    ).record
    assert record.notes == ("nothing is quantized, as asked for",)


def test_a_runtimes_refusal_names_no_folder_that_is_gone(tmp_path: Path) -> None:
    """OpenVINO has no kernel for an If whose branches differ in rank."""
    build = GraphBuilder(opset=17)
    x = build.input("x", ["n", 8])
    total = build.op("ReduceSum", [x], "total", keepdims=0)
    positive = build.op("Greater", [total, build.constant("zero", np.float32(0))], "positive")
    flat = helper.make_graph(
        [helper.make_node("Flatten", ["x"], ["flat_y"], axis=0)], "flat", [],
        [helper.make_tensor_value_info("flat_y", TensorProto.FLOAT, None)],
    )  # fmt: skip
    one = helper.make_graph(
        [helper.make_node("ReduceSum", ["x"], ["one_y"], keepdims=0)], "one", [],
        [helper.make_tensor_value_info("one_y", TensorProto.FLOAT, None)],
    )  # fmt: skip
    y = build.op("If", [positive], "choose", then_branch=flat, else_branch=one)
    onnx.save(build.proto(y), tmp_path / "net.onnx")
    edgekit.compress(tmp_path / "net.onnx", tmp_path / "out", calibration={"x": normal(48, 8)}, proxy="none")
    with pytest.raises(BackendError) as caught:
        edgekit.export(tmp_path / "out", "x86-openvino")
    assert "partial" not in str(caught.value)
    assert "model.xml" in str(caught.value)


@pytest.mark.parametrize(("batch", "told"), [(1, True), ("n", False)])
def test_a_batch_of_one_is_told(batch: int | str, told: bool, tmp_path: Path) -> None:
    build = GraphBuilder(opset=17)
    y = build.op("MatMul", [build.input("x", [batch, 8]), build.weight("w", 8, 4)], "fc")
    onnx.save(build.proto(y), tmp_path / "net.onnx")
    record = edgekit.compress(tmp_path / "net.onnx", tmp_path / "out", calibration={"x": normal(48, 8)}).record
    assert any(note.startswith("takes one sample at a time") for note in record.notes) == told
