"""ResNet-20 on CIFAR-10, compressed by edgekit and by the runtimes' own quantizers: accuracy, kernels and latency, in one run."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import claims
import click
import numpy as np
import onnx_ir as ir
import torch
from claims import OURS, Claim, Result
from int8_formats import end_to_end, layer_differences
from latency import Effort, latencies
from peers import onnxruntime_quantized, openvino_quantized
from scoring import Array, Entry, Feeds, planned, predict, run_entry, scores
from tables import claims_table, results_table, setting

import edgekit
from edgekit.backend import Artifact, get_backend
from edgekit.data import Preprocess, open_data
from edgekit.errors import SourceError
from edgekit.graph.io import load_annotated, load_onnx, save_onnx
from edgekit.graph.run import Session
from edgekit.pipelines.sources import input_specs
from edgekit.records import MODEL, Manifest
from edgekit.reference import resolve_reference
from edgekit.target import Target, load_target
from edgekit.training.checkpoint import load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
FACTORY = f"{ROOT / 'tests' / 'models' / 'resnet20.py'}:resnet20"
CHECKPOINT, TRAIN, TEST = "resnet20-12fca82f.th", "cifar10-jpeg-train.zip", "cifar10-jpeg-test.zip"
PREPROCESS = Preprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
CALIBRATION_IMAGES, TEST_BATCH, LAYERWISE_IMAGES = 512, 50, 50
PEER_BATCH = 64
"""NNCF averages extremes over batches, so their size matters: of 1, 4, 8, ... 128 this one gave it its best accuracy."""

X86_OPENVINO, X86_ONNXRUNTIME, ARM, CUDA = "x86-openvino", "x86-onnxruntime", "arm-onnxruntime", "cuda-tensorrt"
OPENVINO, ONNXRUNTIME, ARM_ON_X86, TENSORRT = (
    "OpenVINO",
    "ONNX Runtime",
    "ONNX Runtime, ARM's graph on x86",
    "TensorRT, simulated",
)
THREADS = 2
BATCH_SIZES = (1, 8)
QUICK = Effort(rounds=1, bursts=3, burst_seconds=0.05)


@dataclass(frozen=True, slots=True)
class Subject:
    """The compressed model, and what it is held against.

    Attributes:
        folder: what `edgekit.compress` and `edgekit.export` wrote.
        again: a second compression of the same.
        model: its float graph.
        float_model: the same as a file without annotations: what the peers get.
        manifests: of the exports, by target.
        batches: all test images.
        labels: of them, shape `(N,)`.
        reference: what the float network predicts in torch, shape `(N, classes)`.
    """

    folder: Path
    again: Path
    model: ir.Model
    float_model: Path
    manifests: Mapping[str, Manifest]
    batches: Sequence[Feeds]
    labels: Array
    reference: Array


@click.command()
@click.option(
    "--zoo",
    type=click.Path(path_type=Path),
    default=ROOT.parent / "shared" / "zoo",
    help="The folder with the checkpoint and the images.",
)
@click.option("--quick", is_flag=True, help="One short round of timing: to see that it works, not to be quoted.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=ROOT / "benchmarks" / "results" / "resnet20.md",
    help="Where the tables go.",
)
def main(zoo: Path, quick: bool, output: Path) -> None:
    """Print the tables and write them to a file; exit with 1 when a claim fails."""
    for name in (CHECKPOINT, TRAIN, TEST):
        if not (zoo / name).is_file():
            raise click.ClickException(f"{zoo / name} does not exist; give the folder that has it with --zoo")
    effort = QUICK if quick else Effort()
    with tempfile.TemporaryDirectory(prefix="edgekit-") as temporary:
        subject = _prepare(zoo, Path(temporary))
        results = [_result(entry, subject) for entry in _entries(zoo, subject, Path(temporary))]
        results = _timed(results, subject.batches[0], effort)
        found = list(_claims(subject, results))
        text = "\n".join([results_table(results), claims_table(found), setting(), _protocol(results, effort)])
    output.parent.mkdir(exist_ok=True)
    output.write_text(text, encoding="utf-8")
    click.echo(text)
    if any(claim.verdict == claims.FAIL for claim in found):
        raise SystemExit(1)


def _prepare(zoo: Path, folder: Path) -> Subject:
    """Compress twice, export for all targets, and let the float network predict."""
    _say("compress, export")
    folders = folder / "compressed", folder / "again"
    for out in folders:
        edgekit.compress(
            zoo / CHECKPOINT,
            out,
            model=FACTORY,
            calibration=zoo / TRAIN,
            samples=CALIBRATION_IMAGES,
            preprocess=PREPROCESS,
            proxy="none",  # every layer in int8, as the peers have it
        )
    exports = edgekit.export(folders[0], [X86_OPENVINO, X86_ONNXRUNTIME, ARM, CUDA])
    model = load_annotated(folders[0] / MODEL)
    float_model = folder / "float.onnx"
    save_onnx(model, float_model)
    test = list(open_data(zoo / TEST, preprocess=PREPROCESS).bind(input_specs(model)).batches(TEST_BATCH))
    batches = [batch.feeds for batch in test]
    return Subject(
        folder=folders[0],
        again=folders[1],
        model=model,
        float_model=float_model,
        manifests={one.manifest.target: one.manifest for one in exports},
        batches=batches,
        labels=np.concatenate([batch.labels for batch in test if batch.labels is not None]),
        reference=_in_torch(zoo / CHECKPOINT, batches),
    )


def _in_torch(checkpoint: Path, batches: Sequence[Feeds]) -> Array:
    factory = resolve_reference(FACTORY, error=SourceError, what="the network")
    assert callable(factory)
    network = load_checkpoint(checkpoint, factory=factory).eval()
    with torch.no_grad():
        return predict(lambda feeds: {"logits": network(torch.from_numpy(feeds["image"])).numpy()}, batches)


def _entries(zoo: Path, subject: Subject, folder: Path) -> Iterator[Entry]:
    """For each runtime the float precisions that it has, edgekit's artifact, and the files of its own quantizer."""
    data = open_data(zoo / TRAIN, preprocess=PREPROCESS).bind(input_specs(subject.model))
    calibration = [batch.feeds for batch in data.batches(PEER_BATCH, 0, CALIBRATION_IMAGES)]
    openvino, onnxruntime, arm, cuda = (_target(name) for name in (X86_OPENVINO, X86_ONNXRUNTIME, ARM, CUDA))

    yield from _float_entries(OPENVINO, openvino, subject, folder)
    yield Entry(OPENVINO, OURS, _artifact(subject, X86_OPENVINO), openvino)
    exact = replace(_artifact(subject, X86_OPENVINO), precision="f32")
    yield Entry(OPENVINO, f"{OURS}, f32 hint", exact, openvino)
    _say("NNCF")
    for label, artifact in openvino_quantized(subject.float_model, calibration, folder).items():
        yield Entry(OPENVINO, label, artifact, openvino)
        yield Entry(OPENVINO, f"{label}, f32 hint", replace(artifact, precision="f32"), openvino, timed=False)

    yield from _float_entries(ONNXRUNTIME, onnxruntime, subject, folder)
    yield Entry(ONNXRUNTIME, OURS, _artifact(subject, X86_ONNXRUNTIME), onnxruntime)
    _say("onnxruntime.quantization")
    for index, (label, artifact) in enumerate(onnxruntime_quantized(subject.float_model, calibration, folder).items()):
        yield Entry(ONNXRUNTIME, label, artifact, onnxruntime, timed=index == 0)  # their graphs are the same
    yield Entry(ARM_ON_X86, OURS, _artifact(subject, ARM), arm, timed=False)
    yield Entry(TENSORRT, OURS, _artifact(subject, CUDA), cuda, timed=False)


def _float_entries(group: str, target: Target, subject: Subject, folder: Path) -> Iterator[Entry]:
    backend = get_backend(target.backend)
    for precision in backend.float_precisions(target):
        place = folder / f"{target.name}-{precision}"
        place.mkdir()
        yield Entry(
            group,
            f"float, {precision}",
            backend.convert(subject.float_model, target, place, precision=precision),
            target,
        )


def _target(name: str) -> Target:
    """A shipped target with this comparison's number of threads."""
    target = load_target(name)
    return target.model_copy(update={"runtime": target.runtime.model_copy(update={"threads": THREADS})})


def _artifact(subject: Subject, target: str) -> Artifact:
    manifest, folder = subject.manifests[target], subject.folder / target
    return Artifact(folder / manifest.artifact, tuple(folder / name for name in manifest.artifact_files))


def _result(entry: Entry, subject: Subject) -> Result:
    _say(f"{entry.group}: {entry.label}")
    if entry.group == TENSORRT:
        lowered = Session(subject.folder / CUDA / MODEL, optimize=False)
        logits, kernels = predict(lowered.run, subject.batches), planned(entry, subject.model)
    else:
        logits, kernels = run_entry(entry, subject.model, subject.batches)
    return Result(entry, scores(logits, subject.reference, subject.labels), kernels, entry.label.startswith("float"))


def _timed(results: Sequence[Result], images: Feeds, effort: Effort) -> list[Result]:
    """The results with latencies, where they are of interest."""
    found: dict[tuple[str, str], Result] = {(one.entry.group, one.entry.label): one for one in results}
    for group in dict.fromkeys(result.entry.group for result in results if result.entry.timed):
        entries = [result.entry for result in results if result.entry.group == group and result.entry.timed]
        for batch in BATCH_SIZES:
            feeds = {name: array[:batch] for name, array in images.items()}
            _say(f"{group}: latency at batch {batch}")
            for label, latency in latencies(entries, OURS, feeds, effort, _say).items():
                result = found[group, label]
                found[group, label] = replace(result, latencies={**result.latencies, batch: latency})
    return list(found.values())


def _claims(subject: Subject, results: Sequence[Result]) -> Iterator[Claim]:
    float_top1 = float((subject.reference.argmax(1) == subject.labels).mean())
    yield from claims.accuracy([result for result in results if result.entry.group != TENSORRT], float_top1)
    yield from claims.int8_kernels(results)
    yield from claims.speed(results)
    cuda = load_onnx(subject.folder / CUDA / MODEL)
    broken = get_backend("tensorrt").check(cuda, load_target(CUDA))
    yield from claims.tensorrt(_artifact(subject, CUDA).path, broken)
    for target, group in ((X86_ONNXRUNTIME, ONNXRUNTIME), (ARM, ARM_ON_X86)):
        _say(f"{group}: the three formats")
        lowered = load_onnx(subject.folder / target / MODEL)
        few = {name: array[:LAYERWISE_IMAGES] for name, array in subject.batches[0].items()}
        yield from claims.formats(group, layer_differences(lowered, few), end_to_end(lowered, subject.batches))
    yield from claims.annotated_file(subject.folder / MODEL, subject.again / MODEL, subject.reference, subject.batches)


def _protocol(results: Sequence[Result], effort: Effort) -> str:
    noisy = {
        (result.entry.group, batch): latency.noisy for result in results for batch, latency in result.latencies.items()
    }
    return (
        f"Latency: {THREADS} threads; medians over {effort.rounds} rounds, each with a fresh process for every file and "
        f"{effort.bursts} interleaved bursts of {effort.burst_seconds} s. In brackets: 95 % bootstrap intervals over the rounds "
        f"(over the bursts of a single one). Noisy rounds: {sum(noisy.values())} of {effort.rounds * len(noisy)}.\n"
    )


def _say(text: str) -> None:
    click.echo(text, err=True)


if __name__ == "__main__":
    main()
