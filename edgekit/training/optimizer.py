"""Which parameters are trained how fast, and how far gradients may reach."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from edgekit.errors import SourceError
from edgekit.schedule import Schedule
from edgekit.training.fake_quant import quantizers

MOMENTUM = 0.9
SCALE = "scale"
"""The last part of the name of a learned scale, of quantizers other than edgekit's."""


def make_optimizer(modules: Sequence[nn.Module], schedule: Schedule) -> torch.optim.Optimizer:
    """An optimizer for all parameters that want a gradient, in the groups that `Schedule` tells of.

    Each group's `initial_lr` is its highest learning rate.

    Raises:
        SourceError: no parameter wants a gradient.

    Reference: Loshchilov, Hutter (2017), "Decoupled Weight Decay Regularization", arXiv:1711.05101, for "adamw".
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    seen: set[int] = set()
    gains = {id(one) for module in modules for grid in quantizers(module) for one in grid.parameters()}
    for module in modules:
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            is_scale = id(parameter) in gains or name.rpartition(".")[2] == SCALE
            rate = schedule.learning_rate * (schedule.scale_learning_rate if is_scale else 1.0)
            decay = 0.0 if is_scale or parameter.ndim <= 1 else schedule.weight_decay
            groups.setdefault((rate, decay), []).append(parameter)
    if not groups:
        names = ", ".join(type(module).__name__ for module in modules)
        raise SourceError(f"{names}: no parameter wants a gradient (requires_grad); there is nothing to train")
    tables = [
        {"params": parameters, "lr": rate, "initial_lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]
    fused = all(one.dtype == torch.float32 and one.device.type in ("cpu", "cuda") for one in trained(tables))
    if schedule.optimizer == "sgd":
        return torch.optim.SGD(tables, lr=schedule.learning_rate, momentum=MOMENTUM, fused=fused or None)
    return torch.optim.AdamW(tables, lr=schedule.learning_rate, fused=fused or None)


def trained(groups: Sequence[dict[str, object]]) -> list[nn.Parameter]:
    """All parameters of an optimizer's groups."""
    return [one for group in groups for one in group["params"]]  # type: ignore[attr-defined]


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Each group's learning rate, as a share of its highest."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
