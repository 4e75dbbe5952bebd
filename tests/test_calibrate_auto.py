"""Calibration by the outputs of layers ("auto", "eq"), for all tensors and for some, and what stands in where no layer reads."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from edgekit.calibration.calibrate import CANDIDATES, FALLBACK, calibrate
from edgekit.calibration.layer_rows import Rows, collect_rows, linear_layers, matrix, numbers, rows_key
from edgekit.data import Batch
from edgekit.graph.annotations import all_values, get_params
from edgekit.graph.operators import is_constant
from edgekit.lowering.qdq import lower_qdq
from edgekit.method import LayerMethod, Method
from edgekit.passes.assign_specs import assign_specs
from edgekit.passes.simplify import simplify
from edgekit.quant.affine import fake_quantize, weight_params
from edgekit.quant.output_error import NEAR
from edgekit.quant.spec import QuantParams, QuantSpec
from edgekit.target import load_target
from graphs import Array, normal, run
from networks import Net, mixed_net, residual_net, token_net

PORTABLE = load_target("portable")
AUTO, MINMAX = Method(calibrator="auto"), Method(calibrator="minmax")
WIDTH = 16


def wished(model: ir.Model, method: Method = AUTO) -> ir.Model:
    return assign_specs(simplify(model), PORTABLE, method)


def cut(data: Array, size: int = 7) -> list[Batch]:
    return [Batch({"x": data[i : i + size]}) for i in range(0, len(data), size)]


def rows_for(model: ir.Model, data: Array) -> Rows:
    return collect_rows(model, linear_layers(model.graph), cut(data), samples=len(data), threads=1)


def calibrated(model: ir.Model, data: Array, method: Method, *, rows: Rows | None = None, size: int = 7) -> ir.Model:
    given = rows_for(model, data) if rows is None else rows
    return calibrate(model, PORTABLE, cut(data, size), method=method, rows=given, threads=1)


def grids(model: ir.Model, *, constants: bool = False) -> dict[str, QuantParams]:
    values = (value for value in all_values(model.graph) if is_constant(value) == constants)
    return {value.name or "": params for value in values if (params := get_params(value)) is not None}


def observers(model: ir.Model) -> dict[str, str]:
    return {name: params.observer for name, params in grids(model).items()}


def outputs(model: ir.Model, data: Array) -> dict[str, Array]:
    return run(model, {"x": data})


def pictures(model: ir.Model, count: int = 16) -> Array:
    return normal(count, *[dim for dim in model.graph.inputs[0].shape or () if isinstance(dim, int)])


def uneven() -> tuple[ir.Model, Array]:
    """Two layers whose inputs have a channel that sticks out: "deaf" does not hear it, "keen" hears hardly anything else."""
    net = Net(seed=1)
    gain = np.ones(WIDTH, np.float32)
    gain[3] = 60
    x = net.op("Mul", [net.input("x", ["n", 8, WIDTH]), net.constant("gain", gain)], "spiked")
    deaf, keen = normal(WIDTH, WIDTH, seed=2), 0.01 * normal(WIDTH, WIDTH, seed=3)
    deaf[3], keen[3] = 0, normal(WIDTH, seed=4)
    a = net.op("MatMul", [x, net.constant("deaf.weight", deaf)], "deaf")
    y = net.op("Mul", [net.op("Erf", [a], "erf"), net.constant("gain2", gain)], "spiked2")
    return net.model(net.op("MatMul", [y, net.constant("keen.weight", keen)], "keen")), normal(48, 8, WIDTH)


def two_branches() -> ir.Model:
    net = Net(seed=1)
    x = net.input("x", ["n", 8, WIDTH])
    a = net.op("Tanh", [net.matmul(x, "a", WIDTH, WIDTH)], "a.tanh")
    b = net.op("Tanh", [net.matmul(x, "b", WIDTH, WIDTH)], "b.tanh")
    return net.model(net.matmul(a, "c", WIDTH, 4), net.matmul(b, "d", WIDTH, 4))


@pytest.mark.parametrize("calibrator", ["auto", "eq"])
@pytest.mark.parametrize("build", [residual_net, mixed_net, token_net])
def test_every_tensor_gets_a_grid_and_says_who_chose_it(build: Callable[[], ir.Model], calibrator: str) -> None:
    model = wished(build())
    data = pictures(model)
    found = calibrated(model, data, Method(calibrator=calibrator))
    plain = grids(calibrated(model, data, MINMAX))
    assert grids(found).keys() == plain.keys()
    read = {layer.source.name for layer in linear_layers(model.graph)}
    for name, params in grids(found).items():
        known = (*CANDIDATES,) if calibrator == "auto" else ("eq",)
        assert params.observer in (known if name in read else (FALLBACK,)), name
        assert params.low >= plain[name].low - 1e-6
        assert params.high <= plain[name].high + 1e-6
        assert (params.dtype, params.fixed) == ("uint8", False)
    assert read & set(plain), "some tensors are read by layers"


def error_of(model: ir.Model, rows: Rows, source: str, params: QuantParams) -> float:
    """Of the outputs of all layers that read `source`, relative to their energies; straight from the definition."""
    total = 0.0
    for layer in linear_layers(model.graph):
        grid = get_params(layer.weight)
        if layer.source.name == source and grid is not None:
            weight = numbers(layer.weight)
            given = rows[rows_key(layer)].rows
            exact = given.astype(np.float64) @ matrix(layer, weight)
            rounded = fake_quantize(given, params).astype(np.float64) @ matrix(layer, fake_quantize(weight, grid))
            total += float(np.square(rounded - exact).sum() / np.square(exact).sum())
    return total


@pytest.mark.parametrize("build", [residual_net, mixed_net, token_net, lambda: uneven()[0]])
def test_no_candidate_harms_the_outputs_less(build: Callable[[], ir.Model]) -> None:
    model = wished(build())
    data = pictures(model, 24)
    rows = rows_for(model, data)
    found = calibrated(model, data, AUTO, rows=rows)
    others = {name: grids(calibrated(model, data, Method(calibrator=name), rows=rows)) for name in CANDIDATES}
    sources = {layer.source.name or "" for layer in linear_layers(model.graph)} & set(grids(found))
    assert sources
    for source in sources:
        mine = error_of(found, rows, source, grids(found)[source])
        least = min(error_of(found, rows, source, known[source]) for known in others.values())
        assert mine <= (1 + NEAR) * least * (1 + 1e-3)


def test_what_chooses_is_a_matter_of_each_tensor() -> None:
    net, data = uneven()
    model = wished(net)
    found = calibrated(model, data, AUTO)
    others = {name: grids(calibrated(model, data, Method(calibrator=name))) for name in CANDIDATES}
    deaf, keen = ({name: known[f"{source}_y"] for name, known in others.items()} for source in ("spiked", "spiked2"))
    names = observers(found)
    assert names["spiked_y"] == min(deaf, key=lambda name: float(deaf[name].scale)) != "minmax"
    assert float(deaf[names["spiked_y"]].scale) < 0.99 * float(deaf["minmax"].scale)
    assert names["spiked2_y"] == "minmax"
    assert grids(found)["spiked2_y"] == keen["minmax"]


def test_auto_is_nearer_to_float_than_any_one_candidate_for_all() -> None:
    net, data = uneven()
    model = wished(net)
    exact = outputs(model, data)["keen_y"]

    def error(method: Method) -> float:
        lowered = lower_qdq(calibrated(model, data, method), PORTABLE)
        return float(np.square(outputs(lowered, data)["keen_y"] - exact).mean())

    assert error(AUTO) <= 1.05 * min(error(Method(calibrator=name)) for name in CANDIDATES)


@pytest.mark.parametrize("calibrator", ["auto", "eq"])
def test_without_rows_the_fallback_chooses(calibrator: str) -> None:
    model = wished(residual_net())
    data = pictures(model)
    found = calibrated(model, data, Method(calibrator=calibrator), rows={})
    expected = calibrated(model, data, Method(calibrator=FALLBACK), rows={})
    assert set(observers(found).values()) == {FALLBACK}
    assert grids(found) == grids(expected)
    assert grids(found, constants=True) == grids(expected, constants=True)


def test_tensors_that_no_layer_reads_fall_back() -> None:
    model = wished(residual_net())
    found = observers(calibrated(model, pictures(model), AUTO))
    read = {layer.source.name for layer in linear_layers(model.graph)}
    assert {"a2_y", "b2_y", "c.short_y"} <= set(found)
    assert not {"a2_y", "b2_y", "c.short_y"} & read
    assert {found[name] for name in ("a2_y", "b2_y", "c.short_y")} == {FALLBACK}


def test_easyquant_lowers_the_angle_between_outputs() -> None:
    model = wished(token_net(), Method(weights="int4", calibrator="eq"))
    data = normal(24, 12, 16) ** 3
    rows = rows_for(model, data)
    plain, found = (
        calibrated(model, data, Method(weights="int4", calibrator=one), rows=rows) for one in ("minmax", "eq")
    )
    layer = next(one for one in linear_layers(model.graph) if one.name == "head")

    def cosine(result: ir.Model, grid: QuantParams | None) -> float:
        own = next(one for one in linear_layers(result.graph) if one.name == "head")
        source, weight = get_params(own.source), numbers(own.weight)
        params = get_params(own.weight) if grid is None else grid
        assert source is not None and params is not None
        given = rows[rows_key(layer)].rows
        a = (given @ matrix(own, weight)).ravel()
        b = (fake_quantize(given, source) @ matrix(own, fake_quantize(weight, params))).ravel()
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    spec = QuantSpec("int4", symmetric=True, per_channel=True)
    assert cosine(found, None) > cosine(plain, weight_params(numbers(layer.weight), spec, axis=1))


def test_easyquant_chooses_ranges_of_weights_too() -> None:
    model = wished(two_branches())
    found = calibrated(model, normal(16, 8, WIDTH), Method(calibrator="eq"))
    constants = grids(found, constants=True)
    assert {name: params.observer for name, params in constants.items()} == {f"{name}.weight": "eq" for name in "abcd"}
    plain = grids(calibrated(model, normal(16, 8, WIDTH), MINMAX), constants=True)
    for name, params in constants.items():
        assert (params.dtype, params.axis, params.narrow_range) == ("int8", 1, True)
        assert params.scale.shape == plain[name].scale.shape
        assert (params.scale <= plain[name].scale * (1 + 1e-6)).all()


def test_easyquant_leaves_shared_weights_alone() -> None:
    net = Net(seed=1)
    x = net.input("x", ["n", 8, WIDTH])
    a = net.matmul(x, "a", WIDTH, WIDTH)
    b = net.op("MatMul", [net.op("Tanh", [a], "tanh"), "a.weight"], "b")
    model = wished(net.model(b))
    found = calibrated(model, normal(16, 8, WIDTH), Method(calibrator="eq"))
    assert grids(found, constants=True)["a.weight"].observer == "minmax"
    assert grids(found)["x"].dtype == "uint8"


def test_a_value_that_several_layers_read_gets_the_widest_range_that_one_of_them_finds() -> None:
    data = normal(24, 8, WIDTH)
    data[..., 3] *= 30
    net = Net(seed=1)
    names = ("a", "b")
    x = net.input("x", ["n", 8, WIDTH])
    deaf, keen = normal(WIDTH, WIDTH, seed=2), normal(WIDTH, WIDTH, seed=3)
    deaf[3] = 0
    outputs = [
        net.op("MatMul", [x, net.constant(f"{n}.weight", w)], n) for n, w in zip(names, (deaf, keen), strict=True)
    ]
    together = calibrated(wished(net.model(*outputs)), data, Method(calibrator="eq"))
    alone = []
    for name in names:
        weight = next(tensor for tensor in net.initializers if tensor.name == f"{name}.weight")
        single = Net(seed=1)
        single.initializers.append(weight)
        model = single.model(single.op("MatMul", [single.input("x", ["n", 8, WIDTH]), weight.name], name))
        alone.append(grids(calibrated(wished(model), data, Method(calibrator="eq")))["x"])
    found = grids(together)["x"]
    assert alone[0].high < alone[1].high
    assert found.low == min(params.low for params in alone)
    assert found.high == max(params.high for params in alone)


def layered(base: str, *layers: tuple[str, str]) -> Method:
    return Method(calibrator=base, layers=tuple(LayerMethod(match=match, calibrator=name) for match, name in layers))


@pytest.mark.parametrize("other", ["kld", "mse", "percentile", "admm", "eq"])
def test_a_pattern_gives_some_layers_another_calibrator(other: str) -> None:
    model = wished(two_branches())
    data = normal(16, 8, WIDTH)
    found = observers(calibrated(model, data, layered("minmax", ("c", other))))
    assert found["a.tanh_y"] == other
    assert {name for name, one in found.items() if one == other} <= {"a.tanh_y", "c_y"}
    assert found["b.tanh_y"] == found["x"] == "minmax"
    same = grids(calibrated(model, data, Method(calibrator=other)))["a.tanh_y"]
    assert grids(calibrated(model, data, layered("minmax", ("c", other))))["a.tanh_y"] == same or other == "kld"


def test_some_layers_by_their_outputs_and_the_others_not() -> None:
    net, data = uneven()
    model = wished(net)
    found = observers(calibrated(model, data, layered("kld", ("keen", "auto"))))
    assert found["spiked2_y"] == "minmax"
    assert found["spiked_y"] == "kld"
    found = observers(calibrated(model, data, layered("auto", ("keen", "kld"))))
    assert found["spiked2_y"] == "kld"
    assert found["spiked_y"] != "kld"


def test_a_value_takes_the_calibrator_of_its_maker_where_no_reader_asks() -> None:
    model = wished(residual_net())
    found = observers(calibrated(model, pictures(model), layered("mse", ("a2", "minmax"))))
    assert found["a2_y"] == "minmax"
    assert found["a1.relu_y"] == "minmax", "what it reads"
    assert found["a.relu_y"] == found["b2_y"] == "mse"


def test_of_two_patterns_the_later_one_wins() -> None:
    model = wished(two_branches())
    method = layered("minmax", ("*", "mse"), ("d", "percentile"))
    found = observers(calibrated(model, normal(16, 8, WIDTH), method))
    assert found["b.tanh_y"] == "percentile"
    assert found["a.tanh_y"] == found["x"] == "mse"


@pytest.mark.parametrize("calibrator", ["auto", "eq"])
def test_neither_order_nor_size_of_batches_makes_a_difference(calibrator: str) -> None:
    model = wished(token_net())
    data = normal(20, 12, 16)
    method = Method(calibrator=calibrator)
    first = calibrated(model, data, method)
    again = calibrated(model, np.ascontiguousarray(data[::-1]), method, size=3)
    assert grids(first) == grids(again)
    assert grids(first, constants=True) == grids(again, constants=True)


@pytest.mark.parametrize("calibrator", ["auto", "eq"])
def test_constant_and_zero_inputs(calibrator: str) -> None:
    model = wished(two_branches())
    for value in (0.0, 0.7):
        found = calibrated(model, np.full((4, 8, WIDTH), value, np.float32), Method(calibrator=calibrator))
        for params in (*grids(found).values(), *grids(found, constants=True).values()):
            assert np.isfinite(params.scale).all()
            assert (params.scale > 0).all()
        assert grids(found)["x"].high >= 0.0


@pytest.mark.parametrize("calibrator", ["auto", "eq"])
def test_sixteen_bits(calibrator: str) -> None:
    method = Method(calibrator=calibrator, layers=(LayerMethod(match="c", precision="int16"),))
    model = wished(two_branches(), method)
    found = grids(calibrated(model, normal(16, 8, WIDTH), method))
    assert (found["a.tanh_y"].dtype, found["b.tanh_y"].dtype) == ("uint16", "uint8")
    assert float(found["a.tanh_y"].scale) < float(found["b.tanh_y"].scale) / 100
