"""Checkpoints as training scripts, libraries and wrappers leave them: found and loaded, or refused with the reason."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import edgekit
from edgekit.errors import SourceError
from edgekit.training.checkpoint import load_checkpoint
from graphs import run

State = dict[str, Any]


class Net(nn.Module):
    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bn(self.conv(x)).relu().mean((2, 3)))


class Tokens(nn.Module):
    """Positions in a buffer, which some versions of a library save and others do not."""

    def __init__(self, *, saved: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.register_buffer("position_ids", torch.arange(5)[None], persistent=saved)
        self.register_buffer("scale", torch.tensor([2.0]), persistent=saved)

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x) * self.scale


def weights() -> State:
    torch.manual_seed(1)
    return Net().state_dict()


def under(prefix: str) -> State:
    return {f"{prefix}{key}": value for key, value in weights().items()}


def saved(content: object, folder: Path) -> Path:
    torch.save(content, folder / "net.pt")
    return folder / "net.pt"


def load(content: object, folder: Path, factory: Callable[[], nn.Module] = Net) -> nn.Module:
    return load_checkpoint(saved(content, folder), factory=factory)


def parts() -> State:
    return {name: child.state_dict() for name, child in Net().named_children()}


COUNTED = {"total_ops": torch.zeros(1), "conv.total_params": torch.zeros(1)}
LAYOUTS: dict[str, Callable[[], object]] = {
    "net": lambda: {"net": weights(), "best": 0.9},
    "any name": lambda: {"generator_b": weights(), "epoch": 3},
    "of two, the one that fits": lambda: {"model": {"other": torch.ones(1)}, "ema": weights()},
    "a loss beside it": lambda: {"loss": torch.tensor(0.1), "state_dict": weights()},
    "a wrapper of a library": lambda: {"pytorch-lightning_version": "2", "state_dict": under("model.")},
    "a task's network": lambda: {"state_dict": under("net.")},
    "a backbone": lambda: under("encoder.backbone."),
    "wrappers in any order": lambda: {"model": under("model._orig_mod.module.")},
    "sharded training": lambda: under("_forward_module._fsdp_wrapped_module."),
    "a compiled part": lambda: {key.replace("conv.", "conv._orig_mod."): value for key, value in weights().items()},
    "counted operations": lambda: weights() | COUNTED,
    "counted in data parallel": lambda: under("module.") | {f"module.{key}": value for key, value in COUNTED.items()},
    "criteria": lambda: weights() | {"criterion.weight": torch.ones(2), "aux_loss.pos_weight": torch.ones(2)},
    "a teacher": lambda: {"state_dict": under("model.") | under("teacher.")},
    "a teacher alone": lambda: under("teacher."),
    "a number for each batch count": lambda: weights() | {"bn.num_batches_tracked": torch.tensor([3])},
    "half precision": lambda: {key: value.half() for key, value in weights().items()},
    "sparse": lambda: weights() | {"head.weight": weights()["head.weight"].to_sparse()},
    "averaged": lambda: torch.optim.swa_utils.AveragedModel(filled()).state_dict(),
}


def filled() -> Net:
    net = Net()
    net.load_state_dict(weights())
    return net


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_found_and_what_serves_training_is_left_out(tmp_path: Path, layout: str) -> None:
    loaded = load(LAYOUTS[layout](), tmp_path).state_dict()
    for key, value in weights().items():
        assert loaded[key].dtype == value.dtype
        if "num_batches" not in key:
            torch.testing.assert_close(loaded[key], value, rtol=1e-3, atol=1e-3 if layout == "half precision" else 0)


def test_the_state_dicts_of_a_models_parts_are_joined(tmp_path: Path) -> None:
    content = parts()
    loaded = load(content | {"optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}, tmp_path).state_dict()
    assert torch.equal(loaded["conv.weight"], content["conv"]["weight"])


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        torch.compile,
        torch.optim.swa_utils.AveragedModel,
        lambda net: nn.DataParallel(torch.compile(net)),
    ],
)
def test_a_factory_may_return_a_wrapped_model(tmp_path: Path, wrap: Callable[[nn.Module], nn.Module]) -> None:
    module = load(weights(), tmp_path, lambda: wrap(Net()))
    assert type(module) is Net
    assert torch.equal(module.state_dict()["conv.weight"], weights()["conv.weight"])


@pytest.mark.parametrize("shards", [".safetensors", ".bin"])
def test_a_checkpoint_in_several_files_is_read_by_its_index(tmp_path: Path, shards: str) -> None:
    state = weights()
    halves = {f"model-1{shards}": list(state)[:3], f"model-2{shards}": list(state)[3:]}
    for name, keys in halves.items():
        (save_file if shards == ".safetensors" else torch.save)({key: state[key] for key in keys}, tmp_path / name)  # type: ignore[operator]
    table = {key: name for name, keys in halves.items() for key in keys}
    index = tmp_path / f"model{shards}.index.json"
    index.write_text(json.dumps({"weight_map": table}))
    assert torch.equal(load_checkpoint(index, factory=Net).state_dict()["head.bias"], state["head.bias"])

    with pytest.raises(SourceError, match=r"is a folder; give .* file: it holds model"):
        load_checkpoint(tmp_path, factory=Net)
    index.write_text(json.dumps({"weight_map": {"head.bias": f"../{tmp_path.name}/model-1{shards}"}}))
    with pytest.raises(
        SourceError, match=r"names the file '\.\./.*', which is not beside it; copy or download all files"
    ):
        load_checkpoint(index, factory=Net)
    index.write_text("[]")
    with pytest.raises(SourceError, match="has no table 'weight_map'"):
        load_checkpoint(index, factory=Net)


@pytest.mark.parametrize("by_file", [True, False])
def test_positions_may_be_saved_or_not(tmp_path: Path, by_file: bool) -> None:
    state = Tokens(saved=by_file).state_dict()
    state.setdefault("scale", torch.tensor([2.0]))
    module = load(state, tmp_path, lambda: Tokens(saved=not by_file))
    assert torch.equal(module.state_dict()["embed.weight"], state["embed.weight"])
    with pytest.raises(SourceError, match=r"1 unexpected: scale"):
        load(state | {"scale": torch.tensor([3.0])}, tmp_path, lambda: Tokens(saved=False))


# Weights that other numbers stand for.


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.ConvTranspose1d(4, 3, 3))


def each(change: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*(change(child) if hasattr(child, "weight") else child for child in plain()))


KINDS: dict[str, Callable[[], nn.Module]] = {
    "plain": plain,
    "weight_norm": each(parametrizations.weight_norm),
    "weight_norm by hooks": each(weight_norm),
    "spectral_norm": each(parametrizations.spectral_norm),
    "spectral_norm by hooks": each(spectral_norm),
    "pruned": each(
        lambda child: prune.l1_unstructured(child, "weight", 0.5)  # type: ignore[no-untyped-call]
    ),
}


@pytest.mark.parametrize("wanted", KINDS)
@pytest.mark.parametrize("kind", KINDS)
def test_either_side_may_compute_its_weights(tmp_path: Path, kind: str, wanted: str) -> None:
    torch.manual_seed(2)
    trained = KINDS[kind]()
    for value in trained.parameters():
        nn.init.normal_(value)
    trained.eval()
    module = load(trained.state_dict(), tmp_path, KINDS[wanted])
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(module(x), trained(x), rtol=1e-5, atol=1e-5)


def test_copies_of_a_parametrized_layer_load_from_plain_weights(tmp_path: Path) -> None:
    layer = nn.Linear(4, 4)
    normed = parametrizations.weight_norm(copy.deepcopy(layer))
    state = nn.Sequential(layer, copy.deepcopy(layer)).state_dict()
    module = load(state, tmp_path, lambda: nn.Sequential(normed, copy.deepcopy(normed)))
    assert torch.equal(module.state_dict()["1.weight"], layer.weight)


def test_a_lazy_model_takes_its_sizes_from_the_checkpoint(tmp_path: Path) -> None:
    state = nn.Sequential(nn.Linear(4, 3)).state_dict()
    module = load(state, tmp_path, lambda: nn.Sequential(nn.LazyLinear(3)))
    assert torch.equal(module.state_dict()["0.weight"], state["0.weight"])


# What does not fit.


def packed() -> State:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state: State = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 3)), {nn.Linear}).state_dict()  # type: ignore[no-untyped-call]
    return state


def quantized() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(weights()["head.weight"], 0.1, 0, torch.qint8)


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return Net()


WRONG: dict[str, tuple[Callable[[], object], Callable[[], nn.Module], str]] = {
    "classes": (lambda: Net(7).state_dict(), Net, r"2 of another shape: head\.weight \(7, 4\) where the model has \(2, 4\), head"),
    "codes": (
        lambda: weights() | {"head.weight": weights()["head.weight"].to(torch.int8)}, Net,
        r"1 of another type: head\.weight torch\.int8 where the model has torch\.float32",
    ),
    "quantized": (lambda: weights() | {"head.weight": quantized()}, Net, r"quantized weights: head\.weight; give the float"),
    "packed": (packed, lambda: nn.Sequential(nn.Linear(4, 3)), r"quantized weights: 0\._packed_params.*; give the float checkpoint"),
    "a second head": (lambda: weights() | {"head2.weight": torch.ones(2, 4)}, Net, r"Net: 1 unexpected: head2\.weight; let the"),
    "an average beside it": (lambda: under("model.") | under("ema_model."), Net, r"8 unexpected: ema_model\.conv\.weight, "),
    "a copy in front of it": (lambda: weights() | under("model."), Net, r"8 unexpected: model\.conv\.weight, "),
    "two that fit": (lambda: {"student": weights(), "pupil": weights()}, Net, r"this model 2 times: student, pupil; save the wanted"),
    "no statistics": (
        lambda: {key: value for key, value in weights().items() if "running" not in key}, Net,
        r"2 missing: bn\.running_mean, bn\.running_var",
    ),
    "orthogonal": (
        each(parametrizations.orthogonal)().state_dict, plain, r"missing: 0\.weight.*0\.parametrizations\.weight\.0\.base"
    ),
    "meta": (weights, on_meta, r"factory on_meta\(\) made a model without numbers \(device meta\); build it on the CPU"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused_in_one_sentence(tmp_path: Path, case: str) -> None:
    content, factory, message = WRONG[case]
    with pytest.raises(SourceError, match=message) as caught:
        load(content(), tmp_path, factory)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_with_all_of_it_goes_through_the_public_door(tmp_path: Path) -> None:
    net = filled().eval()
    state = {f"module.model.{key}": value.half() for key, value in net.state_dict().items()}
    content = {"state_dict": state | {"module.criterion.weight": torch.ones(2)}, "optimizer": {"state": {}}, "epoch": 3}
    data = {"x": np.random.default_rng(0).normal(size=(24, 3, 8, 8)).astype(np.float32)}
    result = edgekit.compress(saved(content, tmp_path), tmp_path / "out", calibration=data, model=Net, proxy="none")
    assert [layer.name for layer in result.record.layers] == ["conv", "head"]
    [scores] = run(result.model, data).values()
    np.testing.assert_allclose(scores, net(torch.from_numpy(data["x"])).detach().numpy(), rtol=0, atol=1e-2)
