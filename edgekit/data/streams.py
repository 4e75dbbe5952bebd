"""Data from a user's function, cut and merged into batches of the wanted size.

The function takes no arguments and returns an iterable, anew for each pass. Each item that it yields is a batch:

- an array: for a model with one input;
- a tuple or list of arrays: in the order of the inputs;
- a dictionary: arrays by input name, and class numbers under `labels`;
- a pair `(inputs, labels)`, where `inputs` is any of the above.

A pair of two arrays could be two inputs as well. It is `(inputs, labels)` when the second one is 1-D, of whole numbers,
and as long as the first one, which is not 1-D; a function for which that is wrong yields dictionaries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

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
from edgekit.errors import DataError
from edgekit.reference import user_code

_END = object()


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """What a function yielded: arrays, by name or in the order of the inputs, and labels."""

    arrays: dict[str, Array] | tuple[Array, ...]
    labels: Array | None


class StreamData:
    """A function that yields batches, in its own order."""

    size: int | None = None
    class_names: tuple[str, ...] = ()

    def __init__(self, name: str, function: Callable[[], Any]) -> None:
        """Calls the function once, for its first item."""
        self.name = name
        self._function = function
        self._used: object = None
        self._first = next(self.items())

    @property
    def labelled(self) -> bool:
        """Whether the first item has labels."""
        return self._first.labels is not None

    def bind(self, inputs: Sequence[InputSpec]) -> BoundStream:
        """See `edgekit.data.Dataset.bind`; looks at the first item, the others follow as they are read."""
        plan = _plan(self.name, inputs, self._first)
        return BoundStream(self, tuple(inputs), plan)

    def examples(self, count: int) -> dict[str, Array] | tuple[Array, ...]:
        """See `edgekit.data.example_arrays`; at most the first item."""
        arrays = self._first.arrays
        inputs = [array for name, array in arrays.items() if name != LABELS] if isinstance(arrays, dict) else arrays
        # Arrays of different lengths, such as the state of a recurrent layer, are one call as they stand.
        stop = count if len({len(array) for array in inputs if array.ndim}) == 1 else None
        cut = [without_doubles(array[:stop] if array.ndim else array) for array in inputs]
        return (
            dict(zip([name for name in arrays if name != LABELS], cut, strict=True))
            if isinstance(arrays, dict)
            else tuple(cut)
        )

    def items(self) -> Iterator[Item]:
        """A new pass over what the function yields.

        Raises:
            DataError: the function raises, yields nothing or something unknown, or cannot be called again.
        """
        with user_code(DataError, f"{self.name}: the function"):
            result = self._function()
            if isinstance(result, Mapping) or hasattr(result, "__array__"):
                result = [result]  # one batch, not a row or a name at a time
            if not hasattr(result, "__iter__") and not hasattr(result, "__getitem__"):
                raise DataError(f"{self.name}: gives a {type(result).__name__}; expected an iterable of batches")
            iterator = iter(result)
        if iterator is result and result is self._used:
            raise DataError(f"{self.name}: returns the same iterator again; expected a new one for each pass")
        self._used = result if iterator is result else None
        found = False
        while (value := self._next(iterator)) is not _END:
            found = True
            yield _item(value, self.name)
        if not found:
            raise DataError(f"{self.name}: yields nothing; expected at least one batch, each time it is called")

    def _next(self, iterator: Iterator[Any]) -> Any:
        with user_code(DataError, f"{self.name}: the function"):
            return next(iterator, _END)


class BoundStream:
    """A function's batches, for a model."""

    size: int | None = None

    def __init__(self, data: StreamData, inputs: tuple[InputSpec, ...], plan: Plan) -> None:
        """Nothing is read yet."""
        self.inputs = inputs
        self._data = data
        self._plan = plan

    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """See `edgekit.data.BoundData.batches`. Samples of other dimensions than those before begin a new batch."""
        assert batch_size >= 1 and start >= 0
        fixed = self._plan.fixed
        pieces = _window(self._pieces(), start, stop)
        found = False
        for batch in pieces if self._plan.single else _rebatch(pieces, fixed or batch_size):
            if fixed is None or len(batch) == fixed:
                found = True
                yield batch
        if not found and start == 0 and stop is None:
            raise DataError(
                f"{self._data.name}: yields fewer samples than the {fixed} that the model takes at a time; "
                "yield more, or export the model with a dynamic batch axis"
            )

    def _pieces(self) -> Iterator[Batch]:
        """What the function yields, as batches of whatever size."""
        name = self._data.name
        sample = 0
        for item in self._data.items():
            if _plan(name, self.inputs, item) != self._plan or (item.labels is not None) != self._data.labelled:
                raise DataError(
                    f"{name}: the batch that begins with sample {sample} is unlike the first one (its ranks, or whether "
                    "it has labels); yield the same kind each time"
                )
            for piece in self._calls(item, sample):
                yield piece
                sample += len(piece)
        if not sample:
            raise DataError(f"{name}: yields no samples, only empty arrays; expected at least one")

    def _calls(self, item: Item, sample: int) -> Iterator[Batch]:
        """One item, whose first sample is number `sample`; with rows, each row by itself."""
        name, rows = self._data.name, self._plan.rows
        arrays = by_name(name, item.arrays, self.inputs)
        whole = self._plan.single and not rows
        count = 1 if whole else len(next(iter(arrays.values())))
        labels = None
        if item.labels is not None and all(spec.name != LABELS for spec in self.inputs):
            labels = checked_labels(name, item.labels, len(item.labels) if whole else count, rows=bool(rows))
        if not rows:
            if count:
                yield Batch(self._feeds(arrays, range(sample, sample + count)), labels, whole)
            return
        for row in range(count):
            picked = {key: array[row] if key in rows else array[row : row + 1] for key, array in arrays.items()}
            label = None if labels is None else labels[row : row + 1].reshape(-1)
            yield Batch(self._feeds(picked, [sample + row]), label, single=True)

    def _feeds(self, arrays: dict[str, Array], samples: Sequence[int]) -> dict[str, Array]:
        single = self._plan.single
        return {
            spec.name: prepared(self._data.name, spec, arrays[spec.name], samples, single=single)
            for spec in self.inputs
        }


def _plan(source: str, inputs: Sequence[InputSpec], item: Item) -> Plan:
    arrays = by_name(source, item.arrays, inputs)
    for spec in inputs:
        check_type(source, spec, arrays[spec.name].dtype)
    return plan_calls(source, inputs, {name: array.shape for name, array in arrays.items()}, stream=True)


def _item(value: Any, source: str) -> Item:
    if isinstance(value, tuple | list) and len(value) == 2:
        inputs, labels = value
        if isinstance(inputs, Mapping | tuple | list):
            return Item(_arrays(inputs, source), as_array(labels, source))
        pair = (as_array(inputs, source), as_array(labels, source))
        return Item(pair[:1], pair[1]) if _are_labels(pair[1], pair[0]) else Item(pair, None)
    arrays = _arrays(value, source)
    return Item(arrays, arrays.get(LABELS) if isinstance(arrays, dict) else None)


def _arrays(value: Any, source: str) -> dict[str, Array] | tuple[Array, ...]:
    if isinstance(value, Mapping):
        return {str(name): as_array(array, source) for name, array in value.items()}
    if isinstance(value, tuple | list):
        return tuple(as_array(array, source) for array in value)
    return (as_array(value, source),)


def _are_labels(second: Array, first: Array) -> bool:
    """Whether a pair of arrays is (input, labels), as the module's docstring has it."""
    return second.ndim == 1 and second.dtype.kind in "iu" and first.ndim > 1 and len(first) == len(second)


def _window(pieces: Iterator[Batch], start: int, stop: int | None) -> Iterator[Batch]:
    """The samples from `start` to `stop`."""
    begin = 0
    for piece in pieces:
        if stop is not None and begin >= stop:
            return
        end = begin + len(piece)
        last = end if stop is None else min(end, stop)
        if last > start:
            yield _cut(piece, max(start - begin, 0), last - begin)
        begin = end


def _rebatch(pieces: Iterator[Batch], size: int) -> Iterator[Batch]:
    """Batches of `size` samples; a shorter one at the end, and before samples of other dimensions."""
    rest: Batch | None = None
    for piece in pieces:
        if rest is not None and _dimensions(rest) != _dimensions(piece):
            yield rest
            rest = None
        joined = piece if rest is None else _join(rest, piece)
        whole = len(joined) // size * size
        for begin in range(0, whole, size):
            yield _cut(joined, begin, begin + size)
        rest = _cut(joined, whole, len(joined)) if whole < len(joined) else None
    if rest is not None:
        yield rest


def _dimensions(batch: Batch) -> list[tuple[int, ...]]:
    return [array.shape[1:] for array in batch.feeds.values()]


def _cut(batch: Batch, begin: int, end: int) -> Batch:
    if (begin, end) == (0, len(batch)):
        return batch  # also a single call, whose arrays have no axis to cut
    labels = None if batch.labels is None else batch.labels[begin:end]
    return Batch({name: array[begin:end] for name, array in batch.feeds.items()}, labels)


def _join(first: Batch, second: Batch) -> Batch:
    feeds = {name: np.concatenate([array, second.feeds[name]]) for name, array in first.feeds.items()}
    labels = None
    if first.labels is not None and second.labels is not None:
        labels = np.concatenate([first.labels, second.labels])
    return Batch(feeds, labels)
