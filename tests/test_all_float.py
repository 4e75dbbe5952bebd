"""What an export says when its runtime is faster with every layer in float."""

from __future__ import annotations

from pathlib import Path

import pytest

import edgekit
from edgekit.graph.io import load_annotated
from edgekit.graph.rules import quantized_nodes
from edgekit.records import MODEL, TunedPlacement
from edgekit.target import load_target
from edgekit.tuning import write_placement
from networks import needs_vnni

TARGET, KEY = "x86-onnxruntime", "k" * 64


def known(out: Path, keep_float: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `keep_float` be what an earlier search found to be faster."""
    monkeypatch.setattr("edgekit.pipelines.placement.placement_key", lambda *_: KEY)
    found = TunedPlacement(
        key=KEY, target=TARGET, runtime="", keep_float=keep_float, ratio=1.5, ci_low=1.4, ci_high=1.6, finished=True
    )
    write_placement(out, found)


@needs_vnni
def test_nothing_left_in_int8_is_said_plainly(compressed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_annotated(compressed / MODEL)
    names = tuple(sorted(node.name or "" for node in quantized_nodes(model, load_target(TARGET))))
    known(compressed, names, monkeypatch)
    (result,) = edgekit.export(compressed, TARGET)
    assert result.manifest.placement is not None and result.manifest.placement.all_float
    (note,) = [note for note in result.manifest.notes if "int8" in note]
    assert note.startswith(f"no layer is left in int8 on {TARGET}: float is faster here (1.50x, 1.40 to 1.60)")
    assert note in (compressed / "report.md").read_text(encoding="utf-8")


@needs_vnni
def test_one_layer_left_in_int8_is_not_nothing(compressed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_annotated(compressed / MODEL)
    names = sorted(node.name or "" for node in quantized_nodes(model, load_target(TARGET)) if node.name != "deep")
    known(compressed, tuple(names), monkeypatch)
    (result,) = edgekit.export(compressed, TARGET)
    assert result.manifest.placement is not None and not result.manifest.placement.all_float
    assert not any("no layer is left" in note for note in result.manifest.notes)
    assert any("in float because that is faster here" in note for note in result.manifest.notes)
