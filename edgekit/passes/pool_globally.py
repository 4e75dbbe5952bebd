"""ReduceMean over all spatial axes becomes GlobalAveragePool, which runtimes have an integer kernel for."""

from __future__ import annotations

import onnx_ir as ir

from edgekit.graph.annotations import get_params, set_params
from edgekit.graph.operators import copy_type, int_attribute, is_constant, is_float


def pool_globally(model: ir.Model) -> ir.Model:
    """`ReduceMean(x, axes=all but the first two)` of a tensor of rank 3 to 5 becomes `GlobalAveragePool(x)`.

    Without `keepdims` a Flatten follows: the two are the same where all reduced axes go. Whole numbers and float64 stay, which no
    runtime pools.
    """
    model = model.clone()
    for node in list(model.graph):
        if node.op_type == "ReduceMean" and node.domain == "" and _is_global(node):
            _replace(model.graph, node)
    return model


def _is_global(node: ir.Node) -> bool:
    data = node.inputs[0]
    if data is None or data.shape is None or not 3 <= len(data.shape) <= 5:
        return False
    if not is_float(data) or data.dtype == ir.DataType.DOUBLE:
        return False
    rank = len(data.shape)
    if "axes" in node.attributes:
        axes = list(node.attributes["axes"].as_ints())
    elif len(node.inputs) > 1 and is_constant(node.inputs[1]):
        value = node.inputs[1]
        assert value is not None and value.const_value is not None
        axes = [int(axis) for axis in value.const_value.numpy().reshape(-1)]
    else:
        return False
    return sorted(axis % rank for axis in axes) == list(range(2, rank))


def _replace(graph: ir.Graph, mean: ir.Node) -> None:
    data, output = mean.inputs[0], mean.outputs[0]
    assert data is not None and data.shape is not None
    pool = ir.node("GlobalAveragePool", [data], name=mean.name)
    new_nodes = [pool]
    pooled = pool.outputs[0]
    pooled.shape = ir.Shape([*list(data.shape)[:2], *[1] * (len(data.shape) - 2)])
    pooled.type = None if output.dtype is None else ir.TensorType(output.dtype)
    result = pooled
    if not int_attribute(mean, "keepdims", 1):
        pooled.name = f"{output.name}_pooled"
        flatten = ir.node("Flatten", [pooled], {"axis": 1}, name=f"{mean.name}/Flatten")
        result = flatten.outputs[0]
        copy_type(result, output)
        new_nodes.append(flatten)
    graph.insert_after(mean, new_nodes)
    set_params(result, get_params(output))
    name = output.name
    output.replace_all_uses_with(result, replace_graph_outputs=True)
    graph.remove(mean, safe=True)
    result.name = name
