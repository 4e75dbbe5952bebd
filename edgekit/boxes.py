"""Reading detections from the outputs of detectors, and how far two sets of them are the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
F64 = NDArray[np.float64]

LEAST_SCORE = 0.25
NEARLY = 0.05
"""What a score may be under that in the other model: users can rely on no box whose score lies on the threshold."""
SAME_OBJECT, SAME_BOX = 0.45, 0.5
"""Intersection over union: of two boxes of which non-maximum suppression keeps one; of two that are the same detection."""
LEAST_ANCHORS = 64
MOST_COLUMNS = 512
MOST_CANDIDATES = 1000


@dataclass(frozen=True, slots=True)
class Detections:
    """Of one sample: corners `(n, 4)` as x1, y1, x2, y2, scores `(n,)` and classes `(n,)`, the best first."""

    corners: F64
    scores: F64
    classes: NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Layout:
    """How detections are written.

    Attributes:
        turned: anchors come last, in an output of both boxes and scores.
        whether: the first score says whether there is an object at all, the others which.
        background: the class of no object, 0 or -1; None where there is none.
        sizes: boxes are centers and sizes, not corners.
        coefficients: of masks, behind the scores (YOLO for segmentation).
        cells: of the finest of three square grids, each side, where boxes are offsets from a cell and logarithms of sizes (YOLOX).
    """

    turned: bool = False
    whether: bool = False
    background: int | None = None
    sizes: bool = False
    coefficients: int = 0
    cells: int = 0


def detection_maps(outputs: Mapping[str, Array]) -> Iterator[tuple[str, ...]]:
    """The outputs that detections may be read from: boxes and scores apart, or side by side in one."""
    maps = {name: array for name, array in outputs.items() if array.ndim == 3 and array.dtype.kind == "f"}
    boxes = [name for name, array in maps.items() if array.shape[2] == 4 and array.shape[1] >= LEAST_ANCHORS]
    scores = [name for name, array in maps.items() if _are_scores(array)]
    yield from (
        (name, other) for name in boxes for other in scores if other != name and _anchors_match(maps[name], maps[other])
    )
    for name, array in maps.items():
        table = _table(array)
        sized = table.shape[1] >= LEAST_ANCHORS and 5 <= table.shape[2] <= MOST_COLUMNS
        in_pixels = sized and float(np.abs(table[:, :, :4]).max(initial=0)) > 2  # numbers up to 1 could be anything
        if not in_pixels or not _are_boxes(table[:, :, :4]):
            continue
        if _are_scores(table[:, :, 4:]):
            yield (name,)
        prototypes = (
            other for other, found in outputs.items() if found.ndim == 4 and found.shape[1] < table.shape[2] - 4
        )
        yield from (
            (name, other)
            for other in prototypes
            if _are_scores(table[:, :, 4 : table.shape[2] - outputs[other].shape[1]])
        )


def _anchors_match(boxes: Array, scores: Array) -> bool:
    return boxes.shape[:2] == scores.shape[:2]


def _are_scores(array: Array) -> bool:
    return bool((array >= -1e-3).all() and (array <= 1 + 1e-3).all())


def _table(array: Array) -> Array:
    """`(N, anchors, columns)`: there are more anchors than columns."""
    return array if array.shape[1] >= array.shape[2] else array.transpose(0, 2, 1)


def layout_of(outputs: Sequence[Array]) -> Layout:
    """How the float model writes detections: boxes `(N, A, 4)` and scores `(N, A, C)`, or one `(N, A, 4 + C)`, `(N, 4 + C, A)` or, with
    the score of there being an object before those of the classes, `(N, A, 5 + C)`; beside prototypes of masks `(N, M, H, W)`, its last
    M columns are their coefficients.
    """
    if len(outputs) == 2 and outputs[1].ndim == 3:
        boxes, scores = outputs
        background = None
        if scores.shape[2] > 1 and float(np.abs(scores.sum(axis=2, dtype=np.float64) - 1).max(initial=0)) < 1e-2:
            background = 0 if scores[:, :, 0].mean() >= scores[:, :, -1].mean() else -1
        return Layout(background=background, sizes=_are_sizes(boxes))
    turned = outputs[0].shape[1] < outputs[0].shape[2]
    table = _table(outputs[0])
    boxes, whether = table[:, :, :4], not turned and table.shape[2] > 5
    cells = _cells(boxes) if (boxes[..., 2:] < 0).any() else 0
    coefficients = outputs[1].shape[1] if len(outputs) == 2 else 0
    return Layout(turned, whether and not coefficients, None, cells > 0 or _are_sizes(boxes), coefficients, cells)


def read_boxes(outputs: Sequence[Array], layout: Layout) -> list[Detections]:
    """The detections of each sample, the nearly sure ones too, after non-maximum suppression within classes."""
    boxes, scores = boxes_and_scores(outputs, layout)
    corners = _corners(boxes) if layout.sizes else boxes
    return [_suppressed(each, some) for each, some in zip(corners, scores, strict=True)]


def boxes_and_scores(outputs: Sequence[Array], layout: Layout) -> tuple[F64, F64]:
    """Boxes `(N, anchors, 4)` as they are written, and the scores of classes `(N, anchors, classes)`."""
    arrays = [np.asarray(array, np.float64) for array in outputs]
    if len(arrays) == 2 and not layout.coefficients:
        boxes, scores = arrays
    else:
        table = arrays[0].transpose(0, 2, 1) if layout.turned else arrays[0]
        boxes, scores = table[:, :, :4], table[:, :, 4 : table.shape[2] - layout.coefficients]
    if layout.whether:
        scores = scores[:, :, :1] * scores[:, :, 1:]
    if layout.background is not None:
        scores = scores[:, :, 1:] if layout.background == 0 else scores[:, :, :-1]
    return _on_grids(boxes, layout.cells) if layout.cells else boxes, scores


def _are_boxes(boxes: Array) -> bool:
    """Whether four numbers each are corners in order, centers and sizes, or offsets on known grids."""
    return not (_are_sizes(boxes) and bool((boxes[..., 2:] < 0).any())) or _cells(boxes) > 0


def _cells(boxes: Array) -> int:
    """The cells along a side of the finest of three grids, each half as fine, that have as many as there are boxes; or 0."""
    side = round(float(np.sqrt(boxes.shape[1] * 16 / 21)))
    return side if side % 4 == 0 and 21 * side * side == 16 * boxes.shape[1] else 0


def _on_grids(boxes: F64, cells: int) -> F64:
    """Centers and sizes in pixels; cells of the finest grid have 8.

    Reference: Ge et al. 2021, YOLOX, arXiv 2107.08430.
    """
    places, strides = [], []
    for step in (1, 2, 4):
        rows, columns = np.divmod(np.arange((cells // step) ** 2), cells // step)
        places.append(np.stack([columns, rows], axis=1))
        strides.append(np.full(len(rows), 8.0 * step))
    stride = np.concatenate(strides)[:, None]
    sizes = np.exp(np.minimum(boxes[..., 2:], 10.0))
    return np.concatenate([(boxes[..., :2] + np.concatenate(places)) * stride, sizes * stride], axis=-1)


def _are_sizes(boxes: Array) -> bool:
    """Whether the last two numbers are sizes: a far corner is never before the near one, a size is often less than a center."""
    return bool((boxes[..., 2:] < boxes[..., :2]).mean() > 0.01)


def _corners(boxes: F64) -> F64:
    halves = boxes[..., 2:] / 2
    return np.concatenate([boxes[..., :2] - halves, boxes[..., :2] + halves], axis=-1)


def _suppressed(corners: F64, scores: F64) -> Detections:
    classes, best = scores.argmax(axis=1), scores.max(axis=1, initial=0.0)
    order = np.argsort(-best, kind="stable")[:MOST_CANDIDATES]
    order = order[best[order] > LEAST_SCORE - NEARLY]
    kept: list[int] = []
    for index in order:
        rivals = [k for k in kept if classes[k] == classes[index]]
        if not rivals or float(_iou(corners[[index]], corners[rivals]).max()) <= SAME_OBJECT:
            kept.append(int(index))
    return Detections(corners[kept], best[kept], classes[kept])


def both_found(ours: Detections, theirs: Detections) -> NDArray[np.float64]:
    """1 for each sure detection of either side that the other has too, 0 for the rest; the mean is the F1 of both.

    Each, the best first, is matched with one of the same class that it overlaps most, be that one sure or nearly so.
    """
    return np.concatenate([_found(ours, theirs), _found(theirs, ours)])


def _found(wanted: Detections, among: Detections) -> NDArray[np.float64]:
    overlap = _iou(wanted.corners, among.corners)
    overlap[wanted.classes[:, None] != among.classes[None, :]] = 0.0
    found = np.zeros(len(wanted.scores))
    for index, row in enumerate(overlap):
        best = int(row.argmax()) if len(row) else -1
        if best >= 0 and row[best] >= SAME_BOX:
            found[index] = 1.0
            overlap[:, best] = 0.0
    return found[wanted.scores > LEAST_SCORE]


def _iou(a: F64, b: F64) -> F64:
    """Intersection over union of corners `(n, 4)` and `(m, 4)`: `(n, m)`."""
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    inside = np.clip(high - low, 0, None).prod(axis=2)
    areas = [np.clip(x[:, 2:] - x[:, :2], 0, None).prod(axis=1) for x in (a, b)]
    return np.asarray(inside / np.maximum(areas[0][:, None] + areas[1][None, :] - inside, 1e-12))
