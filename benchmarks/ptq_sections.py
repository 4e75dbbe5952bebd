"""What a part of the comparison of post-training quantization consists of: rows, claims, Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from claims import FAIL, PASS, TIE, Claim, as_text
from latency import Latency
from scoring import Entry
from tables import claims_table, table

from edgekit.measure import Ratio

FORMATS = {
    "Spearman": "{:.4f}",
    "against float": "{:+.4f}",
    "cosine": "{:.5f}",
    "top-1": "{:.2%}",
    "same as float": "{:.2%}",
    "SQNR": "{:.1f} dB",
}
"""How the numbers of a column are written."""
MEGABYTE = 1_000_000


@dataclass(frozen=True, slots=True)
class Row:
    """One entry: how well it does, by column of `FORMATS`, and how fast it is, by batch size."""

    entry: Entry
    scores: Mapping[str, float]
    latencies: Mapping[int, Latency] = field(default_factory=dict)

    @property
    def size_mb(self) -> float:
        """What has to be shipped (10^6 bytes)."""
        return self.entry.artifact.size_bytes / MEGABYTE


@dataclass(frozen=True, slots=True)
class Section:
    """A table, and what has to hold in it. `note` says what the reader has to know."""

    title: str
    note: str
    rows: Sequence[Row]
    claims: Sequence[Claim]

    def markdown(self) -> str:
        """The heading, the note, the rows and the claims."""
        return "\n".join([f"## {self.title}\n", f"{self.note}\n", rows_table(self.rows), claims_table(self.claims)])


def rows_table(rows: Sequence[Row]) -> str:
    """One line a row, with the columns that some row has."""
    scores = [column for column in FORMATS if any(column in row.scores for row in rows)]
    batches = sorted({batch for row in rows for batch in row.latencies})
    heads = ["runtime", "file", *scores, "MB"]
    for batch in batches:
        heads += [f"batch {batch}", "edgekit is faster"]
    return table(heads, [_line(row, scores, batches) for row in rows])


def at_least(text: str, found: float, least: float, column: str) -> Claim:
    """`found` is `least` or more; both as in `column`."""
    return Claim(text, FORMATS[column].format(found), PASS if found >= least else FAIL)


def no_larger(where: str, row: Row, most_mb: float) -> Claim:
    """What has to be shipped is small."""
    return Claim(f"{where}: at most {most_mb:g} MB", f"{row.size_mb:.1f} MB", PASS if row.size_mb <= most_mb else FAIL)


def faster_by(text: str, ratio: Ratio, least: float) -> Claim:
    """A median of `least` or more; below it, an interval that reaches `least` is a tie."""
    verdict = PASS if ratio.median >= least else TIE if ratio.ci_high >= least else FAIL
    return Claim(text, as_text(ratio), verdict)


def faster_than_fastest(group: str, rivals: Sequence[Row], what: str, least: float) -> Iterator[Claim]:
    """The subject against the fastest of `rivals`, for each batch size."""
    for batch in sorted({batch for row in rivals for batch in row.latencies}):
        fastest = min((row for row in rivals if batch in row.latencies), key=lambda row: row.latencies[batch].ms)
        text = f"{group}, batch {batch}: {least:.2f} x as fast as the fastest {what} ({fastest.entry.label})"
        yield faster_by(text, fastest.latencies[batch].ours, least)


def _line(row: Row, scores: Sequence[str], batches: Sequence[int]) -> list[str]:
    line = [row.entry.group, row.entry.label]
    line += [FORMATS[column].format(row.scores[column]) if column in row.scores else "" for column in scores]
    line.append(f"{row.size_mb:.2f}")
    for batch in batches:
        latency = row.latencies.get(batch)
        line += [f"{latency.ms:.3f} ms", as_text(latency.ours)] if latency else ["", ""]
    return line
