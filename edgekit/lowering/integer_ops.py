"""Each operator of a QDQ graph as integer operators: an int32 accumulator, then `edgekit::Requantize`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgekit.errors import GraphError
from edgekit.lowering.bias import bias_codes
from edgekit.lowering.functions import DOMAIN
from edgekit.lowering.integer_parts import (
    INT32,
    activation,
    add_constant,
    addend,
    centred,
    clipped_codes,
    eight_bit,
    finish,
    output,
    rank_of,
    refuse,
    regridded,
    saturation,
    shape_of,
    weight_zero,
)
from edgekit.lowering.lookup import argument, table
from edgekit.lowering.pooling import pool_windows
from edgekit.lowering.units import Operand, Unit, constant, other_input, same_grid
from edgekit.lowering.writer import Attributes, Writer, node_name
from edgekit.quant.requantize import shared_shift_multipliers

CONV_ATTRIBUTES = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")


def _conv(unit: Unit, writer: Writer) -> ir.Value:
    """ConvInteger, the bias in int32, Requantize per output channel."""
    x, w = activation(unit, 0), eight_bit(unit, 1)
    if w.axis not in (None, 0):
        refuse(unit.node, f"its weight has one scale for each entry of axis {w.axis}; expected axis 0, the outputs")
    attributes: Attributes = {
        name: unit.node.attributes[name].value for name in CONV_ATTRIBUTES if name in unit.node.attributes
    }
    sums = writer.node("ConvInteger", [x.codes, w.codes, x.zero_point, weight_zero(w)], attributes, dtype=INT32)
    channels = (-1, *[1] * (rank_of(unit, w) - 2))
    grid = np.asarray(x.scales * w.scales)
    bias = bias_codes(unit, _third(unit.node), grid)
    if bias is not None and np.any(bias):
        sums = add_constant(writer, sums, bias.reshape(channels))
    return finish(unit, writer, sums, grid, channels)


def _matmul(unit: Unit, writer: Writer) -> ir.Value:
    """MatMulInteger, a bias in int32 from an Add behind it, Requantize per column."""
    a, b = activation(unit, 0), eight_bit(unit, 1)
    if b.axis is not None and b.axis % rank_of(unit, b) != rank_of(unit, b) - 1:
        refuse(unit.node, f"its weight has one scale for each entry of axis {b.axis}; expected the last, the columns")
    bias = None if unit.added is None else other_input(unit.added, unit.node.outputs[0])
    return _product(unit, writer, (a, b), (a.codes, b.codes), np.asarray(a.scales * b.scales), bias)


def _gemm(unit: Unit, writer: Writer) -> ir.Value:
    """MatMulInteger on transposed codes; alpha goes into the multiplier, beta into the int32 bias."""
    a, b = activation(unit, 0), eight_bit(unit, 1)
    attributes = unit.node.attributes
    alpha, beta = attributes.get_float("alpha", 1.0), attributes.get_float("beta", 1.0)
    trans_a, trans_b = bool(attributes.get_int("transA", 0)), bool(attributes.get_int("transB", 0))
    if alpha <= 0:
        refuse(unit.node, f"its alpha is {alpha}; expected a positive number")
    if b.axis is not None and b.axis % 2 != (0 if trans_b else 1):
        refuse(unit.node, f"its weight has one scale for each entry of axis {b.axis}; expected the outputs' axis")
    left = _transposed(writer, a, "a") if trans_a else a.codes
    right = _transposed(writer, b, "b") if trans_b else b.codes
    grid = np.asarray(a.scales * b.scales * alpha)
    return _product(unit, writer, (a, b), (left, right), grid, _third(unit.node), beta)


def _product(
    unit: Unit,
    writer: Writer,
    sides: tuple[Operand, Operand],
    codes: tuple[ir.Value, ir.Value],
    grid: NDArray[np.float64],
    bias: ir.Value | None,
    factor: float = 1.0,
) -> ir.Value:
    inputs = [*codes, sides[0].zero_point, weight_zero(sides[1])]
    sums = writer.node("MatMulInteger", inputs, dtype=INT32)
    added = bias_codes(unit, bias, grid, factor)
    if added is not None and np.any(added):
        sums = add_constant(writer, sums, added)
    return finish(unit, writer, sums, grid, (-1,))


def _transposed(writer: Writer, side: Operand, label: str) -> ir.Value:
    """The codes of a matrix, transposed now where they are constant."""
    codes = constant(side.codes)
    if codes is not None:
        return writer.constant(f"{label}_transposed", np.ascontiguousarray(codes.T))
    return writer.node("Transpose", [side.codes], {"perm": (1, 0)}, suffix=f"{label}_transposed", dtype=side.dtype)


def _add(unit: Unit, writer: Writer) -> ir.Value:
    """Add or Sub: `edgekit::RequantizeAdd`, two multipliers and one shift."""
    sign = -1.0 if unit.node.op_type == "Sub" else 1.0
    target = output(unit)
    sides = [addend(unit, index, writer) for index in (0, 1)]
    reals = [float(side.scales / target.scales) * factor for side, factor in zip(sides, (1.0, sign), strict=True)]
    try:
        multipliers, shift = shared_shift_multipliers(reals)
    except GraphError as error:
        raise GraphError(f"{unit.node.op_type} {node_name(unit.node)!r}: {error}") from error
    inputs: list[ir.Value | None] = []
    for label, side, multiplier in zip("ab", sides, multipliers, strict=True):
        zero_point = side.zero_point or writer.constant(f"{label}_zero_point", np.asarray(0, np.int32))
        inputs += [side.codes, zero_point, writer.constant(f"{label}_multiplier", np.asarray(multiplier, np.int64))]
    inputs += [writer.constant("shift", np.asarray(shift, np.int64)), *saturation(unit, writer)]
    return writer.node("RequantizeAdd", inputs, domain=DOMAIN, dtype=target.dtype)


def _mul(unit: Unit, writer: Writer) -> ir.Value:
    """The product of centred codes, requantized."""
    sides = [addend(unit, index, writer) for index in (0, 1)]
    factors = [centred(writer, side, label) for label, side in zip("ab", sides, strict=True)]
    product = writer.node("Mul", factors, dtype=INT32)
    return finish(unit, writer, product, np.asarray(sides[0].scales * sides[1].scales), ())


def _concat(unit: Unit, writer: Writer) -> ir.Value:
    """Concat of codes, each input first brought to the output's grid where it has another."""
    dtype = output(unit).dtype
    parts = [regridded(unit, writer, activation(unit, index), f"x{index}") for index in range(len(unit.inputs))]
    joined = writer.node("Concat", parts, {"axis": unit.node.attributes.get_int("axis", 0)}, dtype=dtype)
    return clipped_codes(unit, writer, joined, suffix="clip") if unit.clips else joined


def _where(unit: Unit, writer: Writer) -> ir.Value:
    """Where on codes, each branch first brought to the output's grid."""
    dtype = output(unit).dtype
    parts = [regridded(unit, writer, activation(unit, index), f"x{index}") for index in (1, 2)]
    chosen = writer.node("Where", [unit.node.inputs[0], *parts], dtype=dtype)
    return clipped_codes(unit, writer, chosen, suffix="clip") if unit.clips else chosen


def _mean(unit: Unit, writer: Writer) -> ir.Value:
    """GlobalAveragePool or ReduceMean: ReduceSum of centred codes; the count goes into the multiplier."""
    x, shape = activation(unit, 0), shape_of(unit, 0)
    axes, keepdims = list(range(2, len(shape))), 1
    if unit.node.op_type == "ReduceMean":
        given = constant(unit.node.inputs[1]) if len(unit.node.inputs) > 1 else None
        if given is None:
            refuse(unit.node, "its axes are not constant")
        axes, keepdims = [int(axis) % len(shape) for axis in given], unit.node.attributes.get_int("keepdims", 1)
    sizes = [size for axis in axes if (size := shape[axis]) is not None]
    if len(sizes) != len(axes):
        refuse(unit.node, f"it averages over axes {axes} of an input of shape {shape}; expected static sizes there")
    inputs = [centred(writer, x, "x"), writer.constant("axes", np.asarray(axes, np.int64))]
    sums = writer.node("ReduceSum", inputs, {"keepdims": keepdims}, dtype=INT32)
    return finish(unit, writer, sums, np.asarray(x.scales / np.prod(sizes)), ())


def _average_pool(unit: Unit, writer: Writer) -> ir.Value:
    """A depthwise ConvInteger with ones; each window's count goes into the multiplier."""
    x = activation(unit, 0)
    windows = pool_windows(unit.node, shape_of(unit, 0))
    if isinstance(windows, str):
        refuse(unit.node, windows)
    ones = writer.constant("ones", np.ones((windows.channels, 1, *windows.kernel), np.int8))
    attributes: Attributes = {
        "dilations": windows.dilations,
        "group": windows.channels,
        "kernel_shape": windows.kernel,
        "pads": windows.pads,
        "strides": windows.strides,
    }
    sums = writer.node("ConvInteger", [x.codes, ones, x.zero_point], attributes, dtype=INT32)
    return finish(unit, writer, sums, np.asarray(x.scales / windows.counts), windows.counts.shape)


def lookup(unit: Unit, writer: Writer) -> ir.Value:
    """Any function of one code: Gather from its table of 256 codes."""
    dtype = output(unit).dtype
    indices = writer.node("Cast", [argument(unit).codes], {"to": int(INT32)}, suffix="indices", dtype=INT32)
    return writer.node("Gather", [writer.constant("table", table(unit)), indices], dtype=dtype)


def _clip(unit: Unit, writer: Writer) -> ir.Value:
    """Relu or Clip: on the codes where the grid stays, else through a table."""
    x = activation(unit, 0)
    if not same_grid(x, output(unit)):
        return lookup(unit, writer)
    return clipped_codes(replace(unit, clips=(unit.node, *unit.clips)), writer, x.codes, suffix="")


def _third(node: ir.Node) -> ir.Value | None:
    return node.inputs[2] if len(node.inputs) > 2 else None


WRITERS: dict[str, Callable[[Unit, Writer], ir.Value]] = {
    "Add": _add,
    "AveragePool": _average_pool,
    "Clip": _clip,
    "Concat": _concat,
    "Conv": _conv,
    "Gemm": _gemm,
    "GlobalAveragePool": _mean,
    "MatMul": _matmul,
    "Mul": _mul,
    "ReduceMean": _mean,
    "Relu": _clip,
    "Sub": _add,
    "Where": _where,
}
"""Operators that have an integer form besides a table."""
