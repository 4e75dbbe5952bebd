"""A random graph through `edgekit.compress` and `edgekit.export`, on the runtimes themselves."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from fuzz_graphs import Drawn
from fuzz_stages import REFUSED, WRONG, Case, Row

import edgekit

SAMPLES = 24
RUNTIMES = ("x86-onnxruntime", "arm-onnxruntime", "x86-openvino")
ENGINE = "cuda-tensorrt"
UNDECIDED, DECIDED = 0.8, 3.0
"""The share that is compressed without looking for a decision; seconds for one where it is looked for."""


def ship(drawn: Drawn, seed: int, index: int, folder: Path, targets: tuple[str, ...]) -> list[Row]:
    """A row for `compress`, and one for each target. On a CPU without VNNI the pipeline itself runs weights of 7 bits instead."""
    case, path, out = Case(drawn, index, seed, folder), folder / "net.onnx", folder / "out"
    onnx.save(drawn.model, path)
    data = drawn.samples(SAMPLES, seed=2)
    rng = np.random.default_rng([seed, index, 2])
    judged: dict[str, Any] = (
        {"proxy": "none"} if rng.random() < UNDECIDED else {"proxy": "auto", "time_budget": DECIDED}
    )
    compressed = case.attempt("compress", lambda: edgekit.compress(path, out, calibration=data, **judged))
    for target in targets if compressed is not None else ():
        case.attempt(f"export: {target}", partial(_exported, out, target))
    return [_judged(row, folder) for row in case.rows]


def _exported(out: Path, target: str) -> object:
    """What the runtime computes wrongly whatever is float is refused by the proof, which is right."""
    [result] = edgekit.export(out, [target], tune_placement=False)
    return result


def _judged(row: Row, folder: Path) -> Row:
    reason = re.sub(re.escape(str(folder)) + r"/?", "", row.reason)
    return Row(row.index, row.stage, row.outcome, reason) if row.outcome in (REFUSED, WRONG) else row
