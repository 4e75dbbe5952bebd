"""Calibration without data: images that match a network's BatchNorm statistics, and what is refused."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import edgekit
from conftest import TinyFiles
from edgekit.data import InputSpec, Preprocess, open_data
from edgekit.errors import DataError, SourceError
from edgekit.graph.io import load_annotated
from edgekit.graph.run import Session
from edgekit.lowering.qdq import lower_qdq
from edgekit.pipelines.sources import input_specs
from edgekit.reference import resolve_reference
from edgekit.target import load_target
from edgekit.training.checkpoint import load_checkpoint
from edgekit.training.synthetic import module_inputs, synthetic_images, synthetic_samples

ROOT = Path(__file__).resolve().parent.parent
ZOO = ROOT.parent / "shared" / "zoo"
SHAPE = (3, 12, 12)
FLOAT, WHOLE = np.dtype(np.float32), np.dtype(np.int64)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trained(*, seed: int = 0) -> nn.Sequential:
    """Two BatchNorms whose statistics are those of smooth, shifted images; a Relu that works in place; in training mode."""
    torch.manual_seed(seed)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)
    )
    for _ in range(60):
        coarse = torch.randn(16, 3, 3, 3)
        module(nn.functional.interpolate(coarse, scale_factor=4, mode="bilinear") + torch.rand(16, 3, 1, 1))
    return module


def distance(module: nn.Sequential, images: NDArray[Any]) -> float:
    """How far the statistics of what the BatchNorms read are from the running ones."""
    x, total = torch.from_numpy(images), 0.0
    with torch.no_grad():
        for child in module.eval():
            if isinstance(child, nn.BatchNorm2d):
                assert child.running_mean is not None and child.running_var is not None
                total += float((x.mean((0, 2, 3)) - child.running_mean).square().sum())
                total += float((x.std((0, 2, 3)) - child.running_var.sqrt()).square().sum())
            x = child(x)
    return total


def test_batchnorms_read_what_they_read_in_training() -> None:
    module = trained()
    images = synthetic_images(module, SHAPE, 24, seed=0, steps=30)
    noise = synthetic_images(module, SHAPE, 24, seed=0, steps=0)
    assert images.shape == (24, *SHAPE) and images.dtype == FLOAT
    assert distance(module, images) < 0.1 * distance(module, noise)


def test_the_module_stays_as_it_is_and_the_images_depend_on_the_seed_alone() -> None:
    module = trained()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = torch.get_rng_state()
    first = synthetic_images(module, SHAPE, 5, seed=1, steps=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(child.training for child in module.modules())
    assert all(p.grad is None and p.requires_grad for p in module.parameters())
    torch.manual_seed(random.randrange(1000))
    assert np.array_equal(first, synthetic_images(module, SHAPE, 5, seed=1, steps=3))
    assert not np.array_equal(first, synthetic_images(module, SHAPE, 5, seed=2, steps=3))


def test_an_exported_program_gives_the_images_of_its_module(tmp_path: Path) -> None:
    module = trained().eval()
    dynamic = {"input": {0: torch.export.Dim.AUTO}}
    torch.export.save(
        torch.export.export(module, (torch.zeros(2, *SHAPE),), dynamic_shapes=dynamic), tmp_path / "net.pt2"
    )
    program = load_checkpoint(tmp_path / "net.pt2", factory=None)
    expected = synthetic_images(module, SHAPE, 6, seed=0, steps=5)
    np.testing.assert_allclose(synthetic_images(program, SHAPE, 6, seed=0, steps=5), expected, rtol=0, atol=1e-4)
    assert module_inputs(program, SHAPE) == [InputSpec("input", FLOAT, (None, *SHAPE))]


def test_without_batchnorm_and_for_onnx_files_it_is_standard_normal_numbers() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True))
    images = synthetic_samples(plain, module_inputs(plain, SHAPE), 100, seed=0)["input"]
    two = [InputSpec("a", FLOAT, (None, 3, 8)), InputSpec("b", np.dtype(np.float16), (None, 40))]
    samples = synthetic_samples(None, two, 100, seed=0)
    assert {name: (array.shape, array.dtype) for name, array in samples.items()} == {
        "a": ((100, 3, 8), FLOAT),
        "b": ((100, 40), np.dtype(np.float16)),
    }
    for array in (images, *samples.values()):
        assert abs(float(array.mean(dtype=np.float64))) < 0.06
        assert abs(float(array.std(dtype=np.float64)) - 1) < 0.06


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (InputSpec("ids", WHOLE, (None, 48)), "'ids'.*whole numbers.*real data"),
        (InputSpec("flag", np.dtype(bool), (None,)), "'flag'.*real data"),
        (InputSpec("image", FLOAT, (None, 3, None, 224)), "'image'.*static size"),
        (InputSpec("scale", FLOAT, ()), "'scale'"),
    ],
)
def test_what_it_cannot_make_up_is_refused(spec: InputSpec, words: str) -> None:
    with pytest.raises(DataError, match=words):
        synthetic_samples(None, [spec], 4, seed=0)


class Pair(nn.Module):
    def forward(self, image: Tensor, ids: Tensor) -> Tensor:
        return image + ids


def test_a_shape_or_a_number_of_inputs_that_does_not_fit_is_refused() -> None:
    with pytest.raises(DataError, match=r"Sequential does not run on .*4, 1, 12, 12.*--input-shape"):
        synthetic_images(trained(), (1, 12, 12), 4, seed=0, steps=1)
    with pytest.raises(DataError, match=r"Pair.forward needs the inputs image, ids"):
        module_inputs(Pair(), SHAPE)


@pytest.mark.skipif(not (ZOO / "resnet20-12fca82f.th").is_file(), reason="the model zoo is not here")
def test_resnet20_calibrated_on_them_agrees_with_float(tmp_path: Path) -> None:
    factory = resolve_reference(
        f"{ROOT / 'tests' / 'models' / 'resnet20.py'}:resnet20", error=SourceError, what="model"
    )
    assert callable(factory)
    module = load_checkpoint(ZOO / "resnet20-12fca82f.th", factory=factory)
    inputs = module_inputs(module, (3, 32, 32))
    assert _agreement(module, synthetic_samples(module, inputs, 24, seed=0), tmp_path / "out") >= 0.95


def _agreement(module: nn.Module, calibration: dict[str, NDArray[Any]], out: Path) -> float:
    """On 200 test images, the share whose class int8 does not change."""
    method = edgekit.Method(calibrator="mse", rounding="nearest")
    graph = load_annotated(edgekit.compress(module, out, calibration=calibration, samples=16, method=method).model)
    preprocess = Preprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    test = open_data(ZOO / "cifar10-jpeg-test.zip", preprocess=preprocess).bind(input_specs(graph))
    feeds = next(iter(test.batches(200))).feeds
    wanted, got = (
        next(iter(Session(model, optimize=True).run(feeds).values())).argmax(1)
        for model in (graph, lower_qdq(graph, load_target("portable")))
    )
    return float(np.mean(wanted == got))


def test_an_onnx_file_is_compressed_without_data(tiny: TinyFiles, tmp_path: Path) -> None:
    record = edgekit.compress(tiny.model, tmp_path / "out", calibration="synthetic").record
    assert any("synthetic data" in note for note in record.notes)
    assert record.samples > 32
    (result,) = edgekit.export(tmp_path / "out", "x86-onnxruntime")
    assert result.manifest.proof.agrees


def test_a_checkpoint_without_data_needs_the_shape_of_a_sample(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
    with pytest.raises(
        DataError, match=r"--input-shape is None: a torch model does not say what it reads; give .*3x224x224"
    ):
        edgekit.compress(module, tmp_path / "out", calibration="synthetic")
    with pytest.raises(DataError, match="--input-shape is '3x-1'"):
        edgekit.compress(module, tmp_path / "out", calibration="synthetic", input_shape="3x-1")
    assert list(tmp_path.iterdir()) == []
    record = edgekit.compress(module, tmp_path / "out", calibration="synthetic", input_shape="3x12x12").record
    assert any("synthetic data" in note for note in record.notes)
