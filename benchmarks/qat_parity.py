"""Whether the exported graph computes what was trained: codes layer by layer, fed the same codes, and decisions end to end."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from qat_part import Part, holds
from qat_resnet20 import INPUT, _Work, click_say
from resnet20 import CHECKPOINT, FACTORY
from torch import Tensor, nn
from torch.nn import functional as F

import edgekit
from edgekit.backend import get_backend
from edgekit.graph.annotations import get_params
from edgekit.graph.io import load_annotated
from edgekit.graph.run import Session
from edgekit.lowering.qdq import lower_qdq
from edgekit.method import Method
from edgekit.reference import resolve_reference
from edgekit.target import load_target
from edgekit.training.checkpoint import load_checkpoint
from edgekit.training.digits_net import digits_net
from edgekit.training.fake_quant import FakeQuantize
from edgekit.training.qat import prepare_qat
from edgekit.worker import Worker

SAMPLES = 2000
STEPS = 20
MOST_CODES, SAME = 0.001, {"x86-onnxruntime": 0.999, "x86-openvino": 0.995}


class Transformer(nn.Module):
    """Two layers on 16 tokens, with a class for each sample."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, width), nn.Linear(width, 10)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out((q @ k.transpose(-1, -2) / 6).softmax(-1) @ v)
        return x + self.down(F.gelu(self.up(self.after(x))))


@dataclass(frozen=True, slots=True)
class _Net:
    """A float network, what its quantizers start from, and the samples that it is tried on."""

    name: str
    module: nn.Module
    calibration: np.ndarray[Any, Any]
    test: np.ndarray[Any, Any]


def parity_section(zoo: Path, folder: Path) -> Part:
    """ResNet-20, the demo's network and a transformer, each trained for a few steps so that all grids have moved."""
    rows, claims = [], []
    for net in _nets(zoo, folder):
        for target, least in SAME.items():
            click_say(f"parity: {net.name}, {target}")
            graph = _trained(net, target)
            out = folder / f"{net.name}-{target}".replace(" ", "-")
            edgekit.compress(copy.deepcopy(graph), out, calibration=net.calibration[:64], target=target, proxy="none")
            differ, worst, layers = _codes(graph, load_annotated(out / "model.onnx"), target, net.test[:64])
            same = _same_decisions(graph, out, target, net.test)
            rows.append([net.name, target, str(layers), f"{differ:.4%}", str(worst), f"{same:.2%}"])
            where = f"{net.name}, {target}"
            claims.append(
                holds(
                    f"{where}: at most 0.1 % of codes differ, by one",
                    f"{differ:.4%}",
                    differ <= MOST_CODES and worst <= 1,
                )
            )
            claims.append(
                holds(f"{where}: the same top-1 on {least:.1%} of {len(net.test)}", f"{same:.2%}", same >= least)
            )
    note = (
        "Codes: each tensor's, in torch's simulation and in the exported graph (ONNX Runtime, optimizations off), whose every Quantize "
        "node gets what it gets when all layers before it are fed torch's codes. Top-1: the module against the exported file on its own "
        "runtime (OpenVINO in f32)."
    )
    heads = ["network", "target", "tensors", "codes that differ", "by at most", "same top-1"]
    return Part("Parity", note, heads, rows, claims)


def _nets(zoo: Path, folder: Path) -> Iterator[_Net]:
    work = _Work(zoo, folder)
    work._top1(lambda feeds: {"y": np.zeros((len(feeds[INPUT]), 10))})  # reads the images
    factory = resolve_reference(str(FACTORY), error=RuntimeError, what="factory")
    assert callable(factory)
    images = np.concatenate([batch.feeds[INPUT] for batch in work.batches])[:SAMPLES]
    yield _Net("ResNet-20", load_checkpoint(zoo / CHECKPOINT, factory=factory), work.calibration[INPUT][:256], images)
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    digits = rng.normal(0.3, 0.4, (SAMPLES + 256, 1, 8, 8)).clip(0, 1).astype(np.float32)
    yield _Net("demo network", digits_net().eval(), digits[SAMPLES:], digits[:SAMPLES])
    tokens = rng.normal(0, 1, (SAMPLES + 256, 16, 8)).astype(np.float32)
    yield _Net("transformer", Transformer().eval(), tokens[SAMPLES:], tokens[:SAMPLES])


def _trained(net: _Net, target: str) -> nn.Module:
    graph = prepare_qat(net.module, (net.calibration,), target, method=Method()).train()
    optimizer = torch.optim.SGD(graph.parameters(), 1e-3, momentum=0.9)
    x = torch.from_numpy(net.calibration[:64])
    with torch.no_grad():
        wanted = net.module(x).softmax(1)
    for _ in range(STEPS):
        loss = -(wanted * graph(x).log_softmax(1)).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return graph.eval()


def _codes(graph: nn.Module, model: ir.Model, target: str, x: np.ndarray[Any, Any]) -> tuple[float, int, int]:
    """The share of codes that differ, by how much at most, and how many tensors were compared."""
    seen: dict[str, np.ndarray[Any, Any]] = {}
    quantizers = {
        name: child for name, child in graph.named_modules() if isinstance(child, FakeQuantize) and child.axis is None
    }
    calls = [node for node in graph.graph.nodes if node.op == "call_module" and node.target in quantizers]  # type: ignore[union-attr, operator]
    interpreter = _Recorder(graph, {node.name: node.args[0].name for node in calls}, seen)
    with torch.no_grad():
        interpreter.run(torch.from_numpy(x))
    lowered = lower_qdq(model, load_target(target))
    cut, grids = _cut(lowered, model, seen)
    feeds = {cut.graph.inputs[0].name or "": x} | {f"{name}_dequantized": array for name, array in seen.items() if f"{name}_dequantized" in
             {value.name for value in cut.graph.inputs}}  # fmt: skip
    found = Session(cut, optimize=False).run(feeds)
    different = total = worst = 0
    for name, (scale, zero_point) in grids.items():
        ours = np.rint(seen[name] / scale) + zero_point
        apart = np.abs(found[f"{name}_quantized"].astype(np.int64) - ours.astype(np.int64))
        different, total, worst = different + int((apart > 0).sum()), total + apart.size, max(worst, int(apart.max()))
    return different / max(total, 1), worst, len(grids)


class _Recorder(torch.fx.Interpreter):
    """Keeps what quantizers make, by the name of what they round."""

    def __init__(self, graph: Any, names: Mapping[str, str], seen: dict[str, Any]) -> None:
        super().__init__(graph)
        self.names, self.seen = names, seen

    def run_node(self, n: Any) -> Any:
        made = super().run_node(n)
        if n.name in self.names:
            self.seen[self.names[n.name]] = made.detach().numpy()
        return made


def _cut(lowered: ir.Model, model: ir.Model, seen: Mapping[str, Any]) -> tuple[ir.Model, dict[str, tuple[Any, Any]]]:
    """The lowered graph with each dequantized tensor as an input, and each tensor's codes as an output; the grids by name."""
    graph, grids = lowered.graph, {}
    params = {value.name: get_params(value) for node in model.graph for value in node.outputs}
    for node in list(graph):
        output = node.outputs[0]
        name = (output.name or "").removesuffix("_quantized")
        if node.op_type == "QuantizeLinear" and name in seen and params.get(name) is not None:
            scale, zero_point = (node.inputs[place].const_value.numpy() for place in (1, 2))  # type: ignore[union-attr]
            grids[name] = scale, zero_point.astype(np.int64)
            graph.outputs.append(output)
    for node in list(graph):
        output = node.outputs[0]
        name = (output.name or "").removesuffix("_dequantized")
        if node.op_type == "DequantizeLinear" and name in grids:
            fed = ir.Value(name=f"{name}_dequantized", type=ir.TensorType(ir.DataType.FLOAT), shape=output.shape)
            output.name = f"{name}_before"
            output.replace_all_uses_with(fed, replace_graph_outputs=True)
            graph.inputs.append(fed)
    return lowered, grids


def _same_decisions(graph: nn.Module, out: Path, target: str, test: np.ndarray[Any, Any]) -> float:
    [result] = edgekit.export(out, target)
    manifest = result.manifest
    same: Sequence[Any] = []
    from subject import exported

    assert get_backend(manifest.backend)
    with Worker(exported(out, manifest), load_target(target), exact=True) as worker:
        same = []
        for start in range(0, len(test), 250):
            x = test[start : start + 250]
            with torch.no_grad():
                ours = graph(torch.from_numpy(x)).argmax(1).numpy()
            same.append(next(iter(worker.run({manifest.inputs[0].name: x}).values())).argmax(1) == ours)
    return float(np.concatenate(same).mean())
