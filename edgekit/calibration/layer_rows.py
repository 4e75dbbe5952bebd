"""What layers multiply: their inputs as rows, their weights as matrices, so that every layer is `rows @ matrix`.

A layer's rows are a sample of those of all positions of all calibration samples. Which ones is a matter of each sample alone (its
content chooses it, its shape chooses the positions), so that neither the order nor the size of batches makes a difference.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgekit.calibration.observe import open_batch_axis
from edgekit.calibration.padding import Mask, padding_mask, without_padding
from edgekit.data import Batch
from edgekit.errors import DataError
from edgekit.graph.annotations import get_wish
from edgekit.graph.operators import LINEAR, Roles, int_attribute, roles
from edgekit.graph.probe import Probe
from edgekit.method import AUTO, EASYQUANT, Method

F32 = NDArray[np.float32]

ROWS = 1024
"""Of each layer, about: enough to tell ranges and shifts apart. More only where a Hessian is made of them."""
ROWS_BYTES = 128 << 20
"""Of the rows of all layers: they are held while ranges are chosen."""
SAMPLES = 256
"""The most samples that rows are taken from, about."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """How a layer reads its input: equal ones on one value read the same rows.

    Attributes:
        kind: "rows" for MatMul and Gemm, "patches" for Conv.
        kernel, strides, dilations, pads: of a Conv; pads are begins, then ends.
        groups: of a Conv.
    """

    kind: str
    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    groups: int = 1


@dataclass(frozen=True, slots=True)
class LinearLayer:
    """A layer with a constant weight.

    Attributes:
        node, parts: the operator and the roles of its inputs.
        source: the activation that it reads.
        weight: the value of its weight.
        geometry: how it reads `source`.
    """

    node: ir.Node
    parts: Roles
    source: ir.Value
    weight: ir.Value
    geometry: Geometry

    @property
    def name(self) -> str:
        """Of the node."""
        return self.node.name or ""


def linear_layers(graph: ir.Graph) -> list[LinearLayer]:
    """The layers of a graph that are `rows @ matrix`: all MatMul, Gemm and Conv with a constant weight of known shape."""
    return [layer for node in graph if (layer := _linear_layer(node)) is not None]


def _linear_layer(node: ir.Node) -> LinearLayer | None:
    if node.domain or node.op_type not in LINEAR or node.op_type == "ConvTranspose":
        return None
    parts = roles(node)
    if parts is None or parts.weight is None or parts.weight_axis is None:
        return None
    source, weight = node.inputs[parts.activations[0]], node.inputs[parts.weight]
    assert source is not None and weight is not None and weight.const_value is not None
    geometry = Geometry("rows") if node.op_type != "Conv" else _patches(node, tuple(weight.const_value.shape.numpy()))
    return None if geometry is None else LinearLayer(node, parts, source, weight, geometry)


def _patches(node: ir.Node, shape: tuple[int, ...]) -> Geometry | None:
    rank = len(shape) - 2
    if node.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return None

    def ints(name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(node.attributes.get_ints(name, default))

    ones = (1,) * rank
    strides, dilations, pads = ints("strides", ones), ints("dilations", ones), ints("pads", (0,) * (2 * rank))
    return Geometry("patches", shape[2:], strides, dilations, pads, int_attribute(node, "group", 1))


def matrix(layer: LinearLayer, array: NDArray[np.generic]) -> F32:
    """An array of the weight's shape as `(groups, K, N)`: K is what an output sums over, N the output channels of a group."""
    values = np.asarray(array, np.float32)
    if layer.geometry.kind == "patches":
        groups = layer.geometry.groups
        return np.ascontiguousarray(values.reshape(groups, values.shape[0] // groups, -1).transpose(0, 2, 1))
    return np.ascontiguousarray(values if layer.parts.weight_axis == 1 else values.T)[None]


def array_of(layer: LinearLayer, matrices: NDArray[np.generic], shape: tuple[int, ...]) -> NDArray[np.generic]:
    """The inverse of `matrix`: from `(groups, K, N)` back to the weight's `shape`."""
    if layer.geometry.kind == "patches":
        return np.ascontiguousarray(matrices.transpose(0, 2, 1)).reshape(shape)
    return np.ascontiguousarray(matrices[0] if layer.parts.weight_axis == 1 else matrices[0].T)


def numbers(value: ir.Value) -> F32:
    """A constant's numbers."""
    assert value.const_value is not None
    return np.asarray(value.const_value.numpy(), np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class RowSample:
    """What layers read.

    Attributes:
        rows: `(groups, n, K)`, a sample, of one half of the samples and then of the other.
        halves: where the rows of each half stand.
        low, high: `(2, channels)`, the extremes of each channel over all positions of each half.
    """

    rows: F32
    halves: tuple[slice, slice]
    low: F32
    high: F32


RowsKey = tuple[str, Geometry]
Rows = Mapping[RowsKey, RowSample]
"""By the name of the value and how it is read."""


def rows_key(layer: LinearLayer) -> RowsKey:
    """Where a layer's rows are found; layers that read one value in the same way share them."""
    return layer.source.name or "", layer.geometry


def collect_rows(
    model: ir.Model,
    layers: Sequence[LinearLayer],
    batches: Iterable[Batch],
    *,
    samples: int,
    rows: int | None = None,
    threads: int = 0,
) -> dict[RowsKey, RowSample]:
    """Rows of what each of `layers` reads, about `rows` of each, from about `SAMPLES` of the `samples` that `batches` hold.

    With None there are about `ROWS` of each, or as many as fit into `ROWS_BYTES` together.
    """
    widths = {rows_key(layer): matrix(layer, numbers(layer.weight)).shape for layer in layers}
    if rows is None:
        each_bytes = sum(4 * groups * inputs for groups, inputs, _ in widths.values())
        rows = max(1, min(ROWS, ROWS_BYTES // max(1, each_bytes)))
    share = -(-samples // SAMPLES)
    each = max(1, -(-rows * share // max(1, samples)))
    found: dict[RowsKey, list[tuple[int, _Seen]]] = {key: [] for key in widths}
    names = list(dict.fromkeys(name for name, _ in found))
    for sample in run_samples(model, names, batches, share=share, threads=threads):
        for (name, geometry), parts in found.items():
            array = sample.real(name, geometry)
            if array is not None and array.size:  # what is selected from a sample may be nothing
                parts.append((sample.checksum, _see(array, geometry, each * sample.size)))
    for parts in found.values():
        parts.sort(key=lambda part: part[0])
    # Taken out one by one, or all rows would be held twice.
    return {key: _joined([part for _, part in parts]) for key in list(found) if (parts := found.pop(key))}


def wished_rows(model: ir.Model, method: Method, batches: Iterable[Batch], *, samples: int) -> Rows:
    """What the layers read whose weights are to be quantized, where a `method` looks at it."""
    if not (method.bias_correction or method.calibrators & {AUTO, EASYQUANT}):
        return {}
    layers = [layer for layer in linear_layers(model.graph) if get_wish(layer.weight) is not None]
    return collect_rows(model, layers, batches, samples=samples) if layers else {}


class Sample(NamedTuple):
    """What one run of the model gave: of large samples, a part of the values that were asked for.

    Attributes:
        checksum: of its content; 0 where no other sample was chosen.
        size: how many samples it is: those of a batch that cannot be cut.
        arrays: values by name; whoever takes one sample lets go of those of the one before.
        mask: which tokens are real.
    """

    checksum: int
    size: int
    arrays: dict[str, NDArray[np.generic]]
    mask: Mask

    def real(self, name: str, geometry: Geometry) -> NDArray[np.generic] | None:
        """A value without padding, for a layer of tokens; what a convolution reads has channels where tokens have places.

        None where it is in another part.

        Raises:
            DataError: it is NaN or infinite somewhere.
        """
        if name not in self.arrays:
            return None
        array = self.arrays[name]
        array = without_padding(array, self.mask) if geometry.kind == "rows" else array
        if not np.isfinite([array.min(initial=0.0), array.max(initial=0.0)]).all():
            raise DataError(
                f"tensor {name!r} becomes NaN or Inf during calibration; check the checkpoint and the preprocessing"
            )
        return array


class _Seen(NamedTuple):
    """Rows of one sample, and the extremes of its channels."""

    rows: F32
    low: F32
    high: F32


def _see(array: NDArray[np.generic], geometry: Geometry, count: int) -> _Seen:
    channel = 1 if geometry.kind == "patches" else array.ndim - 1
    others = tuple(axis for axis in range(array.ndim) if axis != channel)
    low, high = (np.asarray(extreme(array, axis=others), np.float32) for extreme in (np.min, np.max))
    return _Seen(rows_of(array, geometry, count), low, high)


def _joined(seen: Sequence[_Seen]) -> RowSample:
    halves = seen[0::2], seen[1::2] or seen
    rows = [np.concatenate([one.rows for one in half], axis=1) for half in halves]
    middle, end = rows[0].shape[1], rows[0].shape[1] + rows[1].shape[1]
    low, high = (
        np.stack([np.min([one.low for one in half], axis=0) for half in halves]),
        np.stack([np.max([one.high for one in half], axis=0) for half in halves]),
    )
    return RowSample(np.concatenate(rows, axis=1), (slice(0, middle), slice(middle, end)), low, high)


def run_samples(
    model: ir.Model, names: Sequence[str], batches: Iterable[Batch], *, share: int, threads: int = 0
) -> Iterator[Sample]:
    """Named values of about one in `share` samples, each run alone; of the first where that is none."""
    probe = Probe(model, names, optimize=True, threads=threads)

    def run(feeds: dict[str, NDArray[np.generic]], size: int, checksum: int) -> Iterator[Sample]:
        mask = padding_mask(feeds)
        for arrays in probe.run(feeds):
            yield Sample(checksum, size, arrays, mask)
            arrays.clear()

    first: tuple[dict[str, NDArray[np.generic]], int] | None = None
    chosen = False
    for feeds, size in _samples(batches, cut=open_batch_axis(model)):
        checksum = _checksum(feeds)
        if checksum % share == 0:
            chosen = True
            yield from run(feeds, size, checksum)
        elif first is None:
            first = feeds, size
    if first is not None and not chosen:
        yield from run(*first, checksum=0)


def _samples(batches: Iterable[Batch], *, cut: bool) -> Iterator[tuple[dict[str, NDArray[np.generic]], int]]:
    """What is run at once, and how many samples it is."""
    for batch in batches:
        if batch.single or not cut or len(batch) == 1:
            yield batch.feeds, len(batch)
            continue
        for index in range(len(batch)):
            yield {name: np.ascontiguousarray(array[index : index + 1]) for name, array in batch.feeds.items()}, 1


def _checksum(feeds: Mapping[str, NDArray[np.generic]]) -> int:
    checksum = 0
    for array in feeds.values():
        checksum = zlib.crc32(np.ascontiguousarray(array).tobytes(), checksum)
    return checksum


def rows_of(array: NDArray[np.generic], geometry: Geometry, count: int) -> F32:
    """At most `count` rows, `(groups, n, K)`, of positions that are spread over `array`."""
    values = np.asarray(array, np.float32)
    if geometry.kind == "rows":
        flat = values.reshape(-1, values.shape[-1])
        return np.ascontiguousarray(flat[_spread(len(flat), count)])[None]
    rank = len(geometry.kernel)
    begins, ends = geometry.pads[:rank], geometry.pads[rank:]
    padded = np.pad(values, [(0, 0), (0, 0), *zip(begins, ends, strict=True)]) if any(geometry.pads) else values
    extent = [(k - 1) * d + 1 for k, d in zip(geometry.kernel, geometry.dilations, strict=True)]
    windows = np.lib.stride_tricks.sliding_window_view(padded, extent, axis=tuple(range(2, 2 + rank)))
    steps = [slice(None, None, s) for s in geometry.strides]
    taps = tuple(slice(None, None, d) for d in geometry.dilations)
    index = (slice(None), slice(None), *steps, *taps)
    windows = np.moveaxis(windows[index], 1, 1 + rank)  # (batch, positions ..., channels, kernel ...)
    positions = windows.shape[: 1 + rank]
    picked = np.unravel_index(_spread(int(np.prod(positions)), count), positions)
    patches = windows[picked]  # (n, channels, kernel ...)
    groups = geometry.groups
    rows = patches.reshape(len(patches), groups, -1).transpose(1, 0, 2)
    return np.ascontiguousarray(rows)


def _spread(size: int, count: int) -> NDArray[np.intp]:
    """At most `count` of the first `size` whole numbers, scattered but always the same: a regular step would hit the same column."""
    if count >= size:
        return np.arange(size)
    picked = np.unique(
        (np.arange(count) * size // count + (np.arange(count) * 7919) % max(1, size // count)).clip(0, size - 1)
    )
    return np.asarray(picked, np.intp)
