"""The demo's network: small, with what real networks are made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DigitsNet(nn.Module):
    """8x8 grey images `(N, 1, 8, 8)` to 10 scores `(N, 10)`: BatchNorm, a residual Add, a depthwise convolution, a Concat."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(1, 64)
        self.residual = _conv(64, 64)
        self.depthwise = _conv(64, 64, groups=64)
        self.pointwise = _conv(64, 64, kernel=1)
        self.pool = nn.MaxPool2d(2)
        self.mix = _conv(128, 128)
        self.head = nn.Linear(128, 10)

    def forward(self, image: Tensor) -> Tensor:
        """Scores of the ten digits."""
        x = self.stem(image)
        x = torch.relu(x + self.residual(x))
        x = torch.cat([x, self.pointwise(self.depthwise(x))], dim=1)
        x = self.mix(self.pool(x))
        scores: Tensor = self.head(x.mean(dim=(2, 3)))
        return scores


def digits_net() -> nn.Module:
    """The network, untrained: what `--model digits_net.py:digits_net` names."""
    return DigitsNet()


def _conv(inputs: int, outputs: int, kernel: int = 3, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )
