"""Quantization-aware training in a loop of your own: prepare, train as you always do, compress, export."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import edgekit
from edgekit.training import prepare_qat

BITS = edgekit.Method(weights="int4", precision="int4")


def network() -> nn.Module:
    """Any module."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def train(module: nn.Module, images: Tensor, labels: Tensor, epochs: int, rate: float) -> None:
    """Your loop: nothing in it knows of quantization."""
    module.train()
    optimizer = torch.optim.AdamW(module.parameters(), rate)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(64):
            loss = F.cross_entropy(module(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    module.eval()


def accuracy(module: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images whose highest score is that of their label."""
    with torch.no_grad():
        return float((module(images).argmax(1) == labels).float().mean())


def main() -> None:
    """A network in float, rounded to 4 bits, and trained with its rounding."""
    digits = load_digits()
    images = torch.from_numpy((digits.images[:, None] / 16).astype(np.float32))
    labels = torch.from_numpy(digits.target)
    seen, test = slice(0, 1300), slice(1300, None)

    module = network()
    train(module, images[seen], labels[seen], epochs=25, rate=3e-3)
    print(f"float: {accuracy(module, images[test], labels[test]):.4f}")

    quantized = prepare_qat(module, (images[:256].numpy(),), "x86-onnxruntime", method=BITS)
    print(f"rounded to 4 bits: {accuracy(quantized, images[test], labels[test]):.4f}")
    train(quantized, images[seen], labels[seen], epochs=5, rate=1e-3)
    print(f"trained with 4 bits: {accuracy(quantized, images[test], labels[test]):.4f}")

    with tempfile.TemporaryDirectory(prefix="edgekit-example-") as folder:
        calibration = images[:256].numpy()
        edgekit.compress(quantized, Path(folder), calibration=calibration, target="x86-onnxruntime", method=BITS)
        [result] = edgekit.export(Path(folder), "x86-onnxruntime")
        print(f"{result.manifest.target}: agrees with the simulation: {result.manifest.proof.agrees}")


if __name__ == "__main__":
    main()
