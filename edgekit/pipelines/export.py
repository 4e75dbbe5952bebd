"""`edgekit export`: the annotated model becomes the graph and the artifact of each target, proven on the target's own runtime."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import edgekit
from edgekit.backend import Artifact, get_backend
from edgekit.departure import Departure
from edgekit.errors import BackendError, EdgekitError, GoalError, OutputError, TargetError
from edgekit.graph.contract import contract
from edgekit.graph.io import load_onnx
from edgekit.graph.magnitudes import mark_wide, wide_names
from edgekit.graph.rules import check_operators
from edgekit.graph.sparsity import graph_sparsity
from edgekit.kept_workers import kept_workers
from edgekit.lift import Floor
from edgekit.lowering.cpu import saturates_here, with_reduced_range
from edgekit.metric import Evaluate, Runner, open_metric
from edgekit.output import sha256, staged_folder, write_text
from edgekit.pipelines.build import Candidate, Job
from edgekit.pipelines.decision import MOST_LOST, Decision, settle_target
from edgekit.pipelines.departures import departures
from edgekit.pipelines.expected import PROVEN_ON, Expected, what_is_expected
from edgekit.pipelines.floor import lift_notes
from edgekit.pipelines.placement import fastest, placement_notes
from edgekit.pipelines.precise import Built, build_precisely
from edgekit.pipelines.resized import Resized
from edgekit.pipelines.stored import Stored, open_stored
from edgekit.pipelines.targets import missing
from edgekit.progress import Progress, silent
from edgekit.records import (
    MANIFEST,
    MODEL,
    Compressed,
    FileRecord,
    Manifest,
    Metric,
    PortRecord,
    TunedPlacement,
    read_record,
    versions,
)
from edgekit.report import write_report
from edgekit.target import Format, Target, load_target
from edgekit.words import some


@dataclass(frozen=True, slots=True)
class ExportResult:
    """One export: its folder and what was written down about it."""

    folder: Path
    manifest: Manifest


@kept_workers()
def export(
    out: str | Path,
    targets: str | Sequence[str],
    *,
    format: Format | None = None,
    evaluate: str | Path | Callable[[Runner], float] | None = None,
    allow_wrong: bool = False,
    tune_placement: bool = True,
    time_budget: float | None = None,
    on_progress: Progress = silent,
) -> list[ExportResult]:
    """Lower, convert and verify the compressed model in `out` for each of `targets`.

    Args:
        out: the folder that `compress` wrote; each target gets a folder in it.
        targets: names or TOML files.
        format: of the graph; the target's own when None.
        evaluate: as in `compress`, whose own is used when None.
        allow_wrong: keep an artifact, for inspection, that its runtime computes wrongly and that could not be repaired.
        tune_placement: let measured time decide which layers run in int8, where the target's device is this machine. It takes a
            `time_budget`, or an earlier result for the same model, target and runtime.
        time_budget: seconds for that, for each target.
        on_progress: told of each step.

    Raises:
        EdgekitError: see `edgekit.errors`; the other targets are exported all the same, and the folder of the one that failed is as
            it was.
    """
    if not targets:
        raise TargetError("no target is named; give at least one with --target (`edgekit targets` lists them)")
    rules = [load_target(name) for name in ([targets] if isinstance(targets, str) else targets)]
    for target in rules:
        check_operators(target)
        _check_target(target, format)
        if sum(other.name == target.name for other in rules) > 1:
            raise TargetError(
                f"two targets are called {target.name!r} and would share a folder; give one of them another `name`"
            )
    stored = open_stored(Path(out))
    reference = evaluate or stored.record.evaluate
    metric = open_metric(reference, stored.held_back.inputs, preprocess=stored.record.preprocess) if reference else None
    measured = cache(partial(what_is_expected, stored, judged=metric is None))
    results, failures = [], []
    for target in rules:
        try:
            seconds = time_budget or 0.0 if tune_placement else None
            chosen = format or target.graph.format
            results.append(_export_to(stored, target, chosen, metric, measured, allow_wrong, seconds, on_progress))
        except EdgekitError as error:  # the others go on
            failures.append(error)
        write_report(stored.folder)
    if failures:
        done = f" (exported: {', '.join(result.manifest.target for result in results)})" if results else ""
        raise type(failures[0])("; ".join(map(str, failures)) + done)
    return results


def _export_to(
    stored: Stored,
    target: Target,
    format: Format,
    metric: Evaluate | None,
    measured: Callable[[], Expected],
    allow_wrong: bool,
    tuning_s: float | None,
    on_progress: Progress,
) -> ExportResult:
    """Export to one target, into its folder or not at all."""
    final = stored.folder / target.name
    _check_strangers(final)
    with staged_folder(final, marker=MANIFEST, what="an edgekit export") as folder:
        try:
            manifest = _export_one(stored, target, format, metric, measured, folder, tuning_s, on_progress)
        except EdgekitError as error:  # runtimes name their file, which lies where nobody will find it
            raise type(error)(str(error).replace(f"{folder}{os.sep}", "")) from error
        if manifest.proof.agrees is False and not allow_wrong:
            raise GoalError(
                f"target {target.name!r}: {manifest.runtime} does not compute what the simulation does, and no layer kept in float "
                f"mends it: {manifest.proof.reason}; nothing was exported (--allow-wrong exports it for inspection)"
            )
    return ExportResult(final, manifest)


def _check_strangers(folder: Path) -> None:
    """Refuse to replace an export into whose folder somebody put files of their own."""
    if not (folder / MANIFEST).is_file():
        return
    manifest = read_record(folder / MANIFEST, Manifest, remedy=f"move {folder} away and export again")
    ours = {MANIFEST, *(file.name for file in manifest.files)}
    strange = sorted(path.name for path in folder.iterdir() if path.name not in ours and not path.name.startswith("."))
    if strange:
        raise OutputError(
            f"{folder}: holds {strange[0]!r}, which edgekit did not write; move it elsewhere, because an export replaces the whole folder"
        )


def _check_target(target: Target, format: Format | None) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", target.name):
        raise TargetError(
            f"target name {target.name!r} cannot name a folder; use letters, digits, '-', '_' and '.' for `name` in its file"
        )
    if not target.backend:
        raise TargetError(
            f"target {target.name!r} has no runtime: it is what others extend; export to one of `edgekit targets`"
        )
    if format is not None and format not in target.graph.formats:
        reason = f": {target.graph.formats_reason}" if target.graph.formats_reason else ""
        raise TargetError(
            f"target {target.name!r} does not take format {format!r}, only {', '.join(target.graph.formats)}{reason}"
        )


def _export_one(
    stored: Stored,
    target: Target,
    format: Format,
    metric: Evaluate | None,
    measured: Callable[[], Expected],
    folder: Path,
    tuning_s: float | None,
    on_progress: Progress,
) -> Manifest:
    backend = get_backend(target.backend)
    available = backend.available(target)
    if not available.can_convert:
        raise BackendError(f"target {target.name!r}: {missing(available)}")
    if target.runtime.float_dtype == "float16":
        singles = (batch.feeds for batch in stored.held_back.batches(1))
        stored = replace(stored, model=mark_wide(stored.model, singles))
    expected, lifted = measured(), None
    decision, resized = expected.decision, expected.resized
    if format == "qdq":  # the others take no layer in float
        stored, lifted = settle_target(stored, target, decision, on_progress)
    target = target.model_copy(update={"graph": target.graph.model_copy(update={"format": format})})
    checked = with_reduced_range(target) if available.can_check and saturates_here(target) else target
    job = Job(
        stored.model,
        target,
        checked,
        format,
        backend,
        available,
        folder,
        expected.batches,
        expected.floats,
        resized if resized and resized.feeds else None,
        min(stored.record.held_back, PROVEN_ON),
    )
    placement = None
    if tuning_s is not None and available.can_run and format == "qdq":
        placement = fastest(stored, target, backend, tuning_s, on_progress)
    slow = frozenset(placement.keep_float) if placement else frozenset()
    judge = metric or (decision.evaluate if decision else None)
    built, precision_note = build_precisely(job, slow, judge, partial(_floor, stored.record, decision), on_progress)
    proxy = stored.record.proxy
    parted, parted_note = departures(built.job, slow | frozenset(built.kept))
    notes = (
        *lift_notes(lifted, proxy.name if decision and proxy else ""),
        *_size_notes(stored, resized, built.candidate.artifact),
        *_sparsity_note(stored.record, folder / MODEL),
        *([precision_note] if precision_note else []),
        *([parted_note] if parted_note else []),
    )
    return _describe(built, stored.record, placement, metric is None, decision, parted, notes)


def _floor(record: Compressed, decision: Decision | None, value: Metric) -> float | None:
    """The least that `value` may be; None where nothing is known of the float model."""
    if decision is not None:
        return decision.floor
    known = record.float_metric
    return Floor("points", MOST_LOST).needed(known.value) if known and known.name == value.name else None


def _sparsity_note(record: Compressed, graph: Path) -> Iterator[str]:
    """How many zeros a model that was made sparse has kept on its way."""
    if record.pruned is not None and record.pruned.sparsity is not None:
        found = graph_sparsity(load_onnx(graph))
        zeros = sum(layer.zeros * layer.weights for layer in found) / max(1, sum(layer.weights for layer in found))
        fours = sum(layer.two_four for layer in found)
        yield f"{zeros:.1%} of the weights are zero; {fours} of {len(found)} layers have two zeros in every four along their sums (2:4)"


def _describe(
    built: Built,
    record: Compressed,
    placement: TunedPlacement | None,
    proxied: bool,
    decision: Decision | None,
    parted: tuple[Departure, ...],
    notes: Sequence[str],
) -> Manifest:
    """Write the manifest; its number is that of a decision where it is `proxied`, else of a metric."""
    job, candidate, kept, value = built.job, built.candidate, built.kept, built.value
    artifact = candidate.artifact
    judged = value if proxied else None
    manifest = Manifest(
        edgekit=edgekit.__version__,
        versions=versions("onnx", "onnxruntime", "openvino", "tensorrt", "tensorrt-rtx-cu13", "numpy"),
        source=record.source,
        model_sha256=record.model_sha256,
        target=job.target.name,
        target_rules=job.target,
        backend=job.target.backend,
        runtime=job.available.version,
        format=job.format,
        artifact=artifact.path.name,
        artifact_files=tuple(file.name for file in artifact.files),
        **_ports(job),
        files=tuple(
            FileRecord(name=file.name, bytes=file.stat().st_size, sha256=sha256(file))
            for file in sorted(job.folder.iterdir())
        ),
        kept_float=kept,
        proof=candidate.proof,
        metric=None if judged else value,
        float_metric=record.float_metric
        if record.float_metric and value and record.float_metric.name == value.name
        else None,
        metric_source=built.value_source,
        proxy=judged,
        placement=placement,
        departures=parted,
        notes=(*_notes(job, candidate, kept), *notes, *placement_notes(placement), *_lost(judged, decision)),
    )
    write_text(job.folder / MANIFEST, json.dumps(manifest.model_dump(mode="json"), indent=2) + "\n")
    return manifest


def _ports(job: Job) -> dict[str, Any]:
    """What a caller has to know."""
    promised = contract(job.model)
    inputs, outputs = (
        tuple(PortRecord(name=port.name, dtype=port.dtype.lower(), dims=port.dims) for port in ports)
        for ports in (promised.inputs, promised.outputs)
    )
    return {"inputs": inputs, "outputs": outputs, "opset": load_onnx(job.folder / MODEL).opset_imports.get("", 0)}


def _size_notes(stored: Stored, resized: Resized | None, artifact: Artifact) -> Iterator[str]:
    """What to tell of the sizes of inputs and files."""
    if resized is not None and not resized.feeds:
        yield f"checked for {', '.join(resized.sizes)} only: the float model takes none of the other sizes that were tried"
    before = sum(file.stat().st_size for file in stored.folder.glob(f"{MODEL}*"))
    if artifact.size_bytes > before:
        yield f"larger than the float model: {artifact.size_bytes:,} bytes, where that has {before:,}"


def _lost(judged: Metric | None, decision: Decision | None) -> Iterator[str]:
    if judged and decision and judged.value < decision.floor:
        yield f"{judged.name} with float is {judged.value:.4g}, under {decision.floor:g}: check the accuracy before you ship it"


def _notes(job: Job, candidate: Candidate, kept: tuple[str, ...]) -> list[str]:
    notes, proof, runtime = [*candidate.artifact.notes, *candidate.notes], candidate.proof, job.available.version
    opset = load_onnx(job.folder / MODEL).opset_imports.get("", 0)
    if opset > job.target.graph.opset:
        notes.append(
            f"the graph has opset {opset}, the target file asks for {job.target.graph.opset}: compress with --target for that"
        )
    if not job.available.can_run:
        notes.append(missing(job.available))
    if job.checked != job.target:
        notes.append(
            "checked with weights of 7 bits in place of 8, whose products this machine's CPU saturates; the metric is simulated"
        )
    wide = wide_names(job.model) if job.target.runtime.float_dtype == "float16" else ()
    if wide:
        notes.append(f"in float32 around tensors that leave float16's range: {some(wide)}")
    if kept:
        notes.append(
            f"kept in float, because {runtime} refuses them or computes them wrongly in int8: {', '.join(kept)}"
        )
    if proof.agrees is False:
        notes.append(
            f"WRONG: {runtime} does not compute what the simulation does: {proof.reason}. Do not ship this artifact"
        )
    if proof.float_layers:
        notes.append(f"in float: {some(proof.float_layers)}")
    return notes
