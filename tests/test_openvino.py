"""OpenVINO: what really runs in int8, equal to the simulation, and the graphs that it would compute wrongly."""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgekit.backend import Artifact, KernelRecord
from edgekit.errors import BackendError
from edgekit.graph.io import save_onnx
from edgekit.lowering.qdq import lower_qdq
from edgekit.passes.simplify import simplify
from edgekit.target import Device
from edgekit_openvino import OpenVinoBackend
from graphs import GraphBuilder
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

BACKEND = OpenVinoBackend()
TARGET = local_target("x86-openvino")
NETS = (residual_net, mixed_net, token_net)
ROUNDING = 0.02
"""A code that flips at a tie, as a share of an output's largest magnitude; wrong kernels are off by 0.2 and more."""

runs = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None or platform.machine() != "x86_64",
    reason="openvino is not installed (pip install 'edgekit[openvino]'), or this is no x86-64 machine",
)
pytestmark = runs

SHAPES: dict[str, list[int | str]] = {"x": ["n", 3], "unread": ["n", 2], "empty": [0], "same": ["n", 4]}
"""Of inputs that a network may not read."""


def lower(model: ir.Model, *keep_float: str, count: int = 16) -> ir.Model:
    return BACKEND.lower(annotate(model, count=count), TARGET, keep_float=frozenset(keep_float))


def kernels_of(model: ir.Model, folder: Path, *, precision: str = "int8") -> list[KernelRecord]:
    return list(compiled(model, BACKEND, TARGET, folder, precision=precision).kernels(samples(model, 3)))


def by_layer(kernels: list[KernelRecord]) -> dict[str, KernelRecord]:
    return {layer: kernel for kernel in kernels for layer in kernel.layers}


def error(model: ir.Model, folder: Path) -> float:
    """How far the lowered model, run by OpenVINO, is from its simulation."""
    lowered = lower(model)
    assert BACKEND.check(lowered, TARGET) == []
    feeds = samples(model, 3, seed=3)
    return worst(compiled(lowered, BACKEND, TARGET, folder).run(feeds), simulate(lowered, feeds))


# Kernels.


def test_every_layer_of_a_residual_network_runs_on_codes(tmp_path: Path) -> None:
    found = by_layer(kernels_of(lower(residual_net()), tmp_path))
    for layer in ("stem", "a1", "a2", "b1", "b2", "c1", "c2", "c.short", "head", "pool", "flatten"):
        assert found[layer].precision == "int8", layer
    for layer in ("stem", "a1", "a2", "b1", "b2", "c1", "c2", "c.short"):
        assert found[layer].kernel.startswith("Convolution/") and found[layer].kernel.endswith("I8")
    assert found["a.add"] is found["a2"], "the Add runs as the end of the convolution"
    assert found["b.slice"].kernel.endswith("I8") and found["b.pad"].kernel.endswith("I8")


def test_the_quantized_layers_of_a_mixed_network_run_on_codes(tmp_path: Path) -> None:
    kernels = kernels_of(lower(mixed_net()), tmp_path)
    found = by_layer(kernels)
    for layer in ("stem", "deep", "max", "cat", "mix", "squeeze", "expand", "head", "flat"):
        assert found[layer].precision == "int8", layer
    assert found["silu"] is found["mix"], "SiLU runs as the end of the convolution"
    assert found["excite.gate"] is found["expand"]


def test_the_linear_layers_of_an_attention_block_run_on_codes(tmp_path: Path) -> None:
    found = by_layer(kernels_of(lower(token_net()), tmp_path))
    for layer in ("query", "key", "value", "out", "head"):
        assert found[layer].precision == "int8" and found[layer].kernel.startswith("FullyConnected"), layer


def test_a_transposed_convolution_behind_a_relu_runs_on_codes(tmp_path: Path) -> None:
    net = Net()
    x = net.conv_relu(net.input("x", ["n", 8, 8, 8]), "a", 8, 16)
    up = net.op(
        "ConvTranspose",
        [x, net.weight("w", 16, 8, 2, 2), net.weight("b", 8)],
        "up",
        strides=[2, 2],
        kernel_shape=[2, 2],
    )
    found = by_layer(kernels_of(lower(net.model(net.conv(up, "b", 8, 4))), tmp_path))
    assert (found["up"].precision, found["up"].kernel[:13]) == ("int8", "Deconvolution")


def test_a_layer_that_is_kept_float_is_the_only_one(tmp_path: Path) -> None:
    found = by_layer(kernels_of(lower(residual_net(), "b1"), tmp_path))
    assert found["b1"].precision == "f32"
    assert all(found[layer].precision == "int8" for layer in ("stem", "a1", "a2", "b2", "c1", "c2", "head"))


def test_nothing_is_rounded_a_second_time_behind_what_only_moves_numbers(tmp_path: Path) -> None:
    kernels = kernels_of(lower(mixed_net()), tmp_path)
    alone = [kernel.layers for kernel in kernels if kernel.kernel.startswith("FakeQuantize")]
    assert not any("flat" in layer for layers in alone for layer in layers)


def test_the_kernel_of_a_dynamic_batch_is_named_as_it_ran(tmp_path: Path) -> None:
    assert not [kernel.kernel for kernel in kernels_of(lower(residual_net()), tmp_path) if "undef" in kernel.kernel]


# Names of layers.


@pytest.mark.parametrize("make", NETS)
@pytest.mark.parametrize("precision", ["int8", "f32"])
def test_kernels_bear_the_names_of_onnx_nodes(make: Callable[[], ir.Model], precision: str, tmp_path: Path) -> None:
    model = lower(make()) if precision == "int8" else simplify(make())
    layers = {layer for kernel in kernels_of(model, tmp_path, precision=precision) for layer in kernel.layers}
    assert layers <= {node.name for node in model.graph}
    assert {node.name for node in model.graph if node.op_type in ("Conv", "ConvTranspose", "Gemm")} <= layers


def tail(op_type: str) -> ir.Model:
    """A network that ends in an operator which OpenVINO reads as several operations, or renames after its output."""
    net = Net()
    x = net.conv_relu(net.input("x", ["n", 4, 8, 8]), "a", 4, 8)
    match op_type:
        case "Conv":
            return net.model(net.conv(x, "last", 8, 4))
        case "ConvTranspose":
            return net.model(net.op("ConvTranspose", [x, net.weight("w", 8, 4, 2, 2), net.weight("b", 4)], "last"))
        case "Gemm":
            return net.model(net.gemm(net.reshape(x, "flat", -1, 512), "last", 512, 4))
        case "MatMul":
            return net.model(net.matmul(net.reshape(x, "flat", -1, 512), "last", 512, 4))
        case _:
            return net.model(net.op(op_type, [net.conv(x, "b", 8, 8), x], "last"))


@pytest.mark.parametrize("op_type", ["Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Mul"])
def test_the_last_layer_bears_its_nodes_name_not_its_tensors(op_type: str, tmp_path: Path) -> None:
    model = lower(tail(op_type))
    assert "last" in by_layer(kernels_of(model, tmp_path))
    loaded = compiled(model, BACKEND, TARGET, tmp_path)
    assert list(loaded.run(samples(model, 2))) == ["last_y"]


def test_a_transposed_weight_does_not_speak_for_its_layer(tmp_path: Path) -> None:
    """OpenVINO transposes int8 weights by kernels that bear the layer's name, whatever the layer computes in."""
    kernels = kernels_of(lower(token_net()), tmp_path)
    assert any(kernel.kernel.startswith("Transpose") and not kernel.layers for kernel in kernels)
    assert not any(kernel.kernel.startswith("Transpose") and "query" in kernel.layers for kernel in kernels)


def test_an_output_that_equals_another_tensor_keeps_its_name(tmp_path: Path) -> None:
    """OpenVINO computes equal nodes once; the tensor then has the names of all."""
    net = Net()
    y = net.conv(net.input("x", ["n", 3, 8, 8]), "a", 3, 4)
    pads = [y, net.constant("pads", np.array([0, 0, 1, 1, 0, 0, 1, 1]))]
    first, second = net.op("Pad", pads, "first"), net.op("Pad", pads, "second")
    model = net.model(net.op("Tanh", [first], "tanh"), second, y)
    for precision, graph in (("int8", lower(model)), ("f32", model)):
        feeds = samples(model, 2)
        results = compiled(graph, BACKEND, TARGET, tmp_path, precision=precision).run(feeds)
        assert list(results) == ["tanh_y", "second_y", "a_y"]
        assert worst(results, simulate(graph, feeds)) < 1e-5


def test_an_empty_input_is_dropped_and_told(tmp_path: Path) -> None:
    """One that is handed through unchanged bears the name of the output in OpenVINO."""
    net = Net()
    x, _, _, same = (net.input(name, shape) for name, shape in SHAPES.items())
    model = net.model(net.op("Relu", [x], "relu"), net.op("Max", [same], "max"))
    save_onnx(model, tmp_path / "net.onnx")
    artifact = BACKEND.convert(tmp_path / "net.onnx", TARGET, tmp_path, precision="f32")
    assert artifact.notes == ("OpenVINO drops inputs that hold nothing: do not feed 'empty'",)
    feeds = {
        name: np.full([2 if size == "n" else size for size in shape], -3, np.float32) for name, shape in SHAPES.items()
    }
    loaded = BACKEND.load(artifact, TARGET, exact=True)
    results = loaded.run(feeds)
    assert [array.tolist() for array in results.values()] == [[[0.0] * 3] * 2, [[-3.0] * 4] * 2]
    loaded.prepare(feeds)()


# Results.


@pytest.mark.parametrize("make", NETS)
def test_the_runtime_computes_what_the_simulation_does(make: Callable[[], ir.Model], tmp_path: Path) -> None:
    model = lower(make())
    assert BACKEND.check(model, TARGET) == []
    loaded = compiled(model, BACKEND, TARGET, tmp_path)
    for count, seed in ((1, 11), (5, 12), (16, 13)):
        feeds = samples(model, count, seed)
        assert worst(loaded.run(feeds), simulate(model, feeds)) < ROUNDING, count


def test_a_residual_network_is_equal_to_float_rounding(tmp_path: Path) -> None:
    """With Q on both inputs of an Add it was off by a code here and there: OpenVINO leaves out the inner rounding."""
    assert error(residual_net(), tmp_path) < 1e-5


def test_random_networks_compute_what_the_simulation_does(tmp_path: Path) -> None:
    for seed in range(40):
        assert error(random_net(seed), tmp_path) < ROUNDING, seed


@pytest.mark.parametrize("pads", [[0, 0, 1, 1, 0, 0, 1, 1], [0, 4, 0, 0, 0, 4, 0, 0], [0, 0, 0, 0, 0, 2, 1, 0]])
@pytest.mark.parametrize("producer", ["Conv", "Relu", "MaxPool", "AveragePool", "GlobalAveragePool", "Concat", "Add"])
def test_a_pad_is_right_whatever_feeds_it(producer: str, pads: list[int], tmp_path: Path) -> None:
    """Spatial and channel pads of signed numbers with a dynamic batch; the padded value has a quantized reader too."""
    net = Net()
    x = net.input("x", ["n", 3, 8, 8])
    y, channels = net.conv(x, "a", 3, 8), 8
    window = {"kernel_shape": [2, 2], "strides": [2, 2]}
    match producer:
        case "Relu" | "GlobalAveragePool":
            y = net.op(producer, [y], "p")
        case "MaxPool" | "AveragePool":
            y = net.op(producer, [y], "p", **window)
        case "Concat":
            y, channels = net.op("Concat", [y, net.conv(x, "a2", 3, 8)], "p", axis=1), 16
        case "Add":
            y = net.op("Add", [y, net.conv(x, "a2", 3, 8)], "p")
    padded = net.conv(net.pad(y, "pad", pads), "b", channels + pads[1] + pads[5], 4)
    assert error(net.model(padded, net.conv(y, "c", channels, 4)), tmp_path) < 1e-5


@pytest.mark.parametrize("kind", ["none", "zero", "depthwise", "transposed"])
def test_a_convolution_without_a_bias_is_right_at_float_readers_too(kind: str, tmp_path: Path) -> None:
    """OpenVINO 2026.4 is off by 90 % there, unless the convolution has a bias that is not zero."""
    net = Net()
    x = net.op("Relu", [net.input("x", ["n", 8, 8, 8])], "relu")
    if kind == "zero":
        zeros = net.constant("zeros", np.zeros(8, np.float32))
        y = net.op("Conv", [x, net.weight("w", 8, 8, 3, 3), zeros], "a", pads=[1, 1, 1, 1])
    elif kind == "transposed":
        y = net.op("ConvTranspose", [x, net.weight("w", 8, 8, 2, 2)], "a", strides=[2, 2], kernel_shape=[2, 2])
    else:
        y = net.conv(x, "a", 8, 8, bias=False, group=8 if kind == "depthwise" else 1)
    assert error(net.model(net.conv(y, "b", 8, 4), net.op("Tanh", [y], "tanh"), y), tmp_path) < 1e-5


def test_an_average_that_no_q_follows_is_not_rounded(tmp_path: Path) -> None:
    net = Net()
    y = net.conv(net.input("x", ["n", 3, 8, 8]), "a", 3, 4)
    pooled = net.op("AveragePool", [y], "pool", kernel_shape=[2, 2], strides=[2, 2])
    assert error(net.model(net.op("Tanh", [pooled], "tanh"), net.conv(y, "b", 4, 4)), tmp_path) < 1e-5


def test_concat_of_signed_branches_is_right(tmp_path: Path) -> None:
    net = Net()
    x = net.input("x", ["n", 3, 8, 8])
    y = net.op("Concat", [net.conv(x, "a", 3, 8), net.conv_relu(x, "b", 3, 8)], "cat", axis=1)
    assert error(net.model(net.conv(y, "c", 16, 4)), tmp_path) < 1e-5


def test_a_dead_channel_keeps_its_bias(tmp_path: Path) -> None:
    net = Net(seed=7)
    weight = net.rng.normal(0, 1, (8, 3, 1, 1)).astype(np.float32)
    weight[[1, 4]] *= np.array([1e-9, 1e-37], np.float32).reshape(2, 1, 1, 1)
    bias = net.constant("b", np.array([0.5, -8, 3, 0, 6, 1, 1, 1], np.float32))
    model = net.model(net.op("Conv", [net.input("x", ["n", 3, 8, 8]), net.constant("w", weight), bias], "a"))
    feeds = samples(model, 16)
    ours = compiled(lower(model), BACKEND, TARGET, tmp_path).run(feeds)["a_y"]
    exact = simulate(model, feeds)["a_y"]
    assert np.abs(ours - exact)[:, [1, 4]].max() < 1e-3
    assert np.abs(ours - exact).max() < 0.2


def test_a_fixed_batch_runs_too(tmp_path: Path) -> None:
    model = lower(residual_net(batch=2))
    feeds = samples(model, 99)
    assert feeds["x"].shape[0] == 2
    assert worst(compiled(model, BACKEND, TARGET, tmp_path).run(feeds), simulate(model, feeds)) < ROUNDING


def test_prepared_inference_runs_again_and_again(tmp_path: Path) -> None:
    model = lower(residual_net())
    infer = compiled(model, BACKEND, TARGET, tmp_path).prepare(samples(model, 2))
    assert [infer() for _ in range(3)] == [None, None, None]


# Artifacts and precisions.


def test_an_artifact_is_two_files(tmp_path: Path) -> None:
    save_onnx(lower(residual_net()), tmp_path / "net.onnx")
    artifact = BACKEND.convert(tmp_path / "net.onnx", TARGET, tmp_path, precision="int8")
    assert artifact == Artifact(tmp_path / "net.xml", (tmp_path / "net.xml", tmp_path / "net.bin"), "int8")
    assert artifact.size_bytes == sum(path.stat().st_size for path in artifact.files)
    assert BACKEND.planned_kernels(artifact) == ()


def test_float_precisions_are_asked_of_this_machine_and_obeyed(tmp_path: Path) -> None:
    assert BACKEND.float_precisions(TARGET)[0] == "f32"
    model = simplify(residual_net())
    for precision in BACKEND.float_precisions(TARGET):
        save_onnx(model, tmp_path / "net.onnx")
        artifact = BACKEND.convert(tmp_path / "net.onnx", TARGET, tmp_path, precision=precision)
        loaded = BACKEND.load(artifact, TARGET, exact=False)
        found = by_layer(list(loaded.kernels(samples(model, 3))))
        assert {found[layer].precision for layer in ("a1", "b2", "c2")} == {precision}


def test_exact_asks_for_float32_beside_the_int8_layers(tmp_path: Path) -> None:
    kernels = kernels_of(lower(residual_net(), "b1"), tmp_path)
    assert {kernel.precision for kernel in kernels} <= {"int8", "f32"}


def test_where_a_target_can_run() -> None:
    here = BACKEND.available(TARGET)
    assert (here.can_convert, here.can_run, here.can_check, here.reason) == (True, True, True, "")
    assert here.version.startswith("openvino 20")
    arm = TARGET.model_copy(update={"device": Device(arch="aarch64")})
    elsewhere = BACKEND.available(arm)
    assert (elsewhere.can_convert, elsewhere.can_run, elsewhere.can_check) == (True, False, True)
    assert "x86_64" in elsewhere.reason and "aarch64" in elsewhere.remedy


# Rules.


def test_rules_that_a_graph_of_another_target_breaks() -> None:
    net = Net()
    y = net.conv(net.input("x", ["n", 3, 8, 8]), "a", 3, 4)
    signed = net.model(net.conv(net.pad(y, "pad", [0, 2, 0, 0, 0, 2, 0, 0]), "b", 8, 4))
    (broken,) = BACKEND.check(lower_qdq(annotate(signed), local_target("x86-onnxruntime")), TARGET)
    assert "Pad 'pad' pads codes with a zero point other than 0" in broken
    target = local_target("x86-onnxruntime")
    never = target.model_copy(update={"quantization": target.quantization.model_copy(update={"integer_pad": "never"})})
    (broken,) = BACKEND.check(lower_qdq(annotate(signed), never), TARGET)
    assert "Pad 'pad' reads a DequantizeLinear" in broken


def test_rules_for_grids() -> None:
    text = """<ir_version: 10, opset_import: ["": 21]> g (float[n,4] x) => (float[n,4] y) {
        q = QuantizeLinear(x, s, z16) d = DequantizeLinear(q, s, z16) dw = DequantizeLinear(w, s, z8) y = MatMul(d, dw) }"""
    proto = onnx.parser.parse_model(text)
    constants = {"s": np.float32(0.1), "z16": np.uint16(5), "z8": np.uint8(9), "w": np.full((4, 4), 3, np.uint8)}
    for name, array in constants.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    proto.graph.node[1].name = "wide"
    found = BACKEND.check(ir.from_proto(proto), TARGET)
    assert found == [
        "'wide' is a 16-bit grid: OpenVINO drops it, its clamp too",
        "weight 'w' has a zero point other than 0: OpenVINO runs its layer in f32",
    ]


@needs_vnni
def test_wide_weights_are_warned_of_without_vnni() -> None:
    old = TARGET.model_copy(update={"device": Device(arch="x86_64", isa=("avx512f",))})
    (warning,) = BACKEND.check(lower(residual_net()), old)
    assert "9 weights" in warning and "'stem.weight_quantized'" in warning and "saturate" in warning


SATURATING = """
import sys
from pathlib import Path
import numpy as np
from edgekit_openvino import OpenVinoBackend
from edgekit.backend import Artifact
from edgekit.target import load_target
path = Path(sys.argv[1])
model = OpenVinoBackend().load(Artifact(path, (path,), "int8"), load_target("x86-openvino"), exact=True)
np.savez(sys.argv[2], **model.run({"x": np.load(sys.argv[3])["x"]}))
"""


@needs_vnni
def test_the_warning_is_true(tmp_path: Path) -> None:
    """OpenVINO obeys a limit on the instruction set; without VNNI wide weights saturate."""
    net = Net(seed=5)
    x = net.input("x", ["n", 16, 8, 8])
    weight = np.abs(net.rng.normal(0, 1, (8, 16, 3, 3))).astype(np.float32)
    y = net.op("Conv", [x, net.constant("w", weight), net.weight("b", 8)], "a", pads=[1, 1, 1, 1])
    feeds = {"x": np.abs(samples(net.model(y), 3)["x"])}
    lowered = lower(net.model(y))
    save_onnx(lowered, tmp_path / "net.onnx")
    artifact = BACKEND.convert(tmp_path / "net.onnx", TARGET, tmp_path, precision="int8")
    np.savez(tmp_path / "in.npz", **feeds)
    errors = {}
    for isa in ("AVX2", "DEFAULT"):
        command = [
            sys.executable,
            "-c",
            SATURATING,
            str(artifact.path),
            str(tmp_path / "out.npz"),
            str(tmp_path / "in.npz"),
        ]
        subprocess.run(command, check=True, env={**os.environ, "ONEDNN_MAX_CPU_ISA": isa}, timeout=60)
        errors[isa] = worst(dict(np.load(tmp_path / "out.npz")), simulate(lowered, feeds))
    assert errors["DEFAULT"] < 0.01 < 0.05 < errors["AVX2"]


# Refusals.


def test_a_graph_that_the_runtime_refuses_is_reported_in_its_words(tmp_path: Path) -> None:
    node = onnx.helper.make_node("NoSuchOperator", ["x"], ["y"])
    infos = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    graph = onnx.helper.make_graph([node], "g", infos[:1], infos[1:])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)]), tmp_path / "net.onnx")
    with pytest.raises(BackendError, match=r"net\.onnx: OpenVINO refuses the model: .*NoSuchOperator") as caught:
        BACKEND.convert(tmp_path / "net.onnx", TARGET, tmp_path, precision="int8")
    assert ".cpp" not in str(caught.value)


def test_a_missing_artifact_is_named(tmp_path: Path) -> None:
    path = tmp_path / "gone.xml"
    with pytest.raises(BackendError, match=r"gone\.xml: no such file; run `edgekit export` again"):
        BACKEND.load(Artifact(path, (path,), "int8"), TARGET, exact=False)


def test_a_damaged_artifact_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "damaged.xml"
    path.write_text("nothing that a runtime knows")
    with pytest.raises(BackendError, match=r"damaged\.xml: OpenVINO refuses the model"):
        BACKEND.load(Artifact(path, (path,), "int8"), TARGET, exact=False)


def test_feeds_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = lower(residual_net())
    loaded = compiled(model, BACKEND, TARGET, tmp_path)
    with pytest.raises(
        BackendError,
        match=r"OpenVINO fails to run: input 'x' is \[1, 4, 16, 16\], where the model takes \[.*,3,16,16\]",
    ):
        loaded.run({"x": np.zeros((1, 4, 16, 16), np.float32)})
    with pytest.raises(BackendError, match=r"OpenVINO fails to run: input 'x' has no array \(given: y\)"):
        loaded.run({"y": np.zeros((1, 3, 16, 16), np.float32)})


@pytest.mark.parametrize("threads", [1, 2])
def test_sizes_that_do_not_fit_are_refused_and_others_go_on(threads: int, tmp_path: Path) -> None:
    """On one thread OpenVINO returns empty or old results in the place of an error, and on two it goes on failing."""
    net = Net(seed=3)
    x = net.conv(net.input("x", ["n", 4, "h", "w"]), "conv", 4, 4)
    save_onnx(simplify(net.model(net.op("AveragePool", [x], "pool", kernel_shape=[3, 2]))), tmp_path / "net.onnx")
    target = TARGET.model_copy(update={"runtime": TARGET.runtime.model_copy(update={"threads": threads})})
    artifact = BACKEND.convert(tmp_path / "net.onnx", target, tmp_path, precision="f32")
    model = BACKEND.load(artifact, target, exact=True)
    for _ in range(2):
        assert model.run({"x": np.ones((1, 4, 3, 6), np.float32)})["pool_y"].shape == (1, 4, 1, 5)
        with pytest.raises(BackendError, match=r"fails to run: .*Kernel"):
            model.run({"x": np.ones((1, 4, 2, 6), np.float32)})


def test_a_crash_of_the_reader_is_survived_and_told(tmp_path: Path) -> None:
    """OpenVINO's reader dies of a Pad that wraps around in front of two Clips."""
    build = GraphBuilder(opset=25)
    x = build.op("LeakyRelu", [build.input("x", ["n", 12, 6])], "leaky")
    x = build.op("Pad", [x, build.constant("pads", np.array([0, 0, 2, 0, 0, 2]))], "wrap", mode="wrap")
    low, high = build.constant("low", np.float32(2)), build.constant("high", np.float32(7))
    y = build.op("Clip", [build.op("Clip", [x, "", low], "first"), low, high], "second")
    onnx.save(build.proto(y), tmp_path / "net.onnx")
    with pytest.raises(BackendError, match=r"net\.onnx: OpenVINO crashed while it read the model \(exit code -11"):
        BACKEND.convert(tmp_path / "net.onnx", TARGET, tmp_path, precision="int8")
