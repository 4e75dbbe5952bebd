"""QDQ, QOperator and the integer graph of one model: layer by layer on the same codes, and end to end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from scoring import Feeds, predict, sqnr_db

from edgekit.graph.run import Session
from edgekit.lowering.integer import lower_integer
from edgekit.lowering.qoperator import lower_qoperator
from edgekit.lowering.units import Unit, constant, find_units

Array = NDArray[Any]

FORMATS: dict[str, Callable[[ir.Model], ir.Model]] = {
    "QDQ": lambda model: model,
    "QOperator": lower_qoperator,
    "integer": lower_integer,
}


@dataclass(frozen=True, slots=True)
class EndToEnd:
    """The worst pair of formats: share of samples with the same arg max, and SQNR between the scores (dB)."""

    same_top1: float
    sqnr_db: float


def layer_differences(qdq: ir.Model, feeds: Feeds) -> dict[str, float]:
    """How far the formats are apart behind each operator, in codes of its output, by the operator's name.

    Each DequantizeLinear -> operator -> QuantizeLinear is cut out as a model of its own, that model is written in each
    format, and all get the codes that the whole QDQ graph has there. The QDQ graph counts twice: as the standard says,
    and as ONNX Runtime fuses it. Where the output stays float, a code is 1/255 of the range of its values.
    """
    units = find_units(qdq.graph)
    wires = sorted({str(value.name) for unit in units for value in _wires(unit)} - set(feeds))
    codes = {**feeds, **Session(_tapped(qdq, wires), optimize=False).run(feeds, wires)}
    return {str(unit.node.name): _spread(qdq, unit, codes) for unit in units}


def end_to_end(qdq: ir.Model, batches: Sequence[Feeds]) -> EndToEnd:
    """Run the model whole in each format, and hold every pair together."""
    logits = [predict(Session(lower(qdq), optimize=True).run, batches) for lower in FORMATS.values()]
    pairs = list(combinations(logits, 2))
    return EndToEnd(
        same_top1=min(float((a.argmax(1) == b.argmax(1)).mean()) for a, b in pairs),
        sqnr_db=min(sqnr_db(b, a) for a, b in pairs),
    )


def _wires(unit: Unit) -> list[ir.Value]:
    """What a unit reads that is not constant: codes, or floats where no DequantizeLinear stands before it."""
    found = [
        value if quantized is None else quantized.codes
        for value, quantized in zip(unit.node.inputs, unit.inputs, strict=True)
    ]
    return [value for value in dict.fromkeys(found) if value is not None and constant(value) is None]


def _tapped(qdq: ir.Model, wires: Sequence[str]) -> ir.Model:
    """The model with further outputs."""
    model = qdq.clone()
    values = ir.convenience.create_value_mapping(model.graph)
    model.graph.outputs.extend(values[name] for name in wires)
    return model


def _spread(qdq: ir.Model, unit: Unit, codes: Feeds) -> float:
    wires = _wires(unit)
    alone = ir.Model(ir.convenience.extract(qdq.graph, wires, [unit.result]), ir_version=qdq.ir_version)
    feeds = {str(value.name): codes[str(value.name)] for value in wires}
    sessions = [Session(alone, optimize=False), *(Session(lower(alone), optimize=True) for lower in FORMATS.values())]
    results = np.stack([predict(session.run, [feeds]) for session in sessions])
    step = 1.0 if unit.output is not None else max(float(np.ptp(results[0])) / 255, 1e-30)
    return float((results.max(0) - results.min(0)).max()) / step
