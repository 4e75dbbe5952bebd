"""AdaRound over a model's layers: what it changes, what it leaves alone, what its outputs gain, and that it stops in time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from torch.nn.functional import conv2d, linear

import edgekit
from conftest import TinyFiles, tiny_images
from edgekit import Method
from edgekit.calibration.layer_rows import linear_layers, numbers
from edgekit.data import Batch
from edgekit.graph.annotations import get_params
from edgekit.graph.io import load_annotated
from edgekit.graph.run import Session, with_outputs
from edgekit.lowering.qdq import lower_qdq
from edgekit.method import LayerMethod, Rounding
from edgekit.quant.affine import constant_codes, dequantize, fake_quantize
from edgekit.quant.spec import QuantParams
from edgekit.target import load_target
from edgekit.training import round_layers as module
from edgekit.training.round_layers import round_layers
from networks import Net

CALIBRATING = 64
ROUNDINGS: tuple[Rounding, ...] = ("nearest", "gptq", "adaround")
FOREVER = 1e6


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Few iterations, on one thread: threads wait for each other on a busy machine."""
    monkeypatch.setattr(module, "ITERATIONS", 400)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def low_bits(rounding: Rounding, *, budget: float = FOREVER, layers: tuple[LayerMethod, ...] = ()) -> Method:
    return Method(weights="int4", rounding=rounding, rounding_budget=budget, bias_correction=False, layers=layers)


def compressed(tiny: TinyFiles, out: Path, method: Method) -> ir.Model:
    return load_annotated(
        edgekit.compress(tiny.model, out, calibration=tiny.data, samples=CALIBRATING, method=method, proxy="none").model
    )


def weights_of(model: ir.Model) -> dict[str, tuple[NDArray[Any], QuantParams]]:
    constants = {name: value for name, value in model.graph.initializers.items() if name.endswith("weight")}
    found = {}
    for name, value in constants.items():
        params = get_params(value)
        assert value.const_value is not None and params is not None
        found[name] = (value.const_value.numpy(), params)
    return found


def codes_of(model: ir.Model) -> dict[str, NDArray[Any]]:
    return {name: constant_codes(*found) for name, found in weights_of(model).items()}


def simulated_error(model: ir.Model) -> float:
    """The mean squared error of the outputs."""
    quantized = lower_qdq(model, load_target("portable"))
    wanted, found = (
        Session(graph, optimize=False).run({"image": tiny_images()})["head_y"] for graph in (model, quantized)
    )
    return float(np.square(np.subtract(wanted, found)).mean())


def test_its_codes_are_neither_the_nearest_nor_gptq_s_and_the_network_s_error_falls(
    tiny: TinyFiles, tmp_path: Path
) -> None:
    made = {rounding: compressed(tiny, tmp_path / rounding, low_bits(rounding)) for rounding in ROUNDINGS}
    codes = {rounding: codes_of(model) for rounding, model in made.items()}
    for name, found in codes["adaround"].items():
        if name == "stem.weight":
            continue  # it reads white noise, for which nearest rounding is about the best
        assert not np.array_equal(found, codes["nearest"][name]), name
    assert any(not np.array_equal(found, codes["gptq"][name]) for name, found in codes["adaround"].items())
    error = {rounding: simulated_error(model) for rounding, model in made.items()}
    assert error["adaround"] < 0.1 * error["nearest"]


def test_it_is_chosen_layer_by_layer_and_gives_the_same_codes_again(tiny: TinyFiles, tmp_path: Path) -> None:
    only_deep = low_bits("nearest", layers=(LayerMethod(match="deep", rounding="adaround"),))
    plain, first, again = (
        codes_of(compressed(tiny, tmp_path / name, method))
        for name, method in (("plain", low_bits("nearest")), ("first", only_deep), ("again", only_deep))
    )
    changed = {name for name, found in first.items() if not np.array_equal(found, plain[name])}
    assert changed == {"deep.weight"}
    assert all(np.array_equal(found, again[name]) for name, found in first.items())


def test_it_ends_within_the_budget_and_what_it_did_not_reach_keeps_gptq_s_codes(
    tiny: TinyFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ITERATIONS", 10**9)  # as many as there is time for
    gptq = compressed(tiny, tmp_path / "gptq", low_bits("gptq"))
    batches = [Batch({"image": tiny_images()})]
    done: list[tuple[int, int]] = []
    began = time.monotonic()
    rounded = round_layers(
        gptq,
        batches,
        samples=len(batches[0]),
        method=low_bits("adaround", budget=2.0),
        threads=1,
        on_layer=lambda *count: done.append(count),
    )
    assert time.monotonic() - began < 4.0
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert any(not np.array_equal(found, codes_of(gptq)[name]) for name, found in codes_of(rounded).items())
    untouched = round_layers(gptq, batches, samples=len(batches[0]), method=low_bits("adaround", budget=1e-9))
    assert all(np.array_equal(found, codes_of(gptq)[name]) for name, found in codes_of(untouched).items())


def grouped_network() -> ir.Model:
    """A convolution in two groups, a depthwise one, a linear layer, and a matrix product without a bias."""
    net = Net(seed=3)
    x = net.conv_relu(net.input("image", ["n", 1, 8, 8]), "stem", 1, 8)
    x = net.conv_relu(x, "grouped", 8, 8, group=2)
    x = net.conv_relu(x, "depthwise", 8, 8, group=8)
    x = net.op("MaxPool", [x], "pool", kernel_shape=[4, 4], strides=[4, 4])
    x = net.op("Relu", [net.gemm(net.op("Flatten", [x], "flat", axis=1), "hidden", 32, 32)], "hidden.relu")
    return net.model(net.matmul(x, "head", 32, 4))


@pytest.mark.parametrize("block_size", [0, 16])
def test_each_layer_s_output_gains_with_groups_blocks_and_without_bias(
    tmp_path: Path, block_size: Literal[0, 16]
) -> None:
    ir.save(grouped_network(), tmp_path / "grouped.onnx")
    blocks = {"block_size": block_size, "activations": "none" if block_size else "static"}
    images = {"image": tiny_images()[:CALIBRATING]}
    made = edgekit.compress(
        tmp_path / "grouped.onnx",
        tmp_path / "out",
        calibration=images,
        method=low_bits("gptq").model_copy(update=blocks),
    )
    gptq = load_annotated(made.model)
    method = low_bits("adaround").model_copy(update=blocks)
    rounded = round_layers(gptq, [Batch(images)], samples=CALIBRATING, method=method, threads=1)
    before, after = output_errors(gptq, images), output_errors(rounded, images)
    assert before.keys() == {"stem", "grouped", "depthwise", "hidden", "head"}
    for name, error in after.items():
        assert np.all(error <= before[name] * 1.0001), name
        assert name not in ("grouped", "depthwise", "hidden") or error.sum() < before[name].sum(), name
    grids = {name: params.block_size for name, (_, params) in weights_of(rounded).items()}
    assert grids["hidden.weight"] == grids["head.weight"] == block_size


def output_errors(model: ir.Model, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[np.float64]]:
    """The mean squared error of each layer's output channels, behind its Relu, with its own input and weight quantized alone."""
    layers = linear_layers(model.graph)
    names = {layer.source.name or "" for layer in layers} - feeds.keys()
    read = feeds | Session(with_outputs(model, names), optimize=False).run(feeds)
    found = {}
    for layer in layers:
        grid, params = get_params(layer.source), get_params(layer.weight)
        assert params is not None
        x, plain = read[layer.source.name or ""], numbers(layer.weight)
        given = x if grid is None else fake_quantize(x, grid)
        rounded = dequantize(constant_codes(plain, params), params)
        wanted, got = _output(layer.node, x, plain), _output(layer.node, given, rounded)
        found[layer.name] = np.square(wanted - got).mean(axis=(0, *range(2, wanted.ndim)))
    return found


def _output(node: ir.Node, x: NDArray[Any], weight: NDArray[Any]) -> NDArray[np.float64]:
    """By torch, in float64; behind the Relu that all have but the MatMul."""
    bias = [torch.from_numpy(numbers(value).astype(np.float64)) for value in node.inputs[2:] if value is not None]
    left, right = (torch.from_numpy(array.astype(np.float64)) for array in (x, weight))
    if node.op_type == "Conv":
        y = conv2d(left, right, bias[0], padding=1, groups=node.attributes.get_int("group", 1))
    else:
        y = linear(left, right, bias[0]) if node.op_type == "Gemm" else left @ right
    return np.asarray((y if node.op_type == "MatMul" else torch.relu(y)).numpy())
