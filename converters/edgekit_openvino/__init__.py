"""OpenVINO on x86-64 CPUs."""

from __future__ import annotations

from edgekit_openvino.backend import OpenVinoBackend

__all__ = ["OpenVinoBackend"]
