from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from PIL import Image

import edgekit
from conftest import TinyFiles, tiny_network
from edgekit.backend import Artifact
from edgekit.data import Preprocess
from edgekit.errors import BackendError, DataError, OutputError, TargetError
from edgekit.output import sha256
from edgekit.records import Manifest, read_manifests, read_record
from edgekit.report import summary
from edgekit.worker import Worker
from graphs import GraphBuilder, normal, run
from networks import Net, needs_vnni, samples

Array = NDArray[Any]
NumpyTarget = Callable[..., str]
Snapshot = Callable[[Path], dict[str, str]]


def test_an_export_is_proven_and_described(exported_once: Path) -> None:
    folder = exported_once / "numpy"
    manifest = read_record(folder / "manifest.json", Manifest, remedy="")
    assert {path.name for path in folder.iterdir()} == {"manifest.json", "model.onnx", "model.int8.onnx"}
    assert {(file.name, file.sha256) for file in manifest.files} == {
        (name, sha256(folder / name)) for name in ("model.onnx", "model.int8.onnx")
    }
    assert (manifest.artifact, manifest.artifact_files) == ("model.int8.onnx", ("model.int8.onnx",))
    assert manifest.artifact_bytes == (folder / "model.int8.onnx").stat().st_size
    assert (manifest.target, manifest.backend, manifest.format) == ("numpy", "numpy", "qdq")
    assert manifest.model_sha256 == sha256(exported_once / "model.onnx")
    proof = manifest.proof
    assert proof.agrees is True
    assert (proof.samples, proof.batch_sizes) == (24, (1, 3, 7, 33))
    assert proof.ran_on.startswith("onnx ")
    assert manifest.kept_float == ()
    assert manifest.metric is not None
    assert manifest.float_metric is not None
    assert manifest.metric_source == "ran"
    assert (manifest.float_metric.value, manifest.metric.name) == (1.0, "top-1")


def test_the_lowered_graph_computes_what_was_proven(exported_once: Path) -> None:
    with np.load(exported_once / "held_back.npz") as archive:
        feeds = {"image": archive["image"]}
    lowered = run(exported_once / "numpy" / "model.onnx", feeds)["head_y"]
    floats = run(exported_once / "model.onnx", feeds)["head_y"]
    assert 10 < 20 * np.log10(np.linalg.norm(floats) / np.linalg.norm(lowered - floats)) < 60


def test_two_exports_give_the_same_bytes_in_another_process(
    compressed: Path, exported: Path, plugin: Path, numpy_target: NumpyTarget, tmp_path: Path
) -> None:
    portable = numpy_target("plain", absent="not here")  # so that each export is short
    (tmp_path / "arm.toml").write_text(
        Path(portable).read_text().replace("portable", "arm-onnxruntime").replace("plain", "arm")
    )
    targets = [portable, str(tmp_path / "arm.toml")]
    edgekit.export(compressed, targets)
    code = "import edgekit, sys; edgekit.export(sys.argv[1], sys.argv[2:])"
    environment = os.environ | {"PYTHONHASHSEED": "99", "PYTHONPATH": str(plugin)}
    subprocess.run([sys.executable, "-c", code, exported, *targets], env=environment, check=True)
    ours, theirs = (
        {name: (folder / name / "model.onnx").read_bytes() for name in ("plain", "arm")}
        for folder in (compressed, exported)
    )
    assert ours == theirs
    assert ours["plain"] != ours["arm"]
    assert ours["plain"] == (exported / "numpy" / "model.onnx").read_bytes()


@pytest.mark.parametrize(
    ("targets", "format", "error", "message"),
    [
        ([], None, TargetError, r"no target is named; give at least one with --target"),
        (["x86-openvno"], None, TargetError, r"unknown target 'x86-openvno'; did you mean 'x86-openvino'\?"),
        (["portable"], None, TargetError, r"target 'portable' has no runtime: it is what others extend"),
        (
            ["x86-openvino"],
            "qoperator",
            TargetError,
            r"target 'x86-openvino' does not take format 'qoperator', only qdq: OpenVINO",
        ),
        (
            ["x86-onnxruntime", "cuda-tensorrt"],
            "integer",
            TargetError,
            r"'cuda-tensorrt' does not take format 'integer'",
        ),
    ],
)
def test_what_is_asked_is_checked_before_anything_is_written(
    compressed: Path, snapshot: Snapshot, targets: list[str], format: Any, error: type[Exception], message: str
) -> None:
    before = snapshot(compressed)
    with pytest.raises(error, match=message):
        edgekit.export(compressed, targets, format=format)
    assert snapshot(compressed) == before


@pytest.mark.parametrize("name", ["", "../escaped", ".hidden", "a/b"])
def test_a_target_whose_name_is_no_folder_is_refused(
    compressed: Path, numpy_target: NumpyTarget, snapshot: Snapshot, name: str
) -> None:
    path = Path(numpy_target())
    path.write_text(path.read_text().replace('name = "numpy"', f'name = "{name}"'))
    before = snapshot(compressed.parent)
    with pytest.raises(TargetError, match=r"target name '.*' cannot name a folder; use letters, digits"):
        edgekit.export(compressed, [str(path)])
    assert snapshot(compressed.parent) == before


@pytest.mark.parametrize("format", ["qoperator", "integer"])
def test_other_formats_are_proven_too(compressed: Path, format: Any) -> None:
    [result] = edgekit.export(compressed, ["x86-onnxruntime"], format=format)
    types = {node.op_type for node in ir.load(result.folder / "model.onnx").graph}
    assert result.manifest.format == format
    assert result.manifest.proof.agrees is True
    assert ("QLinearConv" in types) == (format == "qoperator")


def test_a_folder_that_edgekit_did_not_write_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"nowhere: is not a folder; give the one that `edgekit compress -o` wrote"):
        edgekit.export(tmp_path / "nowhere", ["x86-onnxruntime"])
    with pytest.raises(
        OutputError, match=r"compress\.json: does not exist; give the folder that `edgekit compress -o` wrote"
    ):
        edgekit.export(tmp_path, ["x86-onnxruntime"])


def test_a_runtime_that_is_not_installed_writes_nothing(
    compressed: Path, numpy_target: NumpyTarget, snapshot: Snapshot
) -> None:
    path = Path(numpy_target("tpu"))
    path.write_text(path.read_text().replace('backend = "numpy"', 'backend = "edgetpu"'))
    before = snapshot(compressed)
    with pytest.raises(
        BackendError, match=r"backend 'edgetpu' is not installed \(installed: .*onnxruntime.*\): install its package"
    ):
        edgekit.export(compressed, [str(path)])
    assert snapshot(compressed) == before


NO_OPENVINO = """
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "openvino":
            raise ModuleNotFoundError("No module named 'openvino'", name="openvino")

sys.meta_path.insert(0, Blocker())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "openvino" else find_spec(name, package)
"""


@pytest.fixture
def without_openvino(tmp_path: Path) -> dict[str, str]:
    """The environment of a process that cannot find OpenVINO."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(NO_OPENVINO)
    return {"PYTHONPATH": str(folder)}


@needs_vnni
def test_openvino_that_is_not_installed_is_said_with_the_remedy(
    compressed: Path, cli_process: Callable[..., Any], without_openvino: dict[str, str], snapshot: Snapshot
) -> None:
    before = snapshot(compressed)
    done = cli_process("export", compressed, "--target", "x86-openvino", env=without_openvino)
    assert (done.code, done.stdout) == (7, "")
    assert done.stderr == "edgekit: target 'x86-openvino': openvino is not installed; pip install 'edgekit[openvino]'\n"
    assert snapshot(compressed) == before
    listed = json.loads(cli_process("targets", "--json", env=without_openvino).stdout)
    found = {target["name"]: target["availability"] for target in listed}
    assert (found["x86-openvino"]["can_convert"], found["x86-openvino"]["reason"]) == (
        False,
        "openvino is not installed",
    )
    assert found["x86-onnxruntime"]["can_run"] is True


def test_files_that_somebody_put_into_an_export_are_not_deleted(
    exported: Path, plugin: Path, snapshot: Snapshot
) -> None:
    (exported / "numpy" / "notes.txt").write_text("mine")
    before = snapshot(exported)
    with pytest.raises(OutputError, match=r"numpy: holds 'notes\.txt', which edgekit did not write; move it elsewhere"):
        edgekit.export(exported, [str(plugin / "numpy.toml")])
    assert snapshot(exported) == before


def test_a_folder_in_the_place_of_an_export_is_refused(compressed: Path, plugin: Path, snapshot: Snapshot) -> None:
    (compressed / "numpy").mkdir()
    (compressed / "numpy" / "thesis.tex").write_text("mine")
    before = snapshot(compressed)
    with pytest.raises(
        OutputError, match=r"numpy: is not empty and holds no manifest\.json, so it is not an edgekit export"
    ):
        edgekit.export(compressed, [str(plugin / "numpy.toml")])
    assert snapshot(compressed) == before


@pytest.mark.parametrize("how", ["crash", "raise", "refuse"])
def test_a_runtime_that_fails_leaves_the_previous_export(
    exported: Path, numpy_target: NumpyTarget, snapshot: Snapshot, how: str
) -> None:
    before = snapshot(exported)
    with pytest.raises(edgekit.errors.EdgekitError):
        edgekit.export(exported, [numpy_target(on_run=how)])
    assert snapshot(exported) == before


# A runtime that computes one operator wrongly.


def test_layers_that_the_runtime_gets_wrong_are_found_and_kept_float(
    compressed: Path, numpy_target: NumpyTarget
) -> None:
    """A MaxPool that is wrong on codes gets floats when the convolution that reads it is kept in float."""
    [result] = edgekit.export(compressed, [numpy_target(wrong="pool,block")])
    assert result.manifest.proof.agrees is True
    assert set(result.manifest.kept_float) == {"deep", "block"}
    listed = ", ".join(result.manifest.kept_float)
    assert any(
        note.startswith("kept in float, because onnx ")
        and note.endswith(f" or computes them wrongly in int8: {listed}")
        for note in result.manifest.notes
    )
    sources = {
        node.name: node.inputs[0].producer() for node in ir.load(result.folder / "model.onnx").graph if node.inputs[0]
    }
    on_codes = {
        name for name, producer in sources.items() if producer is not None and producer.op_type == "DequantizeLinear"
    }
    assert {"stem", "head"} <= on_codes
    assert not {"deep", "block", "pool"} & on_codes
    report = (compressed / "report.md").read_text()
    assert f"computes them wrongly in int8: {listed}" in report
    assert "WRONG" not in report


def test_a_wrong_layer_is_looked_for_with_one_batch_that_shows_it(
    compressed: Path, numpy_target: NumpyTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []
    plain = Worker.run

    def counted(self: Worker, feeds: dict[str, Array]) -> dict[str, Array]:
        ran.append(len(feeds["image"]))
        return plain(self, feeds)

    monkeypatch.setattr(Worker, "run", counted)
    [result] = edgekit.export(compressed, [numpy_target(wrong="block")])
    assert result.manifest.kept_float == ("block",)
    whole = [7, 7, 7, 3, 1, 1, 1, 1, 33]
    assert ran == [*whole, 1, 1, 1, 1, *whole, 50, 46]  # the last two are of the metric


@pytest.mark.parametrize(
    "attributes",
    [
        {"kernel_shape": [2, 2], "dilations": [2, 2]},  # ONNX Runtime fuses it into a node that it then refuses
        {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1, "count_include_pad": 1, "pads": [1, 1, 1, 1]},
    ],
    ids=["refused", "wrong"],
)
def test_a_pool_that_onnxruntime_fuses_wrongly_is_kept_float(tmp_path: Path, attributes: dict[str, Any]) -> None:
    build = GraphBuilder(opset=19)
    x = build.conv(build.input("x", ["N", 3, 12, 12]), "first", 3, 8)
    y = build.conv(build.op("AveragePool", [x], "pool", **attributes), "second", 8, 4)
    onnx.save(build.proto(y), tmp_path / "pools.onnx")
    out = tmp_path / "out"
    edgekit.compress(tmp_path / "pools.onnx", out, calibration={"x": normal(96, 3, 12, 12)})
    [result] = edgekit.export(out, ["x86-onnxruntime"])
    assert result.manifest.proof.agrees is True
    # ONNX Runtime fuses even a float pool between DQ and Q, so its reader has to stay float too.
    assert set(result.manifest.kept_float) == {"pool", "second"}
    assert set(result.manifest.proof.float_layers) == {"second"}


@needs_vnni
def test_scores_beside_boxes_keep_a_grid_of_their_own(tmp_path: Path) -> None:
    build = GraphBuilder(opset=21)
    x = build.conv(build.input("x", ["N", 3, 8, 8]), "features", 3, 8)
    box = build.op("Sigmoid", [build.conv(x, "box", 8, 4)], "box_sigmoid")
    pixels = build.op("Mul", [box, build.constant("stride", np.float32(640))], "pixels")
    score = build.op("Sigmoid", [build.conv(x, "score", 8, 1)], "score_sigmoid")
    y = build.op("Concat", [pixels, score], "head", axis=1)
    onnx.save(build.proto(y), tmp_path / "detector.onnx")
    data = normal(120, 3, 8, 8)
    edgekit.compress(tmp_path / "detector.onnx", tmp_path / "out", calibration={"x": data})
    floats = run(tmp_path / "detector.onnx", {"x": data[:32]})[y][:, 4]
    for name in ("x86-onnxruntime", "x86-openvino"):
        [result] = edgekit.export(tmp_path / "out", name)
        assert [note for note in result.manifest.notes if not note.startswith("larger than")] == []  # it is tiny
        scores = run(result.folder / "model.onnx", {"x": data[:32]})[y][:, 4]
        assert 20 * np.log10(np.linalg.norm(floats) / np.linalg.norm(scores - floats)) > 25


def test_an_operator_that_onnx_does_not_have_is_a_mistake(compressed: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(
        'name = "mine"\nextends = "x86-onnxruntime"\nsummary = ""\n[quantization]\nquantize = ["Convv"]\n'
    )
    with pytest.raises(TargetError, match="ONNX has no operator 'Convv'; did you mean 'Conv'"):
        edgekit.export(compressed, str(tmp_path / "mine.toml"))


@needs_vnni
def test_a_fault_of_large_batches_is_found(tmp_path: Path) -> None:
    """OpenVINO's mean over a signed int8 tensor of rank 3 is right up to a batch of 8, and wrong from 9 on."""
    build = GraphBuilder(opset=21)
    x = build.op(
        "Conv", [build.input("x", ["N", 4, 40]), build.weight("w", 8, 4, 5)], "conv", kernel_shape=[5], pads=[2, 2]
    )
    mean = build.op("Flatten", [build.op("GlobalAveragePool", [x], "mean")], "flat")
    y = build.op("Gemm", [mean, build.weight("v", 3, 8)], "head", transB=1)
    onnx.save(build.proto(y), tmp_path / "signal.onnx")
    data = normal(200, 4, 40)
    edgekit.compress(tmp_path / "signal.onnx", tmp_path / "out", calibration={"x": data})
    [result] = edgekit.export(tmp_path / "out", "x86-openvino")
    assert result.manifest.proof.agrees is True
    target = result.manifest.target_rules
    files = tuple(result.folder / name for name in result.manifest.artifact_files)
    with Worker(Artifact(files[0], files), target, exact=True) as worker:
        ran = next(iter(worker.run({"x": data[:64]}).values()))
    floats = run(tmp_path / "signal.onnx", {"x": data[:64]})[y]
    assert 20 * np.log10(np.linalg.norm(floats) / np.linalg.norm(ran - floats)) > 25


def test_a_target_that_fails_does_not_stop_the_others(
    compressed: Path, plugin: Path, numpy_target: NumpyTarget
) -> None:
    failing = numpy_target(name="failing", on_run="refuse")
    with pytest.raises(edgekit.errors.EdgekitError, match=r"\(exported: numpy\)$"):
        edgekit.export(compressed, [failing, str(plugin / "numpy.toml")])
    assert list(read_manifests(compressed)) == ["numpy"]


def test_the_metric_of_export_takes_the_place_of_compress_s(compressed: Path, plugin: Path) -> None:
    def one(run_model: Any) -> float:
        return 1.0

    [result] = edgekit.export(compressed, [str(plugin / "numpy.toml")], evaluate=one)
    assert result.manifest.metric is not None
    assert (result.manifest.metric.name, result.manifest.metric.value) == ("one", 1.0)


def test_what_cannot_be_mended_is_exported_only_for_inspection(
    exported: Path, numpy_target: NumpyTarget, cli: Callable[..., Any], snapshot: Snapshot
) -> None:
    before = snapshot(exported)
    target = numpy_target(wrong_always="head")
    refused = cli("export", exported, "--target", target)
    assert (refused.code, refused.stdout) == (9, "")
    assert refused.stderr.startswith("edgekit: target 'numpy': onnx ")
    assert "does not compute what the simulation does" in refused.stderr
    assert refused.stderr.endswith("nothing was exported (--allow-wrong exports it for inspection)\n")
    assert snapshot(exported) == before

    done = cli("export", exported, "--target", target, "--allow-wrong")
    assert done.code == 0
    assert "WRONG, do not ship" in done.stdout
    assert "note: WRONG: onnx" in done.stdout
    manifest = read_manifests(exported)["numpy"]
    assert manifest.proof.agrees is False
    assert "output 'head_y' is" in manifest.proof.reason
    assert manifest.kept_float == ()
    assert "DequantizeLinear" in [node.op_type for node in ir.load(exported / "numpy" / "model.onnx").graph]
    assert [row.state for row in summary(exported)] == ["WRONG, do not ship"]
    assert "Do not ship this artifact" in (exported / "report.md").read_text()


OPENVINO_16_BIT = """
name = "openvino-16-bit"
extends = "x86-openvino"
backend = "openvino"
summary = "OpenVINO drops 16-bit grids, and with them the Relu that their saturation stands for"

[quantization]
activation = { dtype = "uint16", symmetric = false }
output_q = "always"
drop_redundant = ["Relu"]
"""


def test_what_openvino_computes_wrongly_is_caught_and_mended(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    net = Net(seed=6)
    model = net.model(net.conv(net.conv_relu(net.input("x", ["n", 3, 8, 8]), "first", 3, 8), "second", 8, 8))
    ir.save(model, tmp_path / "net.onnx")
    (tmp_path / "target.toml").write_text(OPENVINO_16_BIT)
    edgekit.compress(tmp_path / "net.onnx", tmp_path / "out", calibration=samples(model, 80))
    [result] = edgekit.export(tmp_path / "out", [str(tmp_path / "target.toml")])
    assert result.manifest.proof.agrees is True
    assert result.manifest.kept_float == ("first",)
    assert "Relu" in [node.op_type for node in ir.load(result.folder / "model.onnx").graph]


# The metric.


def test_the_metric_of_compress_is_found_from_another_folder(
    tiny: TinyFiles, tmp_path: Path, plugin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "quality.py").write_text("def half(run):\n    return 0.5\n")
    monkeypatch.chdir(tmp_path / "work")
    edgekit.compress(tiny.model, tmp_path / "out", calibration=tiny.data, evaluate="quality.py:half")
    monkeypatch.chdir(tmp_path)
    [result] = edgekit.export("out", [str(plugin / "numpy.toml")])
    assert result.manifest.metric is not None
    assert (result.manifest.metric.name, result.manifest.metric.value) == ("half", 0.5)

    (tmp_path / "work" / "quality.py").unlink()
    with pytest.raises(DataError, match=r"quality\.py' does not exist"):
        edgekit.export("out", [str(plugin / "numpy.toml")])


def test_images_are_preprocessed_as_they_were_in_compress(tmp_path: Path, plugin: Path) -> None:
    rng = np.random.default_rng(0)
    preprocess = Preprocess(channels="L", size=(8, 8), mean=(0.5,), std=(0.29,), resample="nearest")
    pixels = rng.integers(0, 256, (40, 8, 8), np.uint8)
    feeds = {"image": ((pixels[:, None] / 255 - 0.5) / 0.29).astype(np.float32)}
    labels = run(tiny_network(), feeds)["head_y"].argmax(1)
    for index, label in enumerate(labels):
        folder = tmp_path / "images" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[index]).save(folder / f"{index}.png")
    ir.save(tiny_network(), tmp_path / "net.onnx")
    # Class folders are numbered by their order, so every class of the network has to occur.
    assert set(labels) == {0, 1, 2, 3}

    images = tmp_path / "images"
    record = edgekit.compress(
        tmp_path / "net.onnx", tmp_path / "out", calibration=images, evaluate=images, preprocess=preprocess
    ).record
    assert record.float_metric is not None
    assert record.float_metric.value == 1.0
    [result] = edgekit.export(tmp_path / "out", [str(plugin / "numpy.toml")])
    assert result.manifest.metric is not None
    assert result.manifest.metric.value > 0.7


def test_without_the_device_the_metric_is_simulated(compressed: Path, numpy_target: NumpyTarget) -> None:
    [result] = edgekit.export(compressed, [numpy_target(absent="no accelerator is plugged in")])
    manifest = result.manifest
    assert manifest.proof.agrees is None
    assert manifest.metric_source == "simulated"
    assert manifest.notes == ("no accelerator is plugged in; attach the device",)
    [row] = summary(compressed)
    assert (row.state, row.metric.endswith(" simulated")) == ("built, not run here", True)


# Interruptions.

EXPORT = """
    import sys
    sys.path.insert(0, {plugin!r})
    import edgekit
    edgekit.export(out, [{target!r}], format="qoperator")
"""


def test_a_kill_leaves_the_previous_export_or_none(
    compressed: Path, plugin: Path, numpy_target: NumpyTarget, killed: Callable[..., Iterator[Path]]
) -> None:
    target = numpy_target(absent="not here")  # so that each run is short
    edgekit.export(compressed, [target])
    job = textwrap.dedent(EXPORT).format(plugin=str(plugin), target=target)
    found = [state(out) for out in killed(job, previous=compressed)]
    assert found[0] == "qdq"
    assert found[-1] == "qoperator"
    assert set(found) == {"qdq", "", "qoperator"}
    assert found == sorted(found, key=["qdq", "", "qoperator"].index)


def test_a_kill_of_the_first_export_leaves_nothing_that_stops_the_next(
    compressed: Path, plugin: Path, numpy_target: NumpyTarget, killed: Callable[..., Iterator[Path]]
) -> None:
    target = numpy_target(absent="not here")
    job = textwrap.dedent(EXPORT).format(plugin=str(plugin), target=target)
    found = []
    for out in killed(job, previous=compressed):
        found.append(state(out))
        assert [row.target for row in summary(out)] == (["numpy"] if found[-1] else [])
        edgekit.export(out, [target])
        assert state(out) == "qdq"
        assert not [path.name for path in out.iterdir() if path.is_dir() and path.name != "numpy"]
    assert set(found) == {"", "qoperator"}


def state(out: Path) -> str:
    """The format of the complete export in a folder, or "" when there is none."""
    if not (out / "numpy").exists():
        return ""
    manifest = read_manifests(out)["numpy"]
    assert {(path.name) for path in (out / "numpy").iterdir()} == {
        "manifest.json",
        *(file.name for file in manifest.files),
    }
    assert all(sha256(out / "numpy" / file.name) == file.sha256 for file in manifest.files)
    return manifest.format
