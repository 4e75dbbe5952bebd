"""`edgekit inspect`: layers, shapes, costs, and which tensors carry which quant attributes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgekit.graph.annotations import annotated_values, attach, get_params
from edgekit.graph.io import load_onnx
from edgekit.graph.operators import Layer, dims, is_constant, layers
from edgekit.passes.fold_fake_quant import fold_fake_quant
from edgekit.passes.simplify import simplify
from edgekit.passes.upgrade_opset import upgrade_opset
from edgekit.records import MODEL


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor with quant attributes: `scale` and `zero_point` are ranges when there is one of each per channel."""

    name: str
    kind: str
    shape: tuple[int | None, ...] | None
    dtype: str
    scale: tuple[float, float]
    zero_point: tuple[int, int]
    axis: int | None
    observer: str
    fixed: bool


@dataclass(frozen=True, slots=True)
class InspectResult:
    """What is in a model; MACs for one sample."""

    path: Path
    opset: int
    nodes: int
    layers: tuple[Layer, ...]
    tensors: tuple[TensorInfo, ...]

    @property
    def macs(self) -> int:
        """Of all layers."""
        return sum(layer.macs for layer in self.layers)

    @property
    def parameters(self) -> int:
        """Of all layers."""
        return sum(layer.parameters for layer in self.layers)


def inspect(path: str | Path) -> InspectResult:
    """Look into a compressed model's folder or any ONNX file; Q/DQ pairs are shown as attributes of their tensors.

    Raises:
        SourceError: it cannot be read.
    """
    file = Path(path)
    file = file / MODEL if file.is_dir() else file
    source = load_onnx(file)
    opset = source.opset_imports.get("", 0)
    model = attach(source) if source.graph.initializers else source
    if not annotated_values(model.graph):
        model = simplify(upgrade_opset(model, opset=max(opset, 13)))
        if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph):
            model = fold_fake_quant(model)
    tensors = []
    for value in annotated_values(model.graph):
        params = get_params(value)
        assert params is not None
        tensors.append(
            TensorInfo(
                name=value.name or "",
                kind="weight" if is_constant(value) else "activation",
                shape=dims(value),
                dtype=params.dtype,
                scale=(float(np.min(params.scale)), float(np.max(params.scale))),
                zero_point=(int(np.min(params.zero_point)), int(np.max(params.zero_point))),
                axis=params.axis,
                observer=params.observer,
                fixed=params.fixed,
            )
        )
    return InspectResult(file, opset, len(source.graph), tuple(layers(model)), tuple(tensors))
