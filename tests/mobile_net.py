"""A network of MobileNet's shape with a thin stem: on CPUs its first layers are faster in float than in int8."""

from __future__ import annotations

import onnx_ir as ir

from networks import Net

BLOCKS = ((16, 1), (24, 2), (32, 2), (64, 2), (64, 1), (128, 2), (128, 1))
"""Output channels and stride of each depthwise-separable block."""


def mobile_net(*, side: int = 96, width: float = 1.0, blocks: int = len(BLOCKS)) -> ir.Model:
    """Images `(1, 3, side, side)` to scores `(1, 10)`; the stem has 8 channels at a width of 1."""
    net = Net(seed=7)
    channels = int(8 * width)
    x = net.conv_relu(net.input("x", ["n", 3, side, side]), "stem", 3, channels, strides=[2, 2])
    for index, (wide, stride) in enumerate(BLOCKS[:blocks]):
        wide = int(wide * width)
        x = net.conv_relu(x, f"{index}.dw", channels, channels, group=channels, strides=[stride, stride])
        x = net.conv_relu(x, f"{index}.pw", channels, wide, 1)
        channels = wide
    x = net.op("Flatten", [net.op("GlobalAveragePool", [x], "pool")], "flatten", axis=1)
    return net.model(net.gemm(x, "head", channels, 10))
