"""Rounding weights by what their layers read: GPTQ over the layers of a model, a few at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgekit.calibration.hessians import HESSIAN_BYTES, hessian_bytes, hessians
from edgekit.calibration.layer_rows import LinearLayer, array_of, linear_layers, matrix, numbers, rows_key
from edgekit.data import Batch
from edgekit.graph.annotations import get_params, set_params
from edgekit.graph.sizes import in_parts
from edgekit.method import Method
from edgekit.quant.gptq import gptq
from edgekit.quant.spec import QuantParams

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
    into `HESSIAN_BYTES`; each group is one pass over the samples.
    """
    model = model.clone()
    layers = [layer for layer in linear_layers(model.graph) if _wanted(layer, method)]
    done = 0
    for group in in_parts(layers, hessian_bytes, HESSIAN_BYTES):
        found = hessians(model, group, batches, samples=samples, threads=threads)
        for layer in group:
            hessian = found.get(rows_key(layer))
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
