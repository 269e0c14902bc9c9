"""The plan of `auto`, made by measuring."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from meshlm.worker.loading.checkpoint import Checkpoint
from meshlm.worker.quantization.cache import Measured
from meshlm.worker.quantization.calibration import importance
from meshlm.worker.quantization.plan import BITS, Format
from meshlm.worker.quantization.scoring import ScoredModel, compare, reference
from meshlm.worker.quantization.sensitivity import Part, Sensitivity, Told, choose, exchange, measure, parts_of

_TRIES = 4
_TIGHTER = 0.8


@dataclass(frozen=True, slots=True)
class Request:
    """rise: of the perplexity, 0.01 is 1%; shrink: quantize the file's own blocks anew where that is smaller."""

    rise: float = 0.01
    shrink: bool = False


def measure_plan(
    model: ScoredModel, texts: Sequence[torch.Tensor], request: Request, told: Told
) -> tuple[Measured, list[Sensitivity]]:
    """The smallest formats whose divergence from the exact model on `texts` is at most ln(1 + rise) nats a token.

    On text such as the model itself would write, the divergence is the rise of the loss, and of any text's it is the
    steadier estimate: a thousand tokens tell it to a few percent. What is chosen by adding up is then measured as a
    whole, and where it is above the bound chosen anew with less. The model's matrices are as before afterwards.
    """
    bound, tokens = math.log1p(request.rise), sum(len(text) for text in texts)
    parts = parts_of(open_matrices(model, request.shrink), model.decoder.config.layers)
    if not parts:
        return Measured({}, {}, not request.shrink, bound, 0.0, tokens, 0.0), []
    exact = reference(model, texts)
    salience = importance(model, texts)
    sensitivities = measure(model, exact, parts, salience, told)
    names = [name for part in parts for name in part.names]
    budget = bound
    for attempt in range(_TRIES):
        chosen = choose(sensitivities, budget)
        formats = {name: chosen[part.label] for part in parts for name in part.names}
        exchange(model, formats, salience)
        kl = compare(model, exact).kl
        model.restore(names)
        if kl <= bound or attempt == _TRIES - 1:
            break
        budget *= _TIGHTER * bound / kl
    used = {name: values for name, values in salience.items() if name in formats}
    measured = Measured(formats, used, not request.shrink, bound, kl, tokens, _bits(parts, chosen))
    return measured, sensitivities


def open_matrices(model: ScoredModel, shrink: bool) -> dict[str, tuple[int, int]]:
    """Shapes of those whose format is to be decided: what the file has quantized keeps its blocks, unless shrunk."""
    shapes = {name: (matrix.shape[0], matrix.shape[1]) for name, matrix in model.matrices.items()}
    if shrink:
        return shapes
    return {name: shape for name, shape in shapes.items() if not keeps_blocks(model.checkpoint, name)}


def keeps_blocks(checkpoint: Checkpoint, name: str) -> bool:
    return checkpoint.read_quantized(name) is not None


def _bits(parts: Sequence[Part], chosen: Mapping[str, Format]) -> float:
    return sum(BITS[chosen[part.label]] * part.weights for part in parts) / sum(part.weights for part in parts)
