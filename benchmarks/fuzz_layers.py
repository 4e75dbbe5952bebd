"""Layers with weights, and what stands around them in networks."""

from __future__ import annotations

from typing import Any

import numpy as np
from fuzz_graphs import Draft, Rejected, Tensor
from fuzz_movement import reduce_axes


def conv(draft: Draft, x: Tensor) -> Tensor:
    """1-D to 3-D; grouped, depthwise, strided, dilated, padded unevenly or by itself."""
    channels, space = x.shape[1], x.rank - 2
    group = draft.pick([g for g in (1, 2, channels) if channels % g == 0]) if draft.chance(0.35) else 1
    wide = group * draft.pick([1, 2]) if group > 1 else draft.pick([1, 4, 6, 8])
    if group == channels and draft.chance(0.5):
        wide = channels
    kernel = [draft.pick([1, 2, 3, 3]) for _ in range(space)] if draft.chance(0.3) else [draft.pick([1, 3])] * space
    attributes: dict[str, Any] = {"group": group} if group > 1 or draft.chance(0.5) else {}
    if draft.chance(0.3):
        attributes["strides"] = [draft.pick([1, 2]) for _ in range(space)]
    if draft.chance(0.15):
        attributes["dilations"] = [2] * space
    _padding(draft, attributes, kernel)
    if draft.chance(0.7):
        attributes["kernel_shape"] = kernel
    inputs: list[Tensor | str] = [x, draft.weight(wide, channels // group, *kernel, fan_in=channels // group * 3)]
    if draft.chance(0.7):
        inputs.append(draft.row(wide))
    return draft.one("Conv", *inputs, **attributes)


def _padding(draft: Draft, attributes: dict[str, Any], kernel: list[int]) -> None:
    kind = draft.number(0, 9)
    if kind == 0 and "dilations" not in attributes:
        attributes["auto_pad"] = draft.pick(["SAME_UPPER", "SAME_LOWER", "VALID"])
    elif kind == 1:
        attributes["pads"] = [draft.number(0, 2) for _ in range(2 * len(kernel))]
    elif kind > 2:
        attributes["pads"] = [k // 2 for k in kernel] * 2


def conv_activated(draft: Draft, x: Tensor) -> Tensor:
    """A convolution, perhaps a normalization, an activation function: what a target fuses."""
    y = conv(draft, x)
    if draft.chance(0.5):
        y = batchnorm(draft, y)
    if draft.chance(0.3):
        y = draft.one("Add", y, draft.row(y.shape[1], *[1] * (y.rank - 2)))
    return draft.one(draft.pick(["Relu", "Relu", "LeakyRelu", "Sigmoid", "Tanh"]), y)


def conv_transpose(draft: Draft, x: Tensor) -> Tensor:
    channels, space = x.shape[1], x.rank - 2
    group = draft.pick([1, 1, 1, 2]) if channels % 2 == 0 else 1
    wide, stride, kernel = draft.pick([1, 2, 4]), draft.pick([1, 2]), draft.pick([1, 2, 3])
    attributes: dict[str, Any] = {"strides": [stride] * space, "kernel_shape": [kernel] * space}
    if group > 1:
        attributes["group"] = group
    match draft.number(0, 5):
        case 0:
            attributes["auto_pad"] = draft.pick(["SAME_UPPER", "SAME_LOWER"])
        case 1 if stride == 2:
            attributes["output_padding"] = [1] * space
        case 2 if kernel == 3:
            attributes["pads"] = [1] * 2 * space
        case 3 if draft.chance(0.3):
            attributes["dilations"] = [2] * space
    inputs: list[Tensor | str] = [x, draft.weight(channels, wide, *[kernel] * space, fan_in=channels, channel=1)]
    if draft.chance(0.6):
        inputs.append(draft.row(wide * group))
    return draft.one("ConvTranspose", *inputs, **attributes)


def residual(draft: Draft, x: Tensor) -> Tensor:
    """A block whose skip connection reads what the block reads."""
    channels = x.shape[1]
    y = draft.one("Conv", x, draft.weight(channels, channels, 3, 3, fan_in=9 * channels), pads=[1] * 4)
    if draft.chance(0.5):
        y = batchnorm(draft, y)
    y = draft.one("Add", *((y, x) if draft.chance(0.6) else (x, y)))
    return draft.one("Relu", y) if draft.chance(0.6) else y


def squeeze_excite(draft: Draft, x: Tensor) -> Tensor:
    channels = x.shape[1]
    y = draft.one("GlobalAveragePool", x) if draft.chance(0.7) else reduce_axes(draft, "ReduceMean", x, (2, 3), True)
    y = draft.one("Relu", draft.one("Conv", y, draft.weight(2, channels, 1, 1, fan_in=channels), draft.row(2)))
    y = draft.one("Conv", y, draft.weight(channels, 2, 1, 1, fan_in=2), draft.row(channels))
    gate = draft.one("HardSigmoid", y, alpha=1 / 6, beta=0.5) if draft.chance(0.5) else draft.one("Sigmoid", y)
    return draft.one("Mul", x, gate)


def gemm(draft: Draft, x: Tensor) -> Tensor:
    """Transposed or not, scaled or not, with a bias of any shape that it takes or none."""
    rows, features = x.shape
    wide, attributes = draft.pick([1, 4, 6, 10]), dict[str, Any]()
    trans_a = draft.chance(0.07)
    if trans_a:
        attributes["transA"], rows, features = 1, features, rows
    shape = (features, wide)
    if draft.chance(0.6):
        attributes["transB"], shape = 1, (wide, features)
    for name in ("alpha", "beta"):
        if draft.chance(0.15):
            attributes[name] = draft.pick([0.5, 2.0, 0.0 if name == "beta" else 0.3])
    weight = draft.weight(*shape, fan_in=features, channel=0 if "transB" in attributes else 1)
    inputs: list[Tensor | str] = [x, weight]
    biases: list[tuple[int, ...]] = [(wide,), (wide,), (wide,), (1, wide), (1,), (), (rows, 1), (1, 1)]
    if draft.opset < 11 or draft.chance(0.8):
        inputs.append(draft.row(*draft.pick(biases)))
    if draft.chance(0.05):
        other = draft.one("Transpose", x, perm=[1, 0])
        return draft.one("Gemm", draft.weight(wide, features, fan_in=features), other, transB=0, transA=0)
    return draft.one("Gemm", *inputs, **attributes)


def matmul(draft: Draft, x: Tensor) -> Tensor:
    """By a constant, perhaps with a bias on either side of an Add and an activation function."""
    features, wide = x.shape[-1], draft.pick([1, 4, 8, 12])
    y = draft.one("MatMul", x, draft.weight(features, wide, fan_in=features, channel=1))
    if draft.chance(0.6):
        bias = draft.row(*draft.pick([(wide,), (wide,), (1, wide)]))
        y = draft.one("Add", *((y, bias) if draft.chance(0.6) else (bias, y)))
    return draft.one(draft.pick(["Relu", "Tanh", "Sigmoid"]), y) if draft.chance(0.3) else y


def matmul_odd(draft: Draft, x: Tensor) -> Tensor:
    """A batch of matrices, a vector, or the constant on the left."""
    features = x.shape[-1]
    match draft.number(0, 3):
        case 0 if x.rank > 2:
            return draft.one("MatMul", x, draft.weight(*x.shape[1:-2], features, 4, fan_in=features))
        case 1:
            return draft.one("MatMul", x, draft.weight(features, fan_in=features))
        case 2 if x.rank > 2:
            return draft.one("MatMul", draft.weight(5, x.shape[-2], fan_in=x.shape[-2]), x)
        case _:
            return draft.one("MatMul", x, draft.weight(1, features, 4, fan_in=features))


def matmul_pair(draft: Draft, x: Tensor) -> Tensor:
    """By another activation, or by the transpose of itself."""
    others = [
        t for t in draft.tensors if t.rank == x.rank and t.shape[-2] == x.shape[-1] and t.shape[:-2] == x.shape[:-2]
    ]
    if others and draft.chance(0.5):
        y = draft.one("MatMul", x, draft.pick(others))
    else:
        alike = [t for t in draft.tensors if t.shape == x.shape and t.array.dtype == x.array.dtype]
        perm = [*range(x.rank - 2), x.rank - 1, x.rank - 2]
        y = draft.one("MatMul", x, draft.one("Transpose", draft.pick(alike), perm=perm))
    return draft.one("Mul", y, draft.floats(1 / np.sqrt(x.shape[-1]))) if draft.chance(0.6) else y


def projections(draft: Draft, x: Tensor) -> Tensor:
    """Two or three products of one tensor, which are packed into one, and what reads them."""
    features, wide = x.shape[-1], draft.pick([4, 8])
    made = []
    for _ in range(draft.number(2, 3)):
        if x.rank == 2 and draft.chance(0.5):
            weight = draft.weight(wide, features, fan_in=features)
            y = draft.one("Gemm", x, weight, draft.row(wide), transB=1)
        else:
            y = draft.one("MatMul", x, draft.weight(features, wide, fan_in=features, channel=1))
            y = draft.one("Add", y, draft.row(wide)) if draft.chance(0.6) else y
        made.append(y)
    first = draft.one(draft.pick(["Sigmoid", "Tanh", "Relu"]), made[0]) if draft.chance(0.6) else made[0]
    return draft.one(draft.pick(["Mul", "Add", "Sub"]), first, made[1])


def attention(draft: Draft, x: Tensor) -> Tensor:
    """Self-attention with one or two heads, perhaps masked, perhaps with a residual connection."""
    length, features = x.shape[1:]
    heads, wide = draft.pick([1, 2]), 8
    q, k, v = (draft.one("MatMul", x, draft.weight(features, wide, fan_in=features)) for _ in range(3))
    if draft.chance(0.6):
        q, k, v = (draft.one("Add", y, draft.row(wide)) for y in (q, k, v))
    if heads > 1:
        q, k, v = (draft.one("Reshape", y, draft.ints(0, length, heads, wide // heads)) for y in (q, k, v))
        q, k, v = (draft.one("Transpose", y, perm=[0, 2, 1, 3]) for y in (q, k, v))
    k = draft.one("Transpose", k, perm=[0, 1, 3, 2] if heads > 1 else [0, 2, 1])
    scores = draft.one("MatMul", q, k)
    scale = np.sqrt(wide // heads)
    scores = draft.one(
        *(("Div", scores, draft.floats(scale)) if draft.chance(0.5) else ("Mul", scores, draft.floats(1 / scale)))
    )
    if draft.chance(0.3):
        scores = draft.one("Add", scores, draft.floats(np.triu(np.full((length, length), -1e3), 1)))
    context = draft.one("MatMul", draft.one("Softmax", scores, axis=3 if heads > 1 else 2), v)
    if heads > 1:
        context = draft.one("Transpose", context, perm=[0, 2, 1, 3])
        context = draft.one("Reshape", context, draft.ints(0, length, wide))
    y = draft.one("MatMul", context, draft.weight(wide, features, fan_in=wide))
    return draft.one("Add", x, y) if draft.chance(0.5) else y


def einsum(draft: Draft, x: Tensor) -> Tensor:
    features = x.shape[2]
    if draft.chance(0.5):
        return draft.one("Einsum", x, draft.weight(features, 4, fan_in=features), equation="bij,jk->bik")
    return draft.one("Einsum", x, x, equation="bij,bkj->bik")


def recurrent(draft: Draft, x: Tensor) -> Tensor:
    """LSTM, GRU or RNN over the middle axis, in one direction or both."""
    kind, hidden = draft.pick(["LSTM", "GRU", "RNN"]), 4
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind]
    direction = draft.pick(["forward", "forward", "reverse", "bidirectional"])
    both = 2 if direction == "bidirectional" else 1
    x = draft.one("Transpose", x, perm=[1, 0, 2])
    features = x.shape[2]
    inputs: list[Tensor | str] = [
        x,
        draft.weight(both, gates * hidden, features, fan_in=features, channel=1),
        draft.weight(both, gates * hidden, hidden, fan_in=hidden, channel=1),
    ]
    if draft.chance(0.7):
        inputs.append(draft.row(both, 2 * gates * hidden))
    attributes: dict[str, Any] = {"hidden_size": hidden, "direction": direction}
    if kind == "GRU" and draft.chance(0.5):
        attributes["linear_before_reset"] = 1
    every, last = draft.put(kind, inputs, outputs=2, **attributes)
    if draft.chance(0.3):
        return draft.one("Transpose", last, perm=[1, 0, 2])
    y = draft.one("Transpose", every, perm=[2, 0, 1, 3])
    return draft.one("Reshape", y, draft.ints(0, 0, both * hidden))


def batchnorm(draft: Draft, x: Tensor) -> Tensor:
    channels = x.shape[1]
    variance = draft.floats(draft.rng.uniform(0.1, 2.0, channels))
    inputs: list[Tensor | str] = [
        x,
        draft.row(channels, around=1.0),
        draft.row(channels),
        draft.row(channels, spread=0.3),
        variance,
    ]
    attributes: dict[str, Any] = {"epsilon": draft.pick([1e-5, 1e-3])} if draft.chance(0.5) else {}
    if draft.opset < 9 and draft.chance(0.3):
        attributes["spatial"] = 1
    return draft.one("BatchNormalization", *inputs, **attributes)


def layernorm(draft: Draft, x: Tensor) -> Tensor:
    axis = draft.pick([-1, -1, x.rank - 1, 1])
    shape = x.shape[axis:]
    inputs: list[Tensor | str] = [x, draft.row(*shape, around=1.0)]
    if draft.chance(0.7):
        inputs.append(draft.row(*shape))
    if draft.opset >= 23 and draft.chance(0.3):
        return draft.one("RMSNormalization", *inputs[:2], axis=axis)
    return draft.one("LayerNormalization", *inputs, axis=axis, epsilon=1e-3)


def decomposed_layernorm(draft: Draft, x: Tensor) -> Tensor:
    centred = draft.one("Sub", x, reduce_axes(draft, "ReduceMean", x, (-1,), True))
    squared = draft.one("Pow", centred, draft.floats(2.0)) if draft.chance(0.7) else draft.one("Mul", centred, centred)
    spread = draft.one("Add", reduce_axes(draft, "ReduceMean", squared, (-1,), True), draft.floats(1e-3))
    y = draft.one("Div", centred, draft.one("Sqrt", spread))
    return draft.one("Add", draft.one("Mul", y, draft.row(x.shape[-1], around=1.0)), draft.row(x.shape[-1]))


def other_norm(draft: Draft, x: Tensor) -> Tensor:
    channels = x.shape[1]
    if draft.opset >= 21 and channels % 2 == 0 and draft.chance(0.5):
        inputs: list[Tensor | str] = [x, draft.row(channels, around=1.0), draft.row(channels)]
        return draft.one("GroupNormalization", *inputs, num_groups=2, epsilon=1e-3)
    if draft.chance(0.5):
        return draft.one("InstanceNormalization", x, draft.row(channels, around=1.0), draft.row(channels), epsilon=1e-2)
    if x.rank != 4:
        raise Rejected("LRN takes pictures")
    return draft.one("LRN", x, size=3)
