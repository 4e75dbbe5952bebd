"""The recipe file: everything that the command line can say about a compression, to keep beside the checkpoint."""

from __future__ import annotations

from pathlib import Path

from edgekit.data.images import Preprocess
from edgekit.toml_file import Table, read_toml, validate


class CompressTable(Table):
    """`[compress]`: options of `edgekit compress` by their names."""

    model: str | None = None
    calibration: str | None = None
    samples: int | None = None
    target: str | None = None
    calibrator: str | None = None
    evaluate: str | None = None
    trust_checkpoint: bool | None = None


class DataTable(Table):
    """`[data]`."""

    preprocess: Preprocess | None = None


class Recipe(Table):
    """A recipe file."""

    compress: CompressTable = CompressTable()
    data: DataTable = DataTable()


def load_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Raises:
        TargetError: it cannot be read, or has a mistake; with the line to fix.
    """
    return validate(read_toml(path), Recipe, path=path)
