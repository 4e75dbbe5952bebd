"""What channels are worth: criteria from the literature, each a function from a group to scores.

Scores of different groups have to be comparable. A layer's weights have a scale of their own, which a normalization behind it takes
out again, so each layer's share is divided by its mean over the units; then the shares of all layers that lose weights with a unit
are added up, of those that make its channels and of those that read them. A unit that many layers use is worth more than one of few.
(ResNet-20 on CIFAR-10 JPEGs, 35 % of the MACs cut in one shot by squares of weights: 0.37 top-1 this way, 0.30 with the makers alone,
0.19 when the sum is divided by the group's mean as well.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from edgekit.errors import DataError
from edgekit.training.checkpoint import evaluating
from edgekit.training.prune.groups import Importance, Part, TensorGroup
from edgekit.training.prune.slots import NORM
from edgekit.training.taps import outputs_of

Batch = Mapping[str, Tensor]
Loss = Callable[[Mapping[str, Tensor], Batch], Tensor]
"""From outputs by name and the batch to a number to minimize, a mean over the batch."""

MEAN, SQUARE = "mean", "square"
"""The gradients that a criterion reads: their mean over the batches, or the root of their mean square."""


def l1(group: TensorGroup) -> Tensor:
    """Magnitudes of the weights that go with a unit.

    Reference: Li et al. 2017, "Pruning Filters for Efficient ConvNets", arXiv:1608.08710, section 3.1; there for the filters that make
    a channel.
    """
    return _added(group, _multiplying(group), lambda part: part.weight.abs())


def l2(group: TensorGroup) -> Tensor:
    """Squares of the weights that go with a unit."""
    return _added(group, _multiplying(group), lambda part: part.weight**2)


def bn(group: TensorGroup) -> Tensor:
    """Magnitudes of the scales that BatchNorm multiplies a unit's channels with.

    Meant for networks that were trained with a penalty on these. Groups without a BatchNorm that has scales get `l1`.

    Reference: Liu et al. 2017, "Learning Efficient Convolutional Networks through Network Slimming", arXiv:1708.06519, section 3.
    """
    norms = [part for part in group.parts if isinstance(part.module, NORM)]
    return _added(group, norms, lambda part: part.weight.abs()) if norms else l1(group)


def taylor(group: TensorGroup) -> Tensor:
    """How much the loss changes without a unit, to first order: squares of weight times gradient.

    Reference: Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", arXiv:1906.10771, equations 6 and 7.

    Raises:
        DataError: no gradients were gathered.
    """
    return _added(group, _multiplying(group), lambda part: (part.weight * _gradient(group, part)) ** 2)


def hessian(group: TensorGroup) -> Tensor:
    """How much the loss grows without a unit, to second order at a minimum: curvature times the weight squared.

    The curvature is the diagonal of the empirical Fisher matrix, the mean square of the gradients (`SQUARE`).

    Reference: LeCun, Denker, Solla 1990, "Optimal Brain Damage", equation 3, without the factor of one half.

    Raises:
        DataError: no gradients were gathered.
    """
    return taylor(group)  # of root mean squares in the place of means


def fpgm(group: TensorGroup) -> Tensor:
    """How far the filters that make a unit are from all others of their layers: near the geometric median they can be replaced.

    Reference: He et al. 2019, "Filter Pruning via Geometric Median", arXiv:1811.00250, equation 6.
    """
    makers = [part for part in group.parts if part.role == "makes"]
    exact = "donot_use_mm_for_euclid_dist"  # products lose half the digits of small distances
    return _added(group, makers, lambda part: torch.cdist(part.weight, part.weight, compute_mode=exact))


def seeded(seed: int) -> Importance:
    """Random scores, the same for a seed and a group's name."""

    def random(group: TensorGroup) -> Tensor:
        rng = np.random.default_rng([seed, *group.name.encode()])
        return torch.from_numpy(rng.uniform(0.1, 1.0, group.units))

    return random


IMPORTANCE: dict[str, Importance] = {
    "l1": l1,
    "l2": l2,
    "bn": bn,
    "taylor": taylor,
    "hessian": hessian,
    "random": seeded(0),
    "fpgm": fpgm,
}
"""The criteria, by name."""

GRADIENTS: dict[str, str] = {"taylor": MEAN, "hessian": SQUARE}
"""The gradients that criteria need, by the name of the criterion; `gather_gradients` gathers them."""


def gather_gradients(module: nn.Module, batches: Iterable[Batch], loss: Loss, *, kind: str = MEAN) -> int:
    """Leave the gradients of a loss in the parameters of a module, in eval mode; returns the number of batches.

    Args:
        module: the copy that is pruned, `Prunable.module`.
        batches: inputs by name, with labels where the loss needs them.
        loss: of outputs by name and the batch, a mean.
        kind: `MEAN` over the batches, or `SQUARE`: the root of the mean of the squared gradients. Small batches make it sharper.

    Raises:
        DataError: there are no batches, or a loss is not finite.
    """
    total: dict[nn.Parameter, Tensor] = {}
    count = 0
    module.zero_grad()
    with evaluating(module), torch.enable_grad():
        for batch in batches:
            value = loss(outputs_of(module, batch), batch)
            if not torch.isfinite(value):
                raise DataError(f"the loss of batch {count} is {float(value.detach())}; gradients need finite ones")
            value.backward()  # type: ignore[no-untyped-call]
            count += 1
            for parameter in module.parameters():
                if parameter.grad is not None:
                    step = parameter.grad**2 if kind == SQUARE else parameter.grad
                    total[parameter] = total[parameter] + step if parameter in total else step
                    parameter.grad = None
    if not count:
        raise DataError("there are no batches to gather gradients from; give at least one")
    for parameter, value in total.items():
        parameter.grad = (value / count).sqrt() if kind == SQUARE else value / count
    return count


def _multiplying(group: TensorGroup) -> list[Part]:
    """The layers that make the channels or read them: no normalizations, whose numbers are of another kind."""
    return [part for part in group.parts if part.role != "follows"]


def _added(group: TensorGroup, parts: Iterable[Part], of: Callable[[Part], Tensor]) -> Tensor:
    """For each unit, the sum over layers of its share in the layer."""
    scores = torch.zeros(group.units, dtype=torch.float64)
    for part in parts:
        share = of(part).sum(1).to(scores)
        scores = scores + share / share.mean().clamp(min=torch.finfo(torch.float32).tiny)
    return scores


def _gradient(group: TensorGroup, part: Part) -> Tensor:
    if part.gradient is None:
        raise DataError(
            f"group {group.name!r} has no gradients in {part.layer}; gather them before scoring, with gather_gradients()"
        )
    return part.gradient
