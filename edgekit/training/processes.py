"""What several training processes do together; each function does nothing where there is one.

Gradients are averaged after the backward pass rather than by DistributedDataParallel, which must see every parameter used through one
call of one wrapped module: quantizers whose scales freeze midway, and projectors that a loss calls, are not so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from accelerate import Accelerator


def average(accelerator: Accelerator, tensors: Sequence[Tensor]) -> None:
    """Give each tensor its mean over all processes, in place; one message for each type."""
    if accelerator.num_processes == 1:
        return
    for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
        same = [tensor for tensor in tensors if tensor.dtype == dtype]
        mean = accelerator.reduce(torch.cat([tensor.reshape(-1) for tensor in same]), "mean")
        for tensor, part in zip(same, mean.split([tensor.numel() for tensor in same]), strict=True):
            tensor.copy_(part.view_as(tensor))


def average_buffers(accelerator: Accelerator, modules: Sequence[nn.Module]) -> None:
    """The same for what modules track, such as BatchNorm's statistics and observed ranges."""
    if accelerator.num_processes == 1:
        return
    buffers = [buffer for module in modules for buffer in module.buffers() if buffer.is_floating_point()]
    average(accelerator, [buffer for buffer in buffers if buffer.numel()])


def send_from_first(accelerator: Accelerator, tensors: Sequence[Tensor]) -> None:
    """Give each tensor what it is in the first process."""
    if accelerator.num_processes == 1:
        return
    from accelerate.utils import broadcast

    for tensor in tensors:
        tensor.copy_(broadcast(tensor.detach().clone(memory_format=torch.contiguous_format)))


def gathered(accelerator: Accelerator, value: Any) -> list[Any]:
    """An object of each process, in their order."""
    if accelerator.num_processes == 1:
        return [value]
    from accelerate.utils import gather_object

    return list(gather_object([value]))
