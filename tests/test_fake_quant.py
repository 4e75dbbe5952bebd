"""The operator that quantization-aware training rounds with: bit for bit what ONNX computes, and gradients that hold."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from edgekit.graph.run import Session
from edgekit.quant.affine import choose_params
from edgekit.quant.spec import INTEGER_RANGES, QuantParams, QuantSpec
from edgekit.training.fake_quant import Binarize, FakeQuantize, quantizers, without_quantizers

TYPES = ("uint8", "int8", "uint4", "int4")


def grid(
    dtype: str, scale: object, zero_point: object, axis: int | None = None, *, narrow: bool = False
) -> QuantParams:
    return QuantParams(dtype, np.asarray(scale, np.float32), np.asarray(zero_point, np.int64), axis, narrow)


def by_onnx(x: np.ndarray, params: QuantParams) -> np.ndarray:
    """QuantizeLinear, then DequantizeLinear, in ONNX Runtime."""
    kind = TensorProto.DataType.Value(params.dtype.upper())
    attributes = {} if params.axis is None else {"axis": params.axis}
    zero_point = np.broadcast_to(params.zero_point, params.scale.shape)
    constants = [
        helper.make_tensor("s", TensorProto.FLOAT, params.scale.shape, params.scale.reshape(-1).tolist()),
        helper.make_tensor("z", kind, params.scale.shape, zero_point.reshape(-1).tolist()),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **attributes),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **attributes),
    ]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(x.shape)) for name in "xy"]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return Session(ir.from_proto(model), optimize=False).run({"x": x})["y"]


def same_bits(x: np.ndarray, params: QuantParams) -> None:
    ours = FakeQuantize(params).eval()(torch.from_numpy(x)).detach().numpy()
    theirs = by_onnx(x, params)
    np.testing.assert_array_equal(ours + 0.0, theirs + 0.0)  # -0 and 0 are one code


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(TYPES),
    scale=st.floats(2.0**-20, 2.0**10, width=32),
    place=st.floats(0, 1),
    numbers=st.lists(st.floats(-(2.0**20), 2.0**20, width=32), min_size=1, max_size=40),
)
def test_it_is_onnx_quantize_dequantize(dtype: str, scale: float, place: float, numbers: list[float]) -> None:
    qmin, qmax = INTEGER_RANGES[dtype]
    zero_point = round(qmin + place * (qmax - qmin))
    same_bits(np.array(numbers, np.float32), grid(dtype, scale, zero_point))


@pytest.mark.parametrize("dtype", TYPES)
def test_ties_ends_and_what_is_no_number(dtype: str) -> None:
    for scale in (0.1, 0.3, 1.0, 1 / 3, 1e-40, 3e35):
        step = np.float32(scale)
        codes = np.arange(-300, 300, dtype=np.float32)
        ties = (codes + np.float32(0.5)) * step
        x = np.concatenate(
            [ties, np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(-np.inf)), codes * step]
        )
        x = np.concatenate([x, np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 1e38, -1e38], np.float32)])
        qmin, qmax = INTEGER_RANGES[dtype]
        for zero_point in (0, qmin, qmax, (qmin + qmax + 1) // 2):
            with np.errstate(all="ignore"):
                module = FakeQuantize(grid(dtype, max(scale, 1e-12), zero_point))
                module.base.fill_(scale)
                params = grid(dtype, scale, zero_point)
                ours = module.eval()(torch.from_numpy(x)).detach().numpy()
                np.testing.assert_array_equal(ours, by_onnx(x, params))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_one_scale_a_channel(axis: int) -> None:
    rng = np.random.default_rng(axis)
    x = rng.normal(0, 1, (4, 5, 6)).astype(np.float32)
    scale = rng.uniform(0.001, 0.1, x.shape[axis])
    same_bits(x, grid("int8", scale, np.zeros(x.shape[axis]), axis))
    same_bits(x, grid("uint8", scale, rng.integers(0, 256, x.shape[axis]), axis))


def test_a_narrow_grid_does_not_use_the_lowest_code() -> None:
    module = FakeQuantize(grid("int8", 1.0, 0, narrow=True))
    assert module(torch.tensor([-500.0, -128.0, -127.0, 500.0])).tolist() == [-127, -127, -127, 127]
    assert module.params() == QuantParams(
        "int8", np.array(1, np.float32), np.array(0), None, True, observer="fake_quant", fixed=True
    )


def test_in_training_what_is_no_number_is_seen() -> None:
    module = FakeQuantize(grid("uint8", 1.0, 7))
    x = torch.tensor([float("nan"), 1.0])
    assert torch.isnan(module.train()(x)).tolist() == [True, False]
    assert module.eval()(x).tolist() == [-7, 1]


def reference(
    x: np.ndarray, gradient: np.ndarray, scale: np.ndarray, low: float, high: float, axes: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Equation 3 of the paper and its factor, relative to the numbers, in float64."""
    ratio = x.astype(np.float64) / scale
    inside = (ratio >= low) & (ratio <= high)
    slope = np.where(inside, np.rint(ratio) - ratio, np.clip(ratio, low, high))
    factor = 1 / np.sqrt(x.size / scale.size * max(abs(high), 1))
    spread = scale * (abs(low) + abs(high)) / 2 / 3
    return gradient * inside, (gradient * slope).sum(axis=axes, keepdims=True) * scale * factor / spread**2


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize(
    ("dtype", "zero_point"), [("uint8", 0), ("int8", 0), ("uint8", 121), ("uint4", 0), ("int4", 0)]
)
def test_gradients_are_those_of_the_paper(dtype: str, zero_point: int, axis: int | None) -> None:
    rng = np.random.default_rng(3)
    x = rng.normal(0, 1, (6, 5, 7, 3)).astype(np.float32)
    qmin, qmax = INTEGER_RANGES[dtype]
    shape = () if axis is None else (x.shape[axis],)
    scale = rng.uniform(1.5, 3, shape).astype(np.float32) / (qmax - qmin)
    module = FakeQuantize(grid(dtype, scale, np.full(shape, zero_point), axis))
    tensor = torch.from_numpy(x).requires_grad_()
    gradient = rng.normal(0, 1, x.shape).astype(np.float32)
    module.train()(tensor).backward(torch.from_numpy(gradient))
    along = [1] * x.ndim
    if axis is not None:
        along[axis] = -1
    others = tuple(a for a in range(x.ndim) if a != axis)
    wide = scale.astype(np.float64).reshape(along)
    by_x, by_scale = reference(x, gradient, wide, qmin - zero_point, qmax - zero_point, others)
    ratio = x / wide
    safe = np.abs(np.stack([ratio - (qmin - zero_point), ratio - (qmax - zero_point)])).min(axis=0) > 0.001
    assert safe.mean() > 0.9
    np.testing.assert_allclose(tensor.grad.numpy()[safe], by_x[safe], rtol=1e-6)
    assert module.gain.grad is not None
    found = module.gain.grad.numpy().reshape(-1)
    np.testing.assert_allclose(found, by_scale.reshape(-1), rtol=1e-3, atol=1e-4 * np.abs(by_scale).max())


def test_the_scale_follows_finite_differences_of_the_loss() -> None:
    """Where all numbers lie outside the range, nothing is rounded differently when the scale moves a little."""
    x = torch.tensor([9.0, -8.0, 7.0, 30.0])
    module = FakeQuantize(grid("int4", 0.5, 0)).train()
    loss = (module(x) * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum()
    loss.backward()
    factor = 1 / np.sqrt(4 * 7) / (0.5 * 7.5 / 3) ** 2
    assert module.gain.grad is not None
    assert module.gain.grad.item() == pytest.approx((7 * 1 - 8 * 2 + 7 * 3 + 7 * 4) * 0.5 * factor, rel=1e-6)


def test_a_scale_stays_positive_and_a_frozen_one_where_it_is() -> None:
    module = FakeQuantize(grid("int8", 0.1, 0)).train()
    module.gain.data.fill_(-3.0)
    assert torch.isfinite(module(torch.ones(3))).all() and module.scale.item() > 0
    module.freeze()
    before = module.scale.item()
    module(torch.full((4,), 100.0, requires_grad=True)).sum().backward()
    assert module.gain.grad is None and module.scale.item() == before


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_tracked_range_follows_the_data(symmetric: bool) -> None:
    spec = QuantSpec("int8" if symmetric else "uint8", symmetric=symmetric)
    module = FakeQuantize(choose_params(-0.1, 0.2, spec, observer="minmax"), tracked=True).train()
    torch.manual_seed(0)
    for _ in range(800):
        module(torch.rand(100) * 3 - 1)
    wanted = choose_params(-1.0, 2.0, spec)
    assert module.scale.item() == pytest.approx(float(wanted.scale), rel=0.03)
    assert abs(int(module.zero_point) - int(wanted.zero_point)) <= 2
    module.eval()
    before = module.scale.item()
    module(torch.rand(100) * 50)
    assert module.scale.item() == before


def test_a_state_is_restored_and_quantizers_can_be_switched_off() -> None:
    first, second = (torch.nn.Sequential(FakeQuantize(grid("uint8", s, z))) for s, z in ((0.5, 3), (0.25, 9)))
    second.load_state_dict(first.state_dict())
    x = torch.linspace(-9, 9, 50)
    torch.testing.assert_close(first(x), second(x), rtol=0, atol=0)
    with without_quantizers(first):
        assert (first(x) == x).all()
    assert not (first(x) == x).all() and len(quantizers(first)) == 1


def test_binary_weights_are_signs_times_the_mean_magnitude() -> None:
    params = QuantParams("int2", np.ones(2, np.float32), np.zeros(2, np.int64), axis=0, narrow_range=True)
    binarize = Binarize(params).train()
    weight = torch.tensor([[0.5, -1.5, 0.0], [2.0, 0.9, -0.6]], requires_grad=True)
    made = binarize(weight)
    scales = [2 / 3, 3.5 / 3]  # the rows' means of magnitudes
    assert torch.allclose(made, torch.tensor([[1, -1, 1], [1, 1, -1]]) * torch.tensor(scales)[:, None])
    assert len(made.detach().abs().unique()) == 2
    gradient = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    made.backward(gradient)
    # Through the sign where a weight is within 1, times the scale; and through the scale, a third of each sign for every element.
    through = [[1 * scales[0], 0, 3 * scales[0]], [0, 5 * scales[1], 6 * scales[1]]]
    by_scale = [(1 - 2 + 3) / 3, (4 + 5 - 6) / 3]
    signs = [[1, -1, 0], [1, 1, -1]]  # at 0 a magnitude has no slope
    expected = [
        [t + b * s for t, s in zip(*row, strict=True)]
        for row, b in zip(zip(through, signs, strict=True), by_scale, strict=True)
    ]
    assert weight.grad is not None
    assert torch.allclose(weight.grad, torch.tensor(expected), atol=1e-6)
