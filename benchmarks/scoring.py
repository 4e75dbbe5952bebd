"""How well an artifact does what the float model did, and what its runtime made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgekit.backend import Artifact, KernelRecord, get_backend
from edgekit.graph.operators import layers
from edgekit.proof import int8_share
from edgekit.target import Target
from edgekit.worker import Worker

Array = NDArray[Any]
Feeds = dict[str, Array]
MOST_DB = 200.0


@dataclass(frozen=True, slots=True)
class Entry:
    """An artifact that takes part.

    Attributes:
        group: entries of one group are compared with each other.
        label: tells the entries of a group apart.
        artifact: what the runtime loads. With the precision "f32", OpenVINO computes float parts in f32 as well.
        target: its backend loads it.
        timed: its latency is of interest.
    """

    group: str
    label: str
    artifact: Artifact
    target: Target
    timed: bool = True


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of shape `(N, classes)`, held against the float model's.

    Attributes:
        top1: share of samples whose arg max is their label.
        agreement: share of samples whose arg max is the float model's.
        sqnr_db: signal-to-quantization-noise ratio over all scores (dB).
    """

    top1: float
    agreement: float
    sqnr_db: float


@dataclass(frozen=True, slots=True)
class Kernels:
    """What computes in int8, as the runtime itself reports it.

    Attributes:
        macs: share of the multiply-accumulates of Conv, Gemm and MatMul in int8 kernels.
        adds: how many of the model's `all_adds` Add nodes are part of an int8 kernel; None where kernels do not name them.
        float_layers: the layers that are not.
    """

    macs: float
    adds: int | None
    all_adds: int
    float_layers: tuple[str, ...]


def scores(logits: Array, reference: Array, labels: Array) -> Scores:
    """Hold `logits` of shape `(N, classes)` against the float model's."""
    decided = logits.argmax(1)
    return Scores(
        top1=float((decided == labels).mean()),
        agreement=float((decided == reference.argmax(1)).mean()),
        sqnr_db=sqnr_db(logits, reference),
    )


def sqnr_db(values: Array, reference: Array) -> float:
    """The power of `reference` over that of the difference (dB, at most 200)."""
    noise = float(np.square(values.astype(np.float64) - reference).sum())
    signal = float(np.square(reference.astype(np.float64)).sum())
    return MOST_DB if noise == 0 else min(MOST_DB, 10 * float(np.log10(signal / noise)))


def predict(run: Callable[[Feeds], Mapping[str, Array]], batches: Sequence[Feeds]) -> Array:
    """The first output for all samples, shape `(N, classes)`."""
    return np.concatenate([next(iter(run(feeds).values())) for feeds in batches]).astype(np.float32)


def run_entry(entry: Entry, model: ir.Model, batches: Sequence[Feeds]) -> tuple[Array, Kernels]:
    """What an entry predicts, and the kernels that it takes, layers being named as in the float `model`."""
    with Worker(entry.artifact, entry.target) as worker:
        return predict(worker.run, batches), kernels(model, worker.kernels(batches[0]))


def planned(entry: Entry, model: ir.Model) -> Kernels:
    """The kernels that the builder planned, where the artifact cannot run; TensorRT's names only layers in them."""
    return replace(kernels(model, get_backend(entry.target.backend).planned_kernels(entry.artifact)), adds=None)


def kernels(model: ir.Model, records: Sequence[KernelRecord]) -> Kernels:
    """What of the float `model`'s layers and Adds the `records` show in int8."""
    share, float_layers = int8_share(layers(model), records)
    integer = {layer for record in records if record.precision == "int8" for layer in record.layers}
    adds = [node.name for node in model.graph if node.op_type == "Add"]
    return Kernels(share or 0.0, sum(name in integer for name in adds), len(adds), float_layers)
