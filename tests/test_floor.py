"""`--max-drop`, `--explain` and placement by time through the pipelines and the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import edgekit
from conftest import Cli, TinyFiles
from edgekit.errors import DataError, TargetError
from edgekit.graph.annotations import annotated_values, get_params
from edgekit.graph.io import load_annotated, load_onnx
from edgekit.graph.rules import precision
from edgekit.records import MANIFEST, TunedPlacement, read_compressed
from edgekit.tuning import write_placement
from networks import needs_vnni

LOSSY = edgekit.Method(weights="int2", rounding="nearest", smooth=False)
"""Weights of four numbers: a model that needs layers in float."""


def compress(tiny: TinyFiles, out: Path, **options: Any) -> Any:
    return edgekit.compress(tiny.model, out, calibration=tiny.data, samples=40, **options).record


def test_a_floor_leaves_layers_in_float_until_it_is_met(tiny: TinyFiles, tmp_path: Path) -> None:
    record = compress(tiny, tmp_path / "out", method=LOSSY, max_drop="20dB")
    assert record.lifted is not None
    assert record.lifted.before < 20 <= record.lifted.after
    assert record.lifted.lifted and record.lifted.met and record.lifted.finished
    graph = load_annotated(tmp_path / "out" / "model.onnx")
    assert {node.name for node in graph.graph if precision(node) == "float"} == set(record.lifted.lifted)
    assert any("the floor 20dB is met with" in note for note in record.notes)
    assert not list(tmp_path.glob(".*search.json")), "a finished search is forgotten"


def test_lifted_layers_are_float_in_every_export(tiny: TinyFiles, tmp_path: Path) -> None:
    record = compress(tiny, tmp_path / "out", method=LOSSY, max_drop="20dB")
    edgekit.export(tmp_path / "out", "x86-onnxruntime")
    lowered = load_onnx(tmp_path / "out" / "x86-onnxruntime" / "model.onnx")
    for node in lowered.graph:
        if node.name in record.lifted.lifted:
            weight = node.inputs[1]
            assert weight is not None and weight.producer() is None, "no DequantizeLinear before it"


def test_a_floor_that_is_met_by_int8_lifts_nothing(tiny: TinyFiles, tmp_path: Path) -> None:
    record = compress(tiny, tmp_path / "out", max_drop=50, evaluate=tiny.data)
    assert record.lifted is not None
    assert (record.lifted.lifted, record.lifted.met) == ((), True)


def test_points_need_a_metric_and_nothing_is_written(tiny: TinyFiles, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--max-drop 0.5 is in points of a metric, and there is none: give --evaluate"):
        compress(tiny, tmp_path / "out", max_drop=0.5)
    assert list(tmp_path.iterdir()) == []


def test_explain_tells_of_each_layer_in_the_record_and_the_report(tiny: TinyFiles, tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "out"
    done = cli("compress", tiny.model, "--calibration", tiny.data, "--samples", 40, "--explain", "-o", out)
    assert done.code == 0, done.stderr
    names = [layer.name for layer in read_compressed(out).sensitivity]
    assert set(names) >= {"stem", "block", "deep", "head"}
    report = (out / "report.md").read_text(encoding="utf-8")
    assert "## Each layer quantized alone" in report
    assert all(f"| `{name}` |" in report for name in names)


@pytest.mark.parametrize("text", ["soon", "10x", "-3s", "0", "infh", "m"])
def test_a_time_that_is_none_is_refused(text: str, tiny: TinyFiles, tmp_path: Path, cli: Cli) -> None:
    done = cli(
        "compress",
        tiny.model,
        "--calibration",
        tiny.data,
        "--max-drop",
        "30dB",
        f"--time-budget={text}",
        "-o",
        tmp_path / "o",
    )
    assert done.code == 2
    assert "such as 90s, 10m or 1h" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_sixteen_bits_run_in_float_where_the_target_says_so(tiny: TinyFiles, tmp_path: Path) -> None:
    compress(tiny, tmp_path / "out", method=edgekit.Method(precision="int16"), proxy="none")
    model = load_annotated(tmp_path / "out" / "model.onnx")
    types = {params.dtype for value in annotated_values(model.graph) if (params := get_params(value)) is not None}
    assert types == {"uint16", "uint8", "int8"}, "what no layer reads keeps 8 bits"
    edgekit.export(tmp_path / "out", "x86-onnxruntime")
    assert not any(
        node.op_type == "QuantizeLinear"
        for node in load_onnx(tmp_path / "out" / "x86-onnxruntime" / "model.onnx").graph
    )
    (tmp_path / "wide.toml").write_text(
        'name = "wide"\nextends = "x86-onnxruntime"\nsummary = "16 bits"\n[quantization]\nwide = "quantize"\n'
    )
    (result,) = edgekit.export(tmp_path / "out", str(tmp_path / "wide.toml"))
    lowered = load_onnx(result.folder / "model.onnx")
    assert any(node.op_type == "QuantizeLinear" for node in lowered.graph)
    assert result.manifest.proof.agrees


@needs_vnni
def test_a_known_placement_is_used_again_without_timing(
    tiny: TinyFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    compress(tiny, out, proxy="none")

    def placed(*args: Any, **options: Any) -> TunedPlacement:
        raise AssertionError("timed again")

    keys: list[str] = []

    def key_of(*args: Any, **options: Any) -> str:
        keys.append("k" * 64)
        return keys[-1]

    monkeypatch.setattr("edgekit.pipelines.placement.placement_key", key_of)
    monkeypatch.setattr("edgekit.pipelines.placement.tune_placement", placed)
    known = TunedPlacement(
        key="k" * 64,
        target="x86-onnxruntime",
        runtime="",
        keep_float=("stem",),
        ratio=1.5,
        ci_low=1.4,
        ci_high=1.6,
        finished=True,
    )
    write_placement(out, known)
    (result,) = edgekit.export(out, "x86-onnxruntime", time_budget=5.0)
    assert result.manifest.placement == known
    assert any(
        "in float because that is faster here (1.50x, 1.40 to 1.60): stem" in note for note in result.manifest.notes
    )
    assert "stem" in result.manifest.proof.float_layers
    (untuned,) = edgekit.export(out, "x86-onnxruntime", tune_placement=False)
    assert untuned.manifest.placement is None
    assert json.loads((out / "x86-onnxruntime" / MANIFEST).read_text())["placement"] is None


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"layers": (edgekit.LayerMethod(match="stm", precision="float"),)}, "no layer .* 'stm'; did you mean 'stem'"),
        ({"weights": "uint4"}, "weights in uint4 take --activations none or dynamic"),
        ({"block_size": 32}, "weights in blocks of 32 take --activations none or dynamic"),
        ({"layers": (edgekit.LayerMethod(match="head", block_size=32),)}, "weights in blocks of 32 take"),
    ],
)
def test_choices_that_would_be_ignored_are_refused(
    choices: dict[str, Any], words: str, tiny: TinyFiles, tmp_path: Path
) -> None:
    with pytest.raises(TargetError, match=words):
        compress(tiny, tmp_path / "out", method=edgekit.Method(**choices))
    assert list(tmp_path.iterdir()) == []
