"""Cutting units out of a network, and the proof that what is left computes what it should."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from edgekit.training.checkpoint import evaluating, users_error
from edgekit.training.forward import Call
from edgekit.training.prune.attention import HeadAttention
from edgekit.training.prune.attention_forward import fewer_heads, fixed_width
from edgekit.training.prune.couplings import Coupling
from edgekit.training.prune.heads import TRACED, Attention, write_heads
from edgekit.training.prune.padded_forward import put
from edgekit.training.prune.slots import Indices, cut_tensors, owner_of, width, write_count, write_widths

ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}
"""How far outputs may be apart, of the largest magnitude: sums in another order differ by less, a wrong channel by more."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Units that go.

    Attributes:
        coupling: whose.
        removed: their numbers, sorted.
    """

    coupling: Coupling
    removed: Indices


def remove_units(
    module: nn.Module, cuts: Sequence[Cut], attentions: Sequence[Attention], records: Mapping[str, str]
) -> None:
    """Take units out of all layers that they are part of, in place.

    Args:
        module: the network.
        cuts: what goes.
        attentions: all that are known, as they are before the cut.
        records: by the path of an attention, which of its attributes change with the number of heads.
    """
    places: dict[tuple[str, int], Indices] = {}
    gone: dict[str, int] = defaultdict(int)
    for cut in cuts:
        for member in cut.coupling.members:
            some = member.of_units(cut.removed)
            for slot in some.slots:
                key = (slot.tensor, slot.axis)
                places[key] = np.union1d(places.get(key, np.array([], np.intp)), slot.places)
            gone[member.layer] += some.channels.size if member.role == "follows" else 0
    layers = {path: module.get_submodule(path) for path in gone if not _is_tensor(module, path)}
    counts = {path: (width(layer, "both") or 0) - gone[path] for path, layer in layers.items() if gone[path]}
    cut_tensors(module, places)
    write_widths(layers.values())
    for path, count in counts.items():
        write_count(layers[path], count)
    for attention in attentions:
        if any(tensor.startswith(f"{attention.path}.") for tensor, _ in places):
            _let_know(module, attention, records.get(attention.path, "all"))


def _is_tensor(module: nn.Module, path: str) -> bool:
    owner, name = owner_of(module, path) if path else (module, "")
    return name in owner._parameters


def _let_know(module: nn.Module, attention: Attention, record: str) -> None:
    child = module.get_submodule(attention.path)
    row = attention.rows[0]
    owner, name = owner_of(module, row.tensor)
    left = getattr(owner, name).shape[row.axis]
    kept = attention.units * left // row.places.size
    if not isinstance(child, nn.MultiheadAttention):
        _write_own(module, child, attention, kept, record)
        return
    child = HeadAttention.of(child)
    parent, name = owner_of(module, attention.path)
    parent._modules[name] = child
    assert child.in_proj_weight is not None, "known attentions have it"
    child.num_heads, child.embed_dim = kept, child.in_proj_weight.shape[1]
    child.kdim = child.vdim = child.embed_dim


def _write_own(module: nn.Module, child: nn.Module, attention: Attention, kept: int, record: str) -> None:
    inner = attention.inner // attention.units * kept
    if isinstance(child, fx.GraphModule):
        fewer_heads(child, (attention.units, kept), (attention.inner, inner))
        return
    write_heads(child, attention, kept, record)
    new = fixed_width(child, kept, inner) if record == TRACED else None
    if new is not None:
        put(module, attention.path, new)


def mask_units(module: nn.Module, cuts: Sequence[Cut]) -> None:
    """Make units count for nothing, in place: zeros where their channels are read, and out of the statistics of normalizations.

    What a unit's channels hold does not matter then, whatever activations stand between.
    """
    hidden: dict[str, list[Indices]] = defaultdict(list)
    zeros: list[tuple[Tensor, int, Indices]] = []
    for cut in cuts:
        for member in cut.coupling.members:
            some = member.of_units(cut.removed)
            if member.role == "follows" and not _is_tensor(module, member.layer):
                hidden[member.layer].append(some.channels.reshape(-1))
            for slot in some.slots[:1] if member.role == "reads" else ():
                owner, name = owner_of(module, slot.tensor)
                zeros.append((getattr(owner, name), slot.axis, np.unique(slot.places)))
    with torch.no_grad():
        for tensor, axis, places in zeros:
            tensor.index_fill_(axis, torch.from_numpy(places), 0.0)
    for path, channels in hidden.items():
        layer = module.get_submodule(path)
        if isinstance(layer, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm):
            kept = np.setdiff1d(np.arange(width(layer, "both") or 0), np.concatenate(channels))
            layer.register_forward_hook(_normalizing(layer, torch.from_numpy(kept)))


def _normalizing(layer: nn.Module, kept: Tensor) -> Any:
    """A hook: the layer's result where its other channels are left out."""
    count = width(layer, "both")
    narrow = copy.deepcopy(layer)
    narrow._forward_hooks.clear()
    for table in (narrow._parameters, narrow._buffers):
        for name, value in table.items():
            if value is not None and value.dim() == 1 and len(value) == count:
                table[name] = nn.Parameter(value.detach()[kept])
    write_count(narrow, len(kept))

    def replace(_layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # A LayerNorm of a class of its own may move axis 1 to the end by itself.
        last = type(layer) in (nn.LayerNorm, nn.RMSNorm) or (inputs[0].shape[1] != count)
        axis = -1 if last and not isinstance(layer, nn.GroupNorm) else 1
        new = narrow.to(output.dtype)(inputs[0].index_select(axis, kept))
        return torch.zeros_like(output).index_copy(axis, kept, new)

    return replace


def prove(
    module: nn.Module,
    pruned: nn.Module | None,
    call: Call,
    cuts: Sequence[Cut],
    attentions: Sequence[Attention],
    records: Mapping[str, str],
) -> str:
    """What is wrong with a cut; empty if the pruned network computes what the masked original does.

    Args:
        module: the network before the cut.
        pruned: after it; None for a copy that is cut here.
        call: inputs.
        cuts: what goes.
        attentions, records: as in `remove_units`.
    """
    masked = copy.deepcopy(module)
    mask_units(masked, cuts)
    if pruned is None:
        pruned = copy.deepcopy(module)
        try:
            remove_units(pruned, cuts, attentions, records)
        except (IndexError, ValueError, RuntimeError) as error:  # its places do not fit the tensors
            return users_error(error)
    else:
        pruned = copy.deepcopy(pruned)
    for dtype in ROUNDING:
        wide = _cast(call, dtype)
        try:
            with evaluating(masked):
                theirs = wide.run(masked.to("cpu", dtype))
        except Exception as error:  # whatever the user's code raises, such as on float64
            if dtype is torch.float32:
                return f"with them masked forward raises {users_error(error)}"
            continue
        try:
            with evaluating(pruned):
                ours = wide.run(pruned.to("cpu", dtype))
        except Exception as error:  # whatever the user's code raises where it counts on a width
            return f"without them forward raises {users_error(error)}"
        return next((told for told in _differences(ours, theirs, ROUNDING[dtype]) if told), "")
    raise AssertionError("the last type returns or raises")


def _differences(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], tolerance: float) -> list[str]:
    if ours.keys() != theirs.keys():
        return ["other outputs"]
    return [_difference(name, ours[name], theirs[name], tolerance) for name in ours]


def _difference(name: str, ours: Tensor, theirs: Tensor, tolerance: float) -> str:
    if ours.shape != theirs.shape:
        return f"output {name!r} has the shape {tuple(ours.shape)} in the place of {tuple(theirs.shape)}"
    if not theirs.numel() or torch.equal(ours, theirs):
        return ""
    if not theirs.is_floating_point():
        return f"output {name!r} differs"
    known = torch.isfinite(theirs)
    if not torch.equal(known, torch.isfinite(ours)):
        return f"output {name!r} has numbers that are not finite"
    if not known.any():
        return ""
    error = float((ours[known] - theirs[known]).abs().max())
    size = float(theirs[known].abs().max())
    if error <= tolerance * max(size, 1e-6):
        return ""
    return f"output {name!r} is off by {error:.3g} where these channels are masked (largest magnitude {size:.3g})"


def _cast(call: Call, dtype: torch.dtype) -> Call:
    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return Call(tuple(map(cast, call.args)), {name: cast(one) for name, one in call.kwargs.items()}, {}, {})
