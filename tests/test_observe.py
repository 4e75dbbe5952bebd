"""The first calibration pass: every sample counts once and the same, whoever counts it, in whatever company it comes."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import pytest

from edgekit.calibration.observe import observe
from edgekit.data import Batch
from edgekit.errors import DataError
from edgekit.graph.annotations import all_values
from edgekit.graph.operators import is_constant, is_float
from edgekit.graph.run import Session, with_outputs
from edgekit.quant.observers import COARSE, EVERY, FINE, Histogram, HistogramObserver
from graphs import Array, GraphBuilder, normal
from networks import mixed_net, residual_net, samples, token_net

STRIDES = [EVERY, FINE, COARSE]


def activations(model: ir.Model) -> list[ir.Value]:
    return [value for value in all_values(model.graph) if is_float(value) and not is_constant(value)]


def histograms(model: ir.Model, batches: list[Batch], *, threads: int = 2, stride: int = EVERY) -> dict[str, Histogram]:
    found = observe(model, activations(model), batches, threads=threads, on_batch=None, stride=stride)
    return {value.name or "": observer.histogram() for value, observer in found.items()}


def cut(data: dict[str, Array], *sizes: int) -> list[Batch]:
    ends = np.cumsum(sizes)
    return [Batch({k: v[end - size : end] for k, v in data.items()}) for size, end in zip(sizes, ends, strict=True)]


def assert_equal(found: dict[str, Histogram], wanted: dict[str, Histogram]) -> None:
    assert found.keys() == wanted.keys()
    for name, a in found.items():
        b = wanted[name]
        np.testing.assert_array_equal(a.counts, b.counts, err_msg=name)
        assert (a.width, a.min, a.max, a.average_min, a.average_max) == (
            b.width,
            b.min,
            b.max,
            b.average_min,
            b.average_max,
        ), name


@pytest.mark.parametrize("build", [residual_net, mixed_net, token_net])
def test_it_counts_what_single_inferences_show(build: object) -> None:
    assert callable(build)
    model = build()
    data, values = samples(model, 5), activations(model)
    names = [value.name or "" for value in values]
    wanted = {name: HistogramObserver() for name in names}
    session = Session(with_outputs(model, set(names) - set(data)), optimize=True, threads=1)
    for index in range(5):
        feeds = {name: array[index : index + 1] for name, array in data.items()}
        for name, array in {**feeds, **session.run(feeds)}.items():
            wanted[name].update(array)
    found = histograms(model, cut(data, 5), threads=1)
    assert_equal(found, {name: observer.histogram() for name, observer in wanted.items()})


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_neither_order_nor_batches_nor_threads_change_a_bit(stride: int, threads: int) -> None:
    model = wide_net()
    data = {"x": normal(9, 4, 128, 128, seed=0)}
    wanted = histograms(model, cut(data, 9), threads=1, stride=stride)
    assert_equal(histograms(model, cut(data, 1, 4, 1, 3), threads=threads, stride=stride), wanted)
    assert_equal(histograms(model, cut({"x": data["x"][::-1]}, 2, 7), threads=threads, stride=stride), wanted)


def wide_net() -> ir.Model:
    """Elementwise, so that the number of threads changes no rounding; 65,536 values a sample."""
    b = GraphBuilder()
    x = b.input("x", ["n", 4, "h", "w"])
    return b.model(b.op("Mul", [b.op("Relu", [x], "relu"), x], "square"))


def test_shapes_may_change_from_batch_to_batch() -> None:
    model = wide_net()
    small, large = normal(2, 4, 8, 8, seed=0), normal(3, 4, 16, 24, seed=1)
    both = histograms(model, [Batch({"x": small}), Batch({"x": large})])
    assert both["relu_y"].count == small.size + large.size
    assert both["x"].max == max(small.max(), large.max())


@pytest.mark.parametrize("stride", STRIDES)
def test_averages_are_over_samples(stride: int) -> None:
    x = normal(4, 4, 128, 128, seed=3) * np.array([1, 10, 2, 3], np.float32)[:, None, None, None]
    found = histograms(wide_net(), cut({"x": x}, 3, 1), stride=stride)["x"]
    flat = x.reshape(4, -1).astype(np.float64)
    assert found.average_min == pytest.approx(flat.min(axis=1).mean(), rel=1e-15, abs=0)
    assert found.average_max == pytest.approx(flat.max(axis=1).mean(), rel=1e-15, abs=0)
    assert (found.min, found.max) == (flat.min(), flat.max())


def test_a_single_call_and_a_fixed_batch_are_one_sample_each() -> None:
    x = normal(4, 3, 16, 16, seed=0)
    fixed = histograms(residual_net(batch=4), [Batch({"x": x})])["x"]
    assert (fixed.average_min, fixed.average_max) == (x.min(), x.max())
    single = histograms(residual_net(), [Batch({"x": x}, single=True)])["x"]
    assert (single.average_min, single.average_max) == (x.min(), x.max())


def test_batches_are_drawn_and_reported_in_the_calling_thread_and_in_order() -> None:
    here, told, drawn = threading.get_ident(), [], []

    def stream() -> Iterator[Batch]:
        for size in (3, 1, 2):
            drawn.append(threading.get_ident())
            yield Batch({"x": normal(size, 3, 16, 16, seed=size)})

    def on_batch(size: int) -> None:
        told.append((size, threading.get_ident()))

    model = residual_net()
    observe(model, activations(model), stream(), threads=2, on_batch=on_batch)
    assert told == [(3, here), (1, here), (2, here)]
    assert set(drawn) == {here}


def test_few_batches_are_alive_at_once() -> None:
    arrays: list[weakref.ref[Array]] = []
    most = 0

    def stream() -> Iterator[Batch]:
        nonlocal most
        for index in range(40):
            array = normal(1, 3, 16, 16, seed=index)
            arrays.append(weakref.ref(array))
            yield Batch({"x": array}, single=True)
            del array
            most = max(most, sum(ref() is not None for ref in arrays))

    model = residual_net()
    observe(model, activations(model), stream(), threads=2, on_batch=None)
    assert 1 <= most <= 6


@pytest.mark.parametrize("batches", [[], [Batch({"x": np.zeros((0, 3, 16, 16), np.float32)})]])
def test_no_samples_are_refused(batches: list[Batch]) -> None:
    model = residual_net()
    with pytest.raises(DataError, match="holds no samples"):
        observe(model, activations(model), batches, threads=2, on_batch=None)


def test_the_first_broken_sample_ends_the_pass() -> None:
    x = normal(6, 3, 16, 16, seed=0)
    x[3] = np.inf
    model = residual_net()
    told: list[int] = []
    with pytest.raises(DataError, match="tensor 'x' becomes NaN or Inf"):
        observe(model, activations(model), cut({"x": x}, 2, 2, 2), threads=2, on_batch=told.append)
    assert told == [2]


def test_an_error_of_the_data_comes_through() -> None:
    def stream() -> Iterator[Batch]:
        yield Batch({"x": normal(1, 3, 16, 16, seed=0)})
        raise DataError("image 7 is truncated")

    model = residual_net()
    with pytest.raises(DataError, match="image 7 is truncated"):
        observe(model, activations(model), stream(), threads=2, on_batch=None)
