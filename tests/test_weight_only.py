"""Weights as codes behind float activations: equal to their grids, compressed in the runtime's own kernels, or refused by name."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from edgekit.backend import Backend
from edgekit.errors import GraphError, TargetError
from edgekit.graph.io import save_onnx
from edgekit.lowering.qdq import lower_qdq
from edgekit.lowering.weight_only import check_format
from edgekit.quant.affine import constant_codes
from edgekit.target import load_target
from edgekit_onnxruntime import OnnxRuntimeBackend
from edgekit_openvino import OpenVinoBackend
from edgekit_tensorrt import TensorRtBackend
from networks import compiled, get_params_of, needs_vnni, samples, simulate, text, worst
from weight_graphs import (
    artifact_of,
    changed_params,
    compressed,
    numbers,
    on_grids,
    picture,
    rows,
    shared,
    size_of,
    tokens,
    with_options,
)

ORT, OPENVINO = OnnxRuntimeBackend(), OpenVinoBackend()
FLOAT_ACTIVATIONS: dict[str, tuple[Backend, dict[str, str]]] = {
    "x86-onnxruntime": (ORT, {"session.qdq_matmulnbits_accuracy_level": "0"}),
    "x86-openvino": (OPENVINO, {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}),
}
"""How each runtime is kept from quantizing activations by itself."""
SUMS = 1e-5
"""What the order of sums changes, as a share of an output's largest magnitude; codes of 8 bits are off by 5e-3."""
BYTES = 0.03
"""What activations of 8 bits change; a wrong weight is off by 0.3."""
GRIDS = [
    ("int8", 0),
    ("int8", 32),
    ("int4", 0),
    ("int4", 16),
    ("int4", 64),
    ("int4", 128),
    ("uint4", 32),
    ("uint4", 64),
]


def ids(grid: object) -> str:
    return f"{grid[0]}-{grid[1]}" if isinstance(grid, tuple) else str(grid)


@pytest.mark.parametrize("name", FLOAT_ACTIVATIONS)
@pytest.mark.parametrize("grid", GRIDS, ids=ids)
@pytest.mark.parametrize("network", [tokens, rows, shared])
def test_a_runtime_computes_with_the_numbers_of_the_grids(
    network: Callable[[], ir.Model], grid: tuple[str, int], name: str, tmp_path: Path
) -> None:
    backend, options = FLOAT_ACTIVATIONS[name]
    model = compressed(network(), tmp_path, weights=grid[0], block_size=grid[1])
    target = with_options(name, **options)
    runtime = compiled(backend.lower(model, target, keep_float=frozenset()), backend, target, tmp_path)
    for count in (1, 5):
        feeds = samples(model, count)
        assert worst(runtime.run(feeds), simulate(on_grids(model), feeds)) < SUMS


@pytest.mark.parametrize("grid", [("int8", 0), ("int4", 64), ("uint4", 64), ("int2", 64), ("uint2", 64)], ids=ids)
def test_onnx_runtime_multiplies_with_codes(grid: tuple[str, int], tmp_path: Path) -> None:
    target = load_target("x86-onnxruntime")
    for network, layers in ((tokens, {"up0", "down0"}), (rows, {"first", "second", "third"})):
        model = compressed(network(), tmp_path, weights=grid[0], block_size=grid[1])
        runtime = compiled(lower_qdq(model, target), ORT, target, tmp_path)
        feeds = samples(model, 2)
        kernels = [kernel.kernel for kernel in runtime.kernels(feeds)]
        assert sum("MatMulNBits" in kernel for kernel in kernels) == len(layers)
        assert not any("Dequantize" in kernel for kernel in kernels)
        assert worst(runtime.run(feeds), simulate(on_grids(model), feeds)) < BYTES


@needs_vnni
@pytest.mark.parametrize(("weights", "block", "share"), [("int8", 0, 0.35), ("int4", 64, 0.25), ("uint4", 128, 0.25)])
def test_openvino_multiplies_with_codes_and_quantizes_activations_by_itself(
    weights: str, block: int, share: float, tmp_path: Path
) -> None:
    target, precise = load_target("x86-openvino"), with_options("x86-openvino", DYNAMIC_QUANTIZATION_GROUP_SIZE="0")
    model = compressed(tokens(), tmp_path, weights=weights, block_size=block)
    lowered, feeds = OPENVINO.lower(model, target, keep_float=frozenset()), samples(model, 2)
    runtime = compiled(lowered, OPENVINO, target, tmp_path)
    found = {kernel.precision for kernel in runtime.kernels(feeds) if kernel.kernel.startswith("FullyConnected")}
    assert found == {"int8" if weights == "int8" else weights.replace("int", "i").replace("ui", "u")}
    rounded, exact = runtime.run(feeds), compiled(lowered, OPENVINO, precise, tmp_path).run(feeds)
    assert SUMS < worst(rounded, exact) < BYTES
    floats = size_of(artifact_of(tokens(), OPENVINO, target, tmp_path))
    assert size_of(artifact_of(lowered, OPENVINO, target, tmp_path)) < share * floats


@pytest.mark.parametrize("name", FLOAT_ACTIVATIONS)
def test_weights_of_convolutions_become_codes_where_the_target_executes_their_type(name: str, tmp_path: Path) -> None:
    backend, options = FLOAT_ACTIVATIONS[name]
    target = with_options(name, **options)
    for weights in ("int8", "int4"):
        model = compressed(picture(), tmp_path, weights=weights)
        lowered = backend.lower(model, target, keep_float=frozenset())
        (line,) = (line for line in text(lowered) if " = Conv(" in line)
        on_codes = "q(conv.weight)" in line
        assert on_codes == (weights == "int8" or name == "x86-openvino")
        if on_codes:
            expected, feeds = on_grids(model), samples(model, 3)
            runtime = compiled(lowered, backend, target, tmp_path)
            assert worst(runtime.run(feeds), simulate(expected, feeds)) < SUMS


def test_a_gemm_becomes_a_product_with_an_untransposed_weight_and_an_add(tmp_path: Path) -> None:
    model = compressed(rows(), tmp_path)
    assert text(lower_qdq(model, load_target("x86-openvino"))) == [
        "first_result = MatMul(x, q(first.weight))",
        "first_y = Add(first_result, first.bias)",
        "relu_y = Relu(first_y)",
        "second_result = MatMul(relu_y, q(second.weight))",
        "second_y = Add(second_result, second.bias)",
        "third_y = MatMul(second_y, q(third.weight))",
        "return third_y",
    ]
    lines = text(lower_qdq(model, load_target("x86-onnxruntime")))
    assert [line.split(" = ")[1].split("(")[0] for line in lines[:5]] == [
        "Unsqueeze",
        "MatMul",
        "Add",
        "Squeeze",
        "Relu",
    ]


def test_a_gemm_that_scales_its_terms_stays_one(tmp_path: Path) -> None:
    model = rows()
    model.graph.node("first").attributes["alpha"] = ir.AttrFloat32("alpha", 0.5)
    model = compressed(model, tmp_path)
    lowered = lower_qdq(model, load_target("x86-onnxruntime"))
    assert text(lowered)[0] == "first_y = Gemm(x, q(first.weight), first.bias)"
    feeds = samples(model, 4)
    assert worst(simulate(lowered, feeds), simulate(on_grids(model), feeds)) < SUMS


def test_a_shared_weight_is_stored_once_where_the_runtime_executes_it_so(tmp_path: Path) -> None:
    model, two = compressed(shared(), tmp_path), ["query.weight_quantized", "value.weight_quantized"]
    for target, stored in (("x86-openvino", two), ("x86-onnxruntime", [two[0], f"{two[0]}_", two[1]])):
        lowered = lower_qdq(model, load_target(target))
        assert sorted(name for name in lowered.graph.initializers if "_quantized" in name) == stored


def test_a_short_last_block_runs_in_onnx_runtime_and_is_refused_for_openvino(tmp_path: Path) -> None:
    model = compressed(tokens(features=100), tmp_path, weights="int4", block_size=64)
    backend, options = FLOAT_ACTIVATIONS["x86-onnxruntime"]
    target = with_options("x86-onnxruntime", **options)
    feeds = samples(model, 2)
    runtime = compiled(lower_qdq(model, target), backend, target, tmp_path)
    assert worst(runtime.run(feeds), simulate(on_grids(model), feeds)) < SUMS
    with pytest.raises(
        TargetError, match=r"MatMul 'up0' sums over 100 inputs, which are no multiple of its blocks of 64"
    ):
        lower_qdq(model, load_target("x86-openvino"))


def test_what_a_target_does_not_execute_is_refused_with_what_it_does(tmp_path: Path) -> None:
    refused = [
        ("x86-openvino", "int2", 64),
        ("cuda-tensorrt", "uint4", 64),
        ("cuda-tensorrt", "int4", 32),
        ("cuda-tensorrt", "int4", 0),
    ]
    for name, weights, block in refused:
        model = compressed(tokens(), tmp_path, weights=weights, block_size=block)
        with pytest.raises(TargetError) as caught:
            lower_qdq(model, load_target(name))
        kind = f"{weights} in blocks of {block}" if block else f"{weights} with one scale a channel"
        assert f"MatMul 'up0' has weights of {kind}, which target {name!r} does not execute; expected int8" in str(
            caught.value
        )
        assert text(lower_qdq(model, load_target(name), keep_float=frozenset({"up0", "down0"}))) == text(tokens())


def test_layers_kept_in_float_read_the_float_weight(tmp_path: Path) -> None:
    model = compressed(shared(), tmp_path)
    lowered = lower_qdq(model, load_target("x86-openvino"), keep_float=frozenset({"key"}))
    assert text(lowered)[:4] == [
        "query_y = MatMul(x, q(query.weight))",
        "tanh_y = Tanh(x)",
        "key_y = MatMul(tanh_y, query.weight)",
        "value_y = MatMul(x, q(value.weight))",
    ]


@pytest.mark.parametrize("network", [tokens, rows])
def test_chosen_codes_are_stored_and_the_bias_makes_up_for_the_shift(
    network: Callable[[], ir.Model], tmp_path: Path
) -> None:
    model = compressed(network(), tmp_path, weights="int4", block_size=32)
    name = "up0.weight" if network is tokens else "first.weight"
    weight, params = numbers(model.graph.initializers[name]), get_params_of(model, name)
    codes = np.clip(constant_codes(weight, params).astype(np.int8) + 1, -8, 7)
    shift = np.linspace(-1, 1, 256, dtype=np.float32)
    chosen = changed_params(model, name, codes=codes, shift=shift)
    lowered, feeds = lower_qdq(chosen, load_target("x86-onnxruntime")), samples(model, 3)
    bias = name.replace("weight", "bias")
    expected = on_grids(chosen)
    expected.graph.initializers[bias].const_value = ir.tensor(
        numbers(model.graph.initializers[bias]) - shift, name=bias
    )
    assert worst(simulate(lowered, feeds), simulate(expected, feeds)) < SUMS
    assert worst(simulate(lowered, feeds), simulate(on_grids(model), feeds)) > 0.1


def test_two_bits_raise_the_opset_and_an_old_opset_is_refused(tmp_path: Path) -> None:
    target = load_target("x86-onnxruntime")
    lowered = lower_qdq(compressed(tokens(), tmp_path, weights="int2", block_size=64), target)
    assert (lowered.opset_imports[""], lowered.ir_version) == (25, 13)
    assert lower_qdq(compressed(tokens(), tmp_path), target).opset_imports[""] == 21
    old = compressed(tokens(), tmp_path, weights="int4", block_size=64)
    old.opset_imports[""] = 17
    with pytest.raises(
        GraphError, match=r"MatMul 'up0' has weights of int4 in blocks of 64, which need opset 21; the model has 17"
    ):
        lower_qdq(old, target)


def test_other_formats_refuse_such_a_model_by_name(tmp_path: Path) -> None:
    model = compressed(tokens(), tmp_path)
    check_format(model, "qdq")
    check_format(tokens(), "integer")
    for format in ("qoperator", "integer"):
        with pytest.raises(
            TargetError, match=rf"MatMul 'up0' was compressed with activations = 'none', and format '{format}'"
        ):
            check_format(model, format)


def test_lowering_is_deterministic_and_leaves_its_input_alone(tmp_path: Path) -> None:
    model = compressed(tokens(), tmp_path, weights="uint4", block_size=32)
    target, files = load_target("x86-onnxruntime"), []
    for index in range(2):
        save_onnx(lower_qdq(model, target), tmp_path / f"{index}.onnx")
        files.append((tmp_path / f"{index}.onnx").read_bytes())
    assert files[0] == files[1]
    assert get_params_of(model, "up0.weight").block_size == 32


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")
@pytest.mark.parametrize(("weights", "block"), [("int8", 0), ("int4", 64), ("int4", 128)])
def test_tensorrt_fuses_the_dequantize_linear_into_the_product(weights: str, block: int, tmp_path: Path) -> None:
    backend, target = TensorRtBackend(), load_target("cuda-tensorrt")
    model = compressed(tokens(batch=4), tmp_path, weights=weights, block_size=block)
    lowered = backend.lower(model, target, keep_float=frozenset())
    assert backend.check(lowered, target) == []
    kernels = backend.planned_kernels(artifact_of(lowered, backend, target, tmp_path))
    assert any({"down0", "down0.weight/DequantizeLinear"} <= set(kernel.layers) for kernel in kernels)
