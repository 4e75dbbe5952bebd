"""What is wrong with an ONNX file that can be parsed: damaged, made by hand, or made to do harm."""

from __future__ import annotations

import graphlib
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import Message

from edgekit.errors import SourceError

_MOST_ELEMENTS = 2**48
_MOST_NODES = 10**6
_TYPED_FIELDS = tuple(f"{kind}_data" for kind in ("float", "double", "int32", "int64", "uint64", "string"))


def check_proto(path: Path, proto: onnx.ModelProto) -> None:
    """Refuse a file that nobody could read right, or that would read other files, or grow without end.

    Raises:
        SourceError: there is no graph; text that is none; a tensor whose data is not what its shape says, or lies outside the model's
            folder; a value that two nodes make or none; a circle; functions that call themselves.
    """
    if not len(proto.graph.node) and not len(proto.graph.output):
        raise SourceError(f"{path}: holds no ONNX graph (no nodes, no outputs); give an ONNX model")
    for value in proto.graph.input:
        if value.type.HasField("tensor_type") and not value.type.tensor_type.elem_type:
            raise SourceError(f"{path}: input {value.name!r} has no element type; export the model again")
    _check_messages(path, proto)
    _check_graph(path, proto.graph, frozenset())
    for function in proto.functions:
        _check_graph(path, function, frozenset())
    _check_functions(path, proto)


def _check_messages(path: Path, message: Message) -> None:
    """Check every text, attribute and tensor below `message`, in subgraphs and functions too."""
    for field, value in message.ListFields():
        several = (value,) if isinstance(value, str | bytes | Message) else value
        if field.type == field.TYPE_STRING:
            # Protobuf hands out text that is not UTF-8 as bytes, and fails when it has to write it.
            broken = next((text for text in several if not isinstance(text, str)), None)
            if broken is not None:
                raise SourceError(
                    f"{path}: {message.DESCRIPTOR.name}.{field.name} is {broken[:40]!r}, which is no text; "
                    "the file is damaged: export or copy it again"
                )
        elif field.type == field.TYPE_MESSAGE:
            for one in several:
                if isinstance(one, onnx.AttributeProto) and not one.type and not one.ref_attr_name:
                    raise SourceError(f"{path}: attribute {one.name!r} of a node has no type; export the model again")
                if isinstance(one, onnx.TensorProto):
                    _check_tensor(path, one)
                else:
                    _check_messages(path, one)


def _check_tensor(path: Path, tensor: onnx.TensorProto) -> None:
    """That a tensor holds as much data as its shape and type say: what is missing would be made up as zeros."""
    what = f"{path}: tensor {tensor.name!r}"
    if not isinstance(tensor.name, str) or not isinstance(tensor.doc_string, str):
        raise SourceError(
            f"{what} has a name or a description that is no text; the file is damaged: export or copy it again"
        )
    try:
        dtype = ir.DataType(tensor.data_type)
    except ValueError:
        dtype = ir.DataType.UNDEFINED
    if dtype == ir.DataType.UNDEFINED:
        raise SourceError(f"{what} has the element type {tensor.data_type}, which ONNX does not know; export it again")
    shape = list(tensor.dims)
    if min(shape, default=0) < 0 or math.prod(max(size, 1) for size in shape) > _MOST_ELEMENTS:
        raise SourceError(
            f"{what} has the shape {shape}; expected dimensions from 0 on, and at most 2**48 elements: export it again"
        )
    count = math.prod(shape)
    size = 0 if dtype == ir.DataType.STRING else math.ceil(count * dtype.bitwidth / 8)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        _check_external(path, tensor, size)
        return
    own = {field: len(getattr(tensor, field)) for field in _TYPED_FIELDS}
    if tensor.HasField("raw_data"):
        unit, expected, found = "bytes of data", size, len(tensor.raw_data)
        fits = dtype != ir.DataType.STRING and found == expected and not any(own.values())
    else:
        field = onnx.helper.tensor_dtype_to_field(dtype.value)
        packed = 8 // dtype.bitwidth if dtype != ir.DataType.STRING and dtype.bitwidth in (2, 4) else 1
        parts = 2 if dtype in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128) else 1
        unit, expected, found = f"numbers in {field}", math.ceil(count / packed) * parts, own[field]
        fits = found == expected == sum(own.values())
    if not fits:
        raise SourceError(
            f"{what} has the shape {shape} and the type {dtype.name}, but {found} {unit}; expected {expected}: the file is "
            "damaged, export or copy it again"
        )


def _check_external(path: Path, tensor: onnx.TensorProto, size: int) -> None:
    what = f"{path}: tensor {tensor.name!r}"
    said = {entry.key: entry.value for entry in tensor.external_data}
    location = said.get("location", "")
    folder = path.parent.resolve()
    try:
        offset, length = int(said.get("offset") or 0), int(said.get("length") or size)
        file = (folder / location).resolve()
        found = file.stat().st_size if file.is_file() else None
        linked = found is not None and file.stat().st_nlink > 1
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise SourceError(
            f"{what} is said to lie at {location[:200]!r}, which cannot be looked up ({error}); export the model again"
        ) from error
    if not file.is_relative_to(folder) or linked:
        raise SourceError(
            f"{what} is stored outside the model's folder, or through a link ({location!r}); that is "
            "refused, because a prepared model could read any file so: copy the model and its data file into one folder"
        )
    if offset < 0 or length != size or tensor.data_type == onnx.TensorProto.STRING:
        raise SourceError(
            f"{what} has {length} bytes from byte {offset} on in {location!r}; expected {size} bytes, from 0 or a later "
            "byte on: export the model again"
        )
    if found is None or found < offset + size:
        has = "no such file" if found is None else f"{found} bytes"
        raise SourceError(
            f"{what} needs {offset + size} bytes of {location!r}, found {has}; "
            "copy the data file that belongs to the model beside it"
        )


def _check_graph(path: Path, graph: onnx.GraphProto | onnx.FunctionProto, outer: frozenset[str]) -> None:
    """That each value has one source, each name that is read is made, and no node waits for itself."""
    given = _given(graph)
    outputs = [name for node in graph.node for name in node.output if name]
    twice = [name for name, count in Counter([*given, *outputs]).items() if count > 1]
    if twice:
        raise SourceError(
            f"{path}: {len(twice)} values are made more than once (first {twice[0]!r}), by nodes, initializers or inputs; "
            "give each its own name"
        )
    visible = outer.union(given, outputs)
    for node in graph.node:
        for name in node.input:
            if name and name not in visible:
                raise SourceError(
                    f"{path}: node {node.name!r} ({node.op_type}) reads {name!r}, which is no input, no initializer and no node's "
                    "output; the file is damaged or was edited: export it again"
                )
        for inner in _subgraphs(node):
            _check_graph(path, inner, visible)
    for output in graph.output:
        name = output if isinstance(output, str) else output.name
        if name not in visible:
            raise SourceError(f"{path}: output {name!r} of the graph is made by no node; export the model again")
    _check_order(path, graph)


def _check_functions(path: Path, model: onnx.ModelProto) -> None:
    """That model-local functions end, and do not multiply: all are inlined."""
    functions = {(each.domain, each.name, each.overload): each for each in model.functions}

    def calls(graph: onnx.GraphProto | onnx.FunctionProto) -> Counter[tuple[str, str, str]]:
        return Counter((node.domain, node.op_type, node.overload) for node in _nodes(graph))

    called = {key: calls(function) for key, function in functions.items()}
    try:
        order = tuple(
            graphlib.TopologicalSorter({k: v.keys() & functions.keys() for k, v in called.items()}).static_order()
        )
    except graphlib.CycleError as error:
        names = " -> ".join(key[1] for key in error.args[1][:5])
        raise SourceError(f"{path}: model-local functions call themselves ({names}); export the model again") from error
    size: dict[tuple[str, str, str], int] = {}
    for key in order:
        size[key] = sum(count * size.get(each, 1) for each, count in called[key].items())
    total = sum(count * size.get(each, 1) for each, count in calls(model.graph).items())
    if total > max(_MOST_NODES, len(model.graph.node)):
        raise SourceError(
            f"{path}: has {total:,} nodes once its model-local functions are inlined; at most {_MOST_NODES:,} are read: "
            "export it without functions"
        )


def _nodes(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for inner in _subgraphs(node):
            yield from _nodes(inner)


def _given(graph: onnx.GraphProto | onnx.FunctionProto) -> list[str]:
    """What a graph's nodes can read before any of them runs; an input that has an initializer counts once."""
    if isinstance(graph, onnx.FunctionProto):
        return list(graph.input)
    stored = [tensor.name for tensor in graph.initializer if tensor.name]
    stored += [tensor.values.name for tensor in graph.sparse_initializer]
    known = set(stored)
    return [*stored, *(value.name for value in graph.input if value.name not in known)]


def _check_order(path: Path, graph: onnx.GraphProto | onnx.FunctionProto) -> None:
    maker = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    order = {index: {maker[name] for name in _reads(node) if name in maker} for index, node in enumerate(graph.node)}
    try:
        graphlib.TopologicalSorter(order).prepare()
    except graphlib.CycleError as error:
        nodes = [graph.node[index] for index in error.args[1][:5]]
        names = " <- ".join(node.name or node.op_type for node in nodes)
        raise SourceError(f"{path}: nodes wait for each other in a circle ({names}); export the model again") from error


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """What a node reads, in its subgraphs too."""
    yield from node.input
    for inner in _subgraphs(node):
        own = {*_given(inner), *(name for each in inner.node for name in each.output)}
        reads = [name for each in inner.node for name in _reads(each)]
        yield from (name for name in (*reads, *(output.name for output in inner.output)) if name not in own)


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs
