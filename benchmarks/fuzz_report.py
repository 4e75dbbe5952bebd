"""What became of random graphs, as tables."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fuzz_stages import CRASHED, REFUSED, RIGHT, WRONG
from tables import setting, table

LEFT_IN_FLOAT = "left in float"
Found = tuple[str, str, str]
MOST = 12


@dataclass(frozen=True, slots=True)
class Graph:
    """A graph that was drawn: what is in it, and for each stage the outcome and why; or why it is invalid."""

    index: int
    opset: int = 0
    dtype: str = ""
    dynamic: bool = False
    operators: dict[str, int] = field(default_factory=dict)
    rejected: int = 0
    found: list[Found] = field(default_factory=list)
    invalid: str = ""


def report(graphs: Sequence[Graph], seed: int) -> str:
    """Counts for each stage, what was wrong, what was refused, what stayed float, and what the graphs were made of."""
    valid = [graph for graph in graphs if not graph.invalid]
    dynamic, vain = sum(graph.dynamic for graph in valid), sum(graph.rejected for graph in valid)
    kinds = Counter(graph.dtype for graph in valid if graph.dtype)
    nodes = sum(sum(graph.operators.values()) for graph in valid)
    return "\n".join(
        [
            f"# Random graphs\n\n`python benchmarks/fuzz.py --graphs {len(graphs)} --seed {seed}`: {len(graphs)} graphs drawn, "
            f"{len(graphs) - len(valid)} thrown away as invalid. The rest have {nodes:,} nodes ({vain:,} more were drawn that ONNX "
            f"Runtime refuses), {dynamic} of them open sizes; {', '.join(f'{n} are {kind}' for kind, n in kinds.most_common())}.\n",
            _stages(valid),
            "`right`: computes what the source does (float graphs), what the simulation does (lowered graphs), or within 10 dB of float "
            "(`near float`; not asked of EasyQuant, which looks for the greatest cosine and does not see a common gain, "
            "nor of a moving average, which cuts off what single samples reach). "
            "`refused`: with a message. `wrong`: something else was computed, or what was given was changed. `crashed`: "
            "any other exception. Every tenth graph is compressed and exported to the runtimes, and built for TensorRT.\n",
            "## Wrong, crashed\n",
            _mistakes(valid),
            "## Refused\n",
            _grouped(valid, lambda row: row[1] == REFUSED),
            "## Layers with constant weights that stay float\n",
            _grouped(valid, lambda row: row[0] == LEFT_IN_FLOAT),
            "## Thrown away\n",
            table(["graphs", "why"], [[str(n), _cell(why)] for why, n in _reasons(graphs)]),
            "## Operators\n",
            _operators(valid),
            "## Opsets\n",
            _counts("opset", Counter(graph.opset for graph in valid if graph.opset)),
            setting(),
        ]
    )


def _stages(graphs: Sequence[Graph]) -> str:
    counts = Counter((stage, outcome) for graph in graphs for stage, outcome, _ in graph.found)
    stages = list(dict.fromkeys(stage for graph in graphs for stage, _, _ in graph.found if stage != LEFT_IN_FLOAT))
    outcomes = (RIGHT, REFUSED, WRONG, CRASHED)
    return table(
        ["stage", *outcomes], [[stage, *(str(counts[stage, outcome]) for outcome in outcomes)] for stage in stages]
    )


def _mistakes(graphs: Sequence[Graph]) -> str:
    rows = [(graph, row) for graph in graphs for row in graph.found if row[1] in (WRONG, CRASHED)]
    if not rows:
        return "None.\n"
    return table(
        ["graph", "opset", "stage", "", "why"],
        [[str(graph.index), str(graph.opset), row[0], row[1], _cell(row[2])] for graph, row in rows],
    )


def _grouped(graphs: Sequence[Graph], wanted: Callable[[Found], bool]) -> str:
    """One line for what differs in names and numbers alone, the most frequent first."""
    groups: dict[tuple[str, str], list[tuple[int, str]]] = defaultdict(list)
    for graph in graphs:
        for row in graph.found:
            if wanted(row):
                groups[row[0], _shape_of(row[2])].append((graph.index, row[2]))
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    rows = [[str(len(rows)), stage, str(rows[0][0]), _cell(rows[0][1])] for (stage, _), rows in ordered]
    return table(["times", "stage", "first", "what it says"], rows) if rows else "None.\n"


def _shape_of(text: str) -> str:
    return re.sub(r"\d+", "#", re.sub(r"'[^']*'", "'...'", text))[:90]


def _reasons(graphs: Sequence[Graph]) -> list[tuple[str, int]]:
    counts = Counter(_shape_of(graph.invalid) for graph in graphs if graph.invalid)
    examples = {_shape_of(graph.invalid): graph.invalid for graph in graphs if graph.invalid}
    return [(examples[shape], count) for shape, count in counts.most_common(MOST)]


def _operators(graphs: Sequence[Graph]) -> str:
    counts: Counter[str] = Counter()
    for graph in graphs:
        counts.update(graph.operators)
    return f"{len(counts)} operators: {', '.join(f'{name} {count}' for name, count in counts.most_common())}.\n"


def _counts(head: str, counts: Counter[int]) -> str:
    ordered = sorted(counts.items())
    return table([head, *(str(key) for key, _ in ordered)], [["graphs", *(str(count) for _, count in ordered)]])


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
