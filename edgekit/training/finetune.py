"""Train a module for its export: with quantizers or without, from labels, from a teacher, or both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgekit.data import InputSpec
from edgekit.data.samples import LABELS
from edgekit.distillation import FEATURE, RESPONSE, Distillation
from edgekit.errors import DataError, SourceError
from edgekit.finetune import Finetune, Finetuned
from edgekit.method import Method
from edgekit.progress import Progress
from edgekit.reference import resolve_reference
from edgekit.target import Target
from edgekit.training.batches import Share, TrainData, input_names
from edgekit.training.checkpoint import copied, evaluating
from edgekit.training.distill import task_loss
from edgekit.training.forward import named_tensors
from edgekit.training.loop import Trained, train
from edgekit.training.memory_format import channels_last
from edgekit.training.prune.sparsity import Masks
from edgekit.training.qat import TRACED_WITH, prepare_qat
from edgekit.training.resume import digest
from edgekit.training.taps import match_layers
from edgekit.training.teacher import Distiller, open_distiller
from edgekit.training.train_data import open_train_data

Arrays = Mapping[str, NDArray[Any]]
Runner = Callable[[Arrays], Arrays]
Metric = Callable[[Runner], float]


def finetune(
    module: nn.Module,
    plan: Finetune,
    rules: Target,
    method: Method,
    calibration: tuple[NDArray[Any], ...] | dict[str, NDArray[Any]],
    *,
    preprocess: Any,
    metric: Metric | None,
    folder: Path,
    key: str,
    on_progress: Progress,
    masks: Masks | None = None,
    gradually: bool = False,
) -> tuple[nn.Module, Finetuned]:
    """A trained copy of `module`, ready to be exported, and what its training came to.

    Args:
        module: float.
        plan: what to do.
        rules: whose rounding is trained for.
        method: types of the quantizers, and how their ranges start.
        calibration: samples, `(N, ...)` each, of the module's inputs.
        preprocess: for images of the training data.
        metric: gives a number for a runner of arrays by name, higher is better; None without `--evaluate`.
        folder: for checkpoints and curves.
        key: stands for what is done besides: with another one, or another module, no run goes on from these checkpoints.
        masks: of weights that stay zero.
        gradually: these become zero over the first half of the steps.

    Raises:
        EdgekitError: see `prepare_qat`, `open_train_data`, `open_distiller` and `train`.
    """
    on_progress("prepare training", 0, None)
    measure = None if metric is None else (lambda one: metric(runner(one)))
    before = measure(module) if measure else None
    teacher = _teacher(plan, module)
    plan = _taught(plan, method, module, teacher, calibration)
    pairs = _pairs(plan, module, teacher, calibration)
    taps = [ours for ours, _ in pairs]
    if plan.qat:
        student: nn.Module = prepare_qat(module, calibration, rules, method=method, scales=plan.scales, taps=taps)
    else:
        student = copied(module)  # as it is: BatchNorm that is folded trains badly where little is learned yet
    start = measure(student) if measure and plan.qat else before
    data = open_data_for(plan, module, calibration, preprocess, on_progress)
    [batch] = first_batches(data, plan, 1)
    inputs = {name: tensor for name, tensor in batch.items() if name != LABELS}
    distiller = _distiller(plan, pairs, student, teacher, inputs, labelled=LABELS in batch)
    on_step: tuple[Callable[[int, int], None], ...] = (freezing(student, plan.freeze),)
    if masks is not None and gradually:
        on_step = (*on_step, masks.gradually(student))
    placed = channels_last([student, *([teacher] if distiller else [])], inputs)
    with masks.holding(student) if masks is not None else nullcontext(), placed:
        trained = train(
            student,
            data,
            distiller.loss if distiller else task_loss,
            schedule=plan.schedule,
            folder=folder,
            teacher=distiller.teacher if distiller else None,
            taps=distiller.taps if distiller else None,
            extra=(*(distiller.trainable if distiller else ()), *([masks] if masks is not None else [])),
            evaluate=measure,
            on_step=on_step,
            on_progress=on_progress,
            key=f"{key} {digest(module)}",
            replaces=True,
        )
    if masks is not None:
        masks.enforce(student)
    learned = ", ".join(distiller.loss.learns) if distiller else "labels"
    after = dict(trained.metrics).get(trained.kept_step)  # the loop asked for it last
    if after is None and measure:
        after = measure(student)
    return student, _record(plan, data, trained, learned, (before, start, after))


def freezing(module: nn.Module, share: float) -> Callable[[int, int], None]:
    """What stops a module's quantizers and BatchNorms from moving, called before each step with its number and how many there are."""

    def freeze(step: int, steps: int) -> None:
        if step >= share * steps:
            for child in module.modules():
                if callable(stop := getattr(child, "freeze", None)):
                    stop()

    return freeze


def _teacher(plan: Finetune, module: nn.Module) -> nn.Module:
    """Who teaches: the model as it came, or what the plan names."""
    if plan.teacher is None:
        return copied(module)
    made = (
        resolve_reference(plan.teacher, error=DataError, what="--teacher")
        if isinstance(plan.teacher, str)
        else plan.teacher
    )
    if not isinstance(made, nn.Module) and callable(made):
        made = made()
    if not isinstance(made, nn.Module):
        raise DataError(
            f"--teacher {plan.teacher!r} is a {type(made).__name__}; give a function that returns an nn.Module"
        )
    return made


def _taught(
    plan: Finetune,
    method: Method,
    module: nn.Module,
    teacher: nn.Module,
    calibration: tuple[NDArray[Any], ...] | dict[str, NDArray[Any]],
) -> Finetune:
    """The plan, with a teacher where few bits need one: from labels alone ResNet-20 in 4 bits trained to less than it was rounded to."""
    if plan.distill is not None or not plan.qat or not method.has_few_bits:
        return plan
    try:
        match_layers(module, teacher, _named(module, _few(calibration)))
    except SourceError:  # no features to compare
        return plan.model_copy(update={"distill": Distillation()})
    return plan.model_copy(update={"distill": Distillation(kind=(RESPONSE, FEATURE))})


def _pairs(
    plan: Finetune,
    module: nn.Module,
    teacher: nn.Module,
    calibration: tuple[NDArray[Any], ...] | dict[str, NDArray[Any]],
) -> tuple[tuple[str, str], ...]:
    """The layers whose features are compared: matched while the student still has layers."""
    if plan.distill is None or not plan.distill.reads_features:
        return ()
    return plan.distill.pairs or match_layers(module, teacher, _named(module, _few(calibration)))


def _distiller(
    plan: Finetune,
    pairs: tuple[tuple[str, str], ...],
    student: nn.Module,
    teacher: nn.Module,
    inputs: Mapping[str, Tensor],
    *,
    labelled: bool,
) -> Distiller | None:
    """None where labels alone teach."""
    wanted = plan.distill
    if wanted is None:
        if labelled:
            return None
        wanted = Distillation(hard=0.0)
    wanted = wanted.model_copy(update={"pairs": pairs})
    return open_distiller(wanted, student, teacher, inputs, has_labels=labelled)


def open_data_for(
    plan: Finetune,
    module: nn.Module,
    calibration: tuple[NDArray[Any], ...] | dict[str, NDArray[Any]],
    preprocess: Any,
    on_progress: Progress,
) -> TrainData:
    """The data that a plan trains on: its own, or what calibrates. Raises as `open_train_data` does."""
    return open_train_data(
        _by_name(module, calibration) if plan.data is None else plan.data,
        module_inputs(module, calibration),
        preprocess=preprocess if plan.data is not None else None,
        augment=plan.augment,
        on_progress=on_progress,
    )


def first_batches(data: TrainData, plan: Finetune, count: int) -> Sequence[Mapping[str, Tensor]]:
    """The first batches, as many as there are of `count`.

    Raises:
        DataError: there is none.
    """
    size = plan.schedule.batch_size if data.size is None else min(plan.schedule.batch_size, data.size)
    found = list(islice(data.epoch(0, 0, Share(max(1, size), plan.schedule.seed)), count))
    if not found:
        raise DataError(f"{data.name}: holds no batch to train on")
    return found


def module_inputs(
    module: nn.Module, calibration: tuple[NDArray[Any], ...] | dict[str, NDArray[Any]]
) -> list[InputSpec]:
    """The inputs of a module, as the samples have them."""
    return [
        InputSpec(name, np.dtype(array.numpy().dtype), (None, *array.shape[1:]))
        for name, array in _named(module, _few(calibration)).items()
    ]


def _named(module: nn.Module, arrays: tuple[NDArray[Any], ...] | dict[str, NDArray[Any]]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.array(array)) for name, array in _by_name(module, arrays).items()}


def _by_name(module: nn.Module, arrays: tuple[NDArray[Any], ...] | dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return arrays if isinstance(arrays, dict) else dict(zip(input_names(module).known, arrays, strict=False))


def _few(arrays: tuple[NDArray[Any], ...] | dict[str, NDArray[Any]]) -> Any:
    if isinstance(arrays, dict):
        return {name: array[:TRACED_WITH] for name, array in arrays.items()}
    return tuple(array[:TRACED_WITH] for array in arrays)


def runner(module: nn.Module) -> Runner:
    """Runs a module on arrays, as a metric runs an artifact."""

    def run(feeds: Arrays) -> Arrays:
        device = next((tensor.device for tensor in module.parameters()), torch.device("cpu"))
        tensors = {name: torch.from_numpy(np.array(array)).to(device) for name, array in feeds.items()}
        with torch.no_grad(), evaluating(module):
            made = named_tensors(module(**tensors))
        return {name: tensor.float().cpu().numpy() for name, tensor in made.items()}

    return run


def _record(
    plan: Finetune,
    data: TrainData,
    trained: Trained,
    learned: str,
    values: tuple[float | None, float | None, float | None],
) -> Finetuned:
    tenth = max(1, len(trained.losses) // 10)
    first, last = trained.losses[:tenth], trained.losses[-tenth:]
    before, start, after = values
    return Finetuned(
        summary=plan.summary,
        learned_from=learned,
        samples=data.size,
        steps=trained.steps,
        resumed_from=trained.resumed_from,
        kept_step=trained.kept_step,
        seconds=trained.seconds,
        first_loss=sum(first) / len(first),
        last_loss=sum(last) / len(last),
        before=before,
        start=start,
        after=after,
        remarks=trained.remarks,
    )
