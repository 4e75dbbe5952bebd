"""A module made prunable: which channels can go, what they are worth, and the module without some of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from edgekit.channels import Choice, Group, LayerCost
from edgekit.errors import DataError, EdgekitError, SourceError
from edgekit.training.checkpoint import evaluating, unwrapped, users_error
from edgekit.training.forward import Array, Call, as_array, exportable, plain_call
from edgekit.training.prune.costs import layer_costs
from edgekit.training.prune.couplings import Coupling, couple, trace
from edgekit.training.prune.cut import Cut, prove, remove_units
from edgekit.training.prune.followers import followers
from edgekit.training.prune.heads import RECORDS, Attention, find_attention
from edgekit.training.prune.padded_forward import replace_padding
from edgekit.training.prune.padding import is_selection, replace_shortcuts
from edgekit.training.prune.slots import Indices, Role, Slot, ignored, owner_of
from edgekit.training.prune.units import OUTPUTS
from edgekit.training.state_dict import remove_parametrizations
from edgekit.training.taps import running
from edgekit.words import some

Examples = Sequence[Array | Tensor] | Mapping[str, Array | Tensor]
"""Inputs of forward, by position or by name, with a batch axis in front."""

SAMPLES = 2
"""How many of the examples are run: a batch of one hides what depends on the batch."""

IGNORED = "they are ignored"

_TRIED = 3
"""To try a group, one in so many of its units goes."""


@dataclass(frozen=True, slots=True)
class Part:
    """What a group has in one layer.

    Attributes:
        layer: its path.
        module: the layer.
        role: "makes" where its outputs are cut, "reads" where its inputs are, "follows" where it only has numbers for channels of
            others: a normalization, a scale.
        weight: `(units, k)`, all numbers of its weight that go with a unit.
        gradient: of `weight`, the same shape; None before a backward pass.
    """

    layer: str
    module: nn.Module
    role: Role
    weight: Tensor
    gradient: Tensor | None


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """What a criterion gets to see of a group.

    Attributes:
        name: of the group.
        units: how many.
        width: channels of one unit.
        parts: the layers with weights that belong to it.
    """

    name: str
    units: int
    width: int
    parts: tuple[Part, ...]


Importance = Callable[[TensorGroup], Tensor]
"""Scores of shape `(units,)` for a group; units with higher ones are kept."""


@dataclass(slots=True)
class Prunable:
    """A copy of a module whose channels can be cut.

    Attributes:
        module: the copy. Gradients that a criterion needs are gathered in it.
        groups: what can be cut, in the order of the layers; all scores are 1 before `score`.
        costs: of all layers that multiply.
        remarks: what cannot be cut, and why.
        replaced: shortcuts that became convolutions.
    """

    module: nn.Module
    groups: tuple[Group, ...]
    costs: tuple[LayerCost, ...]
    remarks: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    _couplings: tuple[Coupling, ...] = field(default=(), repr=False)
    _attentions: tuple[Attention, ...] = field(default=(), repr=False)
    _records: Mapping[str, str] = field(default_factory=dict, repr=False)
    _call: Call | None = field(default=None, repr=False)

    def tensors(self, name: str) -> TensorGroup:
        """What a criterion gets to see of the group of that name."""
        one = next(one for one in self._couplings if one.name == name)
        parts = []
        for member in one.members:
            owner = _layer_of(self.module, member.layer)
            if member.slots and not is_selection(owner):
                weight, gradient = _arranged(self.module, member.slots[0])
                parts.append(Part(member.layer, owner, member.role, weight, gradient))
        return TensorGroup(one.name, one.units, one.width, tuple(parts))

    def score(self, importance: Importance, *, normalize: bool = False) -> tuple[Group, ...]:
        """The groups with the scores of a criterion, which `groups` has from then on.

        Args:
            importance: the criterion.
            normalize: divide by the group's mean, for criteria whose scores of different groups cannot be compared otherwise; those of
                `IMPORTANCE` can.

        Raises:
            DataError: the criterion returns something else than a finite score for each unit.
        """
        scored = []
        for group in self.groups:
            scores = _scores(importance, self.tensors(group.name))
            if scores.shape != (group.units,) or not np.isfinite(scores).all():
                wrong = "numbers that are not finite" if scores.shape == (group.units,) else f"shape {scores.shape}"
                raise DataError(
                    f"the importance of group {group.name!r} is of {wrong}; expected a finite score for each of {group.units} units"
                )
            mean = float(np.abs(scores).mean())
            scored.append(replace(group, scores=scores / mean if normalize and mean else scores))
        self.groups = tuple(scored)
        return self.groups

    def cut(self, choice: Choice) -> nn.Module:
        """Cut what a choice leaves out, in `module`, and return it; proven to compute what it did with these channels masked.

        Names of parameters stay as they were. The groups are used up: find them anew for another cut.

        Raises:
            DataError: a group or unit that there is none of, or a group that would lose all its units.
            SourceError: the cut network computes something else.
        """
        if self._call is None:
            raise SourceError(f"{type(self.module).__name__} has been cut already; find its groups anew")
        cuts = [Cut(one, _removed(one, choice[one.name])) for one in self._couplings if one.name in choice]
        unknown = sorted(choice.keys() - {one.name for one in self._couplings})
        if unknown:
            raise DataError(
                f"there is no group {unknown[0]!r} to choose from; known: {some([one.name for one in self.groups])}"
            )
        cuts = [cut for cut in cuts if len(cut.removed)]
        before = copy.deepcopy(self.module)
        remove_units(self.module, cuts, self._attentions, self._records)
        wrong = prove(before, self.module, self._call, cuts, self._attentions, self._records)
        if wrong:
            names = some([cut.coupling.name for cut in cuts])
            self.module = before
            raise SourceError(
                f"{type(before).__name__} computes something else when channels of {names} are cut: {wrong}; name layers that keep "
                "their channels in 'ignore'"
            )
        self._call = None
        return self.module


def _scores(importance: Importance, group: TensorGroup) -> np.ndarray[Any, np.dtype[np.float64]]:
    """What a criterion, which may be the user's, says of a group."""
    try:
        return np.asarray(torch.as_tensor(importance(group)).detach().cpu(), np.float64)
    except EdgekitError:
        raise
    except Exception as error:  # whatever the user's code raises, or returns
        raise DataError(f"the importance of group {group.name!r} failed: {users_error(error)}") from error


def find_groups(module: nn.Module, example_inputs: Examples, *, ignore: Sequence[str] = ()) -> Prunable:
    """Make a copy of a module prunable. The module itself stays as it is.

    What reaches an output of the network keeps its channels, and so do inputs. Each group is tried: a third of its units is cut, and
    what is left must compute what the network does with these channels masked, to rounding in float64. Groups that fail keep their
    channels and are named in `remarks`.

    Args:
        module: eager, in any mode, on any device.
        example_inputs: of forward, with a batch of at least one; the first two samples are run.
        ignore: paths or patterns of layers whose outputs keep their channels, such as `layer3.*`.

    Raises:
        BackendError: torch-pruning is not installed.
        SourceError: the module does not run on the examples, cannot be followed, has nothing to cut, or no layer that a pattern
            matches.
    """
    if isinstance(module, fx.GraphModule) and any(
        isinstance(node.target, torch._ops.OpOverload) for node in module.graph.nodes
    ):
        raise SourceError(
            "channels can be cut of a module that has its layers as modules, and this one is a graph (a .pt2, what edgekit.load or "
            "prepare_qat gave): prune the module that it was made of, with --model, or single weights with --sparsity"
        )
    module = exportable(unwrapped(module))
    call = plain_call(module, few(example_inputs))
    prunable = _copied(module)
    dtypes = {name: value.dtype for name, value in prunable.state_dict().items()}
    if _is_half(prunable):
        prunable.float()
    with running("model"), evaluating(prunable):
        call.run(prunable)
    replaced = replace_shortcuts(prunable, call)
    prunable, padded = replace_padding(prunable, call)
    found = find_attention(prunable, call)
    kept = dict.fromkeys(ignored(prunable, ignore), IGNORED)
    graph, repairs = trace(prunable, call, found)
    couplings, stay = couple(prunable, graph, repairs, found, kept)
    attentions = tuple(found.values())
    trial = _Trial(prunable, call, attentions)
    couplings = trial.sound(couplings)
    remarks = _remarks(stay | trial.failed)
    if not couplings:
        raise SourceError(
            f"{type(module).__name__} has no channels that can be cut" + (f": {some(remarks)}" if remarks else "")
            + "; widths between layers of torch.nn can be, where nothing else depends on them and they are not ignored"
        )  # fmt: skip
    groups = tuple(Group(one.name, one.makers, np.ones(one.units), one.width) for one in couplings)
    costs = layer_costs(prunable, call, couplings, attentions)
    for name, value in prunable.state_dict(keep_vars=True).items():
        value.data = value.data.to(dtypes.get(name, value.dtype))
    prunable.to(device_of(module))
    return Prunable(
        prunable, groups, costs, tuple(remarks), replaced + padded, couplings, attentions, trial.records, call
    )


class _Trial:
    """Which groups can be cut, found out by cutting a few units of them."""

    def __init__(self, module: nn.Module, call: Call, attentions: Sequence[Attention]) -> None:
        self.failed: dict[str, str] = {}
        self.records = {one.path: RECORDS[0] for one in attentions}
        self._module, self._call, self._attentions = module, call, attentions

    def sound(self, couplings: Sequence[Coupling]) -> tuple[Coupling, ...]:
        """Those that can be cut, together."""
        found = self._halved(couplings)
        if len(found) == len(couplings) or not self._wrong(found):
            return found
        chosen: tuple[Coupling, ...] = ()
        for one in found:  # each works alone, but not with some other
            wrong = self._wrong((*chosen, one))
            if wrong:
                self.failed[one.name] = wrong
            else:
                chosen = (*chosen, one)
        return chosen

    def _halved(self, couplings: Sequence[Coupling]) -> tuple[Coupling, ...]:
        wrong = self._wrong(couplings)
        if not wrong:
            return tuple(couplings)
        if len(couplings) > 1:
            middle = len(couplings) // 2
            return self._halved(couplings[:middle]) + self._halved(couplings[middle:])
        [one] = couplings
        near = [path for path in self.records if any(m.layer.startswith(f"{path}.") for m in one.members)]
        for record in RECORDS[1:] if near else ():
            before = dict(self.records)
            self.records |= dict.fromkeys(near, record)
            if not self._wrong(couplings):
                return tuple(couplings)
            self.records = before
        through = followers(self._module, self._call, one.name)
        self.failed[one.name] = f"{wrong} (what it makes goes through {some(through)})" if through else wrong
        return ()

    def _wrong(self, couplings: Sequence[Coupling]) -> str:
        cuts = [Cut(one, _some_units(one.units)) for one in couplings]
        return prove(self._module, None, self._call, cuts, self._attentions, self.records) if cuts else ""


def _some_units(units: int) -> Indices:
    """A third of the units, in no order."""
    count = max(1, units // _TRIED)
    return np.sort(np.random.default_rng(units).permutation(units)[:count])


def _remarks(reasons: Mapping[str, str]) -> list[str]:
    """One sentence for each reason, other than that the user or the task of the network wants it so."""
    layers: dict[str, list[str]] = {}
    for layer, reason in reasons.items():
        layers.setdefault(reason, []).append(layer)
    return [
        f"channels of {some(names)} stay: {reason}"
        for reason, names in layers.items()
        if reason not in (IGNORED, OUTPUTS)
    ]


def _copied(module: nn.Module) -> nn.Module:
    try:
        copied = copy.deepcopy(module)
    except Exception as error:  # whatever a class of the user's raises
        raise SourceError(f"{type(module).__name__} cannot be copied: {users_error(error)}") from error
    remove_parametrizations(copied)
    return copied.to("cpu")


def device_of(module: nn.Module) -> torch.device:
    """Where a module's first tensor is."""
    return next((one.device for one in (*module.parameters(), *module.buffers())), torch.device("cpu"))


def few(inputs: Examples, count: int = SAMPLES) -> tuple[Array, ...] | dict[str, Array]:
    """The first samples, as arrays."""
    named = inputs if isinstance(inputs, Mapping) else dict(enumerate(inputs))
    arrays = {key: _full(one) for key, one in named.items()}
    batch = next((array.shape[0] for array in arrays.values() if array.ndim), 0)
    if batch:
        arrays = {
            key: array[:count] if array.ndim and array.shape[0] == batch else array for key, array in arrays.items()
        }
    if isinstance(inputs, Mapping):
        return {str(key): array for key, array in arrays.items()}
    return tuple(arrays.values())


def _full(values: Array | Tensor) -> Array:
    """As an array, in which half precision became float32."""
    array = as_array(values.detach().cpu()) if isinstance(values, Tensor) else np.asarray(values)
    return array.astype(np.float32) if array.dtype == np.float16 else array


def _is_half(module: nn.Module) -> bool:
    return any(value.dtype in (torch.float16, torch.bfloat16) for value in module.parameters())


def _layer_of(module: nn.Module, path: str) -> nn.Module:
    """The layer of a path; of a parameter's, the module that has it."""
    owner, name = owner_of(module, path) if path else (module, "")
    child = owner._modules.get(name) if path else module
    return child if child is not None else owner


def _arranged(module: nn.Module, slot: Slot) -> tuple[Tensor, Tensor | None]:
    """What of a tensor goes with each unit, `(units, k)`, and its gradient."""
    owner, name = owner_of(module, slot.tensor)
    value: Tensor = getattr(owner, name)

    def arranged(tensor: Tensor) -> Tensor:
        rows = torch.from_numpy(slot.places.reshape(-1)).to(tensor.device)
        return tensor.detach().index_select(slot.axis, rows).movedim(slot.axis, 0).reshape(len(slot.places), -1)

    return arranged(value), None if value.grad is None else arranged(value.grad)


def _removed(coupling: Coupling, kept: Indices) -> Indices:
    units = np.asarray(kept)
    if (
        units.ndim != 1
        or not len(units)
        or len(np.unique(units)) != len(units)
        or not np.issubdtype(units.dtype, np.integer)
    ):
        raise DataError(
            f"group {coupling.name!r} is to keep {units.tolist()}; expected numbers of units, each once, and at least one"
        )
    if units.min() < 0 or units.max() >= coupling.units:
        raise DataError(f"group {coupling.name!r} is to keep unit {units.max()}; it has {coupling.units}")
    return np.setdiff1d(np.arange(coupling.units), units)
