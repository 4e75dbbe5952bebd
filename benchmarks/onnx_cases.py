"""The cases that the ONNX project tests runtimes with, each through `compress` and `export`, and what became of it.

`python benchmarks/onnx_cases.py TARGET,... CASE...` is a child that prints one line of JSON for each case before and after it ran, so
that its parent knows which one ended it.
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnxruntime as ort
from numpy.typing import NDArray
from onnx.backend.test.loader import DATA_DIR, load_model_tests

import edgekit
from edgekit.errors import EdgekitError
from edgekit.graph.refusals import ORT_ERRORS, first_line
from edgekit.graph.run import Session
from edgekit.kept_workers import kept_workers
from edgekit.lowering.cpu import cpu_saturates

Array = NDArray[Any]

INT8, FLOAT, REFUSED, WRONG, CRASH, NOT_RUNNABLE = "int8", "float", "refused", "wrong", "crash", "not runnable here"
OUTCOMES = (INT8, FLOAT, REFUSED, WRONG, CRASH)
COMPRESS = "compress"
"""In the place of a target: what `compress` alone did."""
STORED = ("simple", "pytorch-converted", "pytorch-operator")
LIGHT = "light"
CONSTANTS, NEWER, OLDEST = "+constants", "+opset", 7
RUN_ERRORS: tuple[type[Exception], ...] = (*ORT_ERRORS, RuntimeError, ValueError, TypeError)
FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16}
MOST_FLOAT_ERROR = {"float16": 1e-2, "bfloat16": 1e-1}
LEAST_DB = 10.0
"""The least of int8 on the very call that it was calibrated with; a half of all steps lost is more than rounding."""


class NotRunnable(Exception):
    """A case that is not about what edgekit does, or that ONNX Runtime does not run."""


@dataclass(frozen=True, slots=True)
class Case:
    """One case of ONNX's: `model` is a model or the path of one; arrays by input name are its first data set."""

    name: str
    kind: str
    model: onnx.ModelProto | Path
    inputs: tuple[Any, ...] | Path | None


@dataclass(frozen=True, slots=True)
class Row:
    """What became of a case on one target."""

    case: str
    kind: str
    target: str
    outcome: str
    reason: str = ""
    decibels: float | None = None


@functools.cache
def cases() -> dict[str, Case]:
    """Every case that comes with the installed `onnx`, by its name, in the order of names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of onnx's own makers of cases, which overflow on purpose
        nodes = load_model_tests(kind="node")
    found = [Case(o.name, "node", o.model, tuple(o.data_sets[0][0])) for o in nodes if o.model and o.data_sets]
    for kind in STORED:
        folders = sorted(path.parent for path in (Path(DATA_DIR) / kind).glob("*/model.onnx"))
        found += [Case(folder.name, kind, folder / "model.onnx", folder / "test_data_set_0") for folder in folders]
    found += [Case(path.stem, LIGHT, path, None) for path in sorted((Path(DATA_DIR) / LIGHT).glob("*.onnx"))]
    found += [*filter(None, map(_with_constants, found)), *filter(None, map(_of_newer_opset, found))]
    return {case.name: case for case in sorted(found, key=lambda case: case.name)}


def _with_constants(case: Case) -> Case | None:
    """The same with weights: in ONNX's own cases all that a node reads is an input, which leaves nothing to quantize."""
    if not isinstance(case.model, onnx.ModelProto) or not isinstance(case.inputs, tuple) or len(case.inputs) < 2:
        return None
    if any(not isinstance(one, np.ndarray | np.generic) for one in case.inputs):
        return None
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    others = _inputs(model)[1:]
    arrays = dict(zip(others, case.inputs[1:], strict=True))
    model.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(a), name) for name, a in arrays.items())
    kept = [value for value in model.graph.input if value.name not in arrays]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    return Case(f"{case.name}{CONSTANTS}", "node with constants", model, case.inputs[:1])


def _of_newer_opset(case: Case) -> Case | None:
    """The same with another number: ONNX stored these before opset 7, the oldest that edgekit takes, and their operators stayed."""
    if case.kind not in STORED or not isinstance(case.model, Path) or not isinstance(case.inputs, Path):
        return None
    model = onnx.load(case.model)
    [opset] = [one for one in model.opset_import if not one.domain]
    if opset.version >= OLDEST:
        return None
    opset.version = OLDEST
    return Case(f"{case.name}{NEWER}", f"{case.kind}, opset {OLDEST}", model, case.inputs)


def rows(case: Case, targets: Sequence[str], folder: Path) -> Iterator[Row]:
    """One row for each target; with none of them, one for `compress`."""
    try:
        path, feeds, expected = _prepared(case, folder)
    except NotRunnable as error:
        yield Row(case.name, case.kind, COMPRESS, NOT_RUNNABLE, str(error))
        return
    try:
        edgekit.compress(path, folder / "out", calibration=[feeds], proxy="none")
        if not targets:
            yield Row(case.name, case.kind, COMPRESS, *_judged(folder / "out" / "model.onnx", True, feeds, expected))
    except Exception as error:  # any but edgekit's own is what this looks for
        for target in targets or [COMPRESS]:
            yield Row(case.name, case.kind, target, *_failed(error, COMPRESS))
        return
    for target in targets:
        try:
            # What a runtime computes wrongly is refused by the proof.
            [result] = edgekit.export(folder / "out", [target])
            yield Row(case.name, case.kind, target, *_judged(result.folder / "model.onnx", False, feeds, expected))
        except Exception as error:  # as above
            yield Row(case.name, case.kind, target, *_failed(error, "export"))


def _failed(error: Exception, step: str) -> tuple[str, str]:
    if isinstance(error, EdgekitError):
        return REFUSED, re.sub(r"[^\s:]*edgekit-cases-[^\s:]*/", "", str(error))
    where = traceback.extract_tb(error.__traceback__)
    ours = next((frame for frame in reversed(where) if "edgekit" in Path(frame.filename).parts), where[-1])
    place = f"{Path(ours.filename).name}:{ours.lineno} {ours.name}"
    return CRASH, f"{step}: {type(error).__name__}: {first_line(error)} ({place})"


def _judged(
    path: Path, annotated: bool, feeds: Mapping[str, Array], expected: Mapping[str, Any]
) -> tuple[str, str, float | None]:
    """The outcome, why, and how far (dB) a graph is from the source in ONNX Runtime's reference session."""
    model = onnx.load(path, load_external_data=False)
    quantized = any(node.op_type.endswith("QuantizeLinear") for node in model.graph.node)
    found = Session(path, optimize=False).run(feeds)
    problems = [_difference(name, expected[name], found.get(name)) for name in expected]
    problem = next(filter(None, problems), "")
    if annotated and model.graph.quantization_annotation:
        return (WRONG, problem, None) if problem else (INT8, "", None)
    if not quantized:
        return (WRONG if problem else FLOAT), problem, None
    if cpu_saturates() and any("Integer" in node.op_type for node in model.graph.node):
        return (
            INT8,
            "",
            None,
        )  # this CPU computes the target's integer kernels wrongly, and `export` checked others in their place
    near = min((_decibels(expected[name], found[name]) for name in expected if name in found), default=0.0)
    return INT8, (f"only {near:.1f} dB from float" if near < LEAST_DB else ""), near


def _difference(name: str, expected: Any, found: Any) -> str:
    """How an output differs by more than a float's rounding, in words."""
    if found is None:
        return f"output {name!r} is gone"
    old, new = np.asarray(expected), np.asarray(found)
    if old.shape != new.shape or old.dtype != new.dtype:
        return f"output {name!r} was {old.dtype} {old.shape} and is {new.dtype} {new.shape}"
    if old.dtype.kind not in "f":
        return "" if np.array_equal(old, new) else f"output {name!r} differs in {int((old != new).sum())} elements"
    most = MOST_FLOAT_ERROR.get(old.dtype.name, 1e-3) * max(1.0, float(np.abs(old[np.isfinite(old)]).max(initial=0.0)))
    if np.allclose(old.astype(np.float64), new.astype(np.float64), rtol=0.0, atol=most, equal_nan=True):
        return ""
    with np.errstate(invalid="ignore"):
        return f"output {name!r} is off by {float(np.nanmax(np.abs(old.astype(np.float64) - new))):.3g}"


def _decibels(expected: Any, found: Any) -> float:
    old, new = np.asarray(expected), np.asarray(found)
    if old.shape != new.shape:
        return -200.0
    if old.dtype.kind != "f" or not old.size:
        return 200.0
    old, new = old.astype(np.float64), new.astype(np.float64)
    finite = np.isfinite(old) & np.isfinite(new)
    noise, signal = np.sum((old - new)[finite] ** 2), np.sum(old[finite] ** 2)
    return float(np.clip(10 * np.log10(max(signal, 1e-300) / max(noise, 1e-300)), -200.0, 200.0))


def _prepared(case: Case, folder: Path) -> tuple[Path, dict[str, Array], dict[str, Any]]:
    """The model's file, one call, and what ONNX Runtime makes of it.

    Raises:
        NotRunnable: it is nothing that edgekit has to do with, or that ONNX Runtime can run or repeat.
    """
    path = folder / "model.onnx"
    if isinstance(case.model, Path):
        path.write_bytes(case.model.read_bytes())
    else:
        onnx.save(case.model, path)
    model = onnx.load(path)
    names = _inputs(model)
    if not any(_is_float(value) for value in model.graph.input) and not any(
        tensor.data_type in FLOATS for tensor in model.graph.initializer
    ):
        raise NotRunnable("no float tensor is an input or an initializer")
    try:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        feeds = _feeds(case, session, names)
        results = [session.run(None, feeds) for _ in range(2)]
    except RUN_ERRORS as error:
        raise NotRunnable(f"ONNX Runtime: {first_line(error)}".replace(f"{path}", path.name)) from error
    if any(not isinstance(one, np.ndarray) for one in results[0]):
        raise NotRunnable("an output is no tensor")
    expected, again = ({o.name: a for o, a in zip(session.get_outputs(), one, strict=True)} for one in results)
    if any(_difference(name, expected[name], again[name]) for name in expected):
        raise NotRunnable("its outputs are another at each run")
    return path, feeds, expected


def _inputs(model: onnx.ModelProto) -> list[str]:
    """What a caller gives: the inputs that have no default."""
    defaults = {tensor.name for tensor in model.graph.initializer}
    return [value.name for value in model.graph.input if value.name not in defaults]


def _is_float(value: onnx.ValueInfoProto) -> bool:
    return value.type.HasField("tensor_type") and value.type.tensor_type.elem_type in FLOATS


def _feeds(case: Case, session: ort.InferenceSession, names: Sequence[str]) -> dict[str, Array]:
    if case.inputs is None:  # as onnx's own runner makes them
        shapes = {value.name: [int(size) for size in value.shape] for value in session.get_inputs()}
        sizes = {name: int(np.prod(shapes[name])) for name in names}
        return {name: (np.arange(sizes[name]) / sizes[name]).astype(np.float32).reshape(shapes[name]) for name in names}
    arrays = list(case.inputs) if isinstance(case.inputs, tuple) else _stored_arrays(case.inputs)
    if any(not isinstance(one, np.ndarray | np.generic) for one in arrays):
        raise NotRunnable("an input is no tensor")
    return {name: np.asarray(one) for name, one in zip(names, arrays, strict=False)}


def _stored_arrays(folder: Path) -> list[Array]:
    count = len(list(folder.glob("input_*.pb")))
    return [onnx.numpy_helper.to_array(onnx.load_tensor(folder / f"input_{index}.pb")) for index in range(count)]


@kept_workers()
def main() -> None:
    """The child."""
    targets, names = [target for target in sys.argv[1].split(",") if target], sys.argv[2:]
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what runtimes print goes elsewhere
    for name in names:
        print(json.dumps({"begin": name}), file=out, flush=True)
        with tempfile.TemporaryDirectory(prefix="edgekit-cases-", ignore_cleanup_errors=True) as folder:
            for row in rows(cases()[name], targets, Path(folder)):
                print(json.dumps(asdict(row)), file=out, flush=True)
        print(json.dumps({"end": name}), file=out, flush=True)


if __name__ == "__main__":
    main()
