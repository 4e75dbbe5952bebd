"""What of a layer goes with its channels: which tensors, along which axis, at which places; and its own record of its widths."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgekit.errors import SourceError
from edgekit.words import hint

Side = Literal["in", "out", "both"]
"""Channels of a layer's input, of its output, or of both where they are the same ones."""

Role = Literal["makes", "reads", "follows"]
"""A layer makes channels, reads them with weights of its own, or has numbers that go with them, such as a bias or a scale."""

Indices = NDArray[np.intp]

CONV = nn.modules.conv._ConvNd
NORM = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
_OF_CHANNELS = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True, slots=True)
class Slot:
    """Places in one tensor that go with units.

    Attributes:
        tensor: its path, as in `state_dict`.
        axis: along which they are cut.
        places: `(units, k)`, what goes with each unit.
    """

    tensor: str
    axis: int
    places: Indices


@dataclass(frozen=True, slots=True)
class Member:
    """A layer's share in a group.

    Attributes:
        layer: its path.
        role: what it does with the channels.
        slots: what is cut from it; the first one is what a criterion looks at.
        channels: of the layer at that side that belong to each unit, `(units, k)`.
    """

    layer: str
    role: Role
    slots: tuple[Slot, ...]
    channels: Indices

    def of_units(self, units: Indices) -> Member:
        """The same for some units only."""
        slots = tuple(Slot(slot.tensor, slot.axis, slot.places[units]) for slot in self.slots)
        return Member(self.layer, self.role, slots, self.channels[units])


def is_tied(conv: nn.Module) -> bool:
    """Whether a convolution's groups have one input channel each, as depthwise ones do: a group goes as a whole."""
    return isinstance(conv, CONV) and conv.groups > 1 and conv.in_channels == conv.groups


def width(module: nn.Module, side: Side) -> int | None:
    """How many channels a layer has at a side; None for one whose channels cannot be cut."""
    if isinstance(module, CONV):
        if conv_is_odd(module):
            return None
        return module.in_channels if side == "in" else module.out_channels
    if isinstance(module, nn.Linear):
        return module.in_features if side == "in" else module.out_features
    if isinstance(module, NORM):
        return module.num_features
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return module.normalized_shape[0] if len(module.normalized_shape) == 1 else None
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    if isinstance(module, nn.PReLU):
        return module.num_parameters
    return module.embedding_dim if isinstance(module, nn.Embedding) else None


def conv_is_odd(module: nn.Module) -> bool:
    """Whether its groups take several channels and put out one: nothing of it can be cut evenly."""
    return isinstance(module, CONV) and 1 < module.groups == module.out_channels != module.in_channels


def role(module: nn.Module, side: Side) -> Role:
    """What a layer does with the channels at one of its sides."""
    if side == "in":
        return "reads"
    return "makes" if isinstance(module, CONV | nn.Linear | nn.Embedding) else "follows"


def bound_channels(module: nn.Module, side: Side) -> Indices | None:
    """Channels of a side that can only go together, `(bundles, k)`; None where each is alone.

    Grouped convolutions lose the same channel of each group, a GroupNorm whole groups: the rest is normalized as before.
    """
    count = width(module, side)
    if count is None:
        return None
    if isinstance(module, CONV) and module.groups > 1:
        places = np.arange(count).reshape(module.groups, -1)
        return places if is_tied(module) else places.T
    if isinstance(module, nn.GroupNorm) and module.num_groups > 1:
        return np.arange(count).reshape(module.num_groups, -1)
    return None


def slots_of(path: str, module: nn.Module, side: Side, channels: Indices) -> tuple[Slot, ...]:
    """What is cut from a layer with channels at one side, shape `(units, k)`; empty where only its record of widths changes."""
    if isinstance(module, CONV):
        found = _of_conv(module, side, channels)
    elif isinstance(module, nn.Linear):
        found = [("weight", 1, channels)] if side == "in" else [("weight", 0, channels), ("bias", 0, channels)]
    elif isinstance(module, nn.Embedding):
        found = [("weight", 1, channels)]
    else:
        found = [(name, 0, channels) for name in _OF_CHANNELS]
    front = f"{path}." if path else ""
    return tuple(
        Slot(f"{front}{name}", axis, places)
        for name, axis, places in found
        if isinstance(getattr(module, name, None), Tensor)
    )


def _of_conv(conv: CONV, side: Side, channels: Indices) -> list[tuple[str, int, Indices]]:
    per_group = conv.out_channels // conv.groups
    inputs = conv.in_channels // conv.groups
    if is_tied(conv):
        if side == "in" and per_group > 1:
            return [("weight", 0, channels)] if conv.transposed else []
        rows = [] if conv.transposed and per_group > 1 else [("weight", 0, channels)]
        return [*rows, ("bias", 0, channels)]
    if side == "in":
        return [("weight", 0, channels) if conv.transposed else ("weight", 1, _within(channels, inputs))]
    rows = [("weight", 1, _within(channels, per_group)) if conv.transposed else ("weight", 0, channels)]
    return [*rows, ("bias", 0, channels)]


def _within(channels: Indices, size: int) -> Indices:
    """Places within a group of convolution's channels that come once for each group."""
    return np.stack([np.unique(row % size) for row in channels]) if len(channels) else channels


def cut_tensors(module: nn.Module, removed: Mapping[tuple[str, int], Indices]) -> None:
    """Take places out of tensors, in place: parameters stay parameters, of the same names, with their gradients.

    Args:
        module: the network.
        removed: places to take out, by the tensor's path and the axis.
    """
    tensors: dict[int, tuple[Tensor, dict[int, Indices]]] = {}  # tied weights are one tensor of several names
    for (path, axis), places in removed.items():
        owner, name = owner_of(module, path)
        value = getattr(owner, name)
        axes = tensors.setdefault(id(value), (value, {}))[1]
        axes[axis] = np.union1d(axes[axis], places) if axis in axes else np.unique(places)
    for value, axes in tensors.values():
        new, gradient = value.detach(), value.grad
        for axis, places in axes.items():
            keep = torch.from_numpy(np.setdiff1d(np.arange(value.shape[axis]), places)).to(value.device)
            new = new.index_select(axis, keep)
            gradient = None if gradient is None else gradient.index_select(axis, keep)
        if isinstance(value, nn.Parameter):
            new = nn.Parameter(new, requires_grad=value.requires_grad)
            new.grad = gradient
        _put_everywhere(module, value, new)


def _put_everywhere(module: nn.Module, old: Tensor, new: Tensor) -> None:
    """Replace a tensor under all its names: tied weights stay tied."""
    for child in module.modules():
        for table in (child._parameters, child._buffers):
            for name, value in table.items():
                if value is old:
                    table[name] = new  # type: ignore[assignment]


def owner_of(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds a tensor or child, and the last part of its path."""
    parent, _, name = path.rpartition(".")
    return module.get_submodule(parent), name


def write_widths(modules: Iterable[nn.Module]) -> None:
    """Let layers know how wide their tensors are after a cut."""
    for module in modules:
        if isinstance(module, CONV):
            _write_conv(module)
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, nn.Embedding):
            module.embedding_dim = module.weight.shape[1]


def _write_conv(conv: CONV) -> None:
    per_group, inputs, first = conv.out_channels // conv.groups, conv.in_channels // conv.groups, conv.weight.shape[0]
    if is_tied(conv):
        conv.groups = first if conv.transposed else first // per_group
        conv.in_channels, conv.out_channels = conv.groups * inputs, conv.groups * per_group
    elif conv.transposed:
        conv.in_channels, conv.out_channels = first, conv.weight.shape[1] * conv.groups
    else:
        conv.out_channels, conv.in_channels = first, conv.weight.shape[1] * conv.groups


def write_count(module: nn.Module, count: int) -> None:
    """Let a normalization or PReLU know how many channels are left; it may have no tensor that shows it."""
    changed: dict[str, Any] = {}
    if isinstance(module, NORM):
        changed = {"num_features": count}
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        changed = {"normalized_shape": (count,)}
    elif isinstance(module, nn.GroupNorm):
        groups = module.num_groups
        changed = {"num_channels": count, "num_groups": groups * count // module.num_channels if groups > 1 else 1}
    elif isinstance(module, nn.PReLU):
        changed = {"num_parameters": count}
    for name, value in changed.items():
        setattr(module, name, value)


def ignored(module: nn.Module, patterns: Sequence[str]) -> list[nn.Module]:
    """The layers that patterns match, and what is inside them; SourceError for a pattern that matches none."""
    names = [path for path, _ in module.named_modules() if path]
    found: list[nn.Module] = []
    for pattern in patterns:
        matched = [path for path in names if fnmatchcase(path, pattern)]
        if not matched:
            raise SourceError(f"no layer matches {pattern!r} in 'ignore'; {hint(pattern, names)}")
        found += [child for path in matched for child in module.get_submodule(path).modules()]
    return found
