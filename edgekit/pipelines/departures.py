"""Layer by layer: how far a runtime's codes, with all its optimizations, are from those that were trained."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx_ir as ir

from edgekit.backend import Artifact
from edgekit.departure import Departure, departure, share
from edgekit.errors import EdgekitError
from edgekit.graph.annotations import annotated_values, get_params
from edgekit.graph.io import save_onnx
from edgekit.graph.run import Session, with_outputs
from edgekit.kept_workers import in_worker
from edgekit.lowering.qdq import lower_qdq
from edgekit.pipelines.build import Job
from edgekit.proof import Arrays, run_batches
from edgekit.records import MODEL


def departures(job: Job, keep_float: frozenset[str]) -> tuple[tuple[Departure, ...], str]:
    """What the target's runtime makes of each quantized tensor of a trained model, in the order of the graph; and what to tell of it.

    The graph that is exported is built once more with its codes as outputs. Differences add up on the way: a tensor's are those of all
    layers before it. Nothing is compared where no grid was trained, where the runtime is not here, or where another CPU is stood in for.
    """
    trained = any(
        (params := get_params(value)) is not None and params.fixed for value in annotated_values(job.model.graph)
    )
    if not trained or job.format != "qdq" or not job.available.can_check or job.checked != job.target:
        return (), ""
    reference = lower_qdq(job.model, job.target, keep_float=keep_float)
    made_by = _quantized(reference)
    lowered = job.backend.lower(job.model, job.target, keep_float=keep_float)
    names = {name for name in _quantized(lowered) if name in made_by}
    try:
        with tempfile.TemporaryDirectory(prefix="edgekit-") as folder:
            path = Path(folder) / MODEL
            save_onnx(with_outputs(lowered, names), path)
            artifact = job.backend.convert(path, job.target, Path(folder), precision="int8")
            ran, left_alone = (_codes(artifact, job, exact=exact) for exact in (True, False))
        expected = run_batches(Session(with_outputs(reference, names), optimize=False).run, job.batches)
    except EdgekitError as error:  # a table for the report is not worth an export
        return (), f"the codes of single layers could not be read from the runtime: {error}"
    found, by_default = (
        tuple(
            departure(tensor, layer, [batch[name] for batch in here], [batch[name] for batch in expected])
            for name, (tensor, layer) in made_by.items()
            if name in names
        )
        for here in (ran, left_alone)
    )
    return found, "" if found == by_default else (
        f"left to its own precision, {job.available.version} makes {share(by_default):.2%} of the codes otherwise than they were trained; "
        f"in float32, in which this is proven, {share(found):.2%}: ask for float32 where the model is loaded"
    )


def _codes(artifact: Artifact, job: Job, *, exact: bool) -> list[Arrays]:
    return in_worker(lambda worker: run_batches(worker.run, job.batches), artifact, job.target, exact=exact)


def _quantized(lowered: ir.Model) -> dict[str, tuple[str, str]]:
    """The tensors of codes in a lowered graph: what is quantized there, and the node that made it."""
    found = {}
    for node in lowered.graph:
        if node.op_type == "QuantizeLinear":
            source = node.inputs[0]
            assert source is not None
            maker = source.producer()
            if maker is not None and maker.op_type == "Clip" and (source.name or "").endswith("_clipped"):
                source = maker.inputs[0]
                assert source is not None
                maker = source.producer()
            found[node.outputs[0].name or ""] = source.name or "", "" if maker is None else maker.name or ""
    return found
