"""What `edgekit compress` has to tell about what stays float."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import onnx_ir as ir

from edgekit.graph.annotations import annotated_values, get_params
from edgekit.graph.operators import FLOATS, LINEAR, is_constant
from edgekit.graph.rules import RECURRENT, quantized_nodes, scaled_across
from edgekit.records import MODEL
from edgekit.target import Target
from edgekit.words import some

WORTH_A_WORD = 0.05
"""Of a model's numbers."""
FEW_SAMPLES = 32


def stays_float(graph: ir.Model, rules: Target) -> dict[str, int]:
    """How often each operator stays float that a quantizer might have been expected to take."""
    quantized = quantized_nodes(graph, rules)
    counts = Counter(
        node.op_type if not node.domain else f"{node.domain}::{node.op_type}"
        for node in graph.graph
        if node not in quantized and (node.domain or rules.rule_for(node.op_type) != "pass_through")
    )
    for absorbed in rules.quantization.absorb:
        counts.pop(absorbed, None)
    return dict(sorted(counts.items()))


def dequantized(source: str) -> Iterator[str]:
    """What to tell when all that was asked for is the float model."""
    yield f"{MODEL} is {source} in float: nothing is quantized"


def remarks(graph: ir.Model, rules: Target, source: str, samples: int, *, wanted: bool) -> Iterator[str]:
    """One sentence each.

    Args:
        graph: with its grids.
        rules: of the target.
        source: name of the file or class that it came from.
        samples: how many of them chose ranges.
        wanted: somebody wants layers quantized at all.
    """
    inside = _inside(graph.graph)
    annotated = any(True for _ in annotated_values(graph.graph))
    if not annotated and not wanted:
        yield "nothing is quantized, as asked for"
    elif not annotated and inside:
        yield f"nothing is quantized: the layers of {source} are inside {some(inside)}, where all stays float"
    elif not annotated:
        yield f"nothing is quantized: {source} has no operator that target {rules.name!r} quantizes ({', '.join(LINEAR)})"
    elif inside:
        yield f"{sum(inside.values())} layers stay float, because they are inside {some(inside)}"
    yield from _recurrent(graph.graph)
    yield from _one_at_a_time(graph.graph)
    if not samples and annotated:
        yield "every tensor came with its grid: no range was chosen, and the calibration data only serves to verify exports"
    elif annotated and samples < FEW_SAMPLES:
        yield f"calibrated on {samples} samples only; a few hundred give ranges that hold"
    across = [node.name or "" for node, parts in quantized_nodes(graph, rules).items() if scaled_across(node, parts)]
    if across:
        yield f"in float, because their weights came with scales along another axis than the output channels': {some(across)}"


def _inside(graph: ir.Graph) -> dict[str, int]:
    """How many layers there are inside each node that has graphs of its own, by what it is and its name."""
    found = {}
    for node in graph:
        inner = (sub for attribute in node.attributes.values() for sub in _graphs(attribute))
        count = sum(one.op_type in (*LINEAR, *RECURRENT) and not one.domain for sub in inner for one in sub.all_nodes())
        if count:
            found[f"{node.op_type} {node.name!r}"] = count
    return found


def _graphs(attribute: ir.Attr) -> list[ir.Graph]:
    if attribute.type == ir.AttributeType.GRAPH:
        return [attribute.as_graph()]
    return list(attribute.as_graphs()) if attribute.type == ir.AttributeType.GRAPHS else []


def _recurrent(graph: ir.Graph) -> Iterator[str]:
    """What operators with a memory hold, which no target here multiplies in int8 without scales at run time."""
    held = {
        node: sum(_size(value) for value in node.inputs)
        for node in graph
        if node.op_type in RECURRENT and not node.domain and get_params(node.inputs[1]) is None
    }
    total = sum(_size(value) for value in graph.initializers.values())
    share = sum(held.values()) / max(total, 1)
    if share >= WORTH_A_WORD:
        kinds = Counter(node.op_type for node in held)
        names = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        yield f"{names} stay float, with {100 * share:.0f} % of the model's numbers"


def _one_at_a_time(graph: ir.Graph) -> Iterator[str]:
    """A first axis of 1 is mostly a batch that was traced so, and cannot be told from one that has to be."""
    inputs = [value for value in graph.inputs if not value.is_initializer() and value.shape]
    if inputs and all(value.shape is not None and value.shape[0] == 1 for value in inputs):
        yield "takes one sample at a time, as its source does: for larger batches export that with a dynamic batch axis"


def _size(value: ir.Value | None) -> int:
    if value is None or value.const_value is None or not is_constant(value) or value.dtype not in FLOATS:
        return 0
    return value.const_value.size
