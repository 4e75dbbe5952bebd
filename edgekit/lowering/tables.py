"""Embedding tables as codes: rows are looked up in codes, and only what was looked up becomes floats."""

from __future__ import annotations

import onnx_ir as ir

from edgekit.graph.annotations import DTYPES, get_params, set_params
from edgekit.graph.operators import copy_type
from edgekit.graph.rules import embeddings
from edgekit.lowering.grid_writer import GridWriter, numbers
from edgekit.lowering.writer import replace_value
from edgekit.quant.affine import constant_codes
from edgekit.quant.spec import QuantParams
from edgekit.target import Target


def lower_tables(writer: GridWriter, target: Target, keep_float: frozenset[str]) -> None:
    """Store the tables that have symmetric grids as codes, where the target wants them so; all their grids are gone then.

    With `tables = "codes"`, Gather reads codes, and Cast and Mul follow: in ONNX Runtime a DequantizeLinear with a scale for
    each column takes three times as long. With "dequantize" a DequantizeLinear stands in front of the Gather, for a runtime
    that makes one kernel of both; any other would turn the whole table into floats at each inference.
    """
    rule = target.weights.tables
    for gather in embeddings(writer.graph):
        table = gather.inputs[0]
        params = get_params(table)
        assert table is not None
        set_params(table, None)
        if params is None or params.block_size or params.zero_point.any() or gather.name in keep_float:
            continue
        if rule == "dequantize":
            codes = constant_codes(numbers(table), params)
            gather.replace_input_with(0, writer.constant(gather, str(table.name), codes, params, table))
        elif rule == "codes":
            _look_up_codes(writer, gather, table, params)


def _look_up_codes(writer: GridWriter, gather: ir.Node, table: ir.Value, params: QuantParams) -> None:
    name, rows, dtype = str(table.name), gather.inputs[1], table.dtype or ir.DataType.FLOAT
    assert rows is not None
    codes = writer.initializer(f"{name}_quantized", constant_codes(numbers(table), params), DTYPES[params.dtype])
    found, result = gather.outputs[0], ir.Value()
    copy_type(result, found)
    looked_up = ir.node("Gather", [codes, rows], {"axis": 0}, name=gather.name, metadata_props=gather.metadata_props)
    gather.name = None
    looked_up.outputs[0].name = f"{name}_rows_quantized"
    cast = writer.node("Cast", [looked_up.outputs[0]], name, {"to": int(dtype)})
    nodes = [looked_up, cast]
    per_row = params.axis == 0
    scale = writer.initializer(f"{name}_scale", params.scale.reshape(-1, 1) if per_row else params.scale, dtype)
    if per_row:
        nodes.append(writer.node("Gather", [scale, rows], f"{name}_scale", {"axis": 0}))
        scale = nodes[-1].outputs[0]
    nodes.append(writer.node("Mul", [cast.outputs[0], scale], name))
    writer.graph.insert_before(gather, nodes)
    replace_value(found, nodes[-1].outputs[0])
