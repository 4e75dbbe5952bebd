"""Running a graph in ONNX Runtime as a reference: for calibration, for proofs of equality and for simulation."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from edgekit.errors import GraphError
from edgekit.graph.annotations import all_values
from edgekit.graph.io import fits_protobuf, save_onnx, self_contained
from edgekit.graph.refusals import ORT_ERRORS, first_line

Arrays = dict[str, NDArray[np.generic]]


class Session:
    """A model in ONNX Runtime on the CPU.

    Args:
        model: the graph, or the path of a file.
        optimize: let ONNX Runtime fuse and rewrite floats. Off, each node is computed as the standard says. Quantize/DequantizeLinear
            are computed either way: what they stand around is simulated in float.
        threads: of one inference; 0 lets ONNX Runtime choose.
        lean: give memory back after each run, which takes a fifth more time where activations are large.
    """

    def __init__(self, model: ir.Model | Path, *, optimize: bool, threads: int = 0, lean: bool = False) -> None:
        options = ort.SessionOptions()
        level = ort.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        options.enable_cpu_mem_arena = not lean
        # Planned from the second run of a shape on, beside what the first has taken: twice the memory, and no faster.
        options.enable_mem_pattern = False
        # Or it makes integer kernels of Q/DQ, which saturate on some CPUs, and quantizes more than it is told to.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        # Spinning threads slow whatever works on the results between two runs.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = _open(model, options)
        except ORT_ERRORS as error:
            if not optimize:
                raise GraphError(f"ONNX Runtime cannot load the model: {first_line(error)}") from error
            # Its fusions break some graphs, such as a LayerNormalization in parts behind a Cast.
            self._session = Session(model, optimize=False, threads=threads, lean=lean)._session
        self.input_names: list[str] = [i.name for i in self._session.get_inputs()]
        self.output_names: list[str] = [o.name for o in self._session.get_outputs()]

    def run(self, feeds: Mapping[str, NDArray[np.generic]], outputs: Sequence[str] | None = None) -> Arrays:
        """Arrays by input name in, arrays by output name out.

        Raises:
            GraphError: with ONNX Runtime's words, when a node fails.
        """
        return {name: _own(array) for name, array in self.lend(feeds, outputs).items()}

    def lend(self, feeds: Mapping[str, NDArray[np.generic]], outputs: Sequence[str] | None = None) -> Arrays:
        """The same as views of the session's memory, for large arrays that are soon let go of.

        All that a session took for its activations stays taken as long as one of them is held, be it of a few bytes and the session
        gone: half a gigabyte for a score.
        """
        names = self.output_names if outputs is None else list(outputs)
        try:
            results = self._session.run(names, dict(feeds))
        except ORT_ERRORS as error:
            raise GraphError(f"ONNX Runtime cannot run the model: {first_line(error)}") from error
        return dict(zip(names, results, strict=True))


def _own(array: NDArray[np.generic]) -> NDArray[np.generic]:
    """The array with memory of its own; what is no array (a sequence) as it is."""
    return array.copy() if isinstance(array, np.ndarray) and not array.flags.owndata else array


def _open(model: ir.Model | Path, options: ort.SessionOptions) -> ort.InferenceSession:
    providers = ["CPUExecutionProvider"]
    if isinstance(model, Path):
        return ort.InferenceSession(str(model), options, providers=providers)
    if fits_protobuf(model):
        return ort.InferenceSession(
            ir.to_proto(self_contained(model)).SerializeToString(), options, providers=providers
        )
    with tempfile.TemporaryDirectory(prefix="edgekit-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "model.onnx"
        save_onnx(model, path)
        return ort.InferenceSession(str(path), options, providers=providers)


def with_outputs(model: ir.Model, names: set[str]) -> ir.Model:
    """A copy whose values of these names are outputs too."""
    copy = model.clone()
    present = {value.name for value in copy.graph.outputs}
    copy.graph.outputs.extend(v for v in all_values(copy.graph) if v.name in names and v.name not in present)
    return copy
