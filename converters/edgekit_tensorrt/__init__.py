"""TensorRT for edgekit: NVIDIA's builder makes the engine, its runtime runs it where there is a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgekit_tensorrt.backend import TensorRtBackend

__all__ = ["TensorRtBackend"]


def __getattr__(name: str) -> object:
    """The backend, imported when asked for: the build process (`edgekit_tensorrt.build`) needs none of it."""
    if name == "TensorRtBackend":
        from edgekit_tensorrt.backend import TensorRtBackend

        return TensorRtBackend
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
