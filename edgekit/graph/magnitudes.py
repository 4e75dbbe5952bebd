"""Which tensors need more than float16's range, by what a model makes of some samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgekit.graph.annotations import all_values
from edgekit.graph.operators import is_constant
from edgekit.graph.probe import Probe

WIDE = "edgekit.wide"
"""The metadata key of tensors that are kept in float32; it holds the largest magnitude that was seen."""
LIMIT = 2.0**15
"""From this magnitude on: half of float16's range is left to samples that were not seen."""
INFINITE = 1e30
"""From this magnitude on a number means "no number": attention masks hold float32's lowest value."""


def mark_wide(model: ir.Model, batches: Iterable[Mapping[str, NDArray[np.generic]]]) -> ir.Model:
    """A copy whose float32 tensors that leave float16's range on `batches` are marked `WIDE`.

    Magnitudes from `INFINITE` on count only where they come in with an input: those that a constant mask makes are smaller in
    float16, where the mask is. Infinities are infinities in either type.

    Args:
        model: float; may carry quant attributes.
        batches: feeds; the activations of one are held at a time.

    Raises:
        GraphError: ONNX Runtime cannot run it.
    """
    model = model.clone()
    values = [value for value in all_values(model.graph) if value.dtype == ir.DataType.FLOAT and not is_constant(value)]
    largest = _largest(model, [value.name for value in values if value.name], batches)
    for value in [*model.graph.inputs, *(output for node in model.graph for output in node.outputs)]:
        seen = largest.get(value.name or "", 0.0)
        if LIMIT <= seen < INFINITE or (seen >= INFINITE and _from_input(value)):
            value.metadata_props[WIDE] = f"{seen:g}"
    return model


def wide_names(model: ir.Model) -> list[str]:
    """The names of the tensors that `mark_wide` marked, in graph order."""
    return [value.name or "" for value in all_values(model.graph) if WIDE in value.metadata_props]


def _from_input(value: ir.Value) -> bool:
    """Whether a number is as large as it is because of an input, not of a constant."""
    producer = value.producer()
    return producer is None or any(source is not None and WIDE in source.metadata_props for source in producer.inputs)


def _largest(
    model: ir.Model, names: list[str], batches: Iterable[Mapping[str, NDArray[np.generic]]]
) -> dict[str, float]:
    """The largest finite magnitude of each tensor over all batches."""
    probe = Probe(model, names, optimize=False)
    largest = dict.fromkeys(names, 0.0)
    for feeds in batches:
        for arrays in probe.run(feeds):
            for name in list(arrays):
                largest[name] = max(largest[name], _magnitude(arrays.pop(name)))
    return largest


def _magnitude(array: NDArray[np.generic]) -> float:
    if not array.size:
        return 0.0
    return max(abs(end) if np.isfinite(end) else 0.0 for end in (float(array.min()), float(array.max())))
