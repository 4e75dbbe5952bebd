"""`--search`: the descent over methods alone, and through the pipeline, the recipe and the command line."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import edgekit
from conftest import Cli, TinyFiles
from edgekit.errors import DataError
from edgekit.method import Method
from edgekit.passes.simplify import simplify
from edgekit.pipelines.search import Plan, options
from edgekit.records import Compressed, read_compressed
from edgekit.search import Choice, search
from edgekit.target import load_target
from edgekit.trials import Searched, difference
from graphs import Array
from networks import Net, residual_net, samples, token_net

BLANK = Searched(key="k", judged_by="value", judged_on="a table")
CHOICES: list[Choice] = [
    [{"calibrator": name} for name in ("auto", "kld", "mse")],
    [{"smooth": True}, {"smooth": False}],
    [{"equalize": False}, {"equalize": True}],
]
UNTRAINED = Method(rounding="auto")
"""The default without rounding in question, so that nothing is trained."""


def worth(method: Method, number: int) -> float:
    """KLD is good with smoothing off only, which is worth it with equalization only: a second round is needed."""
    kld = {True: 1.0, False: 5.0}[method.smooth] if method.calibrator == "kld" else 0.0
    smooth = (0.0 if method.smooth else 0.5) if method.equalize else (0.0 if method.smooth else -8.0)
    return kld + smooth + (2.0 if method.calibrator == "mse" else 0.0) + (1.0 if method.equalize else 0.0)


def outcome(searched: Searched) -> list[tuple[str, float, bool]]:
    return [(trial.changed, trial.value, trial.kept) for trial in searched.trials]


def test_rounds_go_on_until_one_gains_nothing() -> None:
    found = search(Method(), CHOICES, worth, blank=BLANK)
    assert found.finished
    assert difference(Method(), found.best.method) == "calibrator kld, smooth off, equalize on"
    assert found.best.value == max(trial.value for trial in found.trials) == 6.5
    methods = [trial.method for trial in found.trials]
    assert len(set(methods)) == len(methods), "nothing is tried twice"
    kept = [trial.value for trial in found.trials if trial.kept]
    assert kept == sorted(set(kept)), "each is better than the one before"


def test_of_equal_methods_the_earliest_stays() -> None:
    found = search(Method(), CHOICES, lambda method, number: 1.0, blank=BLANK)
    assert found.best.method == Method()
    assert [trial.kept for trial in found.trials] == [True] + [False] * 4


def test_what_is_good_enough_ends_it() -> None:
    found = search(Method(), CHOICES, worth, blank=BLANK.model_copy(update={"needed": 1.0}))
    assert found.finished
    assert [trial.changed for trial in found.trials] == ["", "calibrator kld"]


def test_dear_options_come_last_and_once() -> None:
    found = search(Method(), CHOICES, worth, last=[{"rounding": "adaround", "rounding_budget": 0.0}], blank=BLANK)
    assert [trial.method.rounding for trial in found.trials].count("adaround") == 1
    assert found.trials[-1].changed == "rounding adaround, rounding budget 0"
    assert found.trials[-1].method.calibrator == "kld"


def test_a_dear_option_needs_time_for_itself_and_for_the_winner() -> None:
    last = [{"rounding": "adaround", "rounding_budget": 60.0}]
    found = search(Method(), [], worth, last=last, time_budget_s=119.0, blank=BLANK)
    assert (len(found.trials), found.finished) == (1, False)
    found = search(Method(), [], worth, last=last, time_budget_s=121.0, blank=BLANK)
    assert (len(found.trials), found.finished) == (2, True)


def test_it_ends_within_its_time_with_the_best_so_far() -> None:
    def slow(method: Method, number: int) -> float:
        time.sleep(0.1)
        return worth(method, number)

    begin = time.monotonic()
    found = search(Method(), CHOICES, slow, time_budget_s=0.5, blank=BLANK)
    assert time.monotonic() - begin < 2
    assert not found.finished
    assert 1 <= len(found.trials) <= 4
    assert found.best.value == max(trial.value for trial in found.trials)


def uneven() -> ir.Model:
    """Two convolutions whose channels between them differ by a factor of a thousand, and all count: equalization mends it."""
    net = Net(seed=4)
    spread = np.geomspace(1, 1000, 8, dtype=np.float32)
    first = net.rng.normal(0, 0.3, (8, 3, 3, 3)).astype(np.float32) * spread[:, None, None, None]
    second = net.rng.normal(0, 0.3, (6, 8, 1, 1)).astype(np.float32) / spread[None, :, None, None]
    x = net.input("x", ["n", 3, 8, 8])
    x = net.op("Relu", [net.op("Conv", [x, net.constant("a.weight", first)], "a", kernel_shape=[3, 3])], "relu")
    return net.model(net.op("Conv", [x, net.constant("b.weight", second)], "b", kernel_shape=[1, 1]))


@pytest.fixture(scope="module")
def channels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Mapping[str, Array]]:
    folder = tmp_path_factory.mktemp("uneven")
    ir.save(uneven(), folder / "uneven.onnx")
    return folder / "uneven.onnx", samples(uneven(), 60)


def searched_record(
    net: tuple[Path, Mapping[str, Array]], out: Path, method: Method = UNTRAINED, **more: Any
) -> Compressed:
    return edgekit.compress(net[0], out, calibration=net[1], method=method, search=True, **more).record


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_it_finds_what_a_network_needs(channels: tuple[Path, Mapping[str, Array]], tmp_path: Path) -> None:
    record = searched_record(channels, tmp_path / "out")
    found = record.searched
    assert found is not None
    assert found.finished
    assert found.trials[0].method == UNTRAINED
    assert record.method == found.best.method
    assert record.method.equalize
    assert found.best.value > found.trials[0].value + 10
    assert found.judged_on == "11 samples set apart"
    assert record.samples == 45, "the winner is calibrated on all"
    assert any(f"equalize on is better ({found.best.value:.4g}) than" in note for note in record.notes)
    report = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "| trial | changed | SQNR (dB) of the worst output | seconds |" in report
    assert all(f"| {trial.changed} |" in report for trial in found.trials[1:])
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "what was remembered is gone"


def test_the_same_again_gives_the_same_bytes(channels: tuple[Path, Mapping[str, Array]], tmp_path: Path) -> None:
    method = Method(rounding="auto", equalize=True)
    records = [searched_record(channels, tmp_path / name, method, seed=3) for name in ("one", "two")]
    one, two = (outcome(record.searched) for record in records if record.searched)
    assert one == two
    assert sha(tmp_path / "one" / "model.onnx") == sha(tmp_path / "two" / "model.onnx")
    plain = searched_record(channels, tmp_path / "plain", method).searched
    assert plain is not None
    assert [changed for changed, *_ in outcome(plain)] != [changed for changed, *_ in one], "another order"


def test_what_the_user_chose_stays(channels: tuple[Path, Mapping[str, Array]], tmp_path: Path) -> None:
    method = Method(rounding="nearest", equalize=False, calibrator="minmax")
    found = searched_record(channels, tmp_path / "out", method).searched
    assert found is not None
    assert {(t.method.rounding, t.method.equalize, t.method.calibrator) for t in found.trials} == {
        ("nearest", False, "minmax")
    }
    assert [trial.changed for trial in found.trials] == ["", "bias correction off"]


class Interrupter:
    """Interrupts after some trials; remembers which were made."""

    def __init__(self, after: float = math.inf) -> None:
        self.after, self.made, self.totals = after, 0, set[int | None]()

    def __call__(self, step: str, done: int, total: int | None) -> None:
        if step.startswith("search: "):
            self.made += 1
            self.totals.add(total)
            if self.made >= self.after:
                raise KeyboardInterrupt


def test_it_goes_on_where_it_was_interrupted(channels: tuple[Path, Mapping[str, Array]], tmp_path: Path) -> None:
    whole = searched_record(channels, tmp_path / "whole", on_progress=(undisturbed := Interrupter())).searched
    assert whole is not None
    assert undisturbed.made == len(whole.trials)
    with pytest.raises(KeyboardInterrupt):
        searched_record(channels, tmp_path / "out", on_progress=Interrupter(after=4))
    assert [path.name for path in tmp_path.glob("*out*")] == [".out.methods.json"]
    second = Interrupter()
    again = searched_record(channels, tmp_path / "out", on_progress=second).searched
    assert again is not None
    assert second.made == len(whole.trials) - 4
    assert outcome(again) == outcome(whole)
    assert [trial.seconds for trial in again.trials[:4]] != [trial.seconds for trial in whole.trials[:4]]
    assert sha(tmp_path / "out" / "model.onnx") == sha(tmp_path / "whole" / "model.onnx")
    assert not list(tmp_path.glob(".*"))


def test_what_was_remembered_of_another_search_is_not_used(
    channels: tuple[Path, Mapping[str, Array]], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        searched_record(channels, tmp_path / "out", on_progress=Interrupter(after=3))
    other = (channels[0], samples(uneven(), 60, seed=1))
    progress = Interrupter()
    found = searched_record(other, tmp_path / "out", on_progress=progress).searched
    assert found is not None
    assert progress.made == len(found.trials)


def test_without_time_it_ends_with_the_method_to_begin_with(
    channels: tuple[Path, Mapping[str, Array]], tmp_path: Path
) -> None:
    record = searched_record(channels, tmp_path / "out", time_budget=1e-6)
    assert record.searched is not None
    assert (len(record.searched.trials), record.searched.finished) == (1, False)
    assert record.method == UNTRAINED
    assert any("time was up before the search was over: run the same again" in note for note in record.notes)
    assert (tmp_path / ".out.methods.json").is_file(), "the next run goes on"
    edgekit.compress(channels[0], tmp_path / "plain", calibration=channels[1], time_budget=1e-6)
    assert sha(tmp_path / "out" / "model.onnx") == sha(tmp_path / "plain" / "model.onnx")


def test_a_floor_that_is_met_ends_it_and_one_that_is_not_lifts_layers_of_the_winner(
    channels: tuple[Path, Mapping[str, Array]], tmp_path: Path
) -> None:
    easy = searched_record(channels, tmp_path / "easy", max_drop="1dB")
    assert easy.searched is not None
    assert len(easy.searched.trials) == 1
    assert any("is good enough" in note for note in easy.notes)
    hard = searched_record(channels, tmp_path / "hard", max_drop="cos0.9999999999")
    assert hard.searched is not None
    assert hard.lifted is not None
    assert hard.searched.judged_by == "cosine of the worst output"
    assert hard.method.equalize
    assert hard.lifted.lifted


def test_the_metric_decides_where_there_is_one(tiny: TinyFiles, tmp_path: Path) -> None:
    record = edgekit.compress(
        tiny.model,
        tmp_path / "out",
        calibration=tiny.data,
        evaluate=tiny.data,
        method=Method(weights="int4", calibrator="minmax", rounding="auto", smooth=False),
        search=True,
        proxy="none",
    ).record
    found = record.searched
    assert found is not None
    assert record.simulated_metric is not None
    assert (found.judged_by, found.judged_on) == ("top-1", "the metric's own data")
    assert found.best.value == record.simulated_metric.value, "all samples calibrate in trials"
    assert found.best.value >= found.trials[0].value


def test_points_of_the_metric_end_it(tiny: TinyFiles, tmp_path: Path) -> None:
    options = {"calibration": tiny.data, "evaluate": tiny.data, "search": True, "method": UNTRAINED}
    found = edgekit.compress(tiny.model, tmp_path / "out", max_drop=50, **options).record.searched  # type: ignore[arg-type]
    assert found is not None
    assert found.needed == pytest.approx(0.5, abs=1e-9)
    assert (len(found.trials), found.finished) == (1, True)


def test_a_metric_that_fails_is_named_and_no_trial_is_lost(
    channels: tuple[Path, Mapping[str, Array]], tmp_path: Path
) -> None:
    calls = 0

    def fragile(run: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == 5:  # after float, twice, and two trials
            raise ZeroDivisionError("no boxes")
        return float(-np.abs(run({"x": channels[1]["x"][:4]})["b_y"]).mean())

    with pytest.raises(DataError, match=r"--evaluate fragile.*no boxes"):
        searched_record(channels, tmp_path / "out", evaluate=fragile)
    assert not (tmp_path / "out").exists()
    progress = Interrupter()
    found = searched_record(channels, tmp_path / "out", evaluate=fragile, on_progress=progress).searched
    assert found is not None
    assert progress.made == len(found.trials) - 2


@pytest.mark.parametrize(
    ("choices", "names"),
    [
        ({}, ["calibrator", "smooth", "bias_correction", "rounding"]),
        ({"smooth": True}, ["calibrator", "bias_correction", "rounding"]),
        ({"activations": "dynamic"}, ["bias_correction", "rounding"]),
        ({"activations": "none", "weights": "uint4", "block_size": 16}, ["bias_correction", "rounding"]),
    ],
)
def test_only_what_can_matter_is_tried(choices: dict[str, Any], names: list[str]) -> None:
    found, last = options(token_net(), load_target("portable"), Method(**choices), Plan(None, 100.0, 0, Path("state")))
    assert [next(iter(choice[0])) for choice in found] == names
    assert found[-1] == [{"rounding": "auto"}, {"rounding": "nearest"}]
    trained = [{"rounding": "adaround", "rounding_budget": 20.0}]
    assert list(last) == (trained if importlib.util.find_spec("torch") else [])


def test_convolutions_have_other_roundings() -> None:
    model = simplify(residual_net())
    found, _ = options(model, load_target("portable"), Method(smooth=True), Plan(None, 9.0, 0, Path("state")))
    assert found[-1] == [{"rounding": "auto"}, {"rounding": "nearest"}, {"rounding": "gptq"}]
    assert [{"equalize": False}, {"equalize": True}] in found


def test_few_samples_and_a_static_batch(tmp_path: Path) -> None:
    model = residual_net(batch=4)
    ir.save(model, tmp_path / "net.onnx")
    method = Method(calibrator="minmax", rounding="nearest", equalize=False, smooth=False)
    for count, judged_on in ((16, "4 samples set apart"), (8, "the samples that calibrate, for want of others")):
        data = {"x": np.random.default_rng(0).normal(0, 1, (count, 3, 16, 16)).astype(np.float32)}
        found = searched_record((tmp_path / "net.onnx", data), tmp_path / f"out{count}", method).searched
        assert found is not None
        assert found.judged_on == judged_on
        assert [trial.changed for trial in found.trials] == ["", "bias correction off"]


def test_trained_rounding_is_tried_last(channels: tuple[Path, Mapping[str, Array]], tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="AdaRound needs torch")
    method = Method(calibrator="minmax", equalize=True, bias_correction=True, rounding_budget=0.5)
    found = searched_record(channels, tmp_path / "out", method).searched
    assert found is not None
    assert [t.changed for t in found.trials] == ["", "rounding gptq", "rounding adaround"]


def test_the_command_line_and_the_recipe_reach_it(tiny: TinyFiles, tmp_path: Path, cli: Cli) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[compress]\nsearch = true\nseed = 2\nsamples = 40\n[method]\nrounding = "nearest"\n')
    arguments = ("compress", tiny.model, "--calibration", tiny.data, "--no-equalize", "--recipe", recipe)
    done = cli(*arguments, "--calibrator", "kld", "-o", tmp_path / "out")
    assert done.code == 0, done.stderr
    found = read_compressed(tmp_path / "out").searched
    assert found is not None
    assert {trial.method.calibrator for trial in found.trials} == {"kld"}
    assert {trial.method.rounding for trial in found.trials} == {"nearest"}
    assert {trial.method.smooth for trial in found.trials} == {True, False}
    assert "note: search: " in done.stdout
    flags = ("--search", "--calibrator", "kld", "--rounding", "nearest", "--samples", 40, "--no-equalize")
    done = cli("compress", tiny.model, "--calibration", tiny.data, *flags, "-o", tmp_path / "flags")
    assert done.code == 0, done.stderr
    assert sha(tmp_path / "flags" / "model.onnx") == sha(tmp_path / "out" / "model.onnx")


@pytest.mark.parametrize(
    ("given", "word"), [({"seed": 1}, "--seed 1"), ({"time_budget": 60.0, "proxy": "none"}, "--time-budget 60")]
)
def test_options_of_a_search_without_one_are_refused(
    given: dict[str, Any], word: str, tiny: TinyFiles, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=f"{word} is .* there is no(ne| search): give --search"):
        edgekit.compress(tiny.model, tmp_path / "out", calibration=tiny.data, **given)
    assert list(tmp_path.iterdir()) == []
