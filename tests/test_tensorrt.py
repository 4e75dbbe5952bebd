"""TensorRT: real builds with NVIDIA's own parser and builder, which need no GPU; static rules; refusals."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

import edgekit
import networks
from edgekit.backend import Artifact, KernelRecord, get_backend
from edgekit.errors import BackendError
from edgekit.graph.annotations import set_params
from edgekit.graph.io import save_onnx
from edgekit.graph.run import Session
from edgekit.lowering.half import to_float16
from edgekit.quant.spec import QuantParams
from edgekit.target import Device, Target, load_target
from edgekit_tensorrt import TensorRtBackend
from edgekit_tensorrt.kernels import from_build_log, from_inspector
from edgekit_tensorrt.package import import_tensorrt, missing_gpu
from tensorrt_graphs import RNG, model_of, qdq, small_conv

BACKEND = TensorRtBackend()
TARGET = load_target("cuda-tensorrt")

builds = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="tensorrt_rtx is not installed: pip install 'edgekit[tensorrt]'",
)
without_gpu = pytest.mark.skipif(not missing_gpu(), reason="this machine has a GPU: the refusal cannot be seen")


def target_with(*, isa: str = "sm86", **options: str) -> Target:
    runtime = TARGET.runtime.model_copy(update={"options": options})
    return TARGET.model_copy(update={"runtime": runtime, "device": Device(arch="cuda", isa=(isa,))})


def build(model: ir.Model, folder: Path, *, target: Target = TARGET, precision: str = "int8") -> Artifact:
    source = folder / "source.onnx"
    ir.save(model, source)
    return BACKEND.convert(source, target, folder, precision=precision)


def precisions(artifact: Artifact, node: str) -> set[str]:
    """In which precisions the engine's kernels compute for a node, by the builder's plan."""
    return {kernel.precision for kernel in BACKEND.planned_kernels(artifact) if node in kernel.layers}


class Net:
    """ResNets as Quantize/DequantizeLinear graphs, written node by node; every Conv is int8 with zero point 0."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.constants: dict[str, NDArray[Any]] = {"zero": np.array(0, np.int8), "scale": np.array(0.05, np.float32)}

    def quantized(self, x: str) -> str:
        if f"{x}_d = DequantizeLinear({x}_q, scale, zero)" not in self.lines:
            self.node(f"{x}_q", f"QuantizeLinear({x}, scale, zero)")
            self.node(f"{x}_d", f"DequantizeLinear({x}_q, scale, zero)")
        return f"{x}_d"

    def conv(self, x: str, y: str, inputs: int, outputs: int, *, size: int = 3, stride: int = 1) -> str:
        codes = RNG.integers(-127, 128, (outputs, inputs, size, size)).astype(np.int8)
        scale = (RNG.uniform(0.5, 1, outputs) / (80 * size * np.sqrt(inputs))).astype(np.float32)
        self.constants |= {f"{y}_w": codes, f"{y}_s": scale, f"{y}_b": RNG.normal(size=outputs).astype(np.float32)}
        pad = size // 2
        attributes = f"<pads=[{pad},{pad},{pad},{pad}], strides=[{stride},{stride}]>"
        data = self.quantized(x)
        self.lines.append(f"{y}_dw = DequantizeLinear<axis=0>({y}_w, {y}_s)")
        self.lines.append(f"{y} = Conv{attributes}({data}, {y}_dw, {y}_b)")
        return y

    def node(self, y: str, call: str) -> str:
        self.lines.append(f"{y} = {call}")
        return y

    def block(self, x: str, y: str, inputs: int, outputs: int) -> str:
        """A basic block; only the skip input of its Add is quantized, and a wider output halves the image."""
        stride = 1 if inputs == outputs else 2
        first = self.node(f"{y}_r", f"Relu({self.conv(x, f'{y}_1', inputs, outputs, stride=stride)})")
        main = self.conv(first, f"{y}_2", outputs, outputs)
        skip = x if stride == 1 else self.conv(x, f"{y}_p", inputs, outputs, size=1, stride=2)
        return self.node(y, f"Relu({self.node(f'{y}_a', f'Add({main}, {self.quantized(skip)})')})")

    def model(self, head: str, y: str) -> ir.Model:
        return model_of(
            f"g (float[N,3,32,32] x) => ({head} y) {{ {' '.join(self.lines)} y = Identity({y}) }}", self.constants
        )


def resnet(blocks: int) -> ir.Model:
    """CIFAR's ResNet with `blocks` basic blocks in each of three stages of 16, 32, 64 channels: 3 makes ResNet-20."""
    net = Net()
    x, width = net.node("stem_r", f"Relu({net.conv('x', 'stem', 3, 16)})"), 16
    for index in range(3 * blocks):
        wider = 16 << (index // blocks)
        x, width = net.block(x, f"b{index}", width, wider), wider
    pooled = net.node("flat", f"Flatten({net.node('pool', f'GlobalAveragePool({x})')})")
    net.constants |= {"fc_w": RNG.normal(size=(64, 10)).astype(np.float32), "fc_b": np.zeros(10, np.float32)}
    return net.model("float[N,10]", net.node("fc", f"Gemm({pooled}, fc_w, fc_b)"))


# Builds


@builds
def test_resnet20_builds_with_every_conv_in_int8(tmp_path: Path) -> None:
    model = resnet(3)
    assert BACKEND.check(model, TARGET) == []
    artifact = build(to_float16(model), tmp_path)
    assert artifact.path == tmp_path / "model.engine"
    assert artifact.files == (artifact.path,) and artifact.precision == "int8"
    convs = [node.name or "" for node in model.graph if node.op_type == "Conv"]
    assert len(convs) == 21
    assert {name for name in convs if "int8" not in precisions(artifact, name)} == set()
    assert precisions(artifact, "Gemm_fc") == {"f16"}


@builds
def test_float32_parts_build_too(tmp_path: Path) -> None:
    artifact = build(resnet(1), tmp_path)
    assert "int8" in precisions(artifact, "Conv_b1_2")
    assert precisions(artifact, "Gemm_fc") == {"f32"}


@builds
def test_a_scale_kept_in_float32_behind_casts_still_gives_an_int8_conv(tmp_path: Path) -> None:
    half = to_float16(qdq(xs=np.array(1e-5, np.float32), ws=np.full(8, 1e-6, np.float32)))
    assert half.graph.initializers["ws"].dtype == ir.DataType.FLOAT
    assert "int8" in precisions(build(half, tmp_path), "Conv_y")


@builds
@pytest.mark.parametrize("precision", ["f32", "f16"])
def test_float_models_build_in_both_float_precisions(precision: str, tmp_path: Path) -> None:
    artifact = build(small_conv(), tmp_path, precision=precision)
    assert artifact.precision == precision and artifact.size_bytes > 1000
    assert precision in precisions(artifact, "Conv_r")
    assert precision in BACKEND.float_precisions(TARGET)


@builds
def test_float16_model_computes_what_onnx_runtime_computes() -> None:
    model = resnet(1)
    x = RNG.normal(size=(2, 3, 32, 32)).astype(np.float32)
    expected, got = (Session(m, optimize=False, threads=1).run({"x": x})["y"] for m in (model, to_float16(model)))
    assert np.corrcoef(expected.ravel().astype(float), got.ravel().astype(float))[0, 1] > 0.99


@builds
def test_a_given_batch_range_is_built(tmp_path: Path) -> None:
    assert build(small_conv(), tmp_path, target=target_with(batch="1,8,16")).path.is_file()


@builds
def test_several_gpus_in_one_engine(tmp_path: Path) -> None:
    target = TARGET.model_copy(update={"device": Device(arch="cuda", isa=("sm86", "sm89"))})
    assert build(small_conv(), tmp_path, target=target).path.is_file()


@builds
def test_an_annotated_model_is_lowered_to_what_tensorrt_builds(tmp_path: Path) -> None:
    model = small_conv()
    conv = model.graph[0]
    params = {"x": QuantParams("uint8", np.array(0.02, np.float32), np.array(128), low=-2.5, high=2.5)}
    params["w"] = QuantParams("int8", np.full(8, 0.02, np.float32), np.zeros(8, np.int64), axis=0, narrow_range=True)
    for value in conv.inputs:
        assert value is not None and value.name is not None
        set_params(value, params[value.name])
    lowered = BACKEND.lower(model, TARGET, keep_float=frozenset())
    assert BACKEND.check(lowered, TARGET) == []
    assert "int8" in precisions(build(lowered, tmp_path), "Conv_r")
    kept = BACKEND.lower(model, TARGET, keep_float=frozenset({"Conv_r"}))
    assert "int8" not in precisions(build(kept, tmp_path), "Conv_r")


# Refusals


@builds
@pytest.mark.parametrize("isa", ["sm87", "sm90", "ampere"])
def test_an_unknown_gpu_is_refused_with_the_list(isa: str, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=rf"does not build for '{isa}': it has sm75, sm80, sm86, sm89, sm120, sm121"):
        build(small_conv(), tmp_path, target=target_with(isa=isa))


@builds
@without_gpu
def test_the_gpu_at_hand_needs_a_driver(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"tensorrt_rtx .*(did not build it|builder).*CUDA|cudaError"):
        build(small_conv(), tmp_path, target=target_with(isa="current"))


@builds
def test_the_parsers_own_words_and_the_node_are_told(tmp_path: Path) -> None:
    with pytest.raises(
        BackendError, match=r"node 'QuantizeLinear_q' \(QuantizeLinear\): .*Non-zero zero point is not supported"
    ):
        build(qdq(z=np.array(5, np.int8)), tmp_path)


@builds
def test_an_int32_bias_is_refused_without_noise_about_drivers(tmp_path: Path) -> None:
    model = model_of(
        "g (float[1,8] x) => (float[1,8] y) { b = DequantizeLinear(codes, s) y = Add(x, b) }",
        {"codes": np.arange(8, dtype=np.int32), "s": np.array(0.1, np.float32)},
    )
    with pytest.raises(BackendError, match=r"DequantizeLinear_b.*Int32 but must have type") as refusal:
        build(model, tmp_path)
    assert "cudaError" not in str(refusal.value)


def test_an_unknown_precision_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"no precision 'bf16'; it has int8, f32, f16"):
        build(small_conv(), tmp_path, precision="bf16")


@builds
def test_a_crash_of_the_builder_is_an_error_with_its_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crashing = tmp_path / "tensorrt.py"
    crashing.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(BackendError, match=r"builder crashed \(signal SIGSEGV\)"):
        build(small_conv(), tmp_path)
    assert not (tmp_path / "model.engine").exists()


@builds
def test_a_failing_import_in_the_child_is_told_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt.py").write_text("raise SystemExit('licence expired')\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(BackendError, match=r"crashed \(exit code 1\).*licence expired"):
        build(small_conv(), tmp_path)


@builds
def test_an_empty_tensorrt_package_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt.py").write_text("__version__ = '0'\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert build(small_conv(), tmp_path).path.is_file()


# Where there is no GPU


def test_importing_the_plug_in_imports_no_runtime() -> None:
    code = "import json, sys, edgekit.backend as b; b.get_backend('tensorrt'); print(json.dumps(sorted(sys.modules)))"
    loaded = set(
        json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout)
    )
    assert "edgekit_tensorrt.backend" in loaded
    assert not loaded & {"tensorrt", "tensorrt_rtx", "cuda.bindings", "torch"}


@builds
def test_available_says_package_and_what_is_missing() -> None:
    backend = get_backend("tensorrt")
    found = backend.available(TARGET)
    trt = import_tensorrt()
    assert trt is not None
    assert found.can_convert and found.version == f"{trt.__name__} {trt.__version__}"
    assert (found.can_run, bool(found.reason), bool(found.remedy)) == (
        (False, True, True) if missing_gpu() else (True, False, False)
    )


@builds
@without_gpu
def test_loading_without_a_gpu_is_an_error_not_a_crash(tmp_path: Path) -> None:
    artifact = build(small_conv(), tmp_path)
    with pytest.raises(
        BackendError, match=r"model.engine cannot run here: (no NVIDIA driver|the NVIDIA driver).*; run on a machine"
    ):
        BACKEND.load(artifact, TARGET, exact=True)


# Kernel records


INSPECTED = json.dumps(
    {
        "Layers": [
            {
                "Name": "Reformatting CopyNode for Input Tensor 0 to a + b",
                "LayerType": "Reformat",
                "Inputs": [{"Name": "x", "Format/Datatype": "Row major linear FP32"}],
                "Outputs": [{"Name": "xr", "Format/Datatype": "Row major Int8 format"}],
                "TacticName": "",
                "Metadata": "",
            },
            {
                "Name": "a + b",
                "LayerType": "CaskConvolution",
                "Inputs": [{"Name": "xr", "Format/Datatype": "Row major Int8 format"}],
                "Outputs": [{"Name": "y", "Format/Datatype": "Channel major FP16 format where channel % 8 == 0"}],
                "TacticName": "sm80_xmma_fprop",
                "Metadata": "[ONNX Layer: a]\u001e[ONNX Layer: b]\u001e[ONNX Layer: a]",
            },
            {
                "Name": "pool",
                "LayerType": "kgen",
                "Inputs": [{"Name": "y", "Datatype": "Int8", "Format": "(Linear) Row major linear format"}],
                "Outputs": [{"Name": "z", "Datatype": "Half", "Format": "(Linear) Row major linear format"}],
                "TacticName": "__myl_Avg",
                "Metadata": "[ONNX Layer: pool]",
            },
            "c + d",
        ]
    }
)


def test_the_inspectors_layers_become_records() -> None:
    """The fields are those of NVIDIA's engine inspector for TensorRT 8 to 10, and for TensorRT for RTX."""
    assert from_inspector(INSPECTED) == [
        KernelRecord((), "Reformat", "f32"),
        KernelRecord(("a", "b"), "sm80_xmma_fprop", "int8"),
        KernelRecord(("pool",), "__myl_Avg", "f16"),
        KernelRecord(("c", "d"), "c + d", "unknown"),
    ]


@builds
def test_the_builders_table_names_onnx_nodes(tmp_path: Path) -> None:
    artifact = build(qdq(), tmp_path)
    records = BACKEND.planned_kernels(artifact)
    assert next(record.precision for record in records if "Conv_y" in record.layers) == "int8"
    assert [record.precision for record in records if record.layers == ("QuantizeLinear_q",)] == ["f32"]
    assert from_build_log((tmp_path / "model.layers.txt").read_text(encoding="utf-8").splitlines()) == records


@builds
def test_a_network_of_any_image_size_is_exported_for_that_of_its_samples(tmp_path: Path) -> None:
    net = networks.Net(seed=3)
    x = net.conv_relu(net.input("x", ["n", 3, "h", "w"]), "a", 3, 8)
    save_onnx(net.model(net.op("GlobalAveragePool", [net.conv(x, "b", 8, 8)], "mean")), tmp_path / "net.onnx")
    data = {"x": np.random.default_rng(0).normal(0, 1, (24, 3, 16, 20)).astype(np.float32)}
    edgekit.compress(tmp_path / "net.onnx", tmp_path / "out", calibration=data)
    [result] = edgekit.export(tmp_path / "out", "cuda-tensorrt")
    assert any(
        "the engine takes 'x' in the size of the samples only, Nx3x16x20" in note for note in result.manifest.notes
    )
