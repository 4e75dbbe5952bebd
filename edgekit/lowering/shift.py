"""One-sided activations on targets whose grids are symmetric: shifted to the middle before they become codes, and back in the bias."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from edgekit.graph.annotations import fresh_name, get_params, set_params
from edgekit.graph.operators import Roles, bias_place, copy_type, is_constant
from edgekit.graph.rules import on_codes, quantized_nodes
from edgekit.lowering.grid_writer import GridWriter, numbers
from edgekit.quant.affine import constant_codes, dequantize, middle_code
from edgekit.quant.spec import QuantParams
from edgekit.target import Target

WORTH_A_NODE = 1.25
"""How much coarser the symmetric grid of an activation must be than its affine one for an addition at run time."""


def shift_one_sided(model: ir.Model, writer: GridWriter, target: Target, keep_float: frozenset[str]) -> None:
    """Where `target` has symmetric activations only, let matrix products read one-sided floats on their affine grid all the same.

    With the affine grid x = s (q - z) and d = s (z - m), m the middle code, x + d = s (q - m) is the same codes on a symmetric grid, and
    `(x + d) @ W = x @ W + d * sum(W)`: an Add goes before the codes, and a constant row comes off the layer's bias. A Conv pads with
    zeros, which a shift would move, and codes of a quantized operator are there already: both stay.

    Only grids that may be moved, and that lose more than `WORTH_A_NODE` on a symmetric grid. In place.
    """
    rules = target.quantization.activation
    if not rules.symmetric or rules.dtype != "int8":
        return
    chosen = quantized_nodes(model, target, keep_float=keep_float)
    for value in [*model.graph.inputs, *(output for node in model.graph for output in node.outputs)]:
        params = get_params(value)
        if params is None or _loss(params) <= WORTH_A_NODE or on_codes(value, chosen, target):
            continue
        readers = [use.node for use in value.uses() if use.node in chosen]
        if readers and all(_can_shift(node, chosen[node]) for node in readers):
            _shift(writer, value, params, {node: chosen[node] for node in readers})


def _loss(params: QuantParams) -> float:
    """The step of the symmetric grid in an affine one's place, relative to its own step; 0 where it must not change."""
    low, high = params.low, params.high
    if params.fixed or params.axis is not None or params.dtype != "uint8" or not low < high:
        return 0.0
    return 2 * max(-low, high) / (max(high, 0.0) - min(low, 0.0))


def _can_shift(node: ir.Node, parts: Roles) -> bool:
    if node.op_type not in ("MatMul", "Gemm") or parts.weight is None or parts.weight_axis is None:
        return False
    weight = node.inputs[parts.weight]
    params = get_params(weight)
    plain = params is not None and not params.block_size and weight is not None and len(weight.uses()) == 1
    return plain and is_constant(weight) and bias_place(node) is not None


def _shift(writer: GridWriter, value: ir.Value, params: QuantParams, readers: dict[ir.Node, Roles]) -> None:
    middle = middle_code(params.dtype)
    by = np.float32(params.scale * np.float32(int(params.zero_point) - middle))
    name = str(value.name)
    amount = writer.initializer(f"{name}_shift", np.asarray(by), value.dtype or ir.DataType.FLOAT)
    add = writer.node("Add", [value, amount], name)
    shifted = writer.node_after(value, add)
    shifted.name = fresh_name(f"{name}_shifted", writer.values)
    copy_type(shifted, value)
    zero = np.zeros(params.scale.shape, np.int64)
    set_params(value, None)
    set_params(shifted, QuantParams("int8", params.scale, zero, observer=params.observer))
    for node, parts in readers.items():
        assert parts.weight is not None and parts.weight_axis is not None
        weight = node.inputs[parts.weight]
        grid = get_params(weight)
        assert weight is not None and grid is not None
        used = dequantize(constant_codes(numbers(weight), grid), grid).astype(np.float64)
        row = float(by) * used.sum(axis=1 - parts.weight_axis)
        row = row if grid.shift is None else row + grid.shift
        set_params(weight, replace(grid, shift=row.astype(np.float32)))
        node.replace_input_with(parts.activations[0], shifted)
