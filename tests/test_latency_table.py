from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from edgekit.backend import Artifact, Availability, get_backend
from edgekit.errors import BackendError
from edgekit.latency_table import Effort, LatencyTable, cache_folder, time_layers
from edgekit.layer_shape import LayerShape, layer_shapes
from edgekit.target import Target, load_target
from networks import Net, local_target

TARGET = local_target("x86-onnxruntime")
QUICK = Effort(rounds=2, seconds=0.01)
FULL = {"a": ((8,), (4, 8)), "b": ((4, 8), (8,))}


def inferred(net: Net, *outputs: str) -> ir.Model:
    """The model with the shapes of all values."""
    return ir.from_proto(onnx.shape_inference.infer_shapes(net.proto(*outputs)))


@pytest.fixture(scope="module")
def shapes() -> dict[str, LayerShape]:
    net = Net()
    y = net.conv_relu(net.input("x", ["N", 8, 10, 10]), "a", 8, 8)
    return layer_shapes(inferred(net, net.conv(y, "b", 8, 8)))


class Slot:
    """A worker whose runtime takes 1 µs for each input channel times output channel; only of files that end in .plan."""

    opened: ClassVar[list[str]] = []
    order: ClassVar[list[tuple[int, int]]] = []
    noise: ClassVar[list[float]] = []

    def __init__(self, artifact: Artifact, target: Target, *, exact: bool) -> None:
        assert exact
        self.opened.append("new")
        self.load(artifact)

    def load(self, artifact: Artifact) -> None:
        if artifact.path.suffix != ".plan":
            raise BackendError("not a plan")
        model = onnx.load(artifact.path.read_text(encoding="utf-8"))
        self.copies = sum(node.op_type == "Conv" for node in model.graph.node)
        self.channels = tuple(model.graph.initializer[0].dims[:2])

    def time(
        self, feeds: Mapping[str, NDArray[np.float32]], *, seconds: float, iterations: None, warmup: int
    ) -> list[int]:
        assert feeds["x"].shape[:2] == (1, self.channels[1])
        self.order.append((self.channels[1], self.channels[0]))
        factor = self.noise[len(self.order) % len(self.noise)] if self.noise else 1.0
        return [round(1000 * self.copies * self.channels[0] * self.channels[1] * factor)] * 3

    def close(self) -> None:
        self.opened.append("closed")


class Planner:
    """A backend whose runtime needs a file of its own; `refuses` so many output channels."""

    def __init__(self, refuses: int = 0) -> None:
        self.refuses = refuses

    def available(self, target: Target) -> Availability:
        return Availability(True, True, True, "planner 1")

    def convert(self, model: Path, target: Target, out: Path, *, precision: str) -> Artifact:
        assert precision == "f32"
        if onnx.load(model).graph.initializer[0].dims[0] == self.refuses:
            raise BackendError("too wide")
        path = out / "model.plan"
        path.write_text(str(model), encoding="utf-8")
        return Artifact(path, (path,), precision)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("edgekit.latency_table.Worker", Slot)
    for some in (Slot.opened, Slot.order, Slot.noise):
        some.clear()  # type: ignore[attr-defined]
    yield


def planned(shapes: dict[str, LayerShape], cache: Path, backend: Planner, effort: Effort = QUICK) -> LatencyTable:
    return time_layers(shapes, FULL, TARGET, backend, cache=cache, effort=effort)  # type: ignore[arg-type]


@pytest.mark.usefixtures("fake")
def test_times_are_of_one_layer_and_each_shape_is_measured_once(shapes: dict[str, LayerShape], tmp_path: Path) -> None:
    found = planned(shapes, tmp_path, Planner())
    assert found.measured == 3  # 8 to 8 is in both grids
    assert found.time("a", 8, 4) == pytest.approx(0.032)
    assert found.time("a", 8, 8) == pytest.approx(0.064)
    assert found.time("b", 6, 8) == pytest.approx(0.048)
    assert found.remarks == ()
    assert Slot.order == [(8, 4), (8, 8), (4, 8), (4, 8), (8, 8), (8, 4)]
    assert Slot.opened == ["new", "new", "closed"]  # the first time an ONNX file was tried, and refused


@pytest.mark.usefixtures("fake")
def test_known_times_are_not_measured_again(shapes: dict[str, LayerShape], tmp_path: Path) -> None:
    first = planned(shapes, tmp_path, Planner())
    [file] = tmp_path.iterdir()
    Slot.order.clear()
    again = planned({"b": shapes["b"]}, tmp_path, Planner())
    assert again.remarks == ("not timed, because the graph has no such layer or leaves its size open: a",)
    assert (again.measured, Slot.order) == (0, [])
    assert again.time("b", 4, 8) == first.time("b", 4, 8)
    assert planned(shapes, tmp_path, Planner(), Effort(rounds=3, seconds=0.01)).measured == 3
    for damage in ("{", '{"setup": {}, "times": {}}', "\udce4"):
        file.write_bytes(damage.encode(errors="surrogateescape"))
        assert planned(shapes, tmp_path, Planner()).measured == 3
        assert planned(shapes, tmp_path, Planner()).measured == 0


@pytest.mark.usefixtures("fake")
def test_layers_that_are_not_in_the_graph_are_told(shapes: dict[str, LayerShape], tmp_path: Path) -> None:
    found = planned({"a": shapes["a"]}, tmp_path, Planner())
    assert found.remarks == ("not timed, because the graph has no such layer or leaves its size open: b",)


def test_a_runtime_that_is_not_here_is_an_error(shapes: dict[str, LayerShape], tmp_path: Path) -> None:
    class Absent(Planner):
        def available(self, target: Target) -> Availability:
            return Availability(True, False, False, "planner 1", "no device", "attach it")

    with pytest.raises(BackendError, match="'x86-onnxruntime': no device; attach it"):
        planned(shapes, tmp_path, Absent())


@pytest.mark.usefixtures("fake")
def test_runs_share_a_file(shapes: dict[str, LayerShape], tmp_path: Path) -> None:
    one = time_layers({"a": shapes["a"]}, {}, TARGET, Planner(), cache=tmp_path, effort=QUICK)  # type: ignore[arg-type]
    assert one.measured == 1
    assert planned(shapes, tmp_path, Planner()).measured == 2
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.usefixtures("fake")
def test_noise_is_measured_longer_and_told(shapes: dict[str, LayerShape], tmp_path: Path) -> None:
    Slot.noise[:] = [1.0, 2.0, 1.0, 1.5]
    found = planned(shapes, tmp_path, Planner())
    assert len(Slot.order) > 6
    assert re.search(r"\d of 4 times of layers are noisy \(intervals wider than 15%\)", found.remarks[0])
    assert any(point.low_ms < point.median_ms < point.high_ms for point in found.points.values())
    quiet = sum(
        not point.noisy for point in {shapes[name].key(i, o): p for (name, i, o), p in found.points.items()}.values()
    )
    assert quiet < 3
    Slot.noise[:] = [1.0]
    again = planned(shapes, tmp_path, Planner())
    assert (again.measured, again.remarks) == (3 - quiet, ())


@pytest.mark.usefixtures("fake")
def test_a_layer_that_the_runtime_refuses_is_left_out(tmp_path: Path) -> None:
    net = Net()
    y = net.conv(net.input("x", ["N", 8, 10, 10]), "a", 8, 8)
    shapes = layer_shapes(inferred(net, net.conv(y, "wide", 8, 32, 1)))
    found = planned(shapes, tmp_path, Planner(refuses=32))
    assert found.time("wide", 8, 32) == 0.0
    assert found.time("a", 8, 8) > 0
    assert "Conv 1x1, 8 to 32 channels, at 10x10): too wide" in found.remarks[-1]


@pytest.mark.usefixtures("fake")
def test_a_cache_that_cannot_be_written_costs_nothing_else(shapes: dict[str, LayerShape], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = planned(shapes, tmp_path / "file" / "cache", Planner())
    assert found.time("a", 8, 8) > 0
    assert "not kept for the next run" in found.remarks[0]


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "edgekit" / "latency"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "edgekit" / "latency"


def test_times_between_measured_widths_are_linear_in_both() -> None:
    grid = np.array([[1.0, 2.0, 2.0], [3.0, 4.0, 6.0]])
    table = LatencyTable({"a": (((4, 8), (8, 16, 32)), grid)}, {}, 0, ())
    assert table.time("a", 4, 8) == 1.0
    assert table.time("a", 8, 24) == 5.0
    assert table.time("a", 6, 12) == 2.5
    assert table.time("a", 2, 64) == 2.0
    assert table.time("b", 2, 64) == 0.0


def test_onnx_runtime_is_measured_in_all_widths(tmp_path: Path) -> None:
    net = Net()
    y = net.conv(net.input("x", ["N", 64, 28, 28]), "conv", 64, 64)
    y = net.conv(y, "depthwise", 64, 64, group=64)
    shapes = layer_shapes(inferred(net, net.conv(y, "project", 64, 16, 1)))
    widths = {"conv": ((16, 64), (16, 64)), "depthwise": ((16, 64), (16, 64))}
    one = TARGET.model_copy(update={"runtime": TARGET.runtime.model_copy(update={"threads": 1})})
    found = time_layers(shapes, widths, one, get_backend("onnxruntime"), cache=tmp_path, effort=QUICK)
    assert found.measured == 4 + 2 + 1
    assert set(found.grids) == {"conv", "depthwise", "project"}
    assert found.time("conv", 64, 64) > 0 and found.time("project", 64, 16) > 0
    assert all(0 < one.low_ms <= one.median_ms <= one.high_ms for one in found.points.values())


def test_a_runtime_that_fails_leaves_an_empty_table(
    monkeypatch: pytest.MonkeyPatch, shapes: dict[str, LayerShape], tmp_path: Path
) -> None:
    plugin = Path(__file__).parent / "plugin"
    monkeypatch.syspath_prepend(str(plugin))
    target = load_target(str(plugin / "numpy.toml"))
    crashing = target.model_copy(update={"runtime": target.runtime.model_copy(update={"options": {"on_run": "crash"}})})
    found = time_layers(shapes, {}, crashing, get_backend("numpy"), cache=tmp_path, effort=QUICK)
    assert found.grids == {}
    assert "SIGSEGV" in found.remarks[0]
