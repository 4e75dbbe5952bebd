"""`edgekit benchmark`: how fast each exported artifact is, against the same runtime's float, in one run."""

from __future__ import annotations

import json
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from edgekit.backend import Artifact, get_backend
from edgekit.calibration.smooth import unsmooth
from edgekit.errors import BackendError, GoalError, TargetError
from edgekit.graph.io import save_onnx
from edgekit.graph.run import Session
from edgekit.measure import Candidate, Comparison, measure, samples_in
from edgekit.output import sha256, write_text
from edgekit.pipelines.stored import Stored, open_stored, samples_of_size
from edgekit.pipelines.targets import availability
from edgekit.progress import Progress, silent
from edgekit.proof import Arrays, compare
from edgekit.records import BENCHMARKS, MODEL, Benchmark, Benchmarks, Manifest, PrecisionTiming, read_manifests
from edgekit.report import write_report
from edgekit.target import Target, load_target
from edgekit.worker import Worker

BURSTS = 7
BURST_SECONDS = 0.25
INT8 = "int8"
STALE = "exported from an earlier compression"


def benchmark(
    out: str | Path,
    targets: str | Sequence[str] = (),
    *,
    batch_size: int = 1,
    iterations: int | None = None,
    fail_on_slower: bool = False,
    on_progress: Progress = silent,
) -> Benchmarks:
    """Time the exports of the compressed model in `out`.

    Args:
        out: the folder that `compress` wrote, with exports in it.
        targets: their names or files; all that were exported when empty.
        batch_size: samples of one inference, where the model's batch is dynamic.
        iterations: inferences of one burst; by time when None.
        fail_on_slower: raise when an artifact is measurably slower than float32: the whole 95 % interval of its speed-up is below 1.
        on_progress: told of each step.

    Raises:
        EdgekitError: see `edgekit.errors`. A target that cannot run here is not an error: its record says why.
    """
    stored = open_stored(Path(out))
    records = []
    for manifest in _chosen(stored, [targets] if isinstance(targets, str) else targets):
        record = _benchmark_one(stored, manifest, batch_size=batch_size, iterations=iterations, on_progress=on_progress)
        records.append(record.model_copy(update={"graph_sha256": manifest.graph_sha256}))
    found = Benchmarks(machine=_machine(), batch_size=batch_size, targets=tuple(records))
    write_text(stored.folder / BENCHMARKS, json.dumps(found.model_dump(mode="json"), indent=2) + "\n")
    write_report(stored.folder)
    if fail_on_slower:
        refuse_slower(found)
    return found


def _chosen(stored: Stored, targets: Sequence[str]) -> list[Manifest]:
    manifests = read_manifests(stored.folder)
    if not manifests:
        raise TargetError(
            f"{stored.folder}: nothing is exported yet; run `edgekit export {stored.folder} --target ...` first"
        )
    names = [name if name in manifests else load_target(name).name for name in targets] or list(manifests)
    for name in names:
        if name not in manifests:
            raise TargetError(
                f"{stored.folder}: target {name!r} is not exported (exported: {', '.join(manifests)}); export it first"
            )
    return [manifests[name] for name in names]


def _benchmark_one(
    stored: Stored, manifest: Manifest, *, batch_size: int, iterations: int | None, on_progress: Progress
) -> Benchmark:
    """Time one export, or say why that is impossible here."""
    target = manifest.target_rules
    available = availability(target)
    unmeasured = Benchmark(target=target.name, runtime=available.version)
    if manifest.model_sha256 != stored.record.model_sha256:
        return unmeasured.model_copy(update={"reason": STALE, "remedy": "run `edgekit export` again"})
    if not available.can_run:
        return unmeasured.model_copy(update={"reason": available.reason, "remedy": available.remedy})
    feeds = samples_of_size(stored, batch_size)
    with tempfile.TemporaryDirectory(prefix="edgekit-") as temporary:
        try:
            candidates = _candidates(stored, manifest, Path(temporary))
            wrong = _what_is_wrong(stored, candidates[-1].artifact, target, feeds)
        except BackendError as error:
            return unmeasured.model_copy(update={"reason": str(error)})
        if wrong:
            reason = f"WRONG at batch {samples_in(feeds)}, do not ship: {wrong}"
            return unmeasured.model_copy(update={"reason": reason})
        comparison = measure(
            candidates,
            feeds,
            bursts=BURSTS,
            burst_seconds=BURST_SECONDS,
            iterations=iterations,
            on_progress=lambda done, total: on_progress(f"{target.name}: benchmark", done, total),
        )
        return _record(target.name, available.version, samples_in(feeds), candidates, comparison)


def _what_is_wrong(stored: Stored, artifact: Artifact, target: Target, feeds: Arrays) -> str:
    """How the artifact's results at this batch size differ from the simulation's; a fast wrong answer is not worth timing."""
    simulated = Session(stored.folder / target.name / MODEL, optimize=False).run(feeds)
    floats = Session(stored.model, optimize=False).run(feeds)
    with Worker(artifact, target, exact=True) as worker:
        return compare([worker.run(feeds)], [simulated], [floats]).reason


def _candidates(stored: Stored, manifest: Manifest, temporary: Path) -> list[Candidate]:
    """The float model in each precision of the runtime, "f32" first, and the artifact."""
    target = manifest.target_rules
    backend = get_backend(target.backend)
    float_model = temporary / MODEL
    save_onnx(unsmooth(stored.model), float_model)
    candidates = []
    for precision in backend.float_precisions(target):
        folder = temporary / precision
        folder.mkdir()
        candidates.append(
            Candidate(precision, backend.convert(float_model, target, folder, precision=precision), target)
        )
    return [*candidates, Candidate(INT8, _artifact(stored.folder / target.name, manifest), target)]


def _artifact(folder: Path, manifest: Manifest) -> Artifact:
    files = tuple(folder / name for name in manifest.artifact_files)
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise BackendError(f"{missing[0]}: does not exist; run `edgekit export` again")
    recorded = {file.name: file.sha256 for file in manifest.files}
    changed = [file for file in files if sha256(file) != recorded.get(file.name)]
    if changed:
        raise BackendError(
            f"{changed[0]}: is not the file that was verified when it was exported; run `edgekit export` again"
        )
    return Artifact(folder / manifest.artifact, files)


def _record(
    name: str, runtime: str, batch_size: int, candidates: Sequence[Candidate], comparison: Comparison
) -> Benchmark:
    sizes = {candidate.label: candidate.artifact.size_bytes for candidate in candidates}
    timings = tuple(
        PrecisionTiming(**asdict(timing), artifact_bytes=sizes[timing.label]) for timing in comparison.timings
    )
    by_label = {timing.label: timing for timing in timings}
    if INT8 not in by_label:
        return Benchmark(target=name, runtime=runtime, timings=timings, reason=comparison.failures[INT8])
    floats = [timing for timing in timings if timing.label != INT8]
    fastest = min(floats, key=lambda timing: timing.median_ms, default=None)
    speedup = comparison.ratios.get(INT8)
    fastest_ratio = comparison.ratios.get(fastest.label) if fastest else None
    return Benchmark(
        target=name,
        runtime=runtime,
        batch_size=batch_size,
        timings=timings,
        speedup=speedup.median if speedup else None,
        speedup_low=speedup.ci_low if speedup else None,
        speedup_high=speedup.ci_high if speedup else None,
        fastest_float=fastest.label if fastest else "",
        speedup_over_fastest=(speedup.median / (fastest_ratio.median if fastest_ratio else 1.0))
        if speedup and fastest
        else None,
        noisy=comparison.noisy,
        notes=tuple(
            filter(None, [comparison.message, *(f"{label}: {why}" for label, why in comparison.failures.items())])
        ),
    )


def refuse_slower(found: Benchmarks) -> None:
    """Raise when an artifact is slower than float32 for certain: noise widens the interval, so it needs no rule of its own.

    What was not timed proves nothing: at least one target has to be, and none may be stale or wrong.

    Raises:
        GoalError: naming the targets.
    """
    untimed = [record for record in found.targets if record.reason]
    unfit = [record for record in untimed if record.reason == STALE or record.reason.startswith("WRONG")]
    if unfit or len(untimed) == len(found.targets):
        listed = "; ".join(f"{record.target}: {record.why_not}" for record in unfit or untimed)
        raise GoalError(f"not shown to be faster than float32, because it was not timed: {listed}")
    slow = [record for record in found.targets if record.speedup_high is not None and record.speedup_high < 1]
    if slow:
        listed = ", ".join(f"{record.target} ({record.speedup:.2f} x)" for record in slow)
        raise GoalError(f"slower than float32: {listed}; leave layers in float, or ship the float model there")


def _machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(names) or '?'} CPUs, {platform.system()}"
