from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import edgekit
from edgekit.errors import GoalError, TargetError
from edgekit.pipelines.benchmark import STALE, refuse_slower
from edgekit.records import Benchmark, Benchmarks, PrecisionTiming, read_record
from edgekit.report import summary

NumpyTarget = Callable[..., str]
Cli = Callable[..., Any]


def test_the_artifact_is_timed_beside_float(exported: Path, plugin: Path) -> None:
    found = edgekit.benchmark(exported, iterations=3, batch_size=2)
    [record] = found.targets
    assert (record.target, record.batch_size, record.why_not) == ("numpy", 2, "")
    assert [timing.label for timing in record.timings] == ["f32", "int8"]
    floats, integers = record.timings
    assert floats.iterations == integers.iterations == 7 * 3
    assert integers.artifact_bytes == (exported / "numpy" / "model.int8.onnx").stat().st_size
    assert floats.artifact_bytes > integers.artifact_bytes > 1000
    assert record.median_ms == integers.median_ms
    assert 0 < integers.median_ms < 10_000
    assert integers.throughput == pytest.approx(2000 / integers.median_ms, rel=1e-9)
    assert record.fastest_float == "f32"
    assert record.speedup is not None
    assert record.speedup_low is not None
    assert record.speedup_high is not None
    assert record.speedup_low <= record.speedup <= record.speedup_high
    assert record.speedup_over_fastest == record.speedup
    assert read_record(exported / "benchmark.json", Benchmarks, remedy="") == found
    assert "## Latency" in (exported / "report.md").read_text()
    assert json.loads((exported / "report.json").read_text())["benchmark"] == found.model_dump(mode="json")


def test_slower_than_float_fails_when_asked(exported: Path, plugin: Path, cli: Cli) -> None:
    """The reference evaluator runs a graph with more nodes for longer, so its int8 is slower for certain."""
    for iterations in (3, 30, 100):  # noise widens the interval until nothing is certain
        done = cli("benchmark", exported, "--iterations", iterations, "--fail-on-slower")
        if done.code:
            break
    assert done.code == 9
    assert "report: " in done.stdout, "what was measured is printed all the same"
    assert done.stderr.startswith("edgekit: slower than float32: numpy (0.")
    assert done.stderr.endswith("; leave layers in float, or ship the float model there\n")
    assert read_record(exported / "benchmark.json", Benchmarks, remedy="").targets[0].timings


def test_a_target_that_cannot_run_here_says_why(compressed: Path, numpy_target: NumpyTarget, cli: Cli) -> None:
    cli("export", compressed, "--target", numpy_target(absent="no accelerator is plugged in"))
    done = cli("benchmark", compressed)
    assert (done.code, done.stderr) == (0, "")
    assert "numpy: not timed: no accelerator is plugged in; attach the device" in done.stdout
    assert (
        "numpy: not timed: no accelerator is plugged in; attach the device." in (compressed / "report.md").read_text()
    )
    assert [row.state for row in summary(compressed)] == ["built, not run here"]


def test_a_backend_that_is_gone_says_so(exported: Path) -> None:
    [record] = edgekit.benchmark(exported).targets  # the plug-in is not on the path here
    assert record.timings == ()
    assert record.why_not.startswith("backend 'numpy' is not installed (installed: ")


def test_a_runtime_that_fails_says_how_and_the_others_are_timed(exported: Path, numpy_target: NumpyTarget) -> None:
    edgekit.export(exported, [numpy_target("shaky", absent="not now")])
    path = exported / "shaky" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["target_rules"]["runtime"]["options"] = {"on_load": "crash"}
    path.write_text(json.dumps(manifest))
    healthy, shaky = edgekit.benchmark(exported, iterations=1).targets
    assert [timing.label for timing in healthy.timings] == ["f32", "int8"]
    assert shaky.timings == ()
    assert "SIGSEGV" in shaky.why_not


def test_a_missing_artifact_says_so(exported: Path, plugin: Path) -> None:
    (exported / "numpy" / "model.int8.onnx").unlink()
    [record] = edgekit.benchmark(exported).targets
    assert record.why_not.endswith("model.int8.onnx: does not exist; run `edgekit export` again")


def test_exports_of_an_earlier_compression_are_flagged(exported: Path, plugin: Path, tiny: Any, cli: Cli) -> None:
    edgekit.compress(
        tiny.model, exported, calibration=tiny.data, method=edgekit.Method(calibrator="minmax"), samples=40
    )
    done = cli("benchmark", exported)
    assert done.code == 0
    assert "numpy: not timed: exported from an earlier compression; run `edgekit export` again" in done.stdout
    assert [row.state for row in summary(exported)] == ["stale: export again"]


def test_timings_of_an_earlier_export_are_not_shown(exported: Path, plugin: Path, tiny: Any) -> None:
    edgekit.benchmark(exported, iterations=1)
    assert summary(exported)[0].median_ms != ""
    edgekit.compress(
        tiny.model, exported, calibration=tiny.data, method=edgekit.Method(calibrator="minmax"), samples=40
    )
    edgekit.export(exported, [str(plugin / "numpy.toml")])
    [row] = summary(exported)
    assert (row.median_ms, row.speedup) == ("", "")
    assert row.state.startswith("checked on onnx")
    assert "## Latency" not in (exported / "report.md").read_text()


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["x86-openvino"], r"target 'x86-openvino' is not exported \(exported: numpy\); export it first"),
        (["x86-openvin"], r"unknown target 'x86-openvin'; did you mean 'x86-openvino'\?"),
    ],
)
def test_a_target_that_was_not_exported_is_refused(exported_once: Path, targets: list[str], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        edgekit.benchmark(exported_once, targets)


def test_nothing_exported_is_said(compressed_once: Path) -> None:
    with pytest.raises(TargetError, match=r"nothing is exported yet; run `edgekit export .* --target \.\.\.` first"):
        edgekit.benchmark(compressed_once)


def timing(label: str, median: float) -> PrecisionTiming:
    return PrecisionTiming(
        label=label,
        median_ms=median,
        p90_ms=median,
        p99_ms=median,
        ci_low_ms=median,
        ci_high_ms=median,
        throughput=1000 / median,
        load_ms=1.0,
        peak_rss_bytes=1,
        iterations=21,
        bursts=(median,),
        artifact_bytes=1,
    )


@pytest.mark.parametrize(
    ("high", "noisy", "fails"), [(0.8, False, True), (0.8, True, True), (1.1, False, False), (None, False, False)]
)
def test_only_what_is_slower_for_certain_fails(high: float | None, noisy: bool, fails: bool) -> None:
    speedup = None if high is None else 0.75
    record = Benchmark(
        target="t", timings=(timing("f32", 3), timing("int8", 4)), speedup=speedup, speedup_high=high, noisy=noisy
    )
    found = Benchmarks(machine="m", batch_size=1, targets=(record,))
    if not fails:
        return refuse_slower(found)
    with pytest.raises(GoalError, match=r"slower than float32: t \(0\.75 x\)"):
        refuse_slower(found)
    return None


def test_an_artifact_that_is_wrong_at_the_batch_size_is_not_timed(compressed: Path, numpy_target: NumpyTarget) -> None:
    edgekit.export(compressed, numpy_target(wrong_always="head"), allow_wrong=True)
    [record] = edgekit.benchmark(compressed, iterations=1, batch_size=3).targets
    assert record.reason.startswith("WRONG at batch 3, do not ship: output ")
    assert record.timings == ()
    assert [row.state for row in summary(compressed)] == ["WRONG, do not ship"]


def test_an_artifact_that_was_changed_since_is_not_timed(exported: Path, plugin: Path) -> None:
    artifact = exported / "numpy" / "model.int8.onnx"
    artifact.write_bytes(artifact.read_bytes() + b"\0")
    [record] = edgekit.benchmark(exported, iterations=1).targets
    assert "model.int8.onnx: is not the file that was verified" in record.reason
    assert record.timings == ()


TIMED = Benchmark(target="timed", speedup=2.0, speedup_low=1.9, speedup_high=2.1)
ABSENT = Benchmark(target="absent", reason="no such device", remedy="find one")
STALE_EXPORT = Benchmark(target="stale", reason=STALE, remedy="export again")
WRONG_EXPORT = Benchmark(target="wrong", reason="WRONG at batch 9, do not ship: output 'y'")


@pytest.mark.parametrize("records", [(ABSENT,), (TIMED, STALE_EXPORT), (TIMED, WRONG_EXPORT)])
def test_the_gate_does_not_pass_what_was_not_timed(records: tuple[Benchmark, ...]) -> None:
    with pytest.raises(GoalError, match=f"because it was not timed: {records[-1].target}: "):
        refuse_slower(Benchmarks(machine="", batch_size=1, targets=records))


def test_the_gate_passes_where_only_another_device_is_missing() -> None:
    refuse_slower(Benchmarks(machine="", batch_size=1, targets=(TIMED, ABSENT)))
