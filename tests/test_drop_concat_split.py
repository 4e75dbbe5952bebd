"""Concat and Split that undo each other become wires, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.graph.annotations import all_values, set_params
from edgekit.graph.equal import random_feeds
from edgekit.passes.drop_concat_split import drop_concat_split
from edgekit.passes.simplify import simplify
from edgekit.quant.spec import QuantParams
from graphs import GraphBuilder, op_types, run


def prove(before: ir.Model, after: ir.Model) -> None:
    assert [v.name for v in after.graph.outputs] == [v.name for v in before.graph.outputs]
    for batch in (1, 3):
        feeds = random_feeds(list(before.graph.inputs), batch)
        expected, found = run(before, feeds), run(after, feeds)
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array)


def joined(b: GraphBuilder, sizes: list[int], axis: int = 1) -> str:
    """Relus of inputs whose axis 1 or 2 has these sizes, joined along it."""
    shapes = [["N", size, 4] if axis % 3 == 1 else ["N", 4, size] for size in sizes]
    parts = [b.op("Relu", [b.input(f"x{i}", shape)], f"part{i}") for i, shape in enumerate(shapes)]
    return str(b.op("Concat", parts, "concat", axis=axis))


def split(b: GraphBuilder, x: str, sizes: list[int], axis: int = 1) -> list[str]:
    names = b.op("Split", [x, b.constant("sizes", np.array(sizes))], "split", outputs=len(sizes), axis=axis)
    return list(names) if len(sizes) > 1 else [names]


def tanhs(b: GraphBuilder, values: list[str]) -> list[str]:
    return [b.op("Tanh", [value], f"tanh{i}") for i, value in enumerate(values)]


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 3), min_size=2, max_size=4), taken=st.lists(st.integers(1, 3), min_size=2, max_size=4),
    axis=st.sampled_from([1, 2, -1, -2]), again=st.sampled_from([0, -3]),
)  # fmt: skip
def test_a_split_of_a_concat_goes_only_where_the_sizes_are_the_same(
    sizes: list[int], taken: list[int], axis: int, again: int
) -> None:
    taken = taken if sum(taken) == sum(sizes) else sizes
    b = GraphBuilder()
    other = axis + again if -3 <= axis + again < 3 and axis > 0 else axis  # the same axis, counted from the end
    before = simplify(b.model(*tanhs(b, split(b, joined(b, sizes, axis), taken, other))))
    after = drop_concat_split(before)
    assert ("Split" in op_types(after)) == ("Concat" in op_types(after)) == (taken != sizes)
    prove(before, after)


def test_a_split_into_equal_parts() -> None:
    b = GraphBuilder()
    parts = b.op("Split", [joined(b, [3, 3])], "split", outputs=2, axis=1, num_outputs=2)
    before = simplify(b.model(*tanhs(b, parts)))
    after = drop_concat_split(before)
    assert op_types(after) == ["Relu", "Relu", "Tanh", "Tanh"]
    prove(before, after)


def test_a_concat_with_another_reader_stays_for_that() -> None:
    b = GraphBuilder()
    x = joined(b, [1, 2])
    before = simplify(b.model(*tanhs(b, split(b, x, [1, 2])), b.op("Abs", [x])))
    after = drop_concat_split(before)
    assert sorted(op_types(after)) == sorted(["Relu", "Relu", "Concat", "Tanh", "Tanh", "Abs"])
    prove(before, after)


def test_outputs_take_their_names_to_what_was_joined() -> None:
    b = GraphBuilder()
    before = simplify(b.model(*split(b, joined(b, [1, 2]), [1, 2])))
    after = drop_concat_split(before)
    assert op_types(after) == ["Relu", "Relu"]
    prove(before, after)


def test_a_concat_of_all_parts_goes() -> None:
    b = GraphBuilder()
    parts = split(b, b.op("Relu", [b.input("x", ["N", 5])]), [2, 3])
    before = simplify(b.model(b.op("Tanh", [b.op("Concat", parts, axis=-1)])))
    after = drop_concat_split(before)
    assert op_types(after) == ["Relu", "Tanh"]
    prove(before, after)


@pytest.mark.parametrize("order", [[1, 0], [0], [0, 0]])
def test_a_concat_of_other_parts_stays(order: list[int]) -> None:
    b = GraphBuilder()
    parts = split(b, b.op("Relu", [b.input("x", ["N", 6])]), [3, 3])
    before = simplify(b.model(b.op("Tanh", [b.op("Concat", [parts[i] for i in order], axis=1)]), *tanhs(b, parts)))
    after = drop_concat_split(before)
    assert op_types(after) == op_types(before)


def test_a_concat_along_another_axis_stays() -> None:
    b = GraphBuilder()
    parts = split(b, b.op("Relu", [b.input("x", ["N", 6])]), [3, 3])
    before = simplify(b.model(b.op("Tanh", [b.op("Concat", parts, axis=0)])))
    assert op_types(drop_concat_split(before)) == op_types(before)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 3), min_size=2, max_size=3), start=st.integers(-9, 9), end=st.integers(-9, 99),
    step=st.sampled_from([1, 1, 1, 2]),
)  # fmt: skip
def test_a_slice_goes_only_where_it_is_one_of_the_joined(sizes: list[int], start: int, end: int, step: int) -> None:
    b = GraphBuilder()
    inputs = [b.constant(n, np.array([v])) for n, v in (("s", start), ("e", end), ("a", -2), ("t", step))]
    before = simplify(b.model(b.op("Tanh", [b.op("Slice", [joined(b, sizes), *inputs])])))
    after = drop_concat_split(before)
    places = [(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]
    whole = slice(start, end, step).indices(sum(sizes))[:2] in places and step == 1
    assert ("Slice" not in op_types(after)) == whole
    prove(before, after)


@pytest.mark.parametrize(
    ("sizes", "indices", "left"),
    [
        ([2, 3], [0, 1], []),
        ([2, 3], [-3, -2, -1], []),
        ([2, 3], [1, 0], ["Concat", "Gather"]),
        ([2, 3], [0, 0], ["Concat", "Gather"]),
        ([2, 3], [0, 1, 2], ["Concat", "Gather"]),
        ([2, 3], [2, 3], ["Concat", "Gather"]),
        ([2, 3], [[0, 1]], ["Concat", "Gather"]),
        ([1, 3], 0, ["Gather"]),
        ([3, 1], -1, ["Gather"]),
        ([3, 1], 0, ["Concat", "Gather"]),
    ],
)
def test_a_gather_of_exactly_one(sizes: list[int], indices: object, left: list[str]) -> None:
    b = GraphBuilder()
    y = b.op("Gather", [joined(b, sizes), b.constant("i", np.array(indices))], axis=1)
    before = simplify(b.model(b.op("Tanh", [y])))
    after = drop_concat_split(before)
    assert [op for op in op_types(after) if op in ("Concat", "Gather")] == left
    prove(before, after)


def output_of_an_input(b: GraphBuilder) -> list[str]:
    x = b.op("Concat", [b.input("x", ["N", 2]), b.input("z", ["N", 3])], axis=1)
    return split(b, x, [2, 3])


def two_outputs_of_one(b: GraphBuilder) -> list[str]:
    x = b.op("Relu", [b.input("x", ["N", 2])])
    return split(b, b.op("Concat", [x, x], axis=1), [2, 2])


def already_an_output(b: GraphBuilder) -> list[str]:
    x, z = b.op("Relu", [b.input("x", ["N", 2])]), b.op("Relu", [b.input("z", ["N", 2])])
    return [x, *split(b, b.op("Concat", [x, z], axis=1), [2, 2])]


def unknown_sizes(b: GraphBuilder) -> list[str]:
    x = b.op("Concat", [b.input("x", ["N", "A"]), b.input("z", ["N", "B"])], axis=1)
    return [b.op("Tanh", [part]) for part in b.op("Split", [x], outputs=2, axis=1, num_outputs=2)]


def another_axis(b: GraphBuilder) -> list[str]:
    return tanhs(b, split(b, joined(b, [2, 2], 1), [2, 2], 2))


STAYS = [output_of_an_input, two_outputs_of_one, already_an_output, unknown_sizes, another_axis]


@pytest.mark.parametrize("build", STAYS, ids=lambda build: build.__name__)
def test_where_a_name_or_number_would_be_lost_it_stays(build: Callable[[GraphBuilder], list[str]]) -> None:
    b = GraphBuilder()
    before = simplify(b.model(*build(b)))
    assert op_types(drop_concat_split(before)) == op_types(before)


@pytest.mark.parametrize("tensor", ["concat_y", "split_y1"])
def test_a_grid_keeps_them(tensor: str) -> None:
    b = GraphBuilder()
    before = simplify(b.model(*tanhs(b, split(b, joined(b, [1, 2]), [1, 2]))))
    values = {value.name: value for value in all_values(before.graph)}
    set_params(values[tensor], QuantParams("uint8", np.array(0.05, np.float32), np.array(128)))
    assert op_types(drop_concat_split(before)) == op_types(before)
