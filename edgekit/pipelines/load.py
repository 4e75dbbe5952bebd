"""`edgekit.load`: a pruned module, without its class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgekit.records import PRUNED


def load(path: str | Path) -> Any:
    """The module that pruning left, as an `nn.Module`, from what `compress` wrote; no pickled code is run.

    Args:
        path: the folder that `compress` wrote, or its folder `pruned`.

    Raises:
        EdgekitError: see `edgekit.training.stored.load_module`.
    """
    # Torch takes seconds to import.
    from edgekit.training.stored import load_module

    path = Path(path)
    return load_module(path / PRUNED if (path / PRUNED).is_dir() else path)
