"""The integer format: nothing but integers between the input's QuantizeLinear and the output's DequantizeLinear.

Each accumulator goes back to 8 bits through `edgekit::Requantize`, which rounds ties up where QuantizeLinear takes the
even code: layer by layer, on the same codes, the two agree within one code.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from edgekit.lowering.functions import add_functions
from edgekit.lowering.integer_ops import WRITERS, lookup
from edgekit.lowering.integer_parts import centred, refuse, requantized
from edgekit.lowering.lookup import SCALAR_BINARY, UNARY, has_table
from edgekit.lowering.movement import MOVES, sink_dequantize
from edgekit.lowering.units import CODE_RANGES, Operand, Unit, match, operand
from edgekit.lowering.writer import Writer, remove_dead, replace_value


def lower_integer(model: ir.Model) -> ir.Model:
    """The QDQ `model` with ConvInteger, MatMulInteger, tables and `edgekit::Requantize`; node names are kept.

    Raises:
        GraphError: an operator that would stay float, by name, and why; or scales beyond fixed-point range.
    """
    model = ShapeInferencePass()(model.clone()).model
    graph = model.graph
    sink_dequantize(graph)
    remove_dead(model)
    for node in graph:
        _refuse_half(node)
    absorbed: set[ir.Node] = set()
    for node in list(graph):
        unit = _regrid(node) if node.op_type == "QuantizeLinear" else match(node, absorb_row=True)
        if unit is None or node in absorbed:
            continue
        result = _write(unit, Writer(graph, node))
        if result is not None:
            replace_value(unit.result, result)
            absorbed.update([] if unit.added is None else [unit.added])
    remove_dead(model)
    for node in graph:
        _refuse_float(node)
    add_functions(model)
    return model


def _write(unit: Unit, writer: Writer) -> ir.Value | None:
    """The integer form; None where there is none, or where floats only move after the last DequantizeLinear."""
    op_type = unit.node.op_type
    if op_type == "QuantizeLinear":
        assert unit.inputs[0] is not None
        scale = np.asarray(unit.inputs[0].scales)
        return requantized(unit, writer, centred(writer, unit.inputs[0], "x"), scale)
    if op_type == "Concat" and unit.output is None:
        return None
    if op_type not in ("Relu", "Clip") and unit.output is not None and has_table(unit):
        return lookup(unit, writer)
    return WRITERS[op_type](unit, writer) if op_type in WRITERS else None


def _regrid(quantize: ir.Node) -> Unit | None:
    """A QuantizeLinear straight behind a DequantizeLinear: from one grid to another."""
    value, scale = quantize.inputs[:2]
    assert value is not None
    assert scale is not None
    source = operand(value)
    target = Operand(quantize.outputs[0], scale, quantize.inputs[2] if len(quantize.inputs) > 2 else None)
    if source is None or not source.per_tensor or source.dtype not in CODE_RANGES or target.dtype not in CODE_RANGES:
        return None
    return Unit(quantize, (source,), (), target)


def _refuse_half(node: ir.Node) -> None:
    """The format ends in a DequantizeLinear whose scale is float32, and so is what it makes."""
    scale = node.inputs[1] if node.op_type in ("QuantizeLinear", "DequantizeLinear") else None
    if scale is not None and scale.dtype not in (None, ir.DataType.FLOAT):
        refuse(
            node, f"its scale is {scale.dtype.name}, and the format knows float32 alone: export the model in float32"
        )


def _refuse_float(node: ir.Node) -> None:
    """Only moving floats is allowed, and only before the first QuantizeLinear or after the last DequantizeLinear."""
    if node.op_type in ("QuantizeLinear", "DequantizeLinear") or node.domain == "edgekit":
        return
    values = [value for value in (*node.inputs, *node.outputs) if value is not None and value.const_value is None]
    if all(value.dtype is not None and not value.dtype.is_floating_point() for value in values):
        return
    moves = node.op_type in MOVES or node.op_type == "Concat"
    if moves and not (_comes_from_codes(node) and _goes_to_codes(node)):
        return
    refuse(node, _reason(node, moves))


def _reason(node: ir.Node, moves: bool) -> str:
    if moves:
        return "it moves floats between a DequantizeLinear and a QuantizeLinear whose grids or attributes differ"
    if match(node) is None:
        return "none of its inputs comes from a DequantizeLinear"
    if node.op_type in WRITERS or node.op_type in UNARY | SCALAR_BINARY:
        return "expected 8-bit codes behind a DequantizeLinear before it and a QuantizeLinear after it"
    return "this operator has no integer form"


def _comes_from_codes(node: ir.Node) -> bool:
    producers = [value.producer() for value in node.inputs if value is not None]
    return any(
        one.op_type == "DequantizeLinear" or (one.op_type in MOVES and _comes_from_codes(one))
        for one in producers
        if one is not None
    )


def _goes_to_codes(node: ir.Node) -> bool:
    readers = [use.node for value in node.outputs for use in value.uses()]
    return any(one.op_type == "QuantizeLinear" or (one.op_type in MOVES and _goes_to_codes(one)) for one in readers)
