"""Small PyTorch modules, each of a kind that people bring."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Recurrent(nn.Module):
    """A recurrent layer, whatever its order of axes, and a head on every step; `time_first` says that inputs are that way too."""

    def __init__(self, layer: nn.RNNBase, *, time_first: bool = False) -> None:
        super().__init__()
        self.layer = layer
        self.turned = not layer.batch_first and not time_first
        self.head = nn.Linear(6 * (1 + layer.bidirectional), 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.layer(x.transpose(0, 1) if self.turned else x)
        return self.head(y.transpose(0, 1) if self.turned else y)


class Streaming(nn.Module):
    """An LSTM of two layers whose state is an input and an output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(6, 4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> dict[str, Tensor]:
        y, (h, c) = self.layer(x, (h, c))
        return {"y": self.head(y[:, -1]), "h": h, "c": c}


class ConvLstm(nn.Module):
    """Columns of an image as steps, as readers of text have them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.lstm = nn.LSTM(32, 8, bidirectional=True, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.max_pool2d(self.bn(self.conv(x)).relu(), 2)
        self.lstm.flatten_parameters()
        return self.head(self.lstm(y.permute(0, 3, 1, 2).flatten(2))[0])


class Decoder(nn.Module):
    """A cell in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(8, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 6)
        c = torch.zeros_like(h)
        for step in range(3):
            h, c = self.cell(x[:, step], (h, c))
        return self.head(h)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, weights = self.attention(x, x, x)
        return y, weights


class Masked(nn.Module):
    """Tokens of which a boolean input hides some."""

    def __init__(self, encoder: nn.Module, *, pooled: bool = True) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(8, 3)
        self.pooled = pooled

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        y = self.encoder(x, src_key_padding_mask=hidden)
        return self.head(y.masked_fill(hidden[..., None], 0).sum(1) if self.pooled else y)


class Padded(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.again = nn.Conv2d(8, 8, 3, padding=1, padding_mode="zeros" if mode == "constant" else mode)
        self.head = nn.Linear(8, 3)
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(F.pad(x, (1, 2, 1, 1), mode=self.mode)).relu()
        return self.head(self.again(y).relu().mean((2, 3)))


class Resized(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 4, 3, padding=1)
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.interpolate(self.conv(x).relu(), **self.options))


class Caching(nn.Module):
    """Keeps what it made for one size, in an attribute that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.cache: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.cache is None or self.cache.shape[0] != x.shape[0]:
            self.cache = torch.arange(x.shape[0], dtype=torch.float32)[:, None] / 10
        return self.linear(x + self.cache)


class Counting(nn.Module):
    """Counts its calls, and writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.drop = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x.clamp_(-1, 1)
        return self.drop(self.linear(x))


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 2.0) -> Tensor:
        y = self.linear(x).relu()
        return self.head(y if mask is None else y * mask) * scale


class OneSample(nn.Module):
    """Code that fixes the batch, in one of the usual ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(400, 3)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.how == "reshape":
            return self.head(y.reshape(1, -1))
        if self.how == "squeeze":
            return self.head(y.squeeze(0).flatten()[None])
        if self.how == "int":
            return self.head(y.view(int(x.shape[0]), -1))
        return torch.stack([self.head(one.flatten()) for one in y])


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y if y.sum() > 0 else -y


class Returning(nn.Module):
    """Scores and what they were made of, packed by `give`."""

    def __init__(self, give: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)
        self.give = give

    def forward(self, x: Tensor) -> object:
        hidden = self.linear(x).relu()
        return self.give(self.head(hidden), hidden)
