"""The operators of a random graph: how each is drawn, in the form that its opset has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import fuzz_layers as layers
import fuzz_movement as movement
import fuzz_numbers as numbers
from fuzz_graphs import Draft, Tensor


@dataclass(frozen=True, slots=True)
class Operator:
    """How often something is drawn, for tensors of which ranks, from which opset on."""

    weight: float
    make: Callable[[Draft, Tensor], object]
    ranks: tuple[int, ...] = (1, 2, 3, 4, 5)
    since: int = 7
    until: int = 99

    def takes(self, draft: Draft, x: Tensor) -> bool:
        return x.rank in self.ranks and self.since <= draft.opset <= self.until


OPERATORS = (
    Operator(14, layers.conv, (3, 4, 5)),
    Operator(4, layers.conv_activated, (3, 4)),
    Operator(3, layers.conv_transpose, (3, 4)),
    Operator(2, layers.residual, (4,)),
    Operator(1, layers.squeeze_excite, (4,)),
    Operator(14, layers.gemm, (2,)),
    Operator(8, layers.matmul, (2, 3, 4)),
    Operator(1, layers.matmul_odd, (1, 2, 3, 4)),
    Operator(3, layers.matmul_pair, (2, 3, 4)),
    Operator(2, layers.projections, (2, 3)),
    Operator(2, layers.attention, (3,)),
    Operator(1, layers.einsum, (3,), since=12),
    Operator(3, layers.recurrent, (3,)),
    Operator(3, layers.batchnorm, (2, 3, 4)),
    Operator(2, layers.layernorm, (2, 3, 4), since=17),
    Operator(1, layers.decomposed_layernorm, (2, 3)),
    Operator(2, layers.other_norm, (3, 4)),
    Operator(8, numbers.with_constant),
    Operator(6, numbers.with_tensor),
    Operator(10, numbers.activation),
    Operator(3, numbers.clip),
    Operator(2, numbers.decomposed_activation),
    Operator(3, numbers.softmax, (2, 3, 4)),
    Operator(3, numbers.classifier, (2,)),
    Operator(2, numbers.where, since=9),
    Operator(2, numbers.casts),
    Operator(1, numbers.variadic, since=8),
    Operator(0.5, numbers.index_output, (2, 3, 4)),
    Operator(0.5, numbers.constants_only),
    Operator(3, numbers.reduce, (2, 3, 4)),
    Operator(5, numbers.pool, (3, 4)),
    Operator(3, numbers.pool_globally, (3, 4)),
    Operator(4, movement.concat, (1, 2, 3, 4)),
    Operator(3, movement.split, (2, 3, 4)),
    Operator(3, movement.concat_of_split, (2, 3, 4)),
    Operator(3, movement.slice_, (1, 2, 3, 4)),
    Operator(4, movement.pad, (2, 3, 4)),
    Operator(3, movement.resize, (3, 4)),
    Operator(4, movement.transpose, (2, 3, 4)),
    Operator(3, movement.reshape, (2, 3, 4)),
    Operator(2, movement.reshape_by_shape, (2, 3, 4)),
    Operator(3, movement.flatten, (2, 3, 4)),
    Operator(2, movement.squeeze),
    Operator(2, movement.unsqueeze, (1, 2, 3)),
    Operator(2, movement.gather, (2, 3, 4)),
    Operator(1.5, movement.embedding),
    Operator(1, movement.expand, since=8),
    Operator(2, movement.depth_space, (4,)),
    Operator(1, movement.tile, (2, 3)),
    Operator(2, movement.identity),
    Operator(0.7, movement.branch),
)
