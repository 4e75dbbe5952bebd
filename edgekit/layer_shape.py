"""A layer without its weights: all that its time depends on, and a model of it alone with other numbers of channels."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgekit.graph.operators import LINEAR, bias_place, int_attribute, roles

Attribute = int | float | str | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LayerShape:
    """A Conv, ConvTranspose, Gemm or MatMul with a constant weight, for one sample.

    Attributes:
        op_type: of its node.
        attributes: of its node but `group` and `kernel_shape`, by name, sorted.
        inputs, outputs: channels.
        before: sizes of the input's axes but the channels, for a convolution those behind the channels, else those in front.
        after: the same of the output.
        kernel: of a convolution.
        group: of a convolution, else 1.
        depthwise: a convolution with a group for each input channel, whose number of input channels follows that of the output.
        bias: whether one is added.
        opset: of the default domain.
    """

    op_type: str
    attributes: tuple[tuple[str, Attribute], ...]
    inputs: int
    outputs: int
    before: tuple[int, ...]
    after: tuple[int, ...]
    kernel: tuple[int, ...]
    group: int
    depthwise: bool
    bias: bool
    opset: int

    @property
    def text(self) -> str:
        """The same for all layers that differ in channels only."""
        parts = {name: value for name, value in asdict(self).items() if name not in ("inputs", "outputs")}
        if self.depthwise:
            parts["group"] = self.outputs // self.inputs
        return json.dumps(parts, sort_keys=True)

    @property
    def summary(self) -> str:
        """For people."""
        kernel = f" {'x'.join(map(str, self.kernel))}" if self.kernel else ""
        return f"{self.op_type}{kernel}, {self.inputs} to {self.outputs} channels, at {'x'.join(map(str, self.before)) or 1}"

    def key(self, inputs: int, outputs: int) -> str:
        """Names the layer with so many channels."""
        return f"{0 if self.depthwise else inputs} to {outputs}: {self.text}"

    def macs(self, inputs: int, outputs: int) -> int:
        """Multiply-accumulates with so many channels."""
        sizes = self.before if self.op_type == "ConvTranspose" else self.after
        per_output = 1 if self.depthwise else inputs / self.group
        return round(math.prod(sizes) * math.prod(self.kernel) * outputs * per_output)

    def input_shape(self, inputs: int, outputs: int) -> tuple[int, ...]:
        """Of the input with so many channels."""
        return self._with_channels(self.before, self._read(inputs, outputs))

    def output_shape(self, outputs: int) -> tuple[int, ...]:
        """Of the output with so many channels."""
        return self._with_channels(self.after, outputs)

    def weight_shape(self, inputs: int, outputs: int) -> tuple[int, ...]:
        """Of the weight with so many channels."""
        group = self.groups(inputs, outputs)
        inputs = self._read(inputs, outputs)
        match self.op_type:
            case "Conv":
                return outputs, inputs // group, *self.kernel
            case "ConvTranspose":
                return inputs, outputs // group, *self.kernel
            case "Gemm" if dict(self.attributes).get("transB"):
                return outputs, inputs
            case _:
                return inputs, outputs

    def groups(self, inputs: int, outputs: int) -> int:
        """The `group` of the node with so many channels."""
        return self._read(inputs, outputs) if self.depthwise else self.group

    def _read(self, inputs: int, outputs: int) -> int:
        return outputs * self.inputs // self.outputs if self.depthwise else inputs

    def _with_channels(self, sizes: tuple[int, ...], channels: int) -> tuple[int, ...]:
        return (1, channels, *sizes) if self.kernel else (1, *sizes, channels)


def layer_shapes(model: ir.Model, *, sizes: Mapping[str, int] | None = None) -> dict[str, LayerShape]:
    """The layers of a shape-inferred float model by the names of their nodes, in order.

    Left out are layers whose weight has other than two axes (products) or is computed, and those with an open size.

    Args:
        model: its first axis is the batch.
        sizes: of symbolic dimensions besides the batch, by name.
    """
    opset = model.opset_imports.get("", 21)
    found = {}
    for node in model.graph:
        if node.domain == "" and node.op_type in LINEAR:
            shape = _shape(node, opset, sizes or {})
            if shape is not None:
                found[node.name or ""] = shape
    return found


def _shape(node: ir.Node, opset: int, sizes: Mapping[str, int]) -> LayerShape | None:
    role = roles(node)
    if role is None or role.weight is None:
        return None
    weight = node.inputs[role.weight]
    assert weight is not None and weight.const_value is not None
    dims = weight.const_value.shape.numpy()
    before, after = _sizes(node.inputs[0], sizes), _sizes(node.outputs[0], sizes)
    if before is None or after is None or len(before) < 2:
        return None
    is_conv = node.op_type.startswith("Conv")
    if is_conv:
        inputs, outputs, before, after = before[1], after[1], before[2:], after[2:]
    elif len(dims) == 2:
        inputs, outputs, before, after = before[-1], after[-1], before[1:-1], after[1:-1]
    else:
        return None
    group = int_attribute(node, "group", 1)
    place = bias_place(node)
    last = node if place is None else place[0]
    return LayerShape(
        op_type=node.op_type,
        attributes=_attributes(node),
        inputs=inputs,
        outputs=outputs,
        before=before,
        after=after,
        kernel=tuple(dims[2:]) if is_conv else (),
        group=group,
        depthwise=node.op_type == "Conv" and group == inputs > 1,
        bias=place is not None and len(last.inputs) > place[1] and last.inputs[place[1]] is not None,
        opset=opset,
    )


def one_layer(shape: LayerShape, inputs: int, outputs: int, *, copies: int) -> ir.Model:
    """A model of copies of a layer with so many channels, each with other weights, that read one input `x` side by side.

    A Relu follows a convolution, which costs nothing there, and a pooling to one number a channel, because a runtime's own memory
    layout ends at the outputs.
    """
    x = ir.val("x", ir.DataType.FLOAT, shape.input_shape(inputs, outputs))
    first = ir.node("Relu", [x], outputs=[ir.val("read")], name="read")
    nodes, constants, results = [first], [], []
    for index in range(copies):
        weight = _constant(f"weight{index}", shape.weight_shape(inputs, outputs), index)
        row = _constant(f"bias{index}", (outputs,), index)
        operands = [first.outputs[0], weight]
        constants.append(weight)
        if shape.bias:
            constants.append(row)
            if shape.op_type != "MatMul":
                operands.append(row)
        nodes.append(_node(shape.op_type, operands, f"layer{index}", _node_attributes(shape, inputs, outputs)))
        if shape.bias and shape.op_type == "MatMul":
            nodes.append(_node("Add", [nodes[-1].outputs[0], row], f"add{index}", {}))
        if shape.kernel:
            nodes.append(_node("Relu", [nodes[-1].outputs[0]], f"relu{index}", {}))
        dims = shape.output_shape(outputs)
        if shape.kernel and math.prod(shape.after) > 1:
            pool = {"kernel_shape": (1,) * len(shape.after), "strides": shape.after}
            nodes.append(_node("MaxPool", [nodes[-1].outputs[0]], f"pool{index}", pool))
            dims = (*dims[:2], *(1,) * len(shape.after))
        result = nodes[-1].outputs[0]
        result.type, result.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(dims)
        results.append(result)
    graph = ir.Graph([x], results, nodes=nodes, initializers=constants, name="layer", opset_imports={"": shape.opset})
    return ir.Model(graph, ir_version=10)


def _node(op_type: str, operands: list[ir.Value], name: str, attributes: Mapping[str, Attribute]) -> ir.Node:
    given = {key: list(value) if isinstance(value, tuple) else value for key, value in attributes.items()}
    return ir.node(op_type, operands, given, outputs=[ir.val(f"{name}_y")], name=name)


def _node_attributes(shape: LayerShape, inputs: int, outputs: int) -> dict[str, Attribute]:
    given = dict(shape.attributes)
    if shape.kernel:
        given |= {"group": shape.groups(inputs, outputs), "kernel_shape": shape.kernel}
    return given


def _constant(name: str, dims: tuple[int, ...], index: int) -> ir.Value:
    """Numbers that differ from copy to copy: runtimes compute equal layers once."""
    block: NDArray[np.float32] = np.random.default_rng(index).normal(0, 0.05, 4096).astype(np.float32)
    return ir.val(name, const_value=ir.tensor(np.resize(block, dims), name=name))


def _attributes(node: ir.Node) -> tuple[tuple[str, Attribute], ...]:
    values = {
        name: attribute.value for name, attribute in node.attributes.items() if name not in ("group", "kernel_shape")
    }
    return tuple(
        (name, value if isinstance(value, int | float | str) else tuple(value))
        for name, value in sorted(values.items())
    )


def _sizes(value: ir.Value | None, sizes: Mapping[str, int]) -> tuple[int, ...] | None:
    """The shape of one sample, or None where a size is not known."""
    if value is None or value.shape is None:
        return None
    known = [size if isinstance(size, int) else sizes.get(str(size.value)) for size in value.shape]
    found = [1, *known[1:]]
    return tuple(size for size in found if size is not None) if None not in found else None
