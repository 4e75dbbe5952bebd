"""Say which tensors are to be quantized, and how, by a target's rules."""

from __future__ import annotations

import onnx_ir as ir

from edgekit.graph.annotations import set_wish
from edgekit.graph.operators import is_constant
from edgekit.graph.rules import absorbed_output, quantized_nodes, shares_grid
from edgekit.quant.spec import QuantSpec
from edgekit.target import Target


def assign_specs(model: ir.Model, target: Target) -> ir.Model:
    """Mark the tensors that `target` quantizes with the spec that it wants.

    1. The activations and the constant weight that a quantized node reads.
    2. The output of a quantized node, behind the activation function that is absorbed into it.
    3. Every tensor that shares a grid with a marked one (Concat, pass-through operators).
    """
    model = model.clone()
    activation = target.quantization.activation.spec
    marked: set[ir.Value] = set()
    for node, parts in quantized_nodes(model, target).items():
        marked.update(value for i in parts.activations if (value := node.inputs[i]) is not None)
        marked.update(absorbed_output(out, target) for out in node.outputs)
        weight = node.inputs[parts.weight] if parts.weight is not None else None
        if weight is not None:
            set_wish(weight, *_weight_spec(target, parts.weight_axis))
    _spread(model, target, marked)
    for value in marked:
        if not is_constant(value):
            set_wish(value, activation, None)
    return model


def _weight_spec(target: Target, axis: int | None) -> tuple[QuantSpec, int | None]:
    spec = target.quantization.weight.spec
    if spec.per_channel and axis is None:
        return QuantSpec(spec.dtype, spec.symmetric, False, spec.narrow_range), None
    return spec, axis if spec.per_channel else None


def _spread(model: ir.Model, target: Target, marked: set[ir.Value]) -> None:
    """Mark what is tied to a marked value, until nothing changes."""
    ties = [tied for node in model.graph if (tied := shares_grid(node, target))]
    grew = True
    while grew:
        grew = False
        for tied in ties:
            if any(value in marked for value in tied) and not all(value in marked for value in tied):
                marked.update(tied)
                grew = True
