"""Whatever the user gave becomes a float ONNX graph in canonical form, proven equal to it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgekit.data import Dataset, InputSpec, example_arrays
from edgekit.errors import DataError, GraphError, SourceError
from edgekit.graph.annotations import annotated_values, attach
from edgekit.graph.equal import prove_equal
from edgekit.graph.finite import check_finite
from edgekit.graph.io import load_onnx
from edgekit.graph.run import Session
from edgekit.output import sha256
from edgekit.passes.drop_concat_split import drop_concat_split
from edgekit.passes.expand_integer import expand_integer
from edgekit.passes.fold_affine import fold_affine
from edgekit.passes.fold_batchnorm import fold_batchnorm
from edgekit.passes.fold_fake_quant import fold_fake_quant
from edgekit.passes.fold_softmax import fold_softmax
from edgekit.passes.pack_matmuls import pack_matmuls
from edgekit.passes.pool_globally import pool_globally
from edgekit.passes.simplify import simplify
from edgekit.passes.to_float32 import computes_in_others, to_float32
from edgekit.passes.upgrade_opset import upgrade_opset
from edgekit.records import Source
from edgekit.reference import resolve_reference

QDQ = ("QuantizeLinear", "DequantizeLinear", "FakeQuant")
SYNTHETIC = "synthetic"
"""In the place of calibration data: there is none."""
SYNTHETIC_SAMPLES = 96
EXAMPLES = 2
"""Samples that a torch model is traced with, and an ONNX model compared on."""


def load_source(
    source: object,
    dataset: Dataset,
    *,
    factory: str | Callable[[], object] | None,
    trust: bool,
    opset: int,
    tune: Callable[[Any, Source], Any] | None = None,
) -> tuple[ir.Model, Source]:
    """The source as a float graph, as it came, and where it came from.

    Args:
        source: a path of an ONNX file, checkpoint or exported program, or an `nn.Module`.
        dataset: a torch model is traced with its first samples.
        factory: what makes the `nn.Module` that a checkpoint's weights go into: `FILE.py:factory`, `package.module:factory` or
            the callable itself.
        trust: open checkpoints that run pickled code.
        opset: of a graph that is traced here.
        tune: makes another module of the source's, by training.

    Raises:
        SourceError: see `load_onnx`, `load_checkpoint` and `export_onnx`.
    """
    path = Path(source) if isinstance(source, str | Path) else None
    if path is not None and path.suffix.lower() == ".onnx":
        if factory is not None:
            raise SourceError(f"{path}: an ONNX file holds its model; --model is for checkpoints: leave it out")
        if tune is not None:
            raise SourceError(
                f"{path}: an ONNX file cannot be trained; give the checkpoint that it was exported from, with --model"
            )
        model = load_onnx(path)
        return model, Source(name=path.name, kind="onnx", sha256=sha256(path), opset=model.opset_imports.get(""))
    # Torch takes seconds to import, and an ONNX file does not need it.
    from edgekit.training.check_export import check_export
    from edgekit.training.export_onnx import export_onnx
    from edgekit.training.fake_quant import binarized

    module, origin = _load_module(source, path, factory, trust)
    inputs = inputs_of(example_arrays(dataset, EXAMPLES), module)
    if tune is not None:
        export_onnx(module, inputs, opset=opset)  # what cannot be exported is told before hours of training
        module = binarized(tune(module, origin))
    else:
        module = binarized(module)
    model = export_onnx(module, inputs, opset=opset)
    check_export(module, model, inputs)
    return model, origin


def _load_module(
    source: object, path: Path | None, factory: str | Callable[[], object] | None, trust: bool
) -> tuple[Any, Source]:
    """The `nn.Module` of a source that is no ONNX file."""
    from edgekit.training.checkpoint import load_checkpoint

    if path is not None:
        module = load_checkpoint(path, factory=_factory(factory), trust=trust)
        origin = Source(name=path.name, kind=path.suffix.lower().lstrip("."), sha256=sha256(path))
    elif hasattr(source, "state_dict") and callable(source):
        module = cast(Any, source)
        origin = Source(name=type(source).__name__, kind="module")
    else:
        raise SourceError(
            f"the source is a {type(source).__name__}; give the path of a checkpoint or ONNX file, or an nn.Module"
        )
    return module, origin


def synthetic_samples(
    source: object, *, factory: str | Callable[[], object] | None, trust: bool, input_shape: str | None
) -> dict[str, NDArray[Any]]:
    """Samples where there are none: images that match the BatchNorm statistics of a torch model, or else normal numbers.

    Args:
        source, factory, trust: as in `load_source`.
        input_shape: of one sample, such as "3x224x224"; a torch model does not say it.

    Raises:
        DataError: the shape is missing or none, or the model wants data that cannot be made up.
        SourceError: the source cannot be loaded.
    """
    from edgekit.training import synthetic

    path = Path(source) if isinstance(source, str | Path) else None
    if path is not None and path.suffix.lower() == ".onnx":
        return synthetic.synthetic_samples(None, input_specs(load_onnx(path)), SYNTHETIC_SAMPLES, 0)
    if input_shape is None or not re.fullmatch(r"[1-9][0-9]*(x[1-9][0-9]*)*", input_shape):
        raise DataError(
            f"--input-shape is {input_shape!r}: a torch model does not say what it reads; give the shape of one sample, such as 3x224x224"
        )
    module, _ = _load_module(source, path, factory, trust)
    shape = tuple(map(int, input_shape.split("x")))
    return synthetic.synthetic_samples(module, synthetic.module_inputs(module, shape), SYNTHETIC_SAMPLES, 0)


def canonicalize(model: ir.Model, feeds: Mapping[str, NDArray[np.generic]], *, opset: int) -> ir.Model:
    """One form for all sources: working opset, constants folded, annotations and Q/DQ as attributes, BatchNorm folded.

    Q/DQ are folded before BatchNorm is, because the weights of trained files stand behind DequantizeLinear.

    Raises:
        SourceError: a parameter is NaN or infinite.
        GraphError: the result does not compute what the source does.
    """
    original = attach(model)
    upgraded = simplify(upgrade_opset(original, opset=opset))
    check_finite(upgraded)
    if computes_in_others(upgraded):
        upgraded = _in_float32(original, upgraded, feeds)
    else:
        prove_equal(original, upgraded, feeds)
    expanded = expand_integer(upgraded)
    quantized = any(node.op_type in QDQ for node in expanded.graph)
    folded = fold_fake_quant(expanded) if quantized else expanded
    canonical = simplify(pool_globally(fold_batchnorm(folded)))
    prove_equal(folded, canonical, feeds)
    return canonical


def _in_float32(original: ir.Model, upgraded: ir.Model, feeds: Mapping[str, NDArray[np.generic]]) -> ir.Model:
    """A model of half or double precision in float32; as it came where that is not the same.

    ONNX Runtime has not every operator in every type, so that there may be nothing to compare with.
    """
    converted = simplify(to_float32(upgraded))
    try:
        Session(original, optimize=False).run(feeds)
    except GraphError:
        return converted
    try:
        prove_equal(original, converted, feeds)
    except GraphError:
        prove_equal(original, upgraded, feeds)
        return upgraded
    return converted


def rewrite(model: ir.Model, feeds: Mapping[str, NDArray[np.generic]]) -> ir.Model:
    """The same function in fewer nodes; a model that came with grids is left as it is.

    Raises:
        GraphError: the result does not compute what the canonical model does.
    """
    if annotated_values(model.graph):
        return model
    rewritten = simplify(pack_matmuls(drop_concat_split(fold_softmax(fold_affine(model)))))
    prove_equal(model, rewritten, feeds)
    return rewritten


def input_specs(model: ir.Model) -> list[InputSpec]:
    """The inputs that a caller has to give.

    Raises:
        DataError: an input or output of a type that no array has.
    """
    specs = []
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.dtype == ir.DataType.BFLOAT16 and not value.is_initializer():
            raise DataError(
                f"{value.name!r} of the model is bfloat16, which arrays cannot hold; export it with float32 inputs and outputs "
                "(the weights may be bfloat16)"
            )
    for value in model.graph.inputs:
        if value.is_initializer():
            continue
        if value.dtype is None or value.shape is None:
            raise DataError(f"input {value.name!r} of the model has no type or no rank; export it with both")
        shape = tuple(d if isinstance(d, int) else None for d in value.shape)
        specs.append(InputSpec(value.name or "", np.dtype(value.dtype.numpy()), shape))
    return specs


def _factory(reference: str | Callable[[], object] | None) -> Callable[[], object] | None:
    if reference is None or callable(reference):
        return reference
    found = resolve_reference(reference, error=SourceError, what="--model")
    if not callable(found):
        raise SourceError(
            f"--model {reference!r} is a {type(found).__name__}; give a function or class that makes the model"
        )
    return found


def inputs_of(
    examples: tuple[NDArray[Any], ...] | dict[str, NDArray[Any]], module: Any
) -> tuple[NDArray[Any], ...] | dict[str, NDArray[Any]]:
    """Only what `forward` takes, when the data has more arrays than that."""
    if isinstance(examples, tuple):
        return examples
    import inspect

    from edgekit.training.checkpoint import unwrapped

    try:
        parameters = inspect.signature(unwrapped(module).forward).parameters
    except ValueError:  # a TorchScript module, which the exporter refuses by name
        return examples
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return examples
    known = {name: array for name, array in examples.items() if name in parameters}
    required = [
        n for n, p in parameters.items() if p.default is p.empty and p.kind is not p.VAR_POSITIONAL and n not in known
    ]
    if required:
        raise DataError(
            f"the calibration data has no array for the model's input {required[0]!r} (arrays found: {', '.join(examples)}); name the "
            f"arrays like the parameters of forward ({', '.join(parameters)})"
        )
    return known
