"""`--qat`, `--train-data`, `--distill`: train the source before it becomes a graph."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit.data import Dataset, Preprocess, example_arrays
from edgekit.finetune import Finetune, Finetuned
from edgekit.method import Method
from edgekit.metric import open_metric
from edgekit.pipelines.sources import inputs_of
from edgekit.progress import Progress
from edgekit.records import Source
from edgekit.target import Target


@dataclass(slots=True)
class Tuning:
    """Training as a step of `compress`.

    Attributes:
        rules, method: what quantizers are trained for, and how they start.
        samples: of the calibration data, that they start from.
        evaluate: the metric, as `compress` takes it.
        out: the output folder; checkpoints and curves go into a hidden one beside it.
        found: what the training came to, once it is over.
    """

    plan: Finetune
    rules: Target
    method: Method
    samples: int
    evaluate: Any
    preprocess: Preprocess | None
    out: Path
    on_progress: Progress
    found: Finetuned | None = None

    def train(self, calibration: Dataset, module: Any, origin: Source) -> Any:
        """The trained module.

        Raises:
            EdgekitError: see `edgekit.training.finetune.finetune`.
        """
        # Torch takes seconds to import, and nothing else here needs it.
        from edgekit.training.finetune import finetune, module_inputs

        arrays = inputs_of(example_arrays(calibration, self.samples), module)
        specs = module_inputs(module, arrays)
        metric = None if self.evaluate is None else open_metric(self.evaluate, specs, preprocess=self.preprocess)
        trained, self.found = finetune(
            module,
            self.plan,
            self.rules,
            self.method,
            arrays,
            preprocess=self.preprocess,
            metric=metric and (lambda run: metric(run).value),
            folder=self.out.parent / f".{self.out.name}.training",
            key=origin.sha256 or origin.name,
            on_progress=self.on_progress,
        )
        return trained
