"""Small Quantize/DequantizeLinear graphs, written node by node, and how the tests run them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[Any]
TYPES = {"uint8": (np.uint8, 0, 255), "int8": (np.int8, -128, 127)}


class QdqGraph:
    """Appends nodes; each method returns the name of the float value that the next operator reads."""

    def __init__(self, dtype: str = "uint8", seed: int = 0) -> None:
        self.code, self.qmin, self.qmax = TYPES[dtype]
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.outputs: list[str] = []
        self.scales: dict[str, float] = {}

    def constant(self, name: str, array: Array) -> str:
        self.initializers.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def input(self, name: str, shape: Sequence[int | str], low: float = -2.0, high: float = 2.0) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)))
        return self.quantized(name, low, high)

    def grid(self, low: float, high: float) -> tuple[np.float32, Array]:
        """Scale and zero point of an affine grid that holds [low, high] and zero."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = np.float32((high - low) / 255)
        return scale, np.asarray(np.clip(np.rint(self.qmin - low / scale), self.qmin, self.qmax), self.code)

    def quantized(self, value: str, low: float, high: float) -> str:
        scale, zero_point = self.grid(low, high)
        names = [self.constant(f"{value}_scale", scale), self.constant(f"{value}_zero_point", zero_point)]
        self.nodes += [
            helper.make_node("QuantizeLinear", [value, *names], [f"{value}_codes"], name=f"{value}/q"),
            helper.make_node("DequantizeLinear", [f"{value}_codes", *names], [f"{value}_dq"], name=f"{value}/dq"),
        ]
        self.scales[f"{value}_dq"] = float(scale)
        return f"{value}_dq"

    def float_op(self, op_type: str, name: str, inputs: Sequence[str], **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op_type, list(inputs), [f"{name}_y"], name=name, **attributes))
        return f"{name}_y"

    def op(self, op_type: str, name: str, inputs: Sequence[str], low: float, high: float, **attributes: Any) -> str:
        return self.quantized(self.float_op(op_type, name, inputs, **attributes), low, high)

    def same(self, op_type: str, name: str, inputs: Sequence[str], like: str, **attributes: Any) -> str:
        """An operator that keeps the grid of `like`: its Q and DQ read the same initializers."""
        value, stem = self.float_op(op_type, name, inputs, **attributes), like.removesuffix("_dq")
        grid = [f"{stem}_scale", f"{stem}_zero_point"]
        self.nodes += [
            helper.make_node("QuantizeLinear", [value, *grid], [f"{value}_codes"], name=f"{value}/q"),
            helper.make_node("DequantizeLinear", [f"{value}_codes", *grid], [f"{value}_dq"], name=f"{value}/dq"),
        ]
        self.scales[f"{value}_dq"] = self.scales[like]
        # `same` may be chained: the grid keeps being found under the new name.
        by_name = {one.name: one for one in self.initializers}
        for suffix in ("scale", "zero_point"):
            self.constant(f"{value}_{suffix}", numpy_helper.to_array(by_name[f"{stem}_{suffix}"]))
        return f"{value}_dq"

    def weight(self, name: str, shape: Sequence[int], axis: int | None = 0, spread: float = 0.5) -> str:
        real = self.rng.normal(0, spread, shape)
        dims = tuple(dim for dim in range(len(shape)) if dim != axis) if axis is not None else None
        scale = np.asarray(np.abs(real).max(axis=dims) / 127, np.float32)
        along = scale if axis is None else scale.reshape([-1 if dim == axis else 1 for dim in range(len(shape))])
        codes = np.clip(np.rint(real / along), -127, 127).astype(np.int8)
        parts = [
            self.constant(f"{name}_codes", codes),
            self.constant(f"{name}_scale", scale),
            self.constant(f"{name}_zero_point", np.zeros(scale.shape, np.int8)),
        ]
        options = {} if axis is None else {"axis": axis}
        self.nodes.append(helper.make_node("DequantizeLinear", parts, [f"{name}_dq"], name=f"{name}/dq", **options))
        return f"{name}_dq"

    def bias(self, name: str, size: int, x: str, weight: str, *, stored: bool = True) -> str:
        real = self.rng.normal(0, 1, size)
        if not stored:
            return self.constant(name, real.astype(np.float32))
        by_name = {one.name: one for one in self.initializers}
        weight_scale = numpy_helper.to_array(by_name[weight.removesuffix("_dq") + "_scale"])
        scale = np.asarray(np.float32(self.scales[x]) * weight_scale, np.float32)
        parts = [
            self.constant(f"{name}_codes", np.rint(real / scale).astype(np.int32)),
            self.constant(f"{name}_scale", scale),
        ]
        options = {"axis": 0} if scale.ndim else {}
        self.nodes.append(helper.make_node("DequantizeLinear", parts, [f"{name}_dq"], name=f"{name}/dq", **options))
        return f"{name}_dq"

    def model(self, *outputs: str) -> ir.Model:
        infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        graph = helper.make_graph(self.nodes, "g", self.inputs, infos, self.initializers)
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        proto = onnx.shape_inference.infer_shapes(proto, strict_mode=True)
        onnx.checker.check_model(proto)
        return ir.from_proto(proto)


def run(model: ir.Model, feeds: dict[str, Array], *, optimized: bool = False) -> list[Array]:
    """The model's outputs in ONNX Runtime; as it stands, unless `optimized`."""
    options = onnxruntime.SessionOptions()
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [np.asarray(output) for output in session.run(None, feeds)]


def op_types(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]
