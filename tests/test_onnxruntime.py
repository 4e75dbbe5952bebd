"""ONNX Runtime: what really runs in integer kernels, equal to the simulation, on the x86 target and on the ARM one."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgekit.backend import Artifact, KernelRecord
from edgekit.errors import BackendError
from edgekit.graph.io import save_onnx
from edgekit.passes.simplify import simplify
from edgekit.target import Device, Target
from edgekit_onnxruntime import OnnxRuntimeBackend
from edgekit_onnxruntime.names import NodeNames
from networks import (
    Net,
    annotate,
    compiled,
    local_target,
    mixed_net,
    needs_vnni,
    random_net,
    residual_net,
    samples,
    simulate,
    token_net,
    worst,
)

BACKEND = OnnxRuntimeBackend()
NAMES = ("x86-onnxruntime", "arm-onnxruntime")
NETS = (residual_net, mixed_net, token_net)
ROUNDING = 0.02
"""A code that flips at a tie, as a share of an output's largest magnitude; wrong kernels are off by 0.2 and more."""

on_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="the x86 target is native on x86-64 only")


def lower(model: ir.Model, name: str = "x86-onnxruntime", *keep_float: str) -> ir.Model:
    return BACKEND.lower(annotate(model), local_target(name), keep_float=frozenset(keep_float))


def kernels_of(
    model: ir.Model, folder: Path, *, target: Target | None = None, precision: str = "int8"
) -> list[KernelRecord]:
    target = target or local_target("x86-onnxruntime")
    return list(compiled(model, BACKEND, target, folder, precision=precision).kernels(samples(model, 3)))


def by_layer(kernels: list[KernelRecord]) -> dict[str, str]:
    return {layer: kernel.kernel for kernel in kernels for layer in kernel.layers}


def with_artifact(kind: str, name: str = "x86-onnxruntime") -> Target:
    target = local_target(name)
    return target.model_copy(update={"runtime": target.runtime.model_copy(update={"artifact": kind})})


# Kernels.


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_of_a_residual_network_runs_on_codes(name: str, tmp_path: Path) -> None:
    kernels = kernels_of(lower(residual_net(), name), tmp_path, target=local_target(name))
    found = by_layer(kernels)
    convolutions = ("stem", "a1", "a2", "b1", "b2", "c1", "c2", "c.short")
    assert {layer: found[layer] for layer in convolutions} == dict.fromkeys(convolutions, "QLinearConv")
    adds = ("a.add", "b.add", "c.add")
    assert {layer: found[layer] for layer in adds} == dict.fromkeys(adds, "QLinearAdd")
    assert (found["pool"], found["head"]) == ("QLinearGlobalAveragePool", "QGemm")
    assert (found["b.slice"], found["b.pad"]) == ("Slice", "Pad")
    assert [kernel.kernel for kernel in kernels if kernel.precision != "int8"] == ["QuantizeLinear"], (
        "of the input alone"
    )
    assert "DequantizeLinear" not in found.values(), "the head makes floats itself"


@pytest.mark.parametrize("name", NAMES)
def test_the_lighter_operators_run_on_codes_too(name: str, tmp_path: Path) -> None:
    found = by_layer(kernels_of(lower(mixed_net(), name), tmp_path, target=local_target(name)))
    expected = {
        "stem": "QLinearConv",
        "deep": "QLinearConv",
        "average": "QLinearAveragePool",
        "cat": "QLinearConcat",
        "silu.gate": "QLinearSigmoid",
        "silu": "QLinearMul",
        "excite": "QLinearMul",
        "squeeze.pool": "QLinearGlobalAveragePool",
        "head": "QGemm",
    }
    assert {layer: found[layer] for layer in expected} == expected
    assert found["max"] in ("MaxPool", "NhwcMaxPool")


@pytest.mark.parametrize("name", NAMES)
def test_a_transposed_convolution_reads_stored_floats(name: str, tmp_path: Path) -> None:
    kernels = kernels_of(lower(mixed_net(), name), tmp_path, target=local_target(name))
    (up,) = [kernel for kernel in kernels if "up" in kernel.layers]
    assert (up.kernel, up.precision) == ("ConvTranspose", "f32")
    assert not any("up.weight" in layer for kernel in kernels for layer in kernel.layers), "dequantized at every run"


@pytest.mark.parametrize("name", NAMES)
def test_matmuls_that_share_an_input_run_on_codes(name: str, tmp_path: Path) -> None:
    found = by_layer(kernels_of(lower(token_net(), name), tmp_path, target=local_target(name)))
    integer = ("MatMulIntegerToFloat", "QLinearMatMul")
    assert all(found[layer] in integer for layer in ("query", "key", "value", "out", "head"))
    assert not any(found[layer] in integer for layer in ("scores", "context", "norm", "softmax") if layer in found)


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_that_is_kept_float_is_the_only_one(name: str, tmp_path: Path) -> None:
    kernels = kernels_of(lower(residual_net(), name, "b1"), tmp_path, target=local_target(name))
    (kept,) = [kernel for kernel in kernels if "b1" in kernel.layers]
    assert kept.precision == "f32"
    found = by_layer(kernels)
    assert all(found[layer] == "QLinearConv" for layer in ("stem", "a1", "a2", "b2", "c1", "c2"))


# Results.


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("make", NETS)
def test_the_runtime_computes_what_the_simulation_does(name: str, make: Callable[[], ir.Model], tmp_path: Path) -> None:
    model = lower(make(), name)
    loaded = compiled(model, BACKEND, local_target(name), tmp_path)
    for count, seed in ((1, 11), (5, 12), (16, 13)):
        feeds = samples(model, count, seed)
        assert worst(loaded.run(feeds), simulate(model, feeds)) < ROUNDING, count


@on_x86
@pytest.mark.parametrize("make", NETS)
def test_the_arm_file_gives_the_numbers_of_the_x86_file(make: Callable[[], ir.Model], tmp_path: Path) -> None:
    results = []
    for name in NAMES:
        folder = tmp_path / name
        folder.mkdir()
        model = lower(make(), name)
        results.append(compiled(model, BACKEND, local_target(name), folder).run(samples(model, 8, seed=21)))
    assert worst(results[0], results[1]) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_random_networks_compute_what_the_simulation_does(name: str, tmp_path: Path) -> None:
    for seed in range(20):
        model = BACKEND.lower(annotate(random_net(seed), count=8), local_target(name), keep_float=frozenset())
        feeds = samples(model, 3, seed=1)
        assert (
            worst(compiled(model, BACKEND, local_target(name), tmp_path).run(feeds), simulate(model, feeds)) < ROUNDING
        ), seed


@pytest.mark.parametrize("name", NAMES)
def test_a_dead_channel_keeps_its_bias(name: str, tmp_path: Path) -> None:
    net = Net(seed=7)
    weight = net.rng.normal(0, 1, (8, 3, 1, 1)).astype(np.float32)
    weight[[1, 4]] *= np.array([1e-9, 1e-37], np.float32).reshape(2, 1, 1, 1)
    bias = np.array([0.5, -8, 3, 0, 6, 1, 1, 1], np.float32)
    inputs = [net.input("x", ["n", 3, 8, 8]), net.constant("w", weight), net.constant("b", bias)]
    model = net.model(net.op("Conv", inputs, "a"))
    feeds = samples(model, 16)
    ours = compiled(lower(model, name), BACKEND, local_target(name), tmp_path).run(feeds)["a_y"]
    exact = simulate(model, feeds)["a_y"]
    assert np.abs(ours - exact)[:, [1, 4]].max() < 0.05
    assert np.abs(ours - exact).max() < 0.2


def test_a_fixed_batch_runs_too(tmp_path: Path) -> None:
    model = lower(residual_net(batch=2))
    feeds = samples(model, 99)
    assert feeds["x"].shape[0] == 2
    loaded = compiled(model, BACKEND, local_target("x86-onnxruntime"), tmp_path)
    assert worst(loaded.run(feeds), simulate(model, feeds)) < ROUNDING


# Artifacts.


@pytest.mark.parametrize("kind", ["ort", "onnx"])
def test_both_kinds_of_artifact_run_alike_and_name_their_layers(kind: str, tmp_path: Path) -> None:
    target, model = with_artifact(kind), lower(residual_net())
    save_onnx(model, tmp_path / "net.onnx")
    artifact = BACKEND.convert(tmp_path / "net.onnx", target, tmp_path, precision="int8")
    assert artifact == Artifact(tmp_path / f"net.{kind}", (tmp_path / f"net.{kind}",), "int8")
    assert artifact.size_bytes == (tmp_path / f"net.{kind}").stat().st_size
    loaded, feeds = BACKEND.load(artifact, target, exact=True), samples(model, 3)
    assert worst(loaded.run(feeds), simulate(model, feeds)) < ROUNDING
    found = by_layer(list(loaded.kernels(feeds)))
    assert found["stem"] == "QLinearConv" and found["a.add"] == "QLinearAdd" and found["head"] == "QGemm"
    assert BACKEND.planned_kernels(artifact) == ()


def test_a_float_model_is_its_own_artifact(tmp_path: Path) -> None:
    model = simplify(residual_net())
    save_onnx(model, tmp_path / "net.onnx")
    artifact = BACKEND.convert(tmp_path / "net.onnx", local_target("x86-onnxruntime"), tmp_path, precision="f32")
    assert artifact.path == tmp_path / "net.onnx"
    feeds = samples(model, 3)
    loaded = BACKEND.load(artifact, local_target("x86-onnxruntime"), exact=True)
    assert worst(loaded.run(feeds), simulate(model, feeds)) < 1e-5


def test_the_bfloat16_switch_of_arm_is_harmless_elsewhere(tmp_path: Path) -> None:
    target, model = local_target("arm-onnxruntime"), simplify(residual_net())
    assert BACKEND.float_precisions(target) == ("f32", "bf16")
    assert BACKEND.float_precisions(local_target("x86-onnxruntime")) == ("f32",)
    feeds = samples(model, 3)
    loaded = compiled(model, BACKEND, target, tmp_path, precision="bf16")
    assert worst(loaded.run(feeds), simulate(model, feeds)) < 0.02


def test_prepared_inference_runs_again_and_again(tmp_path: Path) -> None:
    model = lower(residual_net())
    infer = compiled(model, BACKEND, local_target("x86-onnxruntime"), tmp_path).prepare(samples(model, 2))
    assert [infer() for _ in range(3)] == [None, None, None]


# Names of layers.


def test_a_float_networks_kernels_bear_the_names_of_its_nodes(tmp_path: Path) -> None:
    """Convolutions with an activation run as one kernel, on the CPU's own layout and under a name of its own."""
    kernels = kernels_of(simplify(residual_net()), tmp_path, precision="f32")
    names = {node.name for node in simplify(residual_net()).graph}
    layers = {layer for kernel in kernels for layer in kernel.layers}
    assert layers <= names
    assert {"stem", "a1", "a2", "b1", "b2", "c1", "c2", "c.short", "b.pad", "pool", "head"} <= layers
    assert {kernel.precision for kernel in kernels} == {"f32"}


def test_fused_transformer_operators_bear_the_names_of_their_nodes(tmp_path: Path) -> None:
    kernels = kernels_of(simplify(token_net()), tmp_path, precision="f32")
    names = {node.name for node in simplify(token_net()).graph}
    layers = {layer for kernel in kernels for layer in kernel.layers}
    assert layers <= names and {"norm", "query", "scores", "softmax", "head"} <= layers


@pytest.mark.parametrize(
    ("name", "op_type", "layers"),
    [
        ("conv", "QLinearConv", ("conv",)),
        ("conv_token_4", "QLinearConv", ("conv",)),
        ("layer1.0.conv2_token_12", "QLinearConv", ("layer1.0.conv2",)),
        ("fused conv", "FusedConv", ("conv",)),
        ("gemm/MatMulAddFusion", "Gemm", ("gemm",)),
        ("silu/QuickGeluFusion/", "QuickGelu", ("silu",)),
        ("Transpose_token_7", "Transpose", ()),
        ("ReorderOutput", "ReorderOutput", ()),
    ],
)
def test_names_of_an_optimized_graph_are_traced_back(name: str, op_type: str, layers: tuple[str, ...]) -> None:
    assert NodeNames().layers(name, op_type) == layers


def test_with_the_onnx_file_at_hand_a_node_may_be_called_anything() -> None:
    graph = simplify(residual_net()).graph
    nodes = {"x_token_1": graph[0], "Transpose": graph[1]}
    names = NodeNames(nodes, {"stem.relu_y": graph[1]})
    assert names.layers("x_token_1", "Conv") == ("x_token_1",)
    assert names.layers("x_token_1_token_9", "QLinearConv") == ("x_token_1",)
    assert names.layers("Transpose", "Transpose") == ("Transpose",)
    assert names.layers("ReorderOutput_token_3", "ReorderOutput") == ()
    assert names.layers("stem.relu_y_nchwc", "Conv") == ("stem", "stem.relu")


# What is said of the machine, and what is refused.


@on_x86
def test_where_a_target_can_run() -> None:
    here, elsewhere = (
        BACKEND.available(local_target("x86-onnxruntime")),
        BACKEND.available(local_target("arm-onnxruntime")),
    )
    assert (here.can_convert, here.can_run, here.can_check, here.reason) == (True, True, True, "")
    assert here.version.startswith("onnxruntime 1.")
    assert (elsewhere.can_convert, elsewhere.can_run, elsewhere.can_check) == (True, False, True)
    assert "x86_64" in elsewhere.reason and "aarch64" in elsewhere.reason and "aarch64" in elsewhere.remedy


def test_a_lowered_graph_breaks_no_rule() -> None:
    for name in NAMES:
        assert BACKEND.check(lower(residual_net(), name), local_target(name)) == []


@needs_vnni
def test_wide_weights_are_warned_of_without_vnni() -> None:
    old = local_target("x86-onnxruntime").model_copy(update={"device": Device(arch="x86_64", isa=("avx2",))})
    (warning,) = BACKEND.check(lower(residual_net()), old)
    assert "9 weights" in warning and "'stem.weight_quantized'" in warning and "saturate" in warning


def test_a_graph_that_the_runtime_refuses_is_reported_in_its_words(tmp_path: Path) -> None:
    node = onnx.helper.make_node("NoSuchOperator", ["x"], ["y"])
    infos = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    graph = onnx.helper.make_graph([node], "g", infos[:1], infos[1:])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)]), tmp_path / "net.onnx")
    with pytest.raises(BackendError, match=r"net\.onnx: ONNX Runtime refuses the model: .*NoSuchOperator"):
        BACKEND.convert(tmp_path / "net.onnx", local_target("arm-onnxruntime"), tmp_path, precision="int8")


def test_a_missing_artifact_is_named(tmp_path: Path) -> None:
    path = tmp_path / "gone.ort"
    with pytest.raises(BackendError, match=r"gone\.ort: no such file; run `edgekit export` again"):
        BACKEND.load(Artifact(path, (path,), "int8"), local_target("x86-onnxruntime"), exact=False)


def test_a_damaged_artifact_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "damaged.ort"
    path.write_bytes(b"nothing that a runtime knows" * 10)
    with pytest.raises(BackendError, match=r"damaged\.ort: ONNX Runtime refuses the model"):
        BACKEND.load(Artifact(path, (path,), "int8"), local_target("x86-onnxruntime"), exact=False)


def test_feeds_that_do_not_fit_are_refused_in_the_runtimes_words(tmp_path: Path) -> None:
    model = lower(residual_net())
    loaded = compiled(model, BACKEND, local_target("x86-onnxruntime"), tmp_path)
    with pytest.raises(BackendError, match=r"(?s)ONNX Runtime fails to run: .*input: x.*Got: 4 Expected: 3"):
        loaded.run({"x": np.zeros((1, 4, 16, 16), np.float32)})
    with pytest.raises(BackendError, match=r"ONNX Runtime fails to run: .*\['x'\]"):
        loaded.run({"y": np.zeros((1, 3, 16, 16), np.float32)})
