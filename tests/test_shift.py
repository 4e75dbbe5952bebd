"""One-sided activations of matrix products on targets with symmetric grids only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from edgekit.graph.annotations import get_params, set_params
from edgekit.graph.run import Session
from edgekit.lowering.qdq import lower_qdq
from edgekit.target import load_target
from graphs import Array
from networks import Net, annotate, samples, text

CUDA, X86 = "cuda-tensorrt", "x86-openvino"


def one_sided(*, op: str = "Gemm", others: bool = False) -> ir.Model:
    """Relu, then a matrix product with a bias; perhaps something else reads the Relu, too."""
    net = Net(seed=5)
    x = net.op("Relu", [net.input("x", ["n", 32])], "relu")
    y = (
        net.gemm(x, "head", 32, 8)
        if op == "Gemm"
        else net.op("Add", [net.matmul(x, "head", 32, 8), net.weight("head.bias", 8)], "head.add")
    )
    return net.model(y, *([net.op("Tanh", [x], "other")] if others else []))


def outputs(model: ir.Model, target: str, feeds: dict[str, Array]) -> list[Array]:
    return list(Session(lower_qdq(model, load_target(target)), optimize=False).run(feeds).values())


def shifts(model: ir.Model) -> list[str]:
    return [line for line in text(lower_qdq(model, load_target(CUDA))) if "_shift" in line]


@pytest.mark.parametrize("op", ["Gemm", "MatMul"])
@pytest.mark.parametrize("others", [False, True])
def test_the_codes_are_those_of_the_affine_grid(op: str, others: bool) -> None:
    model = annotate(one_sided(op=op, others=others))
    feeds = samples(model, 33, seed=3)
    (exact, affine, symmetric) = (
        Session(model, optimize=False).run(feeds)["head_y" if op == "Gemm" else "head.add_y"],
        outputs(model, X86, feeds)[0],
        outputs(model, CUDA, feeds)[0],
    )
    noise = float(np.abs(affine - exact).max())
    assert noise > 0
    assert float(np.abs(symmetric - affine).max()) < 0.02 * noise


def test_the_graph() -> None:
    assert text(lower_qdq(annotate(one_sided(others=True)), load_target(CUDA))) == [
        "relu_y = Relu(x)",
        "relu_y_shifted = Add(relu_y, relu_y_shift)",
        "head_y = Gemm(q(relu_y_shifted), q(head.weight), head.bias_corrected)",
        "other_y = Tanh(relu_y)",
        "return head_y, other_y",
    ]


def test_what_correction_wanted_off_the_bias_still_goes_off() -> None:
    model = annotate(one_sided())
    weight = model.graph.initializers["head.weight"]
    params = get_params(weight)
    assert params is not None
    before = outputs(model, CUDA, samples(model, 5))[0]
    row = np.arange(8, dtype=np.float32)
    set_params(weight, replace(params, shift=row))
    np.testing.assert_allclose(
        before - outputs(model, CUDA, samples(model, 5))[0], np.tile(row, (5, 1)), atol=1e-5, rtol=0
    )


def signed() -> ir.Model:
    net = Net(seed=5)
    return net.model(net.gemm(net.op("Tanh", [net.input("x", ["n", 32])], "tanh"), "head", 32, 8))


def behind_a_convolution() -> ir.Model:
    net = Net(seed=5)
    x = net.conv_relu(net.input("x", ["n", 3, 4, 4]), "a", 3, 4)
    return net.model(net.gemm(net.op("Flatten", [x], "flat"), "head", 64, 3))


def scaled() -> ir.Model:
    net = Net(seed=5)
    x = net.op("Relu", [net.input("x", ["n", 32])], "relu")
    return net.model(net.gemm(x, "head", 32, 8, alpha=0.5))


def without_bias() -> ir.Model:
    net = Net(seed=5)
    return net.model(net.matmul(net.op("Relu", [net.input("x", ["n", 32])], "relu"), "head", 32, 8))


def read_by_a_convolution() -> ir.Model:
    net = Net(seed=5)
    x = net.op("Relu", [net.input("x", ["n", 3, 4, 4])], "relu")
    return net.model(net.conv(x, "a", 3, 4))


@pytest.mark.parametrize("build", [signed, behind_a_convolution, scaled, without_bias, read_by_a_convolution])
def test_all_others_stay(build: Callable[[], ir.Model]) -> None:
    assert shifts(annotate(build())) == []


def test_trained_grids_stay_and_affine_targets_need_none() -> None:
    model = annotate(one_sided())
    assert shifts(model)
    assert not any("_shift" in line for line in text(lower_qdq(model, load_target(X86))))
    value = next(node.outputs[0] for node in model.graph if node.op_type == "Relu")
    params = get_params(value)
    assert params is not None
    zero_point = np.full_like(params.zero_point, 128)
    set_params(value, replace(params, fixed=True, zero_point=zero_point))
    assert shifts(model) == []
