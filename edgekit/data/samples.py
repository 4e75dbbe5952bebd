"""What a model takes, and arrays held against it: which axis counts samples, shapes, types, values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import DataError
from edgekit.words import nearest

Array = NDArray[Any]

LABELS = "labels"
"""The name of the array that holds class numbers, unless the model has an input of that name."""


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One input of a model.

    Attributes:
        name: of the input.
        dtype: of its elements.
        shape: its dimensions; None for a dynamic one. Axis 0 is the batch axis.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        """`input 'image' (float32, N x 1 x 8 x 8)`, for messages."""
        return f"input {self.name!r} ({self.dtype.name}, {_shape_text(self.shape)})"


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One call of a model.

    Attributes:
        feeds: an array for each input, by name.
        labels: int64, the class of each sample, or None.
        single: this is one call as it stands, not samples along axis 0 of every array.
    """

    feeds: dict[str, Array]
    labels: NDArray[np.int64] | None = None
    single: bool = False

    def __len__(self) -> int:
        """Number of samples; a single call is one."""
        return 1 if self.single else len(next(iter(self.feeds.values())))


@dataclass(frozen=True, slots=True)
class Plan:
    """How arrays become calls of the model.

    Attributes:
        rows: inputs whose arrays have one axis more than the input: each row is the input of one call.
        single: each batch is one call that cannot be merged or cut.
        fixed: samples that each batch must have, where the model's batch axis is static; else None.
    """

    rows: frozenset[str]
    single: bool
    fixed: int | None


def as_array(value: Any, source: str) -> Array:
    """A numpy array, a tensor of torch or of whatever converts itself, a number or a list of numbers, as an array.

    Raises:
        DataError: when it holds anything but numbers.
    """
    if hasattr(value, "detach"):  # a torch tensor, which may sit on a device or want a gradient
        value = value.detach().cpu()
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise DataError(f"{source}: a {type(value).__name__} is no array of numbers ({error})") from error
    if array.ndim and array.dtype.kind in "SU":
        raise DataError(
            f"{source}: holds text (numpy {array.dtype}); models are given numbers and truth values here: let the part of the model "
            "that turns text into numbers run before it, and give what that makes"
        )
    if array.dtype.kind in "OSUVMm":
        raise DataError(f"{source}: a {type(value).__name__} is no array of numbers; give numpy arrays")
    return array


def without_doubles(array: Array) -> Array:
    """float64 as float32, anything else as it is: what a torch model is fed."""
    return np.asarray(array, np.float32 if array.dtype == np.float64 else None, order="C")


def by_name(
    source: str, arrays: Mapping[str, Array] | Sequence[Array], inputs: Sequence[InputSpec]
) -> dict[str, Array]:
    """The array of each input: by name, or in order when they have none. Arrays that no input asks for are left out.

    Raises:
        DataError: when an input has no array.
    """
    names = [spec.name for spec in inputs]
    if isinstance(arrays, Mapping):
        missing = [name for name in names if name not in arrays]
        if missing:
            found = [name for name in arrays if name != LABELS]
            near = nearest(missing[0], found, cutoff=0.6)
            hint = f"rename {near!r}" if near else "name the arrays like the inputs"
            listed = ", ".join(map(repr, found)) or "none"
            raise DataError(f"{source}: no array for input {missing[0]!r} (arrays found: {listed}); {hint}")
        return {name: arrays[name] for name in names}
    if len(arrays) != len(names):
        raise DataError(
            f"{source}: {len(arrays)} unnamed array{'s' if len(arrays) != 1 else ''} for a model with {len(names)} "
            f"inputs ({', '.join(map(repr, names))}); name the arrays like the inputs"
        )
    return dict(zip(names, arrays, strict=True))


def plan_calls(
    source: str, inputs: Sequence[InputSpec], shapes: Mapping[str, tuple[int, ...]], *, stream: bool
) -> Plan:
    """Find out what counts as a sample, and check every shape.

    An array of the input's rank is cut along axis 0, one of one rank more holds one call in each row. With any of the
    latter, each row is a call of its own, and the others give it one sample.
    What a `stream` yields is one call as it stands when the model's inputs have no common batch axis.

    Raises:
        DataError: a wrong rank or dimension; inputs without a common batch axis; arrays of different lengths.
    """
    rows = frozenset(spec.name for spec in inputs if _is_rows(source, spec, shapes[spec.name]))
    fixed = {spec.shape[0] for spec in inputs if spec.name not in rows and spec.shape} - {None}
    scalars = [spec for spec in inputs if spec.name not in rows and not spec.shape]
    lengths = {name: shape[0] for name, shape in shapes.items() if shape}
    same_length = len(set(lengths.values())) == 1

    apart = bool(scalars) or len(fixed) > 1 or (stream and bool(fixed) and not same_length)
    if not rows and apart and stream:
        for spec in inputs:
            check_shape(source, spec, shapes[spec.name], first_axis=0)
        return Plan(rows, single=True, fixed=None)
    if apart or (rows and not fixed <= {1}):
        bad = scalars[0] if scalars else next(spec for spec in inputs if spec.name not in rows and spec.shape[0])
        raise DataError(
            f"{source}: {bad} has no batch axis in common with the other inputs; give one row for each call: "
            f"an array of {_shape_text((None, *bad.shape), 'calls')}"
        )
    if not same_length:
        listed = ", ".join(f"{name!r} {length}" for name, length in lengths.items())
        raise DataError(f"{source}: the arrays have different numbers of samples ({listed}); make them the same")
    for spec in inputs:
        check_shape(source, spec, shapes[spec.name], first_axis=1)
    return Plan(rows, single=bool(rows), fixed=None if rows else next(iter(fixed), None))


def _is_rows(source: str, spec: InputSpec, shape: tuple[int, ...]) -> bool:
    rank = len(spec.shape)
    if len(shape) not in {rank, rank + 1}:
        raise DataError(
            f"{source}: {spec} got an array of shape {shape}; expected {rank} axes"
            f"{', the first one counting samples' if rank else ''}, or {rank + 1} with one call in each row"
        )
    return len(shape) == rank + 1


def check_shape(source: str, spec: InputSpec, shape: tuple[int, ...], *, first_axis: int) -> None:
    """Hold the last axes of an array against the input's, from the array's `first_axis` on.

    Raises:
        DataError: when a dimension differs.
    """
    found = shape[first_axis:]
    expected = spec.shape[len(spec.shape) - len(found) :]
    if all(want in (None, have) for want, have in zip(expected, found, strict=True)):
        return
    hint = "reshape or resize the samples"
    if len(expected) == 3 and all(want in (None, have) for want, have in zip(expected, _swapped(found), strict=True)):
        hint = "the channels seem to be last: transpose to (N, C, H, W)"
    elif len(expected) == 3 and all(want in (None, have) for want, have in zip(_swapped(expected), found, strict=True)):
        hint = "the channels seem to be first: transpose to (N, H, W, C)"
    wanted = _shape_text((*[None] * first_axis, *expected))
    raise DataError(f"{source}: {spec} got an array of shape {shape}; expected {wanted}: {hint}")


def _swapped(shape: tuple[Any, ...]) -> tuple[Any, ...]:
    """(H, W, C) as (C, H, W)."""
    return (shape[2], shape[0], shape[1])


def _shape_text(shape: Sequence[int | None], first: str = "N") -> str:
    if not shape:
        return "one number"
    return " x ".join(
        str(size) if size is not None else (first if not axis else "?") for axis, size in enumerate(shape)
    )


def check_type(source: str, spec: InputSpec, dtype: np.dtype[Any]) -> None:
    """Accept floats for a float input, whole numbers and truth values for an integer or bool one.

    Raises:
        DataError: for anything else; nothing is rescaled or rounded on the way.
    """
    kinds = (_kind(dtype), _kind(spec.dtype))
    if dtype == spec.dtype or kinds in {("float", "float"), ("integer", "integer")}:
        return
    if kinds == ("integer", "float"):
        pixels = ": pixels? scale them as in training, for example .astype('float32') / 255" if dtype == "uint8" else ""
        what_to_do = f"save the values that the model was trained on as {spec.dtype.name}{pixels}"
    elif kinds == ("float", "integer"):
        what_to_do = f"save whole numbers, as {spec.dtype.name}"
    else:
        what_to_do = f"save it as {spec.dtype.name}"
    raise DataError(f"{source}: {spec} got an array of type {dtype.name}; {what_to_do}")


def _kind(dtype: np.dtype[Any]) -> str:
    if dtype.kind in "biu":
        return "integer"
    return "float" if dtype.name.startswith(("float", "bfloat")) else dtype.name


def prepared(source: str, spec: InputSpec, array: Array, samples: Sequence[int], *, single: bool) -> Array:
    """A batch for one input, of the input's type: float widths and integer widths are converted where nothing is lost.

    Args:
        source: where the array comes from.
        spec: the input.
        array: its batch.
        samples: the number of each sample in the source, for messages.
        single: the array is one call, not samples along axis 0.

    Raises:
        DataError: NaN, an infinity, or a number that the input's type cannot hold.
    """
    if _kind(array.dtype) == "float":
        _check_finite(source, spec, array, samples, single=single)
    if array.dtype == spec.dtype:
        return np.asarray(array, order="C")
    if _kind(spec.dtype) == "float":  # a rounding is what the model's type means; an overflow is not
        with np.errstate(over="ignore"):
            converted = array.astype(spec.dtype)
        _check_finite(source, spec, converted, samples, single=single)
        return converted
    low, high = (0, 1) if spec.dtype == bool else (np.iinfo(spec.dtype).min, np.iinfo(spec.dtype).max)
    if array.size and (int(array.min()) < low or int(array.max()) > high):
        raise DataError(
            f"{source}: {spec} got {array.dtype.name} numbers from {array.min()} to {array.max()}, which "
            f"{spec.dtype.name} cannot hold; expected {low} to {high}"
        )
    return array.astype(spec.dtype)


def _check_finite(source: str, spec: InputSpec, array: Array, samples: Sequence[int], *, single: bool) -> None:
    finite = np.isfinite(array)
    if finite.all() or _is_mask(array):
        return
    sample = samples[0] if single else samples[int(np.argwhere(~finite)[0][0])]
    raise DataError(
        f"{source}: {spec} has NaN or a number beyond {array.dtype.name}'s range in sample {sample}; "
        "repair or remove that sample"
    )


def _is_mask(array: Array) -> bool:
    """Whether this is what attention adds to its scores: 0, and minus infinity where nothing is to be seen."""
    return bool(np.all((array == 0) | (array == -np.inf)))


def checked_labels(source: str, labels: Array, count: int, *, rows: bool) -> NDArray[np.int64]:
    """Class numbers as int64, shape `(N,)`; with `rows`, `(N, samples in each call)` will do as well.

    Raises:
        DataError: when they are not whole numbers, or not one for each sample.
    """
    if labels.dtype.kind not in "iu":
        raise DataError(f"{source}: labels are {labels.dtype.name}; expected class numbers: whole numbers from 0 on")
    if labels.ndim not in ((1, 2) if rows else (1,)) or len(labels) != count:
        raise DataError(
            f"{source}: labels have shape {labels.shape}; expected ({count},), one class number for each sample"
        )
    return labels.astype(np.int64)
