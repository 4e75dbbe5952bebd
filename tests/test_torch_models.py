"""PyTorch modules of all kinds through the public door: compressed, run beside the module on another batch, exported; or refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import edgekit
from edgekit.errors import SourceError
from edgekit.pipelines.compress import CompressResult
from graphs import Array, normal, run
from torch_nets import (
    Attention,
    Branching,
    Caching,
    ConvLstm,
    Counting,
    Decoder,
    Masked,
    OneSample,
    Optional,
    Padded,
    Recurrent,
    Resized,
    Returning,
    Streaming,
)

FAST = edgekit.Method(calibrator="minmax", smooth=False, bias_correction=False, rounding="nearest")
SAMPLES = 24

Data = Mapping[str, Array] | list[dict[str, Array]]


def compressed(module: nn.Module, data: Data, folder: Path) -> CompressResult:
    return edgekit.compress(module, folder, calibration=data, method=FAST, proxy="none")


def outputs(module: nn.Module, feeds: Mapping[str, Array]) -> list[Array]:
    """All tensors in what the module returns in eval mode, in order."""
    modes = [child.training for child in module.modules()]
    with torch.no_grad():
        result = module.eval()(**{name: torch.from_numpy(array) for name, array in feeds.items()})
    for child, training in zip(module.modules(), modes, strict=True):
        child.training = training
    return [leaf.numpy() for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def check(module: nn.Module, data: Mapping[str, Array], folder: Path, *, batch: int | None = 5) -> CompressResult:
    """Compressed; the float graph computes what the module does, on a batch that it was not traced with."""
    before = {name: value.clone() for name, value in module.state_dict().items()}
    result = compressed(module, data, folder)
    assert all(child.training for child in module.modules()), "it was in training mode, and is again"
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in before.items())
    feeds = {name: array[:batch] for name, array in data.items()}
    ours = run(result.model, feeds).values()
    for actual, expected in zip(ours, outputs(module, feeds), strict=True):
        assert actual.shape == expected.shape
        np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5)
    return result


def layers(result: CompressResult) -> list[str]:
    return [layer.name for layer in result.record.layers]


IMAGES = {"x": normal(SAMPLES, 3, 12, 12)}
ROWS = {"x": normal(SAMPLES, 6)}
TOKENS = {"x": normal(SAMPLES, 7, 8)}
HIDDEN = {"x": normal(SAMPLES, 7, 8), "hidden": np.arange(7) >= np.arange(SAMPLES)[:, None] % 5 + 3}
WORDS = {"words": np.random.default_rng(0).integers(0, 30, (SAMPLES, 7)).astype(np.int32)}


def classifier(*inner: nn.Module, channels: int = 8) -> nn.Module:
    head = [nn.Conv2d(channels, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *inner, *head)


MODELS: dict[str, tuple[Callable[[], nn.Module], Mapping[str, Array]]] = {
    "LSTM, both ways, two layers": (lambda: Recurrent(nn.LSTM(8, 6, 2, batch_first=True, bidirectional=True)), TOKENS),
    "GRU, time first": (lambda: Recurrent(nn.GRU(8, 6)), TOKENS),
    "GRU with weight_norm": (
        lambda: Recurrent(parametrizations.weight_norm(nn.GRU(8, 6, batch_first=True), "weight_hh_l0")), TOKENS,
    ),
    "LSTMCell": (Decoder, TOKENS),
    "attention with its weights": (Attention, TOKENS),
    "embedding of int32": (lambda: nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 3)), {"input": WORDS["words"]}),
    **{f"pad {mode}": (lambda mode=mode: Padded(mode), IMAGES) for mode in ("constant", "reflect", "replicate", "circular")},
    "bilinear": (lambda: Resized(scale_factor=2, mode="bilinear", align_corners=True), IMAGES),
    "GroupNorm": (lambda: classifier(nn.GroupNorm(2, 8), nn.SiLU()), {"input": IMAGES["x"]}),
    "InstanceNorm": (lambda: classifier(nn.InstanceNorm2d(8, affine=True), nn.ReLU()), {"input": IMAGES["x"]}),
    "PixelShuffle": (lambda: classifier(nn.PixelShuffle(2), channels=2), {"input": IMAGES["x"]}),
    "orthogonal": (
        lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3)), {"input": ROWS["x"]},
    ),
    "DataParallel": (lambda: nn.DataParallel(nn.Sequential(nn.Linear(6, 3))), {"input": ROWS["x"]}),
    "compiled": (lambda: torch.compile(nn.Sequential(torch.compile(nn.Linear(6, 3)))), {"input": ROWS["x"]}),
    "a cache": (Caching, ROWS),
    "a counter": (Counting, ROWS),
    "a mask that is not given": (Optional, ROWS),
    "a mask that is given": (Optional, {**ROWS, "mask": normal(SAMPLES, 8)}),
}  # fmt: skip


@pytest.mark.parametrize("case", MODELS)
def test_a_module_computes_the_same_as_a_graph(tmp_path: Path, case: str) -> None:
    make, data = MODELS[case]
    torch.manual_seed(0)
    assert check(make(), data, tmp_path).record.layers


@pytest.mark.parametrize("make", [ConvLstm, lambda: Masked(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))])
def test_the_artifact_computes_what_the_simulation_does(tmp_path: Path, make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    check(make(), {"x": normal(SAMPLES, 1, 8, 16)} if make is ConvLstm else HIDDEN, tmp_path)
    [result] = edgekit.export(tmp_path, ["x86-onnxruntime"], tune_placement=False)
    assert result.manifest.proof.ran_on
    assert result.manifest.proof.agrees is True
    assert result.manifest.kept_float == ()


# What forward returns.


@dataclass
class Scores:
    logits: Tensor
    hidden: Tensor | None = None
    loss: Tensor | None = None


class Pair(NamedTuple):
    logits: Tensor
    hidden: Tensor


RETURNED: dict[str, tuple[Callable[[Tensor, Tensor], object], list[str]]] = {
    "tuple": (lambda y, h: (y, h), ["output_0", "output_1"]),
    "list with gaps": (lambda y, h: [None, y, 3, h, y.shape[0], "text"], ["output_1", "output_3"]),
    "recurrent": (lambda y, h: (y, (h, h + 1)), ["output_0", "output_1.0", "output_1.1"]),
    "dict": (lambda y, h: {"logits": y, "loss": None, "aux": {"mask": h, "steps": [y, h]}}, [
        "logits", "aux.mask", "aux.steps.0", "aux.steps.1",
    ]),
    "dataclass": (lambda y, h: Scores(y, loss=h.mean()), ["logits", "loss"]),
    "named tuple": (lambda y, h: Pair(y, h), ["logits", "hidden"]),
    "twice": (lambda y, h: {"a": y, "b": y}, ["a", "b"]),
    "names that are taken": (lambda y, h: {"x": y, "head.weight": h, "relu": y + 1}, ["x_out", "head.weight_out", "relu"]),
    "no name": (lambda y, h: {"": y, 0: h}, ["output", "0"]),
    "a constant": (lambda y, h: {"logits": y, "anchors": torch.ones(3)}, ["logits", "anchors"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", RETURNED)
def test_outputs_are_called_as_forward_returns_them(tmp_path: Path, kind: str) -> None:
    give, names = RETURNED[kind]
    result = compressed(Returning(give), ROWS, tmp_path)
    ran = run(result.model, {"x": ROWS["x"][:5]})
    assert list(ran) == names
    logits, hidden = outputs(Returning(lambda y, h: (y, h)), {"x": ROWS["x"][:5]})
    first = {"list with gaps": "output_1", "names that are taken": "x_out", "no name": "output"}.get(kind, names[0])
    np.testing.assert_allclose(ran[first], logits, rtol=0, atol=1e-5)
    assert hidden.shape == (5, 8)


@pytest.mark.parametrize(
    ("give", "message"),
    [
        (
            lambda y, h: {"y": y, "cache": iter([h])},
            r"returns a list_iterator under 'cache'; return tensors, in a tuple, a dict or a",
        ),
        (lambda y, h: None, r"Returning\.forward returns no tensor, and a graph needs an output"),
    ],
)
def test_what_is_no_tensor_cannot_be_returned_alone(
    tmp_path: Path, give: Callable[[Tensor, Tensor], object], message: str
) -> None:
    with pytest.raises(SourceError, match=message):
        compressed(Returning(give), ROWS, tmp_path)


# Batches, states and sizes.


@pytest.mark.parametrize("batch", [1, 3])
def test_recurrent_states_have_the_batch_second(tmp_path: Path, batch: int) -> None:
    calls = [
        {"x": normal(batch, 5, 6, seed=i), "h": normal(2, batch, 4, seed=i), "c": normal(2, batch, 4)}
        for i in range(12)
    ]
    torch.manual_seed(0)
    module = Streaming()
    result = compressed(module, calls, tmp_path)
    feeds = {"x": normal(7, 5, 6), "h": normal(2, 7, 4), "c": normal(2, 7, 4)}
    ran = run(result.model, feeds)
    assert list(ran) == ["y", "h_out", "c_out"]
    for actual, expected in zip(ran.values(), outputs(module, feeds), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("how", ["reshape", "squeeze", "int", "loop"])
def test_a_model_that_takes_one_sample_gets_a_batch_of_one(tmp_path: Path, how: str) -> None:
    result = check(OneSample(how), IMAGES, tmp_path, batch=1)
    assert layers(result) == ["conv", "head"]


def test_samples_without_a_batch_are_calls_of_their_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = Recurrent(nn.GRU(8, 6), time_first=True), normal(SAMPLES, 7, 1, 8)
    result = compressed(module, {"x": x}, tmp_path)
    [ours] = run(result.model, {"x": x[3]}).values()
    np.testing.assert_allclose(ours, outputs(module, {"x": x[3]})[0], rtol=0, atol=1e-5)


def test_a_program_keeps_the_axes_that_it_was_exported_with(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 3)).eval()
    shapes = {"input": {0: torch.export.Dim("batch"), 1: torch.export.Dim("words", max=64)}}
    torch.export.save(
        torch.export.export(module, (torch.ones(2, 7, dtype=torch.long),), dynamic_shapes=shapes), tmp_path / "net.pt2"
    )
    rng = np.random.default_rng(0)
    calls = [{"input": rng.integers(0, 30, (2, 5 + index % 3))} for index in range(12)]
    result = edgekit.compress(tmp_path / "net.pt2", tmp_path / "out", calibration=calls, method=FAST, proxy="none")
    words = rng.integers(0, 30, (3, 11))
    [ours] = run(result.model, {"input": words}).values()
    np.testing.assert_allclose(ours, module(torch.from_numpy(words)).detach().numpy(), rtol=0, atol=1e-5)


# Types.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_types_are_computed_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(400, 3)).to(dtype)
    result = compressed(module, {"input": IMAGES["x"]}, tmp_path)
    assert layers(result) == ["0", "3"]
    assert {value.dtype for value in module.parameters()} == {dtype}
    [ours] = run(result.model, {"input": IMAGES["x"]}).values()
    assert ours.dtype == np.float32
    expected = outputs(module, {"input": IMAGES["x"].astype(np.float64)}) if dtype == torch.float64 else outputs(
        module.float(), {"input": IMAGES["x"]}
    )  # fmt: skip
    np.testing.assert_allclose(ours, expected[0], rtol=0, atol=1e-5)


# What no graph can hold.


class Step(nn.Module):
    def __init__(self, step: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.register_buffer("total", torch.zeros(3))
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return self.step(self, self.linear(x))


def accumulated(module: nn.Module, y: Tensor) -> Tensor:
    module.total += y.mean(0)  # type: ignore[operator]
    return y + module.total


class Keywords(nn.Module):
    def forward(self, **batch: Tensor) -> Tensor:
        return batch["x"] * 2


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "dropout": (lambda: Step(lambda _, y: F.dropout(y)), r"changes from call to call .* random numbers \(F\.dropout without training="),
    "state": (lambda: Step(accumulated), r"it keeps state in the buffer 'total', which a graph cannot; make that an input"),
    "branch": (Branching, r"it branches on the values in a tensor \(.*torch_nets\.py, line \d+\).*; use torch\.where or torch\.cond"),
    "bfloat16": (lambda: Step(lambda m, y: F.linear(y.bfloat16(), m.linear.weight[:, :3].bfloat16()).float()), "computes in bfloat16, "),
    "no operator": (lambda: Step(lambda _, y: torch.linalg.inv(y.T @ y)), r"aten\.linalg_inv_ex has no ONNX equivalent; replace"),
    "scripted": (lambda: nn.Sequential(torch.jit.script(nn.Linear(6, 3))), r"holds TorchScript \(0\), .* give the nn\.Module that"),
    "meta": (lambda: nn.Sequential(nn.Linear(6, 3, device="meta")), r"has no numbers \(device meta\); load its weights first"),
    "any keywords": (Keywords, r"takes its inputs by \*\*batch, which torch cannot trace; name them in forward"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("case", REFUSED)
def test_what_no_graph_can_hold_is_refused_in_one_sentence(tmp_path: Path, case: str) -> None:
    make, message = REFUSED[case]
    module = make()
    data = {"input": ROWS["x"]} if isinstance(module, nn.Sequential) else ROWS
    with pytest.raises(SourceError, match=message) as caught:
        compressed(module, data, tmp_path)
    assert "\n" not in str(caught.value)


def test_hidden_tokens_that_torch_sets_to_zero_are_explained(tmp_path: Path) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(
        SourceError, match=r"fast path .* zeros where src_key_padding_mask .* enable_nested_tensor=False"
    ):
        compressed(Masked(nn.TransformerEncoder(layer, 1), pooled=False), HIDDEN, tmp_path)
    whole = Masked(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), pooled=False)
    assert layers(compressed(whole, HIDDEN, tmp_path))


def test_a_traced_module_beside_named_samples_is_refused_by_what_it_is(tmp_path: Path) -> None:
    traced = torch.jit.trace(nn.Linear(6, 3), torch.ones(2, 6))  # type: ignore[no-untyped-call]
    with pytest.raises(SourceError, match="TorchScript"):
        edgekit.compress(traced, tmp_path / "out", calibration={"input": np.ones((40, 6), np.float32)})
