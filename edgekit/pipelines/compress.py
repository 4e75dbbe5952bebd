"""`edgekit compress`: a checkpoint or ONNX file becomes one annotated ONNX model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

import edgekit
from edgekit.calibration import calibrate
from edgekit.data import Batch, BoundData, Preprocess, open_data
from edgekit.errors import DataError
from edgekit.graph.annotations import annotated_values
from edgekit.graph.io import save_annotated
from edgekit.graph.operators import LINEAR, layers
from edgekit.graph.rules import quantized_nodes
from edgekit.graph.run import Session
from edgekit.lowering.simulation import insert_qdq
from edgekit.metric import Evaluate, Runner, open_metric
from edgekit.output import prepare_folder, replaced_files, sha256
from edgekit.passes.assign_specs import assign_specs
from edgekit.passes.unify_params import unify_params
from edgekit.pipelines.sources import EXAMPLES, canonicalize, input_specs, load_source
from edgekit.progress import Progress, silent
from edgekit.quant.estimators import get_estimator
from edgekit.records import COMPRESSED, HELD_BACK, MODEL, Compressed, LayerRecord, Metric, Source, versions
from edgekit.report import write_report
from edgekit.target import PORTABLE, Target, load_target

DEFAULT_SAMPLES = 512
HELD_BACK_SAMPLES = 64
BATCH_SIZE = 8
FEW_SAMPLES = 32


@dataclass(frozen=True, slots=True)
class CompressResult:
    """What `compress` made: the annotated model's path, and what was written down about it."""

    model: Path
    record: Compressed


def compress(
    source: object,
    out: str | Path,
    *,
    calibration: str | Path | Mapping[str, Any] | Iterable[Any] | Callable[[], Any],
    model: str | Callable[[], object] | None = None,
    samples: int = DEFAULT_SAMPLES,
    target: str = PORTABLE,
    calibrator: str = "mse",
    evaluate: str | Path | Callable[[Runner], float] | None = None,
    preprocess: Preprocess | None = None,
    trust_checkpoint: bool = False,
    on_progress: Progress = silent,
) -> CompressResult:
    """Post-training quantization of `source` into the folder `out`.

    Args:
        source: path of a checkpoint (`.pt`, `.pth`, `.th`, `.safetensors`), an exported program (`.pt2`) or an ONNX file, or an
            `nn.Module`.
        out: folder for `model.onnx`, the held-back samples and the record.
        calibration: samples; see `edgekit.data.open_data`.
        model: what makes the `nn.Module` that a checkpoint's weights go into.
        samples: how many calibrate; more are held back to verify exports with.
        target: compress for one target, or "portable" for all.
        calibrator: "minmax", "percentile", "mse" or "kld".
        evaluate: a metric or labelled data; see `edgekit.metric.open_metric`.
        preprocess: for images.
        trust_checkpoint: open checkpoints that run pickled code.
        on_progress: told of each step.

    Raises:
        EdgekitError: see `edgekit.errors`; `out` is then as it was.
    """
    out = Path(out)
    rules = load_target(target)
    get_estimator(calibrator)
    if samples < 1:
        raise DataError(f"samples is {samples}; at least one is needed, a few hundred make good ranges")
    prepare_folder(out, marker=COMPRESSED, what="an edgekit output folder")
    dataset = open_data(calibration, preprocess=preprocess)

    on_progress("load the source", 0, None)
    graph, origin = load_source(source, dataset, factory=model, trust=trust_checkpoint, opset=rules.graph.opset)
    data = dataset.bind(input_specs(graph))
    metric = None if evaluate is None else open_metric(evaluate, data.inputs, preprocess=preprocess)

    on_progress("bring it into canonical form", 0, None)
    graph = canonicalize(graph, _examples(data), opset=rules.graph.opset)
    split = _split(data, samples)
    held_back = _held_back(data, split)

    graph = assign_specs(graph, rules)
    graph = calibrate(graph, rules, _counted(data, split, on_progress), estimator=calibrator)
    graph = unify_params(graph, rules)

    on_progress("evaluate", 0, None)
    float_metric, simulated_metric = _evaluate(graph, metric)
    with replaced_files(out, COMPRESSED) as stage:
        save_annotated(graph, stage / MODEL)
        np.savez(stage / HELD_BACK, **held_back)  # type: ignore[arg-type]
        record = Compressed(
            edgekit=edgekit.__version__,
            versions=versions("onnx", "onnx-ir", "onnxruntime", "onnxscript", "torch", "numpy"),
            source=origin,
            target=rules.name,
            calibrator=calibrator,
            samples=split,
            held_back=_count(held_back),
            evaluate=_reference(evaluate),
            model_sha256=sha256(stage / MODEL),
            float_metric=float_metric,
            simulated_metric=simulated_metric,
            layers=tuple(
                LayerRecord(
                    name=la.name,
                    op_type=la.op_type,
                    output_shape=la.output_shape,
                    macs=la.macs,
                    parameters=la.parameters,
                )
                for la in layers(graph)
            ),
            stays_float=_stays_float(graph, rules),
            notes=tuple(_notes(graph, rules, split, origin)),
        )
        (stage / COMPRESSED).write_text(json.dumps(record.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")
    write_report(out)
    return CompressResult(out / MODEL, record)


def _examples(data: BoundData) -> dict[str, NDArray[np.generic]]:
    batch = next(iter(data.batches(EXAMPLES)), None)
    if batch is None:
        raise DataError("the calibration data holds no samples; give at least one (a few hundred make good ranges)")
    return batch.feeds


def _split(data: BoundData, samples: int) -> int:
    """How many samples calibrate; the rest, or where there is too little an eighth of all, is held back."""
    if data.size is None or data.size >= samples + HELD_BACK_SAMPLES:
        return samples
    return max(1, min(samples, data.size - max(1, min(HELD_BACK_SAMPLES, data.size // 8)))) if data.size > 1 else 1


def _held_back(data: BoundData, split: int) -> dict[str, NDArray[np.generic]]:
    """Samples that calibration does not see, as arrays that `open_data` reads back; the calibration's own when there are no more."""
    batches = list(data.batches(BATCH_SIZE, split, split + HELD_BACK_SAMPLES)) or list(
        data.batches(BATCH_SIZE, 0, HELD_BACK_SAMPLES)
    )
    shapes = {name: array.shape[int(not batches[0].single) :] for name, array in batches[0].feeds.items()}
    fitting = [b for b in batches if all(b.feeds[n].shape[int(not b.single) :] == shape for n, shape in shapes.items())]
    join = np.stack if batches[0].single else np.concatenate
    arrays = {name: join([batch.feeds[name] for batch in fitting]) for name in shapes}
    if all(batch.labels is not None for batch in fitting) and "labels" not in arrays:
        arrays["labels"] = np.concatenate([batch.labels for batch in fitting if batch.labels is not None])
    return arrays


def _count(arrays: Mapping[str, NDArray[np.generic]]) -> int:
    return len(next(iter(arrays.values())))


def _counted(data: BoundData, split: int, on_progress: Progress) -> Iterator[Batch]:
    done = 0
    for batch in data.batches(BATCH_SIZE, 0, split):
        yield batch
        done += len(batch)
        on_progress("calibrate", done, split)


def _evaluate(graph: ir.Model, metric: Evaluate | None) -> tuple[Metric | None, Metric | None]:
    if metric is None:
        return None, None
    return metric(Session(graph, optimize=True).run), metric(Session(insert_qdq(graph), optimize=True).run)


def _reference(evaluate: object) -> str:
    """What `--evaluate` named, so that `export` finds it from another folder; a function object cannot be found again."""
    if not isinstance(evaluate, str | Path):
        return ""
    location, colon, name = str(evaluate).rpartition(":")
    path = Path(location if colon else str(evaluate))
    return (
        f"{path.resolve()}{colon}{name}"
        if colon and path.is_file()
        else str(path.resolve())
        if path.exists()
        else str(evaluate)
    )


def _stays_float(graph: ir.Model, rules: Target) -> dict[str, int]:
    """How often each operator stays float that a quantizer might have been expected to take."""
    quantized = quantized_nodes(graph, rules)
    counts = Counter(
        node.op_type if not node.domain else f"{node.domain}::{node.op_type}"
        for node in graph.graph
        if node not in quantized and (node.domain or rules.rule_for(node.op_type) != "pass_through")
    )
    for absorbed in rules.quantization.absorb:
        counts.pop(absorbed, None)
    return dict(sorted(counts.items()))


def _notes(graph: ir.Model, rules: Target, split: int, origin: Source) -> Iterator[str]:
    if not annotated_values(graph.graph):
        yield f"nothing is quantized: {origin.name} has no operator that target {rules.name!r} quantizes ({', '.join(LINEAR)})"
    if split < FEW_SAMPLES:
        yield f"calibrated on {split} samples only; a few hundred give ranges that hold"
