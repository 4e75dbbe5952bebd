"""What tells two models apart: for caches of what was measured on one of them."""

from __future__ import annotations

import hashlib

import onnx_ir as ir

from edgekit.graph.annotations import detach


def fingerprint(model: ir.Model) -> str:
    """The SHA-256 of a model: its nodes, constants, inputs, outputs and quant attributes. Models over 2 GB have one too."""
    model = detach(model)
    digest = hashlib.sha256(repr(sorted(model.opset_imports.items())).encode())
    for value in (*model.graph.inputs, *model.graph.outputs):
        digest.update(f"{value.name} {value.dtype} {value.shape}\n".encode())
    for name, value in sorted(model.graph.initializers.items()):
        if value.const_value is not None:
            digest.update(f"{name} {value.const_value.dtype} {value.const_value.shape} {value.metadata_props}".encode())
            digest.update(value.const_value.tobytes())
    for node in model.graph:
        digest.update(ir.to_proto(node).SerializeToString(deterministic=True))
        for output in node.outputs:
            digest.update(f"{output.meta.get('quant_parameter_tensor_names')} {output.metadata_props}".encode())
    return digest.hexdigest()
