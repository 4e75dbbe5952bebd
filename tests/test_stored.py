"""A stored module comes back without its class, computes the same bits, trains, and refuses files that were changed."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from edgekit.errors import SourceError, UntrustedSourceError
from edgekit.output import sha256
from edgekit.training.export_onnx import export_onnx
from edgekit.training.qat import prepare_qat
from edgekit.training.stored import load_module, save_module
from edgekit.training.structure import PROGRAM, STRUCTURE, WEIGHTS, read_structure


def images(count: int = 2, size: int = 8) -> tuple[np.ndarray, ...]:
    return (np.random.default_rng(0).normal(0, 1, (count, 3, size, size)).astype(np.float32),)


class Everything(nn.Module):
    """BatchNorms that fold and that do not, Dropout, in-place operators, a residual, attention, tied and frozen weights, buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 8, 3, padding="same", groups=8)
        self.up = nn.ConvTranspose2d(8, 4, 2, 2)
        self.first_norm = nn.BatchNorm2d(3)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.drop = nn.Dropout(0.5)
        self.one, self.two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
        self.two.weight = self.one.weight
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(3))
        self.register_buffer("table", torch.randn(4), persistent=False)
        self.table: Tensor

    def forward(self, x: Tensor, scale: float = 1.0, mask: Tensor | None = None) -> dict[str, Any]:
        y = F.relu_(self.bn(self.conv(self.first_norm(x))))
        y = self.up(y + self.deep(y)).flatten(2).transpose(1, 2)
        y = y + self.attention(y, y, y, need_weights=False)[0]
        z = self.two(self.drop(self.one(y.mean(1)))) + self.table * self.frozen
        return {"scores": z * torch.tensor([1.0, 2.0, 3.0, 4.0]), "rest": (y, [z])}


def everything() -> Everything:
    torch.manual_seed(0)
    module = Everything()
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            nn.init.uniform_(child.weight, 0.5, 2)
            nn.init.normal_(child.bias)
            assert child.running_mean is not None and child.running_var is not None
            child.running_mean.normal_()
            child.running_var.uniform_(0.5, 2)
    return module.eval()


def stored(tmp_path: Path, module: nn.Module, inputs: Any = None) -> Path:
    folder = tmp_path / "stored"
    save_module(module, folder, images() if inputs is None else inputs, structure={"ratio": 0.5})
    return folder


def same_bits(ours: Tensor, theirs: Tensor) -> bool:
    return ours.dtype == theirs.dtype and ours.shape == theirs.shape and bool((ours == theirs).all())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored(tmp_path_factory.mktemp("module"), everything())


def test_it_computes_the_same_bits_for_any_batch_and_any_call(folder: Path) -> None:
    module, loaded = everything(), load_module(folder)
    assert read_structure(folder).exact
    for count in (1, 2, 5):
        x = torch.randn(count, 3, 8, 8)
        for call in (lambda m, x=x: m(x), lambda m, x=x: m(x=x), lambda m, x=x: m(x, mask=None)):
            ours, theirs = call(loaded), call(module)
            assert list(ours) == ["scores", "rest"] and type(ours["rest"]) is tuple and type(ours["rest"][1]) is list
            assert same_bits(ours["scores"], theirs["scores"]) and same_bits(ours["rest"][0], theirs["rest"][0])
    with pytest.raises(SourceError, match="Everything was captured without its input 'scale'"):
        loaded(x, scale=2.0)


def test_names_ties_frozen_weights_and_buffers_are_what_they_were(folder: Path) -> None:
    module, loaded = everything(), load_module(folder)
    assert {name for name, _ in loaded.named_parameters()} == {name for name, _ in module.named_parameters()}
    assert set(loaded.state_dict()) == set(module.state_dict())
    assert loaded.one.weight is loaded.two.weight  # type: ignore[union-attr]
    assert not loaded.frozen.requires_grad and loaded.unused.requires_grad  # type: ignore[union-attr]
    other = everything()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    loaded.load_state_dict(other.state_dict())
    x = torch.randn(3, 3, 8, 8)
    assert same_bits(loaded(x)["scores"], other(x)["scores"]) and not same_bits(
        loaded(x)["scores"], module(x)["scores"]
    )
    assert load_file(folder / WEIGHTS).keys() == {
        *(name for name, _ in module.named_parameters()),
        *(name for name, _ in module.named_buffers()),
    }


def test_modes_are_alive_and_training_it_is_training_the_module(folder: Path) -> None:
    module, loaded = everything(), load_module(folder)
    x = torch.randn(16, 3, 8, 8)
    loaded.train()
    assert not same_bits(loaded(x)["scores"], loaded(x)["scores"])  # Dropout
    module.drop.p = 0.0
    for child in loaded.modules():
        if isinstance(child, nn.Dropout):
            child.p = 0.0
    loaded.load_state_dict(module.state_dict())
    for one in (module.train(), loaded):
        optimizer = torch.optim.SGD(one.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            one(x)["scores"].square().mean().backward()
            optimizer.step()
    for name in ("conv.weight", "bn.weight", "bn.running_var", "first_norm.running_mean", "one.weight", "frozen"):
        theirs, ours = (dict((*one.named_parameters(), *one.named_buffers()))[name] for one in (module, loaded))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert not same_bits(loaded.bn.running_mean, everything().bn.running_mean)  # type: ignore[union-attr, arg-type]


def test_structure_tells_the_layers_and_what_the_caller_says(folder: Path) -> None:
    found = read_structure(folder)
    rows = [(one.name, one.kind, one.inputs, one.outputs, one.groups) for one in found.layers]
    assert rows[:3] == [
        ("conv", "conv2d", 3, 8, 1),
        ("deep", "conv2d", 8, 8, 8),
        ("up", "conv_transpose2d", 8, 4, 1),
    ]
    assert ("one", "linear", 4, 4, 1) in rows or ("two", "linear", 4, 4, 1) in rows
    assert found.structure == {"ratio": 0.5} and found.module == "Everything"
    assert set(found.files) == {PROGRAM, WEIGHTS} and found.files[WEIGHTS] == sha256(folder / WEIGHTS)


def test_a_grouped_transposed_layer_counts_all_its_channels(tmp_path: Path) -> None:
    net = nn.Sequential(nn.ConvTranspose2d(6, 4, 3, groups=2), nn.Conv2d(4, 6, 1, groups=2)).eval()
    (inputs,) = (np.zeros((2, 6, 4, 4), np.float32),)
    found = read_structure(stored(tmp_path, net, (inputs,))).layers
    assert [(one.inputs, one.outputs, one.groups) for one in found] == [(6, 4, 2), (4, 6, 2)]


ELSEWHERE = """
import sys
from pathlib import Path
import numpy as np, torch
from edgekit.training.stored import load_module, save_module
torch.set_num_threads(1)
module = load_module(Path({folder!r}))
with torch.no_grad():
    np.save({out!r}, module(torch.from_numpy(np.load({x!r})))["scores"].numpy())
assert "test_stored" not in sys.modules
sys.path.insert(0, {tests!r})
from test_stored import everything, images
save_module(everything(), Path({again!r}), images(), structure={{"ratio": 0.5}})
"""


@pytest.fixture(scope="module")
def elsewhere(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a new process makes of the stored module, without its class; then, with the class, a second one."""
    made = tmp_path_factory.mktemp("elsewhere")
    np.save(made / "x.npy", np.random.default_rng(1).normal(0, 1, (3, 3, 8, 8)).astype(np.float32))
    paths = {name: str(made / name) for name in ("x.npy", "y.npy", "again")}
    script = ELSEWHERE.format(
        folder=str(folder), x=paths["x.npy"], out=paths["y.npy"], again=paths["again"], tests=str(Path(__file__).parent)
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return made


def test_a_new_process_without_the_class_computes_the_same_bits(elsewhere: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = everything()(torch.from_numpy(np.load(elsewhere / "x.npy")))["scores"]
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_array_equal(np.load(elsewhere / "y.npy"), expected.detach().numpy())


def test_the_same_module_gives_the_same_bytes_and_nothing_of_the_machine(folder: Path, elsewhere: Path) -> None:
    for name in (PROGRAM, WEIGHTS, STRUCTURE):
        assert (folder / name).read_bytes() == (elsewhere / "again" / name).read_bytes(), name
    with zipfile.ZipFile(folder / PROGRAM) as archive:
        content = b"".join(archive.read(name) for name in archive.namelist())
    content += (folder / STRUCTURE).read_bytes()
    for secret in (os.fsencode(Path(__file__).parent), os.fsencode(Path.cwd()), b"test_stored.py", b'File "'):
        assert secret not in content
    assert images()[0].tobytes()[:64] not in content  # the user's data


def test_it_is_stored_again_and_copied(folder: Path, tmp_path: Path) -> None:
    loaded = load_module(folder)
    again = load_module(stored(tmp_path, loaded))
    x = torch.randn(3, 3, 8, 8)
    assert same_bits(again(x=x)["scores"], everything()(x)["scores"])
    assert {name for name, _ in again.named_parameters()} == {name for name, _ in loaded.named_parameters()}
    assert read_structure(tmp_path / "stored").layers == read_structure(folder).layers
    with pytest.raises(SourceError, match="was captured without its input 'scale'"):
        again(x, scale=2.0)
    copied = copy.deepcopy(loaded).train()
    assert not loaded.training and copied.state_dict().keys() == loaded.state_dict().keys()
    with torch.no_grad():
        copied.get_parameter("conv.weight").zero_()
    assert same_bits(copied.eval()(x, mask=None)["scores"], copied(x=x)["scores"])
    assert not same_bits(copied(x)["scores"], loaded(x)["scores"])


def small() -> nn.Module:
    torch.manual_seed(0)
    layers = {
        "conv": nn.Conv2d(3, 8, 3, bias=False),
        "bn": nn.BatchNorm2d(8),
        "relu": nn.ReLU(),
        "drop": nn.Dropout(0.1),
    }
    return nn.Sequential(
        OrderedDict(layers, pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), head=nn.Linear(8, 4))
    ).eval()


def test_it_is_exported_and_trained_for_rounding_as_the_module_is(tmp_path: Path) -> None:
    module = small()
    loaded = load_module(stored(tmp_path, module))
    names = {node.name for node in export_onnx(module, images()).graph}
    assert {node.name for node in export_onnx(loaded, images()).graph} == names >= {"conv", "head"}
    ours, theirs = prepare_qat(loaded, images(4)), prepare_qat(module, images(4))
    assert {name for name, _ in ours.named_parameters()} == {name for name, _ in theirs.named_parameters()}
    assert "conv.bias" in dict(ours.named_parameters())  # the BatchNorm's
    x = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-6)
    with pytest.raises(SourceError, match="has quantizers, which a stored module cannot keep"):
        save_module(ours, tmp_path / "qat", images(), structure={})
    assert not (tmp_path / "qat").exists()


@dataclass
class Answer:
    logits: Tensor
    hidden: tuple[Tensor, Tensor] | None = None


class Answering(nn.Module):
    def __init__(self, kind: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.kind = nn.Linear(4, 4), kind

    def forward(self, ids: Tensor, bias: Tensor) -> Any:
        return self.kind(self.linear(ids) + bias)


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        (lambda y: Answer(y, (y, y * 2)), ["logits", "hidden.0", "hidden.1"]),
        (lambda y: OrderedDict(out=y), ["out"]),
        (lambda y: {"out": y, "none": None}, ["out", "none"]),
    ],
)
def test_what_is_no_plain_container_becomes_a_dict(
    tmp_path: Path, kind: Callable[[Tensor], Any], keys: list[str]
) -> None:
    inputs = {"bias": np.ones((2, 4), np.float32), "ids": np.zeros((2, 4), np.float32)}
    loaded = load_module(stored(tmp_path, Answering(kind), inputs))
    ids, bias = torch.randn(3, 4), torch.randn(3, 4)
    for found in (loaded(ids, bias), loaded(bias=bias, ids=ids), loaded(ids, bias=bias)):
        assert type(found) is dict and list(found) == keys
    expected = load_linear(tmp_path)(ids) + bias
    assert same_bits(found[keys[0]], expected)


def load_linear(tmp_path: Path) -> nn.Module:
    linear = nn.Linear(4, 4)
    state = load_file(tmp_path / "stored" / WEIGHTS)
    linear.load_state_dict({name.removeprefix("linear."): value for name, value in state.items()})
    return linear


def test_types_layouts_and_parametrizations_keep_their_bits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 4, 3)))
    net = net.to(memory_format=torch.channels_last).double().train()
    loaded = load_module(stored(tmp_path, net, (images()[0].astype(np.float64),)))
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64).to(memory_format=torch.channels_last)
    assert net.training and same_bits(loaded(x), net.eval()(x))
    assert {name for name, _ in loaded.named_parameters()} == {"0.weight", "0.bias", "2.weight", "2.bias"}
    half = nn.Linear(8, 8).bfloat16()
    net = nn.Sequential(Cast(), half)
    loaded = load_module(stored(tmp_path, net, (np.zeros((2, 8), np.float32),)))
    x = torch.randn(3, 8)
    assert loaded(x).dtype == torch.bfloat16 and same_bits(loaded(x), net(x))


class Cast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.bfloat16()


def test_a_transformer_s_fast_path_is_not_stored(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    inputs = (np.random.default_rng(0).normal(0, 1, (2, 5, 8)).astype(np.float32),)
    folder = stored(tmp_path, layer, inputs)
    assert read_structure(folder).exact
    x = torch.randn(3, 5, 8)
    assert same_bits(load_module(folder)(x), layer(x))  # with gradients, torch takes the other path
    with torch.no_grad():
        torch.testing.assert_close(load_module(folder)(x), layer(x), rtol=1e-5, atol=1e-6)


def test_a_module_that_changes_from_call_to_call_is_refused_and_what_was_there_stays(tmp_path: Path) -> None:
    class Random(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand_like(x)

    folder = stored(tmp_path, everything())
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(SourceError, match="it changes from call to call"):
        save_module(Random(), folder, images(), structure={})
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


# ---- files that were changed


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> Path:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def sign(folder: Path, **changes: Any) -> None:
    """Let the structure say what the files are, as someone who means harm would."""
    written = json.loads((folder / STRUCTURE).read_text())
    written["files"] = {name: sha256(folder / name) for name in (PROGRAM, WEIGHTS)}
    (folder / STRUCTURE).write_text(json.dumps(written | changes))


@pytest.mark.parametrize("name", [PROGRAM, WEIGHTS, STRUCTURE])
def test_a_missing_file_is_named(damaged: Path, name: str) -> None:
    (damaged / name).unlink()
    with pytest.raises(SourceError, match=f"has no {name}"):
        load_module(damaged)


@pytest.mark.parametrize("name", [PROGRAM, WEIGHTS])
def test_a_changed_file_is_named(damaged: Path, name: str) -> None:
    content = bytearray((damaged / name).read_bytes())
    content[-1] ^= 1
    (damaged / name).write_bytes(content)
    with pytest.raises(SourceError, match=rf"{name} is not the file that structure.json was written with.*SHA-256"):
        load_module(damaged)


@pytest.mark.parametrize("name", [PROGRAM, WEIGHTS])
def test_a_truncated_file_is_explained_even_if_its_hash_fits(damaged: Path, name: str) -> None:
    (damaged / name).write_bytes((damaged / name).read_bytes()[:200])
    sign(damaged)
    with pytest.raises(SourceError, match=rf"{name} is truncated or not a"):
        load_module(damaged)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("conv.weight"), "1 missing: conv.weight"),
        (lambda state: state.update({"conv.weight": torch.zeros(8, 3, 3, 1)}), r"conv.weight torch.float32 \(8, 3, 3, 1\) in the place of"),
        (lambda state: state.update({"conv.weight": torch.zeros(8, 3, 3, 3).double()}), "conv.weight torch.float64"),
        (lambda state: state.update({"more": torch.zeros(1)}), "1 unexpected: more"),
        (lambda state: state.pop("one.weight"), "2 missing: one.weight, two.weight"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(
    damaged: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    state = load_file(damaged / WEIGHTS)
    change(state)
    save_file(state, damaged / WEIGHTS)
    sign(damaged)
    with pytest.raises(SourceError, match=message):
        load_module(damaged)


class Planted:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("planted"),)


def test_a_planted_pickle_is_not_run(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(damaged)
    with zipfile.ZipFile(damaged / PROGRAM) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    payload = io.BytesIO()
    torch.save(Planted(), payload, pickle_module=pickle)
    with zipfile.ZipFile(damaged / PROGRAM, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, payload.getvalue() if name.endswith("sample_inputs/model.pt") else content)
    sign(damaged)
    with pytest.raises(UntrustedSourceError, match=r"sample_inputs/model\.pt"):
        load_module(damaged)
    assert not (damaged / "planted").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "has format 2, and this version of edgekit reads 1"),
        ({"layers": 3}, "is damaged: 'layers'"),
        ({"files": {"../etc": "0"}}, "is damaged: 'files"),
        ({"files": {}}, "is damaged: 'files'"),
        ({"constants": ["nothing.at.all"]}, "unexpected: nothing.at.all"),
        ({"tied": {"bn.running_mean": "bn.weight"}}, "1 tied to what is unlike: bn.running_mean"),
        ({"tied": {"two.weight": "nothing"}}, "unexpected: nothing"),
        ({"parameters": [{"name": "x: exec('1')", "kind": "KEYWORD_ONLY", "required": True}]}, "is not a valid parameter name"),
        ({"parameters": [{"name": name, "kind": kind, "required": True} for name, kind in (("a", "VAR_KEYWORD"), ("b", "KEYWORD_ONLY"))]},
         "wrong parameter order"),
    ],
)  # fmt: skip
def test_a_damaged_structure_is_explained(damaged: Path, changes: dict[str, Any], message: str) -> None:
    sign(damaged, **changes)
    with pytest.raises(SourceError, match=message):
        load_module(damaged)


def test_what_is_no_stored_module_is_explained(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="does not exist; expected a folder that edgekit stored a module in"):
        load_module(tmp_path / "nothing")
    (tmp_path / STRUCTURE).write_text("{")
    (tmp_path / PROGRAM).touch()
    (tmp_path / WEIGHTS).touch()
    with pytest.raises(SourceError, match="is damaged"):
        load_module(tmp_path)
