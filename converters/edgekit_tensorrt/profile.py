"""The shapes that an engine is built for: one (min, opt, max) triple for each input with dynamic dimensions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise

import onnx_ir as ir

from edgekit.errors import TargetError
from edgekit.graph.annotations import get_sample_shape

Shape = tuple[int, ...]
Range = tuple[Shape, Shape, Shape]

DEFAULT_BATCH = (1, 1, 64)
"""Smallest, usual and largest batch when the target names none: devices run one image at a time."""


def input_ranges(model: ir.Model, options: Mapping[str, str]) -> dict[str, Range]:
    """The ranges that a target's runtime options give the model's inputs.

    `batch = "1,8,64"` is the leading dimension of every input (min, opt, max);
    `"shape:<input>" = "1x3x224x224,8x3x224x224,64x3x512x512"` is a whole input.

    Without the latter, dimensions besides the batch have the size of the samples that the model was compressed with.

    Raises:
        TargetError: an option that does not exist or cannot be read, or a dynamic dimension that neither covers.
    """
    inputs = {value.name or "": value for value in model.graph.inputs if not value.is_initializer()}
    _check_names(options, inputs)
    batch = _batch(options.get("batch"))
    ranges = {name: _range_of(name, value, options, batch) for name, value in inputs.items()}
    return {name: shapes for name, shapes in ranges.items() if shapes is not None}


def _check_names(options: Mapping[str, str], inputs: Mapping[str, ir.Value]) -> None:
    for key in options:
        if key == "batch" or (key.startswith("shape:") and key.removeprefix("shape:") in inputs):
            continue
        known = ", ".join(["batch", *(f"shape:{name}" for name in inputs)])
        raise TargetError(f"[runtime] options: TensorRT has no option {key!r} for this model; it has {known}")


def _range_of(name: str, value: ir.Value, options: Mapping[str, str], batch: Shape) -> Range | None:
    if value.shape is None:
        raise TargetError(f"input {name!r} has no shape; TensorRT needs its rank: export the model with shapes")
    dims = [dim if isinstance(dim, int) else None for dim in value.shape]
    text = options.get(f"shape:{name}")
    if text is not None:
        return _read_shapes(name, text, dims)
    if None not in dims:
        return None
    seen = _seen(value, dims)
    fixed = [dim for dim in seen[1:] if dim is not None]
    if len(fixed) != len(dims) - 1:
        raise TargetError(
            f"input {name!r} has dynamic dimensions besides the batch: {_written(value)}; TensorRT needs their range: set "
            f'[runtime] options "shape:{name}" = "MIN,OPT,MAX" in the target, each written like 1x3x224x224'
        )
    sizes = batch if dims[0] is None else (dims[0],) * 3
    smallest, usual, largest = ((size, *fixed) for size in sizes)
    return smallest, usual, largest


def sizes_of_samples(model: ir.Model, options: Mapping[str, str]) -> list[str]:
    """One sentence for each input whose dimensions the engine has from samples alone."""
    found = []
    for value in model.graph.inputs:
        dims = [dim if isinstance(dim, int) else None for dim in value.shape or ()]
        if value.is_initializer() or None not in dims[1:] or f"shape:{value.name}" in options:
            continue
        seen = "x".join(
            "N" if index == 0 and dims[0] is None else str(dim) for index, dim in enumerate(_seen(value, dims))
        )
        found.append(
            f"the engine takes {value.name!r} in the size of the samples only, {seen}; for others set [runtime] options "
            f'"shape:{value.name}" = "MIN,OPT,MAX" in the target'
        )
    return found


def _seen(value: ir.Value, dims: list[int | None]) -> list[int | None]:
    """The dimensions, those besides the batch that are dynamic from the shape of samples."""
    shape = get_sample_shape(value)
    if shape is None or len(shape) != len(dims):
        return dims
    return [dims[0], *(size if dim is None else dim for dim, size in zip(dims[1:], shape[1:], strict=True))]


def _batch(text: str | None) -> Shape:
    if text is None:
        return DEFAULT_BATCH
    parts = text.replace(" ", "").split(",")
    if len(parts) != 3 or not all(part.isdecimal() for part in parts) or not _ascending([(int(p),) for p in parts]):
        raise TargetError(
            f'[runtime] options: batch = {text!r}; expected "MIN,OPT,MAX" in ascending order, like "1,8,64"'
        )
    return tuple(int(part) for part in parts)


def _read_shapes(name: str, text: str, dims: list[int | None]) -> Range:
    parts = text.replace(" ", "").split(",")
    if len(parts) == 3 and all(re.fullmatch(r"\d+(x\d+)*", part) for part in parts):
        shapes = [tuple(int(size) for size in part.split("x")) for part in parts]
        fits = all(
            len(shape) == len(dims) and all(dim in (None, size) for dim, size in zip(dims, shape, strict=True))
            for shape in shapes
        )
        if fits and _ascending(shapes):
            return shapes[0], shapes[1], shapes[2]
    wanted = "x".join("?" if dim is None else str(dim) for dim in dims)
    raise TargetError(
        f'[runtime] options: "shape:{name}" = {text!r}; expected "MIN,OPT,MAX", ascending shapes that fit the input\'s {wanted}'
    )


def _ascending(shapes: list[Shape]) -> bool:
    return all(0 < low <= high for a, b in pairwise(shapes) for low, high in zip(a, b, strict=True))


def _written(value: ir.Value) -> str:
    assert value.shape is not None
    return "x".join(str(dim) if isinstance(dim, int) else (dim.value or "?") for dim in value.shape)
