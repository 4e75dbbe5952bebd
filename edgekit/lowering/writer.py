"""Writing the nodes that take one operator's place, with names that follow from its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

Attributes = Mapping[str, int | float | str | Sequence[int]]


class Writer:
    """Inserts nodes and initializers in front of `anchor`.

    Attributes:
        name: the anchor's name (its first output's where it has none); the prefix of all names written.
    """

    def __init__(self, graph: ir.Graph, anchor: ir.Node) -> None:
        self.graph = graph
        self.anchor = anchor
        self.name = node_name(anchor)

    def constant(self, suffix: str, array: NDArray[np.generic]) -> ir.Value:
        """A new initializer `<name>/<suffix>`."""
        name = f"{self.name}/{suffix}"
        while name in self.graph.initializers:
            name += "_"
        value = ir.val(name, const_value=ir.tensor(array, name=name))
        self.graph.register_initializer(value)
        return value

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Attributes | None = None,
        *,
        suffix: str = "",
        domain: str = "",
        dtype: ir.DataType | None = None,
    ) -> ir.Value:
        """A new node `<name>`, or `<name>/<suffix>`; returns its one output. The unsuffixed one keeps the metadata."""
        name = f"{self.name}/{suffix}" if suffix else self.name
        metadata = None if suffix else dict(self.anchor.metadata_props)
        node = ir.node(op_type, inputs, attributes or {}, domain=domain, name=name, metadata_props=metadata)
        node.outputs[0].name = f"{name}/codes" if dtype in (ir.DataType.INT8, ir.DataType.UINT8) else f"{name}/out"
        if dtype is not None:
            node.outputs[0].dtype = dtype
        self.graph.insert_before(self.anchor, node)
        return node.outputs[0]


def node_name(node: ir.Node) -> str:
    """The node's name, or its first output's."""
    return node.name or node.outputs[0].name or node.op_type


def replace_value(old: ir.Value, new: ir.Value) -> None:
    """Let all readers of `old` read `new`, which takes over its name, type and shape."""
    name = old.name
    if old.dtype is not None:
        new.dtype = old.dtype
    new.shape = old.shape
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    old.name = f"{name}/replaced"
    new.name = name


def remove_dead(model: ir.Model) -> None:
    """Drop nodes and initializers that nothing reads any more."""
    RemoveUnusedNodesPass()(model)
