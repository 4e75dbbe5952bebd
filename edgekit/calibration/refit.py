"""Weights after a cut: what a layer reads no more is made up for, as far as what it still reads can."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgekit.calibration.hessians import HESSIAN_BYTES, hessian_bytes, hessians
from edgekit.calibration.layer_rows import F32, LinearLayer, array_of, linear_layers, matrix, numbers, rows_key
from edgekit.data import Batch
from edgekit.graph.constants import give_constant
from edgekit.graph.operators import bias_place
from edgekit.graph.sizes import in_parts

DAMPING = 0.01
"""Of the mean variance: what is added to each input's own, so that few rows do not make large weights."""

Bools = NDArray[np.bool_]


def refit(masked: ir.Model, whole: ir.Model, batches: Iterable[Batch], *, samples: int, threads: int = 0) -> ir.Model:
    """A graph with zeros in its weights where channels go, its other weights such that layers' outputs are nearest to what they were.

    Each layer is fitted by itself, to what it makes of the inputs that it has in the whole graph, in the least squares; biases
    that are there take up means. Layers whose weight is shared stay as they are.

    Reference: He et al. 2017, "Channel Pruning for Accelerating Very Deep Neural Networks", arXiv:1707.06168, section 3.1, the
    second of its steps.

    Args:
        masked: its layers are those of `whole`, by their names, with zeros for the inputs that they lose. Not changed.
        whole: the graph as it was.
        batches: calibration data.
        samples: how many `batches` hold.
        threads: of one inference; 0 lets ONNX Runtime choose.
    """
    masked = masked.clone()
    before = {layer.name: layer for layer in linear_layers(whole.graph)}
    lost: list[tuple[LinearLayer, LinearLayer, Bools]] = []
    for layer in linear_layers(masked.graph):
        if layer.name in before and len(layer.weight.uses()) == 1:
            gone = _gone(before[layer.name], layer)
            if gone.any() and not gone.all():
                lost.append((before[layer.name], layer, gone))
    for part in in_parts(lost, lambda one: hessian_bytes(one[0]), HESSIAN_BYTES):
        wholes = [old for old, _, _ in part]
        found = hessians(whole, wholes, batches, samples=samples, threads=threads, constant=True)
        for old, layer, gone in part:
            if rows_key(old) in found:
                _fit(masked.graph, old, layer, gone, found[rows_key(old)])
    return masked


def _gone(old: LinearLayer, new: LinearLayer) -> Bools:
    """The inputs, `(groups, K)`, whose weights became zero."""
    before, after = matrix(old, numbers(old.weight)), matrix(new, numbers(new.weight))
    return np.asarray(((before != 0).any(2)) & ~(after != 0).any(2))


def _fit(graph: ir.Graph, old: LinearLayer, layer: LinearLayer, gone: Bools, hessian: F32) -> None:
    weight, index = numbers(old.weight), layer.parts.weight
    assert index is not None, "linear layers have one"
    before = matrix(old, weight)
    place = _own_bias(layer.node, before.shape[0] * before.shape[2])
    made = [compensate(*one, centered=place is not None) for one in zip(before, hessian, gone, strict=True)]
    give_constant(graph, layer.node, index, array_of(layer, np.stack([new for new, _ in made]), weight.shape))
    if place is not None:
        holder, at, bias = place
        give_constant(graph, holder, at, numbers(bias) + np.concatenate([shift for _, shift in made]))


def _own_bias(node: ir.Node, outputs: int) -> tuple[ir.Node, int, ir.Value] | None:
    """Who reads a layer's bias, at which input, and the bias; None where it has none, or none with a number of its own for each output."""
    place = bias_place(node)
    if place is None or place[1] >= len(place[0].inputs):
        return None
    bias = place[0].inputs[place[1]]
    if bias is None or len(bias.uses()) > 1 or numbers(bias).size != outputs:
        return None
    return *place, bias


def compensate(
    weight: NDArray[Any], hessian: NDArray[Any], gone: Bools, *, centered: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The weight `(K, N)` with zeros for inputs that are `gone`, the others such that outputs are nearest; and what the bias gains, `(N,)`.

    Args:
        weight: `(K, N)`.
        hessian: `x^T x` of rows `(n, K + 1)` that end in 1.
        gone: `(K,)`.
        centered: the bias takes up the mean; else it gains nothing.
    """
    moments = np.asarray(hessian, np.float64)
    count, sums = moments[-1, -1], moments[-1, :-1]
    spread = moments[:-1, :-1]
    if centered:
        spread = spread - np.outer(sums, sums) / count
    kept = ~gone
    own = spread[np.ix_(kept, kept)]
    own = own + np.eye(len(own)) * (DAMPING * np.trace(own) / len(own) + np.finfo(np.float32).tiny)
    lost = np.asarray(weight, np.float64)[gone]
    gain = np.linalg.solve(own, spread[np.ix_(kept, gone)] @ lost)
    new = np.zeros(weight.shape)
    new[kept] = weight[kept] + gain
    shift = (sums[gone] @ lost - sums[kept] @ gain) / count if centered else np.zeros(weight.shape[1])
    return new, shift
