"""Random ONNX graphs through edgekit: each stage must be right, or refuse with a sentence.

python benchmarks/fuzz.py --graphs 2000 --seed 0
python benchmarks/fuzz.py --only 133
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from fuzz_exports import ENGINE, RUNTIMES, ship
from fuzz_graphs import Drawn, Rejected, draw
from fuzz_report import Graph, report
from fuzz_stages import CRASHED, REFUSED, RIGHT, WRONG, Row, judge

from edgekit.backend import get_backend
from edgekit.target import load_target

RESULTS = Path(__file__).parent / "results" / "fuzz.md"
WORKERS = 2
LIMIT_S = 300
"""The longest that one graph may take, before it counts as a crash."""
EXPORTED = 10
"""Every so many graphs is exported to the runtimes, and built for TensorRT where it is installed."""


def fuzzed(seed: int, index: int, *, exports: bool) -> Graph:
    """What became of graph number `index`."""
    try:
        drawn = draw(seed, index)
    except Rejected as error:
        return Graph(index, invalid=str(error))
    with tempfile.TemporaryDirectory(prefix="edgekit-fuzz-", ignore_cleanup_errors=True) as folder:
        rows = judge(drawn, seed, index, Path(folder))
    if exports and index % EXPORTED == 0:
        can_build = get_backend("tensorrt").available(load_target(ENGINE)).can_convert
        targets = (*RUNTIMES, ENGINE) if can_build else RUNTIMES
        with tempfile.TemporaryDirectory(prefix="edgekit-fuzz-", ignore_cleanup_errors=True) as folder:
            rows += ship(drawn, seed, index, Path(folder), targets)
    return _described(drawn, index, rows)


def _described(drawn: Drawn, index: int, rows: Iterable[Row]) -> Graph:
    operators: dict[str, int] = {}
    for node in drawn.model.graph.node:
        operators[node.op_type] = operators.get(node.op_type, 0) + 1
    found = [(row.stage, row.outcome, row.reason) for row in rows]
    return Graph(index, drawn.opset, drawn.dtype, drawn.dynamic, operators, drawn.rejected, found)


def run_all(seed: int, indices: Sequence[int], file: Path, *, exports: bool) -> None:
    """Append a line for each graph to `file`, from processes that may die: the graph that ended one crashed."""
    shares = {worker: list(indices[worker::WORKERS]) for worker in range(WORKERS)}
    children: dict[int, subprocess.Popen[bytes]] = {}
    logs = {worker: file.with_name(f"{file.stem}.{worker}{file.suffix}") for worker in shares}
    while any(shares.values()) or children:
        for worker, todo in shares.items():
            child = children.get(worker)
            if child is not None and child.poll() is None:
                continue
            if child is not None:
                del children[worker]
                _collect(logs[worker], file, todo, child.returncode)
            if todo:
                children[worker] = _child(seed, todo, logs[worker], exports=exports)
        time.sleep(0.2)


def _child(seed: int, todo: Sequence[int], log: Path, *, exports: bool) -> subprocess.Popen[bytes]:
    """A process for the next graphs of a share; few enough that what it leaves behind does not grow."""
    command = [sys.executable, str(Path(__file__)), "--child", str(log), "--seed", str(seed)]
    command += [] if exports else ["--no-exports"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "FUZZ_INDICES": ",".join(map(str, todo[:100]))}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _collect(log: Path, file: Path, todo: list[int], code: int) -> None:
    """Move what a process has written to `file`, and strike it from the list."""
    lines = log.read_text("utf-8").splitlines() if log.is_file() else []
    log.unlink(missing_ok=True)
    done = {json.loads(line)["index"] for line in lines}
    if code and todo[:100] and not set(todo[:100]) <= done:
        dead = next(index for index in todo if index not in done)
        ended = Graph(dead, found=[("process", CRASHED, f"its process ended with {code}")])
        lines.append(json.dumps(asdict(ended)))
        done.add(dead)
    elif not done and todo:
        raise RuntimeError("a process ended without a word; try `--only` with one of its graphs")
    with file.open("a", encoding="utf-8") as whole:
        whole.writelines(f"{line}\n" for line in lines)
    todo[:] = [index for index in todo if index not in done]


def _work(seed: int, indices: Sequence[int], log: Path, *, exports: bool) -> None:
    """The child."""
    for index in indices:
        signal.alarm(LIMIT_S)  # which ends the process
        graph = fuzzed(seed, index, exports=exports)
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(graph)) + "\n")


def known(file: Path) -> Iterator[Graph]:
    """The graphs of an earlier run."""
    for line in file.read_text("utf-8").splitlines() if file.is_file() else []:
        fields: dict[str, Any] = json.loads(line)
        fields["found"] = [tuple(row) for row in fields["found"]]
        yield Graph(**fields)


@click.command()
@click.option("--graphs", default=2000, show_default=True, help="How many are drawn.")
@click.option("--seed", default=0, show_default=True)
@click.option("--only", type=int, metavar="INDEX", help="One graph: the model, and what became of it.")
@click.option(
    "--exports/--no-exports",
    default=True,
    help="Export every tenth to the runtimes, and build it for TensorRT.",
)
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
@click.option(
    "--rows",
    type=click.Path(path_type=Path),
    help="Append every graph there, one JSON a line; what is there is not run again.",
)
@click.option("--child", type=click.Path(path_type=Path), hidden=True)
def main(
    graphs: int, seed: int, only: int | None, exports: bool, output: Path, rows: Path | None, child: Path | None
) -> None:
    """Random ONNX graphs through edgekit."""
    if child is not None:
        _work(seed, [int(index) for index in os.environ["FUZZ_INDICES"].split(",")], child, exports=exports)
        return
    if only is not None:
        _show(seed, only, exports=exports)
        return
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="edgekit-fuzz-") as folder:
        file = rows or Path(folder) / "rows.jsonl"
        done = {graph.index for graph in known(file)}
        run_all(seed, [index for index in range(graphs) if index not in done], file, exports=exports)
        found = sorted((graph for graph in known(file) if graph.index < graphs), key=lambda graph: graph.index)
    text = report(found, seed)
    output.write_text(text, encoding="utf-8")
    click.echo(text)
    click.echo(f"{graphs - len(done)} graphs in {time.monotonic() - begin:.0f} s")
    sys.exit(any(outcome in (WRONG, CRASHED) for graph in found for _, outcome, _ in graph.found))


def _show(seed: int, index: int, *, exports: bool) -> None:
    import onnx

    try:
        click.echo(onnx.printer.to_text(draw(seed, index).model))
    except Rejected as error:
        click.echo(f"invalid: {error}")
        return
    for stage, outcome, reason in fuzzed(seed, index, exports=exports).found:
        color = {RIGHT: "green", REFUSED: "yellow"}.get(outcome, "red")
        click.secho(f"{stage}: {outcome} {reason}", fg=color)


if __name__ == "__main__":
    main()
