"""Files that other tools quantized: what computes on codes becomes Q/DQ, then grids on a float graph, then another runtime's file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_dynamic, quantize_static
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

import edgekit
from edgekit.errors import GraphError, TargetError
from edgekit.graph.annotations import annotated_values, get_params
from edgekit.graph.io import load_annotated, load_onnx, save_onnx
from edgekit.graph.run import Session
from edgekit.method import Method
from edgekit.passes.expand_integer import computes_on_codes, expand_integer
from edgekit.pipelines.sources import canonicalize
from edgekit.quant.packed import unpacked, with_positive_scales
from graphs import Array, GraphBuilder, normal
from networks import Net, residual_net

OPERATORS = ("x86-onnxruntime", "arm-onnxruntime", "x86-openvino", "cuda-tensorrt")


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Four batches of four samples."""

    def __init__(self, feeds: dict[str, Array]) -> None:
        self._batches: Iterator[dict[str, Array]] = iter(
            [{name: array[i : i + 4] for name, array in feeds.items()} for i in range(0, 16, 4)]
        )

    def get_next(self) -> dict[str, Array] | None:
        return next(self._batches, None)


def sqnr(found: Array, expected: Array) -> float:
    return float(10 * np.log10(np.sum(expected**2) / max(np.sum((found - expected) ** 2), 1e-30)))


def output(model: ir.Model, feeds: dict[str, Array]) -> Array:
    return next(iter(Session(model, optimize=False).run(feeds).values()))


def many_kinds() -> ir.Model:
    """What ONNX Runtime has quantized operators for, in one network."""
    net = Net(seed=7)
    x = net.conv_relu(net.input("x", ["n", 3, 16, 16]), "stem", 3, 8)
    y = net.op("LeakyRelu", [net.conv(x, "a", 8, 8)], "leaky", alpha=0.1)
    x = net.op("Concat", [net.op("Mul", [x, net.op("Sigmoid", [y], "gate")], "mul"), y], "concat", axis=1)
    x = net.op("AveragePool", [net.conv_relu(x, "b", 16, 8)], "pool", kernel_shape=[2, 2], strides=[2, 2])
    x = net.op("Add", [x, net.conv(x, "c", 8, 8)], "add")
    x = net.op("Flatten", [net.op("GlobalAveragePool", [x], "mean")], "flat")
    x = net.op("Softmax", [net.gemm(x, "fc", 8, 12)], "softmax", axis=-1)
    return net.model(net.matmul(x, "head", 12, 5))


@pytest.fixture(params=["residual", "kinds"])
def quantized(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[ir.Model, Path, dict[str, Array]]:
    """A float network, ONNX Runtime's QOperator file of it (7-bit weights: no CPU saturates), and samples."""
    model = residual_net() if request.param == "residual" else many_kinds()
    feeds = {"x": normal(16, 3, 16, 16)}
    save_onnx(model, tmp_path / "float.onnx")
    quantize_static(
        tmp_path / "float.onnx", tmp_path / "quantized.onnx", Reader(feeds), quant_format=QuantFormat.QOperator,
        per_channel=True, reduce_range=True,
    )  # fmt: skip
    return model, tmp_path / "quantized.onnx", feeds


def test_what_computes_on_codes_becomes_float_operators_between_q_and_dq(
    quantized: tuple[ir.Model, Path, dict[str, Array]],
) -> None:
    floats, path, feeds = quantized
    source = load_onnx(path)
    assert sum(map(computes_on_codes, source.graph)) >= 8
    expanded = expand_integer(source)
    assert not any(map(computes_on_codes, expanded.graph))
    assert {"QuantizeLinear", "DequantizeLinear", "Conv"} <= {node.op_type for node in expanded.graph}
    assert sqnr(output(expanded, feeds), output(source, feeds)) > 30
    folded = canonicalize(source, feeds, opset=21)
    assert not any(node.op_type.endswith("uantizeLinear") for node in folded.graph)
    assert sqnr(output(folded, feeds), output(floats, feeds)) > 25
    assert len(list(annotated_values(folded.graph))) > 15


def test_names_of_layers_and_outputs_stay(quantized: tuple[ir.Model, Path, dict[str, Array]]) -> None:
    floats, path, _ = quantized
    expanded = expand_integer(load_onnx(path))
    assert [value.name for value in expanded.graph.outputs] == [value.name for value in floats.graph.outputs]
    convolutions = {node.name for node in expanded.graph if node.op_type == "Conv"}
    assert convolutions == {f"{node.name}_quant" for node in floats.graph if node.op_type == "Conv"}


@pytest.mark.parametrize("target", OPERATORS)
def test_an_int8_file_of_one_runtime_becomes_one_of_another(target: str, tmp_path: Path) -> None:
    """The grids are the file's own, activations are re-expressed where they can be; without data no range is chosen."""
    feeds = {"x": normal(40, 3, 16, 16)}
    save_onnx(residual_net(), tmp_path / "float.onnx")
    quantize_static(
        tmp_path / "float.onnx", tmp_path / "net.onnx", Reader(feeds), quant_format=QuantFormat.QOperator,
        reduce_range=True, extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
    )  # fmt: skip
    record = edgekit.compress(tmp_path / "net.onnx", tmp_path / "out", calibration=feeds).record
    assert record.proxy is not None and record.proxy.after >= 0.98
    grids = [get_params(value) for value in annotated_values(load_annotated(tmp_path / "out/model.onnx").graph)]
    assert sum(params is not None and params.fixed for params in grids) >= 20
    [result] = edgekit.export(tmp_path / "out", target)
    assert result.manifest.proof.agrees is not False
    assert result.manifest.kept_float == ()


def two_layers(tmp_path: Path) -> tuple[ir.Model, dict[str, Array]]:
    net = Net(seed=9)
    x = net.op("Relu", [net.matmul(net.input("x", ["n", 6, 64]), "a", 64, 32)], "relu")
    model = net.model(net.op("Add", [net.matmul(x, "b", 32, 16), net.weight("bias", 16)], "add"))
    save_onnx(model, tmp_path / "float.onnx")
    return model, {"x": normal(24, 6, 64)}


@pytest.mark.parametrize("per_channel", [False, True])
def test_dynamic_quantization_becomes_weights_on_grids(per_channel: bool, tmp_path: Path) -> None:
    model, feeds = two_layers(tmp_path)
    quantize_dynamic(tmp_path / "float.onnx", tmp_path / "dynamic.onnx", per_channel=per_channel, reduce_range=True)
    source = load_onnx(tmp_path / "dynamic.onnx")
    assert {"MatMulInteger", "DynamicQuantizeLinear"} <= {node.op_type for node in source.graph}
    folded = canonicalize(source, feeds, opset=21)
    assert sorted(node.op_type for node in folded.graph) == ["Add", "MatMul", "MatMul", "Relu"]
    axes = {(params := get_params(value)) and params.axis for value in annotated_values(folded.graph)}
    assert axes == ({1} if per_channel else {None})
    assert sqnr(output(folded, feeds), output(model, feeds)) > 30


def test_dynamic_convolutions_are_folded_too(tmp_path: Path) -> None:
    save_onnx(residual_net(), tmp_path / "float.onnx")
    quantize_dynamic(tmp_path / "float.onnx", tmp_path / "dynamic.onnx", reduce_range=True)
    source, feeds = load_onnx(tmp_path / "dynamic.onnx"), {"x": normal(8, 3, 16, 16)}
    assert "ConvInteger" in {node.op_type for node in source.graph}
    folded = canonicalize(source, feeds, opset=21)
    assert "Cast" not in {node.op_type for node in folded.graph}
    assert sqnr(output(folded, feeds), output(residual_net(), feeds)) > 30


def test_the_optimizers_own_operators_are_folded(tmp_path: Path) -> None:
    """What ONNX Runtime writes when it saves an optimized dynamic file."""
    import onnxruntime

    model, feeds = two_layers(tmp_path)
    quantize_dynamic(tmp_path / "float.onnx", tmp_path / "dynamic.onnx", per_channel=True, reduce_range=True)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(tmp_path / "dynamic.onnx", options, providers=["CPUExecutionProvider"])
    source = load_onnx(tmp_path / "optimized.onnx")
    assert "DynamicQuantizeMatMul" in {node.op_type for node in source.graph}
    folded = canonicalize(source, feeds, opset=21)
    assert not {"DynamicQuantizeMatMul", "MatMulIntegerToFloat"} & {node.op_type for node in folded.graph}
    assert sqnr(output(folded, feeds), output(model, feeds)) > 30


def test_a_dynamic_lstm_is_a_float_lstm(tmp_path: Path) -> None:
    build = GraphBuilder(opset=17)
    x = build.input("x", [5, "n", 8])
    y = build.op(
        "LSTM", [x, build.weight("w", 2, 24, 8), build.weight("r", 2, 24, 6), build.weight("b", 2, 48)], "lstm",
        outputs=3, hidden_size=6, direction="bidirectional",
    )  # fmt: skip
    onnx.save(build.proto(*y), tmp_path / "float.onnx")
    quantize_dynamic(tmp_path / "float.onnx", tmp_path / "dynamic.onnx", reduce_range=True)
    source, feeds = load_onnx(tmp_path / "dynamic.onnx"), {"x": normal(5, 3, 8)}
    assert "DynamicQuantizeLSTM" in {node.op_type for node in source.graph}
    folded = canonicalize(source, feeds, opset=21)
    expected = Session(tmp_path / "float.onnx", optimize=False).run(feeds)
    found = Session(folded, optimize=False).run(feeds)
    assert list(found) == list(expected)
    assert all(sqnr(found[name], expected[name]) > 25 for name in expected)


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True)])
def test_weights_in_packed_blocks_come_back(bits: int, symmetric: bool, tmp_path: Path) -> None:
    logging.getLogger("onnxruntime.quantization").setLevel(logging.ERROR)
    model, feeds = two_layers(tmp_path)
    made: Any = MatMulNBitsQuantizer(
        onnx.load(tmp_path / "float.onnx"), bits=bits, block_size=16, is_symmetric=symmetric, accuracy_level=1
    )
    made.process()
    onnx.save(made.model.model, tmp_path / "packed.onnx")
    source = load_onnx(tmp_path / "packed.onnx")
    assert sum(node.op_type == "MatMulNBits" for node in source.graph) == 2
    folded = canonicalize(source, feeds, opset=21)
    assert sqnr(output(folded, feeds), output(source, feeds)) > 80
    params = [get_params(value) for value in annotated_values(folded.graph)]
    assert {(p.dtype, p.block_size, p.axis) for p in params if p} == {(f"uint{bits}", 16, 0)}
    edgekit.compress(tmp_path / "packed.onnx", tmp_path / "out", calibration=feeds)
    if bits == 8:
        with pytest.raises(
            TargetError, match="has weights of uint8 in blocks of 16, which target 'x86-openvino' does not execute"
        ):
            edgekit.export(tmp_path / "out", "x86-openvino")
        return
    [result] = edgekit.export(tmp_path / "out", "x86-openvino")
    assert result.manifest.proof.agrees is True
    assert sqnr(output(load_onnx(result.folder / "model.onnx"), feeds), output(model, feeds)) > 15


@pytest.mark.parametrize("symmetric", [True, False])
def test_tables_in_packed_blocks_come_back(symmetric: bool, tmp_path: Path) -> None:
    logging.getLogger("onnxruntime.quantization").setLevel(logging.ERROR)
    build = GraphBuilder(opset=21)
    rows = build.op("Gather", [build.weight("table", 50, 64), build.input("ids", ["n", 6], TensorProto.INT64)], "embed")
    onnx.save(build.proto(build.op("MatMul", [rows, build.weight("w", 64, 4)], "head")), tmp_path / "float.onnx")
    made: Any = MatMulNBitsQuantizer(
        onnx.load(tmp_path / "float.onnx"), block_size=32, is_symmetric=symmetric, accuracy_level=1,
        op_types_to_quantize=("MatMul", "Gather"), quant_axes=(("MatMul", 0), ("Gather", 1)),
    )  # fmt: skip
    made.process()
    onnx.save(made.model.model, tmp_path / "packed.onnx")
    source, feeds = load_onnx(tmp_path / "packed.onnx"), {"ids": np.random.default_rng(0).integers(0, 50, (8, 6))}
    assert "GatherBlockQuantized" in {node.op_type for node in source.graph}
    folded = canonicalize(source, feeds, opset=21)
    assert {node.op_type for node in folded.graph} == {"Gather", "MatMul"}
    assert sqnr(output(folded, feeds), output(source, feeds)) > 80


def test_codes_are_unpacked_from_the_lowest_bits_on() -> None:
    assert unpacked(np.array([[0xE4]], np.uint8), 2).tolist() == [[0, 1, 2, 3]]
    assert unpacked(np.array([[0x21, 0x43]], np.uint8), 4).tolist() == [[1, 2, 3, 4]]


def test_negative_scales_are_turned_without_a_loss() -> None:
    rng = np.random.default_rng(3)
    codes, zero = rng.integers(0, 16, (5, 10)), rng.integers(0, 16, (5, 3))
    scale = rng.normal(0, 1, (5, 3))
    scale[1, 1] = 0
    codes[1, 4:8] = zero[1, 1]
    turned = with_positive_scales(codes, scale, zero, bits=4, block_size=4)
    assert turned[1].min() > 0
    assert min(turned[0].min(), turned[2].min()) >= 0 and max(turned[0].max(), turned[2].max()) <= 15

    def numbers(c: Array, s: Array, z: Array) -> Array:
        block = np.arange(10) // 4
        return np.asarray((c - z[:, block]) * s[:, block])

    np.testing.assert_array_equal(numbers(*turned), numbers(codes, scale, zero))


def integer_sum(build: GraphBuilder) -> str:
    """A product of codes that nobody scales back."""
    codes = build.op("DynamicQuantizeLinear", [build.input("x", ["n", 4])], "quantize", outputs=3)
    weight = build.constant("w", np.ones((4, 2), np.int8))
    return str(build.op("MatMulInteger", [codes[0], weight, codes[2]], "product"))


def channels_last(build: GraphBuilder) -> str:
    x = build.input("x", ["n", 4, 4, 3], TensorProto.UINT8)
    grid = [build.constant("s", np.float32(0.1)), build.constant("z", np.uint8(3))]
    return str(build.op("QLinearGlobalAveragePool", [x, *grid, *grid], "pool", channels_last=1, domain="com.microsoft"))


def attention(build: GraphBuilder) -> str:
    return str(build.op("QAttention", [build.input("x", ["n", 4])], "attention", domain="com.microsoft"))


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (integer_sum, r"node 'product' \(MatMulInteger\) computes on codes, and no DynamicQuantizeLinear in front"),
        (channels_last, r"node 'pool' \(QLinearGlobalAveragePool\) computes on codes, with channels last"),
        (
            attention,
            r"node 'attention' \(QAttention\) computes on codes, as no float operator does: give the float model",
        ),
    ],
)
def test_what_has_no_float_form_is_refused_by_name(write: Callable[[GraphBuilder], str], says: str) -> None:
    build = GraphBuilder(opset=17)
    y = write(build)
    with pytest.raises(GraphError, match=says):
        expand_integer(ir.from_proto(build.proto(y)))


def test_dequantize_gives_the_float_model_back(
    quantized: tuple[ir.Model, Path, dict[str, Array]], tmp_path: Path
) -> None:
    floats, path, feeds = quantized
    done = edgekit.compress(path, tmp_path / "out", calibration=feeds, method=Method(dequantize=True))
    model = load_annotated(done.model)
    assert not list(annotated_values(model.graph))
    assert not any("uantize" in node.op_type for node in model.graph)
    assert sqnr(output(model, feeds), output(floats, feeds)) > 25
    assert done.record.notes[0] == "model.onnx is quantized.onnx in float: nothing is quantized"
    assert done.record.proxy is None


@pytest.mark.parametrize("options", [("--weights", "int4"), ("--search",), ("--max-drop", "30dB"), ("--explain",)])
def test_dequantize_beside_what_it_would_ignore_is_refused(
    options: tuple[str, ...], cli: Callable[..., Any], tmp_path: Path
) -> None:
    _, feeds = two_layers(tmp_path)
    np.savez(tmp_path / "x.npz", x=feeds["x"])
    words = (
        "compress",
        str(tmp_path / "float.onnx"),
        "--dequantize",
        *options,
        "--calibration",
        str(tmp_path / "x.npz"),
    )
    done = cli(*words, "-o", str(tmp_path / "out"))
    assert (done.code, done.stdout) == (5, "")
    assert "--dequantize gives the float model and changes nothing: drop what says how to quantize" in done.stderr
    assert not (tmp_path / "out").exists()


def test_dequantize_on_the_command_line(cli: Callable[..., Any], tmp_path: Path) -> None:
    model, feeds = two_layers(tmp_path)
    quantize_dynamic(tmp_path / "float.onnx", tmp_path / "dynamic.onnx", reduce_range=True)
    np.savez(tmp_path / "x.npz", x=feeds["x"])
    done = cli(
        "compress", str(tmp_path / "dynamic.onnx"), "--dequantize", "--calibration", str(tmp_path / "x.npz"), "-o",
        str(tmp_path / "out"),
    )  # fmt: skip
    assert done.code == 0, done.stderr
    assert "dynamic.onnx for 'portable', float\n" in done.stdout
    assert sqnr(output(load_onnx(tmp_path / "out/model.onnx"), feeds), output(model, feeds)) > 30
