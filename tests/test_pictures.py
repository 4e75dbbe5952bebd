"""`compress --explain`: what the record says of the worst layers' numbers, and the pictures that are drawn from it."""

from __future__ import annotations

import math
import sys
from fractions import Fraction
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

import edgekit
from conftest import Cli, TinyFiles
from edgekit.data import open_data
from edgekit.distribution import POINTS, Distribution, LayerDistributions, of_activation, of_weight
from edgekit.errors import OutputError
from edgekit.graph.annotations import get_params
from edgekit.graph.io import load_annotated, load_onnx
from edgekit.graph.run import Session, with_outputs
from edgekit.method import Method
from edgekit.pictures import FOLDER, draw, draw_errors, draw_layer, links, why_none
from edgekit.pipelines.sources import input_specs
from edgekit.quant.affine import choose_params, fake_quantize, weight_params
from edgekit.quant.observers import HistogramObserver
from edgekit.quant.spec import QuantSpec
from edgekit.records import Compressed, LayerSensitivity, Source, read_compressed
from graphs import Array

WEIGHT = QuantSpec("int8", symmetric=True, per_channel=True, narrow_range=True)


def seen(x: Array, low: float, high: float, spec: QuantSpec | None = None) -> Distribution:
    observer = HistogramObserver()
    observer.update(x)
    return of_activation("x", observer.histogram(), choose_params(low, high, spec or QuantSpec()))


def normal(*shape: int) -> Array:
    return np.random.default_rng(7).normal(0, 1, shape).astype(np.float32)


def sensitivity(name: str, output_db: float, local_db: float = 40.0) -> LayerSensitivity:
    return LayerSensitivity(
        name=name, op_type="Conv", macs=1, local_sqnr_db=local_db, output_sqnr_db=output_db, output_cosine=1.0
    )


def explained(*layers: LayerDistributions) -> Compressed:
    return Compressed(
        edgekit="0",
        versions={},
        source=Source(name="net.pt", kind="pt"),
        target="portable",
        method=Method(),
        samples=1,
        held_back=1,
        sensitivity=tuple(sensitivity(layer.name, 30.0) for layer in layers),
        distributions=layers,
    )


CONV = LayerDistributions(
    name="conv", activations=(seen(normal(5000), -2.0, 3.0),), weight=of_weight(
        "conv.weight", normal(8, 4, 3, 3), weight_params(normal(8, 4, 3, 3), WEIGHT, axis=0), axis=0
    )
)  # fmt: skip

floats = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)


@given(arrays(np.float32, st.integers(1, 400), elements=floats))
@settings(deadline=None)
def test_a_histogram_counts_every_number_in_its_bin(x: Array) -> None:
    found = seen(x, -1.0, 1.0)
    assert 1 <= len(found.counts) <= POINTS
    assert (found.min, found.max) == (x.min(), x.max())
    first, width = (
        Fraction(found.first_edge),
        Fraction(found.width),
    )  # floats would round small numbers out of their bins
    index = [math.floor((Fraction(number) - first) / width) for number in x.tolist()]
    assert list(found.counts) == np.bincount(index, minlength=len(found.counts)).tolist()


def test_a_histogram_is_not_wider_than_the_numbers() -> None:
    found = seen(normal(100_000) * 0.1 + 5, 0.0, 6.0)
    assert found.first_edge <= found.min < found.first_edge + 2 * found.width
    last = found.first_edge + len(found.counts) * found.width
    assert last - 2 * found.width < found.max < last
    assert len(found.counts) > POINTS / 3


def test_what_is_clipped_lies_beyond_half_a_step_of_the_grid() -> None:
    x = np.float32([0.0] * 6 + [2.551, 2.569, 3.0, -0.5])
    found = seen(x, 0.0, 2.55)
    assert (found.grid_low, found.grid_high) == pytest.approx((0.0, 2.55), abs=1e-6)
    assert found.clipped == pytest.approx(0.3, abs=1e-12)


@given(
    arrays(np.float32, array_shapes(min_dims=2, max_dims=4, min_side=1, max_side=6), elements=floats), st.integers(0, 1)
)
@settings(deadline=None)
def test_channels_of_a_weight_lie_within_their_grids(weight: Array, axis: int) -> None:
    params = weight_params(weight, WEIGHT, axis=axis)
    found = of_weight("w", weight, params, axis=axis)
    channels = found.channels
    assert channels is not None
    assert (channels.channels, channels.step) == (weight.shape[axis], 1)
    others = tuple(i for i in range(weight.ndim) if i != axis)
    assert channels.min == pytest.approx(weight.min(axis=others), rel=1e-5, abs=0)
    assert channels.max == pytest.approx(weight.max(axis=others), rel=1e-5, abs=0)
    largest = np.float32(127) * params.scale
    assert channels.grid_high == pytest.approx(largest, rel=1e-5, abs=0)
    assert channels.grid_low == pytest.approx(-largest, rel=1e-5, abs=0)
    assert found.clipped == 0
    assert sum(found.counts) == weight.size


def test_many_channels_share_points() -> None:
    weight = normal(300, 5)
    channels = of_weight("w", weight, weight_params(weight, WEIGHT, axis=0), axis=0).channels
    assert channels is not None
    assert (channels.channels, channels.step, len(channels.min)) == (300, 3, 100)
    assert channels.max[1] == pytest.approx(weight[3:6].max(), rel=1e-5)
    assert channels.grid_low[-1] == pytest.approx(-np.abs(weight[297:]).max(), rel=1e-5)


@pytest.mark.parametrize("axis", [0, None])
def test_a_clipped_weight_says_how_much(axis: int | None) -> None:
    weight = np.linspace(-1, 1, 200, dtype=np.float32).reshape(2, 100)
    ends = np.full(2, 0.5) if axis is not None else np.float64(0.5)
    params = choose_params(-ends, ends, WEIGHT, axis=axis)
    found = of_weight("w", weight, params, axis=axis)
    beyond = np.abs(weight - fake_quantize(weight, params)) > params.scale.max() / 2 * (1 + 1e-5)
    assert found.clipped == pytest.approx(beyond.mean(), abs=1e-12)
    assert 0.4 < found.clipped < 0.6
    assert (found.channels is None) == (axis is None)


def test_bars_grow_with_the_noise_and_the_worst_is_on_top() -> None:
    layers = [sensitivity(f"layer{i}", 100.0 - i, 20.0 + i / 10) for i in range(60)]
    (axes,) = draw_errors(layers).axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == [f"layer{i}" for i in range(59, 19, -1)]
    left, right = axes.get_xlim()
    bottom, top = axes.get_ylim()
    assert left > right, "what is worse reaches further"
    assert bottom > top, "the first is on top"
    lengths = [bar.get_width() for bar in axes.patches]  # type: ignore[attr-defined]
    assert np.allclose(np.diff(lengths), -1.0, rtol=0, atol=1e-9)
    (own,) = axes.lines
    assert list(np.asarray(own.get_xdata())) == [layer.local_sqnr_db for layer in layers[:19:-1]]


def test_no_noise_at_all_leaves_the_others_readable() -> None:
    (axes,) = draw_errors([sensitivity("bad", 12.0), sensitivity("exact", 200.0, 200.0)]).axes
    left, right = axes.get_xlim()
    assert (right, left) == (9.0, 89.0)
    bad, exact = (bar.get_width() for bar in axes.patches)  # type: ignore[attr-defined]
    assert (bad, exact) == (77.0, 0.0)


def test_lines_stand_at_the_ends_of_the_grid_and_of_the_numbers() -> None:
    activation, weight, channels = draw_layer(CONV).axes
    for axes, drawn in zip((activation, weight), (CONV.activations[0], CONV.weight), strict=True):
        assert drawn is not None
        at = [np.asarray(line.get_xdata())[0] for line in axes.lines]
        assert at == [drawn.min, drawn.max, drawn.grid_low, drawn.grid_high]
        low, high = axes.get_xlim()
        assert low < min(at) and max(at) < high
    assert "clipped" in activation.get_title() and "none clipped" not in activation.get_title()
    assert "none clipped" in weight.get_title()
    assert channels.get_xlim() == (-0.5, 7.5)


@pytest.mark.parametrize(
    ("layer", "panels"),
    [
        (LayerDistributions(name="zeros", activations=(seen(np.zeros(9, np.float32), 0.0, 0.0),)), 1),
        (LayerDistributions(name="weights only", weight=CONV.weight), 2),
        (LayerDistributions(name="add", activations=CONV.activations * 2), 2),
        (LayerDistributions(name="concat", activations=CONV.activations * 9), 4),
    ],
    ids=lambda case: case.name if isinstance(case, LayerDistributions) else "",
)
def test_each_kind_of_layer_is_drawn(layer: LayerDistributions, panels: int, tmp_path: Path) -> None:
    assert len(draw_layer(layer).axes) == panels
    draw(tmp_path, explained(layer))
    ElementTree.parse(tmp_path / FOLDER / "layer-01.svg")


def test_pictures_are_the_same_bytes_each_time_whatever_the_user_set(tmp_path: Path) -> None:
    import matplotlib

    draw(tmp_path / "a", explained(CONV))
    with matplotlib.rc_context({"font.size": 20, "axes.grid": True, "svg.hashsalt": None}):
        draw(tmp_path / "b", explained(CONV))
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / d / FOLDER).iterdir()} for d in "ab")
    assert set(first) == {"errors.svg", "layer-01.svg"}
    assert first == second


def test_any_name_of_a_layer_can_be_drawn(tmp_path: Path) -> None:
    names = ["/a/b&<c>", "$x_$1", "层/卷积", "]([", "deep/" * 60 + "last"]
    record = explained(*(CONV.model_copy(update={"name": name}) for name in names))
    draw(tmp_path, record)
    for number, name in enumerate(names, 1):
        texts = "".join(ElementTree.parse(tmp_path / FOLDER / f"layer-{number:02}.svg").getroot().itertext())
        assert (name if len(name) < 100 else "deep/last") in texts
    lines = links(tmp_path, record)
    assert r"![What \]( \[" not in lines
    assert rf"![What \](\[ reads]({FOLDER}/layer-04.svg)" in lines


def test_what_an_earlier_model_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    draw(tmp_path, explained(CONV, CONV))
    (tmp_path / FOLDER / "mine.svg").write_text("<svg/>")
    draw(tmp_path, explained(CONV))
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == ["errors.svg", "layer-01.svg", "mine.svg"]
    draw(tmp_path, explained())
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == ["mine.svg"]
    assert links(tmp_path, explained()) == []


def test_a_folder_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / FOLDER).write_text("a file")
    with pytest.raises(OutputError, match=r"pictures.*cannot be written"):
        draw(tmp_path, explained(CONV))


@pytest.fixture(scope="module")
def out(tiny: TinyFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explained") / "out"
    edgekit.compress(tiny.model, folder, calibration=tiny.data, samples=40, explain=True)
    return folder


def test_explain_describes_the_worst_layers_by_the_samples_they_were_judged_by(tiny: TinyFiles, out: Path) -> None:
    record = read_compressed(out)
    order = sorted(record.sensitivity, key=lambda layer: layer.output_sqnr_db)
    assert [layer.name for layer in record.distributions] == [layer.name for layer in order]
    model = load_annotated(out / "model.onnx")
    nodes = {node.name: node for node in model.graph}
    data = open_data(tiny.data).bind(input_specs(model))
    images = np.concatenate([batch.feeds["image"] for batch in data.batches(8, 0, 40)])
    for layer in record.distributions:
        for found in layer.activations:
            value = next(value for value in nodes[layer.name].inputs if value is not None and value.name == found.name)
            params = get_params(value)
            assert params is not None and found.dtype == params.dtype
            assert found.grid_high - found.grid_low == pytest.approx(255 * float(params.scale), rel=1e-5)
            shown = Session(with_outputs(load_onnx(out / "model.onnx"), {found.name}), optimize=False)
            array = images if value.is_graph_input() else shown.run({"image": images})[found.name]
            assert sum(found.counts) == array.size
            assert (found.min, found.max) == pytest.approx((array.min(), array.max()), rel=1e-5)
    stem = next(layer for layer in record.distributions if layer.name == "stem")
    assert stem.weight is not None and stem.weight.channels is not None
    assert stem.weight.channels.channels == 8


def test_weights_in_blocks_are_described_without_activations(tiny: TinyFiles, tmp_path: Path) -> None:
    method = Method(weights="int4", activations="none", block_size=16)
    options = {"calibration": tiny.data, "samples": 40, "target": "x86-onnxruntime", "method": method}
    record = edgekit.compress(tiny.model, tmp_path / "o", explain=True, **options).record
    (head,) = [layer for layer in record.distributions if layer.name == "head"]
    assert head.activations == ()
    assert head.weight is not None and head.weight.channels is not None
    assert (head.weight.dtype, head.weight.channels.channels) == ("int4", 4)


def test_the_report_shows_the_pictures(out: Path) -> None:
    report = (out / "report.md").read_text(encoding="utf-8")
    names = ["errors.svg", *(f"layer-{i:02}.svg" for i in range(1, 1 + len(read_compressed(out).distributions)))]
    assert [line.split("(")[1] for line in report.splitlines() if line.startswith("![")] == [
        f"{FOLDER}/{name})" for name in names
    ]
    for name in names:
        ElementTree.parse(out / FOLDER / name)


def test_without_matplotlib_a_note_says_what_to_install(
    tiny: TinyFiles, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert why_none() == ""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = cli("compress", tiny.model, "--calibration", tiny.data, "--samples", 40, "--explain", "-o", tmp_path / "o")
    assert done.code == 0, done.stderr
    record = read_compressed(tmp_path / "o")
    assert any("pip install 'edgekit[plots]'" in note for note in record.notes)
    assert record.distributions and not (tmp_path / "o" / FOLDER).exists()
    assert "![" not in (tmp_path / "o" / "report.md").read_text(encoding="utf-8")
