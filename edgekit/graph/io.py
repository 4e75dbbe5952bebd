"""ONNX files: reading any of them, writing ours the same way each time."""

from __future__ import annotations

from pathlib import Path

import google.protobuf.message
import onnx_ir as ir

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
        raise SourceError(f"{path}: is not a readable ONNX file, or is truncated ({error}); export or copy it again") from error
    except (OSError, ValueError, TypeError, KeyError, NotImplementedError) as error:
        raise SourceError(f"{path}: cannot be read as ONNX ({error}); check it with onnx.checker and export it again") from error
    if not len(model.graph) and not model.graph.outputs:
        raise SourceError(f"{path}: holds no ONNX graph (no nodes, no outputs); give an ONNX model")
    _check_external_data(model, path)
    return model


def load_annotated(path: Path) -> ir.Model:
    """Read a model that edgekit saved, its annotations as tensor quant attributes."""
    return attach(load_onnx(path))


def save_onnx(model: ir.Model, path: Path) -> None:
    """Write a model, weights beside it in `<name>.data` when they exceed protobuf's 2 GiB. The file appears whole or not at all.

    Raises:
        OutputError: the folder cannot be written.
    """
    weight_bytes = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    partial = path.with_name(f".{path.name}.partial")
    try:
        if weight_bytes > EXTERNAL_DATA_LIMIT:
            ir.save(model, partial, external_data=f"{path.name}.data")
        else:
            ir.save(model, partial)
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error}); choose another output folder") from error
    finally:
        partial.unlink(missing_ok=True)


def save_annotated(model: ir.Model, path: Path) -> None:
    """Write a model with its tensor quant attributes as the ONNX standard's `quantization_annotation`."""
    save_onnx(detach(model), path)


def _check_external_data(model: ir.Model, path: Path) -> None:
    folder = path.parent.resolve()
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        file = (folder / tensor.location).resolve()
        if not file.is_relative_to(folder):
            raise SourceError(f"{path}: tensor {name!r} points outside the model's folder ({tensor.location!r}); refused")
        end = (tensor.offset or 0) + (tensor.length or 0)
        if not file.is_file() or file.stat().st_size < end:
            found = f"{file.stat().st_size} bytes" if file.is_file() else "no such file"
            raise SourceError(
                f"{path}: tensor {name!r} needs {end} bytes of {tensor.location!r}, found {found}; "
                "copy the data file that belongs to the model beside it"
            )
