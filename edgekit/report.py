"""The report: what was compressed, exported and measured, as JSON for machines and Markdown for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from edgekit.departure import Departure, share
from edgekit.output import write_text
from edgekit.pictures import links
from edgekit.pruning import Pruned
from edgekit.records import (
    BENCHMARKS,
    Benchmark,
    Benchmarks,
    Compressed,
    Manifest,
    Metric,
    OutputProof,
    ProxyRecord,
    TunedPlacement,
    read_compressed,
    read_manifests,
    read_record,
)
from edgekit.trials import Searched

REPORT_JSON, REPORT_MD = "report.json", "report.md"
COLUMNS = (
    "target",
    "where it ran",
    "bytes",
    "accuracy",
    "drop",
    "median ms",
    "speed-up",
    "of fastest float",
    "MACs in int8",
)
NOISY = "~"
"""Before a speed-up that was measured while the machine was noisy."""
_MOST_LAYERS = 200


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the summary table; fields that are not known are empty."""

    target: str
    state: str
    bytes: int
    metric: str
    drop: str
    median_ms: str
    speedup: str
    speedup_over_fastest: str
    int8_share: str

    def cells(self) -> tuple[str, ...]:
        """The fields as text, in the order of `COLUMNS`."""
        return tuple(f"{value:,}" if isinstance(value, int) else value for value in asdict(self).values())


def write_report(folder: Path) -> Path:
    """Write `report.json` and `report.md` about everything in a compressed model's folder; the latter's path."""
    compressed = read_compressed(folder)
    manifests = read_manifests(folder)
    benchmarks = _benchmarks(folder, manifests)
    document = {
        "compressed": compressed.model_dump(mode="json"),
        "exports": {name: manifest.model_dump(mode="json") for name, manifest in manifests.items()},
        "benchmark": benchmarks.model_dump(mode="json") if benchmarks else None,
    }
    write_text(folder / REPORT_JSON, json.dumps(document, indent=2) + "\n")
    write_text(folder / REPORT_MD, _markdown(folder, compressed, manifests, benchmarks))
    return folder / REPORT_MD


def summary(folder: Path) -> list[Row]:
    """The table: a row for each exported target."""
    compressed, manifests = read_compressed(folder), read_manifests(folder)
    benchmarks = _benchmarks(folder, manifests)
    measured = {record.target: record for record in benchmarks.targets} if benchmarks else {}
    return [_row(compressed, manifest, measured.get(name)) for name, manifest in manifests.items()]


def _benchmarks(folder: Path, manifests: Mapping[str, Manifest]) -> Benchmarks | None:
    """The last benchmark, without targets that were exported anew since."""
    path = folder / BENCHMARKS
    if not path.is_file():
        return None
    found = read_record(path, Benchmarks, remedy="run `edgekit benchmark` again")
    current = {name: manifest.graph_sha256 for name, manifest in manifests.items()}
    targets = tuple(record for record in found.targets if current.get(record.target) == record.graph_sha256)
    return found.model_copy(update={"targets": targets}) if targets else None


def _row(compressed: Compressed, manifest: Manifest, measured: Benchmark | None) -> Row:
    proof = manifest.proof
    if manifest.model_sha256 != compressed.model_sha256:
        return Row(manifest.target, "stale: export again", manifest.artifact_bytes, "", "", "", "", "", "")
    median = measured.median_ms if measured else None
    noisy = NOISY if measured and measured.noisy else ""
    fastest = (
        f"{noisy}{measured.speedup_over_fastest:.2f}x {measured.fastest_float}"
        if measured and measured.speedup_over_fastest is not None
        else ""
    )
    return Row(
        target=manifest.target,
        state=_state(manifest, measured),
        bytes=manifest.artifact_bytes,
        metric=_metric(manifest, compressed.proxy),
        drop=_drop(manifest),
        median_ms=f"{median:.3f}" if median is not None else "",
        speedup=f"{noisy}{measured.speedup:.2f}x" if measured and measured.speedup is not None else "",
        speedup_over_fastest=fastest,
        int8_share=f"{100 * proof.int8_macs_share:.1f} % {proof.int8_source}"
        if proof.int8_macs_share is not None
        else "",
    )


def _state(manifest: Manifest, measured: Benchmark | None) -> str:
    proof = manifest.proof
    if proof.agrees is False or (measured is not None and measured.reason.startswith("WRONG")):
        return "WRONG, do not ship"
    if proof.agrees is None:
        return "built, not run here"
    if measured is not None and measured.median_ms is not None:
        return f"ran on {proof.ran_on}"
    return f"checked on {proof.ran_on}" + (", not timed here" if measured is not None else "")


def _metric(manifest: Manifest, proxied: ProxyRecord | None) -> str:
    if manifest.metric is not None:
        simulated = " simulated" if manifest.metric_source == "simulated" else ""
        return f"{_number(manifest.metric)}{simulated}"
    simulated = "" if manifest.proof.ran_on else " simulated"
    if manifest.proxy is not None and proxied is not None and proxied.kind not in ("", "argmax"):
        return f"{100 * manifest.proxy.value:.1f} % {proxied.kind}{simulated}"
    if manifest.proof.float_top1 is not None:
        return f"{100 * manifest.proof.float_top1:.1f} % agree{simulated}"
    ratios = [output.float_sqnr_db for output in manifest.proof.outputs if output.float_sqnr_db is not None]
    return f"{min(ratios):.1f} dB{simulated}" if ratios else ""


def _drop(manifest: Manifest) -> str:
    if manifest.metric is None or manifest.float_metric is None:
        return ""
    difference = manifest.float_metric.value - manifest.metric.value
    return f"{100 * difference:+.2f} points" if manifest.metric.name == "top-1" else f"{difference:+.4g}"


def _number(metric: Metric) -> str:
    return f"{100 * metric.value:.2f} %" if metric.name == "top-1" else f"{metric.value:.4g}"


def _markdown(
    folder: Path, compressed: Compressed, manifests: dict[str, Manifest], benchmarks: Benchmarks | None
) -> str:
    measured = {record.target: record for record in benchmarks.targets} if benchmarks else {}
    parts = [f"# {compressed.source.name}", "", *_compression(compressed), ""]
    if manifests:
        rows = [_row(compressed, manifest, measured.get(name)) for name, manifest in manifests.items()]
        parts += ["## Targets", "", *table(COLUMNS, [row.cells() for row in rows]), ""]
    for name, manifest in manifests.items():
        parts += [f"### {name}", "", *_export(manifest), ""]
    if benchmarks:
        parts += [
            "## Latency",
            "",
            f"{benchmarks.machine}; batch {benchmarks.batch_size}.",
            "",
            *_latency(benchmarks),
            "",
        ]
    if compressed.pruned and compressed.pruned.layers:
        parts += ["## Pruned", "", *_pruned(compressed.pruned), ""]
    if compressed.searched:
        parts += ["## Methods tried", "", *_searched(compressed.searched), ""]
    if compressed.sensitivity:
        parts += ["## Each layer quantized alone", "", *_sensitivity(compressed), *links(folder, compressed), ""]
    parts += ["## Layers", "", *_layers(compressed)]
    return "\n".join(parts).rstrip() + "\n"


def _compression(compressed: Compressed) -> list[str]:
    lines = [
        f"- compressed for `{compressed.target}` with {compressed.how}; "
        f"{compressed.held_back} more were held back to verify exports with",
        f"- edgekit {compressed.edgekit}, "
        + ", ".join(f"{name} {number}" for name, number in compressed.versions.items()),
    ]
    if compressed.finetuned:
        lines.append(f"- trained: {compressed.finetuned.told}")
    if compressed.pruned:
        lines.append(f"- pruned: {compressed.pruned.told}")
    if compressed.proxy:
        lines.append(
            f"- {compressed.proxy.name} with {compressed.float_model}: {compressed.proxy.after:.4g} in simulation, "
            f"{compressed.proxy.floor:g} wanted"
        )
    if compressed.float_metric and compressed.simulated_metric:
        lines.append(
            f"- {compressed.float_metric.name}: float {_number(compressed.float_metric)}, in simulation "
            f"{_number(compressed.simulated_metric)}"
        )
    if compressed.stays_float:
        lines.append("- stays float: " + ", ".join(f"{count} {op}" for op, count in compressed.stays_float.items()))
    return lines + [f"- **note:** {note}" for note in compressed.notes]


def _export(manifest: Manifest) -> list[str]:
    proof = manifest.proof
    ran = f"ran on {proof.ran_on}" if proof.ran_on else "not run here; numbers are the simulation's"
    lines = [
        f"- `{manifest.artifact}` ({manifest.format}, {manifest.artifact_bytes:,} bytes), {ran}; "
        f"{proof.samples} held-back samples in batches of {', '.join(map(str, proof.batch_sizes))}"
    ]
    if manifest.opset and manifest.source.opset not in (None, manifest.opset):
        lines.append(f"- opset {manifest.opset}; the source has {manifest.source.opset}")
    if proof.other_sizes:
        lines.append(f"- checked in another size than calibration's too: {', '.join(proof.other_sizes)}")
    lines += [f"- output `{output.name}`: {_distance(output)}" for output in proof.outputs]
    if proof.float_top1 is not None:
        lines.append(f"- same arg max as float on {100 * proof.float_top1:.1f} % of the samples")
    if proof.int8_macs_share is not None:
        lines.append(f"- {100 * proof.int8_macs_share:.1f} % of the MACs in int8 kernels, as {proof.int8_source}")
    lines += [f"- **note:** {note}" for note in manifest.notes]
    lines += _departures(manifest.departures) if manifest.departures else []
    return lines + (_placement(manifest.placement) if manifest.placement else [])


def _departures(departures: Sequence[Departure]) -> list[str]:
    """Where the runtime's codes part from what was trained."""
    rows = [
        (f"`{one.layer or one.tensor}`", f"`{one.tensor}`", f"{one.codes:,}", f"{one.differ:.3%}", str(one.worst))
        for one in departures[:_MOST_LAYERS]
    ]
    total, worst = sum(one.codes for one in departures), max(one.worst for one in departures)
    told = (
        f"Codes, with the runtime's own optimizations, against those that were trained: {share(departures):.3%} of {total:,} differ, "
        f"by at most {worst}. What a layer gets differs already where a layer before it does."
    )
    return ["", told, "", *table(("layer", "tensor", "codes", "differ", "by at most"), rows)]


def _distance(output: OutputProof) -> str:
    """How far an output is from the simulation, where it ran, and from float."""
    if output.float_equal is not None:
        near = (
            f"{100 * output.simulation_equal:.1f} % equal to the simulation, "
            if output.simulation_equal is not None
            else ""
        )
        return f"{near}{100 * output.float_equal:.1f} % equal to float"
    if output.float_sqnr_db is None:
        return "not compared"
    near = f"{output.simulation_sqnr_db:.1f} dB from the simulation, " if output.simulation_sqnr_db is not None else ""
    cosine = f" (cosine {output.float_cosine:.5f})" if output.float_cosine is not None else ""
    return f"{near}{output.float_sqnr_db:.1f} dB from float{cosine}"


def _latency(benchmarks: Benchmarks) -> list[str]:
    rows = [
        (
            record.target,
            timing.label,
            f"{timing.median_ms:.3f}",
            f"{timing.ci_low_ms:.3f} to {timing.ci_high_ms:.3f}",
            f"{timing.p90_ms:.3f}",
            f"{timing.p99_ms:.3f}",
            f"{timing.throughput:.0f}",
            f"{timing.load_ms:.0f}",
            f"{timing.peak_rss_bytes / 2**20:.0f}",
            f"{timing.artifact_bytes:,}",
        )
        for record in benchmarks.targets
        for timing in record.timings
    ]
    header = (
        "target",
        "precision",
        "median ms",
        "95 % interval",
        "p90",
        "p99",
        "samples/s",
        "load ms",
        "peak MiB",
        "bytes",
    )
    lines = table(header, rows) if rows else []
    for record in benchmarks.targets:
        if record.speedup is not None and record.speedup_over_fastest is not None:
            lines.append(
                f"\n{record.target}: int8 is {record.speedup:.2f}x f32 (95 %: {record.speedup_low:.2f} to {record.speedup_high:.2f}), "
                f"{record.speedup_over_fastest:.2f}x the fastest float, {record.fastest_float}."
            )
        if record.why_not:
            lines.append(f"\n{record.target}: not timed: {record.why_not}.")
        lines += [f"\n{record.target}: {note}" for note in record.notes]
    return lines


def _pruned(pruned: Pruned) -> list[str]:
    rows = [
        (f"`{layer.name}`", _arrow(*pairs[0]), _arrow(*pairs[1]), _arrow(*layer.macs))
        for layer in pruned.layers[:_MOST_LAYERS]
        for pairs in [tuple(zip(layer.before, layer.after, strict=True))]
    ]
    return table(("layer", "inputs", "outputs", "MACs"), rows)


def _arrow(before: int, after: int) -> str:
    return f"{before:,} to {after:,}" if before != after else f"{before:,}"


def _searched(searched: Searched) -> list[str]:
    """What each trial changed in the best before it, and whether that was better."""
    rows = [
        (
            str(number),
            trial.changed or "the method to begin with",
            f"{trial.value:.5g}",
            f"{trial.seconds:.1f}",
            "kept" if trial.kept else "",
        )
        for number, trial in enumerate(searched.trials, 1)
    ]
    return table(("trial", "changed", searched.judged_by, "seconds", ""), rows)


def _sensitivity(compressed: Compressed) -> list[str]:
    """The layers that hurt most, with a bar for the share of the error."""
    worst = sorted(compressed.sensitivity, key=lambda layer: layer.output_sqnr_db)[:_MOST_LAYERS]
    noise = [10 ** (-layer.output_sqnr_db / 10) for layer in worst]
    rows = [
        (
            f"`{layer.name}`",
            layer.op_type,
            f"{layer.local_sqnr_db:.1f}",
            f"{layer.output_sqnr_db:.1f}",
            f"{layer.output_cosine:.5f}",
            "█" * max(1, round(20 * own / max(noise))),
        )
        for layer, own in zip(worst, noise, strict=True)
    ]
    return table(("node", "operator", "its output, dB", "model's output, dB", "cosine", "error"), rows)


def _placement(placement: TunedPlacement) -> list[str]:
    """What was timed to decide which layers run in int8."""
    rows = [
        (
            step.what,
            step.precision,
            f"{step.ratio:.2f} ({step.ci_low:.2f} to {step.ci_high:.2f})" if step.ratio is not None else step.failure,
            "kept" if step.kept else "",
        )
        for step in placement.steps
    ]
    return ["", *table(("timed", "to", "times faster", ""), rows)] if rows else []


def _layers(compressed: Compressed) -> list[str]:
    total = sum(layer.macs for layer in compressed.layers) or 1
    rows = [
        (
            f"`{layer.name}`",
            layer.op_type,
            "x".join("?" if d is None else str(d) for d in layer.output_shape or ()),
            f"{layer.macs:,}",
            f"{100 * layer.macs / total:.1f} %",
            f"{layer.parameters:,}",
        )
        for layer in compressed.layers[:_MOST_LAYERS]
    ]
    lines = table(("layer", "operator", "output", "MACs", "share", "parameters"), rows)
    more = len(compressed.layers) - _MOST_LAYERS
    return lines + ([f"\n... and {more} more."] if more > 0 else [])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table, line by line."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]
