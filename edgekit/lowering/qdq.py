"""Lower tensor quant attributes to Quantize/DequantizeLinear nodes, where a target's runtime wants them."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgekit.graph.annotations import DTYPES, annotated_values, code_tensor, get_params, set_params
from edgekit.graph.operators import Roles, is_constant
from edgekit.lowering.placement import Placement, place
from edgekit.quant.affine import quantize, regrid
from edgekit.quant.spec import QuantParams
from edgekit.target import Target

_INT32_MAX = 2**31 - 1


def lower_qdq(model: ir.Model, target: Target, *, keep_float: frozenset[str] = frozenset()) -> ir.Model:
    """The annotated `model` as the Quantize/DequantizeLinear graph that `target` asks for.

    1. Activation grids are re-expressed on the target's type.
    2. `place` decides which tensors pass through Q/DQ and who reads them, by the target's rules.
    3. Weights become codes behind a DequantizeLinear; biases too where the target wants int32.
    4. Q/DQ go in; activation functions that the grid makes redundant go out.

    Nodes in `keep_float` stay float. All attributes are gone from the result.

    Raises:
        GraphError: a trained grid cannot be expressed on this target.
    """
    model = model.clone()
    _regrid(model, target)
    placement = place(model, target, keep_float=keep_float)
    for node, parts in placement.quantized.items():
        _lower_weight(model.graph, node, parts, target)
    for node in placement.redundant:
        _remove_activation(model.graph, node)
    _lower_activations(model.graph, placement)
    for value in annotated_values(model.graph):
        set_params(value, None)
    _remove_dead_initializers(model.graph)
    model.opset_imports[""] = max(model.opset_imports.get("", 0), target.graph.opset)
    return model


def _regrid(model: ir.Model, target: Target) -> None:
    spec = target.quantization.activation.spec
    for value in annotated_values(model.graph):
        params = get_params(value)
        if params is not None and not is_constant(value):
            set_params(value, regrid(params, spec))


def _lower_weight(graph: ir.Graph, node: ir.Node, parts: Roles, target: Target) -> None:
    """Put the weight, and for int32 biases the bias, of a quantized node behind DequantizeLinear."""
    if parts.weight is None:
        return
    weight = node.inputs[parts.weight]
    assert weight is not None and weight.const_value is not None
    params = get_params(weight)
    assert params is not None, "place chooses only nodes whose weight has a grid"
    real = weight.const_value.numpy().astype(np.float32)
    bias = node.inputs[parts.bias] if parts.bias is not None else None
    activation = get_params(node.inputs[parts.activations[0]])
    if bias is not None and bias.const_value is not None and activation is not None and target.quantization.bias == "int32":
        bias_real = bias.const_value.numpy().astype(np.float64).reshape(-1)
        params = _widened_for_bias(params, activation, bias_real)
        node.replace_input_with(parts.bias or 0, _bias_dequantized(graph, node, bias, bias_real, params, activation))
    node.replace_input_with(parts.weight, _weight_dequantized(graph, node, weight, real, params))


def _widened_for_bias(params: QuantParams, activation: QuantParams, bias: NDArray[np.float64]) -> QuantParams:
    """Weight scales large enough for the bias to fit int32 on the accumulator's grid (dead channels have tiny ones)."""
    if params.fixed:
        return params
    needed = (np.abs(bias) / (float(activation.scale) * (_INT32_MAX // 2))).astype(np.float32)
    scale = np.maximum(params.scale, needed if params.scale.ndim else needed.max(initial=0.0)).astype(np.float32)
    return dataclasses.replace(params, scale=scale)


def _bias_dequantized(
    graph: ir.Graph, node: ir.Node, bias: ir.Value, real: NDArray[np.float64], params: QuantParams, activation: QuantParams
) -> ir.Value:
    # The product is taken in float32: ONNX Runtime fuses only where scale(bias) == scale(x) * scale(w) to float rounding.
    scale = (activation.scale * params.scale).astype(np.float32)
    codes = np.clip(np.rint(real / scale.astype(np.float64)), -_INT32_MAX, _INT32_MAX).astype(np.int64)
    grid = QuantParams("int32", scale, np.zeros(scale.shape, np.int64), 0 if scale.ndim else None)
    assert bias.const_value is not None
    return _dequantized(graph, node, f"{bias.name}_{node.name}", codes.reshape(bias.const_value.shape), grid)


def _weight_dequantized(
    graph: ir.Graph, node: ir.Node, weight: ir.Value, real: NDArray[np.float32], params: QuantParams
) -> ir.Value:
    name = weight.name or ""
    known = graph.initializers.get(f"{name}_quantized")
    if known is not None and known.uses():
        shared = known.uses()[0].node
        same = shared.inputs[1]
        if same is not None and same.const_value is not None and np.array_equal(same.const_value.numpy(), params.scale):
            return shared.outputs[0]
        name = f"{name}_{node.name}"
    return _dequantized(graph, node, name, quantize(real, params).astype(np.int64), params)


def _dequantized(graph: ir.Graph, node: ir.Node, name: str, codes: NDArray[np.int64], params: QuantParams) -> ir.Value:
    """Codes as an initializer, and a DequantizeLinear before `node` that reads it."""
    stored = _initializer(graph, f"{name}_quantized", codes, DTYPES[params.dtype])
    dequantize = ir.node(
        "DequantizeLinear",
        [stored, *_grid_inputs(graph, name, params)],
        {} if params.axis is None else {"axis": params.axis},
        name=f"{name}/DequantizeLinear",
    )
    graph.insert_before(node, dequantize)
    output = dequantize.outputs[0]
    output.name = f"{name}_dequantized"
    output.shape, output.dtype = ir.Shape(codes.shape), ir.DataType.FLOAT
    return output


def _grid_inputs(graph: ir.Graph, name: str, params: QuantParams) -> list[ir.Value]:
    zero_point = np.broadcast_to(params.zero_point, params.scale.shape)
    return [
        _initializer(graph, f"{name}_scale", params.scale, ir.DataType.FLOAT),
        _initializer(graph, f"{name}_zero_point", zero_point, DTYPES[params.dtype]),
    ]


def _initializer(graph: ir.Graph, name: str, array: NDArray[np.generic], dtype: ir.DataType) -> ir.Value:
    known = graph.initializers.get(name)
    if known is not None:
        return known
    value = ir.Value(name=name, const_value=code_tensor(np.asarray(array), dtype, name))
    value.shape, value.dtype = ir.Shape(array.shape), dtype
    graph.register_initializer(value)
    return value


def _remove_activation(graph: ir.Graph, node: ir.Node) -> None:
    """Take out a Relu or Clip; its input takes over its output's name, readers and grid."""
    source, output = node.inputs[0], node.outputs[0]
    assert source is not None
    name, params = output.name, get_params(output)
    output.replace_all_uses_with(source, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    source.name = name
    set_params(source, params)


def _lower_activations(graph: ir.Graph, placement: Placement) -> None:
    coded: dict[ir.Value, ir.Value] = {}  # what a DequantizeLinear makes -> its codes
    values = [*graph.inputs, *(output for node in list(graph) for output in node.outputs)]
    for value in values:
        if placement.passes_through_qdq(value):
            _insert_pair(graph, value, placement, coded)


def _insert_pair(graph: ir.Graph, value: ir.Value, placement: Placement, coded: dict[ir.Value, ir.Value]) -> None:
    params = get_params(value)
    assert params is not None
    readers = [(use.node, use.idx) for use in value.uses() if placement.reads_quantized(value, use.node, use.idx)]
    becomes_output = value.is_graph_output() and placement.always
    name = value.name or ""
    source = value
    if becomes_output:
        value.name = f"{name}_float"
    grid = _grid_inputs(graph, name, params)
    producer = value.producer()
    pad = producer if producer is not None and producer in placement.integer_pads else None
    if pad is not None and pad.inputs[0] is not None and pad.inputs[0] in coded:
        codes = _pad_codes(graph, pad, coded[pad.inputs[0]], params, name)
        anchor = codes.producer()
    else:
        quantize_node = ir.node("QuantizeLinear", [source, *grid], name=f"{name}/QuantizeLinear")
        codes = quantize_node.outputs[0]
        codes.name = f"{name}_quantized"
        _place_after(graph, source, quantize_node)
        anchor = quantize_node
    codes.shape, codes.dtype = value.shape, DTYPES[params.dtype]
    dequantize_node = ir.node("DequantizeLinear", [codes, *grid], name=f"{name}/DequantizeLinear")
    output = dequantize_node.outputs[0]
    output.shape, output.dtype = value.shape, value.dtype or ir.DataType.FLOAT
    coded[output] = codes
    assert anchor is not None
    graph.insert_after(anchor, dequantize_node)
    for node, index in readers:
        node.replace_input_with(index, output)
    if becomes_output:
        graph.outputs[graph.outputs.index(value)] = output
        output.name = name
    else:
        output.name = f"{name}_dequantized"
    if pad is not None and not value.uses() and not value.is_graph_output():
        graph.remove(pad, safe=True)


def _pad_codes(graph: ir.Graph, pad: ir.Node, source: ir.Value, params: QuantParams, name: str) -> ir.Value:
    """The same Pad on codes: zero is the zero point there."""
    zero = _grid_inputs(graph, name, params)[1]
    extra = pad.inputs[3:]
    codes = ir.node("Pad", [source, pad.inputs[1], zero, *extra], {"mode": "constant"}, name=pad.name)
    codes.outputs[0].name = f"{name}_quantized"
    graph.insert_after(pad, codes)
    return codes.outputs[0]


def _place_after(graph: ir.Graph, value: ir.Value, node: ir.Node) -> None:
    producer = value.producer()
    if producer is not None:
        graph.insert_after(producer, node)
    else:
        first = next(iter(graph), None)
        assert first is not None
        graph.insert_before(first, node)


def _remove_dead_initializers(graph: ir.Graph) -> None:
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
            del graph.initializers[name]
