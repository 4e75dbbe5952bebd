"""OpenVINO models: reading ONNX, saving IR, running it, and reading which kernels ran."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from edgekit.backend import Artifact, Feeds, KernelRecord, Outputs
from edgekit.errors import BackendError
from edgekit.target import Target

_PRECISIONS = {"i8": "int8", "u8": "int8", "f32": "f32", "bf16": "bf16", "f16": "f16", "i32": "int32", "i64": "int64"}


def save_ir(model: Path, path: Path) -> None:
    """Read an ONNX file and save it as OpenVINO IR, weights in the precision that they have.

    Raises:
        BackendError: with OpenVINO's words.
    """
    try:
        ov.save_model(ov.Core().read_model(model), path, compress_to_fp16=False)
    except RuntimeError as error:
        raise BackendError(f"{model}: OpenVINO refuses the model: {_reason(error)}") from error


def has_bfloat16() -> bool:
    """Whether OpenVINO computes in bfloat16 on this CPU."""
    return "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


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
        self._names = [output.get_any_name() for output in self._compiled.outputs]

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
        records = []
        for op in self._compiled.get_runtime_model().get_ordered_ops():
            info = op.get_rt_info()
            layer_type = str(info["layerType"].astype(str)) if "layerType" in info else op.get_type_name()
            if layer_type in ("Input", "Output", "Const", "Parameter", "Result"):
                continue
            kernel = _text(info, "primitiveType")
            names = tuple(name for name in _text(info, "originalLayersNames").split(",") if name)
            precision = _text(info, "runtimePrecision").lower()
            records.append(KernelRecord(names, f"{layer_type}/{kernel}", _PRECISIONS.get(precision, precision)))
        return records


def _text(info: Any, key: str) -> str:
    return str(info[key].astype(str)) if key in info else ""


def _reason(error: RuntimeError) -> str:
    """OpenVINO's message without the lines that name its own source files."""
    lines = [line.strip() for line in str(error).splitlines()]
    kept = [line for line in lines if line and not line.startswith(("Exception from", "Check '"))]
    return " ".join(kept or lines)[:600]
