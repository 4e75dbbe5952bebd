"""A part of the comparison of training: a table, and what has to hold in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from claims import FAIL, PASS, Claim
from tables import claims_table, table


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
