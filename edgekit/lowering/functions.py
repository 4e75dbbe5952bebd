"""The model-local functions of the integer format: `edgekit::Requantize` and `edgekit::RequantizeAdd`.

Their bodies are standard ONNX on int64, so ONNX Runtime executes them as they stand; a compiler for integer hardware
matches them by name and reads the multipliers and shifts from their inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

DOMAIN = "edgekit"
OPSET = 21
INT64, UINT64 = int(ir.DataType.INT64), int(ir.DataType.UINT64)


def add_functions(model: ir.Model) -> None:
    """Register with the model those of the functions that its graph calls."""
    used = {node.op_type for node in model.graph if node.domain == DOMAIN}
    for function in (_requantize(), _requantize_add()):
        if function.name in used:
            model.functions[function.identifier()] = function
            model.opset_imports[DOMAIN] = 1


class _Body:
    """Appends nodes to a function's graph; every value has a name of its own."""

    def __init__(self, inputs: Sequence[str]) -> None:
        self.inputs = {name: ir.val(name) for name in inputs}
        self.nodes: list[ir.Node] = []

    def op(self, name: str, op_type: str, *inputs: ir.Value, **attributes: int | str) -> ir.Value:
        node = ir.node(op_type, inputs, attributes, name=name)
        node.outputs[0].name = name
        self.nodes.append(node)
        return node.outputs[0]

    def int64(self, name: str) -> ir.Value:
        """An input as int64."""
        return self.op(f"{name}_int64", "Cast", self.inputs[name], to=INT64)

    def constant(self, name: str, number: np.generic) -> ir.Value:
        tensor = ir.tensor(np.asarray(number), name=name)
        node = ir.node("Constant", [], {"value": tensor}, name=name)
        node.outputs[0].name = name
        self.nodes.append(node)
        return node.outputs[0]

    def function(self, name: str, output: ir.Value, doc: str) -> ir.Function:
        imports = {"": OPSET}
        graph = ir.Graph(list(self.inputs.values()), [output], nodes=self.nodes, opset_imports=imports, doc_string=doc)
        return ir.Function(DOMAIN, name, graph=graph, attributes=[])


def _requantize() -> ir.Function:
    body = _Body(["accumulator", "multiplier", "shift", "zero_point", "low", "high"])
    scaled = body.op("scaled", "Mul", body.int64("accumulator"), body.inputs["multiplier"])
    doc = (
        "clip(floor((accumulator * multiplier + 2**shift / 2) / 2**shift) + zero_point, low, high), in the type of "
        "zero_point. accumulator: int32; multiplier, shift: int64, broadcast to it, 0 < multiplier < 2**31, "
        "0 <= shift <= 62. Exact in int64; ties round up."
    )
    return body.function("Requantize", _round_and_saturate(body, scaled), doc)


def _requantize_add() -> ir.Function:
    sides = ["a", "a_zero_point", "a_multiplier", "b", "b_zero_point", "b_multiplier"]
    body = _Body([*sides, "shift", "zero_point", "low", "high"])
    terms = []
    for side in ("a", "b"):
        centred = body.op(f"{side}_centred", "Sub", body.int64(side), body.int64(f"{side}_zero_point"))
        terms.append(body.op(f"{side}_scaled", "Mul", centred, body.inputs[f"{side}_multiplier"]))
    scaled = body.op("scaled", "Add", *terms)
    doc = (
        "clip(floor(((a - a_zero_point) * a_multiplier + (b - b_zero_point) * b_multiplier + 2**shift / 2) / 2**shift) "
        "+ zero_point, low, high), in the type of zero_point. The larger multiplier is in [2**30, 2**31); a negative "
        "one subtracts. Exact in int64; ties round up."
    )
    return body.function("RequantizeAdd", _round_and_saturate(body, scaled), doc)


def _round_and_saturate(body: _Body, scaled: ir.Value) -> ir.Value:
    """`scaled * 2**-shift`, half rounded up, plus the zero point, clipped to [low, high]."""
    places = body.op("places", "Cast", body.inputs["shift"], to=UINT64)
    power = body.op("power", "BitShift", body.constant("one", np.uint64(1)), places, direction="LEFT")
    divisor = body.op("divisor", "Cast", power, to=INT64)
    half = body.op("half", "Div", divisor, body.constant("two", np.int64(2)))
    biased = body.op("biased", "Add", scaled, half)
    # Div truncates toward zero. Mod takes the divisor's sign, so what remains divides exactly: this is the floor.
    remainder = body.op("remainder", "Mod", biased, divisor)
    multiple = body.op("multiple", "Sub", biased, remainder)
    rounded = body.op("rounded", "Div", multiple, divisor)
    shifted = body.op("shifted", "Add", rounded, body.int64("zero_point"))
    above = body.op("above", "Max", shifted, body.int64("low"))
    within = body.op("within", "Min", above, body.int64("high"))
    return body.op("output", "CastLike", within, body.inputs["zero_point"])
