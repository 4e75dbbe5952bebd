"""Samples that are held back: which, as what arrays, and in how much memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgekit.data import Batch, InputSpec
from edgekit.pipelines.split import HELD_BACK_SAMPLES, MOST_HELD_BACK, held_back


@dataclass
class Given:
    """Samples in the batches that a test wants; `batches` of one tell nothing but their number."""

    given: list[Batch]

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        return ()

    @property
    def size(self) -> int:
        return sum(map(len, self.given))

    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        if batch_size == 1:
            feeds = {name: array[:1] for name, array in self.given[0].feeds.items()}
            yield Batch(feeds, single=self.given[0].single)
        elif start == 0:
            yield from self.given


def batch(array: NDArray[Any], labels: list[int] | None = None, *, single: bool = False) -> Batch:
    return Batch({"x": array}, None if labels is None else np.array(labels, np.int64), single)


def test_arrays_are_the_samples_in_order() -> None:
    first, second = np.arange(6.0).reshape(3, 2), np.arange(6.0, 10.0).reshape(2, 2)
    arrays, count, note = held_back(Given([batch(first, [1, 2, 3]), batch(second, [4, 5])]), 0)
    assert (count, note) == (5, "")
    assert arrays["x"].tolist() == np.arange(10.0).reshape(5, 2).tolist()
    assert [*arrays] == ["x", "labels"]
    assert arrays["labels"].tolist() == [1, 2, 3, 4, 5]


def test_labels_that_some_lack_are_left_out() -> None:
    arrays, count, _ = held_back(Given([batch(np.ones((3, 2)), [1, 2, 3]), batch(np.ones((2, 2)))]), 0)
    assert count == 5
    assert [*arrays] == ["x"]


def test_batches_of_another_shape_are_left_out_and_told() -> None:
    given = Given([batch(np.full((2, 3), 1.0)), batch(np.full((2, 4), 2.0)), batch(np.full((1, 3), 3.0))])
    arrays, count, note = held_back(given, 0)
    assert count == 3
    assert arrays["x"][:, 0].tolist() == [1.0, 1.0, 3.0]
    assert note == "1 of 3 batches of held-back samples have another shape and are left out"


def test_a_single_call_is_a_row() -> None:
    calls = [batch(np.full((4, 2), float(number)), single=True) for number in range(3)]
    arrays, count, _ = held_back(Given(calls), 0)
    assert count == 3
    assert arrays["x"].shape == (3, 4, 2)


def test_text_that_gets_longer_is_whole() -> None:
    arrays, _, _ = held_back(Given([batch(np.array(["a", "b"])), batch(np.array(["longer"]))]), 0)
    assert arrays["x"].tolist() == ["a", "b", "longer"]


def test_where_none_are_left_it_is_told() -> None:
    arrays, count, note = held_back(Given([batch(np.ones((3, 2)))]), 3)
    assert count == 3
    assert arrays["x"].shape == (3, 2)
    assert note.startswith("no samples were left to verify exports with")


@pytest.mark.parametrize(("size", "expected"), [(1 << 20, HELD_BACK_SAMPLES), (1 << 10, MOST_HELD_BACK)])
def test_many_small_samples_or_few_large_ones(size: int, expected: int) -> None:
    given = Given([batch(np.zeros((8, size), np.uint8)) for _ in range(MOST_HELD_BACK // 8)])
    assert held_back(given, 0)[1] == expected


def test_large_samples_are_in_memory_once() -> None:
    @dataclass
    class Made(Given):
        @property
        def size(self) -> None:  # type: ignore[override]
            return None

        def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
            for number in range(1 if batch_size == 1 else 20):
                yield batch(np.full((batch_size, 1 << 20), number, np.uint8))

    tracemalloc.start()
    try:
        arrays, count, _ = held_back(Made([]), 0)
        before = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == HELD_BACK_SAMPLES
    assert arrays["x"][:, -1].tolist() == [number for number in range(8) for _ in range(8)]
    whole = arrays["x"].base
    assert whole is not None
    assert whole.nbytes == (HELD_BACK_SAMPLES + 8) << 20
    assert before - whole.nbytes <= 4 * 8 << 20  # batches, one at a time
