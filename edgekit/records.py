"""What edgekit writes down: `compress.json` beside a compressed model, `manifest.json` beside each export."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

from pydantic import Field, ValidationError

from edgekit.data.images import Preprocess
from edgekit.departure import Departure
from edgekit.distribution import LayerDistributions
from edgekit.errors import OutputError
from edgekit.finetune import Finetuned
from edgekit.method import Method
from edgekit.output import sha256
from edgekit.pruning import Pruned
from edgekit.target import Target
from edgekit.toml_file import Table
from edgekit.trials import Lifted, Searched

MODEL = "model.onnx"
HELD_BACK = "held_back.npz"
DECIDING = "deciding.npz"
COMPRESSED = "compress.json"
MANIFEST = "manifest.json"
BENCHMARKS = "benchmark.json"
PRUNED = "pruned"
"""The folder of the pruned module, in float."""


class Source(Table):
    """Where a model came from; `opset` is that of an ONNX file."""

    name: str
    kind: str
    sha256: str = ""
    opset: int | None = None


class PortRecord(Table):
    """An input that a caller has to give, or an output; see `edgekit.graph.contract.Port`."""

    name: str
    dtype: str
    dims: tuple[int | str | None, ...] | None


class Metric(Table):
    """The number that decides, higher is better; a share (top-1) is between 0 and 1."""

    name: str
    value: float


class ProxyRecord(Table):
    """What stood in for a metric: how far the model makes the float one's decisions, 0 to 1, or the SQNR of its outputs.

    Attributes:
        name: for people.
        kind, outputs: the decision and the outputs that it reads; empty for the SQNR.
        floor: the least that is good enough.
        before, after: in simulation, before layers were left in float because of it, and at last.
        decisions: how many judge: samples, or boxes; 0 for the SQNR.
    """

    name: str
    kind: str = ""
    outputs: tuple[str, ...] = ()
    floor: float
    before: float
    after: float
    decisions: int = 0


class LayerRecord(Table):
    """A layer and what it costs, for one sample."""

    name: str
    op_type: str
    output_shape: tuple[int | None, ...] | None
    macs: int
    parameters: int


class Compressed(Table):
    """`compress.json`."""

    edgekit: str
    versions: dict[str, str]
    source: Source
    target: str
    method: Method
    samples: int
    held_back: int
    deciding: int = 0
    evaluate: str = ""
    preprocess: Preprocess | None = None
    model_sha256: str = ""
    float_metric: Metric | None = None
    simulated_metric: Metric | None = None
    proxy: ProxyRecord | None = None
    layers: tuple[LayerRecord, ...] = ()
    stays_float: dict[str, int] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()
    sensitivity: tuple[LayerSensitivity, ...] = ()
    distributions: tuple[LayerDistributions, ...] = ()
    lifted: Lifted | None = None
    searched: Searched | None = None
    finetuned: Finetuned | None = None
    pruned: Pruned | None = None

    @property
    def how(self) -> str:
        """The method in a few words, and how many samples chose ranges, if any."""
        return f"{self.method.summary} from {self.samples} samples" if self.samples else self.method.summary

    @property
    def float_model(self) -> str:
        """What decisions are compared with, in words: quantization starts from what pruning left."""
        return "the pruned model in float" if self.pruned else "float"


class OutputProof(Table):
    """One output of an artifact, on its own runtime, against the simulation and against float.

    Floats have an SQNR (dB) and a cosine; whole numbers and truth values the share of equal elements.
    """

    name: str
    simulation_sqnr_db: float | None
    float_sqnr_db: float | None
    simulation_cosine: float | None
    float_cosine: float | None
    simulation_equal: float | None = None
    float_equal: float | None = None


class Proof(Table):
    """What running an artifact on held-back samples showed.

    Attributes:
        ran_on: the runtime and version; empty when it could not run here, and the numbers are the simulation's.
        agrees: the runtime computes what the simulation does, up to rounding; None when it could not run.
        reason: why not.
        float_top1, simulation_top1: share of samples with the same arg max as the float model, the simulation; None when the
            first output holds no scores.
        other_sizes: of the inputs, in the batch of another size than calibration's; empty where no size is open, or none was tried.
        int8_macs_share: of the layers' MACs, the share in int8 kernels; None when the runtime does not tell.
        int8_source: "ran" as the runtime reported it, "planned" as its builder did.
        float_layers: the layers that ran in float.
    """

    ran_on: str = ""
    batch_sizes: tuple[int, ...] = ()
    samples: int = 0
    other_sizes: tuple[str, ...] = ()
    agrees: bool | None = None
    reason: str = ""
    outputs: tuple[OutputProof, ...] = ()
    float_top1: float | None = None
    simulation_top1: float | None = None
    int8_macs_share: float | None = None
    int8_source: str = ""
    float_layers: tuple[str, ...] = ()


class FileRecord(Table):
    """A shipped file."""

    name: str
    bytes: int
    sha256: str


class Manifest(Table):
    """`manifest.json` of one export; `inputs` and `outputs` are the source's, and `opset` is that of the lowered graph.

    `departures` are of a model with trained grids: the runtime's codes, with all its optimizations, against what was trained.
    """

    edgekit: str
    versions: dict[str, str]
    source: Source
    model_sha256: str
    target: str
    target_rules: Target
    backend: str
    runtime: str
    format: str
    artifact: str
    artifact_files: tuple[str, ...]
    inputs: tuple[PortRecord, ...] = ()
    outputs: tuple[PortRecord, ...] = ()
    opset: int = 0
    files: tuple[FileRecord, ...]
    kept_float: tuple[str, ...] = ()
    proof: Proof = Proof()
    metric: Metric | None = None
    float_metric: Metric | None = None
    metric_source: str = ""
    proxy: Metric | None = None
    notes: tuple[str, ...] = ()
    placement: TunedPlacement | None = None
    departures: tuple[Departure, ...] = ()

    @property
    def artifact_bytes(self) -> int:
        """Bytes of what the runtime loads."""
        return sum(file.bytes for file in self.files if file.name in self.artifact_files)

    @property
    def graph_sha256(self) -> str:
        """Of the lowered graph, which stands for the artifact: runtimes do not write the same bytes twice."""
        return next((file.sha256 for file in self.files if file.name == MODEL), "")


class PrecisionTiming(Table):
    """One candidate of a benchmark; see `edgekit.measure.Timing`."""

    label: str
    median_ms: float
    p90_ms: float
    p99_ms: float
    ci_low_ms: float
    ci_high_ms: float
    throughput: float
    load_ms: float
    peak_rss_bytes: int
    iterations: int
    bursts: tuple[float, ...]
    artifact_bytes: int


class Benchmark(Table):
    """One target: its timings, or why there are none.

    Attributes:
        speedup: float32's latency over int8's, with its 95 % interval `speedup_low` to `speedup_high`.
        fastest_float: the runtime's fastest float precision; `speedup_over_fastest` is against it.
        noisy: the machine was too noisy for the numbers to be trusted much.
        reason, remedy: why nothing was measured, and what would change that.
        graph_sha256: of the lowered graph that was measured.
    """

    target: str
    graph_sha256: str = ""
    runtime: str = ""
    batch_size: int = 1
    timings: tuple[PrecisionTiming, ...] = ()
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    fastest_float: str = ""
    speedup_over_fastest: float | None = None
    noisy: bool = False
    reason: str = ""
    remedy: str = ""
    notes: tuple[str, ...] = ()

    @property
    def why_not(self) -> str:
        """Why nothing was measured, and what would change that; empty when it was."""
        return "; ".join(filter(None, (self.reason, self.remedy)))

    @property
    def median_ms(self) -> float | None:
        """Latency of the int8 artifact (ms)."""
        return next((timing.median_ms for timing in self.timings if timing.label == "int8"), None)


class Benchmarks(Table):
    """`benchmark.json`."""

    machine: str
    batch_size: int
    targets: tuple[Benchmark, ...]


R = TypeVar("R", bound=Table)


def read_record(path: Path, kind: type[R], *, remedy: str) -> R:
    """A record from its file.

    Raises:
        OutputError: it is missing or is not one; `remedy` says what to do.
    """
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise OutputError(f"{path}: does not exist; {remedy}") from error
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        raise OutputError(f"{path}: cannot be read as an edgekit record ({_reason(error)}); {remedy}") from error


def _reason(error: OSError | UnicodeDecodeError | ValidationError) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg'].lower()}"


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of the installed ones among `packages`."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def read_compressed(folder: Path) -> Compressed:
    """The record of a compressed model, its file checked against it.

    Raises:
        OutputError: it is not there, or was changed since.
    """
    if not folder.is_dir():
        raise OutputError(f"{folder}: is not a folder; give the one that `edgekit compress -o` wrote")
    record = read_record(folder / COMPRESSED, Compressed, remedy="give the folder that `edgekit compress -o` wrote")
    path = folder / MODEL
    if not path.is_file() or sha256(path) != record.model_sha256:
        raise OutputError(f"{path}: is missing or is not what {COMPRESSED} describes; run `edgekit compress` again")
    return record


def read_manifests(folder: Path) -> dict[str, Manifest]:
    """The manifests of all exports in a compressed model's folder, by target, sorted; hidden folders are unfinished ones."""
    found = {}
    for path in sorted(path for path in folder.glob(f"*/{MANIFEST}") if not path.parent.name.startswith(".")):
        manifest = read_record(path, Manifest, remedy="run `edgekit export` again")
        found[manifest.target] = manifest
    return found


class LayerSensitivity(Table):
    """What quantizing one node alone does.

    Attributes:
        name, op_type: of the node.
        macs: multiply-accumulates for one sample; 0 for operators without weights.
        local_sqnr_db: of the node's own output (dB, -200 to 200), its inputs and weight quantized.
        output_sqnr_db, output_cosine: of the model's outputs, the lowest among them.
        metric: the user's number; None where none was asked for.
    """

    name: str
    op_type: str
    macs: int
    local_sqnr_db: float
    output_sqnr_db: float
    output_cosine: float
    metric: float | None = None


class PlacementStep(Table):
    """A change that was timed: `layers` to `precision`; how many times faster it is, with the 95 % interval, or why it did not run."""

    what: str
    layers: tuple[str, ...]
    precision: str
    ratio: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    kept: bool = False
    failure: str = ""


class TunedPlacement(Table):
    """Which layers run in float because a runtime is faster so.

    Attributes:
        key: stands for the annotated graph, the target, the runtime's version, the feeds' shapes and what had to be float.
        keep_float: names of nodes, sorted; with those that had to be.
        baseline_ms, tuned_ms: latency at the start and with `keep_float`, timed against each other; None where nothing was.
        ratio, ci_low, ci_high: baseline over tuned, with its 95 % interval.
        steps: what was tried, in order.
        finished: every change that was thought of was timed; else the time was up.
        all_float: `keep_float` leaves no layer in int8.
    """

    key: str
    target: str
    runtime: str
    keep_float: tuple[str, ...] = ()
    baseline_ms: float | None = None
    tuned_ms: float | None = None
    ratio: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    steps: tuple[PlacementStep, ...] = ()
    finished: bool = False
    all_float: bool = False
