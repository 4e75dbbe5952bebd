"""Cross-layer equalization: move scale between consecutive layers until each channel's weights are as large in both."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from edgekit.graph.annotations import get_params
from edgekit.graph.constants import give_constant
from edgekit.graph.operators import dims, int_attribute, is_constant, roles

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

_HOMOGENEOUS = ("Relu", "LeakyRelu", "PRelu")
_POOLS = ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")
_WIDE = (ir.DataType.FLOAT, ir.DataType.DOUBLE)
"""Half-precision types have no room for scaled numbers."""
_DEAD = 1e-6
"""A channel whose weights are smaller than this share of the layer's largest carries nothing, and is not scaled."""


def equalize(model: ir.Model, *, sweeps: int = 20, tolerance: float = 1e-3) -> ir.Model:
    """Scale channel i of a layer by `1 / s_i` and that input of the next layer by `s_i`, with `s_i = sqrt(r1_i r2_i) / r2_i`.

    `r1_i` and `r2_i` are the largest magnitudes of the weights that make channel i and that read it. What lies between must hand a
    positive factor on, so the function stays the same up to rounding:

    1. Layers are Conv (grouped and depthwise too), Gemm and MatMul with a constant float32 or float64 weight. The bias is scaled
       along; that of a MatMul is the Add of a constant row behind it.
    2. Between them: nothing, Relu, LeakyRelu, PRelu, pools, and Flatten or Reshape of (N, C, H, W) to (N, C * H * W), where H * W
       inputs of the next layer belong to one channel. Each tensor has one reader, no grid, and is no graph output.
    3. Clip (Relu6) blocks: its bound does not scale. So does a weight that another node reads.
    4. A channel without weights on one side is left alone.

    A layer between two others (the depthwise one of three) is in two pairs: sweeps over all pairs repeat until none moves a
    channel's scale by more than `tolerance` (relative), at most `sweeps` times.

    Reference: Nagel et al. 2019, arXiv:1906.04721, section 4.1, equations 8 to 11.
    """
    model = model.clone()
    graph = model.graph
    layers = {node: layer for node in graph if (layer := _layer(node)) is not None}
    pairs = [(layers[node], *found) for node in layers if (found := _next(layers, node)) is not None]
    for layer in {id(layer): layer for first, second, _ in pairs for layer in (first, second)}.values():
        layer.sizes = np.abs(_rows(layer.node, layer.axis)).max(axis=3).astype(np.float32)
    pairs = [pair for pair in pairs if all(np.isfinite(layer.sizes).all() for layer in pair[:2])]
    for _ in range(sweeps):
        moves = [_balance(first, second, repeat) for first, second, repeat in pairs]
        if max(moves, default=0.0) <= tolerance:
            break
    for layer in layers.values():
        _apply(graph, layer)
    common.RemoveUnusedNodesPass()(model)
    return model


@dataclass(slots=True)
class _Layer:
    """A layer and its scales so far.

    Attributes:
        node: Conv, Gemm or MatMul.
        axis: the output-channel axis of its weight.
        bias: the input that holds the bias: of the node, or of the Add behind a MatMul.
        shape: groups, outputs a group, inputs a group.
        sizes: the largest magnitudes over the kernel, of that shape, scaled so far; measured for layers that have a partner.
        made, read: the factors of the output and the input channels so far.
    """

    node: ir.Node
    axis: int
    bias: tuple[ir.Node, int] | None
    shape: tuple[int, int, int]
    sizes: F32 = field(init=False)
    made: F64 = field(init=False)
    read: F64 = field(init=False)

    def __post_init__(self) -> None:
        groups, outputs, inputs = self.shape
        self.made, self.read = np.ones(groups * outputs), np.ones(groups * inputs)

    @property
    def output(self) -> ir.Value:
        return (self.bias[0] if self.bias is not None else self.node).outputs[0]

    def scale(self, made: F64, read: F64) -> None:
        """Multiply output channels by `made` and input channels by `read`."""
        groups, outputs, inputs = self.shape
        self.sizes *= made.reshape(groups, outputs, 1).astype(np.float32)
        self.sizes *= read.reshape(groups, 1, inputs).astype(np.float32)
        self.made *= made
        self.read *= read


def _balance(first: _Layer, second: _Layer, repeat: int) -> float:
    """Equalize one pair; the largest move of a channel's scale, relative.

    Args:
        first, second: the layers.
        repeat: how many inputs of `second` belong to one channel.
    """
    made = first.sizes.max(axis=2).reshape(-1).astype(np.float64)
    read = second.sizes.max(axis=1).reshape(made.size, repeat).max(axis=1).astype(np.float64)
    alive = (made > _DEAD * made.max()) & (read > _DEAD * read.max())
    scale = np.sqrt(np.divide(made, read, out=np.ones_like(made), where=alive))
    first.scale(1 / scale, np.ones_like(first.read))
    second.scale(np.ones_like(second.made), np.repeat(scale, repeat))
    return float(np.abs(scale - 1).max())


def _layer(node: ir.Node) -> _Layer | None:
    """A node that can be scaled, or None."""
    parts = roles(node) if not node.domain and node.op_type in ("Conv", "Gemm", "MatMul") else None
    if parts is None or parts.weight is None or parts.weight_axis is None:
        return None
    weight = node.inputs[parts.weight]
    given = len(node.inputs) > 2 and node.inputs[2] is not None
    if weight is None or weight.const_value is None or weight.const_value.dtype not in _WIDE or len(weight.uses()) != 1:
        return None
    if get_params(weight) is not None or weight.const_value.size == 0:
        return None
    if given and (parts.bias is None or get_params(node.inputs[2]) is not None):
        return None
    bias = (node, 2) if given else _added(node) if node.op_type == "MatMul" else None
    shape, groups = weight.const_value.shape.numpy(), int_attribute(node, "group", 1)
    outputs, inputs = shape[parts.weight_axis], shape[1 - parts.weight_axis]
    return _Layer(node, parts.weight_axis, bias, (groups, outputs // groups, inputs))


def _rows(node: ir.Node, axis: int) -> F64:
    """The weight as `(groups, outputs a group, inputs a group, positions)`."""
    weight = _array(node.inputs[1])
    weight = weight.swapaxes(0, 1) if axis == 1 else weight
    groups = int_attribute(node, "group", 1)
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)


def _added(matmul: ir.Node) -> tuple[ir.Node, int] | None:
    """The Add of a constant row behind a MatMul, and which input the row is."""
    output = matmul.outputs[0]
    add = _only_reader(output)
    if add is None or add.op_type != "Add" or add.domain:
        return None
    index = 1 if add.inputs[0] is output else 0
    row, rank, width = dims(add.inputs[index]), len(dims(output) or ()), (dims(matmul.inputs[1]) or ())[-1]
    is_row = (
        row is not None
        and len(row) <= rank
        and all(size == 1 for size in row[:-1])
        and row[-1:] in ((), (1,), (width,))
    )
    plain = is_constant(add.inputs[index]) and get_params(add.inputs[index]) is None
    return (add, index) if plain and is_row else None


def _next(layers: dict[ir.Node, _Layer], node: ir.Node) -> tuple[_Layer, int] | None:
    """The layer that alone reads what `node` makes, and how many of its inputs belong to one channel."""
    value, repeat = layers[node].output, 1
    shape = dims(value)
    if shape is None:
        return None
    axis = len(shape) - 1 if node.op_type == "MatMul" else 1
    while (reader := _only_reader(value)) is not None and reader.inputs[0] is value:
        if reader in layers:
            reads = len(dims(value) or ()) - 1 if reader.op_type == "MatMul" else 1
            fits = reads == axis and layers[reader].read.size == layers[node].made.size * repeat
            return (layers[reader], repeat) if fits else None
        positions = _passes(reader, axis)
        if positions is None:
            return None
        value, repeat = reader.outputs[0], repeat * positions
    return None


def _passes(node: ir.Node, axis: int) -> int | None:
    """Into how many channels a node spreads each one that it hands on; None where it does not hand on a positive factor."""
    if node.domain or any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        return None
    if node.op_type in _HOMOGENEOUS or (node.op_type in _POOLS and axis == 1):
        return 1
    if node.op_type in ("Flatten", "Reshape") and axis == 1:
        before, after = dims(node.inputs[0]), dims(node.outputs[0])
        inner = None if before is None or None in before[1:] else [size for size in before[1:] if size is not None]
        if before is None or after is None or inner is None or len(after) != 2 or after[1] != np.prod(inner):
            return None
        return int(np.prod(inner[1:]))
    return None


def _only_reader(value: ir.Value) -> ir.Node | None:
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output() or get_params(value) is not None:
        return None
    reader = next(iter(uses)).node
    return reader if reader.graph is value.graph else None  # not one inside an If or Loop


def _apply(graph: ir.Graph, layer: _Layer) -> None:
    """Write the scales into weight and bias."""
    if (layer.made == 1).all() and (layer.read == 1).all():
        return
    groups, outputs, inputs = layer.shape
    rows = _rows(layer.node, layer.axis)
    rows = rows * layer.made.reshape(groups, outputs, 1, 1) * layer.read.reshape(groups, 1, inputs, 1)
    shape = list(_array(layer.node.inputs[1]).shape)
    if layer.axis == 1:
        shape[:2] = shape[1], shape[0]
    weight = rows.reshape(shape)
    give_constant(graph, layer.node, 1, weight.swapaxes(0, 1) if layer.axis == 1 else weight)
    if layer.bias is not None:
        holder, index = layer.bias
        give_constant(graph, holder, index, _array(holder.inputs[index]).reshape(-1) * layer.made)


def _array(value: ir.Value | None) -> F64:
    assert value is not None and value.const_value is not None
    return value.const_value.numpy().astype(np.float64)
