"""What the command line shows on a terminal: progress bars and tables."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.measure import Measurement
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from edgekit.pipelines.inspect import InspectResult
from edgekit.pipelines.targets import TargetStatus, missing
from edgekit.progress import Progress, silent
from edgekit.report import COLUMNS, NOISY, Row

_WIDTH_WITHOUT_TERMINAL = 160


@contextmanager
def progress_bars(*, quiet: bool) -> Iterator[Progress]:
    """A bar a step, on stderr; nothing when that is no terminal or `quiet`. What a step says behind a colon may change."""
    if quiet or not sys.stderr.isatty():  # not console.is_terminal, which FORCE_COLOR makes true in a log file
        yield silent
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def show(step: str, done: int, total: int | None) -> None:
            name = step.partition(":")[0]
            if name not in tasks:
                for task in tasks.values():
                    bars.update(task, visible=False)
                tasks[name] = bars.add_task(step, total=total)
            bars.update(tasks[name], description=step, completed=done, total=total)

        yield show


def print_rows(rows: Sequence[Row]) -> None:
    """The summary table."""
    _print(COLUMNS, [row.cells() for row in rows])
    if any(row.speedup.startswith(NOISY) for row in rows):
        print(f"{NOISY} measured while the machine was noisy: the interval is in the report")


def print_targets(found: Sequence[TargetStatus]) -> None:
    """The targets, and what is missing for each."""
    rows = []
    for status in found:
        available = status.availability
        state = "ready" if available.can_run else "builds and checks" if available.can_check else "builds"
        state = state if available.can_convert else "missing"
        version = available.version or "not installed"
        rows.append((status.target.name, status.target.summary, version, state, missing(available)))
    _print(("target", "for", "runtime", "here", "what is missing"), rows)


def print_inspected(found: InspectResult) -> None:
    """Layers and annotated tensors."""
    _print(
        ("layer", "operator", "input", "output", "MACs", "parameters"),
        [
            (la.name, la.op_type, _shape(la.input_shape), _shape(la.output_shape), f"{la.macs:,}", f"{la.parameters:,}")
            for la in found.layers
        ],
    )
    print(f"opset {found.opset}, {found.nodes} nodes, {found.macs:,} MACs, {found.parameters:,} parameters")
    if not found.tensors:
        print("no tensor carries quant attributes")
        return
    _print(
        ("tensor", "kind", "shape", "type", "scale", "zero point", "axis", "range from"),
        [
            (
                t.name,
                t.kind,
                _shape(t.shape),
                t.dtype,
                _span(*t.scale, "{:.6g}"),
                _span(*t.zero_point, "{}"),
                "" if t.axis is None else str(t.axis),
                f"{t.observer}{' (fixed)' if t.fixed else ''}",
            )
            for t in found.tensors
        ],
    )


def _span(low: float, high: float, form: str) -> str:
    return form.format(low) if low == high else f"{form.format(low)} to {form.format(high)}"


def _shape(shape: tuple[int | None, ...] | None) -> str:
    return "?" if shape is None else "x".join("?" if d is None else str(d) for d in shape)


def _print(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table or, where that would have to break words, a block of lines for each row."""
    console = Console(width=None if sys.stdout.isatty() else _WIDTH_WITHOUT_TERMINAL)
    table = Table(show_edge=False)
    for index, name in enumerate(header):
        table.add_column(name, overflow="fold", no_wrap=index == 0)
    for row in rows:
        table.add_row(*map(Text, row))  # as it stands: a name may look like markup
    unbounded = console.options.update_width(10_000)
    if Measurement.get(console, unbounded, table).minimum <= console.width:
        console.print(table)
        return
    for row in rows:
        rest = "; ".join(f"{name}: {cell}" for name, cell in zip(header[1:], row[1:], strict=True) if cell)
        console.print(Text(row[0], style="bold"))
        console.print(Padding(Text(rest), (0, 0, 0, 2)))
