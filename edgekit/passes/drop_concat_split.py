"""Take out Concat and Split (or Slice, or Gather) that undo each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from edgekit.graph.annotations import all_values, fresh_name, get_params
from edgekit.graph.operators import dims, int_attribute, is_constant


def drop_concat_split(model: ir.Model) -> ir.Model:
    """Tensors that are joined and taken apart again are wired through.

    1. A Split of a Concat along the same axis with the sizes of what was joined: its readers read that.
    2. A Concat of all parts of a Split, in order, along the same axis: its readers read what was split.
    3. A Slice of a Concat (one axis, step 1), or a Gather with constant indices, that takes exactly one of the joined tensors. A
       Gather of one number, which drops the axis, stays and reads that tensor.

    Nothing is computed, so the numbers are the same bit for bit. A node stays where a tensor has a grid, which the other does not
    have, where sizes along the axis are not known, or where its output is a graph output and the tensor cannot take on the name:
    it is a graph input, a constant, or another output.
    """
    model = model.clone()
    graph = model.graph
    for node in list(graph):
        if node.domain or not node.inputs:
            continue
        match node.op_type:
            case "Split":
                _drop_split(graph, node)
            case "Concat":
                _drop_concat(graph, node)
            case "Slice":
                _drop_slice(graph, node)
            case "Gather":
                _drop_gather(graph, node)
    common.RemoveUnusedNodesPass()(model)
    return model


def _drop_split(graph: ir.Graph, split: ir.Node) -> None:
    parts = _joined(split.inputs[0], int_attribute(split, "axis", 0))
    axis = int_attribute(split, "axis", 0)
    if parts is None or len(parts) != len(split.outputs):
        return
    sizes = [_size(output, axis) for output in split.outputs]
    if None not in sizes and sizes == [_size(part, axis) for part in parts]:
        _wire(graph, split, parts)


def _drop_concat(graph: ir.Graph, concat: ir.Node) -> None:
    first = concat.inputs[0]
    split = first.producer() if first is not None else None
    if split is None or split.op_type != "Split" or split.domain or list(concat.inputs) != list(split.outputs):
        return
    whole = split.inputs[0]
    rank = len(dims(whole) or ())
    same = rank > 0 and int_attribute(concat, "axis", 0) % rank == int_attribute(split, "axis", 0) % rank
    if whole is not None and same and not _graded(*split.outputs):
        _wire(graph, concat, [whole])


def _drop_slice(graph: ir.Graph, node: ir.Node) -> None:
    starts, ends, axes, steps = (_constant(node, i) for i in range(1, 5))
    if starts is None or ends is None or starts.size != 1:
        return
    if any(len(node.inputs) > i and node.inputs[i] is not None and c is None for i, c in ((3, axes), (4, steps))):
        return  # computed at run time
    axis = int(axes[0]) if axes is not None else 0
    size = _size(node.inputs[0], axis)
    if size is None or (steps is not None and steps[0] != 1):
        return
    first, last, _ = slice(int(starts[0]), int(ends[0])).indices(size)
    found = _covering(node.inputs[0], axis, range(first, last))
    if found is not None:
        _wire(graph, node, [found])


def _drop_gather(graph: ir.Graph, node: ir.Node) -> None:
    indices, axis = _constant(node, 1), int_attribute(node, "axis", 0)
    size = _size(node.inputs[0], axis)
    if indices is None or not indices.size or indices.ndim > 1 or not size:
        return
    taken = [int(index) % size for index in indices.reshape(-1)]
    in_order = range(taken[0], taken[0] + len(taken))
    found = _covering(node.inputs[0], axis, in_order) if taken == list(in_order) else None
    if found is None:
        return
    if indices.ndim == 1:
        _wire(graph, node, [found])
    else:
        name = fresh_name(f"{node.name}.index", {value.name for value in all_values(graph)})
        zero = ir.Value(name=name, const_value=ir.tensor(np.array(0, np.int64), name=name))
        zero.shape, zero.type = ir.Shape(()), ir.TensorType(ir.DataType.INT64)
        graph.register_initializer(zero)
        node.replace_input_with(0, found)
        node.replace_input_with(1, zero)


def _joined(value: ir.Value | None, axis: int) -> list[ir.Value] | None:
    """What a Concat along `axis` made `value` of."""
    concat = value.producer() if value is not None else None
    if concat is None or concat.op_type != "Concat" or concat.domain or _graded(value):
        return None
    rank = len(dims(value) or ())
    if not rank or int_attribute(concat, "axis", 0) % rank != axis % rank:
        return None
    return [part for part in concat.inputs if part is not None]


def _covering(value: ir.Value | None, axis: int, taken: range) -> ir.Value | None:
    """The one joined tensor whose place along the axis is `taken`."""
    start = 0
    for part in _joined(value, axis) or ():
        size = _size(part, axis)
        if size is None:
            return None
        if size > 0 and range(start, start + size) == taken:
            return part
        start += size
    return None


def _wire(graph: ir.Graph, node: ir.Node, sources: Sequence[ir.Value]) -> None:
    """Let the readers of a node's outputs read `sources`, one each, and take the node out; or leave it if a name would be lost."""
    pairs = list(zip(node.outputs, sources, strict=True))
    named = [source for output, source in pairs if output.is_graph_output()]
    lost = any(source.producer() is None or source.is_graph_output() for source in named)
    if lost or len(set(named)) < len(named) or _graded(*node.outputs):
        return
    for output, source in pairs:
        name = output.name
        if output.is_graph_output():
            output.name = None
            source.name = name
        output.replace_all_uses_with(source, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _graded(*values: ir.Value | None) -> bool:
    return any(get_params(value) is not None for value in values)


def _size(value: ir.Value | None, axis: int) -> int | None:
    shape = dims(value)
    return shape[axis] if shape else None


def _constant(node: ir.Node, index: int) -> np.ndarray | None:
    value = node.inputs[index] if len(node.inputs) > index else None
    if value is None or not is_constant(value) or value.const_value is None:
        return None
    return value.const_value.numpy()
