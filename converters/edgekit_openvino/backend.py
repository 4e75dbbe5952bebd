"""The OpenVINO backend: what it offers to edgekit."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir

from edgekit.backend import Artifact, Availability, CompiledModel, KernelRecord
from edgekit.errors import BackendError
from edgekit.graph.annotations import DTYPES
from edgekit.lowering.qdq import lower_qdq
from edgekit.target import Target

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
            return Availability(True, True, True, name)
        reason = f"this machine is {machine}, the target {target.device.arch}: results are checked here, latency is not measured"
        return Availability(True, False, True, name, reason, f"run `edgekit benchmark` on an {target.device.arch} machine")

    def lower(self, model: ir.Model, target: Target, *, keep_float: frozenset[str]) -> ir.Model:
        """The Quantize/DequantizeLinear graph that OpenVINO reads as FakeQuantize and runs in int8."""
        return lower_qdq(model, target, keep_float=keep_float)

    def check(self, model: ir.Model, target: Target) -> list[str]:
        """Graphs that OpenVINO accepts and computes wrongly, or silently runs in float.

        1. Pad between a DequantizeLinear and its reader: wrong where the zero point is not 0 and the batch is dynamic.
        2. Weights with a zero point run in f32.
        3. 16-bit grids are stripped, their clamp too.
        """
        found = []
        for node in model.graph:
            if node.op_type == "Pad" and any(_is_op(value, "DequantizeLinear") for value in node.inputs[:1]):
                found.append(f"Pad {node.name!r} reads a DequantizeLinear: OpenVINO pads codes with 0, not with the zero point")
            if node.op_type != "DequantizeLinear":
                continue
            zero_point = node.inputs[2] if len(node.inputs) > 2 else None
            if zero_point is None or zero_point.const_value is None:
                continue
            if node.inputs[0] is not None and node.inputs[0].const_value is not None and zero_point.const_value.numpy().any():
                found.append(f"weight {node.inputs[0].name!r} has a zero point other than 0: OpenVINO runs its layer in f32")
            if zero_point.const_value.dtype in (DTYPES["int16"], DTYPES["uint16"]):
                found.append(f"{node.name!r} is a 16-bit grid: OpenVINO drops it, its clamp too")
        return found

    def convert(self, model: Path, target: Target, out: Path, *, precision: str) -> Artifact:
        """OpenVINO IR: `.xml` for the graph, `.bin` for the weights.

        Raises:
            BackendError: OpenVINO is not installed or refuses the file.
        """
        if importlib.util.find_spec("openvino") is None:
            raise BackendError(f"openvino is not installed, so {model.name} cannot become OpenVINO IR; {_REMEDY}")
        from edgekit_openvino.compiled import save_ir

        path = out / f"{model.stem}.xml"
        save_ir(model, path)
        return Artifact(path, (path, path.with_suffix(".bin")), precision)

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


def _is_op(value: ir.Value | None, op_type: str) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == op_type
