"""Write operators that compute on codes as the float operators, between Quantize- and DequantizeLinear, that they stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from edgekit.errors import GraphError
from edgekit.graph.annotations import all_values, fresh_name
from edgekit.graph.operators import copy_type, int_attribute, is_constant
from edgekit.quant.packed import Array, unpacked, with_positive_scales

CONTRIB = "com.microsoft"
FLOAT = ir.DataType.FLOAT
_N_BITS = {"K": 0, "N": 0, "bits": 4, "block_size": 0}
"""The attributes of MatMulNBits, with their defaults."""


def expand_integer(model: ir.Model) -> ir.Model:
    """`QLinear*`, `*Integer` and ONNX Runtime's own quantized operators as what they compute, so that grids can be folded.

    1. `QLinearConv`, `QLinearMatMul`, `QGemm`, `QLinearAdd`, ...: DequantizeLinear on what they read, QuantizeLinear on their output.
    2. A product of codes that DynamicQuantizeLinear makes of floats reads the floats; the Cast and Mul that scaled it back go.
    3. `DynamicQuantizeMatMul`, `MatMulIntegerToFloat`, `MatMulNBits`: floats, and a weight behind DequantizeLinear.
    4. `DynamicQuantizeLSTM`: an LSTM with float weights. `GatherBlockQuantized`: a Gather from a float table.

    Raises:
        GraphError: an operator that is none of them, or in a form whose meaning depends on more than its grids.
    """
    if not any(computes_on_codes(node) for node in model.graph):
        return model
    model = model.clone()
    expand = _Expand(model.graph)
    for node in list(model.graph):
        if computes_on_codes(node):
            write = _WRITERS.get(node.op_type)
            if write is None:
                raise _refusal(node, "as no float operator does")
            write(expand, node)
    common.RemoveUnusedNodesPass()(model)
    common.TopologicalSortPass()(model)
    return model


def computes_on_codes(node: ir.Node) -> bool:
    """Whether an operator multiplies, adds or averages quantized numbers, by its name."""
    if node.domain not in ("", "ai.onnx", CONTRIB, "com.ms.internal.nhwc"):
        return False
    name = node.op_type
    return (
        name.startswith(("QLinear", "QGemm", "QAttention", "QEmbed", "QOrdered", "QMoE"))
        or name.endswith(("Integer", "IntegerToFloat", "NBits", "BlockQuantized"))
        or (name.startswith("DynamicQuantize") and name != "DynamicQuantizeLinear")
    )


class _Expand:
    """Writes nodes in front of the one that they replace, which keeps its name and metadata in the float operator."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.taken = {value.name for value in all_values(graph)}

    def float_of(self, node: ir.Node, index: int, axis: int | None = None) -> ir.Value:
        """The floats that the codes in input `index` stand for; scale and zero point are the two inputs behind it."""
        codes, scale, zero = (_input(node, i) for i in range(index, index + 3))
        return self.dequantized(node, codes, scale, zero, axis)

    def dequantized(
        self, node: ir.Node, codes: ir.Value | None, scale: ir.Value | None, zero: ir.Value | None, axis: int | None
    ) -> ir.Value:
        """A DequantizeLinear in front of `node`."""
        attributes = {} if axis is None else {"axis": axis}
        return self.write(node, "DequantizeLinear", [codes, scale, zero], attributes, "dequantized")

    def constant(self, name: str, array: Array, dtype: ir.DataType | None = None) -> ir.Value:
        """An initializer, of another type than the array's if asked for."""
        name = fresh_name(name, self.taken)
        numbers = np.ascontiguousarray(array if dtype is None else array.astype(dtype.numpy()))
        value = ir.val(name, const_value=ir.tensor(numbers, dtype=dtype, name=name))
        self.graph.register_initializer(value)
        return value

    def write(
        self,
        node: ir.Node,
        op_type: str,
        inputs: list[ir.Value | None],
        attributes: Mapping[str, int | float] | None = None,
        suffix: str = "",
    ) -> ir.Value:
        """A node in front of `node`; its output's type is float."""
        name = fresh_name(f"{node.name}/{suffix}", self.taken)
        written = ir.node(op_type, inputs, dict(attributes or {}), name=name)
        output = written.outputs[0]
        output.name, output.type = name, ir.TensorType(FLOAT)
        self.graph.insert_before(node, written)
        return output

    def operator(
        self, node: ir.Node, op_type: str, inputs: list[ir.Value | None], drop: tuple[str, ...] = ()
    ) -> ir.Value:
        """The float operator itself, with the attributes, name and metadata of `node`."""
        attributes = {name: attribute for name, attribute in node.attributes.items() if name not in drop}
        written = ir.node(op_type, inputs, attributes, name=node.name, metadata_props=dict(node.metadata_props))
        output = written.outputs[0]
        output.name, output.type = fresh_name(f"{node.outputs[0].name}_float", self.taken), ir.TensorType(FLOAT)
        output.shape = node.outputs[0].shape
        self.graph.insert_before(node, written)
        return output

    def quantize(self, node: ir.Node, result: ir.Value, scale: int) -> None:
        """Let a QuantizeLinear with the grid in inputs `scale` and `scale + 1` make what `node` made."""
        grid = [_input(node, scale), _input(node, scale + 1)]
        written = ir.node("QuantizeLinear", [result, *grid], name=f"{node.name}/quantized")
        self.graph.insert_before(node, written)
        self.replace(node, written.outputs[0])

    def replace(self, node: ir.Node, new: ir.Value) -> None:
        """Let the readers of a node's only output read `new`, under the same name, and drop the node."""
        old = node.outputs[0]
        copy_type(new, old)
        name, old.name = old.name, None
        new.name = name
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)


def _refusal(node: ir.Node, how: str) -> GraphError:
    return GraphError(
        f"node {node.name!r} ({node.op_type}) computes on codes, {how}: give the float model, or the file before it was turned into "
        "integer operators"
    )


def _conv(expand: _Expand, node: ir.Node) -> None:
    _check_channels(node)
    x, w = expand.float_of(node, 0), expand.float_of(node, 3, axis=0)
    bias = _bias(expand, node, 8, (1, 4), 1.0)
    expand.quantize(node, expand.operator(node, "Conv", [x, w, *([bias] if bias else [])]), 6)


def _matmul(expand: _Expand, node: ir.Node) -> None:
    a, b = expand.float_of(node, 0), expand.float_of(node, 3, axis=_columns(_input(node, 3)))
    expand.quantize(node, expand.operator(node, "MatMul", [a, b]), 6)


def _gemm(expand: _Expand, node: ir.Node) -> None:
    a = expand.float_of(node, 0)
    b = expand.float_of(node, 3, axis=0 if int_attribute(node, "transB", 0) else 1)
    bias = _bias(expand, node, 6, (1, 4), node.attributes.get_float("alpha", 1.0))
    result = expand.operator(node, "Gemm", [a, b, *([bias] if bias else [])])
    if _input(node, 7) is None:
        expand.replace(node, result)
    else:
        expand.quantize(node, result, 7)


def _binary(op_type: str) -> Callable[[_Expand, ir.Node], None]:
    def write(expand: _Expand, node: ir.Node) -> None:
        expand.quantize(node, expand.operator(node, op_type, [expand.float_of(node, 0), expand.float_of(node, 3)]), 6)

    return write


def _unary(op_type: str) -> Callable[[_Expand, ir.Node], None]:
    def write(expand: _Expand, node: ir.Node) -> None:
        _check_channels(node)
        if op_type == "Softmax" and int_attribute(node, "opset", 13) < 13:
            raise _refusal(node, "with the axes of opset 12 and older")
        drop = ("channels_last", "opset")
        expand.quantize(node, expand.operator(node, op_type, [expand.float_of(node, 0)], drop), 3)

    return write


def _mean(expand: _Expand, node: ir.Node) -> None:
    inputs: list[ir.Value | None] = [expand.float_of(node, 0)]
    axes = node.attributes.get("axes")
    if axes is not None:  # from opset 18 on they are an input
        inputs.append(expand.constant(f"{node.name}/axes", np.array(axes.as_ints(), np.int64)))
    expand.quantize(node, expand.operator(node, "ReduceMean", inputs, ("axes",)), 3)


def _concat(expand: _Expand, node: ir.Node) -> None:
    inputs: list[ir.Value | None] = [expand.float_of(node, index) for index in range(2, len(node.inputs), 3)]
    expand.quantize(node, expand.operator(node, "Concat", inputs), 0)


def _where(expand: _Expand, node: ir.Node) -> None:
    inputs = [_input(node, 0), expand.float_of(node, 1), expand.float_of(node, 4)]
    expand.quantize(node, expand.operator(node, "Where", inputs), 7)


def _dynamic(op_type: str) -> Callable[[_Expand, ir.Node], None]:
    """`x -> DynamicQuantizeLinear -> {op_type}Integer -> Cast -> Mul by both scales`, of which the Mul is replaced."""

    def write(expand: _Expand, node: ir.Node) -> None:
        source = _dynamic_source(_input(node, 0))
        scaled = _scaled_back(node)
        if source is None or scaled is None:
            raise _refusal(
                node, "and no DynamicQuantizeLinear in front with a Cast and Mul behind says what they stand for"
            )
        mul, scale = scaled
        axis = 0 if op_type == "Conv" else _columns(_input(node, 1))
        weight = expand.dequantized(node, _input(node, 1), scale, _input(node, 3), axis)
        expand.replace(mul, expand.operator(node, op_type, [source, weight]))

    return write


def _dynamic_matmul(expand: _Expand, node: ir.Node) -> None:
    b, scale, zero, bias = (_input(node, index) for index in range(1, 5))
    _product(expand, node, _input(node, 0), expand.dequantized(node, b, scale, zero, _columns(b)), bias)


def _matmul_to_float(expand: _Expand, node: ir.Node) -> None:
    a, b, a_scale, b_scale, a_zero, b_zero, bias = (_input(node, index) for index in range(7))
    source = _dynamic_source(a) or expand.dequantized(node, a, a_scale, a_zero, None)
    _product(expand, node, source, expand.dequantized(node, b, b_scale, b_zero, _columns(b)), bias)


def _product(expand: _Expand, node: ir.Node, a: ir.Value | None, b: ir.Value, bias: ir.Value | None) -> None:
    result = expand.operator(node, "MatMul", [a, b])
    expand.replace(node, result if bias is None else expand.write(node, "Add", [result, bias], suffix="bias"))


def _lstm(expand: _Expand, node: ir.Node) -> None:
    """Weights `(directions, inputs, 4 * hidden)` with a scale for each direction, or each of its columns; LSTM has them transposed."""
    if not all(is_constant(_input(node, i)) for i in (1, 2, 8, 9, 10, 11)):
        raise _refusal(node, "with weights that are computed at run time")
    weights = [_lstm_weight(expand, node, 1, 8), _lstm_weight(expand, node, 2, 10)]
    inputs = [_input(node, 0), *weights, *(_input(node, index) for index in range(3, 8))]
    written = ir.node(
        "LSTM", inputs, node.attributes, num_outputs=len(node.outputs), name=node.name,
        metadata_props=dict(node.metadata_props),
    )  # fmt: skip
    expand.graph.insert_before(node, written)
    for old, new in zip(node.outputs, written.outputs, strict=True):
        copy_type(new, old)
        name, old.name = old.name, None
        new.name = name
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    expand.graph.remove(node, safe=True)


def _lstm_weight(expand: _Expand, node: ir.Node, codes: int, scale: int) -> ir.Value:
    numbers, scales, zeros = (_constant(_input(node, index)) for index in (codes, scale, scale + 1))
    rows = (len(numbers), 1, -1)
    array = (numbers.astype(np.float32) - zeros.astype(np.float32).reshape(rows)) * scales.reshape(rows)
    return expand.constant(f"{node.name}/{'W' if codes == 1 else 'R'}", array.transpose(0, 2, 1).astype(np.float32))


def _n_bits(expand: _Expand, node: ir.Node) -> None:
    """A weight `(N, blocks, bytes)` of packed codes, scales `(N, blocks)`; the middle code is zero where no zero points are given.

    Where all zero points are the middle, codes are written as signed ones, which more runtimes take.
    """
    rows, columns, bits, size = (int_attribute(node, key, default) for key, default in _N_BITS.items())
    scales, zeros = _input(node, 2), _input(node, 3)
    constants = all(is_constant(value) for value in (_input(node, 1), scales, *([zeros] if zeros else [])))
    if not constants or _input(node, 4) is not None or (zeros is not None and zeros.dtype != ir.DataType.UINT8):
        raise _refusal(
            node, "with zero points that are no codes, blocks in another order, or weights computed at run time"
        )
    blocks, middle = -(-rows // size), 1 << (bits - 1)
    scale = _constant(scales).reshape(columns, blocks)
    codes = unpacked(_constant(_input(node, 1)).reshape(columns, -1), bits)[:, :rows].astype(np.int16)
    offsets = np.full((columns, blocks), middle, np.int16)
    if zeros is not None:
        offsets = unpacked(_constant(zeros).reshape(columns, -1), bits)[:, :blocks].astype(np.int16)
    codes, scale, offsets = with_positive_scales(codes, scale, offsets, bits=bits, block_size=size)
    signed = bool((offsets == middle).all())
    dtype = ir.DataType[f"{'INT' if signed else 'UINT'}{bits}"]
    shift = middle if signed else 0
    weight = expand.constant(f"{node.name}/weight", (codes - shift).T, dtype)
    step = expand.constant(f"{node.name}/scale", scale.T.astype(_constant(scales).dtype))
    zero = expand.constant(f"{node.name}/zero", (offsets - shift).T, dtype)
    floats = expand.write(
        node, "DequantizeLinear", [weight, step, zero], {"axis": 0, "block_size": size}, "dequantized"
    )
    drop = tuple(node.attributes)
    result = expand.operator(node, "MatMul", [_input(node, 0), floats], drop)
    bias = _input(node, 5)
    expand.replace(node, result if bias is None else expand.write(node, "Add", [result, bias], suffix="bias"))


def _gather_blocks(expand: _Expand, node: ir.Node) -> None:
    """A table in blocks along its last axis becomes floats: it gets a scale for each row like any other table."""
    axis, last = int_attribute(node, "quantize_axis", 1), int_attribute(node, "gather_axis", 0)
    table, scales, zeros = _input(node, 0), _input(node, 2), _input(node, 3)
    if not all(is_constant(value) for value in (table, scales, *([zeros] if zeros else []))):
        raise _refusal(node, "with a table that is computed at run time")
    codes, step = _constant(table), _constant(scales).astype(np.float32)
    if table is None or axis != codes.ndim - 1 or last == axis or codes.ndim != 2:
        raise _refusal(node, "in blocks along another axis than the last one of two")
    packed, bits = table.dtype == ir.DataType.UINT8, int_attribute(node, "bits", 4)
    offset: Array = np.array((1 << (bits - 1)) if packed else 0, np.float32)
    if zeros is not None:
        numbers = unpacked(_constant(zeros), bits)[:, : step.shape[1]] if packed else _constant(zeros)
        offset = numbers.astype(np.float32)
    size = int_attribute(node, "block_size", 128)
    numbers = (unpacked(codes, bits) if packed else codes).astype(np.float32)
    block = np.arange(numbers.shape[1]) // size
    offset = offset[:, block] if offset.ndim else offset
    floats = expand.constant(f"{node.name}/table", (numbers - offset) * step[:, block])
    drop = tuple(node.attributes)
    expand.replace(node, expand.operator(node, "Gather", [floats, _input(node, 1)], drop))


def _bias(expand: _Expand, node: ir.Node, index: int, scales: tuple[int, int], factor: float) -> ir.Value | None:
    """An int32 bias as floats: its scale is the product of the inputs' scales."""
    codes = _input(node, index)
    if codes is None:
        return None
    if not all(is_constant(_input(node, i)) for i in (index, *scales)):
        raise _refusal(node, "with a bias or a scale that is computed at run time")
    numbers = [_constant(_input(node, i)) for i in scales]
    scale = (numbers[0] * numbers[1]).astype(np.float32).reshape(-1) * np.float32(factor)
    array = _constant(codes).astype(np.float32) * (scale if scale.size > 1 else scale[0])
    return expand.constant(f"{codes.name}_float", array.astype(np.float32))


def _dynamic_source(codes: ir.Value | None) -> ir.Value | None:
    """The floats that DynamicQuantizeLinear made codes of."""
    producer = None if codes is None else codes.producer()
    return producer.inputs[0] if producer is not None and producer.op_type == "DynamicQuantizeLinear" else None


def _scaled_back(product: ir.Node) -> tuple[ir.Node, ir.Value] | None:
    """The Mul that makes floats of an integer product, and the weight's scale."""
    cast = _only_reader(product)
    mul = _only_reader(cast) if cast is not None and cast.op_type == "Cast" else None
    if cast is None or mul is None or mul.op_type != "Mul":
        return None
    scales = next((value for value in mul.inputs if value is not cast.outputs[0]), None)
    both = None if scales is None else scales.producer()
    if both is None or both.op_type != "Mul":
        return None
    weight = [value for value in both.inputs if is_constant(value)]
    dynamic = [value for value in both.inputs if value is not None and not is_constant(value)]
    quantize = product.inputs[0].producer() if product.inputs[0] is not None else None
    if len(weight) != 1 or len(dynamic) != 1 or dynamic[0].producer() is not quantize or weight[0] is None:
        return None
    return mul, weight[0]


def _only_reader(node: ir.Node) -> ir.Node | None:
    uses = list(node.outputs[0].uses())
    return uses[0].node if len(uses) == 1 and not node.outputs[0].is_graph_output() else None


def _check_channels(node: ir.Node) -> None:
    if int_attribute(node, "channels_last", 0) or node.domain == "com.ms.internal.nhwc":
        raise _refusal(node, "with channels last, which ONNX Runtime does to files that it optimizes")


def _columns(matrix: ir.Value | None) -> int:
    """The axis that a MatMul's second input has its scales along."""
    return 1 if matrix is None or matrix.shape is None else len(matrix.shape) - 1


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _constant(value: ir.Value | None) -> Array:
    assert value is not None and value.const_value is not None
    return value.const_value.numpy()


_WRITERS: Mapping[str, Callable[[_Expand, ir.Node], None]] = {
    "QLinearConv": _conv,
    "QLinearMatMul": _matmul,
    "QGemm": _gemm,
    "QLinearAdd": _binary("Add"),
    "QLinearMul": _binary("Mul"),
    "QLinearAveragePool": _unary("AveragePool"),
    "QLinearGlobalAveragePool": _unary("GlobalAveragePool"),
    "QLinearLeakyRelu": _unary("LeakyRelu"),
    "QLinearSigmoid": _unary("Sigmoid"),
    "QLinearSoftmax": _unary("Softmax"),
    "QLinearReduceMean": _mean,
    "QLinearConcat": _concat,
    "QLinearWhere": _where,
    "MatMulInteger": _dynamic("MatMul"),
    "ConvInteger": _dynamic("Conv"),
    "DynamicQuantizeMatMul": _dynamic_matmul,
    "MatMulIntegerToFloat": _matmul_to_float,
    "DynamicQuantizeLSTM": _lstm,
    "MatMulNBits": _n_bits,
    "GatherBlockQuantized": _gather_blocks,
}
