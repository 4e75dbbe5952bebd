"""Channels that can only go together, what they are worth, and what layers cost when some are gone.

Structured pruning finds these in a network, in torch or in an ONNX graph, chooses which to keep, and cuts the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Choice = Mapping[str, NDArray[np.intp]]
"""The units that are kept, sorted, by the name of their group; a group that is not named keeps all."""


@dataclass(frozen=True, slots=True)
class Group:
    """Units of channels that several layers share: a unit goes from all of them, or from none.

    Attributes:
        name: that of the first layer that makes these channels.
        makers: all layers whose output has these channels.
        scores: `(units,)`, how much each unit is worth; comparable between groups only after the criterion's normalization.
        width: channels of one unit: 1, the size of a head, or the number of groups of a grouped convolution.
    """

    name: str
    makers: tuple[str, ...]
    scores: NDArray[np.float64]
    width: int = 1

    @property
    def units(self) -> int:
        """How many there are."""
        return len(self.scores)


@dataclass(frozen=True, slots=True)
class LayerCost:
    """What a layer costs, and which groups change that.

    Attributes:
        name: of the layer: its path in the module.
        macs: of one sample, unpruned.
        parameters: unpruned.
        channels: of its input and of its output, unpruned.
        reads: for each group that its input consists of, the share of the input's channels; what is left never changes. A depthwise
            convolution reads none: its cost goes with its output alone.
        makes: the same for its output.
    """

    name: str
    macs: int
    parameters: int
    channels: tuple[int, int]
    reads: tuple[tuple[str, float], ...] = ()
    makes: tuple[tuple[str, float], ...] = ()

    def shares(self, kept: Mapping[str, float]) -> tuple[float, float]:
        """What is left of the input's channels and of the output's, where `kept` is what is left of each group (1 if not named)."""
        return _left(self.reads, kept), _left(self.makes, kept)


def kept_shares(groups: Sequence[Group], choice: Choice) -> dict[str, float]:
    """What a choice leaves of each group, 0 to 1."""
    return {group.name: len(choice[group.name]) / group.units for group in groups if group.name in choice}


def total_macs(costs: Sequence[LayerCost], kept: Mapping[str, float]) -> float:
    """MACs of one sample where `kept` is what is left of each group."""
    return sum(cost.macs * math.prod(cost.shares(kept)) for cost in costs)


def _left(parts: tuple[tuple[str, float], ...], kept: Mapping[str, float]) -> float:
    return 1.0 - sum(share * (1.0 - kept.get(name, 1.0)) for name, share in parts)
