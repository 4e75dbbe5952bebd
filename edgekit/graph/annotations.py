"""Tensor quant attributes: on values in memory, and in the ONNX standard's own field in files.

In memory, `QuantParams` sit in `value.meta`. In a file they are `GraphProto.quantization_annotation` (SCALE_TENSOR and
ZERO_POINT_TENSOR name initializers), and what the standard has no key for is JSON in the value's metadata. Names matter at
the file boundary only: passes may rename values freely, and no scale is lost when an optimizer removes "unused" tensors.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgekit.errors import GraphError
from edgekit.quant.affine import CODE_DTYPES
from edgekit.quant.spec import INTEGER_RANGES, QuantParams, QuantSpec

_PARAMS = "edgekit.params"
_WISH = "edgekit.wish"
_SAMPLE_SHAPE = "edgekit.sample_shape"
METADATA = "edgekit.quant"
"""The metadata key, of values and of Quantize/DequantizeLinear nodes, for what ONNX has no field for: see `describe`."""

_STANDARD = "quant_parameter_tensor_names"  # onnx_ir's own key for GraphProto.quantization_annotation
_KEYS = ("SCALE_TENSOR", "ZERO_POINT_TENSOR")
_CODES, _SHIFT = "CODES_TENSOR", "SHIFT_TENSOR"  # the standard leaves keys open

DTYPES = {name: ir.DataType[name.upper()] for name in INTEGER_RANGES}
"""The ONNX type of each quantized type."""


def get_params(value: ir.Value | None) -> QuantParams | None:
    """The quant attributes of a value, or None."""
    return None if value is None else value.meta.get(_PARAMS)


def set_params(value: ir.Value, params: QuantParams | None) -> None:
    """Give a value quant attributes, or take them away."""
    if params is None:
        value.meta.pop(_PARAMS, None)
    else:
        value.meta[_PARAMS] = params


def get_wish(value: ir.Value) -> tuple[QuantSpec, int | None] | None:
    """How a value is to be quantized, and along which axis; None where nobody wants it quantized."""
    return value.meta.get(_WISH)


def set_wish(value: ir.Value, spec: QuantSpec, axis: int | None) -> None:
    """Say how a value is to be quantized."""
    value.meta[_WISH] = (spec, axis)


def without_params(model: ir.Model) -> ir.Model:
    """A copy that no value has quant attributes in: the float model."""
    model = model.clone()
    for value in all_values(model.graph):
        set_params(value, None)
    return model


def set_sample_shape(value: ir.Value, shape: tuple[int, ...]) -> None:
    """Remember the shape that samples of a graph input have."""
    value.metadata_props[_SAMPLE_SHAPE] = "x".join(map(str, shape))


def get_sample_shape(value: ir.Value) -> tuple[int, ...] | None:
    """The shape that samples of a graph input had, or None."""
    text = value.metadata_props.get(_SAMPLE_SHAPE, "")
    return tuple(int(size) for size in text.split("x")) if re.fullmatch(r"\d+(x\d+)*", text) else None


def all_values(graph: ir.Graph) -> Iterator[ir.Value]:
    """Every value of a graph, without its subgraphs': inputs, initializers, then outputs of nodes in order."""
    seen: set[int] = set()
    values = [*graph.inputs, *graph.initializers.values(), *(out for node in graph for out in node.outputs)]
    for value in values:
        if id(value) not in seen:
            seen.add(id(value))
            yield value


def annotated_values(graph: ir.Graph) -> list[ir.Value]:
    """The values that have quant attributes, in graph order."""
    return [value for value in all_values(graph) if get_params(value) is not None]


def attach(model: ir.Model) -> ir.Model:
    """A copy of `model`, as it came from a file, with its annotations as attributes and without their initializers.

    Raises:
        GraphError: an annotation names a missing tensor, or its tensors make no grid.
    """
    model = model.clone()
    graph = model.graph
    parameter_names: set[str] = set()
    for value in all_values(graph):
        names = value.meta.pop(_STANDARD, None)
        description = value.metadata_props.pop(METADATA, "")
        if names:
            set_params(value, _read(graph, value, names, description))
            parameter_names.update(names.values())
    for name in sorted(parameter_names):
        initializer = graph.initializers[name]
        if not initializer.uses() and not initializer.is_graph_output():
            del graph.initializers[name]
    return model


def detach(model: ir.Model) -> ir.Model:
    """A copy of `model` with its attributes written as annotations, ready to be saved. The inverse of `attach`."""
    model = model.clone()
    graph = model.graph
    taken = {value.name for value in all_values(graph)}
    for value in list(all_values(graph)):
        value.meta.pop(_STANDARD, None)  # left from a file whose annotations nobody read
        params = get_params(value)
        if params is None:
            continue
        scale = _register(graph, f"{value.name}_scale", params.scale, ir.DataType.FLOAT, taken)
        zero_point = _register(graph, f"{value.name}_zero_point", params.zero_point, DTYPES[params.dtype], taken)
        names = dict(zip(_KEYS, (scale, zero_point), strict=True))
        if params.codes is not None:
            names[_CODES] = _register(graph, f"{value.name}_codes", params.codes, DTYPES[params.dtype], taken)
        if params.shift is not None:
            names[_SHIFT] = _register(graph, f"{value.name}_shift", params.shift, ir.DataType.FLOAT, taken)
        value.meta[_STANDARD] = names
        value.metadata_props[METADATA] = describe(params)
        set_params(value, None)
    return model


def _register(
    graph: ir.Graph, name: str, array: NDArray[np.generic], dtype: ir.DataType, taken: set[str | None]
) -> str:
    name = fresh_name(name, taken)
    graph.register_initializer(ir.Value(name=name, const_value=code_tensor(array, dtype, name)))
    return name


def code_tensor(array: NDArray[np.generic], dtype: ir.DataType, name: str) -> ir.TensorProtocol:
    """An ONNX tensor of `dtype` holding the codes (or scales) in `array`."""
    return ir.tensor(np.asarray(array).astype(dtype.numpy()), dtype=dtype, name=name)


def fresh_name(name: str, taken: set[str | None]) -> str:
    """`name`, with underscores appended until it is not in `taken`, to which it is added."""
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def describe(params: QuantParams) -> str:
    """What ONNX has no field for, as JSON."""
    record: dict[str, object] = {"dtype": params.dtype}
    if params.axis is not None:
        record["axis"] = params.axis
    if params.narrow_range:
        record["narrow_range"] = True
    if params.observer:
        record["observer"] = params.observer
    if np.isfinite([params.low, params.high]).all():
        record["range"] = [float(params.low), float(params.high)]
    if params.fixed:
        record["fixed"] = True
    if params.block_size:
        record["block_size"] = params.block_size
    return json.dumps(record)


def described(
    description: str, *, dtype: str, scale: NDArray[np.generic], zero_point: NDArray[np.generic], axis: int | None
) -> QuantParams:
    """The grid that a file states, with what `describe` wrote; without that it came from another tool, and is fixed.

    Raises:
        GraphError: the description is not what `describe` writes.
    """
    extra = _extra(description)
    low, high = extra.get("range", (float("nan"), float("nan")))
    return QuantParams(
        dtype=extra.get("dtype", dtype),
        scale=np.asarray(scale, np.float32),
        zero_point=np.asarray(zero_point).astype(np.int64),
        axis=extra.get("axis", axis),
        narrow_range=extra.get("narrow_range", False),
        observer=extra.get("observer", ""),
        low=low,
        high=high,
        fixed=extra.get("fixed", not extra),
        block_size=extra.get("block_size", 0),
    )


_KINDS: dict[str, type] = {
    "dtype": str,
    "axis": int,
    "narrow_range": bool,
    "observer": str,
    "range": list,
    "fixed": bool,
    "block_size": int,
}


def _extra(description: str) -> dict[str, Any]:
    try:
        extra = json.loads(description or "{}")
    except (ValueError, RecursionError):
        extra = None
    fits = isinstance(extra, dict) and all(isinstance(extra[key], _KINDS[key]) for key in extra.keys() & _KINDS)
    if fits and "range" in extra:
        fits = [type(end) for end in extra["range"]] == [float, float]
    if not fits or extra.get("dtype", "uint8") not in INTEGER_RANGES or extra.get("block_size", 0) < 0:
        raise GraphError(
            f"the metadata {METADATA!r} of a tensor or node is {description[:80]!r}, not what edgekit writes: the file is "
            "damaged, compress the model again"
        )
    return dict(extra)


def _read(graph: ir.Graph, value: ir.Value, names: dict[str, str], description: str) -> QuantParams:
    tensors = {key: _named_tensor(graph, value, key, name) for key, name in names.items()}
    missing = [key for key in _KEYS if key not in tensors]
    if missing:
        raise GraphError(
            f"tensor {value.name!r}: its quantization annotation has no {missing[0]}: compress the model again"
        )
    scale, zero_point = (tensors[key].numpy() for key in _KEYS)
    dtype = tensors[_KEYS[1]].dtype.name.lower()
    whole = scale.shape == zero_point.shape and bool((np.isfinite(scale) & (scale > 0)).all())
    if dtype not in INTEGER_RANGES or not whole or (scale.ndim > 1 and "block_size" not in description):
        raise GraphError(
            f"tensor {value.name!r}: its quantization annotation is no grid (scale {scale.dtype} of shape {scale.shape}, zero "
            f"point {dtype} of shape {zero_point.shape}); expected positive scales, one or one a channel, and a zero point "
            f"for each, of {', '.join(INTEGER_RANGES)}: compress the model again"
        )
    params = described(description, dtype=dtype, scale=scale, zero_point=zero_point, axis=0 if scale.ndim else None)
    codes, shift = tensors.get(_CODES), tensors.get(_SHIFT)
    return dataclasses.replace(
        params,
        codes=None if codes is None else codes.numpy().astype(CODE_DTYPES[params.dtype]),
        shift=None if shift is None else np.asarray(shift.numpy(), np.float32),
    )


def _named_tensor(graph: ir.Graph, value: ir.Value, key: str, name: str) -> ir.TensorProtocol:
    initializer = graph.initializers.get(name)
    if initializer is None or initializer.const_value is None:
        raise GraphError(
            f"tensor {value.name!r}: its quantization annotation names {key} {name!r}, which is not in the "
            "file; a tool that edited the file has dropped it: compress the model again"
        )
    return initializer.const_value
