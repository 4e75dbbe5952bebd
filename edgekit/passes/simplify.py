"""Bring a graph into the one shape that the later passes expect, without changing what it computes."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer

from edgekit.graph.operators import copy_type, is_constant

_GROWTH = 1 << 20  # elements that a constant may have more than those that it replaces: Expand and Tile stay nodes
_NEVER_FOLDED = ("ConstantOfShape", "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")


def simplify(model: ir.Model) -> ir.Model:
    """Constants as initializers, shape arithmetic folded, no Identity or Dropout, no dead node, shapes, names for nodes.

    Initializers that IR version 3 lists among the inputs as well become plain initializers: their values are constants of
    the model, not something a caller passes. Model-local functions are inlined. What computes a weight from constants
    (transposition, weight normalization) is computed here, whatever its size.
    """
    model = model.clone()
    model.ir_version = max(model.ir_version or 0, 10)
    common.InlinePass()(model)
    common.RemoveInitializersFromInputsPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    _remove_identities(model.graph)
    _renew_shapes(model)
    optimizer.fold_constants(model, onnx_shape_inference=False, output_size_limit=_GROWTH, should_fold=_should_fold)
    _remove_identities(model.graph)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.RemoveUnusedNodesPass()(model)
    _infer_shapes(model)
    common.TopologicalSortPass()(model)
    _name_nodes(model.graph)
    return model


def _renew_shapes(model: ir.Model) -> None:
    """Infer all shapes anew: stored ones are stale where somebody has made the batch dynamic, but are all that is known
    behind operators that nobody knows.
    """
    inner = [value for node in model.graph for value in node.outputs if not value.is_graph_output()]
    stored = {value: value.shape for value in inner if value.shape is not None}
    for value in stored:
        value.shape = None
    _infer_shapes(model)
    for value, shape in stored.items():
        value.shape = shape if value.shape is None else value.shape
    _infer_shapes(model)


def _infer_shapes(model: ir.Model) -> None:
    # Not strict: where one node cannot be understood, the shapes of all others are still wanted.
    common.ShapeInferencePass(strict_mode=False)(model)


def _should_fold(node: ir.Node) -> bool | None:
    """Asked of nodes that read constants only: None leaves it to the optimizer, which folds small ones."""
    if len(node.outputs) != 1:
        return False  # the optimizer cannot, and would warn
    return None if node.op_type in _NEVER_FOLDED else True


def _remove_identities(graph: ir.Graph) -> None:
    """Take out Identity and inference-mode Dropout; a graph output's name goes to what it was computed from."""
    for node in list(graph):
        if not _is_identity(node):
            continue
        source, output = node.inputs[0], node.outputs[0]
        assert source is not None
        if output.is_graph_output():
            if source.producer() is None or source.is_graph_output():
                continue  # inputs, initializers and other outputs keep their own names
            name, output.name = output.name, None
            source.name = name
        if source.shape is None:
            copy_type(source, output)
        output.replace_all_uses_with(source, replace_graph_outputs=True)
        graph.remove(node, safe=True)


def _is_identity(node: ir.Node) -> bool:
    if node.domain or not node.inputs or node.inputs[0] is None:
        return False
    if node.op_type != "Dropout":
        return node.op_type == "Identity"
    if any(mask.uses() or mask.is_graph_output() for mask in node.outputs[1:]):
        return False
    training = node.inputs[2] if len(node.inputs) > 2 else None
    if training is None:
        return True
    return is_constant(training) and training.const_value is not None and not training.const_value.numpy().any()


def _name_nodes(graph: ir.Graph) -> None:
    """Give every node a name of its own: reports and placement speak of nodes by name."""
    taken: set[str] = set()
    for node in graph:
        name = node.name or f"{node.op_type}_{node.outputs[0].name}"
        unique, count = name, 1
        while unique in taken:
            count += 1
            unique = f"{name}_{count}"
        taken.add(unique)
        node.name = unique
