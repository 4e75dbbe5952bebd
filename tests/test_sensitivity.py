from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import onnx_ir as ir
import pytest

from edgekit.calibration.calibrate import calibrate
from edgekit.data import Batch
from edgekit.errors import DataError, GraphError
from edgekit.graph.annotations import annotated_values, get_params, set_params
from edgekit.graph.operators import LINEAR
from edgekit.lowering.qdq import lower_qdq
from edgekit.method import Method
from edgekit.metric import Runner
from edgekit.passes.assign_specs import assign_specs
from edgekit.passes.simplify import simplify
from edgekit.records import LayerSensitivity, Metric
from edgekit.sensitivity import LARGEST_DB, Fidelity, how_many_hurt, rank, sensitivity
from edgekit.target import Target, load_target
from graphs import Array
from networks import Net, annotate, changed, mixed_net, needs_vnni, residual_net, samples, simulate, token_net

PORTABLE = load_target("portable")
NETS = {"residual": residual_net, "mixed": mixed_net, "token": token_net}


def feeds(model: ir.Model) -> list[dict[str, Array]]:
    return [samples(model, count, seed=seed) for seed, count in enumerate((3, 5))]


def one_by_one(model: ir.Model, target: Target, name: str) -> Fidelity:
    """The plain way: the whole graph lowered with one layer quantized."""
    others = frozenset(str(node.name) for node in model.graph if node.name != name)
    lowered, found = lower_qdq(model, target, keep_float=others), Fidelity()
    for batch in feeds(model):
        found.update(simulate(lowered, batch), simulate(model, batch))
    return found


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("symmetric", [False, True], ids=["affine", "symmetric"])
def test_each_layer_alone_is_what_lowering_it_alone_gives(net: str, symmetric: bool) -> None:
    target = load_target("cuda-tensorrt") if symmetric else PORTABLE
    model = annotate(NETS[net]())
    found = [layer for layer in sensitivity(model, target, feeds(model), threads=1) if layer.op_type in LINEAR]
    assert len(found) >= 3
    for layer in found:
        if symmetric and layer.name == "head":
            continue  # alone it reads floats, which get a shift there; among the others it reads codes
        expected = one_by_one(model, target, layer.name)
        assert layer.output_sqnr_db == pytest.approx(expected.sqnr_db, abs=0.01)
        assert layer.output_cosine == pytest.approx(expected.cosine, abs=1e-7)
        assert layer.local_sqnr_db < 100


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", ["x86-onnxruntime", "arm-onnxruntime"])
def test_codes_that_a_target_wants_of_outputs_are_part_of_the_error(net: str, name: str) -> None:
    target, model = load_target(name), annotate(NETS[net]())
    found = [layer for layer in sensitivity(model, target, feeds(model), threads=1) if layer.op_type in LINEAR]
    assert len(found) >= 3
    for layer in found:
        expected = one_by_one(model, target, layer.name)
        assert layer.output_sqnr_db == pytest.approx(expected.sqnr_db, abs=0.5)  # biases are on codes there too


def test_the_local_error_is_that_of_the_layer_on_float_inputs() -> None:
    net = Net(seed=4)
    model = annotate(net.model(net.conv(net.conv_relu(net.input("x", ["n", 3, 8, 8]), "a", 3, 8), "b", 8, 4)))
    a, b = sensitivity(model, PORTABLE, feeds(model), threads=1)
    assert (a.name, b.name) == ("a", "b")
    assert b.local_sqnr_db == pytest.approx(b.output_sqnr_db, abs=0.01)  # its output is the model's
    assert a.local_sqnr_db != pytest.approx(a.output_sqnr_db, abs=0.01)
    assert a.macs == 3 * 9 * 8 * 64


def test_lighter_operators_are_measured_too() -> None:
    model = annotate(residual_net())
    found = {layer.name: layer for layer in sensitivity(model, PORTABLE, feeds(model), threads=1)}
    assert found["a.add"].macs == 0
    assert 20 < found["a.add"].output_sqnr_db < 80
    names = [str(node.name) for node in model.graph if node.name in found]
    assert list(found) == names


def test_what_does_not_reach_an_output_does_not_count_for_it() -> None:
    net = Net(seed=5)
    x = net.conv_relu(net.input("x", ["n", 3, 8, 8]), "early", 3, 8)
    model = annotate(net.model(x, net.conv(net.conv_relu(x, "mid", 8, 8), "late", 8, 4)))
    found = {layer.name: layer for layer in sensitivity(model, PORTABLE, feeds(model), threads=1)}
    late = one_by_one(model, PORTABLE, "late")
    assert found["late"].output_sqnr_db == pytest.approx(late.sqnr_db, abs=0.01)
    assert found["early"].output_sqnr_db < LARGEST_DB


def test_a_bad_layer_ranks_first() -> None:
    model = annotate(residual_net())
    coarse = model.clone()
    value = next(value for value in annotated_values(coarse.graph) if value.name == "c1.weight")
    params = get_params(value)
    assert params is not None
    set_params(value, replace(params, scale=params.scale * 30))
    before, after = (sensitivity(each, PORTABLE, feeds(model), threads=1) for each in (model, coarse))
    assert rank(after)[0] == "c1" != rank(before)[0]


def test_the_metric_is_taken_with_each_layer_alone() -> None:
    model = annotate(residual_net())
    batch = samples(model, 6, seed=3)
    calls = []

    def metric(run: Runner) -> Metric:
        calls.append(1)
        difference = run(batch)["head_y"] - simulate(model, batch)["head_y"]
        return Metric(name="closeness", value=-float(np.abs(difference).mean()))

    found = sensitivity(model, PORTABLE, feeds(model), metric=metric, threads=1)
    measured = {layer.name: layer.metric for layer in found if layer.metric is not None}
    assert set(measured) == {layer.name for layer in found if layer.op_type in LINEAR}
    assert len(calls) == len(measured)
    assert all(value < 0 for value in measured.values())
    assert rank(found)[0] == min(measured, key=lambda name: measured[name])


def test_repeats_to_the_bit_and_leaves_the_model_alone() -> None:
    model = annotate(mixed_net())
    before = ir.to_proto(model).SerializeToString()
    first, second = (sensitivity(model, PORTABLE, feeds(model), threads=1) for _ in range(2))
    assert first == second
    assert ir.to_proto(model).SerializeToString() == before


def test_progress_counts_the_nodes() -> None:
    model, told = annotate(residual_net()), []
    found = sensitivity(model, PORTABLE, feeds(model), threads=1, on_progress=lambda *step: told.append(step))
    assert told == [("sensitivity", done, len(found)) for done in range(1, len(found) + 1)]


def test_nothing_quantized_is_nothing_found() -> None:
    model = annotate(residual_net(), target=changed("portable", quantize=()))
    assert sensitivity(model, PORTABLE, feeds(model), threads=1) == []


def test_no_batches_and_no_float_output_are_explained() -> None:
    model = annotate(residual_net())
    with pytest.raises(DataError, match="at least one batch"):
        sensitivity(model, PORTABLE, [])
    net = Net(seed=6)
    classes = net.op("ArgMax", [net.conv(net.input("x", ["n", 3, 8, 8]), "a", 3, 4)], "classes", axis=1)
    graph = ir.from_proto(net.proto(classes, dtypes={classes: 7}))
    with pytest.raises(GraphError, match="classes_y"):
        sensitivity(annotate(graph), PORTABLE, [samples(graph, 2)])


@pytest.mark.parametrize(
    ("found", "sqnr", "cosine"),
    [
        ([[1.0, 0.0], [0.0, 2.0]], LARGEST_DB, 1.0),
        ([[1.0, 0.5], [0.0, 2.0]], 10 * np.log10(5 / 0.25), (1 + 1 / np.sqrt(1.25)) / 2),
        ([[0.0, 0.0], [0.0, 2.0]], 10 * np.log10(5 / 1), 0.5),
        ([[np.nan, 0.0], [0.0, 2.0]], -LARGEST_DB, 0.5),
    ],
)
def test_fidelity_by_hand(found: list[list[float]], sqnr: float, cosine: float) -> None:
    fidelity = Fidelity()
    for ours, theirs in zip(found, [[1.0, 0.0], [0.0, 2.0]], strict=True):
        fidelity.update({"y": np.array([ours])}, {"y": np.array([theirs])})
    assert fidelity.sqnr_db == pytest.approx(sqnr, abs=1e-9)
    assert fidelity.cosine == pytest.approx(cosine, abs=1e-9)


def test_masked_numbers_are_not_compared() -> None:
    fidelity = Fidelity()
    fidelity.update({"y": np.array([[-np.inf, 1.0]])}, {"y": np.array([[-np.inf, 1.0]])})
    assert (fidelity.sqnr_db, fidelity.cosine) == (LARGEST_DB, 1.0)


def layer(name: str, db: float, metric: float | None = None, op_type: str = "Conv") -> LayerSensitivity:
    return LayerSensitivity(
        name=name, op_type=op_type, macs=1, local_sqnr_db=db, output_sqnr_db=db, output_cosine=1.0, metric=metric
    )


def test_ranks_by_output_error_and_by_metric_where_there_is_one() -> None:
    assert rank([layer("a", 30), layer("b", 20), layer("c", 10, op_type="Add")]) == ["c", "b", "a"]
    assert rank([layer("a", 30, 0.5), layer("b", 20, 0.9), layer("c", 10, 0.9)]) == ["a", "c", "b"]


def test_an_operator_without_a_metric_ranks_beside_the_layer_that_hurts_as_much() -> None:
    measured = [layer("a", 30, 0.5), layer("b", 20, 0.9)]
    assert rank([*measured, layer("c", 28, op_type="Mul")]) == ["c", "a", "b"]
    assert rank([*measured, layer("c", 22, op_type="Mul")]) == ["a", "b", "c"]


@pytest.mark.parametrize(("errors", "count"), [([20, 20], 2), ([10, 40, 40], 1), ([20, 30, 20, 30, 20], 3), ([200], 1)])
def test_few_nodes_make_most_of_the_error(errors: list[float], count: int) -> None:
    assert how_many_hurt([layer(str(index), db) for index, db in enumerate(errors)]) == count


@needs_vnni
@pytest.mark.parametrize("activations", ["static", "dynamic", "none"])
def test_layers_behind_a_table_of_codes_with_activations_of_every_kind(
    activations: Literal["static", "dynamic", "none"],
) -> None:
    target, net = load_target("x86-onnxruntime"), Net(seed=8)
    table = net.constant("table", net.rng.normal(size=(4096, 16)).astype(np.float32))
    x = net.op("Gather", [table, net.input("ids", ["n", 6], dtype=7)], "lookup")
    x = net.op("Tanh", [x], "tanh")
    model = net.model(net.matmul(net.op("Relu", [net.matmul(x, "a", 16, 32)], "relu"), "b", 32, 8))
    ids = [{"ids": np.arange(24, dtype=np.int64).reshape(4, 6) * 97 + seed} for seed in range(2)]
    model = assign_specs(simplify(model), target, Method(activations=activations))
    model = calibrate(model, target, [Batch(each) for each in ids], method=Method(calibrator="minmax"), threads=1)
    found = sensitivity(model, target, ids, threads=1)
    assert [layer.name for layer in found] == ["a", "b"]
    for layer in found:
        others = frozenset(str(node.name) for node in model.graph if node.name != layer.name)
        lowered, expected = lower_qdq(model, target, keep_float=others), Fidelity()
        for batch in ids:
            expected.update(simulate(lowered, batch), simulate(model, batch))
        assert 20 < layer.output_sqnr_db < 100
        assert layer.output_sqnr_db == pytest.approx(expected.sqnr_db, abs=0.01)
