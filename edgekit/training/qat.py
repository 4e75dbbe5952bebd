"""Quantization-aware training: a module gets quantizers where a target quantizes, and is trained with them.

Which tensors those are is asked where post-training quantization asks: the module is captured, exported, annotated and placed by
the same code, and what comes out is carried back to the captured graph. So what is trained is what will be exported.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_ir as ir
from torch import Tensor, fx, nn

from edgekit.calibration.calibrate import calibrate
from edgekit.calibration.layer_rows import wished_rows
from edgekit.data import Batch
from edgekit.errors import SourceError
from edgekit.graph.annotations import get_params
from edgekit.graph.rules import check_operators, shares_grid
from edgekit.lowering.placement import Placement, place
from edgekit.method import BINARY, EVERYTHING, Method
from edgekit.passes.assign_specs import assign_precisions, assign_specs
from edgekit.passes.unify_params import unify_params
from edgekit.quant.spec import QuantParams, same_grid
from edgekit.target import PORTABLE, Target, load_target
from edgekit.training.capture import CONVOLUTIONS, LINEAR, Captured, capture
from edgekit.training.fake_quant import Binarize, FakeQuantize, RoundBias
from edgekit.training.forward import Array
from edgekit.training.marks import Exported, export_marked

Scales = Literal["learned", "tracked"]
QUANTIZERS = "quantizers"
"""The submodule that holds them: `quantizers.<node>` for what a node of the graph makes, `quantizers.<weight>` for a weight, "__" for
each dot."""
BIASES = "rounded_biases"
TRACED_WITH = 2
"""Samples."""


def prepare_qat(
    module: nn.Module,
    example_inputs: tuple[Array, ...] | Mapping[str, Array],
    target: str | Target = PORTABLE,
    *,
    method: Method = EVERYTHING,
    scales: Scales = "learned",
    calibration: Iterable[Batch] | None = None,
    taps: Sequence[str] = (),
) -> Captured:
    """A copy of `module`, as a graph, that rounds tensors where `target` does; for `edgekit.compress` once it is trained.

    It is called as the module is, returns what that returns, and its parameters have the same names, but those of BatchNorms that
    are folded. `train()` and `eval()` work. The quantizers start on the ranges of post-training quantization.

    Args:
        module: in any mode; it stays as it was.
        example_inputs: samples to calibrate on, `(N, ...)` each; a tuple is positional, a dict goes by the names of forward's
            parameters. A few hundred make good ranges.
        target: a name, or what `edgekit.target.load_target` gave.
        method: types and calibrators, for all layers or some; what is for after training only (GPTQ, smoothing) is not used.
        scales: "learned" by gradient, or "tracked" by moving averages of the extremes.
        calibration: batches by the names of the inputs, in the place of `example_inputs`.
        taps: layers whose outputs can be read; see `capture`.

    Raises:
        SourceError: torch cannot capture the module (the message names the line), or it does not run on the inputs.
        TargetError: the target's rules are wrong.
        DataError: a tensor becomes NaN or infinite.
    """
    rules = load_target(target) if isinstance(target, str) else target
    check_operators(rules)
    few = _first(example_inputs, TRACED_WITH)
    graph = capture(module, few, taps=taps)
    exported = export_marked(graph, few, opset=rules.graph.opset)
    names = [value.name or "" for value in exported.model.graph.inputs]
    batches = list(calibration or [_batch(example_inputs, names)])
    for batch in batches[:1]:
        _check_batch(exported.model, batch, type(module).__name__)
    annotated = _annotated(exported.model, rules, method, batches)
    binary = {node.name or "" for node in annotated.graph if method.for_layer(node.name or "").weights == BINARY}
    placement = place(annotated, rules)
    _insert(graph, Exported(annotated, exported.made), placement, rules, tracked=scales == "tracked", binary=binary)
    return graph


def _check_batch(model: ir.Model, batch: Batch, name: str) -> None:
    """Refuse a model that was traced for one sample because its code fixes the size of a batch."""
    for value in model.graph.inputs:
        array = batch.feeds.get(value.name or "")
        found = () if array is None else array.shape
        size = value.shape[0] if value.shape else None
        if isinstance(size, int) and found and found[0] != size:
            raise SourceError(
                f"{name} computes batches of {size} alone (input {value.name!r}), and quantization-aware training takes larger ones, such "
                f"as {found}; take sizes from x.shape[0] or -1, without int() or len(), and keep no buffer of batch size"
            )


def _annotated(model: ir.Model, rules: Target, method: Method, batches: list[Batch]) -> ir.Model:
    """The float model with the grids that training starts from."""
    model = assign_specs(assign_precisions(model, method), rules, method)
    rows = wished_rows(model, method, batches, samples=sum(map(len, batches)))
    return unify_params(calibrate(model, rules, batches, method=method, rows=rows), rules)


def _insert(
    graph: fx.GraphModule,
    exported: Exported,
    placement: Placement,
    rules: Target,
    *,
    tracked: bool,
    binary: AbstractSet[str],
) -> None:
    inserting = _Inserting(graph, {node.name: node for node in graph.graph.nodes}, tracked)
    for node, parts in placement.quantized.items():
        weight = node.inputs[parts.weight] if parts.weight is not None else None
        params, owner = get_params(weight), exported.owner(node)
        if params is not None and owner is not None:
            inserting.weight(owner, params, binary=node.name in binary)
    rounded: set[ir.Value] = set()  # to its grid, in the captured graph
    for value in (*exported.model.graph.inputs, *(output for node in exported.model.graph for output in node.outputs)):
        params = get_params(value)
        if params is None:
            continue
        if not _repeats(value, placement, rules, rounded):
            shown = _shown(value, exported, rules)
            readers = placement.readers(value)
            if shown is not value and readers:
                readers = [(use.node, use.idx) for use in shown.uses()]
            owners = [owner for node, _ in readers if (owner := exported.owner(node)) is not None]
            if not (aliases := exported.made.get(shown.name or "")):
                continue
            inserting.activation(aliases, owners, params)
        rounded.add(value)
    for node, parts in placement.quantized.items() if rules.quantization.bias == "int32" else ():
        params, owner = get_params(node.inputs[parts.activations[0]]), exported.owner(node)
        if parts.bias is not None and params is not None and owner is not None:
            inserting.bias(owner, params)
    graph.graph.lint()
    graph.recompile()


def _shown(value: ir.Value, exported: Exported, rules: Target) -> ir.Value:
    """A value, or where no captured node makes it, what it becomes when its only reader has moved its numbers."""
    while value.name not in exported.made and len(value.uses()) == 1:
        reader = next(iter(value.uses())).node
        if value not in shares_grid(reader, rules) or len(reader.outputs) != 1:
            break
        value = reader.outputs[0]
    return value


def _repeats(value: ir.Value, placement: Placement, rules: Target, rounded: set[ir.Value]) -> bool:
    """Whether a value holds only numbers that are on its grid already, because what they come from was `rounded` to it."""
    node = value.producer()
    tied = [] if node is None else shares_grid(node, rules)
    if node is None or value not in tied:
        return False
    read = set(placement.reads) | {use for source in placement.shared for use in placement.readers(source)}
    own = get_params(value)
    sources = [(index, source) for index, source in enumerate(node.inputs) if source in tied and source is not value]
    return bool(sources) and all(
        source in rounded and (node, index) in read and (grid := get_params(source)) and own and same_grid(grid, own)
        for index, source in sources
    )


@dataclass(slots=True)
class _Inserting:
    """Quantizers go into a captured graph.

    Attributes:
        nodes: of the graph, by name, as captured.
        modules: the names of those that are in, by the weight or the grid: tensors that share one have it as one object.
    """

    graph: fx.GraphModule
    nodes: Mapping[str, fx.Node]
    tracked: bool
    modules: dict[object, str] = field(default_factory=dict)

    def weight(self, owner: str, params: QuantParams, *, binary: bool) -> None:
        """Round the weight of a layer."""
        layer = self.nodes[owner]
        index = 2 if "addmm" in str(layer.target) else 1
        weight = layer.args[index] if len(layer.args) > index else None
        if not isinstance(weight, fx.Node):
            return
        axis = None if params.axis is None else _weight_axis(layer, weight)
        tensor = operator.attrgetter(str(weight.target))(self.graph) if weight.op == "get_attr" else weight
        name = self._module(tensor, str(weight.target).replace(".", "__"), _on_axis(params, axis), binary=binary)
        with self.graph.graph.inserting_before(layer):
            rounded = self._call(name, weight)
        layer.update_arg(index, rounded)

    def activation(self, aliases: tuple[str, ...], readers: list[str], params: QuantParams) -> None:
        """Round what a node makes, for some of its readers; `aliases` are nodes that hand it on unchanged."""
        chain = [self.nodes[name] for name in aliases]
        edges: dict[fx.Node, list[fx.Node]] = {}
        for reader in dict.fromkeys(self.nodes[name] for name in readers):
            source = next((node for node in reversed(chain) if node in reader.all_input_nodes), None)
            if source is None:
                continue
            # Before what hands it on, such as a Dropout, which scales what it does not drop.
            while source in chain[1:]:
                before = chain[chain.index(source) - 1]
                if before not in source.all_input_nodes:
                    break
                reader, source = source, before
            edges.setdefault(source, []).append(reader)
        for source, users in edges.items():
            name = self._module(id(params), aliases[0], params)
            place = source
            while place.op == "placeholder" and place.next.op == "placeholder":
                place = place.next
            with self.graph.graph.inserting_after(place):
                rounded = self._call(name, source)
            for user in users:
                user.replace_input_with(source, rounded)

    def bias(self, owner: str, params: QuantParams) -> None:
        """Round the bias of a layer whose input and weight are rounded, as part of the sum of their products."""
        layer = self.nodes[owner]
        weight, bias = (layer.args[index] if len(layer.args) > index else None for index in (1, 2))
        if (
            layer.target not in (LINEAR, *CONVOLUTIONS)
            or not isinstance(weight, fx.Node)
            or not isinstance(bias, fx.Node)
        ):
            return
        paths = self.modules.get(id(params), ""), str(weight.target)
        grids = [self.graph.get_submodule(path) for path in paths if path.startswith(f"{QUANTIZERS}.")]
        activation, of_weight = (
            [grid for grid in grids if isinstance(grid, FakeQuantize)] if len(grids) == 2 else (None, None)
        )
        if activation is None or of_weight is None:
            return
        name = f"{BIASES}.{layer.name}"
        self.graph.add_submodule(name, RoundBias(activation, of_weight))
        with self.graph.graph.inserting_before(layer):
            layer.update_arg(2, self._call(name, bias))

    def _module(self, key: object, name: str, params: QuantParams, *, binary: bool = False) -> str:
        if key not in self.modules:
            path = f"{QUANTIZERS}.{name}"
            made = Binarize(params) if binary else FakeQuantize(params, tracked=self.tracked)
            self.graph.add_submodule(path, made)
            self.modules[key] = path
        return self.modules[key]

    def _call(self, name: str, source: fx.Node) -> fx.Node:
        rounded = self.graph.graph.call_module(name, (source,))
        rounded.meta = dict(source.meta)
        return rounded


def _weight_axis(layer: fx.Node, weight: fx.Node) -> int:
    """The axis of the output channels of a weight as torch has it."""
    if layer.target in CONVOLUTIONS:
        return int(CONVOLUTIONS[layer.target])
    value = weight.meta.get("val")
    rank = value.dim() if isinstance(value, Tensor) else 2
    return 0 if layer.target is LINEAR else rank - 1


def _on_axis(params: QuantParams, axis: int | None) -> QuantParams:
    return QuantParams(
        params.dtype,
        params.scale,
        params.zero_point,
        axis,
        params.narrow_range,
        params.observer,
        params.low,
        params.high,
    )


def _first(inputs: tuple[Array, ...] | Mapping[str, Array], count: int) -> tuple[Array, ...] | dict[str, Array]:
    if isinstance(inputs, Mapping):
        return {name: np.asarray(array)[:count] for name, array in inputs.items()}
    return tuple(np.asarray(array)[:count] for array in inputs)


def _batch(inputs: tuple[Array, ...] | Mapping[str, Array], names: list[str]) -> Batch:
    given = inputs if isinstance(inputs, Mapping) else dict(zip(names, inputs, strict=True))
    return Batch({name: np.asarray(given[name]) for name in names})
