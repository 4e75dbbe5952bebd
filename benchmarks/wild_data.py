"""Realistic inputs for models found in packages: photographs, lines of text, sound, files. Each takes a seed: no two share samples."""

from __future__ import annotations

import importlib.util
import string
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Array = NDArray[Any]

PHOTOS = (
    "astronaut",
    "chelsea",
    "coffee",
    "rocket",
    "motorcycle_left",
    "hubble_deep_field",
    "retina",
    "camera",
    "coins",
)
"""Of scikit-image's package."""
RATE = 16000


def photos(count: int, height: int, width: int, seed: int) -> Array:
    """Cut-outs of photographs, `(count, height, width, 3)` uint8: turned, scaled and lit differently."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("scikit-image is not installed")
    folder = Path(spec.origin).parent / "data"
    files = [next(folder.glob(f"{name}.*")) for name in PHOTOS]
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        image = Image.open(files[int(rng.integers(len(files)))]).convert("RGB")
        share = float(rng.uniform(0.5, 1.0))
        side = int(share * min(image.size))
        left, top = int(rng.integers(image.width - side + 1)), int(rng.integers(image.height - side + 1))
        cut = image.crop((left, top, left + side, top + side)).resize((width, height))
        if rng.random() < 0.5:
            cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        found.append(np.clip(np.asarray(cut, np.float32) * rng.uniform(0.6, 1.2), 0, 255).astype(np.uint8))
    return np.stack(found)


def lines(count: int, height: int, width: int, seed: int) -> Array:
    """A line of a few words on each, `(count, height, width, 3)` uint8."""
    rng = np.random.default_rng(seed)
    return np.stack([_page(rng, height, width, rows=1) for _ in range(count)])


def pages(count: int, side: int, seed: int) -> Array:
    """Several lines on each, `(count, side, side, 3)` uint8."""
    rng = np.random.default_rng(seed)
    return np.stack([_page(rng, side, side, rows=int(rng.integers(3, 8))) for _ in range(count)])


def tones(count: int, length: int, seed: int, rate: int = RATE) -> Array:
    """Voice-like sound, `(count, length)` float32 in [-1, 1]: notes with harmonics that come and go, pauses, noise."""
    rng = np.random.default_rng(seed)
    time = np.arange(length) / rate
    found = np.zeros((count, length))
    for row in found:
        for _ in range(int(rng.integers(1, 5))):
            start, stop = np.sort(rng.uniform(0, length / rate, 2))
            pitch = float(rng.uniform(80, 700)) * (1 + 0.02 * np.sin(2 * np.pi * rng.uniform(3, 7) * time))
            phase = 2 * np.pi * np.cumsum(pitch) / rate
            voice = sum(np.sin(k * phase) / k**1.2 for k in range(1, 9))
            row += np.where((time >= start) & (time <= stop), voice, 0) * rng.uniform(0.05, 0.4)
        row += rng.normal(0, 10 ** rng.uniform(-4, -1.5), length)
    return np.clip(found, -1, 1).astype(np.float32)


def file_bytes(count: int, length: int, seed: int, padding: int = 256) -> Array:
    """The first and last bytes of installed files, `(count, length)` int32; short ones are filled up."""
    root = Path(sysconfig.get_path("purelib"))
    files = sorted(path for path in root.rglob("*.*") if path.is_file() and path.stat().st_size > 64)
    by_suffix: dict[str, list[Path]] = {}
    for path in files:
        by_suffix.setdefault(path.suffix, []).append(path)
    rng = np.random.default_rng(seed)
    suffixes = sorted(by_suffix)
    found = np.full((count, length), padding, np.int32)
    for row in found:
        some = by_suffix[suffixes[int(rng.integers(len(suffixes)))]]
        content = np.frombuffer(some[int(rng.integers(len(some)))].read_bytes(), np.uint8)
        half = min(length // 2, len(content))
        row[:half], row[length - half :] = content[:half], content[-half:]
    return found


def _page(rng: np.random.Generator, height: int, width: int, rows: int) -> Array:
    light = bool(rng.random() < 0.8)
    paper = tuple(int(v) for v in rng.integers(180 if light else 0, 256 if light else 80, 3))
    ink = tuple(int(v) for v in rng.integers(0 if light else 180, 80 if light else 256, 3))
    image = Image.new("RGB", (width, height), paper)
    draw = ImageDraw.Draw(image)
    step = height // rows
    for row in range(rows):
        size = max(10, int(step * rng.uniform(0.45, 0.75)))
        words = " ".join(_word(rng) for _ in range(int(rng.integers(1, 5))))
        draw.text((int(rng.integers(2, 12)), row * step + (step - size) // 3), words, ink, ImageFont.load_default(size))
    noisy = np.asarray(image, np.float32) + rng.normal(0, rng.uniform(0, 8), (height, width, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8)


def _word(rng: np.random.Generator) -> str:
    letters = string.ascii_letters + string.digits
    return "".join(letters[i] for i in rng.integers(len(letters), size=int(rng.integers(2, 9))))
