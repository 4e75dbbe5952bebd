"""Whole blocks left out: those without which the network computes nearly what it did.

A block is one of several of a class in an `nn.Sequential` or `nn.ModuleList` whose result has the shape of its input, as residual
blocks and transformer layers have. Without it its input goes on as it is.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from edgekit.errors import GoalError
from edgekit.training.checkpoint import evaluating
from edgekit.training.forward import Call
from edgekit.training.prune.padded_forward import put
from edgekit.training.prune.slots import ignored
from edgekit.training.taps import running
from edgekit.words import some

CONTAINERS = (nn.Sequential, nn.ModuleList)


class Skipped(nn.Module):
    """Stands where a block was: its input, in the form in which the block returned its result."""

    def __init__(self, form: type | None, length: int) -> None:
        """`form` is the tuple or list of `length` that the block returned, with its result in front; None for the result alone."""
        super().__init__()
        self.form, self.length = form, length

    def forward(self, x: Tensor, *_args: Any, **_kwargs: Any) -> Any:
        """The first input."""
        return x if self.form is None else self.form([x, *[None] * (self.length - 1)])


def leave_out(module: nn.Module, count: int, call: Call, *, ignore: Sequence[str] = ()) -> tuple[str, ...]:
    """Leave blocks out, in place: one after the other, each time the one without which the outputs move least.

    Paths and parameters of everything else keep their names.

    Args:
        module: eager.
        count: of blocks, at least 1.
        call: samples that the outputs are compared on.
        ignore: paths or patterns of layers; blocks that they are, or are in, stay.

    Returns:
        The paths of what went, in that order.

    Raises:
        GoalError: there are fewer blocks.
        SourceError: a pattern that matches no layer, or the module does not run on the samples.

    Reference: Song et al. 2024, "SLEB: Streamlining LLMs through Redundancy Verification and Elimination of Transformer Blocks",
        arXiv:2402.09025; there by perplexity, here by the squared error of the outputs, which needs no labels.
    """
    stay = set(ignored(module, ignore))
    with evaluating(module):
        with running("model"):
            whole = call.run(module)
        blocks = {
            path: stand_in
            for path, stand_in in _blocks(module, call).items()
            if not stay & set(module.get_submodule(path).modules())
        }
        if count > len(blocks):
            found = f"{len(blocks)} can ({some(list(blocks))})" if blocks else "none can"
            raise GoalError(
                f"blocks to leave out: {count}; {found}: blocks are modules of one class in an nn.Sequential "
                "or nn.ModuleList whose result has the shape of their input; ask for fewer, or ignore fewer layers"
            )
        gone: list[str] = []
        for _ in range(count):
            moved = {path: _moved(module, path, one, call, whole) for path, one in blocks.items()}
            path = min(moved, key=lambda name: moved[name])
            if moved[path] == math.inf:
                raise GoalError(
                    f"the model does not run without any of its blocks ({some(list(moved))}); cut channels instead"
                )
            put(module, path, blocks.pop(path))
            gone.append(path)
    return tuple(gone)


def _blocks(module: nn.Module, call: Call) -> dict[str, Skipped]:
    """What can stand in for each block, by the block's path; of blocks within others the outer ones."""
    candidates = dict(_repeated(module))
    seen: dict[str, list[Skipped | None]] = {}

    def watch(path: str) -> Any:
        def look(_child: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            seen.setdefault(path, []).append(_stand_in(args, output))

        return look

    handles = [child.register_forward_hook(watch(path)) for path, child in candidates.items()]
    try:
        call.run(module)
    finally:
        for handle in handles:
            handle.remove()
    fit = {path: ones[0] for path, ones in seen.items() if len(ones) == 1 and ones[0] is not None}
    return {
        path: fit_one
        for path in candidates
        if (fit_one := fit.get(path)) is not None and not any(path.startswith(f"{outer}.") for outer in fit)
    }


def _repeated(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules with layers in them that a container has several of."""
    for path, container in module.named_modules():
        if not isinstance(container, CONTAINERS):
            continue
        kinds = Counter(type(child) for child in container)
        for name, child in container.named_children():
            layered = any(True for _ in child.children()) and any(True for _ in child.parameters())
            if kinds[type(child)] > 1 and layered and not isinstance(child, CONTAINERS):
                yield f"{path}.{name}" if path else name, child


def _stand_in(args: tuple[Any, ...], output: Any) -> Skipped | None:
    """What gives a block's first input in the form of its output; None where that has another shape, or more tensors."""
    first, *rest = output if type(output) in (tuple, list) and output else (output,)
    given = args[0] if args else None
    if not (isinstance(first, Tensor) and isinstance(given, Tensor)) or any(one is not None for one in rest):
        return None
    if first.shape != given.shape or first.dtype != given.dtype:
        return None
    alone = isinstance(output, Tensor)
    return Skipped(None if alone else type(output), 1 if alone else len(output))


def _moved(module: nn.Module, path: str, stand_in: Skipped, call: Call, whole: dict[str, Tensor]) -> float:
    """How far the outputs move without a block, as a share of their squares."""
    block = module.get_submodule(path)
    put(module, path, stand_in)
    try:
        without = call.run(module)
    except Exception:  # whatever the user's code raises where it wants more of a block than its result
        return math.inf
    finally:
        put(module, path, block)
    errors = [
        float((without[name].double() - one.double()).square().sum() / one.double().square().sum().clamp_min(1e-30))
        for name, one in whole.items()
        if one.is_floating_point() and name in without
    ]
    return sum(errors) if errors else math.inf
