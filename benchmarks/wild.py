"""Models that people download, through the default command: what of their decisions is kept on each runtime, beside the peers."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from subject import here
from tables import setting, table
from wild_models import MODELS, WildModel

import edgekit
from edgekit.backend import Artifact, get_backend
from edgekit.data import open_data
from edgekit.errors import EdgekitError
from edgekit.graph.float16 import rounded_steps
from edgekit.graph.io import load_onnx
from edgekit.graph.run import Session
from edgekit.lowering.cpu import cpu_saturates
from edgekit.measure import Candidate, measure, ratio
from edgekit.metric import Evaluate
from edgekit.pipelines.sources import input_specs
from edgekit.proxy import choose_proxy, open_proxy
from edgekit.records import MODEL
from edgekit.sensitivity import Fidelity
from edgekit.target import Target, load_target
from edgekit.worker import Worker

Feeds = Mapping[str, NDArray[Any]]

TARGETS = ("x86-onnxruntime", "x86-openvino", "arm-onnxruntime", "cuda-tensorrt")
CALIBRATION, TEST = 1, 2
"""Seeds of the data."""
LIMIT_S = 1500
RESULTS = Path(__file__).parent / "results" / "wild.md"


def compressed(model: WildModel, folder: Path) -> Iterator[dict[str, Any]]:
    """One row for the default command, and one for each target and peer."""
    assert model.path is not None
    calibration = model.feeds(model.count, CALIBRATION)
    begin = time.monotonic()
    try:
        record = edgekit.compress(model.path, folder / "out", calibration=calibration, samples=model.count // 2).record
    except EdgekitError as error:
        yield {"by": "edgekit", "on": "compress", "refused": str(error)}
        return
    seconds, peak = time.monotonic() - begin, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    lifted = record.lifted.lifted if record.lifted else ()
    feeds, floats = _tested(model)  # not before: they are none of what compressing takes
    judge = _judge(feeds, floats)
    yield {
        "by": "edgekit", "on": "compress", "seconds": seconds, "proxy": judge[0], "lifted": len(lifted),
        "layers": len(record.layers), "peak_gb": peak, "notes": record.notes,
    }  # fmt: skip
    for name in TARGETS:
        yield {"by": "edgekit", "on": name, **_exported(folder, name, judge, feeds, floats, model.path)}


def _tested(model: WildModel) -> tuple[list[Feeds], list[Feeds]]:
    """Samples that nothing was chosen by, one a call, and what the source makes of them."""
    assert model.path is not None
    source = load_onnx(model.path)
    data = open_data(model.feeds(model.count, TEST)).bind(input_specs(source))
    feeds: list[Feeds] = [batch.feeds for batch in data.batches(1)]
    session = Session(model.path, optimize=True)
    return feeds, [session.run(batch) for batch in feeds]


def _judge(feeds: Sequence[Feeds], floats: Sequence[Feeds]) -> tuple[str, Evaluate | None]:
    proxy = choose_proxy(floats, feeds)
    return (proxy.name, open_proxy(proxy, feeds, floats)) if proxy else ("SQNR", None)


def _exported(
    folder: Path,
    name: str,
    judge: tuple[str, Evaluate | None],
    feeds: Sequence[Feeds],
    floats: Sequence[Feeds],
    source: Path,
) -> dict[str, Any]:
    begin = time.monotonic()
    try:
        [result] = edgekit.export(folder / "out", here(name, folder))
    except EdgekitError as error:
        return {"refused": str(error)}
    seconds = time.monotonic() - begin
    manifest = result.manifest
    row = {
        "seconds": seconds, "mb": manifest.artifact_bytes / 1e6, "float_mb": source.stat().st_size / 1e6,
        "int8": manifest.proof.int8_macs_share, "kept_float": manifest.kept_float, "agrees": manifest.proof.agrees,
    }  # fmt: skip
    if manifest.proof.agrees is None:
        session = Session(rounded_steps(load_onnx(result.folder / MODEL)), optimize=False)
        return row | _scored(judge, session.run, feeds, floats)
    artifact = Artifact(
        result.folder / manifest.artifact, tuple(result.folder / one for one in manifest.artifact_files)
    )
    with Worker(artifact, manifest.target_rules, exact=True) as worker:
        row |= _scored(judge, worker.run, feeds, floats)
    return row | (_timed(artifact, manifest.target_rules, source, feeds[0]) if name.startswith("x86") else {})


def _timed(artifact: Artifact, target: Target, source: Path, feeds: Feeds) -> dict[str, Any]:
    """How many times faster than the float source an artifact is on the same runtime, one sample at a time; with its interval."""
    with tempfile.TemporaryDirectory(prefix="edgekit-") as folder:
        floats = get_backend(target.backend).convert(source, target, Path(folder), precision="f32")
        comparison = measure([Candidate("f32", floats, target), Candidate("int8", artifact, target)], feeds)
    if comparison.failures:
        return {"slow": f"not timed: {next(iter(comparison.failures.values()))[:160]}"}
    base, ours = (np.array(timing.bursts) for timing in comparison.timings)
    found = ratio(base, ours)
    return {"ms": float(np.median(ours)), "ratio": [found.median, found.ci_low, found.ci_high]}


def _scored(
    judge: tuple[str, Evaluate | None], run: Any, feeds: Sequence[Feeds], floats: Sequence[Feeds]
) -> dict[str, Any]:
    known: dict[int, Feeds] = {}

    def remembered(batch: Feeds) -> Feeds:
        return known.setdefault(id(batch), run(batch))

    found = Fidelity()
    for batch, wanted in zip(feeds, floats, strict=True):
        found.update(remembered(batch), wanted)
    kept = judge[1](remembered).value if judge[1] else None
    return {"kept": kept, "db": found.sqnr_db}


def peers(model: WildModel, folder: Path) -> Iterator[dict[str, Any]]:
    """What ONNX Runtime's quantizer and NNCF make of the same file and samples."""
    from onnxruntime.quantization import CalibrationMethod
    from peers import onnxruntime_quantized, openvino_quantized

    assert model.path is not None
    feeds, floats = _tested(model)
    judge = _judge(feeds, floats)
    data = open_data(model.feeds(model.count, CALIBRATION)).bind(input_specs(load_onnx(model.path)))
    calibration = [dict(batch.feeds) for batch in data.batches(1)]
    makers = {
        "x86-onnxruntime": lambda: onnxruntime_quantized(
            model.path, calibration, folder, methods=(CalibrationMethod.MinMax,), reduce_range=cpu_saturates()
        ),
        "x86-openvino": lambda: openvino_quantized(model.path, calibration, folder),
    }
    for name, make in makers.items():
        begin = time.monotonic()
        try:
            made = make()
        except Exception as error:  # whatever a peer fails with is its result
            yield {
                "by": name,
                "on": name,
                "refused": f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}",
            }
            continue
        for label, artifact in made.items():
            row = {"by": label, "on": name, "seconds": time.monotonic() - begin, "mb": artifact.size_bytes / 1e6}
            try:
                with Worker(artifact, load_target(name), exact=True) as worker:
                    row |= _scored(judge, worker.run, feeds, floats)
                yield row | _timed(artifact, load_target(name), model.path, feeds[0])
            except Exception as error:
                yield row | {"refused": f"does not run: {str(error)[:160]}"}


def run_child(model: WildModel, part: str) -> list[dict[str, Any]]:
    """The rows of one model by one party, made in a process of its own: crashes and memory are its own."""
    words = [sys.executable, __file__, "--child", part, "--only", model.name]
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
        try:
            ended = subprocess.run(
                [*words, "--output", file.name], capture_output=True, text=True, timeout=LIMIT_S, check=False
            )
            rows = [json.loads(line) for line in Path(file.name).read_text(encoding="utf-8").splitlines()]
        except subprocess.TimeoutExpired:
            return [{"by": part, "on": "", "refused": f"took longer than {LIMIT_S} s"}]
    if ended.returncode:
        words = ended.stderr.strip().splitlines()[-1:] or [""]
        rows.append({"by": part, "on": "", "refused": f"CRASHED with {ended.returncode}: {words[0][:200]}"})
    return rows


def serve(model: WildModel, part: str, output: Path) -> None:
    """Be a child: a line of JSON for each row as soon as it is known."""
    with tempfile.TemporaryDirectory(prefix="edgekit-") as folder, output.open("w", encoding="utf-8") as file:
        for row in (compressed if part == "edgekit" else peers)(model, Path(folder)):
            file.write(json.dumps(row, default=lambda x: x.item() if isinstance(x, np.generic) else str(x)) + "\n")
            file.flush()


def cells(model: WildModel, row: Mapping[str, Any]) -> list[str]:
    """A row of the table."""
    kept, db = row.get("kept"), row.get("db")
    about = row.get("refused", "") or row.get("slow", "") or "; ".join(row.get("notes", ()))
    if row.get("kept_float"):
        about = f"float, as the runtime computes them wrongly: {', '.join(row['kept_float'])}"
    if row["on"] == "compress" and "lifted" in row:
        about = f"{row['proxy']}; {row['lifted']} nodes in float, {row['layers']} layers; peak {row['peak_gb']:.2f} GB. {about}"
    return [
        model.name, row["by"], row["on"],
        "" if kept is None else f"{100 * kept:.1f} %",
        "" if db is None else f"{db:.1f} dB",
        f"{row['mb']:.2f}" if "mb" in row else "",
        "" if row.get("int8") is None else f"{100 * row['int8']:.0f} %",
        "{:.2f}x ({:.2f}-{:.2f})".format(*row["ratio"]) if "ratio" in row else "",
        f"{row['seconds']:.0f} s" if "seconds" in row else "",
        re.sub(r"\S*/edgekit-\w+/?", "", about).replace("|", "/"),
    ]  # fmt: skip


@click.command()
@click.option("--only", multiple=True, help="Models by name.")
@click.option("--peers/--no-peers", "with_peers", default=True)
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS)
@click.option("--child", hidden=True)
def main(only: tuple[str, ...], with_peers: bool, output: Path, child: str | None) -> None:
    """Print and write the table; models whose packages are not installed are left out, with a word."""
    chosen = [model for model in MODELS if not only or model.name in only]
    if child is not None:
        serve(chosen[0], child, output)
        return
    rows: list[list[str]] = []
    for model in chosen:
        if model.path is None:
            click.echo(f"{model.name}: left out, {model.package} is not installed or has no {model.file}")
            continue
        for part in ("edgekit", "peers") if with_peers else ("edgekit",):
            found = [cells(model, row) for row in run_child(model, part)]
            click.echo("\n".join("  ".join(row) for row in found))
            rows += found
        _write(output, rows)


def _write(output: Path, rows: Sequence[Sequence[str]]) -> None:
    heads = [
        "model",
        "made by",
        "runtime",
        "decisions kept",
        "SQNR",
        "MB",
        "MACs in int8",
        "speed-up over float32",
        "took",
        "remarks",
    ]
    reduced = "This CPU has no VNNI: weights have 7 bits in all files but TensorRT's.\n" if cpu_saturates() else ""
    output.parent.mkdir(exist_ok=True)
    output.write_text(
        "\n".join(["# Models from packages, the default command\n", setting(), reduced, table(heads, rows)]),
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
