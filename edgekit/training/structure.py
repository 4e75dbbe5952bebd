"""What is written about a stored module: how it is called, which layers it has, and what its other files are."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any, Final, Literal

import torch
from pydantic import Field, ValidationError

from edgekit.errors import SourceError
from edgekit.toml_file import Table
from edgekit.training.pickles import first_line
from edgekit.words import some

PROGRAM: Final = "program.pt2"
WEIGHTS: Final = "weights.safetensors"
STRUCTURE: Final = "structure.json"
FORMAT: Final = 1
AGAIN = "copy or save it again"
"""What to do about a file that is damaged."""

_NONE = inspect.Parameter.empty
_KIND = re.compile(r"linear|conv(_transpose)?[123]d")
_GROUPS = 6  # the argument of that name, of all convolutions


class StoredParameter(Table):
    """One of forward's, and its default where that is a plain value; any other counts as None."""

    name: str
    kind: Literal["POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD", "VAR_POSITIONAL", "KEYWORD_ONLY", "VAR_KEYWORD"]
    required: bool
    default: bool | int | float | str | None = None


class StoredLayer(Table):
    """A layer with a weight.

    Attributes:
        name: its path in the module.
        kind: the operator: "conv2d", "conv_transpose2d", "linear".
        inputs, outputs: channels.
        groups: of a convolution.
    """

    name: str
    kind: str
    inputs: int
    outputs: int
    groups: int = 1


class Structure(Table):
    """What `structure.json` says.

    Attributes:
        format: of the folder.
        torch: the version that wrote the program.
        module: the name of the class that it was.
        layers: in the order in which they run.
        structure: what the caller of `save_module` added.
        parameters: of forward.
        positional, named: which inputs the program was traced with: how many by place, and which by name.
        tied: names of tensors that are another one, by name.
        constants: tensors of the program that are none of the module's, such as numbers in forward's code.
        hidden: buffers that a state_dict leaves out.
        exact: whether the module that is read back gives the same outputs to the last bit.
        files: SHA-256 of the other two.
    """

    format: Literal[1]
    torch: str
    module: str
    layers: tuple[StoredLayer, ...]
    structure: dict[str, Any]
    parameters: tuple[StoredParameter, ...]
    positional: int = Field(ge=0)
    named: tuple[str, ...]
    tied: dict[str, str]
    constants: tuple[str, ...]
    hidden: tuple[str, ...]
    exact: bool
    files: dict[Literal["program.pt2", "weights.safetensors"], str] = Field(min_length=2)


def read_structure(folder: Path) -> Structure:
    """What is written about a stored module.

    Raises:
        SourceError: there is none, or it is damaged or of another format.
    """
    path = folder / STRUCTURE
    missing = [name for name in (STRUCTURE, PROGRAM, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        what = "does not exist" if not folder.exists() else f"has no {some(missing)}"
        raise SourceError(f"{folder} {what}; expected a folder that edgekit stored a module in: {AGAIN}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict) and found.get("format") not in (None, FORMAT):
            raise SourceError(
                f"{path} has format {found['format']!r}, and this version of edgekit reads {FORMAT}; update edgekit, or save again"
            )
        return Structure.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise SourceError(f"{path} is damaged: {where!r}: {first['msg']}; {AGAIN}") from error
    except (ValueError, OSError) as error:
        raise SourceError(f"{path} is damaged ({first_line(error)}); {AGAIN}") from error


def write_structure(structure: Structure, folder: Path) -> None:
    """Write it into a folder."""
    text = json.dumps(structure.model_dump(mode="json"), indent=2, sort_keys=True, allow_nan=False)
    (folder / STRUCTURE).write_text(text + "\n", encoding="utf-8")


def signature_of(structure: Structure, folder: Path) -> inspect.Signature:
    """How forward is called.

    Raises:
        SourceError: it cannot be called so.
    """
    try:
        return inspect.Signature(
            [
                inspect.Parameter(
                    one.name, getattr(inspect.Parameter, one.kind), default=_NONE if one.required else one.default
                )
                for one in structure.parameters
            ]
        )
    except ValueError as error:
        raise SourceError(f"{folder / STRUCTURE} is damaged ({error}); {AGAIN}") from error


def parameters_of(signature: inspect.Signature) -> tuple[StoredParameter, ...]:
    """The parameters of forward."""
    made = []
    for one in signature.parameters.values():
        kind: Any = one.kind.name
        default = one.default if isinstance(one.default, bool | int | float | str) else None
        made.append(StoredParameter(name=one.name, kind=kind, required=one.default is _NONE, default=default))
    return tuple(made)


def layers_of(program: torch.export.ExportedProgram) -> tuple[StoredLayer, ...]:
    """The convolutions and linear layers of a program, each once, in the order in which they run."""
    names = program.graph_signature.inputs_to_parameters
    found: dict[str, StoredLayer] = {}
    for node in program.graph.nodes:
        kind = str(node.target).removeprefix("aten.").partition(".")[0]
        weight = node.args[1] if len(node.args) > 1 else None
        if not _KIND.fullmatch(kind) or not isinstance(weight, torch.fx.Node):
            continue
        path = names.get(weight.name)
        if path is None:  # computed from others
            continue
        shape = weight.meta["val"].shape
        groups = int(node.args[_GROUPS]) if len(node.args) > _GROUPS else 1
        outputs, inputs = (shape[1] * groups, shape[0]) if "transpose" in kind else (shape[0], shape[1] * groups)
        name = path.rpartition(".")[0]
        found.setdefault(
            path, StoredLayer(name=name, kind=kind, inputs=int(inputs), outputs=int(outputs), groups=groups)
        )
    return tuple(found.values())
