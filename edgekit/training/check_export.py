"""Prove that an exported ONNX model computes what its module does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgekit.errors import GraphError, SourceError
from edgekit.graph.annotations import all_values
from edgekit.graph.run import Session
from edgekit.training.checkpoint import evaluating
from edgekit.training.fake_quant import without_quantizers
from edgekit.training.forward import Call, as_array, computing, difference, exportable, plain_call

Array = NDArray[Any]


def check_export(module: nn.Module, model: ir.Model, inputs: tuple[Array, ...] | Mapping[str, Array]) -> None:
    """Run both on `inputs`, the module twice.

    Raises:
        SourceError: an output differs by more than float rounding, changes from call to call, or cannot be computed.
    """
    module = exportable(module)
    with without_quantizers(module):  # they are attributes of the exported model, which computes in float
        _check(module, model, inputs)


def _check(module: nn.Module, model: ir.Model, inputs: tuple[Array, ...] | Mapping[str, Array]) -> None:
    values = {value.name or "": value for value in model.graph.inputs}
    given = inputs if isinstance(inputs, Mapping) else dict(zip(values, inputs, strict=True))
    fitted = {name: _fitted(array, values[name]) if name in values else array for name, array in given.items()}
    call = plain_call(module, fitted if isinstance(inputs, Mapping) else tuple(fitted.values()))
    with computing(module, call):
        with evaluating(module):
            expected = call.run(module)
            _check_steady(module, call, expected)
        ran = _run(model, type(module).__name__, {name: fitted[name] for name in values})
        for (name, ours), theirs in zip(ran.items(), expected.values(), strict=True):
            apart = difference(ours, as_array(theirs))
            if apart:
                raise SourceError(
                    f"output {name!r} of the exported model differs from the module's by {apart}: {_why(module, call, ran)}"
                )


def _fitted(array: Array, value: ir.Value) -> Array:
    """As much of the examples as an input takes: one row, or as many samples as its fixed batch."""
    shape = list(value.shape or ())
    if array.ndim > len(shape):
        return np.asarray(array[0])
    return array[: shape[0]] if shape and isinstance(shape[0], int) else array


def _check_steady(module: nn.Module, call: Call, first: Mapping[str, Tensor]) -> None:
    """A graph holds neither random numbers nor what one call leaves for the next."""
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    second = call.run(module)
    moving = [name for name in first if difference(as_array(first[name]), as_array(second[name]))]
    if not moving:
        return
    changed = [name for name, buffer in module.named_buffers() if not torch.equal(before[name], buffer)]
    why = (
        f"it keeps state in the buffer {changed[0]!r}, which a graph cannot; make that an input and an output of forward"
        if changed
        else "it draws random numbers (F.dropout without training=self.training?) or keeps state, which a graph cannot; take that out"
    )
    raise SourceError(
        f"output {moving[0]!r} of {type(module).__name__} changes from call to call on the same inputs: {why}"
    )


def _run(model: ir.Model, name: str, feeds: Mapping[str, Array]) -> dict[str, Array]:
    try:
        return Session(model, optimize=False).run(feeds)
    except GraphError as error:
        if any(value.dtype == ir.DataType.BFLOAT16 for value in all_values(model.graph)):
            raise SourceError(
                f"{name} computes in bfloat16, which ONNX Runtime does not on a CPU; take casts and autocast out of forward"
            ) from error
        raise SourceError(
            f"{name} came out of torch's exporter as a wrong graph: {error}; replace that operator in the model"
        ) from error


def _why(module: nn.Module, call: Call, ran: Mapping[str, Array]) -> str:
    """Why a graph differs from its module, and what to do."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        slow = call.run(module).values()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    if not any(difference(ours, as_array(theirs)) for ours, theirs in zip(ran.values(), slow, strict=True)):
        return (
            "torch's fast path for transformers puts zeros where src_key_padding_mask hides tokens, and the graph what forward computes "
            "there; make nn.TransformerEncoder with enable_nested_tensor=False"
        )
    return "the exporter translated an operator wrongly; export the model to ONNX yourself and give that file"
