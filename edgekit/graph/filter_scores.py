"""How much filters are worth, from their weights alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import GraphError
from edgekit.pruning import CRITERIA

F64 = NDArray[np.float64]
Filters = NDArray[np.floating]
"""Of a group: `(units, weights)`, float32 or, where the graph has those, float64. They are as large as the graph's weights: criteria go
through them row by row, or copy them only where they have to."""
Criterion = Callable[[Filters], F64]
"""From filters a score for each unit: what scores higher is kept."""


def l1(filters: Filters) -> F64:
    """The sum of magnitudes.

    Reference: Li, Kadav, Durdanovic, Samet, Graf (2017), "Pruning Filters for Efficient ConvNets", arXiv:1608.08710, section 3.1.
    """
    return np.array([np.abs(row).sum(dtype=np.float64) for row in filters])


def l2(filters: Filters) -> F64:
    """The Euclidean norm."""
    return np.array([np.sqrt(np.square(row, dtype=np.float64).sum()) for row in filters])


def fpgm(filters: Filters) -> F64:
    """The sum of the distances to all other filters: what lies near the median of all can be made up for by the others.

    Reference: He, Liu, Wang, Hu, Yang (2019), "Filter Pruning via Geometric Median", arXiv:1811.00250, equation 6.
    """
    points = filters.astype(np.float64)
    squares = (points**2).sum(axis=1)
    distances = np.sqrt(np.maximum(squares[:, None] + squares - 2 * points @ points.T, 0))
    np.fill_diagonal(distances, 0)  # up to rounding, they are
    return np.asarray(distances.sum(axis=1))


def criterion_function(criterion: str | Criterion, seed: int) -> Criterion:
    """A criterion by name; a function as it is.

    Raises:
        GraphError: it is unknown, or needs more than an ONNX file has.
    """
    if callable(criterion):
        return criterion
    rng = np.random.default_rng(seed)
    known: dict[str, Criterion] = {"l1": l1, "l2": l2, "fpgm": fpgm, "random": lambda filters: rng.random(len(filters))}
    if criterion in known:
        return known[criterion]
    if criterion not in CRITERIA:
        raise GraphError(f"criterion is {criterion!r}; an ONNX graph can be pruned by {', '.join(known)}")
    needs = "BatchNorm, which is folded," if criterion == "bn" else "gradients, which an ONNX graph has none of"
    raise GraphError(
        f"criterion {criterion!r} needs {needs}: choose one of {', '.join(known)}, or prune the checkpoint instead"
    )
