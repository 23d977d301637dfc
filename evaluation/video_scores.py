"""How well masks of a video's objects agree with the truth: regions (J) and boundaries (F), as DAVIS defines them.

A benchmark dataset and evaluation methodology for video object segmentation (Perazzi et al., CVPR 2016); DAVIS 2017
(1704.00675) counts objects, not videos, and neither the first frame, which was given, nor the last. Masks are bool
(height, width); ``void``: pixels that do not count.
"""

from collections.abc import Mapping, Sequence

import cv2
import numpy as np

TOLERANCE = 0.008  # of the image's diagonal: how far a boundary may be from the true one
VOID = 255  # the index of pixels that do not count
FAILED = 0.5  # recall is the share of frames above this
BINS = 4  # parts of a video, of which decay compares the first with the last


def region_similarity(found: np.ndarray, truth: np.ndarray, void: np.ndarray | None = None) -> float:
    """J: intersection over union; 1 where both are empty."""
    counts = np.ones_like(truth) if void is None else ~void
    union = np.count_nonzero((found | truth) & counts)
    return np.count_nonzero(found & truth & counts) / union if union else 1.0


def boundary_accuracy(found: np.ndarray, truth: np.ndarray, void: np.ndarray | None = None) -> float:
    """F: harmonic mean of the shares of either boundary that lie within TOLERANCE of the other one."""
    counts = np.ones_like(truth) if void is None else ~void
    found, truth = boundary(found & counts), boundary(truth & counts)
    radius = int(np.ceil(TOLERANCE * np.hypot(*truth.shape)))
    precision, recall = _share_near(found, truth, radius), _share_near(truth, found, radius)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def boundary(mask: np.ndarray) -> np.ndarray:
    """Pixels that differ from the one to the right, below, or diagonally below; the last one has none."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    right, below, both = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    return (mask ^ right) | (mask ^ below) | (mask ^ both)


def _share_near(pixels: np.ndarray, others: np.ndarray, radius: int) -> float:
    """Of the set ``pixels``, the share at most ``radius`` from one of ``others``; 1 where there are none."""
    if not pixels.any():
        return 1.0
    squares = np.arange(-radius, radius + 1) ** 2
    disk = (squares[:, None] + squares <= radius**2).astype(np.uint8)
    near = cv2.dilate(others.astype(np.uint8), disk).astype(bool)
    return np.count_nonzero(pixels & near) / np.count_nonzero(pixels)


def score_frame(found: np.ndarray, truth: np.ndarray, objects: int) -> list[tuple[float, float]]:
    """(J, F) of every object 1 .. ``objects`` in one frame, of masks of indices."""
    void = truth == VOID
    pairs = [(found == number, truth == number) for number in range(1, objects + 1)]
    return [(region_similarity(*pair, void), boundary_accuracy(*pair, void)) for pair in pairs]


def statistics(values: Sequence[float]) -> dict[str, float]:
    """Mean, recall and decay of one object's values over the frames that count.

    Decay: how much better the first quarter is than the last. The quarters share the frames between them.
    """
    per_frame = np.asarray(values, dtype=np.float64)
    ends = np.round(np.linspace(1, len(per_frame), BINS + 1) + 1e-10).astype(int) - 1
    first, last = per_frame[: ends[1] + 1], per_frame[ends[-2] :]
    return {
        "mean": float(per_frame.mean()),
        "recall": float((per_frame > FAILED).mean()),
        "decay": float(first.mean() - last.mean()),
    }


def summarise(objects: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, float]:
    """Of every object's {"J": per frame, "F": per frame}: means over objects, in percent, by DAVIS's names."""
    numbers = {}
    for measure in ("J", "F"):
        found = [statistics(values[measure]) for values in objects]
        for part in ("mean", "recall", "decay"):
            numbers[f"{measure}-{part.capitalize()}"] = 100 * float(np.mean([one[part] for one in found]))
    return {"J&F-Mean": (numbers["J-Mean"] + numbers["F-Mean"]) / 2} | numbers
