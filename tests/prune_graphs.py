"""Small graphs whose groups of channels are known, random ones, and how a cut is held against a mask."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from edgekit.channels import Choice, kept_shares, total_macs
from edgekit.graph.channel_groups import Channels
from edgekit.graph.equal import random_feeds
from edgekit.graph.operators import dims, layers
from edgekit.passes.prune_channels import masked, prune_channels
from graphs import Array, run
from networks import Net

ROUNDING = 2e-5
"""Of float32, as a share of an output's largest magnitude: sums of fewer terms, in another order."""
SIZE = 6
"""Height and width of the pictures that random graphs read."""


def agree(expected: Mapping[str, Array], found: Mapping[str, Array]) -> None:
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert array.shape == found[name].shape
        largest = float(np.abs(array.astype(np.float64)).max(initial=0))
        assert np.isfinite(largest)
        np.testing.assert_allclose(found[name], array, rtol=0, atol=ROUNDING * largest, err_msg=name)


def cut(model: ir.Model, channels: Channels, choice: Choice, *, batches: tuple[int, ...] = (1, 3)) -> ir.Model:
    """The pruned graph, after it was seen to compute what the masked one does, at the cost foretold, and to have valid shapes."""
    before = {name: value.const_value for name, value in model.graph.initializers.items()}
    whole, pruned = masked(model, channels, choice), prune_channels(model, channels, choice)
    assert {name: value.const_value for name, value in model.graph.initializers.items()} == before
    onnx.checker.check_model(ir.to_proto(pruned), full_check=True)
    for batch in batches:
        feeds = random_feeds(model.graph.inputs, batch=batch, seed=batch)
        agree(run(whole, feeds), run(pruned, feeds))
    sizes = {value.name: dims(value) for node in inferred(pruned).graph for value in node.outputs}
    for node in pruned.graph:
        for value in node.outputs:
            assert dims(value) == sizes[value.name], value.name
    foretold = total_macs(channels.costs, kept_shares(channels.groups, choice))
    assert math.isclose(foretold, sum(layer.macs for layer in layers(pruned)), rel_tol=1e-9)
    return pruned


def random_choice(channels: Channels, seed: int, share: float = 0.5) -> dict[str, NDArray[np.intp]]:
    """Some units of each group, at least one."""
    rng = np.random.default_rng(seed)
    return {
        group.name: np.sort(rng.choice(group.units, max(1, round(group.units * share)), replace=False))
        for group in channels.groups
    }


def shapes(model: ir.Model) -> dict[str, tuple[int | None, ...] | None]:
    """Of all constants."""
    return {name: dims(value) for name, value in model.graph.initializers.items()}


def array_of(model: ir.Model, name: str) -> Array:
    value = model.graph.initializers[name].const_value
    assert value is not None
    return value.numpy()


def inferred(model: ir.Model) -> ir.Model:
    """The model with shapes as ONNX infers them, whatever it had."""
    proto = ir.to_proto(model)
    del proto.graph.value_info[:]
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))


def made(net: Net, *outputs: str) -> ir.Model:
    return inferred(net.model(*outputs))


def picture(net: Net, channels: int = 3) -> str:
    return net.input("x", ["n", channels, 6, 6])


def head(net: Net, x: str, channels: int) -> str:
    """A classifier of the mean over the picture."""
    return net.gemm(
        net.op("Flatten", [net.op("GlobalAveragePool", [x], "pool")], "flatten", axis=1), "head", channels, 5
    )


@dataclass
class Random:
    """A random network over pictures `(N, C, H, W)`; each step takes a tensor and its shape `(C, H, W)` and makes others."""

    net: Net
    rng: np.random.Generator
    tensors: list[tuple[str, tuple[int, int, int]]] = field(default_factory=list)
    convs: dict[tuple[int, int], str] = field(default_factory=dict)
    count: int = 0

    def name(self, kind: str) -> str:
        self.count += 1
        return f"{kind}_{self.count}"

    def pick(self, *choices: int) -> int:
        return int(self.rng.choice(choices))

    def constant(self, kind: str, *shape: int) -> str:
        return self.net.constant(self.name(kind), self.rng.uniform(0.2, 1.0, shape).astype(np.float32))

    def step(self) -> None:
        recent = self.tensors[-4:]
        x, shape = recent[int(self.rng.integers(len(recent)))]
        step = STEPS[int(self.rng.integers(len(STEPS)))]
        made = step(self, x, *shape)
        if made is not None:
            self.tensors.append(made)


Made = tuple[str, tuple[int, int, int]]


def conv(r: Random, x: str, c: int, h: int, w: int) -> Made:
    wide, kernel = r.pick(4, 6, 8), r.pick(1, 3)
    return r.net.conv(x, r.name("conv"), c, wide, kernel), (wide, h, w)


def grouped(r: Random, x: str, c: int, h: int, w: int) -> Made | None:
    if c % 2:
        return None
    wide = r.pick(4, 8)
    return r.net.conv(x, r.name("grouped"), c, wide, 3, group=2), (wide, h, w)


def depthwise(r: Random, x: str, c: int, h: int, w: int) -> Made:
    multiplier = r.pick(1, 1, 2)
    return r.net.conv(x, r.name("depthwise"), c, c * multiplier, 3, group=c), (c * multiplier, h, w)


def transposed(r: Random, x: str, c: int, h: int, w: int) -> Made:
    name, groups = r.name("transposed"), r.pick(1, 1, c, 2 if c % 2 == 0 else 1)
    wide = r.pick(1, 2) if groups > 1 else r.pick(4, 6)
    inputs = [x, r.net.weight(f"{name}.weight", c, wide, 3, 3), r.net.weight(f"{name}.bias", wide * groups)]
    y = r.net.op("ConvTranspose", inputs, name, kernel_shape=[3, 3], pads=[1] * 4, group=groups)
    return y, (wide * groups, h, w)


def shared(r: Random, x: str, c: int, h: int, w: int) -> Made:
    """A convolution with a weight that others of its shape have too."""
    weight = r.convs.setdefault((c, 6), "") or r.net.weight(r.name("shared.weight"), 6, c, 1, 1)
    r.convs[c, 6] = weight
    return r.net.op("Conv", [x, weight], r.name("shared"), kernel_shape=[1, 1]), (6, h, w)


def activation(r: Random, x: str, c: int, h: int, w: int) -> Made:
    kind = str(r.rng.choice(["Relu", "Sigmoid", "Tanh", "HardSwish", "Erf", "LeakyRelu"]))
    return r.net.op(kind, [x], r.name(kind.lower())), (c, h, w)


def prelu(r: Random, x: str, c: int, h: int, w: int) -> Made:
    return r.net.op("PRelu", [x, r.constant("slope", c, 1, 1)], r.name("prelu")), (c, h, w)


def scaled(r: Random, x: str, c: int, h: int, w: int) -> Made:
    kind = str(r.rng.choice(["Mul", "Add", "Sub", "Div"]))
    constant = r.constant("factor", *((c, 1, 1), (1, c, 1, 1), (1,), (c, h, 1))[r.pick(0, 1, 2, 3)])
    return r.net.op(kind, [x, constant], r.name("scaled")), (c, h, w)


def normalized(r: Random, x: str, c: int, h: int, w: int) -> Made:
    return r.net.batchnorm(x, r.name("norm"), c), (c, h, w)


def joined(r: Random, x: str, c: int, h: int, w: int) -> Made | None:
    """Any other tensor of the same shape, added or multiplied."""
    others = [name for name, shape in r.tensors if shape == (c, h, w) and name != x]
    if not others:
        return None
    kind = str(r.rng.choice(["Add", "Mul", "Max"]))
    return r.net.op(kind, [x, others[-r.pick(1, len(others))]], r.name(kind.lower())), (c, h, w)


def concat(r: Random, x: str, c: int, h: int, w: int) -> Made | None:
    others = [(name, shape) for name, shape in r.tensors if shape[1:] == (h, w)]
    other, shape = others[int(r.rng.integers(len(others)))]
    if c + shape[0] > 20:
        return None
    return r.net.op("Concat", [other, x], r.name("concat"), axis=1), (c + shape[0], h, w)


def split(r: Random, x: str, c: int, h: int, w: int) -> Made | None:
    if c < 3:
        return None
    first = r.pick(1, 2, c // 2)
    name = r.name("split")
    sizes = r.net.constant(f"{name}.sizes", np.array([first, c - first]))
    one, other = r.net.op("Split", [x, sizes], name, outputs=2, axis=1)
    r.tensors.append((one, (first, h, w)))
    return other, (c - first, h, w)


def gated(r: Random, x: str, c: int, h: int, w: int) -> Made | None:
    """Both halves of the channels, one of them as a gate."""
    if c % 2:
        return None
    one, other = r.net.op("Split", [x], r.name("halves"), outputs=2, axis=1, num_outputs=2)
    return r.net.op("Mul", [one, r.net.op("Sigmoid", [other])], r.name("gated")), (c // 2, h, w)


def part(r: Random, x: str, c: int, h: int, w: int) -> Made | None:
    if c < 4:
        return None
    start, end = r.pick(0, 1), r.pick(c, c - 1, -1)
    y = r.net.slice(x, r.name("part"), starts=[start, 0], ends=[end, 9999], axes=[1, 2], steps=[1, 1])
    return y, (len(range(c)[start:end]), h, w)


def strided(r: Random, x: str, c: int, h: int, w: int) -> Made | None:
    """What a shortcut without weights does: each second picture element, and channels of zeros around."""
    if h < 4 or c > 10:
        return None
    y = r.net.slice(x, r.name("strided"), starts=[0, 0], ends=[9999, 9999], axes=[2, 3], steps=[2, 2])
    behind = r.pick(0, 2)
    y = r.net.pad(y, r.name("pad"), [0, 1, 0, 0, 0, behind, 0, 0])
    return y, (c + 1 + behind, (h + 1) // 2, (w + 1) // 2)


def pooled(r: Random, x: str, c: int, h: int, w: int) -> Made:
    kind = str(r.rng.choice(["MaxPool", "AveragePool"]))
    return r.net.op(kind, [x], r.name("pool"), kernel_shape=[3, 3], pads=[1] * 4), (c, h, w)


def enlarged(r: Random, x: str, c: int, h: int, w: int) -> Made | None:
    if h > 3:
        return None
    name = r.name("resize")
    if r.pick(0, 1):
        scales = r.net.constant(f"{name}.scales", np.array([1, 1, 2, 2], np.float32))
        return r.net.op("Resize", [x, "", scales], name), (c, 2 * h, 2 * w)
    sizes = r.net.constant(f"{name}.sizes", np.array([c, 2 * h, 2 * w]))
    return r.net.op("Resize", [x, "", "", sizes], name, axes=[1, 2, 3]), (c, 2 * h, 2 * w)


def squeeze_excite(r: Random, x: str, c: int, h: int, w: int) -> Made:
    name = r.name("se")
    y = r.net.op("ReduceMean", [x, r.net.constant(f"{name}.axes", np.array([2, 3]))], f"{name}.mean")
    y = r.net.op("Relu", [r.net.conv(y, f"{name}.down", c, 3, 1)])
    gate = r.net.op("Sigmoid", [r.net.conv(y, f"{name}.up", 3, c, 1)])
    return r.net.op("Mul", [gate, x], f"{name}.mul"), (c, h, w)


def shuffled(r: Random, x: str, c: int, h: int, w: int) -> Made | None:
    if c % 2:
        return None
    name = r.name("shuffle")
    y = r.net.reshape(x, f"{name}.five", -1, 2, c // 2, h, w)
    y = r.net.op("Transpose", [y], f"{name}.t", perm=[0, 2, 1, 3, 4])
    return r.net.reshape(y, f"{name}.four", -1, c, h, w), (c, h, w)


def attended(r: Random, x: str, c: int, h: int, w: int) -> Made:
    """Self-attention of picture elements, two or three heads of three numbers."""
    name, heads, net = r.name("attention"), r.pick(2, 3), r.net
    tokens = net.op("Transpose", [net.reshape(x, f"{name}.flat", 0, c, h * w)], f"{name}.tokens", perm=[0, 2, 1])
    rows = {}
    for one, perm in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
        y = net.matmul(tokens, f"{name}.{one}", c, 3 * heads)
        y = net.op("Add", [y, r.constant(f"{one}.bias", 3 * heads)])
        rows[one] = net.op("Transpose", [net.reshape(y, f"{name}.{one}.heads", 0, h * w, heads, 3)], perm=perm)
    weights = net.op("Softmax", [net.op("MatMul", [rows["q"], rows["k"]], f"{name}.scores")], axis=-1)
    y = net.op("Transpose", [net.op("MatMul", [weights, rows["v"]], f"{name}.context")], perm=[0, 2, 1, 3])
    y = net.matmul(net.reshape(y, f"{name}.merge", 0, 0, -1), f"{name}.out", 3 * heads, 4)
    y = net.op("Transpose", [y], f"{name}.back", perm=[0, 2, 1])
    return net.reshape(y, f"{name}.picture", 0, 0, h, w), (4, h, w)


STEPS: tuple[Callable[[Random, str, int, int, int], Made | None], ...] = (
    *(conv, conv, conv, grouped, depthwise, depthwise, transposed, shared, activation, activation, prelu, scaled),
    *(normalized, joined, joined, joined, concat, split, gated, part, strided, pooled, enlarged, squeeze_excite),
    *(shuffled, attended),
)


def random_network(seed: int, steps: int = 14) -> ir.Model:
    """A network whose outputs are made by layers of all tensors that nothing else reads."""
    rng = np.random.default_rng(seed)
    net = Net(seed=seed)
    r = Random(net, rng)
    x = net.input("x", ["n", 3, SIZE, SIZE])
    r.tensors.append((net.conv(x, "stem", 3, r.pick(4, 6, 8), 3), (0, SIZE, SIZE)))
    width = net.initializers[0].dims[0]
    r.tensors[0] = (r.tensors[0][0], (int(width), SIZE, SIZE))
    for _ in range(steps):
        r.step()
    read = {name for node in net.nodes for name in node.input}
    outputs = []
    for name, (c, h, w) in r.tensors:
        if name not in read:
            head = r.name("head")
            if r.pick(0, 1):
                y = net.op("Flatten", [name], f"{head}.flatten", axis=1)
                outputs.append(net.gemm(y, head, c * h * w, 3))
            else:
                y = net.op("GlobalAveragePool", [name], f"{head}.pool")
                y = net.reshape(y, f"{head}.flat", 0, -1)
                outputs.append(net.matmul(y, head, c, 3))
    return made(net, *outputs)
