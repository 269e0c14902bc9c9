"""How good scores are: area under the curve, recall at a share of false positives, and calibration."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]
Labels = NDArray[np.bool_]


def auc(scores: Scores, labels: Labels) -> float:
    """The chance that a positive scores above a negative; a tie counts half. NaN without one of them."""
    positives = int(labels.sum())
    negatives = len(labels) - positives
    if not positives or not negatives:
        return float("nan")
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2
    return float((ranks[inverse][labels].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def threshold(negatives: Scores, share: float) -> float:
    """The least threshold above which no more than `share` of the negatives score."""
    ordered = np.sort(negatives)[::-1]
    return float(ordered[min(int(share * len(ordered)), len(ordered) - 1)])


def recall(scores: Scores, labels: Labels, share: float) -> float:
    """Of the positives, how many score above the threshold that lets `share` of the negatives through as false."""
    return float((scores[labels] > threshold(scores[~labels], share)).mean())


def f1(scores: Scores, labels: Labels, at: float) -> float:
    """Harmonic mean of precision and recall, where scores from `at` up count as positive."""
    told = scores >= at
    return float(2 * (told & labels).sum() / max(1, told.sum() + labels.sum()))


def calibration_error(scores: Scores, labels: Labels, weights: Scores, bins: int = 10) -> float:
    """Mean distance between what scores say and what is so, over bins of equal width; each text by its weight."""
    places = np.minimum((scores * bins).astype(int), bins - 1)
    said = np.bincount(places, weights * scores, bins)
    so = np.bincount(places, weights * labels, bins)
    return float(np.abs(said - so).sum() / weights.sum())
