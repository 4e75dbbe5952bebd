"""The artifact of an export: without the layers that the runtime gets wrong, and with floats that are precise enough."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from edgekit.backend import Artifact
from edgekit.errors import BackendError
from edgekit.graph.float16 import rounded_steps
from edgekit.graph.io import load_onnx
from edgekit.graph.run import Session
from edgekit.kept_workers import in_worker
from edgekit.metric import Evaluate
from edgekit.pipelines.build import Candidate, Job, find_guilty, try_build
from edgekit.progress import Progress
from edgekit.records import MODEL, Metric

MOST_REPAIRS = 8


@dataclass(frozen=True, slots=True)
class Built:
    """An export's artifact, and what it is worth.

    Attributes:
        kept: layers that are in float because the runtime gets them wrong.
        value: of the metric, or of the decision that stands in for one.
        value_source: whether the artifact ran for it or its graph was simulated.
    """

    job: Job
    candidate: Candidate
    kept: tuple[str, ...]
    value: Metric | None
    value_source: str


def build_precisely(
    job: Job,
    slow: frozenset[str],
    judge: Evaluate | None,
    floor_of: Callable[[Metric], float | None],
    on_progress: Progress,
) -> tuple[Built, str]:
    """What was built, in float32 where float16 falls under the floor of what `judge` says and float32 does not; that is told."""
    built = _built(job, slow, judge, on_progress)
    floor = floor_of(built.value) if built.value else None
    if built.value is None or floor is None or built.value.value >= floor:
        return built, ""
    if job.target.runtime.float_dtype != "float16":
        return built, ""
    whole = _built(_in_float32(job), slow, judge, on_progress)
    if whole.value is None or whole.value.value < floor:
        return _built(job, slow, judge, on_progress), ""
    half, found = built.value, whole.value.value
    return (
        whole,
        f"in float32 what is not int8: {half.name} is {half.value:.4g} in float16, {found:.4g} so, {floor:.4g} needed",
    )


def _in_float32(job: Job) -> Job:
    """The job for the same target, whose float layers are no float16."""
    target, checked = (
        rules.model_copy(update={"runtime": rules.runtime.model_copy(update={"float_dtype": "float32"})})
        for rules in (job.target, job.checked)
    )
    return replace(job, target=target, checked=checked)


def _built(job: Job, slow: frozenset[str], judge: Evaluate | None, on_progress: Progress) -> Built:
    candidate, kept = _repaired(job, slow, on_progress)
    value, source = _measure_metric(job, candidate.artifact, judge)
    return Built(job, candidate, kept, value, source)


def _repaired(job: Job, slow: frozenset[str], on_progress: Progress) -> tuple[Candidate, tuple[str, ...]]:
    """What was built, and the layers that are in float because the runtime gets them wrong; `slow` ones are in float anyway.

    Raises:
        BackendError: the runtime refuses the graph whatever is in float.
    """
    kept: tuple[str, ...] = ()
    while True:
        on_progress(f"{job.target.name}: lower, convert, verify", len(kept), None)
        candidate, problem = try_build(job, slow | frozenset(kept))
        if not problem or len(kept) == MOST_REPAIRS:
            break
        on_progress(f"{job.target.name}: find the layer that the runtime gets wrong", len(kept), None)
        guilty = find_guilty(job, slow | frozenset(kept), candidate)
        if guilty is None:
            break
        kept = (*kept, guilty)
    if candidate is None:
        raise BackendError(problem)
    return candidate, kept


def _measure_metric(job: Job, artifact: Artifact, metric: Evaluate | None) -> tuple[Metric | None, str]:
    """The metric of the artifact on its runtime or, where that cannot run, of the lowered graph in simulation."""
    if metric is None:
        return None, ""
    if not job.available.can_check or job.checked != job.target:
        # Not optimized: ONNX Runtime's own fusions fail on some graphs that were made for other runtimes.
        return metric(Session(rounded_steps(load_onnx(job.folder / MODEL)), optimize=False).run), "simulated"
    return in_worker(lambda worker: metric(worker.run), artifact, job.target, exact=False), "ran"
