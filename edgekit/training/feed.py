"""Batches without end, epoch after epoch, from any place on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from edgekit.errors import DataError
from edgekit.training.batches import Share, Tensors, TrainData
from edgekit.training.resume import random_state, set_random_state


class Feed:
    """The batches of one process.

    Attributes:
        epoch, batch: so many batches of this epoch were taken.
        inputs: of the module, by name.
        before: where all random numbers were when this epoch began; None before the first.
    """

    def __init__(self, data: TrainData, share: Share, limit: int | None, device: torch.device) -> None:
        """At most `limit` batches are taken from an epoch."""
        self.epoch = self.batch = 0
        self.inputs = data.inputs
        self.before: dict[str, Any] | None = None
        self._data, self._share, self._limit, self._device = data, share, limit, device
        self._batches: Iterator[Tensors] | None = None

    def go_to(self, epoch: int, batch: int, before: dict[str, Any] | None) -> None:
        """Take up an epoch in which `batch` batches were taken, and which began with these random numbers.

        Data that is read again from the first batch draws them as it did then; the caller sets what they are now.

        Raises:
            DataError: the data cannot be read.
        """
        self.epoch, self.batch, self.before, self._batches = epoch, batch, before, None
        if before is not None and (self._limit is None or batch < self._limit):
            set_random_state(before, self._device, self._data.generators())
            self._batches = self._data.epoch(epoch, batch, self._share)

    def next(self) -> Tensors:
        """The next batch.

        Raises:
            DataError: an epoch has none, or the data cannot be read.
        """
        if self.before is None:
            self._begin(0)
        while True:
            at_end = self._batches is None or self.batch == self._limit
            batch = None if at_end else next(self._batches, None)  # type: ignore[arg-type]
            if batch is not None:
                self.batch += 1
                return batch
            if not self.batch:
                raise DataError(f"{self._data.name}: yields no batches; give at least one in every epoch")
            self._begin(self.epoch + 1)

    def samples(self, epoch: int, batch: int) -> list[int]:
        """The numbers of a batch's samples in the user's data; empty where they are not known."""
        return self._data.samples(epoch, batch, self._share)

    def state(self) -> dict[str, Any]:
        """Where all random numbers are now."""
        return random_state(self._device, self._data.generators())

    def restore(self, state: dict[str, Any]) -> None:
        """Set all random numbers."""
        set_random_state(state, self._device, self._data.generators())

    def _begin(self, epoch: int) -> None:
        self._batches = None
        self.epoch, self.batch, self.before = epoch, 0, self.state()
        self._batches = self._data.epoch(epoch, 0, self._share)
