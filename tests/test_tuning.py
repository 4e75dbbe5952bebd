from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from edgekit.backend import Artifact, Availability, CompiledModel, KernelRecord, get_backend
from edgekit.errors import BackendError
from edgekit.records import TunedPlacement
from edgekit.target import Target, load_target
from edgekit.tuning import Unit, fronts, placement_key, read_placement, regions, tune_placement, units, write_placement
from mobile_net import mobile_net
from networks import annotate, residual_net, samples

TARGET = load_target("x86-onnxruntime")


class Burdened:
    """ONNX Runtime, whose graphs have a large matrix product more while `heavy` says so of a layer that is quantized or not."""

    name = "onnxruntime"

    def __init__(self, *heavy: str, when_float: bool = False, refuses: str = "") -> None:
        self._plain = get_backend("onnxruntime")
        self._heavy, self._when_float, self._refuses = heavy, when_float, refuses

    def lower(self, model: ir.Model, target: Target, *, keep_float: frozenset[str]) -> ir.Model:
        lowered = self._plain.lower(model, target, keep_float=keep_float)
        slow = [name for name in self._heavy if (name in keep_float) == self._when_float]
        graph, x = lowered.graph, lowered.graph.inputs[0]
        for name in slow:
            weight = ir.val(f"{name}/burden", const_value=ir.tensor(np.full((1, 4_000_000), 1e-9, np.float32)))
            graph.register_initializer(weight)
            scalar = ir.node("ReduceMax", [x], {"keepdims": 0}, name=f"{name}/scalar")
            wide = ir.node("Mul", [weight, scalar.outputs[0]], name=f"{name}/wide")
            total = ir.node("ReduceSum", [wide.outputs[0]], {"keepdims": 0}, name=f"{name}/total")
            output = graph.outputs[0]
            add = ir.node("Add", [output, total.outputs[0]], name=f"{name}/add")
            add.outputs[0].type, add.outputs[0].shape = output.type, output.shape
            graph.extend([scalar, wide, total, add])
            graph.outputs[0] = add.outputs[0]
            output.name, add.outputs[0].name = f"{name}/before", output.name
        return lowered

    def convert(self, model: Path, target: Target, out: Path, *, precision: str) -> Artifact:
        if self._refuses and self._refuses not in model.read_bytes().decode("latin-1"):
            raise BackendError("the runtime refuses it")
        return self._plain.convert(model, target, out, precision=precision)

    def available(self, target: Target) -> Availability:
        return self._plain.available(target)

    def check(self, model: ir.Model, target: Target) -> list[str]:
        return self._plain.check(model, target)

    def float_precisions(self, target: Target) -> tuple[str, ...]:
        return self._plain.float_precisions(target)

    def load(self, artifact: Artifact, target: Target, *, exact: bool) -> CompiledModel:
        return self._plain.load(artifact, target, exact=exact)

    def planned_kernels(self, artifact: Artifact) -> Sequence[KernelRecord]:
        return self._plain.planned_kernels(artifact)


@pytest.fixture(scope="module")
def model() -> ir.Model:
    return annotate(mobile_net(side=16, blocks=1), count=2)


@pytest.fixture(autouse=True)
def short_bursts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"BURST_SECONDS": 0.02, "FINAL_BURSTS": 7, "FINAL_BURST_SECONDS": 0.02}.items():
        monkeypatch.setattr(f"edgekit.tuning.{name}", value)
    monkeypatch.setattr("edgekit.measure.MOST_WARMUP_BURSTS", 2)


def test_units_are_layers_with_what_is_light_behind_them() -> None:
    found = units(annotate(mobile_net(side=32, blocks=2), count=2), TARGET)
    assert [unit.names for unit in found] == [
        ("stem",), ("0.dw",), ("0.pw",), ("1.dw",), ("1.pw", "pool"), ("head",),
    ]  # fmt: skip
    assert [unit.kind for unit in found] == ["stem", "depthwise", "conv", "depthwise", "conv", "product"]
    assert [unit.channels for unit in found] == [8, 8, 16, 16, 24, 10]
    assert [unit.intensity for unit in found] == [27, 9, 8, 9, 16, 24]
    residual = units(annotate(residual_net(), count=2), TARGET)
    assert ("a2", "a.add") in [unit.names for unit in residual]


def test_units_that_must_be_float_are_none(model: ir.Model) -> None:
    found = units(model, TARGET, keep_float=frozenset({"stem", "head"}))
    assert [unit.names[0] for unit in found] == ["0.dw", "0.pw"]


def test_fronts_are_everything_and_halves_of_it() -> None:
    found = units(annotate(mobile_net(side=32, blocks=2), count=2), TARGET)
    assert [len(change.units) for change in fronts(found)] == [6, 4, 2, 1]
    assert fronts(found)[-1].units == {found[0]}
    assert fronts([]) == []


def test_regions_are_runs_and_widths_once() -> None:
    tried = regions(units(annotate(mobile_net(side=32, blocks=3), count=2), TARGET))
    sets = [frozenset(unit.names[0] for unit in change.units) for change in tried]
    assert len(set(sets)) == len(sets)
    assert len({change.what for change in tried}) == len(tried)
    for expected in (
        {"stem"},
        {"stem", "0.dw", "0.pw"},  # one size
        {"0.dw", "1.dw"},  # depthwise, at most 16 channels
        {"0.dw", "1.dw", "2.dw"},
        {"1.dw", "1.pw"},  # one size
        {"head"},
    ):
        assert expected in sets
    assert sets.index(frozenset({"0.dw"})) < sets.index(frozenset({"2.pw"}))  # 9 products an element before 24
    assert regions([]) == []


def test_equal_layers_in_a_row_are_one_region() -> None:
    row = [Unit((name,), "conv", (8, 4, 4), 8, 72.0) for name in "abc"]
    other = Unit(("d",), "conv", (8, 4, 4), 8, 8.0)
    assert frozenset(row) in {change.units for change in regions([*row, other])}


def test_a_layer_that_is_slow_in_int8_comes_out_float_and_what_must_be_float_stays_so(model: ir.Model) -> None:
    must = frozenset({"head"})
    found = tune_placement(model, TARGET, Burdened("stem"), samples(model, 1), keep_float=must, time_budget_s=3.0)
    assert {"head", "stem"} <= set(found.keep_float)
    assert found.ratio is not None and found.ci_low is not None and found.ci_low > 1
    assert found.steps[0].kept
    assert all("head" not in step.layers for step in found.steps)
    assert found.runtime.startswith("onnxruntime ")


def test_it_never_gets_slower_than_it_started(model: ir.Model) -> None:
    every = [name for unit in units(model, TARGET) for name in unit.names]
    found = tune_placement(model, TARGET, Burdened(*every, when_float=True), samples(model, 1), time_budget_s=3.0)
    assert found.keep_float == ()
    assert found.steps and not any(step.kept for step in found.steps)
    assert all(step.ci_high is not None and step.ci_high < 1 for step in found.steps)


def test_no_time_is_no_change(model: ir.Model) -> None:
    found = tune_placement(
        model, TARGET, Burdened(), samples(model, 1), keep_float=frozenset({"head"}), time_budget_s=0.0
    )
    assert (found.keep_float, found.steps, found.finished, found.ratio) == (("head",), (), False, None)


def test_a_placement_that_the_runtime_refuses_is_passed_over(model: ir.Model) -> None:
    refusing = Burdened("stem", refuses="stem.weight_quantized")  # refuses what has the stem in float
    found = tune_placement(model, TARGET, refusing, samples(model, 1), time_budget_s=3.0)
    assert "stem" not in found.keep_float
    assert any(step.failure == "the runtime refuses it" for step in found.steps)


def test_a_start_that_the_runtime_refuses_is_an_error(model: ir.Model) -> None:
    with pytest.raises(BackendError, match="refuses"):
        tune_placement(model, TARGET, Burdened(refuses="no such bytes"), samples(model, 1))


def test_results_are_stored_by_what_they_depend_on(model: ir.Model, tmp_path: Path) -> None:
    backend, feeds = get_backend("onnxruntime"), samples(model, 1)
    key = placement_key(model, TARGET, backend, feeds)
    assert key == placement_key(model.clone(), TARGET, backend, samples(model, 1, seed=9))
    others = {
        placement_key(annotate(mobile_net(side=16, blocks=1), count=3), TARGET, backend, feeds),
        placement_key(model, load_target("x86-openvino"), backend, feeds),
        placement_key(model, TARGET, backend, samples(model, 2)),
        placement_key(model, TARGET, backend, feeds, keep_float=frozenset({"stem"})),
    }
    assert len(others | {key}) == 5
    placement = TunedPlacement(key=key, target=TARGET.name, runtime="onnxruntime 1", keep_float=("stem",), ratio=1.3)
    assert read_placement(tmp_path, key) is None
    write_placement(tmp_path, placement)
    assert read_placement(tmp_path, key) == placement
    assert read_placement(tmp_path, key[:16] + "0" * 48) is None
    next(tmp_path.iterdir()).write_text("{")
    assert read_placement(tmp_path, key) is None
