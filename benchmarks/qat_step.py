"""What a step of quantization-aware training costs beside the same step in float."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from qat_part import Part, holds
from resnet20 import CHECKPOINT, FACTORY
from torch import nn
from torch.nn import functional as F

from edgekit.measure import bootstrap_median
from edgekit.reference import resolve_reference
from edgekit.training.checkpoint import load_checkpoint
from edgekit.training.fake_quant import quantizers
from edgekit.training.qat import prepare_qat

BATCH, ROUNDS = 128, 12
MOST = 1.3


def step_section(zoo: Path, folder: Path) -> Part:
    """ResNet-20, batches of 128, one step of each in turn; the ratio within each turn."""
    factory = resolve_reference(str(FACTORY), error=RuntimeError, what="factory")
    assert callable(factory)
    module = load_checkpoint(zoo / CHECKPOINT, factory=factory)
    rng = np.random.default_rng(0)
    x, y = (
        torch.from_numpy(rng.normal(0, 1, (BATCH, 3, 32, 32)).astype(np.float32)),
        torch.from_numpy(rng.integers(0, 10, BATCH)),
    )
    frozen = prepare_qat(module, (x.numpy(),))
    for quantizer in quantizers(frozen):
        quantizer.freeze()
    candidates = {
        "float, with its BatchNorms": module,
        "QAT, learned scales": prepare_qat(module, (x.numpy(),)),
        "QAT, tracked ranges": prepare_qat(module, (x.numpy(),), scales="tracked"),
        "QAT, frozen grids": frozen,
    }
    times = _times(candidates, x, y)
    base = times["float, with its BatchNorms"]
    rows, ratios = [], {}
    for label, found in times.items():
        ratios[label] = bootstrap_median(found / base)
        median = float(np.median(found / base))
        rows.append(
            [
                label,
                f"{1000 * float(np.median(found)):.0f} ms",
                f"{median:.2f}x ({ratios[label][0]:.2f}-{ratios[label][1]:.2f})",
            ]
        )
    learned = float(np.median(times["QAT, learned scales"] / base))
    claims = [
        holds(
            f"a step with learned scales takes at most {MOST} times the float step", f"{learned:.2f}x", learned <= MOST
        )
    ]
    threads = torch.get_num_threads()
    note = f"Forward, backward and SGD on a batch of {BATCH}, {ROUNDS} turns, {threads} threads; intervals: 95 %, bootstrap."
    return Part("A step", note, ["what", "median", "over float"], rows, claims)


def _times(candidates: dict[str, nn.Module], x: Any, y: Any) -> dict[str, np.ndarray[Any, Any]]:
    steps = {}
    for label, module in candidates.items():
        module.train()
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        steps[label] = torch.optim.SGD(trained, 1e-6)
    found: dict[str, list[float]] = {label: [] for label in candidates}
    for turn in range(ROUNDS + 2):
        for label, module in candidates.items():
            begin = time.perf_counter()
            loss = F.cross_entropy(module(x), y)
            steps[label].zero_grad()
            loss.backward()
            steps[label].step()
            if turn >= 2:
                found[label].append(time.perf_counter() - begin)
    return {label: np.array(values) for label, values in found.items()}
