"""Quantization-aware training with the Hugging Face Trainer (`pip install transformers`): what it trains is a module like any other."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

import edgekit
from edgekit.training import prepare_qat


class Sequences(Dataset[dict[str, Tensor]]):
    """Which half of a sequence is louder."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randn(count, 12, 8, generator=generator)
        self.labels = (self.tokens[:, :6].abs().mean((1, 2)) > self.tokens[:, 6:].abs().mean((1, 2))).long()

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"tokens": self.tokens[index], "labels": self.labels[index]}


class Classifier(nn.Module):
    """A small encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 32), nn.Linear(32 * 12, 32), nn.Linear(32, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of the two halves."""
        return self.head(F.relu(self.second(F.relu(self.first(tokens)).flatten(1))))


class WithLoss(nn.Module):
    """What the Trainer calls: labels in, a loss out."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The loss, and the scores beside it."""
        scores = self.module(tokens)
        return {"loss": F.cross_entropy(scores, labels), "logits": scores}


def main() -> None:
    """Prepare, train with the Trainer, compress, export."""
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    train, calibration = Sequences(2000, 0), Sequences(256, 1).tokens.numpy()
    prepared = prepare_qat(Classifier(), (calibration,))
    with tempfile.TemporaryDirectory(prefix="edgekit-example-") as folder:
        settings: dict[str, Any] = {"num_train_epochs": 3, "per_device_train_batch_size": 64, "report_to": []}
        arguments = TrainingArguments(folder, learning_rate=3e-3, save_strategy="no", use_cpu=True, **settings)
        Trainer(WithLoss(prepared), arguments, train_dataset=train).train()
        test = Sequences(1000, 2)
        with torch.no_grad():
            right = prepared.eval()(test.tokens).argmax(1) == test.labels
        print(f"trained with 8 bits: {float(right.float().mean()):.4f}")
        out = Path(folder) / "out"
        edgekit.compress(prepared, out, calibration={"tokens": np.asarray(calibration)})
        for result in edgekit.export(out, ["x86-onnxruntime", "x86-openvino"]):
            print(f"{result.manifest.target}: agrees with the simulation: {result.manifest.proof.agrees}")


if __name__ == "__main__":
    main()
