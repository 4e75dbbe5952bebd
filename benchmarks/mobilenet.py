"""A small network of MobileNet's kind with random weights: a thin stem and thin depthwise layers, which int8 may slow down."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

IMAGE = (3, 96, 96)
STEM = 8
BLOCKS = ((16, 1), (32, 2), (32, 1), (64, 2), (64, 1), (128, 2), (128, 1), (128, 1), (256, 2), (256, 1))
"""Output channels and stride of each depthwise-separable block: a width of a quarter of MobileNet's."""
CLASSES = 100
MOST = 6.0
"""Where the activations are cut off."""


def mobilenet(seed: int = 0) -> ir.Model:
    """The float ONNX graph, BatchNorm folded, batch axis dynamic; weights by He's rule.

    Reference: Howard et al. (2017), "MobileNets", arXiv:1704.04861, table 1; weights by He et al. (2015), "Delving Deep
    into Rectifiers", arXiv:1502.01852, equation 10.
    """
    net = _Net(seed)
    image = ir.val("image", ir.DataType.FLOAT, ["N", *IMAGE])
    x, channels = net.conv(image, "stem", 3, STEM, kernel=3, stride=2), STEM
    for index, (width, stride) in enumerate(BLOCKS):
        x = net.conv(x, f"block{index}.depthwise", channels, channels, kernel=3, stride=stride, group=channels)
        x, channels = net.conv(x, f"block{index}.pointwise", channels, width, kernel=1), width
    x = net.op("Flatten", [net.op("GlobalAveragePool", [x], "pool")], "flatten", axis=1)
    weight = net.constant("head.weight", net.rng.normal(0, math.sqrt(1 / channels), (CLASSES, channels)))
    x = net.op("Gemm", [x, weight, net.constant("head.bias", np.zeros(CLASSES))], "head", transB=1)
    x.type, x.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["N", CLASSES])
    graph = ir.Graph(
        [image], [x], nodes=net.nodes, initializers=net.constants, name="mobilenet", opset_imports={"": 21}
    )
    return ir.Model(graph, ir_version=10)


def images(count: int, seed: int = 0) -> NDArray[np.float32]:
    """Patches of several sizes with a brightness of their own, `(count, *IMAGE)`."""
    rng = np.random.default_rng(seed)
    found = rng.normal(0, 0.2, (count, *IMAGE)) + rng.normal(0, 0.3, (count, 1, 1, 1))
    for size in (6, 24):
        patches = rng.normal(0, 0.7, (count, 3, size, size))
        found += patches.repeat(IMAGE[1] // size, axis=2).repeat(IMAGE[2] // size, axis=3)
    return found.astype(np.float32)


class _Net:
    """Nodes and constants as they are made; a node `conv` makes the value `conv_y`."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[ir.Node] = []
        self.constants: list[ir.Value] = []
        self._low, self._high = self.constant("low", np.zeros(())), self.constant("high", np.full((), MOST))

    def op(self, op_type: str, inputs: list[ir.Value], name: str, **attributes: int | list[int]) -> ir.Value:
        node = ir.node(op_type, inputs, attributes, outputs=[ir.val(f"{name}_y")], name=name)
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, name: str, array: NDArray[np.float64]) -> ir.Value:
        value = ir.val(name, const_value=ir.tensor(array.astype(np.float32), name=name))
        self.constants.append(value)
        return value

    def conv(
        self, x: ir.Value, name: str, c_in: int, c_out: int, *, kernel: int, stride: int = 1, group: int = 1
    ) -> ir.Value:
        """A convolution whose channels differ in gain and bias, as a folded BatchNorm makes them differ, and its Clip."""
        shape = (c_out, c_in // group, kernel, kernel)
        weight = self.rng.normal(0, math.sqrt(2 / math.prod(shape[1:])), shape)
        gains = self.rng.lognormal(0, 0.3, c_out)[:, None, None, None]
        constants = [
            self.constant(f"{name}.weight", weight * gains),
            self.constant(f"{name}.bias", self.rng.normal(0, 0.3, c_out)),
        ]
        window = {"kernel_shape": [kernel, kernel], "strides": [stride, stride], "pads": [kernel // 2] * 4}
        y = self.op("Conv", [x, *constants], name, group=group, **window)
        return self.op("Clip", [y, self._low, self._high], f"{name}.clip")
