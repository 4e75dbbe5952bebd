"""The graphs that show what one quantized node costs: its copy on codes beside it, and the rest of the model with an error added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from edgekit.graph.annotations import all_values
from edgekit.graph.operators import copy_type
from edgekit.graph.rules import RECURRENT, absorbed_output
from edgekit.lowering.writer import remove_dead
from edgekit.target import Target

_PAIR = frozenset({"Clip", "QuantizeLinear", "DequantizeLinear"})
MAKE_FLOATS = ("MatMul", "Gemm", *RECURRENT)
"""Their kernels read codes and make floats."""


@dataclass(frozen=True, slots=True)
class Site:
    """Where the error of a quantized node shows.

    Attributes:
        node: the quantized one.
        output: of it, the first that something reads.
        value: the same; or what an activation function that runs as a part of it makes, where a target puts that on codes too.
        tail: nodes of the lowered graph from the node's output to the end of that Q/DQ pair; none where there is no such pair.
    """

    node: ir.Node
    output: ir.Value
    value: ir.Value
    tail: tuple[ir.Node, ...] = ()

    @property
    def name(self) -> str:
        """The node's."""
        return self.node.name or ""


def site_of(node: ir.Node, target: Target, on_codes: Mapping[str | None, ir.Value]) -> Site:
    """Where the error of a node shows, and what of the lowered graph belongs to it."""
    output = read_output(node)
    plain = Site(node, output, output)
    if target.quantization.output_q != "always" or node.op_type in MAKE_FLOATS:
        return plain
    last, reached, tail = absorbed_output(output, target), False, list[ir.Node]()
    value = on_codes[output.name]
    while not tail or tail[-1].op_type != "DequantizeLinear":
        reached = reached or value.name == last.name
        users = [use.node for use in value.uses()]
        if len(users) != 1 or users[0].op_type not in (_PAIR if reached else {*_PAIR, *target.quantization.absorb}):
            return plain
        tail.append(users[0])
        value = users[0].outputs[0]
    return Site(node, output, last, tuple(tail))


def read_output(node: ir.Node) -> ir.Value:
    """The first output whose numbers something reads: an LSTM's may be only the last state. Errors of others are not counted."""
    return next((value for value in node.outputs if _is_read(value)), node.outputs[0])


def _is_read(value: ir.Value) -> bool:
    return value.is_graph_output() or any(use.node.op_type != "Shape" for use in value.uses())


def beside_floats(model: ir.Model, lowered: ir.Model, segment: Sequence[Site], live: Sequence[str]) -> ir.Model:
    """The float graph and, beside each node of a segment, its copy on codes. Outputs: the copy's error, the node's energy, `live`."""
    model = model.clone()
    model.opset_imports.update(lowered.opset_imports)  # lowering raises it where the codes need that
    model.ir_version = lowered.ir_version
    graph = model.graph
    plain, on_codes = by_name(graph), by_name(lowered.graph)
    outputs = [plain[name] for name in live]
    copies: dict[ir.Value, ir.Value] = {}
    for site in segment:
        name, exact = site.name, plain[site.value.name]
        quantized = _copy(graph, on_codes[site.output.name], plain, copies)
        quantized = _behind(graph, quantized, site, plain, copies)
        error = _append(graph, "Sub", [quantized, exact], error_name(name), exact)
        energy = _append(graph, "ReduceSumSquare", [exact], signal_name(name), exact, keepdims=0)
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
    copied = ir.node(
        node.op_type,
        inputs,
        dict(node.attributes),
        domain=node.domain,
        num_outputs=len(node.outputs),
        name=_on_codes(value),
    )
    graph.append(copied)
    for old, new in zip(node.outputs, copied.outputs, strict=True):
        copy_type(new, old)
        copies[old] = new
        if old.name:  # not of what an operator with a memory might give and need not
            new.name = _on_codes(old)
    return copies[value]


def _behind(
    graph: ir.Graph,
    value: ir.Value,
    site: Site,
    plain: Mapping[str | None, ir.Value],
    copies: dict[ir.Value, ir.Value],
) -> ir.Value:
    """Append the tail of a site to what its node makes on codes."""
    for node in site.tail:
        constants = [each if each is None else _copy(graph, each, plain, copies) for each in node.inputs[1:]]
        name = f"{site.name}/{node.outputs[0].name}"
        value = _append(graph, node.op_type, [value, *constants], name, node.outputs[0], attributes=node.attributes)
    return value


def rest_of(model: ir.Model, segment: Sequence[Site]) -> tuple[ir.Model, list[str]]:
    """The float graph from the first of some nodes on, and the values before it that it reads, which are inputs now.

    Each site has something added to it: an input of any shape.
    """
    names, values = {site.name for site in segment}, {site.value.name: site.name for site in segment}
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
                live[value] = ir.Value(name=fed_name(value.name or ""), type=value.type, shape=value.shape)
                graph.inputs.append(live[value])
            node.replace_input_with(index, live[value])
    graph.outputs[:] = [value for value in graph.outputs if value.producer() in inside]
    for node in nodes[start:]:
        for output in node.outputs:
            if output.name in values:
                _add_error(graph, output, values[output.name])
    remove_dead(model)
    return model, [value.name or "" for value in live]


def _add_error(graph: ir.Graph, output: ir.Value, name: str) -> None:
    node = output.producer()
    assert node is not None, "it is a node's output"
    error = ir.Value(name=error_name(name), type=output.type or ir.TensorType(ir.DataType.FLOAT))
    graph.inputs.append(error)
    add = ir.node("Add", [output, error], name=f"{node.name}/with error")
    copy_type(add.outputs[0], output)
    graph.insert_after(node, add)
    for use in list(output.uses()):
        if use.node is not add:
            use.node.replace_input_with(use.idx, add.outputs[0])
    if output in graph.outputs:
        add.outputs[0].name, output.name = output.name, f"{output.name}/without error"
        graph.outputs[graph.outputs.index(output)] = add.outputs[0]
    else:
        add.outputs[0].name = f"{output.name}/with error"


def _append(
    graph: ir.Graph,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    name: str,
    like: ir.Value,
    *,
    attributes: Mapping[str, ir.Attr] | None = None,
    **numbers: int,
) -> ir.Value:
    node = ir.node(op_type, inputs, attributes or numbers, name=name)
    copy_type(node.outputs[0], like)
    node.outputs[0].name = name
    graph.append(node)
    return node.outputs[0]


def _on_codes(value: ir.Value) -> str:
    return f"{value.name}/on codes"


def error_name(name: str) -> str:
    """Of what a node on codes makes of float inputs, less the float node's."""
    return f"{name}/error"


def signal_name(name: str) -> str:
    """Of the energy of what a node makes."""
    return f"{name}/signal"


def fed_name(name: str) -> str:
    """Of a value that the rest of a model is given."""
    return f"{name}/fed"


def by_name(graph: ir.Graph) -> dict[str | None, ir.Value]:
    """All values of a graph."""
    return {value.name: value for value in all_values(graph)}
