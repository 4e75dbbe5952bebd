"""An `nn.Module` as a graph that can be changed and trained: same call, same parameter names, BatchNorm folded, modes alive.

What torch captures is frozen in the mode and for the batch sizes that it was captured with, and refuses `train()`. Here Dropout is a
module again, a BatchNorm that no layer takes in is one too, in-place operators are plain ones, and guards are gone.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from edgekit.errors import SourceError
from edgekit.training.checkpoint import evaluating, quiet, unwrapped
from edgekit.training.export_onnx import trace
from edgekit.training.forward import Array, Call, as_array, calls, difference, exportable
from edgekit.training.state_dict import remove_parametrizations
from edgekit.words import hint

ATEN = torch.ops.aten
CONVOLUTIONS: dict[Any, bool] = {
    ATEN.conv1d.default: False, ATEN.conv2d.default: False, ATEN.conv3d.default: False,
    ATEN.conv1d.padding: False, ATEN.conv2d.padding: False, ATEN.conv3d.padding: False,
    ATEN.conv_transpose1d.default: True, ATEN.conv_transpose2d.input: True, ATEN.conv_transpose3d.input: True,
}  # fmt: skip
"""Whether each is transposed. Weight and bias are arguments 1 and 2, as of a linear layer."""
LINEAR = ATEN.linear.default
_DROPOUTS: dict[Any, Callable[[float], nn.Module]] = {
    ATEN.dropout.default: nn.Dropout,
    ATEN.feature_dropout.default: nn.Dropout2d,
    ATEN.alpha_dropout.default: nn.AlphaDropout,
    ATEN.feature_alpha_dropout.default: nn.FeatureAlphaDropout,
}
_TAPS = "taps"


class Captured(fx.GraphModule):
    """A module as a graph; it is copied and trained like any other module."""

    def __deepcopy__(self, memo: Any) -> Captured:
        """A copy that shares nothing."""
        with quiet():  # torch warns of its own classes
            copied = super().__deepcopy__(memo)
        assert isinstance(copied, Captured)
        for hook in self._forward_pre_hooks.values():  # torch forgets them
            if isinstance(hook, Rebind) and not copied._forward_pre_hooks:
                copied.register_forward_pre_hook(copy.deepcopy(hook, memo), with_kwargs=True)
        return copied


def capture(
    module: nn.Module, example_inputs: tuple[Array, ...] | Mapping[str, Array], *, taps: Sequence[str] = ()
) -> Captured:
    """A copy of `module` as a graph, in eval mode; the module itself stays as it was.

    It is called as the module is, takes other batch sizes, and returns what the module returns. Parameters keep their names, but
    those of a BatchNorm that follows a convolution or linear layer go into that layer.

    Args:
        module: in any mode.
        example_inputs: a batch, at least two samples; a tuple is positional, a dict goes by the names of forward's parameters.
        taps: layers by path, whose outputs are passed through an `nn.Identity` of the name `taps.<path>`, "__" for each dot, where
            hooks can read them.

    Raises:
        SourceError: the module does not run on the inputs, torch cannot capture it (the message names the line), or there is no
            such layer.
    """
    original = exportable(module)
    copied = copy.deepcopy(original)
    remove_parametrizations(copied)
    errors = []
    for call in calls(copied, dict(example_inputs) if isinstance(example_inputs, Mapping) else example_inputs):
        try:
            graph = _captured(copied, call, taps)
        except SourceError as error:
            errors.append(error)
            continue
        _check_equal(copied, graph, call)
        return graph
    raise errors[0]


def _captured(module: nn.Module, call: Call, taps: Sequence[str]) -> Captured:
    with evaluating(module):
        program = trace(module, call, flat=False)
    traced = program.module(check_guards=False)
    # Of torch's own class, whose train() and eval() refuse.
    graph = Captured(traced, traced.graph)
    _drop_guards(graph)
    _without_in_place(graph)
    revive_dropout(graph)
    _fold_batchnorms(graph)
    revive_batchnorms(graph)
    _add_taps(graph, taps)
    _clean(graph)
    graph.register_forward_pre_hook(Rebind(module, call), with_kwargs=True)
    for parameter in graph.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return graph.eval()


class Rebind:
    """Calls in any of the ways that forward takes them, arranged as the graph was captured."""

    def __init__(self, module: nn.Module, call: Call) -> None:
        self.signature = inspect.signature(module.forward)
        self.positional = len(call.args)
        self.named = tuple(call.kwargs)
        self.name = type(module).__name__

    def __call__(
        self, graph: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call, as the hook of a module hands them on."""
        bound = self.signature.bind(*args, **kwargs).arguments
        flat: list[tuple[str, Any]] = []
        for name, value in bound.items():
            variadic = self.signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL
            flat += [(name, one) for one in value] if variadic else [(name, value)]
        left = [(name, value) for name, value in flat if name not in self.named]
        extra = [
            name for name, value in left[self.positional :] if value is not self.signature.parameters[name].default
        ]
        if extra:
            raise SourceError(
                f"{self.name} was captured without its input {extra[0]!r}; give it in the example inputs, or leave it out"
            )
        named = {name: value for name, value in flat if name in self.named}
        return tuple(value for _, value in left[: self.positional]), {name: named[name] for name in self.named}


def _drop_guards(graph: fx.GraphModule) -> None:
    """Take out what rejects other sizes than those captured."""
    for node in list(graph.graph.nodes):
        if node.op == "call_module" and str(node.target).startswith("_guards"):
            graph.graph.erase_node(node)


def _without_in_place(graph: fx.GraphModule) -> None:
    """Operators that write into their input write into a new tensor; where that is part of another one, they stay."""
    order = {node: index for index, node in enumerate(graph.graph.nodes)}
    for node in list(graph.graph.nodes):
        plain = _plain_operator(node)
        if plain is None or not isinstance(node.args[0], fx.Node) or _is_view(node.args[0]):
            continue
        written = node.args[0]
        node.target = plain
        for user in list(written.users):
            if order[user] > order[node]:
                user.replace_input_with(written, node)


def _plain_operator(node: fx.Node) -> Any:
    """The operator that does the same out of place, or None."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    name, overload = node.target._schema.name.removeprefix("aten::"), node.target._overloadname
    if not name.endswith("_") or name.endswith("__"):
        return None
    packet = getattr(ATEN, name[:-1], None)
    found = getattr(packet, overload, None) if packet is not None else None
    same = found is not None and [a.name for a in found._schema.arguments] == [
        a.name for a in node.target._schema.arguments
    ]
    return found if same else None


def _is_view(node: fx.Node) -> bool:
    """Whether a node's tensor shares its memory with another one that is used elsewhere."""
    if node.op in ("placeholder", "get_attr"):
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    returns = node.target._schema.returns
    aliased = any(one.alias_info is not None and not one.alias_info.is_write for one in returns)
    return aliased and any(len(source.users) > 1 for source in node.all_input_nodes)


def revive_dropout(graph: fx.GraphModule) -> None:
    """Dropout that was captured as switched off obeys `train()` again."""
    for node in list(graph.graph.nodes):
        kind = _DROPOUTS.get(node.target)
        if kind is not None:
            _replace(graph, node, f"dropout.{node.name}", kind(_number(node.args[1])), node.args[0])


def _fold_batchnorms(graph: fx.GraphModule) -> None:
    """A BatchNorm behind a convolution or linear layer becomes part of its weight and bias."""
    for node in list(graph.graph.nodes):
        if node.target is ATEN.batch_norm.default and _is_foldable(graph, node):
            _fold(graph, node)


def _is_foldable(graph: fx.GraphModule, node: fx.Node) -> bool:
    layer = node.args[0]
    if not isinstance(layer, fx.Node) or len(layer.users) != 1:
        return False
    if layer.target not in (LINEAR, *CONVOLUTIONS) or (layer.target is LINEAR and len(_shape(layer)) != 2):
        return False
    groups = layer.args[6] if CONVOLUTIONS.get(layer.target) and len(layer.args) > 6 else 1
    known = [*layer.args[1:3], *node.args[1:5]]
    sources = [one for one in known if isinstance(one, fx.Node)]
    alone = all(one.op == "get_attr" and _is_alone(graph, one) for one in sources)
    known_statistics = all(isinstance(one, fx.Node) for one in node.args[3:5])
    return bool(alone and groups == 1 and known_statistics and not layer.kwargs)


def _is_alone(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a parameter is read once, under any of its names."""
    tensor = _attribute(graph, node)
    same = [other for other in graph.graph.nodes if other.op == "get_attr" and _attribute(graph, other) is tensor]
    return sum(len(other.users) for other in same) == 1


def _fold(graph: fx.GraphModule, node: fx.Node) -> None:
    layer = node.args[0]
    assert isinstance(layer, fx.Node)
    weight = layer.args[1]
    assert isinstance(weight, fx.Node)
    bias = layer.args[2] if len(layer.args) > 2 else None
    given = [None if one is None else _attribute(graph, one).detach() for one in (weight, bias, *node.args[1:5])]
    old_weight, old_bias, gain, shift, mean, variance = given
    assert old_weight is not None and mean is not None and variance is not None
    epsilon = _number(node.args[7])
    made: tuple[Tensor, Tensor]
    if layer.target is LINEAR:
        zeros = torch.zeros_like(mean) if old_bias is None else old_bias
        made = fuse_linear_bn_weights(old_weight, zeros, mean, variance, epsilon, gain if gain is not None else torch.ones_like(mean),
                                      shift if shift is not None else torch.zeros_like(mean))  # fmt: skip
    else:
        made = fuse_conv_bn_weights(
            old_weight, old_bias, mean, variance, epsilon, gain, shift, CONVOLUTIONS[layer.target]
        )
    path = str(weight.target)
    bias_path = str(bias.target) if isinstance(bias, fx.Node) else f"{path.rpartition('.')[0]}.bias".lstrip(".")
    _set_parameter(graph, path, made[0])
    _set_parameter(graph, bias_path, made[1])
    if bias is None:
        with graph.graph.inserting_before(layer):
            layer.args = (*layer.args[:2], graph.graph.get_attr(bias_path), *layer.args[3:])
    node.replace_all_uses_with(layer)
    graph.graph.erase_node(node)


def revive_batchnorms(graph: fx.GraphModule) -> None:
    """A BatchNorm that stays obeys `train()` again; its parameters keep their names."""
    for node in list(graph.graph.nodes):
        if node.target is ATEN.batch_norm.default:
            momentum, epsilon = (_number(node.args[place]) for place in (6, 7))
            name = f"batchnorm.{node.name}"
            graph.add_submodule(name, _BatchNorm(momentum, epsilon))
            with graph.graph.inserting_before(node):
                new = graph.graph.call_module(name, node.args[:5])
            _take_place(node, new)
            graph.graph.erase_node(node)


class _BatchNorm(nn.Module):
    """Normalizes by the batch while training, unless frozen, else by running statistics; parameters are handed in."""

    def __init__(self, momentum: float, epsilon: float) -> None:
        super().__init__()
        self.momentum, self.epsilon, self.frozen = momentum, epsilon, False

    def forward(
        self, x: Tensor, gain: Tensor | None, shift: Tensor | None, mean: Tensor | None, variance: Tensor | None
    ) -> Tensor:
        by_batch = (self.training and not self.frozen) or mean is None
        return torch.nn.functional.batch_norm(x, mean, variance, gain, shift, by_batch, self.momentum, self.epsilon)

    def freeze(self) -> None:
        """Leave the running statistics where they are from now on, and use them."""
        self.frozen = True


def _add_taps(graph: fx.GraphModule, taps: Sequence[str]) -> None:
    """Pass the outputs of layers through modules that hooks can be hung on."""
    last: dict[str, fx.Node] = {}
    for node in graph.graph.nodes:
        if isinstance(node.meta.get("val"), Tensor):
            last |= {str(path): node for path, _ in (node.meta.get("nn_module_stack") or {}).values()}
    for path in taps:
        if path not in last:
            raise SourceError(f"no layer of the model is called {path!r}; {hint(path, list(last))}")
        name = f"{_TAPS}.{path.replace('.', '__')}"
        graph.add_submodule(name, nn.Identity())
        with graph.graph.inserting_after(last[path]):
            node = graph.graph.call_module(name, (last[path],))
        _take_place(last[path], node)
        node.replace_input_with(node, last[path])


def _replace(graph: fx.GraphModule, node: fx.Node, name: str, module: nn.Module, source: Any) -> None:
    graph.add_submodule(name, module)
    with graph.graph.inserting_before(node):
        new = graph.graph.call_module(name, (source,))
    _take_place(node, new)
    graph.graph.erase_node(node)


def _take_place(old: fx.Node, new: fx.Node) -> None:
    """Let the readers of a node read another one, which has its shape and module."""
    new.meta = dict(old.meta)
    old.replace_all_uses_with(new)


def _clean(graph: fx.GraphModule) -> None:
    """Drop what nothing reads any more: nodes, and the parameters and modules that only they held."""
    for node in reversed(list(graph.graph.nodes)):
        if node.op == "get_attr" and not node.users:
            graph.graph.erase_node(node)
    graph.graph.lint()
    graph.recompile()
    read = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    for name in [name for name, _ in graph.named_parameters(remove_duplicate=False) if name not in read]:
        _owner(graph, name)._parameters.pop(name.rpartition(".")[2])
    for name in [name for name, _ in graph.named_buffers(remove_duplicate=False) if name not in read]:
        _owner(graph, name)._buffers.pop(name.rpartition(".")[2])


def _owner(graph: nn.Module, path: str) -> nn.Module:
    return graph.get_submodule(path.rpartition(".")[0])


def _attribute(graph: fx.GraphModule, node: Any) -> Tensor:
    found = operator.attrgetter(str(node.target))(graph)
    assert isinstance(found, Tensor)
    return found


def _set_parameter(graph: fx.GraphModule, path: str, value: Tensor) -> None:
    setattr(_owner(graph, path), path.rpartition(".")[2], nn.Parameter(value.detach().clone()))


def _number(argument: object) -> float:
    assert isinstance(argument, int | float), "torch captures numbers as they are"
    return float(argument)


def _shape(node: fx.Node) -> tuple[Any, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _check_equal(module: nn.Module, graph: fx.GraphModule, call: Call) -> None:
    """Prove that nothing was changed but the form.

    Raises:
        SourceError: an output differs by more than float rounding.
    """
    with evaluating(module), evaluating(graph):
        expected, found = call.run(module), call.run(graph)
    for name, theirs in expected.items():
        apart = difference(as_array(found[name]), as_array(theirs))
        if apart:
            raise SourceError(
                f"output {name!r} of the captured graph of {type(unwrapped(module)).__name__} differs from the module's by {apart}: "
                "it changes from call to call, or depends on more than its inputs"
            )
