"""The build process, `python -m edgekit_tensorrt.build REQUEST REPLY`: one ONNX file in, one engine out.

It stands alone, because the builder is native code: when it crashes it takes this process with it and not its parent.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from edgekit_tensorrt.package import INSTALL, compute_capabilities, gpu_at_hand, import_tensorrt, version_of

Shape = list[int]

NOISE = ("cudaError 35", "Cuda Runtime (")
"""What the parser adds to a message on a machine without a driver; it has nothing to do with the model."""


@dataclass(frozen=True, slots=True)
class Request:
    """What to build.

    Attributes:
        model: the ONNX file.
        engine: the file to write.
        isa: the GPUs to build for ("sm86"), or ("current",).
        profile: (min, opt, max) shapes of each input with dynamic dimensions.
        tf32: float32 matrix products may round their inputs to 10 bits, which is TensorRT's default.
        sparse: kernels may skip zeros, where a layer has two in every four weights.
    """

    model: str
    engine: str
    isa: list[str]
    profile: dict[str, list[Shape]] = field(default_factory=dict)
    tf32: bool = True
    sparse: bool = False


@dataclass(frozen=True, slots=True)
class Reply:
    """How it went: `error` is empty on success; `layers` is the builder's table of the engine's layers, one a line."""

    error: str = ""
    warnings: list[str] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)


class Refusal(Exception):
    """TensorRT does not build this; the message is for the user."""


def main(arguments: list[str]) -> None:
    """Read the request, build, write the reply."""
    request_file, reply_file = (Path(argument) for argument in arguments)
    request = Request(**json.loads(request_file.read_text(encoding="utf-8")))
    try:
        reply = build(request)
    except Refusal as refusal:
        reply = Reply(error=str(refusal))
    reply_file.write_text(json.dumps(asdict(reply)), encoding="utf-8")


def build(request: Request) -> Reply:
    """Parse and build.

    Raises:
        Refusal: no package, a GPU it does not build for, or the parser's or builder's own words.
    """
    trt = import_tensorrt()
    if trt is None:
        raise Refusal(f"neither tensorrt nor tensorrt_rtx is installed; {INSTALL}")
    logger = _logger(trt)
    builder = trt.Builder(logger)
    if builder is None:
        raise Refusal(f"{version_of(trt)} cannot create a builder here: {_joined(logger.errors)}")
    # Strongly typed: each tensor has the type that the ONNX file gives it. Newer packages know nothing else.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(request.model):
        raise Refusal(_parser_errors(trt, parser))
    config = _config(trt, builder, request)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise Refusal(f"{version_of(trt)} parsed the model and did not build it: {_joined(logger.errors)}")
    Path(request.engine).write_bytes(engine)
    return Reply(warnings=logger.warnings, layers=logger.layers)


def _config(trt: ModuleType, builder: Any, request: Request) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if not request.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if request.sparse:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    _set_compute_capabilities(trt, config, request.isa)
    if request.profile:
        profile = builder.create_optimization_profile()
        for name, (smallest, usual, largest) in request.profile.items():
            profile.set_shape(name, smallest, usual, largest)
        if config.add_optimization_profile(profile) < 0:
            raise Refusal(
                f"{version_of(trt)} refuses the input shapes {request.profile}; change them in the target's options"
            )
    return config


def _set_compute_capabilities(trt: ModuleType, config: Any, isa: list[str]) -> None:
    known = compute_capabilities(trt)
    if not known:
        here = gpu_at_hand()
        if isa != ["current"] and here not in isa:
            raise Refusal(
                f"{version_of(trt)} builds for the GPU at hand only, which is {here or 'missing'}, and the target wants {', '.join(isa)}; "
                "export on the device itself"
            )
        return
    config.num_compute_capabilities = len(isa)
    for index, name in enumerate(isa):
        if name not in known and name != "current":
            raise Refusal(
                f"{version_of(trt)} does not build for {name!r}: it has {', '.join(known)} and 'current' (the GPU at hand); "
                "set [device] isa in the target to one of these, or install NVIDIA's tensorrt on the device itself"
            )
        if not config.set_compute_capability(getattr(trt.ComputeCapability, name.upper()), index):
            raise Refusal(
                f"{version_of(trt)} does not build for {', '.join(isa)} together; name one GPU in [device] isa"
            )


def _parser_errors(trt: ModuleType, parser: Any) -> str:
    messages = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        where = f"node {error.node_name()!r} ({error.node_operator()}): " if error.node_operator() else ""
        lines = [line for line in error.desc().splitlines() if not any(noise in line for noise in NOISE)]
        messages.append(where + " ".join(lines))
    return f"{version_of(trt)}'s ONNX parser refuses the model: {_joined(messages)}"


def _joined(messages: list[str]) -> str:
    return "; ".join(messages) or "it gave no reason"


def _logger(trt: ModuleType) -> Any:
    """A logger that keeps errors, warnings and the table of layers; its class needs the package, so it is made here."""

    class Logger(trt.ILogger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.warnings: list[str] = []
            self.layers: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(message.strip())
            elif severity == trt.ILogger.WARNING:
                self.warnings.append(message.strip())
            elif message.startswith("Layers:\n"):
                self.layers = [line for line in message.splitlines() if line.startswith("Name: ")]

    return Logger()


if __name__ == "__main__":
    main(sys.argv[1:])
