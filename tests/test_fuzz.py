"""Random graphs through edgekit: a few of those that `benchmarks/fuzz.py` draws, and by name what it has found."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from edgekit import Method
from edgekit.backend import get_backend
from edgekit.errors import GraphError
from edgekit.graph.run import Session
from edgekit.lowering.integer import lower_integer
from edgekit.lowering.qdq import lower_qdq
from edgekit.lowering.qoperator import lower_qoperator
from edgekit.method import EVERYTHING
from edgekit.passes.pool_globally import pool_globally
from edgekit.passes.simplify import simplify
from edgekit.passes.upgrade_opset import upgrade_opset
from edgekit.pipelines.quantize import Calibrating, quantize
from edgekit.pipelines.sources import canonicalize, input_specs, rewrite
from edgekit.proof import compare
from edgekit.target import load_target
from graphs import Array, GraphBuilder, normal, op_types, run
from networks import Net, annotate, local_target, samples, simulate

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import fuzz  # noqa: E402
import fuzz_stages  # noqa: E402
from fuzz_graphs import Draft, Drawn, Rejected, draw  # noqa: E402
from fuzz_ops import OPERATORS  # noqa: E402
from fuzz_report import Graph, report  # noqa: E402
from fuzz_stages import CRASHED, REFUSED, RIGHT, WRONG, judge  # noqa: E402

GRAPHS = 20
HALF_OF_BOTH = {"float16": TensorProto.FLOAT16, "float64": TensorProto.DOUBLE}


def drawn_one(index: int) -> Drawn:
    return draw(1, index)


@settings(
    max_examples=GRAPHS,
    derandomize=True,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(index=st.integers(0, 10_000))
def test_a_random_graph_is_computed_right_or_refused_with_a_sentence(
    index: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    try:
        drawn = drawn_one(index)
    except Rejected:
        return
    rows = judge(drawn, 1, index, tmp_path_factory.mktemp("graph"))
    assert [row for row in rows if row.outcome in (WRONG, CRASHED)] == []
    assert any(row.outcome == RIGHT for row in rows)
    assert all(len(row.reason.split()) > 4 for row in rows if row.outcome == REFUSED)


# The generator, and what it finds.


def test_a_graph_is_the_same_each_time() -> None:
    first, again, other = drawn_one(3), drawn_one(3), drawn_one(4)
    assert first.model.SerializeToString() == again.model.SerializeToString() != other.model.SerializeToString()


def test_graphs_are_valid_and_run_at_other_sizes() -> None:
    for index in range(8):
        drawn = drawn_one(index)
        onnx.checker.check_model(drawn.model, full_check=True)
        here, there = (run(drawn.model, drawn.feeds(1, elsewhere=elsewhere)) for elsewhere in (False, True))
        sizes = [{name: array.shape for name, array in outputs.items()} for outputs in (here, there)]
        assert drawn.dynamic or sizes[0] == sizes[1]


def test_every_operator_can_be_drawn() -> None:
    found: set[str] = set()
    wanted = {operator.make.__name__ for operator in OPERATORS}
    attempt = Draft.attempt

    def noted(self: Draft, make: Callable[[Draft, Any], object], x: Any) -> None:
        before = len(self.nodes)
        attempt(self, make, x)
        if len(self.nodes) > before:
            found.add(make.__name__)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Draft, "attempt", noted)
        for index in range(150):
            draw(4, index)
    assert wanted - found == set()


@pytest.mark.parametrize(
    ("change", "outcome", "says"),
    [
        (lambda model, _: _scaled(model), WRONG, "is off by"),
        (lambda model, _: 1 / 0, CRASHED, "ZeroDivisionError"),
        (lambda model, _: _refused(), REFUSED, "node 'a' has no name"),
        (lambda model, _: _renamed(model), WRONG, "changed the model that it was given"),
    ],
)
def test_what_a_pass_does_wrong_is_found(
    change: Callable[[ir.Model, object], object],
    outcome: str,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fuzz_stages, "rewrite", change)
    [row] = [row for row in judge(drawn_one(3), 1, 3, tmp_path) if row.stage == fuzz_stages.REWRITE]
    assert row.outcome == outcome
    assert says in row.reason


def _scaled(model: ir.Model) -> ir.Model:
    """With all outputs a thousandth larger."""
    model = model.clone()
    graph = model.graph
    factor = ir.Value(name="factor", const_value=ir.tensor(np.array(1.001, np.float32), name="factor"))
    graph.register_initializer(factor)
    for index, output in enumerate(list(graph.outputs)):
        if output.dtype == ir.DataType.FLOAT:
            node = ir.node("Mul", [output, factor])
            graph.append(node)
            name, output.name = output.name, f"{output.name}_before"
            node.outputs[0].name, node.outputs[0].shape = name, output.shape
            node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
            graph.outputs[index] = node.outputs[0]
    return model


def _refused() -> ir.Model:
    raise GraphError("node 'a' has no name: give it one")


def _renamed(model: ir.Model) -> ir.Model:
    rewritten = model.clone()
    next(iter(model.graph)).name = "another"
    return rewritten


def test_the_graph_that_ends_its_process_crashed_and_the_rest_go_on(tmp_path: Path) -> None:
    log, rows, todo = tmp_path / "rows.0.jsonl", tmp_path / "rows.jsonl", [4, 6, 8]
    log.write_text(json.dumps(asdict(Graph(4, 13))) + "\n", encoding="utf-8")
    fuzz._collect(log, rows, todo, -11)
    assert todo == [8]
    assert [(graph.index, graph.found) for graph in fuzz.known(rows)] == [
        (4, []),
        (6, [("process", CRASHED, "its process ended with -11")]),
    ]


def test_the_report_counts_stages_and_reasons() -> None:
    found = [
        ("load", RIGHT, ""),
        ("rewrite", REFUSED, "node 'a' has 3 inputs"),
        ("left in float", RIGHT, "MatMul after Softmax"),
    ]
    other = [("load", RIGHT, ""), ("rewrite", REFUSED, "node 'b' has 4 inputs"), ("annotate", WRONG, "off by 1")]
    graphs = [
        Graph(0, 13, "float32", True, {"Conv": 2}, 1, found),
        Graph(1, 7, "float64", False, {"Conv": 1}, 0, other),
        Graph(2, invalid="refused"),
    ]
    text = report(graphs, 0)
    assert "3 graphs drawn, 1 thrown away as invalid. The rest have 3 nodes (1 more were drawn" in text
    assert "| rewrite | 0 | 2 | 0 | 0 |" in text
    assert "| 2 | rewrite | 0 | node 'a' has 3 inputs |" in text
    assert "| 1 | 7 | annotate | wrong | off by 1 |" in text
    assert "| 1 | left in float | 0 | MatMul after Softmax |" in text


# What was found.


@pytest.mark.parametrize(("opset", "op_type"), [(7, "Upsample"), (9, "Upsample"), (10, "Resize")])
def test_linear_resizing_of_old_opsets_inside_a_graph(opset: int, op_type: str) -> None:
    """The converter gives the output of a Resize that it made another name, by which its coordinates were not found again."""
    net = GraphBuilder(opset, 4)
    x = net.input("x", ["n", 2, 5])
    scales = np.array([1, 1, 2], np.float32)
    attributes = {"scales": scales.tolist()} if opset < 9 else {}
    inputs = [x] if opset < 9 else [x, net.constant("scales", scales)]
    resized = net.op(op_type, inputs, "up", mode="linear", **attributes)
    model = net.model(net.op("Relu", [resized], "relu"))
    feeds = {"x": normal(2, 2, 5)}
    upgraded = simplify(upgrade_opset(model, opset=21))
    np.testing.assert_allclose(run(upgraded, feeds)["relu_y"], run(model, feeds)["relu_y"], atol=1e-6)


def test_opsets_later_than_any_runtime_quantizes_are_brought_down() -> None:
    """ONNX Runtime 1.32 runs opset 28, and has no kernel for QuantizeLinear of it."""
    net = Net(opset=28, ir_version=12, seed=1)
    model = net.model(net.conv_relu(net.input("x", ["n", 3, 4, 4]), "conv", 3, 4))
    upgraded = upgrade_opset(model, opset=21)
    assert upgraded.opset_imports[""] == 25
    feeds = samples(model, 2)
    np.testing.assert_allclose(run(upgraded, feeds)["conv.relu_y"], run(model, feeds)["conv.relu_y"], rtol=1e-6)
    lowered = lower_qdq(annotate(upgraded), load_target("x86-onnxruntime"))
    assert "QuantizeLinear" in op_types(lowered)
    assert simulate(lowered, feeds)["conv.relu_y"].shape == (2, 4, 4, 4)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
@pytest.mark.parametrize(("op_type", "attributes"), [("Clip", {"min": -0.5}), ("Clip", {"max": 0.5}), ("Pad", {})])
def test_numbers_of_old_opsets_get_the_type_of_what_they_meet(
    dtype: str, op_type: str, attributes: dict[str, float]
) -> None:
    """The converter makes float32 tensors of the attributes of Clip and Pad, which neither takes beside other types."""
    net = GraphBuilder(10, 5)
    x = net.input("x", ["n", 3], HALF_OF_BOTH[dtype])
    more: dict[str, Any] = {"pads": [0, 1, 0, 1], "value": 2.0} if op_type == "Pad" else attributes
    y = net.op(op_type, [x], "changed", **more)
    proto = net.proto(y, dtypes={y: HALF_OF_BOTH[dtype]})
    x_array = normal(4, 3).astype(dtype)
    bounds = attributes.get("min"), attributes.get("max")
    padded = np.pad(x_array, [(0, 0), (1, 1)], constant_values=2.0)
    upgraded = simplify(upgrade_opset(ir.from_proto(proto), opset=21))
    expected = padded if op_type == "Pad" else np.clip(x_array, *bounds)
    np.testing.assert_array_equal(run(upgraded, {"x": x_array})[y], expected)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(TensorProto.DOUBLE, "ReduceMean"), (TensorProto.INT32, "ReduceMean"), (TensorProto.FLOAT, "GlobalAveragePool")],
)
def test_a_mean_that_no_runtime_pools_stays(kind: int, expected: str) -> None:
    net = GraphBuilder(17, 8)
    y = net.op("ReduceMean", [net.input("x", ["n", 3, 4, 4], kind)], "mean", axes=[2, 3])
    assert op_types(pool_globally(ir.from_proto(net.proto(y, dtypes={y: kind})))) == [expected]


def attention_net(*, dtype: type = np.float32, shows_heads: bool = False) -> ir.Model:
    """Self-attention of two heads whose projections are packed into one layer."""
    net = Net(seed=5)
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))

    def constant(name: str, *shape: int) -> str:
        return net.constant(name, net.rng.normal(0, 0.5, shape).astype(dtype))

    x = net.input("x", ["n", 6, 8], kind)
    heads = {}
    for name in ("q", "k", "v"):
        y = net.op("MatMul", [x, constant(f"{name}.weight", 8, 8)], name)
        y = net.op("Add", [y, constant(f"{name}.bias", 8)], f"{name}.add")
        heads[name] = net.reshape(y, f"{name}.heads", 0, 6, 2, 4)
    q, v = (net.op("Transpose", [heads[name]], f"{name}.turn", perm=[0, 2, 1, 3]) for name in ("q", "v"))
    k = net.op("Transpose", [heads["k"]], "k.turn", perm=[0, 2, 3, 1])
    scores = net.op("Softmax", [net.op("MatMul", [q, k], "scores")], "softmax", axis=-1)
    context = net.op("Transpose", [net.op("MatMul", [scores, v], "context")], "context.turn", perm=[0, 2, 1, 3])
    y = net.op("MatMul", [net.reshape(context, "joined", 0, 6, 8), constant("out.weight", 8, 4)], "out")
    outputs = [y, heads["q"]] if shows_heads else [y]
    return ir.from_proto(net.proto(*outputs, dtypes=dict.fromkeys(outputs, kind)))


def canonical(model: ir.Model, feeds: dict[str, Array]) -> ir.Model:
    return rewrite(canonicalize(model, feeds, opset=21), feeds)


def test_heads_that_are_an_output_too_keep_their_layer() -> None:
    """QAttention took the name of a layer that stayed because its heads are read elsewhere, and nothing loads two of a name."""
    feeds = {"x": normal(3, 6, 8)}
    target = local_target("x86-onnxruntime")
    for shows_heads, operator in ((True, "MultiHeadAttention"), (False, "QAttention")):
        annotated = annotate(canonical(attention_net(shows_heads=shows_heads), feeds), count=8)
        lowered = get_backend("onnxruntime").lower(annotated, target, keep_float=frozenset())
        assert operator in op_types(lowered)
        expected, found = simulate(lower_qdq(annotated, target), feeds), simulate(lowered, feeds)
        assert compare([found], [expected], [simulate(annotated, feeds)]).agrees is True


def test_attention_in_float64_stays_as_it_is() -> None:
    """ONNX Runtime has no attention operator for it."""
    feeds = {"x": normal(3, 6, 8).astype(np.float64)}
    model = simplify(attention_net(dtype=np.float64))
    lowered = get_backend("onnxruntime").lower(model, load_target("x86-onnxruntime"), keep_float=frozenset())
    np.testing.assert_allclose(simulate(lowered, feeds)["out_y"], simulate(model, feeds)["out_y"], rtol=1e-9)


def test_the_bias_of_a_layer_of_zeros_is_not_rounded_to_the_input_s_steps() -> None:
    """Its weights had the scale 1, and its bias lies on the grid of the input's scale times that, where it is a whole number."""
    net = Net(seed=1)
    inputs = [
        net.input("x", ["n", 3, 4, 4]),
        net.constant("weight", np.zeros((2, 3, 1, 1), np.float32)),
        net.constant("bias", np.array([0.013, -0.004], np.float32)),
    ]
    annotated = annotate(net.model(net.op("Conv", inputs, "conv", kernel_shape=[1, 1])))
    found = simulate(lower_qdq(annotated, load_target("arm-onnxruntime")), samples(annotated, 2))["conv_y"]
    np.testing.assert_allclose(found[0, :, 0, 0], [0.013, -0.004], atol=1e-4)


def test_a_bias_that_is_computed_is_not_corrected() -> None:
    """What quantization adds to an output in the mean was to be taken off a constant that is none."""
    net = Net(seed=1)
    x = net.input("x", ["n", 4, 6, 6])
    bias = net.op("ReduceMax", [x, net.constant("axes", np.array([0, 2, 3]))], "bias", keepdims=0)
    model = net.model(net.op("Conv", [x, net.weight("weight", 4, 4, 3, 3), bias], "conv"))
    data = samples(model, 16)
    bound = fuzz_stages.open_data(data).bind(input_specs(model))
    annotated = quantize(model, load_target("portable"), Method(), Calibrating(bound, 16, fuzz_stages.silent))
    for name in ("portable", "arm-onnxruntime"):
        lowered = lower_qdq(annotated, load_target(name))
        assert "QuantizeLinear" in op_types(lowered)
        one_sample = {"x": data["x"][:1]}
        expected, found = (Session(one, optimize=False).run(one_sample)["conv_y"] for one in (model, lowered))
        assert np.abs(expected - found).max() < 0.05 * np.abs(expected).max()


def half_net() -> ir.Model:
    net = GraphBuilder(21)
    x = net.input("x", ["n", 3, 6, 6], TensorProto.FLOAT16)
    weight = net.constant("weight", net.rng.normal(0, 0.3, (4, 3, 3, 3)).astype(np.float16))
    y = net.op("Conv", [x, weight], "conv", kernel_shape=[3, 3])
    y = net.op("Relu", [y], "relu")
    other = net.constant("other", net.rng.normal(0, 0.3, (2, 4, 1, 1)).astype(np.float16))
    y = net.op("Conv", [y, other], "head", kernel_shape=[1, 1])
    return ir.from_proto(net.proto(y, dtypes={y: TensorProto.FLOAT16}))


def annotated_half(method: Method = EVERYTHING) -> tuple[ir.Model, dict[str, Array]]:
    model = half_net()
    feeds = {"x": normal(4, 3, 6, 6).astype(np.float16)}
    data = fuzz_stages.open_data(feeds).bind(input_specs(model))
    calibrating = Calibrating(data, 4, fuzz_stages.silent)
    return quantize(simplify(model), load_target("portable"), method, calibrating), feeds


def test_biases_for_openvino_are_of_the_convolution_s_type() -> None:
    annotated, feeds = annotated_half(Method(bias_correction=False))
    lowered = get_backend("openvino").lower(annotated, load_target("x86-openvino"), keep_float=frozenset())
    biases = [node.inputs[2] for node in lowered.graph if node.op_type == "Conv"]
    assert all(bias is not None and bias.dtype == ir.DataType.FLOAT16 for bias in biases)
    assert all(bias.const_value.numpy().all() for bias in biases if bias is not None and bias.const_value is not None)
    expected = simulate(lower_qdq(annotated, load_target("x86-openvino")), feeds)["head_y"]
    np.testing.assert_allclose(simulate(lowered, feeds)["head_y"], expected, atol=2e-3)


def test_float16_stays_between_quantize_and_dequantize_in_qoperator_graphs() -> None:
    """The scales of QLinear operators are float32."""
    annotated, feeds = annotated_half()
    qdq = lower_qdq(annotated, local_target("x86-onnxruntime"))
    lowered = lower_qoperator(qdq)
    assert "QLinearConv" not in op_types(lowered)
    np.testing.assert_array_equal(simulate(lowered, feeds)["head_y"], simulate(qdq, feeds)["head_y"])


def test_float16_has_no_integer_form_and_the_refusal_says_so() -> None:
    annotated, _ = annotated_half()
    with pytest.raises(GraphError, match="its scale is FLOAT16, and the format knows float32 alone: export"):
        lower_integer(lower_qdq(annotated, local_target("x86-onnxruntime")))


def selecting_net() -> ir.Model:
    """Layers that are given the samples with a number above 2.2, of which there may be none."""
    net = Net(seed=1)
    x = net.input("x", ["n", 6, 8])
    most = net.op("ReduceMax", [x, net.constant("axes", np.array([1, 2]))], "most", keepdims=0)
    chosen = net.op("Greater", [most, net.constant("limit", np.float32(2.2))], "greater")
    y = net.op("Relu", [net.matmul(net.op("Compress", [x, chosen], "chosen", axis=0), "first", 8, 8)], "relu")
    return net.model(net.matmul(y, "head", 8, 4))


@pytest.mark.parametrize("method", [Method(), Method(weights="int4"), Method(calibrator="minmax")])
def test_samples_that_leave_nothing_for_a_layer(method: Method) -> None:
    model = selecting_net()
    data = samples(model, 24)
    counts = [len(simulate(model, {"x": data["x"][i : i + 1]})["head_y"]) for i in range(24)]
    assert 0 < sum(counts) < 24
    bound = fuzz_stages.open_data(data).bind(input_specs(model))
    annotated = quantize(
        canonical(model, data), load_target("portable"), method, Calibrating(bound, 24, fuzz_stages.silent)
    )
    lowered = lower_qdq(annotated, load_target("x86-onnxruntime"))
    assert op_types(lowered).count("QuantizeLinear") >= 2
    expected, found = (Session(one, optimize=False).run(data)["head_y"] for one in (model, lowered))
    assert np.abs(expected - found).max() < 0.3 * np.abs(expected).max()
