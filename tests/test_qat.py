"""Quantization-aware training: what is trained is what is exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import edgekit
import edgekit.training
from edgekit.errors import SourceError, TargetError
from edgekit.graph.annotations import annotated_values, attach, get_params
from edgekit.graph.io import load_onnx
from edgekit.graph.run import Session
from edgekit.lowering.qdq import lower_qdq
from edgekit.method import Method
from edgekit.target import load_target
from edgekit.training.fake_quant import FakeQuantize, quantizers
from edgekit.training.qat import prepare_qat


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


class Residual(nn.Module):
    """Convolutions with BatchNorm, a residual Add, a Concat, pools and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.left, self.right = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.pool, self.join = nn.MaxPool2d(2), nn.Conv2d(16, 8, 1)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        y = F.relu(self.left(x) + x)
        z = torch.cat([y, F.relu(self.right(y))], 1)
        z = F.relu(self.join(self.pool(z)))
        return self.head(self.drop(z.mean((2, 3))))


class Block(nn.Module):
    """Half a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.after = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        weights = (q @ k.transpose(-1, -2) / 4).softmax(-1)
        x = x + self.out(weights @ v)
        return x + self.down(F.gelu(self.up(self.after(x))))


def shaken(module: nn.Module, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    for child in module.modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            child.running_mean.normal_()
            child.running_var.uniform_(0.5, 2)
        elif isinstance(child, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(child.weight)
    return module.eval()


NETS = {"residual": (Residual, (64, 3, 12, 12)), "transformer": (Block, (64, 10, 16))}


def trained(name: str, target: str, **options: Any) -> tuple[nn.Module, np.ndarray]:
    """A network whose weights and grids have moved away from where they started."""
    make, shape = NETS[name]
    data = normal(*shape)
    graph = prepare_qat(shaken(make()), (data,), target, **options).train()
    optimizer = torch.optim.SGD(graph.parameters(), 1e-2)
    torch.manual_seed(0)
    for _ in range(5):
        loss = (graph(torch.from_numpy(data)) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return graph.eval(), data


def exported(graph: nn.Module, data: np.ndarray, target: str, folder: Path, **options: Any) -> Any:
    """The annotated model that `compress` makes of it, nothing chosen by itself that training has chosen."""
    edgekit.compress(graph, folder, calibration=data, target=target, **options)
    return attach(load_onnx(folder / "model.onnx"))


@pytest.mark.parametrize("scales", ["learned", "tracked"])
@pytest.mark.parametrize("target", ["portable", "x86-onnxruntime", "x86-openvino", "cuda-tensorrt"])
@pytest.mark.parametrize("name", list(NETS))
def test_what_is_trained_is_what_is_exported(name: str, target: str, scales: Any, tmp_path: Path) -> None:
    graph, data = trained(name, target, scales=scales)
    model = exported(graph, data[:32], target, tmp_path / "out")
    rules = load_target(target)
    simulated = Session(lower_qdq(model, rules), optimize=False)
    x = normal(200, *data.shape[1:], seed=5)
    [theirs] = simulated.run({simulated.input_names[0]: x}).values()
    ours = graph(torch.from_numpy(x)).detach().numpy()
    plain = Session(model, optimize=False).run({simulated.input_names[0]: x})
    [floats] = plain.values()
    quantization = np.abs(theirs - floats).mean()
    assert quantization > 0
    assert np.abs(ours - theirs).mean() < 0.05 * quantization  # a code may flip where sums are ordered differently


@pytest.mark.parametrize("name", list(NETS))
def test_trained_grids_are_not_moved(name: str, tmp_path: Path) -> None:
    graph, data = trained(name, "portable")
    model = exported(graph, data[:32], "portable", tmp_path / "out")
    found = [params for value in annotated_values(model.graph) if (params := get_params(value)) is not None]
    for quantizer in quantizers(graph):
        own = quantizer.params()
        assert any(
            np.array_equal(params.scale, own.scale)
            and np.array_equal(params.zero_point, own.zero_point)
            and params.fixed
            for params in found
        ), quantizer
    layers = [node for node in model.graph if node.op_type in ("Conv", "Gemm", "MatMul")]
    weights = [get_params(node.inputs[1]) for node in layers if node.inputs[1].is_initializer()]
    assert weights and all(params is not None and params.fixed and params.codes is None for params in weights)


def test_quantizers_stand_where_the_target_quantizes() -> None:
    graph = prepare_qat(shaken(Residual()), (normal(16, 3, 12, 12),), "x86-openvino")
    names = {
        name.removeprefix("quantizers.") for name, child in graph.named_modules() if isinstance(child, FakeQuantize)
    }
    weights = {"stem__weight", "left__weight", "right__weight", "join__weight", "head__weight"}
    assert weights < names
    assert {"x", "relu", "relu_1", "relu_3"} < names
    kinds = {child.dtype for child in quantizers(graph)}
    assert kinds == {"uint8", "int8"}
    assert all(child.axis == 0 for name, child in graph.quantizers.named_children() if name in weights)


def test_joined_tensors_share_one_grid() -> None:
    graph = prepare_qat(shaken(Residual()), (normal(16, 3, 12, 12),))
    [join] = [node for node in graph.graph.nodes if "cat" in str(node.target)]
    inputs = join.args[0]
    assert len({node.target for node in inputs}) == 1 and all(node.op == "call_module" for node in inputs)


def test_a_quantizer_stands_before_dropout_not_behind() -> None:
    graph = prepare_qat(shaken(Residual()), (normal(16, 3, 12, 12),))
    [drop] = [node for node in graph.graph.nodes if str(node.target).startswith("dropout.")]
    assert str(drop.args[0].target).startswith("quantizers.")


@pytest.mark.parametrize("target", ["x86-openvino", "x86-onnxruntime", "cuda-tensorrt"])
def test_four_bits_are_unsigned_behind_a_relu(target: str, tmp_path: Path) -> None:
    method = Method(weights="int4", precision="int4")
    graph, data = trained("residual", target, method=method)
    assert {child.dtype for child in quantizers(graph)} == {"uint4", "int4"}
    x = normal(100, 3, 12, 12, seed=3)
    model = exported(graph, data[:32], target, tmp_path / "out", method=method)
    simulated = Session(lower_qdq(model, load_target(target)), optimize=False)
    [theirs] = simulated.run({simulated.input_names[0]: x}).values()
    assert np.abs(graph(torch.from_numpy(x)).detach().numpy() - theirs).mean() < 0.005 * np.abs(theirs).mean()


def test_the_same_module_gives_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        graph, data = trained("residual", "portable")
        exported(graph, data[:16], "portable", tmp_path / folder)
    assert (tmp_path / "a" / "model.onnx").read_bytes() == (tmp_path / "b" / "model.onnx").read_bytes()


class Twice(nn.Module):
    """One layer in two places, and outputs in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, image: Tensor) -> dict[str, Any]:
        x = F.relu(self.conv(F.relu(self.conv(F.relu(self.stem(image))))))
        return {"map": x, "pooled": (x.mean((2, 3)),)}


def test_a_weight_that_is_used_twice_has_one_quantizer(tmp_path: Path) -> None:
    data = normal(32, 3, 12, 12)
    graph = edgekit.training.prepare_qat(Twice(), {"image": data})
    assert len([name for name, _ in graph.quantizers.named_children() if name.startswith("conv__weight")]) == 1
    x = torch.from_numpy(normal(5, 3, 12, 12, seed=2))
    made = graph(image=x)
    assert list(made) == ["map", "pooled"] and isinstance(made["pooled"], tuple)
    made["map"].sum().backward()
    assert graph.get_parameter("conv.weight").grad is not None
    model = exported(graph.eval(), data, "portable", tmp_path / "out")
    assert {value.name for value in model.graph.outputs} == {"map", "pooled.0"}


def test_frozen_quantizers_do_not_learn() -> None:
    graph = prepare_qat(shaken(Residual()), (normal(16, 3, 12, 12),)).train()
    for quantizer in quantizers(graph):
        quantizer.freeze()
    graph(torch.from_numpy(normal(4, 3, 12, 12))).sum().backward()
    assert all(quantizer.gain.grad is None for quantizer in quantizers(graph))
    assert graph.get_parameter("left.weight").grad is not None


@pytest.mark.parametrize("target", ["portable", "x86-onnxruntime"])
@pytest.mark.parametrize("name", list(NETS))
def test_binary_weights_come_out_as_two_codes(name: str, target: str, tmp_path: Path) -> None:
    graph, data = trained(name, target, method=Method(weights="binary"))
    before = {key: value.clone() for key, value in graph.state_dict().items()}
    model = exported(graph, data[:32], target, tmp_path / "out")
    assert all(torch.equal(value, before[key]) for key, value in graph.state_dict().items())
    weights = [
        params
        for value in annotated_values(model.graph)
        if (params := get_params(value)) is not None and value.const_value is not None
    ]
    assert len(weights) >= 4
    assert {(params.dtype, params.qmin, params.qmax) for params in weights} == {("int2", -1, 1)}
    lowered = lower_qdq(model, load_target(target))
    codes = [
        value.const_value.numpy()
        for key, value in lowered.graph.initializers.items()
        if "weight" in key and key.endswith("_quantized")
    ]
    assert len(codes) >= 4
    assert all(set(np.unique(array.astype(int))) == {-1, 1} for array in codes)
    x = normal(50, *data.shape[1:], seed=5)
    [theirs] = Session(lowered, optimize=False).run({lowered.graph.inputs[0].name: x}).values()
    ours = graph(torch.from_numpy(x)).detach().numpy()
    assert np.abs(ours - theirs).mean() < 0.02 * np.abs(ours).mean()


def test_binary_weights_need_training(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="binary weights are for training: add --qat"):
        edgekit.compress(
            shaken(Residual()), tmp_path, calibration=normal(8, 3, 12, 12), method=Method(weights="binary")
        )


def test_code_that_fixes_the_batch_is_refused_with_what_to_do() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(1, 2, 3), nn.Linear(8, 2)

        def forward(self, image: Tensor) -> Tensor:
            return self.head(self.conv(image).reshape(len(image), -1))

    image = np.random.default_rng(0).normal(size=(8, 1, 4, 4)).astype(np.float32)
    with pytest.raises(
        SourceError, match=r"batches of 1 alone .*'image'.* larger ones, such as \(8, 1, 4, 4\); .*len\(\)"
    ):
        prepare_qat(Fixed(), {"image": image})
