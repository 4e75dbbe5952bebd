"""Attention whose forward takes the width of its heads from its input, made free of that."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx, nn

from edgekit.training.prune.padded_forward import trace_layer

HEADS = "num_heads"
"""The key of the number of heads in the `meta` of a traced layer, which copies keep as they keep no other attributes."""


def fixed_width(child: nn.Module, heads: int, inner: int) -> nn.Module | None:
    """A layer that uses `inner` where its forward asks for the last size of its first input; None where it cannot be traced.

    Much code for transformers starts with `B, N, C = x.shape` and reshapes the heads with `C // self.num_heads` and `C`, which is right
    only as long as the heads are as wide as the input.

    Args:
        child: after its attributes and weights have changed; its own layers keep their names.
        heads: how many are left.
        inner: channels of all heads together.
    """
    graph = trace_layer(child)
    if graph is None:
        return None
    first = next((node for node in graph.nodes if node.op == "placeholder"), None)
    widths = [node for node in graph.nodes if first is not None and _is_width(node, first)]
    for node in widths:
        for user in list(node.users):
            user.args = fx.map_arg(user.args, lambda arg: inner if arg in widths else arg)
            user.kwargs = fx.map_arg(user.kwargs, lambda arg: inner if arg in widths else arg)
        graph.erase_node(node)
    if not widths:
        return None
    new = fx.GraphModule(child, graph, type(child).__name__)
    new.graph.eliminate_dead_code()
    new.recompile()
    new.meta[HEADS] = heads
    return new


def fewer_heads(child: fx.GraphModule, heads: tuple[int, int], inner: tuple[int, int]) -> None:
    """Let a layer that `fixed_width` made know that it has fewer heads, in place.

    Args:
        child: the layer.
        heads: how many there were, and are; the last axis but the head's own that is as long counts them.
        inner: channels of all heads, before and after.
    """
    for node in child.graph.nodes:
        sizes = [inner[1] if arg == inner[0] else arg for arg in node.args]
        if node.target in ("view", "reshape"):
            places = [place for place, size in enumerate(sizes[:-1]) if isinstance(size, int) and size == heads[0]]
            if places:
                sizes[places[-1]] = heads[1]
            node.args = tuple(sizes)
        elif node.target is operator.floordiv and sizes[1] == heads[0]:
            node.args = (sizes[0], heads[1])
    child.recompile()
    child.meta[HEADS] = heads[1]


def _is_width(node: fx.Node, first: fx.Node) -> bool:
    """Whether a node is the last size of an input of three axes, as `x.shape[2]`, `x.shape[-1]` or `x.size(2)`."""
    if node.op == "call_method" and node.target == "size":
        return node.args[0] is first and node.args[1:] in ((2,), (-1,))
    if node.op != "call_function" or node.target is not operator.getitem or node.args[1] not in (2, -1):
        return False
    shape: Any = node.args[0]
    if not isinstance(shape, fx.Node) or not shape.args or shape.args[0] is not first:
        return False
    return (shape.op == "call_method" and shape.target == "size" and len(shape.args) == 1) or (
        shape.op == "call_function" and shape.target is getattr and shape.args[1] == "shape"
    )
