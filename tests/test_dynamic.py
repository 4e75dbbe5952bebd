"""Scales of activations at inference: integer products in ONNX Runtime, the runtime's own in OpenVINO, a refusal for TensorRT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from edgekit.errors import TargetError
from edgekit.lowering.qdq import lower_qdq
from edgekit.target import load_target
from edgekit_onnxruntime import OnnxRuntimeBackend
from edgekit_openvino import OpenVinoBackend
from networks import compiled, needs_vnni, samples, simulate, text, worst
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
)

ORT, OPENVINO, TARGET = OnnxRuntimeBackend(), OpenVinoBackend(), load_target("x86-onnxruntime")
SUMS = 1e-5
"""What the order of sums changes, as a share of an output's largest magnitude."""
BYTES = 0.03
"""What activations of 8 bits change; a wrong weight is off by 0.3."""


def dynamic(model: ir.Model, folder: Path, **choices: object) -> ir.Model:
    return compressed(model, folder, activations="dynamic", **choices)


@needs_vnni
@pytest.mark.parametrize("name", ["x86-onnxruntime", "arm-onnxruntime"])
@pytest.mark.parametrize("network", [tokens, rows, shared])
def test_onnx_runtime_computes_what_the_operators_say(
    network: Callable[[], ir.Model], name: str, tmp_path: Path
) -> None:
    model, target = dynamic(network(), tmp_path), load_target(name)
    lowered = lower_qdq(model, target)
    runtime = compiled(lowered, ORT, target, tmp_path)
    for count in (1, 5):
        feeds = samples(model, count)
        expected, found = simulate(on_grids(model), feeds), runtime.run(feeds)
        assert worst(found, simulate(lowered, feeds)) < BYTES / 3  # a code may flip at a tie
        assert SUMS < worst(found, expected) < BYTES


@pytest.mark.parametrize(
    ("network", "wanted"),
    [
        (tokens, {"DynamicQuantizeMatMul": 2}),
        (rows, {"DynamicQuantizeMatMul": 3}),
        (shared, {"DynamicQuantizeLinear": 1, "MatMulIntegerToFloat": 2, "DynamicQuantizeMatMul": 1}),
    ],
)
def test_onnx_runtime_fuses_each_product_with_all_around_it(
    network: Callable[[], ir.Model], wanted: dict[str, int], tmp_path: Path
) -> None:
    model = dynamic(network(), tmp_path)
    runtime = compiled(lower_qdq(model, TARGET), ORT, TARGET, tmp_path)
    kernels = [kernel.kernel for kernel in runtime.kernels(samples(model, 2))]
    assert {name: sum(name in kernel for kernel in kernels) for name in wanted} == wanted
    assert not any(kind in kernel for kernel in kernels for kind in ("MatMulInteger/", "Cast", "DequantizeLinear"))


def test_what_several_layers_read_is_quantized_once_and_a_shared_weight_stored_once(tmp_path: Path) -> None:
    lowered = lower_qdq(dynamic(shared(), tmp_path), TARGET)
    assert [node.op_type for node in lowered.graph].count("DynamicQuantizeLinear") == 2
    stored = [name for name in lowered.graph.initializers if "_quantized" in name]
    assert sorted(stored) == ["query.weight_quantized", "value.weight_quantized"]


def test_the_file_shrinks_to_a_third_and_layers_keep_their_names(tmp_path: Path) -> None:
    lowered = lower_qdq(dynamic(tokens(), tmp_path), TARGET)
    floats = size_of(artifact_of(tokens(), ORT, TARGET, tmp_path))
    assert size_of(artifact_of(lowered, ORT, TARGET, tmp_path)) < 0.35 * floats
    assert [node.name for node in lowered.graph if node.op_type == "MatMulInteger"] == ["up0", "down0"]


def test_a_convolution_stays_float(tmp_path: Path) -> None:
    lines = text(lower_qdq(dynamic(picture(), tmp_path), TARGET))
    assert "conv_y = Conv(x, conv.weight, conv.bias)" in lines
    assert sum("MatMulInteger(" in line for line in lines) == 1


@needs_vnni
def test_the_bias_makes_up_for_the_shift_and_chosen_codes_are_stored(tmp_path: Path) -> None:
    for network, name in ((tokens, "up0.weight"), (rows, "first.weight")):
        model = dynamic(network(), tmp_path)
        codes = np.full(numbers(model.graph.initializers[name]).shape, 3, np.int8)
        chosen = changed_params(model, name, codes=codes, shift=np.linspace(-1, 1, 256, dtype=np.float32))
        expected, feeds, bias = on_grids(chosen), samples(model, 3), name.replace("weight", "bias")
        moved = numbers(model.graph.initializers[bias]) - np.linspace(-1, 1, 256, dtype=np.float32)
        expected.graph.initializers[bias].const_value = ir.tensor(moved, name=bias)
        found = simulate(lower_qdq(chosen, TARGET), feeds)
        assert worst(found, simulate(expected, feeds)) < BYTES
        assert worst(found, simulate(on_grids(model), feeds)) > 0.1


def test_a_layer_kept_in_float_is_float(tmp_path: Path) -> None:
    lowered = lower_qdq(dynamic(tokens(), tmp_path), TARGET, keep_float=frozenset({"down0"}))
    assert "down0_y = MatMul(up0.add_y, down0.weight)" in text(lowered)
    assert (
        lower_qdq(dynamic(tokens(), tmp_path), TARGET, keep_float=frozenset({"up0", "down0"})).opset_imports[""] == 21
    )


def test_four_bits_are_left_to_the_runtime_which_quantizes_activations_by_itself(tmp_path: Path) -> None:
    model = dynamic(tokens(), tmp_path, weights="int4", block_size=64)
    runtime, feeds = compiled(lower_qdq(model, TARGET), ORT, TARGET, tmp_path), samples(model, 2)
    assert sum("MatMulNBits" in kernel.kernel for kernel in runtime.kernels(feeds)) == 2
    assert SUMS < worst(runtime.run(feeds), simulate(on_grids(model), feeds)) < BYTES


@needs_vnni
def test_openvino_quantizes_activations_when_it_meets_codes(tmp_path: Path) -> None:
    target = load_target("x86-openvino")
    model = dynamic(tokens(), tmp_path)
    lowered, feeds = OPENVINO.lower(model, target, keep_float=frozenset()), samples(model, 2)
    assert not any("Dynamic" in node.op_type or "Integer" in node.op_type for node in lowered.graph)
    runtime = compiled(lowered, OPENVINO, target, tmp_path)
    products = [k for k in runtime.kernels(feeds) if k.kernel.startswith("FullyConnected")]
    assert [k.precision for k in products] == ["int8", "int8"]
    assert SUMS < worst(runtime.run(feeds), simulate(on_grids(model), feeds)) < BYTES


def test_tensorrt_refuses_by_name(tmp_path: Path) -> None:
    with pytest.raises(
        TargetError, match=r"MatMul 'up0' wants scales of activations at run time, which target 'cuda-tensorrt'"
    ):
        lower_qdq(dynamic(tokens(), tmp_path), load_target("cuda-tensorrt"))
