"""A model in float16: what is not an integer becomes float16, for runtimes whose networks are strongly typed.

Each node is given the element type it computes in; where a value is of another, a Cast stands between. Kept in float32:

- the graph's inputs and outputs, so callers notice nothing;
- what the ONNX standard wants in float32 (the scales of a Resize, NonMaxSuppression, Quantize/DequantizeLinear before opset 19);
- operators whose results leave float16's range for ordinary inputs (`GROWING`: a square, a sum of squares, an exponential), and the
  chain that brings them back into it (`CARRY`, up to and with a Div): a LayerNorm or a norm written out in single operators;
- operators of other domains, of sequences, and those with subgraphs;
- what reads or makes a tensor that leaves float16's range: one that `mark_wide` marked, a constant, or what codes stand for;
- a Quantize/DequantizeLinear with a scale that is not a normal float16 number (below 2^-14 it loses bits, below 2^-25 it is 0).
  TensorRT-RTX 1.7 still fuses it: a Conv between such DequantizeLinear and Cast reads int8, as with float16 scales.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from edgekit.errors import GraphError
from edgekit.graph.annotations import all_values
from edgekit.graph.magnitudes import INFINITE, WIDE
from edgekit.graph.operators import is_constant
from edgekit.quant.spec import INTEGER_RANGES

F16, F32 = ir.DataType.FLOAT16, ir.DataType.FLOAT
LARGEST = float(np.finfo(np.float16).max)
SMALLEST_NORMAL = float(np.finfo(np.float16).tiny)

MASK = 2.0**15
"""What stands for `INFINITE` in float16: far enough below every score, and a score added to it does not overflow."""

GROWING = frozenset(
    {"CumSum", "Exp", "LpNormalization", "MeanVarianceNormalization", "Pow", "ReduceL2", "ReduceLogSum"}
)
GROWING |= {"ReduceLogSumExp", "ReduceProd", "ReduceSum", "ReduceSumSquare"}
CARRY = frozenset({"Add", "Clip", "Expand", "Log", "Max", "Reciprocal", "ReduceMax", "ReduceMean", "Sqrt", "Unsqueeze"})
OWN_TYPE = frozenset({"Bernoulli", "BlackmanWindow", "ConstantOfShape", "EyeLike", "HammingWindow", "HannWindow"})
OWN_TYPE |= {"MelWeightMatrix", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
"""Operators whose output type is an attribute's business; they keep it."""

_Formals = Sequence[onnx.defs.OpSchema.FormalParameter]


def to_float16(model: ir.Model) -> ir.Model:
    """The same model computing in float16 wherever that is safe; inputs, outputs and their names stay as they are.

    Raises:
        GraphError: a tensor's element type is unknown.
    """
    model = model.clone()
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    if any(value.type is None for node in model.graph for value in node.outputs if value.name):
        common.ShapeInferencePass(check_type=False, strict_mode=False)(model)
    _Converter(model).run()
    return model


class _Converter:
    """One walk over the graph in topological order.

    Attributes:
        made_half: values whose type this walk changed from float32 to float16.
        wide: values that need float32's range until an operator of `CARRY` or a Div brings them back.
        beyond: values that leave float16's range, and codes that come from such: all that read or make them stay in float32.
        twins: a Cast of a value, or the other version of an initializer.
    """

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self.opset = model.opset_imports.get("", 1)
        self.names = {value.name for node in self.graph.all_nodes() for value in (*node.inputs, *node.outputs) if value}
        self.made_half: set[ir.Value] = set()
        self.wide: set[ir.Value] = set()
        self.beyond = {value for value in all_values(self.graph) if WIDE in value.metadata_props or _is_beyond(value)}
        self.twins: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def run(self) -> None:
        for node in list(self.graph):
            self._convert(node)
        self._restore_outputs()
        self._settle_initializers()
        for value in all_values(self.graph):
            value.metadata_props.pop(WIDE, None)

    def _convert(self, node: ir.Node) -> None:
        schema = None if self._needs_float32(node) else self._schema(node)
        for index, value in enumerate(node.inputs):
            if value is None or not _is_float(value, node):
                continue
            half = schema is not None and _takes_float16(schema.inputs, index)
            node.replace_input_with(index, self._as(value, F16) if half else self._as_before(value))
        for inner in _inner_nodes(node):
            for index, value in enumerate(inner.inputs):
                if value is not None:
                    inner.replace_input_with(index, self._as_before(value))
        if schema is not None:
            self._set_output_types(node, schema)

    def _needs_float32(self, node: ir.Node) -> bool:
        beyond = any(value in self.beyond for value in (*node.inputs, *node.outputs))
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            return self._grid_needs_float32(node, beyond)
        if beyond:
            return True
        follows = any(value in self.wide for value in node.inputs)
        square = node.op_type == "Mul" and node.inputs[0] is node.inputs[1]
        if node.op_type in GROWING or square or (node.op_type in CARRY and follows):
            self.wide.update(node.outputs)
            return True
        return node.op_type == "Div" and follows

    def _grid_needs_float32(self, node: ir.Node, beyond: bool) -> bool:
        """As for any node, and where the scale or the ends of the grid are no normal float16 numbers.

        Codes made in float32 are read in float32: on a rounded scale they would stand for other numbers.
        """
        ends = _ends(node)
        if beyond or ends > LARGEST:
            self.beyond.update(node.outputs)
        return beyond or not _scale_is_normal(node) or ends > LARGEST

    def _schema(self, node: ir.Node) -> onnx.defs.OpSchema | None:
        """The standard's word on a node's types; None for a node that keeps its types."""
        values = [value for value in (*node.inputs, *node.outputs) if value is not None and value.type is not None]
        standard = node.domain in ("", "ai.onnx") and node.op_type not in OWN_TYPE
        if not standard or _inner_nodes(node) or not all(isinstance(value.type, ir.TensorType) for value in values):
            return None
        return onnx.defs.get_schema(node.op_type, self.opset, "")

    def _set_output_types(self, node: ir.Node, schema: onnx.defs.OpSchema) -> None:
        for index, value in enumerate(node.outputs):
            if value.dtype == F32 and _takes_float16(schema.outputs, index):
                value.type = ir.TensorType(F16)
                self.made_half.add(value)
        for name in ("to", "output_dtype"):
            attribute = node.attributes.get(name)
            if attribute is not None and attribute.as_int() == F32:
                node.attributes[name] = ir.AttrInt64(name, int(F16))

    def _as_before(self, value: ir.Value) -> ir.Value:
        """`value` in the type it had before this walk."""
        return self._as(value, F32) if value in self.made_half else value

    def _as(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """`value` in `dtype`: itself, a converted initializer, or a Cast right behind its producer."""
        if value.dtype == dtype:
            return value
        key = (value, dtype)
        if key not in self.twins:
            constant = value.is_initializer() and not value.is_graph_input()
            self.twins[key] = self._half_initializer(value) if constant else self._cast(value, dtype)
        return self.twins[key]

    def _half_initializer(self, value: ir.Value) -> ir.Value:
        assert value.const_value is not None and value.name is not None
        array = _to_half(value.const_value.numpy())
        name = self._fresh(f"{value.name}_f16")
        twin = ir.Value(name=name, shape=value.shape, type=ir.TensorType(F16), const_value=ir.tensor(array, name=name))
        twin.metadata_props.update(value.metadata_props)
        self.graph.register_initializer(twin)
        return twin

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        name = self._fresh(f"{value.name}_{'f16' if dtype == F16 else 'f32'}")
        node = ir.node("Cast", [value], {"to": int(dtype)}, name=f"{name}_cast")
        result = node.outputs[0]
        result.name, result.type, result.shape = name, ir.TensorType(dtype), value.shape
        producer = value.producer()
        if producer is None:
            self.graph.insert_before(self.graph[0], node)
        else:
            self.graph.insert_after(producer, node)
        return result

    def _restore_outputs(self) -> None:
        for index, value in enumerate(self.graph.outputs):
            if value in self.made_half:
                name = value.name
                value.name = self._fresh(f"{name}_f16")
                result = self._as(value, F32)
                result.name = name
                self.graph.outputs[index] = result

    def _settle_initializers(self) -> None:
        """Drop float32 initializers that nothing reads any more; their float16 twins take their names."""
        for (value, dtype), twin in self.twins.items():
            if dtype == F16 and twin.is_initializer() and not value.uses() and not value.is_graph_output():
                assert value.name is not None
                del self.graph.initializers[value.name]
                twin.name = value.name

    def _fresh(self, name: str) -> str:
        while name in self.names:
            name += "_"
        self.names.add(name)
        return name


def _is_float(value: ir.Value, node: ir.Node) -> bool:
    if value.type is None:
        raise GraphError(
            f"tensor {value.name!r}, read by node {node.name!r} ({node.op_type}), has no element type and shape inference finds "
            'none; write it into the model\'s value_info, or set float_dtype = "float32" in the target'
        )
    return value.dtype in (F32, F16)


def _inner_nodes(node: ir.Node) -> list[ir.Node]:
    graphs = [
        attribute.as_graph() for attribute in node.attributes.values() if attribute.type == ir.AttributeType.GRAPH
    ]
    return [inner for graph in graphs for inner in graph.all_nodes()]


def _takes_float16(formals: _Formals, index: int) -> bool:
    return "tensor(float16)" in formals[min(index, len(formals) - 1)].types


def _scale_is_normal(node: ir.Node) -> bool:
    scale = node.inputs[1]
    if scale is None or scale.const_value is None or scale.is_graph_input():
        return False
    array = scale.const_value.numpy()
    return bool(np.all((array >= SMALLEST_NORMAL) & (array <= LARGEST)))


def _ends(node: ir.Node) -> float:
    """The largest magnitude that the codes of a Quantize/DequantizeLinear can stand for; 0 where the grid is computed at run time."""
    scale, zero_point = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
    if scale is None or scale.const_value is None or (zero_point is not None and zero_point.const_value is None):
        return 0.0
    codes = node.inputs[0] if node.op_type == "DequantizeLinear" else zero_point
    if (
        node.op_type == "DequantizeLinear"
        and codes is not None
        and is_constant(codes)
        and codes.const_value is not None
    ):
        numbers = codes.const_value.numpy().astype(np.int32)
        low, high = int(numbers.min(initial=0)), int(numbers.max(initial=0))
    else:
        name = "uint8" if codes is None or codes.dtype is None else codes.dtype.name.lower()
        low, high = INTEGER_RANGES.get(name, (0, 0))
    scales = scale.const_value.numpy().astype(np.float64)
    zero = (
        0 if zero_point is None or zero_point.const_value is None else zero_point.const_value.numpy().astype(np.int32)
    )
    return float(np.max(scales * np.maximum(np.abs(low - zero), np.abs(high - zero)), initial=0.0))


def _is_beyond(value: ir.Value) -> bool:
    """Whether a constant holds numbers that float16 does not have, other than infinities and what stands for them."""
    if value.dtype != F32 or not is_constant(value) or value.const_value is None or not value.const_value.size:
        return False
    magnitudes = np.abs(value.const_value.numpy())
    return bool(np.any((magnitudes > LARGEST) & (magnitudes < INFINITE)))


def _to_half(array: NDArray[np.generic]) -> NDArray[np.float16]:
    values = array.astype(np.float32)
    masked = np.isfinite(values) & (np.abs(values) >= INFINITE)
    return np.where(masked, np.sign(values) * np.float32(MASK), values).astype(np.float16)
