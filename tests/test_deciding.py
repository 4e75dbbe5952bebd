"""Which samples decide whether a quantized model is good enough."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import edgekit
from edgekit.data import BoundData, open_data
from edgekit.errors import OutputError
from edgekit.graph.io import save_onnx
from edgekit.graph.run import Session
from edgekit.pipelines import decision as judging
from edgekit.pipelines import split
from edgekit.pipelines.decision import Decision, open_decision
from edgekit.pipelines.expected import what_is_expected
from edgekit.pipelines.sources import input_specs
from edgekit.pipelines.split import MOST_DECIDING, deciding
from edgekit.pipelines.stored import open_stored
from edgekit.proxy import Proxy
from edgekit.records import Compressed, Metric
from edgekit.sensitivity import MOST
from edgekit.target import load_target
from networks import Net
from test_proxy import PLAIN, one_bad_layer

Feeds = dict[str, np.ndarray]


def by_ease(factor: float, folder: Path, samples: int = 256) -> np.ndarray:
    """Samples in the order in which a network in `folder` tells them apart, the hardest first."""
    model, data = one_bad_layer(factor, samples)
    save_onnx(model, folder / "net.onnx")
    [scores] = Session(model, optimize=True).run(data).values()
    ordered = np.sort(scores, axis=1)
    return data["x"][np.argsort(ordered[:, -1] - ordered[:, -2])]


def compressed(samples: np.ndarray, folder: Path) -> Compressed:
    """Of a function, whose last samples are held back."""

    def calls() -> Iterator[Feeds]:
        yield from ({"x": batch} for batch in np.split(samples, len(samples) // 8))

    return edgekit.compress(folder / "net.onnx", folder / "out", calibration=calls, samples=192, method=PLAIN).record


def test_samples_that_calibrated_decide_too(tmp_path: Path) -> None:
    """The 64 held back keep all decisions, and of the others so many are lost that the floor does not hold."""
    samples = by_ease(20.0, tmp_path)
    record = compressed(samples, tmp_path)
    assert (record.samples, record.held_back) == (192, 64)
    assert record.proxy is not None and record.proxy.decisions == 256
    assert record.proxy.before < 0.95 and record.proxy.after >= 0.98
    assert record.lifted is not None and record.lifted.lifted
    with np.load(tmp_path / "out" / "held_back.npz") as held_back:
        np.testing.assert_array_equal(held_back["x"], samples[192:])


def decided(samples: np.ndarray, folder: Path) -> tuple[Decision, float]:
    """What an export judges by, and the share that the compressed model keeps."""
    record = compressed(samples, folder)
    decision = what_is_expected(open_stored(folder / "out"), judged=True).decision
    assert decision is not None and record.proxy is not None
    return decision, record.proxy.after


def test_all_that_decided_judge_an_export_too(tmp_path: Path) -> None:
    samples = by_ease(1.0, tmp_path)
    decision, kept = decided(samples, tmp_path)
    assert decision.samples == decision.decisions == 256 and decision.floor == 0.98
    stored = open_stored(tmp_path / "out")
    assert decision.judge(stored.model, load_target("portable")) == kept
    with np.load(tmp_path / "out" / "deciding.npz") as archive:
        np.testing.assert_array_equal(archive["x"], samples[:192])
    edgekit.compress(tmp_path / "net.onnx", tmp_path / "out", calibration={"x": samples}, method=PLAIN, proxy="none")
    assert not (tmp_path / "out" / "deciding.npz").exists()


def test_samples_that_calibrated_are_stored_as_far_as_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, _ = given(40, 8)
    held = {"x": np.zeros((8, 8), np.float32)}
    monkeypatch.setattr(split, "STORED_BYTES", (8 + 20) * 32)
    assert split.save_deciding(tmp_path / "some.npz", data, 32, 32, held) == 16
    assert split.save_deciding(tmp_path / "asked.npz", data, 32, 8, held) == 8
    with np.load(tmp_path / "some.npz") as archive:
        assert archive["x"].shape == (16, 8)
    assert split.save_deciding(tmp_path / "none.npz", data, 32, 0, held) == 0
    assert not (tmp_path / "none.npz").exists()


def test_those_held_back_are_not_stored_twice(tmp_path: Path) -> None:
    """However many are asked for: of sequences, whose steps come first, more are counted than there are."""
    data, _ = given(40, 8)
    held = {"x": np.zeros((8, 8), np.float32)}
    assert split.save_deciding(tmp_path / "some.npz", data, 32, 1000, held) == 32
    assert split.save_deciding(tmp_path / "none.npz", data, 40, 1000, held) == 0


def test_samples_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    compressed(by_ease(1.0, tmp_path), tmp_path)
    (tmp_path / "out" / "deciding.npz").write_bytes(b"")
    with pytest.raises(
        OutputError, match=r"deciding\.npz: the samples of `compress` cannot be read .* run `edgekit compress` again"
    ):
        edgekit.export(tmp_path / "out", "arm-onnxruntime")


def test_an_export_asks_for_more_of_held_back_samples_that_flatter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of all decisions are lost, and none of the 64, where there is no room for more of them."""
    monkeypatch.setattr(split, "STORED_BYTES", 0)
    decision, kept = decided(by_ease(1.0, tmp_path), tmp_path)
    assert decision.samples == 64 and kept < 1
    assert (decision.floor, decision.aimed) == (pytest.approx(0.98 + 1 - kept), pytest.approx(0.99 + 1 - kept))
    assert float(decision.floor_text) == pytest.approx(100 * (kept - 0.98), abs=1e-6)


def test_an_export_asks_for_less_of_held_back_samples_that_lose_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nothing that a target loses beside, nothing more has to go to float."""
    monkeypatch.setattr(split, "STORED_BYTES", 0)
    samples = by_ease(1.0, tmp_path)
    decision, kept = decided(samples[::-1], tmp_path)
    stored = open_stored(tmp_path / "out")
    here = decision.judge(stored.model, load_target("portable"))
    assert here < kept >= 0.98
    assert decision.floor == pytest.approx(0.98 - (kept - here))
    [result] = edgekit.export(tmp_path / "out", "arm-onnxruntime")
    assert not any("under" in note for note in result.manifest.notes)


@pytest.mark.parametrize(("before", "share"), [(0.98, 0.75), (0.9, 0.99), (0.99, 0.0), (1.0, MOST)])
def test_the_more_is_lost_the_more_layers_are_tried_first(before: float, share: float) -> None:
    """A tenth of the losses needs a hundredth of the noise's energy."""
    decision = Decision(Proxy("argmax", ("p",)), lambda run: Metric(name="", value=1.0), 0.98, "2", "1", 0.99, 100)
    assert decision.hurting(before) == pytest.approx(share)


@pytest.mark.parametrize(("before", "share"), [(10.0, 0.9), (0.0, 0.99), (20.0, 0.0), (25.0, 0.0)])
def test_of_signals_the_noise_above_the_floor_has_to_go(before: float, share: float) -> None:
    """10 dB too few are nine tenths of the energy."""
    decision = Decision(None, lambda run: Metric(name="", value=before), 20.0, "180", "180", 20.0, 16)
    assert decision.hurting(before) == pytest.approx(share)


def test_a_floor_in_decibels_stays(tmp_path: Path) -> None:
    """Where outputs hold no decision."""
    net = Net(seed=3)
    y = net.conv(net.input("x", ["n", 3, 6, 6]), "a", 3, 4)
    data = {"x": np.random.default_rng(0).normal(0, 1, (80, 3, 6, 6)).astype(np.float32)}
    save_onnx(net.model(y), tmp_path / "net.onnx")
    record = edgekit.compress(tmp_path / "net.onnx", tmp_path / "out", calibration=data).record
    assert record.proxy is not None and record.proxy.kind == ""
    decision = what_is_expected(open_stored(tmp_path / "out"), judged=True).decision
    assert decision is not None and decision.proxy is None
    assert decision.floor == 20


def test_of_slow_models_fewer_signals_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "COMPARING_S", 1e-9)
    net = Net(seed=3)
    graph = net.model(net.conv(net.input("x", ["n", 3, 6, 6]), "a", 3, 4))
    feeds = [{"x": np.zeros((8, 3, 6, 6), np.float32)}] * 5
    decision = open_decision(graph, feeds)
    assert decision is not None and decision.proxy is None and decision.samples == 16


def test_held_back_samples_need_not_show_the_decision(tmp_path: Path) -> None:
    """All of one class: scores that could be marks."""
    model, data = one_bad_layer(1.0, 512)
    save_onnx(model, tmp_path / "net.onnx")
    [scores] = Session(model, optimize=True).run(data).values()
    one = scores.argmax(axis=1) == np.bincount(scores.argmax(axis=1)).argmax()
    assert one.sum() >= 64
    samples = np.concatenate([data["x"][~one][:192], data["x"][one][:64]])
    record = compressed(samples, tmp_path)
    assert record.proxy is not None and record.proxy.kind == "argmax"
    [result] = edgekit.export(tmp_path / "out", "arm-onnxruntime")
    assert result.manifest.proxy is not None and result.manifest.proxy.name == record.proxy.name


def given(count: int, size: int) -> tuple[BoundData, ir.Model]:
    """`count` samples of `size` numbers, and a model that takes them."""
    net = Net()
    model = net.model(net.op("Relu", [net.input("x", ["n", size])]))
    return open_data({"x": np.zeros((count, size), np.float32)}).bind(input_specs(model)), model


@pytest.mark.parametrize(("count", "size", "expected"), [(600, 8, MOST_DECIDING), (100, 8, 100), (24, 2 << 20, 16)])
def test_no_more_than_are_cheap_to_hold(count: int, size: int, expected: int) -> None:
    """16 samples of 8 MB are all that is held."""
    data, model = given(count, size)
    held, _ = given(8, size)
    found = deciding(held, data, count - 8, model)
    assert sum(len(batch["x"]) for batch in found) == expected


def test_samples_that_calibrated_and_are_held_back_decide_once() -> None:
    data, model = given(10, 8)
    assert sum(len(batch["x"]) for batch in deciding(data, data, 10, model)) == 10
