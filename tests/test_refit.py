"""Weights that are fitted to the inputs that are left: nearest in the least squares, and nearer than the cut alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import edgekit
from edgekit.calibration.layer_rows import linear_layers, matrix, numbers
from edgekit.calibration.refit import DAMPING, compensate, refit
from edgekit.data import Batch
from edgekit.graph.io import load_annotated, save_onnx
from edgekit.method import LayerMethod, Method
from edgekit.passes.simplify import simplify
from edgekit.pruning import Prune
from graphs import Array, initializers, normal, poked, run
from networks import Net

FLOAT = Method(layers=(LayerMethod(match="*", precision="float"),))
GONE = slice(4, 6)
"""Of the inputs of each group."""


def mixed(count: int, *shape: int, seed: int = 0) -> Array:
    """Channels, on axis 1, that are mixtures of a few, and not zero in the mean."""
    few = np.random.default_rng(seed).normal(1, 1, (count, 4, *shape[1:]))
    mix = np.random.default_rng(7).normal(size=(shape[0], 4))
    return np.asarray(np.einsum("ck,nk...->nc...", mix, few) + 0.1 * normal(count, *shape, seed=seed + 1), np.float32)


def conv(group: int = 1) -> ir.Model:
    net = Net(seed=1)
    return net.model(net.conv(net.input("x", ["n", 12, 6, 6]), "a", 12, 8, 1, group=group))


def gemm(trans_b: int = 1, bias: tuple[int, ...] = (8,)) -> ir.Model:
    net = Net(seed=1)
    x, shape = net.input("x", ["n", 12]), (8, 12) if trans_b else (12, 8)
    inputs = [x, net.weight("a.weight", *shape), net.weight("a.bias", *bias)]
    return net.model(net.op("Gemm", inputs, "a", transB=trans_b))


def product(bias: bool) -> ir.Model:
    net = Net(seed=1)
    y = net.matmul(net.input("x", ["n", 12]), "a", 12, 8)
    return net.model(net.op("Add", [y, net.weight("a.bias", 8)], "a.add") if bias else y)


def cut(model: ir.Model) -> ir.Model:
    """The same, where the layer weighs some of its inputs with zero."""
    [layer] = linear_layers(model.graph)
    inputs = 1 if layer.node.op_type == "Conv" or layer.node.attributes.get_int("transB", 0) else 0
    index = (slice(None), GONE) if inputs else GONE
    return poked(model.clone(), layer.weight.name or "", lambda array: array.__setitem__(index, 0))


def lost(model: ir.Model, other: ir.Model, x: Array) -> float:
    """Mean square of what differs, as a share of what is there."""
    [ours], [theirs] = run(other, {"x": x}).values(), run(model, {"x": x}).values()
    return float(np.mean((ours - theirs) ** 2) / np.mean(theirs**2))


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (conv(), (12, 6, 6)),
        (conv(group=2), (12, 6, 6)),
        (gemm(), (12,)),
        (gemm(trans_b=0), (12,)),
        (gemm(bias=(1, 8)), (12,)),
        (gemm(bias=(1,)), (12,)),
        (product(bias=True), (12,)),
        (product(bias=False), (12,)),
    ],
    ids=["conv", "grouped", "gemm", "gemm-rows", "gemm-row-bias", "gemm-one-bias", "matmul-bias", "matmul"],
)
def test_what_is_left_makes_up_for_what_went(model: ir.Model, shape: tuple[int, ...]) -> None:
    model = simplify(model)
    masked, data, new = cut(model), mixed(256, *shape), mixed(64, *shape, seed=99)
    fitted = refit(masked, model, [Batch({"x": data})], samples=256, threads=1)
    assert lost(model, fitted, new) < 0.05 * lost(model, masked, new)
    [layer] = linear_layers(fitted.graph)
    assert not matrix(layer, numbers(layer.weight))[:, GONE].any()  # it can still be cut
    shapes = [{name: value.shape for name, value in one.graph.initializers.items()} for one in (fitted, model)]
    assert shapes[0] == shapes[1]
    assert lost(model, cut(model), new) == lost(model, masked, new)  # which was not changed


def test_layers_that_lost_nothing_and_shared_weights_stay() -> None:
    net = Net(seed=1)
    x = net.input("x", ["n", 12])
    shared = net.weight("w", 12, 8)
    y = net.op("Add", [net.op("MatMul", [x, shared], "a"), net.op("MatMul", [x, shared], "b")], "sum")
    model = simplify(net.model(net.matmul(y, "c", 8, 4)))
    masked = poked(model.clone(), "w", lambda array: array.__setitem__(GONE, 0))
    fitted = refit(masked, model, [Batch({"x": mixed(64, 12)})], samples=64, threads=1)
    assert initializers(fitted) == initializers(masked)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 12), st.booleans())
def test_the_weights_are_those_of_damped_least_squares(seed: int, inputs: int, centered: bool) -> None:
    rng = np.random.default_rng(seed)
    rows, weight = rng.normal(1, 1, (60, inputs)) @ rng.normal(size=(inputs, inputs)), rng.normal(size=(inputs, 3))
    gone = np.zeros(inputs, bool)
    gone[: rng.integers(1, inputs)] = True
    extended = np.c_[rows, np.ones(60)]
    new, shift = compensate(weight, extended.T @ extended, gone, centered=centered)
    kept, wanted = rows[:, ~gone], rows[:, gone] @ weight[gone]
    means = (kept.mean(0), wanted.mean(0)) if centered else (0, 0)
    kept, wanted = kept - means[0], wanted - means[1]
    spread = kept.T @ kept
    damped = np.sqrt(DAMPING * np.trace(spread) / len(spread)) * np.eye(len(spread))
    gain, *_ = np.linalg.lstsq(np.r_[kept, damped], np.r_[wanted, np.zeros((len(spread), 3))], rcond=None)
    assert np.allclose(new[~gone], weight[~gone] + gain, rtol=1e-6, atol=1e-8)
    assert not new[gone].any()
    assert np.allclose(shift, means[1] - means[0] @ gain if centered else 0, atol=1e-8)


def network(path: Path) -> Path:
    net = Net(seed=3)
    x = net.conv_relu(net.input("x", ["n", 12, 6, 6]), "a", 12, 16)
    x = net.op("Flatten", [net.conv_relu(x, "b", 16, 16)])
    save_onnx(net.model(net.gemm(x, "c", 16 * 36, 5)), path)
    return path


def test_a_pruned_file_is_fitted_unless_it_is_to_stay_as_it_was_cut(tmp_path: Path) -> None:
    source, data, new = network(tmp_path / "m.onnx"), mixed(128, 12, 6, 6), mixed(32, 12, 6, 6, seed=99)
    [wanted] = run(source, {"x": new}).values()

    def nearness(model: Callable[[dict[str, Array]], dict[str, Array]]) -> float:
        [found] = model({"x": new}).values()
        return -float(np.mean((found - wanted) ** 2))

    found = {}
    for recover in (False, True):
        prune = Prune(ratio=0.25, recover=recover, round_to=0)
        record = edgekit.compress(
            source,
            tmp_path / str(recover),
            calibration={"x": data},
            method=FLOAT,
            prune=prune,
            proxy="none",
            evaluate=nearness,
        ).record
        assert record.pruned is not None and record.simulated_metric is not None
        found[recover] = record.pruned
        left = record.pruned.after if recover else record.pruned.cut
        assert record.simulated_metric.value == pytest.approx(left, rel=1e-4)
    cut, fitted = found[False], found[True]
    assert (cut.after, cut.recovered) == (None, "")
    assert fitted.before == cut.before == pytest.approx(0, abs=1e-9)
    assert fitted.cut == cut.cut and "fit of each layer" in fitted.recovered
    assert fitted.cut is not None and fitted.after is not None and fitted.after > 0.5 * fitted.cut
    assert "cut, " in fitted.told and "after recovery; recovered by a fit of each layer" in fitted.told


def test_quantization_is_held_against_the_pruned_model_and_that_is_said(tmp_path: Path) -> None:
    source, data = network(tmp_path / "m.onnx"), mixed(64, 12, 6, 6)
    record = edgekit.compress(source, tmp_path / "out", calibration={"x": data}, prune=Prune(ratio=0.25)).record
    assert record.proxy is not None
    told = f"{record.proxy.name} with the pruned model in float: {record.proxy.after:.4g} in simulation"
    assert told in (tmp_path / "out" / "report.md").read_text()


def test_without_a_metric_what_is_left_of_the_decisions_is_told(tmp_path: Path) -> None:
    source, data = network(tmp_path / "m.onnx"), mixed(64, 12, 6, 6)
    prune = Prune(ratio=0.25, round_to=0)
    record = edgekit.compress(
        source, tmp_path / "out", calibration={"x": data}, samples=32, method=FLOAT, prune=prune, proxy="none"
    ).record
    pruned = load_annotated(tmp_path / "out" / "model.onnx")
    scores = [run(model, {"x": data}).popitem()[1].argmax(1) for model in (source, pruned)]
    [note] = [one for one in record.notes if "with the unpruned model" in one]
    said = re.fullmatch(
        r"argmax agreement of 'c_y' with the unpruned model: ([\d.]+), on 32 of the calibration samples", note
    )
    assert said and float(said[1]) == pytest.approx(np.mean(scores[0] == scores[1]), abs=0.1)
