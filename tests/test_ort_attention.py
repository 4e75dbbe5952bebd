"""Transformers in ONNX Runtime's own operators: the same numbers, fewer and integer kernels, under the names of the layers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from edgekit.graph.operators import layers
from edgekit.lowering.qdq import lower_qdq
from edgekit.proof import int8_share
from edgekit_onnxruntime import OnnxRuntimeBackend
from edgekit_onnxruntime.attention import fuse_transformer
from networks import compiled, local_target, simulate, worst
from transformer_graphs import annotated, bert, feeds, vit

BACKEND = OnnxRuntimeBackend()
NAMES = ("x86-onnxruntime", "arm-onnxruntime")
MASKS = ("padding", "lowest", "where", "hidden", "picked", "weak", "float", "keys", "none")
QUANTIZED_MASKS = ("padding", "lowest", "where", "hidden", "picked", "none")
"""Those that `QAttention` can take."""
ROUNDING = 0.02
"""Of an output's largest magnitude: codes that flip at ties. A wrong mask, scale or number of heads is off by 0.1 and more."""


def lowered(model: ir.Model, name: str = "x86-onnxruntime", *, packed: bool = True) -> tuple[ir.Model, ir.Model]:
    """The annotated model as a Q/DQ graph, and as the backend lowers it."""
    model, target = annotated(model, packed=packed), local_target(name)
    return lower_qdq(model, target), BACKEND.lower(model, target, keep_float=frozenset())


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("packed", [True, False])
def test_the_numbers_stay(mask: str, packed: bool) -> None:
    before, after = lowered(bert(mask), packed=packed)
    for count, length in ((1, 10), (7, 10), (33, 3), (3, 17)):
        given = feeds(before, count, length, seed=count)
        assert worst(simulate(after, given), simulate(before, given)) < ROUNDING, (count, length)


@pytest.mark.parametrize("mask", MASKS)
def test_packed_attention_with_a_mask_of_padding_is_one_operator(mask: str) -> None:
    found = operators(lowered(bert(mask))[1])
    quantized = mask in QUANTIZED_MASKS
    assert found["QAttention"] == (2 if quantized else 0)
    assert found["MultiHeadAttention"] == (0 if quantized else 2)
    assert found["MatMulIntegerToFloat"] == (7 if quantized else 9)
    assert not found["Softmax"] + found["MatMul"] + found["Transpose"] + found["DequantizeLinear"]
    assert found["QuantizeLinear"] == 9, "one for each input of a layer, and no pair beside it"


def test_projections_of_their_own_keep_their_layers() -> None:
    found = operators(lowered(bert(), packed=False)[1])
    assert (found["MultiHeadAttention"], found["MatMulIntegerToFloat"]) == (2, 13)
    assert found["Expand"] == 1, "all layers share one mask"


def test_the_order_of_projections_does_not_matter() -> None:
    before, after = lowered(bert(names=("value", "query", "key")))
    assert operators(after)["QAttention"] == 2
    given = feeds(before, 5, 9)
    assert worst(simulate(after, given), simulate(before, given)) < ROUNDING


@pytest.mark.parametrize("name", NAMES)
def test_one_projection_taken_apart_along_an_axis(name: str) -> None:
    before, after = lowered(vit(), name)
    assert operators(after)["QAttention"] == 1
    assert not operators(after)["Gather"] + operators(after)["Transpose"]
    given = feeds(before, 7, 10)
    assert worst(simulate(after, given), simulate(before, given)) < ROUNDING


def test_a_fully_hidden_sample_looks_at_everything_alike() -> None:
    before, after = lowered(bert("lowest", layers=1))
    given = feeds(before, 3, 10)
    assert not given["attention_mask"][1].any()
    (expected,), (found,) = simulate(before, given).values(), simulate(after, given).values()
    assert np.isfinite(found).all()
    assert np.abs(found[1] - expected[1]).max() < ROUNDING * np.abs(expected).max()


def test_weights_keep_one_scale_for_each_column() -> None:
    (attention,) = [node for node in lowered(bert(layers=1))[1].graph if node.op_type == "QAttention"]
    weight, scale = attention.inputs[1], attention.inputs[4]
    assert weight is not None and weight.const_value is not None and scale is not None and scale.const_value is not None
    assert tuple(weight.const_value.shape) == (32, 96)
    assert len(np.unique(scale.const_value.numpy())) > 48


@pytest.mark.parametrize("name", NAMES)
def test_kernels_bear_the_names_of_the_layers(name: str, tmp_path: Path) -> None:
    source, target = annotated(bert(length=10)), local_target(name)
    model = BACKEND.lower(source, target, keep_float=frozenset())
    loaded = compiled(model, BACKEND, target, tmp_path)
    given = feeds(model, 3, 10)
    assert worst(loaded.run(given), simulate(model, given)) < ROUNDING
    kernels = {layer: kernel.kernel for kernel in loaded.kernels(given) for layer in kernel.layers}
    assert kernels["layer0.query+key+value"] == "QAttention"
    assert all(kernels[f"layer1.{layer}"] == "MatMulIntegerToFloat" for layer in ("out", "up", "down"))
    assert "SkipLayerNormalization" not in kernels.values()
    _, floats = int8_share(layers(source), loaded.kernels(given))
    assert sorted(floats) == sorted(f"layer{index}.{one}" for index in (0, 1) for one in ("context", "scores"))


def test_a_layer_that_is_kept_float_stays_so() -> None:
    source, target = annotated(bert(layers=1)), local_target("x86-onnxruntime")
    model = BACKEND.lower(source, target, keep_float=frozenset({"layer0.query+key+value"}))
    found = operators(model)
    assert (found["QAttention"], found["MultiHeadAttention"], found["MatMul"]) == (0, 1, 1)


@pytest.mark.parametrize("format", ["qoperator", "integer"])
def test_other_formats_start_from_quantize_and_dequantize(format: str) -> None:
    target = local_target("x86-onnxruntime")
    target = target.model_copy(update={"graph": target.graph.model_copy(update={"format": format})})
    model = BACKEND.lower(annotated(bert(layers=1)), target, keep_float=frozenset())
    assert not any(node.domain for node in model.graph)


def test_attention_whose_weights_are_an_output_stays() -> None:
    model = annotated(bert(layers=1))
    softmax = next(node for node in model.graph if node.op_type == "Softmax")
    model.graph.outputs.append(softmax.outputs[0])
    found = operators(fuse_transformer(lower_qdq(model, local_target("x86-onnxruntime"))))
    assert (found["Softmax"], found["QAttention"], found["MultiHeadAttention"]) == (1, 0, 0)


def test_the_source_and_the_result_stay_apart_and_the_result_is_the_same_each_time() -> None:
    before, _ = lowered(bert())
    text = ir.to_proto(before).SerializeToString(deterministic=True)
    first, second = fuse_transformer(before), fuse_transformer(before)
    assert ir.to_proto(before).SerializeToString(deterministic=True) == text
    assert ir.to_proto(first).SerializeToString(deterministic=True) == ir.to_proto(second).SerializeToString(
        deterministic=True
    )


def test_a_graph_without_a_transformer_comes_back_as_it_was() -> None:
    from networks import annotate, residual_net

    model = lower_qdq(annotate(residual_net()), local_target("x86-onnxruntime"))
    assert [node.name for node in fuse_transformer(model).graph] == [node.name for node in model.graph]
