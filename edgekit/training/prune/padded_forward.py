"""Padding of channels that stands in a forward of the user's becomes a convolution, whose widths can be cut."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from edgekit.training.checkpoint import evaluating, quiet
from edgekit.training.forward import Call
from edgekit.training.prune.padding import Selection
from edgekit.training.prune.slots import owner_of

_PADS = (F.pad, torch._C._nn.pad)


@dataclass(frozen=True, slots=True)
class _Padding:
    """One call of `F.pad`: the channels before, how many zeros before and behind them, and the tensor's number of axes."""

    channels: int
    before: int
    behind: int
    axes: int


def replace_padding(module: nn.Module, call: Call) -> tuple[nn.Module, tuple[str, ...]]:
    """A module in which `F.pad` along channels, with a strided slice in front of it, is a convolution; and the paths of these.

    The forward of the layer that pads is traced (`torch.fx`); its own layers keep their names. Where it cannot be traced, does
    something else in train mode, or the outputs are not the same to the last bit, the layer stays as it is.
    """
    paths: list[str] = []
    before = _outputs(module, call) or {}
    for owner, padding in _found(module, call).items():
        path = next(path for path, child in module.named_modules() if child is owner)
        new = _rewritten(owner, padding)
        if new is None:
            continue
        changed = put(module, path, new)
        after = _outputs(changed, call) or {}
        if before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before):
            module = changed
            paths += [f"{path}.{name}".lstrip(".") for name, _ in new.named_children() if name.startswith(_NAME)]
        else:
            module = put(changed, path, owner)
    return module, tuple(paths)


_NAME = "padded_channels"


def _found(module: nn.Module, call: Call) -> dict[nn.Module, list[_Padding]]:
    """Where channels are padded: by the innermost layer that runs, in the order of the calls."""
    running: list[nn.Module] = []
    found: dict[nn.Module, list[_Padding]] = defaultdict(list)

    class Watch(TorchFunctionMode):
        def __torch_function__(
            self,
            function: Any,
            types: Iterable[Any],
            args: tuple[Any, ...] = (),
            kwargs: Mapping[str, Any] | None = None,
        ) -> Any:
            if function in _PADS and running:
                one = _padding(*args, **(kwargs or {}))
                if one is not None:
                    found[running[-1]].append(one)
            return function(*args, **(kwargs or {}))

    def enter(child: nn.Module, _args: Any) -> None:
        running.append(child)

    def leave(_child: nn.Module, _args: Any, _output: Any) -> None:
        running.pop()

    with ExitStack() as stack:
        for child in module.modules():
            for handle in (child.register_forward_pre_hook(enter), child.register_forward_hook(leave)):
                stack.callback(handle.remove)
        stack.enter_context(evaluating(module))
        stack.enter_context(Watch())
        call.run(module)
    return dict(found)


def _padding(input: Tensor, pad: Iterable[int], mode: str = "constant", value: float | None = None) -> _Padding | None:
    """What a call pads, if it is zeros along axis 1 alone."""
    sizes, axes = list(pad), input.dim()
    if mode != "constant" or value or not 3 <= axes <= 5 or len(sizes) != 2 * (axes - 1) or any(sizes[:-2]):
        return None
    return _Padding(input.shape[1], sizes[-2], sizes[-1], axes) if min(sizes) >= 0 and any(sizes) else None


class _Tracer(fx.Tracer):
    """Looks into the forward of one layer, not into those inside it."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _rewritten(owner: nn.Module, padding: list[_Padding]) -> fx.GraphModule | None:
    """The layer with convolutions in the place of its padding; None where that cannot be done."""
    graph = trace_layer(owner)
    if graph is None:
        return None
    nodes = [node for node in graph.nodes if node.op == "call_function" and node.target in _PADS]
    nodes = [node for node in nodes if _pads_channels(node)]
    if not nodes or len(padding) % len(nodes) or padding != padding[: len(nodes)] * (len(padding) // len(nodes)):
        return None
    new = fx.GraphModule(owner, graph, type(owner).__name__)
    for number, (node, one) in enumerate(zip(nodes, padding, strict=False)):
        source, stride = _sliced(node.args[0], one.axes - 2)
        rows = torch.cat([torch.zeros(one.before, one.channels), torch.eye(one.channels)])
        rows = torch.cat([rows, torch.zeros(one.behind, one.channels)])
        name = f"{_NAME}_{number}" if number else _NAME
        new.add_submodule(name, Selection(rows.reshape(*rows.shape, *(1,) * (one.axes - 2)), stride).layer())
        with graph.inserting_before(node):
            conv = graph.call_module(name, (source,))
        node.replace_all_uses_with(conv)
        graph.erase_node(node)
    graph.eliminate_dead_code()
    new.graph = graph
    new.recompile()
    for name, child in owner.named_children():  # those that forward does not use keep their weights all the same
        if name not in dict(new.named_children()):
            new.add_module(name, child)
    new.train(owner.training)
    return new


def trace_layer(owner: nn.Module) -> fx.Graph | None:
    """The forward of a layer, without what is inside its own layers; None where it cannot be traced or depends on the mode."""
    graphs = [_traced(owner, training=training) for training in (False, True)]
    return graphs[0] if graphs[0] is not None and str(graphs[0]) == str(graphs[1]) else None


def _traced(owner: nn.Module, *, training: bool) -> fx.Graph | None:
    before = owner.training
    owner.training = training
    try:
        with quiet():
            return _Tracer().trace(owner)
    except Exception:  # forward does what cannot be traced
        return None
    finally:
        owner.training = before


def _pads_channels(node: fx.Node) -> bool:
    pad = node.args[1] if len(node.args) > 1 else node.kwargs.get("pad", ())
    return (
        isinstance(pad, tuple | list) and len(pad) >= 4 and all(isinstance(size, int) for size in pad) and any(pad[-2:])
    )


def _sliced(node: Any, pixels: int) -> tuple[fx.Node, tuple[int, ...]]:
    """What a strided slice `x[:, :, ::2, ::2]` takes its pixels from, and the strides; the node itself where there is none."""
    if node.op == "call_function" and node.target is operator.getitem and isinstance(node.args[1], tuple):
        parts = node.args[1]
        whole = slice(None)
        if (
            len(parts) == pixels + 2
            and all(isinstance(part, slice) and part.start is part.stop is None for part in parts)
            and parts[0] == parts[1] == whole
        ):
            return node.args[0], tuple(part.step or 1 for part in parts[2:])
    return node, (1,) * pixels


def put(module: nn.Module, path: str, child: nn.Module) -> nn.Module:
    """The module with another child, under all names of the one at a path."""
    if not path:
        return child
    old = module.get_submodule(path)
    for name in [name for name, one in module.named_modules(remove_duplicate=False) if one is old]:
        owner, last = owner_of(module, name)
        owner._modules[last] = child
    return module


def _outputs(module: nn.Module, call: Call) -> dict[str, Tensor] | None:
    try:
        with evaluating(module):
            return call.run(module)
    except Exception:  # code around a rewritten layer asks it for what it no longer has
        return None
