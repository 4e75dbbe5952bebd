"""`--prune`, `--qat`, `--train-data`, `--distill`: cut and train the source before it becomes a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir

from edgekit.data import Dataset, Preprocess, example_arrays
from edgekit.errors import SourceError
from edgekit.finetune import Finetune, Finetuned
from edgekit.graph.run import Session
from edgekit.method import Method
from edgekit.metric import open_metric
from edgekit.pipelines.prune_graph import prune_graph
from edgekit.pipelines.pruning import PruneJob, prune_module, recovering
from edgekit.pipelines.quantize import Calibrating
from edgekit.pipelines.sources import input_specs, inputs_of
from edgekit.progress import Progress
from edgekit.pruning import Prune, Pruned
from edgekit.records import Source
from edgekit.target import Target


@dataclass(slots=True)
class Tuning:
    """Pruning and training as steps of `compress`.

    Attributes:
        plan, prune: what to do; one of them at least.
        rules, method: what quantizers are trained for, and how they start.
        samples: of the calibration data, that they start from.
        evaluate: the metric, as `compress` takes it.
        out: the output folder; checkpoints and curves go into hidden ones beside it.
        found, pruned: what training and pruning came to, once they are over.
        kept: the pruned module, in float, and samples of its inputs.
    """

    plan: Finetune | None
    prune: Prune | None
    rules: Target
    method: Method
    samples: int
    evaluate: Any
    preprocess: Preprocess | None
    out: Path
    on_progress: Progress
    found: Finetuned | None = None
    pruned: Pruned | None = None
    kept: tuple[Any, Any] | None = None

    def train(self, calibration: Dataset, module: Any, origin: Source) -> Any:
        """The module, cut and trained as asked.

        Raises:
            EdgekitError: see `edgekit.training.finetune.finetune` and `edgekit.training.prune.flow.prune`.
        """
        arrays = inputs_of(example_arrays(calibration, self.samples), module)
        tune = partial(self._tune, arrays, origin)
        masks = None
        if self.prune is not None:
            from edgekit.training.checkpoint import copied

            recovery = recovering(self.plan, self.prune, copied(module))  # a teacher is frozen
            job = PruneJob(
                self.prune,
                recovery,
                self.rules,
                arrays,
                tune,
                partial(self._batches, recovery, arrays),
                self._measure(module, arrays),
                self.on_progress,
            )
            module, masks, self.pruned = prune_module(job, module)
            self.kept = module, arrays
        if self.plan is not None and (self.prune is None or self.plan.qat):
            module, self.found = tune(module, self.plan, "", masks, False)
        return module

    def cut_graph(self, graph: ir.Model, examples: dict[str, Any], batches: Calibrating) -> ir.Model:
        """An ONNX source's graph, pruned as asked. Raises as `prune_graph` does."""
        if self.prune is None:
            return graph
        measure = self._measure_graph(graph)
        graph, self.pruned = prune_graph(
            graph, self.prune, examples, self.rules, batches, measure=measure, on_progress=self.on_progress
        )
        return graph

    def _measure_graph(self, graph: ir.Model) -> Callable[[ir.Model], float] | None:
        if self.evaluate is None:
            return None
        metric = open_metric(self.evaluate, input_specs(graph), preprocess=self.preprocess)
        return lambda one: metric(Session(one, optimize=True).run).value

    def _tune(
        self, arrays: Any, origin: Source, module: Any, plan: Finetune, label: str, masks: Any, gradually: bool
    ) -> tuple[Any, Finetuned]:
        # Torch takes seconds to import, and nothing else here needs it.
        from edgekit.training.finetune import finetune

        folder = f".{self.out.name}.training" + (f"-{label.replace(' ', '-')}" if label else "")
        return finetune(
            module,
            plan,
            self.rules,
            self.method,
            arrays,
            preprocess=self.preprocess,
            metric=self._metric(module, arrays),
            folder=self.out.parent / folder,
            key=" ".join(filter(None, (origin.sha256 or origin.name, self.prune.summary if self.prune else "", label))),
            on_progress=self.on_progress,
            masks=masks,
            gradually=gradually,
        )

    def _metric(self, module: Any, arrays: Any) -> Callable[[Any], float] | None:
        from edgekit.training.finetune import module_inputs

        if self.evaluate is None:
            return None
        metric = open_metric(self.evaluate, module_inputs(module, arrays), preprocess=self.preprocess)
        return lambda run: metric(run).value

    def _measure(self, module: Any, arrays: Any) -> Callable[[Any], float] | None:
        from edgekit.training.finetune import runner

        metric = self._metric(module, arrays)
        return None if metric is None else (lambda one: metric(runner(one)))

    def _batches(self, recovery: Finetune, arrays: Any, module: Any, count: int) -> Sequence[Any]:
        """The first batches of the training data."""
        from edgekit.training.finetune import first_batches, open_data_for

        data = open_data_for(recovery, module, arrays, self.preprocess, self.on_progress)
        return first_batches(data, recovery, count)

    def store(self, folder: Path) -> str:
        """Write the pruned module down, for `edgekit.load`; returns why that was not possible, or nothing."""
        if self.kept is None or self.pruned is None:
            return ""
        from edgekit.training.stored import save_module

        module, arrays = self.kept
        try:
            save_module(module, folder, arrays, structure=self.pruned.model_dump(mode="json"))
        except SourceError as error:
            return f"the pruned module is not kept beside the model: {error}"
        return ""
