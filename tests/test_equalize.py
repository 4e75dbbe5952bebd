"""Cross-layer equalization: the same function from layers whose channels are as large on both sides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.graph.annotations import all_values, set_params
from edgekit.graph.equal import prove_equal, random_feeds
from edgekit.passes.equalize import equalize
from edgekit.passes.simplify import simplify
from edgekit.quant.affine import fake_quantize, weight_params
from edgekit.quant.spec import QuantParams, QuantSpec
from graphs import Array, GraphBuilder, initializers, op_types

Between = Callable[[GraphBuilder, str], str]
PER_TENSOR = QuantSpec("int8", symmetric=True, per_channel=False, narrow_range=True)


class Uneven(GraphBuilder):
    """Weights whose channels differ by up to a thousand times."""

    def weight(self, name: str, *shape: int) -> str:
        spread = 10 ** self.rng.uniform(-1.5, 1.5, (shape[0], *[1] * (len(shape) - 1)))
        return self.constant(name, (self.rng.normal(0, 0.3, shape) * spread).astype(np.float32))


def prove(before: ir.Model, after: ir.Model) -> None:
    assert op_types(after) == op_types(before)
    assert [node.name for node in after.graph] == [node.name for node in before.graph]
    assert set(after.graph.initializers) == set(before.graph.initializers)
    for batch in (1, 3):
        prove_equal(before, after, random_feeds(list(before.graph.inputs), batch))


def array(model: ir.Model, name: str) -> Array:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def made(weight: Array) -> Array:
    return np.asarray(np.abs(weight).reshape(weight.shape[0], -1).max(1))


def read(weight: Array) -> Array:
    return made(weight.swapaxes(0, 1))


def same(left: Array, right: Array) -> None:
    np.testing.assert_allclose(left, right, rtol=5e-3)


def image(b: GraphBuilder) -> str:
    return b.input("x", ["N", 3, 8, 8])


def nothing(b: GraphBuilder, x: str) -> str:
    return x


def relu(b: GraphBuilder, x: str) -> str:
    return str(b.op("Relu", [x]))


def leaky(b: GraphBuilder, x: str) -> str:
    return str(b.op("LeakyRelu", [x], alpha=0.1))


def prelu(b: GraphBuilder, x: str) -> str:
    return str(b.op("PRelu", [x, b.constant("slope", b.rng.uniform(-1, 1, (6, 1, 1)).astype(np.float32))]))


def pooled(b: GraphBuilder, x: str) -> str:
    x = b.op("MaxPool", [relu(b, x)], kernel_shape=[2, 2], strides=[2, 2], pads=[1, 1, 1, 1])
    return str(b.op("AveragePool", [x], kernel_shape=[2, 2], pads=[1, 1, 1, 1]))


def mean(b: GraphBuilder, x: str) -> str:
    return str(b.op("GlobalAveragePool", [x]))


@pytest.mark.parametrize("between", [nothing, relu, leaky, prelu, pooled, mean])
@pytest.mark.parametrize("bias", [True, False])
def test_two_convolutions_meet_in_the_middle(between: Between, bias: bool) -> None:
    b = Uneven()
    x = between(b, b.conv(image(b), "first", 3, 6, bias=bias))
    before = simplify(b.model(b.conv(x, "second", 6, 4, bias=bias)))
    after = equalize(before)
    prove(before, after)
    old = made(array(before, "first.weight")) / read(array(before, "second.weight"))
    assert old.max() / old.min() > 10, "there is something to equalize"
    same(made(array(after, "first.weight")), read(array(after, "second.weight")))
    products = made(array(before, "first.weight")) * read(array(before, "second.weight"))
    same(made(array(after, "first.weight")), np.sqrt(products))


def test_a_depthwise_convolution_between_two_is_equalized_with_both() -> None:
    b = Uneven()
    x = relu(b, b.conv(image(b), "expand", 3, 6, 1))
    x = relu(b, b.conv(x, "depthwise", 6, 6, group=6))
    before = simplify(b.model(b.conv(x, "project", 6, 4, 1)))
    after = equalize(before)
    prove(before, after)
    sizes = [
        made(array(after, "expand.weight")),
        made(array(after, "depthwise.weight")),
        read(array(after, "project.weight")),
    ]
    same(sizes[0], sizes[1])
    same(sizes[1], sizes[2])
    cube = (
        made(array(before, "expand.weight"))
        * made(array(before, "depthwise.weight"))
        * read(array(before, "project.weight"))
    )
    same(sizes[0], np.cbrt(cube))


def test_per_tensor_weights_lose_less() -> None:
    b = Uneven()
    before = simplify(b.model(b.conv(relu(b, b.conv(image(b), "first", 3, 6)), "second", 6, 4)))
    after = equalize(before)

    def worst(model: ir.Model) -> float:
        weight = array(model, "first.weight")
        error = weight - fake_quantize(weight, weight_params(weight, PER_TENSOR, axis=None))
        return float((np.abs(error).reshape(6, -1).max(1) / made(weight)).max())

    assert worst(after) < worst(before) / 3


@settings(max_examples=30, deadline=None)
@given(
    group=st.sampled_from([1, 2, 3]), multiplier=st.integers(1, 2), width=st.integers(1, 4), seed=st.integers(0, 9),
    flat=st.sampled_from(["Flatten", "Reshape", "mean"]), kind=st.sampled_from(["Gemm", "Gemm^T", "MatMul"]),
)  # fmt: skip
def test_any_chain_of_layers_keeps_the_numbers(
    group: int, multiplier: int, width: int, seed: int, flat: str, kind: str
) -> None:
    b = Uneven(seed=seed)
    x = relu(b, b.conv(image(b), "a", 3, 6))
    x = leaky(b, b.conv(x, "b", 6, 6 * multiplier, group=group))
    channels, side = 6 * multiplier, 1 if flat == "mean" else 2
    x = mean(b, x) if flat == "mean" else b.op("MaxPool", [x], kernel_shape=[4, 4], strides=[4, 4])
    x = (
        b.op("Flatten", [x])
        if flat != "Reshape"
        else b.op("Reshape", [x, b.constant("s", np.array([-1, channels * 4]))])
    )
    for i, (c_in, c_out) in enumerate([(channels * side * side, width), (width, 3)]):
        w = b.weight(f"w{i}", *((c_out, c_in) if kind == "Gemm^T" else (c_in, c_out)))
        if kind == "MatMul":
            x = b.op("Add", [b.op("MatMul", [x, w], f"fc{i}"), b.weight(f"bias{i}", 1, c_out)])
        else:
            x = b.op("Gemm", [x, w, b.weight(f"bias{i}", c_out)], f"fc{i}", transB=int(kind == "Gemm^T"), alpha=0.5)
        x = relu(b, x) if i == 0 else x
    before = simplify(b.model(x))
    after = equalize(before)
    for name in ("a.weight", "b.weight", "w0", "w1"):
        assert initializers(after)[name] != initializers(before)[name], f"{name} was equalized"
    rows = array(after, "w0") if kind == "Gemm^T" else array(after, "w0").T
    grouped = np.abs(rows.reshape(width, channels, side * side)).max((0, 2))
    np.testing.assert_allclose(grouped, made(array(after, "b.weight")), rtol=0.05)
    prove_equal(before, after, random_feeds(list(before.graph.inputs), 2))


def test_sequences_are_equalized_along_their_last_axis() -> None:
    b = Uneven()
    x = b.input("x", ["N", 5, 4])
    x = relu(b, b.op("Add", [b.weight("b1", 6), b.op("MatMul", [x, b.weight("w1", 4, 6)], "up")]))
    before = simplify(b.model(b.op("MatMul", [x, b.weight("w2", 6, 4)], "down")))
    after = equalize(before)
    prove(before, after)
    same(read(array(after, "w1")), made(array(after, "w2")))


def test_a_second_time_changes_nothing_and_few_sweeps_change_less() -> None:
    b = Uneven()
    x = image(b)
    for i, channels in enumerate([3, 6, 6, 6]):
        x = relu(b, b.conv(x, f"conv{i}", channels, 6))
    before = simplify(b.model(x))
    after = equalize(before, sweeps=100, tolerance=1e-6)
    again = equalize(after, sweeps=100, tolerance=1e-4)
    for name in initializers(after):
        np.testing.assert_allclose(array(again, name), array(after, name), rtol=1e-3, atol=0)
    assert initializers(equalize(before, sweeps=0)) == initializers(before)
    once = array(equalize(before, sweeps=1), "conv1.weight")
    assert np.abs(once - array(after, "conv1.weight")).max() > 1e-3


def test_channels_of_zeros_are_left_alone() -> None:
    b = GraphBuilder()
    first, second = (b.rng.normal(size=(6, c, 3, 3)).astype(np.float32) for c in (3, 6))
    first[1], first[2], second[:, 3] = 0, 1e-30, 0
    x = b.op("Conv", [image(b), b.constant("w1", first), b.weight("b1", 6)], "first", pads=[1] * 4)
    before = simplify(b.model(b.op("Conv", [relu(b, x), b.constant("w2", second)], "second")))
    after = equalize(before)
    prove(before, after)
    np.testing.assert_array_equal(array(after, "w1")[1:4], first[1:4])
    np.testing.assert_array_equal(array(after, "b1")[1:4], array(before, "b1")[1:4])
    np.testing.assert_array_equal(array(after, "w2")[:, 1:4], second[:, 1:4])
    assert (made(array(after, "w1"))[[0, 4, 5]] != made(first)[[0, 4, 5]]).all()


def test_a_layer_of_zeros_and_one_of_infinities_are_left_alone() -> None:
    for number in (0, np.inf):
        b = GraphBuilder()
        x = b.op("Conv", [image(b), b.constant("w1", np.full((6, 3, 1, 1), number, np.float32))], "first")
        before = simplify(b.model(b.conv(relu(b, x), "second", 6, 4)))
        assert initializers(equalize(before)) == initializers(before)


def test_a_shared_bias_is_scaled_in_a_copy() -> None:
    b = Uneven()
    bias = b.weight("bias", 6)
    x = b.op("Conv", [image(b), b.weight("w1", 6, 3, 1, 1), bias], "first")
    before = simplify(b.model(b.op("Conv", [relu(b, x), b.weight("w2", 6, 6, 1, 1), bias], "second")))
    after = equalize(before)
    assert len(after.graph.initializers) == 4
    prove_equal(before, after, random_feeds(list(before.graph.inputs), 3))
    same(made(array(after, "w1")), read(array(after, "w2")))


def pair(between: Callable[[GraphBuilder, str], Any]) -> Callable[[GraphBuilder], list[str]]:
    """Two convolutions with something between them, which may give other outputs as well."""

    def build(b: GraphBuilder) -> list[str]:
        found = between(b, b.conv(image(b), "first", 3, 6))
        x, *others = found if isinstance(found, list) else [found]
        return [b.conv(x, "second", 6, 6), *others]

    build.__name__ = between.__name__
    return build


def relu6(b: GraphBuilder, x: str) -> str:
    return str(b.op("Clip", [x, b.constant("low", np.float32(0)), b.constant("high", np.float32(6))]))


def sigmoid(b: GraphBuilder, x: str) -> str:
    return str(b.op("Sigmoid", [x]))


def residual(b: GraphBuilder, x: str) -> str:
    return str(b.op("Add", [x, relu(b, x)]))


def another_reader(b: GraphBuilder, x: str) -> list[str]:
    return [x, b.op("Tanh", [x])]


def an_output(b: GraphBuilder, x: str) -> list[str]:
    return [relu(b, x), x]


def softmax(b: GraphBuilder, x: str) -> str:
    return str(b.op("Softmax", [x], axis=1))


def shared_weight(b: GraphBuilder) -> list[str]:
    w = b.weight("w", 3, 3, 1, 1)
    return [b.op("Conv", [relu(b, b.op("Conv", [image(b), w], "first")), w], "second")]


def computed_bias(b: GraphBuilder) -> list[str]:
    x = b.op("Conv", [image(b), b.weight("w", 6, 3, 1, 1), b.input("bias", [6])], "first")
    return [b.conv(x, "second", 6, 4)]


def position_code(b: GraphBuilder) -> list[str]:
    x = b.op("MatMul", [b.input("x", ["N", 5, 4]), b.weight("w1", 4, 6)])
    return [b.op("MatMul", [b.op("Add", [x, b.weight("code", 5, 6)]), b.weight("w2", 6, 4)])]


def pooled_along_the_columns(b: GraphBuilder) -> list[str]:
    x = b.op("MatMul", [b.input("x", ["N", 4, 4, 8]), b.weight("w1", 8, 6)])
    x = b.op("MaxPool", [x], kernel_shape=[1, 2], pads=[0, 0, 0, 1])
    return [b.op("MatMul", [x, b.weight("w2", 6, 4)])]


def channels_are_not_columns(b: GraphBuilder) -> list[str]:
    return [b.op("MatMul", [b.conv(image(b), "first", 3, 8), b.weight("w2", 8, 4)])]


def flat_from_another_axis(b: GraphBuilder) -> list[str]:
    x = b.op("Reshape", [b.conv(image(b), "first", 3, 6), b.constant("s", np.array([-1, 64]))])
    return [b.op("Gemm", [x, b.weight("w2", 64, 4)])]


STAYS = [
    *map(pair, [relu6, sigmoid, residual, another_reader, an_output, softmax]), shared_weight, computed_bias, position_code,
    pooled_along_the_columns, channels_are_not_columns, flat_from_another_axis,
]  # fmt: skip


@pytest.mark.parametrize("build", STAYS, ids=lambda build: build.__name__)
def test_where_a_factor_does_not_pass_nothing_is_scaled(build: Callable[[GraphBuilder], list[str]]) -> None:
    b = Uneven()
    before = simplify(b.model(*build(b)))
    assert initializers(equalize(before)) == initializers(before)


@pytest.mark.parametrize("tensor", ["w1", "b1", "w2", "up_y"])
def test_a_grid_of_a_matmul_or_its_bias_blocks_it(tensor: str) -> None:
    b = Uneven()
    x = b.op("MatMul", [b.input("x", ["N", 5, 4]), b.weight("w1", 4, 6)], "up")
    x = relu(b, b.op("Add", [x, b.weight("b1", 6)]))
    before = simplify(b.model(b.op("MatMul", [x, b.weight("w2", 6, 4)], "down")))
    set_params(
        {value.name: value for value in all_values(before.graph)}[tensor],
        QuantParams("uint8", np.array(0.05, np.float32), np.array(128)),
    )
    assert initializers(equalize(before)) == initializers(before)


@pytest.mark.parametrize("tensor", ["first.weight", "first.bias", "second.weight", "first_y"])
def test_a_grid_blocks_it(tensor: str) -> None:
    b = Uneven()
    before = simplify(b.model(b.conv(relu(b, b.conv(image(b), "first", 3, 6)), "second", 6, 4)))
    values = {value.name: value for value in all_values(before.graph)}
    set_params(values[tensor], QuantParams("uint8", np.array(0.05, np.float32), np.array(128)))
    assert initializers(equalize(before)) == initializers(before)
