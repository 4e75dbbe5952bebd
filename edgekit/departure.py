"""Where a runtime's codes part from those that were trained: tensor by tensor, as a record."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgekit.toml_file import Table

Codes = NDArray[np.generic]


class Departure(Table):
    """One tensor's codes, as the runtime makes them with all its optimizations, against the simulation's.

    Attributes:
        tensor: whose codes they are.
        layer: the node that makes it; empty for an input.
        codes: how many were compared.
        differ: the share of them that differ.
        worst: by how much at most.
    """

    tensor: str
    layer: str
    codes: int
    differ: float
    worst: int


def departure(tensor: str, layer: str, ran: Sequence[Codes], expected: Sequence[Codes]) -> Departure:
    """Compare the codes of some batches, which have the same shapes on both sides."""
    different = total = worst = 0
    for here, there in zip(ran, expected, strict=True):
        apart = np.abs(here.astype(np.int64) - there.astype(np.int64))
        different, total = different + int(np.count_nonzero(apart)), total + apart.size
        worst = max(worst, int(apart.max(initial=0)))
    return Departure(tensor=tensor, layer=layer, codes=total, differ=different / max(1, total), worst=worst)


def share(departures: Sequence[Departure]) -> float:
    """Of all codes, the share that differs."""
    return sum(one.differ * one.codes for one in departures) / max(1, sum(one.codes for one in departures))
