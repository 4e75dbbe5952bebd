"""Which channels of which layers can only go together: Torch-Pruning's dependency graph, followed channel by channel."""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgekit.errors import BackendError, SourceError
from edgekit.training.checkpoint import evaluating, quiet, users_error
from edgekit.training.forward import Call, named_tensors
from edgekit.training.prune.heads import Attention
from edgekit.training.prune.index_maps import Repairs, repair
from edgekit.training.prune.slots import Member, Slot, role, slots_of
from edgekit.training.prune.units import Key, Walk, side_width


@dataclass(frozen=True, slots=True)
class Coupling:
    """Units, and what goes with them.

    Attributes:
        name: of the first layer that makes the channels; with `:2` and so on where that makes several kinds of units.
        units: how many.
        members: all layers that take part.
        attention: the path of the attention whose heads the units are.
    """

    name: str
    units: int
    members: tuple[Member, ...]
    attention: str | None = None

    @property
    def makers(self) -> tuple[str, ...]:
        """The layers that make the channels."""
        return tuple(dict.fromkeys(member.layer for member in self.members if member.role == "makes"))

    @property
    def width(self) -> int:
        """Channels of one unit in the first layer that makes them."""
        return int(next(member.channels.shape[1] for member in self.members if member.role == "makes"))


def torch_pruning() -> Any:
    """The package `torch_pruning`.

    Raises:
        BackendError: it is not installed.
    """
    try:
        with quiet():
            return importlib.import_module("torch_pruning")
    except ImportError as error:
        raise BackendError(
            f"structured pruning needs the package torch-pruning ({error}); pip install 'edgekit[train]'"
        ) from error


def trace(module: nn.Module, call: Call, attentions: Mapping[nn.Module, Attention]) -> tuple[Any, Repairs]:
    """The dependency graph of a module, as Torch-Pruning sees it, in which attention is a single layer.

    Reference: Fang et al. 2023, "DepGraph: Towards Any Structural Pruning", arXiv:2301.12900.

    Raises:
        SourceError: it cannot follow the module.
    """
    tp = torch_pruning()
    sided, tied = _pruners(tp, attentions)
    whole = [child for child in module.modules() if isinstance(child, nn.MultiheadAttention | nn.RNNBase)]
    pruners = {nn.RMSNorm: tied} | {type(child): sided for child in (*whole, *attentions)}
    graph = tp.DependencyGraph()
    owners: dict[Any, nn.Module] = {}
    modes = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        with (
            evaluating(module),
            _opaque({*whole, *attentions}),
            _recorded(module, owners),
            quiet(),
            torch.enable_grad(),
        ):
            for parameter, _ in modes:
                parameter.requires_grad_(parameter.is_floating_point())
            graph.build_dependency(module, call, forward_fn=_forward, verbose=False, customized_pruners=pruners)
    except SourceError:
        raise
    except Exception as error:  # whatever Torch-Pruning raises on an operator that it does not know
        raise SourceError(
            f"Torch-Pruning cannot follow {type(module).__name__}: {users_error(error)}; name layers to leave out in 'ignore', or "
            "write what it does with modules of torch.nn"
        ) from error
    finally:
        for parameter, flag in modes:
            parameter.requires_grad_(flag)
    return graph, repair(graph, owners)


def _forward(module: nn.Module, call: Call) -> list[Tensor]:
    """The outputs, each of a node of its own behind the layer that makes it."""
    args = [tensor.clone() for tensor in call.args]
    outputs = named_tensors(module(*args, **{name: tensor.clone() for name, tensor in call.kwargs.items()}))
    found = [tensor * 1 for tensor in outputs.values() if tensor.requires_grad]
    if not found:
        raise SourceError(
            f"no output of {type(module).__name__} depends on its weights by operators with gradients; remove no_grad and detach() "
            "from forward"
        )
    return found


@contextmanager
def _recorded(module: nn.Module, owners: dict[Any, nn.Module]) -> Iterator[None]:
    """Notes which module made which node of autograd's graph."""

    def record(child: nn.Module, _args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        if isinstance(first, Tensor) and first.grad_fn is not None:
            owners[first.grad_fn] = child

    handles = [child.register_forward_hook(record) for child in module.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Link(torch.autograd.Function):
    """Joins the output of a layer to its inputs in autograd's graph, with nothing between."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *inputs: Tensor) -> Tensor:
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError("only the graph is read")


@contextmanager
def _opaque(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Layers for a while without what is inside them, as far as autograd's graph shows."""

    def without_inside(forward: Callable[..., Any]) -> Callable[..., Any]:
        def closed(*args: Any, **kwargs: Any) -> Any:
            inputs = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor) and one.requires_grad]
            with torch.no_grad():
                result = forward(*args, **kwargs)
            first = result[0] if isinstance(result, tuple) else result
            linked = _Link.apply(first, *inputs)  # type: ignore[no-untyped-call]
            return (linked, *result[1:]) if isinstance(result, tuple) else linked

        return closed

    changed = list(layers)
    for layer in changed:
        layer.forward = without_inside(layer.forward)
    try:
        yield
    finally:
        for layer in changed:
            del layer.__dict__["forward"]


def _pruners(tp: Any, attentions: Mapping[nn.Module, Attention]) -> tuple[Any, Any]:
    """What tells Torch-Pruning how wide layers are that it does not know: with other channels at each side, and with the same."""

    class Sided(tp.BasePruningFunc):  # type: ignore[misc]
        def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
            raise NotImplementedError("edgekit cuts by itself")

        def prune_in_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
            raise NotImplementedError("edgekit cuts by itself")

        def get_out_channels(self, layer: nn.Module) -> int | None:
            return side_width(layer, "out", attentions)

        def get_in_channels(self, layer: nn.Module) -> int | None:
            return side_width(layer, "in", attentions)

    class Tied(Sided):
        prune_in_channels = Sided.prune_out_channels

    return Sided(), Tied()


def couple(
    module: nn.Module,
    graph: Any,
    repairs: Repairs,
    attentions: Mapping[nn.Module, Attention],
    kept: Mapping[nn.Module, str],
) -> tuple[tuple[Coupling, ...], dict[str, str]]:
    """The units that may be cut, in the order of the layers that make them; and why the channels of other layers stay.

    Args:
        module: the network.
        graph, repairs: as `trace` gave them.
        attentions: layers that are a node each.
        kept: layers whose output keeps its channels, and why.
    """
    walk = Walk(graph, repairs, attentions)
    units = walk.run(dict(kept) | _kept_attention(module, attentions, kept))
    paths: dict[Any, str] = {child: path for path, child in module.named_modules()}
    paths |= {parameter: path for path, parameter in module.named_parameters()}
    order = {path: place for place, path in enumerate(paths.values())}
    sets: dict[int, dict[Key, list[int]]] = defaultdict(lambda: defaultdict(list))
    stay: dict[str, str] = {}
    for key, channels in units.numbers.items():
        if not walk.is_layer(key[0]):
            continue
        for channel, number in channels.items():
            reason = units.frozen(number)
            if reason is None:
                sets[units.find(number)][key].append(channel)
            elif key[1] == "out" and key[0].module in paths:
                stay.setdefault(paths[key[0].module], reason)
    alike: dict[tuple[Any, ...], list[dict[Key, list[int]]]] = defaultdict(list)
    for one in sets.values():
        signature = sorted((order[paths[node.module]], side, len(channels)) for (node, side), channels in one.items())
        alike[tuple(signature)].append(one)
    couplings = [
        Coupling("", len(same), _members(module, paths, attentions, same))
        for _, same in sorted(alike.items(), key=lambda pair: pair[0])
    ]
    couplings += [
        Coupling("", attention.units, _existing(module, attention.heads()), attention=attention.path)
        for attention in attentions.values()
        if attention.out is not None
    ]
    couplings = [
        one
        for one in couplings
        if one.units > 1
        and {"makes", "reads"} <= {member.role for member in one.members}
        and (one.attention is None or not any(module.get_submodule(path) in kept for path in one.makers))
    ]
    couplings.sort(key=lambda one: order.get(one.makers[0], 0))
    return tuple(_named(couplings)), stay


def _kept_attention(
    module: nn.Module, attentions: Mapping[nn.Module, Attention], kept: Mapping[nn.Module, str]
) -> dict[nn.Module, str]:
    """Attention of which the layers that make its output are kept, and why."""
    found = {}
    for child, attention in attentions.items():
        makers = (
            [attention.out]
            if attention.out is not None
            else [m.layer for m in attention.members("out", np.arange(attention.inner)[None])]
        )
        reasons = [kept[layer] for path in makers if (layer := module.get_submodule(path)) in kept]
        if reasons:
            found[child] = reasons[0]
    return found


def _named(couplings: Sequence[Coupling]) -> Iterator[Coupling]:
    counts: dict[str, int] = defaultdict(int)
    for one in couplings:
        first = one.makers[0]
        counts[first] += 1
        name = first if counts[first] == 1 else f"{first}:{counts[first]}"
        yield Coupling(name, one.units, one.members, one.attention)


def _members(
    module: nn.Module,
    paths: Mapping[Any, str],
    attentions: Mapping[nn.Module, Attention],
    same: Sequence[Mapping[Key, Sequence[int]]],
) -> tuple[Member, ...]:
    """What takes part in units that are alike."""
    order = {path: place for place, path in enumerate(paths.values())}
    keys = sorted(same[0], key=lambda key: (order[paths[key[0].module]], key[1]))
    same = sorted(same, key=lambda one: min(one[keys[0]]))
    members: list[Member] = []
    for node, side in keys:
        channels = np.array([sorted(one[node, side]) for one in same], np.intp)
        path = paths[node.module]
        if isinstance(node.module, nn.Parameter):
            axis = node.pruning_dim % node.module.dim()
            members.append(Member(path, "follows", (Slot(path, axis, channels),), channels))
        elif node.module in attentions:
            members += attentions[node.module].members(side, channels)
        else:
            slots = slots_of(path, node.module, side, channels)
            members.append(Member(path, role(node.module, side), slots, channels))
    return _existing(module, members)


def _existing(module: nn.Module, members: Iterable[Member]) -> tuple[Member, ...]:
    """Members without the tensors that a layer does not have."""
    tensors = module.state_dict(keep_vars=True).keys()
    return tuple(
        Member(one.layer, one.role, tuple(slot for slot in one.slots if slot.tensor in tensors), one.channels)
        for one in members
    )
