"""Realistic inputs for models found in packages: photographs, text, sound, files. Each takes a seed: no two share samples."""

from __future__ import annotations

import importlib.util
import re
import string
import sysconfig
import zlib
from collections.abc import Sequence
from functools import cache
from itertools import chain, zip_longest
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Array = NDArray[Any]

Colour = tuple[int, ...]

PHOTOS = tuple(
    ("skimage", f"data/{name}")
    for name in (
        "astronaut.png",
        "chelsea.png",
        "coffee.png",
        "rocket.jpg",
        "motorcycle_left.png",
        "hubble_deep_field.jpg",
        "retina.jpg",
        "camera.png",
        "coins.png",
    )
)
"""Of all kinds, by the package they lie in."""
PEOPLE = (
    ("skimage", "data/astronaut.png"),
    ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
    ("ultralytics", "assets/bus.jpg"),
    ("ultralytics", "assets/zidane.jpg"),
)
"""With somebody on each."""
RATE = 16000
LETTERS = string.ascii_letters + string.digits


def photos(count: int, height: int, width: int, seed: int, of: tuple[tuple[str, str], ...] = PHOTOS) -> Array:
    """Cut-outs of photographs, `(count, height, width, 3)` uint8: turned, scaled and lit differently."""
    files = [_package(name) / path for name, path in of]
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
    """A few words on each, `(count, height, width, 3)` uint8: cut out tightly and scaled to the size, as a recognizer is given them."""
    rng = np.random.default_rng(seed)
    return np.stack([_line(rng, height, width) for _ in range(count)])


def captchas(count: int, height: int, width: int, seed: int) -> Array:
    """Four to six letters and digits on each, `(count, height, width, 3)` uint8: turned and shifted, with strokes across."""
    rng = np.random.default_rng(seed)
    return np.stack([_captcha(rng, height, width) for _ in range(count)])


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
    """The first and last bytes of installed files, `(count, length)` int32; short ones are filled up.

    As many of each suffix, where there are so many. No row comes twice, and none with an even and with an odd seed.
    """
    root = Path(sysconfig.get_path("purelib"))
    by_suffix: dict[str, list[Path]] = {}
    for path in sorted(path for path in root.rglob("*.*") if path.is_file() and path.stat().st_size > 64):
        by_suffix.setdefault(path.suffix, []).append(path)
    rng = np.random.default_rng(seed)
    shuffled = [[some[index] for index in rng.permutation(len(some))] for _, some in sorted(by_suffix.items())]
    found: dict[bytes, Array] = {}
    for path in filter(None, chain.from_iterable(zip_longest(*shuffled))):
        row = _ends(path, length, padding)
        if zlib.crc32(row.tobytes()) % 2 == seed % 2:
            found.setdefault(row.tobytes(), row)
        if len(found) == count:
            break
    return np.stack(list(found.values()))


def _ends(path: Path, length: int, padding: int) -> Array:
    content, row = np.memmap(path, np.uint8, "r"), np.full(length, padding, np.int32)
    half = min(length // 2, len(content))
    row[:half], row[length - half :] = content[:half], content[-half:]
    return row


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{name} is not installed, which has photographs")
    return Path(spec.origin).parent


def _line(rng: np.random.Generator, height: int, width: int) -> Array:
    paper, ink = _colours(rng)
    font, text = ImageFont.load_default(40), ""
    while not text or font.getlength(text) < rng.uniform(0.75, 1.0) * width / height * 50:
        text = f"{text} {_real_word(rng)}".strip()
    margin = rng.uniform(4, 14)
    image = Image.new("RGB", (int(font.getlength(text) + 2 * margin), int(rng.uniform(48, 60))), paper)
    ImageDraw.Draw(image).text((margin, image.height / 2), text, ink, font, anchor="lm")
    return _noisy(rng, image.resize((width, height), Image.Resampling.BILINEAR))


def _captcha(rng: np.random.Generator, height: int, width: int) -> Array:
    paper, ink = _colours(rng)
    image = Image.new("RGB", (width, height), paper)
    count = int(rng.integers(4, 7))
    step = width / (count + 0.5)
    for place in range(count):
        size = int(min(0.8 * height, 1.5 * step) * rng.uniform(0.8, 1.0))
        letter = Image.new("L", (2 * size, 2 * size))
        ImageDraw.Draw(letter).text((size, size), _pick(rng, LETTERS), 255, ImageFont.load_default(size), anchor="mm")
        top = int((0.5 + rng.uniform(-0.08, 0.08)) * height) - size
        image.paste(ink, (int((place + 0.75) * step) - size, top), letter.rotate(float(rng.uniform(-15, 15))))
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(4))):
        ends = [int(v) for v in rng.integers(0, (width, height, width, height))]
        draw.line(ends, tuple(int(v) for v in rng.integers(0, 256, 3)))
    return _noisy(rng, image)


def _page(rng: np.random.Generator, height: int, width: int, rows: int) -> Array:
    paper, ink = _colours(rng)
    image = Image.new("RGB", (width, height), paper)
    draw = ImageDraw.Draw(image)
    step = height // rows
    for row in range(rows):
        size = max(10, int(step * rng.uniform(0.45, 0.75)))
        words = " ".join(_word(rng) for _ in range(int(rng.integers(1, 5))))
        draw.text((int(rng.integers(2, 12)), row * step + (step - size) // 3), words, ink, ImageFont.load_default(size))
    return _noisy(rng, image)


def _colours(rng: np.random.Generator) -> tuple[Colour, Colour]:
    """Of the paper and of the ink: dark on light, or one time in five the other way."""
    light = bool(rng.random() < 0.8)
    paper = tuple(int(v) for v in rng.integers(180 if light else 0, 256 if light else 80, 3))
    return paper, tuple(int(v) for v in rng.integers(0 if light else 180, 80 if light else 256, 3))


def _noisy(rng: np.random.Generator, image: Image.Image) -> Array:
    pixels = np.asarray(image, np.float32)
    return np.clip(pixels + rng.normal(0, rng.uniform(0, 8), pixels.shape), 0, 255).astype(np.uint8)


def _word(rng: np.random.Generator) -> str:
    return "".join(_pick(rng, LETTERS) for _ in range(int(rng.integers(2, 9))))


def _real_word(rng: np.random.Generator) -> str:
    return _pick(rng, _vocabulary())


@cache
def _vocabulary() -> tuple[str, ...]:
    """The words of Python's own help."""
    return tuple(sorted({word for text in topics.values() for word in re.findall(r"\b[A-Za-z]{2,10}\b", text)}))


def _pick(rng: np.random.Generator, some: Sequence[str]) -> str:
    return some[int(rng.integers(len(some)))]
