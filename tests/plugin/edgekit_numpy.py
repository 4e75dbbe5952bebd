"""A third party's backend: ONNX's reference evaluator. It needs no change in edgekit, only its entry point.

Options of `[runtime]` make it fail the ways that real runtimes do: `on_load` and `on_run`, see `misbehave`. The latter
begins after `healthy_runs` inferences. `wrong` names nodes that it computes wrongly when they read a DequantizeLinear,
`wrong_always` nodes that it always computes wrongly, `wrong_size` the last size of an input with which it gets all wrong, `no_size` one
that it refuses.
`absent` says why the device is not here.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from edgekit.backend import Artifact, Availability, CompiledModel, Feeds, KernelRecord, Outputs
from edgekit.errors import GraphError
from edgekit.target import Target


class UnhappyPluginError(GraphError):
    """An error class that only this plug-in knows."""


def misbehave(how: str) -> None:
    """Do what `how` says; the empty string is to do nothing."""
    match how:
        case "":
            pass
        case "crash":
            print("assertion failed in kernel.cc:42", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGSEGV)
        case "be killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            os._exit(3)
        case "hang":
            time.sleep(3600)
        case "dawdle":
            time.sleep(0.02)
        case "import":
            from slow_runtime import READY  # takes 0.3 s

            time.sleep(READY)
        case "print":
            print("hello from Python")
            os.write(1, b'{"do": "hello from C"}\n')
            subprocess.run(["echo", "hello from a child"], check=True)
        case "read":
            os.read(0, 1000)
        case "raise":
            raise ValueError("the cheese is out")
        case "refuse":
            raise UnhappyPluginError("node 'conv': no kernel for it; leave it in float")
        case _:
            raise AssertionError(how)


def spoiled(model: onnx.ModelProto, options: dict[str, str]) -> onnx.ModelProto:
    """The model with the sign of some nodes' results turned."""
    dequantized = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    nodes = []
    for node in model.graph.node:
        nodes.append(node)
        quantized = node.name in options.get("wrong", "").split(",") and node.input[0] in dequantized
        if quantized or node.name in options.get("wrong_always", "").split(","):
            output, node.output[0] = node.output[0], f"{node.output[0]}_right"
            nodes.append(onnx.helper.make_node("Neg", [node.output[0]], [output]))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


class Compiled:
    """An ONNX file in the reference evaluator."""

    def __init__(self, path: Path, options: dict[str, str]) -> None:
        self._model = spoiled(onnx.load(path), options)
        self._evaluator = ReferenceEvaluator(self._model)
        self._on_run = options.get("on_run", "")
        self._wrong_size = int(options.get("wrong_size", "0"))
        self._no_size = int(options.get("no_size", "0"))
        self._healthy_runs = int(options.get("healthy_runs", "0"))

    def run(self, feeds: Feeds) -> Outputs:
        """Run one inference."""
        return dict(zip(self._evaluator.output_names, self._run_once(dict(feeds)), strict=True))

    def prepare(self, feeds: Feeds) -> Callable[[], None]:
        """One inference on `feeds`."""
        inputs = dict(feeds)

        def infer() -> None:
            self._run_once(inputs)

        return infer

    def _run_once(self, inputs: Outputs) -> list[NDArray[np.generic]]:
        self._healthy_runs -= 1
        misbehave(self._on_run if self._healthy_runs < 0 else "")
        outputs = cast(list[NDArray[np.generic]], self._evaluator.run(None, inputs))
        if any(array.ndim and array.shape[-1] == self._no_size for array in inputs.values()):
            raise ValueError("no kernel for this size")
        wrong = any(array.ndim and array.shape[-1] == self._wrong_size for array in inputs.values())
        return [-array for array in outputs] if wrong else outputs

    def kernels(self, feeds: Feeds) -> list[KernelRecord]:
        """One kernel a node; all of them compute in float."""
        return [KernelRecord((node.name,), node.op_type, "f32") for node in self._model.graph.node]


class NumpyBackend:
    """The reference evaluator of ONNX."""

    name = "numpy"

    def available(self, target: Target) -> Availability:
        """Always there, since it comes with onnx, unless the option `absent` says otherwise."""
        version = f"onnx {onnx.__version__}"
        reason = target.runtime.options.get("absent", "")
        if reason:
            return Availability(True, False, False, version, reason, "attach the device")
        return Availability(can_convert=True, can_run=True, can_check=True, version=version)

    def lower(self, model: ir.Model, target: Target, *, keep_float: frozenset[str]) -> ir.Model:
        """Quantize/DequantizeLinear around each quantized operator."""
        from edgekit.lowering.qdq import lower_qdq

        return lower_qdq(model, target, keep_float=keep_float)

    def check(self, model: ir.Model, target: Target) -> list[str]:
        """No rules."""
        return []

    def convert(self, model: Path, target: Target, out: Path, *, precision: str) -> Artifact:
        """The ONNX file itself is the artifact."""
        path = out / f"model.{precision}.onnx"
        shutil.copyfile(model, path)
        return Artifact(path, (path,), precision)

    def float_precisions(self, target: Target) -> tuple[str, ...]:
        """Only f32."""
        return ("f32",)

    def planned_kernels(self, artifact: Artifact) -> Sequence[KernelRecord]:
        """None: what runs is known when it has run."""
        return ()

    def load(self, artifact: Artifact, target: Target, *, exact: bool) -> CompiledModel:
        """Read the file."""
        misbehave(target.runtime.options.get("on_load", ""))
        return Compiled(artifact.path, target.runtime.options)
