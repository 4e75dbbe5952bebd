"""ONNX's own backend test cases through edgekit: a few of those that `benchmarks/onnx_backend.py` runs, the same ones each time."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from edgekit.graph.magnitudes import mark_wide, wide_names

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

from onnx_backend import report, run_all  # noqa: E402
from onnx_cases import COMPRESS, CRASH, FLOAT, INT8, NOT_RUNNABLE, REFUSED, WRONG, Case, Row, cases, rows  # noqa: E402

COMPRESSED, EXPORTED = 30, 3
WITH_LAYERS = ("test_Conv", "test_conv", "test_gemm", "test_matmul", "test_Linear")
QUANTIZED = (
    "test_Conv2d_groups+opset",
    "test_conv_with_strides_and_asymmetric_padding+constants",
    "test_gemm_transposeB+constants",
    "test_matmul_4d+constants",
)
RUNTIMES = ("x86-onnxruntime", "x86-openvino")


def some(count: int, prefixes: tuple[str, ...] = ("test_",)) -> list[Case]:
    """Always the same ones."""
    fitting = [case for name, case in cases().items() if name.startswith(prefixes)]
    return random.Random(1).sample(fitting, count)


def ran(case: Case, targets: Sequence[str], folder: Path) -> list[Row]:
    folder.mkdir()
    found = list(rows(case, targets, folder))
    assert found
    assert not [row for row in found if row.outcome in (WRONG, CRASH)]
    return found


def test_random_cases_are_compressed(tmp_path: Path) -> None:
    found = [row for case in some(COMPRESSED) for row in ran(case, [], tmp_path / case.name)]
    assert sum(row.outcome == FLOAT for row in found) >= COMPRESSED // 3
    assert all(row.reason for row in found if row.outcome in (REFUSED, NOT_RUNNABLE))


def test_random_layers_are_quantized(tmp_path: Path) -> None:
    found = [row for case in some(COMPRESSED, WITH_LAYERS) for row in ran(case, [], tmp_path / case.name)]
    assert sum(row.outcome == INT8 for row in found) >= COMPRESSED // 4


def test_random_cases_are_exported(tmp_path: Path) -> None:
    for case in some(EXPORTED):
        ran(case, RUNTIMES, tmp_path / case.name)


@pytest.mark.parametrize("name", QUANTIZED)
def test_cases_with_weights_run_in_int8(name: str, tmp_path: Path) -> None:
    found = ran(cases()[name], RUNTIMES, tmp_path / "case")
    assert [(row.target, row.outcome, row.reason) for row in found] == [(target, INT8, "") for target in RUNTIMES]


def test_a_crash_of_the_child_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import onnx, os\nsave = onnx.save\n"
        "onnx.save = lambda model, *rest, **kw: os.abort() if 'Relu' in str(model) else save(model, *rest, **kw)\n",
        encoding="utf-8",
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = list(run_all([cases()["test_exp"], cases()["test_relu"]], []))
    assert [(row.case, row.target, row.outcome) for row in found] == [
        ("test_exp", COMPRESS, FLOAT),
        ("test_relu", COMPRESS, CRASH),
    ]
    assert "ended with -6" in found[1].reason
    assert "| compress | 0 | 1 | 0 | 0 | 1 |" in report(found)


def test_scan_of_opset_8_is_refused_as_what_it_is(tmp_path: Path) -> None:
    [row] = rows(cases()["test_scan_sum"], [], tmp_path)
    assert row.outcome == REFUSED
    assert (
        row.reason == "node 'y' is a Scan of opset 8, which nothing can upgrade; export the model with opset 9 or later"
    )


def test_a_model_without_a_float32_tensor_has_no_wide_one() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["": 21]> g (float16[N, 2] x) => (float16[N, 2] y) { h = Relu(x) y = Exp(h) }'
    )
    assert wide_names(mark_wide(model, [{"x": np.ones((1, 2), np.float16)}])) == []


def test_what_computes_in_float64_is_quantized_in_float32(tmp_path: Path) -> None:
    [row] = ran(cases()["test_flexattention_double_expanded_ver26+constants"], RUNTIMES[:1], tmp_path / "case")
    assert (row.outcome, row.reason) == (INT8, "")


def test_nan_where_the_source_has_nan_is_no_disagreement(tmp_path: Path) -> None:
    found = ran(cases()["test_operator_pow+opset"], RUNTIMES, tmp_path / "case")
    assert [row.outcome for row in found] == [FLOAT, FLOAT]
