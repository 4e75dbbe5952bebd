"""How pipelines say where they are."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told of each step of a pipeline."""

    def __call__(self, step: str, done: int, total: int | None) -> None:
        """`done` of `total` (None: not known) units of `step` are behind us."""
        ...


def silent(step: str, done: int, total: int | None) -> None:
    """Says nothing."""
