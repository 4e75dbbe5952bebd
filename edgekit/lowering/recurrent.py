"""Weights of LSTM, GRU and RNN as codes, where the runtime takes them so."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgekit.graph.annotations import get_params, set_params
from edgekit.graph.operators import int_attribute
from edgekit.graph.rules import ACTIVATIONS, RECURRENT_WEIGHTS, precision, recurrent
from edgekit.lowering.grid_writer import GridWriter, numbers
from edgekit.lowering.writer import node_name
from edgekit.quant.affine import constant_codes
from edgekit.quant.spec import QuantParams
from edgekit.target import Target

CONTRIB = "com.microsoft"


def lower_recurrent(model: ir.Model, writer: GridWriter, target: Target, keep_float: frozenset[str]) -> None:
    """Let operators with a memory read weights as the target wants them; no grid is left on them.

    1. "codes": behind a DequantizeLinear, which such a runtime computes once.
    2. "dynamic": an LSTM whose activations were asked to get their scale at run time becomes ONNX Runtime's DynamicQuantizeLSTM. All
       others stay float: that runtime would dequantize their weights at each inference.
    3. "float", and nodes in `keep_float`.
    """
    written = False
    nodes = recurrent(model.graph)
    weights = [node.inputs[index] for node in nodes for index in RECURRENT_WEIGHTS]
    for node in nodes:
        activations = node.metadata_props.pop(ACTIVATIONS, "")
        grids = [get_params(node.inputs[index]) for index in RECURRENT_WEIGHTS]
        stays = node.name in keep_float or precision(node) == "float" or None in grids
        if not stays and target.weights.recurrent == "codes":
            _dequantize(node, writer)
        elif not stays and target.weights.recurrent == "dynamic" and activations == "dynamic" and _suits(node):
            _quantize_dynamically(model.graph, node, writer)
            written = True
    for value in weights:
        if value is not None:
            set_params(value, None)
    if written:
        model.opset_imports[CONTRIB] = 1


def _dequantize(node: ir.Node, writer: GridWriter) -> None:
    for index in RECURRENT_WEIGHTS:
        weight, params = _weight(node, index)
        codes = constant_codes(numbers(weight), params)
        node.replace_input_with(index, writer.constant(node, str(weight.name), codes, params, weight))


def _suits(node: ir.Node) -> bool:
    """Whether ONNX Runtime has the operator for it: an LSTM of float32, its batch behind the steps."""
    floats = all(_weight(node, index)[0].dtype in (None, ir.DataType.FLOAT) for index in RECURRENT_WEIGHTS)
    return node.op_type == "LSTM" and floats and int_attribute(node, "layout", 0) == 0


def _quantize_dynamically(graph: ir.Graph, node: ir.Node, writer: GridWriter) -> None:
    """The operator wants weights transposed, `(directions, inputs, gates * hidden)`, and a scale for each column of each direction."""
    stored, grids = [], []
    for index in RECURRENT_WEIGHTS:
        weight, params = _weight(node, index)
        codes = constant_codes(numbers(weight), params).astype(np.int8).transpose(0, 2, 1)
        shape = (codes.shape[0], codes.shape[2])
        name = str(weight.name)
        stored.append(writer.initializer(f"{name}_quantized", np.ascontiguousarray(codes), ir.DataType.INT8))
        scale = np.ascontiguousarray(np.broadcast_to(params.scale, shape))
        grids.append(writer.initializer(f"{name}_scale", scale, ir.DataType.FLOAT))
        grids.append(writer.initializer(f"{name}_zero_point", np.zeros(shape, np.int8), ir.DataType.INT8))
    others = [node.inputs[index] if index < len(node.inputs) else None for index in range(3, 8)]
    attributes = {name: attribute for name, attribute in node.attributes.items() if name != "layout"}
    written = ir.node(
        "DynamicQuantizeLSTM", [node.inputs[0], *stored, *others, *grids], attributes, domain=CONTRIB,
        num_outputs=len(node.outputs), name=node.name, metadata_props=dict(node.metadata_props),
    )  # fmt: skip
    graph.insert_before(node, written)
    for old, new in zip(node.outputs, written.outputs, strict=True):
        new.shape, new.type = old.shape, old.type
        kept, old.name = old.name, f"{node_name(node)}/replaced"
        new.name = kept
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _weight(node: ir.Node, index: int) -> tuple[ir.Value, QuantParams]:
    weight, params = node.inputs[index], get_params(node.inputs[index])
    assert weight is not None and params is not None, "only nodes with grids on both come here"
    return weight, params
