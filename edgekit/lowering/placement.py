"""Where Quantize/DequantizeLinear go: which tensors pass through them, and which of their readers read the result."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from edgekit.graph.annotations import get_params
from edgekit.graph.operators import Roles, is_constant
from edgekit.graph.rules import absorbed_output, has_few_bits, pads_with_zero, quantized_nodes, scaled_across
from edgekit.quant.affine import quantize
from edgekit.quant.spec import QuantParams, same_grid
from edgekit.target import Target

_CONVOLUTIONS = ("Conv", "ConvTranspose")
_FLOAT_OUTPUT = ("Gemm", "MatMul")
"""Operators whose integer kernels come with a float output too."""


@dataclass(slots=True)
class Placement:
    """The decisions for one model and one target.

    Attributes:
        quantized: the nodes that run on codes, with their roles, in graph order.
        reads: the inputs, as (node, index), that are read as codes.
        shared: the values that an integer kernel makes: a Q/DQ pair stands on them, and everybody reads behind it.
        integer_pads: Pad nodes that run on codes.
        redundant: Relu and Clip nodes that saturation replaces; each comes after the node that feeds it.
    """

    quantized: dict[ir.Node, Roles]
    reads: set[tuple[ir.Node, int]] = field(default_factory=set)
    shared: set[ir.Value] = field(default_factory=set)
    integer_pads: set[ir.Node] = field(default_factory=set)
    redundant: list[ir.Node] = field(default_factory=list)

    def readers(self, value: ir.Value) -> list[tuple[ir.Node, int]]:
        """Who reads behind the Q/DQ pair of `value`."""
        uses = [(use.node, use.idx) for use in value.uses()]
        return uses if value in self.shared else [use for use in uses if use in self.reads]


def place(model: ir.Model, target: Target, *, keep_float: frozenset[str] = frozenset()) -> Placement:
    """Decide by the target's rules; a node whose tensors lack a grid stays float.

    With the rule `output_q = "always"` a pair also stands on what quantized nodes make, and on nothing else for the sake of
    float readers: these read floats where floats are made.
    """
    chosen = quantized_nodes(model, target, keep_float=keep_float)
    placement = Placement({node: parts for node, parts in chosen.items() if _has_grids(node, parts, target)})
    for node, parts in placement.quantized.items():
        placement.reads.update((node, index) for index in _read_activations(node, parts, placement, target))
    always = target.quantization.output_q == "always"
    for node in reversed(list(model.graph)):
        if node in placement.quantized:
            if not always and not _is_worth_codes(node, placement, target):
                placement.reads -= {(node, index) for index in placement.quantized.pop(node).activations}
        elif node.name not in keep_float and _hands_on(node, placement, target):
            _hand_on(node, placement, target, always=always)
    if always:
        for node in placement.quantized:
            _share_output(node, placement, target, keep_float)
    return placement


def _has_grids(node: ir.Node, parts: Roles, target: Target) -> bool:
    """Whether all that a node reads as codes has a grid and, where its kind unifies them, it is the same one as its output's.

    Scales of a weight along another axis than that of the output channels do not leave the sums: such a layer stays float.
    """
    if scaled_across(node, parts):
        return False
    indices = parts.activations if parts.weight is None else (*parts.activations, parts.weight)
    grids = [get_params(node.inputs[i]) for i in indices]
    if node.op_type in target.quantization.unify:
        grids += [get_params(output) for output in node.outputs]
        return all(grid is not None and grids[0] is not None and same_grid(grid, grids[0]) for grid in grids)
    return all(grid is not None for grid in grids)


def _read_activations(node: ir.Node, parts: Roles, placement: Placement, target: Target) -> tuple[int, ...]:
    """The inputs read as codes.

    Of an Add whose target wants only the skip connection on codes, those that no convolution feeds. Where convolutions feed
    both, the first input stays float: by convention it is the main branch, and the Add runs as the end of its convolution.
    """
    if node.op_type != "Add" or target.quantization.residual_add == "both":
        return parts.activations
    fed = [index for index in parts.activations if _only_reader_of_convolution(_input(node, index), placement)]
    return tuple(index for index in parts.activations if index not in fed[:1])


def _only_reader_of_convolution(value: ir.Value, placement: Placement) -> bool:
    producer = value.producer()
    if producer is None or producer not in placement.quantized:
        return False
    return producer.op_type in _CONVOLUTIONS and len(value.uses()) == 1 and not value.is_graph_output()


def _is_worth_codes(node: ir.Node, placement: Placement, target: Target) -> bool:
    """Whether a node that only averages or joins numbers is followed by a Q; without one, codes in front of it gain nothing.

    OpenVINO would round an average to the input's grid, and move a DequantizeLinear behind the node to a Pad.
    """
    uses = [(use.node, use.idx) for output in node.outputs for use in output.uses()]
    on_codes = [use in placement.reads for use in uses]
    if node.op_type in ("AveragePool", "GlobalAveragePool"):
        return all(on_codes) and bool(uses) and not node.outputs[0].is_graph_output()
    if node.op_type == "Concat":
        return any(on_codes) and not _reaches_float_pad(node, placement, target)
    return True


def _hands_on(node: ir.Node, placement: Placement, target: Target) -> bool:
    """Whether a node only moves numbers, between grids that exist, and somebody reads what it makes as codes."""
    moves = not node.domain and target.rule_for(node.op_type) == "pass_through"
    if not (moves or pads_with_zero(node)) or is_constant(node.inputs[0]):
        return False
    grids = [grid for value in (node.inputs[0], *node.outputs) if (grid := get_params(value)) is not None]
    if len(grids) <= len(node.outputs) or not (moves or _pads_on_codes(grids, target)):
        return False
    return any(placement.readers(output) for output in node.outputs) and not _reaches_float_pad(node, placement, target)


def _pads_on_codes(grids: list[QuantParams], target: Target) -> bool:
    """Whether a Pad between two grids runs on codes: they must be one, and the zero point what the target can pad with."""
    rule = target.quantization.integer_pad
    allowed = rule == "always" or (rule == "zero" and not grids[0].zero_point.any())
    return allowed and same_grid(grids[0], grids[1])


def _hand_on(node: ir.Node, placement: Placement, target: Target, *, always: bool) -> None:
    uses = {(use.node, use.idx) for output in node.outputs for use in output.uses()}
    on_codes_only = uses <= placement.reads and not any(output.is_graph_output() for output in node.outputs)
    beside_pad = node.op_type == "Pad" or any(reader in placement.integer_pads for reader, _ in uses)
    placement.reads.add((node, 0))
    if node.op_type == "Pad":
        placement.integer_pads.add(node)
    if always:
        placement.shared.update(node.outputs)
    elif target.quantization.pass_through_q == "before" and on_codes_only and not beside_pad:
        placement.reads -= uses


def _reaches_float_pad(node: ir.Node, placement: Placement, target: Target) -> bool:
    """Whether a Pad in float reads what a node makes, at once or behind others that move numbers.

    OpenVINO moves a DequantizeLinear in front of it behind it, and then pads with the wrong number.
    """
    if target.quantization.integer_pad == "always":
        return False
    for reader in (use.node for output in node.outputs for use in output.uses() if use.idx == 0):
        if reader.op_type == "Pad" and reader not in placement.integer_pads:
            return True
        if target.rule_for(reader.op_type) == "pass_through" and _reaches_float_pad(reader, placement, target):
            return True
    return False


def _share_output(node: ir.Node, placement: Placement, target: Target, keep_float: frozenset[str]) -> None:
    """Put a pair on what a quantized node makes; activation functions that this makes redundant are left out.

    A Gemm or MatMul has kernels with float output, which are kept where nobody reads codes. Of few bits no kernel makes codes.
    """
    for output in node.outputs:
        last = absorbed_output(output, target)
        grid = get_params(last)
        if grid is None or has_few_bits(grid) or (node.op_type in _FLOAT_OUTPUT and not placement.readers(last)):
            continue
        between = _chain(output, last)
        dropped = target.quantization.drop_redundant
        if all(one.op_type in dropped and one.name not in keep_float and _saturates(one, grid) for one in between):
            placement.redundant += between
            placement.shared.add(output)
        else:
            placement.shared.add(last)


def _chain(first: ir.Value, last: ir.Value) -> list[ir.Node]:
    """The nodes from one value to another, where each value has one reader."""
    nodes = []
    while first is not last:
        nodes.append(next(iter(first.uses())).node)
        first = nodes[-1].outputs[0]
    return nodes


def _saturates(node: ir.Node, grid: QuantParams) -> bool:
    """Whether saturation at the ends of a grid does what a Relu or Clip does: its bounds round to the first and last code."""
    bounds = _clip_bounds(node)
    if bounds is None:
        return False
    whole = replace(grid, narrow_range=False)
    codes = quantize(np.array(bounds, np.float32), whole)
    return tuple(int(code) for code in codes) == (whole.qmin, whole.qmax)


def _clip_bounds(node: ir.Node) -> tuple[float, float] | None:
    """What a Relu or Clip lets through; None for another operator, or where a bound is computed at run time."""
    if node.op_type == "Relu":
        return 0.0, float("inf")
    if node.op_type != "Clip":
        return None
    bounds = [float("-inf"), float("inf")]
    for index, value in enumerate(node.inputs[1:]):
        if value is None:
            continue
        if not is_constant(value) or value.const_value is None:
            return None
        bounds[index] = float(value.const_value.numpy().item())
    return bounds[0], bounds[1]


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value
