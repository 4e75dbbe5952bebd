"""Finding DequantizeLinear -> operator -> (Relu, Clip) -> QuantizeLinear in a QDQ graph.

A `Unit` is one operator with the grids of what it reads and writes; every format but QDQ is written from units.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

CODE_RANGES: dict[ir.DataType, tuple[int, int]] = {ir.DataType.INT8: (-128, 127), ir.DataType.UINT8: (0, 255)}
CLIPPING = ("Relu", "Clip")
Number = TypeVar("Number", np.int64, np.float64)


@dataclass(frozen=True, slots=True)
class Operand:
    """A quantized tensor: `real = (codes - zero_point) * scale`.

    Attributes:
        codes: the integer tensor.
        scale: float initializer, shape `()` or `(C,)`.
        zero_point: initializer of the codes' type, the shape of `scale`; None means 0.
        axis: the channel axis where `scale` has more than one element, else None.
    """

    codes: ir.Value
    scale: ir.Value
    zero_point: ir.Value | None
    axis: int | None = None

    @property
    def dtype(self) -> ir.DataType | None:
        """Type of the codes, as far as the graph says."""
        if self.zero_point is not None and self.zero_point.dtype is not None:
            return self.zero_point.dtype
        return self.codes.dtype

    @property
    def scales(self) -> NDArray[np.float64]:
        """The scale as numbers, shape `()` or `(C,)`."""
        scale = constant(self.scale)
        assert scale is not None
        return np.asarray(scale.reshape(()) if scale.size == 1 else scale, np.float64)

    @property
    def zero_points(self) -> NDArray[np.int64]:
        """The zero point as numbers, shape `()` or `(C,)`."""
        zero = np.zeros((), np.int64) if self.zero_point is None else constant(self.zero_point)
        assert zero is not None
        return np.asarray(zero.reshape(()) if zero.size == 1 else zero, np.int64)

    @property
    def per_tensor(self) -> bool:
        """One scale for the whole tensor."""
        return self.axis is None

    @property
    def constant_codes(self) -> NDArray[np.int64] | None:
        """The codes, where they are an initializer."""
        codes = constant(self.codes)
        return None if codes is None else codes.astype(np.int64)

    def constant_reals(self) -> NDArray[np.float64] | None:
        """The numbers that constant codes stand for."""
        codes = self.constant_codes
        if codes is None:
            return None
        centred = codes - along(self.zero_points, self.axis, codes.ndim)
        return np.asarray(centred * along(self.scales, self.axis, codes.ndim), np.float64)


@dataclass(frozen=True, slots=True)
class Unit:
    """One operator between grids.

    Attributes:
        node: the float operator.
        inputs: one entry for each of its inputs: the operand behind a DequantizeLinear, or None where it reads a float.
        added: an Add of a constant row right behind a MatMul, when asked for: a bias written as a node of its own.
        clips: the Relu and Clip nodes between it and its QuantizeLinear.
        output: its QuantizeLinear's result; None where the result stays float.
    """

    node: ir.Node
    inputs: tuple[Operand | None, ...]
    clips: tuple[ir.Node, ...] = ()
    output: Operand | None = None
    added: ir.Node | None = None

    @property
    def result(self) -> ir.Value:
        """What a lowered form of this unit replaces: the codes, or the float result."""
        if self.output is not None:
            return self.output.codes
        return (self.added or self.node).outputs[0]

    def code_bounds(self) -> tuple[int, int]:
        """The lowest and highest output code that saturation and `clips` together leave."""
        assert self.output is not None
        assert self.output.dtype is not None
        qmin, qmax = CODE_RANGES[self.output.dtype]
        low, high = qmin, qmax
        for clip in self.clips:
            # Rounding and saturation keep order, so clipping the codes is clipping the numbers.
            floor, ceiling = (_code_of(bound, self.output, qmin, qmax) for bound in clip_bounds(clip))
            low, high = max(low, floor), min(high, ceiling)
        return min(low, high), high


def find_units(graph: ir.Graph) -> list[Unit]:
    """Every operator that reads at least one quantized tensor, in graph order."""
    return list(_units(graph))


def _units(graph: ir.Graph) -> Iterator[Unit]:
    for node in graph:
        unit = match(node)
        if unit is not None:
            yield unit


def match(node: ir.Node, *, absorb_row: bool = False) -> Unit | None:
    """The unit around `node`, or None where it reads no quantized tensor or is a Quantize/DequantizeLinear itself.

    `absorb_row` takes an Add of a constant row behind a MatMul into the MatMul's unit.
    """
    if node.op_type in ("QuantizeLinear", "DequantizeLinear") or node.domain not in ("", "ai.onnx"):
        return None
    inputs = tuple(None if value is None else operand(value) for value in node.inputs)
    if all(one is None for one in inputs):
        return None
    if len(node.outputs) != 1:
        return Unit(node, inputs)
    added = _added_row(node.outputs[0]) if absorb_row and node.op_type == "MatMul" else None
    clips, quantize = _follow((added or node).outputs[0])
    if quantize is None:
        return Unit(node, inputs, added=added)
    scale = quantize.inputs[1]
    assert scale is not None
    output = Operand(quantize.outputs[0], scale, _input(quantize, 2), _axis(quantize))
    if not (_is_constant(output) and output.per_tensor and output.dtype in CODE_RANGES):
        return Unit(node, inputs, added=added)
    return Unit(node, inputs, tuple(clips), output, added)


def row(value: ir.Value | None) -> NDArray[np.float64] | None:
    """The numbers of a constant with one value for each entry of its last axis, or one for all; else None."""
    found = None if value is None else operand(value)
    values = constant(value) if found is None else found.constant_reals()
    if values is None or (values.ndim > 0 and values.size != values.shape[-1]):
        return None
    return values.astype(np.float64)


def operand(value: ir.Value) -> Operand | None:
    """What `value` is the DequantizeLinear of, if it is one with constant parameters."""
    node = value.producer()
    if node is None or node.op_type != "DequantizeLinear" or node.attributes.get_int("block_size", 0) != 0:
        return None
    codes, scale = node.inputs[0], node.inputs[1]
    assert codes is not None
    assert scale is not None
    found = Operand(codes, scale, _input(node, 2), _axis(node))
    return found if _is_constant(found) else None


def same_grid(a: Operand, b: Operand) -> bool:
    """Whether equal codes stand for equal numbers."""
    return (
        a.dtype == b.dtype
        and a.axis == b.axis
        and np.array_equal(a.scales, b.scales)
        and np.array_equal(a.zero_points, b.zero_points)
    )


def constant(value: ir.Value | None) -> NDArray[np.generic] | None:
    """The value of an initializer or a Constant node; None for anything computed."""
    if value is None or value.is_graph_input():
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def clip_bounds(node: ir.Node) -> tuple[float, float]:
    """The interval that a Relu or Clip keeps, in real numbers."""
    if node.op_type == "Relu":
        return 0.0, float("inf")
    low, high = constant(_input(node, 1)), constant(_input(node, 2))
    return float("-inf") if low is None else float(low.item()), float("inf") if high is None else float(high.item())


def along(values: NDArray[Number], axis: int | None, rank: int) -> NDArray[Number]:
    """`values` of shape `(C,)` shaped to broadcast along `axis` of a tensor of `rank` dimensions."""
    if axis is None or values.ndim == 0:
        return values
    return values.reshape([-1 if dim == axis % rank else 1 for dim in range(rank)])


def _code_of(number: float, grid: Operand, qmin: int, qmax: int) -> int:
    """What QuantizeLinear makes of a number; in float32, as there, lest ties fall to another side."""
    scaled = np.rint(np.float32(np.clip(number, -1e30, 1e30)) / np.float32(grid.scales))
    return int(np.clip(float(scaled) + int(grid.zero_points), qmin, qmax))


def _follow(value: ir.Value) -> tuple[list[ir.Node], ir.Node | None]:
    """The clipping nodes after `value` and the QuantizeLinear behind them, each the only reader of the one before."""
    clips: list[ir.Node] = []
    while (node := only_reader(value)) is not None:
        if node.op_type == "QuantizeLinear" and node.inputs[0] is value:
            return clips, node
        if node.op_type not in CLIPPING or node.inputs[0] is not value or not _constant_bounds(node):
            break
        clips.append(node)
        value = node.outputs[0]
    return [], None


def only_reader(value: ir.Value) -> ir.Node | None:
    """The one node that reads `value`, where nothing else does."""
    uses = tuple(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def _added_row(value: ir.Value) -> ir.Node | None:
    """The only reader of `value`, if it adds a constant row."""
    node = only_reader(value)
    if node is None or node.op_type != "Add":
        return None
    return node if row(other_input(node, value)) is not None else None


def other_input(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The input of a binary operator that is not `value`."""
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]


def _constant_bounds(node: ir.Node) -> bool:
    return all(value is None or constant(value) is not None for value in node.inputs[1:])


def _is_constant(found: Operand) -> bool:
    zero_point = found.zero_point
    return constant(found.scale) is not None and (zero_point is None or constant(zero_point) is not None)


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if len(node.inputs) > index else None


def _axis(node: ir.Node) -> int | None:
    """The axis attribute where it means something: with more than one scale."""
    scale = constant(node.inputs[1])
    return None if scale is None or scale.size == 1 else node.attributes.get_int("axis", 1)
