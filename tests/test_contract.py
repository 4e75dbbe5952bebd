"""What a caller relies on: names, types and sizes of inputs and outputs, in compress and in every export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import edgekit
from edgekit.errors import GoalError, GraphError
from edgekit.graph.contract import Port, check_contract, contract
from edgekit.graph.io import load_onnx, save_onnx
from graphs import GraphBuilder, normal
from networks import Net


def plain() -> ir.Model:
    net = Net(seed=2)
    y = net.conv_relu(net.input("x", ["n", 3, "h", "w"]), "conv", 3, 4)
    return net.model(net.op("GlobalAveragePool", [y], "mean"))


def test_a_contract_says_what_a_caller_has_to_give_and_gets() -> None:
    found = contract(plain())
    assert found.inputs == (Port("x", "FLOAT", ("n", 3, "h", "w")),)
    assert [port.name for port in found.outputs] == ["mean_y"]
    assert str(found.inputs[0]) == "float of n x 3 x h x w"


def test_a_default_value_is_no_input_that_has_to_be_given() -> None:
    build = GraphBuilder(opset=11, ir_version=3)
    y = build.conv(build.input("x", ["N", 3, 8, 8]), "conv", 3, 4)
    model = ir.from_proto(build.proto(y))
    assert len(model.graph.inputs) == 3
    assert [port.name for port in contract(model).inputs] == ["x"]


def renamed(model: ir.Model) -> None:
    model.graph.inputs[0].name = "image"


def retyped(model: ir.Model) -> None:
    model.graph.inputs[0].type = ir.TensorType(ir.DataType.DOUBLE)


def closed(model: ir.Model) -> None:
    model.graph.inputs[0].shape = ir.Shape([1, 3, "h", "w"])


def opened(model: ir.Model) -> None:
    model.graph.inputs[0].shape = ir.Shape(["n", "c", "h", "w"])


def flattened(model: ir.Model) -> None:
    model.graph.inputs[0].shape = ir.Shape(["n", 3])


def batch_of_one(model: ir.Model) -> None:
    model.graph.outputs[0].shape = ir.Shape([1, 4, 1, 1])


def another_output(model: ir.Model) -> None:
    model.graph.outputs.append(model.graph.node(0).outputs[0])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (renamed, r"inputs are 'image', the source's were 'x'"),
        (retyped, r"input 'x' was float of n x 3 x h x w and is double of"),
        (closed, r"input 'x' was float of n x 3 x h x w and is float of 1 x 3"),
        (opened, r"input 'x' was .* and is float of n x c x h x w"),
        (flattened, r"input 'x' was .* and is float of n x 3:"),
        (batch_of_one, r"output 'mean_y' was float of n x 4 x 1 x 1 and is float of 1 x 4 x 1 x 1"),
        (another_output, r"outputs are 'mean_y', 'conv_y', the source's were 'mean_y'"),
    ],
)
def test_a_broken_promise_is_found(change: Callable[[ir.Model], None], says: str) -> None:
    before, after = plain(), plain()
    for model in (before, after):
        model.graph.outputs[0].shape = ir.Shape(["n", 4, 1, 1])
    change(after)
    with pytest.raises(GraphError, match=says):
        check_contract(contract(before), after)


def test_an_outputs_unknown_size_may_be_found_out() -> None:
    before, after = plain(), plain()
    before.graph.outputs[0].shape = ir.Shape(["n", None, "unk__1", 1])
    after.graph.outputs[0].shape = ir.Shape(["n", 4, 1, 1])
    check_contract(contract(before), after)
    before.graph.outputs[0].shape = None
    check_contract(contract(before), after)
    with pytest.raises(GraphError, match="was float of n x 4 x 1 x 1 and is float of any rank"):
        check_contract(contract(after), before)


@pytest.mark.parametrize("target", ["x86-onnxruntime", "arm-onnxruntime", "x86-openvino", "cuda-tensorrt"])
def test_every_export_keeps_the_contract(target: str, tmp_path: Path) -> None:
    """A float and an integer input, one output that is read inside, symbols for the batch, height and width."""
    build = GraphBuilder(opset=13)
    x, k = build.input("x", ["N", 3, "H", "W"]), build.input("k", ["N", 1], onnx.TensorProto.INT64)
    y = build.op("Relu", [build.conv(x, "a", 3, 8)], "relu")
    mean = build.op("Flatten", [build.op("GlobalAveragePool", [build.conv(y, "b", 8, 8)], "mean")], "flat")
    row = build.op("Cast", [k], "cast", to=onnx.TensorProto.FLOAT)
    z = build.op("Gemm", [build.op("Add", [mean, row], "add"), build.weight("v", 5, 8)], "head", transB=1)
    onnx.save(build.proto(y, z), tmp_path / "net.onnx")
    data = {"x": normal(24, 3, 12, 12), "k": np.random.default_rng(0).integers(0, 3, (24, 1))}
    edgekit.compress(tmp_path / "net.onnx", tmp_path / "out", calibration=data, proxy="none")
    [result] = edgekit.export(tmp_path / "out", target)
    promised = contract(load_onnx(tmp_path / "net.onnx"))
    check_contract(promised, load_onnx(result.folder / "model.onnx"))
    assert [str(port) for port in promised.inputs] == ["float of N x 3 x H x W", "int64 of N x 1"]
    assert [(port.name, port.dtype, port.dims) for port in result.manifest.inputs] == [
        ("x", "float", ("N", 3, "H", "W")), ("k", "int64", ("N", 1)),
    ]  # fmt: skip
    assert [port.name for port in result.manifest.outputs] == [y, z]
    assert (result.manifest.source.opset, result.manifest.opset) == (13, 21)
    assert "- opset 21; the source has 13" in (tmp_path / "out/report.md").read_text()
    if target == "cuda-tensorrt":
        assert result.manifest.proof.other_sizes == ()
        assert any("takes 'x' in the size of the samples only" in note for note in result.manifest.notes)
    else:
        assert result.manifest.proof.other_sizes == ("x 2x3x6x6", "k 2x1")
        assert "checked in another size than calibration's too: x 2x3x6x6" in (tmp_path / "out/report.md").read_text()


def sequence(steps: int | str) -> ir.Model:
    """A Conv over a sequence, whose positions are a table of eight rows."""
    net = Net(seed=3)
    x = net.input("x", ["n", 4, steps])
    table = net.constant("table", net.rng.normal(0, 1, (4, 8)).astype(np.float32))
    size = net.op("Shape", [x], "shape", start=2)
    rows = net.op("Slice", [table, net.constant("zero", np.array([0])), size, net.constant("one", np.array([1]))])
    y = net.op("Conv", [net.op("Add", [x, rows], "add"), net.weight("w", 6, 4, 3)], "conv", pads=[1, 1])
    return net.model(y)


def test_a_runtime_that_is_wrong_in_another_size_is_caught(tmp_path: Path, numpy_target: Callable[..., str]) -> None:
    save_onnx(sequence("t"), tmp_path / "net.onnx")
    edgekit.compress(tmp_path / "net.onnx", tmp_path / "out", calibration={"x": normal(24, 4, 8)})
    [result] = edgekit.export(tmp_path / "out", numpy_target("right"))
    assert result.manifest.proof.other_sizes == ("x 2x4x4",)
    with pytest.raises(GoalError, match=r"what the simulation does, .*: for x 2x4x4: output 'conv_y' is lost"):
        edgekit.export(tmp_path / "out", numpy_target("wrong", wrong_size="4"))


def test_a_runtime_that_refuses_another_size_is_told_of(tmp_path: Path, numpy_target: Callable[..., str]) -> None:
    save_onnx(sequence("t"), tmp_path / "net.onnx")
    edgekit.compress(tmp_path / "net.onnx", tmp_path / "out", calibration={"x": normal(24, 4, 8)})
    [result] = edgekit.export(tmp_path / "out", numpy_target("narrow", no_size="4"))
    assert (result.manifest.proof.agrees, result.manifest.proof.other_sizes) == (True, ())
    assert "fails for x 2x4x4, which the float model takes: keep to the samples' sizes" in result.manifest.notes


def test_sizes_that_the_float_model_refuses_are_not_tried_and_that_is_said(tmp_path: Path) -> None:
    """The size is said to be open, and the weight has eight rows."""
    net = Net(seed=3)
    save_onnx(net.model(net.matmul(net.input("x", ["n", "t"]), "head", 8, 4)), tmp_path / "net.onnx")
    edgekit.compress(tmp_path / "net.onnx", tmp_path / "out", calibration={"x": normal(24, 8)})
    [result] = edgekit.export(tmp_path / "out", "x86-openvino")
    assert result.manifest.proof.other_sizes == ()
    assert any(
        note == "checked for x 2x8 only: the float model takes none of the other sizes that were tried"
        for note in result.manifest.notes
    )


def test_a_file_that_grew_is_told(tmp_path: Path) -> None:
    """The parts of an engine that are not weights are larger than this network."""
    net: Any = Net(seed=4)
    save_onnx(net.model(net.gemm(net.input("x", ["n", 8]), "head", 8, 4)), tmp_path / "net.onnx")
    edgekit.compress(tmp_path / "net.onnx", tmp_path / "out", calibration={"x": normal(24, 8)})
    [engine] = edgekit.export(tmp_path / "out", "cuda-tensorrt")
    assert any(note.startswith("larger than the float model: ") for note in engine.manifest.notes)
