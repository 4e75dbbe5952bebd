"""What operators mean: roles of inputs, and MACs and parameters against numbers worked out by hand."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import pytest
from onnx import TensorProto

from edgekit.graph.operators import Roles, copy_type, dims, is_float, layers, roles
from edgekit.passes.simplify import simplify
from graphs import GraphBuilder

Build = Callable[[GraphBuilder], str]


def conv(b: GraphBuilder) -> str:
    return b.conv(b.input("x", ["N", 3, 32, 32]), "conv", 3, 16, strides=[2, 2])


def grouped(b: GraphBuilder) -> str:
    return b.conv(b.input("x", ["N", 8, 10, 12]), "conv", 8, 16, group=4, bias=False)


def depthwise(b: GraphBuilder) -> str:
    return b.conv(b.input("x", ["N", 8, 10, 12]), "conv", 8, 8, group=8)


def conv1d(b: GraphBuilder) -> str:
    return str(b.op("Conv", [b.input("x", ["N", 4, 100]), b.weight("w", 6, 4, 5)], "conv"))


def transposed(b: GraphBuilder) -> str:
    inputs = [b.input("x", ["N", 4, 5, 7]), b.weight("w", 4, 6, 3, 3), b.weight("bias", 6)]
    return str(b.op("ConvTranspose", inputs, "up", strides=[2, 2]))


def grouped_transposed(b: GraphBuilder) -> str:
    return str(b.op("ConvTranspose", [b.input("x", ["N", 4, 5, 7]), b.weight("w", 4, 3, 2, 2)], "up", group=2))


def gemm(b: GraphBuilder) -> str:
    return str(b.op("Gemm", [b.input("x", ["N", 20]), b.weight("w", 20, 10), b.weight("bias", 10)], "fc"))


def gemm_transposed(b: GraphBuilder) -> str:
    return str(b.op("Gemm", [b.input("x", ["N", 20]), b.weight("w", 10, 20)], "fc", transB=1))


def matmul(b: GraphBuilder) -> str:
    return str(b.op("MatMul", [b.input("x", ["N", 12, 20]), b.weight("w", 20, 10)], "fc"))


def attention(b: GraphBuilder) -> str:
    return str(b.op("MatMul", [b.input("q", ["N", 4, 12, 8]), b.input("k", ["N", 4, 8, 12])], "scores"))


def weight_on_the_left(b: GraphBuilder) -> str:
    return str(b.op("MatMul", [b.weight("w", 10, 20), b.input("x", ["N", 20, 7])], "left"))


@pytest.mark.parametrize(
    ("build", "macs", "parameters"),
    [
        (conv, 16 * 16 * 16 * (3 * 3 * 3), 16 * 3 * 9 + 16),
        (grouped, 16 * 10 * 12 * (2 * 3 * 3), 16 * 2 * 9),
        (depthwise, 8 * 10 * 12 * 9, 8 * 9 + 8),
        (conv1d, 6 * 96 * (4 * 5), 6 * 4 * 5),
        (transposed, 4 * 5 * 7 * (6 * 3 * 3), 4 * 6 * 9 + 6),
        (grouped_transposed, 4 * 5 * 7 * (3 * 2 * 2), 4 * 3 * 4),
        (gemm, 20 * 10, 20 * 10 + 10),
        (gemm_transposed, 20 * 10, 20 * 10),
        (matmul, 12 * 20 * 10, 20 * 10),
        (attention, 4 * 12 * 12 * 8, 0),
        (weight_on_the_left, 10 * 20 * 7, 10 * 20),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_cost_of_one_sample(build: Build, macs: int, parameters: int) -> None:
    b = GraphBuilder()
    (layer,) = layers(simplify(b.model(build(b))))
    assert (layer.macs, layer.parameters) == (macs, parameters)


def test_layers_come_in_order_with_their_shapes_and_nothing_else() -> None:
    b = GraphBuilder()
    x = b.op("Relu", [b.conv(b.input("x", ["N", 3, 8, 8]), "conv", 3, 4)])
    x = b.op("Flatten", [b.op("GlobalAveragePool", [x])])
    found = layers(simplify(b.model(b.op("Gemm", [x, b.weight("w", 4, 2)], "fc"))))
    assert [(layer.name, layer.op_type, layer.input_shape, layer.output_shape) for layer in found] == [
        ("conv", "Conv", (None, 3, 8, 8), (None, 4, 8, 8)),
        ("fc", "Gemm", (None, 4), (None, 2)),
    ]


def test_without_shapes_a_layer_costs_nothing_that_is_known() -> None:
    b = GraphBuilder()
    far = b.op("Mystery", [b.input("x", ["N", 3, 8, 8])], domain="far")
    (layer,) = layers(simplify(b.model(b.conv(far, "conv", 3, 4))))
    assert (layer.input_shape, layer.macs, layer.parameters) == (None, 0, 4 * 27 + 4)


def node_of(op_type: str, inputs: list[object], **attributes: int) -> ir.Node:
    """A node on inputs that are activations (a list: their shape) or constants (a tuple: theirs)."""
    b = GraphBuilder()
    names = [
        b.input(f"x{i}", shape) if isinstance(shape, list) else b.weight(f"w{i}", *shape)  # type: ignore[misc]
        for i, shape in enumerate(inputs)
    ]
    return list(b.model(b.op(op_type, names, **attributes)).graph)[-1]


IMAGE: list[object] = ["N", 4, 8, 8]


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        (node_of("Conv", [IMAGE, (6, 4, 3, 3), (6,)]), Roles((0,), 1, 0, 2)),
        (node_of("Conv", [IMAGE, (6, 4, 3, 3)]), Roles((0,), 1, 0)),
        (node_of("Conv", [IMAGE, [6, 4, 3, 3]]), None),
        (node_of("Conv", [(1, 4, 8, 8), (6, 4, 3, 3)]), None),
        (node_of("Conv", [IMAGE, (6, 4, 3, 3), [6]]), Roles((0,), 1, 0)),
        (node_of("ConvTranspose", [IMAGE, (4, 6, 3, 3), (6,)]), Roles((0,), 1, 1, 2)),
        (node_of("ConvTranspose", [IMAGE, (4, 3, 3, 3)], group=2), Roles((0,), 1, None)),
        (node_of("Gemm", [["N", 5], (5, 6), (6,)]), Roles((0,), 1, 1, 2)),
        (node_of("Gemm", [["N", 5], (6, 5), (1, 6)], transB=1), Roles((0,), 1, 0, 2)),
        (node_of("Gemm", [[3, 5], (5, 6), (3, 6)]), Roles((0,), 1, 1)),  # not a bias: another row for each sample
        (node_of("Gemm", [["N", 5], (5, 6), (1,)]), Roles((0,), 1, 1)),
        (node_of("Gemm", [[5, 3], (5, 6)], transA=1), None),
        (node_of("Gemm", [["N", 5], [5, 6]]), Roles((0, 1))),
        (node_of("MatMul", [["N", 7, 5], (5, 6)]), Roles((0,), 1, 1)),
        (node_of("MatMul", [["N", 7, 5], (2, 5, 6)]), Roles((0,), 1, None)),
        (node_of("MatMul", [["N", 7, 5], ["N", 5, 7]]), Roles((0, 1))),
        (node_of("MatMul", [(7, 5), ["N", 5, 7]]), None),
        (node_of("Add", [IMAGE, IMAGE]), Roles((0, 1))),
        (node_of("Add", [IMAGE, (4, 1, 1)]), None),
        (node_of("Concat", [IMAGE, IMAGE, IMAGE], axis=1), Roles((0, 1, 2))),
        (node_of("Sigmoid", [IMAGE]), Roles((0,))),
        (node_of("Sigmoid", [(1, 4)]), None),
    ],
    ids=lambda value: value.op_type if isinstance(value, ir.Node) else "",
)
def test_which_inputs_are_activations_weights_and_biases(node: ir.Node, expected: Roles | None) -> None:
    assert roles(node) == expected


def test_types_and_shapes() -> None:
    b = GraphBuilder()
    b.input("x", ["N", 3])
    b.input("i", ["N"], TensorProto.INT64)
    x, i = b.model().graph.inputs
    assert (dims(x), dims(i), dims(None)) == ((None, 3), (None,), None)
    assert (is_float(x), is_float(i), is_float(None), is_float(ir.Value(name="unknown"))) == (True, False, False, True)


def test_a_copied_type_is_not_shared() -> None:
    b = GraphBuilder()
    b.input("x", ["N", 3])
    (x,) = b.model().graph.inputs
    copy = ir.Value(name="copy")
    copy_type(copy, x)
    assert (copy.dtype, dims(copy)) == (ir.DataType.FLOAT, (None, 3))
    copy.dtype = ir.DataType.INT8
    assert x.dtype == ir.DataType.FLOAT
