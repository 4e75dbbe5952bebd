"""Arithmetic, activation functions, reductions and pools."""

from __future__ import annotations

from typing import Any

import numpy as np
from fuzz_graphs import Draft, Rejected, Tensor
from fuzz_inputs import declare
from fuzz_movement import reduce_axes

UNARY = (
    "Relu",
    "Relu",
    "Relu",
    "LeakyRelu",
    "Sigmoid",
    "Tanh",
    "HardSigmoid",
    "Elu",
    "Selu",
    "Softplus",
    "Softsign",
    "Abs",
    "Neg",
)
NEWER = {"Erf": 9, "Celu": 12, "HardSwish": 14, "Mish": 18, "Gelu": 20, "Swish": 24}


def with_constant(draft: Draft, x: Tensor) -> Tensor:
    """One step of arithmetic with a number, a channel's, a row or a whole constant, on either side; one that does nothing."""
    shapes: list[tuple[int, ...]] = [(), (1,), (x.shape[-1],), (1,) * x.rank]
    if x.rank > 2:
        shapes += [(x.shape[1], *[1] * (x.rank - 2)), (1, x.shape[1], *[1] * (x.rank - 2)), x.shape[1:]]
    kind, shape = draft.pick(["Add", "Add", "Mul", "Mul", "Sub", "Div", "Pow", "Max", "Min"]), draft.pick(shapes)
    if kind == "Pow":
        return draft.one("Pow", x, draft.floats(2.0))
    if kind in ("Max", "Min") and (draft.opset < 8 or not shape):
        raise Rejected("no broadcasting")
    if draft.chance(0.07) and kind in ("Add", "Mul", "Sub", "Div"):
        return draft.one(kind, x, draft.floats(np.full(shape, float(kind in ("Mul", "Div")))))
    if kind == "Div":
        signs = draft.rng.choice([-1, 1], shape)
        constant = draft.floats(signs * draft.rng.uniform(0.5, 2.0, shape))
        if draft.chance(0.2):
            return draft.one("Div", constant, draft.one("Add", draft.one("Abs", x), draft.floats(0.7)))
        return draft.one("Div", x, constant)
    constant = draft.row(*shape, spread=1.0)
    return draft.one(kind, *((x, constant) if draft.chance(0.7) else (constant, x)))


def with_tensor(draft: Draft, x: Tensor) -> Tensor:
    """One step of arithmetic with another tensor, or with itself."""

    def fits(other: Tensor) -> bool:
        pairs = list(zip(other.shape[::-1], x.shape[::-1], strict=False))
        return other.array.dtype == x.array.dtype and all(a == b or 1 in (a, b) for a, b in pairs)

    others = [one for one in draft.tensors if fits(one)]
    alike = [one for one in others if one.shape == x.shape]
    other = draft.pick(alike if draft.chance(0.7) else others)
    kind = draft.pick(["Add", "Add", "Add", "Mul", "Mul", "Sub", "Div", "Max", "Min"])
    if kind == "Div":
        return draft.one("Div", x, draft.one("Add", draft.one("Sigmoid", other), draft.floats(0.5)))
    if kind in ("Max", "Min") and draft.opset < 8:
        raise Rejected("no broadcasting")
    return draft.one(kind, *((x, other) if draft.chance(0.5) else (other, x)))


def activation(draft: Draft, x: Tensor) -> Tensor:
    names = [*UNARY, "PRelu", *(name for name, since in NEWER.items() if draft.opset >= since)]
    name, attributes = draft.pick(names), dict[str, Any]()
    if name == "PRelu":
        shapes: list[tuple[int, ...]] = [(1,), (x.shape[-1],)]
        if x.rank > 2:
            shapes.append((x.shape[1], *[1] * (x.rank - 2)))
        return draft.one("PRelu", x, draft.row(*draft.pick(shapes), spread=0.2))
    if name in ("LeakyRelu", "Elu") and draft.chance(0.5):
        attributes["alpha"] = draft.pick([0.1, 0.3, 1.5])
    if name == "Gelu" and draft.chance(0.5):
        attributes["approximate"] = "tanh"
    return draft.one(name, x, **attributes)


def clip(draft: Draft, x: Tensor) -> Tensor:
    """ReLU6 and others; with one bound or none left out, in the form of its opset."""
    low, high = draft.pick([(0.0, 6.0), (0.0, 1.0), (-1.0, 1.0), (0.0, None), (None, 2.0), (0.5, 1.5), (None, None)])
    if draft.opset < 11:
        bounds = {"min": low, "max": high}
        return draft.one("Clip", x, **{name: bound for name, bound in bounds.items() if bound is not None})
    inputs: list[Tensor | str] = [x, *("" if bound is None else draft.floats(bound) for bound in (low, high))]
    while inputs[-1] == "":
        inputs.pop()
    return draft.one("Clip", *inputs)


def decomposed_activation(draft: Draft, x: Tensor) -> Tensor:
    """GELU, SiLU and hard swish as exporters of older opsets write them."""
    match draft.number(0, 3):
        case 0 if draft.opset >= 9:
            erf = draft.one("Erf", draft.one("Div", x, draft.floats(np.sqrt(2))))
            return draft.one("Mul", draft.one("Mul", x, draft.one("Add", erf, draft.floats(1.0))), draft.floats(0.5))
        case 1:
            gate = draft.one("Clip", draft.one("Add", x, draft.floats(3.0)), *_six(draft), **_six_attributes(draft))
            return draft.one("Div", draft.one("Mul", x, gate), draft.floats(6.0))
        case 2:
            return draft.one("Mul", x, draft.one("HardSigmoid", x, alpha=1 / 6, beta=0.5))
        case _:
            return draft.one("Mul", x, draft.one("Sigmoid", x))


def _six(draft: Draft) -> list[str]:
    return [draft.floats(0.0), draft.floats(6.0)] if draft.opset >= 11 else []


def _six_attributes(draft: Draft) -> dict[str, float]:
    return {"min": 0.0, "max": 6.0} if draft.opset < 11 else {}


def softmax(draft: Draft, x: Tensor) -> Tensor:
    """Along any axis but that of the samples; opsets before 13 flatten what follows it."""
    axis = draft.pick([-1, *range(1, x.rank)]) if draft.opset >= 11 else draft.number(1, x.rank - 1)
    attributes = {"axis": axis} if draft.chance(0.8) else {}
    if not attributes and x.rank < 2:
        raise Rejected("no axis left")
    return draft.one("LogSoftmax" if draft.chance(0.15) else "Softmax", x, **attributes)


def classifier(draft: Draft, x: Tensor) -> Tensor:
    """A head, of two classes often, and its Softmax."""
    features, classes = x.shape[1], draft.pick([2, 2, 5])
    y = draft.one("Gemm", x, draft.weight(classes, features, fan_in=features), draft.row(classes), transB=1)
    return draft.one("Softmax", y, axis=1)


def where(draft: Draft, x: Tensor) -> Tensor:
    """By a constant mask, a mask that comes in, or what a tensor is compared with."""
    match draft.number(0, 2):
        case 0:
            condition: Tensor | str = draft.constant(draft.rng.random(x.shape[1:]) < 0.6)
        case 1 if len(draft.inputs) < 4 and draft.inputs[0].shape[0] == "n" and x.rank > 1:
            condition = declare(draft, ("n", *[1] * (x.rank - 1)), np.dtype(bool))
        case _:
            condition = draft.one("Greater", x, draft.floats(0.1))
    alike = [one for one in draft.tensors if one.shape == x.shape and one.array.dtype == x.array.dtype]
    other = draft.floats(draft.pick([0.0, 0.0, -2.0])) if draft.chance(0.5) else draft.pick(alike)
    return draft.one("Where", condition, *((x, other) if draft.chance(0.6) else (other, x)))


def casts(draft: Draft, x: Tensor) -> Tensor:
    """Into another type and back, with a step in between perhaps."""
    between = draft.pick(["float16", "float64", "float32", "int32"])
    y = draft.one("Cast", x, to=_onnx_type(between))
    if between != "int32" and draft.chance(0.5):
        constant = draft.constant(draft.rng.normal(1, 0.3, x.shape[-1]).astype(between))
        y = draft.one(draft.pick(["Mul", "Add"]), y, constant)
    if between.startswith("float") and draft.chance(0.15):
        return y
    return draft.one("Cast", y, to=_onnx_type(x.array.dtype.name))


def _onnx_type(name: str) -> int:
    return {"float16": 10, "float64": 11, "float32": 1, "int32": 6}[name]


def variadic(draft: Draft, x: Tensor) -> Tensor:
    """Sum, Mean, Max or Min of one to three tensors."""
    alike = [one for one in draft.tensors if one.shape == x.shape and one.array.dtype == x.array.dtype]
    others = [draft.pick(alike) for _ in range(draft.number(0, 2))]
    return draft.one(draft.pick(["Sum", "Mean", "Max", "Min"]), x, *others)


def index_output(draft: Draft, x: Tensor) -> Tensor:
    """Class numbers, which nothing reads."""
    if draft.opset >= 11 and draft.chance(0.4):
        return draft.put("TopK", [x, draft.ints(1)], outputs=2, axis=x.rank - 1)[0]
    return draft.one("ArgMax", x, axis=x.rank - 1, keepdims=draft.number(0, 1))


def constants_only(draft: Draft, x: Tensor) -> Tensor:
    """A weight that is computed from constants, in front of what reads it."""
    features = x.shape[-1]
    weight = draft.one("Transpose", draft.weight(4, features, fan_in=features), perm=[1, 0])
    if draft.chance(0.5):
        weight = draft.one("Mul", weight, draft.floats(0.5))
    return draft.one("MatMul", x, weight)


def reduce(draft: Draft, x: Tensor) -> Tensor:
    kind = draft.pick(["ReduceMean", "ReduceMean", "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2"])
    axes = draft.pick([(-1,), (1,), tuple(range(2, x.rank)) or (1,), (x.rank - 1,)])
    return reduce_axes(draft, kind, x, axes, draft.chance(0.6))


def pool(draft: Draft, x: Tensor) -> Tensor:
    """Padded, rounded up, counting what was padded or not; MaxPool dilated too."""
    space, kind = x.rank - 2, draft.pick(["MaxPool", "AveragePool"])
    kernel = draft.pick([1, 2, 2, 3, 3])
    attributes: dict[str, Any] = {"kernel_shape": [kernel] * space}
    if draft.chance(0.7):
        attributes["strides"] = [draft.pick([1, 2])] * space
    if draft.chance(0.15):
        attributes["auto_pad"] = draft.pick(["SAME_UPPER", "SAME_LOWER", "VALID"])
    elif draft.chance(0.5) and kernel > 1:
        attributes["pads"] = [draft.number(0, 1) for _ in range(2 * space)] if draft.chance(0.3) else [1] * 2 * space
    if draft.chance(0.25) and draft.opset >= 10 and "auto_pad" not in attributes:
        attributes["ceil_mode"] = 1
    if kind == "AveragePool" and draft.chance(0.4):
        attributes["count_include_pad"] = 1
    if draft.chance(0.1) and draft.opset >= (10 if kind == "MaxPool" else 19) and "auto_pad" not in attributes:
        attributes["dilations"] = [2] * space
    return draft.one(kind, x, **attributes)


def pool_globally(draft: Draft, x: Tensor) -> Tensor:
    if draft.chance(0.25) and all(size == x.shape[2] for size in x.shape[2:]):
        return draft.one("AveragePool", x, kernel_shape=list(x.shape[2:]))
    return draft.one(draft.pick(["GlobalAveragePool", "GlobalAveragePool", "GlobalMaxPool"]), x)
