"""An `nn.Module` becomes an ONNX model whose nodes are named after the modules they come from.

The exporter folds BatchNorm and constants, and leaves in every node's metadata where it comes from. That metadata
holds source lines and absolute paths: names are made from it, then it is dropped.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from edgekit.errors import SourceError
from edgekit.passes.fold_fake_quant import fold_fake_quant
from edgekit.training.checkpoint import evaluating, quiet, users_error
from edgekit.training.forward import Array, Call, calls, computing, exportable, named_tensors
from edgekit.training.pickles import first_line

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

    Inputs: every one whose first dimension is the batch `(N, ...)` gets a dynamic one, or its second, as recurrent states have
    it; other dimensions are those of the examples, unless a `torch.export` program has them dynamic. A model that takes one
    batch size only gets a fixed batch of one, and one that takes samples without a batch has none. A tuple is positional, a
    dict goes by the names of forward's parameters, which become the names of the graph's inputs.

    Outputs: called as forward returns them, by key or field, `output_0` and so on in a tuple, nested ones behind a dot
    (`aux.mask`), with `_out` added where an input has that name; what is no tensor is left out. A single tensor is called
    after its operation.

    Weights of other float types become float32 where forward works with that. The module is given back as it was. The same
    module and inputs give the same bytes.

    Raises:
        SourceError: the model does not run on the inputs, or computes something that no graph can hold.
    """
    module = exportable(module)
    errors = []
    for call in calls(module, example_inputs):
        try:
            with computing(module, call):
                return _export(module, call, opset)
        except SourceError as error:
            errors.append(error)
    raise errors[0]


def _export(module: nn.Module, call: Call, opset: int) -> ir.Model:
    name = type(module).__name__
    try:
        with evaluating(module):
            outputs = list(call.run(module))
    except SourceError:
        raise
    except Exception as error:  # whatever the user's code raises
        raise SourceError(f"{name} does not run on the example inputs: {users_error(error)}") from error
    if not outputs:
        raise SourceError(f"{name}.forward returns no tensor, and a graph needs an output")
    program = trace(module, call, flat=True)
    model = _translate(program, module, call, opset)
    if any(node.op_type == "FakeQuant" for node in model.graph):  # a module that was trained with quantizers
        model = fold_fake_quant(model)
    _name_initializers(model)
    _name_nodes(model)
    _name_inputs(model, program)
    if outputs != ["output"]:
        _name_outputs(model, outputs)
    _keep_data_only(model)
    return model


def trace(module: nn.Module, call: Call, *, flat: bool) -> torch.export.ExportedProgram:
    """The program of a call in the mode that the module is in, the batch dynamic; with its tensors in a `flat` tuple, or as it returns.

    Raises:
        SourceError: torch cannot trace it; the message names the line.
    """
    hook = module.register_forward_hook(
        lambda module, args, result: tuple(named_tensors(result).values()) if flat else None
    )
    try:
        with quiet(), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            return torch.export.export(module, call.args, call.kwargs, dynamic_shapes=_dynamic_shapes(module, call))
    except Exception as error:  # whatever the user's code raises while torch traces it
        raise SourceError(f"{type(module).__name__} cannot be exported: {_reason(error)}") from error
    finally:
        hook.remove()


def _dynamic_shapes(module: nn.Module, call: Call) -> dict[str, Any] | None:
    """The batch dimension of each input, by parameter of forward; `*args` take a tuple."""
    dim = torch.export.Dim(BATCH)

    def dynamic(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(dynamic(item) for item in value)
        opened: dict[int, Any] = dict.fromkeys(call.open_axes.get(id(value), ()), torch.export.Dim.AUTO)
        return opened | ({call.axes[id(value)]: dim} if id(value) in call.axes else {}) or None

    bound = inspect.signature(module.forward).bind(*call.args, **call.kwargs)
    return {name: dynamic(value) for name, value in bound.arguments.items()} if call.axes else None


def _reason(error: Exception) -> str:
    """torch's reason in one sentence, and what to do about it."""
    text = str(error)
    fixed = re.search(r"specialized it to be a constant \((\d+)\)", text)
    if fixed:
        return (
            f"its code works only for the batch size {fixed[1]} that it was traced with (torch: the dimension "
            f"{BATCH!r} was specialized to {fixed[1]}); "
            "take sizes from x.shape[0] or -1, without int() or len(), and keep no buffer of batch size, "
            "or export the .pt2 with a dynamic batch"
        )
    if "Constraints violated" in text:
        guards = re.findall(r"guard (\(?.+?\)?)\.\n", text)
        told = f" (torch: {guards[0]})" if guards else ""
        return f"its code does something else for some batch sizes{told}; make it the same for all"
    if "data-dependent" in text:
        where = re.findall(r'File "([^"]+)", line (\d+), in forward', text)
        place = f" ({where[-1][0]}, line {where[-1][1]})" if where else ""
        told = first_line(error).partition(" (unhinted")[0]
        return f"it branches on the values in a tensor{place} (torch: {told}); use torch.where or torch.cond"
    return f"{users_error(error)}; rewrite that part with torch operators, or give an ONNX file"


def _translate(
    program: torch.export.ExportedProgram,
    module: nn.Module,
    call: Call,
    opset: int,
) -> ir.Model:
    try:
        with quiet():
            exported = torch.onnx.export(
                program,
                call.args,
                kwargs=call.kwargs,
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=_dynamic_shapes(module, call),  # the program forgets the name of the dimension
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


def _name_outputs(model: ir.Model, names: Sequence[str]) -> None:
    """Give outputs the names under which forward returns them; values inside that have such a name get another."""
    graph = model.graph
    for index, value in enumerate(graph.outputs):
        if value.producer() is None or any(
            value is other for other in graph.outputs[:index]
        ):  # an input, a weight, a second time
            node = ir.node("Identity", [value])
            node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
            graph.append(node)
            graph.outputs[index] = node.outputs[0]
    inner = {value.name: value for node in graph.all_nodes() for value in node.outputs if not value.is_graph_output()}
    taken = {value.name for value in graph.inputs} | set(graph.initializers)
    for value, name in zip(graph.outputs, names, strict=True):
        while name in taken:
            name = f"{name}_out"
        taken.add(name)
        if name in inner:
            inner[name].name = f"{name}_inner"
        value.name = name


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
