"""Calibration and evaluation data: arrays, images or a function, cut into batches for a model's inputs."""

from __future__ import annotations

from edgekit.data.datasets import BoundData, Dataset, example_arrays, open_data
from edgekit.data.images import Preprocess
from edgekit.data.samples import Batch, InputSpec

__all__ = ["Batch", "BoundData", "Dataset", "InputSpec", "Preprocess", "example_arrays", "open_data"]
