"""OpenVINO models: running them, and reading which kernels ran."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import openvino as ov

from edgekit.backend import Artifact, Feeds, KernelRecord, Outputs
from edgekit.errors import BackendError
from edgekit.target import Target
from edgekit_openvino import convert

_PRECISIONS = {"i8": "int8", "u8": "int8", "f32": "f32", "bf16": "bf16", "f16": "f16", "i32": "int32", "i64": "int64"}
_NO_KERNEL = ("Input", "Output", "Const", "Parameter", "Result", "Constant")


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
            raise BackendError(f"{artifact.path}: OpenVINO refuses the model: {convert.reason(error)}") from error
        self._inputs = [convert.input_name(port) for port in self._compiled.inputs]
        self._names = [convert.output_name(output) for output in self._compiled.outputs]
        self._sizes: set[tuple[tuple[int, ...], ...]] = set()
        self._reader: ov.Model | None = None

    def run(self, feeds: Feeds) -> Outputs:
        """Run one inference: arrays by input name in, arrays by output name out."""
        request, given = self._compiled.create_infer_request(), self._given(feeds)
        self._check_sizes(given)
        try:
            request.infer(given)
        except RuntimeError as error:
            raise BackendError(f"{self._path}: OpenVINO fails to run: {convert.reason(error)}") from error
        tensors = [request.get_output_tensor(i) for i in range(len(self._names))]
        return {name: np.array(tensor.data) for name, tensor in zip(self._names, tensors, strict=True)}

    def prepare(self, feeds: Feeds) -> Callable[[], None]:
        """One inference on tensors that share memory with `feeds`."""
        request = self._compiled.create_infer_request()
        arrays = {index: np.ascontiguousarray(array) for index, array in self._given(feeds).items()}
        for index, array in arrays.items():
            request.set_input_tensor(index, ov.Tensor(array, shared_memory=True))

        def infer(arrays: dict[int, Any] = arrays) -> None:  # the arrays must outlive the tensors
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

    def _check_sizes(self, given: dict[int, Any]) -> None:
        """Ask OpenVINO's shape inference before it runs.

        What fails later is swallowed where there is one thread, with old results in its place, and makes further runs fail where
        there are several.
        """
        sizes = tuple(np.shape(array) for array in given.values())
        if sizes in self._sizes or not any(port.get_partial_shape().is_dynamic for port in self._compiled.inputs):
            return
        self._reader = self._reader or ov.Core().read_model(self._path)
        try:
            self._reader.reshape(dict(zip(given, map(ov.PartialShape, sizes), strict=True)))
        except RuntimeError as error:
            raise BackendError(f"{self._path}: OpenVINO fails to run: {convert.reason(error)}") from error
        self._sizes.add(sizes)

    def _given(self, feeds: Feeds) -> dict[int, Any]:
        """The arrays by the number of the input that reads them: see `convert.input_name`; those that were dropped are left out."""
        missing = [name for name in self._inputs if name not in feeds]
        if missing:
            raise BackendError(
                f"{self._path}: OpenVINO fails to run: input {missing[0]!r} has no array (given: {', '.join(feeds) or 'none'})"
            )
        for name, port in zip(self._inputs, self._compiled.inputs, strict=True):
            found, taken = list(np.shape(feeds[name])), port.get_partial_shape()
            if not taken.compatible(ov.PartialShape(found)):  # on one thread it would compute something
                raise BackendError(
                    f"{self._path}: OpenVINO fails to run: input {name!r} is {found}, where the model takes {taken}"
                )
        return {index: feeds[name] for index, name in enumerate(self._inputs)}


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
