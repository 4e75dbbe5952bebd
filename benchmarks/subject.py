"""A compressed network, its exports, and what takes part in a comparison because of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from latency import Effort, Latency, latencies
from scoring import Array, Entry, Feeds, predict

import edgekit
from edgekit.backend import Artifact, get_backend
from edgekit.graph.io import load_annotated, save_onnx
from edgekit.graph.run import Session
from edgekit.lowering.cpu import cpu_saturates
from edgekit.records import MODEL, Manifest
from edgekit.target import Target, load_target
from edgekit.worker import Worker

X86_OPENVINO, X86_ONNXRUNTIME, CUDA = "x86-openvino", "x86-onnxruntime", "cuda-tensorrt"
GROUPS = {"openvino": "OpenVINO", "onnxruntime": "ONNX Runtime", "tensorrt": "TensorRT, simulated"}
"""What entries are called, by the backend of their target."""
EVERY_LAYER = "none"
"""The proxy of all comparisons with peers: no layer is left in float because of what outputs decide."""
THREADS = 2
BATCH_SIZES = (1, 8)


def group_of(target: str) -> str:
    """What the entries of a target are called."""
    return GROUPS[load_target(target).backend]


def here(name: str, folder: Path) -> str:
    """A shipped x86 target as this CPU computes it: without VNNI it is a file in `folder`, with weights of 7 bits."""
    if not cpu_saturates() or not name.startswith("x86"):
        return name
    path = folder / f"{name}-local.toml"
    path.write_text(
        f'name = "{name}-local"\nextends = "{name}"\nsummary = "without VNNI"\n'
        '[device]\nisa = ["avx2"]\n[quantization]\nreduce_range = true\n',
        encoding="utf-8",
    )
    return str(path)


@dataclass(frozen=True, slots=True)
class Subject:
    """What `edgekit.compress` and `edgekit.export` wrote into `folder`.

    Attributes:
        model: the float graph, annotated.
        float_model: the same as a file without annotations: what the peers get.
        manifests: of the exports, by target as it was asked for.
    """

    folder: Path
    model: ir.Model
    float_model: Path
    manifests: Mapping[str, Manifest]

    def entry(self, target: str, label: str, *, timed: bool = True) -> Entry:
        """An export as a participant; the one that is simulated is never timed."""
        artifact = exported(self.folder, self.manifests[target])
        return Entry(group_of(target), label, artifact, threaded(target), timed=timed and target != CUDA)


def prepare(compress: Callable[[Path], object], folder: Path, targets: Sequence[str]) -> Subject:
    """Let `compress` write into a folder in `folder`, and export that to `targets`."""
    folder.mkdir(parents=True)
    out = folder / "compressed"
    compress(out)
    exports = edgekit.export(out, targets)
    model = load_annotated(out / MODEL)
    float_model = folder / "float.onnx"
    save_onnx(model, float_model)
    return Subject(
        out, model, float_model, {target: one.manifest for target, one in zip(targets, exports, strict=True)}
    )


def exported(folder: Path, manifest: Manifest) -> Artifact:
    """What the runtime of one export loads; `folder` is the compressed model's."""
    place = folder / manifest.target
    return Artifact(place / manifest.artifact, tuple(place / name for name in manifest.artifact_files))


def threaded(name: str) -> Target:
    """A target with the number of threads of all comparisons."""
    target = load_target(name)
    return target.model_copy(update={"runtime": target.runtime.model_copy(update={"threads": THREADS})})


def float_entries(target: str, float_model: Path) -> Iterator[Entry]:
    """The float model, in folders beside it, in each float precision that the runtime of `target` has."""
    rules = threaded(target)
    backend = get_backend(rules.backend)
    for precision in backend.float_precisions(rules):
        place = float_model.parent / f"{rules.name}-{precision}"
        place.mkdir()
        artifact = backend.convert(float_model, rules, place, precision=precision)
        yield Entry(group_of(target), f"float, {precision}", artifact, rules)


def peer_entries(target: str, made: Mapping[str, Artifact], *, timed: int | None = None) -> Iterator[Entry]:
    """What a quantizer of the runtime of `target` made, by label; the first `timed` of them are timed, or all."""
    for index, (label, artifact) in enumerate(made.items()):
        yield Entry(group_of(target), label, artifact, threaded(target), timed=timed is None or index < timed)


def outputs(entry: Entry, batches: Sequence[Feeds]) -> Array:
    """The first output for all samples, from the runtime; or from the lowered graph, where it is simulated."""
    if entry.group == group_of(CUDA):
        return predict(Session(entry.artifact.path.parent / MODEL, optimize=False).run, batches)
    with Worker(entry.artifact, entry.target) as worker:
        return predict(worker.run, batches)


def float_outputs(subject: Subject, batches: Sequence[Feeds]) -> Array:
    """The first output of the float model for all samples: what all are held against."""
    return predict(Session(subject.float_model, optimize=True).run, batches)


def in_batches(feeds: Feeds, size: int) -> list[Feeds]:
    """All samples of `feeds`, `size` at a time."""
    count = len(next(iter(feeds.values())))
    return [{name: array[i : i + size] for name, array in feeds.items()} for i in range(0, count, size)]


def timed(
    entries: Sequence[Entry], ours: str, feeds: Feeds, effort: Effort, say: Callable[[str], None]
) -> dict[tuple[str, str], dict[int, Latency]]:
    """Latencies by batch size, of all entries that are timed, by group and label; `ours` is the label they are held against."""
    found: dict[tuple[str, str], dict[int, Latency]] = {}
    for group in dict.fromkeys(entry.group for entry in entries if entry.timed):
        members = [entry for entry in entries if entry.group == group and entry.timed]
        for batch in BATCH_SIZES:
            say(f"{group}: latency at batch {batch}")
            few = {name: array[:batch] for name, array in feeds.items()}
            for label, latency in latencies(members, ours, few, effort, say).items():
                found.setdefault((group, label), {})[batch] = latency
    return found
