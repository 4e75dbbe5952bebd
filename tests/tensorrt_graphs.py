"""ONNX graphs, written as text, that the TensorRT tests share."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

RNG = np.random.default_rng(3)
Arrays = Mapping[str, NDArray[Any]]

NOTHING: Arrays = MappingProxyType({})


def model_of(text: str, initializers: Arrays = NOTHING, *, opsets: str = '"": 21') -> ir.Model:
    """ONNX text with initializers put in and nodes named after their outputs."""
    proto = onnx.parser.parse_model(f"<ir_version: 10, opset_import: [{opsets}]> {text}")
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in initializers.items())
    for node in proto.graph.node:
        node.name = f"{node.op_type}_{node.output[0]}"
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def small_conv(batch: str = "N") -> ir.Model:
    return model_of(
        f"g (float[{batch},3,8,8] x) => (float[{batch},8,8,8] y) {{ r = Conv<pads=[1,1,1,1]>(x, w) y = Relu(r) }}",
        {"w": RNG.normal(size=(8, 3, 3, 3)).astype(np.float32)},
    )


def qdq(x_type: str = "int8", **changes: NDArray[Any]) -> ir.Model:
    """One quantized Conv that breaks no rule, with initializers changed."""
    constants: dict[str, NDArray[Any]] = {
        "xs": np.array(0.02, np.float32),
        "z": np.zeros((), x_type),
        "ws": np.full(8, 0.01, np.float32),
        "w": RNG.integers(-127, 128, (8, 8, 1, 1)).astype(np.int8),
    }
    text = """g (float[1,8,8,8] x) => (float[1,8,8,8] y) {
        q = QuantizeLinear(x, xs, z) d = DequantizeLinear(q, xs, z) dw = DequantizeLinear<axis=0>(w, ws) y = Conv(d, dw) }"""
    return model_of(text, constants | changes)
