"""Where a training run computes, and where its curves go: Hugging Face Accelerate, and its trackers.

Accelerate takes two seconds to import, so only these functions do it.
"""

from __future__ import annotations

import importlib.util
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.errors import BackendError
from edgekit.output import sha256, write_text
from edgekit.schedule import Schedule

if TYPE_CHECKING:
    from accelerate import Accelerator

PROJECT = "edgekit"
RUN_ID = "wandb-run.txt"
"""Holds the number of the Weights & Biases run, so that a run that goes on draws on in the same curves."""

INSTALL = {
    "tensorboard": "pip install tensorboard",
    "wandb": "pip install wandb",
}

_SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TP")


def open_accelerator(schedule: Schedule, folder: Path) -> tuple[Accelerator, tuple[str, ...]]:
    """The devices and processes that `accelerate launch` chose, or this process and the best device here; and what to tell the user.

    Args:
        folder: curves go to `logs` in it.

    Raises:
        BackendError: accelerate, or Weights & Biases where it is asked for, is not installed; the launch shards the model, or the
            device has no such mixed precision.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise BackendError("training needs the package accelerate; pip install 'edgekit[train]'")
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration

    remarks: tuple[str, ...] = ()
    track = None if schedule.track == "none" else schedule.track
    if track is not None and importlib.util.find_spec(track) is None:
        if track == "wandb":
            raise BackendError(
                f"track = 'wandb': the package wandb is not installed; {INSTALL[track]}, or track = 'tensorboard'"
            )
        remarks, track = (f"no curves were written: {track} is not installed; {INSTALL[track]}",), None
    with suppress(AttributeError):  # one that was made before in this process decides for all, unless it is forgotten
        if AcceleratorState._shared_state.get("_mixed_precision") != schedule.mixed_precision:
            AcceleratorState._reset_state()
    try:
        accelerator = Accelerator(
            mixed_precision=schedule.mixed_precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=schedule.accumulate),
            log_with=track,
            project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "logs")),
        )
    except ValueError as error:
        raise BackendError(
            f"mixed_precision = {schedule.mixed_precision!r} does not work here ({error}); set it to 'no'"
        ) from error
    if schedule.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise BackendError("mixed_precision = 'fp16' needs a GPU, and there is none; set it to 'bf16' or 'no'")
    if accelerator.distributed_type.value in _SHARDED:
        raise BackendError(
            f"accelerate was configured for {accelerator.distributed_type.value}, which splits a model; train with plain multi-GPU or "
            "multi-CPU, which split the data"
        )
    return accelerator, remarks


def start_tracking(accelerator: Accelerator, folder: Path, step: int, schedule: Schedule | None) -> None:
    """Open the curves of a run that begins, or goes on, after `step`; its hyperparameters are logged where they are given."""
    if not accelerator.log_with or not accelerator.is_main_process:
        return
    options: dict[str, dict[str, Any]] = {"tensorboard": {"purge_step": step + 1 if step else None}}
    if "wandb" in map(str, accelerator.log_with):
        options["wandb"] = {"dir": str(folder), "id": _run_id(folder), "resume": "allow"}
    known = {} if schedule is None else schedule.model_dump()
    config = {name: value for name, value in known.items() if value is not None}
    accelerator.init_trackers(PROJECT, config=config or None, init_kwargs=options)


def close_tracking(accelerator: Accelerator) -> None:
    """Close the curves. The processes stay together, for what may be trained next."""
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.trackers.clear()


def log_table(accelerator: Accelerator, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Log a table of results."""
    for tracker in accelerator.trackers:
        if tracker.name == "wandb":
            tracker.log_table("result", columns=list(columns), data=[list(row) for row in rows])
        else:
            tracker.log({"result": markdown(columns, rows)})


def log_artifact(
    schedule: Schedule, folder: Path, artifact: Path, columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    """Add a file that was made of the trained model to the curves of its run, with a table about it.

    TensorBoard gets its name, size and SHA-256; Weights & Biases the file itself.
    """
    accelerator, _ = open_accelerator(schedule, folder)
    start_tracking(accelerator, folder, 0, None)
    told = f"{artifact.name}, {artifact.stat().st_size:,} bytes, SHA-256 {sha256(artifact)}"
    accelerator.log({"artifact": told})
    for tracker in accelerator.trackers:
        if tracker.name == "wandb":
            tracker.tracker.log_artifact(str(artifact), name=artifact.stem, type="model")
    log_table(accelerator, columns, rows)
    close_tracking(accelerator)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as TensorBoard shows it."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _run_id(folder: Path) -> str:
    path = folder / RUN_ID
    if not path.is_file():
        write_text(path, uuid.uuid4().hex)
    return path.read_text(encoding="utf-8").strip()
