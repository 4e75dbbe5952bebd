"""An ONNX file with fewer channels, which cannot be trained: as it was cut, and with its weights fitted to what is left."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import resnet20
from claims import Claim
from prune_subject import NOTHING, fewer, say, trained_resnet20
from qat_part import Part, holds

import edgekit
from edgekit.graph.io import save_onnx
from edgekit.proxy import NONE
from edgekit.pruning import Prune, Pruned
from edgekit.training.export_onnx import export_onnx

SHARES = (0.8, 0.65, 0.5)
"""Of the multiply-accumulates that stay."""
SAMPLES = 512
OPSET = 21


@dataclass(frozen=True, slots=True)
class _Row:
    share: float
    cut: float
    fitted: float
    found: Pruned
    seconds: tuple[float, float]


def onnx_section(zoo: Path, folder: Path) -> Part:
    """ResNet-20's file, the same share of each layer gone by l1."""
    source = folder / "resnet20.onnx"
    save_onnx(export_onnx(trained_resnet20(zoo), (np.zeros((4, 3, 32, 32), np.float32),), opset=OPSET), source)
    rows = [_pruned(source, share, zoo, folder / f"{share}") for share in SHARES]
    whole = _scored(source, None, zoo, folder / "whole")[0]
    note = (
        f"The checkpoint as it came, as an ONNX file: {whole:.4f} on the 2,000 test images. The same share of each layer goes by l1, "
        f"in one go; then each layer is fitted to what it made before, by {SAMPLES} images without labels. No training."
    )
    heads = ["MACs", "as it was cut", "fitted", "seconds in all, cut and fitted"]
    told = [
        [fewer(row.found.macs), f"{row.cut:.4f}", f"{row.fitted:.4f}", "{:.0f} and {:.0f}".format(*row.seconds)]
        for row in rows
    ]
    return Part("An ONNX file, without training", note, heads, told, list(_claims(rows)))


def _pruned(source: Path, share: float, zoo: Path, folder: Path) -> _Row:
    say(f"onnx: {share:.0%} of the MACs")
    found = [
        _scored(source, Prune(macs=share, scope="layer", round_to=4, recover=fit), zoo, folder / str(fit))
        for fit in (False, True)
    ]
    pruned = found[1][1]
    assert pruned is not None, "it was pruned"
    return _Row(share, found[0][0], found[1][0], pruned, (found[0][2], found[1][2]))


def _scored(source: Path, prune: Prune | None, zoo: Path, out: Path) -> tuple[float, Pruned | None, float]:
    out.parent.mkdir(exist_ok=True)
    begin = time.monotonic()
    record = edgekit.compress(
        source,
        out,
        calibration=zoo / resnet20.TRAIN,
        samples=SAMPLES,
        preprocess=resnet20.PREPROCESS,
        method=NOTHING,
        prune=prune,
        evaluate=zoo / resnet20.TEST,
        proxy=NONE,
    ).record
    assert record.float_metric is not None, "it was evaluated"
    return record.float_metric.value, record.pruned, time.monotonic() - begin


def _claims(rows: list[_Row]) -> Iterator[Claim]:
    for row in rows:
        won = 100 * (row.fitted - row.cut)
        yield holds(f"{row.share:.0%} of the MACs: fitting wins", f"{won:+.1f} points", won > 0)
