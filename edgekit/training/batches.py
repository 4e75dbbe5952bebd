"""What a training loop is fed: batches of tensors by name, in an order that can be taken up again at any place."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgekit.data import InputSpec
from edgekit.data.samples import LABELS, as_array
from edgekit.errors import DataError
from edgekit.words import nearest

Tensors = dict[str, Tensor]
Indices = NDArray[np.intp]

NO_LABEL = -100
"""The label of samples that torch's losses leave out."""


@dataclass(frozen=True, slots=True)
class Share:
    """Which batches of an epoch one process trains on: with two processes, the first takes batches 0, 2, 4, ...

    Attributes:
        batch_size: samples in each batch.
        seed: of the order.
        process: its number among `processes`.
    """

    batch_size: int
    seed: int
    process: int = 0
    processes: int = 1

    def length(self, size: int) -> int:
        """Batches that each process gets out of an epoch of `size` samples; what is less than a batch is left out."""
        return size // (self.batch_size * self.processes)

    def indices(self, size: int, epoch: int, start: int) -> Iterator[Indices]:
        """The samples of each batch of an epoch, from batch `start` on: another order in each epoch."""
        order = np.random.default_rng((self.seed, epoch, 0)).permutation(size)
        for batch in range(start, self.length(size)):
            first = (batch * self.processes + self.process) * self.batch_size
            yield order[first : first + self.batch_size]


@runtime_checkable
class TrainData(Protocol):
    """Batches to train on: tensors by name; `labels` are among them where there are any."""

    name: str
    """What the user called it."""
    inputs: tuple[str, ...]
    """The module's inputs; a batch has those of them that the data has."""

    @property
    def size(self) -> int | None:
        """Number of samples; None for a user's own batches."""
        ...

    @property
    def key(self) -> dict[str, str | int]:
        """What must be the same for a run to go on with this data."""
        ...

    def length(self, share: Share) -> int | None:
        """Batches in an epoch of one process; None when they cannot be counted in advance."""
        ...

    def epoch(self, number: int, start: int, share: Share) -> Iterator[Tensors]:
        """The batches of an epoch from `start` on: those that the same epoch from 0 on comes to.

        Raises:
            DataError: the user's code fails, or yields what is no batch; a label is out of range.
        """
        ...

    def samples(self, epoch: int, batch: int, share: Share) -> list[int]:
        """The numbers of a batch's samples in the user's data, for messages; empty where they are not known."""
        ...

    def generators(self) -> list[torch.Generator]:
        """Generators of random numbers, besides the global ones, that decide what comes."""
        ...


@dataclass(frozen=True, slots=True)
class Names:
    """The inputs of a module.

    Attributes:
        needed: those that every batch must have, in order.
        known: those that it may have.
    """

    needed: tuple[str, ...]
    known: tuple[str, ...]


def input_names(inputs: Sequence[InputSpec] | nn.Module) -> Names:
    """The names of some inputs, or of those that a module's forward names.

    Raises:
        DataError: forward names none.
    """
    if not isinstance(inputs, nn.Module):
        names = tuple(spec.name for spec in inputs)
        return Names(names, names)
    by_name = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    parameters = [one for one in inspect.signature(inputs.forward).parameters.values() if one.kind in by_name]
    if not parameters:
        raise DataError(f"{type(inputs).__name__}.forward names no inputs; name them, as in forward(self, image)")
    needed = tuple(one.name for one in parameters if one.default is one.empty)
    return Names(needed, tuple(one.name for one in parameters if one.name in needed or one.name != LABELS))


def named_batch(value: Any, names: Names, source: str) -> Tensors:
    """What a user's code yields for a batch, as tensors by name.

    A tuple holds the inputs in order, and may hold labels after them; one of two may be inputs, in a tuple or dictionary, and labels.
    Of a dictionary everything is kept: what is no input of the module is for the loss. Arrays become tensors, float64 float32.

    Raises:
        DataError: an input is missing, or something is no tensor or array.
    """
    if isinstance(value, Mapping):
        named = {str(name): entry for name, entry in value.items()}
    else:
        parts = list(value) if isinstance(value, tuple | list) else [value]
        if len(parts) == 2 and isinstance(parts[0], Mapping | tuple | list):
            return named_batch(parts[0], names, source) | {LABELS: _tensor(parts[1], LABELS, source)}
        wanted = names.needed or names.known[:1]
        if len(parts) not in (len(wanted), len(wanted) + 1):
            listed = ", ".join(map(repr, wanted))
            raise DataError(
                f"{source}: a batch of {len(parts)} parts for a module with {len(wanted)} inputs ({listed}); give the inputs in "
                "order, with labels after them or without; or a dictionary by name"
            )
        named = dict(zip((*wanted, LABELS), parts, strict=False))
    missing = [name for name in names.needed if name not in named]
    if missing:
        raise nothing_for(missing[0], list(named), source)
    return {name: _tensor(entry, name, source) for name, entry in named.items()}


def nothing_for(missing: str, found: Sequence[str], source: str) -> DataError:
    """The error that an input has no data."""
    near = nearest(missing, found, cutoff=0.6)
    hint = f"rename {near!r}" if near else "name the arrays like the module's inputs"
    listed = ", ".join(map(repr, found)) or "none"
    return DataError(f"{source}: nothing for the input {missing!r} (found: {listed}); {hint}")


def check_labels(labels: NDArray[Any], classes: int | None, source: str) -> None:
    """Hold class numbers against the number of classes, or only 0 where that is not known; -100 is no label.

    Raises:
        DataError: one is out of range; they are no whole numbers, though there are classes.
    """
    if labels.dtype.kind not in "iu":
        if classes is None:
            return
        raise DataError(f"{source}: labels are {labels.dtype.name}; expected class numbers: whole numbers from 0 on")
    above = labels >= classes if classes is not None else np.zeros(labels.shape, bool)
    wrong = np.argwhere(((labels < 0) & (labels != NO_LABEL)) | above)
    if len(wrong):
        limit = "0 and up" if classes is None else f"0 to {classes - 1}, as the model has {classes} classes"
        raise DataError(
            f"{source}: {len(wrong)} of {labels.size} labels are out of range, the first {labels[tuple(wrong[0])]} of sample "
            f"{wrong[0][0] if labels.ndim else 0}; expected {limit}"
        )


def _tensor(value: Any, name: str, source: str) -> Tensor:
    if isinstance(value, Tensor):
        return value
    array = as_array(value, f"{source}: {name!r}")
    return torch.from_numpy(np.array(array, np.float32 if array.dtype == np.float64 else None))
