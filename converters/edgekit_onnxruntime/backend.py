"""The ONNX Runtime backend: what it offers to edgekit."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.backend import Artifact, Availability, CompiledModel, KernelRecord
from edgekit.errors import BackendError
from edgekit.lowering.cpu import SATURATES, SATURATES_REMEDY, saturates_here
from edgekit.target import Target

if TYPE_CHECKING:
    import onnx_ir as ir

_MACHINES = {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}


class OnnxRuntimeBackend:
    """ONNX Runtime's CPU execution provider."""

    name = "onnxruntime"

    def available(self, target: Target) -> Availability:
        """Always installed; runs natively where the machine is the target's, and for its results only elsewhere."""
        if importlib.util.find_spec("onnxruntime") is None:
            return Availability(False, False, False, "", "onnxruntime is not installed", "pip install onnxruntime")
        name = f"onnxruntime {version('onnxruntime')}"
        machine = platform.machine().lower()
        machine = _MACHINES.get(machine, machine)
        if target.device.arch in ("", machine):
            if saturates_here(target):
                return Availability(True, False, True, name, SATURATES, SATURATES_REMEDY)
            return Availability(True, True, True, name)
        reason = f"this machine is {machine}, the target {target.device.arch}: results are checked here, latency is not measured"
        return Availability(
            True, False, True, name, reason, f"run `edgekit benchmark` on an {target.device.arch} machine"
        )

    def lower(self, model: ir.Model, target: Target, *, keep_float: frozenset[str]) -> ir.Model:
        """The Quantize/DequantizeLinear graph that ONNX Runtime fuses to integer kernels, with its own operators for transformers.

        These are for the format `qdq` alone: the other formats start from Quantize/DequantizeLinear.
        """
        from edgekit.lowering.qdq import lower_qdq
        from edgekit_onnxruntime.attention import fuse_transformer

        lowered = lower_qdq(model, target, keep_float=keep_float)
        return fuse_transformer(lowered) if target.graph.format == "qdq" else lowered

    def check(self, model: ir.Model, target: Target) -> list[str]:
        """Weights that saturate on CPUs without VNNI. What ONNX Runtime does not take at all, it says itself."""
        from edgekit.lowering.saturation import saturation_warnings

        return saturation_warnings(model, target)

    def convert(self, model: Path, target: Target, out: Path, *, precision: str) -> Artifact:
        """The `.ort` file of a quantized model; a float model, and one whose target asks for `onnx`, is loaded as it is.

        Raises:
            BackendError: ONNX Runtime refuses the graph.
        """
        if precision != "int8" or target.runtime.artifact == "onnx":
            return Artifact(model, (model,), precision)
        from edgekit_onnxruntime.session import save_ort

        path = out / f"{model.stem}.ort"
        save_ort(model, path, target)
        return Artifact(path, (path,), precision)

    def float_precisions(self, target: Target) -> tuple[str, ...]:
        """Float32 with all of ONNX Runtime's fusions, and on ARM its bfloat16 fast path too."""
        return ("f32", "bf16") if target.device.arch == "aarch64" else ("f32",)

    def planned_kernels(self, artifact: Artifact) -> Sequence[KernelRecord]:
        """None: what runs is known when it has run."""
        return ()

    def load(self, artifact: Artifact, target: Target, *, exact: bool) -> CompiledModel:
        """Load an artifact into a session of the target's threads and options."""
        from edgekit_onnxruntime.session import OnnxRuntimeModel

        if not artifact.path.is_file():
            raise BackendError(f"{artifact.path}: no such file; run `edgekit export` again")
        return OnnxRuntimeModel(artifact, target)
