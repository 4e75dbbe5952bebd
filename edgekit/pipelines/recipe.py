"""The recipe file: everything that the command line can say about a compression, to keep beside the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgekit.data.images import Preprocess
from edgekit.errors import TargetError
from edgekit.finetune import Finetune
from edgekit.method import EVERYTHING, LayerMethod, Method
from edgekit.pruning import GOALS, Prune
from edgekit.toml_file import Table, read_toml, validate


class CompressTable(Table):
    """`[compress]`: options of `edgekit compress` by their names."""

    model: str | None = None
    calibration: str | None = None
    input_shape: str | None = None
    samples: int | None = None
    target: str | None = None
    evaluate: str | None = None
    trust_checkpoint: bool | None = None
    max_drop: str | float | None = None
    time_budget: float | None = None
    search: bool | None = None
    seed: int | None = None
    explain: bool | None = None
    proxy: str | None = None


class DataTable(Table):
    """`[data]`."""

    preprocess: Preprocess | None = None


class Recipe(Table):
    """A recipe file."""

    compress: CompressTable = CompressTable()
    method: Method = EVERYTHING
    data: DataTable = DataTable()
    finetune: Finetune | None = None
    prune: Prune | None = None


def load_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Raises:
        TargetError: it cannot be read, or has a mistake; with the line to fix.
    """
    return validate(read_toml(path), Recipe, path=path)


def merged_method(
    base: Method, given: Mapping[str, Any], layers: Sequence[str] = (), keep_float: Sequence[str] = ()
) -> Method:
    """A recipe's method with what the command line says: fields by name, and exceptions as "PATTERN:key=value,key=value".

    Raises:
        TargetError: an unknown key or value.
    """
    exceptions = [
        *(_layer(text) for text in layers),
        *({"match": pattern, "precision": "float"} for pattern in keep_float),
    ]
    known = [layer.model_dump(exclude_none=True) for layer in base.layers]
    # What nobody chose stays unset: `--search` may choose it.
    fields = {**base.model_dump(exclude_unset=True), **given, "layers": [*known, *exceptions]}
    return validate(fields, Method, path=Path("command line"))


def merged_finetune(base: Finetune | None, given: Mapping[str, Any]) -> Finetune | None:
    """A recipe's training with what the command line says: fields by name, those of its tables as `table__field`; None where neither
    asks for one.

    Raises:
        TargetError: an unknown value.
    """
    if base is None and not given:
        return None
    fields: dict[str, Any] = {} if base is None else base.model_dump(exclude_unset=True)
    for name, value in given.items():
        table, deeper, field = name.partition("__")
        if not deeper:
            fields[table] = value
            continue
        own = fields[table] = dict(fields.get(table) or {})
        if (table, field) in (("schedule", "steps"), ("schedule", "epochs")):
            own.pop("epochs", None)
            own.pop("steps", None)
        own[field] = value
    return validate(fields, Finetune, path=Path("command line"))


def merged_prune(base: Prune | None, given: Mapping[str, Any]) -> Prune | None:
    """A recipe's pruning with what the command line says, whose goal replaces the recipe's; None where neither asks for any.

    Raises:
        TargetError: an unknown value, or no goal or two.
    """
    if base is None and not given:
        return None
    fields: dict[str, Any] = {} if base is None else base.model_dump(exclude_unset=True)
    if any(goal in given for goal in GOALS):
        fields = {name: value for name, value in fields.items() if name not in GOALS}
    return validate({**fields, **given}, Prune, path=Path("command line"))


def merged_prunes(base: Prune | None, given: Mapping[str, Any]) -> list[Prune | None]:
    """The same for each of the ratios, which the command line may list with commas.

    Raises:
        TargetError: as `merged_prune`, or no ratio is named.
    """
    listed = given.get("ratio")
    if listed is None:
        return [merged_prune(base, given)]
    ratios = [part.strip() for part in str(listed).split(",") if part.strip()]
    if not ratios:
        raise TargetError(
            f"--prune {listed!r} names no ratio; expected numbers between 0 and 1, such as 0.5 or 0.2,0.4"
        )
    return [merged_prune(base, {**given, "ratio": ratio}) for ratio in ratios]


def few_bits(bits: str | None, given: Mapping[str, Any]) -> dict[str, str]:
    """What `--bits` stands for among the fields of a method.

    Raises:
        TargetError: types are given beside it.
    """
    if bits is None:
        return {}
    beside = [name for name in ("weights", "precision") if name in given]
    if beside:
        raise TargetError(
            f"--bits {bits} and --{beside[0]} {given[beside[0]]} are both given; --bits sets both types: drop one of them"
        )
    return {"weights": f"int{bits}", "precision": f"int{bits}"}


def _layer(text: str) -> dict[str, str | int]:
    pattern, colon, choices = text.rpartition(":")
    pairs = [choice.partition("=") for choice in choices.split(",")]
    known = all(key and key != "match" and equals and value for key, equals, value in pairs)
    if not colon or not pattern or not known:
        raise TargetError(
            f"--layer {text!r}: expected PATTERN:KEY=VALUE,..., such as 'layer1.*:precision=float'; keys are "
            f"{', '.join(name for name in LayerMethod.model_fields if name != 'match')}"
        )
    return {"match": pattern} | {key: int(value) if value.isdigit() else value for key, _, value in pairs}
