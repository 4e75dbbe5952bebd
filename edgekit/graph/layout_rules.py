"""What operators that move numbers about do to positions along axes; see `edgekit.graph.axis_rules`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from edgekit.graph.axes import Axes, Ids, NoRule, Split, constant_array, shape_entries
from edgekit.graph.operators import dims, int_attribute

Outputs = list[tuple[Ids | None, ...]]
Dims = Sequence[int | str | None]


def ints(node: ir.Node, name: str, index: int) -> list[int] | None:
    """Whole numbers that a node is given as an attribute or, in newer opsets, as a constant input; None where neither is there."""
    if name in node.attributes:
        return list(node.attributes[name].as_ints())
    array = constant_array(node.inputs[index]) if len(node.inputs) > index else None
    return None if array is None else [int(number) for number in array.reshape(-1)]


def concat(node: ir.Node, axes: Axes) -> Outputs:
    """One after the other along an axis; tied along all others."""
    given = [axes.get(value) for value in node.inputs]
    axis = int_attribute(node, "axis", 1) % len(given[0])
    result = list(given[0])
    for other in given[1:]:
        for i, ids in enumerate(other):
            if i != axis:
                axes.tie(result[i], ids)
                result[i] = None if ids is None else result[i]
    parts = [one[axis] for one in given]
    known = [ids for ids in parts if ids is not None]
    if len(known) < len(parts):
        for ids in known:
            axes.fix(ids, f"{node.op_type} {node.name!r} joins them with a number that is not known")
        result[axis] = None
    else:
        result[axis] = np.concatenate(known)
    return [tuple(result)]


def split(node: ir.Node, axes: Axes) -> Outputs:
    """Parts along an axis; how long they are is written anew when some are cut."""
    x = axes.get(node.inputs[0])
    axis = int_attribute(node, "axis", 0) % len(x)
    shapes = [dims(output) for output in node.outputs]
    sizes = [None if shape is None else shape[axis] for shape in shapes]
    ids = x[axis]
    if ids is None:
        return [(*x[:axis], None, *x[axis + 1 :])] * len(sizes)
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes) or sum(known) != len(ids):
        raise NoRule("makes parts whose sizes are not known")
    if len(node.inputs) > 1 and node.inputs[1] is not None and constant_array(node.inputs[1]) is None:
        raise NoRule("is given sizes that are computed")
    parts = np.split(ids, np.cumsum(known)[:-1])
    return [(*x[:axis], part, *x[axis + 1 :]) for part in parts]


def slices(node: ir.Node, axes: Axes) -> Outputs:
    """A range along an axis, which is written anew when some positions are cut; each second one, and so on, only where all stay."""
    x, why = axes.get(node.inputs[0]), f"{node.op_type} {node.name!r} picks from them"
    starts, ends, along, steps = (constant_array(v) for v in (*node.inputs[1:], None, None)[:4])
    if len(node.inputs) < 3 or (len(node.inputs) > 3 and node.inputs[3] is not None and along is None):
        raise NoRule("is given axes that are computed")
    shape = dims(node.outputs[0])
    if shape is None:
        raise NoRule("makes a tensor of unknown rank")
    count = dims(node.inputs[1]) or (None,)
    listed = range(count[0] or len(x)) if along is None else [int(axis) % len(x) for axis in along]
    result = list(x)
    for i, axis in enumerate(listed):
        ids = x[axis]
        step = 0 if steps is None and len(node.inputs) > 4 else 1 if steps is None else int(steps[i])
        if ids is not None and starts is not None and ends is not None and step == 1:
            start, end, _ = slice(int(starts[i]), int(ends[i])).indices(len(ids))
            result[axis] = ids[start:end]
        else:
            axes.fix(ids, why)
            result[axis] = axes.fresh_fixed(shape[axis], why)
    return [tuple(result)]


def pad(node: ir.Node, axes: Axes) -> Outputs:
    """Constants before and behind: channels that nobody computes, and that go where what they are added to goes."""
    x = axes.get(node.inputs[0])
    if len(node.inputs) < 2:
        raise NoRule("is of an old opset")
    pads, along = constant_array(node.inputs[1]), constant_array(node.inputs[3]) if len(node.inputs) > 3 else None
    if pads is None or (len(node.inputs) > 3 and node.inputs[3] is not None and along is None):
        raise NoRule("is given widths that are computed")
    listed = range(len(x)) if along is None else [int(axis) % len(x) for axis in along]
    mode = node.attributes["mode"].as_string() if "mode" in node.attributes else "constant"
    result = list(x)
    for i, axis in enumerate(listed):
        before, behind, ids = int(pads[i]), int(pads[i + len(listed)]), x[axis]
        if ids is None or (before, behind) == (0, 0):
            continue
        if mode == "constant" and min(before, behind) >= 0:
            result[axis] = np.concatenate([axes.fresh(before), ids, axes.fresh(behind)])
        else:
            axes.fix(ids, f"{node.op_type} {node.name!r} pads them by what is at their ends")
            result[axis] = axes.fresh_fixed(max(0, len(ids) + before + behind), "of padding")
    return [tuple(result)]


def transpose(node: ir.Node, axes: Axes) -> Outputs:
    """Axes in another order."""
    x = axes.get(node.inputs[0])
    perm = node.attributes["perm"].as_ints() if "perm" in node.attributes else range(len(x))[::-1]
    return [tuple(x[axis] for axis in perm)]


def squeeze(node: ir.Node, axes: Axes) -> Outputs:
    """Axes of size 1 go; which, has to be said, or one that is cut to 1 would go too."""
    x, gone = axes.get(node.inputs[0]), ints(node, "axes", 1)
    if gone is None:
        raise NoRule("takes out whatever is of size 1")
    left = {axis % len(x) for axis in gone}
    return [tuple(ids for axis, ids in enumerate(x) if axis not in left)]


def unsqueeze(node: ir.Node, axes: Axes) -> Outputs:
    """New axes of size 1."""
    x, new = axes.get(node.inputs[0]), ints(node, "axes", 1)
    if new is None:
        raise NoRule("is given axes that are computed")
    rank = len(x) + len(new)
    places, old = {axis % rank for axis in new}, iter(x)
    return [tuple(axes.fresh(1) if axis in places else next(old) for axis in range(rank))]


def expand(node: ir.Node, axes: Axes) -> Outputs:
    """Axes of size 1 are repeated, others pass."""
    x, shape, entries = axes.get(node.inputs[0]), dims(node.outputs[0]), shape_entries(node.inputs[1])
    if shape is None or entries is None:
        raise NoRule("is given a shape that is computed")
    why, result = f"{node.op_type} {node.name!r} repeats them", list[Ids | None]()
    for back in range(-len(shape), 0):
        ids = x[back] if len(x) >= -back else None
        entry = entries[back] if len(entries) >= -back else 1
        if ids is not None and len(ids) == shape[back] and entry is not None:
            result.append(ids)
        else:
            axes.fix(ids, why)
            result.append(axes.fresh_fixed(shape[back], why))
    return [tuple(result)]


def resize(node: ir.Node, axes: Axes) -> Outputs:
    """Axes that keep their size pass; what is enlarged or shrunk stays."""
    x, shape = axes.get(node.inputs[0]), dims(node.outputs[0])
    mode = node.attributes.get("coordinate_transformation_mode")
    policy = node.attributes.get("keep_aspect_ratio_policy")
    if shape is None or (mode is not None and mode.as_string() == "tf_crop_and_resize"):
        raise NoRule("crops what it reads")
    scales, sizes = (constant_array(node.inputs[i]) if len(node.inputs) > i else None for i in (2, 3))
    given = sizes if sizes is not None else scales
    if given is None or (policy is not None and policy.as_string() != "stretch"):
        raise NoRule("is given sizes that are computed")
    along = [axis % len(x) for axis in ints(node, "axes", 9) or range(len(x))]
    factors = {axis: float(given.reshape(-1)[i]) for i, axis in enumerate(along)}
    why, result = f"{node.op_type} {node.name!r} works across them", list[Ids | None]()
    for axis, ids in enumerate(x):
        stays = factors.get(axis, 1.0) == 1.0 if sizes is None else ids is not None and shape[axis] == len(ids)
        if axis not in factors or stays:
            result.append(ids)
        else:
            axes.fix(ids, why)
            result.append(axes.fresh_fixed(shape[axis], why))
    return [tuple(result)]


def flatten(node: ir.Node, axes: Axes) -> Outputs:
    """Two axes of all."""
    x = axes.get(node.inputs[0])
    axis = int_attribute(node, "axis", 1)
    axis += len(x) if axis < 0 else 0
    result: list[Ids | None] = []
    for part in (x[:axis], x[axis:]):
        known = [ids for ids in part if ids is not None]
        if len(part) == 1:
            result.append(part[0])
        elif len(known) == len(part):
            result.append(_merge(node, axes, known))
        else:
            for ids in known:
                axes.fix(ids, f"{node.op_type} {node.name!r} joins them with an axis whose size is not known")
            result.append(None)
    return [tuple(result)]


def reshape(node: ir.Node, axes: Axes) -> Outputs:
    """Axes that are joined or taken apart, block by block; the shape that is given is written anew when some positions are cut."""
    x, out, entries = axes.get(node.inputs[0]), node.outputs[0].shape, shape_entries(node.inputs[1])
    value = node.inputs[0]
    if out is None or value is None or entries is None or len(entries) != len(out):
        raise NoRule("is given a shape that is computed")
    if int_attribute(node, "allowzero", 0) and 0 in entries:
        raise NoRule("may make a tensor of size 0")
    before: Dims = _named(value, x)
    if 0 in before:
        raise NoRule("reads a tensor of size 0")
    after: Dims = [d if isinstance(d, int) else d.value for d in out]
    result: list[Ids | None] = [None] * len(after)
    head, i, j = _blocks(before, after)
    tail, back_i, back_j = _blocks(before[i:][::-1], after[j:][::-1])
    n, m = len(before), len(after)
    mirrored = [((n - b, n - a), (m - d, m - c)) for (a, b), (c, d) in tail]
    for (a, b), (c, d) in (*head, *mirrored):
        known = [ids for ids in x[a:b] if ids is not None]
        if len(known) == b - a:  # or it is a single axis of unknown size
            result[c:d] = _block(node, axes, known, [size for size in after[c:d] if isinstance(size, int)])
    why = f"{node.op_type} {node.name!r} joins them with an axis whose size is not known"
    for ids in x[i : n - back_i]:
        axes.fix(ids, why)
    for k in range(j, m - back_j):
        size = after[k]
        result[k] = axes.fresh_fixed(size if isinstance(size, int) else None, why)
    for entry, ids in zip(entries, result, strict=True):
        if entry is None:
            axes.fix(ids, f"{node.op_type} {node.name!r} is given their number")
    return [tuple(result)]


def _named(value: ir.Value, ids: tuple[Ids | None, ...]) -> Dims:
    shape = value.shape if value.shape is not None else [None] * len(ids)
    named = [None if isinstance(d, int) or d is None else d.value for d in shape]
    return [len(one) if one is not None else name for one, name in zip(ids, named, strict=True)]


def _blocks(before: Dims, after: Dims) -> tuple[list[tuple[tuple[int, int], tuple[int, int]]], int, int]:
    """From the first axis on, ranges of axes on both sides that have the same size, and where that ends."""
    blocks, i, j = list[tuple[tuple[int, int], tuple[int, int]]](), 0, 0
    while i < len(before) and j < len(after):
        a, b, end_i, end_j = before[i], after[j], i + 1, j + 1
        while isinstance(a, int) and isinstance(b, int) and a != b:
            more = _at(before, end_i) if a < b else _at(after, end_j)
            if more is None:
                return blocks, i, j
            a, b, end_i, end_j = (a * more, b, end_i + 1, end_j) if a < b else (a, b * more, end_i, end_j + 1)
        if a is None or a != b:
            break
        blocks.append(((i, end_i), (j, end_j)))
        i, j = end_i, end_j
    return blocks, i, j


def _at(sizes: Dims, index: int) -> int | None:
    """The size of an axis, if there is one and it is known."""
    size = sizes[index] if index < len(sizes) else None
    return size if isinstance(size, int) else None


def _block(node: ir.Node, axes: Axes, ids: list[Ids], sizes: list[int]) -> list[Ids]:
    """Axes of `sizes` made of others that have as many positions together."""
    wide, places = [one for one in ids if len(one) != 1], [k for k, size in enumerate(sizes) if size != 1]
    result = [axes.fresh(size) for size in sizes]
    if len(places) == 1:
        result[places[0]] = _merge(node, axes, ids)
    elif len(wide) == 1:
        chosen = axes.choose(node.name or "", len(places))
        rows = np.moveaxis(wide[0].reshape([sizes[k] for k in places]), chosen, 0).reshape(sizes[places[chosen]], -1)
        for column in rows.T[1:]:
            axes.tie(rows[:, 0], column)
        for k in places:
            axes.fix(result[k] if k != places[chosen] else None, f"{node.op_type} {node.name!r} takes them apart")
        result[places[chosen]] = rows[:, 0]
        axes.splits[node.name or ""] = Split(len(places), chosen, rows[:, 0])
    elif wide:
        for one in (*ids, *result):
            axes.fix(one, f"{node.op_type} {node.name!r} mixes its axes")
    return result


def _merge(node: ir.Node, axes: Axes, ids: list[Ids]) -> Ids:
    """One axis of several, the last of which runs fastest: one of them can be cut."""
    sizes = [len(one) for one in ids]
    wide = [k for k, size in enumerate(sizes) if size != 1]
    if not wide:
        return ids[0] if ids else axes.fresh(1)
    kept = next((k for k in wide if not axes.seems_fixed(ids[k])), wide[0])
    for k in wide:
        axes.fix(ids[k] if k != kept else None, f"{node.op_type} {node.name!r} joins them with others")
    return np.tile(ids[kept].repeat(math.prod(sizes[kept + 1 :])), math.prod(sizes[:kept]))


LAYOUT_RULES: dict[str, Callable[[ir.Node, Axes], Outputs]] = {
    "Concat": concat,
    "Expand": expand,
    "Flatten": flatten,
    "Pad": pad,
    "Reshape": reshape,
    "Resize": resize,
    "Slice": slices,
    "Split": split,
    "Squeeze": squeeze,
    "Transpose": transpose,
    "Unsqueeze": unsqueeze,
}
"""By operator."""
