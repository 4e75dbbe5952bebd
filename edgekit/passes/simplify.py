"""Bring a graph into the one shape that the later passes expect, without changing what it computes."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript import optimizer

_FOLDED_BYTES = 1 << 20  # a constant that folding makes is worth its bytes up to here


def simplify(model: ir.Model) -> ir.Model:
    """Constants as initializers, shape arithmetic folded, no Identity, no dead node, shapes inferred, every node named.

    Initializers that IR version 3 lists among the inputs as well become plain initializers: their values are constants of the
    model, not something a caller passes.
    """
    model = model.clone()
    model.ir_version = max(model.ir_version or 0, 10)
    common.RemoveInitializersFromInputsPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.ShapeInferencePass()(model)
    optimizer.fold_constants(model, onnx_shape_inference=False, output_size_limit=_FOLDED_BYTES)
    common.IdentityEliminationPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedFunctionsPass()(model)
    common.ShapeInferencePass()(model)
    common.TopologicalSortPass()(model)
    _name_nodes(model.graph)
    return model


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
