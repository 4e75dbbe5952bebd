"""Which nodes a target runs quantized. Calibration, training and lowering all ask here, so they always agree."""

from __future__ import annotations

import difflib

import onnx
import onnx_ir as ir

from edgekit.errors import TargetError
from edgekit.graph.operators import LINEAR, Roles, dims, is_constant, is_float, roles
from edgekit.target import Target


def quantized_nodes(
    model: ir.Model, target: Target, *, keep_float: frozenset[str] = frozenset()
) -> dict[ir.Node, Roles]:
    """The nodes of the main graph that `target` runs quantized, with the roles of their inputs, in graph order.

    1. Linear operators, when the target's rules name them and their weight is a constant (or both inputs are activations).
    2. Lighter operators (Add, Mul, Concat, pools, ...) only downstream of a quantized node: on their own, converting to int8 and
       back costs more than they do.
    3. An Add only of two tensors that are known to have the same shape: attention masks and position codes are not activations.

    Nodes named in `keep_float` are left out.
    """
    chosen: dict[ir.Node, Roles] = {}
    carries: set[ir.Value] = (
        set()
    )  # values that come from a quantized node, perhaps through operators that pass codes on
    for node in model.graph:
        found = _roles_if_ruled(node, target) if node.name not in keep_float else None
        if found is not None and (node.op_type in LINEAR or any(node.inputs[i] in carries for i in found.activations)):
            chosen[node] = found
            carries.update(node.outputs)
        elif node.inputs and node.inputs[0] in carries and passes_on(node, target):
            carries.update(node.outputs)
    return chosen


def check_operators(target: Target) -> None:
    """Refuse names of operators that ONNX does not have: a misspelt one would silently leave its operator in float.

    Raises:
        TargetError: with the nearest name.
    """
    rules = target.quantization
    named = {*rules.quantize, *rules.pass_through, *rules.absorb, *rules.unify}
    unknown = sorted(name for name in named if not onnx.defs.has(name))
    if unknown:
        known = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
        near = difflib.get_close_matches(unknown[0], sorted(known), n=1)
        hint = f"did you mean {near[0]!r}?" if near else "see ONNX's list of operators"
        raise TargetError(f"target {target.name!r}: ONNX has no operator {unknown[0]!r}; {hint}")


def passes_on(node: ir.Node, target: Target) -> bool:
    """Whether a node hands its input's codes on: pass-through operators, absorbed activations, and Pad with zeros."""
    return not node.domain and (node.op_type in target.quantization.absorb or moves_numbers(node, target))


def absorbed_output(value: ir.Value, target: Target) -> ir.Value:
    """The value behind the activation functions that run as part of the operator that made `value`."""
    while not value.is_graph_output() and len(value.uses()) == 1:
        node = next(iter(value.uses())).node
        if node.domain or node.op_type not in target.quantization.absorb:
            break
        value = node.outputs[0]
    return value


def shares_grid(node: ir.Node, target: Target) -> list[ir.Value]:
    """The inputs and outputs of a node that must be on one grid; empty when the node ties nothing."""
    if node.domain or not node.inputs:
        return []
    if node.op_type in target.quantization.unify:
        tied = [*node.inputs, *node.outputs]
    elif moves_numbers(node, target):
        tied = [node.inputs[0], *node.outputs]
    else:
        return []
    return [value for value in tied if value is not None and is_float(value) and not is_constant(value)]


def moves_numbers(node: ir.Node, target: Target) -> bool:
    """Whether what a node makes lies in its input's range: pass-through operators (but cubic Resize), and Pad with zeros."""
    if node.domain or target.rule_for(node.op_type) != "pass_through":
        return pads_with_zero(node)
    mode = node.attributes.get("mode")
    return node.op_type != "Resize" or mode is None or mode.as_string() != "cubic"


def pads_with_zero(node: ir.Node) -> bool:
    """Whether a node is a Pad with the constant 0, which every grid can represent."""
    if node.op_type != "Pad" or node.domain:
        return False
    mode = node.attributes.get("mode")
    if mode is not None and mode.as_string() != "constant":
        return False
    value = node.inputs[2] if len(node.inputs) > 2 else None
    if value is None:
        return True
    return is_constant(value) and value.const_value is not None and not value.const_value.numpy().any()


def _roles_if_ruled(node: ir.Node, target: Target) -> Roles | None:
    if node.domain or target.rule_for(node.op_type) != "quantize":
        return None
    found = roles(node)
    if found is None or not all(is_float(node.inputs[i]) for i in found.activations):
        return None
    if node.op_type == "Add":
        left, right = dims(node.inputs[0]), dims(node.inputs[1])
        if left is None or left != right:
            return None
    return found
