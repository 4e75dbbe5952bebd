"""Reading a TOML file into a typed, frozen record, with errors that name the line to fix."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from edgekit.errors import TargetError
from edgekit.words import nearest


class Table(BaseModel):
    """A TOML table: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


T = TypeVar("T", bound=Table)


def read_toml(path: Path) -> dict[str, Any]:
    """The file as plain dictionaries.

    Raises:
        TargetError: when it cannot be read or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TargetError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise TargetError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except tomllib.TOMLDecodeError as error:
        raise TargetError(f"{path}: is not valid TOML: {error}") from error


def validate(data: dict[str, Any], kind: type[T], *, path: Path) -> T:
    """`data` as a `kind`.

    Raises:
        TargetError: one line for each mistake: where it stands, what was found, what was expected.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        lines = [_explain(dict(mistake), kind, text) for mistake in error.errors()]
        raise TargetError(f"{path}: " + "; ".join(lines)) from error


def _explain(mistake: dict[str, Any], kind: type[BaseModel], text: str) -> str:
    keys = [str(part) for part in mistake["loc"]]
    where = ".".join(keys)
    number = _line_of([part for part in mistake["loc"] if isinstance(part, str)], text)
    place = f"line {number}: " if number else ""
    if mistake["type"] == "value_error" and isinstance(mistake["input"], dict):  # a table's own check says which keys
        return f"{place}{mistake['ctx']['error']}"
    if mistake["type"] == "extra_forbidden":
        known = _keys_at(kind, keys[:-1])
        near = nearest(keys[-1], known, cutoff=0.6)
        hint = f"did you mean {near!r}?" if near else f"known keys are {', '.join(known)}"
        return f"{place}unknown key {where!r}; {hint}"
    if mistake["type"] == "missing":
        return f"key {where!r} is missing; add it"
    expected = mistake["msg"].removeprefix("Value error, ")
    expected = expected[0].lower() + expected[1:]
    return f"{place}{where!r} is {mistake['input']!r}: {expected}"


def _keys_at(kind: type[BaseModel], path: list[str]) -> list[str]:
    for key in (one for one in path if not one.isdigit()):
        field = kind.model_fields.get(key)
        annotation = field.annotation if field else None
        tables = [one for one in _nested(annotation) if isinstance(one, type) and issubclass(one, BaseModel)]
        if not tables:
            return []
        kind = tables[0]
    return list(kind.model_fields)


def _nested(annotation: Any) -> list[Any]:
    """A type and all that stand in its brackets."""
    return [annotation, *(inner for argument in get_args(annotation) for inner in _nested(argument))]


def _line_of(keys: list[str], text: str) -> int | None:
    """The line on which the last of `keys` is set, looking under its table's heading first."""
    if not keys:
        return None  # the table as a whole
    lines = text.splitlines()
    start = 0
    for index, line in enumerate(lines):
        if line.strip() == f"[{'.'.join(keys[:-1])}]":
            start = index
    pattern = re.compile(rf"(^|[\s{{,.]){re.escape(keys[-1])}\s*=|^\s*\[{re.escape('.'.join(keys))}\]")
    order: list[int] = [*range(start, len(lines)), *range(start)]
    return next((index + 1 for index in order if pattern.search(lines[index].split("#")[0])), None)
