"""The QOperator format: one quantized operator of ONNX Runtime in the place of each DQ -> operator -> Q.

What has no quantized form stays float between DequantizeLinear and QuantizeLinear. The result equals, code for code,
what ONNX Runtime's own optimizer makes of the QDQ graph; where a Relu or Clip that saturation does not already do
stands before the Q, it becomes a Clip of the codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeGuard

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgekit.lowering.bias import bias_codes
from edgekit.lowering.movement import sink_dequantize
from edgekit.lowering.units import CODE_RANGES, Operand, Unit, match, row, same_grid
from edgekit.lowering.writer import Attributes, Writer, remove_dead, replace_value

CONTRIB = "com.microsoft"
POOL_ATTRIBUTES = ("auto_pad", "ceil_mode", "count_include_pad", "kernel_shape", "pads", "strides")
CONV_ATTRIBUTES = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")


def lower_qoperator(model: ir.Model) -> ir.Model:
    """The QDQ `model` with ONNX Runtime's quantized operators; node names are kept.

    Raises:
        GraphError: a bias that does not fit into int32.
    """
    model = model.clone()
    sink_dequantize(model.graph)
    remove_dead(model)
    for node in list(model.graph):
        unit = match(node)
        write = None if unit is None else WRITERS.get(node.op_type)
        result = None if unit is None or write is None else write(unit, Writer(model.graph, node))
        if unit is not None and result is not None:
            replace_value(unit.result, _clipped(unit, Writer(model.graph, node), result))
    remove_dead(model)
    if any(node.domain == CONTRIB for node in model.graph):
        model.opset_imports[CONTRIB] = 1
    return model


def _conv(unit: Unit, writer: Writer) -> ir.Value | None:
    x, w = unit.inputs[:2]
    if not _activation(x) or not _weight(w, x) or unit.output is None or unit.output.dtype != x.dtype:
        return None
    if w.axis not in (None, 0) or not _has_row_bias(unit):
        return None
    codes = [*_parts(writer, x, "x"), *_parts(writer, w, "w"), *_grid(writer, unit.output, "y")]
    inputs = [*codes, _bias(unit, writer, np.asarray(x.scales * w.scales))]
    return writer.node("QLinearConv", inputs, _attributes(unit.node, CONV_ATTRIBUTES), dtype=x.dtype)


def _matmul(unit: Unit, writer: Writer) -> ir.Value | None:
    a, b = unit.inputs
    if not _activation(a) or not _weight(b, a) or not (b.axis is None or _last_axis(b)):
        return None
    if unit.output is None:
        a_codes, a_scale, a_zero = _parts(writer, a, "a")
        b_codes, b_scale, b_zero = _parts(writer, b, "b")
        inputs = [a_codes, b_codes, a_scale, b_scale, a_zero, b_zero]
        return writer.node("MatMulIntegerToFloat", inputs, domain=CONTRIB, dtype=ir.DataType.FLOAT)
    if unit.output.dtype != a.dtype:
        return None
    inputs = [*_parts(writer, a, "a"), *_parts(writer, b, "b"), *_grid(writer, unit.output, "y")]
    return writer.node("QLinearMatMul", inputs, dtype=a.dtype)


def _gemm(unit: Unit, writer: Writer) -> ir.Value | None:
    a, b = unit.inputs[:2]
    if not _activation(a) or not _weight(b, a) or not _has_row_bias(unit):
        return None
    attributes = unit.node.attributes
    alpha, beta = attributes.get_float("alpha", 1.0), attributes.get_float("beta", 1.0)
    trans_a, trans_b = attributes.get_int("transA", 0), attributes.get_int("transB", 0)
    if b.axis not in (None, 0 if trans_b else 1) or (unit.output is not None and unit.output.dtype != a.dtype):
        return None
    bias = _bias(unit, writer, np.asarray(a.scales * b.scales * alpha), beta)
    grid = () if unit.output is None else _grid(writer, unit.output, "y")
    inputs = [*_parts(writer, a, "a"), *_parts(writer, b, "b"), bias, *grid]
    options: Attributes = {"alpha": alpha, "transA": trans_a, "transB": trans_b}
    return writer.node("QGemm", inputs, options, domain=CONTRIB, dtype=unit.result.dtype if not grid else a.dtype)


def _binary(unit: Unit, writer: Writer) -> ir.Value | None:
    a, b = unit.inputs
    if not _activation(a) or not _activation(b) or unit.output is None:
        return None
    if not a.dtype == b.dtype == unit.output.dtype:
        return None
    inputs = [*_parts(writer, a, "a"), *_parts(writer, b, "b"), *_grid(writer, unit.output, "y")]
    return writer.node(f"QLinear{unit.node.op_type}", inputs, domain=CONTRIB, dtype=a.dtype)


def _concat(unit: Unit, writer: Writer) -> ir.Value | None:
    if unit.output is None:
        return None
    inputs: list[ir.Value | None] = [*_grid(writer, unit.output, "y")]
    for index, part in enumerate(unit.inputs):
        if not _activation(part) or part.dtype != unit.output.dtype:
            return None
        inputs += _parts(writer, part, f"x{index}")
    axis: Attributes = {"axis": unit.node.attributes.get_int("axis", 0)}
    return writer.node("QLinearConcat", inputs, axis, domain=CONTRIB, dtype=unit.output.dtype)


def _where(unit: Unit, writer: Writer) -> ir.Value | None:
    _, a, b = unit.inputs
    if not _activation(a) or not _activation(b) or unit.output is None or not a.dtype == b.dtype == unit.output.dtype:
        return None
    grids = [*_parts(writer, a, "a"), *_parts(writer, b, "b"), *_grid(writer, unit.output, "y")]
    return writer.node("QLinearWhere", [unit.node.inputs[0], *grids], domain=CONTRIB, dtype=a.dtype)


def _unary(op_type: str, names: tuple[str, ...] = ()) -> Callable[[Unit, Writer], ir.Value | None]:
    def write(unit: Unit, writer: Writer) -> ir.Value | None:
        x = unit.inputs[0]
        if not _activation(x) or unit.output is None or unit.output.dtype != x.dtype:
            return None
        inputs = [*_parts(writer, x, "x"), *_grid(writer, unit.output, "y")]
        return writer.node(op_type, inputs, _attributes(unit.node, names), domain=CONTRIB, dtype=x.dtype)

    return write


def _average_pool(unit: Unit, writer: Writer) -> ir.Value | None:
    attributes = unit.node.attributes
    # ONNX Runtime 1.32: QLinearAveragePool has no dilations, and divides border windows wrongly with these two together.
    wrong = attributes.get_int("ceil_mode", 0) != 0 and attributes.get_int("count_include_pad", 0) != 0
    if wrong or any(step != 1 for step in attributes.get_ints("dilations", ())):
        return None
    return _unary("QLinearAveragePool", POOL_ATTRIBUTES)(unit, writer)


def _softmax(unit: Unit, writer: Writer) -> ir.Value | None:
    x = unit.inputs[0]
    if not _activation(x) or unit.output is None or unit.output.dtype != x.dtype:
        return None
    options: Attributes = {"axis": unit.node.attributes.get_int("axis", -1), "opset": 13}
    inputs = [*_parts(writer, x, "x"), *_grid(writer, unit.output, "y")]
    return writer.node("QLinearSoftmax", inputs, options, domain=CONTRIB, dtype=x.dtype)


def _clip(unit: Unit, writer: Writer) -> ir.Value | None:
    """A Relu or Clip that changes no grid: a Clip of the codes."""
    x = unit.inputs[0]
    if not _activation(x) or unit.output is None or not same_grid(x, unit.output):
        return None
    return _clip_codes(writer, x.codes, replace(unit, clips=(unit.node, *unit.clips)), suffix="")


WRITERS: dict[str, Callable[[Unit, Writer], ir.Value | None]] = {
    "Add": _binary,
    "AveragePool": _average_pool,
    "Clip": _clip,
    "Concat": _concat,
    "Conv": _conv,
    "Gemm": _gemm,
    "GlobalAveragePool": _unary("QLinearGlobalAveragePool"),
    "LeakyRelu": _unary("QLinearLeakyRelu", ("alpha",)),
    "MatMul": _matmul,
    "Mul": _binary,
    "Relu": _clip,
    "Sigmoid": _unary("QLinearSigmoid"),
    "Softmax": _softmax,
    "Where": _where,
}


def _activation(found: Operand | None) -> TypeGuard[Operand]:
    """One scale for the tensor, in float32, which is all that these operators take, and 8-bit codes."""
    in_float32 = found is not None and found.scale.dtype in (None, ir.DataType.FLOAT)
    return found is not None and in_float32 and found.per_tensor and found.dtype in CODE_RANGES


def _weight(found: Operand | None, activation: Operand) -> TypeGuard[Operand]:
    """8-bit codes of a type that ONNX Runtime multiplies with the activation's (int8 takes no uint8 partner)."""
    if found is None or found.dtype not in CODE_RANGES:
        return False
    return activation.dtype == ir.DataType.UINT8 or found.dtype == ir.DataType.INT8


def _last_axis(found: Operand) -> bool:
    rank = None if found.codes.shape is None else found.codes.shape.rank()
    return found.axis == -1 or (rank is not None and found.axis == rank - 1)


def _grid(writer: Writer, found: Operand, label: str) -> tuple[ir.Value, ir.Value]:
    """Scale and zero point, which these operators want spelled out."""
    if found.zero_point is not None:
        return found.scale, found.zero_point
    dtype = found.dtype or ir.DataType.UINT8
    return found.scale, writer.constant(f"{label}_zero_point", np.zeros(found.scales.shape, dtype.numpy()))


def _parts(writer: Writer, found: Operand, label: str) -> tuple[ir.Value, ir.Value, ir.Value]:
    return (found.codes, *_grid(writer, found, label))


def _has_row_bias(unit: Unit) -> bool:
    """No bias, or a constant with one value for each output channel."""
    return len(unit.node.inputs) < 3 or unit.node.inputs[2] is None or row(unit.node.inputs[2]) is not None


def _bias(unit: Unit, writer: Writer, grid: NDArray[np.float64], factor: float = 1.0) -> ir.Value | None:
    value = unit.node.inputs[2] if len(unit.node.inputs) > 2 else None
    codes = bias_codes(unit, value, grid, factor)
    if codes is None:
        return None
    stored = unit.inputs[2]
    kept = None if stored is None else stored.constant_codes
    if stored is not None and kept is not None and codes.ndim == 1 and np.array_equal(codes, kept):
        return stored.codes
    return writer.constant("bias", codes.reshape(-1))


def _attributes(node: ir.Node, names: tuple[str, ...]) -> Attributes:
    return {name: node.attributes[name].value for name in names if name in node.attributes}


def _clipped(unit: Unit, writer: Writer, codes: ir.Value) -> ir.Value:
    """`codes` after the unit's Relu and Clip nodes."""
    return _clip_codes(writer, codes, unit, suffix="clip") if unit.clips else codes


def _clip_codes(writer: Writer, codes: ir.Value, unit: Unit, *, suffix: str) -> ir.Value:
    assert unit.output is not None
    dtype = unit.output.dtype
    assert dtype is not None
    bounds = unit.code_bounds()
    if bounds == CODE_RANGES[dtype]:
        return codes
    low, high = (
        writer.constant(name, np.asarray(code, dtype.numpy()))
        for name, code in zip(("low", "high"), bounds, strict=True)
    )
    return writer.node("Clip", [codes, low, high], suffix=suffix, dtype=dtype)
