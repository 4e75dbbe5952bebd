"""A random graph through edgekit, stage by stage: each is right, refused with a sentence, wrong, or crashed."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from fuzz_compare import parted
from fuzz_graphs import Drawn

from edgekit import LayerMethod, Method
from edgekit.backend import get_backend
from edgekit.data import BoundData, open_data
from edgekit.errors import EdgekitError
from edgekit.graph.annotations import all_values, annotated_values, describe, get_params, get_wish, set_sample_shape
from edgekit.graph.io import load_annotated, load_onnx, save_annotated
from edgekit.graph.magnitudes import mark_wide
from edgekit.graph.operators import LINEAR, is_constant, roles
from edgekit.graph.refusals import first_line
from edgekit.graph.run import Session
from edgekit.lowering.cpu import cpu_saturates, with_reduced_range
from edgekit.lowering.integer import lower_integer
from edgekit.lowering.qdq import lower_qdq
from edgekit.lowering.qoperator import lower_qoperator
from edgekit.lowering.weight_only import check_format
from edgekit.method import CALIBRATORS, EASYQUANT
from edgekit.passes.assign_specs import assign_specs
from edgekit.pipelines.quantize import Calibrating, quantize
from edgekit.pipelines.sources import canonicalize, input_specs, rewrite
from edgekit.pipelines.split import first_batch
from edgekit.progress import silent
from edgekit.proof import ROUNDING_DB, compare
from edgekit.target import PORTABLE, Target, load_target, target_names

RIGHT, REFUSED, WRONG, CRASHED = "right", "refused", "wrong", "crashed"
LOAD, REWRITE, ANNOTATE, SAVE, SANE = "load", "rewrite", "annotate", "save and load", "near float"
TARGETS = (PORTABLE, *target_names())
FORMATS = {"qoperator": lower_qoperator, "integer": lower_integer}
SAMPLES = 12
FLOOR_DB = 10.0
"""Of the worst output, with 8 bits and the samples that calibrated."""
FAR_BY_DESIGN = (EASYQUANT, "moving-average")
"""EasyQuant looks for the greatest cosine, which does not see a common gain; a moving average of few samples cuts the largest off."""
OWN_MISTAKES = (
    "report this as a bug",
    "does not compute the same",
    "ONNX Runtime cannot load",
    "ONNX Runtime cannot run",
)
"""What errors say of a graph that edgekit has made itself, of one that ONNX Runtime runs."""
NO_KERNEL = "NOT_IMPLEMENTED"
"""What ONNX Runtime says where it has an operator of a type in one opset, and in a later one not: PRelu of float64."""
TRACES = {"float32": 1e-25, "float64": 1e-25, "float16": 1e-6}
HALF_TRACE = 1e-2
HALF_DB = 3.0
"""Further from float than the simulation: what float16 flips of the codes of few and small tensors is more than in networks."""


@dataclass(frozen=True, slots=True)
class Row:
    """What became of a graph at a stage."""

    index: int
    stage: str
    outcome: str
    reason: str = ""


@dataclass(slots=True)
class Case:
    """A graph on its way."""

    drawn: Drawn
    index: int
    seed: int
    folder: Path
    rows: list[Row] = field(default_factory=list)

    def attempt(self, stage: str, step: Callable[[], Any]) -> Any:
        """What a step made, or None; in the latter case a row says why. A step that returns text found a mistake."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                made = step()
        except Exception as error:  # any but edgekit's own is what this looks for
            self.rows.append(Row(self.index, stage, *failed(error)))
            return None
        problem = made if isinstance(made, str) else ""
        self.rows.append(Row(self.index, stage, WRONG if problem else RIGHT, problem))
        return None if problem else made


def failed(error: Exception) -> tuple[str, str]:
    """How a step that raised ended, and what was said."""
    text = str(error)
    if isinstance(error, EdgekitError):
        blames_itself = any(words in text for words in OWN_MISTAKES) and NO_KERNEL not in text
        return (WRONG if blames_itself or not text.strip() else REFUSED), " ".join(text.split())
    where = traceback.extract_tb(error.__traceback__)
    ours = next((frame for frame in reversed(where) if "edgekit" in Path(frame.filename).parts), where[-1])
    return (
        CRASHED,
        f"{type(error).__name__}: {first_line(error)} ({Path(ours.filename).name}:{ours.lineno} {ours.name})",
    )


def judge(drawn: Drawn, seed: int, index: int, folder: Path) -> list[Row]:
    """A row for each stage that the graph reached."""
    case, rng = Case(drawn, index, seed, folder), np.random.default_rng([seed, index, 1])
    path = folder / "net.onnx"
    onnx.save(drawn.model, path)
    loaded = case.attempt(LOAD, lambda: _loaded(path, drawn))
    if loaded is None:
        return case.rows
    bound = case.attempt("bind data", lambda: open_data(drawn.samples(SAMPLES, seed=2)).bind(input_specs(loaded)))
    if bound is None:
        return case.rows
    rewritten = case.attempt(REWRITE, lambda: _rewritten(loaded, bound, drawn))
    if rewritten is None:
        return case.rows
    rules, method = load_target(TARGETS[int(rng.integers(5))]), draw_method(rng, rewritten)
    annotated = case.attempt(ANNOTATE, lambda: _annotated(rewritten, rules.name, method, bound, drawn))
    if annotated is None:
        return case.rows
    case.attempt(SAVE, lambda: _saved(annotated, folder / "annotated.onnx", drawn))
    for name in TARGETS:
        case.attempt(f"lower: {name}", partial(_lowered, annotated, name, drawn, bound))
    case.attempt("lower: formats", lambda: _formats(annotated, drawn))
    if method.activations == "static" and method.precision == "int8" and method.weights == "int8":
        if method.calibrator not in FAR_BY_DESIGN:
            case.attempt(SANE, lambda: _near_float(annotated, rules.name, bound))
        case.rows += [Row(index, "left in float", RIGHT, why) for why in _left_float(annotated, rules.name)]
    return case.rows


def draw_method(rng: np.random.Generator, model: ir.Model) -> Method:
    """The default for half of all graphs, else anything that can be asked for."""

    def pick(*choices: Any) -> Any:
        return choices[int(rng.integers(len(choices)))]

    kind = int(rng.integers(0, 14))
    names = [node.name or "" for node in model.graph]
    match kind:
        case 0:
            return Method(activations="none", weights=pick("int8", "int4", "uint4"), block_size=pick(0, 16, 32))
        case 1:
            return Method(activations="none", weights=pick("int2", "uint2", "int4"), block_size=16)
        case 2:
            return Method(activations="dynamic", weights=pick("int8", "int8", "int4", "uint4"))
        case 3:
            return Method(weights=pick("int4", "int2"), rounding=pick("auto", "nearest"))
        case 4:
            return Method(calibrator=pick(*CALIBRATORS), smooth=False, bias_correction=pick(True, False))
        case 5:
            return Method(equalize=True, calibrator=pick("minmax", "auto"))
        case 6 if names:
            layer = LayerMethod(
                match=str(rng.choice(names)), precision=pick("float", "int16", "int8"), weights=pick(None, "int4")
            )
            return Method(layers=(layer,), rounding=pick("nearest", "gptq"))
        case 7:
            return Method(precision="int16", calibrator="minmax")
        case _:
            return Method()


def _loaded(path: Path, drawn: Drawn) -> ir.Model | str:
    model = load_onnx(path)
    return parted(drawn, model) or model


def _rewritten(model: ir.Model, bound: BoundData, drawn: Drawn) -> ir.Model | str:
    before, examples = _bytes(model), first_batch(bound, 2)
    canonical = canonicalize(model, examples, opset=load_target(PORTABLE).graph.opset)
    kept = _bytes(canonical)
    rewritten = rewrite(canonical, examples)
    if _bytes(model) != before or _bytes(canonical) != kept:
        return "a pass changed the model that it was given"
    for value in rewritten.graph.inputs:
        set_sample_shape(value, examples[value.name or ""].shape)
    return parted(drawn, rewritten) or rewritten


def _annotated(model: ir.Model, rules: str, method: Method, bound: BoundData, drawn: Drawn) -> ir.Model | str:
    before = _bytes(model)
    annotated = quantize(model, load_target(rules), method, Calibrating(bound, SAMPLES, silent))
    if _bytes(model) != before:
        return "quantize changed the model that it was given"
    for value in annotated_values(annotated.graph):
        params = get_params(value)
        if params is None or not (np.isfinite(params.scale).all() and (params.scale > 0).all()):
            return f"tensor {value.name!r} has no positive, finite scale"
    return parted(drawn, annotated) or annotated


def _saved(annotated: ir.Model, path: Path, drawn: Drawn) -> str:
    """The file computes the very same, and its grids are the same."""
    save_annotated(annotated, path)
    back = load_annotated(path)
    feeds = drawn.feeds(3)
    here, there, plain = (Session(one, optimize=False, threads=1).run(feeds) for one in (annotated, back, path))
    if any(not np.array_equal(here[k], one[k], equal_nan=True) for k in here for one in (there, plain)):
        return "what was saved computes something else"
    return "" if _grids(annotated) == _grids(back) else "what was saved has other grids"


def _grids(model: ir.Model) -> dict[str, tuple[object, ...]]:
    found = {}
    for value in annotated_values(model.graph):
        params = get_params(value)
        assert params is not None
        arrays = (params.scale, params.zero_point, params.codes, params.shift)
        found[value.name or ""] = (describe(params), *(None if a is None else np.asarray(a).tolist() for a in arrays))
    return found


def _lowered(annotated: ir.Model, name: str, drawn: Drawn, bound: BoundData) -> str:
    """The backend's graph computes what edgekit's own lowering does, in float arithmetic."""
    target, before = _local(name), _bytes(annotated)
    simulation = lower_qdq(annotated, target)
    problem = _parts_left(simulation)
    if problem:
        return problem
    graph = simulation
    if target.backend:
        marked = (
            mark_wide(annotated, (b.feeds for b in bound.batches(1)))
            if target.runtime.float_dtype == "float16"
            else annotated
        )
        graph = get_backend(target.backend).lower(marked, target, keep_float=frozenset())
        get_backend(target.backend).check(graph, target)
    if _bytes(annotated) != before:
        return "the lowering changed the model that it was given"
    half = target.runtime.float_dtype == "float16"
    if half and drawn.truncates:
        return ""  # a whole number is another one from the slightest rounding on
    return _apart(graph, simulation, annotated, drawn, half=half)


def _local(name: str) -> Target:
    """A target whose integer products no CPU saturates: ONNX Runtime's own operators are integer kernels in any session."""
    target = load_target(name)
    return with_reduced_range(target) if target.backend == "onnxruntime" and cpu_saturates() else target


def _parts_left(model: ir.Model) -> str:
    left = [value.name for value in all_values(model.graph) if get_params(value) is not None]
    return f"tensor {left[0]!r} still has a grid" if left else ""


def _formats(annotated: ir.Model, drawn: Drawn) -> str:
    """QLinear and integer operators compute what their Quantize/DequantizeLinear graph does; 7-bit weights saturate nowhere."""
    reasons = []
    for format, lower in FORMATS.items():
        target = _local("x86-onnxruntime")
        try:
            check_format(annotated, format)  # type: ignore[arg-type]
            qdq = lower_qdq(annotated, target)
            lowered = lower(qdq)
        except EdgekitError as error:
            reasons.append(error)
            continue
        problem = _apart(lowered, qdq, annotated, drawn)
        if problem:
            return f"{format}: {problem}"
    if len(reasons) == len(FORMATS):
        raise reasons[0]
    return ""


def _apart(graph: ir.Model, simulation: ir.Model, floats: ir.Model, drawn: Drawn, *, half: bool = False) -> str:
    batches = [drawn.feeds(3), drawn.feeds(4, elsewhere=True)]
    ran, simulated, plain = (
        [Session(one, optimize=False, threads=1).run(feeds) for feeds in batches] for one in (graph, simulation, floats)
    )
    for ours, theirs in zip((*ran, *simulated), (*plain, *plain), strict=True):
        for name, array in theirs.items():
            if name not in ours or ours[name].dtype != array.dtype or ours[name].shape != array.shape:
                return f"output {name!r} has another type or shape"
    ran, simulated, plain = (
        [_without_traces(one, other, half) for one, other in zip(arrays, plain, strict=True)]
        for arrays in (ran, simulated, plain)
    )
    proof, expected = compare(ran, simulated, plain), compare(None, simulated, plain)
    far = [
        (own.float_sqnr_db or 0.0, wanted.float_sqnr_db or 0.0)
        for own, wanted in zip(proof.outputs, expected.outputs, strict=True)
        if own.simulation_sqnr_db is not None and own.simulation_sqnr_db < ROUNDING_DB
    ]
    if not far and "arg max" in proof.reason:
        return ""  # of equals, such as gates that float16 rounds to 1
    if half and far and all(own >= wanted - HALF_DB for own, wanted in far) and "is lost" not in proof.reason:
        return ""
    return proof.reason


def _without_traces(arrays: Mapping[str, Any], floats: Mapping[str, Any], half: bool) -> dict[str, Any]:
    """Without the biases that stand for zero for OpenVINO, where an output holds nothing else; nor what float16 leaves of x - x."""
    traces = {
        k: HALF_TRACE if half and not floats[k].any() else TRACES.get(a.dtype.name, 0.0) for k, a in arrays.items()
    }
    return {k: np.where(np.abs(a) < traces[k], 0, a).astype(a.dtype) for k, a in arrays.items()}


def _near_float(annotated: ir.Model, name: str, bound: BoundData) -> str:
    batches = [batch.feeds for batch in bound.batches(1)]  # as it was calibrated: some graphs add samples up
    sessions = [Session(one, optimize=False, threads=1) for one in (lower_qdq(annotated, load_target(name)), annotated)]
    simulated, plain = ([one.run(feeds) for feeds in batches] for one in sessions)
    found = [(o.float_sqnr_db, o.name) for o in compare(None, simulated, plain).outputs if o.float_sqnr_db is not None]
    low, output = min(found, default=(200.0, ""))
    return f"{output} is {low:.1f} dB from float" if low < FLOOR_DB else ""


def _left_float(annotated: ir.Model, name: str) -> Iterator[str]:
    """The layers with constant weights that the target quantizes by name and that have no grid all the same."""
    target = load_target(name)
    wished = assign_specs(annotated, target)
    names = {
        node.name for node in wished.graph if any(v is not None and get_wish(v) is not None for v in node.inputs[1:2])
    }
    for node in annotated.graph:
        weight = node.inputs[1] if node.op_type in LINEAR and len(node.inputs) > 1 else None
        if (
            weight is None
            or node.domain
            or node.op_type not in target.quantization.quantize
            or is_constant(node.inputs[0])
        ):
            continue
        if not is_constant(weight) or get_params(weight) is not None or node.name in names:
            continue
        after = node.inputs[0].producer() if node.inputs[0] is not None else None
        attributes = sorted(a for a in node.attributes if a in ("transA", "alpha", "beta", "group"))
        yield (
            f"{node.op_type} {weight.dtype.name if weight.dtype else '?'} weight of rank {len(weight.shape or ())}, roles "
            f"{'none' if roles(node) is None else 'known'}, {attributes}, after {after.op_type if after else 'an input'}"
        )


def _bytes(model: ir.Model) -> bytes:
    """What a model says, but for the names inside of Constant nodes, which nothing reads and passes share."""
    proto = ir.to_proto(model)
    for node in proto.graph.node:
        for attribute in node.attribute:
            attribute.t.name = ""
    return bytes(proto.SerializeToString(deterministic=True))
