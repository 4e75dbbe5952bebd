"""Bring a model of any opset from 7 on to the working opset, or the newest that runtimes read."""

from __future__ import annotations

import onnx
import onnx_ir as ir
from onnx import version_converter
from onnx_ir.passes import common

from edgekit.errors import GraphError, SourceError
from edgekit.graph.annotations import all_values, annotated_values, get_params, set_params
from edgekit.graph.io import self_contained

OLDEST, NEWEST = 7, 25
"""The opsets that a source may have, and a target may ask for: runtimes have no kernels for the QuantizeLinear of later ones."""
_BIG = 1024  # bytes; larger initializers stay out of the protobuf that the converter (C++, 2 GiB) is handed


def upgrade_opset(model: ir.Model, *, opset: int) -> ir.Model:
    """`model` at `opset` or later, up to `NEWEST`, converted by ONNX's own version converter.

    1. Model-local functions are inlined: the converter drops them.
    2. Big weights do not pass through the converter; nodes get back the metadata that it drops, tensors their attributes.
    3. Linear Upsample and Resize of opset 10 and older sample with "asymmetric" coordinates, which it forgets; a Pad that
       mirrors may have had a value too, which it leaves where it is no longer allowed. Bounds of a Clip and what a Pad fills with
       become float32 tensors, whatever type they meet.

    The caller proves the result equal to the source by running both (`graph.equal.prove_equal`): other conversions
    are wrong too (Hardmax of opset 12 and older), and nobody has a list. A model later than `NEWEST` stays so if it has no older form.

    Raises:
        SourceError: the source is older than opset 7.
        GraphError: the converter has no rule for a node, or a wrong one.
    """
    found = model.opset_imports.get("", opset)
    if found < OLDEST:
        raise SourceError(f"the model has opset {found}; {OLDEST} is the oldest that ONNX can upgrade: export it again")
    source, wanted = model, opset if found < opset else min(found, NEWEST)
    model = model.clone()
    model.opset_imports.setdefault("", found)  # a model of other domains alone names none
    if found == wanted:
        return model
    common.InlinePass()(model)
    _check_scans(model.graph, found)
    metadata = {node.outputs[0].name: dict(node.metadata_props) for node in model.graph if node.outputs}
    grids = {value.name: get_params(value) for value in annotated_values(model.graph)}
    for node in model.graph:
        if node.op_type == "Pad" and "mode" in node.attributes and node.attributes["mode"].as_string() != "constant":
            node.attributes.pop("value", None)
    tensors = _take_out_big_tensors(model.graph)
    proto = ir.to_proto(self_contained(model))
    proto.ir_version = max(proto.ir_version, 8)
    try:
        upgraded = ir.from_proto(version_converter.convert_version(proto, wanted))
    except (RuntimeError, onnx.checker.ValidationError) as error:
        if found > NEWEST:  # not all that is new has an old form, and runtimes may know it
            return source.clone()
        raise GraphError(
            f"the model cannot be upgraded from opset {found} to {opset}: {error}; export it with a newer opset"
        ) from error
    _put_back(upgraded.graph, tensors)
    for value in all_values(upgraded.graph):
        set_params(value, grids.get(value.name))
    for node in upgraded.graph:
        node.metadata_props.update(metadata.get(node.outputs[0].name if node.outputs else None, {}))
    for node in upgraded.graph.all_nodes():
        _retype_numbers(node)
        # All of them, whatever their names: the converter gives outputs others.
        if node.op_type == "Resize" and found <= 10:
            node.attributes["coordinate_transformation_mode"] = ir.AttrString(
                "coordinate_transformation_mode", "asymmetric"
            )
            node.attributes["nearest_mode"] = ir.AttrString("nearest_mode", "floor")
    return upgraded


def _retype_numbers(node: ir.Node) -> None:
    """Give the bounds of a Clip, and the number that a Pad fills with, the type of what they meet."""
    numbers = node.inputs[1:3] if node.op_type == "Clip" else node.inputs[2:3] if node.op_type == "Pad" else ()
    dtype = node.inputs[0].dtype if numbers and node.inputs[0] is not None else None
    for value in numbers:
        constant = None if value is None else value.producer()
        tensor = constant.attributes.get("value") if constant is not None and constant.op_type == "Constant" else None
        if constant is None or tensor is None or dtype is None or tensor.as_tensor().dtype == dtype:
            continue
        array = tensor.as_tensor().numpy().astype("float64").clip(float(dtype.min), float(dtype.max))
        constant.attributes["value"] = ir.AttrTensor("value", ir.tensor(array.astype(dtype.numpy()), dtype=dtype))
        constant.outputs[0].type = ir.TensorType(dtype)


def _check_scans(graph: ir.Graph, opset: int) -> None:
    """Scan of opset 8 counts samples along axis 0 and may be told their lengths; the converter takes it for the later one."""
    scan = next((node for node in graph.all_nodes() if opset < 9 and node.op_type == "Scan"), None)
    if scan is not None:
        raise GraphError(
            f"node {scan.name or scan.outputs[0].name!r} is a Scan of opset {opset}, which nothing can upgrade; "
            "export the model with opset 9 or later"
        )


def _take_out_big_tensors(graph: ir.Graph) -> dict[str, ir.TensorProtocol]:
    """Turn the big initializers into inputs, and return them."""
    tensors = {}
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.nbytes <= _BIG:
            continue
        tensors[name] = tensor
        value.shape, value.dtype = ir.Shape(tensor.shape.numpy()), tensor.dtype
        del graph.initializers[name]
        value.const_value = None
        if value not in graph.inputs:
            graph.inputs.append(value)
    return tensors


def _put_back(graph: ir.Graph, tensors: dict[str, ir.TensorProtocol]) -> None:
    for value in [v for v in graph.inputs if v.name in tensors]:
        graph.inputs.remove(value)
        value.const_value = tensors[value.name or ""]
        graph.register_initializer(value)
