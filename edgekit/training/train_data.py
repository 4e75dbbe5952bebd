"""Training data from files, arrays or a user's code; images are decoded once and held as bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from edgekit.data import InputSpec, Preprocess, open_data
from edgekit.data.datasets import ArrayData, ImageData
from edgekit.data.images import normalize
from edgekit.data.samples import LABELS, as_array, prepared
from edgekit.errors import DataError
from edgekit.progress import Progress, silent
from edgekit.reference import resolve_reference, user_code
from edgekit.schedule import Augment
from edgekit.training.augment import Draws, Layout, augmented, draw
from edgekit.training.batches import Indices, Share, Tensors, TrainData, check_labels, input_names, nothing_for
from edgekit.training.user_data import user_data

Array = NDArray[Any]
Finish = Callable[[str, Array, Indices], Array]
"""Makes of some samples of an input, as they are held, what the module takes."""

MOST_BYTES = 4 * 2**30
"""Of decoded images in memory."""
REPORT_EVERY = 64
"""Images between two words of progress."""

PLAIN = Augment()


class Samples(Dataset[tuple[Tensors, Tensor | None]]):
    """Arrays, or images decoded once. As a `torch.utils.data.Dataset`, each sample is its inputs by name, and its label or None.

    The batches of `epoch` are augmented, what the dataset gives is not; both count samples as the user's data does.
    """

    def __init__(
        self,
        name: str,
        arrays: Mapping[str, Array],
        finish: Finish,
        labels: NDArray[np.int64] | None,
        augment: Augment = PLAIN,
        layout: Layout = "NCHW",
    ) -> None:
        """Arrays by input, samples along axis 0; `finish` is for what augmentation left of them."""
        self.name, self.inputs, self.labels = name, tuple(arrays), labels
        self._arrays, self._finish, self._augment, self._layout = dict(arrays), finish, augment, layout

    @property
    def size(self) -> int:
        """Number of samples."""
        return len(next(iter(self._arrays.values())))

    @property
    def key(self) -> dict[str, str | int]:
        """See `TrainData.key`."""
        return {"samples": self.size, "flip": self._augment.flip, "crop": self._augment.crop}

    def __len__(self) -> int:
        """Number of samples."""
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensors, Tensor | None]:
        """The inputs of a sample by name, without a batch axis, and its label."""
        batch = self._batch(self._read, np.asarray([index], np.intp))
        sample = {name: tensor[0] for name, tensor in batch.items()}
        label = sample.pop(LABELS) if self.labels is not None else None
        return sample, label

    def length(self, share: Share) -> int:
        """See `TrainData.length`."""
        return share.length(self.size)

    def epoch(self, number: int, start: int, share: Share) -> Iterator[Tensors]:
        """See `TrainData.epoch`."""
        read = self._read
        if self._augment != PLAIN:
            read = partial(self._varied, draw(self._augment, self.size, seed=share.seed, epoch=number))
        for indices in share.indices(self.size, number, start):
            yield self._batch(read, indices)

    def samples(self, epoch: int, batch: int, share: Share) -> list[int]:
        """See `TrainData.samples`."""
        return [int(index) for index in next(share.indices(self.size, epoch, batch))]

    def generators(self) -> list[torch.Generator]:
        """See `TrainData.generators`."""
        return []

    def _read(self, name: str, indices: Indices) -> Array:
        return np.asarray(self._arrays[name][indices])

    def _varied(self, draws: Draws, name: str, indices: Indices) -> Array:
        return augmented(self._read(name, indices), indices, draws, self._augment.crop, self._layout)

    def _batch(self, read: Callable[[str, Indices], Array], indices: Indices) -> Tensors:
        batch = {name: torch.from_numpy(self._finish(name, read(name, indices), indices)) for name in self._arrays}
        if self.labels is not None:
            batch[LABELS] = torch.from_numpy(self.labels[indices])
        return batch


def open_train_data(
    reference: Any,
    inputs: Sequence[InputSpec] | nn.Module,
    *,
    preprocess: Preprocess | None = None,
    augment: Augment = PLAIN,
    classes: int | None = None,
    on_progress: Progress = silent,
) -> TrainData:
    """What `--train-data` names, or an object, as batches for a module.

    Args:
        reference: an `.npz` or `.npy` file, a folder or zip of images; `module:function`, the function itself, or what it returns:
            a `torch.utils.data.Dataset` of samples, or an iterable of batches such as a `DataLoader`; arrays by name. A sample or
            batch is a tensor, a tuple of the inputs in order, of these and the labels, or a dictionary by name. A function
            that returns an iterator is called for every epoch.
        inputs: of the module; or the module itself, when its forward names them.
        preprocess: for images only.
        augment: for images, and arrays `(N, C, H, W)`. A user's code does its own.
        classes: when labels are class numbers, how many there are; each label is then checked.

    Raises:
        DataError: it does not exist, cannot be read, holds nothing, does not fit the inputs, or does not fit in memory.
    """
    is_text = isinstance(reference, str | Path)
    name = str(reference) if is_text else f"training data ({type(reference).__name__})"
    if is_text and (Path(reference).exists() or ":" not in name):
        dataset = open_data(reference, preprocess=preprocess)
        assert isinstance(dataset, ArrayData | ImageData), "functions come below"
        return _stored(dataset, inputs, augment, classes, on_progress)
    found = resolve_reference(name, error=DataError, what="training data") if is_text else reference
    made, again = found, None
    if isinstance(found, type) or not any(hasattr(found, how) for how in ("__getitem__", "__iter__", "__array__")):
        if not callable(found):
            raise DataError(
                f"{name}: is a {type(found).__name__}; expected a dataset, batches, or a function that returns them"
            )
        again = found
        with user_code(DataError, f"{name}: the function"):
            made = found()
    if preprocess is not None:
        raise DataError(f"{name}: [data.preprocess] is for a folder or zip of images only; remove it")
    if isinstance(made, Mapping) or hasattr(made, "__array__"):
        arrays = {str(key): as_array(value, name) for key, value in made.items()} if isinstance(made, Mapping) else None
        return _stored(ArrayData(name, arrays or (as_array(made, name),), 0), inputs, augment, classes, on_progress)
    if augment != PLAIN:
        raise DataError(
            f"{name}: augmentation is for images and arrays; remove it, and let the function vary its samples"
        )
    return user_data(name, made, input_names(inputs), classes, again)


def _stored(
    dataset: ArrayData | ImageData,
    inputs: Sequence[InputSpec] | nn.Module,
    augment: Augment,
    classes: int | None,
    on_progress: Progress,
) -> Samples:
    """Arrays and images."""
    name = dataset.name
    specs = {spec.name: spec for spec in (_specs(inputs, dataset) if isinstance(inputs, nn.Module) else inputs)}
    bound = dataset.bind(list(specs.values()))
    if bound.plan.single:
        raise DataError(
            f"{name}: its samples cannot be put together in batches; give module:function, which returns batches"
        )
    if augment != PLAIN and [len(spec.shape) for spec in specs.values()] != [4]:
        listed = ", ".join(map(str, specs.values()))
        raise DataError(f"{name}: augmentation is for one input of images, with 4 axes; found {listed}; remove it")
    if bound.labels is not None:
        check_labels(bound.labels, classes, name)
    if isinstance(dataset, ImageData):
        pixels, (spec,) = _decoded(dataset, on_progress), specs.values()
        finish = partial(_normal, dataset.preprocess, spec)
        return Samples(name, {spec.name: pixels}, finish, bound.labels, augment, dataset.preprocess.layout)
    arrays = dataset.arrays if isinstance(dataset.arrays, dict) else dict(zip(specs, dataset.arrays, strict=True))
    return Samples(name, {key: arrays[key] for key in specs}, partial(_checked, name, specs), bound.labels, augment)


def _checked(source: str, specs: Mapping[str, InputSpec], name: str, array: Array, indices: Indices) -> Array:
    return prepared(source, specs[name], array, indices.tolist(), single=False)


def _normal(how: Preprocess, spec: InputSpec, name: str, pixels: Array, indices: Indices) -> Array:
    return pixels if spec.dtype == np.uint8 else normalize(pixels, how).astype(spec.dtype, copy=False)


def _decoded(data: ImageData, on_progress: Progress) -> NDArray[np.uint8]:
    """All images, resized and cropped: `(N, C, H, W)` or `(N, H, W, C)`."""
    files, first = data.files, data.files.pixels(0, data.preprocess)
    needed = first.nbytes * data.size
    if needed > MOST_BYTES:
        raise DataError(
            f"{data.name}: {data.size:,} images of {first.shape} take {needed / 2**30:.1f} GiB of memory, more than "
            f"{MOST_BYTES / 2**30:g}; set a smaller size in [data.preprocess], or give module:function, which returns a "
            "torch.utils.data.Dataset that decodes an image when it is asked for"
        )
    pixels = np.empty((data.size, *first.shape), np.uint8)
    for index, name in enumerate(files.names):
        image = files.pixels(index, data.preprocess)
        if image.shape != first.shape:
            raise DataError(
                f"{data.name}: images of different sizes ({files.names[0]!r} gives {first.shape}, {name!r} {image.shape}); "
                "set size = [height, width] in [data.preprocess]"
            )
        pixels[index] = image
        if not (index + 1) % REPORT_EVERY or index + 1 == data.size:
            on_progress("read training images", index + 1, data.size)
    return pixels


def _specs(module: nn.Module, dataset: ArrayData | ImageData) -> list[InputSpec]:
    """A module's inputs, of the types and shapes that the data has."""
    names, found = input_names(module), dataset.examples(1)
    named = found if isinstance(found, dict) else dict(zip(names.needed or names.known, found, strict=False))
    missing = [name for name in names.needed or names.known[:1] if name not in named]
    if missing:
        raise nothing_for(missing[0], list(named), dataset.name)
    given = {name: named[name] for name in names.known if name in named}
    return [InputSpec(name, array.dtype, (None, *array.shape[1:])) for name, array in given.items()]
