"""Post-training quantization, step by step: from a float graph to one whose tensors carry quant attributes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import onnx_ir as ir

from edgekit.calibration.calibrate import calibrate
from edgekit.calibration.correct_bias import correct_bias
from edgekit.calibration.layer_rows import collect_rows, wished_rows
from edgekit.calibration.round_weights import round_weights
from edgekit.calibration.smooth import smooth, smoothable
from edgekit.data import Batch, BoundData
from edgekit.errors import TargetError
from edgekit.method import Method
from edgekit.passes.assign_specs import assign_precisions, assign_specs
from edgekit.passes.equalize import equalize
from edgekit.passes.unify_params import unify_params
from edgekit.pipelines.split import BATCH_SIZE
from edgekit.progress import Progress
from edgekit.target import Target
from edgekit.words import nearest


@dataclass(slots=True)
class Calibrating:
    """The batches up to sample number `stop`, as often as they are asked for; `done` counts the samples of the last whole round."""

    data: BoundData
    stop: int
    on_progress: Progress
    step: str = "calibrate"
    done: int = 0

    def __iter__(self) -> Iterator[Batch]:
        seen = 0
        for batch in self.data.batches(BATCH_SIZE, 0, self.stop):
            yield batch
            seen += len(batch)
            self.on_progress(self.step, seen, self.stop)
        self.done = seen

    def named(self, step: str) -> Calibrating:
        """The same, under another step's name from now on."""
        self.step = step
        return self


def quantize(model: ir.Model, rules: Target, method: Method, batches: Calibrating) -> ir.Model:
    """The float `model` with quant attributes on every tensor that `rules` and `method` want quantized.

    What changes the float graph (equalization, smoothing) leaves its function as it is.
    """
    _check(model, method)
    if method.dequantize:
        return model
    model = assign_precisions(model, method)
    if method.equalize:
        model = equalize(model)
    if method.smooth and method.activations == "static":
        model = _smooth(model, rules, batches)
    model = assign_specs(model, rules, method)
    rows = wished_rows(model, method, batches.named("look at layers"), samples=batches.stop)
    model = calibrate(model, rules, batches.named("calibrate"), method=method, rows=rows)
    model = unify_params(model, rules)
    model = round_weights(model, batches.named("round weights"), samples=batches.stop, method=method)
    if "adaround" in {method.rounding, *(layer.rounding for layer in method.layers)}:
        # Torch takes seconds to import, and no other rounding needs it.
        from edgekit.training.round_layers import round_layers

        model = round_layers(model, batches.named("adaround"), samples=batches.stop, method=method)
    return correct_bias(model, rows) if method.bias_correction else model


def _check(model: ir.Model, method: Method) -> None:
    """Refuse what would be ignored.

    Raises:
        TargetError: exceptions for layers that the model does not have, or weights that static activations cannot meet.
    """
    names = [node.name or "" for node in model.graph]
    for layer in method.layers:
        if not any(fnmatchcase(name, layer.match) for name in names):
            near = nearest(layer.match, names)
            told = f"did you mean {near!r}?" if near else "`edgekit inspect` lists the layers"
            raise TargetError(f"no layer of the model is called {layer.match!r}; {told}")
    for one in (method, *(method.for_layer(name) for name in names)):
        if one.activations == "static" and (one.weights.startswith("u") or one.block_size):
            asked = f"blocks of {one.block_size}" if one.block_size else one.weights
            raise TargetError(
                f"weights in {asked} take --activations none or dynamic: integer kernels multiply symmetric weights with one scale "
                "a channel; give int8, int4 or int2 weights and no block size, or other activations"
            )


def _smooth(model: ir.Model, rules: Target, batches: Calibrating) -> ir.Model:
    layers = smoothable(model, rules)
    rows = collect_rows(model, layers, batches.named("smooth"), samples=batches.stop) if layers else {}
    return smooth(model, rules, rows)
