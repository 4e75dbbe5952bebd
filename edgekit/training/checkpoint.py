"""A checkpoint file and a model factory become an `nn.Module`."""

from __future__ import annotations

import copy
import io
import json
import logging
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._export.verifier import SpecViolationError
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from edgekit.errors import SourceError
from edgekit.training.pickles import UNREADABLE, first_line, load_pickle, screened_program
from edgekit.training.state_dict import NESTED, fill, states_in
from edgekit.words import some

PICKLED = (".pt", ".pth", ".th", ".ckpt", ".bin")
"""Suffixes of files that `torch.save` wrote."""

INDEX = ".index.json"
"""The end of the name of the table that says which of several files holds which tensor."""

# The position of the argument `training`, by ATen operator.
_TRAIN_FLAG = {"dropout": 2, "dropout_": 2, "batch_norm": 5, "_native_batch_norm_legit": 5, "native_dropout": 2}


def load_checkpoint(path: Path, *, factory: Callable[[], object] | None, trust: bool = False) -> nn.Module:
    """The model in `path`, in eval mode on the CPU, its parameters in the types that the model declares.

    A `.pt2` program needs no factory, nor does a whole pickled module; a state_dict goes into what `factory` returns: of several
    in the file, under whatever prefix, the one that gives the model all its weights and has no others.
    `trust` lets pickled code run.

    Raises:
        SourceError: the file is missing, damaged or does not fit the model, or the factory fails.
        UntrustedSourceError: without `trust`, when opening the file would run code.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise SourceError(f"checkpoint {path} {what}; give a .pt, .pth, .th, .safetensors or .pt2 file{_inside(path)}")
    suffix = path.suffix.lower()
    if suffix == ".pt2":
        return _load_program(path, trust=trust)
    found = _load_shards(path, trust=trust) if path.name.endswith(INDEX) else _load_file(path, trust=trust)
    module = _pickled_module(found)
    if module is not None:
        return module.eval()
    states = states_in(found, path)
    if factory is None:
        raise SourceError(f"{path} holds weights without their model; name its factory with --model FILE.py:factory")
    module = _build(factory)
    fill(module, states, found, path)
    return module.eval()


def unwrapped(module: nn.Module) -> nn.Module:
    """The model inside DataParallel, torch.compile and averaging, whose own forward says nothing about its inputs."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel)
    while True:
        inner = module.module if isinstance(module, wrappers) else getattr(module, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return module
        module = inner


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """A module in eval mode for a while, then as it was: its modes, its buffers, and whatever its forward keeps in itself."""
    # A lazy module becomes another one when it first runs, and stays that; TorchScript keeps what it has elsewhere.
    kept = [child for child in module.modules() if not isinstance(child, LazyModuleMixin | torch.jit.ScriptModule)]
    attributes = [(child, dict(vars(child)), dict(child._buffers)) for child in kept]
    modes = [(child, child.training) for child in module.modules()]
    contents = [(buffer, buffer.detach().clone()) for buffer in module.buffers() if not is_lazy(buffer)]
    for child, _ in modes:
        child.training = False
    try:
        yield
    finally:
        for child, before, buffers in attributes:
            vars(child).clear()
            vars(child).update(before)
            child._buffers.clear()
            child._buffers.update(buffers)
        for child, training in modes:
            child.training = training
        for buffer, content in contents:
            buffer.data.copy_(content)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch's warnings, log lines and prints to itself."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def copied(module: nn.Module) -> nn.Module:
    """A copy that shares nothing; torch warns of its own classes when it copies graphs."""
    with quiet():
        return copy.deepcopy(module)


def users_error(error: Exception) -> str:
    """An exception of the user's code: its type and message, and the deepest line that is theirs."""
    told = f"{type(error).__name__}: {first_line(error)}" if str(error) else type(error).__name__
    installed = (*sysconfig.get_paths().values(), str(Path(__file__).parent), "<")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(installed)]
    return f"{told} ({frames[-1].filename}, line {frames[-1].lineno})" if frames else told


def _inside(path: Path) -> str:
    """Which files of a folder are checkpoints."""
    files = [*path.glob(f"*{INDEX}"), *path.glob("*.safetensors"), *path.glob("*.bin")] if path.is_dir() else []
    return f": it holds {some(sorted(file.name for file in files))}" if files else ""


def _load_file(path: Path, *, trust: bool) -> object:
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        return _load_safetensors(path)
    if suffix in PICKLED:
        return load_pickle(path, str(path), trust=trust)
    known = ", ".join((".pt2", ".safetensors", *PICKLED))
    raise SourceError(f"checkpoint {path} has the unknown suffix {suffix!r}; known suffixes: {known}")


def _load_shards(path: Path, *, trust: bool) -> dict[str, Any]:
    """The tensors of all files that an index names, which lie beside it."""
    try:
        names = sorted(set(json.loads(path.read_bytes())["weight_map"].values()))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise SourceError(f"{path} is no index of a checkpoint's files: it has no table 'weight_map'") from error
    tensors: dict[str, Any] = {}
    for name in names:
        shard = path.parent / str(name)
        if shard.parent != path.parent or not shard.is_file():
            raise SourceError(
                f"{path} names the file {name!r}, which is not beside it; copy or download all files again"
            )
        part = _load_file(shard, trust=trust)
        tensors |= part if isinstance(part, dict) else {}
    return tensors


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path, device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise SourceError(
            f"{path} is truncated or not a safetensors file ({first_line(error)}); copy or download it again"
        ) from error


def _load_program(path: Path, *, trust: bool) -> nn.Module:
    source = path if trust else screened_program(path)
    try:
        with quiet():
            program = torch.export.load(source)
            traced = program.module(check_guards=False)
    except (*UNREADABLE, SpecViolationError, SyntaxError) as error:
        raise SourceError(
            f"{path} cannot be opened by torch {torch.__version__} ({first_line(error)}); export the model again"
        ) from error
    if _is_training(traced.graph):
        raise SourceError(f"{path} was exported in training mode; call model.eval() before torch.export.export")
    # A fresh wrapper, because the one from torch refuses eval() and every batch size but the exported ones.
    return torch.fx.GraphModule(traced, traced.graph).eval()


def _is_training(graph: torch.fx.Graph) -> bool:
    """Whether a Dropout or BatchNorm was captured in training mode, which no later eval() undoes."""
    for node in graph.nodes:
        flag = _TRAIN_FLAG.get(str(node.target).removeprefix("aten.").partition(".")[0])
        if flag is not None and len(node.args) > flag and node.args[flag] is True:
            return True
    return False


def _pickled_module(found: object) -> nn.Module | None:
    """A whole module, alone or where training scripts put it."""
    if isinstance(found, nn.Module):
        return found
    inside = [found.get(key) for key in NESTED] if isinstance(found, Mapping) else []
    return next((module for module in map(_pickled_module, inside) if module is not None), None)


def _build(factory: Callable[[], object]) -> nn.Module:
    name = getattr(factory, "__qualname__", repr(factory))
    try:
        module = factory()
    except Exception as error:  # whatever the user's code raises
        raise SourceError(
            f"the model factory {name}() failed: {users_error(error)}; it is called without arguments"
        ) from error
    if not isinstance(module, nn.Module):
        raise SourceError(
            f"the model factory {name}() returned a {type(module).__name__}; it must return a torch.nn.Module"
        )
    if any(value.is_meta for value in (*module.parameters(), *module.buffers())):
        raise SourceError(f"the model factory {name}() made a model without numbers (device meta); build it on the CPU")
    return unwrapped(module).cpu()
