"""SmoothQuant: move the outliers of activation channels into the weights that multiply them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgekit.calibration.layer_rows import LinearLayer, Rows, RowSample, linear_layers, matrix, numbers, rows_key
from edgekit.graph.annotations import all_values, fresh_name, get_params
from edgekit.graph.operators import copy_type, is_constant, roles
from edgekit.graph.rules import on_codes, quantized_nodes
from edgekit.quant.affine import choose_params, fake_quantize, weight_params
from edgekit.quant.spec import QuantSpec
from edgekit.target import Target

F32 = NDArray[np.float32]

SMOOTHING = "edgekit.smoothing"
"""The metadata key of the Mul nodes that smoothing puts in."""
ALPHAS = (0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9)
ROWS = 512
"""Rows of each half of the samples that a factor is judged on."""
WORTH_A_NODE = 0.75
"""What must be left of the error at most for a factor that costs a multiplication at run time."""


@dataclass(frozen=True, slots=True)
class _Group:
    """Layers that read one value, and how the producer of that value can take a factor; `places` is None when it cannot."""

    source: ir.Value
    layers: tuple[LinearLayer, ...]
    places: tuple[_Place, ...] | None


@dataclass(frozen=True, slots=True)
class _Place:
    """A constant, as `node` reads it, that is multiplied along `axis` from index `start` on."""

    node: ir.Node
    constant: ir.Value
    axis: int
    start: int


def smoothable(model: ir.Model, target: Target) -> list[LinearLayer]:
    """The layers that smoothing looks at: quantized matrix products with a constant weight that nobody else reads.

    Not those that came with grids, which are never moved.
    """
    quantized = quantized_nodes(model, target)
    return [
        layer
        for layer in linear_layers(model.graph)
        if layer.node in quantized
        and layer.geometry.kind == "rows"
        and _is_own(layer.weight)
        and get_params(layer.source) is None
    ]


def _is_own(weight: ir.Value) -> bool:
    return len(weight.uses()) == 1 and weight.dtype == ir.DataType.FLOAT and get_params(weight) is None


def smooth(model: ir.Model, target: Target, rows: Rows) -> ir.Model:
    """Divide each channel of what matrix products read by a factor, and multiply the rows of their weights by it.

    1. The factor of channel j is `max|x_j|**alpha / max|w_j|**(1 - alpha)`; each group of layers that read one value gets the
       alpha of least error at their outputs, on `rows`, with activations and weights rounded.
    2. The division is folded into what makes the value: the gain and shift of a LayerNormalization (or of a Mul and Add by
       constants), or a matrix product, through attention's weighted sum of values.
    3. Where others read that value too, or its producer cannot take a factor (GELU), a Mul is put in for these layers, when the
       error falls below `WORTH_A_NODE` of what it was. Not where the value comes from a quantized operator: its codes go straight
       to the layer.

    The float function is the same. Reference: Xiao et al. 2022, "SmoothQuant", arXiv:2211.10438, equation 4.
    """
    model = model.clone()
    taken: set[str | None] = {value.name for value in all_values(model.graph)}
    activation, weight = target.quantization.activation.spec, target.quantization.weight.spec
    for group in _groups(smoothable(model, target)):
        known = rows.get(rows_key(group.layers[0]))
        if known is None or (group.places is None and on_codes(group.source, quantized_nodes(model, target), target)):
            continue
        factor, left = _best_factor(known, group.layers, activation, weight)
        if left >= (1.0 if group.places is not None else WORTH_A_NODE):
            continue
        for layer in group.layers:
            _multiply(
                model.graph,
                layer.node,
                layer.weight,
                1 - layer.parts.weight_axis if layer.parts.weight_axis is not None else 0,
                factor,
                taken,
            )
        if group.places is None:
            _insert_division(model.graph, group, factor, taken)
        else:
            for place in group.places:
                _divide_place(model.graph, place, factor, taken)
    return model


def unsmooth(model: ir.Model) -> ir.Model:
    """Without the Mul nodes of `smooth`, and the same function: what float runs fastest."""
    model = model.clone()
    taken: set[str | None] = {value.name for value in all_values(model.graph)}
    for node in list(model.graph):
        if SMOOTHING not in node.metadata_props:
            continue
        source, divisor = node.inputs
        assert source is not None and divisor is not None
        for use in list(node.outputs[0].uses()):
            parts = roles(use.node)
            assert parts is not None and parts.weight is not None and parts.weight_axis is not None
            weight = use.node.inputs[parts.weight]
            assert weight is not None
            _multiply(model.graph, use.node, weight, 1 - parts.weight_axis, numbers(divisor), taken)
            use.node.replace_input_with(use.idx, source)
        model.graph.remove(node, safe=True)
        del model.graph.initializers[divisor.name or ""]
    return model


def _groups(layers: Sequence[LinearLayer]) -> Iterator[_Group]:
    by_source: dict[ir.Value, list[LinearLayer]] = {}
    for layer in layers:
        by_source.setdefault(layer.source, []).append(layer)
    for source, members in by_source.items():
        only = {use.node for use in source.uses()} == {layer.node for layer in members} and not source.is_graph_output()
        places = _places(source, 0) if only else None
        yield _Group(source, tuple(members), None if places is None else tuple(places))


def _best_factor(
    known: RowSample, layers: Sequence[LinearLayer], activation: QuantSpec, weight: QuantSpec
) -> tuple[F32, float]:
    """The factor of least error at the layers' outputs, and what it leaves of the error without one."""
    halves = [known.rows[0, half][:ROWS] for half in known.halves]
    rows = np.concatenate(halves)
    matrices = [matrix(layer, numbers(layer.weight))[0] for layer in layers]
    outputs = [rows @ w for w in matrices]
    energies = [max(float(np.square(y, dtype=np.float64).sum()), 1e-30) for y in outputs]

    def error(factor: F32) -> float:
        low, high = np.minimum((known.low / factor).min(1), 0.0), np.maximum((known.high / factor).max(1), 0.0)
        # Each half on the range of the other: what equalizes maxima best in one half overflows in the next.
        rounded = np.concatenate(
            [
                fake_quantize(half / factor, choose_params(low[1 - i], high[1 - i], activation))
                for i, half in enumerate(halves)
            ]
        )
        total = 0.0
        for w, y, energy in zip(matrices, outputs, energies, strict=True):
            scaled = w * factor[:, None]
            difference = rounded @ fake_quantize(scaled, weight_params(scaled, weight, axis=1)) - y
            total += float(np.square(difference, dtype=np.float64).sum()) / energy
        return total

    reach = np.maximum(-known.low, known.high).max(axis=0)
    pull = np.max([np.abs(w).max(axis=1) for w in matrices], axis=0)
    alive = (reach > 0) & (pull > 0)
    best, least = np.ones(len(reach), np.float32), error(np.ones(len(reach), np.float32))
    before = least
    for alpha in ALPHAS:
        factor = np.ones(len(reach), np.float64)
        factor[alive] = reach[alive].astype(np.float64) ** alpha / pull[alive].astype(np.float64) ** (1 - alpha)
        tried = np.clip(factor, 1e-4, 1e4).astype(np.float32)
        found = error(tried)
        if found < least:
            best, least = tried, found
    return best, least / before if before > 0 else 1.0


def _places(value: ir.Value, start: int) -> list[_Place] | None:
    """The constants that a factor on the last axis of `value` is folded into; None when there is no such way."""
    node = value.producer()
    if node is None or node.domain:
        return None
    match node.op_type:
        case "LayerNormalization" if node.attributes.get_int("axis", -1) in (-1, _rank(value) - 1):
            return _rows(node, node.inputs[1:], value, start)
        case "Mul":
            return _rows(node, [v for v in node.inputs if is_constant(v)], value, start)
        case "Add":
            shifts, others = [v for v in node.inputs if is_constant(v)], [v for v in node.inputs if not is_constant(v)]
            rows = _rows(node, shifts, value, start)
            source = (
                _places(others[0], start) if len(others) == 1 and others[0] is not None and _single(others[0]) else None
            )
            return None if rows is None or source is None else [*rows, *source]
        case "MatMul" if is_constant(node.inputs[1]):
            weight = node.inputs[1]
            assert weight is not None
            return [_Place(node, weight, 1, start)] if _rank(weight) == 2 and _is_own(weight) else None
        case "Split":
            return _through_split(node, value, start)
        case "Reshape":
            return _through_attention(node, value, start)
        case _:
            return None


def _rows(node: ir.Node, constants: Sequence[ir.Value | None], value: ir.Value, start: int) -> list[_Place] | None:
    """Constants of one number for each channel."""
    if value.shape is None:
        return None
    places = []
    for constant in constants:
        if constant is None:
            continue
        if not is_constant(constant) or constant.shape is None or list(constant.shape) != [value.shape[-1]]:
            return None
        places.append(_Place(node, constant, 0, start))
    return places or None


def _through_split(node: ir.Node, value: ir.Value, start: int) -> list[_Place] | None:
    source = node.inputs[0]
    if source is None or not _single(source) or node.attributes.get_int("axis", 0) not in (-1, _rank(source) - 1):
        return None
    widths = [output.shape[-1] if output.shape is not None else None for output in node.outputs]
    before = widths[: list(node.outputs).index(value)]
    if not all(isinstance(width, int) for width in before):
        return None
    return _places(source, start + sum(width for width in before if isinstance(width, int)))


def _through_attention(node: ir.Node, value: ir.Value, start: int) -> list[_Place] | None:
    """From the heads put side by side back to the projection of the values: weights of attention sum over tokens only."""
    joined = _producer(node.inputs[0], "Transpose")
    product = _producer(joined.inputs[0] if joined else None, "MatMul")
    heads = _producer(product.inputs[1] if product else None, "Transpose")
    split = _producer(heads.inputs[0] if heads else None, "Reshape")
    if joined is None or product is None or heads is None or split is None or split.inputs[0] is None:
        return None
    swapped = all(list(t.attributes.get_ints("perm", [])) == [0, 2, 1, 3] for t in (joined, heads))
    source = split.inputs[0]
    same_width = value.shape is not None and source.shape is not None and value.shape[-1] == source.shape[-1]
    whole = isinstance(source.shape[-1], int) if source.shape is not None else False
    return _places(source, start) if swapped and same_width and whole and _single(source) else None


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = value.producer() if value is not None and _single(value) else None
    return node if node is not None and node.op_type == op_type and not node.domain else None


def _single(value: ir.Value) -> bool:
    return len(value.uses()) == 1 and not value.is_graph_output() and get_params(value) is None


def _rank(value: ir.Value) -> int:
    return -1 if value.shape is None else len(value.shape)


def _divide_place(graph: ir.Graph, place: _Place, factor: F32, taken: set[str | None]) -> None:
    constant = place.constant
    assert constant.shape is not None
    length = constant.shape[place.axis]
    assert isinstance(length, int)
    whole = np.ones(length, np.float32)
    whole[place.start : place.start + len(factor)] = 1.0 / factor
    _multiply(graph, place.node, constant, place.axis, whole, taken)


def _multiply(
    graph: ir.Graph, node: ir.Node, constant: ir.Value, axis: int, factor: F32, taken: set[str | None]
) -> None:
    """Give `node` a constant that is multiplied along `axis`; it keeps its name where nobody else reads the old one."""
    values = numbers(constant)
    shape = [-1 if i == axis else 1 for i in range(values.ndim)]
    array = (values * factor.reshape(shape)).astype(np.float32)
    index = list(node.inputs).index(constant)
    alone = len(constant.uses()) == 1 and not constant.is_graph_output()
    if alone and constant.name is not None:
        del graph.initializers[constant.name]
    name = constant.name if alone and constant.name else fresh_name(f"{constant.name}_smoothed", taken)
    node.replace_input_with(index, _register(graph, name, array))


def _insert_division(graph: ir.Graph, group: _Group, factor: F32, taken: set[str | None]) -> None:
    first, source = group.layers[0].node, group.source
    name = f"{first.name}/smooth"
    divisor = _register(graph, fresh_name(f"{name}_factor", taken), (1.0 / factor).astype(np.float32))
    node = ir.node("Mul", [source, divisor], name=name, metadata_props={SMOOTHING: "1"})
    graph.insert_before(first, node)
    output = node.outputs[0]
    copy_type(output, source)
    output.name = fresh_name(f"{source.name}_smooth", taken)
    for layer in group.layers:
        layer.node.replace_input_with(layer.parts.activations[0], output)


def _register(graph: ir.Graph, name: str, array: F32) -> ir.Value:
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.FLOAT))
    value.const_value = ir.tensor(array, name=name)
    graph.register_initializer(value)
    return value
