"""Shortcuts that pad channels with zeros become convolutions, whose widths can be cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekit.training.checkpoint import evaluating
from edgekit.training.forward import Call

_KINDS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_CONV = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


@dataclass(frozen=True, slots=True)
class Selection:
    """What a layer without weights does: it puts some input channels in some places, and zeros in the others.

    Attributes:
        weight: `(C_out, C_in, 1, ...)`, zeros and at most a single one in each row.
        stride: of the pixels that it takes, the first one included.
    """

    weight: Tensor
    stride: tuple[int, ...]

    def layer(self) -> nn.Module:
        """A convolution that does the same to the last bit; its weight is not trained."""
        outputs, inputs = self.weight.shape[:2]
        kind: Any = _KINDS[self.weight.dim()]
        conv: nn.Module = kind(inputs, outputs, 1, self.stride, bias=False)
        conv.weight = nn.Parameter(self.weight, requires_grad=False)
        return conv


def replace_shortcuts(module: nn.Module, call: Call) -> tuple[str, ...]:
    """Replace, in place, each layer without weights that pads channels with zeros; returns the paths of these layers.

    Such are the option-A shortcuts of residual networks for CIFAR, a strided slice and a padding. A layer is known by what it
    computes on random inputs, not by its class. Where the padding stands in the forward of a layer that does more, nothing changes.

    Reference: He et al. 2015, arXiv:1512.03385, section 4.2, option A.
    """
    shapes = _input_shapes(module, call)
    found: dict[int, nn.Module] = {}
    for child, seen in shapes.items():
        selections = [_selection(child, shape) for shape in seen]
        first = selections[0]
        if first is None or any(one is None or not _same(one, first) for one in selections):
            continue
        found[id(child)] = first.layer().train(child.training)
    paths = [path for path, child in module.named_modules(remove_duplicate=False) if id(child) in found]
    for path in paths:
        parent, _, name = path.rpartition(".")
        owner = module.get_submodule(parent)
        owner._modules[name] = found[id(owner._modules[name])]
    return tuple(paths)


def _input_shapes(module: nn.Module, call: Call) -> Mapping[nn.Module, list[torch.Size]]:
    """The shapes that each layer without tensors of its own is called with, where it is called with one tensor."""
    shapes: dict[nn.Module, list[torch.Size]] = {}
    odd: set[nn.Module] = set()

    def record(child: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and args[0].dim() in _KINDS:
            seen = shapes.setdefault(child, [])
            if args[0].shape not in seen:
                seen.append(args[0].shape)
        else:
            odd.add(child)

    weightless = [child for child in module.modules() if child is not module and not child.state_dict()]
    handles = [child.register_forward_pre_hook(record, with_kwargs=True) for child in weightless]
    try:
        with evaluating(module):
            call.run(module)
    finally:
        for handle in handles:
            handle.remove()
    return {child: seen for child, seen in shapes.items() if child not in odd}


def _selection(child: nn.Module, shape: torch.Size) -> Selection | None:
    """What a layer selects, if that is all it does and the number of channels changes."""
    generator = torch.Generator().manual_seed(0)
    probes = [torch.randn(shape, generator=generator) for _ in range(2)]
    levels = torch.randn((1, shape[1], *(1 for _ in shape[2:])), generator=generator).expand(shape).contiguous()
    try:
        with torch.no_grad(), evaluating(child):
            flat = child(levels.clone())
            outputs = [child(probe.clone()) for probe in probes]
    except Exception:  # whatever the user's code raises on numbers of another range
        return None
    if not _is_wider(flat, shape):
        return None
    stride = tuple(-(-size // out) for size, out in zip(shape[2:], flat.shape[2:], strict=True))
    made, given = flat.flatten(2)[0, :, 0], levels.flatten(2)[0, :, 0]
    weight = (made[:, None] == given[None]).to(torch.float32)
    weight = weight.reshape(*weight.shape, *(1 for _ in shape[2:]))
    if weight.flatten(1).sum(1).max() > 1:
        return None
    for probe, output in zip(probes, outputs, strict=True):
        ours = _CONV[len(shape)](probe, weight, stride=stride)
        if ours.shape != output.shape or not torch.equal(ours, output):
            return None
    return Selection(weight, stride)


def _is_wider(output: object, shape: torch.Size) -> bool:
    return (
        isinstance(output, Tensor)
        and output.dim() == len(shape)
        and output.shape[0] == shape[0]
        and output.shape[1] != shape[1]
        and 0 not in output.shape
    )


def _same(one: Selection, other: Selection) -> bool:
    return one.stride == other.stride and torch.equal(one.weight, other.weight)


def is_selection(layer: nn.Module) -> bool:
    """Whether a layer is a convolution that stands for a shortcut: its weight says nothing about what channels are worth."""
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) or layer.weight.requires_grad or layer.bias is not None:
        return False
    rows = layer.weight.detach().flatten(1)
    return bool(layer.weight[0, 0].numel() == 1 and ((rows == 0) | (rows == 1)).all() and (rows.sum(1) <= 1).all())
