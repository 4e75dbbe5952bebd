"""One export's artifact: lower, convert, run beside the simulation; and which layer is to blame when they part."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from edgekit.backend import Artifact, Availability, Backend, KernelRecord
from edgekit.errors import BackendError, GraphError
from edgekit.graph.contract import check_contract, contract
from edgekit.graph.float16 import rounded_steps
from edgekit.graph.io import save_onnx
from edgekit.graph.operators import layers
from edgekit.graph.rules import quantized_nodes, recurrent
from edgekit.graph.run import Session
from edgekit.kept_workers import in_worker
from edgekit.lowering.integer import lower_integer
from edgekit.lowering.qdq import lower_qdq
from edgekit.lowering.qoperator import lower_qoperator
from edgekit.lowering.weight_only import check_format
from edgekit.pipelines.resized import Resized
from edgekit.proof import Arrays, compare, int8_share, lost_slices, moved_by, run_batches
from edgekit.records import MODEL, Proof
from edgekit.target import Format, Target
from edgekit.worker import Worker

LOWER_FORMAT: dict[Format, Callable[[ir.Model], ir.Model]] = {
    "qdq": lambda model: model,
    "qoperator": lower_qoperator,
    "integer": lower_integer,
}


@dataclass(frozen=True, slots=True)
class Job:
    """What one export works with.

    Attributes:
        checked: stands in for `target` where this CPU does not compute what the target's does.
        batches, floats: of held-back samples, and what the float model makes of them.
        resized: the same in another size than calibration's; None where no size is open or the float model takes no other.
        samples: how many there are.
    """

    model: ir.Model
    target: Target
    checked: Target
    format: Format
    backend: Backend
    available: Availability
    folder: Path
    batches: Sequence[Arrays]
    floats: Sequence[Arrays]
    resized: Resized | None
    samples: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """An artifact that was built and tried.

    Attributes:
        wrong: the batches that each show that the runtime does not compute what the simulation does, by number.
    """

    artifact: Artifact
    proof: Proof
    notes: tuple[str, ...]
    wrong: tuple[int, ...] = ()


def try_build(job: Job, keep_float: frozenset[str]) -> tuple[Candidate | None, str]:
    """What was built, and what is wrong with it; nothing but the reason when the runtime refuses it."""
    try:
        candidate = _build(job, keep_float)
    except BackendError as error:
        return None, str(error)
    return candidate, candidate.proof.reason if candidate.proof.agrees is False else ""


def _build(job: Job, keep_float: frozenset[str]) -> Candidate:
    """Lower, convert, and run on the held-back samples beside the simulation."""
    check_format(job.model, job.format)
    qdq = job.backend.lower(job.model, job.target, keep_float=keep_float)
    lowered = LOWER_FORMAT[job.format](qdq)
    check_contract(contract(job.model), lowered)
    broken = job.backend.check(lowered, job.target)
    if broken and not job.available.can_check:
        raise GraphError(f"target {job.target.name!r}: the graph breaks rules of its runtime: {'; '.join(broken)}")
    save_onnx(lowered, job.folder / MODEL)
    artifact = job.backend.convert(job.folder / MODEL, job.target, job.folder, precision="int8")
    # What runs is held against edgekit's own lowering, not against what the backend made of it.
    reference = (
        lower_qdq(job.model, job.target, keep_float=keep_float) if job.available.can_check else rounded_steps(qdq)
    )
    batches = [*job.batches, *([job.resized.feeds] if job.resized and not artifact.fixed_sizes else [])]
    simulated = run_batches(Session(reference, optimize=False).run, batches)
    ran: Sequence[Arrays] | None = None
    kernels = job.backend.planned_kernels(artifact)
    if job.available.can_check and job.checked == job.target:
        ran, kernels = _run(job, artifact, batches)
    elif job.available.can_check:
        ran, kernels = _run_stand_in(job, keep_float, batches, simulated)
    share, float_layers = int8_share(layers(job.model), kernels)
    proof = _compare(job, ran, simulated).model_copy(
        update={
            "ran_on": job.available.version if ran is not None else "",
            "samples": job.samples,
            "batch_sizes": tuple(sorted({_batch_size(batch) for batch in job.batches})),
            "int8_macs_share": share,
            "int8_source": ("planned" if ran is None else "ran") if share is not None else "",
            "float_layers": float_layers,
        }
    )
    notes = (*broken, *lost_slices(simulated[: len(job.batches)], job.floats))
    if ran is not None and len(ran) < len(batches) and job.resized is not None:
        notes = (
            *notes,
            f"fails for {', '.join(job.resized.sizes)}, which the float model takes: keep to the samples' sizes",
        )
    wrong = _wrong(job, ran, simulated) if proof.agrees is False and ran is not None else ()
    return Candidate(artifact, proof, notes, wrong)


def _wrong(job: Job, ran: Sequence[Arrays], simulated: Sequence[Arrays]) -> tuple[int, ...]:
    """Which of the job's batches show by themselves that something is wrong."""
    triples = zip(ran, simulated, job.floats, strict=False)  # without the one of another size
    return tuple(
        index
        for index, (here, there, floats) in enumerate(triples)
        if compare([here], [there], [floats]).agrees is False
    )


def _compare(job: Job, ran: Sequence[Arrays] | None, simulated: Sequence[Arrays]) -> Proof:
    """The proof of what ran; the last batch may have another size, which is judged by itself."""
    count = len(job.batches)
    proof = compare(None if ran is None else ran[:count], simulated[:count], job.floats)
    if job.resized is None or len(simulated) == count or (ran is not None and len(ran) == count):
        return proof
    other = compare(None if ran is None else ran[count:], simulated[count:], [job.resized.floats])
    proof = proof.model_copy(update={"other_sizes": job.resized.sizes})
    if proof.agrees is False or other.agrees is not False:
        return proof
    return proof.model_copy(update={"agrees": False, "reason": f"for {', '.join(job.resized.sizes)}: {other.reason}"})


def _run(job: Job, artifact: Artifact, batches: Sequence[Arrays]) -> tuple[Sequence[Arrays], Sequence[KernelRecord]]:
    def task(worker: Worker) -> tuple[Sequence[Arrays], Sequence[KernelRecord]]:
        count = len(job.batches)
        ran = run_batches(worker.run, batches[:count])
        kernels = worker.kernels(batches[0])
        with suppress(BackendError):  # it may not take another size, which is told
            ran += run_batches(worker.run, batches[count:])
        return ran, kernels

    return in_worker(task, artifact, job.target, exact=True)


def _run_stand_in(
    job: Job, keep_float: frozenset[str], batches: Sequence[Arrays], simulated: Sequence[Arrays]
) -> tuple[Sequence[Arrays], Sequence[KernelRecord]]:
    """Run the same graph for the target that stands in; what it adds to its own simulation is added to the real one's outputs."""
    expected = run_batches(
        Session(lower_qdq(job.model, job.checked, keep_float=keep_float), optimize=False).run, batches
    )
    lowered = LOWER_FORMAT[job.format](job.backend.lower(job.model, job.checked, keep_float=keep_float))
    with tempfile.TemporaryDirectory(prefix="edgekit-") as folder:
        path = Path(folder) / MODEL
        save_onnx(lowered, path)
        try:
            artifact = job.backend.convert(path, job.checked, Path(folder), precision="int8")
            ran, kernels = _run(job, artifact, batches)
        except BackendError as error:  # it names a file that will be gone
            raise BackendError(str(error).replace(f"{folder}/", "")) from error
    moved = [
        {name: moved_by(real[name], there[name], array) if name in real else array for name, array in here.items()}
        for real, there, here in zip(simulated[: len(ran)], expected[: len(ran)], ran, strict=True)
    ]
    return moved, kernels


def _batch_size(batch: Arrays) -> int:
    return next((len(array) for array in batch.values() if array.ndim), 1)


def find_guilty(job: Job, keep_float: frozenset[str], tried: Candidate | None = None) -> str | None:
    """The first node whose quantization the runtime refuses or gets wrong: bisection over how many, in graph order, are quantized.

    None when there is something wrong even with nothing quantized.

    Args:
        job: what went wrong.
        keep_float: nodes that are in float already.
        tried: what was built; None where the runtime refused that. One batch is enough to tell right from wrong by, where one
            shows that something is.
    """
    chosen = {*quantized_nodes(job.model, job.target, keep_float=keep_float), *recurrent(job.model.graph)}
    names = [node.name or "" for node in job.model.graph if node in chosen and node.name not in keep_float]
    with tempfile.TemporaryDirectory(prefix="edgekit-") as folder:
        # The job's own folder keeps what is exported.
        whole, trial = replace(job, folder=Path(folder)), replace(_by_one_batch(job, tried), folder=Path(folder))
        if tried is None and not try_build(trial, keep_float)[1]:
            trial = whole

        def agrees(count: int) -> bool:
            return not try_build(trial, keep_float | frozenset(names[count:]))[1]

        right, wrong = 0, len(names)
        if not agrees(right):
            return None
        while wrong - right > 1:
            middle = (right + wrong) // 2
            right, wrong = (middle, wrong) if agrees(middle) else (right, middle)
    return names[wrong - 1]


def _by_one_batch(job: Job, tried: Candidate | None) -> Job:
    """The job with the smallest batch that shows the fault, or of all where the runtime refused the file; as it is where none does."""
    showing = range(len(job.batches)) if tried is None else tried.wrong
    if not showing:
        return job
    index = min(showing, key=lambda index: _batch_size(job.batches[index]))
    return replace(job, batches=[job.batches[index]], floats=[job.floats[index]], resized=None)
