"""Small networks whose groups of channels are known: one for each way in which layers share channels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Chain(nn.Module):
    """Convolutions, normalizations and a flattening in front of a linear layer."""

    def __init__(self, activation: Callable[[], nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(8)
        self.act1 = activation()
        self.conv2 = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(12)
        self.act2 = nn.PReLU(12)
        self.fc1 = nn.Linear(12 * 4 * 4, 10)
        self.fc2 = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.norm1(self.conv1(x)))
        x = self.act2(self.norm2(self.conv2(x)))
        return self.fc2(torch.sigmoid(self.fc1(torch.flatten(x, 1))))


class Residual(nn.Module):
    """Two convolutions around an identity, and one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a = nn.Conv2d(8, 6, 3, padding=1)
        self.b = nn.Conv2d(6, 8, 3, padding=1)
        self.c = nn.Conv2d(8, 10, 3, padding=1)
        self.short = nn.Conv2d(8, 10, 1)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.stem(x))
        x = F.relu(x + self.b(F.relu(self.a(x))))
        x = self.c(x) + self.short(x)
        return self.head(x.mean((2, 3)))


class Dense(nn.Module):
    """A concatenation of three, one of them the network's input."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, padding=1)
        self.b = nn.Conv2d(3 + 6, 8, 3, padding=1)
        self.c = nn.Conv2d(3 + 6 + 8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.tanh(self.a(x))
        b = F.relu(self.b(torch.cat([x, a], 1)))
        return self.c(torch.cat([b, x, a], 1))


class Gated(nn.Module):
    """A split in two, in images and in tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        self.mix = nn.Conv2d(6, 8, 1)
        self.wide = nn.Linear(8, 20)
        self.narrow = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.conv(x).chunk(2, 1)
        x = self.mix(torch.sigmoid(b) * a).flatten(2).transpose(1, 2)
        value, gate = self.wide(x).chunk(2, -1)
        return self.narrow(value * F.silu(gate))


class Grouped(nn.Module):
    """A grouped convolution (4 groups of 4), a depthwise one, and a depthwise one with two outputs for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 1)
        self.grouped = nn.Conv2d(16, 24, 3, padding=1, groups=4)
        self.point = nn.Conv2d(24, 10, 1)
        self.depthwise = nn.Conv2d(10, 10, 3, padding=1, groups=10)
        self.twofold = nn.Conv2d(10, 20, 3, padding=1, groups=10)
        self.head = nn.Conv2d(20, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.grouped(F.relu(self.stem(x))))
        x = F.relu(self.depthwise(F.relu6(self.point(x))))
        return self.head(F.relu(self.twofold(x)))


class Upward(nn.Module):
    """Transposed convolutions: plain, grouped and depthwise, in one dimension and in three."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv1d(2, 8, 3, padding=1)
        self.up = nn.ConvTranspose1d(8, 12, 2, stride=2)
        self.grouped = nn.ConvTranspose1d(12, 6, 3, padding=1, groups=2)
        self.depthwise = nn.ConvTranspose1d(6, 6, 3, padding=1, groups=6)
        self.volume = nn.Conv3d(6, 5, 1)
        self.last = nn.Conv3d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.up(F.relu(self.a(x))))
        x = self.depthwise(F.relu(self.grouped(x)))
        return self.last(F.relu(self.volume(x[..., None, None])))


class Shared(nn.Module):
    """A convolution that runs twice, so that its inputs and outputs are the same channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(F.relu(self.twice(F.relu(self.twice(x)))))


class Squeeze(nn.Module):
    """A squeeze-excite block with a hard sigmoid, whose value at zero is not zero, and one mask for all channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.reduce = nn.Linear(8, 4)
        self.expand = nn.Linear(4, 8)
        self.mask = nn.Conv2d(8, 1, 1)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.stem(x))
        scale = F.hardsigmoid(self.expand(F.relu(self.reduce(F.adaptive_avg_pool2d(x, 1).flatten(1)))))
        x = x * scale.view(x.shape[0], x.shape[1], 1, 1)
        return self.head(x * torch.sigmoid(self.mask(x)))


class Norms(nn.Module):
    """A GroupNorm of four groups, one of a single group, an instance normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.groups = nn.GroupNorm(4, 16)
        self.b = nn.Conv2d(16, 6, 3, padding=1)
        self.layer = nn.GroupNorm(1, 6)
        self.c = nn.Conv2d(6, 6, 3, padding=1)
        self.instance = nn.InstanceNorm2d(6, affine=True)
        self.d = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.groups(self.a(x)))
        x = F.relu(self.layer(self.b(x)))
        return self.d(F.relu(self.instance(self.c(x))))


class Shuffle(nn.Module):
    """Two groups, shuffled."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1)
        self.b = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.c = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        count, channels, height, width = x.shape
        x = x.view(count, 2, channels // 2, height, width).transpose(1, 2).reshape(count, channels, height, width)
        return self.c(F.relu(self.b(x)))


class PadChannels(nn.Module):
    """Option A as a layer of its own."""

    def __init__(self, more: int) -> None:
        super().__init__()
        self.more = more

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))


class OptionA(nn.Module):
    """A residual block that doubles the width, with the padding in a layer or in forward."""

    def __init__(self, *, inside: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1 = nn.Conv2d(8, 10, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(10, 16, 3, padding=1)
        self.short = nn.Identity() if inside else PadChannels(8)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        short = self.short(x)
        if isinstance(self.short, nn.Identity):
            short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        return self.head(F.relu(self.conv2(F.relu(self.conv1(x))) + short).mean((2, 3)))


class Untraceable(nn.Module):
    """Option A in a forward whose way depends on its input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1 = nn.Conv2d(8, 10, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(10, 16, 3, padding=1)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.abs().sum() < 0:
            return x
        x = F.relu(self.stem(x))
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        return self.head(F.relu(self.conv2(F.relu(self.conv1(x))) + short).mean((2, 3)))


class SelfAttention(nn.Module):
    """Attention of one's own: queries, keys and values from three layers, or from one."""

    def __init__(self, width: int, heads: int, *, packed: bool = False, fixed: bool = False) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.embed_dim, self.fixed = heads, width // heads, width, fixed
        if packed:
            self.qkv = nn.Linear(width, 3 * width)
        else:
            self.q, self.k, self.v = (nn.Linear(width, width, bias=name != "k") for name in "qkv")
        self.packed = packed
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        count, tokens, _ = x.shape
        heads = 4 if self.fixed else self.num_heads
        if self.packed:
            q, k, v = self.qkv(x).reshape(count, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (layer(x).view(count, tokens, heads, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        joined = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.proj(joined.reshape(count, tokens, self.num_heads * self.head_dim))


class WidthFromInput(nn.Module):
    """Attention whose forward takes the width of the heads from its input, as most vision transformers do."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        count, tokens, width = x.shape
        qkv = self.qkv(x).reshape(count, tokens, 3, self.num_heads, width // self.num_heads).permute(2, 0, 3, 1, 4)
        weights = (qkv[0] @ qkv[1].transpose(-2, -1) * self.scale).softmax(-1)
        return self.proj((weights @ qkv[2]).transpose(1, 2).reshape(count, tokens, width))


class NormInside(nn.Module):
    """Attention that starts with its normalization, and has heads that are wider than the input together."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale, self.norm = heads, 6**-0.5, nn.LayerNorm(width)
        self.to_qkv = nn.Linear(width, 3 * heads * 6, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * 6, width), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.to_qkv(self.norm(x)).chunk(3, dim=-1)
        q, k, v = (part.reshape(*part.shape[:2], self.heads, -1).transpose(1, 2) for part in parts)
        joined = (q @ k.transpose(-1, -2) * self.scale).softmax(-1) @ v
        return self.to_out(joined.transpose(1, 2).flatten(2))


class GroupedQueries(nn.Module):
    """Four heads of queries that share two of keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = heads, heads // 2, width // heads
        self.wq, self.wo = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.wk, self.wv = (nn.Linear(width, width // 2, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for layer in (self.wq, self.wk, self.wv))
        k, v = (one.repeat_interleave(self.n_heads // self.n_kv_heads, 1) for one in (k, v))
        return self.wo(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TorchAttention(nn.Module):
    """torch's attention as a block uses it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


class BertSelf(nn.Module):
    """Heads that a layer outside joins, as in BERT."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_attention_heads, self.attention_head_size, self.all_head_size = heads, width // heads, width
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.num_attention_heads, self.attention_head_size).permute(0, 2, 1, 3)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor]:
        q, k, v = (self._heads(layer(hidden_states)) for layer in (self.query, self.key, self.value))
        context = F.softmax(q @ k.transpose(-1, -2) / self.attention_head_size**0.5, -1) @ v
        context = context.permute(0, 2, 1, 3).contiguous()
        return (context.view(*context.shape[:2], self.all_head_size),)


class BertAttention(nn.Module):
    """The layer around it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.self = BertSelf(width, heads)
        self.dense = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(self.self(x)[0])


class Transformer(nn.Module):
    """Two blocks over embedded tokens, with positions, a class token and a scale of each layer as parameters."""

    def __init__(self, attention: Callable[[int, int], nn.Module], width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 7, width))
        self.blocks = nn.ModuleList(TransformerBlock(attention(width, heads), width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class TransformerBlock(nn.Module):
    """Normalization first; the MLP has a scale for each channel."""

    def __init__(self, attention: nn.Module, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = attention
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.scale = nn.Parameter(0.5 + torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.scale * self.fc2(F.gelu(self.fc1(self.norm2(x))))
