"""Whether a float graph still computes what was drawn, beyond the rounding that it amplifies itself."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir
from fuzz_graphs import Array, Drawn, run

from edgekit.graph.run import Session

TOLERANCE = {"float32": 2e-5, "float64": 2e-5, "float16": 4e-3}
"""As a share of an output's largest magnitude. Sums of n numbers in another order part by about `sqrt(n) * 6e-8`, and these have up to
200, in up to 15 layers: 1e-5; float16 stores each result to 5e-4. A graph that divides by, or takes the difference of, what nearly
vanishes amplifies that, so what a nudge of the inputs by `NUDGE` moves is added, `AMPLIFIED` times.
"""
NUDGE = {"float32": 2.0**-21, "float64": 2.0**-21, "float16": 2.0**-10}
AMPLIFIED = 8.0


def parted(drawn: Drawn, model: ir.Model) -> str:
    """How a float graph computes something else than the one that was drawn, at sizes of its own too."""
    session = Session(model, optimize=False, threads=1)
    calls = [drawn.feeds(3), drawn.feeds(4, elsewhere=True)]
    if drawn.dynamic:
        calls.append(drawn.feeds(5, batch=1))
    for feeds in calls:
        expected = dict(zip((o.name for o in drawn.model.graph.output), run(drawn.model, feeds), strict=True))
        found, slack = session.run(feeds), _slack(drawn, feeds, expected)
        if list(found) != list(expected):
            return f"the outputs were {list(expected)} and are {list(found)}"
        for name, array in expected.items():
            problem = _difference(array, found[name], slack[name])
            if problem:
                return f"output {name!r} {problem}"
    return ""


def _slack(drawn: Drawn, feeds: Mapping[str, Array], expected: Mapping[str, Array]) -> dict[str, Array]:
    """How far each element may be off; see `TOLERANCE`."""
    halved = any(
        a.i == onnx.TensorProto.FLOAT16 for node in drawn.model.graph.node for a in node.attribute if a.name == "to"
    )
    kind = "float16" if halved else drawn.dtype
    moved = {name: np.zeros(array.shape) for name, array in expected.items()}
    for seed in range(3):
        rng = np.random.default_rng(seed)
        nudged = {
            name: (a * (1 + NUDGE[kind] * rng.choice([-1, 1], a.shape))).astype(a.dtype) if a.dtype.kind == "f" else a
            for name, a in feeds.items()
        }
        for (name, array), other in zip(expected.items(), run(drawn.model, nudged), strict=True):
            moved[name] = np.maximum(moved[name], np.abs(array.astype(np.float64) - other.astype(np.float64)))
    return {
        name: AMPLIFIED * np.max(moved[name], initial=0.0)
        + TOLERANCE[kind] * np.abs(array.astype(np.float64)).max(initial=0.0)
        for name, array in expected.items()
    }


def _difference(expected: Array, found: Array, slack: Array) -> str:
    if expected.dtype != found.dtype or expected.shape != found.shape:
        return f"was {expected.dtype} {expected.shape} and is {found.dtype} {found.shape}"
    if expected.dtype.kind != "f":
        return "" if np.array_equal(expected, found) or slack > 1e-3 else "has other whole numbers"
    old, new = expected.astype(np.float64), found.astype(np.float64)
    if not np.isfinite(new).all():
        return "is not finite"
    error = float(np.abs(old - new).max(initial=0.0))
    return f"is off by {error:.3g}, of {np.abs(old).max(initial=0.0):.3g}" if error > slack else ""
