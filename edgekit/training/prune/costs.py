"""What the layers of a module cost, and which groups of channels change that."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from edgekit.channels import LayerCost
from edgekit.training.checkpoint import evaluating
from edgekit.training.forward import Call
from edgekit.training.prune.couplings import Coupling
from edgekit.training.prune.heads import Attention, find_attention
from edgekit.training.prune.slots import CONV, is_tied, owner_of

MATMULS = ".attention"
"""Behind an attention's path, the name of what its two matrix products cost."""

_Shares = tuple[tuple[str, float], ...]


def layer_costs(
    module: nn.Module, call: Call, couplings: Sequence[Coupling], attentions: Sequence[Attention]
) -> tuple[LayerCost, ...]:
    """The cost of each convolution and linear layer that runs, and of the matrix products of attention.

    A layer that runs twice costs twice. Normalizations and activations are left out: runtimes fold them, or they are small.
    """
    macs = _counted(module, call, attentions)
    found: list[LayerCost] = []
    for name, weight in _weights(module, attentions).items():
        if name not in macs:
            continue
        owner, tensor = owner_of(module, weight)
        value, bias = getattr(owner, tensor), getattr(owner, tensor.replace("weight", "bias"), None)
        parameters = value.numel() + (bias.numel() if isinstance(bias, Tensor) else 0)
        reads, makes = _shares(owner, weight, value, couplings)
        found.append(LayerCost(name, macs[name], parameters, _widths(owner, value), reads, makes))
    for one in attentions:
        rows = one.rows[0]
        heads = _share_of(rows.tensor, rows.axis, rows.places.size, couplings)
        if one.path + MATMULS in macs:
            found.append(LayerCost(one.path + MATMULS, macs[one.path + MATMULS], 0, (one.inner, one.inner), (), heads))
    return tuple(found)


def costs_of(module: nn.Module, call: Call) -> tuple[LayerCost, ...]:
    """The costs of a module whose channels all stay."""
    return layer_costs(module, call, (), tuple(find_attention(module, call).values()))


def _weights(module: nn.Module, attentions: Sequence[Attention]) -> dict[str, str]:
    """The weight of each layer that multiplies, by the layer's name."""
    found = {}
    for path, child in module.named_modules():
        front = f"{path}." if path else ""
        if isinstance(child, CONV | nn.Linear):
            found[path] = f"{front}weight"
        elif isinstance(child, nn.MultiheadAttention) and any(one.path == path for one in attentions):
            found[f"{front}in_proj"] = f"{front}in_proj_weight"
    return found


def _widths(owner: nn.Module, weight: Tensor) -> tuple[int, int]:
    if isinstance(owner, CONV):
        return owner.in_channels, owner.out_channels
    return weight.shape[1], weight.shape[0]


def _counted(module: nn.Module, call: Call, attentions: Sequence[Attention]) -> dict[str, int]:
    """Multiply-accumulates of one sample, by the layer's name."""
    samples = next((one.shape[0] for one in (*call.args, *call.kwargs.values()) if one.dim()), 1)
    macs: dict[str, int] = defaultdict(int)

    def layer(path: str) -> Callable[..., None]:
        def count(child: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if isinstance(child, CONV):
                macs[path] += child.weight.numel() * math.prod((inputs[0] if child.transposed else output).shape[2:])
            else:
                macs[path] += child.weight.numel() * (output.numel() // (child.out_features * samples))

        return count

    handles = [
        child.register_forward_hook(layer(path))
        for path, child in module.named_modules()
        if isinstance(child, CONV | nn.Linear)
    ]
    handles += [
        module.get_submodule(one.path).register_forward_hook(_tokens(one, macs), with_kwargs=True) for one in attentions
    ]
    try:
        with evaluating(module):
            call.run(module)
    finally:
        for handle in handles:
            handle.remove()
    return dict(macs)


def _tokens(attention: Attention, macs: dict[str, int]) -> Callable[..., None]:
    """A hook that counts what an attention multiplies: queries with keys, weights with values, and torch's own its projections."""

    def count(child: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], _output: Any) -> None:
        own = isinstance(child, nn.MultiheadAttention)
        given = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor) and one.dim() >= 2]
        axis = 0 if own and not child.batch_first else -2
        queries = given[0].shape[axis]
        keys = given[1].shape[axis] if own else queries
        macs[attention.path + MATMULS] += 2 * queries * keys * attention.inner
        if own:
            assert child.in_proj_weight is not None, "known attentions have it"
            macs[f"{attention.path}.in_proj".lstrip(".")] += child.in_proj_weight.numel() // 3 * (queries + 2 * keys)
            macs[f"{attention.path}.out_proj".lstrip(".")] += child.out_proj.weight.numel() * queries

    return count


def _shares(owner: nn.Module, path: str, weight: Tensor, couplings: Sequence[Coupling]) -> tuple[_Shares, _Shares]:
    """The groups that a weight's input channels consist of, and its output channels, with their shares."""
    if isinstance(owner, CONV) and is_tied(owner):
        return (), _share_of(path, 0, weight.shape[0], couplings)
    inputs = 0 if isinstance(owner, CONV) and owner.transposed else 1
    return (
        _share_of(path, inputs, weight.shape[inputs], couplings),
        _share_of(path, 1 - inputs, weight.shape[1 - inputs], couplings),
    )


def _share_of(path: str, axis: int, size: int, couplings: Sequence[Coupling]) -> _Shares:
    found = {}
    for one in couplings:
        places = [
            slot.places.reshape(-1)
            for member in one.members
            for slot in member.slots
            if (slot.tensor, slot.axis) == (path, axis)
        ]
        if places:
            found[one.name] = len(np.unique(np.concatenate(places))) / size
    return tuple(found.items())
