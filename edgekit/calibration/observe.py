"""The first pass of calibration: what range, and what distribution, each tensor has over the samples.

Memory is flat in the number of samples: each batch's activations are folded into histograms and forgotten. The histograms' bins
are powers of two wide, so their sum depends neither on the order of batches nor on their size; only ONNX Runtime itself may round
another way for another batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgekit.data import Batch
from edgekit.errors import DataError
from edgekit.graph.run import Session, with_outputs
from edgekit.quant.observers import HistogramObserver


def observe(
    model: ir.Model,
    values: list[ir.Value],
    batches: Iterable[Batch],
    *,
    threads: int,
    on_batch: Callable[[int], None] | None,
) -> dict[ir.Value, HistogramObserver]:
    """Run `model` over the batches and observe the values of graph `values`: see the module.

    Raises:
        DataError: no samples, or a tensor becomes NaN or Inf.
    """
    if not values:
        return {}
    observers = {value: HistogramObserver() for value in values}
    inputs = {value.name: value for value in values if value.is_graph_input()}
    computed = [value for value in values if not value.is_graph_input()]
    session = Session(with_outputs(model, {value.name or "" for value in computed}), optimize=True, threads=threads)
    seen = 0
    for batch in batches:
        for name, value in inputs.items():
            _update(observers[value], batch.feeds[name or ""], value)
        if computed:
            arrays = session.run(batch.feeds, outputs=[value.name or "" for value in computed])
            for value in computed:
                _update(observers[value], arrays[value.name or ""], value)
        seen += len(batch)
        if on_batch is not None:
            on_batch(len(batch))
    if not seen:
        raise DataError("the calibration data holds no samples; give at least one (a few hundred make good ranges)")
    return observers


def _update(observer: HistogramObserver, array: NDArray[np.generic], value: ir.Value) -> None:
    try:
        observer.update(array)
    except DataError as error:
        raise DataError(
            f"tensor {value.name!r} becomes NaN or Inf during calibration ({error}); check the checkpoint and the preprocessing"
        ) from error
