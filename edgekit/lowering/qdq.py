"""Lower tensor quant attributes to Quantize/DequantizeLinear nodes, where a target's runtime wants them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgekit.errors import GraphError
from edgekit.graph.annotations import DTYPES, annotated_values, fresh_name, get_params, set_params
from edgekit.graph.operators import Roles, copy_type, is_constant
from edgekit.lowering.grid_writer import GridWriter, numbers
from edgekit.lowering.placement import Placement, place
from edgekit.lowering.recurrent import lower_recurrent
from edgekit.lowering.saturation import reduce_range
from edgekit.lowering.shift import shift_one_sided
from edgekit.lowering.tables import lower_tables
from edgekit.lowering.weight_only import lower_weights
from edgekit.lowering.writer import node_name, remove_dead
from edgekit.quant.affine import TINY, constant_codes, dequantize, middle_code, quantize, regrid, weight_params, widened
from edgekit.quant.spec import BITS, WIDE, QuantParams, QuantSpec
from edgekit.target import Target

_OLDEST = 13
"""The first opset with a scale for each channel."""
_BIAS = 2
"""The input of Conv, ConvTranspose and Gemm that is the bias."""
NARROW = ("int4", "int2")
LEAST_BITS = 8
"""Of the codes that runtimes have for activations."""
_LARGEST_BIAS = 2**30
"""In codes; what int32 holds beyond it is left to the sum of products."""
_OF_ZEROS = 2.0**-10
"""The scale of a weight of zeros, where any is right for the weight: a bias on the grid `input scale * weight scale` wants a fine one."""


def lower_qdq(model: ir.Model, target: Target, *, keep_float: frozenset[str] = frozenset()) -> ir.Model:
    """The annotated `model` as the Quantize/DequantizeLinear graph that `target` asks for.

    0. Weights lose a bit where the target wants that.
    1. Tables that are looked up, and weights of operators with a memory and of layers whose activations have no grid, become codes.
    2. All other grids are re-expressed on the target's types, one-sided ones with a shift where only symmetric grids are had.
    3. `place` decides which tensors pass through Q/DQ and who reads them, by the target's rules.
    4. Activation functions that saturation makes redundant go out.
    5. Weights become codes behind a DequantizeLinear; biases too where the target wants int32.
    6. Q/DQ go in on activations.

    Nodes in `keep_float` stay float. All attributes are gone from the result.

    Raises:
        GraphError: a trained grid cannot be expressed on this target, or the model's opset has no per-channel Q/DQ.
        TargetError: the target does not execute a layer's weights without a grid for its activations.
    """
    model = model.clone()
    if model.opset_imports.get("", 0) < _OLDEST:
        raise GraphError(
            f"the model has opset {model.opset_imports.get('', 0)}; expected {_OLDEST} or later: compress it again"
        )
    if target.quantization.reduce_range:
        reduce_range(model)
    lowering = _Lowering(model.graph, target)
    lower_tables(lowering, target, keep_float)
    lower_recurrent(model, lowering, target, keep_float)
    lower_weights(model, lowering, target, keep_float)
    shift_one_sided(model, lowering, target, keep_float)
    _regrid(model, target)
    placement = place(model, target, keep_float=keep_float)
    for node in placement.redundant:
        _remove_activation(model.graph, node)
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
            if is_constant(value):
                grid = _weight_grid(value, params, rules.weight.spec)
                zeros = not numbers(value).any()
                set_params(value, replace(grid, scale=np.full_like(grid.scale, _OF_ZEROS)) if zeros else grid)
            else:
                set_params(value, _activation_grid(params, rules.activation.spec, rules.wide))
        except GraphError as error:
            raise GraphError(
                f"tensor {value.name!r} cannot be quantized for target {target.name!r}: {error}"
            ) from error


def _activation_grid(params: QuantParams, spec: QuantSpec, wide: str) -> QuantParams | None:
    """The grid of an activation for a target; None where it has 16 bits and the target leaves what reads it in float."""
    if BITS[params.dtype] < LEAST_BITS and params.axis is None:
        return widened(params, spec)
    if params.fixed or params.dtype not in WIDE.values() or spec.dtype in WIDE.values():
        return regrid(params, spec)
    return regrid(params, replace(spec, dtype=WIDE[spec.dtype])) if wide == "quantize" else None


def _weight_grid(weight: ir.Value, params: QuantParams, spec: QuantSpec) -> QuantParams:
    """The grid of a constant for a target: the same where it will do, else chosen anew from the constant's numbers."""
    middle = bool(np.all(params.zero_point == middle_code(params.dtype)))
    if params.dtype == spec.dtype and (params.axis is None or spec.per_channel) and (middle or not spec.symmetric):
        return params
    if params.dtype in NARROW and middle and spec.dtype == "int8" and not params.block_size:
        return replace(
            params, dtype="int8", codes=constant_codes(numbers(weight), params)
        )  # the same numbers, in wider codes
    if params.fixed:
        return regrid(params, replace(spec, narrow_range=spec.narrow_range and params.narrow_range))
    axis = params.axis if spec.per_channel else None
    return weight_params(
        numbers(weight), replace(spec, per_channel=axis is not None), axis=axis, observer=params.observer
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


def _remove_activation(graph: ir.Graph, node: ir.Node) -> None:
    """Take out a Relu or Clip; its input takes over its output's name, readers and grid."""
    source, output = node.inputs[0], node.outputs[0]
    assert source is not None
    name, params = output.name, get_params(output)
    output.replace_all_uses_with(source, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    source.name = name
    set_params(source, params)


class _Lowering(GridWriter):
    """Writes Q/DQ into one graph.

    Attributes:
        codes: a float value -> its codes.
    """

    def __init__(self, graph: ir.Graph, target: Target) -> None:
        super().__init__(graph)
        self.integer_bias = target.quantization.bias == "int32"
        self.codes: dict[ir.Value, ir.Value] = {}
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
            self.take_off(node, params.shift, weight)
        row = _bias_row(node, parts, weight) if self.integer_bias else None
        if row is not None:
            params = _widened(params, activation, row)
            # Taken in float32: ONNX Runtime fuses only where scale(bias) == scale(x) * scale(w) to float rounding.
            scale = np.asarray(activation.scale * params.scale, np.float32)
            grid = QuantParams("int32", scale, np.zeros(scale.shape, np.int64), 0 if scale.ndim else None)
            codes = np.rint(row / scale.astype(np.float64))
            assert np.all(np.abs(codes) <= 2 * _LARGEST_BIAS)
            node.replace_input_with(_BIAS, self.constant(node, f"{node_name(node)}_bias", codes, grid, weight))
        key = (weight, params.scale.tobytes())
        if key not in self._weights:
            codes = _codes(numbers(weight), params, chosen)
            self._weights[key] = self.constant(node, str(weight.name), codes, params, weight)
        node.replace_input_with(parts.weight, self._weights[key])

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
            value.name = fresh_name(f"{name}_float", self.values)
        grid = self.grid(name, params, value)
        producer = value.producer()
        if producer is not None and producer in placement.integer_pads:
            codes = self._pad_codes(producer, grid[1])
        else:
            limited = value if params.limits is None else self._clip(value, params)
            codes = self.node_after(limited, self.node("QuantizeLinear", [limited, *grid], name))
        copy_type(codes, value)
        codes.name, codes.dtype = fresh_name(f"{name}_quantized", self.values), DTYPES[params.dtype]
        result = self.node_after(codes, self.node("DequantizeLinear", [codes, *grid], name))
        result.name = name if is_output else fresh_name(f"{name}_dequantized", self.values)
        copy_type(result, value)
        self.codes[value] = codes
        for node, index in readers:
            if node not in placement.integer_pads:  # these read the codes themselves
                node.replace_input_with(index, result)
        if is_output:
            self.graph.outputs[self.graph.outputs.index(value)] = result

    def _clip(self, value: ir.Value, params: QuantParams) -> ir.Value:
        """A value cut at the ends of a grid that does not use all codes of its type."""
        name = value.name or ""
        bounds = dequantize(np.array([params.qmin, params.qmax]), params)
        ends = [
            self.initializer(f"{name}_{end}", np.asarray(bound), value.dtype or ir.DataType.FLOAT)
            for end, bound in zip(("lowest", "highest"), bounds, strict=True)
        ]
        clipped = self.node_after(value, self.node("Clip", [value, *ends], name))
        copy_type(clipped, value)
        clipped.name = fresh_name(f"{name}_clipped", self.values)
        return clipped

    def _pad_codes(self, pad: ir.Node, zero_point: ir.Value) -> ir.Value:
        """The same Pad on codes, where zero is the zero point. The float one stays for readers of floats, under another name."""
        assert pad.inputs[0] is not None
        name, pad.name = pad.name, fresh_name(f"{pad.name}/float", self.nodes)
        inputs = [self.codes[pad.inputs[0]], pad.inputs[1], zero_point, *pad.inputs[3:]]
        codes = ir.node("Pad", inputs, pad.attributes, name=name, metadata_props=dict(pad.metadata_props))
        return self.node_after(pad.outputs[0], codes)


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
    shape = numbers(weight).shape
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
