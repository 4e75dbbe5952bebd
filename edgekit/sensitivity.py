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

from edgekit.errors import DataError, GraphError
from edgekit.graph.annotations import all_values
from edgekit.graph.operators import LINEAR, copy_type, layers
from edgekit.graph.rules import quantized_nodes
from edgekit.graph.run import Session
from edgekit.graph.sizes import WATCHED_BYTES, in_parts, value_bytes
from edgekit.lowering.qdq import lower_qdq
from edgekit.lowering.writer import remove_dead
from edgekit.metric import Evaluate
from edgekit.progress import Progress, silent
from edgekit.records import LayerSensitivity
from edgekit.target import Target

Arrays = Mapping[str, NDArray[np.generic]]

SEGMENTS = 6
LARGEST_DB = 200.0
AT_ONCE = 1 << 20
_BESIDE_READERS = {
    "output_q": "when-consumed", "bias": "float", "drop_redundant": (), "pass_through_q": "around", "integer_pad": "never",
}  # fmt: skip
"""Rules by which each quantized node reads what it reads behind a Q/DQ pair, and nothing else changes."""


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
    plain, on_codes = _by_name(model.graph), _by_name(lowered.graph)
    nodes = [node for node in quantized_nodes(model, target) if _is_on_codes(on_codes[node.outputs[0].name], plain)]
    costs = {layer.name: layer.macs for layer in layers(model)}
    found: list[LayerSensitivity] = []
    for segment in _segments(nodes, value_bytes(model, batches[0])):
        for node, (local, whole) in zip(segment, _alone(model, lowered, segment, batches, focus, threads), strict=True):
            name = node.name or ""
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


def _segments(nodes: Sequence[ir.Node], sizes: Mapping[str, int]) -> Iterator[list[ir.Node]]:
    """Nodes in order, cut into `SEGMENTS`, or into more where the errors of so many are too large to hold."""
    size = max(1, -(-len(nodes) // SEGMENTS))
    for start in range(0, len(nodes), size):
        by_name = {node.outputs[0].name or "": node for node in nodes[start : start + size]}
        for part in in_parts(by_name, lambda name: sizes.get(name, 0), WATCHED_BYTES):
            yield [by_name[name] for name in part]


def rank(found: Sequence[LayerSensitivity]) -> list[str]:
    """The names of the layers with weights, the worst first: by metric where it is known, then by the error of the model's outputs."""
    weighted = [layer for layer in found if layer.op_type in LINEAR]
    order = sorted(weighted, key=lambda layer: (0.0 if layer.metric is None else layer.metric, layer.output_sqnr_db))
    return [layer.name for layer in order]


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


def _by_name(graph: ir.Graph) -> dict[str | None, ir.Value]:
    return {value.name: value for value in all_values(graph)}


def _is_on_codes(output: ir.Value, plain: Mapping[str | None, ir.Value]) -> bool:
    """Whether what makes a value of the lowered graph reads anything that the float graph has not: nodes on codes, or their results."""
    producer = output.producer()
    assert producer is not None, "a quantized node makes it"
    read = [value for value in producer.inputs if value is not None and not value.is_initializer()]
    return any(value.name not in plain for value in read)


def _score(model: ir.Model, target: Target, node: ir.Node, metric: Evaluate | None, threads: int) -> float | None:
    """The metric with one layer quantized; lighter operators are not quantized without a layer."""
    if metric is None or node.op_type not in LINEAR:
        return None
    others = frozenset(other.name or "" for other in model.graph if other.name != node.name)
    return metric(Session(lower_qdq(model, target, keep_float=others), optimize=True, threads=threads).run).value


def _alone(
    model: ir.Model,
    lowered: ir.Model,
    segment: Sequence[ir.Node],
    batches: Sequence[Arrays],
    focus: Callable[[Arrays], Arrays],
    threads: int,
) -> list[tuple[float, Fidelity]]:
    """For each node of a segment, its own SQNR (dB) and what the model's outputs become when only it is quantized."""
    names = [node.name or "" for node in segment]
    rest, live = _rest(model, names)
    check_float_output(rest)
    # Not optimized: ONNX Runtime would quantize more than it is told to, such as what a MatMul of 4-bit weights reads.
    beside = Session(_beside(model, lowered, segment, live), optimize=False, threads=threads)
    after = Session(rest, optimize=True, threads=threads)
    noise, signal = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    whole = {name: Fidelity() for name in names}

    def add(feeds: Arrays) -> None:  # whose arrays are let go of before the next batch runs
        made = beside.lend(feeds)
        given = dict(feeds) | {_fed(name): made[name] for name in live}
        nothing = {_error(name): np.zeros(1, made[_error(name)].dtype) for name in names}
        expected = focus(after.run(given | nothing))
        for name in names:
            error = made.pop(_error(name))
            whole[name].update(focus(after.run(given | nothing | {_error(name): error})), expected)
            noise[name] += _energy(error)
            signal[name] += float(made[_signal(name)])

    for feeds in batches:
        add(feeds)
    return [(decibels(signal[name], noise[name]), whole[name]) for name in names]


def _energy(error: NDArray[np.generic]) -> float:
    """The sum of squares, some at a time: doubles of a large activation take twice its memory again."""
    flat = error.reshape(-1)
    return sum(float(np.square(flat[i : i + AT_ONCE], dtype=np.float64).sum()) for i in range(0, flat.size, AT_ONCE))


def _beside(model: ir.Model, lowered: ir.Model, segment: Sequence[ir.Node], live: Sequence[str]) -> ir.Model:
    """The float graph and, beside each node of a segment, its copy on codes. Outputs: the copy's error, the node's energy, `live`."""
    model = model.clone()
    model.opset_imports.update(lowered.opset_imports)  # lowering raises it where the codes need that
    model.ir_version = lowered.ir_version
    graph = model.graph
    plain, on_codes = _by_name(graph), _by_name(lowered.graph)
    outputs = [plain[name] for name in live]
    copies: dict[ir.Value, ir.Value] = {}
    for node in segment:
        name, output = node.name or "", node.outputs[0].name
        quantized = _copy(graph, on_codes[output], plain, copies)
        error = _append(graph, "Sub", [quantized, plain[output]], _error(name), plain[output])
        energy = _append(graph, "ReduceSumSquare", [plain[output]], _signal(name), plain[output], keepdims=0)
        energy.shape = ir.Shape([])
        outputs += [error, energy]
    graph.outputs[:] = outputs
    remove_dead(model)
    return model


def _copy(
    graph: ir.Graph, value: ir.Value, plain: Mapping[str | None, ir.Value], copies: dict[ir.Value, ir.Value]
) -> ir.Value:
    """Append what makes a value of the lowered graph to the float one; where it reads what both have, it reads the float one's."""
    if value in copies:
        return copies[value]
    node = value.producer()
    if node is None:
        known = plain.get(value.name)
        if known is not None and known.const_value is value.const_value:
            return known
        copies[value] = ir.Value(
            name=_on_codes(value), type=value.type, shape=value.shape, const_value=value.const_value
        )
        graph.register_initializer(copies[value])
        return copies[value]
    inputs = [
        each if each is None
        else plain[each.name] if each.producer() is not None and each.name in plain
        else _copy(graph, each, plain, copies)
        for each in node.inputs
    ]  # fmt: skip
    copied = ir.node(node.op_type, inputs, dict(node.attributes), num_outputs=len(node.outputs), name=_on_codes(value))
    graph.append(copied)
    for old, new in zip(node.outputs, copied.outputs, strict=True):
        copy_type(new, old)
        new.name, copies[old] = _on_codes(old), new
    return copies[value]


def _rest(model: ir.Model, names: Sequence[str]) -> tuple[ir.Model, list[str]]:
    """The float graph from the first of some nodes on, and the values before it that it reads, which are inputs now.

    Each named node has something added to its output: an input of any shape.
    """
    model = model.clone()
    graph = model.graph
    nodes = list(graph)
    start = next(index for index, node in enumerate(nodes) if node.name in names)
    inside, live = set(nodes[start:]), dict[ir.Value, ir.Value]()
    for node in nodes[start:]:
        for index, value in enumerate(node.inputs):
            if value is None or value.producer() is None or value.producer() in inside:
                continue
            if value not in live:
                live[value] = ir.Value(name=_fed(value.name or ""), type=value.type, shape=value.shape)
                graph.inputs.append(live[value])
            node.replace_input_with(index, live[value])
    graph.outputs[:] = [value for value in graph.outputs if value.producer() in inside]
    for node in nodes[start:]:
        if node.name in names:
            _add_error(graph, node)
    remove_dead(model)
    return model, [value.name or "" for value in live]


def _add_error(graph: ir.Graph, node: ir.Node) -> None:
    output = node.outputs[0]
    error = ir.Value(name=_error(node.name or ""), type=output.type or ir.TensorType(ir.DataType.FLOAT))
    graph.inputs.append(error)
    add = ir.node("Add", [output, error], name=f"{node.name}/with error")
    copy_type(add.outputs[0], output)
    graph.insert_after(node, add)
    for use in list(output.uses()):
        if use.node is not add:
            use.node.replace_input_with(use.idx, add.outputs[0])
    if output in graph.outputs:
        name, output.name = output.name, f"{output.name}/without error"
        add.outputs[0].name = name
        graph.outputs[graph.outputs.index(output)] = add.outputs[0]
    else:
        add.outputs[0].name = f"{output.name}/with error"


def _append(
    graph: ir.Graph, op_type: str, inputs: Sequence[ir.Value], name: str, like: ir.Value, **attributes: int
) -> ir.Value:
    node = ir.node(op_type, inputs, attributes, name=name)
    copy_type(node.outputs[0], like)
    node.outputs[0].name = name
    graph.append(node)
    return node.outputs[0]


def _on_codes(value: ir.Value) -> str:
    return f"{value.name}/on codes"


def _error(name: str) -> str:
    return f"{name}/error"


def _signal(name: str) -> str:
    return f"{name}/signal"


def _fed(name: str) -> str:
    return f"{name}/fed"
