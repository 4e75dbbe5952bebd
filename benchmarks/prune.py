"""Structured pruning: what is left of accuracy and of time, and whether what is left quantizes, exports and loads.

python benchmarks/prune.py --only speed
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click
from prune_int8 import int8_section
from prune_minilm import minilm_section
from prune_one_speed import one_speed_section
from prune_onnx import onnx_section
from prune_resnet20 import resnet20_section
from prune_speed import speed_section
from prune_stored import stored_section
from qat_part import Part, run

ROOT = Path(__file__).resolve().parent.parent
SECTIONS: dict[str, Callable[[Path, Path], Part]] = {
    "resnet20": resnet20_section,
    "speed": speed_section,
    "one-speed": one_speed_section,
    "int8": int8_section,
    "minilm": minilm_section,
    "onnx": onnx_section,
    "stored": stored_section,
}
"""What each gets: the folder with models and data, and one of its own to write into."""


@click.command()
@click.option(
    "--only", type=click.Choice(list(SECTIONS)), help="One section; it is printed, and written if --output is given."
)
@click.option(
    "--zoo",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=ROOT.parent / "shared" / "zoo",
    help="The folder with the checkpoint, the images and the sentences.",
)
@click.option("--output", type=click.Path(path_type=Path), help="benchmarks/results/prune.md unless --only is given.")
def main(only: str | None, zoo: Path, output: Path | None) -> None:
    """Print the tables and write them to a file; exit with 1 when a claim fails."""
    run(SECTIONS, only, zoo, output, "prune.md")


if __name__ == "__main__":
    main()
