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
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from edgekit.backend import Artifact

Feeds = dict[str, NDArray[Any]]


def onnxruntime_quantized(float_model: Path, calibration: Sequence[Feeds], folder: Path) -> dict[str, Artifact]:
    """ONNX Runtime's `quantize_static`, by calibration method: QDQ, uint8 activations, int8 weights per channel.

    These are the settings that its documentation recommends for x86-64 with VNNI; ranges of weights and everything else
    are its defaults. The three files differ in their scales and zero points only.
    """
    prepared = folder / "prepared.onnx"
    made = {}
    with _silence():
        quant_pre_process(str(float_model), str(prepared))
        for method in (CalibrationMethod.MinMax, CalibrationMethod.Percentile, CalibrationMethod.Entropy):
            path = folder / f"quantize_static_{method.name}.onnx"
            quantize_static(
                str(prepared),
                str(path),
                _Reader(calibration),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=method,
            )
            made[f"quantize_static, {method.name}"] = Artifact(path, (path,))
    return made


def openvino_quantized(float_model: Path, calibration: Sequence[Feeds], folder: Path) -> dict[str, Artifact]:
    """NNCF's `quantize`, by preset: symmetric activations ("performance", its default), or affine ones ("mixed")."""
    samples = sum(len(next(iter(feeds.values()))) for feeds in calibration)
    made = {}
    with _silence():
        for preset in (nncf.QuantizationPreset.PERFORMANCE, nncf.QuantizationPreset.MIXED):
            path = folder / f"nncf_{preset.value}.xml"
            quantized = nncf.quantize(
                ov.Core().read_model(float_model),
                nncf.Dataset(list(calibration)),
                preset=preset,
                subset_size=samples,  # NNCF counts batches here, and stops at the end of the data
            )
            ov.save_model(quantized, path, compress_to_fp16=False)
            made[f"NNCF, {preset.value}"] = Artifact(path, (path, path.with_suffix(".bin")))
    return made


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
