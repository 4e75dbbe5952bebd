"""edgekit: compress a model once, ship it to every runtime, prove what was claimed."""

from __future__ import annotations

__version__ = "0.1.0"
