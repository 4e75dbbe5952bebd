"""Which samples decide whether a quantized model is good enough."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import edgekit
from edgekit.data import BoundData, open_data
from edgekit.graph.io import save_onnx
from edgekit.graph.run import Session
from edgekit.pipelines.decision import Decision
from edgekit.pipelines.expected import what_is_expected
from edgekit.pipelines.sources import input_specs
from edgekit.pipelines.split import MOST_DECIDING, deciding
from edgekit.pipelines.stored import open_stored
from networks import Net
from test_proxy import PLAIN, one_bad_layer


def easiest_last(factor: float, folder: Path, samples: int = 256) -> dict[str, np.ndarray]:
    """Data whose last samples, those that are held back, a network in `folder` tells apart best."""
    model, data = one_bad_layer(factor, samples)
    save_onnx(model, folder / "net.onnx")
    [scores] = Session(model, optimize=True).run(data).values()
    ordered = np.sort(scores, axis=1)
    return {"x": data["x"][np.argsort(ordered[:, -1] - ordered[:, -2])]}


def test_samples_that_calibrated_decide_too(tmp_path: Path) -> None:
    """The 64 held back keep all decisions, and of the others so many are lost that the floor does not hold."""
    data = easiest_last(20.0, tmp_path)
    record = edgekit.compress(tmp_path / "net.onnx", tmp_path / "out", calibration=data, method=PLAIN).record
    assert (record.samples, record.held_back) == (192, 64)
    assert record.proxy is not None and record.proxy.decisions == 256
    assert record.proxy.before < 0.95 and record.proxy.after >= 0.98
    assert record.lifted is not None and record.lifted.lifted
    with np.load(tmp_path / "out" / "held_back.npz") as held_back:
        assert len(held_back["x"]) == 64


def decided(data: dict[str, np.ndarray], folder: Path) -> Decision:
    edgekit.compress(folder / "net.onnx", folder / "out", calibration=data, method=PLAIN)
    decision = what_is_expected(open_stored(folder / "out"), judged=True).decision
    assert decision is not None
    return decision


def test_an_export_knows_by_how_much_held_back_samples_flatter(tmp_path: Path) -> None:
    """2 of all 256 decisions are lost, and none of the 64."""
    decision = decided(easiest_last(1.0, tmp_path), tmp_path)
    assert decision.samples == 64
    assert decision.flatters == pytest.approx(2 / 256)
    stricter = decision.stricter()
    assert (stricter.floor, stricter.aimed) == (pytest.approx(0.98 + 2 / 256), pytest.approx(0.99 + 2 / 256))
    assert (stricter.floor_text, stricter.aim) == ("1.21875", "0.21875")


def test_held_back_samples_that_lose_more_than_all_make_nothing_laxer(tmp_path: Path) -> None:
    data = easiest_last(3.0, tmp_path)
    decision = decided({"x": data["x"][::-1].copy()}, tmp_path)
    assert decision.flatters == 0
    assert (decision.stricter().floor, decision.stricter().floor_text) == (0.98, "2")


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
