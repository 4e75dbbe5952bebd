"""A network goes from `nn.Module` to int8 for two runtimes, in Python."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

import edgekit


def network() -> nn.Module:
    """Any module in eval mode; here an untrained one."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 128, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    ).eval()


def main() -> None:
    """Compress, export, benchmark; the results are typed records."""
    images = np.random.default_rng(0).normal(size=(256, 3, 32, 32)).astype(np.float32)
    with tempfile.TemporaryDirectory(prefix="edgekit-example-") as folder:
        ship(images, Path(folder))


def ship(images: np.ndarray, out: Path) -> None:
    """The three calls."""
    compressed = edgekit.compress(network(), out, calibration={"input": images})
    print(f"{compressed.model}: {len(compressed.record.layers)} layers")

    for result in edgekit.export(out, ["x86-onnxruntime", "x86-openvino"]):
        proof = result.manifest.proof
        print(
            f"{result.manifest.target}: agrees with the simulation: {proof.agrees}, int8 MACs: {proof.int8_macs_share:.0%}"
        )

    for record in edgekit.benchmark(out, batch_size=8).targets:
        print(f"{record.target}: {record.median_ms:.3f} ms, {record.speedup:.2f}x float32")


if __name__ == "__main__":
    main()
