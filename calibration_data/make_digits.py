"""Write `digits.npz`: 256 real handwritten digits, the calibration set of the demo.

Run it from anywhere: `python calibration_data/make_digits.py`. It needs scikit-learn, whose 1797 digits of 8 x 8 pixels
are the test set of the UCI "Optical Recognition of Handwritten Digits" data. The same digits come out each time, in the
same bytes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

COUNT = 256


def choose(labels: NDArray[np.int64], count: int) -> NDArray[np.intp]:
    """`count` positions in `labels`, ascending, with the classes as equal in number as they can be."""
    shuffled = np.random.default_rng(0).permutation(len(labels))
    # How many of the same class come before each one, in the shuffled order: the first ones of all classes win.
    turn = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        turn[members] = np.arange(len(members))
    return np.sort(np.lexsort((labels, turn))[:count])


def main(path: Path) -> None:
    """Write the arrays `image`, float32 `(256, 1, 8, 8)` from 0 to 1, and `labels`, int64 `(256,)`."""
    digits = load_digits()
    chosen = choose(digits.target, COUNT)
    image = (digits.images[chosen, None] / 16).astype(np.float32)
    np.savez(path, image=image, labels=digits.target[chosen].astype(np.int64))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("digits.npz"))
