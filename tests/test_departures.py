"""Where a runtime's codes part from those that were trained, tensor by tensor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import edgekit
from edgekit.departure import departure, share
from networks import needs_vnni
from test_qat import trained


def test_codes_are_counted_over_all_batches() -> None:
    ran = [np.array([1, 2, 3], np.uint8), np.array([[0, 255]], np.uint8)]
    expected = [np.array([1, 2, 4], np.uint8), np.array([[255, 255]], np.uint8)]
    found = departure("y", "conv", ran, expected)
    assert (found.codes, found.differ, found.worst) == (
        5,
        0.4,
        255,
    )  # 0 and 255 are 255 apart, in types that hold no -255


def test_the_share_is_of_all_codes() -> None:
    one = departure("a", "", [np.zeros(10, np.int8)], [np.ones(10, np.int8)])
    other = departure("b", "", [np.zeros(30, np.int8)], [np.zeros(30, np.int8)])
    assert share((one, other)) == 0.25
    assert share(()) == 0


@needs_vnni
@pytest.mark.parametrize("name", ["residual", "transformer"])
def test_a_trained_model_is_compared_layer_by_layer(name: str, tmp_path: Path) -> None:
    graph, data = trained(name, "portable")
    edgekit.compress(graph, tmp_path, calibration=data)
    for result in edgekit.export(tmp_path, ["x86-onnxruntime", "x86-openvino"]):
        found = result.manifest.departures
        assert len(found) >= 4
        assert len({one.tensor for one in found}) == len(found)
        assert min(one.codes for one in found) > 100
        assert share(found) < 0.005
        assert max(one.worst for one in found) <= 2
    report = (tmp_path / "report.md").read_text()
    assert f"| `{found[1].layer}` | `{found[1].tensor}` | {found[1].codes:,} |" in report
    assert "against those that were trained" in report


def test_nothing_is_compared_where_nothing_was_trained(compressed: Path) -> None:
    [result] = edgekit.export(compressed, "x86-onnxruntime")
    assert result.manifest.departures == ()
    assert "against those that were trained" not in (compressed / "report.md").read_text()
