"""The plug-in: what edgekit asks of TensorRT."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import onnx_ir as ir

from edgekit.backend import Artifact, Availability, CompiledModel, KernelRecord
from edgekit.errors import BackendError
from edgekit.graph.io import load_onnx, save_onnx
from edgekit.graph.sparsity import graph_sparsity
from edgekit.lowering.half import to_float16
from edgekit.lowering.qdq import lower_qdq
from edgekit.target import Target
from edgekit_tensorrt.build import Reply, Request
from edgekit_tensorrt.kernels import from_build_log
from edgekit_tensorrt.package import INSTALL, import_tensorrt, missing_gpu, version_of
from edgekit_tensorrt.profile import input_ranges, sizes_of_samples
from edgekit_tensorrt.rules import broken_rules

ENGINE, LAYERS = "model.engine", "model.layers.txt"


class TensorRtBackend:
    """TensorRT, or TensorRT for RTX where that is what is installed. It builds without a GPU and runs with one."""

    name = "tensorrt"

    def available(self, target: Target) -> Availability:
        """Whether engines can be built (a package imports) and run (a driver and a GPU are there)."""
        trt = import_tensorrt()
        if trt is None:
            return Availability(False, False, False, reason="neither tensorrt nor tensorrt_rtx imports", remedy=INSTALL)
        missing = missing_gpu()
        remedy = (
            f"run on a machine with an NVIDIA GPU ({', '.join(target.device.isa)}) and its driver" if missing else ""
        )
        return Availability(True, not missing, not missing, version_of(trt), missing, remedy)

    def lower(self, model: ir.Model, target: Target, *, keep_float: frozenset[str]) -> ir.Model:
        """Quantize/DequantizeLinear around float operators; what is not int8 in float16 where the target says so."""
        lowered = lower_qdq(model, target, keep_float=keep_float)
        return to_float16(lowered) if target.runtime.float_dtype == "float16" else lowered

    def check(self, model: ir.Model, target: Target) -> list[str]:
        """The documented rules that the parser lets pass."""
        return broken_rules(model)

    def convert(self, model: Path, target: Target, out: Path, *, precision: str) -> Artifact:
        """Build `model.engine`, and `model.layers.txt`: the builder's own table of what runs in which type.

        Raises:
            BackendError: no package, an unknown GPU or precision, the parser's refusal, or a crash of the builder.
            TargetError: the target's options do not cover the model's dynamic dimensions.
        """
        if precision not in ("int8", *self.float_precisions(target)):
            raise BackendError(
                f"TensorRT has no precision {precision!r}; it has int8, {', '.join(self.float_precisions(target))}"
            )
        graph = load_onnx(model)
        ranges = {
            name: [list(shape) for shape in shapes]
            for name, shapes in input_ranges(graph, target.runtime.options).items()
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

    def float_precisions(self, target: Target) -> tuple[str, ...]:
        """Networks are strongly typed: both are builds of a file in that type."""
        return ("f32", "f16")

    def load(self, artifact: Artifact, target: Target, *, exact: bool) -> CompiledModel:
        """Load an engine. `exact` changes nothing: an engine's types are fixed when it is built, and "f32" is built without TF32.

        Raises:
            BackendError: no package, no GPU, or an engine of another GPU or version.
        """
        available = self.available(target)
        trt = import_tensorrt()
        if trt is None or not available.can_run:
            raise BackendError(f"{artifact.path} cannot run here: {available.reason}; {available.remedy}")
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise BackendError(
                f"{artifact.path} needs the package cuda-bindings to run; pip install cuda-bindings"
            ) from error
        from edgekit_tensorrt.engine import Engine

        return Engine(artifact.path, trt, driver)

    def planned_kernels(self, artifact: Artifact) -> list[KernelRecord]:
        """The kernels as the builder planned them, known without a GPU; empty when the package did not tell."""
        table = artifact.path.with_name(LAYERS)
        return from_build_log(table.read_text(encoding="utf-8").splitlines()) if table.is_file() else []


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
