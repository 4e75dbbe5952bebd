"""Processes that do one task after another: to start one takes longer than most checks of an artifact do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

from edgekit.backend import Artifact
from edgekit.errors import BackendError
from edgekit.target import Target
from edgekit.worker import Worker, usable_cpus

Result = TypeVar("Result")
Key = tuple[str, int]
"""The backend, and the number of threads: neither can change in a process."""

_kept: dict[Key, Worker] | None = None


@contextmanager
def kept_workers() -> Iterator[None]:
    """Inside this block a process that did a task of `in_worker` is kept for the next; the outermost block ends them all."""
    global _kept
    if _kept is not None:
        yield
        return
    kept: dict[Key, Worker] = {}
    _kept = kept
    try:
        yield
    finally:
        _kept = None
        for worker in kept.values():
            worker.close()


def in_worker(task: Callable[[Worker], Result], artifact: Artifact, target: Target, *, exact: bool) -> Result:
    """What a task comes to with an artifact that is loaded in a child process.

    A process that was kept may have suffered from what it did before: where it fails, the task begins anew in a fresh one.

    Args:
        task: gets the worker; it may be called twice.
        artifact, target, exact: see `Worker`.

    Raises:
        BackendError: the runtime is missing, refused the artifact, died or took too long.
    """
    key = target.backend, min(target.runtime.threads, usable_cpus())
    used = _kept.pop(key, None) if _kept else None
    if used is not None:

        def loaded_and_done(worker: Worker) -> Result:
            worker.take(artifact, target, exact=exact)
            return task(worker)

        with suppress(BackendError):
            return _done(loaded_and_done, used, key)
    return _done(task, Worker(artifact, target, exact=exact), key)


def _done(task: Callable[[Worker], Result], worker: Worker, key: Key) -> Result:
    """Do the task, and keep the worker where there is use for it."""
    try:
        result = task(worker)
        if _kept is not None and key not in _kept:
            with suppress(BackendError):  # it ended itself
                worker.rest()
                _kept[key] = worker
                return result
    except BaseException:
        worker.close()
        raise
    worker.close()
    return result
