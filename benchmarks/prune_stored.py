"""Whether a pruned module comes back in a process that has neither its class nor its file, and computes the same bits."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from claims import Claim
from prune_subject import say, trained_resnet20
from prune_torch_resnet50 import torch_resnet50
from qat_part import Part, holds
from scoring import Array
from torch import nn

from edgekit.channel_choice import by_macs
from edgekit.training.digits_net import digits_net
from edgekit.training.prune import IMPORTANCE, find_groups
from edgekit.training.stored import save_module

MACS = 0.5
BATCHES = (1, 2, 5)
RELOAD = """
import sys
import numpy as np, torch, edgekit
torch.set_num_threads(1)
module = edgekit.load(sys.argv[1])
with np.load(sys.argv[2]) as file, torch.no_grad():
    found = {name: module(torch.from_numpy(file[name])).numpy() for name in file.files}
known = [name for name in sys.modules if name.rpartition(".")[2] in sys.argv[4].split(",")]
assert not known, f"the process knows {known}"
np.savez(sys.argv[3], **found)
"""
"""What the new process runs."""
CLASSES = "resnet20,digits_net,prune_torch_resnet50"
"""The modules that define the networks."""


@dataclass(frozen=True, slots=True)
class _Row:
    """One network: its tensors that lost channels, and the largest difference of an output by batch size."""

    name: str
    lost: int
    parameters: tuple[int, int]
    size_bytes: int
    apart: dict[int, float]
    said: str


def stored_section(zoo: Path, folder: Path) -> Part:
    """Half of the MACs go, the rest is stored and read back."""
    rows = [_stored(name, module, image, folder / name.replace(" ", "-")) for name, module, image in _networks(zoo)]
    note = (
        f"Each network is cut to {MACS:.0%} of its MACs by l1, saved, and loaded by `edgekit.load` in a new process that starts in an "
        "empty folder and imports no module that defines the network. Stored with a batch of two."
    )
    heads = [
        "network",
        "tensors that shrank",
        "parameters",
        "bytes",
        *(f"batch {batch}, differs by" for batch in BATCHES),
    ]
    told = [
        [
            row.name,
            str(row.lost),
            f"{row.parameters[0]:,} to {row.parameters[1]:,}",
            f"{row.size_bytes:,}",
            *(f"{row.apart.get(batch, float('nan')):g}" for batch in BATCHES),
        ]
        for row in rows
    ]
    return Part("Stored without its class", note, heads, told, list(_claims(rows)))


def _networks(zoo: Path) -> Iterator[tuple[str, nn.Module, tuple[int, ...]]]:
    yield "ResNet-20", trained_resnet20(zoo), (3, 32, 32)
    torch.manual_seed(0)
    yield "demo network", digits_net(), (1, 8, 8)
    yield "ResNet-50's shape", torch_resnet50(), (3, 224, 224)


def _stored(name: str, module: nn.Module, image: tuple[int, ...], folder: Path) -> _Row:
    say(f"stored: {name}")
    folder.mkdir()
    rng = np.random.default_rng(0)
    batches = {batch: rng.normal(0, 1, (batch, *image)).astype(np.float32) for batch in BATCHES}
    module.eval()
    before = dict(module.named_parameters())
    prunable = find_groups(module, (batches[2],))
    groups = prunable.score(IMPORTANCE["l1"])
    pruned = prunable.cut(by_macs(groups, prunable.costs, MACS).choice).eval()
    save_module(pruned, folder / "pruned", (batches[2],), structure={})
    expected = _outputs(pruned, batches)
    found, said = _reloaded(folder, batches)
    after = dict(pruned.named_parameters())
    lost = sum(name in before and before[name].shape != value.shape for name, value in after.items())
    apart = {batch: float(np.abs(expected[batch] - array).max()) for batch, array in found.items()}
    for batch, array in found.items():
        assert (apart[batch] == 0) == np.array_equal(expected[batch], array)
    sizes = (sum(one.numel() for one in before.values()), sum(one.numel() for one in after.values()))
    size = sum(path.stat().st_size for path in (folder / "pruned").iterdir())
    return _Row(name, lost, sizes, size, apart, said)


def _outputs(module: nn.Module, batches: dict[int, Array]) -> dict[int, Array]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the other process: how a sum is split among threads changes its last bits
    try:
        with torch.no_grad():
            return {batch: module(torch.from_numpy(array)).numpy() for batch, array in batches.items()}
    finally:
        torch.set_num_threads(threads)


def _reloaded(folder: Path, batches: dict[int, Array]) -> tuple[dict[int, Array], str]:
    """What a new process computes, and what it said where it failed."""
    empty, inputs, outputs = folder / "empty", folder / "inputs.npz", folder / "outputs.npz"
    empty.mkdir()
    np.savez(inputs, **{str(batch): array for batch, array in batches.items()})  # type: ignore[arg-type]
    asked = [sys.executable, "-c", RELOAD, str(folder / "pruned"), str(inputs), str(outputs), CLASSES]
    ended = subprocess.run(asked, cwd=empty, capture_output=True, text=True, check=False)
    if ended.returncode:
        return {}, ended.stderr.strip().splitlines()[-1]
    with np.load(outputs) as file:
        return {int(name): file[name] for name in file.files}, ""


def _claims(rows: list[_Row]) -> Iterator[Claim]:
    for row in rows:
        text = f"{row.name}: loads in a new process without its class, and its outputs are the same to the last bit"
        found = (
            row.said or f"differs by {max(row.apart.values()):g} at most, batches of {', '.join(map(str, row.apart))}"
        )
        yield holds(text, found, bool(row.apart) and not any(row.apart.values()))
