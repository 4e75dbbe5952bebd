"""Cut channels out of a graph, or silence them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgekit.channels import Choice
from edgekit.errors import GraphError
from edgekit.graph.annotations import all_values, fresh_name
from edgekit.graph.axes import Ids, constant_array, shape_entries
from edgekit.graph.channel_groups import STAYS, Channels
from edgekit.graph.operators import dims, int_attribute

Kept = NDArray[np.bool_]


def prune_channels(model: ir.Model, channels: Channels, choice: Choice) -> ir.Model:
    """The graph without the units that are not chosen: smaller constants, and numbers of channels where nodes are given some.

    Args:
        model: the one that `channels` was made of; not changed.
        channels: from `edgekit.graph.channel_groups.channel_groups`.
        choice: the units that each group keeps, by its name.

    Raises:
        GraphError: a group is unknown, or would keep nothing or a unit that it does not have.
    """
    kept_units = _kept_units(channels, choice)
    model = model.clone()
    cut = _Cut(model.graph, {name: _kept(units, kept_units) for name, units in channels.units.items()})
    for node in list(model.graph):
        cut.adapt(node)
    for value in list(all_values(model.graph)):
        cut.shrink(value)
    for name in cut.replaced:
        old = model.graph.initializers.get(name)
        if old is not None and not old.uses() and not old.is_graph_output():
            del model.graph.initializers[name]
    return model


def masked(model: ir.Model, channels: Channels, choice: Choice) -> ir.Model:
    """The whole graph, where layers weigh the units that are not chosen with zero: it computes what the pruned one does, up to rounding.

    Raises:
        GraphError: see `prune_channels`.
    """
    kept_units = _kept_units(channels, choice)
    model = model.clone()
    for name, axis in channels.readers:
        units = channels.units.get(name)
        kept = None if units is None else _kept(units, kept_units)[axis]
        value = model.graph.initializers[name]
        if kept is not None and value.const_value is not None:
            shape = [1] * len(value.const_value.shape)
            shape[axis] = len(kept)
            array = value.const_value.numpy()
            _set(value, np.where(kept.reshape(shape), array, np.zeros((), array.dtype)))
    return model


def _kept_units(channels: Channels, choice: Choice) -> Kept:
    """For each unit whether it stays; one more at the end, for `STAYS`."""
    names = {group.name for group in channels.groups}
    for name in choice:
        if name not in names:
            raise GraphError(f"no group of channels is called {name!r}; known: {', '.join(sorted(names)) or 'none'}")
    parts = []
    for group in channels.groups:
        part = np.full(group.units, group.name not in choice)
        if group.name in choice:
            chosen = np.asarray(choice[group.name])
            if not chosen.size:
                raise GraphError(f"{group.name!r} would keep none of its {group.units} channels; keep at least one")
            if chosen.min() < 0 or chosen.max() >= group.units:
                raise GraphError(f"{group.name!r} has units 0 to {group.units - 1}; it cannot keep {chosen.max()}")
            part[chosen] = True
        parts.append(part)
    return np.concatenate([*parts, np.ones(1, np.bool_)])


def _kept(units: Sequence[Ids | None], kept_units: Kept) -> tuple[Kept | None, ...]:
    """For each axis which positions stay; None where all do."""
    assert STAYS == -1, "the last one"
    found = [None if one is None else kept_units[one] for one in units]
    return tuple(None if one is None or one.all() else one for one in found)


def _set(value: ir.Value, array: NDArray[np.generic]) -> None:
    assert value.const_value is not None
    dtype = value.const_value.dtype
    value.const_value = ir.tensor(np.ascontiguousarray(array), dtype=dtype, name=value.name)
    value.shape = ir.Shape(array.shape)


class _Cut:
    """A graph on the way to fewer channels.

    Attributes:
        replaced: names of constants that some node reads no more.
    """

    def __init__(self, graph: ir.Graph, kept: dict[str, tuple[Kept | None, ...]]) -> None:
        self.replaced: list[str] = []
        self._graph, self._kept = graph, kept
        self._names = {value.name for value in all_values(graph)}

    def of(self, value: ir.Value | None) -> tuple[Kept | None, ...]:
        """For each axis of a value which positions stay, None where all do; nothing for a value that stays whole."""
        kept = self._kept.get(value.name or "", ()) if value is not None else ()
        return kept if any(one is not None for one in kept) else ()

    def shrink(self, value: ir.Value) -> None:
        """Take positions out of a constant, and out of a shape."""
        kept = self.of(value)
        if not kept:
            return
        if value.const_value is not None and not value.producer():
            array = value.const_value.numpy()
            for axis, one in enumerate(kept):
                array = array if one is None else np.compress(one, array, axis=axis)
            _set(value, array)
        elif value.shape is not None:
            sizes = zip(value.shape, kept, strict=True)
            value.shape = ir.Shape([size if one is None else int(one.sum()) for size, one in sizes])

    def adapt(self, node: ir.Node) -> None:
        """Give a node the numbers that it needs for what its tensors will be; they still have all positions."""
        if node.domain or not any(self.of(value) for value in (*node.inputs, *node.outputs)):
            return
        match node.op_type:
            case "Conv" | "ConvTranspose":
                self._regroup(node)
            case "Reshape" | "Expand":
                self._reshape(node, 1)
            case "Resize" if len(node.inputs) > 3 and node.inputs[3] is not None:
                self._reshape(node, 3)
            case "Split":
                axis = int_attribute(node, "axis", 0) % _rank(node.inputs[0])
                sizes = [self._size(output, axis) for output in node.outputs]
                if None not in sizes:
                    self._give(node, 1, "split", np.array(sizes, np.int64))
                    node.attributes.pop("num_outputs", None)
            case "Slice":
                self._slice(node)
            case "Pad":
                self._pad(node)

    def _regroup(self, node: ir.Node) -> None:
        kept, groups = self.of(node.inputs[0]), int_attribute(node, "group", 1)
        channels = kept[1] if kept else None
        if channels is not None and groups > 1 and groups == len(channels):
            node.attributes["group"] = ir.AttrInt64("group", int(channels.sum()))

    def _reshape(self, node: ir.Node, index: int) -> None:
        """Sizes that are cut, in a shape that is given; those of -1 and those that are computed come by themselves."""
        entries = shape_entries(node.inputs[index])
        assert entries is not None, "or nothing would be cut"
        axes = list(range(len(entries)))
        if node.op_type == "Resize" and "axes" in node.attributes:
            axes = [axis % _rank(node.inputs[0]) for axis in node.attributes["axes"].as_ints()]
        offset = _rank(node.outputs[0]) - len(entries) if node.op_type == "Expand" else 0
        sizes = [self._size(node.outputs[0], axis + offset) for axis in axes]
        automatic = (1,) if node.op_type == "Expand" else (-1,) if node.op_type == "Reshape" else ()
        wanted = [
            old if old is None or old in automatic or size is None else size
            for old, size in zip(entries, sizes, strict=True)
        ]
        if wanted == entries:
            return
        name = "sizes" if node.op_type == "Resize" else "shape"
        if None not in wanted:
            self._give(node, index, name, np.array(wanted, np.int64))
            return
        computed = node.inputs[index]
        producer = computed.producer() if computed is not None else None
        assert producer is not None, "something computes it"
        new = ir.node("Concat", list(producer.inputs), {"axis": 0}, name=fresh_name(f"{node.name}.{name}", self._names))
        start = 0
        for place, part in enumerate(producer.inputs):
            array = constant_array(part)
            count = array.size if array is not None else (dims(part) or (1,))[0] or 1
            if array is not None:
                self._give(new, place, name, np.array(wanted[start : start + count], np.int64))
            start += count
        new.outputs[0].name = fresh_name(f"{new.name}_y", self._names)
        new.outputs[0].shape, new.outputs[0].type = ir.Shape([len(wanted)]), ir.TensorType(ir.DataType.INT64)
        self._graph.insert_before(node, new)
        node.replace_input_with(index, new.outputs[0])

    def _slice(self, node: ir.Node) -> None:
        kept, starts, ends = self.of(node.inputs[0]), constant_array(node.inputs[1]), constant_array(node.inputs[2])
        along = constant_array(node.inputs[3]) if len(node.inputs) > 3 else None
        if not kept or starts is None or ends is None:
            return
        listed = range(len(starts)) if along is None else [int(axis) % len(kept) for axis in along]
        new_starts, new_ends = starts.astype(np.int64), ends.astype(np.int64)
        for i, axis in enumerate(listed):
            one = kept[axis]
            if one is not None:
                start, end, _ = slice(int(starts[i]), int(ends[i])).indices(len(one))
                new_starts[i], new_ends[i] = one[:start].sum(), one[: max(start, end)].sum()
        self._give(node, 1, "starts", new_starts)
        self._give(node, 2, "ends", new_ends)
        for index, name in ((3, "axes"), (4, "steps")):  # all of one type
            array = constant_array(node.inputs[index]) if len(node.inputs) > index else None
            if array is not None:
                self._give(node, index, name, array.astype(np.int64))

    def _pad(self, node: ir.Node) -> None:
        kept, pads = self.of(node.outputs[0]), constant_array(node.inputs[1])
        along = constant_array(node.inputs[3]) if len(node.inputs) > 3 else None
        if not kept or pads is None:
            return
        listed = range(len(kept)) if along is None else [int(axis) % len(kept) for axis in along]
        new = pads.astype(np.int64)
        for i, axis in enumerate(listed):
            one, before, behind = kept[axis], int(pads[i]), int(pads[i + len(listed)])
            if one is not None:
                new[i], new[i + len(listed)] = one[:before].sum(), one[len(one) - behind :].sum()
        self._give(node, 1, "pads", new)

    def _size(self, value: ir.Value, axis: int) -> int | None:
        """How long an axis will be, or None where that is not known."""
        kept, shape = self.of(value), dims(value)
        one = kept[axis] if kept else None
        if one is not None:
            return int(one.sum())
        return shape[axis] if shape is not None else None

    def _give(self, node: ir.Node, index: int, name: str, array: NDArray[np.int64]) -> None:
        """Let a node's input be a new constant, unless it is the same."""
        old = node.inputs[index] if len(node.inputs) > index else None
        current = constant_array(old)
        if current is not None and current.dtype == array.dtype and np.array_equal(current, array):
            return
        if old is not None:
            self.replaced.append(old.name or "")
        name = fresh_name(f"{node.name}.{name}", self._names)
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.INT64)
        self._graph.register_initializer(value)
        node.resize_inputs(max(len(node.inputs), index + 1))
        node.replace_input_with(index, value)


def _rank(value: ir.Value | None) -> int:
    shape = dims(value)
    assert shape is not None, "or nothing would be cut"
    return len(shape)
