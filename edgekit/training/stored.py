"""A module in a folder of its own: what it computes, its weights, and what it looks like, without its class and without a pickle.

`program.pt2` is a `torch.export` program, `weights.safetensors` holds all parameters and buffers under the module's own names, and
`structure.json` says how the module is called, which layers it has, and what the other two files are.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from edgekit.errors import SourceError
from edgekit.output import replaced_files, sha256
from edgekit.training.capture import Captured, Rebind, revive_batchnorms, revive_dropout
from edgekit.training.checkpoint import evaluating, load_checkpoint, quiet, users_error
from edgekit.training.export_onnx import trace
from edgekit.training.fake_quant import quantizers
from edgekit.training.forward import Array, Call, as_array, calls, difference, exportable, named_tensors
from edgekit.training.pickles import first_line
from edgekit.training.state_dict import remove_parametrizations
from edgekit.training.structure import (
    AGAIN,
    FORMAT,
    PROGRAM,
    STRUCTURE,
    WEIGHTS,
    Structure,
    layers_of,
    parameters_of,
    read_structure,
    signature_of,
    write_structure,
)
from edgekit.words import some

# What torch keeps of where a node comes from, with lines of source and absolute paths.
_TRACES = ("stack_trace", "torch_fn", "source_fn_stack", "from_node", "custom")


class Stored(Captured):
    """A module that was read back; a copy is called as it is, and leaves out the same buffers from its state_dict."""

    def __deepcopy__(self, memo: Any) -> Stored:
        """A copy that shares nothing."""
        copied = super().__deepcopy__(memo)
        assert isinstance(copied, Stored)
        for path, child in self.named_modules():  # torch forgets them
            copied.get_submodule(path)._non_persistent_buffers_set |= child._non_persistent_buffers_set
        return copied


def save_module(
    module: nn.Module,
    folder: Path,
    example_inputs: tuple[Array, ...] | Mapping[str, Array],
    *,
    structure: Mapping[str, Any],
) -> None:
    """Write a module so that `load_module` gives it back, in eval mode, without its class; whole or not at all.

    What is written is read back and run on the example inputs, and gives what the module gives. The same module and inputs give the
    same bytes. Of what forward returns, tuples, lists and dicts of tensors stay what they are; any other object becomes a dict of
    its tensors, named as in `edgekit.training.forward.named_tensors`. Parametrizations become plain weights.

    Args:
        module: in any mode, on any device; it stays as it was.
        folder: made where it is missing; other files in it stay.
        example_inputs: a batch, `(N, ...)` each; a tuple is positional, a dict goes by the names of forward's parameters. They are
            not written.
        structure: more to write into `structure.json`, of JSON's types; sorted by key.

    Raises:
        SourceError: torch cannot trace the module (the message names the line), it changes from call to call, or it has quantizers.
        OutputError: the folder cannot be written.
    """
    if quantizers(module):
        raise SourceError(
            f"{type(module).__name__} has quantizers, which a stored module cannot keep; save the module that prepare_qat was given, "
            "and export this one with edgekit.compress"
        )
    plain = _plain(module)
    call, program = _program(plain, example_inputs)
    with replaced_files(folder, STRUCTURE) as stage:
        with quiet():
            torch.export.save(program, stage / PROGRAM)
        tensors = _tensors(plain)
        tied = _tied(tensors)
        _save_weights(tensors, tied, stage / WEIGHTS)
        written = Structure(
            format=FORMAT,
            torch=torch.__version__,
            module=type(exportable(module)).__name__,
            layers=layers_of(program),
            structure=dict(structure),
            parameters=parameters_of(_signature(plain)),
            positional=len(call.args),
            named=tuple(call.kwargs),
            tied=tied,
            constants=tuple(name for name in program.constants if name not in tensors),
            hidden=_hidden(plain),
            exact=True,
            files={PROGRAM: sha256(stage / PROGRAM), WEIGHTS: sha256(stage / WEIGHTS)},
        )
        write_structure(written, stage)
        if not _is_exact(plain, load_module(stage), call):
            write_structure(written.model_copy(update={"exact": False}), stage)


def load_module(folder: Path) -> Stored:
    """The module that `save_module` wrote, in eval mode on the CPU, without its class; no pickled code is run.

    It is called as the module was, takes other batch sizes, and its parameters and buffers have the same names. In eval mode it
    gives the same outputs to the last bit on the same machine; only where torch computes in another way without gradients, as the
    fast path of `nn.TransformerEncoderLayer` does, float rounding differs. `train()` and `eval()` switch Dropout and BatchNorm, but
    not the dropout inside recurrent layers and attention, which stays off. It can be copied, trained, saved again, and given to
    `edgekit.compress` and `prepare_qat`. Its layers are operators in a graph and no modules any more, so what looks for modules,
    such as Torch-Pruning, finds none. To change weights, load, call `load_state_dict`, and save again.

    Raises:
        SourceError: a file is missing, damaged or changed, or of another version of torch.
        UntrustedSourceError: opening the program would run code.
    """
    structure = read_structure(folder)
    for name, expected in structure.files.items():
        if sha256(folder / name) != expected:
            raise SourceError(
                f"{folder / name} is not the file that {STRUCTURE} was written with (its SHA-256 differs); {AGAIN}. "
                "To change weights, load the module, call load_state_dict, and save it again"
            )
    found = load_checkpoint(folder / PROGRAM, factory=None)
    assert isinstance(found, torch.fx.GraphModule), "what a program is loaded as"
    graph = Stored(found, found.graph)
    _fill(graph, folder / WEIGHTS, structure)
    revive_dropout(graph)
    revive_batchnorms(graph)
    graph.graph.lint()
    graph.recompile()
    graph.register_forward_pre_hook(_AsBefore(structure, folder), with_kwargs=True)
    return graph.eval()


class _AsBefore(Rebind):
    """Calls in any of the ways that the stored module's forward took them."""

    def __init__(self, structure: Structure, folder: Path) -> None:
        self.positional, self.named, self.name = structure.positional, structure.named, structure.module
        self.signature = signature_of(structure, folder)


def _plain(module: nn.Module) -> nn.Module:
    """A copy on the CPU in eval mode, without wrappers and parametrizations."""
    original = exportable(module)
    try:
        copied = copy.deepcopy(original)
    except Exception as error:  # whatever the user's code raises
        raise SourceError(f"{type(original).__name__} cannot be copied: {users_error(error)}") from error
    remove_parametrizations(copied)
    return copied.cpu().eval()


def _program(
    module: nn.Module, inputs: tuple[Array, ...] | Mapping[str, Array]
) -> tuple[Call, torch.export.ExportedProgram]:
    """The first way to call the module that can be traced, and its program, free of what is private to this machine."""
    hook = module.register_forward_hook(
        lambda module, args, result: None if _is_plain(result) else named_tensors(result)
    )
    errors = []
    try:
        for call in calls(module, dict(inputs) if isinstance(inputs, Mapping) else inputs):
            try:
                with evaluating(module):
                    program = trace(module, call, flat=False)
            except SourceError as error:
                errors.append(error)
                continue
            program.example_inputs = None  # a user's data
            for node in program.graph.nodes:
                for key in _TRACES:
                    node.meta.pop(key, None)
            return call, program
    finally:
        hook.remove()
    raise errors[0]


def _is_plain(result: object) -> bool:
    """Whether a result can be described without its classes."""
    if type(result) is dict:
        return all(type(key) is str and _is_plain(value) for key, value in result.items())
    if type(result) in (tuple, list):
        return all(map(_is_plain, result))  # type: ignore[call-overload]
    return result is None or isinstance(result, Tensor | bool | int | float | str)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, under all their names."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def _hidden(module: nn.Module) -> tuple[str, ...]:
    return tuple(
        f"{path}.{name}".lstrip(".")
        for path, child in module.named_modules()
        for name in sorted(child._non_persistent_buffers_set)
    )


def _tied(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of tensors that are the same object as one before, by name."""
    first: dict[int, str] = {}
    return {name: first[id(one)] for name, one in tensors.items() if first.setdefault(id(one), name) != name}


def _save_weights(tensors: Mapping[str, Tensor], tied: Mapping[str, str], path: Path) -> None:
    own = {name: one.detach().contiguous().clone() for name, one in tensors.items() if name not in tied}
    try:
        save_file(own, path)
    except (SafetensorError, KeyError, ValueError) as error:
        raise SourceError(f"the weights cannot be written as safetensors: {first_line(error)}") from error


def _signature(module: nn.Module) -> inspect.Signature:
    """How forward is called; of a captured graph, as the module was that it was captured from."""
    hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, Rebind)]
    return hooks[0].signature if hooks else inspect.signature(module.forward)


def _fill(graph: nn.Module, path: Path, structure: Structure) -> None:
    """Give a graph's tensors the numbers in a file."""
    try:
        numbers = load_file(path, device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise SourceError(f"{path} is truncated or not a safetensors file ({first_line(error)}); {AGAIN}") from error
    tensors, tied = _tensors(graph), structure.tied
    expected = [name for name in tensors if name not in structure.constants]
    named = (*numbers, *tied, *tied.values(), *structure.hidden)
    lost = [name for name in structure.constants if name not in tensors]
    pairs = [
        (name, tensors[name], tensors[source]) for name, source in tied.items() if {name, source} <= tensors.keys()
    ]
    other = [
        f"{name} {value.dtype} {tuple(value.shape)} in the place of {tensors[name].dtype} {tuple(tensors[name].shape)}"
        for name, value in numbers.items()
        if name in tensors and (value.shape != tensors[name].shape or value.dtype != tensors[name].dtype)
    ]
    found = (
        ("missing", [name for name in expected if tied.get(name, name) not in numbers]),
        ("unexpected", [*lost, *(name for name in named if name not in expected)]),
        ("of another shape or type", other),
        ("tied to what is unlike", [name for name, a, b in pairs if type(a) is not type(b) or a.shape != b.shape]),
    )
    problems = [f"{len(names)} {what}: {some(names)}" for what, names in found if names]
    if problems:
        raise SourceError(f"{path} does not fit {PROGRAM}: {'; '.join(problems)}; {AGAIN}")
    for name, value in numbers.items():
        tensors[name].detach().copy_(value)
    for name, source in tied.items():
        owner, last = _place(graph, name)
        setattr(owner, last, getattr(*_place(graph, source)))
    for name in (*structure.constants, *structure.hidden):
        owner, last = _place(graph, name)
        owner._non_persistent_buffers_set.add(last)


def _place(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    owner, _, last = path.rpartition(".")
    return module.get_submodule(owner), last


def _is_exact(module: nn.Module, graph: nn.Module, call: Call) -> bool:
    """Whether a module that was read back gives the same outputs to the last bit.

    Raises:
        SourceError: an output differs by more than float rounding.
    """
    # torch's own shortcut for attention, taken only without gradients, is no part of the program.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with evaluating(module):
            expected = call.run(module)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    found = call.run(graph)
    for name, theirs in expected.items():
        apart = difference(as_array(found[name]), as_array(theirs)) if name in found else "its absence"
        if apart:
            raise SourceError(
                f"output {name!r} of the stored {type(module).__name__} differs from the module's by {apart}: "
                "it changes from call to call, or depends on more than its inputs"
            )
    return all(
        np.array_equal(as_array(found[name]), as_array(theirs), equal_nan=True) for name, theirs in expected.items()
    )
