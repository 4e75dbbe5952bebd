"""Say which tensors are to be quantized, and how, by a target's rules."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from edgekit.graph.annotations import get_params, set_wish
from edgekit.graph.operators import Roles, is_constant
from edgekit.graph.rules import (
    ACTIVATIONS,
    FEW_BITS,
    PRECISION,
    RECURRENT_WEIGHTS,
    absorbed_output,
    embeddings,
    quantized_nodes,
    recurrent,
    shares_grid,
)
from edgekit.method import EVERYTHING, Method
from edgekit.quant.spec import BITS, WIDE, QuantSpec
from edgekit.target import Target

TABLE = QuantSpec("int8", symmetric=True, per_channel=True, narrow_range=True)


def assign_specs(model: ir.Model, target: Target, method: Method = EVERYTHING) -> ir.Model:
    """Mark the tensors that `target` quantizes with the spec that it and the `method` want.

    1. The activations and the constant weight that a quantized node reads.
    2. The output of a quantized node, behind the activation function that is absorbed into it; not of one that reads few bits.
    3. Every tensor that shares a grid with a marked one (Concat, pass-through operators).
    4. Tables that are looked up (embeddings), one scale for each row.
    5. Weights of operators with a memory, one scale for each row of both directions.

    With other than static activations, only constants are marked; a weight that came in blocks takes no others. A tensor that one
    layer wants in 16 bits has 16, and one that all of them want in fewer than 8 has so many, affine, whatever the target's grids are.
    """
    model = model.clone()
    marked: set[ir.Value] = set()
    asked: dict[ir.Value, str] = {}  # the widest precision that a reader wants
    for node, parts in quantized_nodes(model, target).items():
        weight = node.inputs[parts.weight] if parts.weight is not None else None
        own = method.for_layer(node.name or "")
        if weight is not None:
            set_wish(weight, *_weight_spec(own.weight_spec(target.quantization.weight.spec), node, parts))
        activations = own.activations
        given = get_params(weight)
        if activations == "static" and given is not None and given.block_size:
            activations = "none"  # the weight came with a grid in blocks, which no integer kernel multiplies
        if activations != "static":
            node.metadata_props[ACTIVATIONS] = activations
            continue
        read = [value for i in parts.activations if (value := node.inputs[i]) is not None]
        marked.update(read)
        if own.precision not in FEW_BITS:
            marked.update(absorbed_output(out, target) for out in node.outputs)
        for value in read:
            asked[value] = max(own.precision, asked.get(value, own.precision), key=BITS.__getitem__)
    _spread(model, target, marked)
    _agree(model, target, asked)
    for value in marked:
        if not is_constant(value):
            set_wish(value, _activation_spec(target.quantization.activation.spec, asked.get(value, "int8")), None)
    for gather in embeddings(model.graph):
        table = gather.inputs[0]
        assert table is not None
        set_wish(table, TABLE, 0)
    for node in recurrent(model.graph):
        _mark_recurrent(node, method.for_layer(node.name or ""))
    return model


def _mark_recurrent(node: ir.Node, method: Method) -> None:
    if method.precision == "float" and method.activations == "static":
        return
    if method.activations != "static":
        node.metadata_props[ACTIVATIONS] = method.activations
    for index in RECURRENT_WEIGHTS:
        weight = node.inputs[index]
        assert weight is not None, "only constants come here"
        set_wish(weight, TABLE, 1)


def assign_precisions(model: ir.Model, method: Method) -> ir.Model:
    """Note on each node the precision that `method` asks for, where it is not int8; `quantized_nodes` heeds it."""
    model = model.clone()
    for node in model.graph:
        asked = method.for_layer(node.name or "").precision
        if asked != "int8":
            node.metadata_props[PRECISION] = asked
    return model


def _weight_spec(spec: QuantSpec, node: ir.Node, parts: Roles) -> tuple[QuantSpec, int | None]:
    """The grid of a weight and its axis: that of its output channels or, in blocks, the one that a matrix product sums over."""
    axis = parts.weight_axis
    if axis is None or not spec.per_channel:
        return replace(spec, per_channel=False, block_size=0), None
    if spec.block_size and node.op_type in ("MatMul", "Gemm"):
        return spec, 1 - axis
    return replace(spec, block_size=0), axis


def _activation_spec(spec: QuantSpec, precision: str) -> QuantSpec:
    if precision == "int16":
        return replace(spec, dtype=WIDE[spec.dtype])
    if precision in FEW_BITS:
        # Few codes are too dear for a side that has no numbers; lowering finds each of them a place in any wider type.
        return QuantSpec(f"uint{BITS[precision]}")
    return spec


def _agree(model: ir.Model, target: Target, asked: dict[ir.Value, str]) -> None:
    """Let values that share a grid have the widest precision that one of them is asked in."""
    ties = [tied for node in model.graph if (tied := shares_grid(node, target))]
    grew = True
    while grew:
        grew = False
        for tied in ties:
            known = [asked[value] for value in tied if value in asked]
            widest = max(known, key=BITS.__getitem__) if known else ""
            if any(asked.get(value, "") != widest for value in tied):
                asked.update(dict.fromkeys(tied, widest))
                grew = True


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
