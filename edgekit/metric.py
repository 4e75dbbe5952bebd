"""The number that decides whether a compressed model is good: the user's own, or top-1 on labelled data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.data import BoundData, InputSpec, Preprocess, open_data
from edgekit.errors import DataError
from edgekit.records import Metric
from edgekit.reference import resolve_reference, user_code

Arrays = Mapping[str, NDArray[Any]]
Runner = Callable[[Arrays], Arrays]
Evaluate = Callable[[Runner], Metric]
"""Runs a model, through the runner it is given, on data of its own; a higher value is better."""

BATCH_SIZE = 50
TOP1 = "top-1"


def open_metric(
    reference: str | Path | Callable[[Runner], float],
    inputs: Sequence[InputSpec],
    *,
    preprocess: Preprocess | None = None,
) -> Evaluate:
    """What `--evaluate` names: a function `run -> number` (`module:function` or the function itself), or labelled data for top-1.

    The function gets a callable that takes arrays by input name and returns arrays by output name. `preprocess` is for images; other
    labelled data needs none.

    Raises:
        DataError: it does not exist, or the data has no labels.
    """
    if callable(reference):
        return _of_function(reference, getattr(reference, "__name__", "metric"))
    text = str(reference)
    if ":" in text and not Path(text).exists():
        function = resolve_reference(text, error=DataError, what="--evaluate")
        if not callable(function):
            raise DataError(f"--evaluate {text!r} is a {type(function).__name__}; give a function that takes `run`")
        return _of_function(function, text.rpartition(":")[2])
    images = Path(text).is_dir() or text.lower().endswith(".zip")
    dataset = open_data(text, preprocess=preprocess if images else None)
    if not dataset.labelled:
        raise DataError(f"--evaluate {text}: has no labels; sort images into class folders, or add an array 'labels'")
    return top1(dataset.bind(inputs))


def top1(data: BoundData) -> Evaluate:
    """The share of samples whose highest score in the first output is that of their label."""

    def evaluate(run: Runner) -> Metric:
        right = count = 0
        for batch in data.batches(BATCH_SIZE):
            scores = next(iter(run(batch.feeds).values()))
            if scores.ndim != 2 or batch.labels is None:
                raise DataError(
                    f"top-1 needs an output of shape (N, classes), found {scores.shape}; give --evaluate module:function instead"
                )
            if len(batch) and int(batch.labels.max()) >= scores.shape[1]:
                raise DataError(
                    f"label {int(batch.labels.max())} is out of range: the model has {scores.shape[1]} classes"
                )
            right += int(np.sum(np.argmax(scores, axis=1) == batch.labels))
            count += len(batch)
        return Metric(name=TOP1, value=right / max(count, 1))

    return evaluate


def reference_of(evaluate: object) -> str:
    """What `--evaluate` named, so that `export` finds it from another folder; a function object cannot be found again."""
    if not isinstance(evaluate, str | Path):
        return ""
    location, colon, name = str(evaluate).rpartition(":")
    path = Path(location if colon else str(evaluate))
    return (
        f"{path.resolve()}{colon}{name}"
        if colon and path.is_file()
        else str(path.resolve())
        if path.exists()
        else str(evaluate)
    )


def _of_function(function: Callable[[Runner], Any], name: str) -> Evaluate:
    def evaluate(run: Runner) -> Metric:
        with user_code(DataError, f"--evaluate {name}"):
            value = function(run)
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"--evaluate {name} returned {value!r}; it must return one number, higher is better"
            ) from error
        if not math.isfinite(number):
            raise DataError(f"--evaluate {name} returned {number}; it must return a finite number")
        return Metric(name=name, value=number)

    return evaluate
