"""Constant factors and offsets folded into linear operators: the same numbers, fewer nodes, and nothing where it is not exact."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from edgekit.graph.annotations import all_values, get_params, set_params
from edgekit.graph.equal import prove_equal, random_feeds
from edgekit.passes.fold_affine import fold_affine
from edgekit.passes.simplify import simplify
from edgekit.quant.spec import QuantParams
from graphs import GraphBuilder, initializers, op_types

Build = Callable[[GraphBuilder], str]
GRID = QuantParams("uint8", np.array(0.05, np.float32), np.array(128))


def prove(before: ir.Model, after: ir.Model) -> None:
    for batch in (1, 3):
        prove_equal(before, after, random_feeds(list(before.graph.inputs), batch))


def image(b: GraphBuilder, channels: int = 4) -> str:
    return b.input("x", ["N", channels, 9, 9])


def sequence(b: GraphBuilder, width: int = 4) -> str:
    return b.input("x", ["N", 5, width])


def channels(b: GraphBuilder, name: str, *shape: int) -> str:
    """Constants away from zero, of both signs."""
    array = b.rng.uniform(0.5, 2, shape) * b.rng.choice([-1, 1], shape)
    return b.constant(name, array.astype(np.float32))


def conv(b: GraphBuilder) -> tuple[str, tuple[int, ...]]:
    return b.conv(image(b), "fc", 4, 6, pads=[1, 1, 1, 1]), (6, 1, 1)


def conv_without_bias(b: GraphBuilder) -> tuple[str, tuple[int, ...]]:
    return b.conv(image(b), "fc", 4, 6, bias=False, group=2), (1, 6, 1, 1)


def transposed(b: GraphBuilder) -> tuple[str, tuple[int, ...]]:
    return b.op("ConvTranspose", [image(b), b.weight("w", 4, 6, 3, 3)], "fc", strides=[2, 2]), (6, 1, 1)


def gemm(b: GraphBuilder) -> tuple[str, tuple[int, ...]]:
    return b.op("Gemm", [b.input("x", ["N", 4]), b.weight("w", 4, 6), b.weight("bias", 1, 6)], "fc"), (6,)


def gemm_transposed(b: GraphBuilder) -> tuple[str, tuple[int, ...]]:
    return b.op("Gemm", [b.input("x", ["N", 4]), b.weight("w", 6, 4)], "fc", transB=1), (1, 6)


def matmul(b: GraphBuilder) -> tuple[str, tuple[int, ...]]:
    y = b.op("MatMul", [sequence(b), b.weight("w", 4, 6)], "fc")
    return b.op("Add", [b.weight("bias", 6), y], "fc.add"), (6,)


@pytest.mark.parametrize("linear", [conv, conv_without_bias, transposed, gemm, gemm_transposed, matmul])
@pytest.mark.parametrize("scalar", [False, True])
def test_what_follows_a_linear_operator_folds_into_it(
    linear: Callable[[GraphBuilder], tuple[str, tuple[int, ...]]], scalar: bool
) -> None:
    b = GraphBuilder()
    y, shape = linear(b)
    layer = op_types(b.model(y))
    shape = () if scalar else shape
    y = b.op("Mul", [y, channels(b, "m", *shape)])
    y = b.op("Add", [channels(b, "a", *shape), y])
    y = b.op("Div", [y, channels(b, "d", *shape)])
    y = b.op("Sub", [y, channels(b, "s", *shape)])
    y = b.op("Sub", [channels(b, "t", *shape), y])
    before = simplify(b.model(b.op("Relu", [y])))
    after = fold_affine(before)
    assert op_types(after) == [*layer, "Relu"]
    assert next(node.name for node in after.graph) == "fc"
    used = {value.name for node in after.graph for value in node.inputs if value is not None}
    assert set(after.graph.initializers) <= used, "no constant is left over"
    assert len(before.graph) == len(layer) + 6, "the source is not touched"
    prove(before, after)


@settings(max_examples=25, deadline=None)
@given(
    group=st.integers(1, 3), inputs=st.integers(1, 3), outputs=st.integers(1, 3), kernel=st.integers(1, 3),
    pad=st.booleans(), ops=st.lists(st.sampled_from(["Mul", "Div", "Add", "Sub", "from"]), min_size=1, max_size=4),
    scalar=st.booleans(), behind=st.booleans(),
)  # fmt: skip
def test_any_chain_around_any_convolution_keeps_the_numbers(
    group: int, inputs: int, outputs: int, kernel: int, pad: bool, ops: list[str], scalar: bool, behind: bool
) -> None:
    b = GraphBuilder()
    c_in, c_out = group * inputs, group * outputs
    x = image(b, c_in)
    x = b.conv(x, "fc", c_in, c_out, kernel, group=group, pads=[int(pad)] * 4) if behind else x
    for i, op in enumerate(ops):
        c = channels(b, f"c{i}", *(() if scalar else (c_out if behind else c_in, 1, 1)))
        x = b.op("Sub", [c, x]) if op == "from" else b.op(op, [x, c])
    x = x if behind else b.conv(x, "fc", c_in, c_out, kernel, group=group, pads=[int(pad)] * 4)
    before = simplify(b.model(x))
    after = fold_affine(before)
    offsets = [i for i, op in enumerate(ops) if op in ("Add", "Sub", "from")]
    left = offsets[-1] + 1 if offsets and pad and not behind else 0
    assert len(after.graph) == 1 + left
    prove(before, after)


def test_input_normalization_folds_into_a_convolution_without_padding() -> None:
    b = GraphBuilder()
    x = b.op("Div", [b.op("Sub", [image(b, 3), channels(b, "mean", 1, 3, 1, 1)]), channels(b, "std", 1, 3, 1, 1)])
    before = simplify(b.model(b.conv(x, "stem", 3, 8, bias=False, pads=[0] * 4)))
    after = fold_affine(before)
    assert op_types(after) == ["Conv"] and len(next(iter(after.graph)).inputs) == 3
    prove(before, after)


def test_with_padding_only_the_scale_folds() -> None:
    b = GraphBuilder()
    x = b.op("Div", [b.op("Sub", [image(b, 3), channels(b, "mean", 3, 1, 1)]), channels(b, "std", 3, 1, 1)])
    before = simplify(b.model(b.conv(x, "stem", 3, 8)))
    after = fold_affine(before)
    assert op_types(after) == ["Sub", "Conv"]
    prove(before, after)


@pytest.mark.parametrize("mode", ["VALID", "SAME_UPPER"])
def test_automatic_padding_counts(mode: str) -> None:
    b = GraphBuilder()
    x = b.op("Sub", [image(b, 3), channels(b, "mean", 3, 1, 1)])
    before = simplify(b.model(b.op("Conv", [x, b.weight("w", 8, 3, 3, 3)], auto_pad=mode)))
    after = fold_affine(before)
    assert op_types(after) == (["Conv"] if mode == "VALID" else ["Sub", "Conv"])
    prove(before, after)


@pytest.mark.parametrize("biased", [True, False])
def test_scale_and_shift_before_several_matmuls_fold_into_all(biased: bool) -> None:
    b = GraphBuilder()
    x = b.op("Mul", [sequence(b), channels(b, "gamma", 4)])
    x = b.op("Add", [x, channels(b, "beta", 4)])
    outs = []
    for name in ("query", "key"):
        y = b.op("MatMul", [x, b.weight(f"{name}.w", 4, 6)], name)
        outs.append(b.op("Add", [y, b.weight(f"{name}.b", 6)]) if biased else y)
    before = simplify(b.model(*outs))
    after = fold_affine(before)
    assert op_types(after) == (["MatMul", "Add"] * 2 if biased else op_types(before))
    prove(before, after)


def test_it_folds_into_gemms_of_both_layouts() -> None:
    b = GraphBuilder()
    x = b.op("Sub", [channels(b, "c", 4), b.input("x", ["N", 4])])
    y = b.op("Gemm", [x, b.weight("w", 4, 6)], "fc")
    z = b.op("Gemm", [x, b.weight("v", 5, 4), b.weight("bias", 5)], "fc2", transB=1)
    before = simplify(b.model(y, z))
    after = fold_affine(before)
    assert op_types(after) == ["Gemm", "Gemm"]
    prove(before, after)


def attention(b: GraphBuilder, where: str) -> str:
    x, heads = sequence(b, 8), {}
    for name, perm in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1])):
        y = b.op("Add", [b.op("MatMul", [x, b.weight(f"{name}.w", 8, 8)], name), b.weight(f"{name}.b", 8)])
        y = b.op("Reshape", [y, b.constant(f"{name}.shape", np.array([0, -1, 2, 4]))])
        heads[name] = b.op("Transpose", [y], f"{name}.heads", perm=perm)
    scale = b.constant("scale", np.float32(2))
    if where == "query":
        heads["q"] = b.op("Div", [heads["q"], scale])
    scores = b.op("MatMul", [heads["q"], heads["k"]], "scores")
    scores = b.op("Div", [scores, scale]) if where == "scores" else scores
    return str(b.op("Softmax", [scores], axis=-1))


@pytest.mark.parametrize("where", ["query", "scores"])
def test_the_scale_of_attention_goes_into_the_query(where: str) -> None:
    b = GraphBuilder()
    before = simplify(b.model(attention(b, where)))
    after = fold_affine(before)
    assert "Div" not in op_types(after) and len(after.graph) == len(before.graph) - 1
    weights, old = initializers(after), initializers(before)
    assert weights["k.w"] == old["k.w"]
    np.testing.assert_array_equal(np.frombuffer(weights["q.w"], "f4") * 2, np.frombuffer(old["q.w"], "f4"))
    prove(before, after)


def test_a_shared_weight_folds_into_a_copy() -> None:
    b = GraphBuilder()
    x, w = image(b), b.weight("w", 4, 4, 3, 3)
    y = b.op("Mul", [b.op("Conv", [x, w], "a"), channels(b, "c", 4, 1, 1)])
    before = simplify(b.model(b.op("Conv", [y, w], "b")))
    after = fold_affine(before)
    assert op_types(after) == ["Conv", "Conv"]
    first, second = list(after.graph)
    assert first.inputs[1] is not second.inputs[1]
    assert initializers(before)["w"] in initializers(after).values()
    prove(before, after)


def test_an_output_keeps_its_name_shape_and_grid() -> None:
    b = GraphBuilder()
    before = simplify(b.model(b.op("Mul", [b.conv(image(b), "conv", 4, 6), channels(b, "c", 6, 1, 1)], "scaled")))
    set_params(before.graph.outputs[0], GRID)
    after = fold_affine(before)
    output = after.graph.outputs[0]
    assert (output.name, str(output.shape)) == ("scaled_y", str(before.graph.outputs[0].shape))
    assert get_params(output) == GRID and op_types(after) == ["Conv"]


def residual(b: GraphBuilder) -> list[str]:
    x = image(b)
    return [b.op("Add", [b.conv(x, "conv", 4, 4), x])]


def read_twice(b: GraphBuilder) -> list[str]:
    y = b.conv(image(b), "conv", 4, 6)
    return [b.op("Mul", [y, channels(b, "c", 6, 1, 1)]), b.op("Relu", [y])]


def between_is_output(b: GraphBuilder) -> list[str]:
    y = b.conv(image(b), "conv", 4, 6)
    return [b.op("Mul", [y, channels(b, "c", 6, 1, 1)]), y]


def along_another_axis(b: GraphBuilder) -> list[str]:
    return [b.op("Mul", [b.conv(image(b), "conv", 4, 9), channels(b, "c", 9)])]


def grows(b: GraphBuilder) -> list[str]:
    return [b.op("Mul", [b.conv(image(b), "conv", 4, 1), channels(b, "c", 3, 1, 1)])]


def grows_before(b: GraphBuilder) -> list[str]:
    return [b.conv(b.op("Mul", [image(b, 1), channels(b, "c", 3, 1, 1)]), "conv", 3, 4, pads=[0] * 4)]


def divides_by_zero(b: GraphBuilder) -> list[str]:
    return [b.op("Div", [b.conv(image(b), "conv", 4, 6), b.constant("c", np.float32(0))])]


def divided(b: GraphBuilder) -> list[str]:
    return [b.op("Div", [b.constant("c", np.float32(2)), b.conv(image(b), "conv", 4, 6)])]


def minus_infinity(b: GraphBuilder) -> list[str]:
    return [b.op("Add", [b.conv(image(b), "conv", 4, 6), b.constant("c", np.float32(-np.inf))])]


def overflows(b: GraphBuilder) -> list[str]:
    y = b.op("Mul", [b.conv(image(b), "conv", 4, 6), b.constant("c", np.float32(1e30))])
    return [b.op("Mul", [y, b.constant("d", np.float32(1e30))])]


def sum_has_another_reader(b: GraphBuilder) -> list[str]:
    x = b.op("Add", [image(b), channels(b, "c", 4, 1, 1)])
    return [b.conv(x, "conv", 4, 6, pads=[0] * 4), b.op("Relu", [x])]


def bias_alone(b: GraphBuilder) -> list[str]:
    return [b.op("Add", [b.op("MatMul", [sequence(b), b.weight("w", 4, 6)]), b.weight("bias", 6)])]


def position_code(b: GraphBuilder) -> list[str]:
    return [b.op("Add", [b.op("MatMul", [sequence(b), b.weight("w", 4, 6)]), b.weight("code", 5, 6)])]


def scaled_gemm(b: GraphBuilder) -> list[str]:
    y = b.op("Gemm", [b.input("x", ["N", 4]), b.weight("w", 4, 6), b.weight("bias", 6)], alpha=0.5)
    return [b.op("Mul", [y, channels(b, "c", 6)])]


def before_transposed(b: GraphBuilder) -> list[str]:
    x = b.op("Add", [image(b), channels(b, "c", 4, 1, 1)])
    return [b.op("ConvTranspose", [x, b.weight("w", 4, 6, 3, 3), b.weight("bias", 6)], strides=[2, 2])]


def scaled_is_an_output(b: GraphBuilder) -> list[str]:
    x = b.op("Mul", [image(b), channels(b, "c", 4, 1, 1)])
    return [b.conv(x, "conv", 4, 6), x]


def gains_a_dimension(b: GraphBuilder) -> list[str]:
    y = b.op("MatMul", [sequence(b), b.weight("w", 4, 6)])
    return [b.op("Mul", [y, channels(b, "c", 1, 1, 1, 1)])]


def gelu(b: GraphBuilder) -> list[str]:
    x = b.op("Relu", [sequence(b)])
    y = b.op(
        "Mul",
        [
            x,
            b.op(
                "Add",
                [b.op("Erf", [b.op("Div", [x, b.constant("r", np.float32(1.4))])]), b.constant("one", np.float32(1))],
            ),
        ],
    )
    y = b.op("Mul", [y, b.constant("half", np.float32(0.5))])
    return [b.op("MatMul", [y, b.weight("w", 4, 6)])]


def normalized(b: GraphBuilder) -> list[str]:
    x = sequence(b)
    y = b.op("Mul", [b.op("Mul", [x, b.op("Sigmoid", [x])]), channels(b, "gamma", 4)])
    y = b.op("MatMul", [b.op("Add", [y, channels(b, "beta", 4)]), b.weight("w", 4, 6)])
    return [b.op("Add", [y, b.weight("bias", 6)])]


def two_readers_of_the_query(b: GraphBuilder) -> list[str]:
    q = b.op("Transpose", [b.op("MatMul", [sequence(b), b.weight("w", 4, 5)])], perm=[0, 2, 1])
    return [b.op("Mul", [q, b.constant("c", np.float32(2))]), b.op("Relu", [q])]


def integers(b: GraphBuilder) -> list[str]:
    y = b.op("MatMul", [b.input("x", ["N", 4], TensorProto.INT32), b.constant("w", np.ones((4, 6), np.int32))])
    return [b.op("Cast", [b.op("Mul", [y, b.constant("c", np.int32(2))])], to=1)]


STAYS = [
    residual, read_twice, between_is_output, along_another_axis, grows, grows_before, divides_by_zero, divided,
    minus_infinity, sum_has_another_reader, bias_alone, position_code, scaled_gemm, gelu, normalized,
    two_readers_of_the_query, before_transposed, scaled_is_an_output, gains_a_dimension, integers,
]  # fmt: skip


@pytest.mark.parametrize("build", STAYS, ids=lambda build: build.__name__)
def test_where_it_would_not_be_the_same_it_stays(build: Callable[[GraphBuilder], list[str]]) -> None:
    b = GraphBuilder()
    before = simplify(b.model(*build(b)))
    after = fold_affine(before)
    assert op_types(after) == op_types(before)
    assert initializers(after) == initializers(before)


def test_a_factor_that_the_weight_has_no_room_for_stays() -> None:
    b = GraphBuilder()
    before = simplify(b.model(*overflows(b)))
    after = fold_affine(before)
    assert op_types(after) == ["Conv", "Mul"]
    for array in initializers(after).values():
        assert np.isfinite(np.frombuffer(array, "f4")).all()


@pytest.mark.parametrize("tensor", ["fc.w", "bias", "c", "fc_y", "fc.add_y"])
def test_a_grid_of_a_matmul_its_bias_or_the_factor_keeps_it(tensor: str) -> None:
    b = GraphBuilder()
    y = b.op("MatMul", [sequence(b), b.weight("fc.w", 4, 6)], "fc")
    y = b.op("Add", [y, b.weight("bias", 6)], "fc.add")
    before = simplify(b.model(b.op("Mul", [y, channels(b, "c", 6)])))
    set_params({value.name: value for value in all_values(before.graph)}[tensor], GRID)
    assert op_types(fold_affine(before)) == ["MatMul", "Add", "Mul"]


@pytest.mark.parametrize("tensor", ["conv.weight", "conv.bias", "conv_y"])
def test_a_grid_on_what_would_change_keeps_it(tensor: str) -> None:
    b = GraphBuilder()
    before = simplify(b.model(b.op("Mul", [b.conv(image(b), "conv", 4, 6), channels(b, "c", 6, 1, 1)])))
    set_params({value.name: value for value in all_values(before.graph)}[tensor], GRID)
    assert op_types(fold_affine(before)) == ["Conv", "Mul"]
