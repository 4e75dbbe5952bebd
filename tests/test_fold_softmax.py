"""A Softmax over two classes becomes a Sigmoid of differences that the head computes: the same probabilities, half the head."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.graph.annotations import all_values, set_params
from edgekit.graph.equal import prove_equal, random_feeds
from edgekit.passes.drop_concat_split import drop_concat_split
from edgekit.passes.fold_softmax import fold_softmax
from edgekit.passes.simplify import simplify
from edgekit.quant.spec import QuantParams
from graphs import GraphBuilder, initializers, op_types

Build = Callable[[GraphBuilder], str]
BOTH = ["Sigmoid", "Sub", "Concat"]


def prove(before: ir.Model, after: ir.Model) -> None:
    for batch in (1, 3):
        prove_equal(before, after, random_feeds(list(before.graph.inputs), batch))


def softmax(b: GraphBuilder, x: str, axis: int = -1) -> str:
    return str(b.op("Softmax", [x], "scores", axis=axis))


def shape(b: GraphBuilder, name: str, *sizes: int) -> str:
    return b.constant(name, np.array(sizes, np.int64))


def ssd_head(b: GraphBuilder, name: str, anchors: int, size: int, bias: bool = True) -> str:
    """Conv(2A) -> Transpose -> Reshape(N, -1, 2)."""
    x = b.conv(b.input(f"x.{name}", ["N", 4, size, size]), name, 4, 2 * anchors, bias=bias)
    x = b.op("Transpose", [x], f"{name}.nhwc", perm=[0, 2, 3, 1])
    return str(b.op("Reshape", [x, shape(b, f"{name}.shape", 0, -1, 2)], f"{name}.flat"))


def detector(b: GraphBuilder) -> str:
    heads = [ssd_head(b, "large", 3, 5), ssd_head(b, "small", 2, 3, bias=False), ssd_head(b, "last", 1, 1)]
    return softmax(b, b.op("Concat", heads, "all", axis=1), axis=2)


def test_the_heads_of_a_detector_compute_differences() -> None:
    b = GraphBuilder()
    before = simplify(b.model(detector(b)))
    after = fold_softmax(before)
    assert op_types(after) == [*op_types(before)[:-1], *BOTH]
    heads = {node.name: node for node in after.graph if node.op_type == "Conv"}
    assert {name: str(node.outputs[0].shape) for name, node in heads.items()} == {
        "large": "[N,3,5,5]", "small": "[N,2,3,3]", "last": "[N,1,1,1]",
    }  # fmt: skip
    assert [(v.name, str(v.shape)) for v in after.graph.outputs] == [
        (v.name, str(v.shape)) for v in before.graph.outputs
    ]
    assert "large_y" not in {value.name for value in all_values(after.graph)}, "another number, another name"
    prove(before, after)
    inferred = simplify(after)
    assert [str(n.outputs[0].shape) for n in inferred.graph] == [str(n.outputs[0].shape) for n in after.graph]


@pytest.mark.parametrize("wanted", [0, 1])
def test_where_one_class_is_read_the_other_goes(wanted: int) -> None:
    b = GraphBuilder()
    y = b.op("Gather", [detector(b), b.constant("class", np.array(wanted))], "face", axis=2)
    before = simplify(b.model(y))
    after = drop_concat_split(fold_softmax(before))
    assert op_types(after)[-2 - (wanted == 0) :] == ["Sigmoid", *["Sub"] * (wanted == 0), "Gather"]
    assert "Softmax" not in op_types(after)
    prove(before, after)


def segmentation(b: GraphBuilder) -> str:
    return softmax(b, b.conv(b.input("x", ["N", 4, 6, 6]), "head", 4, 2), axis=1)


def channels_last(b: GraphBuilder) -> str:
    x = b.conv(b.input("x", ["N", 4, 6, 6]), "head", 4, 2)
    return softmax(b, b.op("Transpose", [x], perm=[0, 2, 3, 1]))


def classes_outermost(b: GraphBuilder) -> str:
    """A region proposal head: all channels of class 0, then all of class 1."""
    x = b.conv(b.input("x", ["N", 4, 6, 5]), "head", 4, 6)
    return softmax(b, b.op("Reshape", [x, shape(b, "s", 0, 2, -1, 5)]), axis=1)


def anchors_outermost(b: GraphBuilder) -> str:
    x = b.conv(b.input("x", ["N", 4, 6, 5]), "head", 4, 6)
    return softmax(b, b.op("Reshape", [x, shape(b, "s", -1, 3, 2, 6, 5)]), axis=2)


def tokens(b: GraphBuilder) -> str:
    x = b.op("MatMul", [b.input("x", ["N", 5, 4]), b.weight("w", 4, 2)], "head")
    return softmax(b, b.op("Add", [b.weight("bias", 2), x]))


def tokens_without_bias(b: GraphBuilder) -> str:
    return softmax(b, b.op("MatMul", [b.input("x", ["N", 5, 4]), b.weight("w", 4, 2)], "head"))


def several_questions(b: GraphBuilder) -> str:
    x = b.op("Gemm", [b.input("x", ["N", 4]), b.weight("w", 10, 4), b.weight("bias", 1, 10)], "head", transB=1)
    return softmax(b, b.op("Reshape", [x, shape(b, "s", 0, 5, 2)]))


def regrouped(b: GraphBuilder) -> str:
    x = b.op("MatMul", [b.input("x", ["N", 6, 4]), b.weight("w", 4, 8)], "head")
    x = b.op("Reshape", [b.op("Add", [x, b.weight("bias", 1, 1, 8)]), shape(b, "s1", 0, 0, 2, 4)])
    return softmax(b, b.op("Reshape", [x, shape(b, "s2", 0, -1, 2)]))


FOLDED: list[Build] = [
    segmentation, channels_last, classes_outermost, anchors_outermost, tokens, tokens_without_bias, several_questions, regrouped,
]  # fmt: skip


@pytest.mark.parametrize("build", FOLDED, ids=lambda build: build.__name__)
def test_wherever_the_classes_are_channels_of_a_linear_layer(build: Build) -> None:
    b = GraphBuilder()
    before = simplify(b.model(build(b)))
    after = fold_softmax(before)
    assert op_types(after) == [*op_types(before)[:-1], *BOTH]
    weight = next(node for node in after.graph if node.name == "head").inputs[1]
    old = next(node for node in before.graph if node.name == "head").inputs[1]
    assert weight is not None and old is not None and weight.const_value is not None and old.const_value is not None
    assert weight.const_value.size * 2 == old.const_value.size
    prove(before, after)


@settings(max_examples=25, deadline=None)
@given(
    outer=st.integers(1, 3), inner=st.integers(1, 3), height=st.integers(1, 3), width=st.integers(1, 3), last=st.booleans()
)  # fmt: skip
def test_any_layout_of_the_channels(outer: int, inner: int, height: int, width: int, last: bool) -> None:
    b = GraphBuilder()
    x = b.conv(b.input("x", ["N", 4, height, width]), "head", 4, outer * 2 * inner)
    if last:
        x = b.op("Transpose", [x], perm=[0, 2, 3, 1])
        x = b.op("Reshape", [x, shape(b, "s", 0, height * width * outer, 2, inner)])
    else:
        x = b.op("Reshape", [x, shape(b, "s", -1, outer, 2, inner * height * width)])
    before = simplify(b.model(softmax(b, x, axis=2)))
    after = fold_softmax(before)
    assert "Softmax" not in op_types(after)
    prove(before, after)


def test_a_shared_head_is_replaced_for_this_layer_only() -> None:
    b = GraphBuilder()
    w = b.weight("w", 2, 4, 1, 1)
    first, second = (b.op("Conv", [b.input(name, ["N", 4, 3, 3]), w], f"head.{name}") for name in ("x", "z"))
    before = simplify(b.model(softmax(b, first, axis=1), second))
    after = fold_softmax(before)
    assert "Softmax" not in op_types(after) and initializers(after)["w"] == initializers(before)["w"]
    prove(before, after)


def three_classes(b: GraphBuilder) -> list[str]:
    return [softmax(b, b.conv(b.input("x", ["N", 4, 6, 6]), "head", 4, 3), axis=1)]


def another_axis(b: GraphBuilder) -> list[str]:
    return [softmax(b, b.conv(b.input("x", ["N", 4, 6, 2]), "head", 4, 2), axis=3)]


def scores_are_read(b: GraphBuilder) -> list[str]:
    x = b.conv(b.input("x", ["N", 4, 6, 6]), "head", 4, 2)
    return [softmax(b, x, axis=1), b.op("Relu", [x])]


def scores_are_an_output(b: GraphBuilder) -> list[str]:
    x = b.conv(b.input("x", ["N", 4, 6, 6]), "head", 4, 2)
    return [softmax(b, x, axis=1), x]


def behind_relu(b: GraphBuilder) -> list[str]:
    return [softmax(b, b.op("Relu", [b.conv(b.input("x", ["N", 4, 6, 6]), "head", 4, 2)]), axis=1)]


def binary_classifier(b: GraphBuilder) -> list[str]:
    return [softmax(b, b.op("Gemm", [b.input("x", ["N", 4]), b.weight("w", 4, 2)], "head"))]


def grouped(b: GraphBuilder) -> list[str]:
    return [softmax(b, b.conv(b.input("x", ["N", 4, 6, 6]), "head", 4, 2, group=2), axis=1)]


def one_head_is_no_head(b: GraphBuilder) -> list[str]:
    heads = [ssd_head(b, "large", 3, 5), b.op("Relu", [b.input("z", ["N", 7, 2])])]
    return [softmax(b, b.op("Concat", heads, axis=1))]


def joined_classes(b: GraphBuilder) -> list[str]:
    parts = [b.conv(b.input(name, ["N", 4, 6, 6]), f"head.{name}", 4, 2) for name in ("x", "z")]
    parts = [b.op("Reshape", [part, shape(b, f"{part}.shape", -1, 1, 36)]) for part in parts]
    return [softmax(b, b.op("Concat", parts, axis=1), axis=1)]


def positions_as_classes(b: GraphBuilder) -> list[str]:
    x = b.conv(b.input("x", ["N", 4, 6, 6]), "head", 4, 2)
    return [softmax(b, b.op("Reshape", [x, shape(b, "s", 0, -1, 2)]))]


def a_copied_size_would_change(b: GraphBuilder) -> list[str]:
    x = b.op("MatMul", [b.input("x", ["N", 2, 4]), b.weight("w", 4, 4)], "head")
    return [softmax(b, b.op("Reshape", [x, shape(b, "s", -1, 0, 2)]), axis=1)]


def infinite_bias(b: GraphBuilder) -> list[str]:
    bias = b.constant("bias", np.array([0, -np.inf], np.float32))
    return [softmax(b, b.op("Conv", [b.input("x", ["N", 4, 6, 6]), b.weight("w", 2, 4, 1, 1), bias], "head"), axis=1)]


STAYS = [
    three_classes, another_axis, scores_are_read, scores_are_an_output, behind_relu, binary_classifier, grouped,
    one_head_is_no_head, joined_classes, positions_as_classes, a_copied_size_would_change, infinite_bias,
]  # fmt: skip


@pytest.mark.parametrize("build", STAYS, ids=lambda build: build.__name__)
def test_where_it_would_not_be_exact_it_stays(build: Callable[[GraphBuilder], list[str]]) -> None:
    b = GraphBuilder()
    before = simplify(b.model(*build(b)))
    after = fold_softmax(before)
    assert op_types(after) == op_types(before)
    assert initializers(after) == initializers(before)


@pytest.mark.parametrize("tensor", ["head.weight", "head.bias", "head_y", "scores_y"])
def test_a_grid_keeps_it(tensor: str) -> None:
    b = GraphBuilder()
    before = simplify(b.model(segmentation(b)))
    values = {value.name: value for value in all_values(before.graph)}
    set_params(values[tensor], QuantParams("uint8", np.array(0.05, np.float32), np.array(128)))
    assert op_types(fold_softmax(before)) == op_types(before)
