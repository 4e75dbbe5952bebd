"""What stands in for a metric: which decision is chosen from outputs, and how agreement counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import edgekit
from edgekit.boxes import both_found, layout_of, read_boxes
from edgekit.errors import DataError
from edgekit.graph.io import save_onnx
from edgekit.method import Method
from edgekit.pipelines.decision import decision_notes
from edgekit.proxy import Proxy, are_shares, choose_proxy, count_decisions, in_focus, open_proxy
from edgekit.records import Compressed, ProxyRecord
from graphs import run
from networks import Net

Array = NDArray[Any]
Outputs = dict[str, Array]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def softmax(x: Array, axis: int = -1) -> Array:
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return np.asarray(e / e.sum(axis=axis, keepdims=True), np.float32)


def scores() -> Outputs:
    return {"scores": rng().normal(0, 3, (16, 10)).astype(np.float32)}


def probabilities() -> Outputs:
    return {"p": softmax(scores()["scores"])}


def pixels() -> Outputs:
    return {"classes": softmax(rng().normal(0, 3, (4, 5, 6, 6)), axis=1)}


def embeddings() -> Outputs:
    x = rng().normal(0, 1, (16, 32)).astype(np.float32)
    return {"embedding": x / np.linalg.norm(x, axis=1, keepdims=True)}


def mask() -> Outputs:
    return {"map": rng().random((3, 1, 8, 8)).astype(np.float32)}


def keys() -> Outputs:
    """Which of 88 keys sound at each step: most often none, where the first has the largest number."""
    sounding = rng().random((6, 40, 88)).astype(np.float32) * 0.1
    sounding[:, ::4, 50] = 0.9
    sounding[:, 1::2, 0] = 0.2
    return {"sounding": sounding}


def voice() -> Outputs:
    return {"p": rng().random((16, 1)).astype(np.float32), "state": rng().normal(0, 1, (2, 16, 8)).astype(np.float32)}


def faces() -> Outputs:
    """Places of eyes, nose and mouth from 0 to 1, and whether there is a face."""
    return {"places": rng().random((16, 10)).astype(np.float32), "face": softmax(rng().normal(0, 1, (16, 2)))}


def text() -> Outputs:
    logits = rng().normal(0, 1, (6, 12, 9))
    logits[:, ::2, 0] += 9
    return {"steps": softmax(logits)}


def labels() -> Outputs:
    return {"label": rng().integers(0, 9, (16, 4))}


def labels_as_floats() -> Outputs:
    return {"label": rng().integers(0, 9, (1, 12)).astype(np.float32)}


def boxes(*, turned: bool = True) -> Outputs:
    """Two images, 100 anchors, three classes; two objects in the first, one in the second."""
    table = np.zeros((2, 100, 7), np.float32)
    table[:, :, :4] = [50, 50, 20, 20]
    table[0, 3] = [30, 30, 20, 20, 0.9, 0, 0]
    table[0, 50] = [80, 80, 10, 30, 0, 0.8, 0]
    table[1, 7] = [30, 40, 20, 20, 0, 0, 0.7]
    return {"detections": table.transpose(0, 2, 1) if turned else table}


def boxes_and_scores() -> Outputs:
    corners = np.tile(np.array([0.1, 0.1, 0.5, 0.5], np.float32), (2, 100, 1))
    background = np.tile(np.array([0.98, 0.01, 0.01], np.float32), (2, 100, 1))
    background[0, 5] = [0.1, 0.8, 0.1]
    return {"scores": background, "boxes": corners}


@pytest.mark.parametrize(
    ("make", "kind", "names"),
    [
        (scores, "argmax", ("scores",)),
        (probabilities, "argmax", ("p",)),
        (pixels, "argmax", ("classes",)),
        (embeddings, "cosine", ("embedding",)),
        (mask, "mask", ("map",)),
        (keys, "mask", ("sounding",)),
        (voice, "threshold", ("p",)),
        (faces, "argmax", ("face",)),
        (text, "text", ("steps",)),
        (labels, "equal", ("label",)),
        (labels_as_floats, "equal", ("label",)),
        (boxes, "boxes", ("detections",)),
        (boxes_and_scores, "boxes", ("boxes", "scores")),
    ],
)
def test_the_decision_is_seen_in_the_outputs_and_a_model_agrees_with_itself(
    make: Callable[[], Outputs], kind: str, names: tuple[str, ...]
) -> None:
    outputs = make()
    proxy = choose_proxy([outputs], [{"x": np.zeros((16, 3, 8, 8), np.float32)}])
    assert proxy == Proxy(kind, names)
    assert agreement(outputs, outputs, proxy) == 1.0
    assert all(repr(name) in proxy.name for name in names)


def test_a_decision_that_is_asked_for_is_looked_for_first() -> None:
    assert choose_proxy([faces()], [{"x": np.zeros((16, 3, 8, 8), np.float32)}], "threshold") == Proxy(
        "threshold", ("places",)
    )


@pytest.mark.parametrize(
    "outputs",
    [
        {
            "marks": np.tile(np.array([3.0, 4.5, 3.5], np.float32), (16, 1))
            + rng().random((16, 3)).astype(np.float32) / 3
        },
        {"marks": (3 + rng().normal(0, 0.4, (16, 3))).astype(np.float32)},
        {"signal": rng().normal(0, 1, (4, 100)).astype(np.float32)[:, :1]},
        {"scalar": np.float32(0.5)},
        {"broken": np.full((4, 10), np.nan, np.float32)},
    ],
)
def test_where_there_is_no_decision_there_is_no_proxy(outputs: Outputs) -> None:
    assert choose_proxy([{name: np.asarray(array) for name, array in outputs.items()}], [{}]) is None


def agreement(found: Outputs, wanted: Outputs, proxy: Proxy) -> float:
    return open_proxy(proxy, [{}], [wanted])(lambda feeds: found).value


@given(flipped=st.integers(0, 16))
def test_each_lost_sample_counts(flipped: int) -> None:
    wanted = scores()["scores"]
    found = wanted.copy()
    found[:flipped] = -found[:flipped]
    assert agreement({"s": found}, {"s": wanted}, Proxy("argmax", ("s",))) == pytest.approx(1 - flipped / 16)


def test_a_text_is_equal_when_repeats_and_blanks_are_left_out() -> None:
    def steps(*classes: int) -> Array:
        return np.eye(9, dtype=np.float32)[[list(classes)]][0][None] * 0.98 + 0.02 / 9

    wanted = steps(0, 3, 3, 0, 0, 4, 0, 0)
    proxy = Proxy("text", ("t",))
    assert agreement({"t": steps(3, 0, 0, 4, 4, 0, 0, 0)}, {"t": wanted}, proxy) == 1.0
    assert agreement({"t": steps(3, 0, 3, 4, 4, 0, 0, 0)}, {"t": wanted}, proxy) == 0.0
    assert agreement({"t": steps(0, 3, 3, 0, 0, 5, 0, 0)}, {"t": wanted}, proxy) == 0.0


@pytest.mark.parametrize("turned", [False, True])
def test_boxes_are_matched_by_place_and_class(turned: bool) -> None:
    proxy = Proxy("boxes", ("detections",))

    def changed(change: Callable[[Array], None]) -> float:
        found = boxes()["detections"].transpose(0, 2, 1).copy()
        change(found)
        return agreement({"detections": found.transpose(0, 2, 1)}, boxes(), proxy)

    def shift(table: Array) -> None:
        table[:, :, :2] += 2

    def lose(table: Array) -> None:
        table[0, 50, 5] = 0.1

    def confuse(table: Array) -> None:
        table[1, 7, 4:] = [0, 0.7, 0]

    assert changed(shift) == 1.0

    def waver(table: Array) -> None:
        table[0, 50, 5] = 0.21

    assert changed(waver) == 1.0
    assert changed(lose) == pytest.approx((2 + 2) / (2 + 3))
    assert changed(confuse) == pytest.approx((2 + 2) / (3 + 3))


def test_of_overlapping_boxes_of_a_class_one_is_kept() -> None:
    table = boxes(turned=True)["detections"].transpose(0, 2, 1).copy()
    table[0, 4] = [31, 31, 20, 20, 0.85, 0, 0]
    table[0, 5] = [31, 31, 20, 20, 0, 0.6, 0]
    maps = [table.transpose(0, 2, 1)]
    first, second = read_boxes(maps, layout_of(maps))
    assert first.scores.tolist() == pytest.approx([0.9, 0.8, 0.6])
    assert first.corners[0].tolist() == [20, 20, 40, 40]
    assert (first.classes.tolist(), second.classes.tolist()) == ([0, 1, 1], [2])


def test_a_proxy_that_does_not_exist_or_suit_is_refused() -> None:
    with pytest.raises(DataError, match=r"--proxy 'argmaxx' is none; did you mean 'argmax'\? known: auto, none"):
        choose_proxy([scores()], [{}], "argmaxx")
    with pytest.raises(DataError, match=r"--proxy boxes: no output suits it \(found 'scores' float32\[16, 10\]\)"):
        choose_proxy([scores()], [{}], "boxes")
    assert choose_proxy([scores()], [{}], "argmax") == Proxy("argmax", ("scores",))


def one_bad_layer(factor: float = 3000, samples: int = 192) -> tuple[ir.Model, Outputs]:
    """Two layers; a huge channel, which the second one ignores, leaves the others few codes between the first and it."""
    net = Net(seed=11)
    first = rng(1).normal(0, 1, (16, 8)).astype(np.float32)
    first[0] *= factor
    x = net.op("Gemm", [net.input("x", ["n", 8]), net.constant("a.weight", first)], "a", transB=1)
    second = rng(2).normal(0, 1, (6, 16)).astype(np.float32)
    second[:, 0] = 0
    y = net.op("Gemm", [x, net.constant("b.weight", second)], "b", transB=1)
    return net.model(y), {"x": rng(3).normal(0, 1, (samples, 8)).astype(np.float32)}


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outputs]:
    model, data = one_bad_layer()
    path = tmp_path_factory.mktemp("bad") / "net.onnx"
    save_onnx(model, path)
    return path, data


HAIR = 3.0
PLAIN = Method(calibrator="minmax", smooth=False, rounding="nearest")


def test_layers_that_lose_the_decision_are_left_in_float_by_default(bad: tuple[Path, Outputs], tmp_path: Path) -> None:
    path, data = bad
    record = edgekit.compress(path, tmp_path / "out", calibration=data, method=PLAIN).record
    assert record.proxy is not None and record.lifted is not None
    assert record.proxy.kind == "argmax" and record.proxy.before < 0.9 and record.proxy.after >= 0.98
    assert record.lifted.lifted == ("b",)
    assert any("with b in float" in note for note in record.notes)
    report = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    after = f"{record.proxy.after:.4g}"
    assert f"argmax agreement of 'b_y' with float: {after} in simulation, 0.98 wanted" in report
    [result] = edgekit.export(tmp_path / "out", "cuda-tensorrt")
    assert result.manifest.proxy is not None and result.manifest.proxy.value >= 0.98
    assert not any("under 0.98" in note for note in result.manifest.notes)


def test_one_layer_is_lifted_where_the_floor_holds_by_a_hair(tmp_path: Path) -> None:
    """Of 256 decisions, 4 lost are 0.984: on other samples that may be less."""
    model, data = one_bad_layer(HAIR, samples=1024)
    save_onnx(model, tmp_path / "net.onnx")
    record = edgekit.compress(tmp_path / "net.onnx", tmp_path / "out", calibration=data, method=PLAIN).record
    assert record.proxy is not None and record.lifted is not None
    assert 0.98 <= record.proxy.before < 0.99 <= record.proxy.after
    assert record.lifted.lifted == ("b",)
    assert any("at least 0.98 is met by more than a hair with b in float: 0.98" in note for note in record.notes)


def test_without_a_proxy_nothing_is_lifted(bad: tuple[Path, Outputs], tmp_path: Path) -> None:
    path, data = bad
    record = edgekit.compress(path, tmp_path / "out", calibration=data, method=PLAIN, proxy="none").record
    assert record.proxy is None and record.lifted is None


def test_a_floor_that_is_not_met_is_said(bad: tuple[Path, Outputs], tmp_path: Path) -> None:
    path, data = bad
    record = edgekit.compress(path, tmp_path / "out", calibration=data, method=PLAIN, max_drop="0dB").record
    assert record.proxy is not None and record.proxy.after < 0.98
    assert any("under 0.98: check the accuracy" in note for note in record.notes)


def test_a_proxy_beside_a_metric_is_refused(bad: tuple[Path, Outputs], tmp_path: Path) -> None:
    path, data = bad
    with pytest.raises(DataError, match=r"--proxy argmax and --evaluate are both given; .*: drop one of them"):
        edgekit.compress(path, tmp_path / "out", calibration=data, proxy="argmax", evaluate=lambda run: 1.0)


def test_what_a_decision_hangs_on_is_compared_apart() -> None:
    """Boxes in pixels would drown scores, which are at most 1."""
    focused = in_focus(Proxy("boxes", ("detections",)), boxes() | {"other": scores()["scores"]})
    assert {name: array.shape for name, array in focused.items()} == {"boxes": (2, 100, 4), "scores": (2, 100, 3)}
    assert focused["scores"].max() == pytest.approx(0.9)
    assert list(in_focus(Proxy("argmax", ("scores",)), scores() | {"state": np.zeros(3)})) == ["scores"]
    assert list(in_focus(Proxy("argmax", ("scores",)), {"state": np.zeros(3)})) == ["state"]


def test_an_error_in_a_share_counts_as_much_where_the_model_is_sure() -> None:
    """Of odds of one to a thousand, and of one to one; what cannot be told from nothing is nothing."""
    proxy = Proxy("argmax", ("p",))
    assert are_shares(proxy, [{"p": softmax(np.array([[7.0, 0.0]]))}])

    def focused(x: float) -> np.ndarray:
        return np.asarray(in_focus(proxy, {"p": softmax(np.array([[x, 0.0]]))}, shares=True)["p"])

    np.testing.assert_allclose(focused(7.1) - focused(7.0), focused(0.1) - focused(0.0), atol=1e-3)
    beyond = in_focus(proxy, {"p": np.array([[1.002, -0.002]], np.float32)}, shares=True)["p"]
    assert np.isfinite(beyond).all() and abs(beyond[0, 0]) < 14
    logits = {"p": np.array([[3.0, -1.0]], np.float32)}
    assert not are_shares(proxy, [logits]) and in_focus(proxy, logits)["p"] is logits["p"]
    assert not are_shares(Proxy("mask", ("p",)), [{"p": np.zeros((1, 2))}])


def test_one_share_beside_shares_of_classes_is_a_decision() -> None:
    """Gates of experts, say; several would be places."""
    outputs = {"score": rng().random((16, 1)).astype(np.float32), "gates": softmax(rng().normal(0, 1, (16, 4)))}
    assert choose_proxy([outputs], [{}]) == Proxy("threshold", ("score",))


def test_boxes_written_as_offsets_on_grids_are_found_in_pixels() -> None:
    """8 x 8, 4 x 4 and 2 x 2 cells of 8, 16 and 32 pixels; the sizes of all but one are less than a cell."""
    table = np.zeros((2, 84, 7), np.float32)
    table[:, :, 2:4] = -1
    table[0, 8 + 3] = [2.5, 0.5, np.log(2), np.log(4), 0.9, 0.95, 0]
    table[1, 64 + 5] = [0.25, 0.5, 0, -1, 0.8, 0, 0.9]
    first, second = read_boxes([table], layout_of([table]))
    assert first.corners.tolist() == [pytest.approx([(3 + 2.5) * 8 - 8, 12 - 16, (3 + 2.5) * 8 + 8, 12 + 16])]
    low = 16 * np.exp(-1) / 2
    assert second.corners.tolist() == [pytest.approx([20 - 8, 24 - low, 20 + 8, 24 + low])]
    assert both_found(first, first).tolist() == [1.0, 1.0]


def test_numbers_that_are_neither_corners_nor_sizes_are_no_boxes() -> None:
    table = rng().normal(0, 3, (2, 90, 7)).astype(np.float32)
    table[:, :, 4:] = rng().uniform(0, 1, (2, 90, 3))
    found = choose_proxy([{"t": table}], [{}])
    assert found is None or found.kind != "boxes"


def test_boxes_beside_prototypes_of_masks_have_no_scores_in_their_coefficients() -> None:
    coefficients = rng().normal(0, 4, (2, 100, 8)).astype(np.float32)
    table = np.concatenate([boxes(turned=False)["detections"], coefficients], axis=2).transpose(0, 2, 1)
    outputs = {"table": table, "prototypes": rng().normal(0, 1, (2, 8, 16, 16)).astype(np.float32)}
    assert choose_proxy([outputs], [{}]) == Proxy("boxes", ("table", "prototypes"))
    maps = [outputs["table"], outputs["prototypes"]]
    first, second = read_boxes(maps, layout_of(maps))
    assert (first.classes.tolist(), second.classes.tolist()) == ([0, 1], [2])


def test_probabilities_come_before_other_numbers() -> None:
    offsets = {"box": rng().normal(0, 1, (16, 4)).astype(np.float32)}
    assert choose_proxy([offsets | probabilities()], [{}]) == Proxy("argmax", ("p",))


def test_a_text_may_be_read_from_scores_that_are_no_probabilities() -> None:
    logits = rng().normal(0, 1, (6, 12, 40))
    logits[:, ::2, 0] += 9
    assert choose_proxy([{"steps": logits}], [{}]) == Proxy("text", ("steps",))
    assert choose_proxy([{"steps": logits[:, :, :9]}], [{}]) != Proxy("text", ("steps",))


def test_a_text_may_come_with_its_steps_first() -> None:
    logits = rng().normal(0, 1, (12, 1, 40))
    logits[::2, :, 0] += 9
    other = logits.copy()
    other[1, 0, 7] += 20
    assert choose_proxy([{"steps": logits}] * 3, [{}] * 3) == Proxy("text", ("steps",))
    evaluate = open_proxy(Proxy("text", ("steps",)), [{"x": np.array(0)}, {"x": np.array(1)}], [{"steps": logits}] * 2)
    assert evaluate(lambda feeds: {"steps": logits}).value == 1.0
    assert evaluate(lambda feeds: {"steps": other if feeds["x"] else logits}).value == 0.5


@pytest.mark.parametrize("as_float", [False, True])
def test_layers_behind_a_label_are_ranked_by_the_scores_that_it_is_chosen_from(as_float: bool, tmp_path: Path) -> None:
    model, data = one_bad_layer()
    label = ir.node("ArgMax", [model.graph.outputs[0]], {"axis": 1, "keepdims": 0}, name="label")
    last = ir.node("Cast", label.outputs, {"to": 1 if as_float else 6}, name="cast")
    last.outputs[0].name, last.outputs[0].shape = "label_y", ir.Shape(["n"])
    last.outputs[0].type = ir.TensorType(ir.DataType.FLOAT if as_float else ir.DataType.INT32)
    model.graph.extend([label, last])
    model.graph.outputs[:] = last.outputs
    save_onnx(model, tmp_path / "net.onnx")
    record = edgekit.compress(tmp_path / "net.onnx", tmp_path / "out", calibration=data, method=PLAIN).record
    assert record.proxy is not None and record.lifted is not None
    assert (record.proxy.kind, record.lifted.lifted) == ("equal", ("b",))
    assert record.proxy.before < 0.9 and record.proxy.after >= 0.98


def test_a_metric_may_lose_two_points_unasked(bad: tuple[Path, Outputs], tmp_path: Path) -> None:
    """More, and layers are left in float; with --proxy none they are not, with --max-drop as many as that says."""
    path, data = bad
    wanted = run(path, data)["b_y"].argmax(axis=1)

    def agreement_of(runner: Any) -> float:
        return float((runner(data)["b_y"].argmax(axis=1) == wanted).mean())

    def compressed(name: str, **options: Any) -> Compressed:
        return edgekit.compress(
            path, tmp_path / name, calibration=data, method=PLAIN, evaluate=agreement_of, **options
        ).record

    record = compressed("default")
    assert record.proxy is None and record.lifted is not None and record.lifted.lifted == ("b",)
    assert record.simulated_metric is not None and record.simulated_metric.value >= 0.98
    assert any(note.startswith("agreement_of at least 0.98 is met with b in float: 0.") for note in record.notes)
    plain = compressed("plain", proxy="none")
    assert plain.lifted is None and plain.simulated_metric is not None and plain.simulated_metric.value < 0.9
    loose = compressed("loose", max_drop=99)
    assert loose.lifted is not None and loose.lifted.lifted == ()


def test_few_boxes_are_told() -> None:
    proxy = Proxy("boxes", ("detections",))
    table = boxes()
    found = sum(len(one.scores) for one in read_boxes([table["detections"]], layout_of([table["detections"]])))
    assert count_decisions(proxy, [table, table]) == 2 * found > 0
    record = ProxyRecord(name="F1 of boxes", kind="boxes", floor=0.98, before=1.0, after=1.0, decisions=29)
    [note] = decision_notes(record)
    assert "29 boxes only, so that each counts up to 3.4 points" in note
    assert not list(decision_notes(record.model_copy(update={"decisions": 200})))


def test_few_samples_are_told_where_each_is_right_or_wrong(bad: tuple[Path, Outputs], tmp_path: Path) -> None:
    """Not of cosines and masks, whose shares have no steps."""
    path, data = bad
    few = {name: array[:48] for name, array in data.items()}
    record = edgekit.compress(path, tmp_path / "out", calibration=few, method=PLAIN).record
    assert record.proxy is not None and record.proxy.kind == "argmax"
    [note] = [note for note in record.notes if "judged by" in note]
    assert "is judged by 48 samples only, so that each counts up to 2.1 points" in note
    assert not list(decision_notes(record.proxy.model_copy(update={"kind": "cosine", "after": 1.0})))
