"""The child of a `Worker`, `python -m edgekit.worker_process`: it loads an artifact and answers requests until stdin ends."""

from __future__ import annotations

import builtins
import gc
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import IO

import numpy as np
from numpy.typing import NDArray

from edgekit import errors
from edgekit.backend import Artifact, CompiledModel, Feeds, get_backend
from edgekit.errors import EdgekitError
from edgekit.target import Target
from edgekit.worker import Header, Message, cpus_for, decode, encode


def main() -> None:
    """Answer requests; the first of them loads the artifact."""
    requests, replies = _take_pipes()
    model: CompiledModel | None = None
    while (request := decode(requests)) is not None:
        header, feeds = request
        try:
            if header["do"] == "load":
                model = None  # its memory first
                model, load_ms = _load(header)
                reply = encode({"load_ms": load_ms}, {})
            elif header["do"] == "rest":
                model = None
                gc.collect()
                reply = encode({}, {})
            else:
                assert model is not None, "the first request loads"
                reply = encode(*_answer(model, header, feeds))
        except EdgekitError as error:
            kind = next(base.__name__ for base in type(error).__mro__ if base.__module__ == errors.__name__)
            reply = encode({"error": kind, "text": str(error)}, {})
        except Exception as error:  # the process boundary: a runtime may raise anything, and it has to reach the parent
            reply = encode({"failure": f"{type(error).__name__}: {error}"}, {})
        replies.write(reply)
        replies.flush()
    model = None
    gc.collect()
    os._exit(0)  # there is nothing left to do: runtimes take a quarter of a second to end themselves, or crash at it


def _take_pipes() -> tuple[IO[bytes], IO[bytes]]:
    """The pipes to the parent, out of reach of a runtime that prints to stdout or reads stdin."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return requests, replies


def _load(header: Header) -> tuple[CompiledModel, float]:
    sys.path[:] = header["sys_path"]
    target = Target.model_validate_json(header["target"])
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpus_for(target.runtime.threads))
    artifact = Artifact(Path(header["path"]), tuple(Path(file) for file in header["files"]), header["precision"])
    backend = get_backend(target.backend)
    with _import_clock() as import_ns:
        start = time.perf_counter_ns()
        model = backend.load(artifact, target, exact=header["exact"])
        load_ns = time.perf_counter_ns() - start - import_ns()
    return model, load_ns / 1e6


@contextmanager
def _import_clock() -> Iterator[Callable[[], int]]:
    """Sums up the time that import statements take (ns): backends import their runtimes when they first need them."""
    plain = builtins.__import__
    spent, depth = 0, 0

    def timed(
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        nonlocal spent, depth
        start = time.perf_counter_ns()
        depth += 1
        try:
            return plain(name, globals, locals, fromlist, level)
        finally:
            depth -= 1
            if depth == 0:  # the outermost import holds those inside it
                spent += time.perf_counter_ns() - start

    builtins.__import__ = timed
    try:
        yield lambda: spent
    finally:
        builtins.__import__ = plain


def _answer(model: CompiledModel, header: Header, feeds: Feeds) -> Message:
    match header["do"]:
        case "run":
            return {}, model.run(feeds)
        case "kernels":
            return {"kernels": [asdict(record) for record in model.kernels(feeds)]}, {}
        case "time":
            infer = model.prepare(feeds)
            for _ in range(header["warmup"]):
                infer()
            return {}, {"durations": _burst(infer, header["seconds"], header["iterations"])}
        case "peak_rss":
            return {"bytes": _peak_rss_bytes()}, {}
        case unknown:
            raise AssertionError(f"unknown request {unknown!r}")


def _burst(infer: Callable[[], None], seconds: float | None, iterations: int | None) -> NDArray[np.int64]:
    clock = time.perf_counter_ns
    durations: list[int] = []
    gc.collect()
    gc.disable()
    try:
        deadline = math.inf if seconds is None else clock() + seconds * 1e9
        while iterations is None or len(durations) < iterations:
            start = clock()
            infer()
            end = clock()
            durations.append(end - start)
            if end >= deadline:
                break
    finally:
        gc.enable()
    return np.array(durations, np.int64)


def _peak_rss_bytes() -> int:
    """The high-water mark of this program's own memory; getrusage's survives exec, and so holds the parent's too."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if "VmHWM" in line), 0)


if __name__ == "__main__":
    main()
