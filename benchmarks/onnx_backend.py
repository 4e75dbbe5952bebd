"""ONNX's own backend test cases through edgekit: none may crash, and none may compute something else.

python benchmarks/onnx_backend.py --limit 200
"""

from __future__ import annotations

import json
import queue
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any

import click
from onnx_cases import COMPRESS, CRASH, NOT_RUNNABLE, OUTCOMES, REFUSED, WRONG, Case, Row, cases
from tables import setting, table

TARGETS = ("x86-onnxruntime", "x86-openvino", "cuda-tensorrt")
CHUNK, LIMIT_S = 200, 120
"""Cases for each child, and the longest that one case may take (s)."""
RESULTS = Path(__file__).parent / "results" / "onnx_backend.md"
HEAD = 60
LAST_WORDS = 200
DOWNLOADED = (
    "ONNX's `real` cases are 9 networks whose weights are downloads: left out. Their graphs, with constants for weights, are the "
    "`light` cases. A kind without a row was not reached.\n"
)


def chosen(only: str | None, limit: int | None, seed: int) -> list[Case]:
    """The cases whose name or kind fits the pattern, shuffled; no more than `limit`."""
    found = [c for c in cases().values() if only is None or fnmatch(c.name, only) or fnmatch(c.kind, only)]
    random.Random(seed).shuffle(found)
    return found[:limit]


def run_all(todo: Sequence[Case], targets: Sequence[str]) -> Iterator[Row]:
    """The rows of all cases, in children that may die; the case that ended one is a crash, and the rest go on in another."""
    left = list(todo)
    while left:
        done = 0
        for found, death in _in_child([case.name for case in left[:CHUNK]], targets):
            yield from found
            if death:
                reached = {row.target for row in found}
                target = next((target for target in targets if target not in reached), COMPRESS)
                yield Row(left[done].name, left[done].kind, target, CRASH, death)
            done += 1
        left = left[done:]


def _in_child(names: Sequence[str], targets: Sequence[str]) -> Iterator[tuple[list[Row], str]]:
    """The rows of each case that a child began, and how the child ended, where that was in the middle of it."""
    command = [sys.executable, str(Path(__file__).parent / "onnx_cases.py"), ",".join(targets), *names]
    found: list[Row] = []
    running = began = False
    with tempfile.TemporaryFile() as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as child:
            assert child.stdout is not None
            lines = _lines(child.stdout)
            while message := _next(lines, child):
                if "begin" in message:
                    found, running, began = [], True, True
                elif "end" in message:
                    running = False
                    yield found, ""
                else:
                    found.append(Row(**message))
        errors.seek(0)
        words = " ".join(errors.read().decode(errors="replace")[-LAST_WORDS:].split())
    if not began:
        raise RuntimeError(f"the child began no case, and ended with {child.returncode}: {words}")
    if running:
        yield found, f"its process ended with {child.returncode}: {words}"


def _lines(stream: IO[str]) -> queue.Queue[str]:
    """Lines as they come, from a thread, so that waiting for one can end; an empty one at the end."""
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in stream:
            lines.put(line)
        lines.put("")

    threading.Thread(target=read, daemon=True).start()
    return lines


def _next(lines: queue.Queue[str], child: subprocess.Popen[str]) -> dict[str, Any] | None:
    """The child's next message; None when it has ended, or took too long and was killed."""
    try:
        line = lines.get(timeout=LIMIT_S)
    except queue.Empty:
        child.kill()
        return None
    return json.loads(line) if line else None


def report(rows: Sequence[Row]) -> str:
    """Tables of counts, of crashes and wrong ones, of refusals by what they say, and of what was not run."""
    ran = [row for row in rows if row.outcome != NOT_RUNNABLE]
    targets = list(dict.fromkeys(row.target for row in ran))
    counts = Counter((row.target, row.outcome) for row in ran)
    count = len({row.case for row in rows})
    skipped = count - len({row.case for row in ran})
    parts = [
        f"# ONNX's backend test cases\n\n{count} of {len(cases())} cases, {skipped} of them not runnable here.\n",
        table(["target", *OUTCOMES], [[t, *(str(counts[t, outcome]) for outcome in OUTCOMES)] for t in targets]),
        "`float`: nothing to quantize, and the outputs are the source's. `int8`: something was quantized, and the runtime computes what "
        "the simulation does. `refused`: with a message, also where the proof finds that the runtime computes something else. `wrong`: "
        "something else was computed. `crash`: anything else happened. The row "
        "`compress`: cases that were not exported, or cases compressed alone.\n",
        DOWNLOADED,
        _by_kind(ran),
        "## Wrong, crashed\n",
        table(
            ["case", "target", "", "why"],
            [[row.case, row.target, row.outcome, _cell(row.reason)] for row in ran if row.outcome in (WRONG, CRASH)],
        ),
        "## Refused\n",
        _grouped([row for row in ran if row.outcome == REFUSED]),
        "## Far from float, on the call that calibrated\n",
        _grouped([row for row in ran if row.outcome not in (WRONG, CRASH, REFUSED) and row.reason], head=5),
        "## Not runnable here\n",
        _grouped([row for row in rows if row.outcome == NOT_RUNNABLE]),
        setting(),
    ]
    return "\n".join(parts)


def _by_kind(rows: Sequence[Row]) -> str:
    """Counts for each kind of case, over all targets."""
    counts = Counter((row.kind, row.outcome) for row in rows)
    kinds = sorted({row.kind for row in rows})
    return table(["kind", *OUTCOMES], [[kind, *(str(counts[kind, outcome]) for outcome in OUTCOMES)] for kind in kinds])


def _grouped(rows: Sequence[Row], head: int = HEAD) -> str:
    """One line for all that begin alike, the most frequent first."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.reason[:head]].append(row)
    ordered = sorted(groups.values(), key=lambda group: (-len(group), group[0].reason))
    heads = ["rows", "cases", "for example", "what it says"]
    return table(heads, [[str(len(g)), str(len({r.case for r in g})), g[0].case, _cell(g[0].reason)] for g in ordered])


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


@click.command()
@click.option("--only", metavar="PATTERN", help="Cases whose name or kind fits, such as 'test_conv*'.")
@click.option("--limit", type=int, help="No more than so many, chosen at random.")
@click.option("--seed", default=0, show_default=True, help="Of the order.")
@click.option(
    "--target", "targets", multiple=True, default=TARGETS, show_default=True, help="As `edgekit export` takes it."
)
@click.option("--compress-only", is_flag=True, help="Export to none.")
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
@click.option(
    "--rows",
    "rows_file",
    type=click.Path(path_type=Path),
    help="Add every row there, one JSON a line; what is there is not run again.",
)
def main(
    only: str | None,
    limit: int | None,
    seed: int,
    targets: tuple[str, ...],
    compress_only: bool,
    output: Path,
    rows_file: Path | None,
) -> None:
    """ONNX's own backend test cases through edgekit."""
    begin, wanted = time.monotonic(), () if compress_only else targets
    rows = (
        [Row(**json.loads(line)) for line in rows_file.read_text("utf-8").splitlines()]
        if rows_file and rows_file.exists()
        else []
    )
    known = {row.case for row in rows if row.target in (wanted or [COMPRESS]) or row.outcome == NOT_RUNNABLE}
    todo = [case for case in chosen(only, limit, seed) if case.name not in known]
    for row in run_all(todo, wanted):
        rows.append(row)
        if row.outcome in (WRONG, CRASH):
            click.echo(f"{row.case} {row.target}: {row.outcome}: {row.reason}", err=True)
        if rows_file:
            with rows_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(row)) + "\n")
    text = report(rows)
    output.write_text(text, encoding="utf-8")
    click.echo(text)
    click.echo(f"{len(todo)} cases in {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
