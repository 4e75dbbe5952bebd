"""Constants that nodes read, and others in their place."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgekit.graph.annotations import all_values, fresh_name


def give_constant(
    graph: ir.Graph,
    node: ir.Node,
    index: int,
    array: NDArray[np.generic],
    *,
    like: ir.Value | None = None,
    name: str = "",
    taken: set[str | None] | None = None,
) -> None:
    """Let input `index` of a node be another constant, under the old one's name when only this node read that.

    Args:
        graph: that the node is in.
        node: gets more inputs where it has too few.
        index: of the input.
        array: the numbers.
        like: a constant of the element type to store them in; None is the old one.
        name: where there is no old one.
        taken: names of the graph's values, kept up to date; None looks them up.
    """
    node.resize_inputs(max(len(node.inputs), index + 1))
    old = node.inputs[index]
    like = like or old
    assert like is not None and like.const_value is not None, "the type is known"
    if old is not None:
        name = old.name or name
        if len(old.uses()) == 1 and not old.is_graph_output():
            del graph.initializers[name]
            if taken is not None:
                taken.discard(name)
    name = fresh_name(name, {value.name for value in all_values(graph)} if taken is None else taken)
    dtype = like.const_value.dtype
    value = ir.Value(name=name, const_value=ir.tensor(array.astype(dtype.numpy()), dtype=dtype, name=name))
    value.shape, value.type = ir.Shape(array.shape), ir.TensorType(dtype)
    graph.register_initializer(value)
    node.replace_input_with(index, value)
