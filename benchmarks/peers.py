"""What the runtimes' own quantizers make of the same float file and the same calibration samples."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import nncf  # type: ignore[import-untyped]
import openvino as ov
from nncf.quantization.advanced_parameters import (  # type: ignore[import-untyped]
    AdvancedQuantizationParameters,
    AdvancedSmoothQuantParameters,
)
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

from edgekit.backend import Artifact

Feeds = dict[str, NDArray[Any]]

METHODS = (CalibrationMethod.MinMax, CalibrationMethod.Percentile, CalibrationMethod.Entropy)
MATMUL_ONLY = ("MatMul", "Gemm")


def onnxruntime_quantized(
    float_model: Path,
    calibration: Sequence[Feeds],
    folder: Path,
    *,
    methods: Sequence[CalibrationMethod] = METHODS,
    operators: Sequence[str] = (),
    reduce_range: bool = False,
) -> dict[str, Artifact]:
    """ONNX Runtime's `quantize_static`, by calibration method: QDQ, uint8 activations, int8 weights per channel.

    These are the settings that its documentation recommends for x86-64 with VNNI; ranges of weights and everything else
    are its defaults; `reduce_range` is what it recommends without. The files differ
    in their scales and zero points only. `operators` limits it to some; empty means all
    that it knows.
    """
    suffix = f", {operators[0]} only" if operators else ""
    prepared = _prepared(float_model, folder)
    made = {}
    with _silence():
        for method in methods:
            path = folder / f"quantize_static_{method.name}_{'_'.join(operators) or 'all'}.onnx"
            quantize_static(
                str(prepared),
                str(path),
                _Reader(calibration),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(operators) or None,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=method,
                reduce_range=reduce_range,
            )
            made[f"quantize_static, {method.name}{suffix}"] = Artifact(path, (path,))
    return made


def onnxruntime_dynamic(float_model: Path, folder: Path) -> dict[str, Artifact]:
    """ONNX Runtime's `quantize_dynamic`, int8 weights: per tensor, which is its default, and per channel."""
    prepared = _prepared(float_model, folder)
    made = {}
    with _silence():
        for label, per_channel in (("quantize_dynamic", False), ("quantize_dynamic, per channel", True)):
            path = folder / f"quantize_dynamic_{'channels' if per_channel else 'default'}.onnx"
            quantize_dynamic(str(prepared), str(path), per_channel=per_channel, weight_type=QuantType.QInt8)
            made[label] = Artifact(path, (path,))
    return made


def openvino_quantized(float_model: Path, calibration: Sequence[Feeds], folder: Path) -> dict[str, Artifact]:
    """NNCF's `quantize`, by preset: symmetric activations ("performance", its default), or affine ones ("mixed")."""
    made = {}
    with _silence():
        for preset in (nncf.QuantizationPreset.PERFORMANCE, nncf.QuantizationPreset.MIXED):
            quantized = nncf.quantize(
                ov.Core().read_model(float_model),
                nncf.Dataset(list(calibration)),
                preset=preset,
                subset_size=_samples(calibration),
            )
            made[f"NNCF, {preset.value}"] = _saved(quantized, folder / f"nncf_{preset.value}.xml")
    return made


def openvino_transformer(float_model: Path, calibration: Sequence[Feeds], folder: Path) -> dict[str, Artifact]:
    """NNCF's `quantize` in its mode for transformers, with smoothing, which is its default, and without."""
    off = AdvancedQuantizationParameters(smooth_quant_alphas=AdvancedSmoothQuantParameters(convolution=-1, matmul=-1))
    made = {}
    with _silence():
        for label, parameters in (("NNCF, transformer", None), ("NNCF, transformer, no smoothing", off)):
            quantized = nncf.quantize(
                ov.Core().read_model(float_model),
                nncf.Dataset(list(calibration)),
                subset_size=_samples(calibration),
                model_type=nncf.ModelType.TRANSFORMER,
                advanced_parameters=parameters,
            )
            made[label] = _saved(quantized, folder / f"{label.replace(', ', '_').replace(' ', '_')}.xml")
    return made


def _samples(calibration: Sequence[Feeds]) -> int:
    """More than there are batches, which is what NNCF counts: it stops at the end of the data."""
    return sum(len(next(iter(feeds.values()))) for feeds in calibration)


def _saved(quantized: ov.Model, path: Path) -> Artifact:
    ov.save_model(quantized, path, compress_to_fp16=False)
    return Artifact(path, (path, path.with_suffix(".bin")))


def _prepared(float_model: Path, folder: Path) -> Path:
    """The float model as ONNX Runtime's documentation says it should be before it is quantized.

    Its symbolic shape inference fails on the transformer, with a TypeError; the shapes that ONNX infers are enough.
    """
    path = folder / "prepared.onnx"
    if not path.is_file():
        with _silence():
            quant_pre_process(str(float_model), str(path), skip_symbolic_shape=True)
    return path


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, calibration: Sequence[Feeds]) -> None:
        self._rest = iter(calibration)

    def get_next(self) -> Feeds | None:
        return next(self._rest, None)


@contextmanager
def _silence() -> Iterator[None]:
    """Neither progress bars nor advice."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
