"""Tokens that only fill up a sample: what they hold never reaches an output, so no range need cover it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_] | None
"""Which tokens of a sample are real, `(batch, tokens)`; None where no input says so."""


def padding_mask(feeds: Mapping[str, NDArray[np.generic]]) -> Mask:
    """From an input of whole numbers, or truth values, that has "mask" in its name: 0 where tokens only fill up a sample."""
    for name, array in feeds.items():
        whole = array.dtype.kind in "biu"
        if "mask" in name.lower() and whole and array.ndim == 2 and np.isin(array, (0, 1)).all() and array.any():
            return array.astype(bool)
    return None


def without_padding(array: NDArray[np.generic], mask: Mask) -> NDArray[np.generic]:
    """The real tokens of `(batch, tokens, channels)` as `(tokens, channels)`; any other array as it is."""
    return array if mask is None or array.ndim != 3 or array.shape[:2] != mask.shape else array[mask]
