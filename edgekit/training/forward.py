"""Calling a module as its graph will compute: with which inputs, in which types, and the names of what it returns."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from edgekit.errors import SourceError
from edgekit.training.checkpoint import evaluating, quiet, unwrapped
from edgekit.training.state_dict import remove_parametrizations
from edgekit.words import some

Array = NDArray[Any]
Inputs = tuple[Array, ...] | Mapping[str, Array]

TOLERANCE = 1e-3
"""Of the largest magnitude of an output: float sums in another order differ less, a wrong operator more."""

_NO_TENSORS = (bool, int, float, complex, str, torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass(frozen=True, slots=True)
class Call:
    """How forward is called.

    Attributes:
        args: positional inputs.
        kwargs: inputs by name.
        axes: the batch axis of each input that has one, by the tensor's id.
        open_axes: the other axes whose size may change, the same way.
    """

    args: tuple[Tensor, ...]
    kwargs: dict[str, Tensor]
    axes: dict[int, int]
    open_axes: dict[int, tuple[int, ...]]

    def run(self, module: nn.Module) -> dict[str, Tensor]:
        """The tensors that forward returns, by name."""
        with quiet(), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            args = [tensor.clone() for tensor in self.args]  # forward may write into them
            return named_tensors(module(*args, **{name: tensor.clone() for name, tensor in self.kwargs.items()}))


def named_tensors(result: object, name: str = "") -> dict[str, Tensor]:
    """What forward returned, by key or field, `output_0` and so on in a tuple; "output" alone; nested ones behind a dot.

    Raises:
        SourceError: an object that may hold tensors, of a type whose fields are not known.
    """
    if isinstance(result, Tensor):
        return {name or "output": result}
    if result is None or isinstance(result, _NO_TENSORS):
        return {}
    if isinstance(result, Mapping):
        entries = [(str(key) or "output", value) for key, value in result.items()]
    elif is_dataclass(result) and not isinstance(result, type):
        entries = [(field.name, getattr(result, field.name)) for field in fields(result)]
    elif isinstance(result, tuple | list):
        keys = getattr(result, "_fields", None) or [
            f"{'' if name else 'output_'}{index}" for index in range(len(result))
        ]
        entries = list(zip(keys, result, strict=True))
    else:
        where = f" under {name!r}" if name else ""
        raise SourceError(
            f"forward returns a {type(result).__name__}{where}; return tensors, in a tuple, a dict or a dataclass"
        )
    inner = [named_tensors(value, f"{name}.{key}" if name else key) for key, value in entries]
    return {key: tensor for tensors in inner for key, tensor in tensors.items()}


def exportable(module: nn.Module) -> nn.Module:
    """What of a module can be traced: itself, without wrappers.

    Raises:
        SourceError: it is TorchScript or quantized, or holds no numbers.
    """
    module = unwrapped(module)
    name = type(module).__name__
    scripted = [path or name for path, child in module.named_modules() if isinstance(child, torch.jit.ScriptModule)]
    if scripted:
        raise SourceError(
            f"{name} holds TorchScript ({some(scripted)}), which cannot be traced; give the nn.Module that it was made from"
        )
    quantized = [path or name for path, child in module.named_modules() if ".quantized" in type(child).__module__]
    if quantized:
        raise SourceError(
            f"{name} is already quantized by torch ({some(quantized)}); give the float model that it was made from"
        )
    if any(value.is_meta for value in (*module.parameters(), *module.buffers())):
        raise SourceError(f"{name} has no numbers (device meta); load its weights first")
    return module


@contextmanager
def computing(module: nn.Module, call: Call) -> Iterator[None]:
    """A module for a while as its graph computes: on the CPU, in eval mode, without parametrizations, in float32 if that works."""
    with evaluating(module):
        restore = remove_parametrizations(module)
        try:
            with _moved(module, None):
                dtype = next((dtype for dtype in _types(module, call) if _runs(module, call, dtype)), None)
                with _moved(module, dtype):
                    yield
        finally:
            restore()


def _types(module: nn.Module, call: Call) -> list[torch.dtype | None]:
    """What the weights may be computed in, best first; None stands for what they are. Empty where there is no choice."""
    own = {value.dtype for value in (*module.parameters(), *module.buffers()) if value.is_floating_point()}
    data = {value.dtype for value in (*call.args, *call.kwargs.values())}
    if own <= {torch.float32} or torch.float16 in data:
        return []
    # Runtimes compute float16 as it is, but neither of these.
    return [torch.float32, None] if own <= {torch.bfloat16, torch.float64} else [None, torch.float32]


@contextmanager
def _moved(module: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """A module for a while on the CPU, and with a type in it."""
    held = [(value, value.data, value.grad) for value in module.parameters() if not is_lazy(value)]
    with evaluating(module):
        try:
            for parameter, _, _ in held:
                parameter.grad = None
            module.to("cpu", dtype)
            yield
        finally:
            for parameter, data, gradient in held:
                parameter.data, parameter.grad = data, gradient


def _runs(module: nn.Module, call: Call, dtype: torch.dtype | None) -> bool:
    with _moved(module, dtype):
        try:
            call.run(module)
        except Exception:  # whatever the user's code raises where types or shapes do not suit it
            return False
    return True


def calls(module: nn.Module, inputs: Inputs) -> Iterator[Call]:
    """The ways to call forward on example inputs, best first: with a dynamic batch, one sample alone, a row as it is.

    Raises:
        SourceError: forward does not take such inputs.
    """
    arrays = dict(inputs) if isinstance(inputs, Mapping) else {str(index): array for index, array in enumerate(inputs)}
    first = next((name for name, array in arrays.items() if array.ndim), None)
    if first is None:
        raise SourceError("the example inputs have no batch dimension; give at least one array of shape (N, ...)")
    batch = int(arrays[first].shape[0])
    front = {name: 0 for name, array in arrays.items() if array.ndim and array.shape[0] == batch}
    # Recurrent states: (layers, batch, features).
    second = {name: 1 for name, array in arrays.items() if name != first and array.ndim > 2 and array.shape[1] == batch}
    named = isinstance(inputs, Mapping)
    yield _dynamic(module, arrays, front, named=named)
    if second:
        yield _dynamic(module, arrays, front | second, named=named)
    whole = _call(module, arrays, {}, named=named)
    alone = whole if batch == 1 else _call(module, _first(arrays, second | front), {}, named=named)
    with computing(module, whole):
        together = _runs(module, whole, None)
        safe = not together or alone is whole or _is_part(module, alone, whole)
    if safe:
        yield alone
    if not together:
        rows = {name: array[0] for name, array in arrays.items() if array.ndim}
        yield _call(module, arrays | rows, {}, named=named)


def plain_call(module: nn.Module, inputs: Inputs) -> Call:
    """The call of forward on inputs as they are."""
    arrays = dict(inputs) if isinstance(inputs, Mapping) else {str(index): array for index, array in enumerate(inputs)}
    return _call(module, arrays, {}, named=isinstance(inputs, Mapping))


def _dynamic(module: nn.Module, arrays: Mapping[str, Array], axes: Mapping[str, int], *, named: bool) -> Call:
    """A call with a batch of at least two, because torch takes a batch of one for a constant."""
    twice = {
        name: np.concatenate([array, array], axes[name]) if name in axes and array.shape[axes[name]] == 1 else array
        for name, array in arrays.items()
    }
    return _call(module, twice, axes, named=named)


def _first(arrays: Mapping[str, Array], axes: Mapping[str, int]) -> dict[str, Array]:
    """The first sample of a batch."""
    return {name: array.take([0], axes[name]) if name in axes else array for name, array in arrays.items()}


def _call(module: nn.Module, arrays: Mapping[str, Array], axes: Mapping[str, int], *, named: bool) -> Call:
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    parameters = inspect.signature(module.forward).parameters
    by_place = [
        name for name, one in parameters.items() if one.kind is one.POSITIONAL_ONLY and name in tensors
    ] if named else list(tensors)  # fmt: skip
    kwargs = {name: tensor for name, tensor in tensors.items() if name not in by_place}
    opened = _open_axes(module, list(tensors), named=named) if axes else {}
    call = Call(
        tuple(tensors[name] for name in by_place), kwargs,
        {id(tensors[name]): axis for name, axis in axes.items()},
        {id(tensors[name]): found for name, found in opened.items()},
    )  # fmt: skip
    _check_signature(module, call)
    return call


def _open_axes(module: nn.Module, names: Sequence[str], *, named: bool) -> dict[str, tuple[int, ...]]:
    """The axes that a `torch.export` program was exported with as dynamic, by input."""
    nodes = module.graph.find_nodes(op="placeholder") if isinstance(module, torch.fx.GraphModule) else []
    keys = [str(node.target) for node in nodes] if named else names
    shapes = [getattr(node.meta.get("val"), "shape", ()) for node in nodes]
    return {
        key: tuple(axis for axis, size in enumerate(shape) if isinstance(size, torch.SymInt))
        for key, shape in zip(keys, shapes, strict=False)
        if key in names
    }


def _check_signature(module: nn.Module, call: Call) -> None:
    name, signature = type(module).__name__, inspect.signature(module.forward)
    try:
        bound = signature.bind(*call.args, **call.kwargs)
    except TypeError as error:
        given = ", ".join(call.kwargs) or f"{len(call.args)} positional"
        raise SourceError(
            f"the example inputs ({given}) do not fit {name}.forward{signature}: {error}; name and count them as forward does"
        ) from error
    loose = [key for key in bound.arguments if signature.parameters[key].kind is inspect.Parameter.VAR_KEYWORD]
    if loose:
        raise SourceError(
            f"{name}.forward{signature} takes its inputs by **{loose[0]}, which torch cannot trace; name them in forward"
        )


def _is_part(module: nn.Module, alone: Call, whole: Call) -> bool:
    """Whether a sample alone gives what it gives in a batch, so that what it was taken from is one."""
    try:
        with evaluating(module):
            ours = alone.run(module)
        with evaluating(module):
            theirs = whole.run(module)
    except Exception:  # whatever the user's code raises
        return False
    heads = [(tensor, theirs[name][: len(tensor)]) for name, tensor in ours.items() if tensor.dim() and name in theirs]
    return bool(heads) and not any(difference(as_array(tensor), as_array(head)) for tensor, head in heads)


def as_array(tensor: Tensor) -> Array:
    """Any tensor as an array; bfloat16, which NumPy does not know, as float32."""
    return np.asarray((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach())


def difference(ours: Array, theirs: Array) -> str:
    """How far apart two outputs are, for messages; empty within the tolerance."""
    if ours.shape != theirs.shape:
        return f"its shape {ours.shape} in the place of {theirs.shape}"
    wide = np.complex128 if np.iscomplexobj(theirs) else np.float64
    left, right = ours.astype(wide), theirs.astype(wide)
    known = np.isfinite(right)
    if not np.array_equal(left[~known], right[~known], equal_nan=True):
        return "numbers that are not finite"
    error = np.max(np.abs(left[known] - right[known]), initial=0.0)
    return "" if error <= TOLERANCE * np.max(np.abs(right[known]), initial=1e-6) else f"{error:.3g}"
