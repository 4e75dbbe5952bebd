from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

import edgekit
from edgekit.calibration.layer_rows import collect_rows, linear_layers
from edgekit.calibration.observe import observe
from edgekit.data import Batch
from edgekit.graph.probe import Probe
from edgekit.graph.run import Session
from edgekit.graph.sizes import in_parts, peak_bytes, samples_at_once, value_bytes
from edgekit.sensitivity import sensitivity
from edgekit.target import load_target
from graphs import GraphBuilder, normal
from networks import annotate, residual_net, samples

Array = NDArray[Any]


def chain() -> ir.Model:
    """x (4 floats) -> a, b and c of 8 each, of which the first and the last are added up."""
    build = GraphBuilder(opset=21)
    x = build.input("x", ["n", 4])
    a = build.op("MatMul", [x, build.weight("w", 4, 8)], "a")
    b = build.op("Relu", [a], "b")
    c = build.op("Sigmoid", [b], "c")
    return ir.from_proto(build.proto(build.op("Add", [a, c], "sum")))


def activations(model: ir.Model) -> list[ir.Value]:
    return [*model.graph.inputs, *(output for node in model.graph for output in node.outputs)]


def test_bytes_are_those_of_the_samples_shapes() -> None:
    sizes = value_bytes(chain(), {"x": normal(3, 4)})
    assert sizes == {"x": 3 * 16, "a_y": 3 * 32, "b_y": 3 * 32, "c_y": 3 * 32, "sum_y": 3 * 32}


def test_dynamic_sides_count_as_large_as_the_samples_are() -> None:
    build = GraphBuilder(opset=21)
    x = build.input("x", ["n", 3, "h", "w"])
    model = ir.from_proto(build.proto(build.conv(x, "conv", 3, 16, pads=[1, 1, 1, 1])))
    assert value_bytes(model, {"x": normal(1, 3, 20, 30)})["conv_y"] == 16 * 20 * 30 * 4


def test_the_peak_is_of_what_is_alive_together() -> None:
    model, feeds = chain(), {"x": normal(1, 4)}
    # a is alive until the sum; when that is made: a, c and the sum itself
    assert peak_bytes(model, feeds) == 3 * 32
    assert peak_bytes(model, feeds, held=["b_y"]) == 4 * 32
    assert peak_bytes(model, {"x": normal(5, 4)}) == 5 * 3 * 32


def test_so_many_samples_run_together_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = chain()
    assert samples_at_once(model, {"x": normal(1, 4)}, 33) == 33
    monkeypatch.setattr("edgekit.graph.sizes.HELD_BYTES", 10 * 3 * 32 + 1)
    assert samples_at_once(model, {"x": normal(1, 4)}, 33) == 10
    assert samples_at_once(model, {"x": normal(2, 4)}, 33) == 10
    monkeypatch.setattr("edgekit.graph.sizes.HELD_BYTES", 1)
    assert samples_at_once(model, {"x": normal(1, 4)}, 33) == 1


def test_parts_are_as_large_as_allowed_or_one_value() -> None:
    sizes = {"a": 4, "b": 5, "c": 20, "d": 1, "e": 2}
    assert list(in_parts("abcde", lambda name: sizes.get(name, 0), 9)) == [["a", "b"], ["c"], ["d", "e"]]
    assert list(in_parts("", lambda name: sizes.get(name, 0), 9)) == []


def test_values_come_in_parts_and_are_the_same() -> None:
    model = residual_net()
    feeds = samples(model, 2, seed=3)
    names = [value.name or "" for value in activations(model)]
    whole = [dict(part) for part in Probe(model, names, optimize=False).run(feeds)]
    probe = Probe(model, names, optimize=False, most_bytes=20_000)
    parts = [dict(part) for part in probe.run(feeds)]
    assert len(whole) == 2  # the input, and all others
    assert len(parts) > 4
    together = {name: array for part in parts for name, array in part.items()}
    assert list(together) == names
    assert all(sum(array.nbytes for array in part.values()) <= 20_000 or len(part) == 1 for part in parts)
    for name, array in (pair for part in whole for pair in part.items()):
        np.testing.assert_array_equal(together[name], array)


def test_an_output_does_not_hold_the_memory_of_the_session_that_made_it() -> None:
    model = residual_net()
    session, feeds = Session(model, optimize=True), samples(model, 2)
    assert all(array.flags.owndata for array in session.run(feeds).values())
    for name, array in session.lend(feeds).items():
        np.testing.assert_array_equal(array, session.run(feeds)[name])


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's account of memory")
def test_a_session_takes_no_more_for_the_second_run() -> None:
    build = GraphBuilder(opset=21)
    x = build.op("Relu", [build.conv(build.input("x", ["n", 1, 512, 512]), "a", 1, 64, kernel=1)], "relu")
    x = build.conv(build.op("Relu", [build.conv(x, "b", 64, 64, kernel=1)], "again"), "c", 64, 32, kernel=1)
    model = ir.from_proto(build.proto(build.op("GlobalAveragePool", [x], "pool")))
    session, feeds, taken = Session(model, optimize=False, threads=1), {"x": normal(1, 1, 512, 512)}, []
    for _ in range(3):
        session.run(feeds)
        taken.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    assert peak_bytes(model, feeds) == 2 * 64 * 512 * 512 * 4
    assert taken[2] - taken[0] < 32 << 20  # one activation is 64 MiB


def most_running(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The most inferences under way at once, in a list that is filled while they run."""
    lock, running, most = threading.Lock(), [0], [0]
    plain = Session.lend

    def slow(self: Session, *arguments: Any, **options: Any) -> Any:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.03)
        try:
            return plain(self, *arguments, **options)
        finally:
            with lock:
                running[0] -= 1

    monkeypatch.setattr(Session, "lend", slow)
    return most


def test_of_large_samples_fewer_are_observed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = residual_net()
    values, most = activations(model), most_running(monkeypatch)
    batches = [Batch(samples(model, 8, seed=seed)) for seed in (1, 2)]
    free = observe(model, values, batches, threads=4, on_batch=None)
    assert most[0] == 4
    one = peak_bytes(model, samples(model, 1), [value.name or "" for value in values])
    for limit, expected in ((2 * one, 2), (one, 1), (1, 1)):
        most[0] = 0
        monkeypatch.setattr("edgekit.calibration.observe.WATCHED_BYTES", limit)
        found = observe(model, values, batches, threads=4, on_batch=None)
        assert most[0] == expected
        for value in values:
            np.testing.assert_array_equal(found[value].histogram().counts, free[value].histogram().counts)


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for a few small activations only."""
    for module in ("graph.probe", "calibration.observe", "sensitivity"):
        monkeypatch.setattr(f"edgekit.{module}.WATCHED_BYTES", 30_000)
    monkeypatch.setattr(Probe.__init__, "__kwdefaults__", {"threads": 0, "most_bytes": 30_000})


def test_rows_are_the_same_in_parts(request: pytest.FixtureRequest) -> None:
    model = residual_net()
    layers = linear_layers(model.graph)
    batches = [Batch(samples(model, 4, seed=seed)) for seed in (1, 2)]
    whole = collect_rows(model, layers, batches, samples=8, rows=64, threads=1)
    request.getfixturevalue("little")
    parts = collect_rows(model, layers, batches, samples=8, rows=64, threads=1)
    assert list(parts) == list(whole)
    for key, rows in whole.items():
        np.testing.assert_allclose(parts[key].rows, rows.rows, rtol=1e-5, atol=1e-6)


def test_sensitivity_is_the_same_in_smaller_segments(request: pytest.FixtureRequest) -> None:
    model = annotate(residual_net())
    batches = [samples(model, 3, seed=seed) for seed in (1, 2)]
    whole = sensitivity(model, load_target("portable"), batches, threads=1)
    request.getfixturevalue("little")
    parts = sensitivity(model, load_target("portable"), batches, threads=1)
    assert [layer.name for layer in parts] == [layer.name for layer in whole]
    for ours, theirs in zip(parts, whole, strict=True):
        assert ours.output_sqnr_db == pytest.approx(theirs.output_sqnr_db, abs=0.01)
        assert ours.local_sqnr_db == pytest.approx(theirs.local_sqnr_db, abs=0.01)


def test_a_model_of_large_activations_is_compressed_and_proven_a_few_samples_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 maps of 512 x 512 are 64 MiB: 33 samples of them at once would take gigabytes."""
    build = GraphBuilder(opset=21)
    x = build.input("x", ["n", 1, 512, 512])
    maps = build.op("Relu", [build.conv(x, "conv", 1, 64, kernel=1)], "relu")
    small = build.op("Flatten", [build.op("MaxPool", [maps], "pool", kernel_shape=[64, 64], strides=[64, 64])], "flat")
    y = build.op("MatMul", [small, build.weight("w", 4096, 3)], "head")
    onnx.save(build.proto(y), tmp_path / "large.onnx")
    most: list[int] = []
    plain = Session.lend

    def noted(self: Session, feeds: dict[str, Array], *arguments: Any, **options: Any) -> Any:
        most.append(len(feeds["x"]))
        return plain(self, feeds, *arguments, **options)

    monkeypatch.setattr(Session, "lend", noted)
    edgekit.compress(tmp_path / "large.onnx", tmp_path / "out", calibration={"x": normal(4, 1, 512, 512)}, proxy="none")
    [result] = edgekit.export(tmp_path / "out", "arm-onnxruntime")
    assert result.manifest.proof.agrees is not False
    assert result.manifest.proof.batch_sizes == (1, 3)
    assert max(most) == 3
