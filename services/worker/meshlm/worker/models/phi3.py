"""Phi-3 (Abdin et al. 2024, arXiv:2404.14219): Llama with a sliding window, perhaps only a part of each head rotated,
and longrope (Ding et al. 2024, arXiv:2402.13753) for 128k contexts; the config carries all three. Its files store
q, k, v and gate, up as one tensor each, which the loaders cut.
"""

from __future__ import annotations

from typing import TypeVar

from meshlm.worker.models.assembly import load_decoder_of, load_layer
from meshlm.worker.models.config import ModelConfig
from meshlm.worker.models.decoder import Decoder, Progress, Weights

W = TypeVar("W")


def load(config: ModelConfig, weights: Weights[W], progress: Progress) -> Decoder[W]:
    """Raises ModelFileError."""
    return load_decoder_of(config, weights, progress, load_layer)
