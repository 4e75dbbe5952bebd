"""Whole blocks left out: which are blocks, which of them go, and what is left."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import edgekit
from edgekit.errors import GoalError, SourceError
from edgekit.finetune import Finetune
from edgekit.pipelines.compress import compress
from edgekit.pruning import Prune
from edgekit.schedule import Schedule
from edgekit.training.forward import plain_call
from edgekit.training.prune.depth import leave_out
from edgekit.training.prune.flow import Cutting, shorten

IMAGES = (np.random.default_rng(0).normal(size=(6, 3, 8, 8)).astype(np.float32),)
TOKENS = (np.random.default_rng(1).normal(size=(4, 5, 8)).astype(np.float32),)


class Block(nn.Module):
    """A residual of some size."""

    def __init__(self, inputs: int, outputs: int, size: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm = nn.BatchNorm2d(outputs)
        with torch.no_grad():
            self.conv.weight.mul_(size)

    def forward(self, x: Tensor) -> Tensor:
        made = self.norm(self.conv(x))
        return F.relu(made + (x if x.shape == made.shape else 0))


class Stack(nn.Module):
    """One block that changes the width, and residuals of sizes 1, 1e-4, 1e-2 and 2."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(3, 8, 1.0), *(Block(8, 8, size) for size in (1.0, 1e-4, 1e-2, 2.0)))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean((2, 3)))


class Layer(nn.Module):
    """As in transformers' stacks: called with more than its input, and returning a tuple."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.size = size

    def forward(self, x: Tensor, scale: float = 1.0, *, other: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return x + scale * self.size * self.mlp(x), other


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(size) for size in (1.0, 0.01, 0.5))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x, _ = layer(x, 1.0, other=None)
        return self.head(x)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def gone(module: nn.Module, count: int, arrays: tuple[Any, ...] = IMAGES, **given: Any) -> tuple[str, ...]:
    return leave_out(module, count, plain_call(module, arrays), **given)


def run(module: nn.Module, arrays: tuple[Any, ...]) -> Tensor:
    with torch.no_grad():
        return module(*map(torch.from_numpy, arrays))  # type: ignore[no-any-return]


def cut(module: nn.Module, plan: Prune, steps: int = 8) -> tuple[Cutting, list[str]]:
    labels: list[str] = []

    def recover(one: nn.Module, _: Schedule, label: str) -> nn.Module:
        labels.append(label)
        return one

    return shorten(module, plan, IMAGES, recover=recover, schedule=Schedule(steps=steps)), labels


def test_blocks_that_do_least_go_first() -> None:
    assert gone(seeded(Stack), 3) == ("blocks.2", "blocks.3", "blocks.1")


@pytest.mark.parametrize(("make", "arrays", "expected"), [(Stack, IMAGES, "blocks.2"), (Encoder, TOKENS, "layers.1")])
def test_what_is_left_computes_as_with_the_block_s_input_in_the_place_of_its_result(
    make: Callable[[], nn.Module], arrays: tuple[Any, ...], expected: str
) -> None:
    module = seeded(make)
    reference = copy.deepcopy(module)
    reference.get_submodule(expected).register_forward_hook(
        lambda _m, args, out: (args[0], *out[1:]) if isinstance(out, tuple) else args[0]
    )
    assert gone(module, 1, arrays) == (expected,)
    assert torch.equal(run(module, arrays), run(reference, arrays))
    assert module.state_dict().keys() == {k for k in reference.state_dict() if not k.startswith(f"{expected}.")}


def test_ignored_blocks_stay() -> None:
    assert gone(seeded(Stack), 1, ignore=["blocks.2"]) == ("blocks.3",)
    assert gone(seeded(Stack), 1, ignore=["blocks.2.conv"]) == ("blocks.3",)
    with pytest.raises(SourceError, match=r"no layer matches 'block\.2' in 'ignore'; did you mean 'blocks\.2'\?"):
        gone(seeded(Stack), 1, ignore=["block.2"])


@pytest.mark.parametrize(
    ("make", "arrays", "count", "told"),
    [
        (Stack, IMAGES, 5, r"blocks to leave out: 5; 4 can \(blocks\.1, blocks\.2, blocks\.3, blocks\.4\)"),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)),
            IMAGES,
            1,
            "blocks to leave out: 1; none can",
        ),
    ],
)
def test_more_than_there_are(make: Callable[[], nn.Module], arrays: tuple[Any, ...], count: int, told: str) -> None:
    module = seeded(make)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(GoalError, match=told):
        gone(module, count, arrays)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_block_that_runs_twice_stays() -> None:
    class Twice(Stack):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.blocks[2](self.blocks(x)).mean((2, 3)))

    assert gone(seeded(Twice), 1) == ("blocks.3",)


def test_a_block_whose_other_results_are_read_stays() -> None:
    class Reads(Encoder):
        def forward(self, x: Tensor) -> Tensor:
            kept = x
            for layer in self.layers:
                x, other = layer(x, 1.0, other=kept)
                x = x + other
            return self.head(x)

    with pytest.raises(GoalError, match="none can"):
        gone(seeded(Reads), 1, TOKENS)


def test_a_model_that_wants_more_of_its_blocks_than_a_result_is_told() -> None:
    class Asks(Stack):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * sum(block.conv.stride[0] for block in self.blocks)

    with pytest.raises(GoalError, match=r"does not run without any of its blocks \(blocks\.1, .*cut channels instead"):
        gone(seeded(Asks), 1)


def test_macs_and_parameters_are_counted() -> None:
    module = seeded(Stack)
    found, labels = cut(module, Prune(blocks=2))
    block = 64 * 8 * 8 * 9
    assert found.blocks == ("blocks.2", "blocks.3")
    assert found.macs == (64 * 3 * 8 * 9 + 4 * block + 8 * 4, 64 * 3 * 8 * 9 + 2 * block + 8 * 4)
    assert found.parameters[0] - found.parameters[1] == 2 * (8 * 8 * 9 + 8 + 16)
    assert labels == ["round 1"]
    assert len(module.blocks) == 5 and isinstance(module.blocks[2], Block)  # type: ignore[arg-type]


def test_in_rounds() -> None:
    found, labels = cut(seeded(Stack), Prune(blocks=3, schedule="iterative:3"))
    assert found.blocks[:2] == ("blocks.2", "blocks.3")
    assert len(found.blocks) == 3
    assert labels == ["round 1", "round 2", "round 3"]


def test_what_would_be_ignored_is_refused() -> None:
    for given in ({"criterion": "l2"}, {"round_to": 8}, {"scope": "layer"}):
        with pytest.raises(
            ValueError, match="is for channels; blocks go by what the outputs are without them: leave it out"
        ):
            Prune.model_validate({"blocks": 1, **given})
    with pytest.raises(ValueError, match="found macs and blocks"):
        Prune(macs=0.5, blocks=1)


def test_an_onnx_file_has_no_blocks(tmp_path: Path) -> None:
    path = tmp_path / "gemm.onnx"
    ir.save(
        ir.from_onnx_text(
            '<ir_version: 10, opset_import: ["": 21]> g (float[N, 8] x) => (float[N, 8] y) { y = Relu (x) }'
        ),
        path,
    )
    with pytest.raises(SourceError, match="--blocks 1 needs a model with its layers as modules"):
        compress(path, tmp_path / "out", calibration=np.ones((4, 8), np.float32), prune=Prune(blocks=1))


def test_compressed_exported_and_loaded(tmp_path: Path) -> None:
    """The file of ONNX Runtime computes what the module without the block does; so does what `load` gives back."""
    images = np.random.default_rng(2).normal(size=(32, 3, 8, 8)).astype(np.float32)
    module = seeded(Stack)
    found = edgekit.compress(
        module,
        tmp_path / "out",
        calibration=images,
        proxy="none",
        prune=Prune(blocks=2),
        finetune=Finetune(schedule=Schedule(steps=3, track="none")),
    ).record
    assert found.pruned is not None
    assert found.pruned.blocks == ("blocks.2", "blocks.3")
    assert "without blocks.2, blocks.3, MACs" in found.pruned.told
    [done] = edgekit.export(tmp_path / "out", "x86-onnxruntime")
    assert done.manifest.proof.ran_on
    loaded = edgekit.load(tmp_path / "out")
    assert not any(name.startswith(("blocks.2", "blocks.3")) for name in loaded.state_dict())
    assert "blocks.2, blocks.3" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
