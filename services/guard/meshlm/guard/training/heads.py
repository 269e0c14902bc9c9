"""A head, from examples to numbers: candidates are fitted and measured, the best is calibrated and made small."""

from __future__ import annotations

from collections import Counter
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
    # Of the attack head, where they are others.
    attack_penalty: float | None = None
    attack_iterations: int | None = None
    # Of the attack head: a source of n rows counts n**(1 - balance). At 0 rows count alike, at 1 sources do.
    balance: float = 0.0

    def of(self, head: Head) -> tuple[Layout, float, int, float]:
        """What a head's weights depend on."""
        if head == "harm":
            return self.layout, self.penalty, self.iterations, 0.0
        penalty, iterations = self.attack_penalty or self.penalty, self.attack_iterations or self.iterations
        return self.layout, penalty, iterations, self.balance


@dataclass(frozen=True)
class Fitted:
    """A head's weights in eight bits, and the numbers that go with them."""

    weights: NDArray[np.int8]
    numbers: dict[str, float]


def fit(head: Head, examples: Sequence[Example], candidate: Candidate) -> Fitted:
    """A head on the training split; not calibrated."""
    layout, penalty, iterations, balance = candidate.of(head)
    learned = [e for e in examples if e.split == "train"]
    if head == "attack":
        learned = list(rows.with_hidden(learned))
    labelled = [
        (text, label, e.source)
        for e in learned
        if (label := _label(e, head)) is not None
        for text in rows.texts(e, label)
    ]
    counted = matrix([text for text, _, _ in labelled], layout)
    labels = np.array([label for _, label, _ in labelled], float)
    weights = _balanced(labels, _by_source(labels, [source for _, _, source in labelled], balance))
    rare = rarity(counted)
    point = logistic(scaled(counted, rare), labels, weights, penalty, iterations) * rare
    small, scale = _small(point[:-1])
    return Fitted(small, {"scale": scale, "intercept": float(point[-1]), "slope": 1.0, "offset": 0.0})


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


def by_source(head: Head, model: EmbeddedModel, examples: Sequence[Example], split: str) -> dict[str, float]:
    """Of each source's positives, how many score above what 1% of all negatives of the split do."""
    labelled = [(e, label) for e in examples if e.split == split and (label := _label(e, head)) is not None]
    if not any(not label for _, label in labelled):
        return {}
    told = [model.judge(e.text, (head,))[head].score for e, _ in labelled]
    negatives = np.array([score for score, (_, label) in zip(told, labelled, strict=True) if not label])
    least = measures.threshold(negatives, 0.01)
    found: dict[str, list[bool]] = {}
    for score, (example, label) in zip(told, labelled, strict=True):
        if label:
            found.setdefault(example.source, []).append(score > least)
    return {source: round(float(np.mean(hits)), 4) for source, hits in sorted(found.items())}


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


def _balanced(labels: Vector, shares: Vector | None = None) -> Vector:
    """Weights by which both sides count the same; within a side, rows count by their share."""
    shares = np.ones(len(labels)) if shares is None else shares
    totals = np.where(labels == 1, shares[labels == 1].sum(), shares[labels == 0].sum())
    return np.asarray(shares * 0.5 / np.maximum(totals, 1e-12) * len(labels), np.float64)


def _by_source(labels: Vector, sources: Sequence[str], balance: float) -> Vector:
    """Of each row, the size of its source's side to the power of -balance."""
    keys = list(zip(sources, labels.tolist(), strict=True))
    sizes = Counter(keys)
    return np.array([sizes[key] ** -balance for key in keys], np.float64)


def _small(weights: Vector) -> tuple[NDArray[np.int8], float]:
    """In eight bits, and the unit: a few large weights are cut, so that the many small ones keep their shape."""
    nonzero = np.abs(weights[weights != 0])
    top = float(np.quantile(nonzero, 0.9995)) if len(nonzero) else 1.0
    scale = max(top, 1e-12) / 127
    return np.clip(np.rint(weights / scale), -127, 127).astype(np.int8), scale
