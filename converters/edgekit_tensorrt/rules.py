"""TensorRT's documented rules that its parser does not enforce, only warns about, or words badly."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgekit.graph.operators import int_attribute

OPSETS = range(9, 26)
"""The ONNX opsets that the parser is documented for."""
INT4_BLOCKS = (64, 128)
INTEGER_OPS = frozenset({"ConvInteger", "MatMulInteger", "DynamicQuantizeLinear"})

_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
_INT4 = (ir.DataType.INT4, ir.DataType.UINT4)


def broken_rules(model: ir.Model) -> list[str]:
    """One sentence for each rule that the model breaks, naming the node or tensor; empty when none."""
    opset = model.opset_imports.get("", 0)
    found = []
    if opset not in OPSETS:
        found.append(
            f"the model is of opset {opset}; TensorRT reads {OPSETS.start} to {OPSETS.stop - 1}: set [graph] opset in the target"
        )
    found += [
        f"the model defines its own function {domain}::{name}; TensorRT wants standard operators: inline it"
        for domain, name, _ in model.functions
    ]
    for node in model.graph.all_nodes():
        found += _operator(node)
        if node.domain in ("", "ai.onnx") and node.op_type in (_QUANTIZE, _DEQUANTIZE):
            found += _types(node) + _scale_type(node, opset)
            found += _blocks(node) if _block_size(node) or _codes(node) in _INT4 else _channels(node)
    return found


def _operator(node: ir.Node) -> list[str]:
    if node.domain not in ("", "ai.onnx"):
        return [f"{_name(node)} is of the domain {node.domain!r}; TensorRT has only standard ONNX operators"]
    if node.op_type.startswith("QLinear") or node.op_type in INTEGER_OPS:
        return [
            f'{_name(node)} computes on codes; TensorRT wants Quantize/DequantizeLinear around float operators: export with format = "qdq"'
        ]
    return []


def _types(node: ir.Node) -> list[str]:
    """Signed 8-bit codes with zero point 0, int4 and float8 are all there is."""
    codes = _codes(node)
    found = []
    if codes == ir.DataType.INT32:
        found.append(
            f'{_name(node)} dequantizes int32 codes; TensorRT wants a bias in float: set bias = "float" in the target'
        )
    elif codes not in (ir.DataType.INT8, ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN, None):
        found.append(
            f"{_name(node)} has {codes.name.lower()} codes; TensorRT runs int8 (it takes uint8 for int8 with a mere warning): "
            'set dtype = "int8" in the target'
        )
    zero_point = node.inputs[2] if len(node.inputs) > 2 else None
    if zero_point is None:
        return found
    if zero_point.const_value is None:
        found.append(
            f"{_name(node)} computes its zero point {zero_point.name!r} at run time; TensorRT wants the constant 0"
        )
    elif np.any(zero_point.const_value.numpy() != 0):
        found.append(
            f"{_name(node)} has the zero point {zero_point.name!r} that is not 0; TensorRT is symmetric: set symmetric = true in the target"
        )
    return found


def _scale_type(node: ir.Node, opset: int) -> list[str]:
    """Since opset 19 a scale has the type of the float data; the parser lets differing ones pass."""
    scale = node.inputs[1]
    data = node.inputs[0] if node.op_type == _QUANTIZE else node.outputs[0]
    if opset < 19 or scale is None or data is None or None in (scale.dtype, data.dtype) or scale.dtype == data.dtype:
        return []
    assert scale.dtype is not None and data.dtype is not None
    return [
        f"{_name(node)} has the {scale.dtype.name.lower()} scale {scale.name!r} on {data.dtype.name.lower()} data {data.name!r}; "
        "TensorRT wants one type for both: add a Cast, or convert the scale"
    ]


def _blocks(node: ir.Node) -> list[str]:
    """Blocks of 64 or 128 along one of the last two axes of an int4 weight of a MatMul."""
    size, codes, weight = _block_size(node), _codes(node), node.inputs[0]
    if codes not in _INT4:
        return [f"{_name(node)} has blocks of {size} on codes that are not int4; TensorRT blocks int4 weights only"]
    found = []
    if size not in INT4_BLOCKS:
        found.append(f"{_name(node)} has int4 blocks of {size}; TensorRT documents 64 and 128")
    if not _is_constant(weight):
        found.append(f"{_name(node)} has int4 codes that are no constant weight; TensorRT has int4 for weights only")
    found += [
        f"{_name(node)} gives int4 to {_name(user)}; TensorRT has int4 for MatMul only"
        for user in node.outputs[0].consumers()
        if user.op_type != "MatMul"
    ]
    if weight is not None and weight.shape is not None:
        axis, rank = int_attribute(node, "axis", 1), len(weight.shape)
        if axis % rank < rank - 2:
            found.append(
                f"{_name(node)} has blocks along axis {axis} of {rank}; TensorRT blocks along one of the last two"
            )
    return found


def _channels(node: ir.Node) -> list[str]:
    """One scale a tensor for activations; one an output channel for weights."""
    scale, weight = node.inputs[1], node.inputs[0]
    if scale is None or scale.shape is None or len(scale.shape) == 0 or scale.shape == ir.Shape([1]):
        return []
    if not _is_constant(weight):
        return [f"{_name(node)} has a scale for each channel of an activation; TensorRT wants one for the tensor"]
    found = []
    for user, index in node.outputs[0].uses():
        axis, wanted = int_attribute(node, "axis", 1), _output_channel(user, weight)
        rank = len(weight.shape) if weight is not None and weight.shape is not None else None
        if index == 1 and wanted is not None and rank is not None and axis % rank != wanted % rank:
            found.append(
                f"{_name(node)} has a scale for each slice along axis {axis} of the weight {weight.name if weight else None!r}; "
                f"TensorRT wants the output channel of {_name(user)}, axis {wanted % rank}"
            )
    return found


def _output_channel(user: ir.Node, weight: ir.Value | None) -> int | None:
    match user.op_type:
        case "Conv":
            return 0
        case "ConvTranspose":
            return 1
        case "Gemm":
            return 0 if int_attribute(user, "transB", 0) else 1
        case "MatMul":
            return -1
    return None


def _codes(node: ir.Node) -> ir.DataType | None:
    """The type of the codes on the quantized side of a Quantize/DequantizeLinear."""
    if node.op_type == _DEQUANTIZE:
        return node.inputs[0].dtype if node.inputs[0] is not None else None
    zero_point = node.inputs[2] if len(node.inputs) > 2 else None
    if zero_point is not None:
        return zero_point.dtype
    return ir.DataType(int_attribute(node, "output_dtype", 0) or int(ir.DataType.UINT8))


def _block_size(node: ir.Node) -> int:
    return int_attribute(node, "block_size", 0)


def _is_constant(value: ir.Value | None) -> bool:
    """An initializer, a Constant node, or codes that a QuantizeLinear makes of one."""
    if value is None:
        return False
    producer = value.producer()
    if producer is not None and producer.op_type == _QUANTIZE:
        return _is_constant(producer.inputs[0])
    return value.const_value is not None or (producer is not None and producer.op_type == "Constant")


def _name(node: ir.Node) -> str:
    return f"node {node.name!r} ({node.op_type})"
