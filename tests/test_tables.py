"""Embedding tables as codes: what is looked up equals the grid, the file shrinks, and the table is never made floats as a whole."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto

from edgekit.backend import Backend
from edgekit.graph.annotations import annotated_values, get_params, set_params
from edgekit.lowering.qdq import lower_qdq
from edgekit.quant.spec import QuantSpec
from edgekit.quant.weight_ranges import weight_range
from edgekit.target import load_target
from edgekit_onnxruntime import OnnxRuntimeBackend
from edgekit_openvino import OpenVinoBackend
from edgekit_tensorrt import TensorRtBackend
from graphs import Array
from networks import Net, compiled, get_params_of, simulate, text, worst
from weight_graphs import artifact_of, changed_params, compressed, numbers, on_grids, size_of

RUNTIMES: dict[str, Backend] = {"x86-onnxruntime": OnnxRuntimeBackend(), "x86-openvino": OpenVinoBackend()}
SUMS = 1e-5
ROWS, COLUMNS = 1024, 64


def sentence(*, batch: int | str = "n", length: int | str = "s") -> ir.Model:
    """Words and their kinds, both looked up; the table of kinds is too small to be worth a node."""
    net = Net(seed=11)
    words, kinds = (net.input(name, [batch, length], TensorProto.INT64) for name in ("words", "kinds"))
    spread = net.rng.uniform(0.1, 3, COLUMNS) * net.rng.uniform(0.5, 2, (ROWS, 1))
    table = net.constant("words.table", (net.rng.normal(0, 1, (ROWS, COLUMNS)) * spread).astype(np.float32))
    x = net.op("Gather", [table, words], "look_up")
    y = net.op("Gather", [net.weight("kinds.table", 2, COLUMNS), kinds], "look_up_kind")
    return net.model(net.op("Add", [x, y], "add"))


def feeds(count: int, length: int) -> dict[str, Array]:
    rng = np.random.default_rng(count)
    return {"words": rng.integers(-ROWS, ROWS, (count, length)), "kinds": rng.integers(0, 2, (count, length))}


def per_row(model: ir.Model) -> ir.Model:
    """The same, with one scale for each row of the table."""
    model = model.clone()
    (table,) = annotated_values(model.graph)
    set_params(table, weight_range(numbers(table), QuantSpec("int8", symmetric=True, per_channel=True), axis=0))
    return model


@pytest.mark.parametrize("rows", [False, True], ids=["columns", "rows"])
@pytest.mark.parametrize("name", RUNTIMES)
def test_a_runtime_looks_up_codes_and_makes_floats_of_what_it_found(name: str, rows: bool, tmp_path: Path) -> None:
    backend, target, model = RUNTIMES[name], load_target(name), compressed(sentence(), tmp_path)
    model = per_row(model) if rows else model
    lowered = backend.lower(model, target, keep_float=frozenset())
    (gather,) = (node for node in lowered.graph if node.name == "look_up")
    assert (
        gather.inputs[0] is not None
        and gather.inputs[0].dtype == ir.DataType.INT8
        and gather.inputs[0].is_initializer()
    )
    runtime = compiled(lowered, backend, target, tmp_path)
    for count, length in ((1, 1), (2, 7)):
        found = runtime.run(feeds(count, length))
        assert worst(found, simulate(on_grids(model), feeds(count, length))) < SUMS
        assert worst(found, simulate(sentence(), feeds(count, length))) > SUMS
    floats = size_of(artifact_of(sentence(), backend, target, tmp_path))
    assert size_of(artifact_of(lowered, backend, target, tmp_path)) < 0.4 * floats


def test_the_rest_of_the_graph_reads_the_same_names(tmp_path: Path) -> None:
    lines = text(lower_qdq(compressed(sentence(), tmp_path), load_target("x86-onnxruntime")))
    assert "look_up_kind_y = Gather(kinds.table, kinds)" in lines
    assert lines[-2:] == ["add_y = Add(look_up_y, look_up_kind_y)", "return add_y"]


@pytest.mark.parametrize("target", ["x86-openvino", "cuda-tensorrt"])
def test_a_table_kept_in_float_is_float(target: str, tmp_path: Path) -> None:
    lowered = lower_qdq(compressed(sentence(), tmp_path), load_target(target), keep_float=frozenset({"look_up"}))
    assert text(lowered) == text(sentence())


def test_chosen_codes_are_stored(tmp_path: Path) -> None:
    codes = np.full((ROWS, COLUMNS), 5, np.int8)
    model = changed_params(compressed(sentence(), tmp_path), "words.table", codes=codes)
    lowered = lower_qdq(model, load_target("x86-onnxruntime"))
    assert worst(simulate(lowered, feeds(2, 3)), simulate(on_grids(model), feeds(2, 3))) < SUMS


def test_a_grid_that_is_not_symmetric_leaves_the_table_in_float(tmp_path: Path) -> None:
    model = compressed(sentence(), tmp_path)
    params = get_params_of(model, "words.table")
    model = changed_params(model, "words.table", zero_point=np.full_like(params.zero_point, 3))
    assert text(lower_qdq(model, load_target("x86-onnxruntime"))) == text(sentence())
    assert get_params(model.graph.initializers["words.table"]) is not None


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")
def test_tensorrt_makes_one_kernel_of_dequantize_linear_and_look_up(tmp_path: Path) -> None:
    backend, target = TensorRtBackend(), load_target("cuda-tensorrt")
    model = compressed(sentence(batch=2, length=7), tmp_path)
    lowered = backend.lower(model, target, keep_float=frozenset())
    assert backend.check(lowered, target) == []
    kernels = backend.planned_kernels(artifact_of(lowered, backend, target, tmp_path))
    assert any({"look_up", "words.table/DequantizeLinear"} <= set(kernel.layers) for kernel in kernels)
    assert worst(simulate(lowered, feeds(2, 7)), simulate(on_grids(model), feeds(2, 7))) < 2e-3  # float16
