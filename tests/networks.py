"""Small float networks, how they get their quant attributes, and how the lowering tests run, compare and read them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgekit.backend import Backend, CompiledModel
from edgekit.calibration.calibrate import calibrate
from edgekit.data import Batch
from edgekit.graph.annotations import annotated_values, get_params, set_params
from edgekit.graph.io import save_onnx
from edgekit.graph.run import Session
from edgekit.lowering.cpu import cpu_saturates, with_reduced_range
from edgekit.lowering.qdq import lower_qdq
from edgekit.method import Method
from edgekit.passes.assign_specs import assign_specs
from edgekit.passes.simplify import simplify
from edgekit.passes.unify_params import unify_params
from edgekit.quant.spec import QuantParams
from edgekit.target import Target, load_target
from graphs import Array, GraphBuilder

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
        return str(
            self.op("Slice", [x, *(self.constant(f"{name}.{key}", np.array(ranges[key])) for key in keys)], name)
        )

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
    norm = [
        net.constant("norm.gain", np.linspace(0.5, 1.5, 16, dtype=np.float32)),
        net.constant("norm.shift", np.zeros(16, np.float32)),
    ]
    normed = net.op("LayerNormalization", [x, *norm], "norm")
    q, k, v = (
        net.op("Add", [net.matmul(normed, name, 16, 16), net.weight(f"{name}.bias", 16)], f"{name}.add")
        for name in ("query", "key", "value")
    )
    scores = net.op("MatMul", [q, net.op("Transpose", [k], "key.t", perm=[0, 2, 1])], "scores")
    context = net.op("MatMul", [net.op("Softmax", [scores], "softmax", axis=-1), v], "context")
    x = net.op("Add", [x, net.matmul(context, "out", 16, 16)], "residual")
    return net.model(net.matmul(x, "head", 16, 4))


def random_net(seed: int) -> ir.Model:
    """A random graph of up to 12 operators with one to three outputs; every value is a 4-D image batch until the head."""
    net = Net(seed=seed)
    rng = np.random.default_rng(seed)
    images = [(net.input("x", ["n", 4, 8, 8]), 4, 8)]  # (value, channels, height and width)
    if rng.random() < 0.3:
        images.append((net.input("z", ["n", 4, 8, 8]), 4, 8))
    for index in range(int(rng.integers(3, 13))):
        images += _random_layer(net, rng, images, f"n{index}")
    picked = [
        images[-1],
        *(images[i] for i in rng.integers(1 if len(images) > 1 else 0, len(images), int(rng.integers(0, 3)))),
    ]
    outputs = dict.fromkeys(value for value, _, _ in picked if value not in ("x", "z"))
    value, channels, side = images[-1]
    if rng.random() < 0.6 or not outputs:
        features = channels * side * side
        outputs[net.gemm(net.reshape(value, "flat", -1, features), "head", features, 5)] = None
    return net.model(*outputs)


def _random_layer(
    net: Net, rng: np.random.Generator, images: list[tuple[str, int, int]], name: str
) -> list[tuple[str, int, int]]:
    x, c, side = images[int(rng.integers(max(0, len(images) - 3), len(images)))]
    alike = [value for value, channels, height in images if (channels, height) == (c, side)]
    other = str(rng.choice(alike))
    stride = 2 if side >= 4 and rng.random() < 0.3 else 1
    window = {"kernel_shape": [stride, stride], "strides": [stride, stride]}
    match int(rng.integers(0, 16)):
        case 0 | 1 | 2 | 3 | 4:
            wide, group = int(rng.choice([4, 8])), c if rng.random() < 0.2 else 1
            wide = c if group > 1 else wide
            y = net.conv(
                x, name, c, wide, int(rng.choice([1, 3])), bias=rng.random() < 0.8, group=group, strides=[stride] * 2
            )
            kind = int(rng.integers(0, 4))
            if kind == 1:
                y = str(net.op("Relu", [y], f"{name}.relu"))
            elif kind == 2:
                y = net.clip(y, f"{name}.clip", 0.0, 4.0)
            return [(y, wide, side // stride)]
        case 5 | 6:
            return [(net.op("Add", [x, other], name), c, side)]
        case 7:
            return [(net.op("Mul", [x, net.op("Sigmoid", [other], f"{name}.gate")], name), c, side)]
        case 8 if c <= 8:
            return [(net.op("Concat", [x, other], name, axis=1), 2 * c, side)]
        case 9:
            return [(net.op(str(rng.choice(["MaxPool", "AveragePool"])), [x], name, **window), c, side // stride)]
        case 10:
            halves = net.op("Split", [x], name, outputs=2, axis=1, num_outputs=2)
            return [(half, c // 2, side) for half in halves] if c >= 4 else []
        case 11:
            return [(net.pad(x, name, [0, 1, 0, 0, 0, 1, 0, 0]), c + 2, side)]
        case 12:
            return [(net.op("Relu", [x], name), c, side)]
        case 13:
            return [(net.op(str(rng.choice(["Tanh", "LeakyRelu"])), [x], name), c, side)]
        case 14:
            turned = net.op("Transpose", [x], f"{name}.turn", perm=[0, 1, 3, 2])
            return [(net.slice(turned, name, starts=[0], ends=[2], axes=[1], steps=[1]), min(c, 2), side)]
        case _:
            return [(net.op("GlobalAveragePool", [x], name), c, 1)]


def block() -> ir.Model:
    """Conv, Relu, a Conv with a skip connection, MaxPool, Flatten, Gemm."""
    net = Net()
    x = net.conv_relu(net.input("x", ["n", 3, 8, 8]), "a", 3, 4)
    y = net.op("Relu", [net.op("Add", [net.conv(x, "b", 4, 4), x], "add")], "relu")
    y = net.op("MaxPool", [y], "max", kernel_shape=[2, 2], strides=[2, 2])
    return net.model(net.gemm(net.op("Flatten", [y], "flat"), "head", 64, 3))


def samples(model: ir.Model, count: int, seed: int = 0) -> dict[str, Array]:
    """Standard normal numbers for each input; `count` stands for every symbolic dimension."""
    rng = np.random.default_rng(seed)
    shapes = {
        value.name: [d if isinstance(d, int) else count for d in value.shape or ()] for value in model.graph.inputs
    }
    return {str(name): rng.normal(0, 1, shape).astype(np.float32) for name, shape in shapes.items()}


def annotate(model: ir.Model, *, target: Target | None = None, count: int = 16) -> ir.Model:
    """The model with quant attributes from `count` samples, for the portable target unless another is given."""
    target = target or load_target("portable")
    wished = assign_specs(simplify(model), target)
    calibrated = calibrate(
        wished, target, [Batch(samples(model, count))], method=Method(calibrator="minmax"), threads=1
    )
    return unify_params(calibrated, target)


def simulate(model: ir.Model, feeds: Feeds) -> dict[str, Array]:
    """Every node computed as the ONNX standard says, nothing fused."""
    return Session(model, optimize=False, threads=1).run(feeds)


def compiled(
    model: ir.Model, backend: Backend, target: Target, folder: Path, *, precision: str = "int8"
) -> CompiledModel:
    """An artifact of a lowered model, built and loaded."""
    path = folder / "model.onnx"
    save_onnx(model, path)
    return backend.load(backend.convert(path, target, folder, precision=precision), target, exact=True)


def worst(ours: Feeds, theirs: Feeds) -> float:
    """The largest difference at any output, as a share of that output's largest magnitude."""
    assert ours.keys() == theirs.keys()
    return max(
        float(np.abs(ours[name] - theirs[name]).max() / max(np.abs(theirs[name]).max(), 1e-6)) for name in theirs
    )


def text(model: ir.Model) -> list[str]:
    """One line a node, `y = Op(a, b)`. What is read behind a DequantizeLinear is written `q(a)`, codes themselves `codes(a)`."""
    shown = [node for node in model.graph if node.op_type not in ("QuantizeLinear", "DequantizeLinear")]
    lines = [
        f"{', '.join(map(_written, node.outputs))} = {node.op_type}({', '.join(map(_written, node.inputs))})"
        for node in shown
    ]
    return [*lines, f"return {', '.join(map(_written, model.graph.outputs))}"]


def _written(value: ir.Value | None) -> str:
    if value is None:
        return ""
    producer = value.producer()
    if producer is not None and producer.op_type == "DequantizeLinear":
        return f"q({_origin(producer.inputs[0])})"
    codes = not value.is_initializer() and value.dtype in (ir.DataType.UINT8, ir.DataType.INT8)
    return f"codes({_origin(value)})" if codes else str(value.name)


def _origin(codes: ir.Value | None) -> str:
    """The name of the tensor that codes stand for."""
    assert codes is not None and codes.name is not None
    producer = codes.producer()
    if producer is not None and producer.op_type == "QuantizeLinear":
        return str(producer.inputs[0].name if producer.inputs[0] is not None else "")
    return codes.name.removesuffix("_quantized")


def lowered(model: ir.Model, target: str, *keep_float: str) -> list[str]:
    return text(lower_qdq(annotate(model), load_target(target), keep_float=frozenset(keep_float)))


needs_vnni = pytest.mark.skipif(
    cpu_saturates(), reason="this CPU has no VNNI: products of uint8 and int8 saturate, and these weights have 8 bits"
)


def local_target(name: str) -> Target:
    """A shipped target as this CPU computes it: without VNNI, with weights of 7 bits."""
    return with_reduced_range(load_target(name)) if cpu_saturates() else load_target(name)


def changed(target: str, **rules: object) -> Target:
    """A shipped target with some rules changed."""
    base = load_target(target)
    return base.model_copy(update={"quantization": base.quantization.model_copy(update=rules)})


def grids(model: ir.Model) -> list[tuple[ir.Node, np.ndarray, np.ndarray]]:
    """Each Quantize/DequantizeLinear with its scale and zero point."""
    found = []
    for node in model.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale, zero_point = node.inputs[1], node.inputs[2]
            assert scale is not None and scale.const_value is not None
            assert zero_point is not None and zero_point.const_value is not None
            found.append((node, scale.const_value.numpy(), zero_point.const_value.numpy()))
    return found


def trained(model: ir.Model, name: str, dtype: str, zero_point: int, scale: float = 0.05) -> ir.Model:
    """The annotated model with one activation on a grid that training chose."""
    model = model.clone()
    value = next(value for value in annotated_values(model.graph) if value.name == name)
    set_params(value, QuantParams(dtype, np.array(scale, np.float32), np.array(zero_point), fixed=True))
    return model


def get_params_of(model: ir.Model, name: str) -> QuantParams:
    params = get_params(next(value for value in annotated_values(model.graph) if value.name == name))
    assert params is not None
    return params
