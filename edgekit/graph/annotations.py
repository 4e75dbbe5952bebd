"""Tensor quant attributes: on values in memory, and in the ONNX standard's own field in files.

In memory, `QuantParams` sit in `value.meta`. In a file they are `GraphProto.quantization_annotation` (SCALE_TENSOR and
ZERO_POINT_TENSOR name initializers), and what the standard has no key for is JSON in the value's metadata. Names matter at
the file boundary only: passes may rename values freely, and no scale is lost when an optimizer removes "unused" tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from edgekit.errors import GraphError
from edgekit.quant.spec import INTEGER_RANGES, QuantParams, QuantSpec

_PARAMS = "edgekit.params"
_WISH = "edgekit.wish"
_METADATA = "edgekit.quant"
_STANDARD = "quant_parameter_tensor_names"  # onnx_ir's own key for GraphProto.quantization_annotation
_KEYS = ("SCALE_TENSOR", "ZERO_POINT_TENSOR")

DTYPES = {name: ir.DataType[name.upper()] for name in INTEGER_RANGES}


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
        names = value.meta.get(_STANDARD)
        if not names:
            continue
        set_params(value, _read(graph, value, names))
        parameter_names.update(names.values())
    for value in all_values(graph):
        value.meta.pop(_STANDARD, None)
        value.metadata_props.pop(_METADATA, None)
    for name in sorted(parameter_names):
        if name in graph.initializers and not graph.initializers[name].uses():
            del graph.initializers[name]
    return model


def detach(model: ir.Model) -> ir.Model:
    """A copy of `model` with its attributes written as annotations, ready to be saved. The inverse of `attach`."""
    model = model.clone()
    graph = model.graph
    taken = {value.name for value in all_values(graph)}
    for value in annotated_values(graph):
        params = get_params(value)
        assert params is not None and value.name is not None
        tensors = (
            np.asarray(params.scale, np.float32),
            ir.tensor(params.zero_point.astype(np.int64), dtype=ir.DataType.INT64).numpy(),
        )
        names = {}
        for key, suffix, array in zip(_KEYS, ("scale", "zero_point"), tensors, strict=True):
            name = _fresh(f"{value.name}_{suffix}", taken)
            dtype = ir.DataType.FLOAT if suffix == "scale" else DTYPES[params.dtype]
            graph.register_initializer(ir.Value(name=name, const_value=code_tensor(array, dtype, name)))
            names[key] = name
        value.meta[_STANDARD] = names
        value.metadata_props[_METADATA] = describe(params)
        set_params(value, None)
    return model


def code_tensor(array: np.ndarray, dtype: ir.DataType, name: str) -> ir.TensorProtocol:
    """An ONNX tensor of `dtype` holding the codes (or scales) in `array`."""
    return ir.tensor(array.astype(dtype.numpy()), dtype=dtype, name=name)


def _fresh(name: str, taken: set[str | None]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def describe(params: QuantParams) -> str:
    """What the ONNX standard has no key for, as JSON."""
    record: dict[str, object] = {"dtype": params.dtype}
    if params.axis is not None:
        record["axis"] = params.axis
    if params.narrow_range:
        record["narrow_range"] = True
    if params.observer:
        record["observer"] = params.observer
    if np.isfinite([params.low, params.high]).all():
        record["range"] = [params.low, params.high]
    if params.fixed:
        record["fixed"] = True
    return json.dumps(record)


def _read(graph: ir.Graph, value: ir.Value, names: dict[str, str]) -> QuantParams:
    tensors = []
    for key in _KEYS:
        initializer = graph.initializers.get(names.get(key, ""))
        if initializer is None or initializer.const_value is None:
            raise GraphError(
                f"tensor {value.name!r}: its quantization annotation names {key} {names.get(key)!r}, which is not in the "
                "file; a tool that edited the file has dropped it: compress the model again"
            )
        tensors.append(initializer.const_value)
    scale, zero_point = tensors[0].numpy(), tensors[1].numpy()
    extra = json.loads(value.metadata_props.get(_METADATA, "{}"))
    dtype = extra.get("dtype", tensors[1].dtype.name.lower())
    if dtype not in INTEGER_RANGES or scale.shape != zero_point.shape or not (scale > 0).all():
        raise GraphError(
            f"tensor {value.name!r}: its quantization annotation is no grid (scale {scale.shape}, zero point "
            f"{zero_point.shape} of {dtype}); scales must be positive and zero points of the same shape"
        )
    low, high = extra.get("range", (float("nan"), float("nan")))
    axis = extra.get("axis", 0 if scale.ndim else None)
    return QuantParams(
        dtype=dtype,
        scale=scale.astype(np.float32),
        zero_point=zero_point.astype(np.int64),
        axis=axis,
        narrow_range=extra.get("narrow_range", False),
        observer=extra.get("observer", ""),
        low=low,
        high=high,
        fixed=extra.get("fixed", not extra),
    )
