"""Mistral (Jiang et al. 2023, arXiv:2310.06825): Llama with a sliding window, which the config carries."""

from __future__ import annotations

from typing import TypeVar

from meshlm.worker.models.assembly import load_decoder_of, load_layer
from meshlm.worker.models.config import ModelConfig
from meshlm.worker.models.decoder import Decoder, Progress, Weights

W = TypeVar("W")


def load(config: ModelConfig, weights: Weights[W], progress: Progress) -> Decoder[W]:
    """Raises ModelFileError."""
    return load_decoder_of(config, weights, progress, load_layer)
