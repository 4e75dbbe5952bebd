from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import edgekit
from conftest import TinyFiles, tiny_network
from edgekit.errors import DataError, GraphError, OutputError, SourceError
from edgekit.graph.annotations import annotated_values, get_params
from edgekit.graph.io import load_annotated
from edgekit.output import sha256
from edgekit.records import Compressed, read_compressed
from graphs import GraphBuilder, normal, run
from networks import Net, samples

Array = NDArray[Any]
RNG = np.random.default_rng(3)


def images(count: int) -> Array:
    return RNG.normal(0, 1, (count, 1, 8, 8)).astype(np.float32)


def save(model: ir.Model, folder: Path) -> Path:
    path = folder / "net.onnx"
    ir.save(model, path)
    return path


def test_the_result_is_a_float_graph_with_quant_attributes(tiny: TinyFiles, compressed_once: Path) -> None:
    feeds = {"image": images(5)}
    before = run(tiny.model, feeds)["head_y"]
    after = run(compressed_once / "model.onnx", feeds)["head_y"]
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5)

    params = [get_params(value) for value in annotated_values(load_annotated(compressed_once / "model.onnx").graph)]
    assert {one.dtype for one in params if one is not None} == {"uint8", "int8"}


def test_the_record_says_what_was_done(tiny: TinyFiles, compressed_once: Path) -> None:
    record = read_compressed(compressed_once)
    assert (record.source.name, record.source.kind, record.source.sha256) == ("tiny.onnx", "onnx", sha256(tiny.model))
    assert (record.target, record.method.calibrator, record.samples, record.held_back) == ("portable", "kld", 72, 24)
    assert record.evaluate == str(tiny.data)
    assert record.float_metric is not None
    assert record.simulated_metric is not None
    assert record.float_metric.value == 1.0
    assert 0.7 < record.simulated_metric.value < 1.0
    assert [layer.name for layer in record.layers] == ["stem", "block", "deep", "head"]
    assert record.layers[0].macs == 8 * 8 * 8 * 9
    assert record.layers[0].parameters == 8 * 9 + 8
    assert record.notes == ()
    assert record.versions["python"]
    assert record.versions["numpy"] == np.__version__


def test_calibration_does_not_see_what_is_held_back(tiny: TinyFiles, tmp_path: Path) -> None:
    with np.load(tiny.data) as archive:
        originals = archive["image"]
    seen: list[Array] = []

    def data() -> Iterator[dict[str, Array]]:
        for row in originals:
            seen.append(row)
            yield {"image": row[None]}

    edgekit.compress(tiny.model, tmp_path, calibration=data, samples=60, method=edgekit.Method(calibrator="minmax"))
    with np.load(tmp_path / "held_back.npz") as archive:
        held_back = archive["image"]
    np.testing.assert_array_equal(held_back, originals[60:])


@pytest.mark.parametrize(
    ("count", "samples_wished", "calibrate", "verify"),
    [(1, 512, 1, 1), (2, 512, 1, 1), (20, 512, 15, 5), (20, 5, 5, 15), (200, 100, 100, 100), (700, 100, 100, 256)],
)
def test_few_samples_are_shared_out(
    tiny: TinyFiles, tmp_path: Path, count: int, samples_wished: int, calibrate: int, verify: int
) -> None:
    record = edgekit.compress(tiny.model, tmp_path, calibration=images(count), samples=samples_wished).record
    assert (record.samples, record.held_back) == (calibrate, verify)
    few = [
        note
        for note in record.notes
        if note == f"calibrated on {calibrate} samples only; a few hundred give ranges that hold"
    ]
    assert len(few) == (1 if calibrate < 32 else 0)


def test_a_function_that_yields_less_than_wished_is_counted(tiny: TinyFiles, tmp_path: Path) -> None:
    record = edgekit.compress(tiny.model, tmp_path, calibration=lambda: [images(7), images(4)]).record
    assert (record.samples, record.held_back) == (9, 2)


@pytest.mark.parametrize(
    ("batch", "count", "calibrate", "verify"),
    [(1, 10, 8, 2), (4, 4, 4, 4), (4, 7, 4, 4), (4, 30, 20, 8), (100, 100, 100, 100), (100, 250, 100, 100)],
)
def test_a_static_batch_is_filled_whole(tmp_path: Path, batch: int, count: int, calibrate: int, verify: int) -> None:
    source = save(tiny_network(batch=batch), tmp_path)
    record = edgekit.compress(source, tmp_path / "out", calibration=images(count)).record
    assert (record.samples, record.held_back) == (calibrate, verify)


def test_a_static_batch_that_cannot_be_filled_is_refused(tmp_path: Path) -> None:
    source = save(tiny_network(batch=4), tmp_path)
    with pytest.raises(DataError, match=r"holds 3 samples, and the model takes exactly 4 at a time; give more"):
        edgekit.compress(source, tmp_path / "out", calibration=images(3))


def two_inputs() -> ir.Model:
    """`file` and `mask`: names that `numpy.savez` would take for its own arguments."""
    net = Net(seed=7)
    x = net.conv_relu(net.input("file", ["n", 3, 8, 8]), "stem", 3, 8)
    x = net.op("Mul", [x, net.input("mask", ["n", 1, 8, 8])], "masked")
    x = net.op("Flatten", [net.op("GlobalAveragePool", [net.conv(x, "deep", 8, 8)], "pool")], "flat")
    return net.model(net.gemm(x, "head", 8, 3))


def test_a_model_with_several_inputs(tmp_path: Path) -> None:
    model = two_inputs()
    out = tmp_path / "out"
    record = edgekit.compress(save(model, tmp_path), out, calibration=samples(model, 40)).record
    assert (record.samples, record.held_back) == (30, 10)
    with np.load(out / "held_back.npz") as archive:
        assert {name: archive[name].shape for name in archive.files} == {"file": (10, 3, 8, 8), "mask": (10, 1, 8, 8)}
    [result] = edgekit.export(out, ["x86-onnxruntime"])
    assert result.manifest.proof.agrees is True


def test_an_operator_without_a_rule_stays_float_and_is_reported(tmp_path: Path) -> None:
    net = Net(seed=8)
    x = net.op("Sin", [net.conv(net.input("x", ["n", 3, 8, 8]), "a", 3, 4)], "wave")
    model = net.model(net.op("Sin", [net.conv(x, "b", 4, 4)], "wave2"))
    record = edgekit.compress(save(model, tmp_path), tmp_path / "out", calibration=samples(model, 40)).record
    assert record.stays_float == {"Sin": 2}
    assert "- stays float: 2 Sin" in (tmp_path / "out" / "report.md").read_text()


def test_a_model_with_nothing_to_quantize_is_said_and_still_exported(tmp_path: Path) -> None:
    net = Net(seed=9)
    model = net.model(net.op("Relu", [net.input("x", ["n", 3])], "relu"))
    record = edgekit.compress(save(model, tmp_path), tmp_path / "out", calibration=samples(model, 40)).record
    assert record.notes[0].startswith(
        "nothing is quantized: net.onnx has no operator that target 'portable' quantizes (Conv,"
    )
    [result] = edgekit.export(tmp_path / "out", ["x86-onnxruntime"])
    assert result.manifest.proof.agrees is True
    assert result.manifest.proof.int8_macs_share is None


class Small(nn.Module):
    """4 features to 3 scores."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.head(torch.relu(self.hidden(x)))
        return scores


def test_a_module_and_its_checkpoint_give_the_same_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Small().eval()
    torch.save({"epoch": 3, "state_dict": module.state_dict()}, tmp_path / "small.pt")
    data = {"x": RNG.normal(0, 1, (60, 4)).astype(np.float32)}
    of_module = edgekit.compress(module, tmp_path / "module", calibration=data)
    of_file = edgekit.compress(tmp_path / "small.pt", tmp_path / "file", calibration=data, model=Small)
    assert of_module.model.read_bytes() == of_file.model.read_bytes()
    assert (of_module.record.source.name, of_module.record.source.kind) == ("Small", "module")
    assert (of_file.record.source.name, of_file.record.source.kind) == ("small.pt", "pt")
    assert [layer.name for layer in of_file.record.layers] == ["hidden", "head"]
    assert run(of_file.model, data)["linear_1"] == pytest.approx(
        module(torch.from_numpy(data["x"])).detach().numpy(), abs=1e-5
    )


def test_something_else_is_no_source(tmp_path: Path) -> None:
    with pytest.raises(
        SourceError, match=r"the source is a dict; give the path of a checkpoint or ONNX file, or an nn\.Module"
    ):
        edgekit.compress({}, tmp_path / "out", calibration=images(2))
    assert not (tmp_path / "out").exists()


def test_the_same_input_gives_the_same_bytes_in_another_process(
    tiny: TinyFiles, compressed_once: Path, tmp_path: Path
) -> None:
    data = "calibration=sys.argv[2], evaluate=sys.argv[2], method=edgekit.Method(calibrator='kld'), proxy='none'"
    code = f"import edgekit, sys; edgekit.compress(sys.argv[1], sys.argv[3], {data})"
    environment = os.environ | {"PYTHONHASHSEED": "4321"}
    subprocess.run([sys.executable, "-c", code, tiny.model, tiny.data, tmp_path / "out"], env=environment, check=True)
    for name in ("model.onnx", "held_back.npz", "compress.json", "report.json", "report.md"):
        assert (tmp_path / "out" / name).read_bytes() == (compressed_once / name).read_bytes(), name


def test_no_path_of_this_machine_is_in_the_model(tiny: TinyFiles, compressed_once: Path) -> None:
    content = (compressed_once / "model.onnx").read_bytes()
    for path in (Path.cwd(), Path(edgekit.__file__).parent, tiny.model.parent):
        assert str(path).encode() not in content


def test_compressing_again_replaces_the_result_and_keeps_other_files(
    tiny: TinyFiles, exported: Path, snapshot: Callable[[Path], dict[str, str]]
) -> None:
    (exported / "notes.txt").write_text("mine")
    before = snapshot(exported)
    edgekit.compress(
        tiny.model, exported, calibration=tiny.data, method=edgekit.Method(calibrator="minmax"), samples=32
    )
    after = snapshot(exported)
    assert before.keys() | {"deciding.npz"} == after.keys()  # there is a decision to judge by now
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"compress.json", "held_back.npz", "model.onnx", "report.json", "report.md"}


COMPRESS = """
    import edgekit
    edgekit.compress({model!r}, out, calibration={data!r}, method=edgekit.Method(calibrator="minmax"), samples=32)
"""


def test_a_kill_leaves_the_previous_result_or_none(
    tiny: TinyFiles, compressed_once: Path, killed: Callable[..., Iterator[Path]]
) -> None:
    job = textwrap.dedent(COMPRESS).format(model=str(tiny.model), data=str(tiny.data))
    found = [state(out) for out in killed(job, previous=compressed_once)]
    assert found[0] == "kld"
    assert found[-1] == "minmax"
    assert set(found) == {"kld", "", "minmax"}
    assert found == sorted(found, key=["kld", "", "minmax"].index)


def test_a_kill_of_the_first_run_leaves_nothing_that_stops_the_next(
    tiny: TinyFiles, killed: Callable[..., Iterator[Path]]
) -> None:
    job = textwrap.dedent(COMPRESS).format(model=str(tiny.model), data=str(tiny.data))
    found = []
    for out in killed(job):
        found.append(state(out))
        if found[-1] == "":
            edgekit.compress(
                tiny.model, out, calibration=tiny.data, method=edgekit.Method(calibrator="minmax"), samples=32
            )
            assert state(out) == "minmax"
            assert not list(out.glob(".*"))
    assert set(found) == {"", "minmax"}


def state(out: Path) -> str:
    """The calibrator of the complete result in a folder, or "" when there is none."""
    if not (out / "compress.json").exists():
        return ""
    record = read_compressed(out)
    load_annotated(out / "model.onnx")
    with np.load(out / "held_back.npz") as archive:
        assert len(archive["image"]) == record.held_back
    return record.method.calibrator


LIMITED = """
import resource, signal, sys, edgekit
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
try:
    edgekit.compress(sys.argv[1], sys.argv[3], calibration=sys.argv[2])
except edgekit.errors.OutputError as error:
    print(error)
"""


def test_a_disk_that_is_too_small_leaves_the_previous_result(
    tiny: TinyFiles, compressed: Path, tmp_path: Path, snapshot: Callable[[Path], dict[str, str]]
) -> None:
    before = snapshot(compressed)
    for out in (compressed, tmp_path / "new"):
        command = [sys.executable, "-c", LIMITED, tiny.model, tiny.data, out]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert f"{out}" in done.stdout
        assert "cannot be written (File too large); " in done.stdout
    assert snapshot(compressed) == before
    assert not (tmp_path / "new").exists()


def test_a_model_that_was_changed_by_hand_is_noticed(compressed: Path) -> None:
    with (compressed / "model.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(
        OutputError,
        match=r"model\.onnx: is missing or is not what compress\.json describes; run `edgekit compress` again",
    ):
        edgekit.export(compressed, ["x86-onnxruntime"])


def test_a_record_of_another_format_is_noticed(compressed: Path) -> None:
    document = json.loads((compressed / "compress.json").read_text())
    (compressed / "compress.json").write_text(json.dumps(document | {"flavour": "sweet"}))
    with pytest.raises(
        OutputError, match=r"compress\.json: cannot be read as an edgekit record .*; give the folder that"
    ):
        edgekit.export(compressed, ["x86-onnxruntime"])


def test_the_steps_are_told_in_order(tiny: TinyFiles, tmp_path: Path) -> None:
    told: list[tuple[str, int, int | None]] = []
    edgekit.compress(
        tiny.model,
        tmp_path,
        calibration=tiny.data,
        samples=16,
        proxy="none",
        on_progress=lambda *step: told.append(step),
    )
    steps = list(dict.fromkeys(step for step, _, _ in told))
    passes = ["smooth", "look at layers", "calibrate", "round weights"]
    assert [step for step in steps if step not in passes] == [
        "load the source",
        "bring it into canonical form",
    ]
    for each in set(steps) & set(passes):
        assert [done for step, done, total in told if step == each][:2] == [8, 16]
    assert "calibrate" in steps


def test_the_calls_are_typed_and_stay_functions() -> None:
    calls = ["benchmark", "compress", "export", "load"]
    assert edgekit.__all__ == ["LayerMethod", "Method", *calls]
    for name in calls:
        function = getattr(edgekit, name)
        assert function is getattr(edgekit, name)
        assert callable(function)
        assert "return" in typing.get_type_hints(function)
    assert typing.get_type_hints(edgekit.compress)["return"].__name__ == "CompressResult"
    assert typing.get_type_hints(typing.get_type_hints(edgekit.compress)["return"])["record"] is Compressed
    with pytest.raises(AttributeError, match=r"module 'edgekit' has no attribute 'comprss'"):
        edgekit.comprss  # noqa: B018


def test_an_upgrade_that_changes_the_model_is_refused(tmp_path: Path) -> None:
    """ONNX's converter gets Hardmax of opset 12 and older wrong: there it flattens, from 13 on it does not."""
    build = GraphBuilder(opset=11)
    onnx.save(build.proto(build.op("Hardmax", [build.input("x", ["N", 3, 4])], "hard", axis=1)), tmp_path / "hard.onnx")
    with pytest.raises(GraphError, match=r"'hard' \(Hardmax\)"):
        edgekit.compress(tmp_path / "hard.onnx", tmp_path / "out", calibration={"x": normal(9, 3, 4)})


def test_a_pass_that_changes_the_model_is_refused(
    tiny: TinyFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(model: ir.Model) -> ir.Model:
        model = model.clone()
        [relu, *_] = [node for node in model.graph if node.op_type == "Relu"]
        relu.outputs[0].replace_all_uses_with(relu.inputs[0])
        return model

    monkeypatch.setattr("edgekit.pipelines.sources.pool_globally", broken)
    with pytest.raises(GraphError, match="does not compute the same"):
        edgekit.compress(tiny.model, tmp_path, calibration=images(16))


def test_a_module_in_training_mode_is_left_as_it_was(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    edgekit.compress(module, tmp_path, calibration={"input": normal(40, 3, 8, 8)})
    assert module.training
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_of_large_samples_fewer_are_held_back(tmp_path: Path) -> None:
    """Each has half a mebibyte, of which 32 are kept, and 64 samples at least."""
    net = Net(seed=3)
    x = net.op("GlobalAveragePool", [net.conv(net.input("x", ["n", 2, 256, 256]), "conv", 2, 4)], "mean")
    source = save(net.model(net.op("Flatten", [x], "flat")), tmp_path)
    record = edgekit.compress(
        source, tmp_path / "out", calibration=lambda: (np.zeros((1, 2, 256, 256), np.float32) for _ in range(100)),
        samples=4, method=edgekit.Method(calibrator="minmax"), proxy="none",
    ).record  # fmt: skip
    assert (record.samples, record.held_back) == (4, 64)
