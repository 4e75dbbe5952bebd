"""Pack linear layers that read the same tensor into one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from edgekit.graph.annotations import all_values, fresh_name, get_params
from edgekit.graph.operators import dims, int_attribute, is_constant, is_float, roles


def pack_matmuls(model: ir.Model) -> ir.Model:
    """MatMul or Gemm layers on one tensor become one wide layer and a Split: the projections of q, k and v, for one.

    1. The weights are constant matrices of one type, and stand side by side in the packed one, in graph order.
    2. All members have a bias, or none has. The bias of a MatMul is the Add of a constant row behind it, if nothing else reads the
       MatMul; those of a Gemm (with alpha and beta 1) are its third input. Members of both kinds are packed apart.
    3. Widths may differ: the Split has their sizes.
    4. Layers whose weight, bias or output has a grid stay: one grid would have to become one of many columns.

    The packed layer is named after its members, what differs joined by plus signs: `self.query+key+value`. Outputs keep their names.
    It computes each number as before, from the same products.
    """
    model = model.clone()
    graph = model.graph
    groups: dict[tuple[object, ...], list[_Member]] = {}
    for node in graph:
        member = _member(node)
        if member is not None:
            groups.setdefault(member.key(), []).append(member)
    for members in groups.values():
        if len(members) > 1:
            _pack(graph, members)
    common.RemoveUnusedNodesPass()(model)
    return model


@dataclass(frozen=True, slots=True)
class _Member:
    """A linear layer; `axis` is the output axis of its weight, and `add` the node behind a MatMul that adds the bias."""

    node: ir.Node
    axis: int
    add: ir.Node | None
    bias: ir.Value | None

    @property
    def output(self) -> ir.Value:
        return (self.add or self.node).outputs[0]

    @property
    def weight(self) -> ir.TensorProtocol:
        return _tensor(self.node.inputs[1])

    @property
    def width(self) -> int:
        return int(self.weight.shape.numpy()[self.axis])

    def key(self) -> tuple[object, ...]:
        """What members of one group have in common."""
        return self.node.inputs[0], self.node.op_type, self.axis, self.bias is None, self.weight.dtype


def _member(node: ir.Node) -> _Member | None:
    if node.domain or node.op_type not in ("MatMul", "Gemm"):
        return None
    parts = roles(node)
    if parts is None or parts.weight is None or parts.weight_axis is None or not is_float(node.inputs[1]):
        return None
    add, bias = _added(node) if node.op_type == "MatMul" else (None, None)
    if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
        bias = node.inputs[2] if parts.bias is not None else None
        if bias is None:
            return None
    member = _Member(node, parts.weight_axis, add, bias)
    scaled = any(node.attributes.get_float(name, 1.0) != 1.0 for name in ("alpha", "beta"))
    graded = any(get_params(v) is not None for v in (node.inputs[1], bias, node.outputs[0], member.output))
    return None if scaled or graded else member


def _added(matmul: ir.Node) -> tuple[ir.Node, ir.Value] | tuple[None, None]:
    """The Add behind a MatMul, and the constant row of the MatMul's width that it adds."""
    output, uses = matmul.outputs[0], list(matmul.outputs[0].uses())
    if len(uses) != 1 or output.is_graph_output() or uses[0].node.op_type != "Add" or uses[0].node.domain:
        return None, None
    add, bias = uses[0].node, uses[0].node.inputs[1 - uses[0].idx]
    width, shape = (dims(matmul.inputs[1]) or ())[-1:], dims(bias) or ()
    is_row = shape[-1:] == width and all(size == 1 for size in shape[:-1]) and len(shape) <= len(dims(output) or ())
    if bias is None or add.graph is not matmul.graph or not is_constant(bias) or not is_row:
        return None, None
    return add, bias


def _pack(graph: ir.Graph, members: Sequence[_Member]) -> None:
    first = members[0]
    name = _joined([member.node.name or "" for member in members])
    arrays = [member.weight.numpy() for member in members]
    inputs = [
        first.node.inputs[0],
        _constant(graph, f"{name}.weight", np.concatenate(arrays, first.axis), first.weight),
    ]
    bias = None
    if first.bias is not None:
        rows = [_tensor(member.bias).numpy().reshape(-1) for member in members]
        bias = _constant(graph, f"{name}.bias", np.concatenate(rows), first.weight)
    if bias is not None and first.add is None:
        inputs.append(bias)
    nodes = [ir.node(first.node.op_type, inputs, _attributes(first.node), name=name)]
    if bias is not None and first.add is not None:
        adds = _joined([member.add.name or "" for member in members if member.add is not None])
        nodes.append(ir.node("Add", [nodes[0].outputs[0], bias], name=adds))
    packed = [node.outputs[0] for node in nodes]
    widths = [member.width for member in members]
    sizes = _constant(graph, f"{name}.widths", np.array(widths, np.int64))
    nodes.append(ir.node("Split", [packed[-1], sizes], {"axis": -1}, num_outputs=len(members), name=f"{name}/split"))
    graph.insert_before(first.node, nodes)
    taken = {value.name for value in all_values(graph)}
    for value, node in zip(packed, nodes, strict=False):
        value.name = fresh_name(f"{node.name}_output", taken)
        value.type = None if first.output.dtype is None else ir.TensorType(first.output.dtype)
        shape = first.output.shape
        value.shape = None if shape is None else ir.Shape([*shape[:-1], sum(widths)])
    for member, part in zip(members, nodes[-1].outputs, strict=True):
        _replace(graph, member, part)


def _replace(graph: ir.Graph, member: _Member, part: ir.Value) -> None:
    """Let a part of the Split stand for a member: its name, type and readers."""
    output = member.output
    name, part.shape, part.type = output.name, output.shape, output.type
    output.replace_all_uses_with(part, replace_graph_outputs=True)
    graph.remove([node for node in (member.add, member.node) if node is not None], safe=True)
    part.name = name


def _attributes(gemm: ir.Node) -> dict[str, int]:
    return {"transB": 1} if int_attribute(gemm, "transB", 0) else {}


def _joined(names: Sequence[str]) -> str:
    """One name for several: what they begin and end with, and in braces what differs; cut at dots and slashes."""
    split = [re.split(r"(?<=[./])|(?=[./])", name) for name in names]
    shortest = min(len(words) for words in split)
    same = [len({words[i] for words in split}) == 1 for i in range(shortest)]
    begin = same.index(False) if False in same else shortest - 1
    same = [len({words[-1 - i] for words in split}) == 1 for i in range(shortest - begin - 1)]
    end = same.index(False) if False in same else len(same)
    middles = ["".join(words[begin : len(words) - end]) for words in split]
    return "".join([*split[0][:begin], "+".join(middles), *split[0][len(split[0]) - end :]])


def _constant(graph: ir.Graph, name: str, array: np.ndarray, like: ir.TensorProtocol | None = None) -> ir.Value:
    name = fresh_name(name, {value.name for value in all_values(graph)})
    tensor = ir.tensor(array, dtype=None if like is None else like.dtype, name=name)
    value = ir.Value(name=name, const_value=tensor)
    value.shape, value.type = ir.Shape(array.shape), ir.TensorType(tensor.dtype)
    graph.register_initializer(value)
    return value


def _tensor(value: ir.Value | None) -> ir.TensorProtocol:
    assert value is not None and value.const_value is not None
    return value.const_value
