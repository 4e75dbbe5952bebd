"""A backend of somebody else's: found by its entry point, used by every command, with no change in edgekit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import edgekit
from conftest import TinyFiles
from edgekit.backend import backend_names, get_backend
from edgekit.errors import BackendError
from edgekit.pipelines.targets import availability
from edgekit.target import load_target

Cli = Callable[..., Any]


def test_it_is_found_while_its_package_is_on_the_path(plugin: Path) -> None:
    assert "numpy" in backend_names()
    assert get_backend("numpy").name == "numpy"


def test_it_is_not_found_otherwise() -> None:
    assert "numpy" not in backend_names()
    with pytest.raises(
        BackendError, match=r"backend 'numpy' is not installed \(installed: onnxruntime, openvino, tensorrt\)"
    ):
        get_backend("numpy")


def test_edgekit_does_not_know_it() -> None:
    for path in Path(edgekit.__file__).parent.rglob("*.py"):
        assert "edgekit_numpy" not in path.read_text(encoding="utf-8"), path


def test_it_works_from_compress_to_benchmark(tiny: TinyFiles, tmp_path: Path, plugin: Path, cli_process: Cli) -> None:
    out, target = tmp_path / "out", plugin / "numpy.toml"
    environment = {"PYTHONPATH": str(plugin)}
    compressed = cli_process(
        "compress",
        tiny.model,
        "--target",
        target,
        "--calibration",
        tiny.data,
        "--evaluate",
        tiny.data,
        "-o",
        out,
        env=environment,
    )
    assert (compressed.code, compressed.stderr) == (0, "")
    exported = cli_process("export", out, "--target", target, env=environment, cwd=tmp_path)
    assert (exported.code, exported.stderr) == (0, "")
    timed = cli_process("benchmark", out, "--target", target, "--iterations", 2, "--json", env=environment)
    assert (timed.code, timed.stderr) == (0, "")
    assert [timing["label"] for timing in json.loads(timed.stdout)["targets"][0]["timings"]] == ["f32", "int8"]

    manifest = json.loads((out / "numpy" / "manifest.json").read_text())
    assert (manifest["backend"], manifest["proof"]["agrees"]) == ("numpy", True)
    assert manifest["metric_source"] == "ran"
    assert re.search(r"\| numpy \| ran on onnx [\d.]+ \|", (out / "report.md").read_text())


def test_one_that_does_not_import_is_explained(tmp_path: Path, plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "site" / "edgekit_broken-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: edgekit-broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[edgekit.backends]\nbroken = edgekit_broken:Backend\n")
    (tmp_path / "site" / "edgekit_broken.py").write_text("import libfirmware\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    message = r"backend 'broken' does not import: No module named 'libfirmware'; reinstall 'edgekit_broken:Backend'"
    with pytest.raises(BackendError, match=message):
        get_backend("broken")
    target = load_target(str(plugin / "numpy.toml")).model_copy(update={"backend": "broken"})
    found = availability(target)
    assert (found.can_convert, found.can_run, found.can_check) == (False, False, False)
    assert "libfirmware" in found.reason
