"""Proof that two graphs compute the same: both are run, and where they part the first node is named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgekit.errors import GraphError
from edgekit.graph.io import load_onnx
from edgekit.graph.operators import FLOATS
from edgekit.graph.run import Arrays, Session, with_outputs

TOLERANCE: dict[str, float] = {"float64": 1e-4, "float32": 1e-4, "float16": 1e-2, "bfloat16": 1e-1}
"""The largest error that counts as rounding, as a share of the output's largest magnitude.

Folding and re-association change the order of sums, which moves a float32 result by about `sqrt(n) * 6e-8` a layer: 1e-6
to 1e-5 for deep networks. A wrong conversion is off by 1e-2 or more. float64 is held to float32's bound, because folded
constants are float32 in many models; integers and booleans must be equal.
"""

FREE_DIMENSION = 64
"""The size that `random_feeds` gives a dynamic dimension other than the batch: five halvings leave a picture of 2 x 2."""


def random_feeds(inputs: Sequence[ir.Value], batch: int = 2, seed: int = 0) -> Arrays:
    """Arrays for the inputs of a graph where there is no data: normal floats; integers 0 and 1; booleans.

    The name of a dynamic first dimension stands for the batch wherever it occurs; other dynamic dimensions become
    `FREE_DIMENSION`. Inputs with a default (an initializer) are left out.

    Raises:
        GraphError: an input has no shape, or a type that has no random numbers.
    """
    rng = np.random.default_rng(seed)
    inputs = [value for value in inputs if value.const_value is None]
    batch_names = {str(value.shape[0]) for value in inputs if value.shape and not isinstance(value.shape[0], int)}
    feeds: Arrays = {}
    for value in inputs:
        if value.shape is None or value.dtype is None or value.dtype == ir.DataType.STRING:
            raise GraphError(
                f"input {value.name!r} has type {value.dtype} and shape {value.shape}; random numbers need a numeric type "
                "and a known rank: give data for it"
            )
        shape = []
        for axis, dim in enumerate(value.shape):
            is_batch = axis == 0 or (str(dim) in batch_names and str(dim) != "None")
            shape.append(dim if isinstance(dim, int) else batch if is_batch else FREE_DIMENSION)
        numbers = rng.standard_normal(shape) if value.dtype in FLOATS else rng.integers(0, 2, shape)
        feeds[value.name or ""] = np.asarray(numbers).astype(value.dtype.numpy())
    return feeds


def prove_equal(before: ir.Model | Path, after: ir.Model, feeds: Mapping[str, NDArray[np.generic]]) -> None:
    """Run both graphs on `feeds`, each node as the standard says, and compare their outputs; see `TOLERANCE`.

    Raises:
        GraphError: an output is missing or differs: its name, the largest error, and the first node that differs.
    """
    expected = Session(before, optimize=False).run(feeds)
    found = Session(after, optimize=False).run(feeds)
    for name in expected:
        if name not in found:
            raise GraphError(
                f"output {name!r} is gone; the rewritten model has {', '.join(found)}: report this as a bug"
            )
        problem = difference(expected[name], found[name])
        if problem:
            raise GraphError(
                f"the rewritten model does not compute the same: output {name!r} {problem}; "
                f"{_first_difference(before, after, feeds)}"
            )


def difference(expected: NDArray[np.generic], found: NDArray[np.generic]) -> str:
    """How two arrays differ beyond rounding, in words; empty when they do not."""
    if expected.dtype != found.dtype or expected.shape != found.shape:
        return f"was {expected.dtype} of shape {expected.shape} and is {found.dtype} of shape {found.shape}"
    if expected.dtype.name not in TOLERANCE:
        count = int(np.count_nonzero(expected != found))
        return f"differs in {count} of {expected.size} elements" if count else ""
    old, new = expected.astype(np.float64), found.astype(np.float64)
    finite = np.isfinite(old)
    if not np.array_equal(old[~finite], new[~finite], equal_nan=True) or not np.isfinite(new[finite]).all():
        return "is NaN or infinite at other places"
    error = float(np.abs(old[finite] - new[finite]).max(initial=0.0))
    magnitude = float(np.abs(old[finite]).max(initial=0.0))
    if error <= TOLERANCE[expected.dtype.name] * magnitude:
        return ""
    return f"is off by up to {error:.3g}, where its largest magnitude is {magnitude:.3g}"


def _first_difference(before: ir.Model | Path, after: ir.Model, feeds: Mapping[str, NDArray[np.generic]]) -> str:
    """The first node, in the order of `after`, whose output has the same name in both graphs and differs."""
    source = load_onnx(before) if isinstance(before, Path) else before
    shared = {value.name or "" for value in _computed(source)} & {value.name or "" for value in _computed(after)}
    expected = Session(with_outputs(source, shared), optimize=False).run(feeds)
    found = Session(with_outputs(after, shared), optimize=False).run(feeds)
    for value in _computed(after):
        name = value.name or ""
        problem = difference(expected[name], found[name]) if name in shared else ""
        if problem:
            node = value.producer()
            assert node is not None
            return f"the first node that differs is {node.name!r} ({node.op_type}): its output {name!r} {problem}"
    return "no tensor that both models name differs"


def _computed(model: ir.Model) -> Iterator[ir.Value]:
    """The outputs of nodes that are arrays, not sequences, and have a name to be fetched by."""
    values = (output for node in model.graph for output in node.outputs if output.name)
    return (value for value in values if value.type is None or isinstance(value.type, ir.TensorType))
