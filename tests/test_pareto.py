"""Several ratios of pruning beside each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from conftest import Cli
from edgekit.pipelines.pareto import Pareto, Point
from networks import needs_vnni
from tiny_onnx import tiny_samples


def point(ratio: float, metric: float | None, ms: float | None, target: str = "a") -> Point:
    return Point(ratio=ratio, macs=1 - ratio, target=target, metric_name="top-1", metric=metric, ms=ms, float_ms=None)


def test_what_another_point_beats_in_both_is_not_on_the_front() -> None:
    slow, fast, worse, unknown = (
        point(0.2, 0.9, 2.0),
        point(0.4, 0.8, 1.0),
        point(0.6, 0.7, 1.5),
        point(0.8, None, 0.1),
    )
    other = point(0.2, 0.1, 9.0, target="b")
    found = Pareto(points=(slow, fast, worse, unknown, other))
    assert found.front("a") == (fast, slow)
    assert found.front("b") == (other,)


@needs_vnni
def test_each_ratio_is_compressed_exported_and_measured(
    tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx

    from tiny_onnx import tiny_model

    monkeypatch.setattr("edgekit.pipelines.benchmark.BURST_SECONDS", 0.01)
    onnx.save(tiny_model(), tmp_path / "tiny.onnx")
    np.savez(tmp_path / "samples.npz", **tiny_samples())
    np.savez(tmp_path / "test.npz", **tiny_samples(seed=2))
    common = [
        *("compress", str(tmp_path / "tiny.onnx"), "--calibration", str(tmp_path / "samples.npz")),
        *("--prune", "0.2,0.5", "--round-to", "0", "--target", "x86-onnxruntime", "-o", str(tmp_path / "out")),
    ]
    refused = cli(*common)
    assert refused.code == 2
    assert "give the metric with --evaluate" in refused.stderr
    done = cli(*common, "--evaluate", str(tmp_path / "test.npz"))
    assert done.code == 0, done.stderr
    found = Pareto.model_validate_json((tmp_path / "out" / "pareto.json").read_text())
    assert [one.ratio for one in found.points] == [0.2, 0.5]
    assert found.points[0].macs > found.points[1].macs
    assert all(one.metric is not None and one.ms for one in found.points)
    assert (tmp_path / "out" / "pareto.md").read_text() in done.stdout
    assert (tmp_path / "out" / "ratio-0.5" / "x86-onnxruntime" / "model.onnx").is_file()
