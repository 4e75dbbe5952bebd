"""Small ONNX models of any opset, written node by node, and how the tests run and compare them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[Any]


class GraphBuilder:
    """Appends nodes; each method returns the name of a value. Weights come from one seeded generator."""

    def __init__(self, opset: int = 21, ir_version: int = 10, seed: int = 0) -> None:
        self.opset, self.ir_version = opset, ir_version
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def input(self, name: str, shape: Sequence[int | str], dtype: int = TensorProto.FLOAT) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))
        return name

    def constant(self, name: str, array: Any) -> str:
        self.initializers.append(numpy_helper.from_array(np.asarray(array), name))
        if self.ir_version < 4:  # there, an initializer had to be an input as well
            tensor = self.initializers[-1]
            self.inputs.append(helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
        return name

    def constant_node(self, name: str, array: Any) -> str:
        tensor = numpy_helper.from_array(np.asarray(array), f"{name}_value")
        self.nodes.append(helper.make_node("Constant", [], [name], name=f"{name}/Constant", value=tensor))
        return name

    def weight(self, name: str, *shape: int) -> str:
        spread = 1 / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else 0.3
        return self.constant(name, self.rng.normal(0, spread, shape).astype(np.float32))

    def op(self, op_type: str, inputs: Sequence[str], name: str = "", outputs: int = 1, **attributes: Any) -> Any:
        """The name of the node's first output; all their names where `outputs` is more than 1."""
        name = name or f"{op_type.lower()}{len(self.nodes)}"
        names = [f"{name}_y" if i == 0 else f"{name}_y{i}" for i in range(outputs)]
        domain = attributes.pop("domain", "")
        self.nodes.append(helper.make_node(op_type, list(inputs), names, name=name, domain=domain, **attributes))
        return names[0] if outputs == 1 else names

    def conv(
        self, x: str, name: str, c_in: int, c_out: int, kernel: int = 3, bias: bool = True, **attributes: Any
    ) -> str:
        group = attributes.get("group", 1)
        inputs = [x, self.weight(f"{name}.weight", c_out, c_in // group, kernel, kernel)]
        if bias:
            inputs.append(self.weight(f"{name}.bias", c_out))
        attributes.setdefault("pads", [kernel // 2] * 4)
        result: str = self.op("Conv", inputs, name, kernel_shape=[kernel, kernel], **attributes)
        return result

    def batchnorm(self, x: str, name: str, channels: int, **attributes: Any) -> str:
        parameters = [
            self.constant(f"{name}.gamma", self.rng.uniform(0.5, 1.5, channels).astype(np.float32)),
            self.constant(f"{name}.beta", self.rng.normal(0, 0.3, channels).astype(np.float32)),
            self.constant(f"{name}.mean", self.rng.normal(0, 0.3, channels).astype(np.float32)),
            self.constant(f"{name}.var", self.rng.uniform(0.5, 1.5, channels).astype(np.float32)),
        ]
        result: str = self.op("BatchNormalization", [x, *parameters], name, **attributes)
        return result

    def proto(self, *outputs: str, dtypes: dict[str, int] | None = None) -> onnx.ModelProto:
        infos = [helper.make_tensor_value_info(o, (dtypes or {}).get(o, TensorProto.FLOAT), None) for o in outputs]
        graph = helper.make_graph(self.nodes, "g", self.inputs, infos, self.initializers)
        domains = {node.domain for node in self.nodes} - {""}
        imports = [helper.make_opsetid("", self.opset), *(helper.make_opsetid(domain, 1) for domain in sorted(domains))]
        proto = helper.make_model(graph, opset_imports=imports, ir_version=self.ir_version)
        inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
        for output, known in zip(proto.graph.output, inferred.graph.output, strict=True):
            output.CopyFrom(known)
        return proto

    def model(self, *outputs: str) -> ir.Model:
        return ir.from_proto(self.proto(*outputs))


def run(
    model: ir.Model | onnx.ModelProto | Path, feeds: dict[str, Array], *, optimize: bool = False
) -> dict[str, Array]:
    """The outputs in plain ONNX Runtime, apart from edgekit's own Session."""
    options = onnxruntime.SessionOptions()
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    if isinstance(model, ir.Model):
        model = ir.to_proto(model)
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def initializers(model: ir.Model) -> dict[str, bytes]:
    return {k: v.const_value.tobytes() for k, v in model.graph.initializers.items() if v.const_value is not None}


def op_types(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def poked(model: ir.Model, name: str, change: Callable[[Array], object]) -> ir.Model:
    """The model with a constant changed in place."""
    value = model.graph.initializers[name]
    assert value.const_value is not None
    array = value.const_value.numpy().copy()
    change(array)
    value.const_value = ir.tensor(array, name=name)
    return model
