"""Calibration and evaluation data: arrays, images or a function, cut into batches for a model's inputs.

`open_data` finds out what the data is; `bind` holds it against a model's inputs; `batches` reads it, as often as wanted.
Arrays and images are visited in one shuffled order that depends on the seed alone, so that the first samples are a fair
mix of all; a function keeps its own order. Memory does not grow with the number of samples: images are decoded batch
by batch, `.npy` files stay on disk; only an `.npz` is loaded whole.
"""

from __future__ import annotations

import inspect
import lzma
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgekit.data.images import ImageFiles, Preprocess, normalize, open_images
from edgekit.data.samples import (
    LABELS,
    Array,
    Batch,
    InputSpec,
    Plan,
    as_array,
    by_name,
    check_type,
    checked_labels,
    plan_calls,
    prepared,
    without_doubles,
)
from edgekit.data.streams import StreamData
from edgekit.errors import DataError
from edgekit.reference import resolve_reference

MAX_UNPACKED = 2**30
"""Bytes that any .npz may hold when unpacked."""
MAX_RATIO = 100
"""A larger .npz is refused before it is unpacked, where it holds more than this many times its own size: a zip bomb."""

KINDS = "an .npz or .npy file, a folder or .zip of images, or module:function"


class BoundData(Protocol):
    """Data that fits a model."""

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """The model's inputs."""
        ...

    @property
    def size(self) -> int | None:
        """Number of samples; None for a function."""
        ...

    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """The samples from `start` to `stop`, `batch_size` in each batch; the last one may be shorter.

        A model with a static batch axis gets batches of exactly that size, and a short rest is left out. Samples that
        are whole calls come one by one. Each call starts a new pass in the same order.

        Raises:
            DataError: NaN, an infinity or a number out of range, named with its sample; a sample of another shape.
        """
        ...


class Dataset(Protocol):
    """Data as it was found, before it is known what the model takes."""

    @property
    def name(self) -> str:
        """What the user called it."""
        ...

    @property
    def size(self) -> int | None:
        """Number of samples; None for a function."""
        ...

    @property
    def labelled(self) -> bool:
        """Whether samples have class numbers."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """The class folders, class 0 first; empty for other data."""
        ...

    def bind(self, inputs: Sequence[InputSpec]) -> BoundData:
        """Hold the data against a model's inputs.

        Raises:
            DataError: an input without data; a wrong rank, dimension or type; arrays of different lengths; no samples.
        """
        ...

    def examples(self, count: int) -> dict[str, Array] | tuple[Array, ...]:
        """See `example_arrays`."""
        ...


def open_data(
    reference: str | Path | Mapping[str, Any] | Iterable[Any] | Callable[[], Any],
    *,
    preprocess: Preprocess | None = None,
    seed: int = 0,
) -> Dataset:
    """The data behind a path, a `module:function`, arrays by name, or an object that yields batches.

    Args:
        reference: an `.npz` or `.npy` file, a folder or zip of images, `package.module:function` or `path/file.py:function`;
            or the arrays (one, or several by name), the function, or an iterable of batches, such as a data loader.
        preprocess: for images only.
        seed: of the order in which arrays and images are visited.

    Raises:
        DataError: when it does not exist, cannot be read, holds nothing, or is none of these.
    """
    if isinstance(reference, str | Path):
        path = Path(reference)
        if path.is_dir() or (path.is_file() and path.suffix.lower() == ".zip"):
            return ImageData(str(path), open_images(path), preprocess or Preprocess(), seed)
    if preprocess is not None:
        raise DataError(
            f"{reference}: [data.preprocess] is for images only; remove it, or give a folder or zip of images"
        )
    if not isinstance(reference, str | Path):
        return _open_object(reference, "calibration data", seed)
    if path.is_file():
        return _open_arrays(path, seed)
    if ":" not in str(reference):
        raise DataError(f"{path}: does not exist; expected {KINDS}")
    found = resolve_reference(str(reference), error=DataError, what="calibration data")
    return _open_object(found, str(reference), seed)


def example_arrays(dataset: Dataset, count: int) -> dict[str, Array] | tuple[Array, ...]:
    """The first `count` samples, before a model's inputs are known: to export a torch model with.

    Arrays come by name, or in the order of the inputs where they have no names; labels are left out and float64
    becomes float32. There may be fewer than `count`.
    """
    return dataset.examples(count)


def _open_arrays(path: Path, seed: int) -> ArrayData:
    try:
        if path.suffix.lower() == ".npy":
            with np.errstate(over="ignore"):  # of a shape that no array can have, which is an error by itself
                return ArrayData(str(path), (np.lib.format.open_memmap(path, mode="r"),), seed)
        if path.suffix.lower() == ".npz":
            with zipfile.ZipFile(path) as archive:
                _check_unpacked(archive, path)
                members = {member.removesuffix(".npy"): member for member in archive.namelist()}
                arrays = {name: _npz_member(archive, member) for name, member in members.items()}
            return ArrayData(str(path), arrays, seed)
    except MemoryError as error:
        raise DataError(
            f"{path}: does not fit in memory; give a .npy file, or a function that yields batches"
        ) from error
    except _UNREADABLE as error:
        raise DataError(
            f"{path}: cannot be read ({error}); write it with numpy.savez or numpy.save, plain numbers only"
        ) from error
    raise DataError(f"{path}: unknown kind of data; expected {KINDS}")


_UNREADABLE = (
    *(OSError, ValueError, EOFError, RuntimeError, TypeError, KeyError, SyntaxError, tokenize.TokenError),
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError),
)
"""What numpy and zipfile raise on damaged files."""


def _check_unpacked(archive: zipfile.ZipFile, path: Path) -> None:
    size = sum(member.file_size for member in archive.infolist())  # zipfile unpacks no more than it says here
    if size > max(MAX_UNPACKED, MAX_RATIO * path.stat().st_size):
        raise DataError(
            f"{path}: unpacks to {size:,} bytes, more than {MAX_RATIO} times its own size; where that is what you want, "
            "give a .npy file, which stays on disk, or an .npz that is not compressed"
        )


def _npz_member(archive: zipfile.ZipFile, member: str) -> Array:
    with archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _open_object(found: Any, name: str, seed: int) -> Dataset:
    if isinstance(found, Mapping):
        return ArrayData(name, {str(key): as_array(value, name) for key, value in found.items()}, seed)
    if hasattr(found, "__array__"):
        return ArrayData(name, (as_array(found, name),), seed)
    if callable(found):
        _check_no_arguments(found, name)
        return StreamData(name, found)
    if isinstance(found, Iterator):
        raise DataError(f"{name}: an iterator can be read only once; give a function that returns a new one each time")
    if isinstance(found, Iterable):
        return StreamData(name, lambda: found)
    raise DataError(f"{name}: is a {type(found).__name__}; expected arrays by name, or a function that yields batches")


def _check_no_arguments(function: Callable[..., Any], name: str) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # a builtin that does not tell
        return
    try:
        signature.bind()
    except TypeError as error:
        raise DataError(
            f"{name}: is called without arguments, but takes {signature}; give the others defaults"
        ) from error


def _order(count: int, seed: int) -> NDArray[np.intp]:
    return np.random.default_rng(seed).permutation(count)


@dataclass(frozen=True, slots=True, eq=False)
class ArrayData:
    """Whole arrays, by input name or in the order of the inputs; samples along axis 0."""

    name: str
    arrays: dict[str, Array] | tuple[Array, ...]
    seed: int

    @property
    def size(self) -> int | None:
        """Samples in the first array."""
        arrays = self.arrays if isinstance(self.arrays, tuple) else self._without_labels().values()
        return next((len(array) for array in arrays if array.ndim), 0)

    @property
    def labelled(self) -> bool:
        """Whether there is an array `labels`."""
        return isinstance(self.arrays, dict) and LABELS in self.arrays

    @property
    def class_names(self) -> tuple[str, ...]:
        """Arrays have none."""
        return ()

    def bind(self, inputs: Sequence[InputSpec]) -> IndexedData:
        """See `Dataset.bind`."""
        arrays = by_name(self.name, self.arrays, inputs)
        for spec in inputs:
            check_type(self.name, spec, arrays[spec.name].dtype)
        plan = plan_calls(self.name, inputs, {name: array.shape for name, array in arrays.items()}, stream=False)
        size = len(next(iter(arrays.values())))
        labels = None
        if isinstance(self.arrays, dict) and self.labelled and LABELS not in arrays:
            labels = checked_labels(self.name, self.arrays[LABELS], size, rows=plan.single)
        readers: dict[str, Reader] = {name: array.__getitem__ for name, array in arrays.items()}
        return IndexedData(self.name, tuple(inputs), plan, readers, labels, _order(size, self.seed))

    def examples(self, count: int) -> dict[str, Array] | tuple[Array, ...]:
        """See `example_arrays`."""
        first = _order(self.size or 0, self.seed)[:count]
        if isinstance(self.arrays, tuple):
            return tuple(without_doubles(array[first]) for array in self.arrays)
        same_length = {name: array for name, array in self._without_labels().items() if array.shape[:1] == (self.size,)}
        return {name: without_doubles(array[first]) for name, array in same_length.items()}

    def _without_labels(self) -> dict[str, Array]:
        assert isinstance(self.arrays, dict)
        return {name: array for name, array in self.arrays.items() if name != LABELS}


@dataclass(frozen=True, slots=True, eq=False)
class ImageData:
    """Images, decoded when a batch asks for them."""

    name: str
    files: ImageFiles
    preprocess: Preprocess
    seed: int

    @property
    def size(self) -> int:
        """Number of images."""
        return len(self.files.names)

    @property
    def labelled(self) -> bool:
        """Whether they lie in class folders."""
        return self.files.labels is not None

    @property
    def class_names(self) -> tuple[str, ...]:
        """The class folders, class 0 first."""
        return self.files.class_names

    def bind(self, inputs: Sequence[InputSpec]) -> IndexedData:
        """See `Dataset.bind`; decodes one image."""
        if len(inputs) != 1:
            names = ", ".join(repr(spec.name) for spec in inputs)
            raise DataError(
                f"{self.name}: images feed one input, and the model has {len(inputs)} ({names}); "
                "give an .npz with an array for each, or a function"
            )
        spec = inputs[0]
        raw = spec.dtype == np.uint8
        if raw and not self.preprocess.raw:
            raise DataError(
                f"{self.name}: {spec} takes pixels from 0 to 255; set scale = 1.0 in [data.preprocess], "
                "and neither mean nor std"
            )
        order = _order(self.size, self.seed)
        example = self._read(order[:1], raw)
        check_type(self.name, spec, example.dtype)
        plan = plan_calls(self.name, inputs, {spec.name: (self.size, *example.shape[1:])}, stream=False)
        readers: dict[str, Reader] = {spec.name: lambda indices: self._read(indices, raw)}
        return IndexedData(self.name, (spec,), plan, readers, self.files.labels, order)

    def examples(self, count: int) -> tuple[Array, ...]:
        """See `example_arrays`; float32."""
        return (self._read(_order(self.size, self.seed)[:count], False),)

    def _read(self, indices: NDArray[np.intp], raw: bool) -> Array:
        """Images as `(len(indices), C, H, W)` or `(len(indices), H, W, C)`; uint8 when `raw`, else float32."""
        images = [self.files.pixels(int(index), self.preprocess) for index in indices]
        for index, image in zip(indices, images, strict=True):
            if image.shape != images[0].shape:
                raise DataError(
                    f"{self.name}: images of different sizes ({self.files.names[indices[0]]!r} gives {images[0].shape}, "
                    f"{self.files.names[index]!r} {image.shape}); set size = [height, width] in [data.preprocess]"
                )
        return np.stack(images) if raw else normalize(np.stack(images), self.preprocess)


Reader = Callable[[NDArray[np.intp]], Array]


@dataclass(frozen=True, slots=True, eq=False)
class IndexedData:
    """Arrays or images that fit a model: any sample can be read, by its number."""

    name: str
    inputs: tuple[InputSpec, ...]
    plan: Plan
    readers: dict[str, Reader]
    labels: NDArray[np.int64] | None
    order: NDArray[np.intp]

    def __post_init__(self) -> None:
        if not self.size:
            raise DataError(f"{self.name}: holds no samples; give at least one, better a few hundred")
        if self.plan.fixed is not None and self.size < self.plan.fixed:
            raise DataError(
                f"{self.name}: holds {self.size} samples, and the model takes exactly {self.plan.fixed} at a time; "
                "give more, or export the model with a dynamic batch axis"
            )

    @property
    def size(self) -> int:
        """Number of samples."""
        return len(self.order)

    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """See `BoundData.batches`."""
        assert batch_size >= 1 and start >= 0
        chosen = self.order[start:stop]
        step = 1 if self.plan.single else self.plan.fixed or batch_size
        for first in range(0, len(chosen), step):
            indices = chosen[first : first + step]
            if self.plan.fixed is None or len(indices) == step:
                yield self._batch(indices)

    def _batch(self, indices: NDArray[np.intp]) -> Batch:
        feeds = {}
        for spec in self.inputs:
            array = self.readers[spec.name](indices)
            row = spec.name in self.plan.rows
            feeds[spec.name] = prepared(self.name, spec, array[0] if row else array, indices.tolist(), single=row)
        labels = None if self.labels is None else self.labels[indices].reshape(-1)
        return Batch(feeds, labels, self.plan.single)
