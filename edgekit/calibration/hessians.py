"""Hessians of layers: how what a layer reads varies together, summed over rows of calibration samples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from edgekit.calibration.layer_rows import F32, LinearLayer, RowsKey, matrix, numbers, rows_key, rows_of, run_samples
from edgekit.data import Batch
from edgekit.graph.annotations import get_params
from edgekit.quant.affine import fake_quantize
from edgekit.quant.spec import QuantParams

HESSIAN_BYTES = 256 << 20
"""Of the Hessians that are gathered in one pass over the data."""
HESSIAN_SAMPLES = 256
HESSIAN_ROWS = 8192
"""Rows that a Hessian is made of, about: several times the inputs of the widest layers."""
ROWS_AT_ONCE = 512


def hessian_bytes(layer: LinearLayer) -> int:
    """Of one layer."""
    groups, inputs, _ = matrix(layer, numbers(layer.weight)).shape
    return int(groups * inputs * inputs * 4)


def hessians(
    model: ir.Model,
    layers: Sequence[LinearLayer],
    batches: Iterable[Batch],
    *,
    samples: int,
    threads: int,
    constant: bool = False,
) -> dict[RowsKey, F32]:
    """`x^T x` of what each layer reads, `(groups, K, K)`; with a `constant`, of its rows with a 1 at their ends."""
    share = -(-samples // HESSIAN_SAMPLES)
    each = max(1, -(-HESSIAN_ROWS * share // max(1, samples)))
    sources = {rows_key(layer): layer.source for layer in layers}
    found = {key: _Hessian(get_params(source), constant) for key, source in sources.items()}
    names = list(dict.fromkeys(name for name, _ in sources))
    for sample in run_samples(model, names, batches, share=share, threads=threads):
        for (name, geometry), hessian in found.items():
            array = sample.real(name, geometry)
            if array is not None:
                hessian.update(rows_of(array, geometry, each * sample.size))
    return {key: total for key, hessian in found.items() if (total := hessian.total()) is not None}


@dataclass(slots=True)
class _Hessian:
    """A sum of `x^T x` over rows; they are multiplied a few hundred at a time."""

    grid: QuantParams | None
    constant: bool
    sum: F32 | None = None
    waiting: list[F32] = field(default_factory=list)

    def update(self, rows: F32) -> None:
        """Take in rows `(groups, n, K)`, on the grid of what is read."""
        self.waiting.append(rows if self.grid is None else fake_quantize(rows, self.grid))
        if sum(part.shape[1] for part in self.waiting) >= ROWS_AT_ONCE:
            self._add()

    def total(self) -> F32 | None:
        """`(groups, K, K)`; None before the first row."""
        if self.waiting:
            self._add()
        return self.sum

    def _add(self) -> None:
        rows = np.concatenate(self.waiting, axis=1)
        if self.constant:
            rows = np.concatenate([rows, np.ones_like(rows[:, :, :1])], axis=2)
        self.waiting = []
        own = rows.transpose(0, 2, 1) @ rows
        if self.sum is None:
            self.sum = own
        else:
            self.sum += own
