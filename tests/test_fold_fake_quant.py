"""Quantize/DequantizeLinear graphs of any origin, folded into attributes; and the pairs put back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from edgekit.errors import GraphError
from edgekit.graph.annotations import all_values, annotated_values, get_params, set_params
from edgekit.graph.rules import quantized_nodes
from edgekit.lowering.qdq import lower_qdq
from edgekit.passes.fold_fake_quant import fold_fake_quant
from edgekit.passes.simplify import simplify
from edgekit.quant.affine import dequantize, fake_quantize, quantize
from edgekit.quant.spec import INTEGER_RANGES, QuantParams
from edgekit.target import Target, load_target, target_names
from graphs import Array, GraphBuilder, initializers, normal, op_types, run
from networks import annotate, mixed_net, residual_net, samples, token_net
from simulation import insert_qdq

DTYPES = [
    dtype for dtype in INTEGER_RANGES if dtype not in ("int32", "int2", "uint2")
]  # opset 21 has no Quantize for these


def grid(dtype: str = "uint8", scale: Any = 0.05, zero_point: Any = 128, **fields: Any) -> QuantParams:
    return QuantParams(dtype, np.asarray(scale, np.float32), np.asarray(zero_point, np.int64), **fields)


def structure(model: ir.Model) -> dict[str, Any]:
    """All that a model is, in comparable form."""
    graph = model.graph
    return {
        "nodes": [
            (
                node.name,
                node.op_type,
                [value.name if value else None for value in node.inputs],
                [value.name for value in node.outputs],
                {key: str(attribute.value) for key, attribute in node.attributes.items()},
                dict(node.metadata_props),
            )
            for node in graph
        ],
        "inputs": [(value.name, str(value.type), str(value.shape)) for value in graph.inputs],
        "outputs": [(value.name, str(value.type), str(value.shape)) for value in graph.outputs],
        "initializers": initializers(model),
        "params": {value.name: get_params(value) for value in annotated_values(graph)},
        "types": {value.name: (str(value.dtype), str(value.shape)) for value in all_values(graph)},
    }


@st.composite
def annotated_graphs(draw: st.DrawFn) -> ir.Model:
    """A random network of 4-channel images, with random grids on random tensors."""
    b = GraphBuilder(seed=draw(st.integers(0, 9)))
    known = [b.input("x", ["N", 4, 6, 6])]
    weights: list[str] = []
    for index in range(draw(st.integers(1, 6))):
        x, other = draw(st.sampled_from(known)), draw(st.sampled_from(known))
        kind = draw(st.sampled_from(["Conv", "shared", "Relu", "Add", "Max", "MaxPool", "Concat"]))
        if kind == "Conv" or (kind == "shared" and not weights):
            known.append(b.conv(x, f"n{index}", 4, 4, bias=draw(st.booleans())))
            weights.append(f"n{index}.weight")
        elif kind == "shared":
            known.append(b.op("Conv", [x, draw(st.sampled_from(weights))], f"n{index}", pads=[1] * 4))
        elif kind == "MaxPool":
            known.append(b.op("MaxPool", [x], f"n{index}", kernel_shape=[3, 3], pads=[1] * 4))
        elif kind == "Concat":
            joined = b.op("Concat", [x, other], f"n{index}.cat", axis=1)
            known.append(b.conv(joined, f"n{index}", 8, 4, kernel=1))
        else:
            known.append(b.op(kind, [x] if kind == "Relu" else [x, other], f"n{index}"))
    read = {name for node in b.nodes for name in node.input}
    outputs = [name for name in known if name not in read or (name != "x" and draw(st.booleans()))]
    model = simplify(b.model(*outputs))
    for value in all_values(model.graph):
        if draw(st.booleans()):
            set_params(value, draw(grids_for(value)))
    return model


@st.composite
def grids_for(draw: st.DrawFn, value: ir.Value) -> QuantParams:
    dtype = draw(st.sampled_from(DTYPES))
    qmin, qmax = INTEGER_RANGES[dtype]
    assert value.shape is not None
    axis = 0 if len(value.shape) == 1 or value.const_value is not None else 1
    channels = value.shape[axis]
    axis_or_none = axis if isinstance(channels, int) and draw(st.booleans()) else None
    shape = () if axis_or_none is None else (channels,)
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    known_range = draw(st.booleans())
    return QuantParams(
        dtype=dtype,
        scale=np.float32(rng.uniform(1e-4, 0.1, shape)),
        zero_point=np.int64(rng.integers(qmin, qmax + 1, shape)),
        axis=axis_or_none,
        narrow_range=draw(st.booleans()),
        observer=draw(st.sampled_from(["", "kld"])),
        low=-1.5 if known_range else float("nan"),
        high=2.5 if known_range else float("nan"),
        fixed=draw(st.booleans()),
    )


@settings(max_examples=150, deadline=None)
@given(model=annotated_graphs())
def test_folding_is_the_inverse_of_inserting(model: ir.Model) -> None:
    before = structure(model)
    inserted = insert_qdq(model)
    assert not annotated_values(inserted.graph)
    assert op_types(inserted).count("QuantizeLinear") == len(before["params"])
    assert structure(fold_fake_quant(inserted)) == before
    assert structure(model) == before, "the arguments are not touched"


@settings(max_examples=25, deadline=None)
@given(model=annotated_graphs())
def test_inserted_pairs_survive_a_file_and_compute_what_edgekits_arithmetic_says(model: ir.Model) -> None:
    proto = ir.to_proto(insert_qdq(model))
    onnx.checker.check_model(proto, full_check=True)
    again = fold_fake_quant(ir.from_proto(onnx.load_from_string(proto.SerializeToString())))
    assert structure(again)["params"] == structure(model)["params"]
    x = normal(2, 4, 6, 6)
    outputs = run(proto, {"x": x})
    first = next(iter(model.graph))
    params = get_params(model.graph.inputs[0])
    if first.op_type == "Relu" and first.outputs[0].name in outputs and get_params(first.outputs[0]) is None:
        seen = fake_quantize(x, params) if params else x
        np.testing.assert_array_equal(outputs[str(first.outputs[0].name)], np.maximum(seen, 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_pair_is_edgekits_fake_quantization(dtype: str, narrow: bool, per_channel: bool) -> None:
    """ONNX knows no narrow range: QuantizeLinear alone would saturate one code lower."""
    b = GraphBuilder()
    model = simplify(b.model(b.op("Identity", [b.op("Neg", [b.input("x", ["N", 4])], "neg")], "y")))
    middle = (sum(INTEGER_RANGES[dtype]) + 1) // 2
    scale, zero = (np.float32([0.1, 0.2, 0.3, 0.4]), np.int64([middle] * 4)) if per_channel else (0.1, middle)
    params = grid(dtype, scale, zero, axis=1 if per_channel else None, narrow_range=narrow)
    set_params(model.graph.outputs[0], params)
    x = (normal(64, 4) * 30000 if "16" in dtype else normal(64, 4) * 50).astype(np.float32)
    np.testing.assert_array_equal(run(insert_qdq(model), {"x": x})["y_y"], fake_quantize(-x, params))


def float_graph(model: ir.Model) -> ir.Model:
    """A folded model without its attributes."""
    bare = model.clone()
    for value in annotated_values(bare.graph):
        set_params(value, None)
    return bare


def constant(value: ir.Value | None) -> Array:
    assert value is not None and value.const_value is not None
    return value.const_value.numpy()


def with_rounded_weights(model: ir.Model, target: Target) -> ir.Model:
    """The annotated model with the weights of what `target` quantizes on their grids."""
    rounded = model.clone()
    for node, parts in quantized_nodes(rounded, target).items():
        weight = node.inputs[parts.weight] if parts.weight is not None else None
        params = get_params(weight)
        if weight is not None and params is not None:
            weight.const_value = ir.tensor(fake_quantize(constant(weight), params), name=weight.name)
    return rounded


NETS = {"residual": residual_net, "mixed": mixed_net, "tokens": token_net}


@pytest.fixture(scope="module")
def nets() -> dict[str, ir.Model]:
    return {name: annotate(build(), count=8) for name, build in NETS.items()}


@pytest.mark.parametrize("target", target_names())
@pytest.mark.parametrize("net", sorted(NETS))
def test_what_edgekit_writes_for_a_target_folds_back(nets: dict[str, ir.Model], target: str, net: str) -> None:
    rules = load_target(target)
    lowered = lower_qdq(nets[net], rules)
    folded = fold_fake_quant(lowered)
    assert not {"QuantizeLinear", "DequantizeLinear"} & set(op_types(folded))
    assert len(annotated_values(folded.graph)) > 3
    written = [constant(node.inputs[1]) for node in lowered.graph if node.op_type == "QuantizeLinear"]
    kept = [
        params.scale
        for value in annotated_values(folded.graph)
        if value.const_value is None and (params := get_params(value))
    ]
    assert set(map(float, written)) == set(map(float, kept))
    if net == "mixed" and rules.quantization.drop_redundant:
        return  # a Clip to 6 that a grid replaces does not come back; a Relu does
    # Weights are the numbers that their codes stand for; the arithmetic between is float.
    feeds = samples(folded, 3, seed=5)
    reference = run(float_graph(with_rounded_weights(nets[net], rules)), feeds)
    for name, array in run(float_graph(folded), feeds).items():
        np.testing.assert_allclose(array, reference[name], rtol=0, atol=2e-5 * float(np.abs(array).max()))


@pytest.mark.parametrize("target", ["arm-onnxruntime", "x86-onnxruntime"])
@pytest.mark.parametrize("net", ["residual", "mixed"])  # LayerNormalization reads a float that has a grid
def test_where_all_readers_read_codes_the_simulation_is_the_lowered_graph(
    nets: dict[str, ir.Model], target: str, net: str
) -> None:
    lowered = lower_qdq(nets[net], load_target(target))
    feeds = samples(lowered, 3, seed=6)
    expected, found = run(lowered, feeds), run(insert_qdq(fold_fake_quant(lowered)), feeds)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def quantized_by_onnxruntime(folder: Path, **options: Any) -> onnx.ModelProto:
    from onnxruntime import quantization

    b = GraphBuilder()
    x = b.op("Relu", [b.conv(b.input("x", ["N", 3, 8, 8]), "a", 3, 8)], "a.relu")
    x = b.op("Relu", [b.op("Add", [b.conv(x, "b", 8, 8), x], "add")], "add.relu")
    x = b.op(
        "Concat",
        [b.op("MaxPool", [x], "max", kernel_shape=[2, 2], strides=[2, 2]), b.conv(x, "c", 8, 8, strides=[2, 2])],
        axis=1,
    )
    x = b.op("Flatten", [b.op("GlobalAveragePool", [x], "pool")], "flat")
    onnx.save(
        b.proto(b.op("Gemm", [x, b.weight("w", 10, 16), b.weight("bias", 10)], "fc", transB=1)), folder / "float.onnx"
    )

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter([{"x": normal(4, 3, 8, 8, seed=seed)} for seed in range(2)])

        def get_next(self) -> dict[str, Array] | None:
            return next(self.batches, None)

    quantization.quantize_static(
        folder / "float.onnx", folder / "int8.onnx", Reader(), quant_format=quantization.QuantFormat.QDQ, **options
    )
    return onnx.load(folder / "int8.onnx")


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("activation", ["QUInt8", "QInt8"])
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_onnx_runtimes_quantizer_writes_folds_and_computes_the_same(
    tmp_path: Path, per_channel: bool, activation: str
) -> None:
    from onnxruntime.quantization import QuantType

    proto = quantized_by_onnxruntime(tmp_path, per_channel=per_channel, activation_type=QuantType[activation])
    source = ir.from_proto(proto)
    assert "DequantizeLinear" in op_types(source)
    folded = fold_fake_quant(simplify(source))
    assert sorted(op_types(folded)) == sorted(node.op_type for node in onnx.load(tmp_path / "float.onnx").graph.node)
    grids = {value.name: get_params(value) for value in annotated_values(folded.graph)}
    assert all(params is not None and params.fixed and params.observer == "fake_quant" for params in grids.values())
    weights = [params for name, params in grids.items() if params and name and name.startswith(("a.weight", "w"))]
    assert len(weights) == 2 and all((params.axis is not None) == per_channel for params in weights)
    feeds = {"x": normal(5, 3, 8, 8, seed=9)}
    expected = run(proto, feeds)
    for name, array in run(insert_qdq(folded), feeds).items():
        np.testing.assert_array_equal(array, expected[name])


def qdq(b: GraphBuilder, x: str, name: str, params: QuantParams, **attributes: Any) -> str:
    codes = b.op("QuantizeLinear", [x, *constants(b, name, params)], f"{name}.q", **attributes)
    return str(b.op("DequantizeLinear", [codes, f"{name}.scale", f"{name}.zero"], f"{name}.dq", **attributes))


def constants(b: GraphBuilder, name: str, params: QuantParams) -> list[str]:
    zero = params.zero_point.astype(params.dtype.replace("int4", "int8"))
    return [b.constant(f"{name}.scale", params.scale), b.constant(f"{name}.zero", zero)]


def assert_exact(model: ir.Model, feeds: dict[str, Array]) -> ir.Model:
    folded = fold_fake_quant(model)
    expected, found = run(model, feeds), run(insert_qdq(folded), feeds)
    assert list(found) == list(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
    return folded


def test_two_grids_on_one_tensor_are_refused_naming_both_nodes() -> None:
    b = GraphBuilder()
    x = b.op("Relu", [b.input("x", ["N", 4])], "relu")
    first, second = qdq(b, x, "first", grid(scale=0.1)), qdq(b, x, "second", grid(scale=0.2))
    with pytest.raises(
        GraphError, match=r"'relu_y' is quantized on two grids: .*scale 0\.1,.*'first\.q'.*scale 0\.2,.*'second\.q'"
    ):
        fold_fake_quant(b.model(b.op("Add", [first, second])))


def test_a_pair_whose_ends_differ_is_refused() -> None:
    b = GraphBuilder()
    codes = b.op("QuantizeLinear", [b.input("x", ["N", 4]), *constants(b, "a", grid(scale=0.1))], "q")
    with pytest.raises(GraphError, match=r"'x' is quantized on two grids.*'q'.*'dq'"):
        fold_fake_quant(b.model(b.op("DequantizeLinear", [codes, *constants(b, "b", grid(scale=0.2))], "dq")))


def test_the_same_pair_twice_and_two_readers_are_one_grid() -> None:
    b = GraphBuilder()
    x = b.op("Relu", [b.input("x", ["N", 4])], "relu")
    y = b.op("Add", [qdq(b, x, "first", grid()), qdq(b, x, "second", grid())], "add")
    folded = assert_exact(b.model(y), {"x": normal(3, 4)})
    assert op_types(folded) == ["Relu", "Add"]


def test_one_grid_after_another_gets_a_tensor_of_its_own() -> None:
    b = GraphBuilder()
    x = b.op("Relu", [b.input("x", ["N", 4])], "relu")
    fine = qdq(b, x, "fine", grid(scale=0.01, zero_point=0))
    coarse = qdq(b, fine, "coarse", grid("int8", scale=0.3, zero_point=0))
    folded = assert_exact(b.model(b.op("Add", [fine, coarse], "add")), {"x": normal(3, 4)})
    assert op_types(folded) == ["Relu", "Identity", "Add"]
    assert [float(p.scale) for v in annotated_values(folded.graph) if (p := get_params(v))] == [
        np.float32(0.01),
        np.float32(0.3),
    ]


def test_operators_that_move_codes_move_floats() -> None:
    b = GraphBuilder()
    params = grid(scale=0.05, zero_point=100)
    codes = b.op("QuantizeLinear", [b.input("x", ["N", 4, 6, 6]), *constants(b, "g", params)], "q")
    codes = b.op("Pad", [codes, b.constant("pads", np.int64([0, 0, 1, 1, 0, 0, 1, 1])), "g.zero"], "pad")
    codes = b.op("Pad", [codes, b.constant("more", np.int64([0, 1, 0, 0, 0, 0, 0, 0]))], "low")  # pads with code 0
    codes = b.op("MaxPool", [codes], "max", kernel_shape=[2, 2], strides=[2, 2])
    codes = b.op(
        "Transpose", [b.op("Reshape", [codes, b.constant("shape", np.int64([0, 5, 16]))], "flat")], "t", perm=[0, 2, 1]
    )
    codes = b.op("Concat", [codes, b.constant("token", np.uint8([[[1, 2, 3, 4, 5]]] * 3))], "cat", axis=1)
    y = b.op("DequantizeLinear", [codes, "g.scale", "g.zero"], "dq")
    folded = assert_exact(b.model(b.op("Relu", [y], "relu")), {"x": normal(3, 4, 6, 6)})
    assert op_types(folded) == ["Pad", "Pad", "MaxPool", "Reshape", "Transpose", "Concat", "Relu"]
    assert all(get_params(node.outputs[0]) is not None for node in list(folded.graph)[:-1])


def test_an_embedding_table_that_is_read_before_it_is_dequantized() -> None:
    b = GraphBuilder()
    table = b.constant("table", np.random.default_rng(0).integers(-128, 128, (10, 4)).astype(np.int8))
    rows = b.op("Gather", [table, b.input("ids", ["N", 3], TensorProto.INT64)], "gather")
    y = b.op("DequantizeLinear", [rows, *constants(b, "g", grid("int8", 0.02, 3))], "dq")
    folded = assert_exact(b.model(b.op("Relu", [y], "relu")), {"ids": np.int64([[0, 9, 3]])})
    assert op_types(folded) == ["Gather", "Relu"]
    real = folded.graph.initializers["table_"].const_value
    assert real is not None
    np.testing.assert_array_equal(quantize(real.numpy(), grid("int8", 0.02, 3)).min(), -128)


def test_integer_biases_become_plain_floats() -> None:
    b = GraphBuilder()
    codes = np.int32([1000, -70000, 2**24 + 1, 0])
    scale = np.float32([1e-4, 2e-4, 3e-4, 4e-4])
    bias = b.op("DequantizeLinear", [b.constant("bias_quantized", codes), b.constant("s", scale)], "dq", axis=0)
    y = b.op("Conv", [b.input("x", ["N", 3, 4, 4]), b.weight("w", 4, 3, 1, 1), bias], "conv")
    folded = assert_exact(b.model(y), {"x": normal(2, 3, 4, 4)})
    value = folded.graph.initializers["bias"]
    assert get_params(value) is None and value.const_value is not None
    np.testing.assert_array_equal(value.const_value.numpy(), codes.astype(np.float32) * scale)


def test_shared_codes_stay_shared_and_two_readings_of_them_become_two() -> None:
    b = GraphBuilder()
    x = b.input("x", ["N", 4])
    codes = b.constant("w_quantized", np.random.default_rng(0).integers(-128, 128, (4, 4)).astype(np.int8))
    one = [
        b.op("DequantizeLinear", [codes, *constants(b, n, grid("int8", s, 0))], f"{n}.dq")
        for n, s in (("a", 0.1), ("b", 0.1), ("c", 0.3))
    ]
    y = x
    for weight in one:
        y = b.op("MatMul", [y, weight])
    folded = assert_exact(b.model(y), {"x": normal(2, 4)})
    assert sorted(folded.graph.initializers) == ["w", "w_"]


def test_axes_zero_points_and_types_that_are_left_out_have_their_defaults() -> None:
    b = GraphBuilder()
    x = b.input("x", ["N", 3, 4])
    channels = qdq(b, x, "channels", grid("int8", [0.1, 0.2, 0.3], [0, 1, 2]))  # axis 1
    last = b.op(
        "QuantizeLinear", [b.op("Neg", [channels], "neg"), b.constant("s", np.float32([0.1] * 4))], "last.q", axis=-1
    )
    y = b.op("DequantizeLinear", [last, "s"], "last.dq", axis=-1)
    folded = assert_exact(simplify(b.model(b.op("Relu", [y], "relu"))), {"x": normal(2, 3, 4)})
    grids = {v.name: get_params(v) for v in annotated_values(folded.graph)}
    assert {name: (p.axis, p.dtype) for name, p in grids.items() if p} == {"x": (1, "int8"), "neg_y": (2, "uint8")}


def test_codes_that_leave_the_graph_stay_codes() -> None:
    b = GraphBuilder()
    codes = b.op("QuantizeLinear", [b.op("Relu", [b.input("x", ["N", 4])], "relu"), *constants(b, "g", grid())], "q")
    y = b.op("DequantizeLinear", [codes, "g.scale", "g.zero"], "dq")
    model = ir.from_proto(b.proto(codes, y, dtypes={codes: TensorProto.UINT8}))
    assert_exact(model, {"x": normal(3, 4)})


def test_an_output_that_is_also_read_as_float_keeps_both_names() -> None:
    b = GraphBuilder()
    y = qdq(b, b.input("x", ["N", 4]), "g", grid())
    folded = fold_fake_quant(b.model(y, b.op("Relu", [y], "relu")))
    assert [value.name for value in folded.graph.outputs] == ["g.dq_y", "relu_y"]
    np.testing.assert_array_equal(run(folded, {"x": normal(2, 4)})["g.dq_y"], normal(2, 4))


def test_a_relu_that_saturation_replaced_comes_back_only_where_nothing_reads_the_float() -> None:
    for read in (False, True):
        b = GraphBuilder()
        x = b.conv(b.input("x", ["N", 3, 4, 4]), "conv", 3, 4)
        y = b.op("MaxPool", [qdq(b, x, "g", grid(zero_point=0))], "max", kernel_shape=[2, 2])
        folded = fold_fake_quant(b.model(y, x) if read else b.model(y))
        assert op_types(folded) == (["Conv", "MaxPool"] if read else ["Conv", "Relu", "MaxPool"])
        assert [value.name for value in annotated_values(folded.graph)] == ["conv_y"]
        if not read:
            assert_exact(b.model(y), {"x": normal(2, 3, 4, 4)})
            relu = list(folded.graph)[1]
            assert (relu.name, relu.outputs[0].name) == ("conv/Relu", "conv_y")


def test_a_tensor_that_is_an_output_before_and_behind_its_pair_keeps_both_names() -> None:
    b = GraphBuilder()
    x = b.op("Neg", [b.input("x", ["N", 4])], "neg")
    folded = fold_fake_quant(b.model(x, qdq(b, x, "g", grid())))
    assert [value.name for value in folded.graph.outputs] == ["neg_y", "g.dq_y"]
    assert op_types(folded) == ["Neg", "Identity"]


@pytest.mark.parametrize(
    ("qmin", "qmax", "dtype", "narrow"),
    [(-128, 127, "int8", False), (-127, 127, "int8", True), (0, 15, "uint4", False)],
)
def test_symbolic_fake_quantizers_of_qat_are_folded(qmin: int, qmax: int, dtype: str, narrow: bool) -> None:
    b = GraphBuilder()
    parameters = [b.constant("s", np.float32(0.1)), b.constant("z", np.int64(0))]
    bounds = {"axis": 0, "qmin": qmin, "qmax": qmax}
    y = b.op("FakeQuant", [b.input("x", ["N", 4]), *parameters], "fq", domain="edgekit", **bounds)
    channel = b.op("FakeQuant", [b.weight("w", 4, 4), b.constant("ws", np.float32([1, 2, 3, 4])), b.constant("wz", np.int64([0] * 4))],
                   "wq", domain="edgekit", **bounds)  # fmt: skip
    folded = fold_fake_quant(b.model(b.op("MatMul", [y, channel], "fc")))
    assert op_types(folded) == ["MatMul"]
    x, w = (get_params(value) for value in next(iter(folded.graph)).inputs)
    assert x == grid(dtype, 0.1, 0, narrow_range=narrow, observer="fake_quant", fixed=True)
    assert w is not None and w.axis == 0 and w.narrow_range == narrow and w.scale.tolist() == [1, 2, 3, 4]


def computed_scale(b: GraphBuilder) -> str:
    x = b.input("x", ["N", 4])
    codes, scale, zero = b.op("DynamicQuantizeLinear", [x], "dynamic", outputs=3)
    return str(b.op("DequantizeLinear", [codes, scale, zero], "dq"))


def input_codes(b: GraphBuilder) -> str:
    return str(b.op("DequantizeLinear", [b.input("x", ["N", 4], TensorProto.UINT8), *constants(b, "g", grid())], "dq"))


def qlinear(b: GraphBuilder) -> str:
    params = constants(b, "g", grid())
    codes = b.op("QuantizeLinear", [b.input("x", [4, 4]), *params], "q")
    codes = b.op("QLinearMatMul", [codes, *params, codes, *params, *params], "multiply")
    return str(b.op("DequantizeLinear", [codes, *params], "dq"))


def cast(b: GraphBuilder) -> str:
    params = constants(b, "g", grid())
    codes = b.op("QuantizeLinear", [b.input("x", [4, 4]), *params], "q")
    codes = b.op("BitwiseNot", [codes], "not")
    return str(b.op("DequantizeLinear", [codes, *params], "dq"))


def blocks(b: GraphBuilder) -> str:
    grid = [b.constant("s", np.ones((2, 4), np.float32)), b.constant("z", np.zeros((2, 4), np.int8))]
    codes = b.op("QuantizeLinear", [b.input("x", [4, 4]), *grid], "q", axis=0, block_size=2)
    return str(b.op("DequantizeLinear", [codes, *grid], "dq", axis=0, block_size=2))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (computed_scale, "'dq'.*scale from a computed value: dynamic"),
        (input_codes, "'dq' reads 'x', which the caller makes"),
        (qlinear, r"'multiply' \(QLinearMatMul\) computes on codes"),
        (cast, r"'dq' reads 'not_y', which 'not' \(BitwiseNot\) makes"),
        (blocks, "'q'.*in blocks; of activations only one grid"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_no_plain_qdq_graph_is_refused_by_name(build: Any, words: str) -> None:
    b = GraphBuilder()
    y = build(b)
    with pytest.raises(GraphError, match=words):
        fold_fake_quant(b.model(y))


def test_inserting_does_not_touch_names_that_are_taken() -> None:
    b = GraphBuilder()
    x = b.input("x", ["N", 3])
    model = b.model(b.op("Mul", [x, b.constant("x_scale", np.float32([1, 2, 3]))], "mul"))
    set_params(model.graph.inputs[0], grid())
    expected = fake_quantize(normal(2, 3), grid()) * np.float32([1, 2, 3])
    np.testing.assert_array_equal(run(insert_qdq(model), {"x": normal(2, 3)})["mul_y"], expected)
    assert structure(fold_fake_quant(insert_qdq(model))) == structure(model)


def test_a_tensor_that_a_branch_reads_is_quantized_there_too() -> None:
    b = GraphBuilder(13)
    x = b.op("Neg", [b.input("x", ["N", 4])], "neg")
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4]) for name in ("t", "e")]
    then = helper.make_graph([helper.make_node("Relu", [x], ["t"])], "then", [], info[:1])
    otherwise = helper.make_graph([helper.make_node("Abs", [x], ["e"])], "else", [], info[1:])
    model = b.model(b.op("If", [b.constant("yes", np.array(True))], "if", then_branch=then, else_branch=otherwise))
    set_params(next(iter(model.graph)).outputs[0], grid())
    found = run(insert_qdq(model), {"x": normal(2, 4)})["if_y"]
    np.testing.assert_array_equal(found, np.maximum(fake_quantize(-normal(2, 4), grid()), 0))
    assert dequantize(np.array(128), grid()) == 0
