"""What has to hold, and what was found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from int8_formats import EndToEnd
from latency import Latency
from numpy.typing import NDArray
from scoring import Entry, Feeds, Kernels, Scores, predict

from edgekit.measure import Ratio

MOST_TOP1_LOST = 0.005
LEAST_AGREEMENT = 0.985
MOST_CODES_APART = 1.0
LEAST_SAME_TOP1 = 0.99
LEAST_SQNR_DB = 30.0
MOST_FLOAT_ERROR = 1e-5
"""Of the annotated file, as a share of the largest score: what another order of float summation makes."""

OURS = "edgekit"
PASS, FAIL, TIE = "PASS", "FAIL", "tie"


@dataclass(frozen=True, slots=True)
class Result:
    """What was found for one entry; latencies by batch size."""

    entry: Entry
    scores: Scores
    kernels: Kernels
    is_float: bool = False
    latencies: dict[int, Latency] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Claim:
    """One claim, the number that decides it, and the verdict; empty where the number is there to be known only."""

    text: str
    found: str
    verdict: str


def accuracy(results: Sequence[Result], float_top1: float) -> Iterator[Claim]:
    """int8 keeps top-1 and the decisions, on each runtime."""
    for result in _ours(results):
        where = f"{result.entry.group}, {result.entry.label}"
        lost, same = float_top1 - result.scores.top1, result.scores.agreement
        top1_text = f"{where}: top-1 within {100 * MOST_TOP1_LOST} points of float"
        yield Claim(top1_text, f"{-100 * lost:+.2f} points", _verdict(lost <= MOST_TOP1_LOST))
        same_text = f"{where}: the same prediction as float on {100 * LEAST_AGREEMENT} %"
        yield Claim(same_text, f"{100 * same:.2f} %", _verdict(same >= LEAST_AGREEMENT))


def int8_kernels(results: Sequence[Result]) -> Iterator[Claim]:
    """All layers and all residual Adds run in int8."""
    for result in _ours(results):
        where, kernels = f"{result.entry.group}, {result.entry.label}", result.kernels
        macs_found = f"{100 * kernels.macs:.2f} %, {len(kernels.float_layers)} layers in float"
        yield Claim(
            f"{where}: all MACs in int8 kernels", macs_found, _verdict(kernels.macs == 1 and not kernels.float_layers)
        )
        if kernels.adds is None:
            continue
        adds_found = f"{kernels.adds} of {kernels.all_adds}"
        yield Claim(
            f"{where}: every residual Add in an int8 kernel", adds_found, _verdict(kernels.adds == kernels.all_adds)
        )


def speed(results: Sequence[Result]) -> Iterator[Claim]:
    """Faster than the runtime's float, and no slower than its own quantizer."""
    for group in dict.fromkeys(result.entry.group for result in results if result.latencies):
        members = [result for result in results if result.entry.group == group and result.latencies]
        for batch in members[0].latencies:
            yield from _group_speed(group, batch, members)


def formats(group: str, layers: Mapping[str, float], whole: EndToEnd) -> Iterator[Claim]:
    """The three integer formats compute the same."""
    worst = max(layers, key=lambda name: layers[name])
    text = f"{group}: QDQ, QOperator and integer layers within {MOST_CODES_APART:.0f} code on the same codes"
    found = f"{layers[worst]:.2f} at most, in {len(layers)} operators ({worst})"
    yield Claim(text, found, _verdict(layers[worst] <= MOST_CODES_APART))
    same_text = f"{group}: end to end, the formats have the same top-1 on {100 * LEAST_SAME_TOP1:.0f} %"
    yield Claim(same_text, f"{100 * whole.same_top1:.2f} %", _verdict(whole.same_top1 >= LEAST_SAME_TOP1))
    db_text = f"{group}: end to end, their scores agree to {LEAST_SQNR_DB:.0f} dB"
    yield Claim(db_text, f"{whole.sqnr_db:.1f} dB", _verdict(whole.sqnr_db >= LEAST_SQNR_DB))


def tensorrt(engine: Path, broken: Sequence[str]) -> Iterator[Claim]:
    """TensorRT's builder takes the graph, and it keeps the rules that the parser does not enforce."""
    size = engine.stat().st_size if engine.is_file() else 0
    yield Claim("TensorRT: its builder makes an engine of the graph", f"{size:,} bytes", _verdict(size > 0))
    yield Claim("TensorRT: its documented rules hold", "; ".join(broken) or "none is broken", _verdict(not broken))


def annotated_file(model: Path, again: Path, reference: NDArray[Any], batches: Sequence[Feeds]) -> Iterator[Claim]:
    """The compressed model is a plain float ONNX file, equal to the source, and the same from run to run.

    Raises:
        onnx.checker.ValidationError: it is not a valid ONNX file.
    """
    error = float_error(model, reference, batches)
    text = "annotated model: onnx.checker accepts it, ONNX Runtime runs it, it equals the float network"
    yield Claim(text, f"{error:.1e} of the largest score", _verdict(error <= MOST_FLOAT_ERROR))
    same = model.read_bytes() == again.read_bytes()
    yield Claim("two compressions give the same bytes", "the same" if same else "different", _verdict(same))


def float_error(model: Path, reference: NDArray[Any], batches: Sequence[Feeds]) -> float:
    """Load, check and run an annotated file as any user of ONNX would: its largest error, as a share of the largest score.

    Raises:
        onnx.checker.ValidationError: it is not a valid ONNX file.
    """
    onnx.checker.check_model(onnx.load(model), full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # else it warns of each scale that no node reads
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    logits = predict(lambda feeds: {"logits": session.run(None, feeds)[0]}, batches)
    return float(np.abs(logits - reference).max() / np.abs(reference).max())


def _ours(results: Sequence[Result]) -> list[Result]:
    return [result for result in results if result.entry.label.startswith(OURS)]


def _group_speed(group: str, batch: int, members: Sequence[Result]) -> Iterator[Claim]:
    fastest = min((m for m in members if m.is_float), key=lambda member: member.latencies[batch].ms)
    for member in members:
        ours = member.latencies[batch].ours
        text = f"{group}, batch {batch}: faster than {member.entry.label}"
        if member.is_float and member.entry.artifact.precision == "f32":
            yield Claim(text, as_text(ours), _verdict(ours.ci_low > 1))
        elif member is fastest:
            yield Claim(f"{text}, the runtime's fastest float", as_text(ours), "")
        elif not member.is_float and not member.entry.label.startswith(OURS):
            verdict = PASS if ours.median >= 1 else TIE if ours.ci_high >= 1 else FAIL
            yield Claim(f"{group}, batch {batch}: at least as fast as {member.entry.label}", as_text(ours), verdict)


def as_text(ratio: Ratio) -> str:
    """`1.23 x (1.20-1.26)`."""
    return f"{ratio.median:.2f} x ({ratio.ci_low:.2f}-{ratio.ci_high:.2f})"


def _verdict(holds: bool) -> str:
    return PASS if holds else FAIL
