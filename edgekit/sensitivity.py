"""How much each quantized node alone costs: at its own output, at the model's outputs, and in the user's metric.

One session a node over the whole model would be plain and slow. Here the nodes are cut into segments, in graph order. For each
segment one pass over the float graph finds every node's error on float inputs, by a copy of the node beside it that reads codes; then
only the rest of the float graph runs, from the segment on, with one node's error added at a time. With six segments that is little
more than half an inference for each node and batch, and memory does not grow with the number of batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgekit.beside import (
    Site,
    beside_floats,
    by_name,
    error_name,
    fed_name,
    read_output,
    rest_of,
    signal_name,
    site_of,
)
from edgekit.errors import DataError, GraphError
from edgekit.graph.operators import LINEAR, layers
from edgekit.graph.rules import quantized_nodes, recurrent
from edgekit.graph.run import Session
from edgekit.graph.sizes import WATCHED_BYTES, in_parts, value_bytes
from edgekit.lowering.qdq import lower_qdq
from edgekit.metric import Evaluate
from edgekit.progress import Progress, silent
from edgekit.records import LayerSensitivity
from edgekit.target import Target

Arrays = Mapping[str, NDArray[np.generic]]

SEGMENTS = 6
LARGEST_DB = 200.0
AT_ONCE = 1 << 20
MOST = 0.9
_BESIDE_READERS = {"bias": "float", "drop_redundant": (), "pass_through_q": "around", "integer_pad": "never"}
"""Rules by which each quantized node reads what it reads behind a Q/DQ pair, and no node changes."""


def sensitivity(
    model: ir.Model,
    target: Target,
    batches: Sequence[Arrays],
    *,
    metric: Evaluate | None = None,
    focus: Callable[[Arrays], Arrays] = lambda outputs: outputs,
    threads: int = 0,
    on_progress: Progress = silent,
) -> list[LayerSensitivity]:
    """Quantize each node of the annotated `model` alone that `target` runs quantized, and compare with float; in graph order.

    Args:
        model: float, with quant attributes.
        target: says which nodes are quantized, and on which grids.
        batches: feeds; a few dozen samples rank the layers well.
        metric: evaluated as well, once for each layer with weights.
        focus: what of the model's outputs is compared; it is given those that come behind a layer.
        threads: of inference; 0 lets ONNX Runtime choose.
        on_progress: told of each node.

    Raises:
        DataError: no batches, or the metric fails.
        GraphError: no output of the model is a float.
    """
    check_batches(batches, "sensitivity")
    lowered = lower_qdq(model, _with_rules(target, _BESIDE_READERS))
    plain, on_codes = by_name(model.graph), by_name(lowered.graph)
    chosen = {*quantized_nodes(model, target), *recurrent(model.graph)}
    nodes = [node for node in model.graph if node in chosen and _is_on_codes(node, on_codes, plain)]
    costs = {layer.name: layer.macs for layer in layers(model)}
    found: list[LayerSensitivity] = []
    sites = [site_of(node, target, on_codes) for node in nodes]
    for segment in _segments(sites, value_bytes(model, batches[0])):
        for site, (local, whole) in zip(segment, _alone(model, lowered, segment, batches, focus, threads), strict=True):
            node, name = site.node, site.name
            found.append(
                LayerSensitivity(
                    name=name,
                    op_type=node.op_type,
                    macs=costs.get(name, 0),
                    local_sqnr_db=local,
                    output_sqnr_db=whole.sqnr_db,
                    output_cosine=whole.cosine,
                    metric=_score(model, target, node, metric, threads),
                )
            )
            on_progress("sensitivity", len(found), len(nodes))
    return found


def _segments(sites: Sequence[Site], sizes: Mapping[str, int]) -> Iterator[list[Site]]:
    """Nodes in order, cut into `SEGMENTS`, or into more where the errors of so many are too large to hold."""
    size = max(1, -(-len(sites) // SEGMENTS))
    for start in range(0, len(sites), size):
        some = {site.value.name or "": site for site in sites[start : start + size]}
        for part in in_parts(some, lambda name: sizes.get(name, 0), WATCHED_BYTES):
            yield [some[name] for name in part]


def rank(found: Sequence[LayerSensitivity]) -> list[str]:
    """The names of the nodes, the worst first: by metric where it is known, then by the error of the model's outputs.

    Lighter operators have no metric of their own: they stand beside the layer whose error at the outputs is nearest.
    """
    known = [(layer.output_sqnr_db, layer.metric) for layer in found if layer.metric is not None]

    def worth(layer: LayerSensitivity) -> tuple[float, float]:
        here = layer.output_sqnr_db
        metric = layer.metric
        if metric is None:
            metric = min(known, key=lambda other: abs(other[0] - here))[1] if known else 0.0
        return metric, here

    return [layer.name for layer in sorted(found, key=worth)]


def how_many_hurt(found: Sequence[LayerSensitivity], most: float = MOST) -> int:
    """Of how many nodes, the worst, the errors at the outputs make `most` of the sum of all: errors of layers add up in energy."""
    noise = np.sort([10 ** (-layer.output_sqnr_db / 10) for layer in found])[::-1]
    return int(np.searchsorted(np.cumsum(noise), most * noise.sum())) + 1


@dataclass(slots=True)
class Fidelity:
    """How close outputs are to those of the float model, summed up over batches; whole numbers and truth values do not count."""

    _noise: dict[str, float] = field(default_factory=dict)
    _signal: dict[str, float] = field(default_factory=dict)
    _cosines: dict[str, list[float]] = field(default_factory=dict)

    def update(self, found: Arrays, expected: Arrays) -> None:
        """Add a batch. Where the float model itself is not finite (the -inf of a mask), nothing is compared."""
        for name, array in found.items():
            reference = expected[name]
            if not np.issubdtype(reference.dtype, np.floating):
                continue
            finite = np.isfinite(reference)
            ours, theirs = (np.where(finite, v, 0).astype(np.float64) for v in (array, reference))
            rows = [v.reshape(len(v) if v.ndim else 1, -1) for v in (ours, theirs)]
            dots = np.einsum("ij,ij->i", *rows)
            norms = np.linalg.norm(rows[0], axis=1) * np.linalg.norm(rows[1], axis=1)
            same = (rows[0] == rows[1]).all(axis=1)
            cosines = np.where(same, 1.0, dots / np.where(norms > 0, norms, 1.0))
            self._noise[name] = self._noise.get(name, 0.0) + float(np.square(ours - theirs).sum())
            self._signal[name] = self._signal.get(name, 0.0) + float(np.square(theirs).sum())
            self._cosines.setdefault(name, []).extend(np.nan_to_num(cosines).tolist())

    @property
    def sqnr_db(self) -> float:
        """Signal-to-quantization-noise ratio of the worst output (dB, -200 to 200)."""
        return min(decibels(self._signal[name], noise) for name, noise in self._noise.items())

    @property
    def cosine(self) -> float:
        """The mean over samples of the cosine between outputs, of the worst output."""
        return min(float(np.mean(cosines)) for cosines in self._cosines.values())


def decibels(signal: float, noise: float) -> float:
    """A ratio of energies in dB, -200 to 200; no noise is 200."""
    if noise == 0.0:
        return LARGEST_DB
    if not np.isfinite(noise):
        return -LARGEST_DB
    return float(np.clip(10 * np.log10(max(signal, 1e-300) / noise), -LARGEST_DB, LARGEST_DB))


def check_batches(batches: Sequence[Arrays], what: str) -> None:
    """Raises DataError when there are none."""
    if not batches:
        raise DataError(f"{what} needs samples to run the model on, found none; give at least one batch")


def check_float_output(model: ir.Model) -> None:
    """Raises GraphError when a model has no output to compare."""
    if not any(value.dtype is None or value.dtype.is_floating_point() for value in model.graph.outputs):
        names = ", ".join(f"{value.name} ({value.dtype})" for value in model.graph.outputs)
        raise GraphError(f"the model has no output of floats to compare (found: {names}); give a metric to judge it by")


def _with_rules(target: Target, rules: Mapping[str, object]) -> Target:
    return target.model_copy(update={"quantization": target.quantization.model_copy(update=rules)})


def _is_on_codes(node: ir.Node, on_codes: Mapping[str | None, ir.Value], plain: Mapping[str | None, ir.Value]) -> bool:
    """Whether what is in a node's place in the lowered graph is another operator, or reads anything that the float graph has not: nodes on
    codes, or their results.
    """
    lowered = on_codes[read_output(node).name].producer()
    assert lowered is not None, "a quantized node makes it"
    read = [value for value in lowered.inputs if value is not None and not value.is_initializer()]
    return lowered.op_type != node.op_type or any(value.name not in plain for value in read)


def _score(model: ir.Model, target: Target, node: ir.Node, metric: Evaluate | None, threads: int) -> float | None:
    """The metric with one layer quantized; lighter operators are not quantized without a layer."""
    if metric is None or node.op_type not in LINEAR:
        return None
    others = frozenset(other.name or "" for other in model.graph if other.name != node.name)
    return metric(Session(lower_qdq(model, target, keep_float=others), optimize=True, threads=threads).run).value


def _alone(
    model: ir.Model,
    lowered: ir.Model,
    segment: Sequence[Site],
    batches: Sequence[Arrays],
    focus: Callable[[Arrays], Arrays],
    threads: int,
) -> list[tuple[float, Fidelity]]:
    """For each node of a segment, its own SQNR (dB) and what the model's outputs become when only it is quantized."""
    names = [site.name for site in segment]
    rest, live = rest_of(model, segment)
    check_float_output(rest)
    # Not optimized: ONNX Runtime would quantize more than it is told to, such as what a MatMul of 4-bit weights reads.
    beside = Session(beside_floats(model, lowered, segment, live), optimize=False, threads=threads)
    after = Session(rest, optimize=True, threads=threads)
    noise, signal = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    whole = {name: Fidelity() for name in names}

    def add(feeds: Arrays) -> None:  # whose arrays are let go of before the next batch runs
        made = beside.lend(feeds)
        given = dict(feeds) | {fed_name(name): made[name] for name in live}
        nothing = {error_name(name): np.zeros(1, made[error_name(name)].dtype) for name in names}
        expected = focus(after.run(given | nothing))
        for name in names:
            error = made.pop(error_name(name))
            whole[name].update(focus(after.run(given | nothing | {error_name(name): error})), expected)
            noise[name] += _energy(error)
            signal[name] += float(made[signal_name(name)])

    for feeds in batches:
        add(feeds)
    return [(decibels(signal[name], noise[name]), whole[name]) for name in names]


def _energy(error: NDArray[np.generic]) -> float:
    """The sum of squares, some at a time: doubles of a large activation take twice its memory again."""
    flat = error.reshape(-1)
    return sum(float(np.square(flat[i : i + AT_ONCE], dtype=np.float64).sum()) for i in range(0, flat.size, AT_ONCE))
