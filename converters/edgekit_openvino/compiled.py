"""OpenVINO models: reading ONNX, saving IR, running it, and reading which kernels ran."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import openvino as ov

from edgekit.backend import Artifact, Feeds, KernelRecord, Outputs
from edgekit.errors import BackendError
from edgekit.target import Target

_PRECISIONS = {"i8": "int8", "u8": "int8", "f32": "f32", "bf16": "bf16", "f16": "f16", "i32": "int32", "i64": "int64"}
_NO_KERNEL = ("Input", "Output", "Const", "Parameter", "Result", "Constant")


def save_ir(model: Path, path: Path) -> None:
    """Read an ONNX file and save it as OpenVINO IR, weights in the precision that they have.

    Raises:
        BackendError: with OpenVINO's words.
    """
    try:
        network = ov.Core().read_model(model)
        _name_outputs(network, model)
        ov.save_model(network, path, compress_to_fp16=False)
    except RuntimeError as error:
        raise BackendError(f"{model}: OpenVINO refuses the model: {_reason(error)}") from error


def _name_outputs(network: Any, model: Path) -> None:
    """Give the operations that make the outputs the names of their ONNX nodes, as all others have; OpenVINO names them by tensor."""
    producers = {value.name: value.producer() for value in ir.load(model).graph.outputs}
    for output in network.outputs:
        node = producers.get(_output_name(output))
        if node is not None and node.name:
            output.get_node().input_value(0).get_node().set_friendly_name(node.name)


def has_bfloat16() -> bool:
    """Whether OpenVINO computes in bfloat16 on this CPU."""
    return "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _output_name(output: Any) -> str:
    """The ONNX name of an output; its tensor has several names where OpenVINO found two equal computations."""
    name = str(output.get_node().get_friendly_name()).removesuffix("/sink_port_0")
    return name if name in output.get_names() else str(output.get_any_name())


class OpenVinoModel:
    """A loaded artifact."""

    def __init__(self, artifact: Artifact, target: Target, *, exact: bool) -> None:
        self._path = artifact.path
        config: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": target.runtime.threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            **target.runtime.options,
        }
        if exact or artifact.precision == "f32":
            config["INFERENCE_PRECISION_HINT"] = "f32"
        try:
            self._compiled = ov.Core().compile_model(artifact.path, "CPU", config)
        except RuntimeError as error:
            raise BackendError(f"{artifact.path}: OpenVINO refuses the model: {_reason(error)}") from error
        self._names = [_output_name(output) for output in self._compiled.outputs]

    def run(self, feeds: Feeds) -> Outputs:
        """Run one inference: arrays by input name in, arrays by output name out."""
        request = self._compiled.create_infer_request()
        try:
            request.infer(dict(feeds))
        except RuntimeError as error:
            raise BackendError(f"{self._path}: OpenVINO fails to run: {_reason(error)}") from error
        tensors = [request.get_output_tensor(i) for i in range(len(self._names))]
        return {name: np.array(tensor.data) for name, tensor in zip(self._names, tensors, strict=True)}

    def prepare(self, feeds: Feeds) -> Callable[[], None]:
        """One inference on tensors that share memory with `feeds`."""
        request = self._compiled.create_infer_request()
        arrays = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
        for name, array in arrays.items():
            request.set_tensor(name, ov.Tensor(array, shared_memory=True))

        def infer(arrays: dict[str, Any] = arrays) -> None:  # the arrays must outlive the tensors
            request.start_async()
            request.wait()

        return infer

    def kernels(self, feeds: Feeds) -> list[KernelRecord]:
        """The nodes of the runtime model: kernel name, and the precision that it computes in."""
        self.run(feeds)  # with a dynamic batch, some kernels are chosen by the first inference
        records = []
        for op in self._compiled.get_runtime_model().get_ordered_ops():
            info = op.get_rt_info()
            layer_type = _text(info, "layerType") or op.get_type_name()
            if layer_type in _NO_KERNEL:
                continue
            names = source_names(_text(info, "originalLayersNames"))
            kernel, precision = _text(info, "primitiveType"), _text(info, "runtimePrecision").lower()
            records.append(KernelRecord(names, f"{layer_type}/{kernel}", _PRECISIONS.get(precision, precision)))
        return records


_OWN_TYPES = "Convert|ConvolutionBackpropData|Divide|GroupConvolution|MVN|Multiply|Subtract"
_INVENTED = re.compile(rf"({_OWN_TYPES})_\d+|.*(_flatten_reshape|/transpose_[ab])")
"""Operations that OpenVINO adds. One that transposes a weight bears its layer's name, and would speak for its precision."""
_SUFFIX = re.compile(r"(/WithoutBiases|/Dequantization(Multiply|Subtract|Convert)|_original)+$")


def source_names(original: str) -> tuple[str, ...]:
    """The names of ONNX nodes in OpenVINO's list of original layers, each once, in order.

    An operator that OpenVINO reads as several operations gives them its name and a suffix.
    """
    names = [name for name in original.split(",") if name and not _INVENTED.fullmatch(name)]
    return tuple(dict.fromkeys(_SUFFIX.sub("", name) for name in names))


def _text(info: Any, key: str) -> str:
    return str(info[key].astype(str)) if key in info else ""


def _reason(error: RuntimeError) -> str:
    """OpenVINO's message without the lines that name its own source files."""
    lines = [line.strip() for line in str(error).splitlines()]
    kept = [line for line in lines if line and not line.startswith(("Exception from", "Check '"))]
    return " ".join(kept or lines)[:600]
