"""From ONNX to an engine."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from edgekit.backend import Artifact
from edgekit.errors import BackendError
from edgekit.graph.io import load_onnx, save_onnx
from edgekit.graph.sparsity import graph_sparsity
from edgekit.lowering.half import to_float16
from edgekit.target import Target
from edgekit_tensorrt.backend import ENGINE, LAYERS
from edgekit_tensorrt.build import Reply, Request
from edgekit_tensorrt.profile import input_ranges, sizes_of_samples


def build_engine(model: Path, target: Target, out: Path, precision: str) -> Artifact:
    """See `TensorRtBackend.convert`; of a precision that there is."""
    graph = load_onnx(model)
    ranges = {
        name: [list(shape) for shape in shapes] for name, shapes in input_ranges(graph, target.runtime.options).items()
    }
    isa = list(target.device.isa) or ["current"]
    with tempfile.TemporaryDirectory(prefix="edgekit-tensorrt-") as folder:
        if precision == "f16":
            half = Path(folder) / "model.onnx"
            save_onnx(to_float16(graph), half)
            model = half
        request = Request(
            str(model.absolute()),
            str((out / ENGINE).absolute()),
            isa,
            ranges,
            tf32=precision != "f32",
            sparse=any(layer.two_four for layer in graph_sparsity(graph)),
        )
        reply = _in_child(request, Path(folder))
    if reply.error:
        raise BackendError(f"{reply.error} (target {target.name!r}, precision {precision})")
    (out / LAYERS).write_text("".join(f"{line}\n" for line in reply.layers), encoding="utf-8")
    return Artifact(
        out / ENGINE,
        (out / ENGINE,),
        precision,
        tuple(sizes_of_samples(graph, target.runtime.options)),
        fixed_sizes=True,  # also where options give a range: what is tried here need not lie in it
    )


def _in_child(request: Request, folder: Path) -> Reply:
    """Build in a process of its own.

    Raises:
        BackendError: it died without a reply; with the signal.
    """
    request_file, reply_file = folder / "request.json", folder / "reply.json"
    request_file.write_text(json.dumps(asdict(request)), encoding="utf-8")
    command = [sys.executable, "-m", "edgekit_tensorrt.build", str(request_file), str(reply_file)]
    finished = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if finished.returncode == 0 and reply_file.is_file():
        return Reply(**json.loads(reply_file.read_text(encoding="utf-8")))
    Path(request.engine).unlink(missing_ok=True)
    last = "\n".join(finished.stderr.strip().splitlines()[-5:]) or "it wrote nothing"
    raise BackendError(
        f"TensorRT's builder crashed ({_death(finished.returncode)}) on {request.model}; its last words: {last}; "
        "try another version of the package, or keep the layers it names in float"
    )


def _death(returncode: int) -> str:
    if returncode >= 0:
        return f"exit code {returncode}"
    try:
        return f"signal {signal.Signals(-returncode).name}"
    except ValueError:
        return f"signal {-returncode}"
