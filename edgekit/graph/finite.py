"""Parameters that hold NaN or infinity: what reads them computes nothing, in any type."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgekit.errors import SourceError
from edgekit.graph.operators import LINEAR, bias_place, is_constant, is_float

_NORMALIZATIONS = tuple(
    f"{kind}Normalization" for kind in ("Batch", "Group", "Instance", "Layer", "RMS", "SimplifiedLayer", "SkipLayer")
)
_PARAMETRIC = (*LINEAR, *_NORMALIZATIONS, "PRelu", "LSTM", "GRU", "RNN")
"""Operators all of whose constants are parameters."""


def check_finite(model: ir.Model) -> None:
    """Refuse weights, biases and parameters of normalizations that are not finite.

    Other constants may hold infinities, such as attention masks and bounds, but no NaN.

    Raises:
        SourceError: with the tensor and the node that reads it.
    """
    parameters = _parameters(model.graph)
    for node in model.graph.all_nodes():
        for value in node.inputs:
            if value is None or not is_constant(value) or not is_float(value) or value.const_value is None:
                continue
            lowest, highest = _ends(value.const_value)
            broken = "NaN" if np.isnan(lowest) else "" if np.isfinite([lowest, highest]).all() else "infinity"
            if broken == "NaN" or (broken and value in parameters):
                raise SourceError(
                    f"tensor {value.name!r}, read by node {node.name!r} ({node.op_type}), holds {broken}; expected finite numbers: "
                    "the checkpoint is broken, or its training overflowed; give an earlier one"
                )


def _parameters(graph: ir.Graph) -> set[ir.Value]:
    """The constants of layers and normalizations, and the rows that are added behind matrix products."""
    found: set[ir.Value] = set()
    for node in graph.all_nodes():
        if node.op_type in _PARAMETRIC:
            found.update(value for value in node.inputs if value is not None)
        if node.op_type == "MatMul" and is_constant(node.inputs[1]):
            place = bias_place(node)
            bias = None if place is None else place[0].inputs[place[1]]
            found.update([] if bias is None else [bias])
    return found


def _ends(tensor: ir.TensorProtocol) -> tuple[float, float]:
    """The smallest and largest number; NaN where there is one."""
    array = tensor.numpy()
    return (float(array.min()), float(array.max())) if array.size else (0.0, 0.0)
