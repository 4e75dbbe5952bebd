"""Runs an artifact in a child process of its own, because runtimes crash and their threads disturb each other.

`Worker` is the parent's side; `edgekit.worker_process` is the child's. They talk through the child's stdin and stdout.
A message is one line of JSON, followed by the bytes of the arrays that the line lists.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from edgekit import errors
from edgekit.backend import Artifact, Feeds, KernelRecord, Outputs
from edgekit.errors import BackendError, DataError
from edgekit.target import Target

Header = dict[str, Any]
Message = tuple[Header, Outputs]

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
GRACE_S = 5.0
"""How long a child may take to end by itself (s) before it is killed."""
LAST_WORDS = 1000
"""How much of a dead child's stderr is shown (characters)."""


class Worker:
    """An artifact, loaded by its runtime in a child process; a context manager.

    Attributes:
        pid: of the child.
        load_ms: how long the runtime took to load the artifact (ms), without Python's imports.
        failed: whether a call failed.
    """

    def __init__(
        self,
        artifact: Artifact,
        target: Target,
        *,
        exact: bool = False,
        threads: int | None = None,
        timeout_s: float = 300.0,
    ) -> None:
        """Start the child and load `artifact`.

        Args:
            artifact: what to load.
            target: its `backend` is the runtime to load it with.
            exact: run float parts in f32, for parity checks.
            threads: overrides `target.runtime.threads`; never more than this machine has CPUs, and the child is pinned to as many.
            timeout_s: the longest that one call may take (s), here and in the methods.

        Raises:
            BackendError: the runtime is missing, refused the artifact, died or took too long.
        """
        # More threads than CPUs fight for them: a board's four on a desk's two run ten times slower than two.
        self._threads = min(threads or target.runtime.threads, usable_cpus())
        self._timeout_s = timeout_s
        self.load_ms, self.failed = 0.0, False
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115, because close() closes it
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-u", "-m", "edgekit.worker_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=os.environ | dict.fromkeys(THREAD_VARIABLES, str(self._threads)),
        )
        self.pid = self._process.pid
        try:
            self.take(artifact, target, exact=exact)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def take(self, artifact: Artifact, target: Target, *, exact: bool) -> None:
        """Load an artifact of a target with the same backend, with as many threads as at the start. Raises as `run` does."""
        runtime = target.runtime.model_copy(update={"threads": self._threads})
        self._subject = f"{artifact.path.name} (backend {target.backend!r})"
        self._setting = {
            "target": target.model_copy(update={"runtime": runtime}).model_dump_json(),
            "exact": exact,
            "sys_path": [str(entry) for entry in sys.path],
        }
        self.load(artifact)

    def rest(self) -> None:
        """Let go of the artifact and its memory; `take` loads the next."""
        self._ask({"do": "rest"}, limit_s=GRACE_S)

    def load(self, artifact: Artifact) -> None:
        """Load another artifact in the place of the one before. Raises as `run` does."""
        files = [str(file) for file in artifact.files]
        what = {"path": str(artifact.path), "files": files, "precision": artifact.precision}
        self.load_ms = float(self._ask({"do": "load", **what, **self._setting})[0]["load_ms"])

    def run(self, feeds: Feeds) -> Outputs:
        """Run one inference: arrays by input name in, arrays by output name out.

        Raises:
            BackendError: the runtime refused `feeds`, died or took too long.
            DataError: an array holds neither numbers nor booleans.
        """
        return self._ask({"do": "run"}, feeds)[1]

    def kernels(self, feeds: Feeds) -> list[KernelRecord]:
        """The kernels that run for `feeds`, in order. Raises as `run` does."""
        records = self._ask({"do": "kernels"}, feeds)[0]["kernels"]
        return [KernelRecord(tuple(record["layers"]), record["kernel"], record["precision"]) for record in records]

    def time(self, feeds: Feeds, *, seconds: float | None, iterations: int | None, warmup: int) -> list[int]:
        """How long each inference of one burst took (ns), after `warmup` inferences that do not count.

        The burst ends after `iterations` or `seconds`, whichever comes first, and has one inference at least.
        `seconds` are granted on top of the worker's time limit. Raises as `run` does.
        """
        assert seconds is not None or iterations is not None, "a burst needs an end"
        request = {"do": "time", "seconds": seconds, "iterations": iterations, "warmup": warmup}
        durations = self._ask(request, feeds, extra_s=seconds or 0.0)[1]["durations"]
        return [int(duration) for duration in durations]

    def peak_rss_bytes(self) -> int:
        """The most memory that the child has held so far (bytes); 0 where the system does not say."""
        return int(self._ask({"do": "peak_rss"})[0]["bytes"])

    def close(self) -> None:
        """End the child; safe to call twice."""
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with suppress(BrokenPipeError):  # the rest of a request that the child did not live to read
                stream.close()
        self._reap()
        self._stderr.close()

    def _ask(
        self, request: Header, arrays: Feeds | None = None, *, extra_s: float = 0.0, limit_s: float | None = None
    ) -> Message:
        """Send `request` and wait for the answer, turning every way to fail into an `EdgekitError`."""
        message = encode(request, arrays or {})
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        if stdin.closed:
            raise BackendError(
                f"{self._subject}: its worker has ended, so it cannot do {request['do']!r}; start a new Worker"
            )
        limit_s = limit_s or self._timeout_s + extra_s
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            self._process.kill()  # ends the blocking write or read below

        watchdog = threading.Timer(limit_s, expire)
        watchdog.daemon = True
        watchdog.start()
        try:
            stdin.write(message)
            stdin.flush()
            answer = decode(stdout)
        except BrokenPipeError:
            answer = None
        except BaseException:  # the answer would be taken for that to the next request
            self.close()
            raise
        finally:
            watchdog.cancel()
            watchdog.join()
        if expired.is_set() or answer is None:
            doing = str(request["do"])
            error = self._timeout(doing, limit_s) if expired.is_set() else self._death(doing)
            self.close()
            raise error
        self.failed = self.failed or "error" in answer[0] or "failure" in answer[0]
        if "error" in answer[0]:
            raise getattr(errors, answer[0]["error"])(answer[0]["text"])
        if "failure" in answer[0]:
            raise BackendError(f"{self._subject}: the runtime failed during {request['do']!r}: {answer[0]['failure']}")
        return answer

    def _reap(self) -> None:
        """Wait until the child has ended; kill it when that takes too long."""
        try:
            self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _timeout(self, doing: str, limit_s: float) -> BackendError:
        self._reap()
        return BackendError(
            f"{self._subject}: the runtime did not finish {doing!r} within {limit_s:g} s and was stopped"
            f"{self._last_words()}; allow it more time, or try another version of the runtime"
        )

    def _death(self, doing: str) -> BackendError:
        self._reap()
        code = self._process.returncode
        how = f"exited with code {code}" if code >= 0 else f"died of {_signal_name(-code)}"
        advice = "try another version of the runtime"
        if code == -signal.SIGKILL:
            advice = "the system kills processes when memory runs out: try a smaller batch"
        return BackendError(f"{self._subject}: the runtime {how} during {doing!r}{self._last_words()}; {advice}")

    def _last_words(self) -> str:
        """The end of the dead child's stderr, as part of a sentence."""
        size = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, size - LAST_WORDS))
        text = self._stderr.read().decode(errors="replace").strip()
        return f"; its last words: {text}" if text else ""


def _signal_name(number: int) -> str:
    return next((known.name for known in signal.Signals if known == number), f"signal {number}")


def encode(header: Header, arrays: Feeds) -> bytes:
    """A message as bytes.

    Raises:
        DataError: an array holds neither numbers nor booleans.
    """
    for name, array in arrays.items():
        if array.dtype.kind in "OUSMm":
            raise DataError(f"tensor {name!r} has the type {array.dtype}; runtimes here take numbers and booleans only")
    native = {name: array.astype(array.dtype.newbyteorder("="), copy=False) for name, array in arrays.items()}
    listing = [[name, array.dtype.name, array.shape] for name, array in native.items()]
    line = json.dumps({**header, "arrays": listing}).encode() + b"\n"
    return b"".join([line, *(array.tobytes() for array in native.values())])


def decode(stream: IO[bytes]) -> Message | None:
    """The next message of `stream`, or None where it ends, be it in the middle of a message."""
    line = stream.readline()
    if not line.endswith(b"\n"):
        return None
    header = json.loads(line)
    arrays: Outputs = {}
    for name, type_name, shape in header.pop("arrays"):
        dtype = np.dtype(type_name)
        size = math.prod(shape) * dtype.itemsize
        data = stream.read(size)
        if len(data) < size:
            return None
        arrays[name] = np.ndarray(shape, dtype, buffer=bytearray(data))
    return header, arrays


def usable_cpus() -> int:
    """How many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpus_for(threads: int) -> set[int]:
    """`threads` of the CPUs that this process may use: one per core first, the strongest cores first."""

    def rank(cpu: int) -> tuple[int, int, int]:
        folder = Path(f"/sys/devices/system/cpu/cpu{cpu}")
        siblings = folder / "topology/thread_siblings_list"
        first = int(siblings.read_text().replace("-", ",").split(",")[0]) if siblings.is_file() else cpu
        capacity = folder / "cpu_capacity"
        return cpu != first, -int(capacity.read_text()) if capacity.is_file() else 0, cpu

    return set(sorted(os.sched_getaffinity(0), key=rank)[:threads])
