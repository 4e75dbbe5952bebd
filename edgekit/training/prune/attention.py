"""`nn.MultiheadAttention` with any number of heads: torch's own takes for granted that heads make up the embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class HeadAttention(nn.MultiheadAttention):
    """Takes the place of an `nn.MultiheadAttention` that lost heads or channels; its parameters keep their names.

    It computes in its own forward what torch's does, for inputs of one embedding width, from the shapes of its weights.
    """

    @classmethod
    def of(cls, module: nn.MultiheadAttention) -> HeadAttention:
        """A module with the same parameters."""
        new = cls.__new__(cls)
        new.__dict__.update(module.__dict__)
        new._qkv_same_embed_dim = False  # keeps torch's fused encoder layers away from it
        return new

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As in `nn.MultiheadAttention`; inputs `(T, N, C)`, `(N, T, C)` with `batch_first`, or `(T, C)`."""
        batched = query.dim() == 3
        projected = self._projected(query, key, value)
        if not batched:
            projected = [one.unsqueeze(0) for one in projected]
        elif not self.batch_first:
            projected = [one.transpose(0, 1) for one in projected]
        queries, keys, values = (_in_heads(one, self.head_dim) for one in projected)
        mask = _joined(attn_mask, key_padding_mask, queries, batched=batched)
        dropout = self.dropout if self.training else 0.0
        attended: Tensor | None = None
        if need_weights:
            logits = queries @ keys.transpose(-2, -1) / self.head_dim**0.5
            attended = F.softmax(logits if mask is None else logits + mask, -1)
            joined = F.dropout(attended, dropout) @ values
            attended = attended.mean(1) if average_attn_weights else attended
            attended = attended if batched else attended.squeeze(0)
        else:
            joined = F.scaled_dot_product_attention(queries, keys, values, mask, dropout)
        output: Tensor = F.linear(joined.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        if not batched:
            return output.squeeze(0), attended
        return output if self.batch_first else output.transpose(0, 1), attended

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Queries, keys and values; of one input by one multiplication, which runtimes and quantizers see as a layer."""
        assert self.in_proj_weight is not None, "other kinds are not replaced"
        if query is key is value:
            return list(F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1))
        size, found = len(self.in_proj_weight) // 3, []
        for index, one in enumerate((query, key, value)):
            rows = slice(index * size, (index + 1) * size)
            bias = None if self.in_proj_bias is None else self.in_proj_bias[rows]
            found.append(F.linear(one, self.in_proj_weight[rows], bias))
        return found


def _in_heads(x: Tensor, size: int) -> Tensor:
    """`(N, T, heads * size)` as `(N, heads, T, size)`."""
    return x.reshape(*x.shape[:2], -1, size).transpose(1, 2)


def _joined(attention: Tensor | None, padding: Tensor | None, queries: Tensor, *, batched: bool) -> Tensor | None:
    """Both masks as numbers to add, of shape `(N or 1, heads or 1, T or 1, S)`."""
    masks = []
    if attention is not None:
        added = _added(attention, queries)
        heads = queries.shape[1]
        masks.append(added[None, None] if added.dim() == 2 else added.reshape(-1, heads, *added.shape[1:]))
    if padding is not None:
        added = _added(padding if batched else padding.unsqueeze(0), queries)
        masks.append(added[:, None, None])
    return None if not masks else masks[0] if len(masks) == 1 else masks[0] + masks[1]


def _added(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))
