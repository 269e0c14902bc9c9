"""Logistic regression on hashed n-grams, by L-BFGS, and Platt's calibration: numpy alone, and the same each time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from meshlm.guard.ngrams import Layout, grams

Vector = NDArray[np.float64]
_MEMORY = 8  # pairs that L-BFGS remembers
_ARMIJO = 1e-4
_TOLERANCE = 1e-5  # of the gradient's largest part, over that at the start


@dataclass(frozen=True)
class Matrix:
    """Rows of a sparse matrix: `columns` and `values` of row i are at `starts[i]:starts[i + 1]`. No row is empty."""

    starts: NDArray[np.intp]
    columns: NDArray[np.int32]
    values: NDArray[np.float32]
    width: int

    def times(self, weights: Vector) -> Vector:
        """One product a row."""
        return np.asarray(np.add.reduceat(self.values * weights[self.columns], self.starts[:-1]), np.float64)

    def transposed_times(self, rows: Vector) -> Vector:
        """One sum a column."""
        spread = np.repeat(rows, np.diff(self.starts))
        return np.asarray(np.bincount(self.columns, weights=self.values * spread, minlength=self.width), np.float64)


def matrix(texts: Sequence[str], layout: Layout) -> Matrix:
    """For each n-gram of a text, one over the root of how many it has, characters and words apart; and a column of
    ones. How often a text repeats itself does not count."""
    columns, values = [], []
    for text in texts:
        buckets = np.unique(grams(text, layout).buckets)
        of_chars = int(np.searchsorted(buckets, 1 << layout.bits))
        scale = np.full(len(buckets) + 1, max(1, of_chars) ** -0.5, np.float32)
        scale[of_chars:] = max(1, len(buckets) - of_chars) ** -0.5
        scale[-1] = 1.0
        columns.append(np.append(buckets, layout.buckets).astype(np.int32))
        values.append(scale)
    starts = np.concatenate([[0], np.cumsum([len(row) for row in columns])])
    return Matrix(starts, np.concatenate(columns), np.concatenate(values), layout.buckets + 1)


def merged(texts: Sequence[str], layout: Layout, shift: int) -> Matrix:
    """As `matrix`, with 2**shift neighbouring buckets as one, and all n-grams alike."""
    columns, values = [], []
    for text in texts:
        buckets = np.unique(grams(text, layout).buckets >> shift)
        columns.append(np.append(buckets, layout.buckets >> shift).astype(np.int32))
        values.append(np.append(np.full(len(buckets), max(1, len(buckets)) ** -0.5), 1.0).astype(np.float32))
    starts = np.concatenate([[0], np.cumsum([len(row) for row in columns])])
    return Matrix(starts, np.concatenate(columns), np.concatenate(values), (layout.buckets >> shift) + 1)


def rarity(rows: Matrix) -> Vector:
    """Of each column, how much it tells that a row has it: the logarithm of one over the share of rows."""
    having = np.bincount(rows.columns, minlength=rows.width)
    weight = np.log((1.0 + len(rows.starts) - 1) / (1.0 + having)) + 1.0
    weight[-1] = 1.0
    return np.asarray(weight, np.float64)


def scaled(rows: Matrix, columns: Vector) -> Matrix:
    """The matrix with each column times a factor: that much less is it held back by the penalty."""
    return replace(rows, values=(rows.values * columns[rows.columns]).astype(np.float32))


def logistic(rows: Matrix, labels: Vector, weights: Vector, penalty: float, iterations: int = 100) -> Vector:
    """Coefficients, the intercept last, that minimize the weighted mean of losses plus `penalty` times half their
    squares; the intercept is free."""
    share = weights / weights.sum()

    def loss(point: Vector) -> tuple[float, Vector]:
        margin = rows.times(point)
        value = float(share @ (np.logaddexp(0.0, margin) - labels * margin))
        slope = rows.transposed_times(share * (_sigmoid(margin) - labels))
        held = point.copy()
        held[-1] = 0.0
        return value + 0.5 * penalty * float(held @ held), slope + penalty * held

    return _minimum(loss, np.zeros(rows.width), iterations)


def platt(margins: Vector, labels: Vector, weights: Vector) -> tuple[float, float]:
    """Slope and offset that make a margin the log-odds of the label, on rows that were not learned from."""
    rows = Matrix(
        np.arange(0, 2 * len(margins) + 1, 2),
        np.tile(np.array([0, 1], np.int32), len(margins)),
        np.stack([margins, np.ones(len(margins))], axis=1).ravel().astype(np.float32),
        2,
    )
    slope, offset = logistic(rows, labels, weights, penalty=1e-6)
    return float(slope), float(offset)


def _minimum(loss: Callable[[Vector], tuple[float, Vector]], point: Vector, iterations: int) -> Vector:
    """L-BFGS with a backtracking line search."""
    value, slope = loss(point)
    first = float(np.abs(slope).max()) or 1.0
    past: deque[tuple[Vector, Vector, float]] = deque(maxlen=_MEMORY)
    for _ in range(iterations):
        if float(np.abs(slope).max()) <= _TOLERANCE * first:
            break
        direction = -_turned(slope, past)
        descent = float(direction @ slope)
        step = 1.0 if past else 1.0 / max(1e-12, float(np.sqrt(slope @ slope)))
        while True:
            moved = point + step * direction
            new_value, new_slope = loss(moved)
            if new_value <= value + _ARMIJO * step * descent or step < 1e-10:
                break
            step *= 0.5
        change, bend = moved - point, new_slope - slope
        if (curvature := float(change @ bend)) > 1e-18:
            past.append((change, bend, 1.0 / curvature))
        point, value, slope = moved, new_value, new_slope
    return point


def _turned(slope: Vector, past: deque[tuple[Vector, Vector, float]]) -> Vector:
    """The gradient times the inverse of the curvature that was seen (two-loop recursion)."""
    result, factors = slope.copy(), []
    for change, bend, inverse in reversed(past):
        factor = inverse * float(change @ result)
        factors.append(factor)
        result -= factor * bend
    if past:
        change, bend, inverse = past[-1]
        result *= 1.0 / (inverse * float(bend @ bend))
    for (change, bend, inverse), factor in zip(past, reversed(factors), strict=True):
        result += (factor - inverse * float(bend @ result)) * change
    return result


def _sigmoid(margin: Vector) -> Vector:
    return 1.0 / (1.0 + np.exp(-np.clip(margin, -500, 500)))
