"""MiniLM with a quarter of its heads and of its feed-forward width gone, recovered without labels, and exported to every target."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from claims import Claim
from minilm import HEADS, LENGTH, WIDTH, Feeds, Layer, MiniLM, SelfAttention, Sentences, mean_cosine, spearman
from prune_subject import Shape, fewer, say
from ptq_accuracy import _minilm
from qat_part import Part, holds
from scoring import Array
from subject import here, in_batches
from torch import Tensor, nn

import edgekit
from edgekit.distillation import Distillation
from edgekit.errors import EdgekitError
from edgekit.finetune import Finetune
from edgekit.graph.run import Session
from edgekit.proxy import NONE
from edgekit.pruning import Prune, Pruned
from edgekit.records import MODEL
from edgekit.schedule import Schedule
from edgekit.training.checkpoint import load_checkpoint

RATIO = 0.25
CRITERION = "l1"
TARGETS = ("x86-openvino", "x86-onnxruntime", "arm-onnxruntime", "cuda-tensorrt")
BATCH = 50
EPOCHS = 6
RECOVERY = Finetune(
    distill=Distillation(kind=("response", "feature"), hard=0.0),
    schedule=Schedule(epochs=EPOCHS, optimizer="adamw", learning_rate=1e-4, batch_size=32, track="none", save_every=0),
)
CALIBRATION = 256


class HeadedAttention(SelfAttention):
    """The same with the number of heads as an attribute, where pruning finds and changes it, and not as a constant of its file."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = HEADS, WIDTH // HEADS

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(N, L, WIDTH) and an additive mask (N, 1, 1, L) -> (N, L, heads * head_dim)."""
        query, key, value = (self._split(layer(x)) for layer in (self.query, self.key, self.value))
        scores = query @ key.transpose(-1, -2) / math.sqrt(self.head_dim) + mask
        return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)


def headed_minilm() -> nn.Module:
    """MiniLM with fresh weights, whose heads can be cut."""
    network = MiniLM()
    for layer in network.encoder.layer:
        assert isinstance(layer, Layer)
        layer.attention["self"] = HeadedAttention()
    return network


@dataclass(frozen=True, slots=True)
class _Row:
    """One network: embeddings of all evaluated sentences, against those of the unpruned one."""

    label: str
    spearman: float
    cosine: float


def minilm_section(zoo: Path, folder: Path) -> Part:
    """No sentence that recovers or calibrates is one of those that decide."""
    checkpoint, sentences = _minilm(zoo)
    network = load_checkpoint(checkpoint, factory=headed_minilm).eval()
    reference = _embedded(network, sentences)
    learned = dict(sentences.calibration)
    shape = Shape("MiniLM", network, learned, CALIBRATION)
    prune = Prune(ratio=RATIO, scope="layer", criterion=CRITERION)
    rows = [_row("unpruned", reference, reference, sentences)]
    say("MiniLM: cut")
    cut = shape.pruned(prune.model_copy(update={"recover": False}), folder / "cut")
    assert cut is not None, "it was pruned"
    rows.append(_row("cut", _embedded(edgekit.load(folder / "cut"), sentences), reference, sentences))
    say("MiniLM: recover")
    out = folder / "recovered"
    record = edgekit.compress(
        network,
        out,
        calibration=learned,
        samples=CALIBRATION,
        prune=prune,
        finetune=RECOVERY.model_copy(update={"data": learned}),
        proxy=NONE,
    ).record
    assert record.pruned is not None, "it was pruned"
    rows.append(_row("recovered without labels", _embedded(edgekit.load(out), sentences), reference, sentences))
    made = _exported(out)
    for target, place in made.items():
        if isinstance(place, Path):
            rows.append(_row(f"int8, {target}'s graph", _simulated(place / MODEL, sentences), reference, sentences))
    note = (
        f"A quarter of the heads and of the feed-forward channels of each layer go, by {CRITERION}: {fewer(record.pruned.macs)} MACs, "
        f"{fewer(record.pruned.parameters)} parameters. {RECOVERY.distill.summary if RECOVERY.distill else ''}, from the unpruned network, "
        f"on {len(learned['input_ids'])} sentences of {LENGTH} tokens that are no part of the 1,000 evaluated pairs. "
        f"{record.pruned.recovered}"
    )
    told = [[row.label, f"{row.spearman:.4f}", f"{row.cosine:.5f}"] for row in rows]
    claims = list(_claims(record.pruned, rows, made))
    return Part("MiniLM", note, ["file", "Spearman", "cosine to the unpruned"], told, claims)


def _exported(out: Path) -> Mapping[str, Path | EdgekitError]:
    """The folder of each target's export, or what it failed with."""
    found: dict[str, Path | EdgekitError] = {}
    for target in TARGETS:
        say(f"MiniLM: {target}")
        try:
            [result] = edgekit.export(out, here(target, out.parent))
            found[target] = result.folder
        except EdgekitError as error:
            found[target] = error
    return found


def _embedded(module: nn.Module, sentences: Sentences) -> Array:
    def run(feeds: Feeds) -> Array:
        with torch.no_grad():
            made: Array = module(**{name: torch.from_numpy(array) for name, array in feeds.items()}).numpy()
            return made

    return _in_batches(run, sentences)


def _simulated(model: Path, sentences: Sentences) -> Array:
    session = Session(model, optimize=False)
    return _in_batches(lambda feeds: next(iter(session.run(feeds).values())), sentences)


def _in_batches(run: Callable[[Feeds], Array], sentences: Sentences) -> Array:
    """The first sentences of all pairs, then the second ones."""
    batches = [*in_batches(sentences.first, BATCH), *in_batches(sentences.second, BATCH)]
    return np.concatenate([run(feeds) for feeds in batches])


def _row(label: str, found: Array, reference: Array, sentences: Sentences) -> _Row:
    first, second = found.reshape(2, -1, found.shape[1])
    return _Row(label, spearman(first, second, sentences.similarity), mean_cosine(found, reference))


def _claims(pruned: Pruned, rows: list[_Row], made: Mapping[str, Path | EdgekitError]) -> Iterator[Claim]:
    by_label = {row.label: row for row in rows}
    outputs = {layer.name: (layer.before[1], layer.after[1]) for layer in pruned.layers}
    for kind, ending in (("heads", "attention.self.query"), ("feed-forward width", "intermediate.dense")):
        found = {pair for name, pair in outputs.items() if name.endswith(ending)}
        good = len(found) == 1 and all(after == (1 - RATIO) * before for before, after in found)
        text = ", ".join(f"{before} to {after}" for before, after in sorted(found)) or "unchanged"
        yield holds(f"{kind}: {RATIO:.0%} fewer in every layer (channels)", text, good)
    cut, recovered = by_label["cut"].cosine, by_label["recovered without labels"].cosine
    yield holds(
        "label-free recovery brings it nearer to the unpruned", f"{cut:.4f} to {recovered:.4f}", recovered > cut
    )
    for target, place in made.items():
        good = isinstance(place, Path)
        yield holds(f"exports to {target}", "exported" if good else str(place), good)
