"""What the parts of the comparison of pruning have in common: a model that was pruned, in float, as something to run and to time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import resnet20
from scoring import Entry
from subject import group_of, threaded
from torch import nn

import edgekit
from edgekit.backend import get_backend
from edgekit.data import Preprocess
from edgekit.errors import SourceError
from edgekit.finetune import Finetune
from edgekit.graph.io import load_annotated, save_onnx
from edgekit.method import LayerMethod, Method
from edgekit.proxy import NONE
from edgekit.pruning import Prune, Pruned
from edgekit.records import MODEL
from edgekit.reference import resolve_reference

FLOAT = "f32"
NOTHING = Method(layers=(LayerMethod(match="*", precision="float"),))
"""Is quantized."""
RUNTIMES = ("x86-onnxruntime", "x86-openvino")


@dataclass(frozen=True, slots=True)
class Shape:
    """A network in float and what it is pruned with.

    Attributes:
        name: for people.
        module: the network.
        calibration: what `edgekit.compress` takes, `samples` of it.
        preprocess: for images.
    """

    name: str
    module: nn.Module
    calibration: Any
    samples: int
    preprocess: Preprocess | None = None

    def pruned(
        self,
        prune: Prune | None,
        out: Path,
        *,
        finetune: Finetune | None = None,
        evaluate: Path | None = None,
        target: str = "portable",
    ) -> Pruned | None:
        """Prune it into the folder `out`, and leave it in float; None is what pruning nothing comes to."""
        return edgekit.compress(
            self.module,
            out,
            calibration=self.calibration,
            samples=self.samples,
            preprocess=self.preprocess,
            method=NOTHING,
            prune=prune,
            finetune=finetune,
            evaluate=evaluate,
            target=target,
            proxy=NONE,
        ).record.pruned


def float_entry(out: Path, target: str, label: str) -> Entry:
    """What `edgekit.compress` left in `out`, without quantization, for one runtime; the files lie beside it."""
    rules = threaded(target)
    folder = out.parent / f"{out.name}-{rules.name}"
    folder.mkdir()
    save_onnx(load_annotated(out / MODEL), folder / MODEL)
    artifact = get_backend(rules.backend).convert(folder / MODEL, rules, folder, precision=FLOAT)
    return Entry(group_of(target), label, artifact, rules)


def trained_resnet20(zoo: Path) -> nn.Module:
    """The checkpoint, as it came."""
    from edgekit.training.checkpoint import load_checkpoint

    factory = resolve_reference(str(resnet20.FACTORY), error=SourceError, what="factory")
    assert callable(factory)
    return load_checkpoint(zoo / resnet20.CHECKPOINT, factory=factory)


def resnet20_shape(zoo: Path, module: nn.Module) -> Shape:
    """ResNet-20 with the images that calibrate it."""
    return Shape("ResNet-20", module, zoo / resnet20.TRAIN, 512, resnet20.PREPROCESS)


def fewer(pair: tuple[int, int]) -> str:
    """`40.8 M to 19.6 M (48 %)`."""
    return f"{pair[0] / 1e6:.1f} M to {pair[1] / 1e6:.1f} M ({pair[1] / pair[0]:.0%})"


def pruned_layers(found: Pruned) -> str:
    """The outputs of all layers that lost some: `conv1 64 to 48, ...`."""
    changed = [layer for layer in found.layers if layer.before[1] != layer.after[1]]
    return ", ".join(f"{layer.name} {layer.before[1]} to {layer.after[1]}" for layer in changed)


def say(text: str) -> None:
    """Where it is, on stderr."""
    click.echo(text, err=True)
