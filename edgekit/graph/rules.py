"""Which nodes a target runs quantized. Calibration, training and lowering all ask here, so they always agree."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import onnx_ir as ir

from edgekit.errors import TargetError
from edgekit.graph.annotations import get_params
from edgekit.graph.operators import FLOATS, LINEAR, Roles, dims, is_constant, is_float, roles
from edgekit.quant.spec import QuantParams
from edgekit.target import Target
from edgekit.words import nearest

PRECISION = "edgekit.precision"
"""The metadata key, of nodes, of `precision`."""
ACTIVATIONS = "edgekit.activations"
"""The metadata key of layers whose activations have no grid: "dynamic" where it is found at run time, "none" where they stay float."""
FEW_BITS = ("int2", "int4")
"""Precisions in which only layers read codes."""
LEAST_CODES = 128
"""Fewer are too few for what is added up."""
LEAST_TABLE = 1 << 16
"""Elements; what a smaller table would save is not worth a node."""

LEAST_RECURRENT = 1 << 14
"""The same for the weights of an operator with a memory."""
RECURRENT = ("LSTM", "GRU", "RNN")
RECURRENT_WEIGHTS = (1, 2)
"""Their inputs W `(directions, gates * hidden, inputs)` and R `(directions, gates * hidden, hidden)`."""

POOLS = ("AveragePool", "GlobalAveragePool")
_TO_SOFTMAX = (
    "Mul",
    "Div",
    "Add",
    "Sub",
    "Where",
    "Cast",
    "Clip",
    "Reshape",
    "Transpose",
    "Squeeze",
    "Unsqueeze",
    "Tanh",
)
_FROM_SOFTMAX = ("Cast", "Where", "Mul", "Reshape", "Transpose", "Dropout", "Split", "Slice")


def quantized_nodes(
    model: ir.Model, target: Target, *, keep_float: frozenset[str] = frozenset()
) -> dict[ir.Node, Roles]:
    """The nodes of the main graph that `target` runs quantized, with the roles of their inputs, in graph order.

    1. Linear operators, when the target's rules name them and their weight is a constant (or both inputs are activations).
    2. Lighter operators (Add, Mul, Concat, pools, ...) only downstream of a quantized convolution: on their own, converting to
       int8 and back costs more than they do, and a MatMul or Gemm has kernels with float output. That keeps the residual stream
       of a transformer in float, which its accuracy needs.
    3. An Add only of two tensors that are known to have the same shape: attention masks and position codes are not activations.
    4. What no layer with weights follows is post-processing, such as the decoding of boxes and scores: lighter operators but
       pools, and products of activations, stay float there.
    5. The two products of attention stay float, unless the target's rules say otherwise.
    6. A convolution of a Softmax is an expectation, such as a box distribution's: float.
    7. Lighter operators stay float where fewer than 8 bits are asked for: no runtime adds in 4, and sums need more.

    Nodes named in `keep_float`, and those whose `precision` is "float", are left out.
    """
    chosen: dict[ir.Node, Roles] = {}
    leading = _leading_to_layers(model.graph)
    convolved: set[ir.Value] = (
        set()
    )  # what comes from a quantized convolution, perhaps through operators that pass codes on
    multiplied: set[ir.Value] = set()  # the same, from a MatMul or Gemm
    for node in model.graph:
        found = _roles_if_ruled(node, target)
        kept = found is None or node.name in keep_float or precision(node) == "float"
        if not kept and found is not None and node.op_type in LINEAR:
            kept = (not _is_layer(found) and (node not in leading or _in_attention(node, target))) or _expects(node)
        elif not kept and found is not None:
            reads = {node.inputs[i] for i in found.activations}
            ends = node not in leading and node.op_type not in POOLS
            few = precision(node) in FEW_BITS or any(has_few_bits(get_params(value)) for value in reads)
            kept = ends or few or not reads & convolved or bool(reads & multiplied)
        if not kept and found is not None:
            chosen[node] = found
            (multiplied if node.op_type in ("MatMul", "Gemm") else convolved).update(node.outputs)
        elif node.inputs and passes_on(node, target):
            for family in (convolved, multiplied):
                family.update(node.outputs if node.inputs[0] in family else ())
        elif bias_of(node) in multiplied:
            multiplied.update(node.outputs)
    return chosen


def on_codes(value: ir.Value, chosen: Mapping[ir.Node, Roles], target: Target) -> bool:
    """Whether one of the quantized nodes `chosen` makes a value, perhaps with operators behind it that pass codes on."""
    node = value.producer()
    while node is not None and node not in chosen and node.inputs and passes_on(node, target):
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    return node is not None and node in chosen


def precision(node: ir.Node) -> str:
    """What was asked for this very node: "int8", "int16" or "float"; empty when nothing was."""
    return node.metadata_props.get(PRECISION, "")


def has_few_bits(params: QuantParams | None) -> bool:
    """Whether a grid has fewer than 8 bits, be they in the codes of a wider type."""
    return params is not None and params.qmax - params.qmin < LEAST_CODES


def embeddings(graph: ir.Graph) -> list[ir.Node]:
    """The Gather nodes that look up rows of a large constant table `(rows, columns)` of floats, and are its only readers."""
    return [node for node in graph if node.op_type == "Gather" and not node.domain and _looks_up(node)]


def recurrent(graph: ir.Graph) -> list[ir.Node]:
    """The LSTM, GRU and RNN nodes whose weights are constants that are worth a node."""
    return [node for node in graph if node.op_type in RECURRENT and not node.domain and _remembers(node)]


def _remembers(node: ir.Node) -> bool:
    tensors = [
        value.const_value for value in (node.inputs[i] for i in RECURRENT_WEIGHTS) if value and is_constant(value)
    ]
    known = [tensor for tensor in tensors if tensor is not None and tensor.dtype in FLOATS]
    return len(known) == len(RECURRENT_WEIGHTS) and sum(tensor.size for tensor in known) >= LEAST_RECURRENT


def _looks_up(gather: ir.Node) -> bool:
    table = gather.inputs[0]
    if not is_constant(table) or table is None or table.const_value is None or not _has_codes(table):
        return False
    rows_of_table = len(table.const_value.shape) == 2 and gather.attributes.get_int("axis", 0) == 0
    return (
        rows_of_table
        and table.const_value.size >= LEAST_TABLE
        and len(table.uses()) == 1
        and not is_constant(gather.inputs[1])
    )


def bias_of(node: ir.Node) -> ir.Value | None:
    """The value that an Add of a constant row adds to; None for any other node."""
    if node.op_type != "Add" or node.domain or len(node.inputs) != 2:
        return None
    constants = [value for value in node.inputs if is_constant(value)]
    return next((value for value in node.inputs if not is_constant(value)), None) if constants else None


def scaled_across(node: ir.Node, parts: Roles) -> bool:
    """Whether the grid that a weight came with has scales along an axis over which products are summed."""
    params = None if parts.weight is None else get_params(node.inputs[parts.weight])
    return params is not None and not params.block_size and params.axis not in (None, parts.weight_axis)


def _is_layer(parts: Roles) -> bool:
    return parts.weight is not None


def _leading_to_layers(graph: ir.Graph) -> set[ir.Node]:
    """The nodes that a layer with weights follows, near or far."""
    leading: set[ir.Node] = set()
    for node in reversed(list(graph)):
        readers = [use.node for output in node.outputs for use in output.uses()]
        if any(reader in leading or _has_weights(reader) for reader in readers):
            leading.add(node)
    return leading


def _has_weights(node: ir.Node) -> bool:
    found = roles(node) if node.op_type in LINEAR and not node.domain else None
    return found is not None and _is_layer(found) and not _expects(node)


def _in_attention(node: ir.Node, target: Target) -> bool:
    return target.quantization.attention == "float" and (_leads_to_softmax(node) or _comes_from_softmax(node))


def _leads_to_softmax(node: ir.Node, steps: int = 6) -> bool:
    readers = [use.node for output in node.outputs for use in output.uses()]
    return any(
        reader.op_type == "Softmax"
        or (steps > 0 and reader.op_type in _TO_SOFTMAX and _leads_to_softmax(reader, steps - 1))
        for reader in readers
    )


def _comes_from_softmax(node: ir.Node, steps: int = 3) -> bool:
    producers = [producer for value in node.inputs if value is not None and (producer := value.producer()) is not None]
    return any(
        producer.op_type == "Softmax"
        or (steps > 0 and producer.op_type in _FROM_SOFTMAX and _comes_from_softmax(producer, steps - 1))
        for producer in producers
    )


def _expects(node: ir.Node) -> bool:
    """Whether a convolution weighs the outcomes of a Softmax."""
    return node.op_type == "Conv" and _comes_from_softmax(node)


def check_operators(target: Target) -> None:
    """Refuse names of operators that ONNX does not have: a misspelt one would silently leave its operator in float.

    Raises:
        TargetError: with the nearest name.
    """
    rules = target.quantization
    named = {*rules.quantize, *rules.pass_through, *rules.absorb, *rules.unify}
    unknown = sorted(name for name in named if not onnx.defs.has(name))
    if unknown:
        known = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
        near = nearest(unknown[0], sorted(known), cutoff=0.6)
        hint = f"did you mean {near!r}?" if near else "see ONNX's list of operators"
        raise TargetError(f"target {target.name!r}: ONNX has no operator {unknown[0]!r}; {hint}")


def passes_on(node: ir.Node, target: Target) -> bool:
    """Whether a node hands its input's codes on: pass-through operators, absorbed activations, and Pad with zeros."""
    return not node.domain and (node.op_type in target.quantization.absorb or moves_numbers(node, target))


def absorbed_output(value: ir.Value, target: Target) -> ir.Value:
    """The value behind the activation functions that run as part of the operator that made `value`."""
    while not value.is_graph_output() and len(value.uses()) == 1:
        node = next(iter(value.uses())).node
        if node.domain or node.op_type not in target.quantization.absorb:
            break
        value = node.outputs[0]
    return value


def shares_grid(node: ir.Node, target: Target) -> list[ir.Value]:
    """The inputs and outputs of a node that must be on one grid; empty when the node ties nothing."""
    if node.domain or not node.inputs:
        return []
    if node.op_type in target.quantization.unify:
        tied = [*node.inputs, *node.outputs]
    elif moves_numbers(node, target):
        tied = [node.inputs[0], *node.outputs]
    else:
        return []
    return [value for value in tied if value is not None and is_float(value) and not is_constant(value)]


def moves_numbers(node: ir.Node, target: Target) -> bool:
    """Whether what a node makes lies in its input's range: pass-through operators (but cubic Resize), and Pad with zeros."""
    if node.domain or target.rule_for(node.op_type) != "pass_through":
        return pads_with_zero(node)
    mode = node.attributes.get("mode")
    return node.op_type != "Resize" or mode is None or mode.as_string() != "cubic"


def pads_with_zero(node: ir.Node) -> bool:
    """Whether a node is a Pad with the constant 0, which every grid can represent."""
    if node.op_type != "Pad" or node.domain:
        return False
    mode = node.attributes.get("mode")
    if mode is not None and mode.as_string() != "constant":
        return False
    value = node.inputs[2] if len(node.inputs) > 2 else None
    if value is None:
        return True
    return is_constant(value) and value.const_value is not None and not value.const_value.numpy().any()


def _roles_if_ruled(node: ir.Node, target: Target) -> Roles | None:
    if node.domain or target.rule_for(node.op_type) != "quantize":
        return None
    found = roles(node)
    if found is None or not all(_has_codes(node.inputs[i]) for i in found.activations):
        return None
    if node.op_type == "Add":
        left, right = dims(node.inputs[0]), dims(node.inputs[1])
        if left is None or left != right:
            return None
    return found


def _has_codes(value: ir.Value | None) -> bool:
    """Whether a value is a float that QuantizeLinear takes and DequantizeLinear gives: neither knows float64."""
    return value is not None and is_float(value) and value.dtype != ir.DataType.DOUBLE
