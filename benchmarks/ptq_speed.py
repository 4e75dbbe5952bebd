"""How fast int8 is: a network of ResNet-50's shape against the peers, and one of MobileNet's kind against all of it in int8."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import click
import mobilenet
import numpy as np
import onnx_ir as ir
import resnet50
from claims import OURS, Claim
from latency import Effort
from onnxruntime.quantization import CalibrationMethod
from peers import onnxruntime_quantized, openvino_quantized
from ptq_sections import Row, Section, faster_by, faster_than_fastest
from scoring import Array, Entry, Feeds, sqnr_db
from subject import (
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
from edgekit.graph.io import save_onnx

TARGETS = (X86_OPENVINO, X86_ONNXRUNTIME)
CALIBRATION_IMAGES, OTHER_IMAGES = 64, 64
PEER_BATCH = 8
ALL_INT8 = f"{OURS}, all int8"
MOBILENET_GAIN = 1.10
TUNING_S = 60.0
"""Seconds that the placement of one target may take."""


def speed(zoo: Path, folder: Path, effort: Effort) -> Section:
    """Random weights: only time matters; the SQNR shows that nothing broke."""
    image = _resnet50_images(CALIBRATION_IMAGES + OTHER_IMAGES)
    thick = _compared("ResNet-50's shape", resnet50.resnet50(), image, folder / "resnet50", effort)
    thin = _compared("MobileNet's kind", mobilenet.mobilenet(), mobilenet.images(256), folder / "mobilenet", effort)
    claims = [*_against_peers(thick), *_never_slower(thick, 1.0), *_never_slower(thin, MOBILENET_GAIN)]
    note = (
        f'Random weights. "{OURS}" has the layers in int8 that are faster so, by measured time; "{ALL_INT8}" has all that the target '
        "quantizes, as the peers do."
    )
    return Section("Speed of the result", note, [*thick, *thin], claims)


def _compared(name: str, model: ir.Model, images: Array, folder: Path, effort: Effort) -> list[Row]:
    """The rows of one network; the first half of the images calibrates, the others are what it is tried on."""
    _say(f"{name}: compress, export")
    half = len(images) // 2
    folder.mkdir()
    source = folder / "source.onnx"
    save_onnx(model, source)
    subject = prepare(
        lambda out: edgekit.compress(
            source, out, calibration={"image": images[:half]}, samples=half, proxy=EVERY_LAYER
        ),
        folder / "all_int8",
        TARGETS,
    )
    entries = list(_entries(subject, in_batches({"image": images[:half]}, PEER_BATCH), folder))
    batches = in_batches({"image": images[half:]}, PEER_BATCH)
    reference = float_outputs(subject, batches)
    latencies = timed(entries, OURS, batches[0], effort, _say)
    rows = []
    for entry in entries:
        scores = {"SQNR": sqnr_db(outputs(entry, batches), reference)}
        renamed = replace(entry, group=f"{name}, {entry.group}")
        rows.append(Row(renamed, scores, latencies[entry.group, entry.label]))
    return rows


def _entries(subject: Subject, calibration: Sequence[Feeds], folder: Path) -> Iterator[Entry]:
    tuned = _tuned(subject, folder / "tuned")
    for target in TARGETS:
        yield from float_entries(target, subject.float_model)
        yield tuned.entry(target, OURS)
        yield subject.entry(target, ALL_INT8)
        _say(f"{group_of(target)}: its own quantizer")
        if target == X86_OPENVINO:
            yield from peer_entries(target, openvino_quantized(subject.float_model, calibration, folder))
        else:
            minmax = (CalibrationMethod.MinMax,)
            made = onnxruntime_quantized(subject.float_model, calibration, folder, methods=minmax)
            yield from peer_entries(target, made)


def _tuned(subject: Subject, folder: Path) -> Subject:
    """The same compressed model, exported with its layers placed by measured time."""
    _say("placement by measured time")
    shutil.copytree(subject.folder, folder)
    exports = edgekit.export(folder, TARGETS, time_budget=TUNING_S)
    return replace(subject, folder=folder, manifests={one.manifest.target: one.manifest for one in exports})


def _against_peers(rows: Sequence[Row]) -> Iterator[Claim]:
    for group in dict.fromkeys(row.entry.group for row in rows):
        rivals = [row for row in rows if row.entry.group == group and not row.entry.label.startswith((OURS, "float"))]
        yield from faster_than_fastest(group, rivals, "peer", 1.0)


def _never_slower(rows: Sequence[Row], least: float) -> Iterator[Claim]:
    """Placement by time against what it started from."""
    for row in rows:
        if row.entry.label == ALL_INT8:
            for batch, latency in row.latencies.items():
                text = f"{row.entry.group}, batch {batch}: placement by time is {least:.2f} x as fast as all int8"
                yield faster_by(text, latency.ours, least)


def _resnet50_images(count: int) -> Array:
    return np.concatenate([batch.feeds["image"] for batch in resnet50.images(count, PEER_BATCH)])


def _say(text: str) -> None:
    click.echo(text, err=True)
