from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekit.errors import SourceError
from edgekit.training.export_onnx import export_onnx

sys.path.insert(0, str(Path(__file__).parent / "models"))
from resnet20 import ResNet20, resnet20

ROOT = Path(__file__).parent.parent
RNG = np.random.default_rng(0)


def serialized(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString(deterministic=True)


def run(model: ir.Model, feeds: dict[str, Any]) -> list[Any]:
    session = ort.InferenceSession(serialized(model), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def floats(*shape: int) -> Any:
    return RNG.standard_normal(shape).astype(np.float32)


def by_name(model: ir.Model) -> dict[str, ir.Node]:
    return {str(node.name): node for node in model.graph}


def settled(module: nn.Module) -> nn.Module:
    """The module with batch statistics as after some training, so that folding them matters."""
    torch.manual_seed(0)
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            nn.init.uniform_(child.weight, 0.5, 1.5)
            nn.init.normal_(child.bias)
            nn.init.normal_(child.running_mean)
            nn.init.uniform_(child.running_var, 0.5, 2.0)
    return module.eval()


@pytest.fixture(scope="module")
def resnet() -> ResNet20:
    torch.manual_seed(0)
    module = settled(resnet20())
    assert isinstance(module, ResNet20)
    return module


@pytest.fixture(scope="module")
def resnet_onnx(resnet: ResNet20) -> ir.Model:
    return export_onnx(resnet, (floats(1, 3, 32, 32),))


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_onnx_computes_what_the_module_computes(resnet: ResNet20, resnet_onnx: ir.Model, batch: int) -> None:
    image = floats(batch, 3, 32, 32)
    (scores,) = run(resnet_onnx, {"image": image})
    with torch.no_grad():
        expected = resnet(torch.from_numpy(image)).numpy()
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-4)


def test_the_file_is_valid_onnx(resnet_onnx: ir.Model) -> None:
    onnx.checker.check_model(serialized(resnet_onnx), full_check=True)
    assert resnet_onnx.opset_imports[""] == 21


def test_batchnorm_is_folded(resnet_onnx: ir.Model) -> None:
    counts = Counter(node.op_type for node in resnet_onnx.graph)
    assert counts == Counter(Conv=19, Relu=19, Add=9, Slice=4, Pad=2, AveragePool=1, Reshape=1, Gemm=1)


def test_nodes_bear_the_paths_of_their_modules(resnet: ResNet20, resnet_onnx: ir.Model) -> None:
    nodes = by_name(resnet_onnx)
    assert len(nodes) == len(list(resnet_onnx.graph)), "names are unique"
    layers = {name for name, child in resnet.named_modules() if isinstance(child, nn.Conv2d | nn.Linear)}
    assert {name for name, node in nodes.items() if node.op_type in ("Conv", "Gemm")} == layers
    for name in layers:
        assert str(nodes[name].inputs[1].name) == f"{name}.weight"
        assert str(nodes[name].inputs[2].name) == f"{name}.bias"
    assert [name for name in nodes if name.startswith("layer2.0/")] == [
        *("layer2.0/Relu", "layer2.0/Slice", "layer2.0/Slice_1", "layer2.0/Pad", "layer2.0/Add", "layer2.0/Relu_1"),
    ]


def test_first_dimensions_are_named_batch(resnet_onnx: ir.Model) -> None:
    for value in (*resnet_onnx.graph.inputs, *resnet_onnx.graph.outputs):
        assert value.shape is not None
        assert str(value.shape[0]) == "batch"
        assert all(isinstance(size, int) for size in value.shape[1:])


def test_no_metadata_and_no_paths_are_left(resnet_onnx: ir.Model) -> None:
    content = serialized(resnet_onnx)
    for leaked in (str(ROOT), sys.prefix, "resnet20.py", "stack_trace", "pkg."):
        assert leaked.encode() not in content


def test_two_processes_write_the_same_bytes(resnet_onnx: ir.Model) -> None:
    code = (
        "import hashlib, sys; sys.path.insert(0, 'tests'); import test_export_onnx as t\n"
        "t.torch.manual_seed(0); module = t.settled(t.resnet20())\n"
        "model = t.export_onnx(module, (t.np.ones((4, 3, 32, 32), t.np.float32),))\n"
        "print(hashlib.sha256(t.serialized(model)).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == hashlib.sha256(serialized(resnet_onnx)).hexdigest(), done.stderr


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    export_onnx(nn.Linear(3, 2).eval(), (floats(2, 3),))
    assert capfd.readouterr() == ("", "")


def test_the_model_is_cut_loose_from_the_module() -> None:
    module = nn.Linear(3, 2)
    model = export_onnx(module, (floats(2, 3),))
    before = serialized(model)
    with torch.no_grad():
        module.weight.zero_()
    assert serialized(model) == before


def test_export_is_in_eval_mode_and_leaves_the_mode_alone() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout())
    module[1].eval()
    statistics = module[1].running_mean.clone()
    model = export_onnx(module, (floats(2, 3, 8, 8),))
    assert [node.op_type for node in model.graph] == ["Conv"]
    assert [child.training for child in module] == [True, False, True]
    assert torch.equal(module[1].running_mean, statistics)


class Encoder(nn.Module):
    """An attention block on 3-D input with tied embedding and head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.query = nn.Linear(8, 8)
        self.key = nn.Linear(8, 8, bias=False)
        self.act = nn.ReLU()
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        scores = self.query(x) @ self.key(x).transpose(1, 2) - (1 - attention_mask[:, None, :].float()) * 1e4
        x = self.act(scores.softmax(-1) @ x)
        return {"logits": self.head(x), "pooled": self.act(x.mean(1))}


@pytest.fixture(scope="module")
def encoder() -> tuple[nn.Module, ir.Model]:
    torch.manual_seed(0)
    module = Encoder().eval()
    example = {"attention_mask": np.ones((1, 6), np.int64), "input_ids": np.ones((1, 6), np.int64)}
    return module, export_onnx(module, example)


def test_named_inputs_and_dict_outputs_keep_their_names(encoder: tuple[nn.Module, ir.Model]) -> None:
    module, model = encoder
    assert {value.name for value in model.graph.inputs} == {"input_ids", "attention_mask"}
    assert [value.name for value in model.graph.outputs] == ["logits", "pooled"]
    assert {str(value.shape[0]) for value in model.graph.inputs if value.shape} == {"batch"}
    feeds = {"input_ids": RNG.integers(0, 20, (3, 6)), "attention_mask": RNG.integers(0, 2, (3, 6))}
    feeds["attention_mask"][:, 0] = 1
    expected = module(**{name: torch.from_numpy(array) for name, array in feeds.items()})
    for actual, name in zip(run(model, feeds), ("logits", "pooled"), strict=True):
        np.testing.assert_allclose(actual, expected[name].detach().numpy(), rtol=0, atol=1e-5)


def test_a_linear_on_3d_input_gives_its_name_to_the_matmul(encoder: tuple[nn.Module, ir.Model]) -> None:
    nodes = by_name(encoder[1])
    assert (nodes["query"].op_type, nodes["query/Add"].op_type) == ("MatMul", "Add")
    assert nodes["query"].inputs[1].name == "query.weight"
    assert nodes["key"].op_type == "MatMul"
    assert nodes["embed"].op_type == "Gather"
    assert nodes["head"].op_type == "MatMul", "not named after the embedding that it shares its weight with"
    assert {"act/Relu", "act/Relu_1"} <= set(nodes), "a module that is used twice"


class Several(nn.Module):
    """Positional inputs, one without batch; a tuple of outputs, one of them the input itself."""

    def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return x, (x * scale).relu()


def test_tuple_outputs_and_an_input_without_batch() -> None:
    model = export_onnx(Several(), (floats(4, 3), floats(3)))
    assert [value.name for value in model.graph.inputs] == ["x", "scale"]
    assert [value.shape.numpy() for value in model.graph.inputs[1:] if value.shape] == [(3,)]
    x, scale = floats(7, 3), floats(3)
    same, product = run(model, {"x": x, "scale": scale})
    np.testing.assert_array_equal(same, x)
    np.testing.assert_array_equal(product, np.maximum(x * scale, 0))


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(2, 12)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class Unknown(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.svd(x)[1]


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch.ones(5, 5))


@pytest.mark.parametrize(
    ("module", "parts"),
    [
        (FixedBatch(), ["FixedBatch cannot be exported", "batch size 2", "'batch' was specialized", "x.shape[0]"]),
        (Branching(), ["branches on the values in a tensor", "test_export_onnx.py, line", "torch.where"]),
        (Unknown(), ["aten._linalg_svd has no ONNX equivalent", "replace that operator"]),
        (Failing(), ["Failing does not run on the example inputs", "RuntimeError", "test_export_onnx.py, line"]),
    ],
)
def test_what_cannot_be_exported_is_explained(module: nn.Module, parts: list[str]) -> None:
    with pytest.raises(SourceError) as caught:
        export_onnx(module, (floats(2, 3, 4),))
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_inputs_that_forward_does_not_take_are_refused() -> None:
    with pytest.raises(SourceError, match=r"\(image\) do not fit Several\.forward\(x.*missing a required argument"):
        export_onnx(Several(), {"image": floats(2, 3)})
    with pytest.raises(SourceError, match="no batch dimension"):
        export_onnx(Several(), (np.float32(1), np.float32(2)))  # type: ignore[arg-type]
