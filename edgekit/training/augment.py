"""Images varied from epoch to epoch, each by its number and the epoch alone, so that a resumed run sees the same ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgekit.schedule import Augment

Layout = Literal["NCHW", "NHWC"]


@dataclass(frozen=True, slots=True, eq=False)
class Draws:
    """What chance decided for every sample in one epoch, each `(N,)`.

    Attributes:
        top, left: where the window begins in the padded image, 0 to twice the padding. Pixels.
        flipped: whether it is mirrored.
    """

    top: NDArray[np.int64]
    left: NDArray[np.int64]
    flipped: NDArray[np.bool_]


def draw(augment: Augment, count: int, *, seed: int, epoch: int) -> Draws:
    """What happens to each of `count` samples in an epoch: it depends on the arguments alone."""
    rng = np.random.default_rng((seed, epoch, 1))
    top, left = rng.integers(0, 2 * augment.crop + 1, (2, count))
    return Draws(top, left, rng.random(count) < (0.5 if augment.flip else 0.0))


def augmented(
    images: NDArray[Any], indices: NDArray[np.intp], draws: Draws, padding: int, layout: Layout
) -> NDArray[Any]:
    """Images `(n, C, H, W)`, or `(n, H, W, C)`, cropped out of a frame of zeros and mirrored, each as its draw says; new memory.

    Args:
        indices: `(n,)`, the number of each image among all samples.
        padding: pixels of zeros on every side.
    """
    first = 2 if layout == "NCHW" else 1
    height, width = images.shape[first : first + 2]
    sides = [(padding, padding) if axis in (first, first + 1) else (0, 0) for axis in range(4)]
    padded = np.pad(images, sides) if padding else images
    out = np.empty_like(images)
    before = (slice(None),) * (first - 1)
    for place, index in enumerate(indices):
        top, left = draws.top[index], draws.left[index]
        window = padded[place][*before, top : top + height, left : left + width]
        out[place] = window[*before, :, ::-1] if draws.flipped[index] else window
    return out
