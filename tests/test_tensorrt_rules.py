"""TensorRT's static rules and input ranges: pure functions, each rule shown by a model that breaks it."""

from __future__ import annotations

import re

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgekit.errors import TargetError
from edgekit.graph.annotations import set_sample_shape
from edgekit.lowering.half import to_float16
from edgekit.target import load_target
from edgekit_tensorrt import TensorRtBackend
from edgekit_tensorrt.profile import input_ranges, sizes_of_samples
from tensorrt_graphs import model_of, qdq, small_conv

BACKEND = TensorRtBackend()
TARGET = load_target("cuda-tensorrt")


# Static rules


def test_a_clean_model_breaks_no_rule() -> None:
    assert BACKEND.check(qdq(), TARGET) == []
    assert BACKEND.check(to_float16(qdq()), TARGET) == []


def int4_matmul(block: int, *, axis: int = 0, op: str = "MatMul") -> ir.Model:
    shape = (256 // block, 128) if axis == 0 else (256, 128 // block)
    call = "MatMul(x, dw)" if op == "MatMul" else "Gemm(x, dw)"
    constants = {"s": np.full(shape, 0.1, np.float32), "w": np.zeros((256, 128), ir.DataType.INT4.numpy())}
    return model_of(
        f"g (float[4,256] x) => (float[4,128] y) {{ dw = DequantizeLinear<axis={axis}, block_size={block}>(w, s) y = {call} }}",
        constants,
    )


def float_scale_on_half() -> ir.Model:
    return model_of(
        "g (float16[1,8] x) => (float16[1,8] y) { q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) y = Cast<to=10>(d) }",
        {"s": np.array(0.1, np.float32), "z": np.array(0, np.int8)},
    )


def per_channel_activation() -> ir.Model:
    text = "g (float[1,8] x) => (float[1,8] y) { q = QuantizeLinear<axis=1>(x, s, z) y = DequantizeLinear<axis=1>(q, s, z) }"
    return model_of(text, {"s": np.full(8, 0.1, np.float32), "z": np.zeros(8, np.int8)})


def wrong_axis() -> ir.Model:
    model = qdq()
    next(node for node in model.graph if node.name == "DequantizeLinear_dw").attributes["axis"] = ir.AttrInt64(
        "axis", 1
    )
    return model


def local_function() -> ir.Model:
    return ir.from_proto(
        onnx.parser.parse_model(
            """<ir_version: 10, opset_import: ["": 21, "lab": 1]> g (float[2] x) => (float[2] y) { y = lab.f(x) }
            <domain: "lab", opset_import: ["": 21]> f (a) => (b) { b = Relu(a) }"""
        )
    )


@pytest.mark.parametrize(
    ("model", "sentences"),
    [
        (
            qdq(z=np.array(3, np.int8)),
            [r"'QuantizeLinear_q'.*zero point 'z' that is not 0", r"'DequantizeLinear_d'.*not 0"],
        ),
        (qdq("uint8"), [r"'QuantizeLinear_q'.*uint8 codes", r"'DequantizeLinear_d'.*uint8 codes"]),
        (qdq("int16"), [r"'QuantizeLinear_q'.*int16 codes", r"'DequantizeLinear_d'.*int16 codes"]),
        (
            qdq(w=np.ones((8, 8, 1, 1), np.int32)),
            [r"'DequantizeLinear_dw'.*int32 codes; TensorRT wants a bias in float"],
        ),
        (float_scale_on_half(), [r"'QuantizeLinear_q'.*float scale 's' on float16 data 'x'"]),
        (
            per_channel_activation(),
            [r"'QuantizeLinear_q'.*each channel of an activation", r"'DequantizeLinear_y'.*each channel"],
        ),
        (
            wrong_axis(),
            [r"'DequantizeLinear_dw'.*axis 1 of the weight 'w'; TensorRT wants the output channel.*'Conv_y'.*axis 0"],
        ),
        (int4_matmul(32), [r"'DequantizeLinear_dw'.*int4 blocks of 32; TensorRT documents 64 and 128"]),
        (int4_matmul(64, op="Gemm"), [r"'DequantizeLinear_dw'.*int4 to node 'Gemm_y' \(Gemm\)"]),
        (int4_matmul(64), []),
        (int4_matmul(128, axis=1), []),
        (local_function(), [r"its own function lab::f", r"domain 'lab'"]),
        (
            model_of(
                "g (uint8[2,2] x, uint8[2,2] w) => (int32[2,2] y) { y = MatMulInteger(x, w) }",
            ),
            [r"'MatMulInteger_y'.*computes on codes"],
        ),
        (
            model_of(
                "g (float[2] x) => (float[2] y) { y = com.microsoft.QuickGelu(x) }", opsets='"": 21, "com.microsoft": 1'
            ),
            [r"'QuickGelu_y'.*domain 'com.microsoft'"],
        ),
        (
            model_of("g (float[2] x) => (float[2] y) { y = Relu(x) }", opsets='"": 26'),
            [r"opset 26; TensorRT reads 9 to 25"],
        ),
        (
            model_of("g (float[2] x) => (float[2] y) { y = Relu(x) }", opsets='"": 8'),
            [r"opset 8; TensorRT reads 9 to 25"],
        ),
    ],
)
def test_each_rule_names_what_breaks_it(model: ir.Model, sentences: list[str]) -> None:
    found = BACKEND.check(model, TARGET)
    assert len(found) == len(sentences), found
    for sentence, pattern in zip(found, sentences, strict=True):
        assert re.search(pattern, sentence), sentence


# Input ranges


def test_ranges_of_dynamic_inputs() -> None:
    model = model_of("g (float[N,3] x, float[2,3] fixed, float[N,S] ids) => (float[N,3] y) { y = Relu(x) }")
    options = {"batch": "1,4,8", "shape:ids": "1x16,4x64,8x128"}
    assert input_ranges(model, options) == {"x": ((1, 3), (4, 3), (8, 3)), "ids": ((1, 16), (4, 64), (8, 128))}
    assert input_ranges(small_conv(), {}) == {"x": ((1, 3, 8, 8), (1, 3, 8, 8), (64, 3, 8, 8))}
    assert input_ranges(small_conv("1"), {}) == {}


def test_sizes_that_nobody_gave_are_those_of_the_samples_and_it_is_said() -> None:
    model = model_of("g (float[N,3,H,W] x, float[1,S] ids, float[N,4] plain) => (float[N,3,H,W] y) { y = Relu(x) }")
    x, ids, plain = model.graph.inputs
    for value, shape in ((x, (16, 3, 32, 48)), (ids, (1, 20)), (plain, (16, 4))):
        set_sample_shape(value, shape)
    assert input_ranges(model, {"batch": "1,2,4"}) == {
        "x": ((1, 3, 32, 48), (2, 3, 32, 48), (4, 3, 32, 48)),
        "ids": ((1, 20), (1, 20), (1, 20)),
        "plain": ((1, 4), (2, 4), (4, 4)),
    }
    first, second = sizes_of_samples(model, {})
    assert "'x' in the size of the samples only, Nx3x32x48;" in first and '"shape:x" = "MIN,OPT,MAX"' in first
    assert "'ids' in the size of the samples only, 1x20;" in second
    assert sizes_of_samples(model, {"shape:x": "", "shape:ids": ""}) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"input 'ids' has dynamic dimensions besides the batch: NxS.*\"shape:ids\" = \"MIN,OPT,MAX\""),
        ({"shape:ids": "1x16,4x64,8x128", "bacth": "1,2,3"}, r"no option 'bacth'.*it has batch, shape:ids"),
        ({"shape:idz": "1x16,4x64,8x128"}, r"no option 'shape:idz'"),
        ({"batch": "8,4,1"}, r"batch = '8,4,1'; expected \"MIN,OPT,MAX\" in ascending order"),
        ({"batch": "1,x,8"}, r"batch = '1,x,8'"),
        ({"shape:ids": "1x16,4x64"}, r"\"shape:ids\" = '1x16,4x64'; expected.*\?x\?"),
        ({"shape:ids": "1x16x1,4x64x1,8x128x1"}, r"ascending shapes that fit the input's \?x\?"),
        ({"shape:ids": "1x16,4x64,2x128"}, r"ascending shapes"),
    ],
)
def test_bad_ranges_are_explained(options: dict[str, str], message: str) -> None:
    model = model_of("g (float[N,S] ids) => (float[N,S] y) { y = Relu(ids) }")
    with pytest.raises(TargetError, match=message):
        input_ranges(model, options)
