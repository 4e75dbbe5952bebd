"""The train-side steps, and the only room that imports torch.

`prepare_qat` is for training loops of one's own; it is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["prepare_qat"]

if TYPE_CHECKING:
    from edgekit.training.qat import prepare_qat


def __getattr__(name: str) -> object:
    if name in __all__:
        from edgekit.training import qat

        return qat.prepare_qat
    raise AttributeError(f"module 'edgekit.training' has no attribute {name!r}")
