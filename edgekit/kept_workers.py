"""Processes that do one task after another: to start one takes longer than most checks of an artifact do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import TypeVar

from edgekit.backend import Artifact
from edgekit.errors import BackendError
from edgekit.target import Target
from edgekit.worker import Worker, usable_cpus

Result = TypeVar("Result")
Key = tuple[str, int, str]
"""The backend, the number of threads and the runtime's options: a process keeps some of what it was first told."""

_kept: ContextVar[dict[Key, Worker] | None] = ContextVar("kept", default=None)
"""Of this thread."""


@contextmanager
def kept_workers() -> Iterator[None]:
    """Inside this block a process that did a task of `in_worker` is kept for the next; the outermost block ends them all."""
    if _kept.get() is not None:
        yield
        return
    kept: dict[Key, Worker] = {}
    token = _kept.set(kept)
    try:
        yield
    finally:
        _kept.reset(token)
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
    kept = _kept.get()
    key = target.backend, min(target.runtime.threads, usable_cpus()), repr(sorted(target.runtime.options.items()))
    used = kept.pop(key, None) if kept else None
    if used is not None:

        def loaded_and_done(worker: Worker) -> Result:
            worker.take(artifact, target, exact=exact)
            result = task(worker)
            if worker.failed:  # and the task made do with that
                raise BackendError("a call failed")
            return result

        with suppress(BackendError):
            return _done(loaded_and_done, used, kept, key)
    return _done(task, Worker(artifact, target, exact=exact), kept, key)


def _done(task: Callable[[Worker], Result], worker: Worker, kept: dict[Key, Worker] | None, key: Key) -> Result:
    """Do the task, and keep the worker where there is use for it: a failed call may have left something behind."""
    try:
        result = task(worker)
        if kept is not None and not worker.failed:
            with suppress(BackendError):  # it ended itself
                worker.rest()
                kept[key] = worker
                return result
    except BaseException:
        worker.close()
        raise
    worker.close()
    return result
