"""The windows of an AveragePool: explicit pads, and how many elements each window averages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class PoolWindows:
    """An AveragePool as a convolution with ones.

    Attributes:
        channels: of the input.
        kernel, strides, dilations: one number for each spatial axis.
        pads: begin of each spatial axis, then end of each; the end reaches as far as ceil_mode needs.
        counts: the divisor, shape `()`, or `(H_out, W_out)` where windows at the border count fewer elements.
    """

    channels: int
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    counts: NDArray[np.float64]


def pool_windows(node: ir.Node, shape: Sequence[int | None]) -> PoolWindows | str:
    """The windows of `node` over an input of `shape` `(N, C, ...)`, or why they are not known."""
    if shape[1] is None:
        return "its number of channels is not static"
    kernel = tuple(node.attributes.get_ints("kernel_shape", ()))
    strides = tuple(node.attributes.get_ints("strides", [1] * len(kernel)))
    dilations = tuple(node.attributes.get_ints("dilations", [1] * len(kernel)))
    include = bool(node.attributes.get_int("count_include_pad", 0))
    ceil, auto = bool(node.attributes.get_int("ceil_mode", 0)), node.attributes.get_string("auto_pad", "NOTSET")
    given = node.attributes.get_ints("pads", None) if auto == "NOTSET" else None
    explicit = tuple(given) if given is not None else (0, 0) * len(kernel)
    uniform = not ceil and auto in ("NOTSET", "VALID") and (include or not any(explicit))
    if uniform:
        count = np.asarray(np.prod(kernel), np.float64)
        return PoolWindows(shape[1], kernel, strides, dilations, explicit, count)
    known = [size for size in shape[2:] if size is not None]
    if len(known) != len(kernel):
        return f"its windows at the border depend on the input's shape {list(shape)}; export it with static sizes"
    axes = []
    for axis, size in enumerate(known):
        line = _Line(size, kernel[axis], strides[axis], dilations[axis])
        pads = line.same_pads(lower=auto == "SAME_LOWER") if auto.startswith("SAME") else explicit[axis :: len(kernel)]
        axes.append(line.windows((pads[0], pads[1]), ceil=ceil, include=include))
    reach = (*(begin for (begin, _), _ in axes), *(end for (_, end), _ in axes))
    counts = reduce(np.multiply.outer, [counts for _, counts in axes])
    return PoolWindows(shape[1], kernel, strides, dilations, reach, np.asarray(counts))


@dataclass(frozen=True, slots=True)
class _Line:
    """One spatial axis."""

    size: int
    kernel: int
    stride: int
    dilation: int

    @property
    def reach(self) -> int:
        return (self.kernel - 1) * self.dilation + 1

    def same_pads(self, *, lower: bool) -> tuple[int, int]:
        total = max(0, (-(-self.size // self.stride) - 1) * self.stride + self.reach - self.size)
        small, large = total // 2, total - total // 2
        return (large, small) if lower else (small, large)

    def windows(
        self, pads: tuple[int, int], *, ceil: bool, include: bool
    ) -> tuple[tuple[int, int], NDArray[np.float64]]:
        """Pads that give every window its full reach, and the counted elements of each window."""
        begin, end = pads
        room = self.size + begin + end - self.reach
        steps = (-(-room // self.stride) if ceil else room // self.stride) + 1
        if ceil and (steps - 1) * self.stride >= self.size + begin:
            steps -= 1  # the last window would start in the padding
        first, last = (-begin, self.size + end) if include else (0, self.size)
        starts = np.arange(steps)[:, None] * self.stride - begin
        places = starts + np.arange(self.kernel)[None, :] * self.dilation
        counts = np.count_nonzero((places >= first) & (places < last), axis=1).astype(np.float64)
        needed = (steps - 1) * self.stride + self.reach - self.size - begin
        return (begin, max(end, needed)), counts
