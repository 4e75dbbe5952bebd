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
from edgekit.lowering.saturation import SATURATES, SATURATES_REMEDY, saturates_here, saturation_warnings
from edgekit.target import Target
from edgekit_openvino.bias import add_biases
from edgekit_openvino.recurrent import widen_codes

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
        return widen_codes(add_biases(lower_qdq(model, target, keep_float=keep_float)))

    def check(self, model: ir.Model, target: Target) -> list[str]:
        """Graphs that OpenVINO accepts and computes wrongly, or silently runs in float.

        1. Pad between a DequantizeLinear and its reader, and Pad of codes with a number other than 0.
        2. Weights with a zero point run in f32.
        3. 16-bit grids are stripped, their clamp too.
        4. Weights that saturate on CPUs without VNNI.
        """
        found = []
        for node in model.graph:
            if node.op_type == "Pad":
                found += _pad_rules(node)
            if node.op_type == "DequantizeLinear":
                found += _grid_rules(node)
        return found + saturation_warnings(model, target)

    def convert(self, model: Path, target: Target, out: Path, *, precision: str) -> Artifact:
        """OpenVINO IR: `.xml` for the graph, `.bin` for the weights.

        Raises:
            BackendError: OpenVINO is not installed or refuses the file.
        """
        if importlib.util.find_spec("openvino") is None:
            raise BackendError(f"openvino is not installed, so {model.name} cannot become OpenVINO IR; {_REMEDY}")
        from edgekit_openvino.compiled import save_ir

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


def _pad_rules(pad: ir.Node) -> list[str]:
    source, filling = pad.inputs[0], pad.inputs[2] if len(pad.inputs) > 2 else None
    producer = source.producer() if source is not None else None
    if producer is not None and producer.op_type == "DequantizeLinear":
        return [f"Pad {pad.name!r} reads a DequantizeLinear: OpenVINO pads codes with 0, not with the zero point"]
    codes = source is not None and source.dtype in (DTYPES["int8"], DTYPES["uint8"])
    if codes and filling is not None and filling.const_value is not None and filling.const_value.numpy().any():
        return [f"Pad {pad.name!r} pads codes with a zero point other than 0: OpenVINO pads channels with 0"]
    return []


def _grid_rules(dequantize: ir.Node) -> list[str]:
    codes, zero_point = dequantize.inputs[0], dequantize.inputs[2] if len(dequantize.inputs) > 2 else None
    if codes is None or zero_point is None or zero_point.const_value is None:
        return []
    found = []
    eight_bits = zero_point.const_value.dtype in (DTYPES["int8"], DTYPES["uint8"])
    if codes.const_value is not None and eight_bits and zero_point.const_value.numpy().any():
        found.append(f"weight {codes.name!r} has a zero point other than 0: OpenVINO runs its layer in f32")
    if zero_point.const_value.dtype in (DTYPES["int16"], DTYPES["uint16"]):
        found.append(f"{dequantize.name!r} is a 16-bit grid: OpenVINO drops it, its clamp too")
    return found
