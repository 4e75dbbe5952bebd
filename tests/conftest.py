"""What the tests of pipelines and commands share: a tiny network, its data, what edgekit made of it, and the command line."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

import edgekit
from edgekit.cli import main
from networks import Net, simulate

# Torch's threads wait for each other; on a busy machine that takes ten times as long as one thread alone.
os.environ.setdefault("OMP_NUM_THREADS", "1")

TESTS = Path(__file__).parent
PLUGIN = TESTS / "plugin"
SAMPLES = 96


@dataclass(frozen=True)
class TinyFiles:
    """A float network and its data, on disk.

    Attributes:
        model: an ONNX file, input `image` (n, 1, 8, 8), output `head_y` (n, 4).
        data: an `.npz` with the arrays `image` and `labels`; these are the network's own decisions.
    """

    model: Path
    data: Path


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str


Cli = Callable[..., Outcome]


def tiny_images(count: int = SAMPLES) -> NDArray[np.float32]:
    """Standard normal numbers `(count, 1, 8, 8)`."""
    return np.random.default_rng(0).normal(0, 1, (count, 1, 8, 8)).astype(np.float32)


def tiny_network(*, batch: int | str = "n") -> ir.Model:
    """A stem, a residual Add, a MaxPool, a convolution and a linear head whose four classes are about as frequent."""
    scores = simulate(_network("n"), {"image": tiny_images()})["head_y"]
    model = _network(batch)
    weight, bias = (model.graph.initializers[f"head.{name}"] for name in ("weight", "bias"))
    assert weight.const_value is not None
    assert bias.const_value is not None
    mean, spread = scores.mean(0), scores.std(0)
    weight.const_value = ir.tensor(weight.const_value.numpy() / spread[:, None])
    bias.const_value = ir.tensor((bias.const_value.numpy() - mean) / spread)
    return model


def _network(batch: int | str) -> ir.Model:
    net = Net(seed=5)
    x = net.conv_relu(net.input("image", [batch, 1, 8, 8]), "stem", 1, 8)
    y = net.conv(x, "block", 8, 8)
    x = net.op("Relu", [net.op("Add", [y, x], "add")], "add.relu")
    x = net.op("MaxPool", [x], "pool", kernel_shape=[2, 2], strides=[2, 2])
    x = net.conv_relu(x, "deep", 8, 16)
    x = net.op("Flatten", [net.op("GlobalAveragePool", [x], "mean")], "flat", axis=1)
    return net.model(net.gemm(x, "head", 16, 4))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyFiles:
    folder = tmp_path_factory.mktemp("tiny")
    model, images = tiny_network(), tiny_images()
    labels = np.argmax(simulate(model, {"image": images})["head_y"], axis=1)
    ir.save(model, folder / "tiny.onnx")
    np.savez(folder / "tiny.npz", image=images, labels=labels)
    return TinyFiles(folder / "tiny.onnx", folder / "tiny.npz")


@pytest.fixture(scope="session")
def compressed_once(tiny: TinyFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network, compressed; not to be written to."""
    out = tmp_path_factory.mktemp("compressed") / "out"
    edgekit.compress(
        tiny.model,
        out,
        calibration=tiny.data,
        evaluate=tiny.data,
        method=edgekit.Method(calibrator="kld"),
        proxy="none",
    )
    return out


@pytest.fixture
def compressed(compressed_once: Path, tmp_path: Path) -> Path:
    """A copy of the compressed network, to do anything with."""
    return Path(shutil.copytree(compressed_once, tmp_path / "compressed"))


@pytest.fixture(scope="session")
def exported_once(compressed_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compressed network with an export for the target `numpy`; not to be written to."""
    out = Path(shutil.copytree(compressed_once, tmp_path_factory.mktemp("exported") / "out"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(str(PLUGIN))
        edgekit.export(out, [str(PLUGIN / "numpy.toml")])
    return out


@pytest.fixture
def exported(exported_once: Path, tmp_path: Path) -> Path:
    """A copy of the exported network, to do anything with."""
    return Path(shutil.copytree(exported_once, tmp_path / "exported"))


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a third party's backend, on the import path."""
    monkeypatch.syspath_prepend(str(PLUGIN))
    return PLUGIN


@pytest.fixture
def numpy_target(plugin: Path, tmp_path: Path) -> Callable[..., str]:
    """Writes a target file for the third party's backend, with options of its runtime."""

    def write(name: str = "numpy", **options: str) -> str:
        path = tmp_path / f"{name}.toml"
        listed = ", ".join(f"{key} = {json.dumps(value)}" for key, value in options.items())
        plain = (plugin / "numpy.toml").read_text().replace('name = "numpy"', f'name = "{name}"')
        path.write_text(f"{plain}options = {{ {listed} }}\n")
        return str(path)

    return write


@pytest.fixture(scope="session")
def cli() -> Cli:
    """Runs a command in this process; what edgekit does not explain is raised."""

    def run(*arguments: str | Path) -> Outcome:
        result = CliRunner().invoke(main, [str(word) for word in arguments], catch_exceptions=False)
        return Outcome(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture(scope="session")
def cli_process() -> Cli:
    """Runs a command in a process of its own, with `env` on top of this one's."""

    def run(*arguments: str | Path, env: dict[str, str] | None = None, cwd: Path | None = None) -> Outcome:
        command = [
            sys.executable,
            "-c",
            "from edgekit.cli import main; main(prog_name='edgekit')",
            *map(str, arguments),
        ]
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | (env or {}), cwd=cwd, timeout=120
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def snapshot() -> Callable[[Path], dict[str, str]]:
    """Says what is in a folder, hidden files too: the SHA-256 of each file by its path; empty when there is no folder."""

    def take(folder: Path) -> dict[str, str]:
        return {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
            for path in sorted(folder.rglob("*"))
        }

    return take


KILLER = """
import os, pathlib, shutil, signal, sys
import edgekit.pipelines.compress, edgekit.pipelines.export

previous, base, limit, job = sys.argv[1:]
for moment in range(1, int(limit) + 1):
    out = pathlib.Path(base) / str(moment)
    if previous:
        shutil.copytree(previous, out)
    pid = os.fork()
    if pid == 0:
        left = moment
        def hook(event, arguments):
            global left
            touches = any(isinstance(a, (str, os.PathLike)) and os.fspath(a).startswith(str(out)) for a in arguments)
            if event in ("os.rename", "os.remove", "os.mkdir") and touches:
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        exec(job, {"out": out})
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    if not os.WIFSIGNALED(status):
        assert status == 0, status
        break
else:
    raise SystemExit("more moments than the limit")
"""


@pytest.fixture
def killed(tmp_path: Path) -> Callable[..., Iterator[Path]]:
    """Kills a job just before it makes, renames or removes a file of its folder `out`: at the first such moment, the second, ...

    Gives the folder as each moment left it; in the last one the job came to its end. Each begins with a copy of `previous`.
    """

    def run(job: str, *, previous: Path | None = None, limit: int = 60) -> Iterator[Path]:
        base = tmp_path / "killed"
        base.mkdir()
        arguments = [str(previous or ""), str(base), str(limit), job]
        done = subprocess.run([sys.executable, "-c", KILLER, *arguments], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        moments = sorted(int(path.name) for path in base.iterdir())
        for moment in range(1, max(moments) + 1):
            yield base / str(moment)

    return run
