"""What an engine's layers say of themselves, as kernel records.

Two sources tell the same fields: the engine inspector (JSON, needs a GPU) and the table that the builder logs (text, needs none).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from edgekit.backend import KernelRecord

PRECISIONS = {
    "int8": "int8",
    "int4": "int4",
    "fp8": "fp8",
    "half": "f16",
    "fp16": "f16",
    "bfloat16": "bf16",
    "bf16": "bf16",
    "float": "f32",
    "fp32": "f32",
}
"""TensorRT's names of types, in lower case."""
INTEGERS = ("int8", "int4")
CONVERTING = ("kgen", "reformat", "quantize", "dequantize", "scale", "pointwise")
"""Layer types that turn codes into floats (or back) and compute in float, though codes go in: generated pointwise kernels."""

_ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_TYPE = re.compile(r"(?:Datatype|DataType|Format/Datatype): ?([^,}]+)")


def from_inspector(text: str) -> list[KernelRecord]:
    """The engine inspector's JSON, built with detailed verbosity; layers that are a mere name have precision "unknown"."""
    return [_from_json(layer) for layer in json.loads(text)["Layers"]]


def from_build_log(lines: Sequence[str]) -> list[KernelRecord]:
    """The builder's table of layers, one line a layer."""
    return [_from_line(line) for line in lines]


def _from_json(layer: dict[str, Any] | str) -> KernelRecord:
    if isinstance(layer, str):
        return KernelRecord(_from_name(layer), layer, "unknown")
    name, metadata = str(layer.get("Name", "")), str(layer.get("Metadata", ""))
    reads = [_type_of(tensor) for tensor in layer.get("Inputs", [])]
    others = [_type_of(tensor) for key in ("Constants", "Outputs") for tensor in layer.get(key, [])]
    kernel = str(layer.get("TacticName") or layer.get("LayerType") or name)
    return KernelRecord(_names(metadata, name), kernel, _precision(str(layer.get("LayerType", "")), reads, others))


def _from_line(line: str) -> KernelRecord:
    fields = {key: _field(line, key) for key in ("Name", "LayerType", "TacticName")}
    metadata = line.partition("Metadata: ")[2]
    inputs, _, rest = line.partition("Inputs: [")[2].partition("}]")
    reads, others = [_TYPE.findall(part) for part in (inputs, rest)]
    kernel = fields["TacticName"] or fields["LayerType"] or fields["Name"]
    return KernelRecord(_names(metadata, fields["Name"]), kernel, _precision(fields["LayerType"], reads, others))


def _field(line: str, key: str) -> str:
    match = re.search(rf"(?:^|, ){key}: ([^,]*)", line)
    return match.group(1).strip() if match else ""


def _type_of(tensor: dict[str, Any]) -> str:
    return str(tensor.get("Datatype") or tensor.get("DataType") or tensor.get("Format/Datatype") or "")


def _names(metadata: str, name: str) -> tuple[str, ...]:
    """The ONNX nodes of a layer, without repetition."""
    return tuple(dict.fromkeys(_ONNX_LAYER.findall(metadata))) or _from_name(name)


def _from_name(name: str) -> tuple[str, ...]:
    """ONNX nodes from a layer name without metadata: fused ones are joined by " + "."""
    if name.startswith(("Reformatting CopyNode", "__my")):
        return ()
    return tuple(part.strip() for part in name.split(" + ") if part.strip())


def _precision(layer_type: str, reads: Sequence[str], others: Sequence[str]) -> str:
    read = [precision for text in reads if (precision := _short(text))]
    known = [*read, *(precision for text in others if (precision := _short(text)))]
    floats = [precision for precision in known if precision not in INTEGERS]
    integers = [precision for precision in read if precision in INTEGERS]
    if any(word in layer_type.lower() for word in CONVERTING):
        return (floats or known or ["unknown"])[0]
    return (integers or read or known or ["unknown"])[0]


def _short(text: str) -> str:
    """ "Int8", or a format's description such as "Row major linear FP32", as edgekit's name of the type; else empty."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    return next((PRECISIONS[word] for word in words if word in PRECISIONS), "")
