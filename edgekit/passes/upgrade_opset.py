"""Bring a model of any opset from 7 on to the working opset."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from onnx import version_converter

from edgekit.errors import GraphError, SourceError

OLDEST = 7
_BIG = 1024  # bytes; larger initializers stay out of the protobuf that the converter (C++, 2 GiB) is handed


def upgrade_opset(model: ir.Model, *, opset: int) -> ir.Model:
    """`model` at `opset` or later, converted by ONNX's own version converter.

    The caller proves the result equal to the source by running both; one conversion is known to be wrong and is mended here:
    linear Upsample and Resize of opset 10 and older sample with "asymmetric" coordinates, which the converter drops.

    Raises:
        SourceError: the source is older than opset 7.
        GraphError: the converter has no rule for a node.
    """
    found = model.opset_imports.get("", opset)
    if found < OLDEST:
        raise SourceError(f"the model has opset {found}; {OLDEST} is the oldest that ONNX can upgrade: export it again")
    if found >= opset:
        return model.clone()
    model = model.clone()
    tensors = _take_out_big_tensors(model.graph)
    resampled = {node.outputs[0].name for node in model.graph if found <= 10 and node.op_type in ("Upsample", "Resize")}
    proto = ir.to_proto(model)
    proto.ir_version = max(proto.ir_version, 8)
    try:
        converted = version_converter.convert_version(proto, opset)
    except (RuntimeError, onnx.checker.ValidationError) as error:
        raise GraphError(f"the model cannot be upgraded from opset {found} to {opset}: {error}; export it with a newer opset") from error
    upgraded = ir.from_proto(converted)
    _put_back(upgraded.graph, tensors)
    for node in upgraded.graph:
        if node.outputs[0].name in resampled and node.op_type == "Resize":
            node.attributes["coordinate_transformation_mode"] = ir.AttrString("coordinate_transformation_mode", "asymmetric")
            node.attributes["nearest_mode"] = ir.AttrString("nearest_mode", "floor")
    return upgraded


def _take_out_big_tensors(graph: ir.Graph) -> dict[str, ir.TensorProtocol]:
    """Turn the big initializers into inputs, and return them."""
    tensors = {}
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.nbytes <= _BIG or np.prod(tensor.shape) == 1:
            continue
        tensors[name] = tensor
        value.shape, value.dtype = ir.Shape(tensor.shape), tensor.dtype
        del graph.initializers[name]
        value.const_value = None
        if value not in graph.inputs:
            graph.inputs.append(value)
    return tensors


def _put_back(graph: ir.Graph, tensors: dict[str, ir.TensorProtocol]) -> None:
    for value in [v for v in graph.inputs if v.name in tensors]:
        graph.inputs.remove(value)
        value.const_value = tensors[value.name or ""]
        graph.register_initializer(value)
