from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import edgekit
from edgekit.errors import DataError
from edgekit.graph.annotations import annotated_values, get_params, set_params
from edgekit.graph.io import save_onnx
from edgekit.lift import Floor, Known, Search, keep_float, lift, parse_floor
from edgekit.lowering.qdq import lower_qdq
from edgekit.method import Method
from edgekit.metric import Evaluate, Runner
from edgekit.records import Metric
from edgekit.sensitivity import Fidelity
from edgekit.target import load_target
from edgekit.trials import Lifted, LiftState
from graphs import Array
from networks import annotate, residual_net, samples, simulate, text, token_net

PORTABLE = load_target("portable")
LAYERS = ("stem", "a1", "a2", "b1", "b2", "c1", "c2", "c.short", "head")


def coarse(model: ir.Model, *names: str) -> ir.Model:
    """The annotated model with the weights of some layers on a grid that loses nearly everything."""
    model = model.clone()
    for value in annotated_values(model.graph):
        if str(value.name).removesuffix(".weight") in names:
            params = get_params(value)
            assert params is not None
            set_params(value, replace(params, scale=params.scale * 60))
    return model


@pytest.fixture(scope="module")
def model() -> ir.Model:
    return annotate(residual_net())


@pytest.fixture(scope="module")
def batches(model: ir.Model) -> list[dict[str, Array]]:
    return [samples(model, 4, seed=seed) for seed in (1, 2)]


def closeness(model: ir.Model, batches: list[dict[str, Array]], *, offset: float = 0.9) -> Evaluate:
    """A metric that is `offset` for the float model and falls with the distance from it."""
    expected = simulate(model, batches[0])["head_y"]

    def evaluate(run: Runner) -> Metric:
        error = np.abs(run(batches[0])["head_y"] - expected).mean() / np.abs(expected).mean()
        return Metric(name="closeness", value=offset * (1 - float(error)))

    return evaluate


def test_what_is_good_enough_is_left_alone(model: ir.Model, batches: list[dict[str, Array]]) -> None:
    found = lift(model, PORTABLE, batches, Floor("dB", 20), ranking=LAYERS, threads=1)
    assert (found.met, found.finished, found.lifted) == (True, True, ())
    assert found.before == found.after > 20
    assert len(found.state.trials) == 1


def test_only_the_bad_layers_are_lifted_however_they_rank(model: ir.Model, batches: list[dict[str, Array]]) -> None:
    bad = coarse(model, "a2", "c1")
    found = lift(bad, PORTABLE, batches, Floor("dB", 25), ranking=LAYERS, threads=1)
    assert (found.met, found.finished, found.lifted) == (True, True, ("a2", "c1"))
    assert found.before < 20
    assert found.after >= 25 == found.needed
    lowered, fidelity = lower_qdq(bad, PORTABLE, keep_float=frozenset(found.lifted)), Fidelity()
    for batch in batches:
        fidelity.update(simulate(lowered, batch), simulate(model, batch))
    assert found.after == pytest.approx(fidelity.sqnr_db, abs=0.5)  # integer kernels round at ties as they like


def test_a_good_ranking_needs_few_trials(model: ir.Model, batches: list[dict[str, Array]]) -> None:
    bad = coarse(model, "c1")
    found = lift(bad, PORTABLE, batches, Floor("dB", 25), ranking=("c1", *LAYERS), threads=1)
    assert found.lifted[:1] == ("c1",)
    assert len(found.state.trials) == 2


def test_points_are_hundredths_of_a_share_and_units_of_other_metrics(
    model: ir.Model, batches: list[dict[str, Array]]
) -> None:
    bad = coarse(model, "c1")
    for offset, point in ((0.9, 0.01), (90.0, 1.0)):
        metric = closeness(model, batches, offset=offset)
        found = lift(bad, PORTABLE, [], Floor("points", 5), ranking=LAYERS, metric=metric, threads=1)
        assert found.float_value == pytest.approx(offset, rel=1e-5)
        assert found.needed == pytest.approx(offset - 5 * point, rel=1e-5)
        assert (found.met, found.lifted) == (True, ("c1",))
        assert found.before < found.needed <= found.after


def test_a_floor_that_cannot_be_met_gives_the_best_that_was_found(
    model: ir.Model, batches: list[dict[str, Array]]
) -> None:
    found = lift(coarse(model, "a2", "c1"), PORTABLE, batches, Floor("dB", 60), ranking=("a2", "b1"), threads=1)
    assert (found.met, found.finished) == (False, True)
    assert "a2" in found.lifted
    assert found.before < found.after < 60
    assert found.after == max(trial.value for trial in found.state.trials)


def test_it_ends_within_its_time_with_the_best_so_far(model: ir.Model, batches: list[dict[str, Array]]) -> None:
    bad = coarse(model, "a2", "c1")
    plain = closeness(model, batches)

    def slow(run: Runner) -> Metric:
        time.sleep(0.3)
        return plain(run)

    start = time.monotonic()
    found = lift(
        bad, PORTABLE, [], Floor("points", 5), ranking=LAYERS, search=Search(budget_s=1.0), metric=slow, threads=1
    )
    assert time.monotonic() - start < 6
    assert not found.finished
    assert 1 <= len(found.state.trials) <= 3
    assert found.after == max(trial.value for trial in found.state.trials)
    at_once = lift(bad, PORTABLE, batches, Floor("dB", 25), ranking=LAYERS, search=Search(budget_s=0.0), threads=1)
    assert (at_once.finished, at_once.lifted, len(at_once.state.trials)) == (False, (), 1)


def test_a_search_goes_on_where_it_was_stopped(model: ir.Model, batches: list[dict[str, Array]]) -> None:
    bad = coarse(model, "a2", "c1")
    floor = Floor("cosine", 0.999)
    whole = lift(bad, PORTABLE, batches, floor, ranking=LAYERS, threads=1)
    stored: list[str] = []

    class Interrupted(Exception):
        pass

    def on_trial(state: LiftState) -> None:
        stored.append(state.model_dump_json())
        if len(state.trials) == 4:
            raise Interrupted

    with pytest.raises(Interrupted):
        lift(bad, PORTABLE, batches, floor, ranking=LAYERS, on_trial=on_trial, threads=1)
    later: list[LiftState] = []
    state = LiftState.model_validate_json(stored[-1])
    resumed = lift(bad, PORTABLE, batches, floor, ranking=LAYERS, state=state, on_trial=later.append, threads=1)
    assert resumed == whole
    assert len(later) == len(whole.state.trials) - 4


def test_the_state_of_another_search_is_not_believed(model: ir.Model, batches: list[dict[str, Array]]) -> None:
    bad = coarse(model, "a2")
    state = lift(bad, PORTABLE, batches, Floor("dB", 25), ranking=LAYERS, threads=1).state
    assert lift(bad, PORTABLE, batches, Floor("dB", 25), ranking=LAYERS, threads=1).state == state
    others = [
        lift(coarse(model, "a1"), PORTABLE, batches, Floor("dB", 25), ranking=LAYERS, state=state, threads=1),
        lift(bad, load_target("x86-onnxruntime"), batches, Floor("dB", 25), ranking=LAYERS, state=state, threads=1),
        lift(bad, PORTABLE, batches[:1], Floor("dB", 25), ranking=LAYERS, state=state, threads=1),
        lift(bad, PORTABLE, batches, Floor("cosine", 0.9), ranking=LAYERS, state=state, threads=1),
    ]
    assert all(other.state.key != state.key for other in others)


def test_a_metric_that_fails_loses_no_trial(model: ir.Model, batches: list[dict[str, Array]]) -> None:
    plain, calls = closeness(model, batches), list[int]()
    states: list[LiftState] = []

    def failing(run: Runner) -> Metric:
        calls.append(1)
        if len(calls) == 4:
            raise DataError("--evaluate returned nan")
        return plain(run)

    with pytest.raises(DataError, match="nan"):
        lift(
            coarse(model, "a2", "c1"),
            PORTABLE,
            [],
            Floor("points", 5),
            ranking=LAYERS,
            metric=failing,
            on_trial=states.append,
            threads=1,
        )
    assert len(states[-1].trials) == 2  # the float model is no trial


def test_lifted_layers_stay_float_for_every_target(model: ir.Model) -> None:
    marked = keep_float(model, ["a1", "head"])
    for name in ("portable", "x86-onnxruntime", "x86-openvino", "cuda-tensorrt"):
        target = load_target(name)
        assert text(lower_qdq(marked, target)) == text(lower_qdq(model, target, keep_float=frozenset({"a1", "head"})))
    assert all(not node.metadata_props for node in model.graph)


@pytest.mark.parametrize(
    ("written", "floor"),
    [
        ("0.5", Floor("points", 0.5)),
        (" 1 ", Floor("points", 1)),
        ("30dB", Floor("dB", 30)),
        ("32.5 db", Floor("dB", 32.5)),
        ("cos0.999", Floor("cosine", 0.999)),
        ("COS .98", Floor("cosine", 0.98)),
    ],
)
def test_floors_as_they_are_written(written: str, floor: Floor) -> None:
    assert parse_floor(written) == floor
    assert parse_floor(str(floor)) == floor


@pytest.mark.parametrize("written", ["", "half", "-1", "cos0.9dB", "30 dBm", "1e3", "cos", "nan"])
def test_what_is_no_floor_is_explained(written: str) -> None:
    with pytest.raises(DataError, match=r"no floor; give points .*30dB.*cos0\.999"):
        parse_floor(written)


def test_a_cosine_is_below_one() -> None:
    with pytest.raises(DataError, match="below 1"):
        parse_floor("cos30")


def test_a_floor_without_what_it_is_measured_on_is_refused(model: ir.Model) -> None:
    with pytest.raises(DataError, match="--evaluate"):
        lift(model, PORTABLE, [], Floor("points", 1), ranking=LAYERS)
    with pytest.raises(DataError, match="at least one batch"):
        lift(model, PORTABLE, [], Floor("dB", 30), ranking=LAYERS)


def test_progress_says_what_a_trial_found(model: ir.Model, batches: list[dict[str, Array]]) -> None:
    told: list[tuple[str, int, int | None]] = []
    bad = coarse(model, "a2")
    lift(bad, PORTABLE, batches, Floor("dB", 25), ranking=LAYERS, threads=1, on_progress=lambda *s: told.append(s))
    assert [done for _, done, _ in told] == list(range(1, len(told) + 1))
    assert all(total is not None and total >= done for _, done, total in told)
    assert told[0][0].endswith("with 0 layers in float, 25 wanted")


@pytest.mark.parametrize(
    "method",
    [
        Method(weights="int4", block_size=16, activations="none"),
        Method(weights="int2", activations="none"),
        Method(activations="dynamic"),
    ],
    ids=["int4", "int2", "dynamic"],
)
def test_layers_of_every_kind_are_lifted_for_every_later_use(method: Method, tmp_path: Path) -> None:
    model = token_net()
    save_onnx(model, tmp_path / "net.onnx")
    data = samples(model, 48)
    record = edgekit.compress(
        tmp_path / "net.onnx",
        tmp_path / "out",
        calibration=data,
        method=method,
        max_drop="100dB",
        time_budget=60,
        explain=True,
    ).record
    assert record.lifted is not None and record.proxy is not None
    assert len(record.sensitivity) == len(record.lifted.lifted) == 3
    assert record.proxy.after > 100


def test_more_than_the_floor_is_taken_where_it_costs_little(model: ir.Model, batches: list[dict[str, Array]]) -> None:
    """With two bad layers of many: the floor takes one, an aim that takes both is worth it, one that takes all is not."""
    bad = coarse(model, "a2", "c1")
    ranking = ("a2", "c1", *(name for name in LAYERS if name not in ("a2", "c1")))

    def lifted(least: float, aim: Floor | None = None) -> Lifted:
        return lift(bad, PORTABLE, batches, Floor("dB", least), ranking=ranking, search=Search(aim=aim), threads=1)

    both = lifted(25)
    values = {trial.lifted: trial.value for trial in both.state.trials}
    floor = (both.before + values["a2",]) / 2
    assert lifted(floor).lifted == ("a2",)
    assert lifted(floor, aim=Floor("dB", 25)).lifted == ("a2", "c1") == both.lifted
    unreached = lifted(floor, aim=Floor("dB", 150))
    assert unreached.met and len(unreached.lifted) <= 2


def test_what_the_ranking_has_before_a_bad_layer_need_not_be_given_back(
    model: ir.Model, batches: list[dict[str, Array]]
) -> None:
    """Sets that are tried until one decides rightly by chance are no better for it."""
    bad, ranking = coarse(model, "c1"), ("a1", "b1", "c1", "b2", "a2")
    first = lift(bad, PORTABLE, batches, Floor("dB", 20), ranking=ranking, search=Search(give_back=False), threads=1)
    assert first.met and first.finished and first.lifted == ("a1", "b1", "c1")
    assert lift(bad, PORTABLE, batches, Floor("dB", 20), ranking=ranking, threads=1).lifted == ("c1",)


def test_where_no_set_reaches_the_aim_the_fewest_for_the_floor_are_found(
    model: ir.Model, batches: list[dict[str, Array]]
) -> None:
    """The two bad layers rank last of five; the others of the model cannot be left in float."""
    bad, ranking = coarse(model, "a2", "c1"), ("a1", "b1", "b2", "a2", "c1")
    aim = Floor("dB", 150)
    found = lift(bad, PORTABLE, batches, Floor("dB", 25), ranking=ranking, search=Search(aim=aim), threads=1)
    assert found.met and found.finished and found.lifted == ("a2", "c1")
    ranking = ("a2", "c1", "a1", "b1", "b2")
    search = Search(first=5, aim=aim, give_back=False)
    found = lift(bad, PORTABLE, batches, Floor("dB", 25), ranking=ranking, search=search, threads=1)
    assert found.met and found.finished and found.lifted == ("a2", "c1")


def test_what_is_known_is_not_asked_again(model: ir.Model, batches: list[dict[str, Array]]) -> None:
    bad, asked = coarse(model, "c1"), []
    metric = closeness(model, batches)

    def counted(run: Runner) -> Metric:
        asked.append(metric(run))
        return asked[-1]

    whole = lift(bad, PORTABLE, [], Floor("points", 5), ranking=LAYERS, metric=counted, threads=1)
    first = len(asked)
    search = Search(known=Known(of_float=whole.float_value or 0.0, before=whole.before))
    again = lift(bad, PORTABLE, [], Floor("points", 5), ranking=LAYERS, search=search, metric=counted, threads=1)
    assert len(asked) - first == first - 2
    assert again == whole
