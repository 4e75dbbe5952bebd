"""What the integer forms of operators share: their inputs, constants, and the way back to 8 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgekit.errors import GraphError
from edgekit.lowering.functions import DOMAIN
from edgekit.lowering.units import CODE_RANGES, Operand, Unit, constant, same_grid
from edgekit.lowering.writer import Attributes, Writer, node_name
from edgekit.quant.requantize import requantize_multiplier

INT32 = ir.DataType.INT32
CONSTANT_LEVELS = 2**15 - 1
"""A float constant operand of Add or Mul gets this many codes on either side of zero: far below one output step."""


def refuse(node: ir.Node, reason: str) -> NoReturn:
    """Say why a node has no integer form."""
    raise GraphError(
        f"{node.op_type} {node_name(node)!r} would stay float in the integer format: {reason}; "
        "quantize it, or choose the format 'qdq' or 'qoperator'"
    )


def activation(unit: Unit, index: int) -> Operand:
    """Input `index`: 8-bit codes with one scale."""
    found = eight_bit(unit, index)
    if not found.per_tensor:
        refuse(unit.node, f"its input {index} has one scale for each channel; expected one for the tensor")
    return found


def eight_bit(unit: Unit, index: int) -> Operand:
    """Input `index`: 8-bit codes."""
    found = unit.inputs[index] if index < len(unit.inputs) else None
    if found is None:
        value = unit.node.inputs[index] if index < len(unit.node.inputs) else None
        name = None if value is None else value.name
        refuse(unit.node, f"its input {name!r} is float; expected a DequantizeLinear before it")
    if found.dtype not in CODE_RANGES:
        refuse(unit.node, f"its input {found.codes.name!r} has codes of type {found.dtype}; expected INT8 or UINT8")
    return found


def output(unit: Unit) -> Operand:
    """The grid that the unit writes."""
    if unit.output is None:
        refuse(unit.node, "no QuantizeLinear alone reads its result, or only behind other operators than Relu and Clip")
    return unit.output


def weight_zero(weight: Operand) -> ir.Value | None:
    """The zero point to spell out: none where it is 0."""
    return weight.zero_point if np.any(weight.zero_points) else None


def shape_of(unit: Unit, index: int) -> list[int | None]:
    """Sizes of input `index`; None for each that is not static."""
    value = unit.node.inputs[index]
    if value is None or value.shape is None:
        refuse(unit.node, f"the shape of its input {index} is not known")
    return [size if isinstance(size, int) else None for size in value.shape]


def rank_of(unit: Unit, found: Operand) -> int:
    """Number of dimensions."""
    codes = constant(found.codes)
    if codes is not None:
        return codes.ndim
    if found.codes.shape is None:
        refuse(unit.node, f"the shape of {found.codes.name!r} is not known")
    return found.codes.shape.rank()


def addend(unit: Unit, index: int, writer: Writer) -> Operand:
    """Input `index` with one scale; constants on other grids, or float, get codes of 16 bits and a sign."""
    found, label = unit.inputs[index], "ab"[index]
    reals = constant(unit.node.inputs[index]) if found is None else found.constant_reals()
    if reals is None or (found is not None and found.per_tensor and found.dtype in CODE_RANGES):
        return activation(unit, index)
    scale = float(np.max(np.abs(reals), initial=0.0)) / CONSTANT_LEVELS or 1.0
    codes = np.rint(reals.astype(np.float64) / scale).astype(np.int32)
    return Operand(writer.constant(label, codes), writer.constant(f"{label}_scale", np.asarray(scale)), None)


def centred(writer: Writer, side: Operand, label: str) -> ir.Value:
    """The codes minus their zero point, int32."""
    codes = side.codes
    if side.dtype != INT32:
        codes = writer.node("Cast", [codes], {"to": int(INT32)}, suffix=f"{label}_int32", dtype=INT32)
    if not np.any(side.zero_points):
        return codes
    zero_point = writer.constant(f"{label}_zero_point", side.zero_points.astype(np.int32))
    return writer.node("Sub", [codes, zero_point], suffix=f"{label}_centred", dtype=INT32)


def add_constant(writer: Writer, sums: ir.Value, bias: NDArray[np.int32]) -> ir.Value:
    """An accumulator plus its bias."""
    return writer.node("Add", [sums, writer.constant("bias", bias)], suffix="biased", dtype=INT32)


def finish(unit: Unit, writer: Writer, sums: ir.Value, grid: NDArray[np.float64], shape: Sequence[int]) -> ir.Value:
    """An int32 accumulator on `grid`, shaped `shape` to broadcast to it, as output codes; dequantized without a Q.

    `shape` is `()`, `(-1,)` for the last axis or `(-1, 1, ...)` for axis 1.
    """
    if unit.output is not None:
        return requantized(unit, writer, sums, grid if grid.ndim == 0 else grid.reshape(tuple(shape)))
    if grid.ndim > 1:
        refuse(unit.node, "its windows average over different counts and no QuantizeLinear reads its result")
    scale = writer.constant("scale", grid.astype(np.float32))
    axis: Attributes = {"axis": 1 if len(shape) > 1 else -1} if grid.ndim else {}
    return writer.node("DequantizeLinear", [sums, scale], axis, suffix="dequantize", dtype=ir.DataType.FLOAT)


def requantized(
    unit: Unit, writer: Writer, sums: ir.Value, grid: NDArray[np.float64], label: str = "", *, clipped: bool = True
) -> ir.Value:
    """An int32 accumulator on `grid`, which broadcasts to it, as codes of the unit's output."""
    target, prefix = output(unit), f"{label}_" if label else ""
    try:
        multiplier, shift = requantize_multiplier(grid / float(target.scales))
    except GraphError as error:
        raise GraphError(f"{unit.node.op_type} {node_name(unit.node)!r}: {error}") from error
    inputs = [
        sums,
        writer.constant(f"{prefix}multiplier", multiplier),
        writer.constant(f"{prefix}shift", shift),
        *saturation(unit, writer, label, clipped=clipped),
    ]
    return writer.node("Requantize", inputs, suffix=f"{prefix}requantize", domain=DOMAIN, dtype=target.dtype)


def regridded(unit: Unit, writer: Writer, side: Operand, label: str) -> ir.Value:
    """Codes of the unit's output grid for codes of another."""
    if same_grid(side, output(unit)):
        return side.codes
    return requantized(unit, writer, centred(writer, side, label), np.asarray(side.scales), label, clipped=False)


def saturation(unit: Unit, writer: Writer, label: str = "", *, clipped: bool = True) -> list[ir.Value]:
    """Zero point, lowest and highest code of the unit's output, Relu and Clip included."""
    target = output(unit)
    assert target.dtype is not None
    prefix = f"{label}_" if label else ""
    low, high = unit.code_bounds() if clipped else CODE_RANGES[target.dtype]
    codes = {"zero_point": int(target.zero_points), "low": low, "high": high}
    return [writer.constant(f"{prefix}{name}", np.asarray(code, target.dtype.numpy())) for name, code in codes.items()]


def clipped_codes(unit: Unit, writer: Writer, codes: ir.Value, *, suffix: str) -> ir.Value:
    """Codes within the unit's bounds."""
    target = output(unit)
    assert target.dtype is not None
    if unit.code_bounds() == CODE_RANGES[target.dtype]:
        return codes
    low, high = saturation(unit, writer)[1:]
    return writer.node("Clip", [codes, low, high], suffix=suffix, dtype=target.dtype)
