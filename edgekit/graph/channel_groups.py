"""Which channels of an ONNX graph can only be cut together, what they are worth, and what layers cost without them.

All positions along all axes of all tensors get a number; operators tie those that share a fate (`edgekit.graph.axis_rules`). What is tied
together is one unit; units that the same tensors have are a group. An operator without a rule, and all that the graph reads and gives,
keeps what it touches: the name of the operator and its node is the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgekit.channels import Group, LayerCost
from edgekit.errors import GraphError
from edgekit.graph.annotations import annotated_values
from edgekit.graph.axes import Axes, Ids, Maker, NoRule
from edgekit.graph.axis_rules import RULES, described
from edgekit.graph.filter_scores import Criterion, criterion_function
from edgekit.graph.operators import Layer, dims, layers
from edgekit.words import hint

OLDEST_OPSET = 13
"""From it on, what is cut is an input of Split, Squeeze and Softmax works along one axis."""
STAYS = -1
"""Instead of the number of a unit: the position is of none."""


@dataclass(frozen=True, slots=True)
class Channels:
    """What can be cut from a graph.

    Attributes:
        groups: with their scores.
        costs: of all layers, in graph order.
        fixed: why the channels stay that a layer makes, by the layer's name, for those where none can go.
        units: by the name of each tensor that can become smaller, for each axis the number of the unit at each position, or `STAYS`;
            None for an axis that stays. Units are counted through all groups, in their order.
        readers: constants, and the axis along which they weigh channels.
    """

    groups: tuple[Group, ...]
    costs: tuple[LayerCost, ...]
    fixed: Mapping[str, str]
    units: Mapping[str, tuple[Ids | None, ...]]
    readers: tuple[tuple[str, int], ...]


def channel_groups(
    model: ir.Model, *, criterion: str | Criterion = "l1", ignore: Sequence[str] = (), seed: int = 0
) -> Channels:
    """The groups of channels of a float graph in canonical form: constants as initializers, shapes inferred, nodes named.

    Heads are the units of attention, whether queries, keys and values are separate products or one that is taken apart. A residual stream
    goes as a whole, and stays where LayerNormalization takes statistics over it.

    Args:
        model: not changed.
        criterion: "l1", "l2", "fpgm" or "random", or a function of a group's filters `(units, weights)` that gives each a score.
        ignore: shell-style patterns of the names of layers that keep their output channels.
        seed: of random scores.

    Raises:
        GraphError: the model has quant attributes or is of an old opset; the criterion needs more than weights; no layer is called so.
    """
    _check(model)
    score = criterion_function(criterion, seed)
    choices: dict[str, int] = {}
    while True:
        axes = _followed(model, choices)
        _ignore(axes, ignore)
        found = _Found.of(axes)
        tried = dict(choices)
        for name, split in axes.splits.items():
            if split.chosen + 1 < split.candidates and not (found.units_of(split.ids) != STAYS).any():
                choices[name] = split.chosen + 1
        for node, along in axes.layers.items():
            if len(found.movable(along)) > 2:
                choices[node.name or ""] = 1
        if choices == tried:
            return _channels(model, axes, found, score)


def _check(model: ir.Model) -> None:
    annotated = annotated_values(model.graph)
    if annotated:
        raise GraphError(
            f"tensor {annotated[0].name!r} has a quantization grid, which would not fit fewer channels; prune first, then quantize"
        )
    opset = model.opset_imports.get("", 1)
    if opset < OLDEST_OPSET:
        raise GraphError(
            f"the model is of opset {opset}; channels are followed from opset {OLDEST_OPSET} on: upgrade it first"
        )


def _followed(model: ir.Model, choices: Mapping[str, int]) -> Axes:
    """All nodes, one after the other."""
    axes = Axes(choices)
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        if value.shape is not None or value.const_value is not None:
            axes.get(value)
    for node in model.graph:
        try:
            for value in _captured(node, model.graph):
                axes.fix_value(value, f"{described(node)} reads them in a subgraph")
            rule = RULES.get(node.op_type) if not node.domain else None
            if rule is None:
                raise NoRule("is not followed")
            outputs = rule(node, axes)
            axes.of.update(zip(node.outputs, outputs, strict=True))
        except NoRule as error:
            _keep(node, axes, f"{described(node)} {error}")
    for value in model.graph.outputs:
        if value in axes.of:
            axes.fix_value(value, f"graph output {value.name!r}")
    return axes


def _keep(node: ir.Node, axes: Axes, reason: str) -> None:
    """All that a node reads stays, and all that it makes."""
    for value in node.inputs:
        if value is not None and (value in axes.of or value.shape is not None):
            axes.fix_value(value, reason)
    for value in node.outputs:
        if value.shape is not None:
            sizes = [size if isinstance(size, int) else None for size in value.shape]
            axes.of[value] = tuple(axes.fresh_fixed(size, reason) for size in sizes)


def _captured(node: ir.Node, graph: ir.Graph) -> Iterator[ir.Value]:
    """What the subgraphs of a node, and theirs, read or give of `graph`."""
    for attribute in node.attributes.values():
        inner = [attribute.as_graph()] if attribute.type == ir.AttributeType.GRAPH else []
        inner = list(attribute.as_graphs()) if attribute.type == ir.AttributeType.GRAPHS else inner
        for one in inner:
            values = [*one.outputs, *(value for each in one for value in each.inputs)]
            yield from (value for value in values if value is not None and value.graph is graph)
            for each in one:
                yield from _captured(each, graph)


def _ignore(axes: Axes, patterns: Sequence[str]) -> None:
    names = [maker.node.name or "" for maker in axes.makers]
    for pattern in patterns:
        matching = [maker for maker in axes.makers if fnmatchcase(maker.node.name or "", pattern)]
        if not matching:
            raise GraphError(f"no layer with weights is called {pattern!r}; {hint(pattern, names)}")
        for maker in matching:
            axes.fix(maker.ids, f"{described(maker.node)} is to keep its channels")


@dataclass(frozen=True, slots=True)
class _Found:
    """Groups of units, each the smallest id of its positions.

    Attributes:
        roots: for each id, the unit that it is of.
        numbers: for each root, its place among all units of all groups, or `STAYS`.
        groups: for each group, the makers that have its channels, the first of which names it, and the roots in order.
        reasons: why roots stay.
    """

    roots: Ids
    numbers: Ids
    groups: list[tuple[list[Maker], Ids]]
    reasons: dict[int, str]

    @classmethod
    def of(cls, axes: Axes) -> _Found:
        roots, reasons = axes.components()
        movable = np.zeros(len(roots), np.bool_)
        for maker in axes.makers:
            movable[roots[maker.ids]] = True
        movable[list(reasons)] = False
        arrays = {id(ids): ids for one in axes.of.values() for ids in one if ids is not None}
        classes = _classes([roots[ids] for ids in arrays.values()], movable)
        makers: dict[int, list[Maker]] = {}
        members: dict[int, Ids] = {}
        for maker in axes.makers:
            own = roots[maker.ids]
            own = own[movable[own]]
            for one in dict.fromkeys(classes[own].tolist()):
                makers.setdefault(one, []).append(maker)
                members.setdefault(one, np.asarray(list(dict.fromkeys(own[classes[own] == one].tolist())), np.intp))
        groups = [(makers[one], members[one]) for one in makers if len(members[one]) > 1]
        numbers = np.full(len(roots), STAYS, np.intp)
        units = np.concatenate([np.zeros(0, np.intp), *(group for _, group in groups)])
        numbers[units] = np.arange(len(units))
        return cls(roots, numbers, groups, reasons)

    def units_of(self, ids: Ids) -> Ids:
        """For each position the number of its unit, or `STAYS`."""
        return self.numbers[self.roots[ids]]

    def movable(self, along: Sequence[Ids | None]) -> list[Ids]:
        """The axes of several that have units."""
        return [ids for ids in along if ids is not None and (self.units_of(ids) != STAYS).any()]

    def reason(self, ids: Ids) -> str:
        """Why positions stay."""
        given = [self.reasons[root] for root in self.roots[ids].tolist() if root in self.reasons]
        if given:
            return given[0]
        return "its channels can only go all together" if len(ids) > 1 else "it has a single channel"


def _classes(arrays: Sequence[Ids], movable: NDArray[np.bool_]) -> Ids:
    """A number for each unit: the same for two that occur as often in each of the arrays.

    So an array has a whole class or nothing of it: as long as each class keeps a unit, nothing becomes empty.
    """
    classes = np.zeros(len(movable), np.intp)
    taken = 1
    for array in arrays:
        moving = array[movable[array]]
        if not len(moving):
            continue
        own, counts = np.unique(moving, return_counts=True)
        pairs, inverse = np.unique(np.stack([classes[own], counts]), axis=1, return_inverse=True)
        classes[own] = taken + inverse.reshape(-1)
        taken += pairs.shape[1]
    return classes


def _channels(model: ir.Model, axes: Axes, found: _Found, score: Criterion) -> Channels:
    groups: list[Group] = []
    counts: dict[str, int] = {}
    start = 0
    for makers, members in found.groups:
        numbers = np.arange(start, start + len(members))
        start += len(members)
        name = makers[0].node.name or ""
        counts[name] = counts.get(name, 0) + 1
        width = int(np.isin(found.units_of(makers[0].ids), numbers).sum()) // len(members)
        scores = _scores(axes, found, makers, numbers, score)
        unique = name if counts[name] == 1 else f"{name}:{counts[name]}"
        groups.append(Group(unique, tuple(dict.fromkeys(m.node.name or "" for m in makers)), scores, width))
    fixed = {
        maker.node.name or "": found.reason(maker.ids)
        for maker in axes.makers
        if (found.units_of(maker.ids) == STAYS).all()
    }
    units: dict[str, tuple[Ids | None, ...]] = {}
    for value, ids in axes.of.items():
        numbered = tuple(None if one is None else found.units_of(one) for one in ids)
        kept = tuple(one if one is not None and (one != STAYS).any() else None for one in numbered)
        if any(one is not None for one in kept):
            units[value.name or ""] = kept
    readers = dict.fromkeys((value.name or "", axis) for value, axis in axes.readers)
    return Channels(tuple(groups), tuple(_costs(model, axes, found, groups)), fixed, units, tuple(readers))


def _scores(axes: Axes, found: _Found, makers: Sequence[Maker], numbers: Ids, score: Criterion) -> NDArray[np.float64]:
    """Of each unit, from all weights that make it; 1 in the mean."""
    filters = []
    for maker in makers:
        ids, constant = axes.of[maker.weight][maker.axis], maker.weight.const_value
        assert ids is not None and constant is not None
        rows = np.moveaxis(constant.numpy(), maker.axis, 0)
        places = found.units_of(ids)
        own = np.flatnonzero(np.isin(places, numbers))
        own = own[np.argsort(places[own], kind="stable")]
        ordered = rows if np.array_equal(own, np.arange(len(rows))) else rows[own]
        wide = ordered.dtype if ordered.dtype == np.float64 else np.dtype(np.float32)
        filters.append(ordered.reshape(len(numbers), -1).astype(wide, copy=False))
    together = filters[0].view() if len(filters) == 1 else np.concatenate(filters, axis=1)
    together.setflags(write=False)  # it may be the graph's own
    scores = np.asarray(score(together), np.float64)
    if scores.shape != (len(numbers),):
        raise GraphError(
            f"the criterion gave scores of shape {scores.shape} for {len(numbers)} units; expected one for each unit"
        )
    mean = scores.mean()
    return scores / mean if mean > 0 else scores


def _costs(model: ir.Model, axes: Axes, found: _Found, groups: Sequence[Group]) -> Iterator[LayerCost]:
    owner = np.repeat(np.arange(len(groups)), [group.units for group in groups])
    known = {layer.name: layer for layer in layers(model)}
    tables = {maker.node: maker for maker in axes.makers if maker.node.op_type == "Gather"}

    def shares(ids: Ids | None) -> tuple[tuple[str, float], ...]:
        if ids is None:
            return ()
        units = found.units_of(ids)
        own, counts = np.unique(owner[units[units != STAYS]], return_counts=True)
        return tuple((groups[i].name, int(n) / len(ids)) for i, n in zip(own, counts, strict=True))

    for node in model.graph:
        name = node.name or ""
        if node in tables:
            made, table = tables[node].ids, dims(tables[node].weight)
            assert table is not None and table[0] is not None, "it is a constant"
            yield LayerCost(name, 0, table[0] * len(made), (table[0], len(made)), (), shares(made))
        elif name in known and not node.domain:
            layer = known[name]
            read, output, *repeated = axes.layers.get(node, (None, None))
            for ids in found.movable(repeated):  # takes the place of what stays
                read, output = (read, ids) if read is not None and found.movable([read]) else (ids, output)
            yield LayerCost(name, layer.macs, layer.parameters, _widths(layer), shares(read), shares(output))


def _widths(layer: Layer) -> tuple[int, int]:
    axis = 1 if layer.op_type in ("Conv", "ConvTranspose") else -1
    read, made = (shape[axis] if shape else None for shape in (layer.input_shape, layer.output_shape))
    return read or 1, made or 1
