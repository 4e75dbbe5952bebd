"""Rounding weights by what their layers read: GPTQ over the layers of a model, a few at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgekit.calibration.layer_rows import (
    F32,
    LinearLayer,
    RowsKey,
    array_of,
    linear_layers,
    matrix,
    numbers,
    rows_key,
    rows_of,
    run_samples,
)
from edgekit.data import Batch
from edgekit.graph.annotations import get_params, set_params
from edgekit.graph.sizes import in_parts
from edgekit.method import Method
from edgekit.quant.affine import fake_quantize
from edgekit.quant.gptq import gptq
from edgekit.quant.spec import QuantParams

HESSIAN_BYTES = 256 << 20
"""Of the Hessians that are gathered in one pass over the data."""
HESSIAN_SAMPLES = 256
HESSIAN_ROWS = 8192
"""Rows that a Hessian is made of, about: several times the inputs of the widest layers."""
ROWS_AT_ONCE = 512
MOST_CODES = 16
"""Of a grid on which rounding matters for convolutions too."""
DAMPING = 0.05


def round_weights(
    model: ir.Model,
    batches: Iterable[Batch],
    *,
    samples: int,
    method: Method,
    threads: int = 0,
    on_layer: Callable[[int, int], None] | None = None,
) -> ir.Model:
    """Choose the codes of weights whose layers `method` wants rounded by GPTQ, as `QuantParams.codes`.

    The Hessian of a layer is that of what it reads with its own input quantized. Layers are taken in groups whose Hessians fit
    into `HESSIAN_BYTES`; each group is one pass over at most `HESSIAN_SAMPLES` samples.
    """
    model = model.clone()
    layers = [layer for layer in linear_layers(model.graph) if _wanted(layer, method)]
    done = 0
    for group in in_parts(layers, _hessian_bytes, HESSIAN_BYTES):
        hessians = _hessians(model, group, batches, samples=samples, threads=threads)
        for layer in group:
            hessian = hessians.get(rows_key(layer))
            if hessian is not None:
                set_params(layer.weight, _rounded(layer, hessian))
            done += 1
            if on_layer is not None:
                on_layer(done, len(layers))
    return model


def _wanted(layer: LinearLayer, method: Method) -> bool:
    params = get_params(layer.weight)
    mine = params is not None and not params.fixed and len(layer.weight.uses()) == 1
    rounding = method.for_layer(layer.name).rounding
    if rounding == "auto":
        return (
            mine and params is not None and (layer.geometry.kind == "rows" or params.qmax - params.qmin <= MOST_CODES)
        )
    return mine and rounding in ("gptq", "adaround")  # the latter goes on from there


def _hessian_bytes(layer: LinearLayer) -> int:
    groups, inputs, _ = matrix(layer, numbers(layer.weight)).shape
    return int(groups * inputs * inputs * 4)


def _hessians(
    model: ir.Model, layers: Sequence[LinearLayer], batches: Iterable[Batch], *, samples: int, threads: int
) -> dict[RowsKey, NDArray[np.float32]]:
    """`x^T x` of what each layer reads, `(groups, K, K)`."""
    share = -(-samples // HESSIAN_SAMPLES)
    each = max(1, -(-HESSIAN_ROWS * share // max(1, samples)))
    sources = {rows_key(layer): layer.source for layer in layers}
    found = {key: _Hessian(get_params(source)) for key, source in sources.items()}
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
        self.waiting = []
        own = rows.transpose(0, 2, 1) @ rows
        if self.sum is None:
            self.sum = own
        else:
            self.sum += own


def _rounded(layer: LinearLayer, hessian: NDArray[np.float32]) -> QuantParams:
    params = get_params(layer.weight)
    assert params is not None
    weight = numbers(layer.weight)
    matrices = matrix(layer, weight)
    codes = [
        gptq(matrices[index], hessian[index], _grid_of_group(layer, params, index, matrices.shape), damping=DAMPING)
        for index in range(len(matrices))
    ]
    return replace(params, codes=array_of(layer, np.stack(codes), weight.shape))


def _grid_of_group(layer: LinearLayer, params: QuantParams, index: int, shape: tuple[int, ...]) -> QuantParams:
    """The grid as it stands against one group's `(K, N)`."""
    _, _, channels = shape
    if params.axis is None:
        return params
    if params.block_size:
        if params.axis == 0:
            return params
        return replace(params, scale=params.scale.T, zero_point=params.zero_point.T, axis=0)  # of a Gemm's (N, K)
    part = slice(index * channels, (index + 1) * channels)
    return replace(params, scale=params.scale[part], zero_point=params.zero_point[part], axis=1)
