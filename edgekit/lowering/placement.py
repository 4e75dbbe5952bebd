"""Where Quantize/DequantizeLinear go: which tensors pass through them, and which of their readers read the result."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from edgekit.graph.annotations import get_params
from edgekit.graph.operators import Roles, is_constant
from edgekit.graph.rules import absorbed_output, pads_with_zero, quantized_nodes
from edgekit.quant.spec import QuantParams
from edgekit.target import Target

_CONVOLUTIONS = ("Conv", "ConvTranspose")


@dataclass(slots=True)
class Placement:
    """The decisions for one model and one target.

    Attributes:
        quantized: the nodes that run on codes, with their roles.
        always: Q/DQ stand on every quantized node's output, and all readers read behind them.
        redundant: Relu and Clip nodes that the grid of their output replaces.
        integer_pads: Pad nodes that run on codes.
    """

    quantized: dict[ir.Node, Roles]
    always: bool
    redundant: list[ir.Node] = field(default_factory=list)
    integer_pads: set[ir.Node] = field(default_factory=set)
    _reads: set[tuple[ir.Node, int]] = field(default_factory=set)
    _pairs: set[ir.Value] = field(default_factory=set)

    def passes_through_qdq(self, value: ir.Value) -> bool:
        """Whether a Q/DQ pair stands on a value."""
        return value in self._pairs

    def reads_quantized(self, value: ir.Value, node: ir.Node, index: int) -> bool:
        """Whether a reader of a value with a pair reads behind it."""
        return value in self._pairs and (self.always or (node, index) in self._reads)


def place(model: ir.Model, target: Target, *, keep_float: frozenset[str] = frozenset()) -> Placement:
    """Decide by the target's rules; a node whose tensors lack a grid stays float."""
    rules = target.quantization
    quantized = {
        node: parts
        for node, parts in quantized_nodes(model, target, keep_float=keep_float).items()
        if _has_grids(node, parts)
    }
    placement = Placement(quantized, always=rules.output_q == "always")
    for node, parts in quantized.items():
        for index in _read_activations(node, parts, target):
            placement._reads.add((node, index))
            placement._pairs.add(_input(node, index))
    _pass_through(model, target, placement)
    if placement.always:
        _add_outputs(placement, target)
        placement.redundant = _redundant(model, target, placement)
        # The readers of a removed activation's input read the input's new pair.
        placement._pairs.update(_input(node, 0) for node in placement.redundant)
        placement._pairs.difference_update(node.outputs[0] for node in placement.redundant)
    return placement


def _has_grids(node: ir.Node, parts: Roles) -> bool:
    indices = parts.activations if parts.weight is None else (*parts.activations, parts.weight)
    return all(get_params(node.inputs[i]) is not None for i in indices)


def _read_activations(node: ir.Node, parts: Roles, target: Target) -> tuple[int, ...]:
    """The inputs read quantized. Of an Add whose target wants only the skip connection, the one that no convolution feeds."""
    if node.op_type != "Add" or target.quantization.residual_add == "both":
        return parts.activations
    fed = [i for i in parts.activations if _fed_by_convolution(_input(node, i))]
    if not fed:
        return parts.activations
    # The later convolution is the one that the Add fuses into.
    return tuple(i for i in parts.activations if i != fed[0])


def _fed_by_convolution(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type in _CONVOLUTIONS and len(value.uses()) == 1


def _pass_through(model: ir.Model, target: Target, placement: Placement) -> None:
    """Operators that only move numbers run on codes where a quantized node reads what they make."""
    for node in reversed(list(model.graph)):
        moves = not node.domain and target.rule_for(node.op_type) == "pass_through"
        pads = target.quantization.integer_pad and pads_with_zero(node)
        if not (moves or pads) or not node.inputs or get_params(node.inputs[0]) is None or is_constant(node.inputs[0]):
            continue
        if any(output in placement._pairs for output in node.outputs) and all(get_params(o) is not None for o in node.outputs):
            placement._reads.add((node, 0))
            placement._pairs.add(_input(node, 0))
            placement._pairs.update(node.outputs)
            if pads:
                placement.integer_pads.add(node)


def _add_outputs(placement: Placement, target: Target) -> None:
    """Q/DQ on what quantized nodes make: integer kernels need to know the grid of their output.

    A Gemm or MatMul has kernels with float output too, which are kept where no quantized node reads it.
    """
    for node in placement.quantized:
        for output in node.outputs:
            value = absorbed_output(output, target)
            if get_params(value) is not None and node.op_type not in ("Gemm", "MatMul"):
                placement._pairs.add(value)


def _redundant(model: ir.Model, target: Target, placement: Placement) -> list[ir.Node]:
    found = []
    for node in model.graph:
        if node.domain or node.op_type not in target.quantization.drop_redundant or not node.inputs:
            continue
        source, output = _input(node, 0), node.outputs[0]
        producer = source.producer()
        params = get_params(output)
        if output in placement._pairs and params is not None and producer in placement.quantized and len(source.uses()) == 1:
            low, high = _clip_bounds(node)
            if low <= _real(params, params.qmin) * (1 + 1e-6) and _real(params, params.qmax) <= high * (1 + 1e-6):
                found.append(node)
    return found


def _clip_bounds(node: ir.Node) -> tuple[float, float]:
    """What a Relu or Clip lets through; nothing that a grid could lie in when a bound is computed at run time."""
    if node.op_type == "Relu":
        return 0.0, float("inf")
    bounds = [float("-inf"), float("inf")]
    for index in (1, 2):
        value = node.inputs[index] if len(node.inputs) > index else None
        if value is None:
            continue
        if not is_constant(value) or value.const_value is None:
            return float("inf"), float("-inf")
        bounds[index - 1] = float(value.const_value.numpy())
    return bounds[0], bounds[1]


def _real(params: QuantParams, code: int) -> float:
    return float((code - int(params.zero_point)) * float(params.scale))


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value
