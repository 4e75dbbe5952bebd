"""What a caller relies on: the names, types and sizes of a graph's inputs and outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from edgekit.errors import GraphError

Dims = tuple[int | str | None, ...]


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output: its element type, and its sizes: a number, the name of an open one, or None. `dims` is None without a rank."""

    name: str
    dtype: str
    dims: Dims | None

    def __str__(self) -> str:
        """Such as "float32 of N x 3 x ? x ?"."""
        sizes = "any rank" if self.dims is None else " x ".join("?" if dim is None else str(dim) for dim in self.dims)
        return f"{self.dtype.lower()} of {sizes or 'one number'}"


@dataclass(frozen=True, slots=True)
class Contract:
    """The inputs that a caller has to give, and the outputs, in order."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


def contract(model: ir.Model) -> Contract:
    """The contract of a model; inputs that have a default value are not part of it."""
    required = [value for value in model.graph.inputs if not value.is_initializer()]
    return Contract(tuple(map(_port, required)), tuple(map(_port, model.graph.outputs)))


def check_contract(promised: Contract, model: ir.Model) -> None:
    """Hold a rewritten model against what was promised to its callers.

    A size that was open stays open, unless it was unknown and is an output's: those may be found out.

    Raises:
        GraphError: an input or output is missing, new, or another one.
    """
    found = contract(model)
    symbols = {dim for port in promised.inputs for dim in port.dims or () if isinstance(dim, str)}
    for what, before, after in (
        ("inputs", promised.inputs, found.inputs),
        ("outputs", promised.outputs, found.outputs),
    ):
        names = [[port.name for port in ports] for ports in (before, after)]
        if names[0] != names[1]:
            raise GraphError(
                f"the rewritten model's {what} are {_listed(names[1])}, the source's were {_listed(names[0])}: report this as a bug"
            )
        for old, new in zip(before, after, strict=True):
            if not _kept(old, new, symbols if what == "outputs" else None):
                raise GraphError(f"{what[:-1]} {old.name!r} was {old} and is {new}: report this as a bug")


def _kept(old: Port, new: Port, symbols: set[str] | None) -> bool:
    """Whether a port is what it was; an output's sizes may be found out, but for those that an input calls by name."""
    if old.dtype != new.dtype:
        return False
    if old.dims is None or new.dims is None:
        return old.dims is None
    if len(old.dims) != len(new.dims):
        return False
    for before, after in zip(old.dims, new.dims, strict=True):
        fixed = isinstance(before, int)
        if fixed != isinstance(after, int) and (fixed or symbols is None or before in symbols):
            return False
        if fixed and before != after:
            return False
    return True


def _port(value: ir.Value) -> Port:
    kind = value.dtype.name if value.dtype is not None else str(value.type or "unknown")
    dims = None if value.shape is None else tuple(d if isinstance(d, int) else d.value or None for d in value.shape)
    return Port(value.name or "", kind, dims)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names)) or "none"
