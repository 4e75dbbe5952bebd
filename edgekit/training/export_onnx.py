"""An `nn.Module` becomes an ONNX model whose nodes are named after the modules they come from.

The exporter folds BatchNorm and constants, and leaves in every node's metadata where it comes from. That metadata
holds source lines and absolute paths: names are made from it, then it is dropped.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from edgekit.errors import SourceError
from edgekit.training.checkpoint import evaluating, quiet, users_error
from edgekit.training.pickles import first_line

Array = NDArray[np.generic]

BATCH = "batch"
"""The name of the dynamic first dimension."""

_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_SCOPES = "pkg.torch.onnx.name_scopes"
_RULE = "pkg.onnxscript.rewriter.rule_name"
_FOLDED_FROM = "pkg.onnxscript.optimizer.folded_from"


def export_onnx(
    module: nn.Module, example_inputs: tuple[Array, ...] | dict[str, Array], *, opset: int = 21
) -> ir.Model:
    """The ONNX model of `module` in eval mode, its batch dynamic and named "batch".

    Every example input whose first dimension is the batch `(N, ...)` gets a dynamic one; a tuple is positional, a dict
    goes by the names of forward's parameters, which become the names of the graph's inputs. Outputs that forward
    returns in a dict keep their keys. The same module and inputs give the same bytes.

    Raises:
        SourceError: the model does not run on the inputs, works for one batch size only, or has no ONNX equivalent.
    """
    args, kwargs = _as_tensors(example_inputs)
    _check_signature(module, args, kwargs)
    with evaluating(module):
        program = _trace(module, args, kwargs)
    model = _translate(program, module, args, kwargs, opset)
    _name_initializers(model)
    _name_nodes(model)
    _name_inputs(model, program)
    _name_outputs(model, program)
    _keep_data_only(model)
    return model


def _as_tensors(inputs: tuple[Array, ...] | dict[str, Array]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """The example inputs with a batch of at least two, because torch takes a batch of one for a constant."""
    arrays = list(inputs.values()) if isinstance(inputs, Mapping) else list(inputs)
    if not any(array.ndim for array in arrays):
        raise SourceError("the example inputs have no batch dimension; give at least one array of shape (N, ...)")
    batch = _batch_size(arrays)
    tensors = [
        torch.from_numpy(np.concatenate([a, a]) if batch == 1 and _has_batch(a, batch) else a.copy()) for a in arrays
    ]
    if isinstance(inputs, Mapping):
        return (), dict(zip(inputs, tensors, strict=True))
    return tuple(tensors), {}


def _batch_size(arrays: list[Any]) -> int:
    return next(int(array.shape[0]) for array in arrays if array.ndim)


def _has_batch(array: Any, batch: int) -> bool:
    return array.ndim > 0 and int(array.shape[0]) == batch


def _check_signature(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
    signature = inspect.signature(module.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        given = ", ".join(kwargs) or f"{len(args)} positional"
        raise SourceError(
            f"the example inputs ({given}) do not fit {type(module).__name__}.forward{signature}: {error}; "
            "name and count them as forward does"
        ) from error


def _trace(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> torch.export.ExportedProgram:
    name = type(module).__name__
    try:
        with quiet(), torch.no_grad():
            module(*args, **kwargs)
    except Exception as error:  # whatever the user's code raises
        raise SourceError(f"{name} does not run on the example inputs: {users_error(error)}") from error
    try:
        with quiet(), torch.no_grad():
            return torch.export.export(module, args, kwargs, dynamic_shapes=_dynamic_shapes(module, args, kwargs))
    except Exception as error:  # whatever the user's code raises while torch traces it
        raise SourceError(f"{name} cannot be exported: {_reason(error)}") from error


def _dynamic_shapes(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> dict[str, Any]:
    """The batch dimension of each input, by parameter of forward; `*args` take a tuple, `**kwargs` a dict."""
    batch = _batch_size([*args, *kwargs.values()])
    dim = torch.export.Dim(BATCH)

    def dynamic(value: Any) -> Any:
        if isinstance(value, Tensor):
            return {0: dim} if _has_batch(value, batch) else None
        if isinstance(value, tuple):
            return tuple(dynamic(item) for item in value)
        return {key: dynamic(item) for key, item in value.items()}

    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    return {name: dynamic(value) for name, value in bound.arguments.items()}


def _reason(error: Exception) -> str:
    """torch's reason in one sentence, and what to do about it."""
    text = str(error)
    fixed = re.search(r"specialized it to be a constant \((\d+)\)", text)
    if fixed:
        return (
            f"its code works only for the batch size {fixed[1]} that it was traced with (torch: the dimension "
            f"{BATCH!r} was specialized to {fixed[1]}); "
            "take sizes from x.shape[0] or -1 and keep no buffer of batch size, or export the .pt2 with a dynamic batch"
        )
    if "data-dependent" in text:
        where = re.findall(r'File "([^"]+)", line (\d+), in forward', text)
        place = f" ({where[-1][0]}, line {where[-1][1]})" if where else ""
        told = first_line(error).partition(" (unhinted")[0]
        return f"it branches on the values in a tensor{place} (torch: {told}); use torch.where or torch.cond"
    return f"{users_error(error)}; rewrite that part with torch operators, or give an ONNX file"


def _translate(
    program: torch.export.ExportedProgram,
    module: nn.Module,
    args: tuple[Tensor, ...],
    kwargs: dict[str, Tensor],
    opset: int,
) -> ir.Model:
    try:
        with quiet():
            exported = torch.onnx.export(
                program,
                args,
                kwargs=kwargs,
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=_dynamic_shapes(module, args, kwargs),  # the program forgets the name of the dimension
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        unknown = re.search(r"No ONNX function found for <OpOverload\(op='([^']+)'", str(error))
        reason = f"the operator {unknown[1]} has no ONNX equivalent" if unknown else _last_cause(error)
        raise SourceError(
            f"{type(module).__name__} cannot be written as ONNX: {reason}; replace that operator in the model"
        ) from error
    assert exported is not None
    return exported.model


def _last_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def _name_initializers(model: ir.Model) -> None:
    """Give a weight that was folded (transposed, for MatMul) its parameter's name, and a folded BatchNorm's bias "bias"."""
    taken = _value_names(model)
    for value in list(model.graph.initializers.values()):
        name = _parameter_name(value)
        if name != value.name and name not in taken:
            taken.add(name)
            value.name = name


def _parameter_name(value: ir.Value) -> str:
    name = value.name or ""
    if name.endswith(".weight_bias"):
        return name.removesuffix("weight_bias") + "bias"
    sources = ast.literal_eval(value.metadata_props.get(_FOLDED_FROM, "[]"))
    parameters = [source for source in sources if "." in source]
    return parameters[0] if len(parameters) == 1 else name


def _name_nodes(model: ir.Model) -> None:
    """Name nodes by module path: the weighted node of a module bears it alone, what stands beside it adds "/Op"."""
    members: dict[str, list[ir.Node]] = defaultdict(list)
    for node in model.graph.all_nodes():
        members[_owner(node)].append(node)
    containers = {path.rpartition(".")[0] for path in members}
    used: Counter[str] = Counter()
    for path, nodes in members.items():
        weighted = [node for node in nodes if node.op_type in _WEIGHTED and _has_weight(node)] or nodes
        bearer = weighted[0] if len(weighted) == 1 and not (nodes is weighted and path in containers) else None
        for node in nodes:
            name = path if node is bearer else f"{path}/{node.op_type}"
            used[name] += 1
            node.name = name if used[name] == 1 else f"{name}_{used[name] - 1}"


def _owner(node: ir.Node) -> str:
    """The path of the module that a node comes from; in the root module, the name of the call."""
    scopes = [str(scope) for scope in ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))]
    module = ([""] + [scope for scope in scopes[:-1] if scope])[-1]
    weight = node.inputs[1] if node.op_type in _WEIGHTED else None
    holder = (weight.name or "").rpartition(".")[0] if weight is not None else ""
    # The scopes of a folded BatchNorm are the BatchNorm's; those of attention do not know its inner projections.
    if holder and ("BatchNorm" in node.metadata_props.get(_RULE, "") or not module or holder.startswith(f"{module}.")):
        return holder
    return module or ([node.outputs[0].name or node.op_type] + scopes)[-1]


def _has_weight(node: ir.Node) -> bool:
    return any(value is not None and value.is_initializer() for value in node.inputs[:2])


def _name_inputs(model: ir.Model, program: torch.export.ExportedProgram) -> None:
    """Give an input that forward also returns its name back, which the exporter gave to the output."""
    for value, name in zip(model.graph.inputs, program.graph_signature.user_inputs, strict=True):
        for output in model.graph.outputs:
            if output is not value and output.name == name:
                output.name = f"{name}_out"
        value.name = str(name)


def _name_outputs(model: ir.Model, program: torch.export.ExportedProgram) -> None:
    """Give outputs that forward returns in a dict their keys as names."""
    spec = program.call_spec.out_spec
    structure = pytree.tree_unflatten(list(range(len(model.graph.outputs))), spec) if spec else None
    if not isinstance(structure, Mapping):
        return
    taken = _value_names(model)
    for key, position in structure.items():
        value = model.graph.outputs[position] if isinstance(position, int) else None
        if value is not None and value.producer() is not None and str(key) not in taken:
            value.name = str(key)


def _value_names(model: ir.Model) -> set[str | None]:
    names = {value.name for node in model.graph.all_nodes() for value in node.outputs}
    return names | {value.name for value in model.graph.inputs} | set(model.graph.initializers)


def _keep_data_only(model: ir.Model) -> None:
    """Drop metadata, which holds source lines and paths, and cut the tensors loose from the module's memory."""
    graph = model.graph
    model.metadata_props.clear()
    graph.metadata_props.clear()
    graph.name, graph.doc_string = "model", None
    values = [*graph.inputs, *graph.initializers.values()]
    for node in graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        values.extend(node.outputs)
    for value in values:
        value.metadata_props.clear()
        value.doc_string = None
    for name, value in graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None
        value.const_value = ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=name)
