"""ONNX Runtime sessions: saving `.ort` files, running them, and reading which kernels ran."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort

from edgekit.backend import Artifact, Feeds, KernelRecord, Outputs
from edgekit.errors import BackendError
from edgekit.graph.refusals import ORT_ERRORS
from edgekit.target import Target
from edgekit_onnxruntime.names import NodeNames, read_names

_INTEGER_KERNELS = (
    "QLinear", "QGemm", "QAttention", "QEmbed", "MatMulInteger", "ConvInteger", "DynamicQuantize", "MatMulNBits", "QMoE",
)  # fmt: skip
_KEEP_FLOAT = ("optimization.disable_specified_optimizers", "WeightBiasQuantization")
"""ONNX Runtime would quantize the weights of a float layer between a DequantizeLinear and a QuantizeLinear by itself, with one
scale a tensor: the very layers that were kept in float because they cannot bear it."""
_BF16_OPTION = "mlas.enable_gemm_fastmath_arm64_bfloat16"


def session_options(target: Target, *, threads: int | None = None) -> ort.SessionOptions:
    """Options as the target file gives them; errors only in the log."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or target.runtime.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry(*_KEEP_FLOAT)
    for key, value in target.runtime.options.items():
        options.add_session_config_entry(key, value)
    return options


def save_ort(model: Path, path: Path, target: Target) -> None:
    """Optimize an ONNX file for ONNX Runtime and save it in the runtime's own format.

    At the "extended" level: the one above it lays tensors out for the very CPU that it runs on.

    Raises:
        BackendError: with ONNX Runtime's words.
    """
    options = session_options(target)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path)
    options.add_session_config_entry("session.save_model_format", "ORT")
    open_session(model, options)
    if not path.is_file():
        raise BackendError(f"{model}: ONNX Runtime wrote no .ort file")


def open_session(model: Path, options: ort.SessionOptions) -> ort.InferenceSession:
    """A CPU session, its refusal as a `BackendError`."""
    try:
        return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except ORT_ERRORS as error:
        raise BackendError(f"{model}: ONNX Runtime refuses the model: {str(error).strip()}") from error


class OnnxRuntimeModel:
    """A loaded artifact."""

    def __init__(self, artifact: Artifact, target: Target) -> None:
        self._artifact, self._target = artifact, target
        self._session = open_session(artifact.path, self._options())
        self._output_names = [output.name for output in self._session.get_outputs()]

    def run(self, feeds: Feeds) -> Outputs:
        """Run one inference: arrays by input name in, arrays by output name out."""
        try:
            results = self._session.run(self._output_names, dict(feeds))
        except RUN_ERRORS as error:
            raise BackendError(f"{self._artifact.path}: ONNX Runtime fails to run: {str(error).strip()}") from error
        return dict(zip(self._output_names, results, strict=True))

    def prepare(self, feeds: Feeds) -> Callable[[], None]:
        """One inference on bound buffers."""
        binding = self._session.io_binding()
        values = {name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)) for name, array in feeds.items()}
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for name in self._output_names:
            binding.bind_output(name)
        session = self._session

        def infer(values: dict[str, ort.OrtValue] = values) -> None:
            session.run_with_iobinding(binding)

        return infer

    def kernels(self, feeds: Feeds) -> list[KernelRecord]:
        """What ONNX Runtime's profiler saw running."""
        with tempfile.TemporaryDirectory(prefix="edgekit-") as folder:
            options = self._options()
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "profile")
            session = open_session(self._artifact.path, options)
            session.run(self._output_names, dict(feeds))
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        names = read_names(self._artifact.path)
        return [
            _record(event, names)
            for event in events
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
        ]

    def _options(self) -> ort.SessionOptions:
        options = session_options(self._target)
        if self._artifact.precision == "bf16":
            options.add_session_config_entry(_BF16_OPTION, "1")
        return options


def _record(event: dict[str, object], names: NodeNames) -> KernelRecord:
    arguments = event["args"]
    assert isinstance(arguments, dict)
    op_name = str(arguments.get("op_name", ""))
    name = str(event["name"]).removesuffix("_kernel_time")
    precision = "int8" if op_name.startswith(_INTEGER_KERNELS) else _float_precision(arguments)
    return KernelRecord(names.layers(name, op_name), op_name, precision)


def _float_precision(arguments: dict[str, object]) -> str:
    """From the types of the first input: moving codes is int8 work, arithmetic on floats is not."""
    types = arguments.get("input_type_shape")
    first = next(iter(types[0]), "") if isinstance(types, list) and types and isinstance(types[0], dict) else ""
    return {"float": "f32", "float16": "f16", "bfloat16": "bf16", "int8": "int8", "uint8": "int8"}.get(
        first, first or "f32"
    )


RUN_ERRORS: tuple[type[Exception], ...] = (ValueError, *ORT_ERRORS)
"""Inputs that are missing are a ValueError."""
