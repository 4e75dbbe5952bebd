"""Fold fake-quantization into tensor quant attributes."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from edgekit.errors import GraphError
from edgekit.graph.annotations import METADATA, all_values, described, fresh_name, get_params, set_params
from edgekit.graph.operators import LINEAR, copy_type, int_attribute, is_constant
from edgekit.quant.affine import dequantize
from edgekit.quant.spec import INTEGER_RANGES, QuantParams, same_grid

_MOVE_CODES = (
    "MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Gather", "Identity", "Pad", "Concat",
    "DepthToSpace", "SpaceToDepth", "Expand", "Tile",
)  # fmt: skip
_PAIR = ("QuantizeLinear", "DequantizeLinear")  # a node and what stands before it


def fold_fake_quant(model: ir.Model) -> ir.Model:
    """Any Quantize/DequantizeLinear graph becomes a float graph whose tensors carry the grids.

    1. `x -> Q -> DQ`: both nodes go, the grid becomes an attribute of `x`. The same for `x -> edgekit::FakeQuant`.
    2. constant codes -> DQ: the constant becomes float, on its grid; int32 codes (biases) become plain floats.
    3. `Q -> Pad / Reshape / MaxPool / ... on codes -> DQ`: the operator runs on floats, and its output is on the same grid.
    4. `DQ -> Q` on another grid: the second grid goes to a copy (Identity) of the tensor.
    5. `Conv -> Q` on a grid that ends at 0: other tools delete the Relu that saturation replaces. It comes back, or readers
       that a target leaves in float would see negative numbers.
    6. `constant on a grid -> Transpose`, as a linear layer's weight may stand: the constant is turned, and its axis with it.

    Grids found this way are marked fixed: they were trained, or chosen by somebody, and are not moved later. Those that the
    nodes' metadata describes (`edgekit.graph.annotations.describe`) come back as they were.

    Raises:
        GraphError: two grids on one tensor, a Q and a DQ that differ, or an operator that computes on codes
            (QLinearConv ...).
    """
    model = model.clone()
    taken = {value.name for value in all_values(model.graph)}
    fold = _Fold(model.graph, taken, {node for node in model.graph if _requantizes(node)})
    for node in list(model.graph):
        if node.op_type == "FakeQuant" and node.domain == "edgekit":
            fold.fake_quant(node)
        elif node.domain not in ("", "com.microsoft"):
            continue
        elif node.op_type == "QuantizeLinear":
            fold.quantize(node)
        elif node.op_type == "DequantizeLinear":
            fold.dequantize(node)
        elif node.op_type.startswith("QLinear") or node.op_type.endswith("Integer"):
            raise GraphError(
                f"node {node.name!r} ({node.op_type}) computes on codes; only Quantize/DequantizeLinear graphs can be folded: "
                "give the float model, or the file before it was turned into integer operators"
            )
    for node in list(model.graph):
        if node.op_type == "Transpose" and not node.domain:
            fold.transpose(node)
    common.RemoveUnusedNodesPass()(model)
    return model


@dataclass(slots=True)
class _Fold:
    """What is known while a graph is folded.

    Attributes:
        graph: that is folded.
        taken: the names in use.
        requantizing: Quantize nodes that read a Dequantize.
        floats: a value that holds codes -> the float value that it stands for.
        constants: constant codes -> the floats made of them, one for each grid.
        origin: a value with a grid -> the node that said so.
    """

    graph: ir.Graph
    taken: set[str | None]
    requantizing: set[ir.Node]
    floats: dict[ir.Value, ir.Value] = field(default_factory=dict)
    constants: dict[ir.Value, list[tuple[QuantParams, ir.Value]]] = field(default_factory=dict)
    origin: dict[ir.Value, str] = field(default_factory=dict)

    def quantize(self, node: ir.Node) -> None:
        params = grid(node)
        if METADATA not in node.metadata_props and int(params.zero_point.max()) == params.qmin:
            self._restore_relu(_input(node, 0))
        self.floats[node.outputs[0]] = self._tensor_for(node, params)

    def dequantize(self, node: ir.Node) -> None:
        params = grid(node)
        self._replace(node, self._float_of(_input(node, 0), params, node))

    def fake_quant(self, node: ir.Node) -> None:
        self._replace(node, self._tensor_for(node, _symbolic_grid(node)))

    def transpose(self, node: ir.Node) -> None:
        source = _input(node, 0)
        params = get_params(source)
        if params is None or params.block_size or not is_constant(source) or node.outputs[0].is_graph_output():
            return
        array = _array(source)
        order = list(node.attributes.get_ints("perm", list(reversed(range(array.ndim)))))
        name = source.name or ""
        if len(source.uses()) == 1:
            self.taken.discard(name)
            source.name = fresh_name(f"{name}_before", self.taken)
        turned = self._register(name, np.asarray(array, np.float32).transpose(order), source.dtype or ir.DataType.FLOAT)
        turned.metadata_props.update(source.metadata_props)
        axis = None if params.axis is None else order.index(params.axis)
        set_params(turned, dataclasses.replace(params, axis=axis))
        self._replace(node, turned)

    def _restore_relu(self, value: ir.Value) -> None:
        """Put a Relu between an operator whose output may be negative and the Quantize nodes that are its only readers."""
        producer, readers = value.producer(), [use.node for use in value.uses()]
        if producer is None or producer.domain or producer.op_type not in (*LINEAR, "Add") or value.is_graph_output():
            return
        if any(reader.op_type != "QuantizeLinear" for reader in readers):
            return
        relu = ir.node("Relu", [value], name=f"{producer.name}/Relu")
        output = relu.outputs[0]
        copy_type(output, value)
        for reader in readers:
            reader.replace_input_with(0, output)
        self.graph.insert_after(producer, relu)
        name = value.name or ""
        value.name = fresh_name(f"{name}_linear", self.taken)
        output.name = name

    def _tensor_for(self, node: ir.Node, params: QuantParams) -> ir.Value:
        """The tensor that a Quantize quantizes, with its grid; a copy where an earlier pair gave it another one."""
        source = _input(node, 0)
        saturate = source.producer()
        if saturate is not None and saturate.op_type == "Max" and METADATA in saturate.metadata_props:
            source = _input(saturate, 0)  # part of a described pair: QuantizeLinear knows no narrow grid
        old = get_params(source)
        if old is not None and not same_grid(old, params) and node in self.requantizing:
            copy = ir.node("Identity", [source], name=f"{node.name}/Identity")
            copy.outputs[0].name = fresh_name(f"{source.name}_requantized", self.taken)
            copy_type(copy.outputs[0], source)
            self.graph.insert_before(node, copy)
            source = copy.outputs[0]
        self._annotate(source, params, node)
        return source

    def _float_of(self, codes: ir.Value, params: QuantParams, node: ir.Node) -> ir.Value:
        """The float tensor that codes on a grid stand for."""
        if codes in self.floats:
            self._annotate(self.floats[codes], params, node)
        elif is_constant(codes):
            return self._constant(codes, params, node)
        else:
            self.floats[codes] = self._moved(codes, params, node)
        return self.floats[codes]

    def _moved(self, codes: ir.Value, params: QuantParams, node: ir.Node) -> ir.Value:
        """The output of an operator that moves codes around, moving floats instead."""
        mover = codes.producer()
        moves = mover is not None and not mover.domain and mover.op_type in _MOVE_CODES and len(mover.outputs) == 1
        if mover is None or not moves or params.axis is not None:
            made_by = "the caller" if mover is None else f"{mover.name!r} ({mover.op_type})"
            raise GraphError(
                f"DequantizeLinear {node.name!r} reads {codes.name!r}, which {made_by} makes; only tensors that QuantizeLinear made "
                "can be folded, or one-grid tensors moved by Reshape, Pad and their like: give the float model"
            )
        moved = len(mover.inputs) if mover.op_type == "Concat" else 1
        inputs = [
            self._float_of(_input(mover, i), params, node) if i < moved else v for i, v in enumerate(mover.inputs)
        ]
        if mover.op_type == "Pad":
            inputs = [*inputs, None, None][: max(3, len(inputs))]
            inputs[2] = self._pad_value(inputs[2], params, mover)
        floating = ir.node(mover.op_type, inputs, mover.attributes, name=mover.name)
        floating.metadata_props.update(mover.metadata_props)
        output = floating.outputs[0]
        output.name = fresh_name((codes.name or "").removesuffix("_quantized"), self.taken)
        output.shape, output.type = codes.shape, ir.TensorType(ir.DataType.FLOAT)
        self.graph.insert_after(mover, floating)
        self._annotate(output, params, node)
        return output

    def _pad_value(self, value: ir.Value | None, params: QuantParams, pad: ir.Node) -> ir.Value:
        if value is not None and not is_constant(value):
            raise GraphError(f"Pad {pad.name!r} pads codes with a value computed at run time; it cannot be folded")
        code = np.zeros((), np.int64) if value is None else _array(value).astype(np.int64).reshape(())
        return self._register(f"{pad.name}_value", dequantize(code, params), ir.DataType.FLOAT)

    def _constant(self, codes: ir.Value, params: QuantParams, node: ir.Node) -> ir.Value:
        for known, value in self.constants.setdefault(codes, []):
            if same_grid(known, params):
                return value
        real = dequantize(_array(codes).astype(np.int64), params)
        scale_type = _input(node, 1).dtype or ir.DataType.FLOAT
        value = self._register((codes.name or "").removesuffix("_quantized"), real, scale_type)
        if params.dtype != "int32":
            self._annotate(value, params, node)
        self.constants[codes].append((params, value))
        return value

    def _register(self, name: str, array: NDArray[np.float32], dtype: ir.DataType) -> ir.Value:
        name = fresh_name(name, self.taken)
        value = ir.Value(name=name, const_value=ir.tensor(array.astype(dtype.numpy()), dtype=dtype, name=name))
        value.shape, value.dtype = ir.Shape(array.shape), dtype
        self.graph.register_initializer(value)
        return value

    def _annotate(self, value: ir.Value, params: QuantParams, node: ir.Node) -> None:
        old = get_params(value)
        if old is None:
            set_params(value, params)
            self.origin[value] = node.name or ""
        elif not same_grid(old, params):
            raise GraphError(
                f"tensor {value.name!r} is quantized on two grids: {_text(old)} at {self.origin.get(value, 'its annotation')!r} and "
                f"{_text(params)} at {node.name!r}; give it one"
            )

    def _replace(self, node: ir.Node, value: ir.Value) -> None:
        """Let the readers of a Dequantize read `value`; a graph output's name goes to what it was computed from."""
        output = node.outputs[0]
        if output.is_graph_output():
            if value.producer() is None or value.is_graph_output():
                identity = ir.node("Identity", [value], name=f"{node.name}/Identity")
                copy_type(identity.outputs[0], output)
                self.graph.insert_after(node, identity)
                value = identity.outputs[0]
            name, output.name = output.name, None
            value.name = name
        output.replace_all_uses_with(value, replace_graph_outputs=True)


def grid(node: ir.Node) -> QuantParams:
    """The grid that a Quantize- or DequantizeLinear node states.

    Raises:
        GraphError: it is computed at run time, in blocks, or of another type than `INTEGER_RANGES`.
    """
    scale = _parameter(node, 1).astype(np.float32)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        zero_point = _parameter(node, 2)
        known = _input(node, 2).dtype
    else:
        zero_point = np.zeros(scale.shape, np.int64)
        codes = node.inputs[0] if node.op_type == "DequantizeLinear" else node.outputs[0]
        stated = int_attribute(node, "output_dtype", 0) if node.op_type == "QuantizeLinear" else 0
        known = ir.DataType(stated) if stated else codes.dtype if codes is not None else None
    dtype = "uint8" if known is None else known.name.lower()
    if dtype not in INTEGER_RANGES:
        raise GraphError(
            f"node {node.name!r} ({node.op_type}) has codes of type {dtype}; edgekit folds {', '.join(INTEGER_RANGES)}"
        )
    params = _params(node, dtype, scale, zero_point, int_attribute(node, "axis", 1))
    block_size = int_attribute(node, "block_size", 0)
    if block_size and (node.op_type == "QuantizeLinear" or not is_constant(node.inputs[0])):
        raise GraphError(
            f"node {node.name!r} ({node.op_type}) is quantized in blocks; of activations only one grid for a tensor can be folded"
        )
    return dataclasses.replace(params, block_size=block_size)


def _symbolic_grid(node: ir.Node) -> QuantParams:
    """The grid of an `edgekit::FakeQuant(x, scale, zero_point, axis, qmin, qmax)`."""
    bounds = int_attribute(node, "qmin", 0), int_attribute(node, "qmax", 255)
    for dtype, (qmin, qmax) in INTEGER_RANGES.items():
        if bounds in ((qmin, qmax), (qmin + 1, qmax)):
            axis = int_attribute(node, "axis", 1)
            params = _params(node, dtype, _parameter(node, 1), _parameter(node, 2), axis)
            return dataclasses.replace(params, narrow_range=bounds[0] != qmin)
    raise GraphError(
        f"node {node.name!r} (FakeQuant) has codes from {bounds[0]} to {bounds[1]}, which no integer type has"
    )


def _params(
    node: ir.Node, dtype: str, scale: NDArray[np.generic], zero_point: NDArray[np.generic], axis: int
) -> QuantParams:
    description = node.metadata_props.get(METADATA, "")
    per_channel = scale.size > 1 or "axis" in json.loads(description or "{}")
    if not per_channel:
        scale, zero_point = scale.reshape(()), zero_point.reshape(())
    elif axis < 0:
        shape = _input(node, 0).shape
        if shape is None:
            raise GraphError(
                f"node {node.name!r} ({node.op_type}) counts its axis from the end of a tensor of unknown rank"
            )
        axis %= len(shape)
    found = described(description, dtype=dtype, scale=scale, zero_point=zero_point, axis=axis if per_channel else None)
    return found if description else dataclasses.replace(found, observer="fake_quant")


def _parameter(node: ir.Node, index: int) -> NDArray[np.generic]:
    value = node.inputs[index]
    if value is None or not is_constant(value):
        raise GraphError(
            f"node {node.name!r} ({node.op_type}) takes its {'scale' if index == 1 else 'zero point'} from a computed value: "
            "dynamic quantization cannot be folded into attributes; give the float model"
        )
    return _array(value)


def _array(value: ir.Value) -> NDArray[np.generic]:
    assert value.const_value is not None
    return value.const_value.numpy()


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _requantizes(node: ir.Node) -> bool:
    source = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    return source is not None and (node.op_type, source.op_type) in (_PAIR, ("FakeQuant", "FakeQuant"))


def _text(params: QuantParams) -> str:
    scale = f"{params.scale.min():.6g}" + (f" to {params.scale.max():.6g}" if params.scale.size > 1 else "")
    return f"{params.dtype}, scale {scale}, zero point {np.unique(params.zero_point).tolist()}"
