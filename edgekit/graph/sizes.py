"""How much memory activations take: what is held at once is a matter of a model and its samples, not of how many samples there are."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

Arrays = Mapping[str, NDArray[np.generic]]
Item = TypeVar("Item")

HELD_BYTES = 384 << 20
"""Of activations that are alive at once, where there is a choice."""
WATCHED_BYTES = 192 << 20
"""Of activations that are fetched to be looked at: half of it, because there are the rest of the graph and what is made of them."""


def value_bytes(model: ir.Model, feeds: Arrays) -> dict[str, int]:
    """The bytes of each activation of a graph when it runs on arrays of the shapes of `feeds`, by name.

    A size that cannot be inferred counts as 1, and values of unknown rank as nothing: those hang on numbers, such as how many boxes
    are left, and are small.
    """
    model = model.clone()
    for value in (output for node in model.graph for output in node.outputs):
        value.shape = None  # stored ones leave the batch open
    for value in model.graph.inputs:
        if value.name is not None and value.name in feeds:
            value.shape = ir.Shape(feeds[value.name].shape)
    common.ShapeInferencePass(strict_mode=False)(model)
    values = [*model.graph.inputs, *(output for node in model.graph for output in node.outputs)]
    return {value.name or "": _bytes(value) for value in values}


def peak_bytes(model: ir.Model, feeds: Arrays, held: Collection[str] = ()) -> int:
    """The most bytes of activations that are alive at once when a graph runs node by node on arrays like `feeds`.

    Args:
        model: its nodes in an order in which they can run.
        feeds: arrays, or their likes.
        held: names of values that are kept to the end, besides the outputs.
    """
    sizes = value_bytes(model, feeds)
    last = {value: index for index, node in enumerate(model.graph) for value in node.inputs if value is not None}
    alive = peak = sum(sizes[value.name or ""] for value in model.graph.inputs)
    for index, node in enumerate(model.graph):
        alive += sum(sizes[output.name or ""] for output in node.outputs)
        peak = max(peak, alive)
        ended = {
            value for value in (*node.inputs, *node.outputs) if value is not None and last.get(value, index) == index
        }
        kept = {value for value in ended if value.is_graph_output() or value.name in held}
        alive -= sum(sizes.get(value.name or "", 0) for value in ended - kept)
    return peak


def samples_at_once(model: ir.Model, feeds: Arrays, most: int, *, held: Collection[str] = ()) -> int:
    """How many samples like those in `feeds`, 1 to `most`, are run together without holding more than `HELD_BYTES`."""
    count = max((len(array) for array in feeds.values() if array.ndim), default=1)
    return max(1, min(most, HELD_BYTES * max(1, count) // max(1, peak_bytes(model, feeds, held))))


def in_parts(items: Iterable[Item], size_of: Callable[[Item], int], most: int) -> Iterator[list[Item]]:
    """Items in order, in parts whose sizes add up to at most `most`, or that are one item."""
    part: list[Item] = []
    held = 0
    for item in items:
        own = size_of(item)
        if part and held + own > most:
            yield part
            part, held = [], 0
        part.append(item)
        held += own
    if part:
        yield part


def give_back() -> None:
    """Have the C library return what is free to the system, where it can be asked to: large arrays that come and go leave holes."""
    if _TRIM is not None:
        _TRIM(0)


def _trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim  # of glibc
    except (AttributeError, OSError, TypeError):
        return None


_TRIM = _trim()


def _bytes(value: ir.Value) -> int:
    if value.shape is None or value.dtype is None or value.dtype == ir.DataType.STRING:
        return 0
    return math.ceil(math.prod(d if isinstance(d, int) else 1 for d in value.shape) * value.dtype.bitwidth / 8)
