"""Activations of fewer than 8 bits: every runtime holds them in codes of 8 bits that are cut at their ends."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import edgekit
from edgekit.graph.annotations import attach, get_params, get_wish
from edgekit.graph.io import load_onnx
from edgekit.graph.run import Session
from edgekit.lowering.qdq import lower_qdq
from edgekit.method import LayerMethod, Method
from edgekit.passes.assign_specs import assign_specs
from edgekit.quant.affine import choose_params, fake_quantize, quantize, widened
from edgekit.quant.spec import INTEGER_RANGES, QuantParams, QuantSpec
from edgekit.target import load_target
from graphs import GraphBuilder, normal

TARGETS = ("x86-onnxruntime", "x86-openvino", "arm-onnxruntime", "cuda-tensorrt")
WIDER = (QuantSpec("uint8"), QuantSpec("int8"), QuantSpec("int8", symmetric=True), QuantSpec("int16", symmetric=True))


@settings(max_examples=100, deadline=None)
@given(
    dtype=st.sampled_from(["uint4", "int4", "uint2", "int2"]),
    low=st.floats(-9, 0, width=32),
    high=st.floats(0, 9, width=32),
    spec=st.sampled_from(WIDER),
    seed=st.integers(0, 1000),
)
def test_a_wider_type_has_the_same_points_and_no_more(
    dtype: str, low: float, high: float, spec: QuantSpec, seed: int
) -> None:
    params = choose_params(low, high, QuantSpec(dtype))
    wide = widened(params, spec)
    x = np.random.default_rng(seed).normal(0, 6, 300).astype(np.float32)
    np.testing.assert_array_equal(fake_quantize(x, wide), fake_quantize(x, params))
    first, last = INTEGER_RANGES[spec.dtype]
    codes = quantize(x, wide)
    assert first <= codes.min() and codes.max() <= last and len(np.unique(codes)) <= 2 ** int(dtype[-1])
    assert not spec.symmetric or not wide.zero_point.any()


def network(folder: Path) -> Path:
    build = GraphBuilder(opset=21)
    x = build.op("Relu", [build.conv(build.input("x", ["N", 3, 10, 10]), "first", 3, 8)], "relu")
    y = build.op("Relu", [build.op("Add", [build.conv(x, "second", 8, 8), x], "add")], "last")
    y = build.conv(y, "third", 8, 4)
    import onnx

    onnx.save(build.proto(y), folder / "net.onnx")
    return folder / "net.onnx"


@pytest.mark.parametrize("bits", [4, 2])
def test_every_runtime_computes_the_simulation(bits: int, tmp_path: Path) -> None:
    data = normal(96, 3, 10, 10)
    method = Method(weights=f"int{bits}", precision=f"int{bits}")  # type: ignore[arg-type]
    edgekit.compress(network(tmp_path), tmp_path / "out", calibration={"x": data}, method=method, proxy="none")
    model = attach(load_onnx(tmp_path / "out" / "model.onnx"))
    inner = [value for node in model.graph for value in node.outputs if not value.is_graph_output()]
    grids = [params for value in inner if (params := get_params(value)) is not None]
    assert grids and all(params.dtype == f"uint{bits}" for params in grids)
    for result in edgekit.export(tmp_path / "out", TARGETS):
        assert result.manifest.proof.agrees is not False, result.manifest.proof.reason
        lowered = load_onnx(result.folder / "model.onnx")
        assert any(node.op_type == "Clip" for node in lowered.graph)
        assert not any(
            value.dtype in (ir.DataType.UINT4, ir.DataType.UINT2) for node in lowered.graph for value in node.outputs
        )
        [add] = [node for node in lowered.graph if node.op_type == "Add"]
        made_by = {value.producer().op_type for value in add.inputs}  # type: ignore[union-attr]
        assert made_by == {"Conv", "Relu"}, "what is added up has all its bits"


def test_what_layers_read_takes_few_points(tmp_path: Path) -> None:
    method = Method(weights="int4", precision="int4")
    data = normal(64, 3, 10, 10)
    edgekit.compress(network(tmp_path), tmp_path / "out", calibration={"x": data}, method=method, proxy="none")
    for name in TARGETS:
        lowered = lower_qdq(attach(load_onnx(tmp_path / "out" / "model.onnx")), load_target(name))
        pairs = [node for node in lowered.graph if node.op_type == "DequantizeLinear" and node.inputs[0].producer()]
        read = [
            node.outputs[0] for node in pairs if not (node.name or "").startswith("third")
        ]  # what no layer reads has 8 bits
        lowered.graph.outputs.extend(value for value in read if not value.is_graph_output())
        found = Session(lowered, optimize=False).run({"x": data * 3})
        assert read and all(len(np.unique(found[value.name or ""])) <= 16 for value in read)


def test_a_tensor_has_the_widest_precision_that_a_reader_wants(tmp_path: Path) -> None:
    build = GraphBuilder(opset=21)
    x = build.op("Relu", [build.conv(build.input("x", ["N", 3, 10, 10]), "first", 3, 8)], "relu")
    y = build.op("Concat", [build.conv(x, "wide", 8, 4), build.conv(x, "narrow", 8, 4)], "join", axis=1)
    model = ir.from_proto(build.proto(build.conv(y, "last", 8, 4)))
    method = Method(precision="int4", layers=(LayerMethod(match="wide", precision="int8"),))
    wished = assign_specs(model, load_target("portable"), method)
    types = {
        value.name: wish[0].dtype
        for node in wished.graph
        for value in node.outputs
        if (wish := get_wish(value)) is not None
    }
    assert types["relu_y"] == "uint8"
    assert types["join_y"] == types["wide_y"] == types["narrow_y"] == "uint4"


def test_limits_are_part_of_a_grid() -> None:
    one, other = (
        QuantParams("uint8", np.array(1, np.float32), np.array(0), limits=limits) for limits in (None, (0, 15))
    )
    assert one != other and (other.qmin, other.qmax) == (0, 15)
