"""The state_dict in a checkpoint that fits a model, found under whatever names and prefixes it was saved."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from edgekit.errors import SourceError
from edgekit.words import some

NESTED = (
    *("state_dict", "model_state_dict", "model_state", "model", "ema_state_dict", "ema", "module", "net", "weights"),
    *("params_ema", "params"),
)
"""Where training scripts put the weights, best first; other names are tried after these."""

TRAINING_ONLY = re.compile(
    r"(.*\.)?(num_batches_tracked|n_averaged|total_ops|total_params)|"
    r"(.*\.)?(criterion|criteria|(\w+_)?loss(_fn|es)?|(\w+_)?metrics?|(\w+_)?teacher(_\w+)?)\..*"
)
"""Names of what stands in checkpoints for training, for averaging and for counting operations: no model misses it."""

_SHOWN = 5
_DEPTH = 2
_PROBES = 50
# What torch puts into the middle of a name when it wraps a module.
_WRAPPED = re.compile(r"(?<![^.])(_orig_mod|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PARAMETRIZED = re.compile(r"(?<![^.])parametrizations\.(\w+)\.(original0|original1|original|0\._u|0\._v)$")
_AS_HOOKS = {"original0": "_g", "original1": "_v", "original": "_orig", "0._u": "_u", "0._v": "_v"}
State = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Fit:
    """Weights by the model's names, how many of its names they have, and what does not fit."""

    weights: dict[str, Any]
    hits: int
    problems: tuple[str, ...]


def states_in(found: object, path: Path) -> list[tuple[str, State]]:
    """Everything in a file that may be a state_dict, under the names that lead there, best first."""
    if not isinstance(found, Mapping):
        raise SourceError(f"{path} holds a {type(found).__name__}, no state_dict; save model.state_dict()")
    states = list(_inner_states(found, "", _DEPTH))
    if not states:
        keys = ", ".join(repr(key) for key in list(found)[:_SHOWN]) or "none"
        raise SourceError(
            f"{path} holds no tensors (its keys: {keys}); save model.state_dict(), alone or under 'state_dict'"
        )
    return states


def _inner_states(found: Mapping[Any, Any], name: str, depth: int) -> Iterator[tuple[str, State]]:
    if any(isinstance(value, Tensor) for value in found.values()):
        yield name, {str(key): value for key, value in found.items() if isinstance(value, Tensor) or _is_extra(key)}
    for key in sorted(found, key=lambda key: NESTED.index(key) if key in NESTED else len(NESTED)):
        if depth and isinstance(found[key], Mapping):
            yield from _inner_states(found[key], f"{name}.{key}".lstrip("."), depth - 1)


def fill(module: nn.Module, states: Sequence[tuple[str, State]], found: object, path: Path) -> None:
    """Copy the first of the states that fits into the module, once every key and shape does.

    Raises:
        SourceError: none fits, or it does not show which one is meant.
    """
    states = [*states, ("", _joined(found, module))]
    fits = [_fit(module, state) for _, state in states]
    if all(fit.problems for fit in fits):  # one of both may have plain weights where the other computes them
        nearest = max(fits, key=lambda fit: fit.hits)
        remove_parametrizations(module)
        _remove_hooks(module)
        fits = [_fit(module, _plain(state)) for _, state in states]
        if all(fit.problems for fit in fits):
            _check_not_quantized(states, path)
            raise SourceError(
                f"{path} does not fit the model {type(module).__name__}: {'; '.join(nearest.problems)}; "
                "let the factory build the model with the arguments that it was trained with"
            )
    good = [(name, fit) for (name, _), fit in zip(states, fits, strict=True) if not fit.problems]
    if len(good) > 1 and good[0][0].partition(".")[0] not in ("", *NESTED):
        listed = some([name for name, _ in good])
        raise SourceError(
            f"{path} holds weights for this model {len(good)} times: {listed}; save the wanted ones alone"
        )
    try:
        module.load_state_dict(good[0][1].weights, strict=False)
    except RuntimeError as error:  # a module's own way to load
        raise SourceError(
            f"{path} does not load into the model {type(module).__name__}: {' '.join(str(error).split())}"
        ) from error


def remove_parametrizations(module: nn.Module) -> Callable[[], None]:
    """Make plain weights of what parametrizations compute, in place; returns what puts the parametrizations back.

    torch's own function of this name takes the property off a class that copies of the module share.
    """
    removed = []
    for child in [child for child in module.modules() if parametrize.is_parametrized(child)]:
        inner = child.parametrizations
        assert isinstance(inner, nn.ModuleDict)
        values = {name: getattr(child, name).detach() for name in inner}
        removed.append((child, type(child), dict(child._modules), dict(child._parameters)))
        child.__class__ = type(child).__bases__[0]
        del child._modules["parametrizations"]
        for name, value in values.items():
            child.register_parameter(name, nn.Parameter(value, requires_grad=value.is_floating_point()))

    def restore() -> None:
        for child, kind, modules, parameters in removed:
            child._modules.clear()
            child._modules.update(modules)
            child._parameters.clear()
            child._parameters.update(parameters)
            child.__class__ = kind

    return restore


def _remove_hooks(module: nn.Module) -> None:
    """The older kind of parametrizations, which compute weights before each forward."""
    for child in module.modules():
        for hook in list(child._forward_pre_hooks.values()):
            if isinstance(hook, WeightNorm):
                remove_weight_norm(child, hook.name)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(child, hook.name)
            elif isinstance(hook, prune.BasePruningMethod):
                prune.remove(child, hook._tensor_name)  # type: ignore[no-untyped-call]


def _check_not_quantized(states: Sequence[tuple[str, State]], path: Path) -> None:
    entries = [entry for _, state in states for entry in state.items()]
    quantized = [
        name
        for name, value in entries
        if name.endswith("_packed_params") or (isinstance(value, Tensor) and value.is_quantized)
    ]
    if quantized:
        raise SourceError(
            f"{path} holds quantized weights: {some(quantized)}; give the float checkpoint that they were made from"
        )


def _is_extra(key: object) -> bool:
    """Whether an entry of a state_dict is a module's own, of any type."""
    return str(key).endswith(("_extra_state", "_packed_params"))


def _joined(found: object, module: nn.Module) -> State:
    """The state_dicts of a model's parts, saved one beside the other, as one."""
    parts = {name: found.get(name) for name, _ in module.named_children()} if isinstance(found, Mapping) else {}
    states = {name: state for name, state in parts.items() if isinstance(state, Mapping)}
    return {f"{name}.{key}": value for name, state in states.items() for key, value in state.items()}


def _fit(module: nn.Module, state: State) -> _Fit:
    expected = module.state_dict()
    weights = _renamed(state, expected)
    buffers = dict(module.named_buffers())
    tied = {_place(expected[key]) for key in weights if isinstance(expected.get(key), Tensor)}
    missing = [
        key
        for key, value in expected.items()
        if key not in weights and _place(value) not in tied and not _is_table(key, buffers.get(key))
    ]
    strange = [key for key in weights if key not in expected and not TRAINING_ONLY.fullmatch(key)]
    known = {key: value for key, value in weights.items() if key in expected and not _is_miscounted(key, value)}
    pairs = [
        (key, value, expected[key])
        for key, value in known.items()
        if isinstance(value, Tensor) and _is_sized(expected[key])
    ]
    found = (
        ("missing", missing),
        ("unexpected", [key for key in strange if not _same(weights[key], buffers.get(key))]),
        ("of another shape", [
            f"{key} {tuple(ours.shape)} where the model has {tuple(theirs.shape)}"
            for key, ours, theirs in pairs if ours.shape != theirs.shape
        ]),
        ("of another type", [
            f"{key} {ours.dtype} where the model has {theirs.dtype}" for key, ours, theirs in pairs if _kind(ours) != _kind(theirs)
        ]),
    )  # fmt: skip
    problems = tuple(f"{len(names)} {what}: {some(names)}" for what, names in found if names)
    return _Fit(known, len(known), problems)


def _is_table(key: str, buffer: Tensor | None) -> bool:
    """Whether a model makes a buffer itself: counts of batches, positions and other whole numbers."""
    return key.endswith("num_batches_tracked") or (_is_sized(buffer) and not _kind(buffer))


def _is_miscounted(key: str, value: object) -> bool:
    """Whether this is a count of batches of an old or cast checkpoint, which is no whole number alone."""
    return key.endswith("num_batches_tracked") and isinstance(value, Tensor) and (value.dim() > 0 or _kind(value) > 0)


def _is_sized(value: object) -> TypeGuard[Tensor]:
    """A tensor whose shape is known, as that of a lazy module is not before it runs."""
    return isinstance(value, Tensor) and not is_lazy(value)


def _kind(tensor: Tensor) -> int:
    """0 for whole numbers and truth values, 1 for real ones, 2 for complex ones."""
    return 2 if tensor.is_complex() else int(tensor.is_floating_point())


def _same(ours: object, theirs: Tensor | None) -> bool:
    """Whether a checkpoint has what the model makes itself and does not save: positions, masks."""
    if not isinstance(ours, Tensor) or not _is_sized(theirs) or ours.shape != theirs.shape:
        return False
    return bool(torch.allclose(ours.to(theirs.dtype), theirs))


def _renamed(state: State, expected: Mapping[str, object]) -> dict[str, Any]:
    """Weights under the names that the model was written with: without what wrapping and nesting put before them."""
    dense = {key: value.to_dense() if _is_sparse(value) else value for key, value in state.items()}
    weights = {_WRAPPED.sub("", key): value for key, value in dense.items()}
    names = {_WRAPPED.sub("", key): key for key in expected}
    probes = list(names)[:_PROBES]
    before = {key[: -len(name)] for name in probes for key in weights if key.endswith(f".{name}")}
    inside = {name[: -len(key)] for key in list(weights)[:_PROBES] for name in names if name.endswith(f".{key}")}
    moves = [("", ""), *((cut, "") for cut in _shortest_first(before)), *(("", put) for put in _shortest_first(inside))]
    moves.sort(key=lambda move: TRAINING_ONLY.fullmatch(f"{move[0]}x") is not None)
    cut, put = max(moves, key=lambda move: len(_moved(weights, *move).keys() & names.keys()))
    moved = _moved(weights, cut, put)
    for key, value in weights.items():
        if not key.startswith(cut):
            moved[f".{key}" if key in moved else key] = value
    return {names.get(key, key): value for key, value in moved.items()}


def _moved(weights: State, cut: str, put: str) -> dict[str, Any]:
    """The weights under the prefix `cut`, with `put` in its place."""
    return {f"{put}{key.removeprefix(cut)}": value for key, value in weights.items() if key.startswith(cut)}


def _shortest_first(prefixes: set[str]) -> list[str]:
    return sorted(prefixes, key=lambda prefix: (len(prefix), prefix))


def _is_sparse(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.layout is not torch.strided


def _plain(state: State) -> dict[str, Any]:
    """A state_dict with the weights that weight_norm, spectral_norm and pruning compute from what is in it."""
    weights = {
        _PARAMETRIZED.sub(lambda found: found[1] + _AS_HOOKS[found[2]], key): value for key, value in state.items()
    }
    for key in [key for key in weights if key.endswith(("_g", "_orig"))]:
        name = key.rpartition("_")[0]
        g, v, u, original, mask = (weights.get(f"{name}_{end}") for end in ("g", "v", "u", "orig", "mask"))
        if g is not None and v is not None:
            weights[name] = v * (g / _norm_beside(v, g))
        elif original is not None and mask is not None:
            weights[name] = original * mask
        elif original is not None and u is not None and v is not None:
            weights[name] = original / _largest_singular_value(original, u, v)
        else:
            continue
        for end in ("g", "v", "u", "orig", "mask"):
            weights.pop(f"{name}_{end}", None)
    return weights


def _norm_beside(direction: Tensor, magnitude: Tensor) -> Tensor:
    """The norm of a weight along the axes that its magnitude has only one number for."""
    axes = [axis for axis, size in enumerate(magnitude.shape) if size == 1]
    norm: Tensor = torch.linalg.vector_norm(direction, dim=axes or None, keepdim=bool(axes))
    return norm


def _largest_singular_value(weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """As spectral_norm estimates it, from the vectors that training has brought close to the singular ones."""
    axis = 0 if weight.shape[0] == len(u) else 1
    largest: Tensor = u @ (weight.movedim(axis, 0).flatten(1) @ v)
    return largest


def _place(value: object) -> object:
    """What two names of one shared tensor have in common, and no others do."""
    if _is_sized(value) and value.numel():
        return value.data_ptr(), value.shape, value.stride()
    return id(value)
