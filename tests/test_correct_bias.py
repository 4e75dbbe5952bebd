"""Bias correction: in the mean over the calibration rows, a lowered layer's outputs are those of the float one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgekit.calibration.calibrate import calibrate
from edgekit.calibration.correct_bias import correct_bias
from edgekit.calibration.layer_rows import Rows, collect_rows, linear_layers
from edgekit.calibration.round_weights import round_weights
from edgekit.data import Batch
from edgekit.graph.annotations import get_params
from edgekit.graph.io import load_annotated, save_annotated
from edgekit.graph.run import Session
from edgekit.lowering.qdq import lower_qdq
from edgekit.method import LayerMethod, Method
from edgekit.passes.assign_specs import assign_precisions, assign_specs
from edgekit.passes.simplify import simplify
from edgekit.passes.unify_params import unify_params
from edgekit.target import load_target
from graphs import Array, initializers, normal, op_types
from networks import Net, residual_net

PORTABLE, X86 = load_target("portable"), load_target("x86-onnxruntime")
METHOD = Method(weights="int4", calibrator="percentile", rounding="nearest")
"""Coarse, so that means are moved by far more than rounding moves sums."""


def product() -> ir.Model:
    net = Net(seed=1)
    x = net.matmul(net.input("x", ["n", 5, 12]), "layer", 12, 7)
    return simplify(net.model(net.op("Add", [net.weight("layer.bias", 7), x], "add")))


def gemm(bias: bool = True, **attributes: Any) -> ir.Model:
    net = Net(seed=1)
    inputs = [net.input("x", ["n", 12]), net.weight("layer.weight", 7, 12)]
    inputs += [net.weight("layer.bias", 7)] if bias else []
    return simplify(net.model(net.op("Gemm", inputs, "layer", transB=1, **attributes)))


def conv(bias: bool = True, group: int = 1) -> ir.Model:
    net = Net(seed=1)
    return simplify(net.model(net.conv(net.input("x", ["n", 4, 6, 6]), "layer", 4, 8, bias=bias, group=group)))


def no_bias() -> ir.Model:
    net = Net(seed=1)
    return simplify(net.model(net.matmul(net.input("x", ["n", 5, 12]), "layer", 12, 7)))


MODELS: dict[str, tuple[Callable[[], ir.Model], tuple[int, ...]]] = {
    "MatMul and Add": (product, (5, 12)),
    "Gemm": (gemm, (12,)),
    "Gemm without bias": (lambda: gemm(bias=False), (12,)),
    "Conv": (conv, (4, 6, 6)),
    "Conv without bias": (lambda: conv(bias=False), (4, 6, 6)),
    "grouped Conv": (lambda: conv(group=2), (4, 6, 6)),
    "depthwise Conv": (lambda: conv(bias=False, group=4), (4, 6, 6)),
}


def lopsided(*shape: int) -> Array:
    """Positive, with a long tail that is clipped."""
    return np.asarray(np.exp(normal(*shape)), np.float32)


def annotated(model: ir.Model, data: Array, method: Method = METHOD) -> tuple[ir.Model, Rows]:
    batches = [Batch({"x": data})]
    model = assign_specs(assign_precisions(model, method), PORTABLE, method)
    rows = collect_rows(model, linear_layers(model.graph), batches, samples=len(data), rows=100_000, threads=1)
    calibrated = calibrate(model, PORTABLE, batches, method=method, rows=rows, threads=1)
    return unify_params(calibrated, PORTABLE), rows


def shifts(model: ir.Model) -> dict[str, Array]:
    found = {layer.name: get_params(layer.weight) for layer in linear_layers(model.graph)}
    return {name: params.shift for name, params in found.items() if params is not None and params.shift is not None}


def means(model: ir.Model, data: Array) -> Array:
    """Of each channel of the output."""
    (output,) = Session(model, optimize=False, threads=1).run({"x": data}).values()
    channel = 1 if output.ndim == 4 else output.ndim - 1
    return np.asarray(output.mean(tuple(i for i in range(output.ndim) if i != channel), dtype=np.float64))


@pytest.mark.parametrize("name", MODELS)
def test_the_mean_of_the_lowered_output_is_the_float_one(name: str) -> None:
    build, shape = MODELS[name]
    data = lopsided(16, *shape)
    model, rows = annotated(build(), data)
    exact, plain = means(model, data), means(lower_qdq(model, PORTABLE), data)
    corrected = means(lower_qdq(correct_bias(model, rows), PORTABLE), data)
    moved = np.abs(plain - exact).max()
    assert moved > 1e-2
    np.testing.assert_allclose(corrected, exact, rtol=0, atol=1e-3 * moved)


@pytest.mark.parametrize("name", MODELS)
def test_a_shift_is_what_quantization_adds_in_the_mean(name: str) -> None:
    build, shape = MODELS[name]
    data = lopsided(16, *shape)
    model, rows = annotated(build(), data)
    (shift,) = shifts(correct_bias(model, rows)).values()
    assert shift.dtype == np.float32
    added = means(lower_qdq(model, PORTABLE), data) - means(model, data)
    np.testing.assert_allclose(shift, added, rtol=0, atol=1e-5 * np.abs(means(model, data)).max())


def test_a_bias_in_int32_is_as_near_as_its_grid() -> None:
    data = lopsided(16, 4, 6, 6)
    method = Method(calibrator="minmax", rounding="nearest")
    model, rows = annotated(conv(bias=False), data, method)
    rules = X86.quantization.model_copy(update={"output_q": "when-consumed"})
    target = X86.model_copy(update={"quantization": rules})
    corrected = lower_qdq(correct_bias(model, rows), target)
    assert "layer_bias_quantized" in corrected.graph.initializers
    exact, plain, found = (means(one, data) for one in (model, lower_qdq(model, target), corrected))
    grid, params = get_params(model.graph.inputs[0]), get_params(linear_layers(model.graph)[0].weight)
    assert grid is not None and params is not None
    assert np.abs(plain - exact).max() > 1e-3
    assert np.abs(found - exact).max() < 0.51 * float((grid.scale * params.scale).max()) + 1e-4


def test_a_convolution_without_a_bias_gets_one_when_it_is_lowered() -> None:
    data = lopsided(16, 4, 6, 6)
    model, rows = annotated(conv(bias=False), data)
    corrected = correct_bias(model, rows)
    layer = next(node for node in corrected.graph if node.op_type == "Conv")
    assert len(layer.inputs) == 2, "the float model has none"
    lowered = next(node for node in lower_qdq(corrected, PORTABLE).graph if node.op_type == "Conv")
    assert lowered.inputs[2] is not None and lowered.inputs[2].const_value is not None
    np.testing.assert_array_equal(lowered.inputs[2].const_value.numpy(), -shifts(corrected)["layer"])
    assert len(next(node for node in lower_qdq(model, PORTABLE).graph if node.op_type == "Conv").inputs) == 2


def between() -> ir.Model:
    """What follows the product is no bias."""
    net = Net(seed=1)
    x = net.op("Tanh", [net.matmul(net.input("x", ["n", 5, 12]), "layer", 12, 7)], "tanh")
    return simplify(net.model(net.op("Add", [x, net.weight("bias", 7)], "add")))


def read_twice() -> ir.Model:
    net = Net(seed=1)
    x = net.matmul(net.input("x", ["n", 5, 12]), "layer", 12, 7)
    return simplify(net.model(net.op("Add", [x, net.weight("bias", 7)], "add"), net.op("Tanh", [x], "tanh")))


@pytest.mark.parametrize("build", [no_bias, between, read_twice, lambda: gemm(alpha=0.5), lambda: gemm(beta=2.0)])
def test_where_a_bias_has_no_place_there_is_no_shift(build: Callable[[], ir.Model]) -> None:
    model = build()
    shape = [dim for dim in model.graph.inputs[0].shape or () if isinstance(dim, int)]
    data = lopsided(16, *shape)
    model, rows = annotated(model, data)
    assert rows
    assert shifts(correct_bias(model, rows)) == {}


def test_layers_that_share_a_weight_get_none() -> None:
    net = Net(seed=1)
    x = net.input("x", ["n", 12])
    a = net.gemm(x, "a", 12, 12)
    b = net.op("Gemm", [net.op("Relu", [a], "relu"), "a.weight", "a.bias"], "b", transB=1)
    c = net.gemm(b, "c", 12, 5)
    model, rows = annotated(simplify(net.model(c)), lopsided(16, 12))
    assert set(shifts(correct_bias(model, rows))) == {"c"}


def test_layers_that_share_a_bias_are_corrected_apart() -> None:
    net = Net(seed=1)
    x = net.input("x", ["n", 12])
    a = net.gemm(x, "a", 12, 12)
    b = net.op("Gemm", [x, net.weight("b.weight", 12, 12), "a.bias"], "b", transB=1)
    model, rows = annotated(simplify(net.model(a, b)), lopsided(16, 12))
    corrected = correct_bias(model, rows)
    data = {"x": lopsided(16, 12)}
    exact = Session(model, optimize=False, threads=1).run(data)
    plain, found = (
        Session(lower_qdq(one, PORTABLE), optimize=False, threads=1).run(data) for one in (model, corrected)
    )
    for name in exact:
        moved = np.abs(plain[name].mean(0) - exact[name].mean(0)).max()
        assert np.abs(found[name].mean(0) - exact[name].mean(0)).max() < 1e-3 * moved


def test_the_float_model_stays_as_it_is() -> None:
    data = normal(16, 3, 16, 16)
    model, rows = annotated(simplify(residual_net()), data)
    before, grids = initializers(model), shifts(model)
    corrected = correct_bias(model, rows)
    assert grids == shifts(model) == {}, "not the one that is given"
    assert initializers(corrected) == initializers(model) == before
    assert op_types(corrected) == op_types(model)
    first, second = (Session(one, optimize=False, threads=1).run({"x": data}) for one in (model, corrected))
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert set(shifts(corrected)) == {layer.name for layer in linear_layers(model.graph)}


def test_a_layer_that_stays_float_is_not_shifted() -> None:
    data = normal(16, 3, 16, 16)
    method = METHOD.model_copy(update={"layers": (LayerMethod(match="a1", precision="float"),)})
    model, rows = annotated(simplify(residual_net()), data, method)
    assert "a1" not in shifts(correct_bias(model, rows))
    corrected = correct_bias(annotated(simplify(residual_net()), data)[0], rows)
    lowered = lower_qdq(corrected, PORTABLE, keep_float=frozenset({"a1"}))
    node = next(node for node in lowered.graph if node.name == "a1")
    assert node.inputs[2] is not None and node.inputs[2].name == "a1.bias"


def test_shifts_come_back_from_a_file(tmp_path: Path) -> None:
    data = normal(16, 3, 16, 16)
    model, rows = annotated(simplify(residual_net()), data)
    corrected = correct_bias(model, rows)
    save_annotated(corrected, tmp_path / "model.onnx")
    found, expected = shifts(load_annotated(tmp_path / "model.onnx")), shifts(corrected)
    assert list(found) == list(expected)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_a_shift_knows_of_the_codes_that_were_chosen() -> None:
    data = lopsided(32, 5, 12)
    method = METHOD.model_copy(update={"rounding": "gptq"})
    model, rows = annotated(product(), data, method)
    model = round_weights(model, [Batch({"x": data})], samples=len(data), method=method, threads=1)
    corrected = means(lower_qdq(correct_bias(model, rows), PORTABLE), data)
    np.testing.assert_allclose(corrected, means(model, data), rtol=0, atol=1e-4)


def test_weights_alone_are_made_up_for() -> None:
    method = Method(weights="int4", block_size=16, activations="none", rounding="nearest")
    data = lopsided(16, 5, 12)
    model, rows = annotated(product(), data, method)
    exact, plain = means(model, data), means(lower_qdq(model, X86), data)
    found = means(lower_qdq(correct_bias(model, rows), X86), data)
    moved = np.abs(plain - exact).max()
    assert moved > 1e-3
    assert np.abs(found - exact).max() < 1e-3 * moved + 1e-5


def test_without_rows_there_are_no_shifts() -> None:
    model, _ = annotated(product(), lopsided(16, 5, 12))
    assert shifts(correct_bias(model, {})) == {}
