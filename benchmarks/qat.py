"""Quantization-aware training and distillation: what they win, what is exported of it, and what a step costs.

python benchmarks/qat.py --only step
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click
from qat_digits import digits_section
from qat_parity import parity_section
from qat_part import Part, run
from qat_resnet20 import resnet20_section
from qat_step import step_section

ROOT = Path(__file__).resolve().parent.parent
SECTIONS: dict[str, Callable[[Path, Path], Part]] = {
    "resnet20": resnet20_section,
    "parity": parity_section,
    "digits": digits_section,
    "step": step_section,
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
    help="The folder with the checkpoint and the images.",
)
@click.option("--output", type=click.Path(path_type=Path), help="benchmarks/results/qat.md unless --only is given.")
def main(only: str | None, zoo: Path, output: Path | None) -> None:
    """Print the tables and write them to a file; exit with 1 when a claim fails."""
    run(SECTIONS, only, zoo, output, "qat.md")


if __name__ == "__main__":
    main()
