"""Transformers as ONNX Runtime runs them fastest: attention and linear layers as its own operators."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgekit.graph.operators import dims
from edgekit.lowering.units import constant, only_reader
from edgekit.lowering.writer import Writer, remove_dead, replace_value
from edgekit_onnxruntime.heads import Attention, Part, find_attention, same_size
from edgekit_onnxruntime.mask import PaddingMask, padding_mask
from edgekit_onnxruntime.matmul import DOMAIN, PRODUCT, fuse_matmuls, keep_residual_sums

_OLDEST = 15
"""The first opset whose Shape takes a part of the shape."""
_LONGEST = 24
"""Nodes between a layer and the product with the values; there are about ten."""


def fuse_transformer(lowered: ir.Model) -> ir.Model:
    """A Q/DQ graph with ONNX Runtime's own operators in the place of what a transformer is made of.

    1. Linear layers on codes: `fuse_matmuls`.
    2. Attention: `fuse_attention`.
    3. Residual sums: `keep_residual_sums`.

    Numbers change by the rounding of float sums; a graph without any of these comes back as it was.
    """
    return keep_residual_sums(fuse_attention(fuse_matmuls(lowered)))


def fuse_attention(model: ir.Model) -> ir.Model:
    """Every attention as one operator.

    1. `QAttention`, of the name of its projections, where these are one packed layer on codes that nothing else reads, and there is
       no mask or one of padding (`padding_mask`), which goes in as 0 and 1. Nothing of the attention is rounded to codes but the
       input and the weights, as before.
    2. `MultiHeadAttention`, of the name of the product with the values, for all others; the mask is added as it is.

    Reference: Vaswani et al. (2017), "Attention is all you need", arXiv:1706.03762, equation 1.
    """
    model = model.clone()
    if model.opset_imports.get("", 0) < _OLDEST:
        return model
    model.opset_imports.setdefault(DOMAIN, 1)
    writer = _AttentionWriter(model.graph)
    for node in list(model.graph):
        found = find_attention(node)
        if found is None or found.result.dtype == ir.DataType.DOUBLE:  # which neither operator takes
            continue
        if not writer.write_quantized(found):
            writer.write_float(found)
    remove_dead(model)
    if writer.written:
        model.graph.sort()
    return model


class _AttentionWriter:
    """Writes attention operators into one graph; masks that several share are made once.

    Attributes:
        written: whether any was.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.written = False
        self._indices: dict[tuple[ir.Value, int], ir.Value] = {}
        self._biases: dict[tuple[object, ...], ir.Value] = {}
        self._columns: dict[ir.Value, tuple[ir.Value, ...]] = {}

    def write_quantized(self, found: Attention) -> bool:
        """Write a `QAttention` with the projections in it, if they allow it."""
        parts = (found.query, found.key, found.value)
        layer = found.query.source.producer()
        padding = None if found.mask is None else padding_mask(found.mask, list(self.graph.inputs))
        hidden = found.mask is None or (padding is not None and self._covers(padding, found.query.source))
        if layer is None or not hidden or not _packed(layer, parts, found.context):
            return False
        writer = Writer(self.graph, layer)
        codes, weight, x_scale, w_scale, x_zero, w_zero, bias = (*layer.inputs, None, None)[:7]
        assert codes is not None and weight is not None and w_scale is not None
        unsigned = _unsigned(writer, codes, x_scale, x_zero)
        if unsigned is None:
            return False
        order = np.concatenate([np.arange(part.start, part.start + part.width) for part in parts])
        attributes: dict[str, int | float] = {"num_heads": found.query.heads, "scale": found.scale}
        if padding is not None:
            attributes["mask_filter_value"] = padding.filter_value
        row = np.zeros(len(order), np.float32) if bias is None else constant(bias)
        assert row is not None
        inputs = [
            unsigned[0],
            _columns(writer, weight, "weight", order),
            bias if bias is not None and _is_sorted(order) else writer.constant("bias", row[order]),
            x_scale,
            _columns(writer, w_scale, "weight_scale", order),
            None if padding is None else self._index(padding),
            unsigned[1],
            None if w_zero is None else _columns(writer, w_zero, "weight_zero_point", order),
        ]
        replace_value(found.result, writer.node("QAttention", inputs, attributes, domain=DOMAIN))
        self.written = True
        return True

    def write_float(self, found: Attention) -> None:
        """Write a `MultiHeadAttention` of the projections' results."""
        writer = Writer(self.graph, found.context)
        inputs: list[ir.Value | None] = [self._value(writer, part) for part in (found.query, found.key, found.value)]
        if found.mask is not None:
            inputs += [None, None, self._bias(writer, found, found.mask)]
        attributes = {"num_heads": found.query.heads, "scale": found.scale}
        replace_value(found.result, writer.node("MultiHeadAttention", inputs, attributes, domain=DOMAIN))
        self.written = True

    def _covers(self, padding: PaddingMask, x: ir.Value) -> bool:
        """Whether the mask has an entry for every position of every sample: ONNX Runtime does not broadcast it."""
        source = padding.source
        if not same_size(source, 1, x, 1):
            return False
        if same_size(source, 0, x, 0):
            return True
        dynamic = (dims(source) or (0,))[0] is None
        return dynamic and all(
            same_size(source, 0, other, 0) for other in self.graph.inputs if other.const_value is None
        )

    def _index(self, padding: PaddingMask) -> ir.Value:
        """The mask as int32: 1 where a position is looked at."""
        key = (padding.source, padding.kept)
        if key not in self._indices:
            nodes, value, name = [], padding.source, f"{padding.source.name}/mask_index"
            if not padding.kept:
                nodes.append(ir.node("Cast", [value], {"to": int(ir.DataType.BOOL)}, name=f"{name}/hidden"))
                nodes.append(ir.node("Not", nodes[-1].outputs, name=f"{name}/kept"))
                value = nodes[-1].outputs[0]
            nodes.append(ir.node("Cast", [value], {"to": int(ir.DataType.INT32)}, name=name))
            nodes[-1].outputs[0].name = name
            self.graph.insert_before(self.graph[0], nodes)
            self._indices[key] = nodes[-1].outputs[0]
        return self._indices[key]

    def _bias(self, writer: Writer, found: Attention, mask: ir.Value) -> ir.Value:
        """The mask with a number for each query and key; ONNX Runtime broadcasts only over samples and heads."""
        query, key = found.query.source, found.key.source
        if len(dims(mask) or ()) == 4 and same_size(mask, 2, query, 1) and same_size(mask, 3, key, 1):
            return mask
        sizes = [None if value.shape is None else value.shape[1] for value in (query, key)]
        known = all(isinstance(size, int) or (size is not None and size.value is not None) for size in sizes)
        identity = (mask, *map(str, sizes)) if known else (mask, found.context)
        if identity not in self._biases:
            one = writer.constant("mask/one", np.ones(2, np.int64))
            lengths = [
                writer.node("Shape", [value], {"start": 1, "end": 2}, suffix=f"mask/{name}")
                for name, value in (("queries", query), ("keys", key))
            ]
            shape = writer.node("Concat", [one, *lengths], {"axis": 0}, suffix="mask/shape")
            self._biases[identity] = writer.node("Expand", [mask, shape], suffix="mask")
        return self._biases[identity]

    def _value(self, writer: Writer, part: Part) -> ir.Value:
        """The part as a tensor `(B, S, heads * size)`."""
        if part.value is not None:
            return part.value
        if part.source not in self._columns:
            widths = writer.constant("widths", np.full(3, part.width, np.int64))
            split = ir.node("Split", [part.source, widths], {"axis": -1}, num_outputs=3, name=f"{writer.name}/split")
            for output, name in zip(split.outputs, ("first", "second", "third"), strict=True):
                output.name = f"{split.name}/{name}"
            self.graph.insert_before(writer.anchor, split)
            self._columns[part.source] = tuple(split.outputs)
        return self._columns[part.source][part.start // part.width]


def _packed(layer: ir.Node, parts: tuple[Part, ...], context: ir.Node) -> bool:
    """Whether three parts are all there is of one layer on codes, and nothing but the attention reads it or its heads."""
    reader = only_reader(layer.outputs[0])
    if layer.op_type != PRODUCT or layer.domain != DOMAIN or reader is None:
        return False
    if not _leads_only(layer.outputs[0], context):
        return False
    if reader.op_type == "Split" and any(only_reader(output) is None for output in reader.outputs):
        return False
    width = parts[0].width
    of_layer = all(part.source is layer.outputs[0] and part.width == width for part in parts)
    starts = sorted(part.start for part in parts)
    weight = constant(layer.inputs[1])
    rank = len(dims(layer.inputs[0]) or ())
    return (
        of_layer
        and starts == [0, width, 2 * width]
        and weight is not None
        and weight.shape[1] == 3 * width
        and rank == 3
    )


def _leads_only(value: ir.Value, end: ir.Node, steps: int = _LONGEST) -> bool:
    """Whether all that is made of a value goes into one node, which is near."""
    if value.is_graph_output() or steps == 0:
        return False
    readers = [use.node for use in value.uses() if use.node is not end]
    return all(_leads_only(output, end, steps - 1) for reader in readers for output in reader.outputs)


def _unsigned(
    writer: Writer, codes: ir.Value, scale: ir.Value | None, zero_point: ir.Value | None
) -> tuple[ir.Value, ir.Value | None] | None:
    """The codes as uint8, which is all that `QAttention` takes, and their zero point; None where nothing quantizes them here."""
    quantize, number = codes.producer(), constant(zero_point)
    if number is None or number.dtype == np.uint8:
        return codes, zero_point
    if quantize is None or quantize.op_type != "QuantizeLinear":
        return None
    middle = writer.constant("zero_point", (number.astype(np.int16) + 128).astype(np.uint8))
    inputs = [quantize.inputs[0], scale, middle]
    return writer.node("QuantizeLinear", inputs, suffix="QuantizeLinear", dtype=ir.DataType.UINT8), middle


def _columns(writer: Writer, value: ir.Value, suffix: str, order: NDArray[np.int64]) -> ir.Value:
    """The columns of a constant in another order; itself where the order is the same, or there is one number for all."""
    numbers = constant(value)
    assert numbers is not None
    if numbers.size == 1 or _is_sorted(order):
        return value
    return writer.constant(suffix, np.ascontiguousarray(numbers[..., order]))


def _is_sorted(order: NDArray[np.int64]) -> bool:
    return bool(np.all(np.diff(order) == 1))
