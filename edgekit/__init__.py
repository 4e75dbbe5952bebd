"""edgekit: compress a model once, ship it to every runtime, prove what was claimed.

The three calls are `edgekit.compress`, `edgekit.export` and `edgekit.benchmark`; `edgekit.Method` says how to compress. Each is
imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["LayerMethod", "Method", "benchmark", "compress", "export", "load"]

if TYPE_CHECKING:
    from edgekit.method import LayerMethod, Method
    from edgekit.pipelines.benchmark import benchmark
    from edgekit.pipelines.compress import compress
    from edgekit.pipelines.export import export
    from edgekit.pipelines.load import load


def __getattr__(name: str) -> object:
    if name in __all__:
        from importlib import import_module

        module = "method" if name in ("Method", "LayerMethod") else f"pipelines.{name}"
        return getattr(import_module(f"edgekit.{module}"), name)
    raise AttributeError(f"module 'edgekit' has no attribute {name!r}")
