"""Ranges without what activation functions do not tell apart."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.calibration.calibrate import calibrate
from edgekit.calibration.live import WITHIN, live
from edgekit.data import open_data
from edgekit.graph.run import Session
from edgekit.lowering.qdq import lower_qdq
from edgekit.passes.assign_specs import assign_specs
from edgekit.pipelines.sources import input_specs
from edgekit.quant.observers import Histogram, HistogramObserver
from edgekit.target import load_target
from networks import Net, changed, get_params_of

Build = Callable[[Net, str], str]
CHANNELS = 8


def histogram(low: float, high: float) -> Histogram:
    observer = HistogramObserver()
    observer.update(np.linspace(low, high, 10001, dtype=np.float32))
    return observer.histogram()


def hard_swish(net: Net, x: str) -> str:
    return net.op("HardSwish", [x], "act")


def hard_swish_in_parts(net: Net, x: str) -> str:
    inner = net.op("Add", [x, net.constant("three", np.float32(3))], "plus")
    inner = net.op("Clip", [inner, net.constant("zero", np.float32(0)), net.constant("six", np.float32(6))], "clip")
    return net.op("Div", [net.op("Mul", [x, inner], "times"), net.constant("sixth", np.float32(6))], "by")


def silu(net: Net, x: str) -> str:
    return net.op("Mul", [x, net.op("Sigmoid", [x], "gate")], "act")


def gelu_by_tanh(net: Net, x: str) -> str:
    cube = net.op("Mul", [net.op("Mul", [x, x], "square"), x], "cube")
    inner = net.op("Add", [x, net.op("Mul", [cube, net.constant("small", np.float32(0.044715))], "scaled")], "sum")
    inner = net.op("Tanh", [net.op("Mul", [inner, net.constant("root", np.float32(0.7978846))], "inner")], "tanh")
    inner = net.op("Add", [inner, net.constant("one", np.float32(1))], "plus")
    return net.op("Mul", [net.op("Mul", [x, inner], "both"), net.constant("half", np.float32(0.5))], "act")


def biased(net: Net, x: str, most: float = 2) -> str:
    bias = np.linspace(-most, most, CHANNELS, dtype=np.float32).reshape(1, CHANNELS, 1, 1)
    return net.op("Add", [x, net.constant("bias", bias)], "biased")


def moved_and_biased(net: Net, x: str) -> str:
    x = net.op("Transpose", [net.op("Transpose", [x], "there", perm=[0, 2, 3, 1])], "back", perm=[0, 3, 1, 2])
    return hard_swish(net, biased(net, x))


def sigmoid(net: Net, x: str) -> str:
    return net.op("Sigmoid", [x], "act")


def made(build: Build, *, output: bool = False) -> tuple[ir.Value, ir.Model]:
    """What a Neg makes, and the model in which `build` reads it."""
    net = Net()
    x = net.op("Neg", [net.input("x", ["n", CHANNELS, 4, 4])], "before")
    y = net.op("MaxPool", [build(net, x)], "after", kernel_shape=[1, 1])
    model = net.model(*([y, x] if output else [y]))
    return next(node.outputs[0] for node in model.graph if node.op_type == "Neg"), model


@pytest.mark.parametrize(
    ("build", "low", "high"),
    [
        (hard_swish, -3.0, 15.0),
        (hard_swish_in_parts, -3.0, 15.0),
        (silu, -9.2, 15.0),
        (gelu_by_tanh, -3.4, 15.0),
        (sigmoid, -9.7, 9.7),
        (moved_and_biased, -5.0, 15.0),
        (lambda net, x: net.op("Relu", [x], "act"), 0.0, 15.0),
    ],
)
def test_ends_that_are_one_number_to_the_reader_go(build: Build, low: float, high: float) -> None:
    value, model = made(build)
    found = live(value, histogram(-20, 15), model)
    assert (found.min, found.max) == (pytest.approx(low, abs=0.3), pytest.approx(high, abs=0.3))
    assert found.counts.sum() == found.count == 10001
    assert not found.counts[found.centers < found.min - found.width].any()


@pytest.mark.parametrize(
    "build",
    [
        lambda net, x: net.op("Add", [hard_swish(net, x), x], "skip"),
        lambda net, x: net.op("Mul", [x, net.op("GlobalAveragePool", [x], "mean")], "scaled"),
        lambda net, x: net.op("Exp", [x], "size"),  # of small sizes the relative error counts
        lambda net, x: net.op("LeakyRelu", [x], "act", alpha=0.1),
        lambda net, x: net.op("Add", [x, net.op("Softmax", [x], "shares")], "sum"),
        lambda net, x: net.op("Log", [sigmoid(net, x)], "log"),
        lambda net, x: net.op(
            "Mul", [net.op("Sigmoid", [x], "gate"), net.op("Transpose", [x], "turned", perm=[0, 1, 3, 2])], "glu"
        ),
        lambda net, x: hard_swish(
            net, net.op("Mul", [biased(net, x, 1), net.constant("row", np.arange(1.0, 5.0, dtype=np.float32))], "r")
        ),
        lambda net, x: hard_swish(net, net.op("Add", [x, net.constant("none", np.zeros((0,), np.float32))], "nothing")),
    ],
)
def test_what_readers_tell_apart_stays(build: Build) -> None:
    value, model = made(build)
    seen = histogram(-20, 15)
    assert live(value, seen, model) is seen


def test_what_the_caller_gets_stays() -> None:
    value, model = made(hard_swish, output=True)
    seen = histogram(-20, 15)
    assert live(value, seen, model) is seen


def test_a_reader_to_which_all_is_one_number_changes_nothing() -> None:
    value, model = made(hard_swish)
    seen = histogram(-20, -5)
    assert live(value, seen, model) is seen


@settings(max_examples=60, deadline=None)
@given(st.floats(-40, -1), st.floats(1, 40), st.sampled_from([hard_swish, silu, gelu_by_tanh, sigmoid]))
def test_no_result_changes_by_more_than_a_part_of_a_step(low: float, high: float, build: Build) -> None:
    value, model = made(build)
    found = live(value, histogram(low, high), model)
    numbers = np.linspace(low, high, 512, dtype=np.float32).reshape(1, CHANNELS, 4, 16)[..., :4]
    session = Session(model, optimize=False)
    [whole], [cut] = (session.run({"x": -x}).values() for x in (numbers, numbers.clip(found.min, found.max)))
    ends = session.run({"x": -np.linspace(low, high, 4096, dtype=np.float32).reshape(-1, CHANNELS, 4, 4)})
    [every] = ends.values()
    assert np.abs(whole - cut).max() <= 1.01 * WITHIN * (every.max() - every.min()) / 255 + 1e-6


def test_codes_between_a_layer_and_its_activation_are_finer() -> None:
    """Where a target wants them there: as ONNX Runtime does."""
    net = Net()
    x = net.conv(net.input("x", ["n", 4, 8, 8]), "a", 4, CHANNELS)
    x = net.conv(hard_swish(net, x), "b", CHANNELS, 4)
    model, data = net.model(x), {"x": np.random.default_rng(1).normal(0, 4, (64, 4, 8, 8)).astype(np.float32)}
    target = load_target("arm-onnxruntime")
    wished = assign_specs(model, target)
    batches = list(open_data(data).bind(input_specs(model)).batches(8))
    annotated = calibrate(wished, target, batches)
    params = get_params_of(annotated, "a_y")
    lowest = float(params.scale) * (np.iinfo(params.dtype).min - int(params.zero_point))
    assert -3.1 <= lowest <= -2.9
    [exact], [coded] = (
        Session(graph, optimize=False).run(data).values()
        for graph in (model, lower_qdq(annotated, changed("arm-onnxruntime")))
    )
    noise = 10 * np.log10(np.sum(exact**2) / np.sum((exact - coded) ** 2))
    assert noise > 34.2  # 33.8 with codes down to -26
