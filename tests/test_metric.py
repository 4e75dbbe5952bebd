from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from edgekit.data import InputSpec, Preprocess, open_data
from edgekit.errors import DataError
from edgekit.metric import Runner, open_metric, top1
from edgekit.records import Metric

Array = NDArray[Any]
INPUT = InputSpec("x", np.dtype(np.float32), (None, 3))


def scores(feeds: Mapping[str, Array]) -> dict[str, Array]:
    """A model whose highest score is that of the largest number in `x`."""
    return {"scores": feeds["x"] * 2, "other": feeds["x"][:, 0]}


def labelled(path: Path, *, labels: Array, count: int = 120) -> Path:
    np.savez(path, x=np.eye(3, dtype=np.float32)[np.arange(count) % 3], labels=labels)
    return path


def test_top1_is_the_share_of_right_decisions_over_all_batches(tmp_path: Path) -> None:
    labels = np.arange(120) % 3
    labels[:30] = (labels[:30] + 1) % 3
    metric = open_metric(labelled(tmp_path / "test.npz", labels=labels), [INPUT])(scores)
    assert metric == Metric(name="top-1", value=0.75)


def test_a_function_gets_a_runner_and_gives_the_number() -> None:
    def spread(run: Runner) -> float:
        return float(np.ptp(run({"x": np.array([[1, 5, 2]], np.float32)})["scores"]))

    assert open_metric(spread, [INPUT])(scores) == Metric(name="spread", value=8.0)


def test_a_function_is_found_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "quality.py").write_text("def negative_loss(run):\n    return -run({'x': 3})\n")
    metric = open_metric(f"{tmp_path / 'quality.py'}:negative_loss", [INPUT])
    assert metric(lambda feeds: feeds["x"]) == Metric(name="negative_loss", value=-3.0)


@pytest.mark.parametrize(
    ("returned", "complaint"),
    [
        (float("nan"), r"--evaluate quality returned nan; it must return a finite number"),
        (float("-inf"), r"--evaluate quality returned -inf; it must return a finite number"),
        ("0.9 %", r"--evaluate quality returned '0\.9 %'; it must return one number, higher is better"),
        (None, r"--evaluate quality returned None; it must return one number"),
        ({"top1": 0.9}, r"--evaluate quality returned \{'top1': 0\.9\}; it must return one number"),
    ],
)
def test_what_is_no_number_is_refused(returned: object, complaint: str) -> None:
    def quality(run: Runner) -> Any:
        return returned

    with pytest.raises(DataError, match=complaint):
        open_metric(quality, [INPUT])(scores)


@pytest.mark.parametrize("value", [np.float32(0.5), np.array(0.5), np.array([0.5]), 0.5])
def test_numbers_come_in_many_types(value: Any) -> None:
    if isinstance(value, np.ndarray) and value.ndim:
        value = value.item()
    assert open_metric(lambda run: value, [INPUT])(scores).value == 0.5


def test_a_function_that_raises_is_named_with_its_line() -> None:
    def quality(run: Runner) -> float:
        return run({"x": np.zeros((1, 3), np.float32)})["no such output"].mean()  # type: ignore[no-any-return]

    with pytest.raises(
        DataError, match=r"--evaluate quality raised KeyError: 'no such output' \(test_metric\.py, line \d+\)"
    ):
        open_metric(quality, [INPUT])(scores)


def test_a_function_that_leaves_python_is_stopped() -> None:
    def quality(run: Runner) -> float:
        sys.exit(0)

    with pytest.raises(DataError, match=r"--evaluate quality raised SystemExit"):
        open_metric(quality, [INPUT])(scores)


def test_data_without_labels_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "plain.npz", x=np.zeros((2, 3), np.float32))
    with pytest.raises(
        DataError, match=r"plain\.npz: has no labels; sort images into class folders, or add an array 'labels'"
    ):
        open_metric(tmp_path / "plain.npz", [INPUT])


def test_a_reference_that_is_no_function_is_refused(tmp_path: Path) -> None:
    (tmp_path / "quality.py").write_text("LIMIT = 3\n")
    with pytest.raises(DataError, match=r"--evaluate '.*quality\.py:LIMIT' is a int; give a function that takes `run`"):
        open_metric(f"{tmp_path / 'quality.py'}:LIMIT", [INPUT])


def test_labels_beyond_the_models_classes_are_refused(tmp_path: Path) -> None:
    labels = np.arange(120) % 4
    with pytest.raises(DataError, match=r"label 3 is out of range: the model has 3 classes"):
        open_metric(labelled(tmp_path / "test.npz", labels=labels), [INPUT])(scores)


def test_a_model_without_scores_needs_a_function(tmp_path: Path) -> None:
    data = open_data(labelled(tmp_path / "test.npz", labels=np.arange(120) % 3)).bind([INPUT])
    with pytest.raises(
        DataError, match=r"top-1 needs an output of shape \(N, classes\), found \(50,\); give --evaluate"
    ):
        top1(data)(lambda feeds: {"y": feeds["x"][:, 0]})


def test_preprocessing_is_for_images_and_other_data_ignores_it(
    tmp_path: Path, image_folder: Callable[[Path], Path]
) -> None:
    preprocess = Preprocess(channels="L", size=(1, 3), scale=1.0)
    arrays = labelled(tmp_path / "test.npz", labels=np.arange(120) % 3)
    assert open_metric(arrays, [INPUT], preprocess=preprocess)(scores).value == 1.0

    image = InputSpec("x", np.dtype(np.float32), (None, 1, 1, 3))
    seen: list[Array] = []

    def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
        seen.append(feeds["x"])
        return {"scores": feeds["x"].reshape(-1, 3)}

    assert open_metric(image_folder(tmp_path), [image], preprocess=preprocess)(run).value == 1.0
    assert np.concatenate(seen).max() == 255


@pytest.fixture
def image_folder() -> Callable[[Path], Path]:
    """Three classes of images, one bright pixel in each; the class is where it is."""

    def make(folder: Path) -> Path:
        for label in range(3):
            pixels = np.zeros((1, 3), np.uint8)
            pixels[0, label] = 255
            (folder / "images" / str(label)).mkdir(parents=True)
            Image.fromarray(pixels).save(folder / "images" / str(label) / "a.png")
        return folder / "images"

    return make
