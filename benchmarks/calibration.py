"""What calibration costs beside plain inference on a network of ResNet-50's shape: time and memory, ours and the peers', in one run."""

from __future__ import annotations

import itertools
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnxruntime.quantization.calibrate import CalibrationDataReader, CalibrationMethod, create_calibrator
from resnet50 import images, resnet50
from tables import setting, table

from edgekit.calibration.observe import observe
from edgekit.data import Batch
from edgekit.graph.annotations import all_values, get_wish
from edgekit.graph.io import save_onnx
from edgekit.graph.operators import is_constant
from edgekit.graph.run import Session
from edgekit.passes.assign_specs import assign_specs
from edgekit.passes.simplify import simplify
from edgekit.quant.estimators import get_estimator
from edgekit.quant.observers import COARSE, FINE
from edgekit.target import load_target

THREADS = 2
BATCH = 8
"""Of the batches that calibration gets; edgekit cuts them into samples."""

PLAIN = {f"plain inference, batch {size}": size for size in (1, 2, 4, 8)}
OURS = {"edgekit, minmax": ("minmax", COARSE), "edgekit, mse": ("mse", COARSE), "edgekit, kld": ("kld", FINE)}
ONNXRUNTIME = {f"ONNX Runtime, {method.name}": method for method in CalibrationMethod if method.name != "Distribution"}
NNCF = "NNCF"
LIMITS = {"edgekit, mse": 1.4, "edgekit, kld": 1.8}
PEAK_GB, GROWTH = 1.0, 1.05

Feeds = dict[str, NDArray[Any]]
Job = Callable[[], object]


def job(name: str, samples: int, tensors: int | None = None) -> Job:
    """One candidate's whole pass over `samples` images; loading the model is part of every calibrator's pass, not of inference.

    `tensors`: observe only so many, evenly spread; else all that the portable target quantizes.
    """
    model = assign_specs(simplify(resnet50()), load_target("portable"))
    if name in PLAIN:
        session, size = Session(model, optimize=True, threads=THREADS), PLAIN[name]
        return lambda: [session.run(batch.feeds) for batch in _held(samples, size)]
    if name in OURS:
        return lambda: calibrated(model, samples, *OURS[name], tensors)
    folder = Path(tempfile.mkdtemp())
    save_onnx(model, folder / "float.onnx")
    if name in ONNXRUNTIME:
        return lambda: onnxruntime_calibrated(folder, samples, ONNXRUNTIME[name])
    return lambda: nncf_quantized(folder, samples)


def calibrated(
    model: ir.Model, samples: int, estimator: str, stride: int, tensors: int | None = None
) -> list[tuple[float, float]]:
    """edgekit's ranges."""
    values = [value for value in all_values(model.graph) if get_wish(value) is not None and not is_constant(value)]
    values = values[:: max(1, len(values) // (tensors or len(values)))][:tensors]
    observed = observe(model, values, _held(samples, BATCH), threads=THREADS, on_batch=None, stride=stride)
    choose = get_estimator(estimator)
    wishes = [get_wish(value) for value in values]
    return [choose(observed[v].histogram(), wish[0]) for v, wish in zip(values, wishes, strict=True) if wish]


def onnxruntime_calibrated(folder: Path, samples: int, method: CalibrationMethod) -> object:
    """The part of `quantize_static` that looks for ranges, one image at a time."""
    calibrator = create_calibrator(folder / "float.onnx", None, str(folder / "augmented.onnx"), calibrate_method=method)
    calibrator.collect_data(_Reader([batch.feeds for batch in _held(samples, 1)]))
    return calibrator.compute_data()


def nncf_quantized(folder: Path, samples: int) -> object:
    """NNCF cannot be asked for ranges alone; it is imported here because it and its torch would weigh on everybody's memory."""
    import nncf  # type: ignore[import-untyped]
    import openvino as ov

    feeds = [batch.feeds for batch in _held(samples, 1)]
    return nncf.quantize(ov.Core().read_model(folder / "float.onnx"), nncf.Dataset(feeds), subset_size=samples)


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, feeds: Sequence[Feeds]) -> None:
        self._rest = iter(feeds)

    def get_next(self) -> Feeds | None:
        return next(self._rest, None)


_IMAGES: list[Batch] = []
DISTINCT = 64
"""Images held in memory; more samples go around them again, so that the data takes no time and no more memory."""


def _held(samples: int, size: int) -> Iterator[Batch]:
    if not _IMAGES:
        _IMAGES.extend(images(DISTINCT, DISTINCT))
    held = _IMAGES[0].feeds["image"]
    for start in range(0, samples, size):
        first = start % DISTINCT
        yield Batch({"image": held[first : min(first + size, first + samples - start)]})


class Child:
    """A candidate in a process of its own, which runs its job as often as it is told to."""

    def __init__(self, name: str, samples: int, tensors: int | None = None) -> None:
        words = [sys.executable, __file__, "--child", name, "--samples", str(samples)]
        words += ["--tensors", str(tensors)] if tensors else []
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def seconds(self) -> float:
        """Run once: seconds."""
        return self._ask("run")

    def close(self) -> float:
        """End it: the most memory that it ever had resident (GB)."""
        peak = self._ask("end")
        self._process.communicate()
        return peak

    def _ask(self, word: str) -> float:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("ANSWER "):  # libraries print, too
                return float(line.split()[1])
        raise RuntimeError("a candidate ended before its job did")


def serve(name: str, samples: int, tensors: int | None) -> None:
    """Be a `Child`'s process."""
    work = job(name, samples, tensors)
    for line in sys.stdin:
        if line.strip() == "end":
            print("ANSWER", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, flush=True)
            return
        start = time.perf_counter()
        work()
        print("ANSWER", time.perf_counter() - start, flush=True)


def alternated(children: dict[Any, Child], rounds: int) -> dict[Any, list[float]]:
    """Seconds of each, round by round, forwards and backwards in turn, after one that does not count."""
    seconds: dict[Any, list[float]] = {key: [] for key in children}
    for index in range(rounds + 1):
        for key in list(children)[:: 1 if index % 2 else -1]:
            taken = children[key].seconds()
            if index:
                seconds[key].append(taken)
    return seconds


def times(names: Sequence[str], samples: int, rounds: int, pause: Callable[[], None]) -> list[list[str]]:
    """Rows: candidate, ms per image, ratio to the best plain inference of the same round, peak memory."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    peaks: dict[str, float] = {}
    for name in [n for n in names if n not in PLAIN]:
        pause()
        children = {n: Child(n, samples) for n in (*PLAIN, name)}
        for key, found in alternated(children, rounds).items():
            seconds[key] += found
        peaks |= {key: child.close() for key, child in children.items()}
        best = np.min([seconds[n][-rounds:] for n in PLAIN], axis=0)
        seconds[f"{name} ratio"] = list(np.array(seconds[name]) / best)
    rows = []
    for name in names:
        ratio = seconds.get(f"{name} ratio")
        spread = f"{np.median(ratio):.2f} ({min(ratio):.2f} to {max(ratio):.2f})" if ratio else ""
        limit = f"at most {LIMITS[name]}" if name in LIMITS else ""
        rows.append([name, f"{1e3 * min(seconds[name]) / samples:.1f} ms", spread, limit, f"{peaks[name]:.2f} GB"])
    return rows


def memory(counts: Sequence[int]) -> list[list[str]]:
    """Rows: peak memory of a fresh process for each number of samples."""
    rows = []
    for name in OURS:
        peaks = []
        for count in counts:
            child = Child(name, count)
            child.seconds()
            peaks.append(child.close())
        holds = max(peaks) <= PEAK_GB and max(peaks) <= GROWTH * min(peaks)
        rows.append([name, *(f"{peak:.2f} GB" for peak in peaks), "holds" if holds else "FAILS"])
    return rows


def scale(rounds: int, path: Path) -> list[list[str]]:
    """Time over samples and over tensors, as a table and a picture."""
    by_samples = {n: Child("edgekit, mse", n) for n in (16, 32, 64, 128)}
    by_tensors = {n: Child("edgekit, mse", 32, n) for n in (9, 18, 36, 72)}
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    axes = figure.subplots(1, 2)
    rows = []
    for axis, children, label in zip(axes, (by_samples, by_tensors), ("samples", "tensors"), strict=True):
        best = {n: min(found) for n, found in alternated(children, rounds).items()}
        for child in children.values():
            child.close()
        x, y = np.array(list(best)), np.array(list(best.values()))
        slope, base = np.polyfit(x, y, 1)
        axis.plot(x, y, "o", x, base + slope * x, "-")
        axis.set(xlabel=label, ylabel="seconds", xlim=(0, None), ylim=(0, None))
        off = float(np.abs(y / (base + slope * x) - 1).max())
        points = ", ".join(f"{n}: {s:.2f} s" for n, s in best.items())
        rows.append([label, points, f"{base:.2f} s + {1e3 * slope:.1f} ms each", f"{100 * off:.0f} %"])
    figure.savefig(path, metadata={"Date": None})
    return rows


@click.command()
@click.option("--samples", default=64, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--peers/--no-peers", default=True, help="Percentile and Entropy of ONNX Runtime need 8 GB.")
@click.option("--max-samples", default=512, show_default=True, help="Of the memory table.")
@click.option("--output", type=click.Path(path_type=Path), default=Path(__file__).parent / "results" / "calibration.md")
@click.option("--child", hidden=True)
@click.option("--tensors", type=int, hidden=True)
def main(
    samples: int, rounds: int, peers: bool, max_samples: int, output: Path, child: str | None, tensors: int | None
) -> None:
    """Print and write the tables."""
    if child is not None:
        serve(child, samples, tensors)
        return
    names = [*PLAIN, *OURS, *((*ONNXRUNTIME, NNCF) if peers else ())]
    counter = itertools.count(1)
    rows = times(names, samples, rounds, lambda: click.echo(f"candidate {next(counter)} of {len(names) - len(PLAIN)}"))
    parts = [
        f"# Calibration of a ResNet-50-shaped network: {samples} images of 224 x 224, {THREADS} threads\n",
        setting(),
        "Time is the least of all rounds; the ratio is to plain inference at its best batch size in the same round, the median\n"
        f"(least to most) of {rounds} rounds. Calibrators load the model within that time, plain inference does not.\n",
        table(["candidate", "per image", "of plain inference", "wanted", "peak memory"], rows),
        table(["peak memory", f"{samples} images", f"{max_samples} images", ""], memory((samples, max_samples))),
        table(["edgekit, mse over", "found", "fit", "worst deviation"], scale(rounds, output.with_suffix(".svg"))),
        f"![time over samples and tensors]({output.with_suffix('.svg').name})\n",
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n".join(parts), encoding="utf-8")
    click.echo("\n".join(parts))


if __name__ == "__main__":
    main()
