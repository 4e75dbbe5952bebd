"""`--prune`, `--macs`, `--speedup`, `--latency`, `--sparsity`: cut the source before it becomes a graph, and train what is left."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edgekit.channel_choice import Chosen
from edgekit.distillation import Distillation
from edgekit.errors import DataError
from edgekit.finetune import Finetune, Finetuned
from edgekit.pipelines.prune_amount import Amount
from edgekit.pipelines.prune_timing import Timing, TorchModel, float_graph
from edgekit.progress import Progress
from edgekit.pruning import DURING, SCRATCH, Prune, Pruned
from edgekit.schedule import Schedule
from edgekit.target import Target

if TYPE_CHECKING:
    from edgekit.training.prune.flow import Cutting

GRADIENT_BATCHES = 8
"""Of the training data, for criteria that need gradients."""

FEW_STEPS = 100
"""Recovery that is shorter is said to be short. (ResNet-20 on CIFAR-10 JPEGs with half of its MACs, by labels, answers and features: 0.55
top-1 after 16 steps, 0.73 after 50, 0.78 after 100, 0.80 after 200; 0.81 as it came.)"""

Train = Callable[..., tuple[Any, Finetuned]]
"""`(module, plan, label, masks, gradually)`: trains a copy."""


@dataclass(frozen=True, slots=True)
class PruneJob:
    """What one pruning works with.

    Attributes:
        plan: what to cut.
        recovery: how to train what is left.
        rules: whose numbers of channels are liked, where `plan` leaves that open.
        arrays: samples of the module's inputs.
        train: see `Train`.
        batches: of the training data, the first so many, for a module.
        measure: the metric of a module; None without one.
    """

    plan: Prune
    recovery: Finetune
    rules: Target
    arrays: Any
    train: Train
    batches: Callable[[Any, int], Sequence[Any]]
    measure: Callable[[Any], float] | None
    on_progress: Progress


def prune_module(job: PruneJob, module: Any) -> tuple[Any, Any, Pruned]:
    """The module, pruned and recovered; the masks of its zeros, if single weights went; and what it came to.

    Raises:
        EdgekitError: nothing can be cut, the goal cannot be met, or the recovery failed.
    """
    before = job.measure(module) if job.measure else None
    if job.plan.sparsity is not None:
        return _sparsified(job, module, before)
    return _cut(job, module, before)


def check_together(plan: Finetune | None, prune: Prune | None) -> None:
    """Refuse training that pruning would leave no place for.

    Raises:
        DataError: `plan` describes training in float, and `prune` asks for none.
    """
    if plan is not None and prune is not None and not prune.recover and not plan.qat:
        raise DataError(
            "training is described, and recover is false after pruning: nothing would be trained; drop one of them"
        )


def recovering(plan: Finetune | None, prune: Prune, teacher: Any) -> Finetune:
    """How what was cut is trained: as is asked for, but in float, and from the unpruned model where nobody else teaches."""
    plan = plan or Finetune()
    update: dict[str, Any] = {"qat": False}
    if plan.teacher is None:
        update["teacher"] = teacher
        labels_alone = prune.schedule == SCRATCH if plan.distill is None else plan.distill.hard == 1
        update["distill"] = None if labels_alone else plan.distill or Distillation()
    return plan.model_copy(update=update)


def _cut(job: PruneJob, module: Any, before: float | None) -> tuple[Any, Any, Pruned]:
    from edgekit.training.prune.flow import prune, shorten

    plan, trained = job.plan, list[Finetuned]()
    timing = Timing(plan, job.on_progress, trainable=True) if plan.timed else None

    def recover(cut: Any, schedule: Schedule, label: str) -> Any:
        if not plan.recover:
            return cut
        cut, found = job.train(cut, job.recovery.model_copy(update={"schedule": schedule}), label, None, False)
        trained.append(found)
        return cut

    job.on_progress("prune", 0, None)
    if plan.blocks is not None:
        cutting = shorten(module, plan, job.arrays, recover=recover, schedule=job.recovery.schedule)
        return cutting.module, None, _record(job, cutting, timing, before, trained)
    by_amount = Amount(plan, job.rules.pruning, trainable=True)

    def choose(prunable: Any, share: float) -> Chosen:
        if timing is None:
            return by_amount.choose(prunable.groups, prunable.costs, share)
        source = module if prunable.replaced else None  # a shortcut that was replaced may be slower as it came
        model = TorchModel(prunable.module, source, job.arrays, plan.ignore, job.rules.graph.opset)
        return timing.choose(prunable.groups, prunable.costs, share, model)

    cutting = prune(
        module,
        plan,
        job.arrays,
        score=lambda prunable: _score(job, prunable),
        choose=choose,
        recover=recover,
        schedule=job.recovery.schedule,
    )
    if timing is not None and trained:
        missed = timing.again(float_graph(cutting.module, job.arrays, job.rules.graph.opset))
        cutting = replace(cutting, remarks=(*cutting.remarks, *missed))
    return cutting.module, None, _record(job, cutting, timing, before, trained)


def _record(
    job: PruneJob, cutting: Cutting, timing: Timing | None, before: float | None, trained: list[Finetuned]
) -> Pruned:
    return Pruned(
        summary=job.plan.summary,
        layers=cutting.layers,
        macs=cutting.macs,
        parameters=cutting.parameters,
        blocks=cutting.blocks,
        **(timing.told if timing else {}),
        **_metrics(before, trained, job.measure(cutting.module) if job.measure and not trained else None),
        remarks=(*cutting.remarks, *_of_recovery(job, trained)),
    )


def _of_recovery(job: PruneJob, trained: Sequence[Finetuned]) -> Iterator[str]:
    """What the user should know of all trainings together."""
    steps = sum(one.steps for one in trained)
    if trained and steps < FEW_STEPS:
        on = "; --train-data may have more samples than calibrate" if job.recovery.data is None else ""
        yield f"recovery was {steps} steps, which is little: give more --epochs{on}"
    if trained:
        yield from trained[-1].remarks


def _sparsified(job: PruneJob, module: Any, before: float | None) -> tuple[Any, Any, Pruned]:
    from edgekit.training.checkpoint import copied
    from edgekit.training.prune.sparsity import layer_sparsity, plan_masks, sparsify

    plan = job.plan
    gradually = plan.schedule == DURING
    assert plan.sparsity is not None, "the goal"
    make = plan_masks if gradually and plan.recover else sparsify
    module, trained = copied(module), list[Finetuned]()
    job.on_progress("prune", 0, None)
    masks = make(module, plan.sparsity, scope=plan.scope, ignore=plan.ignore)
    if plan.recover:
        module, found = job.train(module, job.recovery, "sparse", masks, gradually)
        trained.append(found)
    layers = layer_sparsity(module)
    weights = sum(layer.weights for layer in layers)
    record = Pruned(
        summary=plan.summary,
        sparsity=sum(layer.zeros * layer.weights for layer in layers) / max(1, weights),
        **_metrics(before, trained, job.measure(module) if job.measure and not trained else None),
        remarks=(
            *(f"stays dense: {name}: {why}" for name, why in masks.dense.items()),
            NO_GAIN,
            *_of_recovery(job, trained),
        ),
    )
    return module, masks, record


NO_GAIN = (
    "zeros among the weights: no CPU runtime here computes faster for them (none was measured to); TensorRT may for 2:4 on GPUs that "
    "have it; files shrink when they are compressed"
)


def _metrics(before: float | None, trained: list[Finetuned], cut: float | None) -> dict[str, Any]:
    if not trained:
        return {"before": before, "cut": cut}
    return {
        "before": before,
        "cut": trained[0].before,
        "after": trained[-1].after,
        "recovered": trained[-1].repeatable,
    }


def _score(job: PruneJob, prunable: Any) -> None:
    """Give the groups scores by the criterion, on gradients where that needs them."""
    from edgekit.training.prune.flow import reaction_or_task
    from edgekit.training.prune.importance import GRADIENTS, IMPORTANCE, gather_gradients

    criterion = job.plan.criterion
    if criterion in GRADIENTS:
        batches = job.batches(prunable.module, GRADIENT_BATCHES)
        gather_gradients(prunable.module, batches, reaction_or_task(batches[0]), kind=GRADIENTS[criterion])
    if isinstance(criterion, str):
        prunable.score(IMPORTANCE[criterion])
    else:
        prunable.score(criterion, normalize=True)  # who wrote it had one group in mind
