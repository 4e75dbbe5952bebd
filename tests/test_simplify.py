"""One form for all graphs: constants, shapes, names, and no node that does nothing; the numbers stay."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from edgekit.graph.equal import random_feeds
from edgekit.graph.operators import dims
from edgekit.passes.pool_globally import pool_globally
from edgekit.passes.simplify import simplify
from graphs import GraphBuilder, normal, op_types, run


def simplified(proto: onnx.ModelProto) -> ir.Model:
    """The simplified model, after it was seen to pass the checker and to compute the same for two batch sizes."""
    source = ir.from_proto(proto)
    model = simplify(source)
    for batch in (1, 3):
        feeds = random_feeds(source.graph.inputs, batch=batch)
        expected, found = run(proto, feeds), run(model, feeds)
        assert list(found) == list(expected)
        for name, array in expected.items():
            np.testing.assert_allclose(
                found[name], array, rtol=0, atol=1e-6 * max(1.0, float(np.abs(array).max(initial=0)))
            )
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return model


def test_weights_that_constants_make_become_constants_of_any_size() -> None:
    b = GraphBuilder()
    x = b.input("x", ["N", 200])
    transposed = b.op("Transpose", [b.weight("w1", 300, 200)], "t", perm=[1, 0])  # 60,000 elements
    normed = b.op("Mul", [b.weight("direction", 200, 300), b.weight("gain", 1, 300)], "normed")
    model = simplified(b.proto(b.op("MatMul", [x, transposed]), b.op("MatMul", [x, normed])))
    assert op_types(model) == ["MatMul", "MatMul"]
    assert {name: dims(value) for name, value in model.graph.initializers.items()} == {
        "t_y": (200, 300),
        "normed_y": (200, 300),
    }


def test_a_weight_behind_identities_keeps_its_name_and_stays_shared() -> None:
    b = GraphBuilder()
    x, w = b.input("x", ["N", 20]), b.weight("encoder.weight", 20, 20)
    y = b.op("MatMul", [b.op("MatMul", [x, b.op("Identity", [w])]), b.op("Identity", [b.op("Identity", [w])])])
    model = simplified(b.proto(y))
    assert op_types(model) == ["MatMul", "MatMul"]
    assert list(model.graph.initializers) == ["encoder.weight"]


def test_constant_nodes_of_every_kind_become_initializers() -> None:
    b = GraphBuilder(13)
    x = b.input("x", ["N", 3])
    for attributes in (
        {"value_float": 2.0},
        {"value_floats": [1.0, 2.0, 3.0]},
        {"value_ints": [-1, 3]},
        {"value_int": 3},
    ):
        (name,) = attributes
        b.nodes.append(helper.make_node("Constant", [], [name], **attributes))
    y = b.op("Add", [b.op("Mul", [x, "value_float"]), "value_floats"])
    y = b.op("Mul", [b.op("Reshape", [y, "value_ints"]), b.op("Cast", ["value_int"], to=TensorProto.FLOAT)])
    model = simplified(b.proto(b.op("Add", [y, b.constant_node("tensor", np.float32([7]))])))
    assert op_types(model) == ["Mul", "Add", "Reshape", "Mul", "Add"]


def test_initializers_listed_as_inputs_are_constants() -> None:
    b = GraphBuilder(8, ir_version=3)
    model = simplified(b.proto(b.conv(b.input("x", ["N", 3, 8, 8]), "conv", 3, 4)))
    assert [value.name for value in model.graph.inputs] == ["x"]
    assert sorted(model.graph.initializers) == ["conv.bias", "conv.weight"]


def test_dynamic_batch_stays_and_static_shape_arithmetic_goes() -> None:
    b = GraphBuilder()
    x = b.input("x", ["N", 3, 4, 4])
    width = b.op("Gather", [b.op("Shape", [x], "shape"), b.constant_node("three", np.int64([3]))], axis=0)
    target = b.op("Concat", [b.constant_node("rest", np.int64([-1])), width], axis=0)
    model = simplified(b.proto(b.op("Reshape", [x, target], "reshape")))
    assert [node.op_type for node in model.graph] == ["Reshape"]
    batch = model.graph.inputs[0].shape
    assert batch is not None and str(batch[0]) == "N"


def test_inference_dropout_goes_and_a_mask_that_is_read_keeps_its_meaning() -> None:
    b = GraphBuilder(13)
    x = b.input("x", ["N", 4])
    ratio, training = b.constant("ratio", np.float32(0.5)), b.constant("training", np.array(False))
    y = b.op("Dropout", [x, ratio, training], "a", outputs=2)[0]
    y = b.op("Relu", [b.op("Dropout", [y], "b")], "relu")
    model = simplified(b.proto(b.op("Dropout", [y], "last")))
    assert op_types(model) == ["Relu"]
    assert model.graph.outputs[0].name == "last_y"
    b = GraphBuilder(13)
    y, mask = b.op("Dropout", [b.input("x", ["N", 4])], "d", outputs=2)
    simplified(b.proto(b.op("Relu", [y]), mask, dtypes={mask: TensorProto.BOOL}))


def test_outputs_that_are_the_same_tensor_as_another_keep_their_names() -> None:
    b = GraphBuilder()
    x = b.input("x", ["N", 3])
    y = b.op("Relu", [x], "relu")
    constant = b.constant_node("k", np.float32([1, 2, 3]))
    outputs = [y, b.op("Identity", [y], "i"), b.op("Identity", [y], "j"), b.op("Identity", [x], "same")]
    model = simplified(b.proto(*outputs, b.op("Identity", [constant], "c"), b.op("Add", [constant, constant], "sum")))
    assert [value.name for value in model.graph.outputs] == [*outputs, "c_y", "sum_y"]


def test_branches_that_pass_an_outer_tensor_on_are_left_alone() -> None:
    b = GraphBuilder(13)
    x = b.input("x", ["N", 4])
    y, w = b.op("Relu", [x], "relu"), b.weight("w", 4)
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4]) for name in ("t", "e")]
    then = helper.make_graph([helper.make_node("Identity", [y], ["t"])], "then", [], info[:1])
    otherwise = helper.make_graph([helper.make_node("Add", [x, w], ["e"])], "else", [], info[1:])
    condition = b.op("Greater", [b.op("ReduceSum", [x], keepdims=0), b.constant("zero", np.float32(0))])
    model = simplified(b.proto(b.op("If", [condition], then_branch=then, else_branch=otherwise)))
    [branching] = [node for node in model.graph if node.op_type == "If"]
    kinds = {name: [node.op_type for node in branching.attributes[name].as_graph()] for name in branching.attributes}
    assert kinds == {"then_branch": ["Identity"], "else_branch": ["Add"]}


def test_big_constants_are_not_unrolled() -> None:
    b = GraphBuilder()
    shape = b.constant("shape", np.int64([2000, 2000]))
    big = b.op("Add", [b.op("ConstantOfShape", [shape]), b.op("Expand", [b.constant("one", np.float32([[1]])), shape])])
    model = simplified(b.proto(b.op("Mul", [b.op("ReduceMax", [big], keepdims=0), b.input("x", ["N", 4])])))
    assert sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value) < 1000


def test_quantized_weights_stay_quantized() -> None:
    b = GraphBuilder()
    parameters = [
        b.constant("codes", np.int8(np.eye(4))),
        b.constant("scale", np.float32(0.1)),
        b.constant("zero", np.int8(0)),
    ]
    model = simplified(b.proto(b.op("MatMul", [b.input("x", ["N", 4]), b.op("DequantizeLinear", parameters)])))
    assert op_types(model) == ["DequantizeLinear", "MatMul"]


def test_every_node_gets_a_name_of_its_own_and_dead_nodes_go() -> None:
    b = GraphBuilder()
    x = b.input("x", ["N", 4])
    b.input("unused", ["N"])
    b.op("Exp", [x], "dead")
    y = b.op("Add", [b.op("Relu", [x], "a"), b.op("Neg", [x], "b")], "add")
    for node, name in zip(b.nodes, ["dead", "twin", "twin", ""], strict=True):
        node.name = name
    model = simplify(b.model(y))  # ONNX Runtime refuses the source for its two twins
    assert [node.name for node in model.graph] == ["twin", "twin_2", "Add_add_y"]
    x_array = normal(2, 4)
    found = run(model, {"x": x_array, "unused": normal(2)})["add_y"]
    np.testing.assert_array_equal(found, np.maximum(x_array, 0) - x_array)
    assert [value.name for value in model.graph.inputs] == ["x", "unused"]


def test_functions_are_inlined_and_shapes_are_known_everywhere() -> None:
    b = GraphBuilder()
    y = b.op("Twice", [b.conv(b.input("x", ["N", 3, 8, 8]), "conv", 3, 4)], "twice", domain="house")
    proto = b.proto(b.op("Relu", [y], "relu"))
    body = [helper.make_node("Add", ["a", "a"], ["r"])]
    proto.functions.append(helper.make_function("house", "Twice", ["a"], ["r"], body, [helper.make_opsetid("", 21)]))
    model = simplified(proto)
    assert op_types(model) == ["Conv", "Add", "Relu"]
    assert all(dims(node.outputs[0]) == (None, 4, 8, 8) for node in model.graph)


def test_one_operator_that_nobody_knows_does_not_hide_the_shapes_of_others() -> None:
    b = GraphBuilder()
    x = b.conv(b.input("x", ["N", 3, 8, 8]), "conv", 3, 4)
    far = b.op("Mystery", [x], "mystery", domain="far")
    proto = b.proto(b.op("Relu", [x], "relu"), b.op("Neg", [far], "neg"))
    shapes = {node.name: dims(node.outputs[0]) for node in simplify(ir.from_proto(proto)).graph}
    assert shapes == {"conv": (None, 4, 8, 8), "mystery": None, "relu": (None, 4, 8, 8), "neg": None}
    proto.graph.value_info.append(helper.make_tensor_value_info("mystery_y", TensorProto.FLOAT, ["N", 7]))
    shapes = {node.name: dims(node.outputs[0]) for node in simplify(ir.from_proto(proto)).graph}
    assert (shapes["mystery"], shapes["neg"]) == ((None, 7), (None, 7))


def test_a_node_that_cannot_be_right_does_not_hide_the_shapes_of_others(capfd: pytest.CaptureFixture[str]) -> None:
    b = GraphBuilder()
    x = b.op("Relu", [b.input("x", ["N", 3, 8, 8])], "relu")
    b.op("Neg", [x], "neg")
    b.op("MatMul", ["neg_y", b.weight("w", 5, 5)], "wrong")  # rows of 8 by a matrix of 5
    model = ir.from_proto(b.proto("wrong_y"))
    assert dims(list(simplify(model).graph)[1].outputs[0]) == (None, 3, 8, 8)
    assert capfd.readouterr().err == ""


def test_stored_shapes_that_are_stale_since_the_batch_was_made_dynamic_are_renewed() -> None:
    b = GraphBuilder()
    proto = b.proto(b.op("Relu", [b.conv(b.input("x", ["N", 3, 8, 8]), "conv", 3, 4)], "relu"))
    proto.graph.value_info.append(helper.make_tensor_value_info("conv_y", TensorProto.FLOAT, [1, 4, 8, 8]))
    model = simplified(proto)
    assert [dims(node.outputs[0]) for node in model.graph] == [(None, 4, 8, 8)] * 2


def test_simplifying_twice_changes_nothing_and_the_source_is_not_touched() -> None:
    b = GraphBuilder(11)
    x = b.input("x", ["N", 3, 8, 8])
    proto = b.proto(b.op("Relu", [b.op("Identity", [b.conv(x, "conv", 3, 4)])]))
    source = ir.from_proto(proto)
    before = ir.to_proto(source).SerializeToString(deterministic=True)
    once = simplify(source)
    assert ir.to_proto(source).SerializeToString(deterministic=True) == before
    serialized = [ir.to_proto(model).SerializeToString(deterministic=True) for model in (once, simplify(once))]
    assert serialized[0] == serialized[1]


@pytest.mark.parametrize(
    ("shape", "axes", "keepdims", "expected"),
    [
        (["N", 4, 6, 6], [2, 3], 1, ["GlobalAveragePool"]),
        (["N", 4, 6, 6], [-1, -2], 0, ["GlobalAveragePool", "Flatten"]),
        (["N", 4, 6], [2], 0, ["GlobalAveragePool", "Flatten"]),
        (["N", 4, 3, 3, 3], [2, 3, 4], 1, ["GlobalAveragePool"]),
        (["N", 4, 6, 6], [1, 2], 0, ["ReduceMean"]),
        (["N", 4, 6, 6], [3], 1, ["ReduceMean"]),
        (["N", 6], [1], 1, ["ReduceMean"]),
    ],
)
@pytest.mark.parametrize("opset", [13, 21])
def test_a_mean_over_all_positions_becomes_a_global_pool(
    shape: list[int | str], axes: list[int], keepdims: int, expected: list[str], opset: int
) -> None:
    b = GraphBuilder(opset)
    x = b.input("x", shape)
    if opset < 18:
        y = b.op("ReduceMean", [x], "mean", axes=axes, keepdims=keepdims)
    else:
        y = b.op("ReduceMean", [x, b.constant("axes", np.int64(axes))], "mean", keepdims=keepdims)
    source = b.model(y)
    model = pool_globally(source)
    assert op_types(model) == expected
    feeds = {"x": normal(*[2 if d == "N" else int(d) for d in shape])}
    np.testing.assert_allclose(run(model, feeds)[y], run(source, feeds)[y], rtol=0, atol=1e-6)
