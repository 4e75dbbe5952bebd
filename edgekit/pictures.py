"""Pictures: of `compress --explain`, what each layer costs and how the worst layers' numbers lie on their grids; of pruning, a front.

They are drawn from the record alone, as SVG files whose bytes depend on nothing else but Matplotlib's version.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.distribution import ChannelRanges, Distribution, LayerDistributions
from edgekit.errors import OutputError
from edgekit.output import write_text
from edgekit.records import Compressed, LayerSensitivity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FOLDER, ERRORS = "pictures", "errors.svg"
MOST_BARS = 40
MOST_ACTIVATIONS = 4
"""Of one layer; a Concat may read dozens."""
WIDEST_DB = 80.0
"""Between the worst layer and the end of the axis: what is better still does not matter."""

_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "edgekit",
    "svg.fonttype": "none",  # names can be searched for, and files are small
    "text.parse_math": False,  # a name may hold dollars
    "font.size": 8.0,
    "axes.titlesize": 8.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.edgecolor": "#888888",
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
}
_NUMBERS, _PALE, _GRID, _SEEN, _OWN = "#4878a8", "#a9c3dd", "#c0392b", "#555555", "#e08a1e"


def why_none() -> str:
    """Why no pictures can be drawn here; empty where they can."""
    if find_spec("matplotlib") is not None:
        return ""
    return (
        "no pictures are drawn, because matplotlib is not installed: `pip install 'edgekit[plots]'` and compress again"
    )


def draw(folder: Path, compressed: Compressed) -> None:
    """Draw what a record explains into `folder / "pictures"`, where those of an earlier model are removed first.

    Raises:
        OutputError: the folder cannot be written.
    """
    pictures = folder / FOLDER
    try:
        for old in [*pictures.glob(ERRORS), *pictures.glob("layer-*.svg")]:
            old.unlink()
    except OSError as error:
        raise OutputError(f"{pictures}: cannot be written ({error.strerror}); make it writable, or move it") from error
    if not compressed.distributions or why_none():
        return
    from matplotlib import style

    with style.context(["default", _STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # what Matplotlib's own font lacks, the viewer's may have
        write_text(pictures / ERRORS, _svg(draw_errors(compressed.sensitivity)))
        for name, layer in _files(compressed):
            write_text(pictures / name, _svg(draw_layer(layer)))


def links(folder: Path, compressed: Compressed) -> list[str]:
    """Lines of Markdown that show the pictures which are in `folder / "pictures"`."""
    captions = {ERRORS: "What each layer alone costs"} | {
        name: f"What {layer.name} reads" for name, layer in _files(compressed)
    }
    found = {name: text for name, text in captions.items() if (folder / FOLDER / name).is_file()}
    lines = [line for name, text in found.items() for line in ("", f"![{_escaped(text)}]({FOLDER}/{name})")]
    return [*lines[:2], "", "### What the worst layers read, and the ends of its grids", *lines[2:]] if lines else []


def _files(compressed: Compressed) -> Iterator[tuple[str, LayerDistributions]]:
    """The picture of each layer that has one: names of layers may not be names of files."""
    for number, layer in enumerate(compressed.distributions, 1):
        if layer.activations or layer.weight:
            yield f"layer-{number:02}.svg", layer


def _escaped(text: str) -> str:
    return text.replace("[", "\\[").replace("]", "\\]")


def _svg(figure: Figure) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def draw_errors(layers: Sequence[LayerSensitivity]) -> Figure:
    """A bar for each of the worst layers, the worst on top: the longer, the worse."""
    from matplotlib.figure import Figure

    worst = sorted(layers, key=lambda layer: layer.output_sqnr_db)[:MOST_BARS]
    ends = [layer.output_sqnr_db for layer in worst] + [layer.local_sqnr_db for layer in worst]
    right = min(ends) - 3.0
    left = min(max(ends) + 3.0, right + WIDEST_DB)
    rows = range(len(worst))
    figure = Figure(figsize=(8.0, 1.3 + 0.2 * len(worst)), layout="constrained")
    axes = figure.add_subplot()
    whole = [min(layer.output_sqnr_db, left) for layer in worst]
    own = [min(layer.local_sqnr_db, left) for layer in worst]
    axes.barh(rows, [left - value for value in whole], left=whole, color=_NUMBERS, height=0.7, label="model's output")
    axes.plot(own, rows, "o", color=_OWN, markersize=4.5, clip_on=False, label="its own output")
    axes.set_yticks(rows, [_shortened(layer.name, 48) for layer in worst])
    axes.set(xlim=(left, right), ylim=(len(worst) - 0.4, -0.6), xlabel="SQNR (dB), each layer quantized alone; worse →")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    which = f"the worst {len(worst)} of {len(layers)} layers" if len(worst) < len(layers) else "layer by layer"
    figure.suptitle(f"Noise of quantization, {which}", fontsize=9, fontweight="bold")
    figure.legend(loc="outside lower center", ncols=2, reverse=True)
    return figure


def draw_layer(layer: LayerDistributions) -> Figure:
    """What a layer reads: histograms of its activations and its weight, and the ranges of the weight's channels."""
    from matplotlib.figure import Figure

    panels = [("reads", one) for one in layer.activations[:MOST_ACTIVATIONS]]
    panels += [("weight", layer.weight)] if layer.weight else []
    channels = layer.weight.channels if layer.weight else None
    count = len(panels) + (channels is not None)
    columns = 2 if count == 4 else min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(3.6 * columns, 0.8 + 2.5 * rows), layout="constrained")
    for number, (role, one) in enumerate(panels, 1):
        _draw_histogram(figure.add_subplot(rows, columns, number), role, one)
    if channels is not None:
        _draw_channels(figure.add_subplot(rows, columns, count), channels)
    figure.suptitle(_shortened(layer.name, 40 * columns), fontsize=9, fontweight="bold")
    named = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=(2, 3, 5)[columns - 1])
    return figure


def _draw_histogram(axes: Axes, role: str, one: Distribution) -> None:
    from matplotlib.ticker import EngFormatter, NullLocator

    edges = [one.first_edge + i * one.width for i in range(len(one.counts) + 1)]
    axes.stairs(one.counts, edges, fill=True, fc=_NUMBERS, ec=_NUMBERS, lw=0.6, label="numbers")
    axes.set_yscale("log", nonpositive="clip")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_ylabel("count")
    axes.set_ylim(0.5, 2.0 * max(one.counts, default=1))
    ends = (edges[0], edges[-1], one.grid_low, one.grid_high)
    margin = 0.03 * (max(ends) - min(ends))
    axes.set_xlim(min(ends) - margin, max(ends) + margin)
    axes.axvspan(min(ends) - margin, one.grid_low, color=_GRID, alpha=0.08, linewidth=0, zorder=0.3, label="clipped")
    axes.axvspan(one.grid_high, max(ends) + margin, color=_GRID, alpha=0.08, linewidth=0, zorder=0.3)
    for end in (one.min, one.max):
        axes.axvline(end, color=_SEEN, linestyle=(0, (3, 2)), linewidth=1.0, zorder=0.8, label="least and largest")
    for end in (one.grid_low, one.grid_high):
        axes.axvline(end, color=_GRID, linewidth=1.2, label="ends of the grid")
    axes.grid(axis="x")
    axes.set_title(f"{role} {_shortened(one.name, 38)}\n{one.dtype}, {_percent(one.clipped)} clipped")


def _draw_channels(axes: Axes, channels: ChannelRanges) -> None:
    edges = [min(i * channels.step, channels.channels) - 0.5 for i in range(len(channels.min) + 1)]
    axes.stairs(channels.max, edges, baseline=channels.min, fill=True, color=_PALE, label="range of a channel")
    for ends in (channels.grid_low, channels.grid_high):
        axes.stairs(ends, edges, baseline=None, color=_GRID, linewidth=1.2, label="ends of the grid")
    axes.set_xlim(edges[0], edges[-1])
    axes.grid(axis="y")
    several = f", {channels.step} at a time" if channels.step > 1 else ""
    axes.set_title(f"weight, by output channel\n{channels.channels} in all{several}")


def _percent(share: float) -> str:
    return "none" if not share else "under 0.01 %" if share < 1e-4 else f"{100 * share:.2f} %"


def _shortened(name: str, most: int) -> str:
    """The end of a name tells more than its beginning, but the beginning says which part of the model it is."""
    if len(name) <= most:
        return name
    begin = most // 3
    return f"{name[:begin]}…{name[len(name) - (most - begin - 1) :]}"


def pareto_svg(points: Mapping[str, Sequence[tuple[str, float, float]]], metric: str) -> str:
    """Accuracy against latency as an SVG file: for each target its points as (label, ms, metric), in the order of pruning."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", _STYLE]):
        figure = Figure((5.2, 3.4), layout="constrained")
        axes = figure.subplots()
        for target, some in points.items():
            axes.plot([ms for _, ms, _ in some], [value for _, _, value in some], "o-", label=target)
            for label, ms, value in some:
                axes.annotate(label, (ms, value), xytext=(4, 4), textcoords="offset points")
        axes.set_xlabel("median latency of one sample (ms)")
        axes.set_ylabel(metric)
        axes.grid(visible=True)
        axes.legend()
        return _svg(figure)
