"""The whole way, on two networks: the demo's, trained here, and ResNet-20 from a checkpoint as users have them.

What `benchmarks/resnet20.py` claims is tested here, but for the timings.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import edgekit
from edgekit.backend import Artifact, get_backend
from edgekit.data import Preprocess, open_data
from edgekit.errors import SourceError
from edgekit.graph.io import load_annotated, load_onnx
from edgekit.pipelines.sources import input_specs
from edgekit.records import MODEL, Manifest
from edgekit.reference import resolve_reference
from edgekit.target import Target, load_target
from edgekit.training import digits
from edgekit.training.checkpoint import load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
ZOO = ROOT.parent / "shared" / "zoo"
sys.path.append(str(ROOT / "benchmarks"))

from claims import (  # noqa: E402
    LEAST_AGREEMENT,
    LEAST_SAME_TOP1,
    LEAST_SQNR_DB,
    MOST_CODES_APART,
    MOST_FLOAT_ERROR,
    MOST_TOP1_LOST,
    float_error,
)
from int8_formats import end_to_end, layer_differences  # noqa: E402
from scoring import Entry, Feeds, Kernels, predict, run_entry, scores  # noqa: E402

from networks import needs_vnni  # noqa: E402

TARGETS = ("x86-openvino", "x86-onnxruntime", "arm-onnxruntime", "cuda-tensorrt")
DIGITS_EPOCHS = 6
TEST_BATCH, LAYERWISE_SAMPLES, WHOLE_BATCHES = 50, 32, 4


@dataclass(frozen=True, slots=True)
class Sources:
    """What a user has: a checkpoint, the function that makes its network, and data."""

    checkpoint: Path
    factory: str
    calibration: Path
    test: Path
    preprocess: Preprocess | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """A network, compressed twice and exported once for each target whose runtime is installed.

    `reference` is what it predicts in torch, shape `(N, classes)`.
    """

    out: Path
    again: Path
    manifests: dict[str, Manifest]
    batches: Sequence[Feeds]
    labels: NDArray[np.int64]
    reference: NDArray[np.float32]
    _ran: dict[tuple[str, str], tuple[NDArray[Any], Kernels]] = field(default_factory=dict)

    def artifact(self, target: str) -> Artifact:
        if target not in self.manifests:
            available = get_backend(load_target(target).backend).available(load_target(target))
            pytest.skip(f"{target}: {available.reason}; {available.remedy}")
        manifest, folder = self.manifests[target], self.out / target
        return Artifact(folder / manifest.artifact, tuple(folder / name for name in manifest.artifact_files))

    def run(self, target: str, precision: str = "int8") -> tuple[NDArray[Any], Kernels]:
        """Scores for all test samples, and the kernels; "f32" asks for float parts in f32."""
        found = self.artifact(target)
        if (target, precision) not in self._ran:
            entry = Entry("", "", Artifact(found.path, found.files, precision), _single_threaded(target))
            self._ran[target, precision] = run_entry(entry, load_annotated(self.out / MODEL), self.batches)
        return self._ran[target, precision]


@pytest.fixture(scope="session", params=["digits", "resnet20"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    sources = _digits(folder) if request.param == "digits" else _resnet20()
    for out in (folder / "out", folder / "again"):
        edgekit.compress(
            sources.checkpoint,
            out,
            model=sources.factory,
            calibration=sources.calibration,
            preprocess=sources.preprocess,
            proxy="none",  # every layer in int8 is what is looked at here
        )
    available = [name for name in TARGETS if _can_convert(load_target(name))]
    exports = edgekit.export(folder / "out", available)
    inputs = input_specs(load_annotated(folder / "out" / MODEL))
    test = list(open_data(sources.test, preprocess=sources.preprocess).bind(inputs).batches(TEST_BATCH))
    batches = [batch.feeds for batch in test]
    labels = np.concatenate([batch.labels for batch in test if batch.labels is not None])
    manifests = {one.manifest.target: one.manifest for one in exports}
    return Case(folder / "out", folder / "again", manifests, batches, labels, _in_torch(sources, batches))


def _digits(folder: Path) -> Sources:
    checkpoint, calibration, test = folder / "digits.pt", folder / "calibration.npz", folder / "test.npz"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # operators this small spend their time waiting for one another's threads
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(digits, "EPOCHS", DIGITS_EPOCHS)
            digits.train(checkpoint, calibration, test)
    finally:
        torch.set_num_threads(threads)
    return Sources(checkpoint, "edgekit.training.digits_net:digits_net", calibration, test)


def _resnet20() -> Sources:
    checkpoint = ZOO / "resnet20-12fca82f.th"
    if not checkpoint.is_file():
        pytest.skip(f"{checkpoint.name} and CIFAR-10 are not here: see benchmarks/README.md")
    return Sources(
        checkpoint,
        f"{ROOT / 'tests' / 'models' / 'resnet20.py'}:resnet20",
        ZOO / "cifar10-jpeg-train.zip",
        ZOO / "cifar10-jpeg-test.zip",
        Preprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    )


def _in_torch(sources: Sources, batches: Sequence[Feeds]) -> NDArray[np.float32]:
    factory = resolve_reference(sources.factory, error=SourceError, what="the network")
    assert callable(factory)
    network = load_checkpoint(sources.checkpoint, factory=factory).eval()
    with torch.no_grad():
        return predict(lambda feeds: {"scores": network(torch.from_numpy(feeds["image"])).numpy()}, batches)


def _can_convert(target: Target) -> bool:
    return get_backend(target.backend).available(target).can_convert


def _single_threaded(name: str) -> Target:
    target = load_target(name)
    return target.model_copy(update={"runtime": target.runtime.model_copy(update={"threads": 1})})


@needs_vnni
@pytest.mark.parametrize(
    ("target", "precision"),
    [("x86-openvino", "int8"), ("x86-openvino", "f32"), ("x86-onnxruntime", "int8"), ("arm-onnxruntime", "int8")],
)
def test_int8_keeps_the_float_networks_decisions(case: Case, target: str, precision: str) -> None:
    found = scores(case.run(target, precision)[0], case.reference, case.labels)
    assert found.top1 >= float((case.reference.argmax(1) == case.labels).mean()) - MOST_TOP1_LOST
    assert found.agreement >= LEAST_AGREEMENT


@pytest.mark.parametrize("target", ["x86-openvino", "x86-onnxruntime", "arm-onnxruntime"])
def test_every_layer_and_every_residual_add_runs_in_int8(case: Case, target: str) -> None:
    kernels = case.run(target)[1]
    assert (kernels.macs, kernels.float_layers) == (1.0, ())
    assert kernels.all_adds > 0
    assert kernels.adds == kernels.all_adds
    assert case.manifests[target].proof.int8_macs_share == 1.0


def test_tensorrt_builds_an_engine_by_its_documented_rules(case: Case) -> None:
    assert case.artifact("cuda-tensorrt").size_bytes > 0
    lowered = load_onnx(case.out / "cuda-tensorrt" / MODEL)
    assert get_backend("tensorrt").check(lowered, load_target("cuda-tensorrt")) == []
    assert case.manifests["cuda-tensorrt"].proof.int8_macs_share == 1.0


@needs_vnni
@pytest.mark.parametrize("target", ["x86-onnxruntime", "arm-onnxruntime"])
def test_the_three_formats_agree_layer_by_layer_within_one_code(case: Case, target: str) -> None:
    lowered = load_onnx(case.out / target / MODEL)
    few = {name: array[:LAYERWISE_SAMPLES] for name, array in case.batches[0].items()}
    apart = layer_differences(lowered, few)
    assert {node.name for node in lowered.graph if node.op_type in ("Conv", "Gemm", "Add")} <= apart.keys()
    assert {name: codes for name, codes in apart.items() if codes > MOST_CODES_APART} == {}


@needs_vnni
@pytest.mark.parametrize("target", ["x86-onnxruntime", "arm-onnxruntime"])
def test_the_three_formats_agree_end_to_end(case: Case, target: str) -> None:
    found = end_to_end(load_onnx(case.out / target / MODEL), case.batches[:WHOLE_BATCHES])
    assert found.same_top1 >= LEAST_SAME_TOP1
    assert found.sqnr_db >= LEAST_SQNR_DB


def test_the_annotated_model_is_a_plain_onnx_file_that_equals_the_network(case: Case) -> None:
    assert float_error(case.out / MODEL, case.reference, case.batches) <= MOST_FLOAT_ERROR


def test_two_compressions_give_the_same_bytes(case: Case) -> None:
    assert (case.out / MODEL).read_bytes() == (case.again / MODEL).read_bytes()
