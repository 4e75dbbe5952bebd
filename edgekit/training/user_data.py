"""Training data that a user's code makes: datasets of samples, and batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from edgekit.data.samples import LABELS
from edgekit.errors import DataError, EdgekitError
from edgekit.reference import user_code
from edgekit.training.batches import Names, Share, Tensors, TrainData, check_labels, named_batch
from edgekit.training.checkpoint import users_error

_END = object()


class UserDataset:
    """Single samples: a `torch.utils.data.Dataset`, or anything with a length and numbered items."""

    def __init__(self, name: str, dataset: Any, names: Names, classes: int | None) -> None:
        """Asks for its length."""
        self.name, self.inputs = name, names.known
        self._dataset, self._names, self._classes = dataset, names, classes
        with user_code(DataError, f"{name}: its __len__"):
            self.size: int = len(dataset)
        if not self.size:
            raise DataError(f"{name}: holds no samples; give at least a batch of them")

    @property
    def key(self) -> dict[str, str | int]:
        """See `TrainData.key`."""
        return {"samples": self.size}

    def length(self, share: Share) -> int:
        """See `TrainData.length`."""
        return share.length(self.size)

    def epoch(self, number: int, start: int, share: Share) -> Iterator[Tensors]:
        """See `TrainData.epoch`. A dataset with a method `set_epoch` is told."""
        with _theirs(self.name):
            _set_epoch(self._dataset, number)
            chosen = [indices.tolist() for indices in share.indices(self.size, number, start)]
            generator = torch.Generator().manual_seed(
                share.seed
            )  # without one, it would draw from the global generator
            iterator = iter(DataLoader(self._dataset, batch_sampler=chosen, generator=generator))
        return _named(iterator, self.name, self._names, self._classes)

    def samples(self, epoch: int, batch: int, share: Share) -> list[int]:
        """See `TrainData.samples`."""
        return [int(index) for index in next(share.indices(self.size, epoch, batch))]

    def generators(self) -> list[torch.Generator]:
        """See `TrainData.generators`."""
        return []


class UserBatches:
    """Batches, such as those of a `DataLoader`: they are read again from the first to come to a later one."""

    size: int | None = None

    def __init__(
        self, name: str, batches: Any, names: Names, classes: int | None, again: Callable[[], Any] | None = None
    ) -> None:
        """`again` is called for the batches of each epoch; without it they are `batches`, or its samples put together."""
        self.name, self.inputs = name, names.known
        self._batches, self._again, self._names, self._classes = batches, again, names, classes

    @property
    def key(self) -> dict[str, str | int]:
        """See `TrainData.key`."""
        return {}

    def length(self, share: Share) -> int | None:
        """See `TrainData.length`."""
        if self._again is not None:
            return None
        try:
            return len(self._open(share)) // share.processes
        except TypeError:  # it has no length, or is a DataLoader over what has none
            return None

    def epoch(self, number: int, start: int, share: Share) -> Iterator[Tensors]:
        """See `TrainData.epoch`. Batches before `start` are read at once, and dropped."""
        with _theirs(self.name):
            iterable = self._open(share)
            for part in (iterable, getattr(iterable, "sampler", None), getattr(iterable, "dataset", None)):
                _set_epoch(part, number)
            iterator = iter(iterable)
            for _ in islice(iterator, start * share.processes):
                pass
        mine = islice(iterator, share.process, None, share.processes)
        return _named(mine, self.name, self._names, self._classes)

    def samples(self, epoch: int, batch: int, share: Share) -> list[int]:
        """See `TrainData.samples`."""
        return []

    def generators(self) -> list[torch.Generator]:
        """See `TrainData.generators`: those of a DataLoader, its sampler and its dataset."""
        holders = [self._batches, *(getattr(self._batches, name, None) for name in ("sampler", "dataset"))]
        found = [getattr(holder, "generator", None) for holder in holders]
        return list({id(one): one for one in found if isinstance(one, torch.Generator)}.values())

    def _open(self, share: Share) -> Any:
        if self._again is not None:
            return self._again()
        if isinstance(self._batches, IterableDataset):
            return DataLoader(self._batches, share.batch_size, drop_last=True)
        return self._batches


def user_data(name: str, made: Any, names: Names, classes: int | None, again: Callable[[], Any] | None) -> TrainData:
    """A dataset or batches.

    Args:
        again: the function that `made` came from, if any.

    Raises:
        DataError: it is neither, is empty, or can be read only once.
    """
    numbered = hasattr(made, "__getitem__") and hasattr(made, "__len__") and not isinstance(made, list | tuple)
    if isinstance(made, Dataset) or (numbered and not isinstance(made, DataLoader)):
        if not isinstance(made, IterableDataset):
            return UserDataset(name, made, names, classes)
    elif isinstance(made, Iterator):
        if again is None:
            raise DataError(
                f"{name}: an iterator can be read only once; give a function that returns a new one for each epoch"
            )
        return UserBatches(name, made, names, classes, again)
    elif not isinstance(made, Iterable):
        raise DataError(
            f"{name}: is a {type(made).__name__}; expected a torch.utils.data.Dataset, or an iterable of batches such as a DataLoader"
        )
    data = UserBatches(name, made, names, classes)
    if data.length(Share(1, 0)) == 0:
        raise DataError(f"{name}: holds no batches; give at least one, and samples enough for it")
    return data


def _named(batches: Iterator[Any], source: str, names: Names, classes: int | None) -> Iterator[Tensors]:
    while True:
        with _theirs(source):
            value = next(batches, _END)
        if value is _END:
            return
        batch = named_batch(value, names, source)
        if classes is not None and LABELS in batch:
            check_labels(batch[LABELS].numpy(force=True), classes, f"{source}: a batch")
        yield batch


@contextmanager
def _theirs(source: str) -> Iterator[None]:
    """Names the line of the user's that an error comes from, below those of torch that called it."""
    try:
        yield
    except EdgekitError:
        raise
    except Exception as error:  # whatever the user's code raises
        raise DataError(f"{source}: the data raised {users_error(error)}") from error


def _set_epoch(found: Any, number: int) -> None:
    if callable(getattr(found, "set_epoch", None)):
        found.set_epoch(number)
