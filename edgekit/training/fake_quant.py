"""Fake quantization: a tensor is rounded to a grid, bit for bit as ONNX Quantize/DequantizeLinear do, and gradients pass through."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx, nn

from edgekit.quant.affine import middle_code
from edgekit.quant.spec import INTEGER_RANGES, QuantParams

OPERATOR = "edgekit::FakeQuant"
"""What a quantizer is in an exported graph: `(x, scale, zero_point)` with the attributes axis, qmin and qmax."""
LEAST_SCALE = 1e-12
"""That a grid may begin with."""
LEAST_GAIN = 2.0**-10
"""Training may not take a scale to 0 or below."""
DEVIATIONS = 3.0
"""Standard deviations that half of a range is taken for."""
MOMENTUM = 0.01
"""Of the moving averages of extremes, for each batch."""


class FakeQuantize(nn.Module):
    """Rounds what passes through to the points of a grid: `real = (code - zero_point) * scale`.

    The scale, `()` or `(C,)`, is what it was to begin with times a parameter, the gain, so that a step of the optimizer is relative to
    it. It is learned unless `tracked`; then it follows the moving average of the extremes. The state_dict holds it and the zero point;
    the rest is the grid's kind and comes with the constructor.

    Attributes:
        dtype: of the codes, one of `edgekit.quant.spec.INTEGER_RANGES`.
        qmin, qmax: the codes in use, both ends included.
        axis: the channel axis of a scale for each channel, or None.
        tracked: the range follows the data while training.
        frozen: neither moves any more.
        enabled: off, numbers pass as they are.

    Reference: Esser, McKinstry, Bablani, Appuswamy, Modha (2020), "Learned Step Size Quantization", arXiv:1902.08153: the gradient of
        the scale, equation 3, and its factor, section 2.2, which is taken relative to the numbers here: with the paper's own, the small
        scales of 8-bit weights overshoot in one step of SGD. Moving averages: Jacob et al. (2018), arXiv:1712.05877, section 3.1.
    """

    gain: nn.Parameter
    base: Tensor
    zero_point: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, params: QuantParams, *, tracked: bool = False) -> None:
        super().__init__()
        if params.block_size:
            raise ValueError("grids in blocks are for weights that are quantized after training")
        self.dtype, self.qmin, self.qmax, self.axis = params.dtype, params.qmin, params.qmax, params.axis
        self.symmetric = bool(np.all(params.zero_point == middle_code(params.dtype)))
        self.tracked, self.frozen, self.enabled = tracked, False, True
        scale = torch.from_numpy(np.array(params.scale, np.float32)).clamp_min(LEAST_SCALE)
        self.register_buffer("base", scale)
        self.gain = nn.Parameter(torch.ones_like(scale), requires_grad=not tracked)
        zero_point = np.broadcast_to(params.zero_point, params.scale.shape)
        self.register_buffer("zero_point", torch.from_numpy(np.array(zero_point, np.int64)))
        self.register_buffer("low", torch.tensor(params.low, dtype=torch.float32), persistent=tracked)
        self.register_buffer("high", torch.tensor(params.high, dtype=torch.float32), persistent=tracked)

    @property
    def scale(self) -> Tensor:
        """The step of the grid as it is now."""
        return self.base * self.gain.detach()

    def forward(self, x: Tensor) -> Tensor:
        """The nearest points of the grid; in training mode NaN stays NaN, so that it is seen, else it is the lowest point."""
        if not self.enabled:
            return x
        if torch.compiler.is_exporting():
            return self._symbol(x)
        if self.training and not self.frozen and self.tracked:
            self._track(x.detach())
        self._keep_positive()
        made = cast(Tensor, _Round.apply(x.float(), self.gain, self.base, *self._bounds(), self.axis))  # type: ignore[no-untyped-call]
        if not self.training:
            made = torch.where(torch.isnan(made), self._lowest(x.dim()), made)
        return made.to(x.dtype)

    def freeze(self) -> None:
        """Leave the grid where it is from now on."""
        self.frozen = True
        self.gain.requires_grad_(False)

    def params(self) -> QuantParams:
        """The grid as it is now; it is not to be moved."""
        self._keep_positive()
        return QuantParams(
            dtype=self.dtype,
            scale=self.scale.cpu().numpy().copy(),
            zero_point=self.zero_point.cpu().numpy().copy(),
            axis=self.axis,
            narrow_range=self.qmin > INTEGER_RANGES[self.dtype][0],
            observer="fake_quant",
            fixed=True,
        )

    def extra_repr(self) -> str:
        """The kind of the grid, for `print(module)`."""
        where = "" if self.axis is None else f", axis={self.axis}"
        return f"{self.dtype} {self.qmin}..{self.qmax}{where}, {'tracked' if self.tracked else 'learned'}"

    def _keep_positive(self) -> None:
        self.gain.data.clamp_(min=LEAST_GAIN)  # not seen by autograd: a grid may be in use twice in one step

    def _bounds(self) -> tuple[Any, Any]:
        """The lowest and highest multiple of the scale that has a code; numbers where all channels have the same."""
        if self.symmetric and not self.tracked:
            middle = middle_code(self.dtype)
            return float(self.qmin - middle), float(self.qmax - middle)
        if self.axis is None:
            zero_point = int(self.zero_point)
            return float(self.qmin - zero_point), float(self.qmax - zero_point)
        zero_points = self.zero_point.to(self.base.dtype)
        return self.qmin - zero_points, self.qmax - zero_points

    def _lowest(self, rank: int) -> Tensor:
        lowest = (self.qmin - self.zero_point) * self.scale
        return lowest if self.axis is None else lowest.reshape(_along(self.axis, rank))

    def _symbol(self, x: Tensor) -> Tensor:
        attributes: dict[str, Any] = {"qmin": self.qmin, "qmax": self.qmax}
        if self.axis is not None:
            attributes["axis"] = self.axis
        inputs = (x, self.scale, self.zero_point)
        return torch.onnx.ops.symbolic(OPERATOR, inputs, attributes, dtype=x.dtype, shape=x.shape, version=1)

    def _track(self, x: Tensor) -> None:
        """Move the range a little towards the extremes of a batch; a weight's is taken as it is, for each channel."""
        if self.axis is not None:
            others = [axis for axis in range(x.dim()) if axis != self.axis]
            largest = x.abs().amax(others)
            self.base.copy_((largest / self.qmax).clamp_min(LEAST_SCALE))
            return
        low, high = x.aminmax()
        known = torch.isfinite(self.low) & torch.isfinite(self.high)
        self.low.copy_(torch.where(known, self.low + MOMENTUM * (low.clamp_max(0) - self.low), low.clamp_max(0)))
        self.high.copy_(torch.where(known, self.high + MOMENTUM * (high.clamp_min(0) - self.high), high.clamp_min(0)))
        middle = middle_code(self.dtype)
        if self.symmetric:
            extent = torch.maximum(-self.low, self.high)
            self.base.copy_((extent / (self.qmax - middle)).clamp_min(LEAST_SCALE))
            return
        scale = ((self.high - self.low) / (self.qmax - self.qmin)).clamp_min(LEAST_SCALE)
        self.base.copy_(scale)
        self.zero_point.copy_((self.qmin - torch.round(self.low / scale)).clamp(self.qmin, self.qmax))


class Binarize(FakeQuantize):
    """A weight becomes its signs times one scale for each output channel, the mean of its magnitudes; 0 counts as positive.

    The scale is a function of the weight, so that nothing of the grid is learned. Exported (`binarized`), a weight is on the codes -1
    and 1 of int2, the smallest type that runtimes have.

    Reference: Rastegari, Ordonez, Redmon, Farhadi (2016), "XNOR-Net", arXiv:1603.05279: the scale, equation 6; the gradient passes where
        a weight is within 1, section 3.1.
    """

    def __init__(self, params: QuantParams) -> None:
        super().__init__(params, tracked=True)

    def forward(self, x: Tensor) -> Tensor:
        """The two points of each channel's grid."""
        if not self.enabled:
            return x
        if torch.compiler.is_exporting():
            return self._symbol(x)
        others = [axis for axis in range(x.dim()) if axis != self.axis]
        scale = x.float().abs().mean(others, keepdim=True)
        points = torch.where(x < 0, -scale, scale)
        self.base.copy_(scale.detach().flatten().clamp_min(LEAST_SCALE))
        passed = torch.nn.functional.hardtanh(x.float()) * scale.detach() + torch.sign(points.detach()) * scale
        return (points.detach() + (passed - passed.detach())).to(x.dtype)


def binarized(module: nn.Module) -> nn.Module:
    """A module whose binary weights are the two numbers that they stand for, as an exported graph has them; itself without any."""
    if not isinstance(module, fx.GraphModule) or not any(isinstance(child, Binarize) for child in module.modules()):
        return module
    copied = copy.deepcopy(module)
    for node in copied.graph.nodes:
        if node.op == "call_module" and isinstance(binarize := copied.get_submodule(str(node.target)), Binarize):
            weight = operator.attrgetter(str(node.args[0].target))(copied)
            with torch.no_grad():
                weight.copy_(binarize(weight))
    return copied


class RoundBias(nn.Module):
    """Rounds a bias `(C,)` as a target does that adds it to integer sums: to whole multiples of input scale times weight scale."""

    def __init__(self, activation: FakeQuantize, weight: FakeQuantize) -> None:
        super().__init__()
        self._grids = (activation, weight)  # in a tuple, because they are parts of the graph already

    def forward(self, bias: Tensor) -> Tensor:
        """The rounded bias; the gradient passes as if it were not."""
        activation, weight = self._grids
        if not (activation.enabled and weight.enabled) or torch.compiler.is_exporting():
            return bias
        step = activation.scale * weight.scale
        return bias + (torch.round(bias.detach() / step) * step - bias.detach())


class _Round(torch.autograd.Function):
    """`clamp(round(x / scale), low, high) * scale`; straight through for x inside the range, the gradient of LSQ for the gain."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, base: Tensor, low: Any, high: Any, axis: int | None) -> Tensor:
        shape = () if axis is None else _along(axis, x.dim())
        step = (base * gain).reshape(shape)
        if isinstance(low, Tensor):
            low, high = low.reshape(shape), high.reshape(shape)
        made = (x / step).round_().clamp_(low, high).mul_(step)
        ctx.save_for_backward(x, made, step, base.clone())  # a tracked one moves when its grid is used a second time
        ctx.low, ctx.high, ctx.axis = low, high, axis
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        x, made, step, base = ctx.saved_tensors
        (gradient,) = gradients
        if ctx.axis is None and not isinstance(ctx.low, Tensor):
            inside = _inside_of_tensor(gradient, x, step.item(), ctx.low, ctx.high)
        else:
            ratio = x / step
            inside = gradient * ((ratio >= ctx.low) & (ratio <= ctx.high))
        if not ctx.needs_input_grad[1]:
            return inside, None, None, None, None, None
        # Inside the range the scale's gradient is code - x / scale, outside it is the code: see equation 3.
        by_scale = (_sum(gradient, made, ctx.axis) - _sum(inside, x, ctx.axis)) / step.reshape(base.shape)
        low, high = (end.abs().max().item() if isinstance(end, Tensor) else abs(end) for end in (ctx.low, ctx.high))
        factor = 1.0 / math.sqrt(x.numel() / max(1, step.numel()) * max(high, 1.0))
        spread = step.reshape(base.shape) * ((low + high) / 2 / DEVIATIONS)
        return inside, by_scale * base * factor / spread.square(), None, None, None, None


def _inside_of_tensor(gradient: Tensor, x: Tensor, step: float, low: float, high: float) -> Tensor:
    """The gradient where x lies in the range: what a hard tanh hands back, in one pass."""
    least = 1e-4  # of a step: the ends themselves are inside, such as the zeros that a Relu makes
    return torch.ops.aten.hardtanh_backward(gradient, x, (low - least) * step, (high + least) * step)  # type: ignore[no-any-return]


def _sum(a: Tensor, b: Tensor, axis: int | None) -> Tensor:
    """The sum of products, over all axes but one."""
    if axis is None:
        strides = b.stride()
        order = sorted(
            range(b.dim()), key=lambda place: -strides[place]
        )  # as it lies in memory: flattening copies otherwise
        return torch.dot(a.permute(order).reshape(-1), b.permute(order).reshape(-1))
    return (a * b).sum([other for other in range(a.dim()) if other != axis])


def _along(axis: int, rank: int) -> tuple[int, ...]:
    return tuple(-1 if place == axis else 1 for place in range(rank))


def quantizers(module: nn.Module) -> list[FakeQuantize]:
    """All of a module's."""
    return [child for child in module.modules() if isinstance(child, FakeQuantize)]


@contextmanager
def without_quantizers(module: nn.Module) -> Iterator[None]:
    """A module for a while in float."""
    before = [(quantizer, quantizer.enabled) for quantizer in quantizers(module)]
    for quantizer, _ in before:
        quantizer.enabled = False
    try:
        yield
    finally:
        for quantizer, enabled in before:
            quantizer.enabled = enabled
