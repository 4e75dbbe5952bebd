"""Reading and writing ONNX files, running them as a reference, and proofs of equality."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

import edgekit
from edgekit.errors import GraphError, OutputError, SourceError
from edgekit.graph import io
from edgekit.graph.equal import FREE_DIMENSION, difference, prove_equal, random_feeds
from edgekit.graph.io import load_annotated, load_onnx, save_annotated, save_onnx
from edgekit.graph.run import Session
from edgekit.passes.simplify import simplify
from edgekit.passes.upgrade_opset import upgrade_opset
from graphs import GraphBuilder, normal, run

FEEDS = {"x": normal(2, 3, 8, 8)}


def network(c_out: int = 4) -> GraphBuilder:
    b = GraphBuilder()
    b.op("Relu", [b.conv(b.input("x", ["N", 3, 8, 8]), "conv", 3, c_out)], "relu")
    return b


def save_external(path: Path, threshold: int = 0) -> None:
    onnx.save(
        network().proto("relu_y"),
        path,
        save_as_external_data=True,
        location=f"{path.stem}.data",
        size_threshold=threshold,
    )


def test_saving_and_loading_keeps_the_model_and_two_saves_are_equal_bytes(tmp_path: Path) -> None:
    model = network().model("relu_y")
    save_onnx(model, tmp_path / "a.onnx")
    save_onnx(load_onnx(tmp_path / "a.onnx"), tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    np.testing.assert_array_equal(run(tmp_path / "a.onnx", FEEDS)["relu_y"], run(model, FEEDS)["relu_y"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.onnx", "b.onnx"]


@pytest.mark.parametrize("threshold", [0, 64])
def test_a_model_with_external_weights_runs_and_is_saved_elsewhere_as_one_file(tmp_path: Path, threshold: int) -> None:
    save_external(tmp_path / "m.onnx", threshold)
    expected = run(tmp_path / "m.onnx", FEEDS)["relu_y"]
    model = load_onnx(tmp_path / "m.onnx")
    np.testing.assert_array_equal(Session(model, optimize=False).run(FEEDS)["relu_y"], expected)
    (tmp_path / "other").mkdir()
    save_onnx(model, tmp_path / "other" / "m.onnx")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["m.onnx"]
    np.testing.assert_array_equal(run(tmp_path / "other" / "m.onnx", FEEDS)["relu_y"], expected)
    assert isinstance(model.graph.initializers["conv.weight"].const_value, ir.ExternalTensor), "still not in memory"


def test_over_the_protobuf_limit_weights_go_beside_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(network(16).proto("relu_y"), FEEDS)["relu_y"]
    monkeypatch.setattr(io, "EXTERNAL_DATA_LIMIT", 1000)
    model = simplify(upgrade_opset(network(16).model("relu_y"), opset=21))
    files = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        save_annotated(model, tmp_path / name / "m.onnx")
        files.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert files[0] == files[1]
    assert set(files[0]) == {"m.onnx", "m.onnx.data"}
    assert len(files[0]["m.onnx"]) < 1000 < len(files[0]["m.onnx.data"])
    np.testing.assert_array_equal(run(tmp_path / "first" / "m.onnx", FEEDS)["relu_y"], expected)
    again = load_annotated(tmp_path / "first" / "m.onnx")
    np.testing.assert_array_equal(Session(again, optimize=False).run(FEEDS)["relu_y"], expected)
    prove_equal(tmp_path / "first" / "m.onnx", again, FEEDS)


def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    model = network().model("relu_y")
    save_onnx(model, tmp_path / "m.onnx")
    before = (tmp_path / "m.onnx").read_bytes()
    (tmp_path / ".m.onnx.partial").mkdir()  # what the file is written to first cannot be written
    with pytest.raises(OutputError, match=r"m\.onnx: cannot be written"):
        save_onnx(model, tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_bytes() == before
    with pytest.raises(OutputError, match="choose another output folder"):
        save_onnx(model, tmp_path / "missing" / "m.onnx")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "holds no ONNX graph"),
        (b"\x00\x01not an onnx file at all", "not a readable ONNX file|cannot be read as ONNX"),
    ],
)
def test_what_is_no_onnx_file_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(SourceError, match=message):
        load_onnx(tmp_path / "m.onnx")


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9, 0.99])
def test_truncated_files_are_refused(tmp_path: Path, kept: float) -> None:
    data = network().proto("relu_y").SerializeToString()
    (tmp_path / "m.onnx").write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(SourceError, match=r"m\.onnx"):
        load_onnx(tmp_path / "m.onnx")


def test_missing_and_short_data_files_are_named(tmp_path: Path) -> None:
    save_external(tmp_path / "m.onnx")
    data = tmp_path / "m.data"
    size = data.stat().st_size
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(
        SourceError, match=rf"tensor 'conv\.bias' needs {size} bytes of 'm\.data', found {size - 1} bytes"
    ):
        load_onnx(tmp_path / "m.onnx")
    data.unlink()
    with pytest.raises(SourceError, match="found no such file"):
        load_onnx(tmp_path / "m.onnx")


@pytest.mark.parametrize("trick", ["path", "symlink", "hardlink"])
def test_data_from_outside_the_models_folder_is_refused(tmp_path: Path, trick: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_external(folder / "m.onnx")
    secret = tmp_path / "secret"
    (folder / "m.data").rename(secret)
    if trick == "path":
        proto = onnx.load(folder / "m.onnx", load_external_data=False)
        for tensor in proto.graph.initializer:
            tensor.external_data[0].value = "../secret"
        (folder / "m.onnx").write_bytes(proto.SerializeToString())
    elif trick == "symlink":
        (folder / "m.data").symlink_to(secret)
    else:
        os.link(secret, folder / "m.data")
    with pytest.raises(SourceError, match=r"outside|copy the model and its data file into one folder"):
        load_onnx(folder / "m.onnx")


def test_what_onnx_runtime_refuses_is_told_in_its_words() -> None:
    b = GraphBuilder()
    nonsense = b.proto(b.op("NoSuchOperator", [b.input("x", [1])]))
    with pytest.raises(GraphError, match=r"ONNX Runtime cannot load the model.*NoSuchOperator"):
        Session(ir.from_proto(nonsense), optimize=False)
    session = Session(network().model("relu_y"), optimize=True)
    assert (session.input_names, session.output_names) == (["x"], ["relu_y"])
    with pytest.raises(GraphError, match="cannot run the model"):
        session.run({"x": normal(2, 4, 8, 8)})


def test_a_proof_finds_the_first_node_that_differs(tmp_path: Path) -> None:
    b = network()
    y = b.op("Neg", ["relu_y"], "neg")
    before = b.model(b.op("Add", [y, "relu_y"], "add"), y)
    save_onnx(before, tmp_path / "before.onnx")
    prove_equal(before, before.clone(), FEEDS)
    after = before.clone()
    next(node for node in after.graph if node.name == "neg").op_type = "Exp"
    for source in (before, tmp_path / "before.onnx"):
        with pytest.raises(
            GraphError, match=r"output 'add_y' is off by up to .* first node that differs is 'neg' \(Exp\)"
        ):
            prove_equal(source, after, FEEDS)


def test_a_proof_misses_no_output() -> None:
    b = network()
    before = b.model("relu_y", "conv_y")
    after = b.model("relu_y")
    with pytest.raises(GraphError, match="output 'conv_y' is gone"):
        prove_equal(before, after, FEEDS)


@pytest.mark.parametrize(
    ("expected", "found", "words"),
    [
        (np.float32([1, 100]), np.float32([1.009, 100]), ""),
        (np.float32([1, 100]), np.float32([1.011, 100]), "off by up to 0.011"),
        (np.float32([0, 0]), np.float32([0, 1e-30]), "off by"),
        (np.float16([1, 100]), np.float16([1.9, 100]), ""),
        (np.float32([np.nan, np.inf, 1]), np.float32([np.nan, np.inf, 1]), ""),
        (np.float32([np.nan, 1]), np.float32([1, np.nan]), "NaN or infinite at other places"),
        (np.float32([np.inf, 1]), np.float32([-np.inf, 1]), "NaN or infinite at other places"),
        (np.float32([1, 2]), np.float32([1, np.inf]), "NaN or infinite at other places"),
        (np.int64([1, 10**9]), np.int64([1, 10**9 + 1]), "differs in 1 of 2 elements"),
        (np.float32([[1]]), np.float32([1]), r"shape \(1, 1\) and is float32 of shape \(1,\)"),
        (np.float32([1]), np.float64([1]), "was float32"),
        (np.zeros((0, 3), np.float32), np.zeros((0, 3), np.float32), ""),
        (np.array([True]), np.array([False]), "differs in 1"),
    ],
)
def test_what_counts_as_a_difference(expected: object, found: object, words: str) -> None:
    import re

    said = difference(np.asarray(expected), np.asarray(found))
    assert re.search(words, said) if words else said == ""


def test_random_feeds_fit_the_inputs_and_repeat() -> None:
    b = GraphBuilder(ir_version=3)
    b.input("image", ["N", 3, 8, "W"])
    b.input("ids", ["N", "T"], TensorProto.INT64)
    b.input("mask", [4, "N"], TensorProto.BOOL)
    b.input("half", [4], TensorProto.FLOAT16)
    b.input("scalar", [])
    b.weight("w", 3)
    feeds = random_feeds(b.model().graph.inputs, batch=5)
    assert {name: (array.shape, array.dtype.name) for name, array in feeds.items()} == {
        "image": ((5, 3, 8, FREE_DIMENSION), "float32"),
        "ids": ((5, FREE_DIMENSION), "int64"),
        "mask": ((4, 5), "bool"),
        "half": ((4,), "float16"),
        "scalar": ((), "float32"),
    }
    assert set(np.unique(feeds["ids"])) == {0, 1}
    again = random_feeds(b.model().graph.inputs, batch=5)
    assert all(np.array_equal(feeds[name], again[name]) for name in feeds)
    other = random_feeds(b.model().graph.inputs, batch=5, seed=1)
    assert not np.array_equal(feeds["image"], other["image"])


@pytest.mark.parametrize(("dtype", "shape"), [(TensorProto.STRING, [2]), (TensorProto.FLOAT, None)])
def test_inputs_without_random_numbers_are_named(dtype: int, shape: list[int] | None) -> None:
    b = GraphBuilder()
    b.inputs.append(helper.make_tensor_value_info("text", dtype, shape))
    with pytest.raises(GraphError, match="input 'text'"):
        random_feeds(b.model().graph.inputs)


@pytest.mark.parametrize("batch", [-1, "?"])
def test_sizes_that_are_written_as_unknown_are_open_and_not_all_the_same(batch: int | str, tmp_path: Path) -> None:
    build = GraphBuilder(opset=17)
    x = build.input("x", [batch, 3, "?", "?"])
    proto = build.proto(build.op("GlobalAveragePool", [build.conv(x, "a", 3, 4)], "mean"))
    dims = proto.graph.input[0].type.tensor_type.shape.dim
    if batch == -1:
        dims[0].dim_value = -1
    onnx.save(proto, tmp_path / "net.onnx")
    shape = load_onnx(tmp_path / "net.onnx").graph.inputs[0].shape
    assert shape is not None
    assert [dim if isinstance(dim, int) else dim.value for dim in shape] == [None, 3, None, None]
    data = {"x": normal(24, 3, 8, 12)}
    record = edgekit.compress(tmp_path / "net.onnx", tmp_path / "out", calibration=data).record
    assert record.samples == 18
    [result] = edgekit.export(tmp_path / "out", "x86-onnxruntime")
    assert result.manifest.proof.agrees is True
