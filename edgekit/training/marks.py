"""Which value of an exported graph each node of a captured one became: nodes are marked, exported, and the marks are taken out."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor, fx, nn

from edgekit.passes.pool_globally import pool_globally
from edgekit.passes.simplify import simplify
from edgekit.training.export_onnx import export_onnx
from edgekit.training.forward import Array

_DOMAIN, _OPERATOR, _NAME = "edgekit", "Mark", "name"


@dataclass(frozen=True, slots=True)
class Exported:
    """The ONNX graph of a captured one, in canonical form.

    Attributes:
        model: float.
        made: by the name of a value, the names of the captured nodes that it stands for, in order: several where operators between
            them do nothing.
    """

    model: ir.Model
    made: Mapping[str, tuple[str, ...]]

    def owner(self, node: ir.Node) -> str | None:
        """The captured node that an ONNX node is part of: the first that follows."""
        waiting, seen = list(node.outputs), set[ir.Value]()
        while waiting:
            value = waiting.pop(0)
            if value in seen:
                continue
            seen.add(value)
            if value.name is not None and value.name in self.made:
                return self.made[value.name][0]
            waiting += [output for use in value.uses() for output in use.node.outputs]
        return None


def export_marked(
    graph: fx.GraphModule, example_inputs: tuple[Array, ...] | dict[str, Array], *, opset: int
) -> Exported:
    """Export a captured graph, and tell which value is which.

    Raises:
        SourceError: see `export_onnx`.
    """
    marked = copy.deepcopy(graph)
    for node in list(marked.graph.nodes):
        if node.op != "get_attr" and _is_float(node):
            _mark(marked, node)
    marked.recompile()
    model = export_onnx(marked, example_inputs, opset=opset)
    made = _unmark(model.graph)
    return Exported(simplify(pool_globally(simplify(model))), {name: tuple(nodes) for name, nodes in made.items()})


class _Mark(nn.Module):
    """Hands a tensor on; in an exported graph it is a node with a name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_exporting():
            return x
        return torch.onnx.ops.symbolic(
            f"{_DOMAIN}::{_OPERATOR}", (x,), {_NAME: self.name}, dtype=x.dtype, shape=x.shape, version=1
        )


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _mark(graph: fx.GraphModule, node: fx.Node) -> None:
    name = f"marks.{node.name}"
    graph.add_submodule(name, _Mark(node.name))
    place = node
    while place.op == "placeholder" and place.next.op == "placeholder":
        place = place.next
    with graph.graph.inserting_after(place):
        mark = graph.graph.call_module(name, (node,))
    node.replace_all_uses_with(mark, delete_user_cb=lambda user: user is not mark)


def _unmark(graph: ir.Graph) -> dict[str, list[str]]:
    """Take out marks, and what does nothing between them."""
    made: dict[str, list[str]] = {}
    names: dict[ir.Value, list[str]] = {}
    for node in list(graph):
        is_mark = node.domain == _DOMAIN and node.op_type == _OPERATOR
        idle = node.op_type == "Identity" and not node.domain
        if not (is_mark or idle):
            continue
        source, output = node.inputs[0], node.outputs[0]
        assert source is not None
        if is_mark:
            names.setdefault(source, []).append(node.attributes[_NAME].as_string())
        if output.is_graph_output():
            if source.is_graph_output() or source.producer() is None:
                node.op_type, node.domain = "Identity", ""
                node.attributes.clear()
                continue
            output.name, source.name = None, output.name
        output.replace_all_uses_with(source, replace_graph_outputs=True)
        graph.remove(node, safe=True)
    for value, found in names.items():
        made[value.name or ""] = found
    return made
