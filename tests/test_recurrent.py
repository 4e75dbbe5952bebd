"""LSTM, GRU and RNN: their weights are codes where the runtime takes them so, and the rest is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import edgekit
from edgekit.graph.annotations import annotated_values, get_params
from edgekit.graph.io import load_annotated, load_onnx
from edgekit.graph.run import Session
from edgekit.lowering.qdq import lower_qdq
from edgekit.method import LayerMethod, Method
from edgekit.sensitivity import sensitivity
from edgekit.target import load_target
from graphs import Array, GraphBuilder, normal
from networks import local_target

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
HIDDEN, INPUTS = 96, 80


def sequence_net(tmp_path: Path, kind: str = "LSTM", directions: int = 1, *, layer: bool = False) -> dict[str, Array]:
    """Steps first, the batch open; the last hidden state of all directions goes into a linear head. Perhaps a `layer` in front."""
    build, rows = GraphBuilder(opset=17, seed=4), GATES[kind] * HIDDEN
    x = build.input("x", ["t", "n", INPUTS])
    x = build.op("MatMul", [x, build.weight("U", INPUTS, INPUTS)], "front") if layer else x
    weights = [build.weight("W", directions, rows, INPUTS), build.weight("R", directions, rows, HIDDEN)]
    way = "bidirectional" if directions == 2 else "forward"
    outputs = build.op(
        kind,
        [x, *weights, build.weight("B", directions, 2 * rows)],
        "memory",
        outputs=2,
        hidden_size=HIDDEN,
        direction=way,
    )
    last = build.op("Transpose", [outputs[1]], "turn", perm=[1, 0, 2])
    flat = build.op("Reshape", [last, build.constant("shape", np.array([0, directions * HIDDEN]))], "flat")
    y = build.op("MatMul", [flat, build.weight("V", directions * HIDDEN, 5)], "head")
    onnx.save(build.proto(y), tmp_path / "net.onnx")
    return {"x": normal(12, 64, INPUTS)}


def calls(data: dict[str, Array]) -> list[dict[str, Array]]:
    """The samples one by one: the batch is the second axis."""
    return [{"x": data["x"][:, i : i + 1]} for i in range(data["x"].shape[1])]


def sqnr(found: Array, expected: Array) -> float:
    return float(10 * np.log10(np.sum(expected**2) / np.sum((found - expected) ** 2)))


def output(model: ir.Model | Path, feeds: Any) -> Array:
    return np.asarray(next(iter(Session(model, optimize=False).run(feeds).values())))


def kinds(path: Path) -> set[str]:
    return {node.op_type for node in load_onnx(path).graph}


@pytest.mark.parametrize(("directions", "layer"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("kind", GATES)
def test_openvino_gets_codes_that_it_makes_floats_of_once(
    kind: str, directions: int, layer: bool, tmp_path: Path
) -> None:
    """Beside other layers in int8 its LSTM refuses weights behind a DequantizeLinear."""
    data = sequence_net(tmp_path, kind, directions, layer=layer)
    method = Method(calibrator="minmax")
    record = edgekit.compress(tmp_path / "net.onnx", tmp_path / "out", calibration=calls(data), method=method).record
    assert not any("stay float, with" in note for note in record.notes)
    model = load_annotated(tmp_path / "out/model.onnx")
    grids = {value.name: get_params(value) for value in annotated_values(model.graph)}
    w = grids["W"]
    assert w is not None and (w.dtype, w.axis, w.scale.shape) == ("int8", 1, (GATES[kind] * HIDDEN,))
    lowered = lower_qdq(model, load_target("x86-openvino"))
    assert sqnr(output(lowered, data), output(tmp_path / "net.onnx", data)) > 20
    [result] = edgekit.export(tmp_path / "out", "x86-openvino")
    assert result.manifest.proof.agrees is True
    floats = (tmp_path / "net.onnx").stat().st_size
    weights = next(file.bytes for file in result.manifest.files if file.name.endswith(".bin"))
    assert weights < 0.35 * floats


@pytest.mark.parametrize("directions", [1, 2])
def test_onnxruntime_gets_its_own_lstm_when_dynamic_activations_are_asked_for(directions: int, tmp_path: Path) -> None:
    data = sequence_net(tmp_path, "LSTM", directions)
    method = Method(activations="dynamic")
    edgekit.compress(tmp_path / "net.onnx", tmp_path / "out", calibration=calls(data), method=method)
    model = load_annotated(tmp_path / "out/model.onnx")
    lowered = lower_qdq(model, local_target("x86-onnxruntime"))
    assert "DynamicQuantizeLSTM" in {node.op_type for node in lowered.graph}
    assert [value.name for value in lowered.graph.outputs] == [value.name for value in model.graph.outputs]
    assert sqnr(output(lowered, data), output(tmp_path / "net.onnx", data)) > 20
    [result] = edgekit.export(tmp_path / "out", "x86-onnxruntime")
    assert result.manifest.proof.agrees is True
    assert "DynamicQuantizeLSTM" in kinds(result.folder / "model.onnx")
    assert result.manifest.artifact_bytes < 0.35 * (tmp_path / "net.onnx").stat().st_size


@pytest.mark.parametrize(
    ("kind", "target"), [("LSTM", "x86-onnxruntime"), ("GRU", "x86-onnxruntime"), ("LSTM", "cuda-tensorrt")]
)
def test_where_it_would_cost_time_weights_stay_floats(kind: str, target: str, tmp_path: Path) -> None:
    """Static activations, or another operator than LSTM: ONNX Runtime would dequantize at each inference."""
    data = sequence_net(tmp_path, kind)
    method = Method(calibrator="minmax", activations="dynamic" if kind == "GRU" else "static")
    edgekit.compress(tmp_path / "net.onnx", tmp_path / "out", calibration=calls(data), method=method)
    lowered = lower_qdq(load_annotated(tmp_path / "out/model.onnx"), load_target(target))
    [memory] = [node for node in lowered.graph if node.op_type == kind]
    assert all(value is not None and value.const_value is not None for value in memory.inputs[1:3])


def test_a_layer_that_is_kept_in_float_keeps_its_floats(tmp_path: Path) -> None:
    data = sequence_net(tmp_path)
    method = Method(calibrator="minmax", layers=(LayerMethod(match="memory", precision="float"),))
    record = edgekit.compress(tmp_path / "net.onnx", tmp_path / "out", calibration=calls(data), method=method).record
    model = load_annotated(tmp_path / "out/model.onnx")
    assert "W" not in {value.name for value in annotated_values(model.graph)}
    assert any(note.startswith("1 LSTM stay float, with ") for note in record.notes)


def test_weights_too_small_to_be_worth_a_node_have_no_grid(tmp_path: Path) -> None:
    build = GraphBuilder(opset=17)
    x = build.input("x", [5, "n", 8])
    weights = [build.weight("W", 1, 64, 8), build.weight("R", 1, 64, 16)]
    y = build.op("LSTM", [x, *weights], "memory", outputs=2, hidden_size=16)[1]
    onnx.save(build.proto(build.op("MatMul", [y, build.weight("V", 16, 4)], "head")), tmp_path / "net.onnx")
    edgekit.compress(tmp_path / "net.onnx", tmp_path / "out", calibration=[{"x": normal(5, 1, 8)}] * 40)
    model = load_annotated(tmp_path / "out/model.onnx")
    assert "W" not in {value.name for value in annotated_values(model.graph)}


@pytest.mark.parametrize(
    ("target", "activations", "ranked"),
    [("portable", "static", True), ("x86-onnxruntime", "dynamic", True), ("cuda-tensorrt", "static", False)],
)
def test_weights_of_a_memory_are_ranked_like_layers_where_they_are_codes(
    target: str, activations: Literal["static", "dynamic"], ranked: bool, tmp_path: Path
) -> None:
    """Its last state is all that is read. What is measured beside float is what lowering it alone makes."""
    data, out, others = sequence_net(tmp_path), tmp_path / "out", frozenset({"head"})
    method = Method(activations=activations)
    edgekit.compress(tmp_path / "net.onnx", out, calibration=calls(data), method=method, proxy="none")
    model, rules = load_annotated(out / "model.onnx"), load_target(target)
    found = {layer.name: layer for layer in sensitivity(model, rules, [data])}
    assert ("memory" in found) == ranked
    expected = output(model, data)
    if ranked:
        alone = output(lower_qdq(model, rules, keep_float=others), data)
        assert found["memory"].output_sqnr_db == pytest.approx(sqnr(alone, expected), abs=0.01)
    np.testing.assert_array_equal(output(lower_qdq(model, rules, keep_float=others | {"memory"}), data), expected)


def test_an_output_of_which_only_the_size_is_read_is_not_where_a_memory_shows(tmp_path: Path) -> None:
    """As exports do that compute sizes: its sequence goes into a Shape, its last state into the head."""
    build = GraphBuilder(opset=17, seed=4)
    x = build.input("x", ["t", "n", INPUTS])
    weights = [build.weight("W", 1, 4 * HIDDEN, INPUTS), build.weight("R", 1, 4 * HIDDEN, HIDDEN)]
    outputs = build.op("LSTM", [x, *weights], "memory", outputs=2, hidden_size=HIDDEN)
    size = build.op("Shape", [outputs[0]], "size")
    steps = build.op("Gather", [size, build.constant("first", np.array([0]))], "steps")
    head = build.op("MatMul", [outputs[1], build.weight("V", HIDDEN, 5)], "head")
    onnx.save(
        build.proto(
            build.op(
                "Tile",
                [head, build.op("Concat", [steps, build.constant("ones", np.array([1, 1]))], "times", axis=0)],
                "all",
            )
        ),
        tmp_path / "net.onnx",
    )
    data = {"x": normal(12, 64, INPUTS)}
    edgekit.compress(tmp_path / "net.onnx", tmp_path / "out", calibration=calls(data), proxy="none")
    model = load_annotated(tmp_path / "out/model.onnx")
    found = {layer.name: layer for layer in sensitivity(model, load_target("portable"), [data])}
    assert 20 < found["memory"].output_sqnr_db < 100


def test_a_memory_that_hurts_is_left_in_float(tmp_path: Path) -> None:
    data = sequence_net(tmp_path)
    record = edgekit.compress(
        tmp_path / "net.onnx", tmp_path / "out", calibration=calls(data), max_drop="70dB", explain=True
    ).record
    assert record.lifted is not None and record.lifted.met and set(record.lifted.lifted) == {"memory", "head"}
    lowered = lower_qdq(load_annotated(tmp_path / "out/model.onnx"), load_target("x86-openvino"))
    np.testing.assert_array_equal(output(lowered, data), output(tmp_path / "out/model.onnx", data))
