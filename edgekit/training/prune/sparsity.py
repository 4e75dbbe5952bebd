"""Single weights become zero: the smallest ones, or two of each four in a row; masks keep them zero while a module is trained.

A mask belongs to a parameter's name, so that it fits a copy of the module and the graph that is captured from it as well. Weights
themselves are zero, not only where they are used: what is exported, stored or resumed from needs no mask.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.optim.optimizer import register_optimizer_step_post_hook

from edgekit.errors import SourceError
from edgekit.graph.sparsity import OF, ZEROS, LayerSparsity, describe
from edgekit.training.checkpoint import unwrapped
from edgekit.words import hint

TWO_FOUR: Literal["2:4"] = "2:4"
Sparsity = float | Literal["2:4"]
Scope = Literal["global", "layer"]

UPDATES = 50
"""How often gradual pruning chooses again, while the share of zeros grows."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_KIND = re.compile(r"linear|conv(_transpose)?[123]d")
_GROUPS = 6  # the argument of that name, of all convolutions


@dataclass(frozen=True, slots=True)
class Weight:
    """The weight of a layer.

    Attributes:
        layer: its path in the module.
        names: of the parameter: several where layers share it.
        axis: that the layer sums over: of input channels.
        groups: that share this axis, each for itself.
    """

    layer: str
    names: tuple[str, ...]
    axis: int
    groups: int

    def of(self, module: nn.Module) -> nn.Parameter:
        """The parameter in a module, or in a copy or captured graph of it.

        Raises:
            SourceError: there is none.
        """
        inner = unwrapped(module)
        for name in self.names:
            try:
                return inner.get_parameter(name)
            except AttributeError:
                continue
        raise SourceError(
            f"{type(inner).__name__} has no parameter {self.names[0]!r}; masks are for a module, its copies, and graphs of it"
        )


class Masks(nn.Module):
    """Which weights stay, of each layer that is sparse: `kept` is true where a weight may be other than zero.

    Give it to `edgekit.training.loop.train` as one of `extra`: it then goes to the module's device, and is part of checkpoints.

    Attributes:
        weights: of the layers that are sparse.
        sparsity: what is aimed at: a share of zeros, 0 to 1, or "2:4".
        scope: "global" compares the weights of all layers, "layer" takes the same share of each.
        dense: layers that are left as they are, and why.
    """

    def __init__(self, module: nn.Module, weights: Sequence[Weight], sparsity: Sparsity, scope: Scope) -> None:
        """Everything is kept as yet."""
        super().__init__()
        self.weights, self.sparsity, self.scope = tuple(weights), sparsity, scope
        self.dense: dict[str, str] = {}
        for weight in self.weights:
            kept = torch.ones_like(weight.of(module), dtype=torch.bool)
            self.register_buffer(_buffer(weight), kept)

    @property
    def kept(self) -> dict[str, Tensor]:
        """The masks, by the name of the parameter, in its shape; true where a weight stays."""
        return {weight.names[0]: self.get_buffer(_buffer(weight)) for weight in self.weights}

    @property
    def zeros(self) -> float:
        """The share of weights that are kept at zero, of all layers that are sparse."""
        kept = self.kept.values()
        return 1.0 - sum(int(mask.sum()) for mask in kept) / sum(mask.numel() for mask in kept)

    @property
    def final(self) -> float:
        """The share of zeros that is aimed at."""
        return ZEROS / OF if self.sparsity == TWO_FOUR else float(self.sparsity)

    def renew(self, module: nn.Module, share: float | None = None) -> None:
        """Choose anew which weights stay, by the magnitudes that they have now, and set the others to zero.

        Args:
            module: whose weights it is about.
            share: of zeros, 0 to 1; None for what is aimed at. For "2:4" on the way there, the groups of four that lose least.

        Raises:
            SourceError: a weight is not finite, or a layer would lose all weights.
        """
        share = self.final if share is None else share
        magnitudes = [weight.of(module).detach().float().abs() for weight in self.weights]
        for weight, magnitude in zip(self.weights, magnitudes, strict=True):
            if not bool(magnitude.isfinite().all()):
                raise SourceError(f"the weight of layer {weight.layer!r} is not finite; its magnitudes say nothing")
        if self.sparsity == TWO_FOUR:
            made = _keep_two_of_four(self.weights, magnitudes, share * OF / ZEROS, self.scope)
        elif self.scope == "global":
            made = _keep_largest(magnitudes, share)
        else:
            made = [_keep_largest([magnitude], share)[0] for magnitude in magnitudes]
        for weight, mask in zip(self.weights, made, strict=True):
            if not bool(mask.any()):
                raise SourceError(
                    f"sparsity {share:.4g} leaves none of the {mask.numel()} weights of layer {weight.layer!r}; "
                    "give a smaller share, scope 'layer', or ignore this layer"
                )
        for weight, mask in zip(self.weights, made, strict=True):
            self.get_buffer(_buffer(weight)).copy_(mask)
        self.enforce(module)

    @torch.no_grad()
    def enforce(self, module: nn.Module) -> None:
        """Set the weights that are not kept to zero, in place.

        Raises:
            SourceError: the module has no such parameters.
        """
        for weight in self.weights:
            parameter, kept = weight.of(module), self.get_buffer(_buffer(weight))
            if parameter.shape != kept.shape:
                raise SourceError(
                    f"{weight.names[0]!r} has the shape {tuple(parameter.shape)}, and its mask {tuple(kept.shape)}; "
                    "make masks after channels are pruned"
                )
            parameter.masked_fill_(~kept.to(parameter.device), 0.0)

    @contextmanager
    def holding(self, module: nn.Module) -> Iterator[None]:
        """For a while, set weights to zero after each step of any optimizer, before anything can see them.

        ::

            with masks.holding(network):
                train(network, data, loss, schedule=schedule, folder=folder, extra=(masks,))
        """
        self.enforce(module)
        handle = register_optimizer_step_post_hook(lambda optimizer, args, kwargs: self.enforce(module))
        try:
            yield
        finally:
            handle.remove()

    def gradually(self, module: nn.Module, *, begin: float = 0.0, end: float = 0.5) -> Callable[[int, int], None]:
        """What lets the share of zeros grow while a module is trained; see `on_step` of `edgekit.training.loop.train`.

        Args:
            module: that is trained, in `holding`.
            begin, end: shares of the training between which it grows.

        Reference: see `cubic`.
        """

        def prune(step: int, steps: int) -> None:
            first, last = round(begin * steps), min(round(end * steps), steps - 1)
            every = max(1, (last - first) // UPDATES)
            if first <= step <= last and ((step - first) % every == 0 or step == last):
                self.renew(module, cubic(step, final=self.final, begin=first, end=last))

        return prune


def sparsify(module: nn.Module, sparsity: Sparsity, *, scope: Scope = "global", ignore: Sequence[str] = ()) -> Masks:
    """Set the smallest weights of a module's layers to zero, in place, and tell which are left.

    Weights are those of Conv, ConvTranspose and Linear layers, biases aside. "2:4" keeps the two largest of each four consecutive
    weights along the axis of input channels; a layer whose input channels (of one group) are no multiple of 4 stays dense.

    Args:
        module: as it is, captured by edgekit, or loaded with `load_module`.
        sparsity: share of the weights that become zero, 0 to 1, or "2:4". Of n weights `round(sparsity * n)` become zero; of
            equal ones the first.
        scope: "global" compares magnitudes of all layers, "layer" takes the same share of each.
        ignore: patterns of layers that stay dense, such as `head` or `blocks.0.*`.

    Raises:
        SourceError: there is no such layer, nothing to make sparse, or a layer would lose all weights.

    Reference: Han, Pool, Tran, Dally (2015), "Learning both Weights and Connections", arXiv:1506.02626; Mishra et al. (2021),
    "Accelerating Sparse Deep Neural Networks", arXiv:2104.08378, for "2:4".
    """
    masks = plan_masks(module, sparsity, scope=scope, ignore=ignore)
    masks.renew(module)
    return masks


def plan_masks(module: nn.Module, sparsity: Sparsity, *, scope: Scope = "global", ignore: Sequence[str] = ()) -> Masks:
    """Masks that keep everything as yet, for `Masks.gradually`; arguments and errors as in `sparsify`."""
    if sparsity != TWO_FOUR and not (isinstance(sparsity, float) and 0 < sparsity < 1):
        raise SourceError(f"sparsity is {sparsity!r}; expected a share between 0 and 1, or {TWO_FOUR!r}")
    weights, dense = _weights(module)
    _check_known(module, weights, ignore)
    wanted = []
    for weight in weights:
        channels = weight.of(module).shape[weight.axis] // weight.groups
        layers = [name.rpartition(".")[0] for name in weight.names]
        if any(fnmatchcase(layer, pattern) for layer in layers for pattern in ignore):
            dense[weight.layer] = "it is to be ignored"
        elif sparsity == TWO_FOUR and channels % OF:
            dense[weight.layer] = f"it sums over {channels} input channels, no multiple of {OF}"
        else:
            wanted.append(weight)
    if not wanted:
        told = "; ".join(f"{layer!r}: {reason}" for layer, reason in list(dense.items())[:5])
        raise SourceError(
            f"{type(unwrapped(module)).__name__} has no layer that can be sparse ({told or 'no Conv and no Linear'})"
        )
    masks = Masks(module, wanted, sparsity, scope)
    masks.dense = dense
    return masks


def layer_sparsity(module: nn.Module) -> tuple[LayerSparsity, ...]:
    """The zeros in the weight of each Conv, ConvTranspose and Linear layer of a module."""
    found = []
    for weight in _weights(module)[0]:
        zero = (weight.of(module).detach() == 0).cpu().numpy()
        found.append(describe(weight.layer, zero, axis=weight.axis, groups=weight.groups))
    return tuple(found)


def cubic(step: int, *, final: float, begin: int, end: int, initial: float = 0.0) -> float:
    """The share of zeros at a step: it grows from `initial` at `begin` to `final` at `end`, fast first and slowly at last.

    Reference: Zhu, Gupta (2017), "To prune, or not to prune", arXiv:1710.01878, eq. 1.

    >>> [cubic(step, final=0.5, begin=0, end=4) for step in range(6)]
    [0.0, 0.2890625, 0.4375, 0.4921875, 0.5, 0.5]
    """
    if step >= end:
        return final
    left = 1.0 - max(step - begin, 0) / (end - begin)
    return final + (initial - final) * left**3


def _keep_largest(magnitudes: Sequence[Tensor], share: float) -> list[Tensor]:
    """Masks of all but the smallest of some tensors; of equal ones the first go."""
    flat = torch.cat([magnitude.reshape(-1) for magnitude in magnitudes])
    count = round(share * flat.numel())
    gone = torch.zeros_like(flat, dtype=torch.bool)
    if count:
        threshold = flat.kthvalue(count).values
        gone = flat < threshold
        equal = (flat == threshold).nonzero()[:, 0]
        gone[equal[: count - int(gone.sum())]] = True
    parts = torch.split(~gone, [magnitude.numel() for magnitude in magnitudes])
    return [part.view_as(magnitude) for part, magnitude in zip(parts, magnitudes, strict=True)]


def _keep_two_of_four(
    weights: Sequence[Weight], magnitudes: Sequence[Tensor], share: float, scope: Scope
) -> list[Tensor]:
    """Masks with two of four in a `share` of the fours: those that lose the least magnitude."""
    turned = [magnitude.movedim(weight.axis, -1) for weight, magnitude in zip(weights, magnitudes, strict=True)]
    fours = [one.reshape(-1, OF) for one in turned]
    order = [one.argsort(dim=1, descending=True, stable=True) for one in fours]
    losses = [one.gather(1, rank[:, OF - ZEROS :]).sum(1) for one, rank in zip(fours, order, strict=True)]
    if scope == "global":
        whole = _keep_largest(losses, share)
    else:
        whole = [_keep_largest([loss], share)[0] for loss in losses]
    made = []
    for weight, one, rank, stays in zip(weights, turned, order, whole, strict=True):
        kept = torch.zeros_like(rank, dtype=torch.bool).scatter_(1, rank[:, : OF - ZEROS], True)
        made.append((kept | stays[:, None]).view(one.shape).movedim(-1, weight.axis))
    return made


def _weights(module: nn.Module) -> tuple[list[Weight], dict[str, str]]:
    """The weights that can be sparse, each once, and layers whose weight cannot."""
    inner = unwrapped(module)
    names: dict[int, list[str]] = {}
    for name, one in inner.named_parameters(remove_duplicate=False):
        names.setdefault(id(one), []).append(name)
    found: dict[int, Weight] = {}
    dense: dict[str, str] = {}
    layers = _in_graph(inner) if isinstance(inner, fx.GraphModule) else _in_modules(inner)
    for layer, parameter, axis, groups in layers:
        if not isinstance(parameter, nn.Parameter):
            dense[layer] = "its weight is computed from other tensors"
        elif is_lazy(parameter):
            dense[layer] = "its weight has no shape before the module runs"
        elif parameter.numel():
            found.setdefault(id(parameter), Weight(layer, tuple(names[id(parameter)]), axis, groups))
    return list(found.values()), dense


def _in_modules(module: nn.Module) -> Iterator[tuple[str, object, int, int]]:
    """Each layer: its path, weight, the axis that it sums over, and the groups that share it."""
    for path, child in module.named_modules():
        if isinstance(child, (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear)):
            plain = not parametrize.is_parametrized(child, "weight")
            transposed = isinstance(child, _TRANSPOSED)
            groups = child.groups if isinstance(child, _TRANSPOSED) else 1
            yield path, child._parameters.get("weight") if plain else None, 0 if transposed else 1, groups


def _in_graph(module: fx.GraphModule) -> Iterator[tuple[str, object, int, int]]:
    """The same of a captured graph, where quantizers may round the weight."""
    for node in module.graph.nodes:
        kind = str(node.target).removeprefix("aten.").partition(".")[0]
        if not _KIND.fullmatch(kind):
            continue
        transposed = "transpose" in kind
        weight: Any = node.args[1]
        while isinstance(weight, fx.Node) and weight.op == "call_module":
            weight = weight.args[0]
        if isinstance(weight, fx.Node) and weight.op == "get_attr":
            path = str(weight.target)
            groups = int(node.args[_GROUPS]) if transposed and len(node.args) > _GROUPS else 1
            yield path.rpartition(".")[0], operator.attrgetter(path)(module), 0 if transposed else 1, groups


def _check_known(module: nn.Module, weights: Sequence[Weight], ignore: Sequence[str]) -> None:
    layers = [weight.layer for weight in weights]
    known = {*layers, *(path for path, _ in unwrapped(module).named_modules())}
    for pattern in ignore:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise SourceError(
                f"no layer of the model is called {pattern!r}, which is to stay dense; {hint(pattern, layers)}"
            )


def _buffer(weight: Weight) -> str:
    return "kept__" + weight.names[0].replace(".", "__")
