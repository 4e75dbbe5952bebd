"""Float16 as it is, in a runtime that would rather not compute it."""

from __future__ import annotations

import onnx_ir as ir


def rounded_steps(model: ir.Model) -> ir.Model:
    """A copy for simulation in which each float16 result is rounded to float16, as a runtime that computes float16 does.

    ONNX Runtime on a CPU computes float16 operators in float32 and leaves out the casts between them, so that sums which float16
    swallows survive there. Casts to and from what it does compute in float16 stay. A single Identity between casts it turns into
    float32 as well; two in a row it leaves, where it does not optimize.
    """
    model = model.clone()
    for graph in model.graphs():
        for node in list(graph):
            for value in list(node.outputs):
                if value.dtype == ir.DataType.FLOAT16 and value.uses():
                    _round(graph, node, value)
    return model


def _round(graph: ir.Graph, producer: ir.Node, value: ir.Value) -> None:
    uses = list(value.uses())
    rounded = value
    for step in ("rounding", "rounded"):  # named, as names must differ between a graph and its branches
        node = ir.node("Identity", [rounded])
        rounded = node.outputs[0]
        rounded.name, rounded.type, rounded.shape = f"{value.name}/{step}", value.type, value.shape
        graph.insert_after(producer, node)
        producer = node
    for user, index in uses:
        user.replace_input_with(index, rounded)
