"""Processes that do one task after another."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import edgekit
from edgekit.backend import Artifact
from edgekit.errors import BackendError
from edgekit.kept_workers import in_worker, kept_workers
from edgekit.worker import Worker
from test_worker import EXPECTED, FEEDS, artifact, child_processes, numpy_target, plugin

__all__ = ["artifact", "plugin"]


@pytest.fixture
def others() -> set[str]:
    """Children that are not of these tests."""
    return child_processes()


def runs(worker: Worker) -> int:
    """A task that tells which process did it."""
    np.testing.assert_array_equal(worker.run(FEEDS)["y"], EXPECTED, strict=True)
    return worker.pid


def test_without_a_block_every_task_has_its_process(artifact: Artifact, others: set[str]) -> None:
    first, second = (in_worker(runs, artifact, numpy_target(), exact=True) for _ in range(2))
    assert first != second
    assert child_processes() == others


def test_inside_a_block_one_process_does_them_all(artifact: Artifact, others: set[str]) -> None:
    with kept_workers():
        first = in_worker(runs, artifact, numpy_target(), exact=True)
        with kept_workers():
            second = in_worker(runs, artifact, numpy_target(), exact=False)
        third = in_worker(runs, artifact, numpy_target(), exact=True)
        assert child_processes() == others | {str(third)}
    assert first == second == third
    assert child_processes() == others


def test_a_process_that_ended_is_replaced(artifact: Artifact, others: set[str]) -> None:
    with kept_workers():
        first = in_worker(runs, artifact, numpy_target(), exact=True)
        os.kill(first, 9)
        second = in_worker(runs, artifact, numpy_target(), exact=True)
        assert first != second
        assert child_processes() == others | {str(second)}
    assert child_processes() == others


@pytest.mark.parametrize("always", [False, True])
def test_what_fails_in_a_used_process_is_tried_in_a_fresh_one(
    artifact: Artifact, others: set[str], always: bool
) -> None:
    pids: list[int] = []

    def task(worker: Worker) -> int:
        pids.append(worker.pid)
        if always or len(pids) == 1:
            os.kill(worker.pid, 11)
        return runs(worker)

    with kept_workers():
        first = in_worker(runs, artifact, numpy_target(), exact=True)
        if always:
            with pytest.raises(BackendError, match="died of SIGSEGV"):
                in_worker(task, artifact, numpy_target(), exact=True)
        else:
            assert in_worker(task, artifact, numpy_target(), exact=True) == pids[1]
        assert len(pids) == 2 and pids[0] == first != pids[1]
    assert child_processes() == others


def test_a_process_in_which_a_call_failed_is_not_kept(artifact: Artifact, others: set[str]) -> None:
    """A runtime that was fed wrongly may answer the next call with what it held."""

    def task(worker: Worker) -> int:
        with suppress(BackendError):
            worker.run({"y": np.zeros(3, np.float32)})
        return runs(worker)

    with kept_workers():
        in_worker(task, artifact, numpy_target(), exact=True)
        assert child_processes() == others
        first = in_worker(runs, artifact, numpy_target(), exact=True)
        assert in_worker(task, artifact, numpy_target(), exact=True) != first
    assert child_processes() == others


def test_other_options_have_another_process(artifact: Artifact) -> None:
    """Some of what a runtime is told first holds for its process."""
    with kept_workers():
        first = in_worker(runs, artifact, numpy_target(), exact=True)
        assert in_worker(runs, artifact, numpy_target(on_run="print"), exact=True) != first


def test_threads_have_their_own_processes(artifact: Artifact, others: set[str]) -> None:
    with kept_workers():
        first = in_worker(runs, artifact, numpy_target(), exact=True)
        with ThreadPoolExecutor(1) as pool:
            second = pool.submit(in_worker, runs, artifact, numpy_target(), exact=True).result()
        assert first != second
        assert child_processes() == others | {str(first)}


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_an_error_of_the_task_goes_on_and_leaves_no_process(
    artifact: Artifact, others: set[str], error: type[BaseException]
) -> None:
    def task(worker: Worker) -> None:
        raise error("no")

    with kept_workers():
        in_worker(runs, artifact, numpy_target(), exact=True)
        with pytest.raises(error):
            in_worker(task, artifact, numpy_target(), exact=True)
        assert child_processes() == others


def test_a_worker_at_rest_holds_no_model(artifact: Artifact) -> None:
    with Worker(artifact, numpy_target()) as worker:
        worker.rest()
        with pytest.raises(BackendError, match="AssertionError: the first request loads"):
            worker.run(FEEDS)
        worker.take(artifact, numpy_target(), exact=True)
        runs(worker)


def test_an_export_ends_its_processes(compressed: Path, others: set[str]) -> None:
    edgekit.export(compressed, ["x86-onnxruntime", "arm-onnxruntime"])
    assert child_processes() == others
