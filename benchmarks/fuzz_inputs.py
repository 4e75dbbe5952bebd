"""What callers of a random graph give: pictures, sequences, rows of features, tokens, masks."""

from __future__ import annotations

from typing import Any

import numpy as np
from fuzz_graphs import SYMBOLS, Draft, Input, Tensor


def new_input(draft: Draft) -> Tensor:
    """One more input: of the first one's rank now and then, so that the two meet."""
    floats = [one for one in draft.inputs if one.dtype == draft.dtype]
    if floats and draft.chance(0.6):
        return declare(draft, draft.pick(floats).shape, draft.dtype)
    channels = draft.pick([1, 3, 4, 6, 8])
    first: int | str = "n" if draft.chance(0.9) else draft.number(1, 3)
    free = draft.chance(0.3)
    match draft.number(0, 9):
        case 0 | 1 | 2 | 3 | 4:
            side: tuple[int | str, ...] = ("h", "w") if free else (8, 8) if draft.chance(0.7) else (6, 9)
            shape: tuple[int | str, ...] = (first, channels, *side)
        case 5 | 6:
            shape = (first, "t" if free else 6, draft.pick([8, 12, 16]))
        case 7:
            shape = (first, channels, "t" if free else 10)
        case 8:
            shape = (first, draft.pick([6, 10, 16]))
        case _:
            shape = (draft.number(4, 9),) if draft.chance(0.2) else (draft.number(4, 9), draft.pick([8, 12]))
    return declare(draft, shape, draft.dtype)


def declare(draft: Draft, shape: tuple[int | str, ...], dtype: np.dtype[Any], high: int = 0) -> Tensor:
    """An input of a shape, with numbers for the graph to be drawn with."""
    scale = 1.0 if draft.chance(0.8) else draft.pick([0.05, 5.0, 20.0])
    one = Input(f"x{len(draft.inputs)}", shape, dtype, high, scale)
    draft.inputs.append(one)
    tensor = Tensor(one.name, one.numbers(SYMBOLS, draft.rng))
    draft.tensors.append(tensor)
    return tensor
