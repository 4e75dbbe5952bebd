"""Random small ONNX graphs, each node tried in ONNX Runtime as it is drawn: `draw(seed, index)` makes the same one each time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgekit.graph.refusals import ORT_ERRORS, first_line

Array = NDArray[Any]

OPSETS = range(7, 29)
BATCH = 3
MOST_NODES = 15
LARGEST = {"float16": 300.0, "float32": 1e4, "float64": 1e4}
"""What is larger is drawn anew: sums of it leave the type."""
MOST_ELEMENTS = 20_000
SYMBOLS = {"n": BATCH, "h": 8, "w": 8, "t": 6}
ELSEWHERE = {"n": 5, "h": 12, "w": 10, "t": 9}
IR_VERSIONS = (
    (7, 3),
    (8, 3),
    (9, 4),
    (10, 5),
    (11, 6),
    (14, 7),
    (18, 8),
    (20, 9),
    (21, 10),
    (22, 10),
    (24, 11),
    (25, 11),
    (28, 12),
)
"""The newest opset that an IR version knows."""


RUN_ERRORS: tuple[type[Exception], ...] = (*ORT_ERRORS, RuntimeError)
INVALID: tuple[type[Exception], ...] = (*RUN_ERRORS, onnx.checker.ValidationError, onnx.shape_inference.InferenceError)


class Rejected(Exception):
    """ONNX Runtime does not run a node as it was drawn, or makes numbers of it that nobody could work with."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A value of the graph, and what it is for the samples that the graph is drawn with."""

    name: str
    array: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def rank(self) -> int:
        return self.array.ndim


@dataclass(frozen=True, slots=True)
class Input:
    """What a caller gives: floats are standard normal, times `scale`; whole numbers lie under `high`."""

    name: str
    shape: tuple[int | str, ...]
    dtype: np.dtype[Any]
    high: int = 0
    scale: float = 1.0

    def numbers(self, sizes: dict[str, int], rng: np.random.Generator) -> Array:
        shape = tuple(sizes[d] if isinstance(d, str) else d for d in self.shape)
        if self.dtype == bool:
            return np.asarray(rng.random(shape) < 0.5)
        if self.dtype.kind == "i":
            return np.asarray(rng.integers(0, self.high, shape), self.dtype)
        return np.asarray(rng.normal(0, self.scale, shape)).astype(self.dtype)


@dataclass(frozen=True, slots=True)
class Drawn:
    """A graph, its inputs as they are declared, and how many nodes were drawn in vain."""

    model: onnx.ModelProto
    inputs: tuple[Input, ...]
    opset: int
    dtype: str
    rejected: int

    @property
    def dynamic(self) -> bool:
        return any(isinstance(d, str) for one in self.inputs for d in one.shape)

    @property
    def truncates(self) -> bool:
        """Whether floats become whole numbers on the way."""
        casts = [node for node in self.model.graph.node if node.op_type == "Cast"]
        return any(a.i == TensorProto.INT32 for node in casts for a in node.attribute)

    def feeds(self, seed: int, *, elsewhere: bool = False, batch: int | None = None) -> dict[str, Array]:
        """One call; `elsewhere` with other sizes wherever they are free."""
        sizes = dict(ELSEWHERE if elsewhere else SYMBOLS)
        if batch is not None:
            sizes["n"] = batch
        rng = np.random.default_rng(seed)
        return {one.name: one.numbers(sizes, rng) for one in self.inputs}

    def samples(self, count: int, seed: int) -> dict[str, Array]:
        """`count` samples along a new first axis where the graph has a size of its own there, else along that axis."""
        if all(one.shape and one.shape[0] == "n" for one in self.inputs):
            return self.feeds(seed, batch=count)
        calls = [self.feeds(seed + i, batch=1) for i in range(count)]
        return {name: np.stack([call[name] for call in calls]) for name in calls[0]}


@dataclass(slots=True)
class Draft:
    """A graph in the making."""

    rng: np.random.Generator
    opset: int
    dtype: np.dtype[Any]
    inputs: list[Input] = field(default_factory=list)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)
    tensors: list[Tensor] = field(default_factory=list)
    rejected: int = 0

    def chance(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def pick(self, choices: Sequence[Any]) -> Any:
        return choices[int(self.rng.integers(len(choices)))]

    def number(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`."""
        return int(self.rng.integers(low, high + 1))

    def constant(self, array: Any, *, shared: bool = True) -> str:
        """A constant's name; an earlier one of this shape and type now and then."""
        array = np.asarray(array)
        alike = [k for k, a in self.constants.items() if a.shape == array.shape and a.dtype == array.dtype]
        if shared and alike and array.dtype.kind == "f" and self.chance(0.15):
            return str(self.pick(alike))
        name = f"c{len(self.constants)}"
        self.constants[name] = array
        return name

    def ints(self, *numbers: int) -> str:
        return self.constant(np.array(numbers, np.int64))

    def floats(self, array: Any) -> str:
        return self.constant(np.asarray(array).astype(self.dtype))

    def weight(self, *shape: int, fan_in: int, channel: int = 0) -> str:
        """He-normal numbers; some with an output channel that is dead, or ten times as large as the others."""
        array = self.rng.normal(0, 1 / np.sqrt(max(1, fan_in)), shape)
        first = (slice(None),) * channel + (0,)
        kind = self.number(0, 19)
        if kind < 3:
            array[first] *= (0.0, 10.0, 0.01)[kind]
        elif kind == 3:
            array = np.abs(array)
        elif kind == 4 and self.chance(0.3):
            array = np.zeros(shape)
        return self.floats(array)

    def row(self, *shape: int, spread: float = 0.5, around: float = 0.0) -> str:
        return self.floats(self.rng.normal(around, spread, shape))

    def put(self, op_type: str, inputs: Sequence[Tensor | str], outputs: int = 1, **attributes: Any) -> list[Tensor]:
        """A node at the end of the graph; its outputs.

        Raises:
            Rejected: see there.
        """
        known = {one.name: one.array for one in self.tensors}
        names = [one.name if isinstance(one, Tensor) else one for one in inputs]
        made = [f"v{len(self.nodes)}_{i}" for i in range(outputs)]
        captured = [attributes.pop("captured")] if "captured" in attributes else []
        node = helper.make_node(op_type, names, made, **attributes)
        arrays = {name: known.get(name, self.constants.get(name)) for name in [*names, *captured] if name}
        results = eager(node, {k: v for k, v in arrays.items() if v is not None}, set(known), self.opset)
        for array in results:
            if array.size == 0 or array.size > MOST_ELEMENTS:
                raise Rejected("nothing is left, or too much")
            most = LARGEST.get(array.dtype.name, np.inf)
            if array.dtype.kind == "f" and not np.abs(array.astype(np.float64)).max() < most:
                raise Rejected("numbers that are too large")
        self.nodes.append(node)
        tensors = [Tensor(name, array) for name, array in zip(made, results, strict=True)]
        self.tensors += tensors
        return tensors

    def one(self, op_type: str, *inputs: Tensor | str, **attributes: Any) -> Tensor:
        """The only output of a node."""
        return self.put(op_type, inputs, **attributes)[0]

    def capturing(self, op_type: str, condition: Tensor | str, captured: Tensor, **branches: Any) -> Tensor:
        """The only output of a node whose subgraphs read a tensor outside of them."""
        return self.put(op_type, [condition], captured=captured.name, **branches)[0]

    def attempt(self, make: Callable[[Draft, Tensor], object], x: Tensor) -> None:
        """Draw a few nodes, or leave the graph as it is."""
        nodes, tensors, constants, inputs = len(self.nodes), len(self.tensors), len(self.constants), len(self.inputs)
        try:
            make(self, x)
        except Rejected:
            self.rejected += 1
            del self.nodes[nodes:], self.tensors[tensors:], self.inputs[inputs:]
            for name in list(self.constants)[constants:]:
                del self.constants[name]


def eager(node: onnx.NodeProto, arrays: dict[str, Array], fed: set[str], opset: int) -> list[Array]:
    """What ONNX Runtime makes of one node.

    Raises:
        Rejected: it refuses.
    """
    tensor_type = helper.np_dtype_to_tensor_dtype
    inputs = [helper.make_tensor_value_info(k, tensor_type(a.dtype), a.shape) for k, a in arrays.items() if k in fed]
    stored = [numpy_helper.from_array(a, k) for k, a in arrays.items() if k not in fed]
    outputs = [helper.make_empty_tensor_value_info(name) for name in node.output]
    graph = helper.make_graph([node], "g", inputs, outputs, stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    try:
        return run(model, {name: array for name, array in arrays.items() if name in fed})
    except RUN_ERRORS as error:
        raise Rejected(first_line(error)) from error


def run(model: onnx.ModelProto, feeds: dict[str, Array]) -> list[Array]:
    """A model's outputs in plain ONNX Runtime, nothing optimized."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


def draw(seed: int, index: int) -> Drawn:
    """Graph number `index`.

    Raises:
        Rejected: no graph came of it that the checker and ONNX Runtime take.
    """
    from fuzz_inputs import new_input
    from fuzz_layers import conv, matmul
    from fuzz_ops import OPERATORS

    rng = np.random.default_rng([seed, index])
    opset = int(rng.choice(list(OPSETS), p=_shares()))
    dtype = np.dtype(rng.choice(["float32", "float16", "float64"], p=[0.88, 0.07, 0.05]))
    draft = Draft(rng, opset, dtype)
    new_input(draft)
    while draft.chance(0.25) and len(draft.inputs) < 3:
        new_input(draft)
    weights = np.array([operator.weight for operator in OPERATORS])
    wanted, tries = draft.number(3, MOST_NODES - 2), 0
    while len(draft.nodes) < wanted and tries < 80:
        tries += 1
        floats = [one for one in draft.tensors if one.array.dtype == dtype]
        x = draft.pick(floats[-3:] if draft.chance(0.7) else floats)
        operator = OPERATORS[int(rng.choice(len(OPERATORS), p=weights / weights.sum()))]
        if operator.takes(draft, x):
            draft.attempt(operator.make, x)
    if draft.chance(0.85) and not any(
        node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul") for node in draft.nodes
    ):
        x = next(one for one in reversed(draft.tensors) if one.array.dtype == dtype)
        draft.attempt(conv if x.rank > 2 and draft.chance(0.6) else matmul, x)
    if not draft.nodes:
        raise Rejected("no node could be drawn")
    return _finished(draft)


def _shares() -> Array:
    """Opsets that exporters write are drawn more often."""
    shares = np.array([3.0 if opset in (11, 13, 17, 18, 20, 21) else 1.0 for opset in OPSETS])
    return np.asarray(shares / shares.sum())


def _finished(draft: Draft) -> Drawn:
    """The graph with as many free sizes as it runs with."""
    outputs, names, seed = _outputs(draft), _names(draft), int(draft.rng.integers(2**31))
    style = np.random.default_rng(seed).random(6)
    problem = ""
    for free in ({"n", "h", "w", "t"}, {"n"}, set()) if style[0] < 0.9 else (set(),):
        inputs = tuple(_with_free(one, free) for one in draft.inputs)
        model = _model(draft, inputs, outputs, names, style)
        drawn = Drawn(model, inputs, draft.opset, draft.dtype.name, draft.rejected)
        try:
            onnx.checker.check_model(model, full_check=True)
            for elsewhere in (False, True):
                _check_numbers(run(model, drawn.feeds(1, elsewhere=elsewhere)), draft.dtype.name)
            if all(one.shape and one.shape[0] == "n" for one in inputs):
                run(model, drawn.feeds(1, batch=1))
            return drawn
        except INVALID as error:
            problem = first_line(error)
    raise Rejected(problem)


def _check_numbers(arrays: list[Array], dtype: str) -> None:
    for array in arrays:
        if array.dtype.kind == "f" and not np.abs(array.astype(np.float64)).max(initial=0.0) < LARGEST[dtype] * 10:
            raise RuntimeError("numbers that are too large")


def _with_free(one: Input, free: set[str]) -> Input:
    shape = tuple(d if isinstance(d, int) or d in free else SYMBOLS[d] for d in one.shape)
    return Input(one.name, shape, one.dtype, one.high, one.scale)


def _outputs(draft: Draft) -> list[Tensor]:
    """What nobody reads, and now and then something that somebody does; some of it stays a dead end."""
    given = {one.name for one in draft.inputs}
    read = {name for node in draft.nodes for name in node.input}
    made = [one for one in draft.tensors if one.name not in given]
    ends = [one for one in made if one.name not in read]
    kept = [one for one in ends[:-1] if draft.chance(0.8)][-3:] + ends[-1:]
    inner = [one for one in made if one.name in read]
    if inner and draft.chance(0.25):
        kept.append(draft.pick(inner))
    return [kept[i] for i in draft.rng.permutation(len(kept))]


def _names(draft: Draft) -> list[str]:
    """Names of nodes: all, none, some, or with characters of other frameworks."""
    count, kind = len(draft.nodes), draft.number(0, 9)
    plain = [f"n{i}" for i in range(count)]
    if kind == 0:
        return [""] * count
    if kind == 1:
        return [name if draft.chance(0.5) else "" for name in plain]
    return [f"/net/{name}:0 (x)" for name in plain] if kind == 2 else plain


def _model(
    draft: Draft, inputs: Sequence[Input], outputs: list[Tensor], names: list[str], style: Array
) -> onnx.ModelProto:
    """Constants as initializers or nodes, and with IR version 3, or some style, among the inputs too."""
    tensor_type = helper.np_dtype_to_tensor_dtype
    infos = [helper.make_tensor_value_info(i.name, tensor_type(i.dtype), i.shape) for i in inputs]
    read = {name for node in draft.nodes for name in node.input}
    used = {name: array for name, array in draft.constants.items() if name in read or style[1] < 0.05}
    newest = next(version for opset, version in IR_VERSIONS if opset >= draft.opset)
    ir_version = 3 if newest == 3 or (style[2] < 0.1 and draft.opset <= 11) else max(newest, 4)
    as_nodes = {name for i, name in enumerate(used) if style[3] < 0.3 and (style[3] < 0.1 or i % 2)}
    stored = [numpy_helper.from_array(array, name) for name, array in used.items() if name not in as_nodes]
    nodes = [
        helper.make_node("Constant", [], [name], value=numpy_helper.from_array(used[name], f"{name}_value"))
        for name in used
        if name in as_nodes
    ]
    if ir_version == 3 or style[4] < 0.05:
        infos += [helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in stored]
    for node, name in zip(draft.nodes, names, strict=True):
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.name = name
        nodes.append(copy)
    ends = [helper.make_tensor_value_info(o.name, tensor_type(o.array.dtype), [None] * o.rank) for o in outputs]
    graph = helper.make_graph(nodes, "fuzz", infos, ends, stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", draft.opset)], ir_version=ir_version)
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    if style[5] < 0.2:
        return inferred
    if style[5] < 0.9:
        del model.graph.output[:]
        model.graph.output.extend(inferred.graph.output)
    return model
