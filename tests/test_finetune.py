"""Training as a step of `compress`: from the command line and from Python, with labels and without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torch.nn import functional as F

import edgekit
from edgekit.cli import main
from edgekit.distillation import Distillation
from edgekit.errors import DataError, EdgekitError, SourceError, TargetError
from edgekit.finetune import Finetune
from edgekit.graph.run import Session
from edgekit.method import LayerMethod, Method
from edgekit.pipelines.recipe import few_bits, load_recipe, merged_finetune
from edgekit.pruning import Prune
from edgekit.schedule import Schedule

NOISE = 1.5
"""Of the images: enough for some of them to be mistaken."""
FACTORY = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.bn = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, image):
        x = torch.relu(self.bn(self.first(image)))
        x = torch.relu(self.second(x) + x)
        return self.head(x.mean((2, 3)))


def net():
    return Net()
"""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.bn(self.first(image)))
        x = F.relu(self.second(x) + x)
        return self.head(x.mean((2, 3)))


def labelled(count: int, seed: int) -> dict[str, np.ndarray]:
    """Stripes and spots of four kinds, in noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, count)
    y, x = np.mgrid[:12, :12]
    kinds = np.stack([np.sin(x), np.sin(y), np.sin(x + y), np.sin(x) * np.sin(y)])
    image = kinds[labels, None] + rng.normal(0, NOISE, (count, 1, 12, 12))
    return {"image": image.astype(np.float32), "labels": labels}


@pytest.fixture(scope="module")
def learned() -> nn.Module:
    """A network that knows the kinds."""
    torch.manual_seed(0)
    net, data = Net().train(), labelled(512, 0)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(60):
        loss = F.cross_entropy(net(torch.from_numpy(data["image"])), torch.from_numpy(data["labels"]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


@pytest.fixture(scope="module")
def files(learned: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetune")
    torch.save(learned.state_dict(), folder / "net.pt")
    (folder / "factory.py").write_text(FACTORY)
    np.savez(folder / "train.npz", **labelled(512, 1))
    np.savez(folder / "test.npz", **labelled(400, 2))
    np.savez(folder / "calibration.npz", image=labelled(128, 3)["image"])
    return folder


def top1(path: Path) -> float:
    data = labelled(400, 2)
    session = Session(path, optimize=False)
    [scores] = session.run({"image": data["image"]}).values()
    return float((scores.argmax(1) == data["labels"]).mean())


SHORT = Schedule(steps=40, batch_size=64, learning_rate=3e-3, track="none")


def test_four_bits_are_trained_back(learned: nn.Module, files: Path, tmp_path: Path) -> None:
    """What rounding to two bits loses, training wins back; and what was trained is what is exported."""
    calibration = str(files / "calibration.npz")
    method = Method(weights="int2", precision="int2")
    plain = edgekit.compress(
        learned,
        tmp_path / "ptq",
        calibration=calibration,
        method=method,
        evaluate=str(files / "test.npz"),
        proxy="none",
    ).record
    plan = Finetune(qat=True, data=str(files / "train.npz"), schedule=SHORT)
    record = edgekit.compress(
        learned,
        tmp_path / "qat",
        calibration=calibration,
        method=method,
        evaluate=str(files / "test.npz"),
        finetune=plan,
        target="x86-onnxruntime",
    ).record
    assert plain.simulated_metric is not None and record.simulated_metric is not None
    found = record.finetuned
    assert found is not None and found.before is not None and found.start is not None and found.after is not None
    assert found.steps == 40 and found.samples == 512
    assert all(part in found.learned_from for part in ("labels", "response", "feature"))  # as few bits need it
    assert found.last_loss < found.first_loss
    assert record.simulated_metric.value > plain.simulated_metric.value + 0.1
    # Scores of two bits tie, in 4 of 100 images: then the last bit of a float decides.
    assert abs(found.after - record.simulated_metric.value) < 0.03
    assert record.lifted is None and record.proxy is None
    assert (
        record.float_metric is not None and record.float_metric.value == found.before
    )  # not of weights that miss their rounding
    [result] = edgekit.export(tmp_path / "qat", "x86-onnxruntime")
    assert abs(top1(result.folder / "model.onnx") - record.simulated_metric.value) < 0.01
    assert "trained: quantization-aware training, learned scales" in (tmp_path / "qat" / "report.md").read_text()


@pytest.mark.parametrize(
    ("method", "few"), [(Method(), False), (Method(layers=(LayerMethod(match="*", weights="int4"),)), True)]
)
def test_labels_alone_teach_eight_bits(
    method: Method, few: bool, learned: nn.Module, files: Path, tmp_path: Path
) -> None:
    plan = Finetune(qat=True, data=str(files / "train.npz"), schedule=SHORT.model_copy(update={"steps": 2}))
    calibration = str(files / "calibration.npz")
    found = edgekit.compress(learned, tmp_path / "out", calibration=calibration, method=method, finetune=plan).record
    assert found.finetuned is not None and (found.finetuned.learned_from == "labels") is not few


def test_without_labels_the_float_model_teaches(learned: nn.Module, files: Path, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in learned.state_dict().items()}
    record = edgekit.compress(
        learned,
        tmp_path / "out",
        calibration=str(files / "calibration.npz"),
        evaluate=str(files / "test.npz"),
        method=Method(weights="int2", precision="int2"),
        finetune=Finetune(qat=True, schedule=SHORT),
    ).record
    found = record.finetuned
    assert found is not None and "response" in found.learned_from and found.samples == 128
    assert found.before is not None and found.start is not None and found.after is not None
    assert found.after - found.start > 0.5 * (found.before - found.start) > 0.05
    assert all(torch.equal(value, before[name]) for name, value in learned.state_dict().items())


@pytest.mark.parametrize("form", ["named", "array", "npy"])
@pytest.mark.parametrize("how", [{"finetune": Finetune(qat=True)}, {"prune": Prune(ratio=0.5)}])
def test_calibration_data_without_names_is_trained_on_in_batches_too(
    how: dict[str, Any], form: str, learned: nn.Module, tmp_path: Path
) -> None:
    images = labelled(128, 2)["image"]
    np.save(tmp_path / "images.npy", images)
    calibration = {"named": {"image": images}, "array": images, "npy": tmp_path / "images.npy"}[form]
    record = edgekit.compress(learned, tmp_path / "out", calibration=calibration, samples=128, **how).record
    told = record.finetuned.told if record.finetuned else record.pruned.told if record.pruned else ""
    assert "on 128 samples" in told
    assert ": 6 steps" in told


@pytest.mark.parametrize("kind", ["feature", "attention,similarity"])
def test_features_teach_a_student_that_is_a_graph(kind: str, learned: nn.Module, files: Path, tmp_path: Path) -> None:
    plan = Finetune(qat=True, distill=Distillation(kind=kind, pairs="second"), schedule=SHORT)
    record = edgekit.compress(
        learned, tmp_path / "out", calibration=str(files / "calibration.npz"), finetune=plan
    ).record
    assert record.finetuned is not None and "second" in record.finetuned.learned_from
    assert record.finetuned.last_loss < record.finetuned.first_loss


def test_fine_tuning_alone_is_training_too(files: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    plan = Finetune(data=str(files / "train.npz"), schedule=SHORT.model_copy(update={"learning_rate": 1e-2}))
    record = edgekit.compress(
        Net(),
        tmp_path / "out",
        calibration=str(files / "calibration.npz"),
        evaluate=str(files / "test.npz"),
        finetune=plan,
    ).record
    assert record.finetuned is not None and record.finetuned.before is not None and record.finetuned.after is not None
    assert record.finetuned.before < 0.4 and record.finetuned.after > record.finetuned.before + 0.25
    assert record.float_metric is not None and abs(record.float_metric.value - record.finetuned.after) < 0.01


def test_the_command_line(files: Path, tmp_path: Path) -> None:
    words = [
        "compress",
        files / "net.pt",
        "--model",
        f"{files / 'factory.py'}:net",
        "--calibration",
        files / "calibration.npz",
    ]
    words += [
        "--qat",
        "--train-data",
        files / "train.npz",
        "--evaluate",
        files / "test.npz",
        "--bits",
        "4",
        "--steps",
        12,
    ]
    words += ["--lr", "1e-3", "--batch-size", 32, "--track", "none", "-o", tmp_path / "out"]
    result = CliRunner().invoke(main, list(map(str, words)))
    assert result.exit_code == 0, result.output
    assert (
        "quantization-aware training, learned scales, 12 steps of adamw at 0.001 on 512 samples, from labels"
        in result.output
    )
    record = json.loads((tmp_path / "out" / "compress.json").read_text())
    assert record["source"]["name"] == "net.pt" and record["method"]["weights"] == "int4"
    assert record["finetuned"]["steps"] == 12
    again = CliRunner().invoke(main, list(map(str, words)))  # a finished training is not repeated
    assert again.exit_code == 0 and "12 steps (from step 12 on)" in again.output
    assert json.loads((tmp_path / "out" / "compress.json").read_text())["model_sha256"] == record["model_sha256"]


def test_a_recipe_says_the_same(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(
        '[finetune]\nqat = true\ndata = "train.zip"\n[finetune.schedule]\nepochs = 5\nlearning_rate = 0.01\n'
        '[finetune.distill]\nkind = "response, rkd"\n[finetune.augment]\nflip = true\n'
    )
    plan = load_recipe(path).finetune
    assert plan is not None and plan.qat and plan.augment.flip and plan.schedule.epochs == 5
    assert plan.distill is not None and plan.distill.kind == ("response", "rkd")
    given = {"schedule__steps": 9, "distill__temperature": 2.0, "scales": "tracked"}
    merged = merged_finetune(plan, given)
    assert merged is not None and merged.distill is not None
    assert (merged.schedule.steps, merged.schedule.epochs, merged.schedule.learning_rate) == (9, None, 0.01)
    assert (merged.distill.temperature, merged.distill.kind, merged.scales) == (2.0, ("response", "rkd"), "tracked")
    assert merged_finetune(None, {}) is None


def bad(learned: nn.Module, files: Path, name: str) -> tuple[type[EdgekitError], str, dict[str, Any]]:
    """An error, its words, and the arguments that it comes from."""
    wrong = {"image": labelled(64, 0)["image"], "labels": np.full(64, 7)}
    return {
        "onnx": (SourceError, "cannot be trained", {"source": files / "net.onnx"}),
        "labels": (DataError, "7", {"finetune": Finetune(qat=True, data=wrong, schedule=SHORT)}),
        "layer": (SourceError, "did you mean 'second'", {
            "finetune": Finetune(distill=Distillation(kind="feature", pairs="secnd"), schedule=SHORT)
        }),
        "teacher": (DataError, "--teacher", {"finetune": Finetune(teacher=3, schedule=SHORT)}),
        "empty": (DataError, "no samples|holds", {"finetune": Finetune(data={"image": labelled(0, 0)["image"]}, schedule=SHORT)}),
    }[name]  # fmt: skip


@pytest.mark.parametrize("name", ["onnx", "labels", "layer", "teacher", "empty"])
def test_what_cannot_be_trained_says_why(name: str, learned: nn.Module, files: Path, tmp_path: Path) -> None:
    if name == "onnx":
        edgekit.compress(learned, tmp_path / "first", calibration=str(files / "calibration.npz"), proxy="none")
        (tmp_path / "first" / "model.onnx").rename(files / "net.onnx")
    kind, words, given = bad(learned, files, name)
    arguments = {"source": learned, "finetune": Finetune(qat=True, schedule=SHORT), **given}
    with pytest.raises(kind, match=words):
        edgekit.compress(out=tmp_path / "out", calibration=str(files / "calibration.npz"), **arguments)
    assert not (tmp_path / "out").exists()


def test_bits_and_types_exclude_each_other() -> None:
    assert few_bits("4", {}) == {"weights": "int4", "precision": "int4"}
    with pytest.raises(TargetError, match="--bits 4 and --weights int8"):
        few_bits("4", {"weights": "int8"})
