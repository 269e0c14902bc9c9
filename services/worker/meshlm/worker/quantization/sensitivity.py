"""How much each part of a model suffers from each format, and the smallest formats that keep a bound."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from meshlm.kernels.quantize import GROUP, dequantize
from meshlm.worker.quantization.plan import BITS, Format, kind_of, quantize
from meshlm.worker.quantization.scoring import Reference, ScoredModel, compare

LADDER = (Format.INT8, Format.INT4, Format.INT4_SYMMETRIC)  # from the largest to the smallest
LAYER_GROUPS = 4
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
Told = Callable[[int, int], None]  # (measurements done, in all)


@dataclass(frozen=True, slots=True)
class Part:
    """Matrices that get one format: of one kind, in a range of layers."""

    label: str  # "down 0-7", "embedding"
    names: tuple[str, ...]
    weights: int


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Of a part: by how much the divergence from the exact model grows (nats a token) in each format, alone."""

    part: Part
    costs: Mapping[Format, float]


def parts_of(matrices: Mapping[str, tuple[int, int]], layers: int) -> list[Part]:
    """A model's matrices (shapes by name), those left out that have no whole groups."""
    found: dict[str, list[str]] = {}
    for name, (_, cols) in matrices.items():
        if cols % GROUP == 0:
            found.setdefault(_label(name, layers), []).append(name)
    return [
        Part(label, tuple(names), sum(matrices[name][0] * matrices[name][1] for name in names))
        for label, names in found.items()
    ]


def _label(name: str, layers: int) -> str:
    match, kind = _LAYER.match(name), kind_of(name)
    if match is None:
        return kind
    group = int(match[1]) * LAYER_GROUPS // layers
    first, behind = (-(-edge * layers // LAYER_GROUPS) for edge in (group, group + 1))
    return f"{kind} {first}-{behind - 1}"


def measure(
    model: ScoredModel, exact: Reference, parts: Sequence[Part], importance: Mapping[str, torch.Tensor], told: Told
) -> list[Sensitivity]:
    """4-bit formats part by part. 8 bits are measured once for all, and shared out by size: of one part alone they are
    lost in the noise of a measurement.
    """
    names = [name for part in parts for name in part.names]
    small = LADDER[1:]
    total = len(parts) * len(small) + 1
    all_weights = sum(part.weights for part in parts)
    int8 = _cost(model, exact, names, Format.INT8, importance)
    told(1, total)
    found = []
    for index, part in enumerate(parts):
        costs = {Format.DENSE: 0.0, Format.INT8: int8 * part.weights / all_weights}
        for step, wanted in enumerate(small):
            costs[wanted] = _cost(model, exact, part.names, wanted, importance)
            told(2 + index * len(small) + step, total)
        found.append(Sensitivity(part, costs))
    return found


def _cost(
    model: ScoredModel,
    exact: Reference,
    names: Sequence[str],
    wanted: Format,
    importance: Mapping[str, torch.Tensor],
) -> float:
    exchange(model, dict.fromkeys(names, wanted), importance)
    cost = max(compare(model, exact).kl, 0.0)
    model.restore(names)
    return cost


def exchange(model: ScoredModel, formats: Mapping[str, Format], importance: Mapping[str, torch.Tensor]) -> None:
    """Writes into the model what is left of its matrices in these formats. Raises ModelFileError."""
    for name, wanted in formats.items():
        matrix = model.matrices[name]
        if wanted is not Format.DENSE and matrix.shape[1] % GROUP == 0:
            quantized = quantize(matrix, wanted, importance.get(name), str(model.checkpoint.path), name)
            matrix.copy_(dequantize(quantized))


def choose(sensitivities: Sequence[Sensitivity], bound: float) -> dict[str, Format]:
    """Formats by a part's label, whose costs add up to `bound` nats a token at most: small ones where they cost least.

    Greedy over a multiple-choice knapsack: of all steps down that still fit, the one that saves most bits for its cost.
    Costs of parts are taken to add up, which is what small divergences nearly do; who calls measures the sum.
    """
    chosen = {found.part.label: Format.DENSE for found in sensitivities}
    spent = 0.0
    while True:
        best: tuple[float, str, Format, float] | None = None
        for found in sensitivities:
            now = chosen[found.part.label]
            for wanted in LADDER:
                added = found.costs[wanted] - found.costs[now]
                saved = (BITS[now] - BITS[wanted]) * found.part.weights
                if saved > 0 and spent + added <= bound:
                    gain = saved / max(added, 1e-12)
                    if best is None or gain > best[0]:
                        best = (gain, found.part.label, wanted, added)
        if best is None:
            return chosen
        _, label, wanted, added = best
        chosen[label], spent = wanted, spent + added
