"""What becomes of a layer's output until other layers weigh it: for messages about channels that cannot be cut."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves

from edgekit.training.checkpoint import evaluating
from edgekit.training.forward import Call

_WEIGH = ("conv", "linear", "matmul", "bmm", "addmm", "multi_head_attention")
"""How the names of functions begin whose outputs are other channels."""


def followers(module: nn.Module, call: Call, layer: str) -> tuple[str, ...]:
    """The functions that what a layer makes goes through, in order, each once: `relu`, `fft_fft`, ..."""
    path = _Path()
    hook = module.get_submodule(layer).register_forward_hook(path.begin)
    try:
        with evaluating(module), path:
            call.run(module)
    finally:
        hook.remove()
    return tuple(dict.fromkeys(path.names))


class _Path(TorchFunctionMode):
    """Follows tensors from function to function; they are kept, so that none takes another one's identity."""

    def __init__(self) -> None:
        super().__init__()
        self.followed: dict[int, Tensor] = {}
        self.names: list[str] = []

    def begin(self, layer: nn.Module, args: Any, made: Any) -> None:
        """What the layer made is followed from here."""
        self._follow(made)

    def _follow(self, made: Any) -> None:
        self.followed |= {id(one): one for one in tree_leaves(made) if isinstance(one, Tensor)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if any(id(one) in self.followed for one in tree_leaves((args, kwargs or {}))):
            name = (resolve_name(func) or getattr(func, "__name__", "")).rpartition(".")[2]
            if not name.startswith("__") and not name.startswith(_WEIGH):
                self.names.append(name)
                self._follow(made)
        return made
