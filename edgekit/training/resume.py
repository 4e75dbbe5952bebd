"""Checkpoints of a training run, written whole or not at all, from which it goes on as if it had not been interrupted.

A run that goes on computes the same losses, bit for bit, on the same machine, with the same versions and number of threads. That takes
the weights, what the optimizer keeps, every source of random numbers, and the place in the data; for data that is read again from
the first batch, the random numbers of the epoch's beginning as well. Files hold tensors and plain values; no pickled code is run.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgekit.errors import OutputError, SourceError
from edgekit.output import staged_folder
from edgekit.toml_file import Table
from edgekit.training.pickles import UNREADABLE

STATE, RECORD = "state.pt", "checkpoint.json"
STEPS = "step-*"
KEPT = 2
"""Checkpoints in a folder; an older one stands in for one that cannot be read."""

Key = dict[str, str | bool | int | float | None]


class Record(Table):
    """What a checkpoint says of itself, for people too.

    Attributes:
        step: updates of the weights behind it.
        epoch, batch: place in the data: so many batches of this epoch were read.
        finished: training had come to its end.
        metrics: step and value of each evaluation.
        best_step: of the best value; 0 when there is none.
        key: what must be the same for a run to go on from here.
    """

    step: int
    epoch: int
    batch: int
    finished: bool
    metrics: tuple[tuple[int, float], ...]
    best_step: int
    key: Key


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint that was read.

    Attributes:
        state: as it was given to `Checkpoints.save`; tensors are on the CPU.
        damaged: newer checkpoints that could not be read.
    """

    record: Record
    state: dict[str, Any]
    damaged: tuple[Path, ...]


class Checkpoints:
    """The checkpoints in a folder, `step-00000200` and so on, of one training run."""

    def __init__(self, folder: Path, key: Key, *, replaces: bool = False) -> None:
        """Nothing is read or written yet. `replaces`: another run's that has finished make room."""
        self.key = key
        self._folder = folder
        self._replaces = replaces

    def newest(self) -> Saved | None:
        """The newest checkpoint that can be read; None when there is none.

        Raises:
            OutputError: it is of a run with another key.
            SourceError: there are some, and none can be read.
        """
        damaged: list[Path] = []
        for path in sorted(self._folder.glob(STEPS), reverse=True):
            try:
                record = Record.model_validate_json((path / RECORD).read_bytes())
                if self._replaces and record.finished and record.key != self.key:
                    self.clear()
                    return None
                self._check_key(record, path)
                state = torch.load(path / STATE, map_location="cpu", weights_only=True)
            except UNREADABLE:
                damaged.append(path)
                continue
            return Saved(record, state, tuple(damaged))
        if damaged:
            raise SourceError(
                f"{self._folder}: none of its {len(damaged)} checkpoints can be read; give another folder, or start anew"
            )
        return None

    def save(self, record: Record, state: Mapping[str, Any]) -> None:
        """Write a checkpoint, then remove all but the newest two.

        Raises:
            OutputError: it cannot be written.
        """
        final = self._folder / f"step-{record.step:08d}"
        if not (final / RECORD).is_file():
            shutil.rmtree(final, ignore_errors=True)  # one that was damaged, and passed over
        with staged_folder(final, marker=RECORD, what="a checkpoint of training") as stage:
            torch.save(dict(state), stage / STATE)
            (stage / RECORD).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
        for old in sorted(self._folder.glob(STEPS))[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)

    def clear(self) -> None:
        """Remove them all."""
        for old in [*self._folder.glob(STEPS), *self._folder.glob(f".{STEPS}.partial-*")]:
            shutil.rmtree(old, ignore_errors=True)

    def kept(self) -> str:
        """Which checkpoint there is to go back to, for messages."""
        newest = max(self._folder.glob(STEPS), default=None)
        return f"the checkpoint {newest} is kept" if newest else "no checkpoint had been written yet"

    def _check_key(self, record: Record, path: Path) -> None:
        names = [*self.key, *(name for name in record.key if name not in self.key)]
        other = [name for name in names if record.key.get(name) != self.key.get(name)]
        if other:
            listed = ", ".join(f"{name} {record.key.get(name)}, now {self.key.get(name)}" for name in other)
            raise OutputError(
                f"{path}: is a checkpoint of another training run ({listed}); train as then to go on with it, give another folder, "
                "or start anew, which removes it"
            )


def fingerprint(modules: Sequence[nn.Module]) -> str:
    """A digest of the names, shapes and types of all parameters and buffers."""
    lines = [
        f"{number} {name} {tuple(tensor.shape)} {tensor.dtype}"
        for number, module in enumerate(modules)
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    ]
    return sha256("\n".join(lines).encode()).hexdigest()[:16]


def digest(module: nn.Module) -> str:
    """A digest of all numbers in a module's parameters and buffers."""
    found = sha256()
    for _, tensor in sorted((*module.named_parameters(), *module.named_buffers()), key=lambda pair: pair[0]):
        found.update(
            tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        )
    return found.hexdigest()[:16]


def module_state(module: nn.Module) -> dict[str, Any]:
    """All of a module's tensors: its state_dict, and buffers that it leaves out; they are not copied."""
    state = module.state_dict()
    hidden = {name: buffer for name, buffer in module.named_buffers(remove_duplicate=False) if name not in state}
    return {"state": state, "hidden": hidden}


def copied(state: dict[str, Any]) -> dict[str, Any]:
    """The same in memory of its own, on the CPU."""
    return {
        part: {
            name: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
            for name, value in held.items()
        }
        for part, held in state.items()
    }


def restore_module(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Write a `module_state` into the module's own tensors."""
    module.load_state_dict(state["state"])
    with torch.no_grad():
        for name, buffer in state["hidden"].items():
            module.get_buffer(name).copy_(buffer)


def random_state(device: torch.device, generators: Sequence[torch.Generator] = ()) -> dict[str, Any]:
    """Where the random numbers of Python, NumPy, torch and these generators are."""
    kind, keys, place, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 - what a user's augmentation draws from
    return {
        "python": random.getstate(),
        "numpy": (str(kind), torch.from_numpy(np.asarray(keys, np.int64)), int(place), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "generators": [generator.get_state() for generator in generators],
    }


def set_random_state(
    state: Mapping[str, Any], device: torch.device, generators: Sequence[torch.Generator] = ()
) -> None:
    """Go back to a `random_state`."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002 - see above
    torch.set_rng_state(state["torch"])
    if state["device"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["device"], device)
    for generator, saved in zip(generators, state["generators"], strict=True):
        generator.set_state(saved)
