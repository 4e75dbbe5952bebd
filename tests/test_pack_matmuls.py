"""Linear layers on one tensor packed into one: the same numbers from one wide multiplication."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from edgekit.graph.annotations import all_values, set_params
from edgekit.graph.equal import prove_equal, random_feeds
from edgekit.passes.pack_matmuls import pack_matmuls
from edgekit.passes.simplify import simplify
from edgekit.quant.spec import QuantParams
from graphs import GraphBuilder, initializers, op_types

LAYER = "encoder.layer.0.attention.self"


def prove(before: ir.Model, after: ir.Model) -> None:
    for batch in (1, 3):
        prove_equal(before, after, random_feeds(list(before.graph.inputs), batch))


def linear(b: GraphBuilder, x: str, name: str, width: int, bias: bool = True) -> str:
    y = str(b.op("MatMul", [x, b.weight(f"{name}.weight", 8, width)], name))
    return str(b.op("Add", [b.weight(f"{name}.bias", width), y], f"{name}/bias")) if bias else y


def projections(b: GraphBuilder, bias: bool = True, name: str = LAYER) -> list[str]:
    x = b.op("Relu", [b.input("x", ["N", 5, 8])])
    return [b.op("Tanh", [linear(b, x, f"{name}.{part}", 8, bias)]) for part in ("query", "key", "value")]


@pytest.mark.parametrize("bias", [True, False])
def test_query_key_and_value_become_one_matmul(bias: bool) -> None:
    b = GraphBuilder()
    before = simplify(b.model(*projections(b, bias)))
    after = pack_matmuls(before)
    assert op_types(after) == ["Relu", "MatMul", *["Add"] * bias, "Split", "Tanh", "Tanh", "Tanh"]
    packed = next(node for node in after.graph if node.op_type == "MatMul")
    assert packed.name == f"{LAYER}.query+key+value"
    assert str(packed.outputs[0].shape) == "[N,5,24]"
    assert {v.name for v in after.graph.initializers.values()} == {
        v.name for n in after.graph for v in n.inputs if v is not None and v.const_value is not None
    }
    tanhs = [node.inputs[0] for node in after.graph if node.op_type == "Tanh"]
    old = [node.inputs[0] for node in before.graph if node.op_type == "Tanh"]
    assert [(v.name, str(v.shape)) for v in tanhs if v] == [(v.name, str(v.shape)) for v in old if v]
    prove(before, after)


@settings(max_examples=25, deadline=None)
@given(
    widths=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    rank=st.integers(1, 3),
    kind=st.sampled_from(["matmul", "biased", "gemm", "gemm^T", "gemm+bias"]),
    seed=st.integers(0, 9),
)
def test_any_widths_ranks_and_forms(widths: list[int], rank: int, kind: str, seed: int) -> None:
    b = GraphBuilder(seed=seed)
    gemm, transposed = kind.startswith("gemm"), kind == "gemm^T"
    x = b.input("x", ["N", 8] if gemm else ["N", 5, 3][:rank] + [8])
    outputs = []
    for i, width in enumerate(widths):
        if not gemm:
            outputs.append(linear(b, x, f"fc{i}", width, kind == "biased"))
            continue
        w = b.weight(f"w{i}", *((width, 8) if transposed else (8, width)))
        bias = [b.weight(f"b{i}", 1, width)] if kind == "gemm+bias" else []
        outputs.append(b.op("Gemm", [x, w, *bias], transB=int(transposed)))
    before = simplify(b.model(*outputs))
    after = pack_matmuls(before)
    count = sum(op in ("MatMul", "Gemm") for op in op_types(after))
    assert count == 1 and op_types(after).count("Split") == (len(widths) > 1)
    assert [v.name for v in after.graph.outputs] == [v.name for v in before.graph.outputs]
    prove(before, after)


@pytest.mark.parametrize(
    ("names", "packed"),
    [
        (("/layer/query/MatMul", "/layer/key/MatMul"), "/layer/query+key/MatMul"),
        (("h.0.gate_proj", "h.0.up_proj"), "h.0.gate_proj+up_proj"),
        (("left", "right"), "left+right"),
        (("a.q", "a.q.more"), "a.q+q.more"),
        (("0.cross.k", "1.cross.k"), "0+1.cross.k"),
    ],
)
def test_the_packed_layer_is_named_after_its_members(names: tuple[str, str], packed: str) -> None:
    b = GraphBuilder()
    x = b.input("x", ["N", 8])
    after = pack_matmuls(simplify(b.model(*[linear(b, x, name, 4, bias=False) for name in names])))
    assert next(iter(after.graph)).name == packed


def test_two_layers_one_after_the_other_are_packed_one_by_one() -> None:
    b = GraphBuilder()
    x = b.input("x", ["N", 8])
    left, right = linear(b, x, "a.left", 8), linear(b, x, "a.right", 8)
    outputs = [linear(b, left, "b.left", 3), linear(b, left, "b.right", 4), right]
    before = simplify(b.model(*outputs))
    after = pack_matmuls(before)
    assert op_types(after) == ["MatMul", "Add", "Split"] * 2
    prove(before, after)


def test_members_with_and_without_bias_are_packed_apart() -> None:
    b = GraphBuilder()
    x = b.input("x", ["N", 8])
    outputs = [linear(b, x, f"fc{i}", 4, bias=i % 2 == 0) for i in range(4)]
    before = simplify(b.model(*outputs))
    after = pack_matmuls(before)
    assert sorted(op_types(after)) == ["Add", "MatMul", "MatMul", "Split", "Split"]
    prove(before, after)


def test_a_shared_weight_stays_for_its_other_reader() -> None:
    b = GraphBuilder()
    x, z = b.input("x", ["N", 8]), b.input("z", ["N", 8])
    w = b.weight("w", 8, 8)
    before = simplify(b.model(b.op("MatMul", [x, w]), b.op("MatMul", [x, b.weight("v", 8, 8)]), b.op("MatMul", [z, w])))
    after = pack_matmuls(before)
    assert op_types(after).count("MatMul") == 2 and "w" in after.graph.initializers
    prove(before, after)


def test_it_is_deterministic_and_leaves_the_source_alone() -> None:
    b = GraphBuilder()
    before = simplify(b.model(*projections(b)))
    serialized = ir.to_proto(before).SerializeToString(deterministic=True)
    first, second = (ir.to_proto(pack_matmuls(before)).SerializeToString(deterministic=True) for _ in range(2))
    assert first == second
    assert ir.to_proto(before).SerializeToString(deterministic=True) == serialized


def one_reader(b: GraphBuilder) -> list[str]:
    x = b.input("x", ["N", 8])
    return [linear(b, x, "a", 4), b.op("Relu", [x])]


def other_tensors(b: GraphBuilder) -> list[str]:
    return [linear(b, b.input(name, ["N", 8]), f"fc{name}", 4) for name in ("x", "z")]


def computed_weight(b: GraphBuilder) -> list[str]:
    x = b.input("x", ["N", 8])
    return [b.op("MatMul", [x, b.input("w", [8, 4])]), linear(b, x, "a", 4, bias=False)]


def weight_on_the_left(b: GraphBuilder) -> list[str]:
    x = b.input("x", [8, 4])
    return [b.op("MatMul", [b.weight(name, 3, 8), x]) for name in ("a", "b")]


def another_type(b: GraphBuilder) -> list[str]:
    x = b.input("x", ["N", 8], TensorProto.INT32)
    parts = [b.op("MatMul", [x, b.constant(name, np.ones((8, 4), np.int32))]) for name in ("a", "b")]
    return [b.op("Cast", [part], to=1) for part in parts]


def stacked_weights(b: GraphBuilder) -> list[str]:
    x = b.input("x", ["N", 3, 5, 8])
    return [b.op("MatMul", [x, b.weight(name, 3, 8, 4)]) for name in ("a", "b")]


def gemms_of_both_layouts(b: GraphBuilder) -> list[str]:
    x = b.input("x", ["N", 8])
    return [b.op("Gemm", [x, b.weight(name, 8, 8)], transB=i) for i, name in enumerate("ab")]


def scaled_gemms(b: GraphBuilder) -> list[str]:
    x = b.input("x", ["N", 8])
    return [b.op("Gemm", [x, b.weight(name, 8, 4)], alpha=2.0) for name in ("a", "b")]


STAYS = [
    one_reader, other_tensors, computed_weight, weight_on_the_left, another_type, stacked_weights, scaled_gemms, gemms_of_both_layouts,
]  # fmt: skip


@pytest.mark.parametrize("build", STAYS, ids=lambda build: build.__name__)
def test_what_is_no_group_stays(build: Callable[[GraphBuilder], list[str]]) -> None:
    b = GraphBuilder()
    before = simplify(b.model(*build(b)))
    after = pack_matmuls(before)
    assert op_types(after) == op_types(before)
    assert initializers(after) == initializers(before)


def test_a_sum_that_is_no_row_is_no_bias() -> None:
    b = GraphBuilder()
    x = b.input("x", ["N", 5, 8])
    sums = [b.op("Add", [linear(b, x, n, 4, bias=False), b.weight(f"{n}.code", 5, 4)]) for n in ("a", "b")]
    before = simplify(b.model(*sums))
    after = pack_matmuls(before)
    assert op_types(after) == ["MatMul", "Split", "Add", "Add"]
    prove(before, after)


@pytest.mark.parametrize("tensor", [".query.weight", ".query.bias", ".query_y", ".query/bias_y"])
def test_a_member_with_a_grid_stays_out(tensor: str) -> None:
    b = GraphBuilder()
    before = simplify(b.model(*projections(b)))
    values = {value.name: value for value in all_values(before.graph)}
    set_params(values[LAYER + tensor], QuantParams("uint8", np.array(0.05, np.float32), np.array(128)))
    after = pack_matmuls(before)
    names = [node.name for node in after.graph if node.op_type == "MatMul"]
    assert sorted(names, key=str) == [f"{LAYER}.key+value", f"{LAYER}.query"]
