"""Calibration: run the float model over samples and choose a range for every tensor that needs one.

Memory is flat in the number of samples: each batch's activations are folded into histograms and forgotten. The histograms' bins
are powers of two wide, so their sum depends neither on the order of batches nor on their size; only ONNX Runtime itself may round
another way for another batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import onnx_ir as ir

from edgekit.calibration.observe import observe
from edgekit.data import Batch
from edgekit.errors import DataError
from edgekit.graph.annotations import all_values, get_params, get_wish, set_params
from edgekit.graph.operators import is_constant
from edgekit.graph.rules import shares_grid
from edgekit.quant.affine import choose_params, weight_params
from edgekit.quant.estimators import get_estimator
from edgekit.target import Target


def calibrate(
    model: ir.Model,
    target: Target,
    batches: Iterable[Batch],
    *,
    estimator: str = "kld",
    threads: int = 0,
    on_batch: Callable[[int], None] | None = None,
) -> ir.Model:
    """Give quant attributes to every tensor that is wished quantized and has none yet.

    Args:
        model: float, with wishes from `assign_specs`.
        target: says which tensors share a grid: what only moves numbers around needs no observing.
        batches: samples, in any order and of any size.
        estimator: how a range is chosen from a histogram, a name from `quant.estimators`.
        threads: of inference; 0 lets ONNX Runtime choose.
        on_batch: told the number of samples after each batch.

    Raises:
        DataError: no samples though a tensor needs some, or a tensor becomes NaN or Inf.
    """
    choose = get_estimator(estimator)
    model = model.clone()
    _calibrate_weights(model.graph)
    observed = observe(model, _to_observe(model, target), batches, threads=threads, on_batch=on_batch)
    for value, observer in observed.items():
        wish = get_wish(value)
        assert wish is not None
        low, high = choose(observer.histogram(), wish[0])
        set_params(value, choose_params(low, high, wish[0], observer=estimator))
    return model


def _calibrate_weights(graph: ir.Graph) -> None:
    for value in all_values(graph):
        wish = get_wish(value)
        if wish is None or get_params(value) is not None or not is_constant(value) or value.const_value is None:
            continue
        weight = value.const_value.numpy()
        if not np.isfinite(weight.astype(np.float32)).all():
            raise DataError(f"weight {value.name!r} holds NaN or Inf; it cannot be quantized: check the checkpoint")
        set_params(value, weight_params(weight.astype(np.float32), wish[0], axis=wish[1]))


def _to_observe(model: ir.Model, target: Target) -> list[ir.Value]:
    """The wished activations, without those that hold only numbers of observed ones: see `_only_moves`."""
    derived = {output for node in model.graph if _only_moves(node, target) for output in node.outputs}
    return [
        value
        for value in all_values(model.graph)
        if get_wish(value) is not None and get_params(value) is None and not is_constant(value) and value not in derived
    ]


def _only_moves(node: ir.Node, target: Target) -> bool:
    """Whether all that a node makes stands in inputs of the same grid already; a constant's numbers do not."""
    tied = shares_grid(node, target)
    sources = node.inputs if node.op_type in target.quantization.unify else node.inputs[:1]
    return bool(tied) and all(value in tied for value in sources)
