"""Attention whose heads can be cut: where it keeps them, and what has to know how many are left."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor, fx, nn

from edgekit.training.checkpoint import evaluating
from edgekit.training.forward import Call
from edgekit.training.prune.slots import Indices, Member, Role, Side, Slot

HEAD_COUNTS = (
    "num_heads", "n_heads", "n_head", "nhead", "nheads", "heads", "num_attention_heads", "num_kv_heads", "n_kv_heads",
    "num_key_value_heads", "n_local_heads",
)  # fmt: skip
"""Names of attributes that hold a number of heads."""

KEY_VALUE_COUNTS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
INNER_WIDTHS = ("all_head_size", "inner_dim", "attn_dim", "attention_dim", "inner_size", "proj_dim", "hidden_dim")
"""Names of attributes that can only be the width of all heads together."""

TRACED = "traced"
RECORDS = ("all", "inner", "none", TRACED)
"""How a layer learns how many heads are left: from all attributes whose value is their width, from those in `INNER_WIDTHS`, from the
number of heads alone, or from that and a traced forward that no longer takes their width from its input.

`embed_dim` may be the one or the other, depending on what forward does with it: what works is found by trying.
"""


@dataclass(frozen=True, slots=True)
class Attention:
    """One attention layer, as something with inputs, heads and outputs.

    Attributes:
        path: of the module.
        units: heads that can be cut one by one; with fewer key and value heads than query heads, those.
        inner: channels of all heads together.
        inputs: width of what it reads.
        outputs: width of what it puts out.
        readers: weights that read the input, with the axis of its channels in them.
        rows: what makes the heads: tensor, axis, and `(units, k)` places.
        out: the layer that joins the heads; None where another module does, and the heads themselves are the output.
        norm: the normalization that it starts with.
    """

    path: str
    units: int
    inner: int
    inputs: int
    outputs: int
    readers: tuple[tuple[str, int], ...]
    rows: tuple[Slot, ...]
    out: str | None
    norm: str | None = None

    def width(self, side: Side) -> int:
        """Channels at a side."""
        return self.inputs if side == "in" else self.outputs

    def bundles(self, side: Side) -> Indices | None:
        """Channels of a side that go together: those of a head, where heads are the output."""
        return np.arange(self.inner).reshape(self.units, -1) if side == "out" and self.out is None else None

    def members(self, side: Side, channels: Indices) -> tuple[Member, ...]:
        """What goes with channels of a side, `(units, k)`."""
        if side == "in":
            readers = [
                Member(name.rpartition(".")[0], "reads", (Slot(name, axis, channels),), channels)
                for name, axis in self.readers
            ]
            if self.norm is None:
                return tuple(readers)
            slots = tuple(Slot(f"{self.norm}.{name}", 0, channels) for name in ("weight", "bias"))
            return (Member(self.norm, "follows", slots, channels), *readers)
        if self.out is not None:
            slots = (Slot(f"{self.out}.weight", 0, channels), Slot(f"{self.out}.bias", 0, channels))
            return (Member(self.out, "makes", slots, channels),)
        heads = np.asarray([row[0] * self.units // self.inner for row in np.sort(channels, axis=1)], np.intp)
        return self._makers(heads)

    def heads(self) -> tuple[Member, ...]:
        """What goes with each head, where the attention joins them itself."""
        assert self.out is not None, "otherwise they are the output"
        places = np.arange(self.inner).reshape(self.units, -1)
        reader = Member(self.out, "reads", (Slot(f"{self.out}.weight", 1, places),), places)
        return (*self._makers(np.arange(self.units)), reader)

    def _makers(self, heads: Indices) -> tuple[Member, ...]:
        layers: dict[str, list[Slot]] = {}
        for row in self.rows:
            layers.setdefault(row.tensor.rpartition(".")[0], []).append(Slot(row.tensor, row.axis, row.places[heads]))
        role: Role = "makes"
        return tuple(Member(layer, role, tuple(slots), slots[0].places) for layer, slots in layers.items())


def find_attention(module: nn.Module, call: Call) -> dict[nn.Module, Attention]:
    """All attention layers whose heads are understood, by module."""
    found: dict[nn.Module, Attention] = {}
    candidates = {
        child: path
        for path, child in module.named_modules()
        if not isinstance(child, nn.MultiheadAttention) and any(_count(child, name) for name in HEAD_COUNTS)
    }
    readings, norms = _inputs_of_linears(module, call, candidates)
    for path, child in module.named_modules():
        one = _multihead(path, child) if isinstance(child, nn.MultiheadAttention) else None
        if child in readings:
            one = _own(path, child, readings[child], norms.get(child))
        if one is not None:
            found[child] = one
    return {child: one for child, one in found.items() if not _holds_other(child, found)}


def _holds_other(child: nn.Module, found: Mapping[nn.Module, Attention]) -> bool:
    return any(inner is not child and inner in found for inner in child.modules())


def _multihead(path: str, child: nn.MultiheadAttention) -> Attention | None:
    if child.in_proj_weight is None or child.bias_k is not None or child.add_zero_attn:
        return None
    front, (rows_in, size) = f"{path}." if path else "", child.in_proj_weight.shape
    inner = rows_in // 3
    rows = _packed_rows(3, child.num_heads, child.head_dim, together=False)
    slots = [Slot(f"{front}in_proj_weight", 0, rows)]
    if child.in_proj_bias is not None:
        slots.append(Slot(f"{front}in_proj_bias", 0, rows))
    readers = ((f"{front}in_proj_weight", 1),)
    outputs = child.out_proj.weight.shape[0]
    return Attention(path, child.num_heads, inner, size, outputs, readers, tuple(slots), f"{front}out_proj")


def _packed_rows(parts: int, heads: int, size: int, *, together: bool) -> Indices:
    """Rows of each head in a weight that makes queries, keys and values: part by part, or `together` head by head."""
    places = np.arange(parts * heads * size)
    if together:
        return places.reshape(heads, parts * size)
    return places.reshape(parts, heads, size).transpose(1, 0, 2).reshape(heads, -1)


def _inputs_of_linears(
    module: nn.Module, call: Call, candidates: Iterable[nn.Module]
) -> tuple[dict[nn.Module, list[tuple[nn.Linear, bool]]], dict[nn.Module, nn.Module]]:
    """For modules that may be attention, their linear layers as they run, and whether one reads what the module gets.

    The second mapping has the normalization of modules that start with one, and read what that gives.
    """
    readings: dict[nn.Module, list[tuple[nn.Linear, bool]]] = {}
    given: dict[nn.Module, Tensor] = {}
    norms: dict[nn.Module, nn.Module] = {}
    handles = []

    def enter(child: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        tensors = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor) and one.is_floating_point()]
        if tensors:
            given[child] = tensors[0]
            readings[child] = []

    def is_given(child: nn.Module, value: object) -> bool:
        theirs = given.get(child)
        if theirs is None or not isinstance(value, Tensor):
            return False
        return value.shape == theirs.shape and value.data_ptr() == theirs.data_ptr()

    def reads(child: nn.Module, linear: nn.Linear, value: object) -> None:
        if child in readings:
            readings[child].append((linear, is_given(child, value)))

    def normalizes(child: nn.Module, norm: nn.Module, value: object, output: Tensor) -> None:
        if is_given(child, value) and not readings[child]:
            norms[child], given[child] = norm, output

    for child in candidates:
        handles.append(child.register_forward_pre_hook(enter, with_kwargs=True))
        handles += [
            linear.register_forward_pre_hook(
                lambda layer, args, child=child: reads(child, layer, args[0]) if args else None
            )
            for linear in child.modules()
            if isinstance(linear, nn.Linear)
        ]
        handles += [
            norm.register_forward_hook(
                lambda layer, args, output, child=child: normalizes(child, layer, args[0], output) if args else None
            )
            for norm in child.modules()
            if isinstance(norm, nn.LayerNorm | nn.RMSNorm)
        ]
    try:
        with evaluating(module):
            call.run(module)
    finally:
        for handle in handles:
            handle.remove()
    return readings, norms


def _own(
    path: str, child: nn.Module, readings: list[tuple[nn.Linear, bool]], norm: nn.Module | None
) -> Attention | None:
    """An attention layer of the user's: queries, keys and values from one input, by three layers or a single one."""
    names = {layer: f"{path}.{name}".lstrip(".") for name, layer in child.named_modules()}
    projections = [layer for layer, reads in readings if reads]
    others = [layer for layer, reads in readings if not reads]
    if len(projections) not in (1, 3) or len(others) > 1 or len({layer.in_features for layer in projections}) > 1:
        return None
    counts = [_count(child, name) for name in HEAD_COUNTS if _count(child, name)]
    queries = max(counts)
    shared = [_count(child, name) for name in KEY_VALUE_COUNTS if _count(child, name) >= 1]
    units = min([*shared, queries])
    widths = [layer.out_features for layer in projections]
    inner = others[0].in_features if others else widths[0] // (3 if len(widths) == 1 else 1)
    if inner % queries or any(one % units for one in widths):
        return None
    if len(widths) == 1:
        if widths != [3 * inner] or units != queries:
            return None
        together = any(name in names[projections[0]].rpartition(".")[2] for name in ("query_key_value",))
        rows = [_packed_rows(3, units, inner // units, together=together)]
    else:
        if widths[0] != inner or (not others and len(set(widths)) > 1):
            return None
        rows = [np.arange(size).reshape(units, -1) for size in widths]
    slots = [
        Slot(f"{names[layer]}.{name}", 0, places)
        for layer, places in zip(projections, rows, strict=True)
        for name in ("weight", "bias")
        if getattr(layer, name) is not None
    ]
    out = others[0] if others else None
    return Attention(
        path=path,
        units=units,
        inner=inner,
        inputs=projections[0].in_features,
        outputs=inner if out is None else out.out_features,
        readers=tuple((f"{names[layer]}.weight", 1) for layer in projections),
        rows=tuple(slots),
        out=None if out is None else names[out],
        norm=None if norm is None else names[norm],
    )


def write_heads(child: nn.Module, attention: Attention, kept: int, record: str) -> None:
    """Let a module know that some of its heads are left, in the attributes that it reads them from.

    Args:
        child: of the pruned copy.
        attention: as it was before.
        kept: heads that are left, of `attention.units`.
        record: one of `RECORDS`.
    """
    units = attention.units
    for name, value in list(vars(child).items()):
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        is_count = name in HEAD_COUNTS and value % units == 0
        is_width = value == attention.inner and (record == "all" or (record == "inner" and name in INNER_WIDTHS))
        if is_count or is_width:
            setattr(child, name, value // units * kept)


def _count(child: nn.Module, name: str) -> int:
    value = child.meta.get(name, 0) if isinstance(child, fx.GraphModule) else vars(child).get(name, 0)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0
