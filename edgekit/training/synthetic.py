"""Calibration without data: images that the BatchNorms of a network cannot tell from those that it was trained on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from edgekit.data import InputSpec
from edgekit.errors import DataError
from edgekit.training.checkpoint import evaluating, quiet, users_error

STEPS = 30
LEARNING_RATE = 0.1
LEAST_DEVIATION = 1e-3
"""Channels that hardly vary are not held to it more closely than that."""
PIXELS_AT_ONCE, FEWEST_AT_ONCE, MOST_AT_ONCE = 1 << 20, 8, 64
"""Images whose statistics are matched together: all of their activations are kept for the gradient."""

_ATEN = 3, 4
_STATISTICS: dict[object, tuple[int, int]] = {
    F.batch_norm: (1, 2),
    torch.batch_norm: _ATEN,
    torch.ops.aten.batch_norm.default: _ATEN,
    torch.ops.aten._native_batch_norm_legit_no_training.default: _ATEN,
}
"""Where the running mean and variance stand among the arguments of each BatchNorm."""


def synthetic_samples(
    module: nn.Module | None, inputs: Sequence[InputSpec], count: int, seed: int
) -> dict[str, NDArray[Any]]:
    """`count` samples of each input, by its name: images by `synthetic_images` where that applies, or else N(0, 1) numbers.

    Args:
        module: what takes them, when it is at hand as a module; a single input is matched to its BatchNorms.
        inputs: of the model; axis 0 is the batch, all others have a size.

    Raises:
        DataError: an input of whole numbers, without a batch axis or of unknown size; `module` does not run on such images.
    """
    shapes = [_sample_shape(spec) for spec in inputs]
    if module is not None and len(inputs) == 1:
        images = synthetic_images(module, shapes[0], count, seed=seed, steps=STEPS)
        return {inputs[0].name: images.astype(inputs[0].dtype)}
    rng = np.random.default_rng(seed)
    normal = [rng.standard_normal((count, *shape)) for shape in shapes]
    return {spec.name: numbers.astype(spec.dtype) for spec, numbers in zip(inputs, normal, strict=True)}


def module_inputs(module: nn.Module, shape: tuple[int, ...]) -> list[InputSpec]:
    """The one float32 input of a module, whose samples have `shape`, under the name of forward's parameter.

    Raises:
        DataError: forward needs more than one input, or names none.
    """
    parameters = inspect.signature(module.forward).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    needed = [p for p in named if p.default is p.empty]
    if not named or len(needed) > 1:
        listed = ", ".join(p.name for p in needed) or "none by name"
        raise DataError(
            f"{type(module).__name__}.forward needs the inputs {listed}; synthetic calibration makes one: give real samples"
        )
    return [InputSpec((needed or named)[0].name, np.dtype(np.float32), (None, *shape))]


def synthetic_images(
    module: nn.Module, shape: tuple[int, ...], count: int, *, seed: int, steps: int
) -> NDArray[np.float32]:
    """Images `(count, *shape)` for which the inputs of each BatchNorm have about its running mean and standard deviation.

    They start as N(0, 1) numbers, and stay that where a module has no BatchNorm with running statistics. The images themselves
    are held to mean 0 and deviation 1 in each channel. The module is run in eval mode and stays as it is. The same arguments
    and number of torch's threads give the same images.

    Args:
        shape: of one image, channels first: `(C, H, W)`.
        steps: of Adam, a few dozen.

    Raises:
        DataError: the module does not run on such images.

    Reference: Cai, Yao, Dong, Gholami, Mahoney, Keutzer (2020), "ZeroQ: A Novel Zero Shot Quantization Framework",
        arXiv:2001.00281, equation 3. Its sum of squares is taken relative to each channel's deviation here, and as the mean over
        a BatchNorm's channels: otherwise layers of large numbers drown the others, and the result hangs on the seed.
    """
    generator = torch.Generator().manual_seed(seed)
    together = min(max(PIXELS_AT_ONCE // max(1, int(np.prod(shape[1:]))), FEWEST_AT_ONCE), MOST_AT_ONCE)
    parts = torch.randn((count, *shape), generator=generator).chunk(-(-count // together))
    with evaluating(module):
        return np.concatenate([_matched(module, part, steps) for part in parts])


def _sample_shape(spec: InputSpec) -> tuple[int, ...]:
    """Of one sample: all axes but the batch."""
    if spec.dtype.kind in "biu":
        raise DataError(
            f"{spec} holds whole numbers, which synthetic calibration cannot make up: real data is needed; give --calibration samples"
        )
    known = tuple(size for size in spec.shape[1:] if size is not None)
    if not spec.shape or len(known) < len(spec.shape) - 1:
        raise DataError(
            f"{spec} has no known size but for its batch; synthetic calibration needs one: export the model with a static size, "
            "or give --calibration samples"
        )
    return known


def _matched(module: nn.Module, start: Tensor, steps: int) -> NDArray[np.float32]:
    images = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([images], LEARNING_RATE)
    for _ in range(steps):
        distance = _distance(module, images)
        if distance is None:
            break
        (images.grad,) = torch.autograd.grad(distance, [images])  # of the images only: parameters get no gradient
        optimizer.step()
    return np.asarray(images.detach().numpy())


def _distance(module: nn.Module, images: Tensor) -> Tensor | None:
    """How far the statistics of these images are from the running ones, over all BatchNorms; None when there is none."""
    mode = _Statistics()
    try:
        with torch.enable_grad(), quiet(), mode:
            module(images.clone())  # whose first operator may work in place
    except Exception as error:  # whatever the user's code raises
        raise DataError(
            f"{type(module).__name__} does not run on synthetic images of shape {tuple(images.shape)}: {users_error(error)}; give the "
            "--input-shape that it takes, or --calibration samples"
        ) from error
    if not mode.distances:
        return None
    zero, one = torch.zeros(images.shape[1]), torch.ones(images.shape[1])
    return torch.stack([*mode.distances, _apart(images, zero, one)]).sum()


class _Statistics(TorchFunctionMode):
    """Notes, of each BatchNorm that runs, how far its input is from its running statistics: of modules and of exported programs."""

    def __init__(self) -> None:
        super().__init__()
        self.distances: list[Tensor] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        if func in _STATISTICS:
            mean, variance = (
                args[place] if len(args) > place else named.get(name)
                for place, name in zip(_STATISTICS[func], ("running_mean", "running_var"), strict=True)
            )
            if mean is not None and variance is not None:
                read = args[0] if args else named["input"]
                self.distances.append(_apart(read, mean, variance.sqrt()))
        return func(*args, **named)


def _apart(read: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """How far the means and standard deviations of the channels, axis 1, are from wanted ones, in units of those deviations."""
    over = [axis for axis in range(read.ndim) if axis != 1]
    unit = deviation.clamp_min(LEAST_DEVIATION)
    found = (read.var(over, correction=0) + LEAST_DEVIATION**2).sqrt()  # at 0 its gradient would be infinite
    return (((read.mean(over) - mean) / unit).square() + ((found - deviation) / unit).square()).mean()
