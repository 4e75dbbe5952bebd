"""What stands in for a metric when there is none: how many of the float model's decisions a quantized one makes too.

A decision is what a user of the outputs would do with them: take the largest score, read a text, draw boxes. A high signal-to-noise
ratio can hide lost decisions, and a low one need not lose any.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.boxes import LEAST_SCORE, both_found, boxes_and_scores, detection_maps, layout_of, read_boxes
from edgekit.errors import DataError
from edgekit.metric import Evaluate, Runner
from edgekit.records import Metric
from edgekit.words import nearest

Array = NDArray[Any]
Arrays = Mapping[str, Array]

AUTO, NONE = "auto", "none"
LEAST_STEPS = 4
"""Of an output that a text is read from."""
FEW = 8
"""Samples from which on scores can be told from marks."""
LEAST_LETTERS = 32
"""Classes from which on scores that are no probabilities may be of letters: fewer are kinds of words more often."""
LEAST_SHARE = 1e-6
"""Less is as good as nothing, and more than 1 less that as good as all."""
UNIT = 1e-3
"""How far sums and norms may be from 1."""


@dataclass(frozen=True, slots=True)
class Proxy:
    """A decision and where it is made.

    Attributes:
        kind: one of `PROXIES`.
        outputs: the names of the outputs that it reads.
    """

    kind: str
    outputs: tuple[str, ...]

    @property
    def name(self) -> str:
        """For people: `argmax agreement of 'scores'`."""
        return f"{PROXIES[self.kind].title} of {' and '.join(repr(name) for name in self.outputs)}"


@dataclass(frozen=True, slots=True)
class _Kind:
    """`agree` gives for each sample, or box, how far two outputs make the same decision, 0 to 1."""

    title: str
    suits: Callable[[Arrays, Arrays], tuple[str, ...]]
    agree: Callable[[Sequence[Array], Sequence[Array]], NDArray[np.float64]]


def choose_proxy(floats: Sequence[Arrays], feeds: Sequence[Arrays], kind: str = AUTO) -> Proxy | None:
    """The decision to judge by, from what the float model makes of some batches; None where its outputs hold none.

    Args:
        floats: outputs, batch by batch.
        feeds: inputs, batch by batch.
        kind: one of `PROXIES`, or "auto" for the first that suits.

    Raises:
        DataError: no such proxy, or no output suits it.
    """
    if kind not in (AUTO, *PROXIES):
        near = nearest(kind, [AUTO, NONE, *PROXIES])
        hint = f"did you mean {near!r}? " if near else ""
        raise DataError(f"--proxy {kind!r} is none; {hint}known: {', '.join((AUTO, NONE, *PROXIES))}")
    same = [batch for batch in floats if _shapes(batch) == _shapes(floats[0])]
    given = [batch for batch, output in zip(feeds, floats, strict=True) if _shapes(output) == _shapes(floats[0])]
    outputs, inputs = _joined(same), _joined(given)
    for name in _in_order(outputs) if kind == AUTO else (kind,):
        found = PROXIES[name].suits(outputs, inputs)
        if found:
            return Proxy(name, found)
    if kind == AUTO:
        return None
    shapes = ", ".join(f"{name!r} {array.dtype}{list(array.shape)}" for name, array in outputs.items())
    raise DataError(f"--proxy {kind}: no output suits it (found {shapes}); give another, or --evaluate module:function")


def _in_order(outputs: Arrays) -> list[str]:
    """The kinds as they are tried: beside probabilities of classes, several numbers from 0 to 1 may be places, such as those of eyes."""
    classes = any(map(_alternatives, _of_classes(outputs).values()))
    several = any(outputs[name].ndim == 2 and outputs[name].shape[1] > 1 for name in _suits_threshold(outputs, {}))
    return sorted(PROXIES, key=lambda name: name == "threshold" and classes and several)


def are_shares(proxy: Proxy, floats: Sequence[Arrays]) -> bool:
    """Whether a class is taken by numbers that are all from 0 to 1, in what the float model makes."""
    single = proxy.kind in ("argmax", "threshold")
    return single and all(_bounded(batch[name]) for batch in floats for name in proxy.outputs)


def in_focus(proxy: Proxy, outputs: Arrays, *, shares: bool = False) -> Arrays:
    """The numbers that a decision hangs on, to be compared as signals; of a detector the boxes, in pixels, and the scores apart.

    `shares` (see `are_shares`) as the logarithms of their odds: samples that are sure of their class hardly show by shares what disturbs
    others.

    All outputs where some of those that the proxy reads are missing.
    """
    if not all(name in outputs for name in proxy.outputs):
        return outputs
    arrays = [outputs[name] for name in proxy.outputs]
    if proxy.kind == "boxes":
        return dict(zip(("boxes", "scores"), boxes_and_scores(arrays, layout_of(arrays)), strict=True))
    if shares:
        arrays = [_log_odds(array) for array in arrays]
    return dict(zip(proxy.outputs, arrays, strict=True))


def open_proxy(proxy: Proxy, feeds: Sequence[Arrays], floats: Sequence[Arrays]) -> Evaluate:
    """The proxy as a metric: the mean agreement with `floats`, what the float model makes of `feeds`, over all samples or boxes."""

    def evaluate(run: Runner) -> Metric:
        agree = PROXIES[proxy.kind].agree
        values = [
            agree([found[name] for name in proxy.outputs], [wanted[name] for name in proxy.outputs])
            for found, wanted in ((run(batch), expected) for batch, expected in zip(feeds, floats, strict=True))
        ]
        each = np.concatenate(values)
        return Metric(name=proxy.name, value=float(each.mean()) if each.size else 1.0)

    return evaluate


def count_decisions(proxy: Proxy, floats: Sequence[Arrays]) -> int:
    """How many decisions the float model makes: samples, or boxes."""
    outputs = [[batch[name] for name in proxy.outputs] for batch in floats]
    found = sum(PROXIES[proxy.kind].agree(arrays, arrays).size for arrays in outputs)
    return found // 2 if proxy.kind == "boxes" else found  # of boxes, those of both models are judged


def _shapes(batch: Arrays) -> dict[str, tuple[int, ...]]:
    return {name: array.shape[1:] for name, array in batch.items()}


def _joined(batches: Sequence[Arrays]) -> Arrays:
    if any(array.ndim == 0 for batch in batches for array in batch.values()):
        return dict(batches[0])
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def _is_float(array: Array) -> bool:
    return array.dtype.kind == "f" and array.ndim > 0 and bool(np.isfinite(array).all())


def _sums_to_one(array: Array, axis: int) -> bool:
    return bool((array >= 0).all() and np.abs(array.sum(axis=axis, dtype=np.float64) - 1).max(initial=0) < UNIT)


def _distribution(array: Array, axis: int) -> bool:
    """Whether numbers along an axis are probabilities, or their logarithms."""
    if array.shape[axis] < 2 or not array.size:
        return False
    if _sums_to_one(array, axis):
        return True
    return bool((array <= UNIT).all()) and _sums_to_one(np.exp(array.astype(np.float64)), axis)


def _bounded(array: Array) -> bool:
    """Whether all numbers are from 0 to 1."""
    return bool((array >= -UNIT).all() and (array <= 1 + UNIT).all())


def _log_odds(shares: Array) -> Array:
    inside = np.clip(shares.astype(np.float64), LEAST_SHARE, 1 - LEAST_SHARE)
    return np.asarray(np.log(inside) - np.log1p(-inside))


def _first(outputs: Arrays, suits: Callable[[Array], bool]) -> tuple[str, ...]:
    return next(((name,) for name, array in outputs.items() if _is_float(array) and suits(array)), ())


def _suits_boxes(outputs: Arrays, inputs: Arrays) -> tuple[str, ...]:
    for names in detection_maps(outputs):
        maps = [outputs[name] for name in names]
        if any((found.scores > LEAST_SCORE).any() for found in read_boxes(maps, layout_of(maps))):
            return names
    return ()


def _suits_text(outputs: Arrays, inputs: Arrays) -> tuple[str, ...]:
    def suits(array: Array) -> bool:
        if array.ndim != 3:
            return False
        array = _by_sample(array)
        if array.shape[1] < LEAST_STEPS or array.shape[2] < 3:
            return False
        marks = _bounded(array)  # each on its own, as the keys of a piano; scores without Softmax go beyond
        if (marks or array.shape[2] < LEAST_LETTERS) and not _distribution(array, 2):
            return False
        return bool(_blank(array) is not None)

    return _first(outputs, suits)


def _by_sample(array: Array) -> Array:
    """Steps of a text as `(N, steps, classes)`; one sample at a time they may come as `(steps, 1, classes)`."""
    turned = array.shape[1] == 1 and array.shape[0] >= LEAST_STEPS
    return array.transpose(1, 0, 2) if turned else array


def _blank(array: Array) -> int | None:
    """The class of no letter: the first or the last, whichever most steps choose; None where steps choose others."""
    chosen = array.argmax(axis=2)
    counts = np.bincount(chosen.reshape(-1), minlength=array.shape[2])
    most = int(counts.argmax())
    return most if most in (0, array.shape[2] - 1) and counts[most] > 0.2 * chosen.size else None


def _suits_mask(outputs: Arrays, inputs: Arrays) -> tuple[str, ...]:
    def suits(array: Array) -> bool:
        maps = array.ndim >= 3 and not any(_distribution(array, axis) for axis in (1, array.ndim - 1))
        return bool(maps and _bounded(array) and (array > 0.5).any())

    return _first(outputs, suits)


def _suits_cosine(outputs: Arrays, inputs: Arrays) -> tuple[str, ...]:
    def suits(array: Array) -> bool:
        if array.ndim != 2 or array.shape[1] < 8:
            return False
        return bool(np.abs(np.linalg.norm(array.astype(np.float64), axis=1) - 1).max(initial=0) < UNIT)

    return _first(outputs, suits)


def _suits_threshold(outputs: Arrays, inputs: Arrays) -> tuple[str, ...]:
    def suits(array: Array) -> bool:
        bounded = bool((array >= 0).all() and (array <= 1).all()) and array.ndim in (1, 2)
        return bool(bounded and not (array.ndim == 2 and _distribution(array, 1)) and (array > 0.5).any())

    return _first(outputs, suits)


def _suits_argmax(outputs: Arrays, inputs: Arrays) -> tuple[str, ...]:
    def suits(array: Array) -> bool:
        if array.ndim == 2:
            return array.shape[1] > 1 and (len(array) < FEW or _alternatives(array))
        return array.ndim > 2 and any(_distribution(array, axis) for axis in (1, array.ndim - 1))

    return _first(_of_classes(outputs), suits) or _first(outputs, suits)


def _of_classes(outputs: Arrays) -> Arrays:
    """Outputs `(N, classes)` that are probabilities."""
    scores = {name: array for name, array in outputs.items() if array.ndim == 2 and _is_float(array)}
    return {name: array for name, array in scores.items() if _distribution(array, 1)}


def _alternatives(array: Array) -> bool:
    """Whether scores `(N, classes)` are of classes, one of them right, not marks: of those one is always the largest, or none below 0."""
    varied = len(set(array.argmax(axis=1).tolist())) > 1
    return varied and (_distribution(array, 1) or bool((array < 0).any()))


def _suits_equal(outputs: Arrays, inputs: Arrays) -> tuple[str, ...]:
    """Whole numbers are labels, whatever their type."""
    whole = [name for name, array in outputs.items() if array.ndim > 0 and _whole(array)]
    floats = any(array.dtype.kind == "f" and name not in whole for name, array in outputs.items())
    return () if floats else tuple(whole[:1])


def _whole(array: Array) -> bool:
    return array.dtype.kind != "f" or bool(np.isfinite(array).all() and (array == np.rint(array)).all())


def _agree_boxes(found: Sequence[Array], wanted: Sequence[Array]) -> NDArray[np.float64]:
    layout = layout_of(wanted)
    pairs = zip(read_boxes(found, layout), read_boxes(wanted, layout), strict=True)
    return np.concatenate([both_found(ours, theirs) for ours, theirs in pairs])


def _agree_text(found: Sequence[Array], wanted: Sequence[Array]) -> NDArray[np.float64]:
    ours, theirs = _by_sample(found[0]), _by_sample(wanted[0])
    blank = _blank(theirs)
    pairs = zip(_texts(ours, blank), _texts(theirs, blank), strict=True)
    return np.array([mine == other for mine, other in pairs], np.float64)


def _texts(array: Array, blank: int | None) -> list[list[int]]:
    """The best path of CTC: repeated classes once, blanks left out."""
    chosen = array.argmax(axis=2)
    starts = np.concatenate([np.ones_like(chosen[:, :1], bool), chosen[:, 1:] != chosen[:, :-1]], axis=1)
    return [row[keep & (row != blank)].tolist() for row, keep in zip(chosen, starts, strict=True)]


def _agree_mask(found: Sequence[Array], wanted: Sequence[Array]) -> NDArray[np.float64]:
    ours, theirs = ((array[0] > 0.5).reshape(len(array[0]), -1) for array in (found, wanted))
    union = (ours | theirs).sum(axis=1)
    return np.asarray(np.where(union > 0, (ours & theirs).sum(axis=1) / np.maximum(union, 1), 1.0))


def _agree_cosine(found: Sequence[Array], wanted: Sequence[Array]) -> NDArray[np.float64]:
    ours, theirs = (array[0].astype(np.float64).reshape(len(array[0]), -1) for array in (found, wanted))
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    return np.asarray(np.where(norms > 0, (ours * theirs).sum(axis=1) / np.maximum(norms, 1e-30), 0.0))


def _agree_threshold(found: Sequence[Array], wanted: Sequence[Array]) -> NDArray[np.float64]:
    same = (found[0] > 0.5) == (wanted[0] > 0.5)
    return np.asarray(same.reshape(len(same), -1).mean(axis=1), np.float64)


def _agree_argmax(found: Sequence[Array], wanted: Sequence[Array]) -> NDArray[np.float64]:
    array = wanted[0]
    axis = 1 if array.ndim == 2 or _distribution(array, 1) else array.ndim - 1
    same = found[0].argmax(axis=axis) == array.argmax(axis=axis)
    return np.asarray(same.reshape(len(same), -1).mean(axis=1), np.float64)


def _agree_equal(found: Sequence[Array], wanted: Sequence[Array]) -> NDArray[np.float64]:
    if found[0].shape != wanted[0].shape:
        return np.zeros(len(wanted[0]))
    same = found[0] == wanted[0]
    return np.asarray(np.asarray(same).reshape(len(wanted[0]), -1).mean(axis=1), np.float64)


PROXIES: dict[str, _Kind] = {
    "equal": _Kind("equality", _suits_equal, _agree_equal),
    "boxes": _Kind("F1 of boxes", _suits_boxes, _agree_boxes),
    "text": _Kind("equality of texts", _suits_text, _agree_text),
    "mask": _Kind("IoU of masks", _suits_mask, _agree_mask),
    "cosine": _Kind("cosine", _suits_cosine, _agree_cosine),
    "threshold": _Kind("agreement above 0.5", _suits_threshold, _agree_threshold),
    "argmax": _Kind("argmax agreement", _suits_argmax, _agree_argmax),
}
"""By the names that `--proxy` takes, in the order in which they are tried."""
