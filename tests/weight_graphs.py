"""Networks of matrix products with weights on grids, and what they compute by those grids."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from edgekit.backend import Artifact, Backend
from edgekit.graph.annotations import all_values, annotated_values, get_params, get_wish, set_params
from edgekit.graph.io import load_annotated, save_annotated, save_onnx
from edgekit.graph.operators import is_constant
from edgekit.method import Method
from edgekit.passes.assign_specs import assign_specs
from edgekit.passes.simplify import simplify
from edgekit.quant.affine import constant_codes, dequantize
from edgekit.quant.weight_ranges import weight_range
from edgekit.target import Target, load_target
from graphs import Array
from networks import Net, get_params_of

FEATURES, HIDDEN = 128, 256


def numbers(value: ir.Value) -> Array:
    assert value.const_value is not None
    return np.asarray(value.const_value.numpy(), np.float32)


def tokens(*, batch: int | str = "n", features: int = FEATURES, layers: int = 1) -> ir.Model:
    """3-D tokens through MatMul and Add, twice a layer."""
    net = Net(seed=7)
    x = net.input("x", [batch, 6, features])
    for index in range(layers):
        for name, inputs, outputs in ((f"up{index}", features, HIDDEN), (f"down{index}", HIDDEN, features)):
            x = net.op(
                "Add", [net.matmul(x, name, inputs, outputs), net.weight(f"{name}.bias", outputs)], f"{name}.add"
            )
    return net.model(x)


def rows() -> ir.Model:
    """2-D rows through a Gemm with a transposed weight, one without, and one without a bias."""
    net = Net(seed=8)
    x = net.op("Relu", [net.gemm(net.input("x", ["n", FEATURES]), "first", FEATURES, HIDDEN)], "relu")
    second = [x, net.weight("second.weight", HIDDEN, FEATURES), net.weight("second.bias", FEATURES)]
    x = net.op("Gemm", second, "second")
    return net.model(net.op("Gemm", [x, net.weight("third.weight", 64, FEATURES)], "third", transB=1))


def shared() -> ir.Model:
    """Two MatMuls of one input, and one of another with the same weight as the first."""
    net = Net(seed=9)
    x = net.input("x", ["n", 6, FEATURES])
    q = net.matmul(x, "query", FEATURES, FEATURES)
    k = net.op("MatMul", [net.op("Tanh", [x], "tanh"), "query.weight"], "key")
    v = net.matmul(x, "value", FEATURES, FEATURES)
    return net.model(net.op("Add", [net.op("Mul", [q, k], "gate"), v], "sum"))


def picture() -> ir.Model:
    """A convolution of pictures, a ConvTranspose, and a linear head."""
    net = Net(seed=10)
    x = net.conv_relu(net.input("x", ["n", 8, 6, 6]), "conv", 8, 16)
    x = net.op("ConvTranspose", [x, net.weight("up.weight", 16, 4, 2, 2)], "up", strides=[2, 2], kernel_shape=[2, 2])
    return net.model(net.gemm(net.reshape(x, "flat", -1, 576), "head", 576, 10))


def compressed(model: ir.Model, folder: Path, **choices: object) -> ir.Model:
    """The model with grids for constants alone, as a compressed file gives it."""
    method = Method.model_validate({"activations": "none", **choices})
    model = assign_specs(simplify(model), load_target("portable"), method)
    for value in all_values(model.graph):
        wish = get_wish(value)
        if wish is not None and is_constant(value):
            set_params(value, weight_range(numbers(value), wish[0], axis=wish[1]))
    save_annotated(model, folder / "compressed.onnx")
    return load_annotated(folder / "compressed.onnx")


def on_grids(model: ir.Model) -> ir.Model:
    """The float model whose constants are the numbers that their codes stand for."""
    model = model.clone()
    for value in annotated_values(model.graph):
        params = get_params(value)
        assert params is not None
        rounded = dequantize(constant_codes(numbers(value), params), params)
        value.const_value = ir.tensor(rounded, name=value.name)
        set_params(value, None)
    return model


def changed_params(model: ir.Model, name: str, **changes: object) -> ir.Model:
    """The annotated model with other parameters for one constant."""
    model = model.clone()
    value = next(value for value in annotated_values(model.graph) if value.name == name)
    set_params(value, replace(get_params_of(model, name), **changes))  # type: ignore[arg-type]
    return model


def with_options(target: str, **options: str) -> Target:
    """A shipped target with options of its runtime."""
    base = load_target(target)
    merged = {**base.runtime.options, **options}
    return base.model_copy(update={"runtime": base.runtime.model_copy(update={"options": merged})})


def artifact_of(model: ir.Model, backend: Backend, target: Target, folder: Path) -> Artifact:
    """A lowered model, built."""
    save_onnx(model, folder / "model.onnx")
    return backend.convert(folder / "model.onnx", target, folder, precision="int8")


def size_of(artifact: Artifact) -> int:
    """Bytes of all files of an artifact."""
    return sum(file.stat().st_size for file in artifact.files)
