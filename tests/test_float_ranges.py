"""Numbers beyond a type: attention masks of minus infinity and of float32's lowest, activations beyond float16."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

import edgekit
from edgekit.errors import DataError
from edgekit.graph.magnitudes import WIDE, mark_wide, wide_names
from graphs import Array, normal, poked, run
from networks import Net, token_net

LOWEST = float(np.finfo(np.float32).min)
IMAGES = {"x": normal(40, 3, 16, 16)}
TOKENS = {"x": normal(40, 12, 16)}
KINDS = ("constant", "where", "input", "padding")

needs_tensorrt = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="tensorrt_rtx is not installed: pip install 'edgekit[tensorrt]'",
)


def save(model: ir.Model, folder: Path) -> Path:
    ir.save(model, folder / "net.onnx")
    return folder / "net.onnx"


def evaluated(model: ir.Model, feeds: dict[str, Array]) -> Array:
    """The output, each node computed in the type that it has: ONNX Runtime widens float16 on CPUs."""
    results: Any = ReferenceEvaluator(ir.to_proto(model)).run(None, feeds)
    return np.asarray(results[0])


# Masks.


def attention(lowest: float, *kinds: str) -> tuple[ir.Model, dict[str, Array]]:
    """A layer of self-attention for each mask: a constant, a choice by Where, an input, an input of padding; and their data."""
    net, feeds = Net(seed=3), dict(TOKENS)
    x = net.input("x", ["n", 12, 16])
    for kind in kinds:
        q, k, v = (
            net.op("Add", [net.matmul(x, f"{kind}.{name}", 16, 16), net.weight(f"{kind}.{name}.bias", 16)])
            for name in ("query", "key", "value")
        )
        scores = net.op("MatMul", [q, net.op("Transpose", [k], perm=[0, 2, 1])])
        if kind == "where":
            seen = net.constant("seen", np.tril(np.ones((12, 12), np.bool_)))
            scores = net.op("Where", [seen, scores, net.constant("lowest", np.float32(lowest))])
        elif kind == "constant":
            triangle = np.triu(np.full((12, 12), lowest, np.float32), 1)
            scores = net.op("Add", [scores, net.constant("triangle", triangle)])
        else:
            rows = 1 if kind == "padding" else 12
            hidden = np.arange(12) >= 4 + np.arange(40)[:, None, None] % 8
            feeds[kind] = np.where(hidden, lowest, 0).astype(np.float32).repeat(rows, axis=1)
            scores = net.op("Add", [scores, net.input(kind, ["n", rows, 12])])
        context = net.op("MatMul", [net.op("Softmax", [scores], axis=-1), v])
        x = net.op("Add", [x, net.matmul(context, f"{kind}.out", 16, 16)], f"{kind}.residual")
    return net.model(net.matmul(x, "head", 16, 4)), feeds


@pytest.mark.parametrize("lowest", [-np.inf, LOWEST])
def test_masks_calibrate_and_give_the_right_answer(lowest: float, tmp_path: Path) -> None:
    model, feeds = attention(lowest, *KINDS)
    assert np.isfinite(run(model, feeds)["head_y"]).all()
    edgekit.compress(save(model, tmp_path), tmp_path / "out", calibration=feeds)
    for result in edgekit.export(tmp_path / "out", ["x86-onnxruntime", "x86-openvino"], tune_placement=False):
        proof = result.manifest.proof
        assert proof.ran_on
        assert proof.agrees is True
        assert result.manifest.kept_float == ()
        assert (proof.outputs[0].float_sqnr_db or 0) > 20


@pytest.mark.parametrize("broken", [np.inf, np.nan])
def test_only_zeros_and_minus_infinity_are_a_mask(broken: float, tmp_path: Path) -> None:
    model, feeds = attention(-np.inf, "input")
    feeds["input"][3, 0, 0] = broken
    with pytest.raises(DataError, match=r"input 'input' .* has NaN or a number beyond float32's range in sample \d+"):
        edgekit.compress(save(model, tmp_path), tmp_path / "out", calibration=feeds)
    picture = TOKENS["x"].copy()
    picture[3, 0, 0] = -np.inf
    with pytest.raises(DataError, match=r"input 'x' .* in sample 3; repair or remove that sample"):
        edgekit.compress(save(token_net(), tmp_path), tmp_path / "out", calibration={"x": picture})


# A target in float16.


def overflowing(kind: str) -> ir.Model:
    """Activations far beyond 65504 that a later operator brings back: in float operators, or between quantized layers."""
    net = Net(seed=3)
    x = net.conv(net.input("x", ["n", 3, 16, 16]), "stem", 3, 8)
    if kind == "float":
        x = net.op(
            "Mul",
            [net.op("Exp", [net.op("Tanh", [x], "tanh")], "exp"), net.constant("gain", np.float32(50000))],
            "grow",
        )
        x = net.op("Softplus", [x], "soft")
        x = net.op("Mul", [x, net.constant("loss", np.float32(1e-5))], "shrink")
    elif kind == "constant":
        x = net.op("Mul", [net.op("Tanh", [x], "tanh"), net.constant("gain", np.float32(1e6))], "grow")
        x = net.op("Mul", [net.op("Softplus", [x], "soft"), net.constant("loss", np.float32(1e-6))], "shrink")
    x = net.conv(net.op("Relu", [x], "relu"), "deep", 8, 8)
    model = net.model(net.op("Tanh", [x], "squash"))
    if kind == "quantized":
        poked(model, "stem.weight", lambda array: np.multiply(array, 1e5, out=array))
        poked(model, "deep.weight", lambda array: np.multiply(array, 1e-6, out=array))
    return model


@needs_tensorrt
@pytest.mark.parametrize(
    ("kind", "wide"), [("float", "grow_y, soft_y"), ("constant", "grow_y, soft_y"), ("quantized", "stem_y, relu_y")]
)
def test_what_leaves_float16_stays_in_float32_and_is_told(kind: str, wide: str, tmp_path: Path) -> None:
    model = overflowing(kind)
    edgekit.compress(save(model, tmp_path), tmp_path / "out", calibration=IMAGES)
    [result] = edgekit.export(tmp_path / "out", ["cuda-tensorrt"])
    assert f"in float32 around tensors that leave float16's range: {wide}" in result.manifest.notes

    feeds = {"x": IMAGES["x"][:4]}
    lowered = ir.load(result.folder / "model.onnx")
    types = {value.name: value.dtype for node in lowered.graph for value in node.outputs}
    assert {types[name] for name in wide.split(", ")} == {ir.DataType.FLOAT}
    assert ir.DataType.FLOAT16 in types.values()
    assert not any(WIDE in value.metadata_props for node in lowered.graph for value in node.outputs)
    got = evaluated(lowered, feeds)
    np.testing.assert_allclose(got, run(model, feeds)["squash_y"], rtol=0, atol=0.05)


@needs_tensorrt
@pytest.mark.parametrize("mask", ["input", "padding"])
def test_a_mask_of_float32s_lowest_from_outside_stays_a_number(mask: str, tmp_path: Path) -> None:
    """In float16 it would be minus infinity, and a row of nothing else NaN."""
    model, feeds = attention(LOWEST, mask)
    feeds[mask][::5] = LOWEST
    edgekit.compress(save(model, tmp_path), tmp_path / "out", calibration=feeds)
    [result] = edgekit.export(tmp_path / "out", ["cuda-tensorrt"])
    some = {name: array[:10] for name, array in feeds.items()}
    got = evaluated(ir.load(result.folder / "model.onnx"), some)
    np.testing.assert_allclose(got, run(model, some)["head_y"], rtol=0, atol=0.2)


def offset_classifier(offset: float) -> ir.Model:
    """Scores whose differences are small beside what is added to all of them: in float16 most come out alike."""
    net = Net(seed=3)
    x = net.conv_relu(net.input("x", ["n", 3, 16, 16]), "stem", 3, 8)
    scores = net.gemm(net.op("Flatten", [x]), "scores", 8 * 16 * 16, 4)
    large = net.op("Mul", [scores, net.constant("gain", np.float32(1e5))])  # is float32 in any case, which is told
    large = net.op("LeakyRelu", [large], "large", alpha=0.5)
    scores = net.op("Mul", [large, net.constant("loss", np.float32(1e-5))])
    shifted = net.op("Add", [scores, net.constant("offset", np.float32(offset))])
    model = net.model(net.op("Softmax", [shifted], "classes", axis=-1))
    poked(model, "scores.weight", lambda array: np.subtract(array, array.mean(1, keepdims=True), out=array))
    poked(model, "scores.bias", lambda array: array.fill(0))
    return model


@needs_tensorrt
@pytest.mark.parametrize("judged", ["by its decisions", "by a metric"])
@pytest.mark.parametrize(("offset", "dtype"), [(0.0, "float16"), (1000.0, "float32")])
def test_floats_are_float32_where_float16_loses_decisions(
    judged: str, offset: float, dtype: str, tmp_path: Path
) -> None:
    model = offset_classifier(offset)
    wanted = run(model, IMAGES)["classes_y"].argmax(1)

    def agreement(runner: Any) -> float:
        return float(np.mean(runner(IMAGES)["classes_y"].argmax(1) == wanted))

    metric = agreement if judged == "by a metric" else None
    edgekit.compress(save(model, tmp_path), tmp_path / "out", calibration=IMAGES, evaluate=metric)
    [result] = edgekit.export(tmp_path / "out", ["cuda-tensorrt"], evaluate=metric)
    told = [note for note in result.manifest.notes if note.startswith("in float32 what is not int8")]
    assert result.manifest.target_rules.runtime.float_dtype == dtype
    assert len(told) == (dtype == "float32")
    assert any("leave float16's range" in note for note in result.manifest.notes) == (dtype == "float16")
    lowered = ir.load(result.folder / "model.onnx")
    types = {value.dtype for node in lowered.graph for value in node.outputs}
    assert (ir.DataType.FLOAT16 in types) == (dtype == "float16")
    value = result.manifest.proxy or result.manifest.metric
    assert value is not None
    assert value.value >= 0.97


def test_marks_are_what_was_seen_and_the_model_is_left_alone() -> None:
    net = Net(seed=0)
    x = net.input("x", ["n", 2])
    big = net.op("Mul", [x, net.constant("gain", np.float32(40000))], "big")
    masked = net.op("Add", [big, net.constant("mask", np.array([0, LOWEST], np.float32))], "masked")
    half = net.op("Mul", [x, net.constant("less", np.float32(30000))], "half")
    proto = net.proto(masked, half, net.op("Log", [net.op("Relu", [x], "relu")], "infinite"))
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    batches = [{"x": np.array([[0.5, -1]], np.float32)}, {"x": np.array([[0, 0.25]], np.float32)}]
    marked = mark_wide(model, batches)
    assert wide_names(marked) == ["big_y", "masked_y"]
    assert [v.metadata_props.get(WIDE) for v in (marked.graph[0].outputs[0], model.graph[0].outputs[0])] == [
        "40000",
        None,
    ]
    assert wide_names(mark_wide(model, batches[1:])) == []
