"""What users bring that is broken, degenerate or extreme: each through the public doors, clear, and with nothing lost."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import edgekit
from conftest import Cli, TinyFiles, tiny_images
from edgekit import Method
from edgekit.errors import DataError, GraphError, SourceError
from edgekit.graph.annotations import annotated_values, get_params
from edgekit.graph.io import load_annotated
from edgekit.method import EVERYTHING
from edgekit.pipelines.export import ExportResult
from graphs import Array, normal, poked
from networks import Net, needs_vnni, residual_net, token_net

Snapshot = Callable[[Path], dict[str, str]]
RUNTIMES = ["x86-onnxruntime", "x86-openvino"]
IMAGES = {"x": normal(40, 3, 16, 16)}
TOKENS = {"x": normal(40, 12, 16)}


def save(model: ir.Model, folder: Path) -> Path:
    ir.save(model, folder / "net.onnx")
    return folder / "net.onnx"


def setting(index: Any, number: float) -> Callable[[Array], object]:
    return lambda array: array.__setitem__(index, number)


def shipped(
    model: ir.Model, data: dict[str, Array], folder: Path, method: Method = EVERYTHING, targets: list[str] = RUNTIMES
) -> list[ExportResult]:
    """Compressed and exported; each artifact ran, and computes what it should."""
    out = folder / "out"
    edgekit.compress(save(model, folder), out, calibration=data, method=method)
    results = edgekit.export(out, targets, tune_placement=False)
    for result in results:
        proof = result.manifest.proof
        assert proof.ran_on
        assert proof.agrees is True
    return results


def decibels(result: ExportResult) -> float:
    found = result.manifest.proof.outputs[0].float_sqnr_db
    assert found is not None
    return found


# Calibration data.


def test_too_few_samples_are_said_with_their_number(tiny: TinyFiles, tmp_path: Path, cli: Cli) -> None:
    np.savez(tmp_path / "few.npz", image=tiny_images(4))
    done = cli("compress", tiny.model, "-o", tmp_path / "out", "--calibration", tmp_path / "few.npz")
    assert done.code == 0
    assert "  note: calibrated on 3 samples only; a few hundred give ranges that hold\n" in done.stdout


@pytest.mark.parametrize(("make", "number"), [(residual_net, 0.5), (token_net, 0.0)])
def test_data_that_never_changes(make: Callable[[], ir.Model], number: float, tmp_path: Path) -> None:
    data = IMAGES if make is residual_net else TOKENS
    constant = {"x": np.full_like(data["x"], number)}
    [result] = shipped(make(), constant, tmp_path, targets=["x86-onnxruntime"])
    assert result.manifest.kept_float == ()
    assert decibels(result) > 30
    params = [get_params(value) for value in annotated_values(load_annotated(tmp_path / "out" / "model.onnx").graph)]
    assert all(one is not None and np.isfinite(one.scale).all() and (one.scale > 0).all() for one in params)


FAILING = """
import numpy as np
rng = np.random.default_rng(0)
def batches():
    for index in range(9):
        if index == 5:
            raise OSError("the camera is unplugged")
        yield rng.normal(size=(4, 1, 8, 8)).astype(np.float32)
"""


def test_a_source_that_raises_in_the_middle_leaves_all_as_it_was(
    tiny: TinyFiles, compressed: Path, tmp_path: Path, cli: Cli, snapshot: Snapshot
) -> None:
    (tmp_path / "camera.py").write_text(FAILING)
    before = snapshot(compressed)
    for out in (compressed, tmp_path / "new"):
        done = cli("compress", tiny.model, "-o", out, "--calibration", f"{tmp_path / 'camera.py'}:batches")
        assert (done.code, done.stdout) == (4, "")
        assert re.search(r"the function raised OSError: the camera is unplugged \(camera\.py, line 7\)\n$", done.stderr)
    assert snapshot(compressed) == before
    assert not (tmp_path / "new").exists()


def test_a_source_that_raises_only_on_a_later_pass(tiny: TinyFiles, tmp_path: Path) -> None:
    passes: list[int] = []

    def batches() -> Iterator[Array]:
        passes.append(1)
        if len(passes) == 4:
            raise OSError("the disk is full")
        yield from np.split(tiny_images(), 12)

    with pytest.raises(
        DataError, match=r"the function raised OSError: the disk is full \(test_bad_input\.py, line \d+\)"
    ):
        edgekit.compress(tiny.model, tmp_path / "out", calibration=batches)
    assert not (tmp_path / "out").exists()


# Weights.

FOUR_BITS = Method(weights="int4", rounding="gptq")
IN_BLOCKS = ("--activations", "none", "--weights", "int4", "--block-size", "32")
BLOCKS = Method(activations="none", weights="int4", block_size=32, rounding="gptq")


@pytest.mark.parametrize("method", [Method(), FOUR_BITS, Method(equalize=True)])
def test_channels_of_zeros_in_convolutions(method: Method, tmp_path: Path) -> None:
    model = poked(poked(residual_net(), "a1.weight", setting(1, 0)), "head.weight", setting(1, 0))
    model = poked(poked(model, "b1.weight", setting(..., 0)), "a2.weight", setting((slice(None), 2), 0))
    for result in shipped(model, IMAGES, tmp_path, method, RUNTIMES if method == Method() else RUNTIMES[:1]):
        assert result.manifest.kept_float == ()
        assert decibels(result) > (25 if method is FOUR_BITS else 35)


@needs_vnni
@pytest.mark.parametrize("method", [Method(), FOUR_BITS, BLOCKS, Method(activations="dynamic")])
def test_channels_of_zeros_in_matrix_products(method: Method, tmp_path: Path) -> None:
    columns = setting((slice(None), 1), 0)
    model = poked(
        poked(poked(token_net(), "query.weight", columns), "head.weight", columns), "out.weight", setting(1, 0)
    )
    model = poked(poked(model, "norm.gain", setting(3, 0)), "value.weight", setting(..., 0))
    for result in shipped(model, TOKENS, tmp_path, method, RUNTIMES if method == Method() else RUNTIMES[:1]):
        assert result.manifest.kept_float == ()
        assert decibels(result) > (20 if method in (FOUR_BITS, BLOCKS) else 35)


@pytest.mark.parametrize(("number", "options"), [(np.nan, ()), (np.inf, IN_BLOCKS), (-np.inf, ())])
@pytest.mark.parametrize(
    ("make", "tensor", "reader"),
    [
        (residual_net, "a1.weight", "'a1' (Conv)"),
        (residual_net, "head.bias", "'head' (Gemm)"),
        (token_net, "query.weight", "'query' (MatMul)"),
        (token_net, "key.bias", "'key.add' (Add)"),
        (token_net, "norm.gain", "'norm' (LayerNormalization)"),
    ],
)
def test_parameters_that_are_no_numbers_are_named_and_nothing_is_written(
    make: Callable[[], ir.Model],
    tensor: str,
    reader: str,
    number: float,
    options: tuple[str, ...],
    tmp_path: Path,
    cli: Cli,
) -> None:
    source = save(poked(make(), tensor, lambda array: array.reshape(-1).__setitem__(3, number)), tmp_path)
    np.savez(tmp_path / "data.npz", x=(IMAGES if make is residual_net else TOKENS)["x"])
    done = cli("compress", source, "-o", tmp_path / "out", "--calibration", tmp_path / "data.npz", *options)
    what = "NaN" if np.isnan(number) else "infinity"
    assert (done.code, done.stdout) == (3, "")
    assert done.stderr.startswith(
        f"edgekit: tensor {tensor!r}, read by node {reader}, holds {what}; expected finite numbers"
    )
    assert not (tmp_path / "out").exists()


def test_the_previous_result_survives_a_broken_checkpoint(compressed: Path, tmp_path: Path, snapshot: Snapshot) -> None:
    before = snapshot(compressed)
    source = save(poked(residual_net(), "stem.weight", setting((0, 0, 0, 0), np.nan)), tmp_path)
    with pytest.raises(SourceError, match=r"'stem\.weight'.* holds NaN"):
        edgekit.compress(source, compressed, calibration=IMAGES)
    assert snapshot(compressed) == before


@pytest.mark.parametrize("method", [Method(), BLOCKS, Method(calibrator="minmax", bias_correction=False, smooth=False)])
def test_a_tensor_that_overflows_on_the_way_is_named(method: Method, tmp_path: Path) -> None:
    net = Net(seed=1)
    x = net.op(
        "Exp", [net.op("Mul", [net.input("x", ["n", 12, 16]), net.constant("big", np.float32(90))], "grow")], "burst"
    )
    with pytest.raises(DataError, match=r"tensor 'burst_y' becomes NaN or Inf during calibration"):
        edgekit.compress(
            save(net.model(net.matmul(x, "head", 16, 4)), tmp_path), tmp_path / "out", calibration=TOKENS, method=method
        )
    assert not (tmp_path / "out").exists()


# Channel axes.


def with_scales(op_type: str, shape: tuple[int, ...], axis: int, *, inputs: int | None = None) -> ir.Model:
    """A layer of a Q/DQ file whose weight has a scale for each index of `axis`; its input has one for each of `inputs`."""
    net = Net(seed=3)
    x = net.input("x", ["n", 4, 8, 8])
    many = {} if inputs is None else {"axis": 1}
    scale = net.constant("x.scale", np.full(inputs or (), 0.03, np.float32))
    zero = net.constant("x.zero", np.zeros(inputs or (), np.int8))
    x = net.op("QuantizeLinear", [x, scale, zero], "q", **many)
    x = net.op("DequantizeLinear", [x, scale, zero], "dq", **many)
    grid = [
        net.constant("w.scale", net.rng.uniform(0.004, 0.01, shape[axis]).astype(np.float32)),
        net.constant("w.zero", np.zeros(shape[axis], np.int8)),
    ]
    codes = net.constant("w", net.rng.integers(-127, 128, shape).astype(np.int8))
    inputs_of = [x, net.op("DequantizeLinear", [codes, *grid], "w.dq", axis=axis)]
    if op_type == "MatMul":
        return net.model(net.op("MatMul", inputs_of, "layer"))
    bias = net.weight("b", shape[1] if op_type == "ConvTranspose" else shape[0])
    return net.model(net.op(op_type, [*inputs_of, bias], "layer", kernel_shape=list(shape[2:])))


@pytest.mark.parametrize(
    ("op_type", "shape", "axis"), [("Conv", (8, 4, 3, 3), 1), ("ConvTranspose", (4, 8, 2, 2), 0), ("MatMul", (8, 6), 0)]
)
def test_scales_along_another_axis_than_the_outputs_leave_the_layer_in_float(
    op_type: str, shape: tuple[int, ...], axis: int, tmp_path: Path
) -> None:
    model = with_scales(op_type, shape, axis)
    data = {"x": normal(40, 4, 8, 8)}
    record = edgekit.compress(save(model, tmp_path), tmp_path / "out", calibration=data).record
    assert (
        "in float, because their weights came with scales along another axis than the output channels': layer"
        in record.notes
    )
    for result in edgekit.export(tmp_path / "out", RUNTIMES, tune_placement=False):
        assert result.manifest.proof.agrees is True
        assert decibels(result) > 100
        assert "QuantizeLinear" not in [node.op_type for node in ir.load(result.folder / "model.onnx").graph]


def test_grids_that_a_matrix_product_came_with_are_not_smoothed_away(tmp_path: Path) -> None:
    data = {"x": normal(40, 4, 8, 8) * np.geomspace(1, 100, 8, dtype=np.float32)}
    edgekit.compress(save(with_scales("MatMul", (8, 6), 1), tmp_path), tmp_path / "out", calibration=data)
    model = load_annotated(tmp_path / "out" / "model.onnx")
    product = next(node for node in model.graph if node.op_type == "MatMul")
    assert [params.fixed for value in product.inputs if (params := get_params(value)) is not None] == [True, True]


def test_a_scale_for_each_channel_of_an_activation_is_refused(tmp_path: Path) -> None:
    model = with_scales("Conv", (8, 4, 3, 3), 0, inputs=4)
    edgekit.compress(save(model, tmp_path), tmp_path / "out", calibration={"x": normal(40, 4, 8, 8)})
    for target in RUNTIMES:
        with pytest.raises(
            GraphError, match=rf"tensor 'x' .* target '{target}': .* per channel of axis 1 .* per tensor"
        ):
            edgekit.export(tmp_path / "out", [target], tune_placement=False)
        assert not (tmp_path / "out" / target).exists()


# The user's metric.

METRICS = """
import itertools, numpy as np
count = itertools.count()
def raises(run): return run({"image": np.zeros((1, 1, 8, 8), np.float32)})["scores"].mean()
def nan(run): return float("nan")
def words(run): return "very good"
def several(run): return np.array([0.5, 0.6])
def later(run): return 0.5 if next(count) == 0 else float("nan")
def dice(run): return 0.5 + 0.01 * next(count)
"""
COMPLAINTS = {
    "raises": r"--evaluate raises raised KeyError: 'scores' \(quality\.py, line 4\)",
    "nan": r"--evaluate nan returned nan; it must return a finite number",
    "words": r"--evaluate words returned 'very good'; it must return one number, higher is better",
    "several": r"--evaluate several returned array\(\[0\.5, 0\.6\]\); it must return one number, higher is better",
    "later": r"--evaluate later returned nan; it must return a finite number",
}


@pytest.fixture
def quality(tmp_path: Path) -> str:
    (tmp_path / "quality.py").write_text(METRICS)
    return str(tmp_path / "quality.py")


@pytest.mark.parametrize("name", COMPLAINTS)
def test_a_metric_that_fails_leaves_all_as_it_was(
    name: str, quality: str, tiny: TinyFiles, compressed: Path, tmp_path: Path, cli: Cli, snapshot: Snapshot
) -> None:
    before = snapshot(compressed)
    for out in (compressed, tmp_path / "new"):
        (tmp_path / "quality.py").write_text(f"{METRICS}# {out}\n")  # a file that was edited is loaded again
        done = cli("compress", tiny.model, "-o", out, "--calibration", tiny.data, "--evaluate", f"{quality}:{name}")
        assert (done.code, done.stdout) == (4, "")
        assert re.fullmatch(rf"edgekit: {COMPLAINTS[name]}\n", done.stderr)
    assert snapshot(compressed) == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["raises", "nan"])
def test_a_metric_that_fails_in_export_leaves_the_previous_export(
    name: str, quality: str, exported: Path, plugin: Path, cli: Cli, snapshot: Snapshot
) -> None:
    before = snapshot(exported)
    done = cli("export", exported, "--target", plugin / "numpy.toml", "--evaluate", f"{quality}:{name}")
    assert (done.code, done.stdout) == (4, "")
    assert re.fullmatch(rf"edgekit: {COMPLAINTS[name]}\n", done.stderr)
    assert snapshot(exported) == before


def test_a_metric_that_changes_its_answer_is_told(quality: str, tiny: TinyFiles, tmp_path: Path, cli: Cli) -> None:
    arguments = ["--calibration", tiny.data, "--evaluate", f"{quality}:dice", "--max-drop", "0.1"]
    done = cli("compress", tiny.model, "-o", tmp_path / "out", *arguments)
    assert done.code == 0
    assert re.search(
        r"note: --evaluate dice gave 0\.\d+ and then 0\.\d+ for the same float model, so .* make it deterministic",
        done.stdout,
    )


def test_a_metric_that_keeps_to_its_answer_is_not_complained_about(tiny: TinyFiles, tmp_path: Path) -> None:
    record = edgekit.compress(tiny.model, tmp_path, calibration=tiny.data, evaluate=tiny.data, max_drop=20).record
    assert not [note for note in record.notes if "deterministic" in note]
