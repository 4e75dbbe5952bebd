"""Which tensors a target's rules want quantized, how, and which must share one grid."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto

from edgekit.graph.annotations import all_values, get_params, get_wish, set_params, set_wish
from edgekit.graph.operators import is_constant
from edgekit.graph.rules import quantized_nodes
from edgekit.passes.assign_specs import assign_specs
from edgekit.passes.simplify import simplify
from edgekit.passes.unify_params import unify_params
from edgekit.quant.affine import choose_params
from edgekit.quant.spec import QuantParams, QuantSpec
from edgekit.target import Target, load_target, target_names
from graphs import GraphBuilder
from networks import Net

PORTABLE = load_target("portable")
UINT8 = QuantSpec("uint8")
WEIGHT = QuantSpec("int8", symmetric=True, per_channel=True, narrow_range=True)


def wishes(model: ir.Model, target: Target = PORTABLE) -> dict[str, tuple[QuantSpec, int | None]]:
    marked = assign_specs(model, target)
    return {value.name or "": wish for value in all_values(marked.graph) if (wish := get_wish(value)) is not None}


def activations(model: ir.Model, target: Target = PORTABLE) -> set[str]:
    marked = assign_specs(model, target)
    return {value.name or "" for value in all_values(marked.graph) if get_wish(value) and not is_constant(value)}


def cnn() -> ir.Model:
    """A residual block with a depthwise Conv and a squeeze-and-excite gate, Concat, and a head behind shape arithmetic."""
    net = Net()
    stem = net.conv_relu(net.input("x", ["N", 3, 8, 8]), "stem", 3, 8)
    deep = net.clip(net.conv(stem, "deep", 8, 8, group=8), "deep.clip", 0.0, 6.0)
    squeezed = net.conv_relu(net.op("GlobalAveragePool", [deep], "squeeze"), "reduce", 8, 4, 1)
    gate = net.op("HardSigmoid", [net.conv(squeezed, "expand", 4, 8, 1)], "gate")
    added = net.op("Add", [net.op("Mul", [deep, gate], "excite"), stem], "add")
    pooled = net.op("MaxPool", [added], "pool", kernel_shape=[2, 2], strides=[2, 2])
    other = net.conv(added, "other", 8, 8, strides=[2, 2])
    joined = net.op("Concat", [pooled, other], "cat", axis=1)
    batch = net.op("Gather", [net.op("Shape", [joined], "shape"), net.constant("zero", np.int64([0]))], "batch", axis=0)
    target = net.op("Concat", [batch, net.constant("rest", np.int64([-1]))], "target", axis=0)
    flat = net.op("Reshape", [joined, target], "flat")
    return simplify(net.model(net.op("Softmax", [net.gemm(flat, "head", 256, 10)], "softmax", axis=1)))


CNN_PORTABLE = {
    "x", "stem.relu_y", "deep.clip_y", "squeeze_y", "reduce.relu_y", "expand_y", "gate_y", "excite_y", "add_y", "pool_y",
    "other_y", "cat_y", "flat_y", "head_y",
}  # fmt: skip


def test_a_cnn_for_every_target_at_once() -> None:
    model = cnn()
    assert activations(model) == CNN_PORTABLE
    weights = {name: wish for name, wish in wishes(model).items() if name not in CNN_PORTABLE}
    assert weights == {f"{name}.weight": (WEIGHT, 0) for name in ("stem", "deep", "reduce", "expand", "other", "head")}
    assert {wish for name, wish in wishes(model).items() if name in CNN_PORTABLE} == {(UINT8, None)}


def test_the_inside_of_an_operator_that_absorbs_its_activation_is_not_marked() -> None:
    assert not {"stem_y", "deep_y", "reduce_y"} & activations(cnn())


@pytest.mark.parametrize("name", target_names())
def test_a_cnn_for_one_target_wants_its_own_grids_and_nothing_more(name: str) -> None:
    target, model = load_target(name), cnn()
    found = wishes(model, target)
    marked = activations(model, target)
    assert marked <= CNN_PORTABLE
    if "Mul" not in target.quantization.quantize:
        # The gate stays float: neither it nor what it makes has a grid of its own, unless an Add wants the product.
        assert "gate_y" not in marked
    assert {"x", "stem.relu_y", "add_y", "cat_y", "flat_y"} <= marked
    assert {found[each] for each in marked} == {(target.quantization.activation.spec, None)}
    assert found["head.weight"] == (target.quantization.weight.spec, 0)


def test_shape_arithmetic_and_integers_are_never_marked() -> None:
    assert not {"shape_y", "batch_y", "target_y", "zero", "rest"} & set(wishes(cnn()))
    b = GraphBuilder()
    ids = b.input("ids", ["N", 4], TensorProto.INT64)
    more = b.op("Add", [ids, b.input("offset", ["N", 4], TensorProto.INT64)], "more")
    x = b.op(
        "Cast", [b.op("Reshape", [more, b.constant("shape", np.int64([0, 4]))], "same")], "float", to=TensorProto.FLOAT
    )
    y = b.op("MatMul", [x, b.weight("w", 4, 4)], "fc")
    found = b.op("ArgMax", [y], "best", axis=1, keepdims=0)
    model = simplify(ir.from_proto(b.proto(found, dtypes={found: TensorProto.INT64})))
    assert activations(model) == {"float_y", "fc_y"}


def test_an_add_of_a_mask_or_a_position_code_is_not_an_activation() -> None:
    b = GraphBuilder()
    x, mask = b.input("x", ["N", 4, 6, 8]), b.input("mask", ["N", 1, 6, 6])
    scores = b.op("MatMul", [x, b.op("Transpose", [x], "t", perm=[0, 1, 3, 2])], "scores")
    masked = b.op("Softmax", [b.op("Add", [scores, mask], "masked")], "softmax", axis=-1)
    context = b.op("MatMul", [masked, x], "context")
    out = b.op("Add", [context, b.weight("positions", 6, 8)], "positioned")
    head = b.op("MatMul", [b.op("Add", [out, x], "residual"), b.weight("w", 8, 2)], "head")
    model = simplify(b.model(head))
    assert activations(model) == {"residual_y", "head_y"}
    assert [node.name for node in quantized_nodes(model, PORTABLE)] == ["head"]
    rules = PORTABLE.quantization.model_copy(update={"attention": "quantize"})
    everywhere = PORTABLE.model_copy(update={"quantization": rules})
    assert activations(model, everywhere) == {"x", "t_y", "scores_y", "softmax_y", "context_y", "residual_y", "head_y"}
    assert [node.name for node in quantized_nodes(model, everywhere)] == ["scores", "context", "head"]


def test_the_residual_stream_between_matrix_products_stays_float() -> None:
    b = GraphBuilder()
    x = b.input("x", ["N", 6, 8])
    hidden = b.op("Add", [b.op("MatMul", [x, b.weight("w", 8, 8)], "fc"), b.weight("bias", 8)], "fc.bias")
    stream = b.op("Add", [hidden, b.op("MatMul", [hidden, b.weight("v", 8, 8)], "fc2")], "residual")
    model = simplify(b.model(b.op("MatMul", [stream, b.weight("u", 8, 2)], "head")))
    assert [node.name for node in quantized_nodes(model, PORTABLE)] == ["fc", "fc2", "head"]


def test_what_no_layer_follows_is_post_processing() -> None:
    b = GraphBuilder()
    boxes = b.conv(b.input("x", ["N", 3, 8, 8]), "boxes", 3, 4)
    scores = b.op("Sigmoid", [b.conv("x", "scores", 3, 4)], "sigmoid")
    model = simplify(b.model(b.op("Concat", [b.op("Add", [boxes, boxes], "decode"), scores], "joined", axis=1)))
    assert [node.name for node in quantized_nodes(model, PORTABLE)] == ["boxes", "scores"]


def test_a_convolution_that_weighs_probabilities_stays_float() -> None:
    b = GraphBuilder()
    logits = b.conv(b.input("x", ["N", 3, 8, 8]), "logits", 3, 4)
    model = simplify(b.model(b.conv(b.op("Softmax", [logits], "softmax", axis=1), "expectation", 4, 1)))
    assert [node.name for node in quantized_nodes(model, PORTABLE)] == ["logits"]


def test_an_add_of_unknown_shapes_may_be_a_mask_and_stays_float() -> None:
    b = GraphBuilder()
    x = b.conv(b.input("x", ["N", 3, 8, 8]), "conv", 3, 4)
    x = b.op("Reshape", [x, b.input("shape", ["rank"], TensorProto.INT64)], "unknown")
    model = simplify(b.model(b.op("Add", [b.op("Relu", [x], "relu"), x], "add")))
    assert [node.name for node in quantized_nodes(model, PORTABLE)] == ["conv"]


def test_light_operators_alone_are_left_in_float() -> None:
    net = Net()
    x = net.input("x", ["N", 4, 8, 8])
    y = net.op("Mul", [net.op("Add", [x, x], "add"), net.op("Sigmoid", [x], "gate")], "mul")
    assert wishes(simplify(net.model(net.op("GlobalAveragePool", [y], "pool")))) == {}


def test_named_nodes_stay_float_and_carry_nothing_on() -> None:
    net = Net()
    x = net.conv_relu(net.input("x", ["N", 3, 8, 8]), "a", 3, 4)
    model = simplify(net.model(net.op("GlobalAveragePool", [x], "pool")))
    assert [node.name for node in quantized_nodes(model, PORTABLE)] == ["a", "pool"]
    assert list(quantized_nodes(model, PORTABLE, keep_float=frozenset({"a"}))) == []


def test_weights_without_a_channel_axis_get_one_scale() -> None:
    b = GraphBuilder()
    x = b.op("ConvTranspose", [b.input("x", ["N", 4, 5, 5]), b.weight("grouped", 4, 3, 3, 3)], "up", group=2)
    x = b.op("ConvTranspose", [x, b.weight("plain", 6, 4, 3, 3)], "more")
    y = b.op("MatMul", [b.input("q", ["N", 2, 7, 5]), b.weight("stacked", 2, 5, 6)], "heads")
    found = wishes(simplify(b.model(x, y)))
    one_scale = QuantSpec("int8", symmetric=True, per_channel=False, narrow_range=True)
    assert (found["grouped"], found["plain"], found["stacked"]) == ((one_scale, None), (WEIGHT, 1), (one_scale, None))


def test_what_is_tied_to_a_marked_tensor_is_marked_through_any_chain() -> None:
    net = Net()
    x = net.input("x", ["N", 4, 8, 8])
    moved = net.reshape(
        net.op("Transpose", [net.op("MaxPool", [x], "max", kernel_shape=[1, 1])], "t", perm=[0, 2, 3, 1]), "r", 0, 64, 4
    )
    left, right = net.op("Split", [net.matmul(moved, "fc", 4, 8)], "split", outputs=2, axis=2, num_outputs=2)
    padded = net.pad(left, "pad", [0, 0, 0, 0, 0, 0])
    found = activations(simplify(net.model(net.op("Softmax", [padded], "s"), net.op("Exp", [right], "e"))))
    assert found == {"x", "max_y", "t_y", "r_y", "fc_y", "split_y", "split_y1", "pad_y"}


def test_pads_of_other_numbers_and_cubic_resizing_tie_nothing() -> None:
    net = Net()
    x = net.conv(net.input("x", ["N", 3, 8, 8]), "conv", 3, 4)
    pads, one = net.constant("pads", np.int64([0] * 6 + [1, 1])), net.constant("one", np.float32(1))
    scales = net.constant("scales", np.float32([1, 1, 2, 2]))
    outputs = [
        net.op("Pad", [x, pads, one], "ones"),
        net.op("Pad", [x, pads], "mirror", mode="reflect"),
        net.op("Resize", [x, "", scales], "cubic", mode="cubic"),
        net.op("Resize", [x, "", scales], "linear", mode="linear"),
    ]
    found = activations(simplify(net.model(*outputs)))
    assert found == {"x", "conv_y", "linear_y"}


def chain() -> ir.Model:
    """`a` and `b` into a Concat, behind it a MaxPool, then a Conv: all one grid."""
    net = Net()
    a, b = (net.conv(net.input(name, ["N", 3, 8, 8]), name.upper(), 3, 4) for name in ("a", "b"))
    joined = net.op("Concat", [a, b], "cat", axis=1)
    pooled = net.op("MaxPool", [joined], "max", kernel_shape=[2, 2])
    return assign_specs(simplify(net.model(net.conv(pooled, "C", 8, 4))), PORTABLE)


def with_ranges(model: ir.Model, **ranges: tuple[float, float] | QuantParams) -> ir.Model:
    for value in all_values(model.graph):
        found = ranges.get(value.name or "")
        if isinstance(found, QuantParams):
            set_params(value, found)
        elif found is not None:
            set_params(value, choose_params(*found, UINT8, observer="minmax"))
    return model


def params(model: ir.Model) -> dict[str, QuantParams]:
    return {value.name or "": found for value in all_values(model.graph) if (found := get_params(value)) is not None}


FIXED = QuantParams("uint8", np.array(0.1, np.float32), np.array(7), observer="fake_quant", fixed=True)


def test_members_of_a_chain_get_the_union_of_their_ranges() -> None:
    unified = params(unify_params(with_ranges(chain(), A_y=(-1.0, 2.0), B_y=(-3.0, 0.5), a=(-5.0, 5.0)), PORTABLE))
    expected = choose_params(-3.0, 2.0, UINT8, observer="minmax")
    assert {name: unified[name] for name in ("A_y", "B_y", "cat_y", "max_y")} == dict.fromkeys(
        ("A_y", "B_y", "cat_y", "max_y"), expected
    )
    assert unified["a"] == choose_params(-5.0, 5.0, UINT8, observer="minmax"), "what is not tied stays"


def test_ranges_of_different_observers_make_a_union() -> None:
    model = with_ranges(chain(), A_y=(-1.0, 2.0), B_y=choose_params(-3.0, 0.5, UINT8, observer="kld"))
    assert params(unify_params(model, PORTABLE))["cat_y"] == choose_params(-3.0, 2.0, UINT8, observer="union")


def test_a_trained_grid_wins_over_calibrated_ones() -> None:
    unified = params(unify_params(with_ranges(chain(), A_y=(-1.0, 2.0), B_y=FIXED), PORTABLE))
    assert {name: unified[name] for name in ("A_y", "B_y", "cat_y", "max_y")} == dict.fromkeys(
        ("A_y", "B_y", "cat_y", "max_y"), FIXED
    )


def test_trained_grids_that_differ_stay_and_others_take_the_widest() -> None:
    other = QuantParams("uint8", np.array(0.2, np.float32), np.array(7), fixed=True)
    found = params(unify_params(with_ranges(chain(), A_y=FIXED, B_y=other), PORTABLE))
    assert (found["A_y"], found["B_y"]) == (FIXED, other)
    assert (found["cat_y"], found["max_y"]) == (other, other)
    same = params(unify_params(with_ranges(chain(), A_y=FIXED, B_y=FIXED), PORTABLE))
    assert same["cat_y"] == FIXED


def test_grids_that_were_loaded_without_wishes_are_unified_on_the_targets_grid() -> None:
    model = with_ranges(chain(), A_y=(-1.0, 2.0), B_y=(-3.0, 0.5), cat_y=(-1.0, 1.0), max_y=(-1.0, 1.0))
    for value in all_values(model.graph):
        value.meta.pop("edgekit.wish", None)
    assert params(unify_params(model, PORTABLE))["max_y"] == choose_params(-3.0, 2.0, UINT8, observer="minmax")


def test_a_finer_wish_of_the_group_is_kept() -> None:
    model = with_ranges(chain(), A_y=(-1.0, 2.0), B_y=(-3.0, 0.5))
    fine = QuantSpec("uint16")
    for value in all_values(model.graph):
        if value.name in ("A_y", "B_y", "cat_y", "max_y"):
            set_wish(value, fine, None)
    assert params(unify_params(model, PORTABLE))["max_y"] == choose_params(-3.0, 2.0, fine, observer="minmax")


def test_unifying_changes_nothing_else_and_not_its_argument() -> None:
    model = with_ranges(chain(), A_y=(-1.0, 2.0))
    before = params(model)
    once = unify_params(model, PORTABLE)
    assert params(model) == before
    assert params(unify_params(once, PORTABLE)) == params(once)
