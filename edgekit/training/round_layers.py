"""AdaRound over the layers of a model: each continues from GPTQ's codes, on the rows that it reads, until the time is up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgekit.calibration.layer_rows import (
    F32,
    LinearLayer,
    array_of,
    collect_rows,
    linear_layers,
    matrix,
    numbers,
    rows_key,
)
from edgekit.data import Batch
from edgekit.graph.annotations import get_params, set_params
from edgekit.graph.operators import bias_place
from edgekit.graph.sizes import in_parts
from edgekit.method import Method
from edgekit.quant.affine import fake_quantize
from edgekit.quant.spec import QuantParams
from edgekit.training.adaround import Activation, adaround

ROWS = 4096
"""Of each layer, about."""
ROWS_BYTES = 256 << 20
"""Of the rows that are collected in one pass over the data."""
ITERATIONS = 1000
PROBE = 20
"""Iterations that are timed first: a descent that is cut short gains nothing, a shorter one that comes to its end does."""
OVERHEAD = 10_000
"""An iteration over a small weight takes about as long as one over so many numbers."""


def round_layers(
    model: ir.Model,
    batches: Iterable[Batch],
    *,
    samples: int,
    method: Method,
    threads: int = 0,
    seed: int = 0,
    on_layer: Callable[[int, int], None] | None = None,
) -> ir.Model:
    """Choose the codes of weights whose layers `method` wants rounded by AdaRound, as `QuantParams.codes`.

    The descent of a layer starts from the codes that its weight has, GPTQ's, or else the nearest. It brings what the layer puts
    out, reading its input quantized, near to what the float layer makes of the float input; behind a layer that a Relu alone
    reads, only what passes the Relu counts. Layers share `method.rounding_budget` seconds by their size, and what one leaves
    goes to the next ones. A layer whose share is too short for all iterations makes fewer; one whose share is shorter still keeps
    its codes. When there is time for all iterations, the result is the same for the same `seed`.

    Args:
        samples: how many `batches` hold; they are read once for each group of layers whose rows fit into `ROWS_BYTES`.
        threads: of the inference; 0 uses all processors.
        on_layer: told how many layers are done, and of how many.

    See `edgekit.training.adaround` for the paper.
    """
    deadline = time.monotonic() + method.rounding_budget
    model = model.clone()
    layers = [layer for layer in linear_layers(model.graph) if _wanted(layer, method)]
    waiting = sum(map(_cost, layers))
    done = 0
    for group in in_parts(layers, _rows_bytes, ROWS_BYTES):
        if time.monotonic() >= deadline:
            break
        found = collect_rows(model, group, batches, samples=samples, rows=ROWS, threads=threads)
        for layer in group:
            sample, left = found.get(rows_key(layer)), deadline - time.monotonic()
            if sample is not None and left > 0:
                set_params(layer.weight, _rounded(layer, sample.rows, left * _cost(layer) / waiting, seed))
            waiting -= _cost(layer)
            done += 1
            if on_layer is not None:
                on_layer(done, len(layers))
    return model


def _wanted(layer: LinearLayer, method: Method) -> bool:
    params = get_params(layer.weight)
    mine = params is not None and not params.fixed and len(layer.weight.uses()) == 1
    return mine and method.for_layer(layer.name).rounding == "adaround"


def _cost(layer: LinearLayer) -> int:
    return numbers(layer.weight).size + OVERHEAD


def _rows_bytes(layer: LinearLayer) -> int:
    groups, inputs, _ = matrix(layer, numbers(layer.weight)).shape
    return int(groups * inputs * ROWS * 4)


def _rounded(layer: LinearLayer, rows: F32, seconds: float, seed: int) -> QuantParams:
    params, grid = get_params(layer.weight), get_params(layer.source)
    assert params is not None
    weight = numbers(layer.weight)
    matrices = matrix(layer, weight)
    bias, activation = _bias(layer, len(matrices)), _activation(layer)
    inputs = rows if grid is None else fake_quantize(rows, grid)
    outputs, grid_of_matrices = rows @ matrices + bias[:, None], _grid_of_matrices(layer, params, matrices.shape)
    start = None if params.codes is None else matrix(layer, params.codes).astype(params.codes.dtype)
    deadline = time.monotonic() + seconds

    def descend(iterations: int) -> NDArray[np.generic]:
        return adaround(
            matrices,
            inputs,
            outputs,
            grid_of_matrices,
            time_budget_s=deadline - time.monotonic(),
            bias=bias,
            activation=activation,
            start=start,
            iterations=iterations,
            seed=seed,
        )

    descend(PROBE)
    left = deadline - time.monotonic()
    iterations = min(ITERATIONS, int(left / (seconds - left) * PROBE))
    if iterations < PROBE:
        return params
    codes = descend(iterations)
    return replace(params, codes=array_of(layer, codes, weight.shape))


def _bias(layer: LinearLayer, groups: int) -> F32:
    """`(groups, N)`; zeros where the layer adds none of its own."""
    if layer.parts.bias is None:
        return np.zeros((groups, matrix(layer, numbers(layer.weight)).shape[2]), np.float32)
    bias = layer.node.inputs[layer.parts.bias]
    assert bias is not None
    return numbers(bias).reshape(groups, -1)


def _activation(layer: LinearLayer) -> Activation:
    """What alone reads the layer's output, where all that the layer adds to its products is known."""
    output, place = layer.node.outputs[0], bias_place(layer.node)
    uses = list(output.uses())
    if len(uses) != 1 or output.is_graph_output() or uses[0].node.op_type != "Relu" or uses[0].node.domain:
        return None
    computed = layer.parts.bias is None and len(layer.node.inputs) > 2 and layer.node.inputs[2] is not None
    return None if computed or (place is None and layer.node.op_type == "Gemm") else "relu"


def _grid_of_matrices(layer: LinearLayer, params: QuantParams, shape: tuple[int, ...]) -> QuantParams:
    """The grid as it stands against `(groups, K, N)`: a channel of a group is one block of K inputs."""
    groups, inputs, channels = shape
    if params.axis is None:
        return params
    if not params.block_size:
        grid = (groups, 1, channels)
        scale, zero_point = params.scale.reshape(grid), params.zero_point.reshape(grid)
        return replace(params, scale=scale, zero_point=zero_point, axis=1, block_size=inputs)
    scale, zero_point = params.scale, params.zero_point
    if params.axis == 1:  # of a Gemm's (N, K)
        scale, zero_point = scale.T, zero_point.T
    return replace(params, scale=scale[None], zero_point=zero_point[None], axis=1)
