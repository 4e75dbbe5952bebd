"""Small float networks, how they get their quant attributes, and how the lowering tests run, compare and read them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from graphs import Array, GraphBuilder

from edgekit.backend import Backend, CompiledModel
from edgekit.calibration import calibrate
from edgekit.data import Batch
from edgekit.graph.io import save_onnx
from edgekit.graph.run import Session
from edgekit.passes.assign_specs import assign_specs
from edgekit.passes.simplify import simplify
from edgekit.passes.unify_params import unify_params
from edgekit.target import Target, load_target

Feeds = Mapping[str, Array]


class Net(GraphBuilder):
    """Layers of a network; the node `conv` makes the value `conv_y`. Each method returns the name of a value."""

    def weight(self, name: str, *shape: int) -> str:
        """He-normal weights; the first output channel is ten times smaller than the rest."""
        array = self.rng.normal(0, math.sqrt(2 / max(1, np.prod(shape[1:]))), shape).astype(np.float32)
        array[0] *= 0.1
        return self.constant(name, array)

    def conv_relu(self, x: str, name: str, c_in: int, c_out: int, kernel: int = 3, **attributes: Any) -> str:
        return str(self.op("Relu", [self.conv(x, name, c_in, c_out, kernel, **attributes)], f"{name}.relu"))

    def clip(self, x: str, name: str, low: float, high: float) -> str:
        bounds = [self.constant(f"{name}.low", np.float32(low)), self.constant(f"{name}.high", np.float32(high))]
        return str(self.op("Clip", [x, *bounds], name))

    def gemm(self, x: str, name: str, features: int, outputs: int, **attributes: Any) -> str:
        inputs = [x, self.weight(f"{name}.weight", outputs, features), self.weight(f"{name}.bias", outputs)]
        return str(self.op("Gemm", inputs, name, **{"transB": 1, **attributes}))

    def matmul(self, x: str, name: str, features: int, outputs: int) -> str:
        array = self.rng.normal(0, math.sqrt(1 / features), (features, outputs)).astype(np.float32)
        return str(self.op("MatMul", [x, self.constant(f"{name}.weight", array)], name))

    def slice(self, x: str, name: str, **ranges: Sequence[int]) -> str:
        keys = ("starts", "ends", "axes", "steps")
        return str(self.op("Slice", [x, *(self.constant(f"{name}.{key}", np.array(ranges[key])) for key in keys)], name))

    def pad(self, x: str, name: str, pads: Sequence[int], **attributes: Any) -> str:
        return str(self.op("Pad", [x, self.constant(f"{name}.pads", np.array(pads))], name, **attributes))

    def reshape(self, x: str, name: str, *shape: int) -> str:
        return str(self.op("Reshape", [x, self.constant(f"{name}.shape", np.array(shape))], name))


def residual_net(*, batch: int | str = "n", width: int = 8) -> ir.Model:
    """A small ResNet: an identity block, one with a Slice-and-Pad shortcut, one with a convolution in it, a linear head."""
    net, wide = Net(seed=1), 2 * width
    x = net.conv_relu(net.input("x", [batch, 3, 16, 16]), "stem", 3, width)
    y = net.conv(net.conv_relu(x, "a1", width, width), "a2", width, width)
    x = net.op("Relu", [net.op("Add", [y, x], "a.add")], "a.relu")
    y = net.conv(net.conv_relu(x, "b1", width, wide, strides=[2, 2]), "b2", wide, wide)
    short = net.slice(x, "b.slice", starts=[0, 0], ends=[2**31, 2**31], axes=[2, 3], steps=[2, 2])
    short = net.pad(short, "b.pad", [0, width // 2, 0, 0, 0, width // 2, 0, 0])
    x = net.op("Relu", [net.op("Add", [y, short], "b.add")], "b.relu")
    y = net.conv(net.conv_relu(x, "c1", wide, wide, strides=[2, 2]), "c2", wide, wide)
    short = net.conv(x, "c.short", wide, wide, 1, strides=[2, 2])
    x = net.op("Relu", [net.op("Add", [y, short], "c.add")], "c.relu")
    x = net.op("Flatten", [net.op("GlobalAveragePool", [x], "pool")], "flatten", axis=1)
    return net.model(net.gemm(x, "head", wide, 10))


def mixed_net(*, batch: int | str = "n") -> ir.Model:
    """Depthwise Conv, Clip(0, 6), MaxPool, Concat, SiLU, squeeze-and-excite, AveragePool, ConvTranspose, two outputs."""
    net = Net(seed=2)
    x = net.clip(net.conv(net.input("x", [batch, 3, 16, 16]), "stem", 3, 8), "stem.clip", 0.0, 6.0)
    deep = net.clip(net.conv(x, "deep", 8, 8, group=8), "deep.clip", 0.0, 6.0)
    small = net.op("MaxPool", [deep], "max", kernel_shape=[2, 2], strides=[2, 2])
    average = net.op("AveragePool", [x], "average", kernel_shape=[2, 2], strides=[2, 2])
    x = net.conv(net.op("Concat", [small, average], "cat", axis=1), "mix", 16, 8, 1)
    x = net.op("Mul", [x, net.op("Sigmoid", [x], "silu.gate")], "silu")
    squeezed = net.conv_relu(net.op("GlobalAveragePool", [x], "squeeze.pool"), "squeeze", 8, 4, 1)
    x = net.op("Mul", [x, net.op("Sigmoid", [net.conv(squeezed, "expand", 4, 8, 1)], "excite.gate")], "excite")
    transposed = [x, net.weight("up.weight", 8, 4, 2, 2), net.weight("up.bias", 4)]
    mask = net.op("ConvTranspose", transposed, "up", strides=[2, 2], kernel_shape=[2, 2])
    return net.model(net.gemm(net.reshape(x, "flat", -1, 512), "head", 512, 6), mask)


def token_net(*, batch: int | str = "n") -> ir.Model:
    """Self-attention over 3-D tokens: three MatMuls read one tensor, biases are Adds, Softmax and LayerNorm stay float."""
    net = Net(seed=3)
    x = net.input("x", [batch, 12, 16])
    norm = [net.constant("norm.gain", np.linspace(0.5, 1.5, 16, dtype=np.float32)), net.constant("norm.shift", np.zeros(16, np.float32))]
    normed = net.op("LayerNormalization", [x, *norm], "norm")
    q, k, v = (
        net.op("Add", [net.matmul(normed, name, 16, 16), net.weight(f"{name}.bias", 16)], f"{name}.add")
        for name in ("query", "key", "value")
    )
    scores = net.op("MatMul", [q, net.op("Transpose", [k], "key.t", perm=[0, 2, 1])], "scores")
    context = net.op("MatMul", [net.op("Softmax", [scores], "softmax", axis=-1), v], "context")
    x = net.op("Add", [x, net.matmul(context, "out", 16, 16)], "residual")
    return net.model(net.matmul(x, "head", 16, 4))


def samples(model: ir.Model, count: int, seed: int = 0) -> dict[str, Array]:
    """Standard normal numbers for each input; `count` stands for every symbolic dimension."""
    rng = np.random.default_rng(seed)
    shapes = {value.name: [d if isinstance(d, int) else count for d in value.shape or ()] for value in model.graph.inputs}
    return {str(name): rng.normal(0, 1, shape).astype(np.float32) for name, shape in shapes.items()}


def annotate(model: ir.Model, *, target: Target | None = None, count: int = 16) -> ir.Model:
    """The model with quant attributes from `count` samples, for the portable target unless another is given."""
    target = target or load_target("portable")
    wished = assign_specs(simplify(model), target)
    calibrated = calibrate(wished, target, [Batch(samples(model, count))], estimator="minmax", threads=1)
    return unify_params(calibrated, target)


def simulate(model: ir.Model, feeds: Feeds) -> dict[str, Array]:
    """Every node computed as the ONNX standard says, nothing fused."""
    return Session(model, optimize=False, threads=1).run(feeds)


def compiled(model: ir.Model, backend: Backend, target: Target, folder: Path, *, precision: str = "int8") -> CompiledModel:
    """An artifact of a lowered model, built and loaded."""
    path = folder / "model.onnx"
    save_onnx(model, path)
    return backend.load(backend.convert(path, target, folder, precision=precision), target, exact=True)


def worst(ours: Feeds, theirs: Feeds) -> float:
    """The largest difference at any output, as a share of that output's largest magnitude."""
    assert ours.keys() == theirs.keys()
    return max(float(np.abs(ours[name] - theirs[name]).max() / np.abs(theirs[name]).max()) for name in theirs)


def text(model: ir.Model) -> list[str]:
    """One line a node: `y = Op(a, b)`, by the names of values."""
    return [
        f"{', '.join(str(out.name) for out in node.outputs)} = {node.op_type}({', '.join(str(v.name) if v else '' for v in node.inputs)})"
        for node in model.graph
    ]
