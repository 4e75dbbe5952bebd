from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit.demo import run_demo
from edgekit.errors import OutputError
from edgekit.records import read_compressed

pytest.importorskip("sklearn", reason="scikit-learn, whose digits the demo trains on, is not installed")

Cli = Callable[..., Any]


@pytest.fixture(autouse=True)
def short_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgekit.training.digits.EPOCHS", 4)


def test_the_demo_goes_the_way_of_any_user(tmp_path: Path, cli: Cli) -> None:
    steps: list[list[str]] = []
    said: list[str] = []

    def run_step(arguments: list[str]) -> None:
        steps.append(arguments)
        if arguments[0] == "compress":
            assert cli(*arguments).code == 0

    out = tmp_path / "demo"
    run_demo(out, run_step, said.append)
    assert [step[0] for step in steps] == ["compress", "export", "benchmark"]
    assert {path.name for path in out.iterdir()} == {
        "digits.pt",
        "digits_net.py",
        "calibration.npz",
        "test.npz",
        "compressed",
    }
    with np.load(out / "calibration.npz") as calibration, np.load(out / "test.npz") as test:
        assert (calibration["image"].shape, test["image"].shape) == ((320, 1, 8, 8), (500, 1, 8, 8))
        shown = {image.tobytes() for image in test["image"]} & {image.tobytes() for image in calibration["image"]}
    assert not shown

    record = read_compressed(out / "compressed")
    assert record.layers[0].name == "stem.0"
    assert record.float_metric is not None
    assert record.simulated_metric is not None
    assert record.float_metric.value > 0.8
    assert record.simulated_metric.value > record.float_metric.value - 0.02
    assert (
        said[1]
        == f"{out / 'digits.pt'}: {100 * record.float_metric.value:.2f} % top-1 in float, on digits it was not trained on"
    )
    targets = steps[1][3::2]
    assert {"arm-onnxruntime", "x86-onnxruntime"} <= set(targets)
    left_out = {line.split()[0] for line in said[2:]}
    assert left_out | set(targets) == {"arm-onnxruntime", "cuda-tensorrt", "x86-onnxruntime", "x86-openvino"}
    assert not left_out & set(targets)


def test_a_step_that_fails_ends_the_demo_with_its_code(
    tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgekit.training.digits.EPOCHS", 1)
    (tmp_path / "digits_net.py").write_text("")
    (tmp_path / "compressed").mkdir()
    (tmp_path / "compressed" / "thesis.tex").write_text("mine")
    done = cli("demo", "-o", tmp_path)
    assert done.code == 8
    assert "$ edgekit compress " in done.stdout
    assert "$ edgekit export " not in done.stdout
    assert done.stderr.startswith(f"edgekit: {tmp_path / 'compressed'}: is not empty and holds no compress.json")


def test_a_folder_with_other_files_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match=r"holds no digits_net\.py, so it is not the demo's folder"):
        run_demo(tmp_path, lambda arguments: None, lambda line: None)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
