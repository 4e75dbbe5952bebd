"""Post-training quantization by edgekit and by the runtimes' own quantizers: accuracy, size and speed of the result, in one run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import click
from claims import FAIL, Claim
from latency import Effort
from ptq_accuracy import low_bits, minilm_section, resnet20_section
from ptq_sections import Section
from ptq_speed import speed
from subject import THREADS
from tables import setting

ROOT = Path(__file__).resolve().parent.parent
SECTIONS: dict[str, Callable[[Path, Path, Effort], Section]] = {
    "minilm": minilm_section,
    "resnet20": resnet20_section,
    "low-bits": low_bits,
    "speed": speed,
}
"""What each gets: the folder with models and data, one of its own to write into, and how long to measure."""
QUICK = Effort(rounds=1, bursts=3, burst_seconds=0.05)


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
@click.option("--quick", is_flag=True, help="One short round of timing: to see that it works, not to be quoted.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Where the tables go; benchmarks/results/ptq.md unless --only is given.",
)
def main(only: str | None, zoo: Path, quick: bool, output: Path | None) -> None:
    """Print the tables and write them to a file; exit with 1 when a claim fails."""
    effort = QUICK if quick else Effort()
    texts: list[str] = []
    found: list[Claim] = []
    for name in [only] if only else SECTIONS:
        with tempfile.TemporaryDirectory(prefix="edgekit-") as folder:
            section = SECTIONS[name](zoo, Path(folder), effort)
            texts.append(section.markdown())  # while the files are there, whose sizes it tells
        found.extend(section.claims)
    text = "\n".join([*texts, setting(), _protocol(effort)])
    if output is None and not only:
        output = ROOT / "benchmarks" / "results" / "ptq.md"
    if output is not None:
        output.parent.mkdir(exist_ok=True)
        output.write_text(text, encoding="utf-8")
    click.echo(text)
    if any(claim.verdict == FAIL for claim in found):
        raise SystemExit(1)


def _protocol(effort: Effort) -> str:
    return (
        f"Latency: {THREADS} threads; medians over {effort.rounds} rounds, each with a fresh process for every file and "
        f"{effort.bursts} interleaved bursts of {effort.burst_seconds} s. In brackets: 95 % bootstrap intervals over the rounds "
        f"(over the bursts of a single one).\n"
    )


if __name__ == "__main__":
    main()
