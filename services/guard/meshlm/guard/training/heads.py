"""A head, from examples to numbers: candidates are fitted and measured, the best is calibrated and made small."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshlm.guard.artefact import Artefact
from meshlm.guard.embedded import EmbeddedModel
from meshlm.guard.judging import Head
from meshlm.guard.ngrams import Layout
from meshlm.guard.training import measures, rows
from meshlm.guard.training.examples import CATEGORIES, Example
from meshlm.guard.training.fit import Vector, logistic, matrix, merged, platt, rarity, scaled

_CATEGORY_SHIFT = 6  # categories share buckets: there is little of each
_CATEGORY_PENALTY = 1e-3


@dataclass(frozen=True)
class Candidate:
    """What may be chosen: by measurement, on the validation split."""

    name: str
    layout: Layout
    penalty: float
    iterations: int = 40


@dataclass(frozen=True)
class Fitted:
    """A head's weights in eight bits, and the numbers that go with them."""

    weights: NDArray[np.int8]
    numbers: dict[str, float]


def fit(head: Head, examples: Sequence[Example], candidate: Candidate) -> Fitted:
    """A head on the training split, calibrated on the validation split."""
    learned = [e for e in examples if e.split == "train"]
    if head == "attack":
        learned = list(rows.with_hidden(learned))
    labelled = [
        (text, label) for e in learned if (label := _label(e, head)) is not None for text in rows.texts(e, label)
    ]
    counted = matrix([text for text, _ in labelled], candidate.layout)
    labels = np.array([label for _, label in labelled], float)
    rare = rarity(counted)
    point = logistic(scaled(counted, rare), labels, _balanced(labels), candidate.penalty, candidate.iterations) * rare
    weights, scale = _small(point[:-1])
    return Fitted(weights, {"scale": scale, "intercept": float(point[-1]), "slope": 1.0, "offset": 0.0})


def calibrated(head: Head, fitted: Fitted, model: EmbeddedModel, examples: Sequence[Example]) -> Fitted:
    """With the slope and offset that make its scores probabilities on the validation split, both sides alike."""
    scores, labels = measured(head, model, examples, "validation")
    margins = np.log(np.clip(scores, 1e-12, 1 - 1e-12)) - np.log1p(-np.clip(scores, 1e-12, 1 - 1e-12))
    slope, offset = platt(margins, labels.astype(float), _balanced(labels.astype(float)))
    return Fitted(fitted.weights, {**fitted.numbers, "slope": slope, "offset": offset})


def categories(examples: Sequence[Example], layout: Layout) -> tuple[NDArray[np.int8], dict[str, Any]]:
    """One weak head a category, on the harmful texts of the training split whose category is known."""
    known = [e for e in examples if e.split == "train" and e.harm and e.categories]
    texts = [next(iter(rows.texts(e, True))) for e in known]
    counted = merged(texts, layout, _CATEGORY_SHIFT)
    rare = rarity(counted)
    table, scales, intercepts = [], [], []
    for category in CATEGORIES:
        labels = np.array([category in e.categories for e in known], float)
        point = logistic(scaled(counted, rare), labels, _balanced(labels), _CATEGORY_PENALTY, 30) * rare
        weights, scale = _small(point[:-1])
        table.append(weights)
        scales.append(scale)
        intercepts.append(float(point[-1]))
    numbers = {"category_shift": _CATEGORY_SHIFT, "category_scale": scales, "category_intercept": intercepts}
    return np.stack(table), numbers


def measured(
    head: Head, model: EmbeddedModel, examples: Sequence[Example], split: str
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Scores as the guard gives them, of one split, and labels."""
    chosen = [(e.text, label) for e in examples if e.split == split and (label := _label(e, head)) is not None]
    scores = np.array([model.judge(text, (head,))[head].score for text, _ in chosen])
    return scores, np.array([label for _, label in chosen], bool)


def quality(head: Head, model: EmbeddedModel, examples: Sequence[Example], split: str) -> dict[str, float]:
    """Figures for the card."""
    scores, labels = measured(head, model, examples, split)
    return {
        "texts": float(len(labels)),
        "positives": float(labels.sum()),
        "auc": round(measures.auc(scores, labels), 4),
        "recall_at_1_percent": round(measures.recall(scores, labels, 0.01), 4),
        "calibration_error": round(measures.calibration_error(scores, labels, _balanced(labels.astype(float))), 4),
    }


def empty(layout: Layout, attack: Fitted | None, harm: Fitted | None) -> Artefact:
    """An artefact without categories: to measure a head before all is there."""
    blank = Fitted(np.zeros(layout.buckets, np.int8), {"scale": 0.0, "intercept": 0.0, "slope": 1.0, "offset": 0.0})
    chosen = {"attack": attack or blank, "harm": harm or blank}
    card = {
        "layout": {"chars": layout.chars, "words": layout.words, "bits": layout.bits},
        "heads": {name: fitted.numbers for name, fitted in chosen.items()},
        "categories": [],
        "category_shift": 0,
        "category_scale": [],
        "category_intercept": [],
    }
    none = np.zeros((0, layout.buckets), np.int8)
    return Artefact(chosen["attack"].weights, chosen["harm"].weights, none, card)


def _label(example: Example, head: Head) -> bool | None:
    return example.attack if head == "attack" else example.harm


def _balanced(labels: Vector) -> Vector:
    """Weights by which both sides count the same."""
    positives = labels.sum()
    share = np.where(labels == 1, 0.5 / max(1.0, positives), 0.5 / max(1.0, len(labels) - positives))
    return np.asarray(share * len(labels), np.float64)


def _small(weights: Vector) -> tuple[NDArray[np.int8], float]:
    """In eight bits, and the unit: a few large weights are cut, so that the many small ones keep their shape."""
    nonzero = np.abs(weights[weights != 0])
    top = float(np.quantile(nonzero, 0.9995)) if len(nonzero) else 1.0
    scale = max(top, 1e-12) / 127
    return np.clip(np.rint(weights / scale), -127, 127).astype(np.int8), scale
