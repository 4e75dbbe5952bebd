"""Smoothing: the same float function, folded where that costs nothing, and far less error where channels stick out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from edgekit.calibration.calibrate import calibrate
from edgekit.calibration.layer_rows import collect_rows
from edgekit.calibration.smooth import SMOOTHING, smooth, smoothable, unsmooth
from edgekit.data import Batch
from edgekit.graph.equal import prove_equal
from edgekit.graph.io import load_annotated, save_annotated
from edgekit.lowering.qdq import lower_qdq
from edgekit.method import LayerMethod, Method
from edgekit.passes.assign_specs import assign_precisions, assign_specs
from edgekit.passes.pack_matmuls import pack_matmuls
from edgekit.passes.simplify import simplify
from edgekit.target import load_target
from graphs import Array, initializers, normal, op_types, run
from networks import Net
from transformer_graphs import bert, feeds, vit

PORTABLE = load_target("portable")
WIDTH, OUTLIERS = 32, (3, 17)
SPIKE = 40.0


def spiked(count: int = WIDTH, by: float = SPIKE) -> Array:
    gain = np.random.default_rng(3).uniform(0.8, 1.2, count).astype(np.float32)
    gain[list(OUTLIERS)] *= by
    return gain


def tokens(count: int = 24, width: int = WIDTH, seed: int = 0) -> dict[str, Array]:
    return {"x": normal(count, 6, width, seed=seed)}


def small(net: Net, x: str, name: str, outputs: int = WIDTH) -> str:
    """A product that has little use for the channels that stick out, as in trained transformers."""
    return str(net.op("MatMul", [x, net.constant(f"{name}.weight", normal(WIDTH, outputs) / spiked()[:, None])], name))


def smoothed(model: ir.Model, data: dict[str, Array], size: int = 5) -> ir.Model:
    layers = smoothable(model, PORTABLE)
    count = len(data["x"])
    batches = [Batch({name: a[i : i + size] for name, a in data.items()}) for i in range(0, count, size)]
    result = smooth(model, PORTABLE, collect_rows(model, layers, batches, samples=count, threads=1))
    assert all(
        np.isfinite(value.const_value.numpy()).all()
        for value in result.graph.initializers.values()
        if value.const_value is not None and value.dtype == ir.DataType.FLOAT
    )
    return result


def smoothing_nodes(model: ir.Model) -> list[str]:
    return [str(node.outputs[0].name) for node in model.graph if SMOOTHING in node.metadata_props]


def error(model: ir.Model, data: dict[str, Array], seen: dict[str, Array]) -> float:
    """Of the int8 model, relative to the float outputs."""
    calibrated = calibrate(
        assign_specs(model, PORTABLE), PORTABLE, [Batch(seen)], method=Method(calibrator="minmax"), threads=1
    )
    exact, rounded = run(model, data), run(lower_qdq(calibrated, PORTABLE), data)
    return float(np.mean([np.linalg.norm(rounded[name] - exact[name]) / np.linalg.norm(exact[name]) for name in exact]))


def weight_of(model: ir.Model, name: str) -> Array:
    node = next(node for node in model.graph if node.name == name)
    assert node.inputs[1] is not None and node.inputs[1].const_value is not None
    return np.asarray(node.inputs[1].const_value.numpy())


def normed(net: Net, x: str, name: str = "norm", gain: str = "", shift: str = "") -> str:
    parameters = [
        gain or net.constant(f"{name}.gain", spiked()),
        shift or net.constant(f"{name}.shift", np.full(WIDTH, 0.1, np.float32)),
    ]
    return str(net.op("LayerNormalization", [x, *parameters], name, axis=-1))


def layer_norm(*, residual: bool = False, output: bool = False) -> ir.Model:
    """Two products of a LayerNormalization whose channels stick out; with others that read it too."""
    net = Net(seed=1)
    y = normed(net, net.input("x", ["n", 6, WIDTH]))
    a, b = small(net, y, "a"), small(net, y, "b")
    x = net.op("Mul", [a, net.op("Sigmoid", [b], "gate")], "product")
    if residual:
        x = net.op("Add", [x, y], "residual")
    return simplify(net.model(x, y) if output else net.model(x))


def rms_norm() -> ir.Model:
    """x / sqrt(mean(x * x) + e) * gain."""
    net = Net(seed=1)
    x = net.input("x", ["n", 6, WIDTH])
    mean = net.op(
        "ReduceMean", [net.op("Mul", [x, x], "square"), net.constant("axes", np.array([-1]))], "mean", keepdims=1
    )
    root = net.op("Sqrt", [net.op("Add", [mean, net.constant("e", np.float32(1e-5))], "safe")], "root")
    y = net.op("Mul", [net.op("Div", [x, root], "divided"), net.constant("gain", spiked())], "norm")
    return simplify(net.model(small(net, y, "a")))


def gain_and_shift() -> ir.Model:
    """A normalization written out as Mul and Add by constants."""
    net = Net(seed=1)
    x = net.op("Tanh", [net.input("x", ["n", 6, WIDTH])], "tanh")
    y = net.op("Mul", [x, net.constant("gain", spiked())], "scaled")
    y = net.op("Add", [net.constant("shift", spiked(by=3)), y], "norm")
    return simplify(net.model(small(net, y, "a")))


def chained() -> ir.Model:
    """A product whose outputs stick out, straight into another."""
    net = Net(seed=1)
    weight = net.constant("a.weight", normal(WIDTH, WIDTH) * spiked())
    y = net.op("MatMul", [net.input("x", ["n", 6, WIDTH]), weight], "a")
    y = net.op("Add", [y, net.constant("a.bias", spiked(by=3))], "a.add")
    model = simplify(net.model(small(net, y, "b")))
    return assign_precisions(model, Method(layers=(LayerMethod(match="a", precision="float"),)))


def gelu(spike: float) -> ir.Model:
    net = Net(seed=1)
    x = net.op("Mul", [net.input("x", ["n", 6, WIDTH]), net.constant("gain", spiked(by=spike))], "scaled")
    return simplify(net.model(small(net, net.op("Gelu", [x], "gelu"), "a")))


FOLDED: dict[str, Callable[[], ir.Model]] = {
    "LayerNormalization": layer_norm,
    "RMSNorm": rms_norm,
    "Mul and Add": gain_and_shift,
    "MatMul": chained,
}


@pytest.mark.parametrize("name", FOLDED)
def test_a_factor_is_folded_into_what_makes_the_value(name: str) -> None:
    model, data = FOLDED[name](), tokens()
    result = smoothed(model, data)
    prove_equal(model, result, tokens(seed=1))
    assert op_types(result) == op_types(model)
    assert set(initializers(result)) == set(initializers(model)), "the same names"
    assert (
        weight_of(result, "b" if name == "MatMul" else "a").tobytes()
        != weight_of(model, "b" if name == "MatMul" else "a").tobytes()
    )
    before, after = (error(one, tokens(seed=1), data) for one in (model, result))
    assert after < 0.5 * before


@pytest.mark.parametrize("others", ["residual", "output"])
def test_where_others_read_the_value_a_mul_serves_the_layers(others: str) -> None:
    model, data = layer_norm(residual=others == "residual", output=others == "output"), tokens()
    result = smoothed(model, data)
    prove_equal(model, result, tokens(seed=1))
    assert smoothing_nodes(result) == ["norm_y_smooth"]
    readers = {
        use.node.name for node in result.graph if SMOOTHING in node.metadata_props for use in node.outputs[0].uses()
    }
    assert readers == {"a", "b"}
    assert initializers(result)["norm.gain"] == initializers(model)["norm.gain"]
    assert error(result, tokens(seed=1), data) < 0.5 * error(model, tokens(seed=1), data)


def test_behind_gelu_a_mul_comes_only_where_it_is_worth_it() -> None:
    data = tokens()
    even = smoothed(gelu(1.0), data)
    assert smoothing_nodes(even) == []
    assert initializers(even) == initializers(gelu(1.0)), "nothing was touched"
    model = gelu(SPIKE)
    result = smoothed(model, data)
    prove_equal(model, result, tokens(seed=1))
    assert smoothing_nodes(result) == ["gelu_y_smooth"]
    assert error(result, tokens(seed=1), data) < 0.5 * error(model, tokens(seed=1), data)


def outliers_of_values(model: ir.Model) -> ir.Model:
    """Columns of the projections of the values that stick out."""
    for index in range(2):
        for part in ("weight", "bias"):
            value = model.graph.initializers[f"layer{index}.value.{part}"]
            assert value.const_value is not None
            value.const_value = ir.tensor(value.const_value.numpy() * spiked(), name=value.name)
    return model


@pytest.mark.parametrize("packed", [False, True])
def test_attention_hands_the_factor_on_to_the_values(packed: bool) -> None:
    model = simplify(outliers_of_values(bert("padding")))
    model = pack_matmuls(model) if packed else model
    assert ("Split" in op_types(model)) == packed
    data = feeds(model, 12, 10)
    result = smoothed(model, data)
    prove_equal(model, result, feeds(model, 6, 10, seed=1))
    for index in range(2):
        assert not np.array_equal(weight_of(result, f"layer{index}.out"), weight_of(model, f"layer{index}.out"))
    context = [f"layer{index}.merge_y_smooth" for index in range(2)]
    assert not set(context) & set(smoothing_nodes(result))
    if not packed:
        before, after = (np.abs(weight_of(one, "layer0.value")).max(0) for one in (model, result))
        assert after.max() / np.median(after) < 0.5 * before.max() / np.median(before)
    assert error(result, feeds(model, 6, 10, seed=1), data) < 0.8 * error(model, feeds(model, 6, 10, seed=1), data)


def test_only_the_values_part_of_a_packed_projection_changes_with_the_context() -> None:
    model = pack_matmuls(simplify(outliers_of_values(bert("none", layers=2))))
    data = feeds(model, 12, 10)
    only_out = [layer for layer in smoothable(model, PORTABLE) if layer.name == "layer0.out"]
    result = smooth(model, PORTABLE, collect_rows(model, only_out, [Batch(data)], samples=12, threads=1))
    prove_equal(model, result, data)
    changed = [name for name, data in initializers(result).items() if data != initializers(model)[name]]
    assert len(changed) == 3, "the projection's weight and bias, and the weight of what reads the context"
    packed = next(
        name
        for name in changed
        if (value := result.graph.initializers[name].const_value) is not None
        and list(value.shape) == [WIDTH, 3 * WIDTH]
    )
    old, new = (one.graph.initializers[packed].const_value for one in (model, result))
    assert old is not None and new is not None
    columns = np.flatnonzero((old.numpy() != new.numpy()).any(axis=0))
    assert 0 < len(columns) <= WIDTH
    assert set(columns // WIDTH) == {columns[0] // WIDTH}, "of one third alone"


def test_a_projection_taken_apart_in_another_way_keeps_its_function() -> None:
    model = simplify(vit())
    data = feeds(model, 12, 10)
    prove_equal(model, smoothed(model, data), feeds(model, 5, 10, seed=1))


def test_attention_whose_context_is_read_twice_is_not_folded() -> None:
    model = simplify(outliers_of_values(bert("none")))
    context = next(value for node in model.graph for value in node.outputs if value.name == "layer0.context_y")
    model.graph.outputs.append(context)
    data = feeds(model, 12, 10)
    result = smoothed(model, data)
    prove_equal(model, result, data)


def test_shared_weights_are_left_alone() -> None:
    net = Net(seed=1)
    x = net.input("x", ["n", 6, WIDTH])
    a = net.matmul(normed(net, x), "a", WIDTH, WIDTH)
    b = net.op("MatMul", [net.op("Tanh", [x], "tanh"), "a.weight"], "b")
    model = simplify(net.model(net.op("Sub", [a, b], "out")))
    assert smoothable(model, PORTABLE) == []
    assert initializers(smoothed(model, tokens())) == initializers(model)


def test_a_producer_with_a_shared_weight_takes_no_factor() -> None:
    net = Net(seed=1)
    x = net.input("x", ["n", 6, WIDTH])
    weight = net.constant("a.weight", normal(WIDTH, WIDTH) * spiked())
    a = net.op("MatMul", [x, weight], "a")
    b = net.op("MatMul", [net.op("Tanh", [x], "tanh"), weight], "b")
    model = simplify(net.model(small(net, a, "c"), b))
    result = smoothed(model, tokens())
    prove_equal(model, result, tokens(seed=1))
    assert initializers(result)["a.weight"] == initializers(model)["a.weight"]
    assert smoothing_nodes(result) == [], "no factor between two quantized products"


@pytest.mark.parametrize("same_twice", [False, True])
def test_a_gain_that_several_normalizations_read_stays_theirs(same_twice: bool) -> None:
    """Exporters store equal constants once; a factor for one of their readers must not reach another."""
    net = Net(seed=1)
    x = net.input("x", ["n", 6, WIDTH])
    gain = net.constant("gain", spiked())
    shift = gain if same_twice else net.constant("shift", np.full(WIDTH, 0.1, np.float32))
    first = normed(net, x, "first", gain, shift)
    plain = net.op("Sigmoid", [first], "plain")  # no layer reads the first one: only the second takes a factor
    second = normed(net, net.op("Tanh", [x], "tanh"), "second", gain, shift)
    model = simplify(net.model(net.matmul(second, "a", WIDTH, WIDTH), plain))
    result = smoothed(model, tokens())
    prove_equal(model, result, tokens(seed=1))
    assert initializers(result)["a.weight"] != initializers(model)["a.weight"]
    assert smoothing_nodes(result) == []


def test_both_normalizations_of_one_gain_take_a_factor_of_their_own() -> None:
    net = Net(seed=1)
    x = net.input("x", ["n", 6, WIDTH])
    gain, shift = net.constant("gain", spiked()), net.constant("shift", np.zeros(WIDTH, np.float32))
    first = net.matmul(normed(net, x, "first", gain, shift), "a", WIDTH, WIDTH)
    second = net.matmul(normed(net, net.op("Tanh", [first], "tanh"), "second", gain, shift), "b", WIDTH, WIDTH)
    model = simplify(net.model(second))
    result = smoothed(model, tokens())
    prove_equal(model, result, tokens(seed=1))
    for name in ("a", "b"):
        assert not np.array_equal(weight_of(result, name), weight_of(model, name))


def test_channels_that_are_never_used_make_no_nan() -> None:
    net = Net(seed=1)
    gain = spiked()
    gain[[0, 5]] = 0  # channels that are always 0
    y = normed(
        net, net.input("x", ["n", 6, WIDTH]), "norm", net.constant("gain", gain), net.constant("shift", 0 * gain)
    )
    weight = normal(WIDTH, WIDTH)
    weight[[0, 7]] = 0  # inputs that nobody multiplies
    model = simplify(net.model(net.op("MatMul", [y, net.constant("a.weight", weight)], "a")))
    result = smoothed(model, tokens())
    prove_equal(model, result, tokens(seed=1))
    assert np.isfinite(run(result, tokens())["a_y"]).all()
    assert not np.array_equal(weight_of(result, "a"), weight)


def test_a_layer_of_zeros_and_an_input_of_zeros() -> None:
    net = Net(seed=1)
    x = net.input("x", ["n", 6, WIDTH])
    y = net.op("MatMul", [normed(net, x), net.constant("a.weight", np.zeros((WIDTH, WIDTH), np.float32))], "a")
    model = simplify(net.model(y))
    prove_equal(model, smoothed(model, tokens()), tokens(seed=1))
    zeros = {"x": np.zeros((8, 6, WIDTH), np.float32)}
    model = gain_and_shift()
    prove_equal(model, smoothed(model, zeros), tokens(seed=1))


def test_without_rows_nothing_happens() -> None:
    model = layer_norm()
    result = smooth(model, PORTABLE, {})
    assert initializers(result) == initializers(model)
    assert op_types(result) == op_types(model)


def test_the_model_that_is_given_is_not_written_to() -> None:
    model = layer_norm(residual=True)
    before, ops = initializers(model), op_types(model)
    smoothed(model, tokens())
    assert (initializers(model), op_types(model)) == (before, ops)


@pytest.mark.parametrize("build", [lambda: layer_norm(residual=True), lambda: gelu(SPIKE), layer_norm])
def test_unsmooth_takes_the_muls_out_and_keeps_the_function(build: Callable[[], ir.Model], tmp_path: Path) -> None:
    model = build()
    result = smoothed(model, tokens())
    save_annotated(result, tmp_path / "smooth.onnx")
    for one in (result, load_annotated(tmp_path / "smooth.onnx")):
        plain = unsmooth(one)
        prove_equal(model, plain, tokens(seed=1))
        assert smoothing_nodes(plain) == []
        assert op_types(plain) == op_types(model)
        assert set(initializers(plain)) == set(initializers(model)), "no factor is left behind"


def test_the_result_does_not_depend_on_how_samples_come() -> None:
    data = tokens()
    turned = {"x": np.ascontiguousarray(data["x"][::-1])}
    assert initializers(smoothed(layer_norm(), data)) == initializers(smoothed(layer_norm(), turned, size=7))


def test_layers_in_float_are_not_smoothed() -> None:
    model = assign_precisions(layer_norm(), Method(layers=(LayerMethod(match="a", precision="float"),)))
    assert {layer.name for layer in smoothable(model, PORTABLE)} == {"b"}
    prove_equal(model, smoothed(model, tokens()), tokens(seed=1))
