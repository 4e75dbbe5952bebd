"""The plug-in: what edgekit asks of TensorRT."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.backend import Artifact, Availability, CompiledModel, KernelRecord
from edgekit.errors import BackendError
from edgekit.target import Target
from edgekit_tensorrt.kernels import from_build_log
from edgekit_tensorrt.package import INSTALL, import_tensorrt, missing_gpu, version_of

if TYPE_CHECKING:
    import onnx_ir as ir

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
        from edgekit.lowering.half import to_float16
        from edgekit.lowering.qdq import lower_qdq

        lowered = lower_qdq(model, target, keep_float=keep_float)
        return to_float16(lowered) if target.runtime.float_dtype == "float16" else lowered

    def check(self, model: ir.Model, target: Target) -> list[str]:
        """The documented rules that the parser lets pass."""
        from edgekit_tensorrt.rules import broken_rules

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
        from edgekit_tensorrt.convert import build_engine

        return build_engine(model, target, out, precision)

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
