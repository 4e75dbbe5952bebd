"""Calibration: the right ranges for the right tensors, in constant memory, the same for every order and split."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from edgekit.calibration.calibrate import calibrate
from edgekit.data import Batch
from edgekit.errors import DataError
from edgekit.graph.annotations import all_values, get_params, get_wish, set_params
from edgekit.graph.io import save_annotated
from edgekit.graph.operators import is_constant
from edgekit.graph.run import with_outputs
from edgekit.method import Method
from edgekit.passes.assign_specs import assign_specs
from edgekit.passes.simplify import simplify
from edgekit.passes.unify_params import unify_params
from edgekit.quant.affine import choose_params, weight_params
from edgekit.quant.spec import QuantParams, QuantSpec
from edgekit.target import load_target
from graphs import Array, GraphBuilder, normal, run
from networks import mixed_net, residual_net, samples, token_net

PORTABLE = load_target("portable")
UINT8 = QuantSpec("uint8")
FIXED = QuantParams("uint8", np.array(0.01, np.float32), np.array(7), fixed=True)


def wished(model: ir.Model) -> ir.Model:
    return assign_specs(simplify(model), PORTABLE)


def batches(arrays: dict[str, Array], size: int) -> list[Batch]:
    count = len(next(iter(arrays.values())))
    return [Batch({name: array[i : i + size] for name, array in arrays.items()}) for i in range(0, count, size)]


def grids(model: ir.Model) -> dict[str, QuantParams]:
    return {value.name or "": params for value in all_values(model.graph) if (params := get_params(value)) is not None}


@pytest.mark.parametrize("build", [residual_net, mixed_net, token_net])
def test_min_and_max_are_those_of_plain_inference(build: object) -> None:
    assert callable(build)
    model = wished(build())
    data = samples(model, 12)
    found = grids(calibrate(model, PORTABLE, batches(data, 5), method=Method(calibrator="minmax"), threads=1))
    names = {value.name or "" for value in all_values(model.graph) if get_wish(value) and not is_constant(value)}
    seen = {**data, **run(with_outputs(model, names), data, optimize=True)}
    observed = [name for name in found if name in seen]
    assert len(observed) > 5
    for name in observed:
        low, high = float(seen[name].min()), float(seen[name].max())
        np.testing.assert_allclose(
            [found[name].low, found[name].high], [min(low, 0), max(high, 0)], rtol=1e-5, atol=1e-6
        )
        assert (found[name].dtype, found[name].observer, found[name].fixed) == ("uint8", "minmax", False)


def test_every_wished_tensor_has_a_grid_after_unifying() -> None:
    for build in (residual_net, mixed_net, token_net):
        model = wished(build())
        found = unify_params(calibrate(model, PORTABLE, batches(samples(model, 8), 4), threads=1), PORTABLE)
        missing = [v.name for v in all_values(found.graph) if get_wish(v) is not None and get_params(v) is None]
        assert missing == []


def test_what_only_moves_numbers_is_not_observed_but_takes_its_sources_grid() -> None:
    model = wished(residual_net())
    calibrated = calibrate(model, PORTABLE, batches(samples(model, 8), 4), threads=1)
    moved = {"b.slice_y", "b.pad_y", "flatten_y"}
    assert not moved & set(grids(calibrated))
    unified = grids(unify_params(calibrated, PORTABLE))
    assert unified["b.slice_y"] == unified["b.pad_y"] == unified["a.relu_y"] == grids(calibrated)["a.relu_y"]


def test_weights_get_the_grid_of_their_own_channels() -> None:
    model = wished(residual_net())
    found = grids(calibrate(model, PORTABLE, batches(samples(model, 4), 4), threads=1))
    weight = model.graph.initializers["stem.weight"].const_value
    assert weight is not None
    spec = QuantSpec("int8", symmetric=True, per_channel=True, narrow_range=True)
    assert found["stem.weight"] == weight_params(weight.numpy(), spec, axis=0)


@pytest.mark.parametrize("estimator", ["minmax", "kld", "mse", "percentile"])
def test_neither_the_order_nor_the_size_of_batches_matters(tmp_path: Path, estimator: str) -> None:
    """Bit for bit where ONNX Runtime is: its convolutions here give one sample the same numbers in every batch."""
    model = wished(residual_net())
    data = samples(model, 24)
    shuffled = {name: array[np.random.default_rng(0).permutation(24)] for name, array in data.items()}
    results = []
    for index, (arrays, size) in enumerate([(data, 8), (data, 8), (shuffled, 8), (data, 1), (shuffled, 24)]):
        calibrated = calibrate(model, PORTABLE, batches(arrays, size), method=Method(calibrator=estimator), threads=1)
        save_annotated(calibrated, tmp_path / f"{index}.onnx")
        results.append(grids(calibrated))
    assert (tmp_path / "0.onnx").read_bytes() == (tmp_path / "1.onnx").read_bytes(), "the same again"
    assert (tmp_path / "0.onnx").read_bytes() == (tmp_path / "2.onnx").read_bytes(), "another order"
    for other in results[3:]:
        for name, params in results[0].items():
            np.testing.assert_allclose(other[name].scale, params.scale, rtol=1e-5)
            np.testing.assert_array_equal(other[name].zero_point, params.zero_point)


def test_memory_does_not_grow_with_the_number_of_samples() -> None:
    model = wished(residual_net())

    def stream(count: int) -> Iterator[Batch]:
        for index in range(count):
            yield Batch({"x": normal(4, 3, 16, 16, seed=index)})

    def peak(count: int) -> int:
        gc.collect()
        tracemalloc.start()
        calibrate(model, PORTABLE, stream(count), method=Method(calibrator="minmax"), threads=1)
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result

    peak(1)
    few, many = peak(4), peak(64)
    one_batch = 4 * 16 * 16 * 8 * 4  # bytes of the largest activation; some are under way at the same time
    assert many < few + 4 * one_batch


def test_grids_that_are_there_are_not_moved_and_what_is_tied_joins_them() -> None:
    model = wished(residual_net())
    values = {value.name or "": value for value in all_values(model.graph)}
    calibrated_before = choose_params(-1.0, 1.0, UINT8, observer="somebody")
    weight = QuantParams("int8", np.full(8, 0.5, np.float32), np.zeros(8, np.int64), axis=0, fixed=True)
    set_params(values["stem.relu_y"], FIXED)
    set_params(values["a.relu_y"], calibrated_before)
    set_params(values["stem.weight"], weight)
    by_kld = Method(calibrator="kld")
    found = grids(calibrate(model, PORTABLE, batches(samples(model, 4), 4), method=by_kld, threads=1))
    assert (found["stem.relu_y"], found["a.relu_y"], found["stem.weight"]) == (FIXED, calibrated_before, weight)
    assert found["a1.relu_y"].observer == "kld"


def test_where_every_tensor_has_a_grid_no_data_is_read() -> None:
    model = wished(residual_net())
    for value in all_values(model.graph):
        if get_wish(value) is not None:
            set_params(value, FIXED)

    def never() -> Iterator[Batch]:
        raise AssertionError("no tensor needs a sample")
        yield

    assert set(map(str, grids(calibrate(model, PORTABLE, never())).values())) == {str(FIXED)}


def test_the_argument_is_not_touched_and_tensors_without_a_wish_get_nothing() -> None:
    model = wished(residual_net())
    found = grids(calibrate(model, PORTABLE, batches(samples(model, 2), 2), threads=1))
    assert grids(model) == {}
    assert set(found) <= {value.name for value in all_values(model.graph) if get_wish(value) is not None}


def test_numbers_that_only_a_constant_brings_in_are_observed() -> None:
    """An embedding table behind Gather, and a class token that Concat adds: their inputs say nothing of their range."""
    b = GraphBuilder()
    table = b.constant("table", np.float32([[100, -50], [3, 4]]))
    tokens = b.op(
        "Gather", [table, b.op("ArgMax", [b.input("x", ["N", 3, 2])], "ids", axis=2, keepdims=0)], "rows", axis=0
    )
    joined = b.op(
        "Concat",
        [b.op("Relu", [tokens], "relu"), b.constant("token", np.full((1, 1, 2), -9, np.float32))],
        "cat",
        axis=1,
    )
    model = wished(
        b.model(
            b.op("MatMul", [joined, b.weight("w", 2, 4)], "fc"), b.op("MatMul", [tokens, b.weight("v", 2, 4)], "gc")
        )
    )
    data = {"x": np.float32([[[1, 0], [0, 1], [1, 0]]])}
    found = grids(unify_params(calibrate(model, PORTABLE, [Batch(data)], method=Method(calibrator="minmax")), PORTABLE))
    assert (found["rows_y"].low, found["rows_y"].high) == (-50.0, 100.0)
    assert (found["cat_y"].low, found["cat_y"].high) == (-9.0, 100.0)


def nan_inside(b: GraphBuilder) -> str:
    x = b.conv(b.input("x", ["N", 3, 8, 8]), "conv", 3, 4)
    return b.conv(b.op("Sqrt", [x], "root"), "next", 4, 4)


def test_a_tensor_that_becomes_nan_is_named() -> None:
    b = GraphBuilder()
    model = wished(b.model(nan_inside(b)))
    with pytest.raises(
        DataError, match=r"tensor 'root_y' becomes NaN or Inf during calibration \(found \d+ .* among 256;"
    ):
        calibrate(model, PORTABLE, [Batch({"x": normal(2, 3, 8, 8)})])
    broken = normal(2, 3, 8, 8)
    broken[0, 0, 0, 0] = np.inf
    with pytest.raises(DataError, match=r"tensor 'x' becomes NaN or Inf during calibration \(found 1 "):
        calibrate(model, PORTABLE, [Batch({"x": broken})])


def test_a_weight_that_holds_nan_is_named() -> None:
    b = GraphBuilder()
    model = wished(b.model(b.conv(b.input("x", ["N", 3, 8, 8]), "conv", 3, 4)))
    weight = model.graph.initializers["conv.weight"]
    weight.const_value = ir.tensor(np.full((4, 3, 3, 3), np.nan, np.float32), name="conv.weight")
    with pytest.raises(DataError, match=r"weight 'conv\.weight' holds NaN or Inf"):
        calibrate(model, PORTABLE, [Batch({"x": normal(1, 3, 8, 8)})])


def test_no_samples_and_unknown_estimators_are_refused() -> None:
    model = wished(residual_net())
    with pytest.raises(DataError, match="holds no samples"):
        calibrate(model, PORTABLE, [])
    with pytest.raises(ValueError, match="did you mean 'kld'"):
        calibrate(model, PORTABLE, [], method=Method(calibrator="klt"))


def test_progress_is_told_in_samples() -> None:
    model = wished(residual_net())
    told: list[int] = []
    calibrate(model, PORTABLE, batches(samples(model, 10), 4), threads=1, on_batch=told.append)
    assert told == [4, 4, 2]


def test_a_tensor_that_is_always_zero_gets_a_usable_grid() -> None:
    b = GraphBuilder()
    x = b.op("Mul", [b.input("x", ["N", 3, 8, 8]), b.constant("zero", np.float32(0))], "nothing")
    found = grids(calibrate(wished(b.model(b.conv(x, "conv", 3, 4))), PORTABLE, [Batch({"x": normal(2, 3, 8, 8)})]))
    assert (float(found["nothing_y"].scale), found["nothing_y"].low, found["nothing_y"].high) == (1.0, 0.0, 0.0)
