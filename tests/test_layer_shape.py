from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgekit.graph.io import save_onnx
from edgekit.graph.operators import layers
from edgekit.graph.run import Session
from edgekit.layer_shape import LayerShape, layer_shapes, one_layer
from networks import Net

SIDE = 12


def inferred(net: Net, *outputs: str) -> ir.Model:
    """The model with the shapes of all values."""
    return ir.from_proto(onnx.shape_inference.infer_shapes(net.proto(*outputs)))


@pytest.fixture(scope="module")
def model() -> ir.Model:
    """Every kind of layer; the last two are a product of two activations and one with an open size."""
    net = Net()
    x = net.input("x", ["N", 3, SIDE, SIDE])
    y = net.conv_relu(x, "stem", 3, 8, strides=[2, 2])
    y = net.conv(y, "depthwise", 8, 16, group=8)
    y = net.conv(y, "grouped", 16, 24, 1, bias=False, group=4)
    up = net.op("ConvTranspose", [y, net.weight("up.weight", 24, 10, 2, 2)], "up", kernel_shape=[2, 2], strides=[2, 2])
    flat = net.op("Flatten", [net.op("GlobalAveragePool", [up])])
    head = net.gemm(flat, "head", 10, 5)
    tokens = net.input("tokens", ["N", "S", 6])
    biased = net.op("Add", [net.matmul(tokens, "query", 6, 4), net.constant("row", np.ones(4, np.float32))], "add")
    product = net.op("MatMul", [biased, net.op("Transpose", [biased], perm=[0, 2, 1])], "scores")
    return inferred(net, head, product)


@pytest.fixture(scope="module")
def shapes(model: ir.Model) -> dict[str, LayerShape]:
    return layer_shapes(model, sizes={"S": 7})


def test_what_is_known_of_each_layer(model: ir.Model, shapes: dict[str, LayerShape]) -> None:
    assert list(shapes) == ["stem", "depthwise", "grouped", "up", "head", "query"]
    stem = shapes["stem"]
    assert (stem.op_type, stem.inputs, stem.outputs, stem.before, stem.after) == ("Conv", 3, 8, (12, 12), (6, 6))
    assert (stem.kernel, stem.group, stem.depthwise, stem.bias, stem.opset) == ((3, 3), 1, False, True, 21)
    assert stem.attributes == (("pads", (1, 1, 1, 1)), ("strides", (2, 2)))
    assert shapes["depthwise"].depthwise and not shapes["grouped"].depthwise
    assert not shapes["grouped"].bias
    assert (shapes["query"].before, shapes["query"].bias) == ((7,), True)
    assert "query" not in layer_shapes(model)
    assert "3 to 8 channels, at 12x12" in stem.summary


def test_macs_are_those_of_the_graph(model: ir.Model, shapes: dict[str, LayerShape]) -> None:
    expected = {layer.name: layer.macs for layer in layers(model)} | {"query": 7 * 6 * 4}
    assert {name: shape.macs(shape.inputs, shape.outputs) for name, shape in shapes.items()} == {
        name: expected[name] for name in shapes
    }
    assert shapes["stem"].macs(3, 4) == 36 * 9 * 3 * 4
    assert shapes["depthwise"].macs(8, 8) == 36 * 9 * 8


@pytest.mark.parametrize(
    ("name", "channels", "weight", "x", "output"),
    [
        ("stem", (3, 4), (4, 3, 3, 3), (1, 3, 12, 12), (1, 4, 1, 1)),
        ("depthwise", (8, 6), (6, 1, 3, 3), (1, 3, 6, 6), (1, 6, 1, 1)),  # two outputs for each input
        ("grouped", (8, 12), (12, 2, 1, 1), (1, 8, 6, 6), (1, 12, 1, 1)),
        ("up", (6, 5), (6, 5, 2, 2), (1, 6, 6, 6), (1, 5, 1, 1)),
        ("head", (7, 5), (5, 7), (1, 7), (1, 5)),
        ("query", (3, 2), (3, 2), (1, 7, 3), (1, 7, 2)),
    ],
)
def test_a_layer_alone_with_other_channels_runs(
    shapes: dict[str, LayerShape],
    tmp_path: Path,
    name: str,
    channels: tuple[int, int],
    weight: tuple[int, ...],
    x: tuple[int, ...],
    output: tuple[int, ...],
) -> None:
    shape = shapes[name]
    assert shape.weight_shape(*channels) == weight
    assert shape.input_shape(*channels) == x
    alone = one_layer(shape, *channels, copies=3)
    assert sum(node.op_type == shape.op_type for node in alone.graph) == 3
    save_onnx(alone, tmp_path / "model.onnx")
    ones = np.ones(x, np.float32)
    results = list(Session(tmp_path / "model.onnx", optimize=True).run({"x": ones}).values())
    assert [result.shape for result in results] == [output] * 3
    assert not np.array_equal(results[0], results[1])


def test_a_layer_alone_computes_what_the_layer_does(shapes: dict[str, LayerShape], tmp_path: Path) -> None:
    alone = one_layer(shapes["grouped"], 16, 24, copies=1)
    save_onnx(alone, tmp_path / "model.onnx")
    x = np.random.default_rng(0).normal(size=(1, 16, 6, 6)).astype(np.float32)
    [found] = Session(tmp_path / "model.onnx", optimize=True).run({"x": x}).values()
    weight = alone.graph.initializers["weight0"].const_value
    assert weight is not None
    columns = np.maximum(x[0, :, 0, 0].astype(np.float64), 0).reshape(4, 4)
    rows = weight.numpy().astype(np.float64).reshape(4, 6, 4)
    expected = np.maximum(np.einsum("gc,goc->go", columns, rows), 0).reshape(-1)
    np.testing.assert_allclose(found.reshape(-1), expected, rtol=1e-5, atol=1e-6)


def test_layers_that_differ_in_channels_only_share_their_times() -> None:
    net = Net()
    y = net.conv(net.input("x", ["N", 4, 8, 8]), "a", 4, 8)
    y = net.conv(net.conv(y, "b", 8, 16), "c", 16, 16, group=16)
    y = net.conv(net.conv(y, "d", 16, 8, bias=False), "e", 8, 8, group=8)
    shapes = layer_shapes(inferred(net, y))
    texts = {name: shape.text for name, shape in shapes.items()}
    assert texts["a"] == texts["b"] != texts["d"]
    assert texts["c"] == texts["e"] != texts["a"]
    assert shapes["a"].key(4, 8) == shapes["b"].key(4, 8) != shapes["b"].key(8, 8)
    assert shapes["c"].key(1, 8) == shapes["e"].key(2, 8)
    assert not math.isnan(shapes["c"].macs(16, 16))
