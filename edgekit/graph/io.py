"""ONNX files: reading any of them, writing ours the same way each time."""

from __future__ import annotations

from pathlib import Path

import google.protobuf.message
import onnx
import onnx_ir as ir
from onnx_ir import external_data

from edgekit.errors import OutputError, SourceError
from edgekit.graph.annotations import attach, detach
from edgekit.graph.check_proto import check_proto

EXTERNAL_DATA_LIMIT = 2**31 - 2**20
"""Bytes of initializers above which weights go to a file beside the model: protobuf ends at 2 GiB."""


def load_onnx(path: Path) -> ir.Model:
    """Read an ONNX file; weights in external files stay there until they are needed.

    Raises:
        SourceError: missing, unreadable, truncated, or not ONNX; a graph that is none; a tensor whose data is not what its shape
            says, or lies outside the model's folder.
    """
    if not path.is_file():
        raise SourceError(f"{path}: no such file; give the path of an ONNX file")
    try:
        proto = onnx.load(path, load_external_data=False)
    except google.protobuf.message.DecodeError as error:
        raise SourceError(
            f"{path}: is not a readable ONNX file, or is truncated ({error}); export or copy it again"
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise _unreadable(path, error) from error
    check_proto(path, proto)
    _free_dimensions(proto.graph)
    try:
        model = ir.from_proto(proto)
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, ir.serde.SerdeError) as error:
        raise _unreadable(path, error) from error
    folder = path.parent.resolve()  # absolute: below an empty one, onnx_ir would follow any path
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        external_data.set_base_dir(graph, folder)
        graph.sort()  # some writers leave nodes in front of those that they read, which nothing else here can copy
    return model


def load_annotated(path: Path) -> ir.Model:
    """Read a model that edgekit saved, its annotations as tensor quant attributes.

    Raises:
        SourceError: see `load_onnx`.
        GraphError: see `attach`.
    """
    return attach(load_onnx(path))


def save_onnx(model: ir.Model, path: Path) -> None:
    """Write a model that needs no other file, or with its weights in `<name>.data` beside it where they exceed 2 GiB.

    Both files appear whole or not at all.

    Raises:
        OutputError: the folder cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        if fits_protobuf(model):
            ir.save(self_contained(model), partial)
        else:
            ir.save(model, partial, external_data=f"{path.name}.data")
        partial.replace(path)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror or error}); choose another output folder"
        ) from error
    finally:
        if partial.is_file():
            partial.unlink()


def save_annotated(model: ir.Model, path: Path) -> None:
    """Write a model with its tensor quant attributes as the ONNX standard's `quantization_annotation`.

    Raises:
        OutputError: the folder cannot be written.
    """
    save_onnx(detach(model), path)


def fits_protobuf(model: ir.Model) -> bool:
    """Whether a model can be written as one protobuf message."""
    tensors = (value.const_value for graph in model.graphs() for value in graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None) <= EXTERNAL_DATA_LIMIT


def self_contained(model: ir.Model) -> ir.Model:
    """A copy with all weights in memory: a reference to an external file holds only beside that file."""
    return external_data.load_to_model(model.clone())


def _free_dimensions(graph: onnx.GraphProto) -> None:
    """Dimensions that exporters write as -1 or `?` are unknown: neither a size, nor all the same one."""
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_value < 0 or dim.dim_param in ("?", "-1"):
                dim.Clear()


def _unreadable(path: Path, error: Exception) -> SourceError:
    cause: BaseException = error
    while cause.__cause__ is not None:  # onnx_ir says on each level where it was, and only on the last what is wrong
        cause = cause.__cause__
    return SourceError(f"{path}: cannot be read as ONNX ({cause}); check it with onnx.checker and export it again")
