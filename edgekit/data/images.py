"""A folder or a zip of images: found, labelled by class folders, decoded one at a time, preprocessed."""

from __future__ import annotations

import io
import lzma
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PlainSerializer, PlainValidator, ValidationInfo, field_validator

from edgekit.errors import DataError
from edgekit.toml_file import Table

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = {
    ".bmp": "BMP",
    ".gif": "GIF",
    ".jpeg": "JPEG",
    ".jpg": "JPEG",
    ".pgm": "PPM",
    ".png": "PNG",
    ".ppm": "PPM",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".webp": "WEBP",
}
"""File endings that count as images, and the only decoders that are ever tried."""

MAX_PIXELS = 50_000_000
"""A larger image is refused before it is decoded (150 MB as RGB)."""

MAX_FILE_BYTES = 256 * 2**20
"""A larger image file is refused before it is read."""


def _lengths(value: Any) -> int | tuple[int, int] | None:
    """A length, or a height and a width; one message for both, where a union would give two. A record on disk may say null."""
    if value is None:
        return None
    parts = list(value) if isinstance(value, list | tuple) else [value]
    if len(parts) > 2 or not parts or not all(type(part) is int and part > 0 for part in parts):
        raise ValueError("expected one length or [height, width], in pixels")
    return (parts[0], parts[1]) if len(parts) == 2 else int(parts[0])


Lengths = Annotated[int | tuple[int, int] | None, PlainValidator(_lengths), PlainSerializer(lambda lengths: lengths)]


class Preprocess(Table):
    """How an image becomes a model's input: resize, centre crop, `(pixel * scale - mean) / std`, layout.

    Attributes:
        channels: the order of the channels; "L" is grey.
        size: resize to `[height, width]`, or the shorter side to one length with the shape kept. Pixels.
        crop: then cut `[height, width]`, or a square, out of the centre. Pixels.
        resample: the filter of the resize.
        scale: factor on the pixels (0 to 255) before `mean` and `std`; 1.0 for a model that takes raw pixels.
        mean, std: one number, or one for each channel in the order of `channels`; empty for none.
        layout: "NCHW" for (N, C, H, W), "NHWC" for (N, H, W, C).
    """

    channels: Literal["RGB", "BGR", "L"] = "RGB"
    size: Lengths = None
    crop: Lengths = None
    resample: Literal["bilinear", "bicubic", "nearest"] = "bilinear"
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1 / 255
    mean: tuple[Annotated[float, Field(allow_inf_nan=False)], ...] = ()
    std: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = ()
    layout: Literal["NCHW", "NHWC"] = "NCHW"

    @field_validator("mean", "std")
    @classmethod
    def _one_or_each(cls, value: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        channels = info.data.get("channels", "RGB")
        if len(value) not in {0, 1, len(channels)}:
            raise ValueError(f"expected one number or {len(channels)}, one for each channel of {channels}")
        return value

    @property
    def raw(self) -> bool:
        """Whether the result is the pixels themselves."""
        return self.scale == 1 and not self.mean and not self.std


@dataclass(frozen=True, slots=True)
class ImageFiles:
    """The images under a folder or in a zip, in the order of their paths.

    Attributes:
        source: the folder or zip, as the user named it.
        names: path of each image below it.
        labels: class of each image, `(N,)`, or None when there are no class folders.
        class_names: the class folders, sorted: class 0 first.
        ignored: how many files are not images.
    """

    source: str
    names: tuple[str, ...]
    labels: NDArray[np.int64] | None
    class_names: tuple[str, ...]
    ignored: int
    _read: Callable[[str], bytes]

    def pixels(self, index: int, preprocess: Preprocess) -> NDArray[np.uint8]:
        """One image, resized and cropped: uint8, `(C, H, W)` or `(H, W, C)` as `preprocess.layout` says.

        Raises:
            DataError: when it cannot be decoded, is too large, or smaller than the crop.
        """
        name = f"{self.source}: image {self.names[index]!r}"
        image = _fit(_decode(self._read(self.names[index]), name, preprocess), name, preprocess)
        array = np.asarray(image, dtype=np.uint8).reshape(image.height, image.width, -1)
        if preprocess.channels == "BGR":
            array = array[:, :, ::-1]
        return array.transpose(2, 0, 1) if preprocess.layout == "NCHW" else array


def normalize(pixels: NDArray[np.uint8], preprocess: Preprocess) -> NDArray[np.float32]:
    """`(pixel * scale - mean) / std` in float32, for pixels of any rank whose last axes are `preprocess.layout`'s."""
    shape = (-1, 1, 1) if preprocess.layout == "NCHW" else (-1,)
    # A division, as training pipelines do it: pixel / 255 is the exact float32, pixel * (1 / 255) is not.
    values = pixels.astype(np.float32) / np.float32(1 / preprocess.scale)
    if preprocess.mean:
        values -= np.asarray(preprocess.mean, np.float32).reshape(shape)
    if preprocess.std:
        values /= np.asarray(preprocess.std, np.float32).reshape(shape)
    return values


def open_images(path: Path) -> ImageFiles:
    """The images of a folder, searched in depth, or of a zip. Folders of images are classes, in alphabetical order, or
    by number where all names are numbers.

    Raises:
        DataError: when it cannot be read, holds no images, or mixes class folders with loose images.
    """
    files, read = _folder(path) if path.is_dir() else _zip(path)
    visible = [name for name in files if not _hidden(name)]
    names = sorted(name for name in visible if PurePosixPath(name).suffix.lower() in FORMATS)
    if not names:
        endings = Counter(PurePosixPath(name).suffix.lower() or "no ending" for name in visible)
        found = ", ".join(f"{count} with {ending}" for ending, count in endings.most_common(3)) or "no files at all"
        raise DataError(f"{path}: holds no images ({found}); expected files with {', '.join(FORMATS)}")
    classes = _classes(names, path)
    numbers = all(name.isdecimal() and len(name) < 1000 for name in classes)  # Python refuses to read longer ones
    class_names = tuple(sorted(set(classes), key=int if numbers else None))
    number = {name: label for label, name in enumerate(class_names)}
    labels = np.asarray([number[name] for name in classes], np.int64) if classes else None
    return ImageFiles(str(path), tuple(names), labels, class_names, len(visible) - len(names), read)


def _hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def _classes(names: Sequence[str], path: Path) -> list[str]:
    """The class folder of each image; empty when the images lie side by side. Folders around all of them don't count."""
    parts = [PurePosixPath(name).parts for name in names]
    while all(len(each) > 1 for each in parts) and len({each[0] for each in parts}) == 1:
        parts = [each[1:] for each in parts]
    loose = [name for name, each in zip(names, parts, strict=True) if len(each) == 1]
    if len(loose) == len(names):
        return []
    if loose:
        raise DataError(
            f"{path}: {len(loose)} images ({loose[0]!r}, ...) lie beside class folders; "
            "move each into its class's folder, or keep them all in one folder for data without labels"
        )
    return [each[0] for each in parts]


def _folder(path: Path) -> tuple[list[str], Callable[[str], bytes]]:
    def read(name: str) -> bytes:
        file = path / name
        try:
            _check_bytes(file.stat().st_size, f"{path}: image {name!r}")
            return file.read_bytes()
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error.strerror or error})") from error

    return [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()], read


def _zip(path: Path) -> tuple[list[str], Callable[[str], bytes]]:
    try:
        archive = zipfile.ZipFile(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (zipfile.BadZipFile, ValueError, RuntimeError, struct.error) as error:
        raise DataError(f"{path}: is not a zip file, or damaged ({error}); make it anew") from error

    def read(name: str) -> bytes:
        member = archive.getinfo(name)
        _check_bytes(member.file_size, f"{path}: image {name!r}")
        if member.flag_bits & 1:
            raise DataError(f"{path}: image {name!r} is encrypted; make the zip without a password")
        try:
            return archive.read(member)  # never more than file_size bytes
        except _BROKEN_MEMBER as error:
            raise DataError(f"{path}: image {name!r} cannot be unpacked ({error}); make the zip anew") from error

    return [member.filename for member in archive.infolist() if not member.is_dir()], read


_BROKEN_MEMBER = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error),
    *(OSError, EOFError, RuntimeError, ValueError),
)
"""What zipfile raises where it cannot unpack something; NotImplementedError is a RuntimeError."""


def _check_bytes(size: int, name: str) -> None:
    if size > MAX_FILE_BYTES:
        raise DataError(f"{name} is {size:,} bytes; at most {MAX_FILE_BYTES:,} are read: shrink or remove it")


def _decode(data: bytes, name: str, preprocess: Preprocess) -> Image:
    import PIL.Image

    bombs = (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning)
    try:
        image = PIL.Image.open(io.BytesIO(data), formats=sorted(set(FORMATS.values())))  # reads the header only
        if image.width * image.height > MAX_PIXELS:
            raise DataError(f"{name} is {image.width} x {image.height} pixels; {_TOO_LARGE}")
        if image.mode.startswith(("I", "F")):
            raise DataError(f"{name} has more than 8 bits a channel ({image.mode}); save it with 8")
        return image.convert("L" if preprocess.channels == "L" else "RGB")
    except DataError:
        raise
    except bombs as error:
        raise DataError(f"{name} has far too many pixels; {_TOO_LARGE}") from error
    except PIL.UnidentifiedImageError as error:
        raise DataError(f"{name} cannot be decoded (no image of a known format); repair or remove it") from error
    except Exception as error:  # on damaged bytes, Pillow's decoders raise whatever comes
        raise DataError(f"{name} cannot be decoded ({error or type(error).__name__}); repair or remove it") from error


_TOO_LARGE = f"at most {MAX_PIXELS:,} in all are decoded: shrink or remove it"


def _fit(image: Image, name: str, preprocess: Preprocess) -> Image:
    """Resized, then cropped around the centre."""
    import PIL.Image

    if preprocess.size is not None:
        height, width = _resized(image.height, image.width, preprocess.size)
        if height * width > MAX_PIXELS:
            raise DataError(
                f"{name} is {image.height} x {image.width} pixels (height x width), which [data.preprocess] resizes to "
                f"{height:,} x {width:,}; at most {MAX_PIXELS:,} in all are made: remove it, or set size = [height, width]"
            )
        image = image.resize((width, height), PIL.Image.Resampling[preprocess.resample.upper()])
    if preprocess.crop is not None:
        crop = preprocess.crop
        height, width = (crop, crop) if isinstance(crop, int) else crop
        if image.height < height or image.width < width:
            raise DataError(
                f"{name} is {image.height} x {image.width} pixels (height x width), smaller than the crop of "
                f"{height} x {width}; set a larger size in [data.preprocess], or a smaller crop"
            )
        top, left = round((image.height - height) / 2), round((image.width - width) / 2)
        image = image.crop((left, top, left + width, top + height))
    return image


def _resized(height: int, width: int, size: int | tuple[int, int]) -> tuple[int, int]:
    if not isinstance(size, int):
        return size
    if height < width:
        return size, int(size * width / height)
    return int(size * height / width), size
