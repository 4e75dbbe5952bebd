from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from edgekit.errors import SourceError, UntrustedSourceError
from edgekit.training.checkpoint import load_checkpoint

sys.path.insert(0, str(Path(__file__).parent / "models"))
from resnet20 import resnet20

ZOO = Path(__file__).parent.parent.parent / "shared" / "zoo"


class Net(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.bn = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bn(self.conv(x)).relu().mean((2, 3)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


class Payload:
    """Unpickling it writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def torch_bytes(content: object, *, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def weights() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return Net().state_dict()


def prefixed(prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in weights().items()}


def assert_loaded(module: nn.Module) -> None:
    assert not module.training
    loaded = module.state_dict()
    for key, value in weights().items():
        assert torch.equal(loaded[key], value), key


LAYOUTS: dict[str, Callable[[], object]] = {
    "plain": weights,
    "state_dict": lambda: {"epoch": 3, "state_dict": weights(), "optimizer": {"lr": 0.1}},
    "model": lambda: {"model": weights(), "ema": {}, "best": 0.9},
    "model_state": lambda: {"model_state": weights()},
    "model_state_dict": lambda: {"model_state_dict": weights()},
    "ema alone": lambda: {"ema": weights(), "step": 10},
    "twice nested": lambda: {"model": {"state_dict": weights()}},
    "data parallel": lambda: {"state_dict": prefixed("module.")},
    "compiled": lambda: prefixed("_orig_mod."),
    "data parallel of compiled": lambda: prefixed("module._orig_mod."),
    "compiled data parallel": lambda: prefixed("_orig_mod.module."),
    "averaged": lambda: {**prefixed("module."), "n_averaged": torch.tensor(3)},
    "without batch counts": lambda: {k: v for k, v in weights().items() if "num_batches" not in k},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_found_where_training_scripts_put_them(tmp_path: Path, layout: str) -> None:
    path = tmp_path / "net.pt"
    path.write_bytes(torch_bytes(LAYOUTS[layout]()))
    assert_loaded(load_checkpoint(path, factory=Net))


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th", ".PTH"])
@pytest.mark.parametrize("legacy", [False, True])
def test_both_formats_of_torch_save_load_under_every_suffix(tmp_path: Path, suffix: str, legacy: bool) -> None:
    path = tmp_path / f"net{suffix}"
    path.write_bytes(torch_bytes(weights(), legacy=legacy))
    assert_loaded(load_checkpoint(path, factory=Net))


def test_safetensors_load(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "net.safetensors")
    assert_loaded(load_checkpoint(tmp_path / "net.safetensors", factory=Net))


def test_a_shared_weight_may_be_saved_once(tmp_path: Path) -> None:
    weight = torch.arange(15.0).reshape(5, 3)
    save_file({"embed.weight": weight}, tmp_path / "tied.safetensors")
    module = load_checkpoint(tmp_path / "tied.safetensors", factory=Tied)
    assert torch.equal(module.state_dict()["head.weight"], weight)


@pytest.mark.skipif(not ZOO.is_dir(), reason="the model zoo is not here")
def test_a_checkpoint_saved_on_a_gpu_from_data_parallel_loads() -> None:
    path = ZOO / "resnet20-12fca82f.th"
    module = load_checkpoint(path, factory=resnet20)
    saved = torch.load(path, weights_only=True, map_location="cpu")["state_dict"]
    for key, value in module.state_dict().items():
        assert value.device.type == "cpu"
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(value, saved[f"module.{key}"]), key


def exported(path: Path, module: nn.Module, **dynamic: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(module, (torch.randn(2, 3, 8, 8),), **dynamic)
        torch.export.save(program, path, extra_files={"notes.txt": "of (any) kind"})
    return path


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    net = Net()
    net.load_state_dict(weights())
    batch = torch.export.Dim("batch")
    return exported(tmp_path_factory.mktemp("program") / "net.pt2", net.eval(), dynamic_shapes=({0: batch},))


def test_an_exported_program_needs_no_factory(program: Path) -> None:
    module = load_checkpoint(program, factory=None)
    assert_loaded(module)
    net = Net()
    net.load_state_dict(weights())
    image = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(module(image), net.eval()(image), rtol=0, atol=1e-6)
    assert module.train().training, "it can be trained"


def test_a_program_exported_in_training_mode_is_refused(tmp_path: Path) -> None:
    path = exported(tmp_path / "train.pt2", nn.Sequential(nn.Conv2d(3, 2, 3), nn.Dropout()))
    with pytest.raises(SourceError, match=r"exported in training mode; call model.eval\(\) before torch.export.export"):
        load_checkpoint(path, factory=None)


# What would run code.


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th"])
def test_a_payload_in_a_checkpoint_does_not_run(tmp_path: Path, suffix: str, legacy: bool) -> None:
    marker = tmp_path / "marker"
    path = tmp_path / f"net{suffix}"
    path.write_bytes(torch_bytes({"state_dict": weights(), "note": Payload(marker)}, legacy=legacy))
    with pytest.raises(UntrustedSourceError, match=r"asks for posix\.system; re-save its state_dict, or pass --trust"):
        load_checkpoint(path, factory=Net)
    assert not marker.exists()
    load_checkpoint(path, factory=Net, trust=True)
    assert marker.exists(), "the payload is a real one"


def test_a_pickled_module_loads_only_when_trusted(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    path.write_bytes(torch_bytes({"model": nn.Linear(3, 2).train(), "epoch": 3}))
    with pytest.raises(UntrustedSourceError, match=r"asks for torch\.nn\.modules\.linear\.Linear"):
        load_checkpoint(path, factory=None)
    module = load_checkpoint(path, factory=None, trust=True)
    assert isinstance(module, nn.Linear)
    assert not module.training


def test_a_pickled_module_whose_code_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.pt"
    path.write_bytes(torch_bytes(Net()))
    monkeypatch.delattr(sys.modules[__name__], "Net")
    with pytest.raises(SourceError, match=r"Python code is missing here.*put that code on the Python path"):
        load_checkpoint(path, factory=None, trust=True)


def test_torchscript_is_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(3, 2)), tmp_path / "net.pt")
    with pytest.raises(SourceError, match="is a TorchScript archive; re-save the model's state_dict"):
        load_checkpoint(tmp_path / "net.pt", factory=Net)


Edit = Callable[[str, bytes, Path], bytes]


def planted(program: Path, path: Path, edit: Edit, marker: Path, extra: dict[str, bytes] | None = None) -> Path:
    """A copy of a program whose members went through `edit`, with members added."""
    with zipfile.ZipFile(program) as archive, zipfile.ZipFile(path, "w") as out:
        for info in archive.infolist():
            out.writestr(info.filename, edit(info.filename, archive.read(info), marker))
        for name, content in (extra or {}).items():
            out.writestr(name, content)
    return path


def in_sample_inputs(name: str, content: bytes, marker: Path) -> bytes:
    return torch_bytes(((Payload(marker),), {})) if name.endswith("/sample_inputs/model.pt") else content


def in_legacy_sample_inputs(name: str, content: bytes, marker: Path) -> bytes:
    payload = torch_bytes(((Payload(marker),), {}), legacy=True)
    return payload if name.endswith("/sample_inputs/model.pt") else content


def in_a_weight(name: str, content: bytes, marker: Path) -> bytes:
    if name.endswith("weights_config.json"):
        table = json.loads(content)
        for entry in table["config"].values():
            entry["use_pickle"] = entry["path_name"] == "weight_0"
        return json.dumps(table).encode()
    return torch_bytes(Payload(marker)) if name.endswith("/weight_0") else content


def in_a_constant(kind: str) -> Edit:
    def edit(name: str, content: bytes, marker: Path) -> bytes:
        if not name.endswith("constants_config.json"):
            return content
        meta = {"is_param": False, "use_pickle": True, "tensor_meta": None}
        return json.dumps({"config": {"planted": {"path_name": kind, **meta}}}).encode()

    return edit


def in_the_graph(change: Callable[[str, str], str]) -> Edit:
    def edit(name: str, content: bytes, marker: Path) -> bytes:
        code = f"__import__('os').system('touch {marker}')"
        return change(content.decode(), code).encode() if name.endswith("models/model.json") else content

    return edit


def unchanged(name: str, content: bytes, marker: Path) -> bytes:
    return content


PLANTS: dict[str, tuple[Edit, Callable[[Path], dict[str, bytes]]]] = {
    "sample inputs": (in_sample_inputs, lambda _: {}),
    "sample inputs, legacy format": (in_legacy_sample_inputs, lambda _: {}),
    "pickled weight": (in_a_weight, lambda _: {}),
    "legacy weights": (unchanged, lambda m: {"net/data/weights/model.pt": torch_bytes({"a": Payload(m)})}),
    "legacy constants": (unchanged, lambda m: {"net/data/constants/model.pt": torch_bytes({"a": Payload(m)})}),
    "pickled constant": (
        in_a_constant("tensor_0"),
        lambda m: {"net/data/constants/tensor_0": torch_bytes(Payload(m))},
    ),
    "opaque object": (
        in_a_constant("opaque_obj_0"),
        lambda m: {"net/data/constants/opaque_obj_0": pickle.dumps(Payload(m))},
    ),
    "opaque object named like a marker": (
        in_a_constant("opaque_obj_0/byteorder"),
        lambda m: {"net/data/constants/opaque_obj_0/byteorder": pickle.dumps(Payload(m), protocol=2)},
    ),
    "symbolic shape": (
        in_the_graph(lambda text, code: text.replace("Symbol('s77', positive=True, integer=True)", code)),
        lambda _: {},
    ),
    "input name": (in_the_graph(lambda text, code: text.replace('"x"', json.dumps(f"x={code}"))), lambda _: {}),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_a_payload_in_a_program_does_not_run(program: Path, tmp_path: Path, plant: str) -> None:
    marker = tmp_path / "marker"
    edit, extra = PLANTS[plant]
    path = planted(program, tmp_path / "net.pt2", edit, marker, extra(marker))
    with pytest.raises(UntrustedSourceError, match=r"net\.pt2, member 'net/.*--trust-checkpoint") as caught:
        load_checkpoint(path, factory=None)
    assert not marker.exists()
    if "pickle" in plant:
        assert "asks for posix.system" in str(caught.value)


@pytest.mark.parametrize("plant", PLANTS)
def test_the_planted_payloads_are_real(program: Path, tmp_path: Path, plant: str) -> None:
    marker = tmp_path / "marker"
    edit, extra = PLANTS[plant]
    path = planted(program, tmp_path / "net.pt2", edit, marker, extra(marker))
    with contextlib.suppress(SourceError):  # the rest of the file may no longer fit
        load_checkpoint(path, factory=None, trust=True)
    assert marker.exists()


def test_guards_of_a_program_do_not_run(program: Path, tmp_path: Path) -> None:
    def guarded(text: str, code: str) -> str:
        return json.dumps({**json.loads(text), "guards_code": [code]})

    marker = tmp_path / "marker"
    path = planted(program, tmp_path / "net.pt2", in_the_graph(guarded), marker)
    module = load_checkpoint(path, factory=None)
    module(torch.randn(3, 3, 8, 8))
    assert not marker.exists()


def test_compiled_code_in_a_program_is_refused(program: Path, tmp_path: Path) -> None:
    extra = {"net/data/aotinductor/model/model.so": b"\x7fELF"}
    path = planted(program, tmp_path / "net.pt2", unchanged, tmp_path, extra)
    with pytest.raises(UntrustedSourceError, match=r"model\.so'?.*is compiled code"):
        load_checkpoint(path, factory=None)


# Bad input.


def raising() -> nn.Module:
    raise LookupError("no such width")


def of_another_type() -> object:
    return {"conv": 1}


def needs_an_argument(width: int) -> nn.Module:
    return Net(width)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (raising, r"factory raising\(\) failed: LookupError: no such width \(.*test_checkpoint\.py, line \d+\)"),
        (of_another_type, r"factory of_another_type\(\) returned a dict; it must return a torch\.nn\.Module"),
        (needs_an_argument, r"needs_an_argument\(\) failed: TypeError.*called without arguments"),
        (None, r"holds weights without their model; name its factory with --model FILE\.py:factory"),
    ],
)
def test_a_bad_factory_is_explained(tmp_path: Path, factory: Callable[[], object] | None, message: str) -> None:
    path = tmp_path / "net.pt"
    path.write_bytes(torch_bytes(weights()))
    with pytest.raises(SourceError, match=message):
        load_checkpoint(path, factory=factory)


def test_keys_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    state = weights()
    del state["head.bias"]
    path.write_bytes(torch_bytes({**state, **{f"extra.{index}": torch.ones(1) for index in range(7)}}))
    with pytest.raises(SourceError) as caught:
        load_checkpoint(path, factory=lambda: Net(width=5))
    message = str(caught.value)
    assert "does not fit the model Net: 1 missing: head.bias; 7 unexpected: extra.0, extra.1" in message
    assert (
        "extra.4 and 2 more; 7 of another shape: conv.weight (4, 3, 3, 3) where the model has (5, 3, 3, 3)" in message
    )
    assert message.endswith("let the factory build the model with the arguments that it was trained with")


@pytest.mark.parametrize("name", ["net.pt", "net.safetensors", "net.pt2"])
@pytest.mark.parametrize("damage", ["half", "tail", "empty", "html"])
def test_damaged_files_are_explained(program: Path, tmp_path: Path, name: str, damage: str) -> None:
    path = tmp_path / name
    if name.endswith("safetensors"):
        save_file(weights(), path)
    else:
        path.write_bytes(program.read_bytes() if name.endswith("pt2") else torch_bytes(weights()))
    content = path.read_bytes()
    damaged = {"half": content[: len(content) // 2], "tail": content[:-9], "empty": b"", "html": b"<!DOCTYPE html>"}
    path.write_bytes(damaged[damage])
    with pytest.raises(SourceError, match=rf"{name} is (truncated|not a PyTorch checkpoint)") as caught:
        load_checkpoint(path, factory=Net)
    assert not isinstance(caught.value, UntrustedSourceError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cut", [5, 60, 700])
def test_a_truncated_legacy_checkpoint_is_explained(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "net.th"
    path.write_bytes(torch_bytes(weights(), legacy=True)[:cut])
    with pytest.raises(SourceError, match="truncated or damaged"):
        load_checkpoint(path, factory=Net)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, no state_dict"),
        ({"epoch": 3, "loss": 0.5}, r"holds no tensors \(its keys: 'epoch', 'loss'\)"),
        (torch.ones(3), "holds a Tensor, no state_dict"),
    ],
)
def test_checkpoints_without_weights_are_explained(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "net.pt"
    path.write_bytes(torch_bytes(content))
    with pytest.raises(SourceError, match=message):
        load_checkpoint(path, factory=Net)


def test_paths_that_are_no_checkpoint_are_explained(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"absent\.pt does not exist; give a \.pt"):
        load_checkpoint(tmp_path / "absent.pt", factory=Net)
    with pytest.raises(SourceError, match="is a folder"):
        load_checkpoint(tmp_path, factory=Net)
    (tmp_path / "net.h5").write_bytes(b"x")
    with pytest.raises(SourceError, match=r"unknown suffix '\.h5'; known suffixes: \.pt2, \.safetensors, \.pt"):
        load_checkpoint(tmp_path / "net.h5", factory=Net)
