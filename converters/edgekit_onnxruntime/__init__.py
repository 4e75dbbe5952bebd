"""ONNX Runtime on x86-64 and ARM CPUs.

Built on what `onnxruntime` itself ships; the separate package `onnxruntime-tools` ended in 2021.
"""

from __future__ import annotations

from edgekit_onnxruntime.backend import OnnxRuntimeBackend

__all__ = ["OnnxRuntimeBackend"]
