"""A part of a comparison, a table and what has to hold in it; and several of them as one run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from claims import FAIL, PASS, Claim
from tables import claims_table, setting, table

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Part:
    """`note` says what the reader has to know."""

    title: str
    note: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    claims: Sequence[Claim]

    def markdown(self) -> str:
        """The heading, the note, the rows and the claims."""
        told = [claims_table(self.claims)] if self.claims else []
        return "\n".join([f"## {self.title}\n", f"{self.note}\n", table(self.heads, self.rows), *told])


def holds(text: str, found: str, good: bool) -> Claim:
    """A claim and its verdict."""
    return Claim(text, found, PASS if good else FAIL)


def run(
    sections: Mapping[str, Callable[[Path, Path], Part]], only: str | None, zoo: Path, output: Path | None, results: str
) -> None:
    """Print the tables of all sections, or of one, and write them to a file; exit with 1 when a claim fails."""
    parts = []
    for name in [only] if only else sections:
        with tempfile.TemporaryDirectory(prefix="edgekit-") as folder:
            parts.append(sections[name](zoo, Path(folder)))
            click.echo(parts[-1].markdown())
    if output is None and not only:
        output = RESULTS / results
    if output is not None:
        output.write_text("\n".join([*(part.markdown() for part in parts), setting()]), encoding="utf-8")
    if any(claim.verdict == FAIL for part in parts for claim in part.claims):
        raise SystemExit(1)
