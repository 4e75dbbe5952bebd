"""What moves numbers without changing them, and what is asked for by axes."""

from __future__ import annotations

from typing import Any

import numpy as np
from fuzz_graphs import Draft, Rejected, Tensor
from onnx import TensorProto, helper


def reduce_axes(draft: Draft, kind: str, x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    """A reduction, with its axes where its opset has them."""
    if draft.opset < 11:
        axes = tuple(axis % x.rank for axis in axes)
    if draft.opset >= (13 if kind == "ReduceSum" else 18):
        return draft.one(kind, x, draft.ints(*axes), keepdims=int(keep))
    return draft.one(kind, x, axes=list(axes), keepdims=int(keep))


def _axes(draft: Draft, kind: str, x: Tensor, axes: list[int]) -> Tensor:
    """Squeeze and Unsqueeze have their axes as an input from opset 13 on."""
    if draft.opset >= 13:
        return draft.one(kind, x, draft.ints(*axes))
    return draft.one(kind, x, axes=axes)


def concat(draft: Draft, x: Tensor) -> Tensor:
    """With others that fit, itself, a constant, or nothing."""
    axis = draft.number(min(1, x.rank - 1), x.rank - 1)

    def fits(other: Tensor) -> bool:
        same = other.array.dtype == x.array.dtype and other.rank == x.rank
        return same and all(a == b for i, (a, b) in enumerate(zip(other.shape, x.shape, strict=True)) if i != axis)

    others: list[Tensor | str] = [draft.pick([t for t in draft.tensors if fits(t)]) for _ in range(draft.number(1, 2))]
    if draft.chance(0.1):
        others = []
    elif draft.chance(0.1) and draft.inputs[0].shape[0] != "n":
        others = [draft.row(*x.shape)]
    joined = [x, *others] if draft.chance(0.7) else [*others, x]
    return draft.one("Concat", *joined, axis=axis - x.rank if draft.chance(0.3) and draft.opset >= 11 else axis)


def split(draft: Draft, x: Tensor) -> Tensor:
    """In equal parts or others, of which only one may be read."""
    axis = draft.number(1, x.rank - 1)
    return draft.pick(_parts(draft, x, axis))  # type: ignore[no-any-return]


def _parts(draft: Draft, x: Tensor, axis: int) -> list[Tensor]:
    size = x.shape[axis]
    if size < 2:
        raise Rejected("too small to split")
    first = size // 2 if size % 2 == 0 and draft.chance(0.6) else draft.number(1, size - 1)
    sizes = [first, size - first]
    if draft.opset >= 18 and first * 2 == size and draft.chance(0.5):
        return draft.put("Split", [x], outputs=2, axis=axis, num_outputs=2)
    if draft.opset >= 13:
        return draft.put("Split", [x, draft.ints(*sizes)], outputs=2, axis=axis)
    return draft.put("Split", [x], outputs=2, axis=axis, split=sizes)


def concat_of_split(draft: Draft, x: Tensor) -> Tensor:
    """Parts that are put together again, as they were or the other way round, after a step each perhaps."""
    axis = draft.number(1, x.rank - 1)
    parts = _parts(draft, x, axis)
    if draft.chance(0.4):
        parts[0] = draft.one(draft.pick(["Relu", "Sigmoid", "Neg"]), parts[0])
    return draft.one("Concat", *(parts if draft.chance(0.6) else parts[::-1]), axis=axis)


def slice_(draft: Draft, x: Tensor) -> Tensor:
    """From the front, the back, with steps, backwards, or of everything."""
    axis = draft.number(min(1, x.rank - 1), x.rank - 1)
    size = x.shape[axis]
    start, end, step = draft.pick(
        [
            (0, max(1, size // 2), 1),
            (1, 2**31 - 1, 1),
            (-2, 2**31 - 1, 1),
            (0, -1, 1),
            (0, 2**31 - 1, 2),
            (0, 2**31 - 1, 1),
            (-1, -(2**31), -1),
        ]
    )
    if draft.opset < 10:
        if step != 1:
            raise Rejected("no steps yet")
        return draft.one("Slice", x, starts=[start], ends=[end], axes=[axis])
    parts = [[start], [end], [axis - x.rank if draft.chance(0.3) else axis], [step]]
    return draft.one(
        "Slice", x, *(draft.ints(*part) for part in (parts if step != 1 or draft.chance(0.7) else parts[:3]))
    )


def pad(draft: Draft, x: Tensor) -> Tensor:
    """With zeros, another number, or what lies at the edge; cutting now and then."""
    mode = draft.pick(["constant", "constant", "constant", "reflect", "edge", *(["wrap"] if draft.opset >= 19 else [])])
    axes = list(range(2, x.rank)) if x.rank > 2 and draft.chance(0.7) else [draft.number(1, x.rank - 1)]
    before, after = ([draft.pick([0, 1, 1, 2]) for _ in axes] for _ in range(2))
    if mode == "constant" and draft.chance(0.1):
        before[0] = -1
    full = [0] * 2 * x.rank
    for axis, low, high in zip(axes, before, after, strict=True):
        full[axis], full[axis + x.rank] = low, high
    number = draft.pick([0.0, 0.0, 1.0, -3.0])
    if draft.opset < 11:
        attributes: dict[str, Any] = {"value": number} if mode == "constant" else {}
        return draft.one("Pad", x, pads=full, mode=mode, **attributes)
    filling = [draft.floats(number)] if mode == "constant" and (number or draft.chance(0.5)) else []
    if draft.opset >= 18 and draft.chance(0.3):
        return draft.one("Pad", x, draft.ints(*before, *after), *(filling or [""]), draft.ints(*axes), mode=mode)
    return draft.one("Pad", x, draft.ints(*full), *filling, mode=mode)


def resize(draft: Draft, x: Tensor) -> Tensor:
    """Nearest, linear or cubic, by scales or sizes; Upsample in old opsets."""
    scale, mode = draft.pick([2.0, 2.0, 0.5, 1.5]), draft.pick(["nearest", "nearest", "linear", "cubic"])
    scales = np.array([1, 1] + [scale] * (x.rank - 2), np.float32)
    if draft.opset < 11 and mode == "cubic":
        mode = "linear"
    if draft.opset < 10:
        if scale < 1:
            raise Rejected("Upsample makes nothing smaller")
        if draft.opset < 9:
            return draft.one("Upsample", x, scales=scales.tolist(), mode=mode)
        return draft.one("Upsample", x, draft.constant(scales, shared=False), mode=mode)
    if draft.opset == 10:
        return draft.one("Resize", x, draft.constant(scales, shared=False), mode=mode)
    coordinates = draft.pick(["half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"])
    attributes: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": coordinates}
    if mode == "nearest" and draft.chance(0.6):
        attributes["nearest_mode"] = draft.pick(["floor", "round_prefer_ceil", "ceil"])
    roi = "" if draft.opset >= 13 else draft.constant(np.zeros(0, np.float32), shared=False)
    if draft.chance(0.25) and draft.inputs[0].shape[0] != "n":
        sizes = [*x.shape[:2], *(int(size * scale) for size in x.shape[2:])]
        empty = "" if draft.opset >= 13 else draft.constant(np.zeros(0, np.float32), shared=False)
        return draft.one("Resize", x, roi, empty, draft.ints(*sizes), **attributes)
    return draft.one("Resize", x, roi, draft.constant(scales, shared=False), **attributes)


def transpose(draft: Draft, x: Tensor) -> Tensor:
    """The axes but that of the samples in another order; all of them now and then."""
    if draft.chance(0.05):
        return draft.one("Transpose", x)
    order = [0, *(int(axis) for axis in 1 + draft.rng.permutation(x.rank - 1))]
    if x.rank == 4 and draft.chance(0.4):
        order = draft.pick([[0, 2, 3, 1], [0, 3, 1, 2]])
    y = draft.one("Transpose", x, perm=order)
    back = [order.index(axis) for axis in range(x.rank)]
    return draft.one("Transpose", draft.one("Relu", y), perm=back) if draft.chance(0.2) else y


def reshape(draft: Draft, x: Tensor) -> Tensor:
    """Flat, with the last axes merged, or with heads."""
    last = x.shape[-1]
    shapes: list[tuple[int, ...]] = [(0, -1), (0, x.shape[1], -1), (-1, int(np.prod(x.shape[1:])))]
    if last % 2 == 0:
        shapes.append((*[0] * (x.rank - 1), 2, last // 2))
    if x.rank == 4:
        shapes.append((0, 0, -1))
    if x.rank == 3 and x.shape[1] % 2 == 0:
        shapes.append((0, x.shape[1] // 2, 2, last))
    return draft.one("Reshape", x, draft.ints(*draft.pick(shapes)))


def reshape_by_shape(draft: Draft, x: Tensor) -> Tensor:
    """The arithmetic with shapes that PyTorch exports: the number of samples is looked up, the rest is one axis."""
    count = draft.one("Gather", draft.one("Shape", x), draft.constant(np.array(0, np.int64)), axis=0)
    count = _axes(draft, "Unsqueeze", count, [0])
    rest = int(np.prod(x.shape[1:])) if draft.chance(0.5) else -1
    return draft.one("Reshape", x, draft.one("Concat", count, draft.ints(rest), axis=0))


def flatten(draft: Draft, x: Tensor) -> Tensor:
    axis = 1 if draft.chance(0.8) else draft.number(0, x.rank)
    return draft.one("Flatten", x, axis=axis) if axis != 1 or draft.chance(0.7) else draft.one("Flatten", x)


def squeeze(draft: Draft, x: Tensor) -> Tensor:
    axes = [axis for axis in range(x.rank) if x.shape[axis] == 1 and axis]
    if not axes:
        raise Rejected("no axis of size 1")
    return _axes(draft, "Squeeze", x, axes if draft.chance(0.5) else axes[:1])


def unsqueeze(draft: Draft, x: Tensor) -> Tensor:
    return _axes(draft, "Unsqueeze", x, [draft.number(min(1, x.rank), x.rank)])


def gather(draft: Draft, x: Tensor) -> Tensor:
    """Constant places along an axis: one, which takes the axis away, or several."""
    axis = draft.number(1, x.rank - 1)
    size = x.shape[axis]
    if draft.chance(0.4):
        places = np.array(draft.number(-size if draft.opset >= 11 else 0, size - 1), np.int64)
    else:
        places = draft.rng.integers(0, size, draft.number(1, 4))
    return draft.one("Gather", x, draft.constant(places), axis=axis)


def embedding(draft: Draft, x: Tensor) -> Tensor:
    """Rows of a small or a large table, looked up by tokens that come in."""
    from fuzz_inputs import declare

    if len(draft.inputs) > 3 or draft.inputs[0].shape[0] != "n":
        raise Rejected("enough inputs")
    rows, columns = draft.pick([(50, 8), (50, 12), (8192, 8)])
    tokens = declare(draft, ("n", 6), np.dtype(draft.pick(["int64", "int64", "int32"])), rows)
    return draft.one("Gather", draft.row(rows, columns, spread=1.0), tokens)


def expand(draft: Draft, x: Tensor) -> Tensor:
    shape = [1 if axis == 0 or size != 1 else draft.pick([1, 3]) for axis, size in enumerate(x.shape)]
    return draft.one("Expand", x, draft.ints(*(shape if draft.chance(0.7) else [1, *shape][-x.rank :])))


def depth_space(draft: Draft, x: Tensor) -> Tensor:
    attributes: dict[str, Any] = {"blocksize": 2}
    if draft.chance(0.5):
        return draft.one("SpaceToDepth", x, **attributes)
    if draft.opset >= 11 and draft.chance(0.5):
        attributes["mode"] = "CRD"
    return draft.one("DepthToSpace", x, **attributes)


def tile(draft: Draft, x: Tensor) -> Tensor:
    return draft.one("Tile", x, draft.ints(1, *(draft.pick([1, 2]) for _ in x.shape[1:])))


def identity(draft: Draft, x: Tensor) -> Tensor:
    if draft.chance(0.3) and draft.opset < 12:
        return draft.one("Dropout", x, ratio=0.3)
    return draft.one("Dropout" if draft.chance(0.2) else "Identity", x)


def branch(draft: Draft, x: Tensor) -> Tensor:
    """An If whose branches read a tensor outside of them."""
    kind = helper.np_dtype_to_tensor_dtype(x.array.dtype)
    assert kind != TensorProto.UNDEFINED
    number = len(draft.nodes)
    graphs = []
    for which, op_type in (("then", "Tanh"), ("else", "Neg")):
        output = helper.make_tensor_value_info(f"{which}{number}", kind, None)
        node = helper.make_node(op_type, [x.name], [f"{which}{number}"])
        graphs.append(helper.make_graph([node], which, [], [output]))
    condition: Tensor | str = draft.constant(np.array(draft.chance(0.5)))
    if draft.opset >= 9 and draft.chance(0.5):
        mean = draft.one("ReduceMean", x, keepdims=0)
        condition = draft.one("Greater", mean, draft.floats(0.0))
    return draft.capturing("If", condition, x, then_branch=graphs[0], else_branch=graphs[1])
