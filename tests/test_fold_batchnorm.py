"""BatchNorm folded into the operator before it: the same numbers, one node less."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from edgekit.graph.annotations import all_values, get_params, set_params
from edgekit.passes.fold_batchnorm import fold_batchnorm
from edgekit.passes.simplify import simplify
from edgekit.quant.affine import fake_quantize, quantize, weight_params
from edgekit.quant.spec import QuantParams, QuantSpec
from graphs import Array, GraphBuilder, initializers, normal, op_types, run
from simulation import insert_qdq

WEIGHT = QuantSpec("int8", symmetric=True, per_channel=True, narrow_range=True)
Build = Callable[[GraphBuilder], str]


def image(b: GraphBuilder, channels: int = 4) -> str:
    return b.input("x", ["N", channels, 9, 9])


def conv(b: GraphBuilder) -> str:
    return b.conv(image(b), "conv", 4, 6)


def conv_without_bias(b: GraphBuilder) -> str:
    return b.conv(image(b), "conv", 4, 6, bias=False)


def grouped(b: GraphBuilder) -> str:
    return b.conv(image(b), "conv", 4, 6, group=2, strides=[2, 2])


def depthwise(b: GraphBuilder) -> str:
    return b.conv(image(b, 6), "conv", 6, 6, group=6)


def transposed(b: GraphBuilder) -> str:
    return str(
        b.op("ConvTranspose", [image(b), b.weight("w", 4, 6, 3, 3), b.weight("bias", 6)], "conv", strides=[2, 2])
    )


def grouped_transposed(b: GraphBuilder) -> str:
    return str(b.op("ConvTranspose", [image(b), b.weight("w", 4, 3, 3, 3)], "conv", group=2))


def gemm(b: GraphBuilder) -> str:
    return str(b.op("Gemm", [b.input("x", ["N", 5]), b.weight("w", 5, 6), b.weight("bias", 1, 6)], "fc"))


def gemm_transposed(b: GraphBuilder) -> str:
    return str(b.op("Gemm", [b.input("x", ["N", 5]), b.weight("w", 6, 5)], "fc", transB=1))


def matmul(b: GraphBuilder) -> str:
    return str(b.op("MatMul", [b.input("x", ["N", 5]), b.weight("w", 5, 6)], "fc"))


FOLDED: list[tuple[Build, list[str]]] = [
    (conv, ["Conv"]),
    (conv_without_bias, ["Conv"]),
    (grouped, ["Conv"]),
    (depthwise, ["Conv"]),
    (transposed, ["ConvTranspose"]),
    (grouped_transposed, ["ConvTranspose"]),
    (gemm, ["Gemm"]),
    (gemm_transposed, ["Gemm"]),
    (matmul, ["MatMul", "Add"]),
]


def feeds_of(model: ir.Model) -> dict[str, Array]:
    shape = model.graph.inputs[0].shape
    assert shape is not None
    return {"x": normal(3, *[int(d) for d in list(shape)[1:] if isinstance(d, int)])}


def assert_same(before: ir.Model, after: ir.Model, feeds: dict[str, Array]) -> None:
    expected, found = run(before, feeds), run(after, feeds)
    assert list(found) == list(expected)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-5 * float(np.abs(array).max()))


@pytest.mark.parametrize(("build", "expected"), FOLDED, ids=lambda v: getattr(v, "__name__", ""))
@pytest.mark.parametrize("epsilon", [1e-5, 0.1])
def test_it_folds_into_every_linear_operator(build: Build, expected: list[str], epsilon: float) -> None:
    b = GraphBuilder()
    y = b.op("Relu", [b.batchnorm(build(b), "bn", 6, epsilon=epsilon)], "relu")
    before = simplify(b.model(y))
    after = fold_batchnorm(before)
    assert op_types(after) == [*expected, "Relu"]
    assert_same(before, after, feeds_of(before))
    used = {value.name for node in after.graph for value in node.inputs if value is not None}
    assert set(after.graph.initializers) <= used, "no old weight is left"
    assert op_types(before)[1] == "BatchNormalization", "the source is not touched"


def test_the_batch_norm_that_is_the_output_leaves_its_name_and_shape() -> None:
    b = GraphBuilder()
    before = simplify(b.model(b.batchnorm(conv(b), "bn", 6)))
    after = fold_batchnorm(before)
    assert op_types(after) == ["Conv"]
    assert [(v.name, str(v.shape)) for v in after.graph.outputs] == [
        (v.name, str(v.shape)) for v in before.graph.outputs
    ]
    assert_same(before, after, feeds_of(before))


def test_one_weight_of_two_convolutions_folds_into_a_copy_for_each() -> None:
    """PyTorch's exporter leaves the BatchNorms of a convolution that is called twice."""
    b = GraphBuilder()
    x = image(b)
    weight, bias = b.weight("w", 4, 4, 3, 3), b.weight("bias", 4)
    for name in ("first", "second"):
        x = b.batchnorm(b.op("Conv", [x, weight, bias], name, pads=[1] * 4), f"{name}.bn", 4)
    before = simplify(b.model(x))
    after = fold_batchnorm(before)
    assert op_types(after) == ["Conv", "Conv"]
    first, second = list(after.graph)
    assert first.inputs[1] is not second.inputs[1] and first.inputs[2] is not second.inputs[2]
    assert_same(before, after, feeds_of(before))


def test_one_batch_norm_shared_by_two_convolutions_folds_into_both() -> None:
    b = GraphBuilder()
    x = b.batchnorm(b.conv(image(b), "a", 4, 4), "bn", 4)
    y = b.conv(x, "b", 4, 4)
    y = b.op("BatchNormalization", [y, "bn.gamma", "bn.beta", "bn.mean", "bn.var"], "again")
    before = simplify(b.model(y))
    after = fold_batchnorm(before)
    assert op_types(after) == ["Conv", "Conv"]
    assert_same(before, after, feeds_of(before))


def test_a_gamma_that_serves_as_variance_too_is_removed_once() -> None:
    b = GraphBuilder()
    b.constant("ones", np.ones(6, np.float32))
    b.constant("zeros", np.zeros(6, np.float32))
    before = simplify(b.model(b.op("BatchNormalization", [conv(b), "ones", "zeros", "zeros", "ones"], "bn")))
    after = fold_batchnorm(before)
    assert op_types(after) == ["Conv"]
    assert len(after.graph.initializers) == 2
    assert_same(before, after, feeds_of(before))


def read_twice(b: GraphBuilder) -> list[str]:
    y = conv(b)
    return [b.batchnorm(y, "bn", 6), b.op("Relu", [y], "relu")]


def convolution_is_an_output(b: GraphBuilder) -> list[str]:
    y = conv(b)
    return [b.batchnorm(y, "bn", 6), y]


def computed_parameter(b: GraphBuilder) -> list[str]:
    y = b.batchnorm(conv(b), "bn", 6)
    b.nodes[-1].input[1] = b.input("gamma", [6])
    return [y]


def computed_bias(b: GraphBuilder) -> list[str]:
    y = b.op("Conv", [image(b), b.weight("w", 6, 4, 3, 3), b.input("bias", [6])], "conv")
    return [b.batchnorm(y, "bn", 6)]


def training(b: GraphBuilder) -> list[str]:
    y = b.batchnorm(conv(b), "bn", 6, training_mode=1)
    b.nodes[-1].output.extend(["running_mean", "running_var"])
    return [y]


def sequence_of_vectors(b: GraphBuilder) -> list[str]:
    y = b.op("MatMul", [b.input("x", ["N", 6, 5]), b.weight("w", 5, 7)], "fc")
    return [b.batchnorm(y, "bn", 6)]  # the channels are the sequence, not the columns


def behind_relu(b: GraphBuilder) -> list[str]:
    return [b.batchnorm(b.op("Relu", [conv(b)]), "bn", 6)]


STAYS = [
    read_twice, convolution_is_an_output, computed_parameter, computed_bias, training, sequence_of_vectors, behind_relu,
]  # fmt: skip


@pytest.mark.parametrize("build", STAYS, ids=lambda build: build.__name__)
def test_where_it_would_change_another_number_it_stays(build: Callable[[GraphBuilder], list[str]]) -> None:
    b = GraphBuilder()
    before = b.model(*build(b))
    after = fold_batchnorm(before)
    assert op_types(after) == op_types(before)
    assert initializers(after) == initializers(before)


def with_params(model: ir.Model, **params: QuantParams) -> ir.Model:
    named = {value.name: value for value in all_values(model.graph)}
    for name, grid in params.items():
        set_params(named[name.replace("__", ".")], grid)
    return model


@pytest.mark.parametrize("per_channel", [True, False])
def test_a_trained_weight_grid_keeps_its_codes(per_channel: bool) -> None:
    b = GraphBuilder()
    model = b.model(b.batchnorm(conv(b), "bn", 6))
    gamma = model.graph.initializers["bn.gamma"]
    assert gamma.const_value is not None
    signs = np.float32([1, -1, 1, 0, -1, 1])
    gamma.const_value = ir.tensor(gamma.const_value.numpy() * signs, name="bn.gamma")
    weight = model.graph.initializers["conv.weight"]
    assert weight.const_value is not None
    spec = QuantSpec("int8", True, per_channel, True)
    params = weight_params(weight.const_value.numpy(), spec, axis=0)
    with_params(model, conv__weight=params)
    before_codes = quantize(weight.const_value.numpy(), params).astype(np.int64)
    after = fold_batchnorm(model)
    folded = next(iter(after.graph)).inputs[1]
    grid = get_params(folded)
    assert folded is not None and folded.const_value is not None and grid is not None and grid.axis == 0
    codes = quantize(folded.const_value.numpy(), grid)
    np.testing.assert_array_equal(codes, before_codes * signs.reshape(-1, 1, 1, 1))
    np.testing.assert_allclose(
        fake_quantize(folded.const_value.numpy(), grid)[3], 0.0, rtol=0, atol=0
    )  # the channel that gamma clears
    assert_same(insert_qdq(model), insert_qdq(after), feeds_of(model))


def test_a_grid_between_the_two_keeps_them_apart_and_one_behind_stays() -> None:
    grid = QuantParams("uint8", np.array(0.05, np.float32), np.array(128))
    b = GraphBuilder()
    between = with_params(b.model(b.batchnorm(conv(b), "bn", 6)), conv_y=grid)
    assert op_types(fold_batchnorm(between)) == ["Conv", "BatchNormalization"]
    b = GraphBuilder()
    behind = with_params(b.model(b.batchnorm(conv(b), "bn", 6)), bn_y=grid)
    after = fold_batchnorm(behind)
    assert get_params(after.graph.outputs[0]) == grid


def test_an_affine_weight_grid_cannot_be_scaled_and_stays() -> None:
    grid = QuantParams("uint8", np.array(0.01, np.float32), np.array(128))
    b = GraphBuilder()
    model = with_params(b.model(b.batchnorm(conv(b), "bn", 6)), conv__weight=grid)
    assert op_types(fold_batchnorm(model)) == ["Conv", "BatchNormalization"]
