"""Rounding by what layers read: codes that reach the file and the runtime as they are, and less error than the nearest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgekit.calibration import hessians
from edgekit.calibration import round_weights as rounding
from edgekit.calibration.calibrate import calibrate
from edgekit.calibration.layer_rows import linear_layers
from edgekit.calibration.round_weights import round_weights
from edgekit.data import Batch
from edgekit.graph.annotations import get_params, set_params
from edgekit.graph.io import load_annotated, save_annotated
from edgekit.lowering.qdq import lower_qdq
from edgekit.method import LayerMethod, Method
from edgekit.passes.assign_specs import assign_specs
from edgekit.passes.simplify import simplify
from edgekit.passes.unify_params import unify_params
from edgekit.quant.affine import choose_params, fake_quantize, quantize
from edgekit.quant.spec import QuantParams, QuantSpec
from edgekit.target import load_target
from graphs import Array, initializers, normal, run
from networks import Net, mixed_net

PORTABLE, X86 = load_target("portable"), load_target("x86-onnxruntime")
INT4 = Method(weights="int4", calibrator="minmax", bias_correction=False)
BLOCKS = Method(weights="int4", block_size=32, activations="none", calibrator="minmax", bias_correction=False)
FEATURES = 64


def correlated(count: int, *shape: int, seed: int = 0) -> Array:
    """Channels, the last of them, that are mixtures of a few."""
    rng = np.random.default_rng(7)
    mix = rng.normal(size=(6, shape[-1])) + 0.05 * rng.normal(size=(6, shape[-1]))
    few = np.random.default_rng(seed).normal(size=(count, *shape[:-1], 6))
    return np.asarray(few @ mix + 0.1 * normal(count, *shape, seed=seed + 1), np.float32)


def pictures(count: int, channels: int, side: int, seed: int = 0) -> Array:
    return np.ascontiguousarray(np.moveaxis(correlated(count, side, side, channels, seed=seed), -1, 1))


def products() -> ir.Model:
    net = Net(seed=1)
    x = net.matmul(net.input("x", ["n", 5, FEATURES]), "a", FEATURES, 48)
    x = net.op("Add", [x, net.weight("a.bias", 48)], "a.add")
    return simplify(net.model(net.matmul(x, "b", 48, 16)))


def gemms() -> ir.Model:
    net = Net(seed=1)
    x = net.gemm(net.input("x", ["n", FEATURES]), "a", FEATURES, 48)
    inputs = [x, net.weight("b.weight", 48, 16), net.weight("b.bias", 16)]
    return simplify(net.model(net.op("Gemm", inputs, "b")))


def convolutions() -> ir.Model:
    net = Net(seed=1)
    x = net.conv(net.input("x", ["n", 8, 7, 7]), "a", 8, 12)
    x = net.conv(x, "b", 12, 12, group=3)
    return simplify(net.model(net.conv(x, "c", 12, 12, group=12, bias=False)))


MODELS = {"MatMul": (products, (5, FEATURES)), "Gemm": (gemms, (FEATURES,)), "Conv": (convolutions, (8, 7, 7))}


def data_for(kind: str, count: int, seed: int = 0) -> Array:
    return pictures(count, 8, 7, seed) if kind == "Conv" else correlated(count, *MODELS[kind][1], seed=seed)


def calibrated(model: ir.Model, data: Array, method: Method) -> ir.Model:
    model = assign_specs(model, PORTABLE, method)
    return unify_params(calibrate(model, PORTABLE, [Batch({"x": data})], method=method, threads=1), PORTABLE)


def rounded(model: ir.Model, data: Array, method: Method, *, size: int = 16, **choices: Any) -> ir.Model:
    batches = [Batch({"x": data[i : i + size]}) for i in range(0, len(data), size)]
    return round_weights(model, batches, samples=len(data), method=method, threads=1, **choices)


def weights(model: ir.Model) -> dict[str, QuantParams]:
    return {
        layer.name: params for layer in linear_layers(model.graph) if (params := get_params(layer.weight)) is not None
    }


def codes(model: ir.Model) -> dict[str, Array]:
    return {name: params.codes for name, params in weights(model).items() if params.codes is not None}


def same_codes(a: ir.Model, b: ir.Model) -> bool:
    first, second = codes(a), codes(b)
    return (
        bool(first) and list(first) == list(second) and all(np.array_equal(first[name], second[name]) for name in first)
    )


def error(model: ir.Model, data: Array, target: Any = PORTABLE) -> float:
    """Of the lowered model's outputs, mean square."""
    lowered, exact = run(lower_qdq(model, target), {"x": data}), run(model, {"x": data})
    return float(np.mean([np.square(lowered[name] - exact[name]).mean() for name in exact]))


@pytest.mark.parametrize("kind", MODELS)
def test_the_output_of_the_lowered_model_is_nearer_than_with_the_nearest_codes(kind: str) -> None:
    model, data, fresh = MODELS[kind][0](), data_for(kind, 96), data_for(kind, 32, seed=9)
    nearest = calibrated(model, data, INT4)
    chosen = rounded(nearest, data, INT4)
    assert error(chosen, fresh) < 0.8 * error(nearest, fresh)


@pytest.mark.parametrize("kind", MODELS)
def test_codes_have_the_weights_shape_and_type_and_stand_near_the_nearest(kind: str) -> None:
    data = data_for(kind, 48)
    chosen = rounded(calibrated(MODELS[kind][0](), data, INT4), data, INT4)
    for layer in linear_layers(chosen.graph):
        params = get_params(layer.weight)
        assert params is not None and params.codes is not None and layer.weight.const_value is not None
        weight = layer.weight.const_value.numpy()
        nearest = quantize(weight, params)
        assert params.codes.shape == weight.shape
        assert params.codes.dtype == nearest.dtype
        assert params.codes.min() >= params.qmin
        assert params.codes.max() <= params.qmax
        assert not np.array_equal(params.codes, nearest)


@pytest.mark.parametrize(("kind", "method"), [*((kind, INT4) for kind in MODELS), ("MatMul", BLOCKS), ("Gemm", BLOCKS)])
def test_codes_come_back_from_a_file(kind: str, method: Method, tmp_path: Path) -> None:
    data = data_for(kind, 32)
    chosen = rounded(calibrated(MODELS[kind][0](), data, method), data, method)
    assert set(codes(chosen)) == {layer.name for layer in linear_layers(chosen.graph)}
    save_annotated(chosen, tmp_path / "model.onnx")
    again = load_annotated(tmp_path / "model.onnx")
    assert weights(again) == weights(chosen)
    assert same_codes(chosen, again)


@pytest.mark.parametrize("kind", MODELS)
def test_codes_reach_the_lowered_graph_exactly(kind: str) -> None:
    method = Method(calibrator="minmax", rounding="gptq")
    data = data_for(kind, 48)
    chosen = rounded(calibrated(MODELS[kind][0](), data, method), data, method)
    stored = lowered_codes(lower_qdq(chosen, PORTABLE))
    for name, expected in codes(chosen).items():
        assert np.array_equal(stored[f"{name}.weight_quantized"], expected)
    nearest = lowered_codes(lower_qdq(calibrated(MODELS[kind][0](), data, method), PORTABLE))
    assert any(not np.array_equal(stored[name], nearest[name]) for name in nearest)


def lowered_codes(model: ir.Model) -> dict[str, Array]:
    return {
        name: value.const_value.numpy()
        for name, value in model.graph.initializers.items()
        if name.endswith("_quantized") and value.const_value is not None
    }


def test_blocks_of_weights_alone_reach_the_graph_and_lower_the_error() -> None:
    data, fresh = correlated(96, 5, FEATURES), correlated(32, 5, FEATURES, seed=9)
    nearest = calibrated(products(), data, BLOCKS)
    chosen = rounded(nearest, data, BLOCKS)
    assert {name: params.block_size for name, params in weights(chosen).items()} == {"a": 32, "b": 32}
    stored = lowered_codes(lower_qdq(chosen, X86))
    for name, expected in codes(chosen).items():
        assert np.array_equal(stored[f"{name}.weight_quantized"].astype(np.int8), expected)
    assert error(chosen, fresh, X86) < 0.8 * error(nearest, fresh, X86)


def test_blocks_of_a_transposed_gemm_are_rounded_like_those_of_a_product() -> None:
    """The same layer, its weight stored as `(N, K)` and as `(K, N)`."""
    weight, data = normal(48, FEATURES), correlated(64, FEATURES)
    found = []
    for transposed in (1, 0):
        net = Net(seed=1)
        inputs = [net.input("x", ["n", FEATURES]), net.constant("a.weight", weight if transposed else weight.T.copy())]
        model = simplify(net.model(net.op("Gemm", inputs, "a", transB=transposed)))
        chosen = codes(rounded(calibrated(model, data, BLOCKS), data, BLOCKS))["a"]
        found.append(chosen if transposed else chosen.T)
    assert np.array_equal(found[0], found[1])


class Passes:
    """Batches that count how often they are gone through."""

    def __init__(self, data: Array) -> None:
        self.data, self.count = data, 0

    def __iter__(self) -> Iterator[Batch]:
        self.count += 1
        yield from (Batch({"x": self.data[i : i + 16]}) for i in range(0, len(self.data), 16))


@pytest.mark.parametrize("method", [INT4, BLOCKS], ids=["per channel", "blocks"])
@pytest.mark.parametrize("room", [1, 40_000])
def test_groups_of_hessians_make_no_difference(room: int, method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    data = correlated(32, 5, FEATURES)
    start = calibrated(products(), data, method)
    whole = rounded(start, data, method)
    passes = Passes(data)
    monkeypatch.setattr(rounding, "HESSIAN_BYTES", room)
    assert same_codes(round_weights(start, passes, samples=32, method=method, threads=1), whole)
    assert passes.count == (2 if room == 1 else 1)


def test_only_the_layers_that_ask_for_it_are_rounded() -> None:
    data = correlated(32, 5, FEATURES)
    method = INT4.model_copy(update={"rounding": "nearest", "layers": (LayerMethod(match="b", rounding="gptq"),)})
    assert set(codes(rounded(calibrated(products(), data, method), data, method))) == {"b"}
    method = INT4.model_copy(update={"layers": (LayerMethod(match="b", rounding="nearest"),)})
    assert set(codes(rounded(calibrated(products(), data, method), data, method))) == {"a"}
    method = INT4.model_copy(update={"rounding": "nearest"})
    assert codes(rounded(calibrated(products(), data, method), data, method)) == {}


def test_shared_weights_keep_the_nearest_codes() -> None:
    net = Net(seed=1)
    x = net.input("x", ["n", 5, FEATURES])
    a = net.matmul(x, "a", FEATURES, 16)
    b = net.op("MatMul", [net.op("Tanh", [x], "tanh"), "a.weight"], "b")
    model = simplify(net.model(net.op("Sub", [a, b], "out")))
    data = correlated(32, 5, FEATURES)
    assert codes(rounded(calibrated(model, data, INT4), data, INT4)) == {}


def test_neither_order_nor_size_of_batches_nor_the_given_model_changes() -> None:
    model, data = products(), correlated(30, 5, FEATURES)
    start = calibrated(model, data, INT4)
    before = initializers(start)
    whole = rounded(start, data, INT4, size=30)
    assert codes(start) == {}
    assert initializers(start) == before == initializers(whole)
    single = rounded(start, data, INT4, size=1)
    assert same_codes(single, whole)
    # Sums of products in another order round differently; hardly a code may differ.
    turned = codes(rounded(start, np.ascontiguousarray(data[::-1]), INT4, size=7))
    assert all(np.mean(turned[name] != array) < 0.01 for name, array in codes(whole).items())


def test_each_layer_is_told() -> None:
    data = correlated(8, 5, FEATURES)
    told: list[tuple[int, int]] = []
    rounded(calibrated(products(), data, INT4), data, INT4, on_layer=lambda done, all: told.append((done, all)))
    assert told == [(1, 2), (2, 2)]


def test_a_static_batch_gives_nearly_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    data = correlated(64, 5, FEATURES)
    monkeypatch.setattr(hessians, "HESSIAN_ROWS", 64 * 5)
    net = Net(seed=1)
    x = net.matmul(net.input("x", [16, 5, FEATURES]), "a", FEATURES, 48)
    x = net.op("Add", [x, net.weight("a.bias", 48)], "a.add")
    fixed = simplify(net.model(net.matmul(x, "b", 48, 16)))
    start = calibrated(products(), data, INT4)
    batches = [Batch({"x": data[i : i + 16]}) for i in range(0, 64, 16)]
    wished = assign_specs(fixed, PORTABLE, INT4)
    own = unify_params(calibrate(wished, PORTABLE, batches, method=INT4, threads=1), PORTABLE)
    found, expected = codes(rounded(own, data, INT4)), codes(rounded(start, data, INT4))
    assert all(np.mean(found[name] != expected[name]) < 0.05 for name in expected)


def test_hessians_are_of_inputs_on_their_grid() -> None:
    data, method = correlated(32, FEATURES), BLOCKS
    start = calibrated(gemms(), data, method)
    grid = choose_params(-2.0, 2.0, QuantSpec("uint2"))
    free = codes(rounded(start, data, method))["a"]
    set_params(start.graph.inputs[0], grid)
    found = codes(rounded(start, data, method))["a"]
    assert np.array_equal(found, codes(rounded(start, fake_quantize(data, grid), method))["a"])
    assert not np.array_equal(found, free)


def test_depthwise_and_grouped_layers_of_a_real_network() -> None:
    model, data = simplify(mixed_net()), normal(24, 3, 16, 16)
    start = calibrated(model, data, INT4)
    chosen = rounded(start, data, INT4)
    assert {"stem", "deep", "mix", "squeeze", "expand", "head"} <= set(codes(chosen))
    assert error(chosen, data) < error(start, data)


def test_a_channel_that_is_always_zero_is_rounded_to_the_nearest() -> None:
    data = correlated(32, 5, FEATURES)
    data[..., 3] = 0
    start = calibrated(products(), data, INT4)
    chosen = rounded(start, data, INT4)
    params = weights(chosen)["a"]
    weight = start.graph.initializers["a.weight"].const_value
    assert weight is not None and params.codes is not None
    assert np.array_equal(params.codes[3], quantize(weight.numpy(), params)[3])


def test_by_default_matrix_products_and_few_bits_are_rounded_by_their_inputs() -> None:
    eight = Method(calibrator="minmax")
    for kind, (make, *_) in MODELS.items():
        data = data_for(kind, 16)
        found = codes(rounded(calibrated(make(), data, eight), data, eight))
        assert bool(found) == (kind != "Conv")
        assert codes(rounded(calibrated(make(), data, INT4), data, INT4))
