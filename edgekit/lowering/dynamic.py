"""Matrix products on codes whose activations get their scale at inference: DynamicQuantizeLinear and MatMulInteger."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgekit.graph.annotations import DTYPES, fresh_name
from edgekit.graph.operators import int_attribute
from edgekit.lowering.grid_writer import GridWriter, numbers
from edgekit.lowering.writer import node_name, replace_value
from edgekit.quant.affine import constant_codes
from edgekit.quant.spec import QuantParams

FLOAT = ir.DataType.FLOAT


def suits(node: ir.Node, weight: ir.Value, params: QuantParams) -> bool:
    """Whether a layer can read codes of 8 bits: a plain MatMul or Gemm of float32, its weight with one scale for each column."""
    plain = all(node.attributes.get_float(name, 1.0) == 1.0 for name in ("alpha", "beta"))
    floats = weight.dtype in (None, FLOAT) and node.op_type in ("MatMul", "Gemm")
    return floats and plain and params.dtype in ("int8", "uint8") and not params.block_size


class DynamicWriter:
    """Writes integer products; what several layers read is quantized once, and what they share is stored once.

    ONNX Runtime makes one node, DynamicQuantizeMatMul, of all that is written for a layer and its bias, or MatMulIntegerToFloat
    of all but a DynamicQuantizeLinear that several layers read.

    Attributes:
        quantized: a float value -> its codes, scale and zero point.
        stored: a weight, as it is or transposed -> codes, scale and zero point.
    """

    def __init__(self, writer: GridWriter) -> None:
        self.writer = writer
        self.quantized: dict[ir.Value, tuple[ir.Value, ...]] = {}
        self.stored: dict[tuple[ir.Value, bool], tuple[ir.Value, ...]] = {}

    def lower(self, node: ir.Node, weight: ir.Value, params: QuantParams) -> None:
        """Let a layer multiply codes: `(float32(x_codes * w_codes) * (x_scale * w_scale)) + bias`."""
        writer, name, source, old = self.writer, node_name(node), node.inputs[0], node.outputs[0]
        assert source is not None
        codes, scale, zero_point = self._quantize(source)
        transpose = node.op_type == "Gemm" and int_attribute(node, "transB", 0) == 1
        w_codes, w_scale, w_zero = self._store(weight, params, transpose=transpose)
        product = ir.node(
            "MatMulInteger", [codes, w_codes, zero_point, w_zero], name=node.name, metadata_props=node.metadata_props
        )
        node.name = None
        cast = writer.node("Cast", [product.outputs[0]], name, {"to": int(FLOAT)})
        scales = writer.node("Mul", [scale, w_scale], f"{name}_scale")
        nodes = [product, cast, scales, writer.node("Mul", [cast.outputs[0], scales.outputs[0]], name)]
        bias = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
        if bias is not None:
            nodes.append(writer.node("Add", [nodes[-1].outputs[0], bias], name))
        writer.graph.insert_before(node, nodes)
        replace_value(old, nodes[-1].outputs[0])

    def _quantize(self, source: ir.Value) -> tuple[ir.Value, ...]:
        if source not in self.quantized:
            name = str(source.name)
            attributed = ir.node(
                "DynamicQuantizeLinear",
                [source],
                num_outputs=3,
                name=fresh_name(f"{name}/DynamicQuantizeLinear", self.writer.nodes),
            )
            self.writer.node_after(source, attributed)
            for output, suffix in zip(attributed.outputs, ("quantized", "scale", "zero_point"), strict=True):
                output.name = fresh_name(f"{name}_{suffix}", self.writer.values)
            self.quantized[source] = tuple(attributed.outputs)
        return self.quantized[source]

    def _store(self, weight: ir.Value, params: QuantParams, *, transpose: bool) -> tuple[ir.Value, ...]:
        key = (weight, transpose)
        if key not in self.stored:
            codes, name, dtype = constant_codes(numbers(weight), params), str(weight.name), DTYPES[params.dtype]
            zero_point = params.zero_point if params.zero_point.any() else np.zeros((), np.int64)
            self.stored[key] = (
                self.writer.initializer(
                    f"{name}_quantized", np.ascontiguousarray(codes.T) if transpose else codes, dtype
                ),
                self.writer.initializer(f"{name}_scale", params.scale, FLOAT),
                self.writer.initializer(f"{name}_zero_point", zero_point, dtype),
            )
        return self.stored[key]
