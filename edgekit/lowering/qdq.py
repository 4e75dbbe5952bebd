"""Lower tensor quant attributes to Quantize/DequantizeLinear nodes, where a target's runtime wants them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgekit.errors import GraphError
from edgekit.graph.annotations import DTYPES, annotated_values, code_tensor, fresh_name, get_params, set_params
from edgekit.graph.operators import Roles, bias_place, copy_type, is_constant
from edgekit.lowering.placement import Placement, place
from edgekit.lowering.writer import node_name, remove_dead
from edgekit.quant.affine import TINY, middle_code, quantize, regrid, weight_params
from edgekit.quant.spec import QuantParams, QuantSpec
from edgekit.target import Target

_OLDEST = 13
"""The first opset with a scale for each channel."""
_BIAS = 2
"""The input of Conv, ConvTranspose and Gemm that is the bias."""
_LARGEST_BIAS = 2**30
"""In codes; what int32 holds beyond it is left to the sum of products."""


def lower_qdq(model: ir.Model, target: Target, *, keep_float: frozenset[str] = frozenset()) -> ir.Model:
    """The annotated `model` as the Quantize/DequantizeLinear graph that `target` asks for.

    1. Grids are re-expressed on the target's types.
    2. `place` decides which tensors pass through Q/DQ and who reads them, by the target's rules.
    3. Activation functions that saturation makes redundant go out.
    4. Weights become codes behind a DequantizeLinear; biases too where the target wants int32.
    5. Q/DQ go in on activations.

    Nodes in `keep_float` stay float. All attributes are gone from the result.

    Raises:
        GraphError: a trained grid cannot be expressed on this target, or the model's opset has no per-channel Q/DQ.
    """
    model = model.clone()
    if model.opset_imports.get("", 0) < _OLDEST:
        raise GraphError(
            f"the model has opset {model.opset_imports.get('', 0)}; expected {_OLDEST} or later: compress it again"
        )
    _regrid(model, target)
    placement = place(model, target, keep_float=keep_float)
    for node in placement.redundant:
        _remove_activation(model.graph, node)
    lowering = _Lowering(model.graph, target)
    for node, parts in placement.quantized.items():
        lowering.lower_weight(node, parts)
    for value in [*model.graph.inputs, *(output for node in model.graph for output in node.outputs)]:
        lowering.lower_activation(value, placement)
    for value in annotated_values(model.graph):
        set_params(value, None)
    remove_dead(model)
    return model


def _regrid(model: ir.Model, target: Target) -> None:
    rules = target.quantization
    for value in annotated_values(model.graph):
        params = get_params(value)
        assert params is not None
        try:
            weight = is_constant(value)
            set_params(
                value,
                _weight_grid(value, params, rules.weight.spec) if weight else regrid(params, rules.activation.spec),
            )
        except GraphError as error:
            raise GraphError(
                f"tensor {value.name!r} cannot be quantized for target {target.name!r}: {error}"
            ) from error


def _weight_grid(weight: ir.Value, params: QuantParams, spec: QuantSpec) -> QuantParams:
    """The grid of a constant for a target: the same where it will do, else chosen anew from the constant's numbers."""
    middle = bool(np.all(params.zero_point == middle_code(params.dtype)))
    if params.dtype == spec.dtype and (params.axis is None or spec.per_channel) and (middle or not spec.symmetric):
        return params
    if params.fixed:
        return regrid(params, replace(spec, narrow_range=spec.narrow_range and params.narrow_range))
    axis = params.axis if spec.per_channel else None
    return weight_params(
        _numbers(weight), replace(spec, per_channel=axis is not None), axis=axis, observer=params.observer
    )


def _codes(weight: NDArray[np.float32], params: QuantParams, chosen: QuantParams) -> NDArray[np.generic]:
    """The codes of a weight on a grid; those that were `chosen` for it wherever that grid is still the same."""
    nearest = quantize(weight, params)
    if chosen.codes is None or chosen.dtype != params.dtype:
        return nearest
    if params.axis is None or params.block_size:
        return chosen.codes
    same = (params.scale == chosen.scale).reshape([-1 if i == params.axis else 1 for i in range(weight.ndim)])
    return np.where(same, chosen.codes, nearest)


def _numbers(constant: ir.Value) -> NDArray[np.float32]:
    assert constant.const_value is not None
    return np.asarray(constant.const_value.numpy(), np.float32)


def _remove_activation(graph: ir.Graph, node: ir.Node) -> None:
    """Take out a Relu or Clip; its input takes over its output's name, readers and grid."""
    source, output = node.inputs[0], node.outputs[0]
    assert source is not None
    name, params = output.name, get_params(output)
    output.replace_all_uses_with(source, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    source.name = name
    set_params(source, params)


class _Lowering:
    """Writes Q/DQ into one graph.

    Attributes:
        codes: a float value -> its codes.
    """

    def __init__(self, graph: ir.Graph, target: Target) -> None:
        self.graph = graph
        self.integer_bias = target.quantization.bias == "int32"
        self.codes: dict[ir.Value, ir.Value] = {}
        values = (value for node in graph.all_nodes() for value in (*node.inputs, *node.outputs) if value is not None)
        self._values = {value.name for value in (*graph.inputs, *graph.initializers.values(), *values)}
        self._nodes = {node.name for node in graph.all_nodes()}
        self._weights: dict[tuple[ir.Value, bytes], ir.Value] = {}

    def lower_weight(self, node: ir.Node, parts: Roles) -> None:
        """Put the constant weight, and where the target wants it the bias, of a quantized node behind DequantizeLinear."""
        if parts.weight is None:
            return
        weight, activation = node.inputs[parts.weight], get_params(node.inputs[parts.activations[0]])
        chosen = params = get_params(weight)
        assert weight is not None and params is not None and chosen is not None and activation is not None, (
            "place chooses only nodes with grids"
        )
        if params.shift is not None:
            self._take_off(node, params.shift, weight)
        row = _bias_row(node, parts, weight) if self.integer_bias else None
        if row is not None:
            params = _widened(params, activation, row)
            # Taken in float32: ONNX Runtime fuses only where scale(bias) == scale(x) * scale(w) to float rounding.
            scale = np.asarray(activation.scale * params.scale, np.float32)
            grid = QuantParams("int32", scale, np.zeros(scale.shape, np.int64), 0 if scale.ndim else None)
            codes = np.rint(row / scale.astype(np.float64))
            assert np.all(np.abs(codes) <= 2 * _LARGEST_BIAS)
            node.replace_input_with(_BIAS, self._constant(node, f"{node_name(node)}_bias", codes, grid, weight))
        key = (weight, params.scale.tobytes())
        if key not in self._weights:
            codes = _codes(_numbers(weight), params, chosen)
            self._weights[key] = self._constant(node, str(weight.name), codes, params, weight)
        node.replace_input_with(parts.weight, self._weights[key])

    def _take_off(self, node: ir.Node, shift: NDArray[np.float32], like: ir.Value) -> None:
        """Subtract from a layer's bias what quantization adds to its output in the mean."""
        place = bias_place(node)
        assert place is not None, "a shift is known only where there is a place for it"
        reader, index = place
        old = reader.inputs[index] if len(reader.inputs) > index else None
        bias = -shift if old is None else (_numbers(old).astype(np.float64) - shift).astype(np.float32)
        if len(reader.inputs) <= index:
            reader.resize_inputs(index + 1)
        name = f"{node_name(node)}_bias" if old is None else f"{old.name}_corrected"
        reader.replace_input_with(index, self._initializer(name, bias, like.dtype or ir.DataType.FLOAT))

    def lower_activation(self, value: ir.Value, placement: Placement) -> None:
        """Put a Q/DQ pair on a value that somebody reads as codes, or that an integer kernel makes."""
        readers, params = placement.readers(value), get_params(value)
        shared = value in placement.shared
        if not (readers or shared):
            return
        assert params is not None and value.name is not None
        name = value.name
        is_output = shared and value in self.graph.outputs
        if is_output:
            value.name = fresh_name(f"{name}_float", self._values)
        grid = self._grid(name, params, value)
        producer = value.producer()
        if producer is not None and producer in placement.integer_pads:
            codes = self._pad_codes(producer, grid[1])
        else:
            codes = self._node_after(value, self._node("QuantizeLinear", [value, *grid], name))
        copy_type(codes, value)
        codes.name, codes.dtype = fresh_name(f"{name}_quantized", self._values), DTYPES[params.dtype]
        result = self._node_after(codes, self._node("DequantizeLinear", [codes, *grid], name))
        result.name = name if is_output else fresh_name(f"{name}_dequantized", self._values)
        copy_type(result, value)
        self.codes[value] = codes
        for node, index in readers:
            if node not in placement.integer_pads:  # these read the codes themselves
                node.replace_input_with(index, result)
        if is_output:
            self.graph.outputs[self.graph.outputs.index(value)] = result

    def _pad_codes(self, pad: ir.Node, zero_point: ir.Value) -> ir.Value:
        """The same Pad on codes, where zero is the zero point. The float one stays for readers of floats, under another name."""
        assert pad.inputs[0] is not None
        name, pad.name = pad.name, fresh_name(f"{pad.name}/float", self._nodes)
        inputs = [self.codes[pad.inputs[0]], pad.inputs[1], zero_point, *pad.inputs[3:]]
        codes = ir.node("Pad", inputs, pad.attributes, name=name, metadata_props=dict(pad.metadata_props))
        return self._node_after(pad.outputs[0], codes)

    def _constant(
        self, node: ir.Node, name: str, codes: NDArray[np.generic], params: QuantParams, like: ir.Value
    ) -> ir.Value:
        """Codes as an initializer, and a DequantizeLinear before `node` that makes floats of them, of the type of `like`."""
        stored = self._initializer(f"{name}_quantized", codes, DTYPES[params.dtype])
        dequantize = self._node("DequantizeLinear", [stored, *self._grid(name, params, like)], name, axis=params.axis)
        self.graph.insert_before(node, dequantize)
        result = dequantize.outputs[0]
        result.name = fresh_name(f"{name}_dequantized", self._values)
        result.shape, result.dtype = ir.Shape(codes.shape), like.dtype or ir.DataType.FLOAT
        return result

    def _grid(self, name: str, params: QuantParams, like: ir.Value) -> list[ir.Value]:
        """Scale, of the float type of `like`, and zero point."""
        zero_point = np.broadcast_to(params.zero_point, params.scale.shape)
        return [
            self._initializer(f"{name}_scale", params.scale, like.dtype or ir.DataType.FLOAT),
            self._initializer(f"{name}_zero_point", zero_point, DTYPES[params.dtype]),
        ]

    def _initializer(self, name: str, array: NDArray[np.generic], dtype: ir.DataType) -> ir.Value:
        name = fresh_name(name, self._values)
        value = ir.Value(name=name, const_value=code_tensor(np.asarray(array), dtype, name))
        value.shape, value.dtype = ir.Shape(array.shape), dtype
        self.graph.register_initializer(value)
        return value

    def _node(self, op_type: str, inputs: list[ir.Value], name: str, *, axis: int | None = None) -> ir.Node:
        attributes = {} if axis is None else {"axis": axis}
        return ir.node(op_type, inputs, attributes, name=fresh_name(f"{name}/{op_type}", self._nodes))

    def _node_after(self, value: ir.Value, node: ir.Node) -> ir.Value:
        """Insert a node right behind whatever makes `value`; returns its output."""
        producer = value.producer()
        if producer is not None:
            self.graph.insert_after(producer, node)
        else:
            self.graph.insert_before(self.graph[0], node)
        return node.outputs[0]


def _bias_row(node: ir.Node, parts: Roles, weight: ir.Value) -> NDArray[np.float64] | None:
    """The bias as one number for each output channel, shape `(C_out,)`; None where it has no place on the accumulator's grid."""
    bias = node.inputs[_BIAS] if node.op_type != "MatMul" and len(node.inputs) > _BIAS else None
    if bias is None or not is_constant(bias) or bias.const_value is None:
        return None
    if any(node.attributes.get_float(name, 1.0) != 1.0 for name in ("alpha", "beta")):
        return None
    numbers = bias.const_value.numpy().astype(np.float64)
    if numbers.size > 1 and numbers.shape[-1] != numbers.size:
        return None
    return np.broadcast_to(numbers.reshape(-1), (_channels(node, parts, weight),))


def _channels(node: ir.Node, parts: Roles, weight: ir.Value) -> int:
    shape = _numbers(weight).shape
    if node.op_type == "ConvTranspose":
        return int(shape[1] * node.attributes.get_int("group", 1))
    return int(shape[0 if parts.weight_axis is None else parts.weight_axis])


def _widened(params: QuantParams, activation: QuantParams, bias: NDArray[np.float64]) -> QuantParams:
    """Weight scales large enough for the bias to fit into int32 on the accumulator's grid: dead channels have tiny ones.

    Trained grids are no exception: where a bias is this large, half a step of the weight is nothing beside it.
    """
    needed = np.maximum(np.abs(bias) / _LARGEST_BIAS, 2 * TINY) / float(activation.scale)
    lowest = (needed if params.scale.ndim else needed.max(initial=0.0)).astype(np.float32)
    return replace(params, scale=np.maximum(params.scale, lowest))
