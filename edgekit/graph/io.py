"""ONNX files: reading any of them, writing ours the same way each time."""

from __future__ import annotations

from pathlib import Path

import google.protobuf.message
import onnx_ir as ir
from onnx_ir import external_data

from edgekit.errors import OutputError, SourceError
from edgekit.graph.annotations import attach, detach

EXTERNAL_DATA_LIMIT = 2**31 - 2**20
"""Bytes of initializers above which weights go to a file beside the model: protobuf ends at 2 GiB."""


def load_onnx(path: Path) -> ir.Model:
    """Read an ONNX file; weights in external files stay there until they are needed.

    Raises:
        SourceError: missing, unreadable, truncated, or not ONNX.
    """
    if not path.is_file():
        raise SourceError(f"{path}: no such file; give the path of an ONNX file")
    try:
        model = ir.load(path)
    except google.protobuf.message.DecodeError as error:
        raise SourceError(
            f"{path}: is not a readable ONNX file, or is truncated ({error}); export or copy it again"
        ) from error
    except (OSError, ValueError, TypeError, KeyError, NotImplementedError, ir.serde.SerdeError) as error:
        raise SourceError(
            f"{path}: cannot be read as ONNX ({error}); check it with onnx.checker and export it again"
        ) from error
    if not len(model.graph) and not model.graph.outputs:
        raise SourceError(f"{path}: holds no ONNX graph (no nodes, no outputs); give an ONNX model")
    for graph in model.graphs():
        for name, value in graph.initializers.items():
            if isinstance(value.const_value, ir.ExternalTensor):
                _check_external(path, name, value.const_value)
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


def _check_external(path: Path, name: str, tensor: ir.ExternalTensor) -> None:
    folder = path.parent.resolve()
    file = (folder / tensor.location).resolve()
    if not file.is_relative_to(folder) or (file.is_file() and file.stat().st_nlink > 1):
        raise SourceError(
            f"{path}: tensor {name!r} is stored outside the model's folder, or through a link ({tensor.location!r}); that is "
            "refused, because a prepared model could read any file so: copy the model and its data file into one folder"
        )
    end = (tensor.offset or 0) + max(tensor.length or 0, tensor.nbytes)
    if not file.is_file() or file.stat().st_size < end:
        found = f"{file.stat().st_size} bytes" if file.is_file() else "no such file"
        raise SourceError(
            f"{path}: tensor {name!r} needs {end} bytes of {tensor.location!r}, found {found}; "
            "copy the data file that belongs to the model beside it"
        )
