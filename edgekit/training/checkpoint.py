"""A checkpoint file and a model factory become an `nn.Module`."""

from __future__ import annotations

import io
import logging
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._export.verifier import SpecViolationError

from edgekit.errors import SourceError
from edgekit.training.pickles import UNREADABLE, first_line, load_pickle, screened_program

PICKLED = (".pt", ".pth", ".th", ".ckpt", ".bin")
"""Suffixes of files that `torch.save` wrote."""

NESTED = ("state_dict", "model_state_dict", "model_state", "model", "ema_state_dict", "ema", "module", "net", "weights")
"""Where training scripts put the weights, best first."""

WRAPPERS = ("module.", "_orig_mod.", "model.")
"""Prefixes that DataParallel, torch.compile and Lightning put before every key."""

_SHOWN = 5
# The position of the argument `training`, by ATen operator.
_TRAIN_FLAG = {"dropout": 2, "dropout_": 2, "batch_norm": 5, "_native_batch_norm_legit": 5, "native_dropout": 2}


def load_checkpoint(path: Path, *, factory: Callable[[], object] | None, trust: bool = False) -> nn.Module:
    """The model in `path`, in eval mode on the CPU, its parameters in the types that the model declares.

    A `.pt2` program needs no factory, nor does a whole pickled module; a state_dict goes into what `factory` returns.
    `trust` lets pickled code run.

    Raises:
        SourceError: the file is missing, damaged or does not fit the model, or the factory fails.
        UntrustedSourceError: without `trust`, when opening the file would run code.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise SourceError(f"checkpoint {path} {what}; give a .pt, .pth, .th, .safetensors or .pt2 file")
    suffix = path.suffix.lower()
    if suffix == ".pt2":
        return _load_program(path, trust=trust)
    if suffix == ".safetensors":
        state: object = _load_safetensors(path)
    elif suffix in PICKLED:
        state = _innermost(load_pickle(path, str(path), trust=trust))
    else:
        known = ", ".join((".pt2", ".safetensors", *PICKLED))
        raise SourceError(f"checkpoint {path} has the unknown suffix {suffix!r}; known suffixes: {known}")
    if isinstance(state, nn.Module):
        return state.eval()
    weights = _tensors(state, path)
    if factory is None:
        raise SourceError(f"{path} holds weights without their model; name its factory with --model FILE.py:factory")
    module = _build(factory)
    _fill(module, weights, path)
    return module.eval()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """A module in eval mode for a while: in training mode a forward pass would change its BatchNorms."""
    was_training = [child for child in module.modules() if child.training]
    for child in was_training:
        child.training = False
    try:
        yield
    finally:
        for child in was_training:
            child.training = True


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


def users_error(error: Exception) -> str:
    """An exception of the user's code: its type and message, and the deepest line that is theirs."""
    told = f"{type(error).__name__}: {first_line(error)}" if str(error) else type(error).__name__
    installed = (*sysconfig.get_paths().values(), str(Path(__file__).parent), "<")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(installed)]
    return f"{told} ({frames[-1].filename}, line {frames[-1].lineno})" if frames else told


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


def _innermost(found: object) -> object:
    """The module or the mapping of tensors, out of the dictionary that the training script saved."""
    while isinstance(found, Mapping):
        wrapped = [found[key] for key in NESTED if isinstance(found.get(key), Mapping | nn.Module)]
        if not wrapped:
            return found
        found = wrapped[0]
    return found


def _tensors(state: object, path: Path) -> dict[str, Tensor]:
    """The tensors of a state_dict; other entries that a checkpoint carries beside them are left out."""
    if not isinstance(state, Mapping):
        raise SourceError(f"{path} holds a {type(state).__name__}, no state_dict; save model.state_dict()")
    weights = {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
    if not weights:
        keys = ", ".join(repr(key) for key in list(state)[:_SHOWN]) or "none"
        raise SourceError(
            f"{path} holds no tensors (its keys: {keys}); save model.state_dict(), alone or under 'state_dict'"
        )
    return weights


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
    return module.cpu()


def _fill(module: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Copy the weights into the module, once every key and shape fits."""
    expected = module.state_dict()
    weights = _without_wrappers(weights, expected)
    tied = {_place(expected[key]) for key in weights if isinstance(expected.get(key), Tensor)}
    missing = [key for key, value in expected.items() if key not in weights and _place(value) not in tied]
    unexpected = [key for key in weights if key not in expected]
    misshapen = [
        f"{key} {tuple(value.shape)} where the model has {tuple(expected[key].shape)}"
        for key, value in weights.items()
        if isinstance(expected.get(key), Tensor) and value.shape != expected[key].shape
    ]
    problems = [
        f"{len(names)} {what}: {_some(names)}"
        for what, names in (
            ("missing", [key for key in missing if not key.endswith("num_batches_tracked")]),
            ("unexpected", [key for key in unexpected if not key.endswith(("num_batches_tracked", "n_averaged"))]),
            ("of another shape", misshapen),
        )
        if names
    ]
    if problems:
        raise SourceError(
            f"{path} does not fit the model {type(module).__name__}: {'; '.join(problems)}; "
            "let the factory build the model with the arguments that it was trained with"
        )
    module.load_state_dict({key: value for key, value in weights.items() if key in expected}, strict=False)


def _without_wrappers(weights: dict[str, Tensor], expected: Collection[str]) -> dict[str, Tensor]:
    """The weights under the names that the model was written with."""
    for prefix in (*WRAPPERS, *WRAPPERS):
        named = [key for key in weights if key != "n_averaged"]
        if all(key.startswith(prefix) for key in named) and not any(key.startswith(prefix) for key in expected):
            weights = {key.removeprefix(prefix): weights[key] for key in named}
    return weights


def _place(value: object) -> object:
    """What two names of one shared tensor have in common, and no others do."""
    if isinstance(value, Tensor) and value.numel():
        return value.data_ptr(), value.shape, value.stride()
    return id(value)


def _some(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
