"""Features of a network: what named layers put out in a forward pass, and which layers of two networks belong together."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from edgekit.data.samples import LABELS
from edgekit.errors import SourceError
from edgekit.training.checkpoint import evaluating, quiet, unwrapped, users_error
from edgekit.training.forward import named_tensors
from edgekit.words import hint, some

Outputs = Mapping[str, Tensor]
"""What a network gave for a batch: outputs by name, and features by `FEATURE` and the layer's name."""

FEATURE = "feature:"
"""In front of a layer's name, the key of its feature among the outputs."""

_CONTAINERS = (nn.ModuleList, nn.Sequential)


class Taps(AbstractContextManager["Taps"]):
    """Records what named layers put out, while it is open as a context manager.

    ::

        with Taps(network, ["layer1", "layer2"]) as taps:
            scores = network(images)
            features = taps.take()      # {"feature:layer1": ..., "feature:layer2": ...}

    A layer that runs several times in a forward pass gives its last output, one that returns several tensors the first of them.
    Gradients flow through what is recorded. In a graph captured from a module, whose layers do not run, the modules
    `taps.<layer>`, "__" for each dot of its name, stand in for them.
    """

    def __init__(self, module: nn.Module, layers: Sequence[str], *, who: str = "model") -> None:
        """Nothing is recorded yet.

        Args:
            module: as it is, or in a wrapper for several devices.
            layers: paths as in `named_modules`; one that is named twice counts once.
            who: what messages call the module: "student", "teacher".

        Raises:
            SourceError: there is no such layer.
        """
        self.layers = tuple(dict.fromkeys(layers))
        self._who = who
        self._modules = {layer: _layer(unwrapped(module), layer, who) for layer in self.layers}
        self._features: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Taps:
        for layer, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._recorder(layer)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._features = {}

    def take(self) -> dict[str, Tensor]:
        """The features of the last forward pass, in the order of `layers`; they are given once and then forgotten.

        Raises:
            SourceError: a layer did not run, or put out no tensor of floats.
        """
        missing = [layer for layer in self.layers if layer not in self._features]
        if missing:
            raise SourceError(
                f"the {self._who}'s layer {missing[0]!r} did not run in forward, or gave no tensor of floats; name a layer that does "
                "(a captured graph has only those that it was captured with)"
            )
        found, self._features = self._features, {}
        return {FEATURE + layer: found[layer] for layer in self.layers}

    def _recorder(self, layer: str) -> Callable[[nn.Module, Any, Any], None]:
        def record(_module: nn.Module, _inputs: Any, output: Any) -> None:
            value = _first_tensor(output)
            if value is not None:
                self._features[layer] = value.clone()  # the next operator may write into it

        return record


def outputs_of(module: nn.Module, batch: Outputs, taps: Taps | None = None) -> dict[str, Tensor]:
    """What forward returns for a batch, by name (see `named_tensors`), and the features of open taps.

    Args:
        module: as it is, or in a wrapper for several devices.
        batch: inputs by name, in the order of forward's when its parameters have other names. Labels are left out, unless
            forward needs a parameter of that name.
        taps: of the module, open.

    Raises:
        SourceError: forward takes other inputs.
    """
    args, kwargs = _arguments(unwrapped(module), batch)
    outputs = named_tensors(module(*args, **kwargs))
    return outputs | taps.take() if taps is not None else outputs


def match_layers(student: nn.Module, teacher: nn.Module, batch: Outputs) -> tuple[tuple[str, str], ...]:
    """Pairs of layers (student's, teacher's) that end the same stage, from the first to the last.

    A stage is all that has the same resolution, or number of tokens; the model's own outputs are none. Stages of the same resolution
    are paired; when there are none, stages are counted from the last one. A layer within a repeated block is taken only where
    no other has the resolution.

    Args:
        student, teacher: modules, in any mode; they stay as they are.
        batch: inputs by name, at least one sample.

    Raises:
        SourceError: one of them does not run on the batch, or has no stages.
    """
    ours, theirs = stages(student, batch, who="student"), stages(teacher, batch, who="teacher")
    common = [size for size in ours if size in theirs]
    if common:
        return tuple((ours[size], theirs[size]) for size in common)
    count = min(len(ours), len(theirs))
    return tuple(zip(list(ours.values())[-count:], list(theirs.values())[-count:], strict=True))


def stages(module: nn.Module, batch: Outputs, *, who: str = "model") -> dict[tuple[int, ...], str]:
    """The layer that ends each stage, by the size of its feature (without batch and channels), in the order in which they end.

    Raises:
        SourceError: the module does not run on the batch, or has no layer between input and output that gives features.
    """
    samples = next((len(value) for value in batch.values() if value.dim()), 0)
    seen, outputs = _run_seen(unwrapped(module), batch, who)
    results = {id(output) for output in outputs.values()}
    found = [
        (layer, tuple(value.shape))
        for layer, value in seen
        if id(value) not in results and value.dim() >= 2 and len(value) == samples and math.prod(value.shape[2:]) > 1
    ] or [(layer, tuple(v.shape)) for layer, v in seen if id(v) not in results and v.dim() == 2 and len(v) == samples]
    if not found:
        raise SourceError(
            f"no layer of the {who} gives features between its inputs and outputs; name layers in 'pairs'"
        )
    found = [(layer, shape) for layer, shape in found if len(shape) == len(found[-1][1])]
    axis = channel_axis([shape for _, shape in found])
    inner = _inside_blocks(unwrapped(module))
    ends: dict[tuple[int, ...], str] = {}
    for layer, shape in found:
        size = shape[1:axis] + shape[axis + 1 :]
        if size not in ends or layer not in inner or ends[size] in inner:
            ends.pop(size, None)
            ends[size] = layer
    return ends


def channel_axis(shapes: Sequence[tuple[int, ...]], others: Sequence[tuple[int, ...]] = ()) -> int:
    """Which axis of features counts channels: 1 as in `(N, C, H, W)`, or the last one as in tokens `(N, T, C)`.

    1. The axis in which another network's features differ, when they agree in the rest.
    2. The axis that grows from the first stage to the last, while the other end shrinks.
    3. The last of three axes, axis 1 of more.

    Args:
        shapes: of a network's features, all of one rank, from the first stage to the last.
        others: of the features of another network that they are paired with.
    """
    last = len(shapes[0]) - 1
    for ours, theirs in zip(shapes, others, strict=False):
        differing = [axis for axis in range(1, last + 1) if ours[axis] != theirs[axis]]
        if differing in ([1], [last]):
            return differing[0]
    front, back = (shapes[-1][axis] - shapes[0][axis] for axis in (1, last))
    if front > 0 > back:
        return 1
    if back > 0 > front:
        return last
    return 2 if last == 2 else 1


def _arguments(module: nn.Module, batch: Outputs) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Positional and named arguments of forward."""
    signature = inspect.signature(module.forward)
    named = {
        name: one
        for name, one in signature.parameters.items()
        if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)
    }
    wants_labels = LABELS in named and named[LABELS].default is inspect.Parameter.empty
    inputs = {name: value for name, value in batch.items() if name != LABELS or wants_labels}
    args, kwargs = ((), inputs) if inputs.keys() <= named.keys() else (tuple(inputs.values()), {})
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise SourceError(
            f"the inputs ({some(list(inputs)) or 'none'}) do not fit {type(module).__name__}.forward{signature}: {error}; "
            "name and count them as forward does"
        ) from error
    return args, kwargs


def _layer(module: nn.Module, layer: str, who: str) -> nn.Module:
    found = _layers(module).get(layer)
    if found is None:
        names = list(_layers(module))
        raise SourceError(f"no layer of the {who} is called {layer!r}; {hint(layer, names)}")
    return found


def _layers(module: nn.Module) -> dict[str, nn.Module]:
    """All layers by name; those that a captured graph has taps for are the taps."""
    taps = _taps_in(module)
    own = {name: child for name, child in module.named_modules() if name and child not in taps.values()}
    if taps:
        own.pop("taps")
    names = {name.replace(".", "__"): name for name in own}
    # A layer without parameters leaves nothing but its tap in the graph.
    return own | {names.get(tap, tap.replace("__", ".")): child for tap, child in taps.items()}


def _taps_in(module: nn.Module) -> dict[str, nn.Module]:
    """What stands in for the layers of a captured graph, by the last part of its own name."""
    holder = getattr(module, "taps", None)
    children = dict(holder.named_children()) if isinstance(holder, nn.Module) else {}
    return children if all(isinstance(child, nn.Identity) for child in children.values()) else {}


def _first_tensor(output: object) -> Tensor | None:
    """The first tensor of floats in what a layer returned."""
    try:
        tensors = named_tensors(output).values()
    except SourceError:
        return None
    return next((one for one in tensors if one.is_floating_point() and not one.is_nested), None)


def _run_seen(module: nn.Module, batch: Outputs, who: str) -> tuple[list[tuple[str, Tensor]], dict[str, Tensor]]:
    """What all layers put out, in the order in which they end, and what the module does."""
    seen: list[tuple[str, Tensor]] = []

    def recorder(layer: str) -> Callable[[nn.Module, Any, Any], None]:
        def record(_module: nn.Module, _inputs: Any, output: Any) -> None:
            value = _first_tensor(output)
            if value is not None:
                seen.append((layer, value))

        return record

    taps = list(_taps_in(module).values())  # what else runs in a captured graph is no layer of the user's
    layers = {name: child for name, child in _layers(module).items() if not taps or child in taps}
    handles = [child.register_forward_hook(recorder(name)) for name, child in layers.items()]
    try:
        with evaluating(module), torch.no_grad(), running(who):
            outputs = outputs_of(module, batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen, outputs


@contextmanager
def running(who: str) -> Iterator[None]:
    """Explains what the user's forward raises.

    Raises:
        SourceError: it raised.
    """
    try:
        with quiet():
            yield
    except SourceError:
        raise
    except Exception as error:  # whatever the user's code raises
        raise SourceError(
            f"the {who} does not run on the batch: {users_error(error)}; give it the inputs that it takes"
        ) from error


def _inside_blocks(module: nn.Module) -> set[str]:
    """Layers within a block of which a list or sequence holds several: of no interest beside the block itself."""
    inner: set[str] = set()
    for name, container in module.named_modules():
        if isinstance(container, _CONTAINERS):
            kinds = Counter(type(child) for child in container)
            for child_name, child in container.named_children():
                if kinds[type(child)] > 1:
                    path = f"{name}.{child_name}" if name else child_name
                    inner |= {f"{path}.{below}" for below, _ in child.named_modules() if below}
    return inner
