"""External data of ONNX files: read from beside the model only, wherever a tensor stands, and all of it is there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import edgekit
from edgekit.errors import SourceError
from edgekit.graph.io import load_onnx
from graphs import GraphBuilder


def external(folder: Path, place: str, **said: object) -> Path:
    """A model with its weight in `w.data`, but for what is `said`; as an initializer, or as a constant in a node or function."""
    folder.mkdir()
    array = np.arange(12, dtype=np.float32).reshape(4, 3)
    (folder / "w.data").write_bytes(array.tobytes())
    tensor = numpy_helper.from_array(array, "w")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": "w.data", "offset": 0, "length": 48, **said}.items():
        tensor.external_data.add(key=key, value=str(value))
    b = GraphBuilder()
    x = b.input("x", ["n", 4])
    constant = helper.make_node("Constant", [], ["w"], "constant", value=tensor)
    product = helper.make_node("MatMul", [x, "w"], ["y"], "product")
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("my", 1)]
    function = helper.make_function("my", "Product", [x], ["y"], [constant, product], opsets)
    nodes = {
        "initializer": [product],
        "node": [constant, product],
        "function": [helper.make_node("Product", [x], ["y"], "call", domain="my")],
    }[place]
    graph = helper.make_graph(
        nodes, "g", b.inputs, [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 3])]
    )
    graph.initializer.extend([tensor] if place == "initializer" else [])
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    model.functions.extend([function] if place == "function" else [])
    (folder / "net.onnx").write_bytes(model.SerializeToString())
    return folder / "net.onnx"


PLACES = pytest.mark.parametrize("place", ["initializer", "node", "function"])


@PLACES
def test_external_data_beside_the_model_is_read_from_any_folder(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = external(tmp_path / "model", place)
    monkeypatch.chdir(path.parent)
    data = {"x": np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)}
    assert edgekit.compress("net.onnx", tmp_path / "out", calibration=data).model.is_file()


@PLACES
@pytest.mark.parametrize("location", ["../secret", "{absolute}", "link", "folder/../../secret", "chain"])
def test_external_data_outside_is_never_read(
    place: str, location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret").write_bytes(bytes(48))
    path = external(tmp_path / "model", place, location=location.format(absolute=tmp_path / "secret"))
    (path.parent / "link").symlink_to(tmp_path / "secret")
    (path.parent / "chain").symlink_to(path.parent / "link")
    (path.parent / "folder").mkdir()
    monkeypatch.chdir(path.parent)
    for source in (
        path,
        Path("net.onnx"),
    ):  # beside the working folder, onnx_ir itself would not look where a path leads
        with pytest.raises(SourceError, match=r"net\.onnx: tensor 'w' is stored outside the model's folder"):
            load_onnx(source)
        with pytest.raises(SourceError, match="could read any file"):
            edgekit.compress(source, tmp_path / "out", calibration={"x": np.zeros((4, 4), np.float32)})
    assert not (tmp_path / "out").exists()


@PLACES
@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"location": "missing.data"}, "needs 48 bytes of 'missing.data', found no such file"),
        ({"location": ""}, "found no such file"),
        ({"location": "."}, "found no such file"),
        ({"location": "x" * 5000}, "cannot be looked up"),
        ({"location": "a\0b"}, "cannot be looked up"),
        ({"location": "loop"}, "cannot be looked up|no such file"),
        ({"offset": 4}, "needs 52 bytes of 'w.data', found 48 bytes"),
        ({"offset": 2**62}, "bytes of 'w.data', found 48 bytes"),
        ({"offset": -4}, "has 48 bytes from byte -4 on"),
        ({"offset": "four"}, "cannot be looked up"),
        ({"length": 44}, "has 44 bytes from byte 0 on in 'w.data'; expected 48 bytes"),
        ({"length": 2**62}, "expected 48 bytes"),
        ({"length": -48}, "has -48 bytes"),
    ],
)
def test_external_data_that_is_not_there_is_named(
    place: str, said: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = external(tmp_path / "model", place, **said)
    (path.parent / "loop").symlink_to(path.parent / "loop")
    with pytest.raises(SourceError, match=rf"net\.onnx: tensor 'w' .*({message})"):
        load_onnx(path)
