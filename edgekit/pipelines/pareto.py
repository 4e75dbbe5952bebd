"""`--prune 0.2,0.4,0.6`: the same model pruned by several ratios, each compressed, exported and measured; accuracy against latency."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from edgekit.backend import get_backend
from edgekit.errors import TargetError
from edgekit.output import check_folder, write_text
from edgekit.pictures import pareto_svg, why_none
from edgekit.pipelines.benchmark import benchmark
from edgekit.pipelines.compress import CompressResult
from edgekit.pipelines.export import export
from edgekit.progress import Progress, silent
from edgekit.pruning import Prune
from edgekit.records import Benchmark, Manifest
from edgekit.report import table
from edgekit.target import load_target, target_names
from edgekit.toml_file import Table

PARETO = "pareto"
"""Of `pareto.json`, `pareto.md` and, with Matplotlib, `pareto.svg`."""


class Point(Table):
    """One ratio on one target.

    Attributes:
        ratio: of the channels that went.
        macs: share of the multiply-accumulates that stayed.
        metric: what `--evaluate` gave for the artifact; None where it could not run.
        ms: median latency of the artifact, one sample at a time; None where it could not be measured.
        float_ms: of the pruned model in float32.
    """

    ratio: float
    macs: float
    target: str
    metric_name: str
    metric: float | None
    ms: float | None
    float_ms: float | None


class Pareto(Table):
    """All points, and those of them that no other beats in both accuracy and latency."""

    points: tuple[Point, ...]

    def front(self, target: str) -> tuple[Point, ...]:
        """The points of a target of which no other is as good in one and better in the other, fastest first."""
        known = [p for p in self.points if p.target == target and p.ms is not None and p.metric is not None]
        known.sort(key=lambda point: (point.ms or 0.0, -(point.metric or 0.0)))
        best, kept = float("-inf"), []
        for point in known:
            if point.metric is not None and point.metric > best:
                best = point.metric
                kept.append(point)
        return tuple(kept)


def pareto(
    out: Path,
    plans: Sequence[Prune],
    compress_one: Callable[[Path, Prune], CompressResult],
    targets: Sequence[str],
    *,
    on_progress: Progress = silent,
) -> Pareto:
    """Compress by each plan into a folder of its own in `out`, export, measure, and write table and plot.

    Args:
        out: a new folder, or one that this made before.
        plans: each with a `ratio`.
        compress_one: compresses into a folder by a plan.
        targets: names; when empty, all whose runtime is here.
        on_progress: told of each step.

    Raises:
        EdgekitError: as `compress` and `export` do.
    """
    check_folder(out, marker=f"{PARETO}.json", what="a comparison of pruned models")
    targets = list(targets) or [name for name in target_names() if _runs_here(name)]
    if not targets:
        raise TargetError(
            "no target's runtime is installed here; install one, such as with pip install 'edgekit[openvino]'"
        )
    points: list[Point] = []
    out.mkdir(parents=True, exist_ok=True)
    for number, plan in enumerate(plans):
        on_progress(f"prune {plan.ratio:g}", number, len(plans))
        made = compress_one(out / f"ratio-{plan.ratio:g}", plan)
        folder = made.model.parent
        manifests = {one.manifest.target: one.manifest for one in export(folder, targets, on_progress=on_progress)}
        measured = {one.target: one for one in benchmark(folder, on_progress=on_progress).targets}
        pruned = made.record.pruned
        macs = pruned.macs[1] / max(1, pruned.macs[0]) if pruned else 1.0
        points += [_point(plan, macs, manifests[name], measured.get(name)) for name in manifests]
        found = Pareto(points=tuple(points))
        write_text(out / f"{PARETO}.json", json.dumps(found.model_dump(mode="json"), indent=2) + "\n")
        write_text(out / f"{PARETO}.md", "\n".join(_markdown(found)) + "\n")
    _draw(out, found)
    return found


def _draw(out: Path, found: Pareto) -> None:
    points: dict[str, list[tuple[str, float, float]]] = {}
    for point in found.points:
        if point.ms is not None and point.metric is not None:
            points.setdefault(point.target, []).append((f"{point.ratio:g}", point.ms, point.metric))
    if points and not why_none():
        write_text(out / f"{PARETO}.svg", pareto_svg(points, found.points[0].metric_name))


def _runs_here(name: str) -> bool:
    target = load_target(name)
    return get_backend(target.backend).available(target).can_run


def _point(plan: Prune, macs: float, manifest: Manifest, measured: Benchmark | None) -> Point:
    metric = manifest.metric  # no proxy, which compares with a model that was pruned itself
    times = {timing.label: timing.median_ms for timing in measured.timings} if measured else {}
    return Point(
        ratio=plan.ratio or 0.0,
        macs=macs,
        target=manifest.target,
        metric_name=metric.name if metric else "",
        metric=metric.value if metric else None,
        ms=times.get("int8"),
        float_ms=times.get("f32"),
    )


def _markdown(found: Pareto) -> Iterator[str]:
    yield "# Accuracy against latency"
    yield ""
    names = {point.metric_name for point in found.points if point.metric_name}
    rows = []
    for point in found.points:
        numbers = [f"{value:.4g}" if value is not None else "" for value in (point.metric, point.float_ms, point.ms)]
        best = "yes" if point in found.front(point.target) else ""
        rows.append((point.target, f"{point.ratio:g}", f"{point.macs:.0%}", *numbers, best))
    heads = (
        "target",
        "pruned",
        "MACs left",
        " or ".join(sorted(names)) or "metric",
        "float ms",
        "int8 ms",
        "not beaten",
    )
    yield from table(heads, rows)
