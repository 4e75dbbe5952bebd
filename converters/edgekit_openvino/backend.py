"""The OpenVINO backend: what it offers to edgekit."""

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

_REMEDY = "pip install 'edgekit[openvino]'"


class OpenVinoBackend:
    """OpenVINO's CPU plug-in."""

    name = "openvino"

    def available(self, target: Target) -> Availability:
        """Whether the package is installed, and this machine is an x86-64 one."""
        if importlib.util.find_spec("openvino") is None:
            return Availability(False, False, False, "", "openvino is not installed", _REMEDY)
        name = f"openvino {version('openvino')}"
        machine = platform.machine().lower().replace("amd64", "x86_64").replace("arm64", "aarch64")
        if target.device.arch in ("", machine):
            if saturates_here(target):
                return Availability(True, False, True, name, SATURATES, SATURATES_REMEDY)
            return Availability(True, True, True, name)
        reason = f"this machine is {machine}, the target {target.device.arch}: results are checked here, latency is not measured"
        return Availability(
            True, False, True, name, reason, f"run `edgekit benchmark` on an {target.device.arch} machine"
        )

    def lower(self, model: ir.Model, target: Target, *, keep_float: frozenset[str]) -> ir.Model:
        """The Quantize/DequantizeLinear graph that OpenVINO reads as FakeQuantize and runs in int8."""
        from edgekit.lowering.qdq import lower_qdq
        from edgekit_openvino.bias import add_biases
        from edgekit_openvino.recurrent import widen_codes

        return widen_codes(add_biases(lower_qdq(model, target, keep_float=keep_float)))

    def check(self, model: ir.Model, target: Target) -> list[str]:
        """What it accepts and computes wrongly, or silently runs in float."""
        from edgekit_openvino.rules import broken_rules

        return broken_rules(model, target)

    def convert(self, model: Path, target: Target, out: Path, *, precision: str) -> Artifact:
        """OpenVINO IR: `.xml` for the graph, `.bin` for the weights.

        Raises:
            BackendError: OpenVINO is not installed or refuses the file.
        """
        if importlib.util.find_spec("openvino") is None:
            raise BackendError(f"openvino is not installed, so {model.name} cannot become OpenVINO IR; {_REMEDY}")
        from edgekit_openvino.save import save_ir

        path = out / f"{model.stem}.xml"
        empty = save_ir(model, path)
        notes = (
            (f"OpenVINO drops inputs that hold nothing: do not feed {', '.join(map(repr, empty))}",) if empty else ()
        )
        return Artifact(path, (path, path.with_suffix(".bin")), precision, notes)

    def float_precisions(self, target: Target) -> tuple[str, ...]:
        """Float32, and bfloat16 where this CPU has it: OpenVINO then takes it by default."""
        if importlib.util.find_spec("openvino") is None:
            return ("f32",)
        from edgekit_openvino.compiled import has_bfloat16

        return ("f32", "bf16") if has_bfloat16() else ("f32",)

    def planned_kernels(self, artifact: Artifact) -> Sequence[KernelRecord]:
        """None: what runs is known when it has run."""
        return ()

    def load(self, artifact: Artifact, target: Target, *, exact: bool) -> CompiledModel:
        """Compile an IR file for the CPU; float parts in f32 when `exact`, or when f32 is the artifact's precision."""
        from edgekit_openvino.compiled import OpenVinoModel

        if not artifact.path.is_file():
            raise BackendError(f"{artifact.path}: no such file; run `edgekit export` again")
        return OpenVinoModel(artifact, target, exact=exact)
