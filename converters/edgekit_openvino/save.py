"""From ONNX to OpenVINO IR."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import onnx_ir as ir

from edgekit.errors import BackendError
from edgekit_openvino import convert


def save_ir(model: Path, path: Path) -> tuple[str, ...]:
    """Read an ONNX file and save it as OpenVINO IR, in a process of its own; the names of inputs that it drops: those of no numbers.

    Raises:
        BackendError: with OpenVINO's words, or that it crashed.
    """
    graph = ir.load(model).graph
    producers = {value.name: value.producer() for value in graph.outputs}
    names = json.dumps({name: node.name for name, node in producers.items() if node is not None and node.name})
    command = [sys.executable, "-P", convert.__file__, str(model), str(path), names]
    ended = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if ended.returncode == convert.REFUSED:
        raise BackendError(f"{model}: OpenVINO refuses the model: {ended.stdout.strip()}")
    if ended.returncode:
        last = " ".join(ended.stderr.strip().splitlines()[-3:]) or "it wrote nothing"
        raise BackendError(
            f"{model}: OpenVINO crashed while it read the model (exit code {ended.returncode}; its last words: {last}); try another version"
        )
    read = set(json.loads(ended.stdout.splitlines()[-1]))
    return tuple(value.name for value in graph.inputs if value.name and value.name not in read)
