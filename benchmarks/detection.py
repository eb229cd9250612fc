"""FastestDet's map as boxes, and mAP50 against YOLO labels, in numpy.

With map channels (objectness, x, y, w, h, 80 classes) at cell (i, j) of an n x n grid, objectness and classes
being probabilities already:

    score = objectness^0.6 max(classes)^0.4
    centre = ((tanh(x) + j) / n, (tanh(y) + i) / n)      size = (sigmoid(w), sigmoid(h))

then non-maximum suppression per class at IoU 0.45. mAP50: per class, detections of all pictures in falling
order of score each take the best free ground-truth box of their picture if IoU >= 0.5; precision is made
falling and read at 101 recalls (as COCO does); the mean is over classes that have a ground-truth box.
Source of the decoding: dog-qiuqiu/FastestDet; of the measure: cocodataset/cocoapi.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

NMS_IOU = 0.45
MIN_SCORE = 0.001
MATCH_IOU = 0.5


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Boxes:
    """The n boxes of one picture; corners are (left, top, right, bottom) in shares of the picture: [n, 4]."""

    corners: Floats
    classes: Ints
    scores: Floats


def read_boxes(path: Path) -> Boxes:
    """Ground truth from lines of class, centre and size; no file means a picture without objects."""
    rows = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    values = np.array([[float(v) for v in row[:5]] for row in rows if row], np.float64).reshape(-1, 5)
    return Boxes(
        corners=_corners(values[:, 1:3], values[:, 3:5]),
        classes=values[:, 0].astype(np.int64),
        scores=np.ones(len(values)),
    )


def decode(output: npt.NDArray[np.float32]) -> Boxes:
    """Boxes of one map [85, n, n]."""
    grid = output.astype(np.float64)
    rows, columns = np.meshgrid(np.arange(grid.shape[1]), np.arange(grid.shape[2]), indexing="ij")
    scale = np.array([grid.shape[2], grid.shape[1]], np.float64)
    centres = (np.tanh(grid[1:3]) + np.stack([columns, rows])).reshape(2, -1).T / scale
    sizes = (1.0 / (1.0 + np.exp(-grid[3:5]))).reshape(2, -1).T
    # Integer kernels may give a probability slightly below zero, which has no power.
    objectness, classes = np.maximum(grid[0], 0.0).reshape(-1), np.maximum(grid[5:], 0.0).reshape(80, -1)
    scores = objectness**0.6 * classes.max(axis=0) ** 0.4
    kept = scores >= MIN_SCORE
    found = Boxes(
        corners=_corners(centres, sizes)[kept], classes=classes.argmax(axis=0)[kept], scores=scores[kept]
    )
    chosen = _suppressed(found)
    return Boxes(corners=found.corners[chosen], classes=found.classes[chosen], scores=found.scores[chosen])


def map50(found: Sequence[Boxes], truth: Sequence[Boxes]) -> float:
    """Mean average precision at IoU 0.5 over the pictures, in [0, 1]."""
    present = sorted({int(c) for boxes in truth for c in boxes.classes})
    return float(np.mean([_average_precision(found, truth, c) for c in present])) if present else 0.0


def _average_precision(found: Sequence[Boxes], truth: Sequence[Boxes], wanted: int) -> float:
    total = sum(int((boxes.classes == wanted).sum()) for boxes in truth)
    scores, hits = [], []
    for guess, real in zip(found, truth, strict=True):
        mine, theirs = guess.classes == wanted, real.classes == wanted
        overlap = iou(guess.corners[mine], real.corners[theirs])
        free = np.ones(overlap.shape[1], bool)
        order = np.argsort(-guess.scores[mine], kind="stable")
        for i in order:
            candidates = np.where(free, overlap[i], -1.0)
            best = int(candidates.argmax()) if len(candidates) else -1
            is_hit = best >= 0 and candidates[best] >= MATCH_IOU
            if is_hit:
                free[best] = False
            hits.append(is_hit)
        scores.append(guess.scores[mine][order])
    if not hits:
        return 0.0
    right = np.array(hits)[np.argsort(-np.concatenate(scores), kind="stable")]
    recall = right.cumsum() / total
    precision = right.cumsum() / np.arange(1, len(right) + 1)
    falling = np.maximum.accumulate(precision[::-1])[::-1]
    at = np.searchsorted(recall, np.linspace(0.0, 1.0, 101), side="left")
    return float(np.append(falling, 0.0)[at].mean())


def iou(a: Floats, b: Floats) -> Floats:
    """Intersection over union of boxes [n, 4] with boxes [m, 4]: [n, m]."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    both = np.prod(np.maximum(high - low, 0.0), axis=2)
    areas = [np.prod(x[:, 2:] - x[:, :2], axis=1) for x in (a, b)]
    union = areas[0][:, None] + areas[1][None, :] - both
    found: Floats = np.divide(both, union, out=np.zeros_like(both), where=union > 0)
    return found


def _suppressed(boxes: Boxes) -> list[int]:
    """Positions that survive non-maximum suppression within their class, best first."""
    order = np.argsort(-boxes.scores, kind="stable")
    overlap = iou(boxes.corners, boxes.corners)
    same = boxes.classes[:, None] == boxes.classes[None, :]
    blocked = np.zeros(len(order), bool)
    kept = []
    for i in order:
        if not blocked[i]:
            kept.append(int(i))
            blocked |= same[i] & (overlap[i] > NMS_IOU)
    return kept


def _corners(centres: Floats, sizes: Floats) -> Floats:
    return np.concatenate([centres - sizes / 2, centres + sizes / 2], axis=1)
