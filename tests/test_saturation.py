"""CPUs that add products of uint8 and int8 in 16 bits: 7-bit weights for them, and what is checked on them for others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

import edgekit
from conftest import TinyFiles
from edgekit.errors import BackendError
from edgekit.graph.annotations import set_params
from edgekit.graph.io import load_onnx
from edgekit.lowering import cpu
from edgekit.lowering.cpu import cpu_saturates, saturates_here, with_reduced_range
from edgekit.lowering.qdq import lower_qdq
from edgekit.lowering.saturation import saturation_warnings
from edgekit.proof import moved_by
from edgekit.target import load_target
from graphs import GraphBuilder
from networks import annotate, get_params_of, residual_net, samples, simulate, worst

OLD = "flags\t\t: fpu sse2 avx avx2\n"


def weight_codes(model: object) -> list[np.ndarray]:
    initializers = model.graph.initializers.values()  # type: ignore[attr-defined]
    arrays = [value.const_value.numpy() for value in initializers if value.const_value is not None]
    return [array for array in arrays if array.dtype == np.int8 and array.ndim > 1]


@pytest.fixture
def old_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text(OLD, encoding="utf-8")
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")


@pytest.mark.parametrize("target", ["x86-onnxruntime", "x86-openvino", "arm-onnxruntime"])
def test_with_a_reduced_range_no_weight_needs_the_eighth_bit(target: str) -> None:
    model, rules = annotate(residual_net()), load_target(target)
    full, reduced = lower_qdq(model, rules), lower_qdq(model, with_reduced_range(rules))
    assert all(int(np.abs(codes.astype(int)).max()) == 127 for codes in weight_codes(full))
    assert all(60 <= int(np.abs(codes.astype(int)).max()) <= 64 for codes in weight_codes(reduced))
    feeds = samples(model, 5)
    assert 0 < worst(simulate(reduced, feeds), simulate(full, feeds)) < 0.1
    assert saturation_warnings(reduced, with_reduced_range(rules)) == []


def test_trained_weights_keep_their_grid() -> None:
    model = annotate(residual_net())
    params = get_params_of(model, "stem.weight")
    set_params(model.graph.initializers["stem.weight"], replace(params, fixed=True))
    reduced = weight_codes(lower_qdq(model, with_reduced_range(load_target("x86-openvino"))))
    assert sorted(int(np.abs(codes.astype(int)).max()) > 64 for codes in reduced)[-2:] == [False, True]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (OLD, True),
        ("flags : avx2 avx512f avx512_vnni\n", False),
        ("flags : avx2 avx_vnni\n", False),
        ("Features : asimd asimddp\n", False),
    ],
)
def test_what_linux_says_of_the_cpu(text: str, found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor : 0\n{text}", encoding="utf-8")
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")
    assert cpu_saturates() is found
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "absent")
    assert cpu_saturates() is False


def test_only_targets_that_are_exact_elsewhere_are_concerned(old_cpu: None) -> None:
    concerned = {
        name: saturates_here(load_target(name)) for name in ("x86-openvino", "arm-onnxruntime", "cuda-tensorrt")
    }
    assert concerned == {"x86-openvino": True, "arm-onnxruntime": True, "cuda-tensorrt": False}
    assert not saturates_here(with_reduced_range(load_target("x86-openvino")))


@pytest.mark.parametrize("target", ["x86-onnxruntime", "x86-openvino"])
def test_an_export_for_a_newer_cpu_is_checked_with_seven_bits_and_says_so(
    target: str, tiny: TinyFiles, tmp_path: Path, old_cpu: None
) -> None:
    out = tmp_path / "out"
    edgekit.compress(tiny.model, out, calibration=tiny.data, evaluate=tiny.data)
    [result] = edgekit.export(out, target, time_budget=5)
    manifest = result.manifest
    assert manifest.proof.agrees is True and manifest.proof.ran_on
    assert manifest.metric_source == "simulated" and manifest.placement is None
    assert any("no VNNI" in note for note in manifest.notes)
    assert (
        max(int(np.abs(codes.astype(int)).max()) for codes in weight_codes(load_onnx(result.folder / "model.onnx")))
        == 127
    )
    [record] = edgekit.benchmark(out, [target], iterations=5).targets
    assert "no VNNI" in record.reason and not record.timings


def test_a_refusal_there_names_no_file_that_is_gone(old_cpu: None, tmp_path: Path) -> None:
    """Axes are an input, so that the output may have any rank."""
    build = GraphBuilder(opset=17)
    x, axes = build.input("x", [3, 4]), build.input("axes", [1], onnx.TensorProto.INT64)
    onnx.save(build.proto(build.op("Unsqueeze", [build.op("Relu", [x], "r"), axes], "u")), tmp_path / "net.onnx")
    call = {"x": np.ones((3, 4), np.float32), "axes": np.array([1])}
    edgekit.compress(tmp_path / "net.onnx", tmp_path / "out", calibration=[call], proxy="none")
    with pytest.raises(BackendError, match=r"OpenVINO refuses the model.* dynamic rank") as caught:
        edgekit.export(tmp_path / "out", "x86-openvino")
    assert "edgekit-" not in str(caught.value)


def test_what_a_runtime_adds_to_one_simulation_is_added_to_another() -> None:
    real, expected, ran = (
        np.array([1.0, np.inf, 3.0, 4.0]),
        np.array([1.5, np.inf, 3.0, 5.0]),
        np.array([1.5, np.inf, 3.25, 9.0]),
    )
    np.testing.assert_array_equal(moved_by(real, expected, ran), [1.0, np.inf, 3.25, 8.0])
    labels = np.array([1, 2])
    assert moved_by(labels, labels, labels + 1) is not labels
    np.testing.assert_array_equal(moved_by(labels, labels, labels + 1), [2, 3])
    np.testing.assert_array_equal(moved_by(real, expected, ran[:2]), ran[:2])
