"""Padding: what only fills up a sample leaves no trace in ranges, rows and Hessians."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto

from edgekit.calibration.calibrate import calibrate
from edgekit.calibration.layer_rows import collect_rows, linear_layers, rows_key
from edgekit.calibration.padding import padding_mask, without_padding
from edgekit.calibration.round_weights import round_weights
from edgekit.data import Batch
from edgekit.graph.annotations import get_params
from edgekit.method import Method
from edgekit.passes.assign_specs import assign_specs
from edgekit.passes.simplify import simplify
from edgekit.target import load_target
from graphs import Array, normal
from networks import Net

PORTABLE = load_target("portable")
MASK = np.arange(6) < np.array([[4], [6], [1], [3]])
KINDS = (np.int64, np.int32, np.uint8, np.bool_)


def feeds(name: str = "attention_mask", dtype: type[np.generic] = np.int64) -> dict[str, Array]:
    """Padded tokens hold numbers a hundred times as large."""
    x = normal(4, 6, 8)
    return {"x": np.where(MASK[:, :, None], x, 100 * x).astype(np.float32), name: MASK.astype(dtype)}


def ranges(model: ir.Model, arrays: dict[str, Array], size: int) -> dict[str, float]:
    batches = [Batch({name: a[i : i + size] for name, a in arrays.items()}) for i in range(0, 4, size)]
    wished = assign_specs(model, PORTABLE)
    found = calibrate(wished, PORTABLE, batches, method=Method(calibrator="minmax"), threads=1)
    return {
        value.name or "": params.high
        for value in [*found.graph.inputs, *(out for node in found.graph for out in node.outputs)]
        if (params := get_params(value)) is not None
    }


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("name", ["attention_mask", "MASK", "token_mask_0"])
def test_a_mask_of_zeros_and_ones_says_which_tokens_are_real(name: str, dtype: type[np.generic]) -> None:
    mask = padding_mask(feeds(name, dtype))
    assert mask is not None
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, MASK)


@pytest.mark.parametrize(
    "others",
    [
        {"attention": MASK.astype(np.int64)},
        {"attention_mask": MASK.astype(np.float32)},
        {"attention_mask": MASK.astype(np.int64) * 2},
        {"attention_mask": MASK.astype(np.int64) - 1},
        {"attention_mask": MASK[:, None].astype(np.int64)},
        {"attention_mask": MASK[0].astype(np.int64)},
        {"attention_mask": np.zeros((4, 6), np.int64)},
    ],
    ids=["another name", "floats", "twos", "negative", "three axes", "one axis", "all zeros"],
)
def test_other_inputs_are_no_mask(others: dict[str, Array]) -> None:
    assert padding_mask({"x": normal(4, 6, 8), **others}) is None


def test_padding_goes_out_of_tokens_and_of_nothing_else() -> None:
    tokens = normal(4, 6, 8)
    kept = without_padding(tokens, MASK)
    np.testing.assert_array_equal(kept, np.concatenate([tokens[i, : MASK[i].sum()] for i in range(4)]))
    for other in (normal(4, 6), normal(4, 7, 8), normal(3, 6, 8), normal(4, 6, 8, 2)):
        assert without_padding(other, MASK) is other
    assert without_padding(tokens, None) is tokens
    np.testing.assert_array_equal(without_padding(tokens, np.ones((4, 6), bool)), tokens.reshape(-1, 8))


def scaled(name: str) -> ir.Model:
    """Tokens, doubled, through a layer; what is added to its output comes from the second input."""
    net = Net(seed=4)
    x = net.op("Mul", [net.input("x", ["n", 6, 8]), net.constant("two", np.float32(2))], "double")
    mask = net.op("Cast", [net.input(name, ["n", 6], TensorProto.INT64)], "cast", to=TensorProto.FLOAT)
    x = net.op("Add", [net.matmul(x, "layer", 8, 8), net.weight("layer.bias", 8)], "add")
    return simplify(
        net.model(net.op("Add", [x, net.op("Unsqueeze", [mask, net.constant("axis", np.array([2]))], "wide")], "sum"))
    )


def test_the_range_of_a_computed_tensor_is_that_of_its_real_tokens() -> None:
    shown = 2 * float(feeds()["x"][MASK].max())
    hidden = 2 * float(feeds()["x"].max())
    assert hidden > 10 * shown
    for size in (1, 2, 4):
        assert ranges(scaled("attention_mask"), feeds(), size)["double_y"] == pytest.approx(shown, rel=1e-6)
    assert ranges(scaled("token_types"), feeds("token_types"), 2)["double_y"] == pytest.approx(hidden, rel=1e-6)


@pytest.mark.parametrize(("name", "count"), [("attention_mask", int(MASK.sum())), ("token_types", MASK.size)])
def test_rows_are_those_of_real_tokens(name: str, count: int) -> None:
    net, arrays = scaled(name), feeds(name)
    (layer,) = linear_layers(net.graph)
    rows = collect_rows(net, [layer], [Batch(arrays)], samples=4, threads=1)[rows_key(layer)].rows
    assert rows.shape == (1, count, 8)
    assert (float(rows.max()) > 50) == (name == "token_types")


def test_a_mask_of_zeros_alone_hides_nothing() -> None:
    net, arrays = scaled("attention_mask"), feeds()
    arrays["attention_mask"] = np.zeros((4, 6), np.int64)
    (layer,) = linear_layers(net.graph)
    rows = collect_rows(net, [layer], [Batch(arrays)], samples=4, threads=1)[rows_key(layer)].rows
    assert rows.shape[1] == 24


def test_the_codes_of_weights_do_not_depend_on_what_fills_up_samples() -> None:
    codes = []
    method = Method(weights="int4", calibrator="minmax")
    for strength in (100, -3):
        x = normal(4, 6, 8)
        filled = np.where(MASK[:, :, None], x, strength * x[:, ::-1]).astype(np.float32)
        batches = [Batch({**feeds(), "x": filled})]
        wished = assign_specs(scaled("attention_mask"), PORTABLE, method)
        calibrated = calibrate(wished, PORTABLE, batches, method=method, threads=1)
        params = get_params(
            round_weights(calibrated, batches, samples=4, method=method, threads=1).graph.initializers["layer.weight"]
        )
        assert params is not None and params.codes is not None
        codes.append(params.codes)
    assert np.array_equal(codes[0], codes[1])


def test_pictures_with_as_many_channels_as_tokens_are_no_tokens() -> None:
    net = Net(seed=4)
    x = net.input("x", ["n", 6, 8])
    weight = net.weight("conv.weight", 4, 6, 3)
    mask = net.op("Cast", [net.input("attention_mask", ["n", 6], TensorProto.INT64)], "cast", to=TensorProto.FLOAT)
    wide = net.op("Unsqueeze", [mask, net.constant("axis", np.array([2]))], "wide")
    graph = net.model(net.op("Conv", [x, weight], "conv"), net.op("Identity", [wide], "out"))
    (layer,) = linear_layers(graph.graph)
    batches = [Batch({**feeds()})]
    rows = collect_rows(graph, [layer], batches, samples=4, threads=1)[rows_key(layer)].rows
    assert rows.shape == (1, 4 * 6, 18)
