"""Grids for every tensor that is wished quantized: weights from their own numbers, activations from samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import onnx_ir as ir

from edgekit.calibration.layer_rows import LinearLayer, Rows, linear_layers, matrix, numbers, rows_key
from edgekit.calibration.live import live
from edgekit.calibration.observe import observe
from edgekit.data import Batch
from edgekit.errors import DataError
from edgekit.graph.annotations import all_values, get_params, get_wish, set_params
from edgekit.graph.operators import is_constant
from edgekit.graph.rules import shares_grid
from edgekit.method import AUTO, EASYQUANT, EVERYTHING, Method
from edgekit.quant.affine import choose_params, fake_quantize
from edgekit.quant.estimators import ESTIMATORS, get_estimator
from edgekit.quant.observers import COARSE, FINE, Histogram
from edgekit.quant.output_error import Reader, choose_by_output, easyquant
from edgekit.quant.spec import QuantSpec
from edgekit.quant.weight_ranges import weight_range
from edgekit.target import Target

CANDIDATES = ("minmax", "mse", "admm", "percentile")
"""The estimators whose ranges "auto" chooses from."""
FALLBACK = "mse"
"""What chooses, in the place of "auto" and "eq", for tensors that no layer reads as rows."""


def calibrate(
    model: ir.Model,
    target: Target,
    batches: Iterable[Batch],
    *,
    method: Method = EVERYTHING,
    rows: Rows | None = None,
    threads: int = 0,
    on_batch: Callable[[int], None] | None = None,
) -> ir.Model:
    """Give quant attributes to every tensor that is wished quantized and has none yet.

    Args:
        model: float, with wishes from `assign_specs`.
        target: says which tensors share a grid: what only moves numbers around needs no observing.
        batches: samples, in any order and of any size.
        method: how ranges are chosen.
        rows: what layers read, for the calibrators that look at their outputs.
        threads: of inference; 0 lets ONNX Runtime choose.
        on_batch: told the number of samples after each batch.

    Raises:
        DataError: no samples though a tensor needs some, or a tensor becomes NaN or Inf.
    """
    model = model.clone()
    _calibrate_constants(model.graph)
    stride = FINE if "kld" in method.calibrators else COARSE
    observed = observe(model, _to_observe(model, target), batches, threads=threads, on_batch=on_batch, stride=stride)
    readers = _readers(model)
    for value, observer in observed.items():
        layers = [layer for layer in readers.get(value, []) if rows and rows_key(layer) in rows]
        seen, wish = observer.histogram(), get_wish(value)
        assert wish is not None, "it was observed for that"
        if not layers:
            seen = live(value, seen, model, steps=wish[0].qmax - wish[0].qmin)
        _choose(value, wish[0], seen, layers, rows or {}, _calibrator(value, layers, method))
    return model


def _calibrate_constants(graph: ir.Graph) -> None:
    """Grids of weights and tables: all of their numbers in 8 bits, the least squared error in fewer."""
    for value in all_values(graph):
        wish = get_wish(value)
        if wish is None or get_params(value) is not None or not is_constant(value) or value.const_value is None:
            continue
        spec, axis = wish
        weight = value.const_value.numpy().astype(np.float32)
        if not np.isfinite(weight).all():
            raise DataError(f"weight {value.name!r} holds NaN or Inf; it cannot be quantized: check the checkpoint")
        estimator = "minmax" if spec.qmax - spec.qmin > 15 else "mse"
        set_params(value, weight_range(weight, spec, axis=axis, estimator=estimator))


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


def _readers(model: ir.Model) -> dict[ir.Value, list[LinearLayer]]:
    """The quantized layers that read each value."""
    found: dict[ir.Value, list[LinearLayer]] = {}
    for layer in linear_layers(model.graph):
        if get_params(layer.weight) is not None:
            found.setdefault(layer.source, []).append(layer)
    return found


def _calibrator(value: ir.Value, layers: Sequence[LinearLayer], method: Method) -> str:
    """The one asked for by a layer that reads the value, or else that makes it."""
    producer = value.producer()
    names = [layer.name for layer in layers] + ([producer.name or ""] if producer is not None else [])
    asked = [method.for_layer(name).calibrator for name in names]
    return next((name for name in asked if name != method.calibrator), method.calibrator)


def _choose(
    value: ir.Value, spec: QuantSpec, histogram: Histogram, layers: Sequence[LinearLayer], rows: Rows, calibrator: str
) -> None:
    if calibrator in (AUTO, EASYQUANT) and not (layers and histogram.count):
        calibrator = FALLBACK
    if calibrator == EASYQUANT:
        ends = _by_cosine(histogram, spec, layers, rows)
    elif calibrator == AUTO:
        ends, calibrator = _by_output(histogram, spec, layers, rows)
    else:
        ends = get_estimator(calibrator)(histogram, spec)
    set_params(value, choose_params(*ends, spec, observer=calibrator))


def _by_output(
    histogram: Histogram, spec: QuantSpec, layers: Sequence[LinearLayer], rows: Rows
) -> tuple[tuple[float, float], str]:
    readers = []
    for layer in layers:
        weight, params = numbers(layer.weight), get_params(layer.weight)
        assert params is not None
        rounded = matrix(layer, fake_quantize(weight, params))
        readers.append(Reader(rows[rows_key(layer)].rows, matrix(layer, weight), rounded))
    return choose_by_output(readers, histogram, spec, {name: ESTIMATORS[name](histogram, spec) for name in CANDIDATES})


def _by_cosine(histogram: Histogram, spec: QuantSpec, layers: Sequence[LinearLayer], rows: Rows) -> tuple[float, float]:
    """EasyQuant's range, the widest that one of the layers finds; their weights get the ranges that it finds for them."""
    found = []
    for layer in layers:
        wish, params = get_wish(layer.weight), get_params(layer.weight)
        assert params is not None
        weight_spec, axis = wish if wish is not None else (None, None)
        if weight_spec is None or params.fixed or params.block_size or len(layer.weight.uses()) > 1:
            continue
        ranges = easyquant(
            rows[rows_key(layer)].rows, matrix(layer, numbers(layer.weight)), histogram, spec, weight_spec
        )
        low, high = ranges.weight_low, ranges.weight_high
        set_params(layer.weight, choose_params(low, high, weight_spec, axis=axis, observer=EASYQUANT))
        found.append(ranges.activation)
    if not found:
        return get_estimator(FALLBACK)(histogram, spec)
    return min(low for low, _ in found), max(high for _, high in found)
