"""Tensor quant attributes: into the ONNX standard's field, and back exactly."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import GraphError
from edgekit.graph.annotations import (
    all_values,
    annotated_values,
    attach,
    detach,
    get_params,
    get_wish,
    set_params,
    set_wish,
)
from edgekit.graph.io import load_annotated, load_onnx, save_annotated, save_onnx
from edgekit.passes.simplify import simplify
from edgekit.quant.spec import INTEGER_RANGES, QuantParams, QuantSpec
from graphs import GraphBuilder, initializers, normal, op_types, run

FEEDS = {"x": normal(2, 3, 8, 8)}
GRID = QuantParams("uint8", np.array(0.05, np.float32), np.array(128), observer="minmax", low=-6.4, high=6.35)


def network() -> ir.Model:
    """Six values of four kinds: an input, three initializers (one of them an output too), two node outputs."""
    b = GraphBuilder()
    y = b.op("Relu", [b.conv(b.input("x", ["N", 3, 8, 8]), "conv", 3, 4)], "relu")
    return simplify(b.model(y, b.op("Identity", [b.constant("table", np.float32([1, 2, 3]))], "copy")))


VALUES = ["x", "conv.bias", "conv.weight", "copy_y", "conv_y", "relu_y"]
CHANNELS = {
    "x": (1, 3),
    "conv.weight": (0, 4),
    "conv_y": (1, 4),
    "relu_y": (1, 4),
    "copy_y": (0, 3),
    "conv.bias": (0, 4),
}


def annotated(**grids: QuantParams) -> ir.Model:
    model = network()
    for value in all_values(model.graph):
        if value.name in grids:
            set_params(value, grids[value.name])
    return model


def grids(model: ir.Model) -> dict[str, QuantParams]:
    return {value.name or "": params for value in all_values(model.graph) if (params := get_params(value)) is not None}


@st.composite
def params_for(draw: st.DrawFn, value: str) -> QuantParams:
    """Any grid that a tensor may have."""
    dtype = draw(st.sampled_from(sorted(INTEGER_RANGES)))
    axis, channels = CHANNELS[value]
    per_channel = draw(st.booleans())
    shape = (draw(st.sampled_from([channels, 1])),) if per_channel else ()
    count = shape[0] if shape else 1
    scales = draw(st.lists(st.floats(2.0**-126, 2.0**100, width=32), min_size=count, max_size=count))
    qmin, qmax = INTEGER_RANGES[dtype]
    zero_points = draw(st.lists(st.integers(qmin, qmax), min_size=count, max_size=count))
    finite = st.floats(allow_nan=False, allow_infinity=False)
    low, high = draw(st.one_of(st.just((float("nan"), float("nan"))), st.tuples(finite, finite)))
    return QuantParams(
        dtype=dtype,
        scale=np.float32(scales).reshape(shape),
        zero_point=np.int64(zero_points).reshape(shape),
        axis=axis if per_channel else None,
        narrow_range=draw(st.booleans()),
        observer=draw(st.sampled_from(["", "minmax", "kld", 'an "odd" näme'])),
        low=low,
        high=high,
        fixed=draw(st.booleans()),
    )


@settings(max_examples=150, deadline=None)
@given(data=st.data(), names=st.sets(st.sampled_from(VALUES), min_size=1))
def test_attributes_come_back_from_the_bytes_of_a_file_as_they_were(data: st.DataObject, names: set[str]) -> None:
    wanted = {name: data.draw(params_for(name), label=name) for name in sorted(names)}
    model = annotated(**wanted)
    proto = ir.to_proto(detach(model)).SerializeToString(deterministic=True)
    again = attach(ir.from_proto(onnx.load_from_string(proto)))
    assert grids(again) == wanted
    assert initializers(again) == initializers(model)
    assert ir.to_proto(detach(again)).SerializeToString(deterministic=True) == proto


def test_two_saves_are_equal_bytes_and_so_is_a_save_of_what_was_loaded(tmp_path: Path) -> None:
    model = annotated(x=GRID, relu_y=GRID)
    save_annotated(model, tmp_path / "a.onnx")
    save_annotated(model.clone(), tmp_path / "b.onnx")
    save_annotated(load_annotated(tmp_path / "a.onnx"), tmp_path / "c.onnx")
    assert len({(tmp_path / f"{name}.onnx").read_bytes() for name in "abc"}) == 1


def test_the_file_is_standard_onnx_and_computes_what_the_float_model_does(tmp_path: Path) -> None:
    weight = QuantParams("int4", np.float32([0.1, 0.2, 0.3, 0.4]), np.int64([0, 1, -8, 7]), axis=0, narrow_range=True)
    save_annotated(annotated(x=GRID, conv_y=GRID, **{"conv.weight": weight}), tmp_path / "m.onnx")
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)
    graph = onnx.load(tmp_path / "m.onnx").graph
    found = {
        a.tensor_name: {e.key: e.value for e in a.quant_parameter_tensor_names} for a in graph.quantization_annotation
    }
    assert found == {
        name: {"SCALE_TENSOR": f"{name}_scale", "ZERO_POINT_TENSOR": f"{name}_zero_point"}
        for name in ("x", "conv.weight", "conv_y")
    }
    stored = {tensor.name: tensor for tensor in graph.initializer}
    assert stored["conv.weight_zero_point"].data_type == onnx.TensorProto.INT4
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(stored["conv.weight_scale"]), weight.scale)
    expected, ran = run(network(), FEEDS), run(tmp_path / "m.onnx", FEEDS, optimize=True)
    assert list(ran) == list(expected)
    np.testing.assert_allclose(ran["relu_y"], expected["relu_y"], rtol=0, atol=1e-6)


def test_the_observed_range_and_the_origin_are_in_the_metadata(tmp_path: Path) -> None:
    save_annotated(annotated(conv_y=GRID), tmp_path / "m.onnx")
    (info,) = [info for info in onnx.load(tmp_path / "m.onnx").graph.value_info if info.name == "conv_y"]
    (entry,) = info.metadata_props
    assert (entry.key, json.loads(entry.value)) == (
        "edgekit.quant",
        {"dtype": "uint8", "observer": "minmax", "range": [-6.4, 6.35]},
    )


def test_a_name_that_is_taken_is_not_overwritten(tmp_path: Path) -> None:
    b = GraphBuilder()
    x = b.input("x", ["N", 3])
    y = b.op("Mul", [x, b.constant("x_scale", np.float32(7))], "mul")
    model = b.model(y)
    set_params(model.graph.inputs[0], GRID)
    save_annotated(model, tmp_path / "m.onnx")
    np.testing.assert_array_equal(run(tmp_path / "m.onnx", {"x": normal(2, 3)})[y], normal(2, 3) * np.float32(7))
    assert grids(load_annotated(tmp_path / "m.onnx")) == {"x": GRID}
    assert list(load_annotated(tmp_path / "m.onnx").graph.initializers) == ["x_scale"]


def test_one_grid_on_many_values_is_stored_for_each_and_renaming_is_free() -> None:
    model = annotated(**dict.fromkeys(VALUES, GRID))
    for value in all_values(model.graph):
        value.name = f"new_{value.name}"
    again = attach(ir.from_proto(ir.to_proto(detach(model))))
    assert grids(again) == {f"new_{name}": GRID for name in VALUES}


def test_detach_and_attach_leave_their_argument_alone() -> None:
    model = annotated(x=GRID)
    stored = detach(model)
    assert grids(model) == {"x": GRID} and grids(stored) == {}
    attach(stored)
    assert grids(attach(stored)) == {"x": GRID}, "attaching twice works, because nothing was taken from the argument"
    assert op_types(model) == op_types(stored)


def test_annotations_that_nobody_read_do_not_dangle_in_the_next_file(tmp_path: Path) -> None:
    save_annotated(annotated(x=GRID, conv_y=GRID), tmp_path / "m.onnx")
    raw = simplify(load_onnx(tmp_path / "m.onnx"))  # removes the scales: no node reads them
    set_params(raw.graph.inputs[0], GRID)
    save_annotated(raw, tmp_path / "n.onnx")
    assert grids(load_annotated(tmp_path / "n.onnx")) == {"x": GRID}


def edited(tmp_path: Path, *, scale: object = None, zero_point: object = None) -> Path:
    """The saved file with other tensors in its annotation; None drops the tensor."""
    save_annotated(annotated(x=GRID), tmp_path / "m.onnx")
    proto = onnx.load(tmp_path / "m.onnx")
    kept = [tensor for tensor in proto.graph.initializer if not tensor.name.startswith("x_")]
    for name, array in (("x_scale", scale), ("x_zero_point", zero_point)):
        if array is not None:
            kept.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    path = tmp_path / "edited.onnx"
    onnx.save(proto, path)
    return path


def test_an_annotation_whose_tensor_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="tensor 'x': its quantization annotation names SCALE_TENSOR 'x_scale'"):
        load_annotated(edited(tmp_path, zero_point=np.uint8(0)))
    with pytest.raises(GraphError, match="names ZERO_POINT_TENSOR 'x_zero_point', which is not in the file"):
        load_annotated(edited(tmp_path, scale=np.float32(1)))


@pytest.mark.parametrize(
    ("scale", "zero_point"),
    [
        (np.float32(0), np.uint8(0)),
        (np.float32(-1), np.uint8(0)),
        (np.float32(np.nan), np.uint8(0)),
        (np.float32(np.inf), np.uint8(0)),
        (np.float32([1, 2]), np.uint8([0])),
        (np.float32([[1, 2]]), np.uint8([[0, 0]])),
        (np.float32(1), np.float32(0)),
    ],
)
def test_an_annotation_that_is_no_grid_is_refused(tmp_path: Path, scale: object, zero_point: object) -> None:
    with pytest.raises(GraphError, match="tensor 'x': its quantization annotation is no grid"):
        load_annotated(edited(tmp_path, scale=scale, zero_point=zero_point))


def test_another_tools_annotation_is_a_fixed_grid_of_its_zero_points_type() -> None:
    proto = ir.to_proto(detach(annotated(x=GRID)))
    del proto.graph.input[0].metadata_props[:]
    (params,) = grids(attach(ir.from_proto(proto))).values()
    assert (params.dtype, params.fixed, params.observer) == ("uint8", True, "")
    assert np.isnan(params.low) and params.scale == GRID.scale and params.zero_point == 128


def test_wishes_and_attributes_live_on_values_and_survive_a_clone() -> None:
    model = annotated(x=GRID)
    value, spec = model.graph.inputs[0], QuantSpec("int8", symmetric=True)
    assert get_wish(value) is None and get_params(None) is None
    set_wish(value, spec, 1)
    copy = model.clone().graph.inputs[0]
    assert get_wish(copy) == (spec, 1) and get_params(copy) == GRID
    set_params(copy, None)
    assert get_params(copy) is None and get_params(value) == GRID
    assert [value.name for value in annotated_values(model.graph)] == ["x"]


def test_values_come_once_in_graph_order() -> None:
    assert [value.name for value in all_values(network().graph)] == [
        "x", "conv.weight", "conv.bias", "copy_y", "conv_y", "relu_y",
    ]  # fmt: skip


def test_big_models_keep_their_annotations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgekit.graph import io

    monkeypatch.setattr(io, "EXTERNAL_DATA_LIMIT", 100)
    model = annotated(x=GRID, relu_y=GRID)
    save_annotated(model, tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx.data").is_file()
    assert grids(load_annotated(tmp_path / "m.onnx")) == {"x": GRID, "relu_y": GRID}
    save_onnx(model, tmp_path / "plain.onnx")
    assert not onnx.load(tmp_path / "plain.onnx").graph.quantization_annotation
