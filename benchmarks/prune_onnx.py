"""An ONNX file with fewer channels, which cannot be trained: as it was cut, and with its weights fitted to what is left."""

from __future__ import annotations

import time
from collections.abc import Iterator
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


def onnx_section(zoo: Path, folder: Path) -> Part:
    """ResNet-20's file, the same share of each layer gone by l1."""
    source = folder / "resnet20.onnx"
    save_onnx(export_onnx(trained_resnet20(zoo), (np.zeros((4, 3, 32, 32), np.float32),), opset=OPSET), source)
    rows = [_pruned(source, share, zoo, folder / f"{share}") for share in SHARES]
    note = (
        f"The checkpoint as it came, as an ONNX file: {rows[0][0].before:.4f} on the 2,000 test images. The same share of each layer goes "
        f"by l1, in one go; then each layer is fitted to what it made before, by {SAMPLES} images without labels. No training."
    )
    heads = ["MACs", "as it was cut", "fitted", "seconds in all"]
    told = [[fewer(found.macs), f"{found.cut:.4f}", f"{found.after:.4f}", f"{seconds:.0f}"] for found, seconds in rows]
    return Part("An ONNX file, without training", note, heads, told, list(_claims(rows)))


def _pruned(source: Path, share: float, zoo: Path, out: Path) -> tuple[Pruned, float]:
    say(f"onnx: {share:.0%} of the MACs")
    begin = time.monotonic()
    found = edgekit.compress(
        source,
        out,
        calibration=zoo / resnet20.TRAIN,
        samples=SAMPLES,
        preprocess=resnet20.PREPROCESS,
        method=NOTHING,
        prune=Prune(macs=share, scope="layer", round_to=4),
        evaluate=zoo / resnet20.TEST,
        proxy=NONE,
    ).record.pruned
    assert found is not None, "it was pruned"
    return found, time.monotonic() - begin


def _claims(rows: list[tuple[Pruned, float]]) -> Iterator[Claim]:
    for share, (found, _) in zip(SHARES, rows, strict=True):
        assert found.cut is not None and found.after is not None, "it was evaluated"
        won = 100 * (found.after - found.cut)
        yield holds(f"{share:.0%} of the MACs: fitting wins", f"{won:+.1f} points", won > 0)
