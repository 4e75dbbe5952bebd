"""A network of ResNet-50's shape with random weights: what calibration and inference cost does not depend on training."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgekit.data import Batch

IMAGE = (3, 224, 224)
STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))
"""Width and number of blocks of each stage; a block's output has four times its width."""

CLASSES = 1000
BRANCH_GAIN = 0.35
"""Of a block's last convolution: with it the activations keep their size from block to block, as trained ones do."""


def resnet50(seed: int = 0) -> ir.Model:
    """The float ONNX graph, 53 Conv and one Gemm: BatchNorm folded, batch axis dynamic, weights by He's rule.

    Channels differ in gain and bias as folded BatchNorm makes them differ, so that activations have tails.

    Reference: He et al. 2015, "Deep Residual Learning for Image Recognition", arXiv:1512.03385, table 1; weights by
    "Delving Deep into Rectifiers", arXiv:1502.01852, equation 10.
    """
    net = _Net(seed)
    image = ir.val("image", ir.DataType.FLOAT, ["N", *IMAGE])
    x = net.op("Relu", [net.conv(image, "stem", 3, 64, 7, stride=2)], "stem.relu")
    x = net.op("MaxPool", [x], "stem.pool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    channels = 64
    for stage, (width, blocks) in enumerate(STAGES, 1):
        for index in range(blocks):
            stride = 2 if stage > 1 and index == 0 else 1
            x = net.block(x, f"layer{stage}.{index}", channels, width, stride)
            channels = 4 * width
    x = net.op("Flatten", [net.op("GlobalAveragePool", [x], "pool")], "flatten", axis=1)
    weight = net.constant("head.weight", net.rng.normal(0, math.sqrt(1 / channels), (CLASSES, channels)))
    x = net.op("Gemm", [x, weight, net.constant("head.bias", np.zeros(CLASSES))], "head", transB=1)
    x.type, x.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["N", CLASSES])
    graph = ir.Graph([image], [x], nodes=net.nodes, initializers=net.constants, name="resnet50", opset_imports={"": 21})
    return ir.Model(graph, ir_version=10)


def images(count: int, batch: int, seed: int = 0) -> Iterator[Batch]:
    """Standardized images with the statistics of natural ones: neighbours alike, each image with a brightness of its own."""
    for start in range(0, count, batch):
        rows = [_image(np.random.default_rng([seed, i])) for i in range(start, min(start + batch, count))]
        yield Batch({"image": np.stack(rows)})


def _image(rng: np.random.Generator) -> NDArray[np.float32]:
    height, width = IMAGE[1:]
    image = rng.normal(0, 0.2, IMAGE)
    for size in (7, 28):  # coarse and finer patches
        patches = rng.normal(0, 0.7, (3, size, size))
        image += np.kron(patches, np.ones((height // size, width // size)))
    return np.asarray(image * rng.uniform(0.5, 1.3) + rng.normal(0, 0.3), np.float32)


class _Net:
    """Nodes and constants as they are made; a node `conv` makes the value `conv_y`."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[ir.Node] = []
        self.constants: list[ir.Value] = []

    def op(self, op_type: str, inputs: list[ir.Value], name: str, **attributes: int | list[int]) -> ir.Value:
        node = ir.node(op_type, inputs, attributes, outputs=[ir.val(f"{name}_y")], name=name)
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, name: str, array: NDArray[np.float64]) -> ir.Value:
        value = ir.val(name, const_value=ir.tensor(array.astype(np.float32), name=name))
        self.constants.append(value)
        return value

    def conv(
        self, x: ir.Value, name: str, c_in: int, c_out: int, kernel: int, stride: int = 1, gain: float = 1.0
    ) -> ir.Value:
        weight = self.rng.normal(0, math.sqrt(2 / (c_in * kernel**2)), (c_out, c_in, kernel, kernel))
        gains = gain * self.rng.lognormal(0, 0.3, c_out)
        bias = self.constant(f"{name}.bias", gain * self.rng.normal(0, 0.3, c_out))
        folded = self.constant(f"{name}.weight", weight * gains[:, None, None, None])
        pads = [kernel // 2] * 4
        window = {"kernel_shape": [kernel, kernel], "strides": [stride, stride], "pads": pads}
        return self.op("Conv", [x, folded, bias], name, **window)

    def block(self, x: ir.Value, name: str, c_in: int, width: int, stride: int) -> ir.Value:
        y = self.op("Relu", [self.conv(x, f"{name}.conv1", c_in, width, 1)], f"{name}.relu1")
        y = self.op("Relu", [self.conv(y, f"{name}.conv2", width, width, 3, stride)], f"{name}.relu2")
        y = self.conv(y, f"{name}.conv3", width, 4 * width, 1, gain=BRANCH_GAIN)
        if c_in != 4 * width:
            x = self.conv(x, f"{name}.short", c_in, 4 * width, 1, stride, gain=1 / math.sqrt(2))
        return self.op("Relu", [self.op("Add", [y, x], f"{name}.add")], f"{name}.relu")
