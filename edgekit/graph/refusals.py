"""How ONNX Runtime says no."""

from __future__ import annotations

import onnxruntime as ort

_STATE = ort.capi.onnxruntime_pybind11_state
ORT_ERRORS: tuple[type[Exception], ...] = (
    _STATE.Fail,
    _STATE.InvalidArgument,
    _STATE.InvalidGraph,
    _STATE.InvalidProtobuf,
    _STATE.NoSuchFile,
    _STATE.NotImplemented,
    _STATE.RuntimeException,
    _STATE.EPFail,
)
"""What ONNX Runtime raises when it refuses or fails to run a model."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, shortened to be read in a sentence."""
    text = str(error).strip().splitlines()
    line = text[0] if text else type(error).__name__
    return line if len(line) <= 300 else line[:297] + "..."
