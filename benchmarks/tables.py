"""Results as Markdown."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

from claims import Claim, Result, as_text

from edgekit.records import versions

PACKAGES = ("onnxruntime", "openvino", "nncf", "tensorrt-rtx-cu13", "onnx", "onnx-ir", "numpy", "torch")


def results_table(results: Sequence[Result]) -> str:
    """One row an entry, in their order."""
    batches = sorted({batch for result in results for batch in result.latencies})
    heads = ["runtime", "file", "top-1", "same as float", "SQNR", "MACs in int8", "Adds in int8", "bytes"]
    for batch in batches:
        heads += [f"batch {batch}", "edgekit is faster"]
    return table(heads, [_row(result, batches) for result in results])


def claims_table(claims: Sequence[Claim]) -> str:
    """One row a claim."""
    return table(["claim", "found", ""], [[claim.text, claim.found, claim.verdict] for claim in claims])


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def setting() -> str:
    """The machine and the versions, in one sentence each."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    machine = f"{len(names) or '?'} CPUs of {names[0] if names else platform.machine()}, {platform.system()}"
    found = ", ".join(f"{package} {version}" for package, version in versions(*PACKAGES).items())
    return f"Machine: {machine}. Versions: {found}.\n"


def _row(result: Result, batches: Sequence[int]) -> list[str]:
    scores, kernels = result.scores, result.kernels
    row = [
        result.entry.group,
        result.entry.label,
        f"{100 * scores.top1:.2f} %",
        f"{100 * scores.agreement:.2f} %",
        f"{scores.sqnr_db:.1f} dB",
        "" if result.is_float else f"{100 * kernels.macs:.0f} %",
        "" if result.is_float or kernels.adds is None else f"{kernels.adds} of {kernels.all_adds}",
        f"{result.entry.artifact.size_bytes:,}",
    ]
    for batch in batches:
        latency = result.latencies.get(batch)
        row += [f"{latency.ms:.3f} ms", as_text(latency.ours)] if latency else ["", ""]
    return row
