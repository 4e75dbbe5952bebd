"""Models as old exporters wrote them, brought to the working opset and compared with themselves in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from edgekit.errors import GraphError, SourceError
from edgekit.graph.annotations import all_values, annotated_values, get_params, set_params
from edgekit.graph.equal import prove_equal, random_feeds
from edgekit.graph.io import load_onnx
from edgekit.graph.operators import int_attribute
from edgekit.passes.simplify import simplify
from edgekit.passes.upgrade_opset import upgrade_opset
from edgekit.quant.spec import QuantParams
from graphs import Array, GraphBuilder, normal, run

OPSET = 21
FLOATS = np.float32


def cnn(opset: int) -> onnx.ModelProto:
    """A classifier with what changed between opsets 7 and 22: attributes that became inputs, defaults, batch norms."""
    b = GraphBuilder(opset, ir_version=3 if opset < 9 else 8)
    x = b.input("x", ["N", 3, 16, 16])
    y = b.batchnorm(b.conv(x, "conv1", 3, 8), "bn1", 8, **({"spatial": 1} if opset < 9 else {}))
    y = clip(b, y, 0.0, 2.0)
    y = dropout(b, b.op("MaxPool", [y], kernel_shape=[2, 2], strides=[2, 2]))
    y = pad(b, y, [0, 0, 1, 1, 0, 0, 1, 1])
    y = b.conv(y, "conv2", 8, 8, group=8, pads=[0, 0, 0, 0])
    y = cut(b, y, [0], [7], [3])
    y = b.op("AveragePool", [y], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    flat = b.op("Reshape", [y, batch_and_rest(b, y)])
    logits = b.op("Gemm", [flat, b.weight("fc.weight", 10, 8 * 4 * 4), b.weight("fc.bias", 10)], "fc", transB=1)
    return b.proto(logits, b.op("Softmax", [logits], axis=1))


def axes(b: GraphBuilder, op_type: str, x: str, values: list[int]) -> str:
    """Squeeze or Unsqueeze, whose axes became an input in opset 13."""
    if b.opset < 13:
        return str(b.op(op_type, [x], axes=values))
    return str(b.op(op_type, [x, b.constant(f"axes{len(b.nodes)}", np.int64(values))]))


def batch_and_rest(b: GraphBuilder, x: str) -> str:
    """The shape (batch, everything else), computed the way that PyTorch exports `x.view(x.size(0), -1)`."""
    index = b.constant_node(f"index{len(b.nodes)}", np.int64(0))
    batch = axes(b, "Unsqueeze", b.op("Gather", [b.op("Shape", [x]), index], axis=0), [0])
    return str(b.op("Concat", [batch, b.constant_node(f"rest{len(b.nodes)}", np.int64([-1]))], axis=0))


def clip(b: GraphBuilder, x: str, low: float, high: float) -> str:
    if b.opset < 11:
        return str(b.op("Clip", [x], min=low, max=high))
    bounds = [b.constant(f"{name}{len(b.nodes)}", FLOATS(v)) for name, v in (("low", low), ("high", high))]
    return str(b.op("Clip", [x, *bounds]))


def dropout(b: GraphBuilder, x: str) -> str:
    if b.opset < 12:
        return str(b.op("Dropout", [x], ratio=0.5))
    return str(b.op("Dropout", [x, b.constant(f"ratio{len(b.nodes)}", FLOATS(0.5))]))


def pad(b: GraphBuilder, x: str, pads: list[int], value: float = 0.0, mode: str = "constant") -> str:
    if b.opset < 11:
        return str(b.op("Pad", [x], pads=pads, mode=mode, value=value))
    extra = [b.constant(f"pads{len(b.nodes)}", np.int64(pads)), b.constant(f"padded{len(b.nodes)}", FLOATS(value))]
    return str(b.op("Pad", [x, *extra], mode=mode))


def cut(b: GraphBuilder, x: str, starts: list[int], ends: list[int], axes: list[int]) -> str:
    if b.opset < 10:
        return str(b.op("Slice", [x], starts=starts, ends=ends, axes=axes))
    named = {"starts": starts, "ends": ends, "axes": axes}
    return str(b.op("Slice", [x, *[b.constant(f"{k}{len(b.nodes)}", np.int64(v)) for k, v in named.items()]]))


def upgraded_outputs(proto: onnx.ModelProto, feeds: dict[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
    upgraded = upgrade_opset(ir.from_proto(proto), opset=OPSET)
    assert upgraded.opset_imports[""] >= OPSET
    return run(proto, feeds), run(upgraded, feeds)


@pytest.mark.parametrize("opset", range(7, 23))
def test_a_network_of_every_opset_computes_the_same_after_upgrade_and_simplification(opset: int) -> None:
    proto = cnn(opset)
    upgraded = upgrade_opset(ir.from_proto(proto), opset=OPSET)
    simple = simplify(upgraded)
    for batch in (1, 3):
        feeds = {"x": normal(batch, 3, 16, 16)}
        expected = run(proto, feeds)
        prove_equal(ir.from_proto(proto), upgraded, feeds)
        for name, array in run(simple, feeds).items():
            np.testing.assert_allclose(array, expected[name], rtol=0, atol=2e-6)
    onnx.checker.check_model(ir.to_proto(simple), full_check=True)
    assert simple.graph.inputs[0].shape is not None
    assert str(simple.graph.inputs[0].shape[0]) == "N"
    assert [value.name for value in simple.graph.inputs] == ["x"]


def resample(op_type: str, mode: str, scale: float) -> Callable[[GraphBuilder], list[str]]:
    def build(b: GraphBuilder) -> list[str]:
        x, scales = b.input("x", ["N", 3, 8, 8]), [1.0, 1.0, scale, scale]
        if b.opset < 9:
            return [b.op(op_type, [x], mode=mode, scales=scales)]
        return [b.op(op_type, [x, b.constant("scales", FLOATS(scales))], mode=mode)]

    return build


def computed_scales(b: GraphBuilder) -> list[str]:
    x = b.input("x", ["N", 3, 8, 8])
    scales = b.op("Mul", [b.constant("half", FLOATS([0.5, 0.5, 1, 1])), b.constant("two", FLOATS([2, 2, 2, 2]))])
    return [b.op("Resize", [x, scales], mode="linear")]


def softmax_over_the_rest(b: GraphBuilder) -> list[str]:
    x = b.input("x", ["N", 3, 4])
    return [b.op("Softmax", [x]), b.op("LogSoftmax", [x]), b.op("Softmax", [x], axis=2)]


def shapes(b: GraphBuilder) -> list[str]:
    x = b.input("x", ["N", 1, 6])
    parts = b.op("Split", [x], "halves", outputs=2, axis=2, split=[2, 4])
    return [axes(b, "Unsqueeze", b.op("Squeeze", [x], axes=[1]), [0, 3]), *parts, b.op("Flatten", [x], axis=1)]


def reductions(b: GraphBuilder) -> list[str]:
    x = b.input("x", ["N", 3, 4, 4])
    kinds = ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceL2", "ReduceLogSumExp")
    return [b.op(kind, [x], kind, axes=[2, 3], keepdims=0) for kind in kinds]


def pads(b: GraphBuilder) -> list[str]:
    x = b.input("x", ["N", 3, 8, 8])
    return [pad(b, x, [0, 0, 1, 1, 0, 0, 2, 2], 1.5), pad(b, x, [0, 0, 1, 1, 0, 0, 2, 2], mode="reflect")]


def one_sided_clip(b: GraphBuilder) -> list[str]:
    return [b.op("Clip", [b.input("x", ["N", 16])], min=0.0)]


def recurrent(b: GraphBuilder) -> list[str]:
    x = b.input("x", [5, "N", 4])
    weights = [b.weight("W", 1, 32, 4), b.weight("R", 1, 32, 8), b.weight("B", 1, 64)]
    return list(b.op("LSTM", [x, *weights], outputs=3, hidden_size=8))


def branches(b: GraphBuilder) -> list[str]:
    b.input("x", ["N", 4])
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4]) for name in ("t", "e")]
    then = helper.make_graph([helper.make_node("Clip", ["x"], ["t"], min=0.0, max=1.0)], "then", [], info[:1])
    otherwise = helper.make_graph([helper.make_node("Neg", ["x"], ["e"])], "else", [], info[1:])
    return [b.op("If", [b.constant("condition", np.array(True))], then_branch=then, else_branch=otherwise)]


CASES: dict[str, tuple[tuple[int, ...], Callable[[GraphBuilder], list[str]]]] = {
    "upsample linear": ((7, 8, 9), resample("Upsample", "linear", 2.0)),
    "upsample nearest": ((7, 8, 9), resample("Upsample", "nearest", 2.0)),
    "resize linear": ((10,), resample("Resize", "linear", 2.0)),
    "resize linear by 1.7": ((10,), resample("Resize", "linear", 1.7)),
    "resize linear down": ((10,), resample("Resize", "linear", 0.5)),
    "resize nearest by 1.7": ((10,), resample("Resize", "nearest", 1.7)),
    "resize by computed scales": ((10,), computed_scales),
    "softmax over the rest": ((7, 11, 12), softmax_over_the_rest),
    "squeeze, split, flatten": ((7, 12), shapes),
    "reductions": ((7, 12), reductions),
    "pads": ((7, 10), pads),
    "one-sided clip": ((7, 10), one_sided_clip),
    "LSTM": ((7, 13), recurrent),
    "If": ((8, 10), branches),
}


@pytest.mark.parametrize(("name", "opset"), [(name, opset) for name, (opsets, _) in CASES.items() for opset in opsets])
def test_what_changed_its_form_computes_the_same(name: str, opset: int) -> None:
    b = GraphBuilder(opset, ir_version=6)
    proto = b.proto(*CASES[name][1](b))
    for batch in (1, 3):
        feeds = random_feeds(ir.from_proto(proto).graph.inputs, batch=batch)
        expected, found = upgraded_outputs(proto, feeds)
        for output, array in expected.items():
            np.testing.assert_allclose(found[output], array, rtol=0, atol=1e-6)


def test_a_conversion_that_the_library_gets_wrong_is_caught_with_the_node() -> None:
    """Up to opset 12, Hardmax put one 1 on all axes from `axis` on together; the converter leaves it as it is."""
    b = GraphBuilder(12)
    proto = b.proto(b.op("Hardmax", [b.op("Relu", [b.input("x", ["N", 3, 4])])], "winner"))
    model = ir.from_proto(proto)
    with pytest.raises(GraphError, match=r"output 'winner_y' is off by up to 1,.*'winner' \(Hardmax\)"):
        prove_equal(model, upgrade_opset(model, opset=OPSET), {"x": normal(2, 3, 4)})


def test_model_local_functions_are_inlined_because_the_converter_drops_them() -> None:
    b = GraphBuilder(9, ir_version=8)
    proto = b.proto(b.op("Twice", [b.input("x", ["N", 4])], "twice", domain="house"))
    body = [helper.make_node("Clip", ["a"], ["c"], min=0.0), helper.make_node("Add", ["c", "c"], ["r"])]
    proto.functions.append(helper.make_function("house", "Twice", ["a"], ["r"], body, [helper.make_opsetid("", 9)]))
    expected, found = upgraded_outputs(proto, {"x": normal(2, 4)})
    np.testing.assert_array_equal(found["twice_y"], expected["twice_y"])


def test_other_domains_names_and_metadata_survive() -> None:
    b = GraphBuilder(11)
    proto = b.proto(b.op("Gelu", [b.conv(b.input("x", ["N", 3, 8, 8]), "conv", 3, 40)], "gelu", domain="com.microsoft"))
    proto.metadata_props.add(key="names", value="{0: 'cat'}")
    proto.graph.node[0].metadata_props.add(key="module", value="layer1.conv")
    upgraded = upgrade_opset(ir.from_proto(proto), opset=OPSET)
    assert [(node.name, node.op_type) for node in upgraded.graph] == [("conv", "Conv"), ("gelu", "Gelu")]
    assert dict(next(iter(upgraded.graph)).metadata_props) == {"module": "layer1.conv"}
    assert upgraded.metadata_props == {"names": "{0: 'cat'}"}
    weight = upgraded.graph.initializers["conv.weight"]  # 4 KB: it went around the converter
    assert not weight.is_graph_input()
    expected, found = upgraded_outputs(proto, {"x": normal(2, 3, 8, 8)})
    np.testing.assert_array_equal(found["gelu_y"], expected["gelu_y"])


def test_quant_attributes_stay_on_their_tensors() -> None:
    b = GraphBuilder(13)
    model = b.model(b.conv(b.input("x", ["N", 3, 8, 8]), "conv", 3, 40))
    grids = {
        name: QuantParams("uint8", np.array(scale, np.float32), np.array(3))
        for name, scale in (("x", 0.1), ("conv.weight", 0.2), ("conv_y", 0.3))
    }
    for value in all_values(model.graph):
        set_params(value, grids.get(value.name or ""))
    upgraded = upgrade_opset(model, opset=OPSET)
    assert {value.name: get_params(value) for value in annotated_values(upgraded.graph)} == grids


def test_newer_and_equal_opsets_stay_and_the_source_is_never_changed() -> None:
    for opset in (7, 21, 22):
        model = ir.from_proto(cnn(opset))
        before = ir.to_proto(model).SerializeToString(deterministic=True)
        upgraded = upgrade_opset(model, opset=OPSET)
        assert upgraded.opset_imports[""] == max(opset, OPSET)
        assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_a_model_of_another_domain_alone_gets_the_working_opset() -> None:
    """Nodes that are added to it are ONNX's own."""
    node = helper.make_node("ArrayFeatureExtractor", ["x", "picked"], ["y"], domain="ai.onnx.ml")
    graph = helper.make_graph(
        [node],
        "picks",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 1])],
        [helper.make_tensor("picked", TensorProto.INT64, [1], [2])],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("ai.onnx.ml", 1)], ir_version=8))
    assert upgrade_opset(model, opset=OPSET).opset_imports == {"ai.onnx.ml": 1, "": OPSET}
    assert "" not in model.opset_imports


def test_older_than_opset_7_is_refused_with_what_to_do() -> None:
    b = GraphBuilder(6)
    model = ir.from_proto(b.proto(b.op("Relu", [b.input("x", [1, 4])])))
    with pytest.raises(SourceError, match="opset 6; 7 is the oldest"):
        upgrade_opset(model, opset=OPSET)


def test_what_has_no_conversion_is_refused_with_the_reason() -> None:
    b = GraphBuilder(8)
    x = b.input("x", [2, 3])
    proto = b.proto(b.op("BatchNormalization", [x, *[b.weight(n, 3) for n in "gbmv"]], spatial=0))
    with pytest.raises(GraphError, match="cannot be upgraded from opset 8 to 21"):
        upgrade_opset(ir.from_proto(proto), opset=OPSET)


def test_weights_in_external_files_are_upgraded(tmp_path: Path) -> None:
    onnx.save(cnn(8), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    upgraded = upgrade_opset(load_onnx(tmp_path / "m.onnx"), opset=OPSET)
    prove_equal(tmp_path / "m.onnx", upgraded, {"x": normal(2, 3, 16, 16)})
    convolutions = [node for node in upgraded.graph if node.op_type == "Conv"]
    assert [int_attribute(node, "group", 1) for node in convolutions] == [1, 8]
