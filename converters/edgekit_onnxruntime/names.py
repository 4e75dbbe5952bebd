"""ONNX Runtime renames the nodes that it fuses or rewrites; this finds the ONNX nodes again."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

_COPY = re.compile(r"_token_\d+$")
"""A node that stands for another, or a new one: `conv_token_4`, `Transpose_token_7`."""
_FUSION = re.compile(r"^fused |/\w+Fusion/?$")
"""`fused conv`, `gemm/MatMulAddFusion`."""
_BLOCKED = re.compile(r"_nchwc$")
"""A convolution or pool on the CPU's own layout is named by its output tensor: `relu_y_nchwc`."""


@dataclass(frozen=True, slots=True)
class NodeNames:
    """What is known of a model's nodes; nothing where the artifact is no ONNX file.

    Attributes:
        nodes: by name.
        producers: the node that makes a tensor, by the tensor's name.
    """

    nodes: Mapping[str, ir.Node] = field(default_factory=dict)
    producers: Mapping[str, ir.Node] = field(default_factory=dict)

    def layers(self, name: str, op_type: str) -> tuple[str, ...]:
        """The ONNX nodes that a node of the optimized graph covers, as far as its name and type tell.

        Empty for a node that ONNX Runtime added (a Transpose, a Reorder).
        """
        copied = _COPY.sub("", name)
        original = _FUSION.sub("", copied)
        if not self.nodes:
            return () if original in (op_type, "Transpose") else (original,)
        known = next((one for one in (name, copied, original) if one in self.nodes), None)
        if known is not None:
            return (known,)
        return self._behind(self.producers.get(_BLOCKED.sub("", original)), op_type)

    def _behind(self, node: ir.Node | None, op_type: str) -> tuple[str, ...]:
        """From the activation function that became part of a convolution back to the convolution."""
        names: list[str] = []
        while node is not None and node.name:
            names.append(node.name)
            if node.op_type == op_type:
                break
            node = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
        return tuple(reversed(names)) if node is not None else tuple(names[:1])


def read_names(path: Path) -> NodeNames:
    """The names of an ONNX file's nodes; nothing for an `.ort` file."""
    if path.suffix != ".onnx":
        return NodeNames()
    import onnx_ir as ir

    nodes = list(ir.load(path).graph)
    return NodeNames(
        {node.name: node for node in nodes if node.name},
        {output.name: node for node in nodes for output in node.outputs if output.name},
    )
