"""Layers as rows times a matrix: what ONNX Runtime computes, the same rows for every order and cut of the samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.calibration.layer_rows import (
    ROWS,
    SAMPLES,
    RowSample,
    array_of,
    collect_rows,
    linear_layers,
    matrix,
    numbers,
    rows_key,
    rows_of,
)
from edgekit.data import Batch
from edgekit.passes.simplify import simplify
from graphs import Array, normal, run
from networks import Net, mixed_net, residual_net, token_net


def batches(data: Array, size: int, name: str = "x") -> list[Batch]:
    return [Batch({name: data[i : i + size]}) for i in range(0, len(data), size)]


def collected(model: ir.Model, given: list[Batch], **choices: Any) -> list[RowSample]:
    layers = linear_layers(model.graph)
    choices.setdefault("samples", sum(len(batch) for batch in given))
    found = collect_rows(model, layers, given, threads=1, **choices)
    return [found[rows_key(layer)] for layer in layers]


def same(a: RowSample, b: RowSample) -> bool:
    arrays = zip((a.rows, a.low, a.high), (b.rows, b.low, b.high), strict=True)
    return a.halves == b.halves and all(np.array_equal(x, y) for x, y in arrays)


def conv(rank: int, c_in: int, c_out: int, kernel: list[int], **attributes: Any) -> ir.Model:
    net = Net(seed=3)
    x = net.input("x", ["n", c_in, *[11, 9][:rank]])
    weight = net.weight("conv.weight", c_out, c_in // attributes.get("group", 1), *kernel)
    return net.model(net.op("Conv", [x, weight, net.weight("conv.bias", c_out)], "conv", **attributes))


def product(rank: int) -> ir.Model:
    net = Net(seed=3)
    x = net.matmul(net.input("x", ["n", 12] if rank == 2 else ["n", 5, 12]), "layer", 12, 7)
    return net.model(net.op("Add", [x, net.weight("layer.bias", 7)], "add"))


def gemm(transposed: int) -> ir.Model:
    net = Net(seed=3)
    shape = (7, 12) if transposed else (12, 7)
    inputs = [net.input("x", ["n", 12]), net.weight("layer.weight", *shape), net.weight("layer.bias", 7)]
    return net.model(net.op("Gemm", inputs, "layer", transB=transposed))


LAYERS = {
    "matmul, 2-D": product(2),
    "matmul, 3-D": product(3),
    "gemm": gemm(0),
    "gemm, transposed": gemm(1),
    "conv 1-D": conv(1, 4, 6, [3]),
    "conv 1-D, all": conv(1, 4, 6, [3], strides=[2], dilations=[2], pads=[3, 1], group=2),
    "conv 2-D": conv(2, 4, 6, [3, 3]),
    "conv 2-D, strides": conv(2, 4, 6, [3, 2], strides=[2, 3], pads=[1, 0, 2, 1]),
    "conv 2-D, dilations": conv(2, 4, 6, [3, 2], dilations=[2, 3], pads=[0, 1, 1, 2]),
    "conv 2-D, groups": conv(2, 4, 6, [3, 3], group=2, pads=[1, 1, 1, 1]),
    "depthwise": conv(2, 4, 4, [3, 3], group=4, pads=[1, 1, 1, 1], strides=[2, 2]),
    "depthwise, two each": conv(2, 4, 8, [3, 3], group=4),
    "valid": conv(2, 4, 6, [3, 3], auto_pad="VALID"),
    "pointwise": conv(2, 4, 6, [1, 1], strides=[2, 1]),
}


@pytest.mark.parametrize("name", LAYERS)
def test_rows_times_the_matrix_are_the_layers_outputs(name: str) -> None:
    model = LAYERS[name]
    (layer,) = linear_layers(model.graph)
    shape = [2 if not isinstance(dim, int) else dim for dim in model.graph.inputs[0].shape or ()]
    data = normal(*shape, seed=5)
    (expected,) = run(model, {"x": data}).values()
    if layer.geometry.kind == "patches":
        expected = np.moveaxis(expected, 1, -1)  # (batch, positions ..., channels)
    rows = rows_of(data, layer.geometry, 10_000)
    weights = matrix(layer, numbers(layer.weight))
    found = np.concatenate(list(rows @ weights), axis=1) + numbers(
        model.graph.initializers[f"{'conv' if layer.geometry.kind == 'patches' else 'layer'}.bias"]
    )
    np.testing.assert_allclose(found, expected.reshape(-1, expected.shape[-1]), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_a_matrix_goes_back_to_the_shape_of_the_weight(name: str) -> None:
    (layer,) = linear_layers(LAYERS[name].graph)
    weight = numbers(layer.weight)
    assert np.array_equal(array_of(layer, matrix(layer, weight), weight.shape), weight)


@given(
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    pads=st.tuples(*[st.integers(0, 2)] * 2),
)
@settings(max_examples=25, deadline=None)
def test_any_geometry_of_a_convolution(kernel: int, stride: int, dilation: int, pads: tuple[int, int]) -> None:
    model = conv(1, 4, 4, [kernel], strides=[stride], dilations=[dilation], pads=list(pads), group=2)
    (layer,) = linear_layers(model.graph)
    data = normal(2, 4, 11)
    rows = rows_of(data, layer.geometry, 1000)
    found = np.concatenate(list(rows @ matrix(layer, numbers(layer.weight))), axis=1)
    expected = run(model, {"x": data})["conv_y"].transpose(0, 2, 1).reshape(-1, 4)
    np.testing.assert_allclose(found + numbers(model.graph.initializers["conv.bias"]), expected, rtol=0, atol=2e-5)


def test_layers_that_are_no_rows_times_a_matrix_are_left_out() -> None:
    net = Net(seed=3)
    x = net.input("x", ["n", 4, 8, 8])
    same_pad = net.op("Conv", [x, net.weight("same.weight", 4, 4, 3, 3)], "same", auto_pad="SAME_UPPER")
    up = net.op("ConvTranspose", [same_pad, net.weight("up.weight", 4, 4, 2, 2)], "up", strides=[2, 2])
    batched = net.op("MatMul", [up, net.weight("batched.weight", 4, 16, 5)], "batched")
    model = net.model(net.op("MatMul", [batched, net.op("Transpose", [batched], "t", perm=[0, 1, 3, 2])], "product"))
    assert linear_layers(model.graph) == []


def test_a_few_rows_are_rows_of_all() -> None:
    data = normal(3, 4, 11, 9)
    for name in ("conv 2-D", "depthwise"):
        (layer,) = linear_layers(LAYERS[name].graph)
        everything, some = (rows_of(data, layer.geometry, count) for count in (10_000, 40))
        assert 30 <= some.shape[1] <= 40 < everything.shape[1]
        known = {row.tobytes() for row in everything.transpose(1, 0, 2)}
        assert {row.tobytes() for row in some.transpose(1, 0, 2)} <= known
        assert len({row.tobytes() for row in some.transpose(1, 0, 2)}) == some.shape[1]


@pytest.mark.parametrize("build", [residual_net, mixed_net, token_net])
def test_neither_order_nor_size_of_batches_makes_a_difference(build: Any) -> None:
    model = simplify(build())
    shape = [dim for dim in model.graph.inputs[0].shape or () if isinstance(dim, int)]
    data = normal(11, *shape)
    first = collected(model, batches(data, 11), rows=60)
    for size, order in ((1, np.arange(11)), (4, np.arange(11)[::-1]), (3, np.random.default_rng(1).permutation(11))):
        again = collected(model, batches(data[order], size), rows=60)
        assert all(map(same, first, again))


def test_of_many_samples_some_are_taken_the_same_in_every_order() -> None:
    model, data = LAYERS["gemm"], normal(4 * SAMPLES, 12)
    (found,) = collected(model, batches(data, 64))
    assert 0.7 * SAMPLES < found.rows.shape[1] < 1.3 * SAMPLES
    (again,) = collected(model, batches(data[::-1], 50))
    assert same(found, again)
    assert {row.tobytes() for row in found.rows[0]} <= {row.tobytes() for row in data}


def test_rows_are_about_as_many_as_asked_for_and_from_every_sample() -> None:
    model, data = LAYERS["matmul, 3-D"], normal(40, 5, 12)
    (found,) = collected(model, batches(data, 8), rows=80)
    assert found.rows.shape == (1, 80, 12)
    known = [{row.tobytes() for row in sample} for sample in data]
    taken = {row.tobytes() for row in found.rows[0]}
    assert all(len(taken & sample) == 2 for sample in known)
    (all_rows,) = collected(model, batches(data, 8), rows=10_000)
    assert all_rows.rows.shape == (1, 200, 12)


def static(batch: int) -> ir.Model:
    net = Net(seed=3)
    return net.model(net.matmul(net.input("x", [batch, 5, 12]), "layer", 12, 7))


@pytest.mark.parametrize("batch", [1, 4])
def test_a_static_batch_axis_keeps_batches_whole_in_any_order(batch: int) -> None:
    data = normal(24, 5, 12)
    whole = batches(data, batch)
    (found,), (again,) = (collected(static(batch), given) for given in (whole, whole[::-1]))
    assert same(found, again)
    assert found.rows.shape == (1, 120, 12)


def test_a_static_batch_gives_as_many_rows_as_its_samples_one_by_one() -> None:
    data = normal(64, 5, 12)
    (alone,), (together,) = (collected(static(size), batches(data, size), rows=128) for size in (1, 8))
    assert alone.rows.shape[1] == 128
    assert 100 <= together.rows.shape[1] <= 128


def test_extremes_are_those_of_all_positions_of_each_half() -> None:
    model, data = LAYERS["conv 2-D"], normal(9, 4, 11, 9)
    (found,) = collected(model, batches(data, 3), rows=9)
    assert found.low.shape == found.high.shape == (2, 4)
    np.testing.assert_array_equal(found.low.min(0), data.min((0, 2, 3)))
    np.testing.assert_array_equal(found.high.max(0), data.max((0, 2, 3)))
    assert not np.array_equal(found.low[0], found.low[1])
    first, second = found.halves
    assert (first.start, second.start, second.stop) == (0, first.stop, found.rows.shape[1])


def test_one_sample_is_both_halves() -> None:
    data = normal(1, 12)
    (found,) = collected(LAYERS["gemm"], batches(data, 1))
    assert [len(found.rows[0, half]) for half in found.halves] == [1, 1]
    np.testing.assert_array_equal(found.low[0], found.low[1])


def test_a_single_call_is_one_sample_that_is_not_cut() -> None:
    data = normal(6, 12)
    (found,) = collected(LAYERS["gemm"], [Batch({"x": data}, single=True)])
    assert found.rows.shape == (1, 12, 12), "both halves of it"
    assert {row.tobytes() for row in found.rows[0]} == {row.tobytes() for row in data}


def test_samples_of_different_lengths() -> None:
    net = Net(seed=3)
    model = net.model(net.matmul(net.input("x", ["n", "s", 12]), "layer", 12, 7))
    (found,) = collected(model, [Batch({"x": normal(2, 3, 12)}), Batch({"x": normal(1, 9, 12, seed=1)})])
    assert found.rows.shape == (1, 2 * 3 + 9, 12)


def test_layers_that_read_one_value_alike_share_rows() -> None:
    model = simplify(token_net())
    keys = {layer.name: rows_key(layer) for layer in linear_layers(model.graph)}
    assert keys["query"] == keys["key"] == keys["value"] != keys["out"]
    found = collect_rows(model, linear_layers(model.graph), batches(normal(4, 12, 16), 2), samples=4, threads=1)
    assert set(found) == set(keys.values())


def test_even_a_sample_that_none_chose_gives_rows() -> None:
    for seed in range(8):  # one of many samples, as counted: some checksum chooses it, or it is the first
        (found,) = collected(LAYERS["gemm"], batches(normal(1, 12, seed=seed), 1), samples=100 * SAMPLES)
        assert found.rows.shape == (1, 2, 12)
    assert ROWS > SAMPLES


def test_what_many_wide_layers_read_is_limited_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = simplify(residual_net()), batches(normal(64, 3, 16, 16), 8)
    before = collected(model, given)
    held = sum(one.rows.nbytes for one in {id(one): one for one in before}.values())
    monkeypatch.setattr("edgekit.calibration.layer_rows.ROWS_BYTES", held // 4)
    after = collected(model, given)
    assert held // 8 < sum(one.rows.nbytes for one in {id(one): one for one in after}.values()) <= held // 3
    assert all(one.rows.shape[1] > 0 for one in after)
