"""Prove that an exported ONNX model computes what its module does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils import _pytree as pytree

from edgekit.errors import SourceError
from edgekit.graph.run import Session
from edgekit.training.checkpoint import evaluating

TOLERANCE = 1e-3
"""Of the largest magnitude of an output: float sums in another order differ less, a wrong operator more."""

Array = NDArray[Any]


def check_export(module: nn.Module, model: ir.Model, inputs: tuple[Array, ...] | Mapping[str, Array]) -> None:
    """Run both on `inputs`.

    Raises:
        SourceError: an output differs by more than float rounding.
    """
    names = [value.name or "" for value in model.graph.inputs]
    feeds = dict(inputs) if isinstance(inputs, Mapping) else dict(zip(names, inputs, strict=False))
    args = () if isinstance(inputs, Mapping) else tuple(torch.from_numpy(a.copy()) for a in inputs)
    kwargs = {name: torch.from_numpy(a.copy()) for name, a in inputs.items()} if isinstance(inputs, Mapping) else {}
    with torch.no_grad(), evaluating(module):
        result = module(*args, **kwargs)
    expected = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    ran = Session(model, optimize=False).run({name: feeds[name] for name in names})
    for (name, ours), theirs in zip(ran.items(), expected, strict=True):
        reference = theirs.detach().numpy().astype(np.float64)
        error = np.max(np.abs(ours.astype(np.float64) - reference), initial=0.0)
        if error > TOLERANCE * max(float(np.max(np.abs(reference), initial=0.0)), 1e-6):
            raise SourceError(
                f"output {name!r} of the exported model differs from the module's by {error:.3g}: the exporter translated an operator "
                "wrongly; export the model to ONNX yourself and give that file"
            )
