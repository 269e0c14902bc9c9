"""Llama (Touvron et al. 2023, arXiv:2302.13971): pre-norm, rotary positions, grouped queries, gated MLP."""

from __future__ import annotations

from typing import TypeVar

from meshlm.worker.models.assembly import load_decoder_of, load_layer
from meshlm.worker.models.config import ModelConfig
from meshlm.worker.models.decoder import Decoder, Progress, Weights

W = TypeVar("W")


def load(config: ModelConfig, weights: Weights[W], progress: Progress) -> Decoder[W]:
    """Raises ModelFileError."""
    return load_decoder_of(config, weights, progress, load_layer)
