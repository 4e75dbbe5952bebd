"""A network of ResNet-50's shape in torch, with random weights: what it costs does not depend on training."""

from __future__ import annotations

import math

import numpy as np
import resnet50
import torch
from torch import Tensor, nn

EXPANSION = 4


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 around a shortcut; the stride is in the middle."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = EXPANSION * width
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.short = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
            if inputs != outputs
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, 4 * width, H / stride, W / stride)."""
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        return torch.relu(self.bn3(self.conv3(y)) + self.short(x))


class ResNet50(nn.Module):
    """Four stages of 3, 4, 6 and 3 blocks, for images (N, 3, 224, 224)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        self.pool = nn.MaxPool2d(3, 2, 1)
        blocks, channels = [], 64
        for stage, (width, count) in enumerate(resnet50.STAGES):
            for index in range(count):
                blocks.append(Bottleneck(channels, width, 2 if stage and not index else 1))
                channels = EXPANSION * width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, resnet50.CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        """(N, 3, 224, 224) -> class scores (N, 1000)."""
        x = self.pool(torch.relu(self.bn1(self.conv1(image))))
        scores: Tensor = self.head(self.blocks(x).mean((2, 3)))
        return scores


def torch_resnet50(seed: int = 0) -> nn.Module:
    """The network in eval mode; filters differ in size, as trained ones do, so that some are worth less than others.

    Reference: He, Zhang, Ren, Sun (2015), "Deep Residual Learning for Image Recognition", arXiv:1512.03385, table 1; weights by
    "Delving Deep into Rectifiers", arXiv:1502.01852, equation 10.
    """
    rng = np.random.default_rng(seed)
    network = ResNet50().eval()
    with torch.no_grad():
        for name, layer in network.named_modules():
            if isinstance(layer, nn.Conv2d):
                fan_in = layer.weight[0].numel()
                gains = rng.lognormal(0, 0.3, layer.out_channels) * _gain(name)
                weight = rng.normal(0, math.sqrt(2 / fan_in), layer.weight.shape) * gains[:, None, None, None]
                layer.weight.copy_(torch.from_numpy(weight))
            elif isinstance(layer, nn.BatchNorm2d):
                layer.bias.copy_(torch.from_numpy(rng.normal(0, 0.1, layer.num_features)))
    return network


def _gain(name: str) -> float:
    if name.endswith("conv3"):
        return resnet50.BRANCH_GAIN
    return 1 / math.sqrt(2) if ".short." in name else 1.0
