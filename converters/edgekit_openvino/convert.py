"""The conversion process, `python convert.py MODEL XML NAMES`: one ONNX file in, one OpenVINO IR out.

It stands alone, because OpenVINO's reader is native code: when it crashes it takes this process with it and not its parent. It is
run as a file, so that it imports nothing but OpenVINO.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import openvino as ov

REFUSED = 3
"""The exit code when OpenVINO refuses the file; its words are on stdout."""


def main(model: str, path: str, names: str) -> None:
    """Read an ONNX file and save it as OpenVINO IR, weights in the precision that they have; prints the inputs that it reads, as JSON.

    Args:
        model: the ONNX file.
        path: of the `.xml`; the `.bin` comes beside it.
        names: a JSON object, the name of the ONNX node that makes each output.
    """
    try:
        network = ov.Core().read_model(Path(model))
        _name_outputs(network, json.loads(names))
        ov.save_model(network, Path(path), compress_to_fp16=False)
        print(json.dumps([input_name(port) for port in network.inputs]))
    except RuntimeError as error:
        print(reason(error))
        sys.exit(REFUSED)


def _name_outputs(network: Any, names: dict[str, str]) -> None:
    """Give the operations that make the outputs the names of their ONNX nodes, as all others have; OpenVINO names them by tensor."""
    for output in network.outputs:
        name = names.get(output_name(output))
        made_by = output.get_node().input_value(0).get_node()
        if name and made_by.get_type_name() != "Parameter":
            made_by.set_friendly_name(name)


def input_name(port: Any) -> str:
    """The ONNX name of an input; its tensor has that of an output that it is handed to unchanged."""
    return str(port.get_node().get_friendly_name())


def output_name(output: Any) -> str:
    """The ONNX name of an output; its tensor has several names where OpenVINO found two equal computations."""
    name = str(output.get_node().get_friendly_name()).removesuffix("/sink_port_0")
    return name if name in output.get_names() else str(output.get_any_name())


def reason(error: RuntimeError) -> str:
    """OpenVINO's message without the lines that name its own source files."""
    lines = [line.strip() for line in str(error).splitlines()]
    kept = [line for line in lines if line and not line.startswith(("Exception from", "Check '"))]
    return " ".join(kept or lines)[:600]


if __name__ == "__main__":
    main(*sys.argv[1:])
