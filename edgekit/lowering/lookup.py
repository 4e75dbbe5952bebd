"""Functions of one quantized tensor as a table of 256 codes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from edgekit.lowering.units import CODE_RANGES, Operand, Unit, constant

UNARY = frozenset(
    {
        "Abs",
        "Ceil",
        "Celu",
        "Clip",
        "Cos",
        "Elu",
        "Erf",
        "Exp",
        "Floor",
        "Gelu",
        "HardSigmoid",
        "HardSwish",
        "LeakyRelu",
        "Log",
        "Mish",
        "Neg",
        "Reciprocal",
        "Relu",
        "Round",
        "Selu",
        "Sigmoid",
        "Sign",
        "Sin",
        "Softplus",
        "Softsign",
        "Sqrt",
        "Swish",
        "Tanh",
        "ThresholdedRelu",
    }
)
SCALAR_BINARY = frozenset({"Add", "Div", "Max", "Min", "Mul", "PRelu", "Pow", "Sub"})
"""Operators of two inputs that a table covers where the other input is one constant number."""

OPSET = 21


def has_table(unit: Unit) -> bool:
    """Whether the unit maps each input code to one output code, whatever its position."""
    if unit.node.op_type not in UNARY | SCALAR_BINARY or len(unit.node.outputs) != 1:
        return False
    numbers = [_number(unit, place) for place in range(len(unit.inputs))]
    present = [place for place, value in enumerate(unit.node.inputs) if value is not None]
    varying = [place for place in present if numbers[place] is None]
    return len(varying) == 1 and _is_activation(unit, varying[0])


def argument(unit: Unit) -> Operand:
    """The one input that is no constant number."""
    places = [
        place for place in range(len(unit.inputs)) if _number(unit, place) is None and _is_activation(unit, place)
    ]
    found = unit.inputs[places[0]]
    assert found is not None
    return found


def table(unit: Unit) -> NDArray[np.generic]:
    """The output codes of all input codes, shape `(256,)`, found by running the float operators on them.

    Entry `code` serves code `code` and entry `256 + code` a negative one, so that Gather, which counts negative
    indices from the end, takes codes of either type as they are.
    """
    source = argument(unit)
    assert source.dtype is not None
    low, high = CODE_RANGES[source.dtype]
    codes = np.arange(low, high + 1, dtype=np.float32)
    reals = (codes - np.float32(source.zero_points)) * np.float32(source.scales)
    return np.roll(_evaluate(unit, reals), low)


def _evaluate(unit: Unit, reals: NDArray[np.float32]) -> NDArray[np.generic]:
    """The operator, its clips and its QuantizeLinear on `reals`, in ONNX Runtime with nothing optimized."""
    assert unit.output is not None
    assert unit.output.dtype is not None
    x = ir.val("reals", ir.DataType.FLOAT, [reals.size])
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": OPSET}, name="table")
    value = x
    for step, node in enumerate((unit.node, *unit.clips)):
        inputs = [
            None if old is None else _initializer(graph, f"{step}_{place}", number) if number is not None else value
            for place, old in enumerate(node.inputs)
            for number in [_number(unit, place) if step == 0 else constant(old)]
        ]
        value = _append(graph, node.op_type, inputs, dict(node.attributes))
    scale = _initializer(graph, "scale", unit.output.scales.astype(np.float32))
    zero_point = _initializer(graph, "zero_point", unit.output.zero_points.astype(unit.output.dtype.numpy()))
    codes = _append(graph, "QuantizeLinear", [value, scale, zero_point], {})
    codes.dtype, codes.shape = unit.output.dtype, ir.Shape([reals.size])
    graph.outputs.append(codes)
    return _run(ir.Model(graph, ir_version=10), {"reals": reals})


def _append(graph: ir.Graph, op_type: str, inputs: list[ir.Value | None], attributes: dict[str, ir.Attr]) -> ir.Value:
    node = ir.node(op_type, inputs, attributes)
    graph.append(node)
    return node.outputs[0]


def _initializer(graph: ir.Graph, name: str, array: NDArray[np.generic]) -> ir.Value:
    value = ir.val(name, const_value=ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value


def _run(model: ir.Model, feeds: dict[str, NDArray[np.float32]]) -> NDArray[np.generic]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    content = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feeds)[0])


def _number(unit: Unit, place: int) -> NDArray[np.generic] | None:
    """Input `place` as a float32 scalar, where it is one constant number."""
    found = unit.inputs[place]
    values = constant(unit.node.inputs[place]) if found is None else found.constant_reals()
    if values is None or values.size != 1:
        return None
    return values.reshape(()).astype(np.float32)


def _is_activation(unit: Unit, place: int) -> bool:
    found = unit.inputs[place]
    return found is not None and found.per_tensor and found.dtype in CODE_RANGES
