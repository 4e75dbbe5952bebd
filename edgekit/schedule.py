"""How long, how fast and on what a network is trained: the choices that the command line and the recipe offer."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from edgekit.toml_file import Table

EPOCHS = 3
"""Passes over the data where neither epochs nor steps are asked for."""

DROPS = 0.5, 0.75
"""Where, as shares of all steps, the decay "step" divides the learning rate by 10."""

Count = Annotated[int, Field(ge=0)]
AtLeastOne = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Augment(Table):
    """How images are varied from epoch to epoch.

    Attributes:
        flip: mirror each image left to right, half of the time.
        crop: pixels of zeros around an image, out of which a window of its size is cut; 4 is usual for 32x32, 0 is none.
    """

    flip: bool = False
    crop: Count = 0


class Schedule(Table):
    """How a network is trained, whatever the loss. One step is one update of the weights.

    Attributes:
        epochs: passes over the data; 3 when `steps` are not given either.
        steps: updates of the weights, in the place of `epochs`.
        learning_rate: the highest, at the end of the warm-up.
        optimizer: "adamw", or "sgd" with momentum 0.9.
        weight_decay: of weights; never of parameters with one axis or none (biases, BatchNorm), nor of the learned scales of
            quantizers: what `FakeQuantize` trains, and what has a name that ends in ".scale".
        scale_learning_rate: factor on the learning rate of those scales; 0 keeps them as they are.
        decay: how the learning rate falls after the warm-up: "cosine" to 0, "step" by 10 after a half and three quarters of all
            steps, or "constant".
        warm_up: a share of all steps (below 1), or a number of steps, over which the learning rate rises from near 0.
        batch_size: samples that one process takes through the network at once.
        clip_norm: longest gradient, as one vector of all parameters; a longer one is shortened to it. 0 is no limit. SGD
            on networks of 4 bits, whose BatchNorms are folded, may diverge without one.
        accumulate: batches whose gradients are averaged for one step.
        mixed_precision: type that the network computes in, where that is safe; parameters stay float32. "fp16" needs a GPU.
        seed: of the order of samples, augmentation and dropout.
        save_every: steps between checkpoints; 0 saves at the end only.
        patience: evaluations without a better metric after which training ends and the best weights are taken; 0 is never, and keeps
            the last weights.
        track: where curves go: "tensorboard" files beside the checkpoints, "wandb" (Weights & Biases), or "none".

    Reference: Loshchilov, Hutter (2016), "SGDR: Stochastic Gradient Descent with Warm Restarts", arXiv:1608.03983, equation 5, without
        restarts, for "cosine"; He, Zhang, Ren, Sun (2015), "Deep Residual Learning for Image Recognition", arXiv:1512.03385,
        section 4.2, for "step"; Goyal et al. (2017), "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour",
        arXiv:1706.02677, section 2.2, for the warm-up.
    """

    epochs: AtLeastOne | None = None
    steps: AtLeastOne | None = None
    learning_rate: Positive = 1e-4
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: NotNegative = 1e-4
    scale_learning_rate: NotNegative = 1.0
    decay: Literal["cosine", "step", "constant"] = "cosine"
    warm_up: NotNegative = 0.05
    batch_size: AtLeastOne = 64
    clip_norm: NotNegative = 0.0
    accumulate: AtLeastOne = 1
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    save_every: Count = 200
    patience: Count = 0
    track: Literal["tensorboard", "wandb", "none"] = "tensorboard"

    @model_validator(mode="before")
    @classmethod
    def _some_length(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("epochs") is None and given.get("steps") is None:
            return given | {"epochs": EPOCHS}
        return given

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.epochs is not None and self.steps is not None:
            raise ValueError(f"epochs = {self.epochs} and steps = {self.steps}: give one of them")
        if self.warm_up >= 1 and not self.warm_up.is_integer():
            raise ValueError(f"warm_up = {self.warm_up:g}: expected a share below 1, or a whole number of steps")
        return self

    def total_steps(self, per_epoch: int | None) -> int | None:
        """Steps in all, when an epoch has so many; None when neither the data nor the schedule says how many."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None, "filled in by the validator"
        return None if per_epoch is None else self.epochs * per_epoch

    def rate_factor(self, step: int, steps: int) -> float:
        """What the learning rate is multiplied by in a step, counted from 0, of so many: above 0, at most 1."""
        warm = min(round(self.warm_up * steps) if self.warm_up < 1 else int(self.warm_up), steps)
        if step < warm:
            return (step + 1) / warm
        if self.decay == "constant":
            return 1.0
        if self.decay == "step":
            return float(0.1 ** sum(step >= share * steps for share in DROPS))
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))
