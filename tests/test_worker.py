from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgekit.backend import Artifact, Feeds, KernelRecord, get_backend
from edgekit.errors import BackendError, DataError, GraphError
from edgekit.target import Target, load_target
from edgekit.worker import Worker, cpus_for, decode, encode

PLUGIN = Path(__file__).parent / "plugin"
LINUX = sys.platform == "linux"


@pytest.fixture(autouse=True)
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PLUGIN))


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    """`y = x @ w + b`, with w all 2 and b all 1."""
    graph = onnx.parser.parse_graph("""
        linear (float[N, 3] x) => (float[N, 2] y) <float[3, 2] w = {2, 2, 2, 2, 2, 2}, float[2] b = {1, 1}>
        { [matmul] xw = MatMul(x, w)
          [add] y = Add(xw, b) }
    """)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "linear.onnx")
    out = tmp_path / "out"
    out.mkdir()
    return get_backend("numpy").convert(tmp_path / "linear.onnx", numpy_target(), out, precision="f32")


FEEDS: Feeds = {"x": np.array([[1, 2, 3], [0, 0, 1]], np.float32)}
EXPECTED = np.array([[13, 13], [3, 3]], np.float32)


def numpy_target(**options: str) -> Target:
    target = load_target(str(PLUGIN / "numpy.toml"))
    return target.model_copy(update={"runtime": target.runtime.model_copy(update={"options": options})})


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """No test leaves an open file, or a child, not even a zombie."""
    files, children = open_files(), child_processes()
    yield
    assert open_files() <= files
    assert child_processes() <= children


def open_files() -> set[tuple[str, Path]]:
    return {(fd.name, fd.readlink()) for fd in Path("/proc/self/fd").glob("*") if fd.is_symlink()}


def child_processes() -> set[str]:
    stats = Path("/proc").glob("[0-9]*/stat")
    return {stat.parent.name for stat in stats if parent_of(stat) == str(os.getpid())}


def parent_of(stat: Path) -> str:
    try:
        return stat.read_text().rpartition(")")[2].split()[1]
    except (FileNotFoundError, ProcessLookupError):
        return ""  # it has just ended


def test_runs_with_a_backend_that_edgekit_does_not_know(artifact: Artifact) -> None:
    with Worker(artifact, numpy_target()) as worker:
        outputs = worker.run(FEEDS)
        assert worker.load_ms > 0
        assert outputs["y"].flags.writeable
    assert list(outputs) == ["y"]
    np.testing.assert_array_equal(outputs["y"], EXPECTED, strict=True)


def test_load_time_leaves_out_the_import_of_the_runtime(artifact: Artifact) -> None:
    with Worker(artifact, numpy_target(on_load="import")) as worker:
        assert 50 <= worker.load_ms < 300  # the import alone takes 300


def test_reports_kernels_in_order(artifact: Artifact) -> None:
    with Worker(artifact, numpy_target()) as worker:
        kernels = worker.kernels(FEEDS)
    assert kernels == [KernelRecord(("matmul",), "MatMul", "f32"), KernelRecord(("add",), "Add", "f32")]


def test_a_burst_has_the_asked_number_of_inferences(artifact: Artifact) -> None:
    with Worker(artifact, numpy_target()) as worker:
        durations = worker.time(FEEDS, seconds=None, iterations=17, warmup=3)
    assert len(durations) == 17
    assert all(1e3 < duration < 1e9 for duration in durations)


def test_a_burst_ends_after_seconds_and_leaves_the_warm_up_out(artifact: Artifact) -> None:
    with Worker(artifact, numpy_target(on_run="dawdle")) as worker:
        start = time.perf_counter()
        durations = worker.time(FEEDS, seconds=0.1, iterations=None, warmup=5)
        wall = time.perf_counter() - start
        once = worker.time(FEEDS, seconds=1e-9, iterations=None, warmup=0)
    assert len(durations) <= 5  # 20 ms each and a little
    assert sum(durations) >= 0.1e9 > sum(durations[:-1])
    assert wall - sum(durations) / 1e9 > 0.1  # 5 warm-ups
    assert len(once) == 1


def test_what_ends_a_burst_first_counts(artifact: Artifact) -> None:
    with Worker(artifact, numpy_target()) as worker:
        assert len(worker.time(FEEDS, seconds=60, iterations=2, warmup=0)) == 2
        assert len(worker.time(FEEDS, seconds=1e-9, iterations=1000, warmup=0)) == 1


@pytest.mark.skipif(not LINUX, reason="only Linux tells a process's own peak memory")
def test_peak_memory_is_the_childs_own(artifact: Artifact) -> None:
    ballast = np.ones(400_000_000, np.uint8)
    with Worker(artifact, numpy_target()) as worker:
        small = worker.peak_rss_bytes()
        worker.run({"x": np.ones((4_000_000, 3), np.float32)})  # 48 MB
        large = worker.peak_rss_bytes()
    assert 20e6 < small < ballast.nbytes
    assert large > small + 48e6


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system does not pin processes to CPUs")
@pytest.mark.parametrize(("threads", "expected"), [(None, 1), (2, 2), (10_000, 10_000)])
def test_pins_the_child_to_as_many_cpus_as_threads(artifact: Artifact, threads: int | None, expected: int) -> None:
    with Worker(artifact, numpy_target(), threads=threads) as worker:
        pinned = os.sched_getaffinity(worker.pid)
        environment = Path(f"/proc/{worker.pid}/environ").read_bytes().split(b"\0")
    granted = min(expected, len(os.sched_getaffinity(0)))
    assert len(pinned) == granted
    assert f"OMP_NUM_THREADS={granted}".encode() in environment


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system does not pin processes to CPUs")
def test_cpus_are_chosen_among_those_allowed() -> None:
    allowed = os.sched_getaffinity(0)
    assert cpus_for(10_000) == allowed
    assert len(cpus_for(1)) == 1
    assert cpus_for(1) <= allowed


@pytest.mark.skipif(not LINUX, reason="reads /proc")
def test_neither_side_imports_torch(artifact: Artifact) -> None:
    code = "import sys, edgekit.worker_process, edgekit.measure; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    with Worker(artifact, numpy_target()) as worker:
        worker.run(FEEDS)
        mapped = Path(f"/proc/{worker.pid}/maps").read_text()
    assert "numpy" in mapped
    assert "libtorch" not in mapped


def test_what_the_runtime_prints_does_not_disturb(artifact: Artifact) -> None:
    with Worker(artifact, numpy_target(on_load="print", on_run="print")) as worker:
        np.testing.assert_array_equal(worker.run(FEEDS)["y"], EXPECTED, strict=True)
        np.testing.assert_array_equal(worker.run(FEEDS)["y"], EXPECTED, strict=True)


def test_a_runtime_that_reads_stdin_reads_nothing(artifact: Artifact) -> None:
    with Worker(artifact, numpy_target(on_run="read"), timeout_s=30) as worker:
        np.testing.assert_array_equal(worker.run(FEEDS)["y"], EXPECTED, strict=True)


def test_a_crash_while_loading_names_the_signal_and_the_last_words(artifact: Artifact) -> None:
    with pytest.raises(BackendError, match=r"(?s)model.f32.onnx .*numpy.* died of SIGSEGV .*'load'.*kernel.cc:42"):
        Worker(artifact, numpy_target(on_load="crash"))


@pytest.mark.parametrize("call", ["run", "kernels", "time"])
def test_a_crash_in_any_call_is_an_error_and_ends_the_worker(artifact: Artifact, call: str) -> None:
    with Worker(artifact, numpy_target(on_run="crash")) as worker:
        if call == "kernels":
            os.kill(worker.pid, 11)
        with pytest.raises(BackendError, match=f"died of SIGSEGV during '{call}'"):
            worker.time(FEEDS, seconds=1, iterations=None, warmup=0) if call == "time" else getattr(worker, call)(FEEDS)
        with pytest.raises(BackendError, match="has ended"):
            worker.run(FEEDS)


def test_a_kill_hints_at_memory_and_an_exit_gives_its_code(artifact: Artifact) -> None:
    with (
        Worker(artifact, numpy_target(on_run="be killed")) as worker,
        pytest.raises(BackendError, match=r"SIGKILL.*memory"),
    ):
        worker.run(FEEDS)
    with (
        Worker(artifact, numpy_target(on_run="exit")) as worker,
        pytest.raises(BackendError, match="exited with code 3"),
    ):
        worker.run(FEEDS)


def test_a_hanging_runtime_is_stopped(artifact: Artifact) -> None:
    start = time.perf_counter()
    with pytest.raises(BackendError, match=r"did not finish 'load' within 2 s"):
        Worker(artifact, numpy_target(on_load="hang"), timeout_s=2)
    assert 2 <= time.perf_counter() - start < 10


def test_a_child_that_does_not_read_a_large_request_is_stopped(artifact: Artifact) -> None:
    worker = Worker(artifact, numpy_target(), timeout_s=10)
    worker._timeout_s = 0.5
    os.kill(worker.pid, 19)  # SIGSTOP: it neither reads nor ends
    with worker, pytest.raises(BackendError, match=r"did not finish 'run' within 0.5 s"):
        worker.run({"x": np.zeros((1_000_000, 3), np.float32)})


def test_an_exception_of_the_runtime_arrives_with_its_words_and_the_worker_lives_on(artifact: Artifact) -> None:
    with Worker(artifact, numpy_target(on_run="raise")) as worker:
        with pytest.raises(BackendError, match=r"during 'run': ValueError: the cheese is out$") as caught:
            worker.run(FEEDS)
        assert "Traceback" not in str(caught.value)
        assert len(worker.kernels(FEEDS)) == 2


def test_an_edgekit_error_keeps_its_class_and_message(artifact: Artifact) -> None:
    with (
        Worker(artifact, numpy_target(on_run="refuse")) as worker,
        pytest.raises(GraphError, match=r"^node 'conv': no kernel for it; leave it in float$"),
    ):
        worker.run(FEEDS)


def test_unknown_backend_is_an_error(artifact: Artifact) -> None:
    target = numpy_target().model_copy(update={"backend": "abacus"})
    with pytest.raises(BackendError, match="'abacus' is not installed"):
        Worker(artifact, target)


def test_text_inputs_are_refused_before_they_are_sent(artifact: Artifact) -> None:
    with Worker(artifact, numpy_target()) as worker:
        with pytest.raises(DataError, match="'x' has the type <U3"):
            worker.run({"x": np.array(["one", "two"])})
        np.testing.assert_array_equal(worker.run(FEEDS)["y"], EXPECTED, strict=True)


ARRAYS = hnp.arrays(
    st.one_of(hnp.integer_dtypes(), hnp.floating_dtypes(), hnp.boolean_dtypes()),
    hnp.array_shapes(min_dims=0, min_side=0, max_side=4),
)


@given(st.dictionaries(st.text(), ARRAYS, max_size=3))
def test_messages_carry_any_array_under_any_name(arrays: dict[str, np.ndarray]) -> None:
    message = decode(io.BytesIO(encode({"do": "run"}, arrays)))
    assert message is not None
    header, received = message
    assert header == {"do": "run"}
    assert list(received) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(received[name], array)
        assert received[name].dtype == array.dtype.newbyteorder("=")


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.int4])
def test_messages_carry_the_small_types_of_onnx(dtype: type) -> None:
    array: np.ndarray = np.array([[1, 2], [3, -4]]).astype(dtype).T
    message = decode(io.BytesIO(encode({}, {"x": array})))
    assert message is not None
    np.testing.assert_array_equal(message[1]["x"], array, strict=True)


def test_a_message_that_breaks_off_is_no_message() -> None:
    whole = encode({"do": "run"}, FEEDS)
    assert all(decode(io.BytesIO(whole[:size])) is None for size in range(len(whole)))
