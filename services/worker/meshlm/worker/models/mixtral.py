"""Mixtral (Jiang et al. 2024, arXiv:2401.04088): Mistral with several MLPs a layer, of which a token takes a few."""

from __future__ import annotations

from typing import TypeVar

from meshlm.worker.models.assembly import layer_around, load_decoder_of, load_mlp
from meshlm.worker.models.config import ModelConfig
from meshlm.worker.models.decoder import Decoder, DecoderLayer, Experts, Progress, Weights

W = TypeVar("W")


def load(config: ModelConfig, weights: Weights[W], progress: Progress) -> Decoder[W]:
    """Raises ModelFileError."""
    return load_decoder_of(config, weights, progress, _load_layer)


def _load_layer(config: ModelConfig, weights: Weights[W], index: int) -> DecoderLayer[W]:
    prefix = f"model.layers.{index}.block_sparse_moe"
    router = weights.vector(f"{prefix}.gate.weight", config.experts, config.hidden_size)
    experts = tuple(
        load_mlp(config, weights, f"{prefix}.experts.{number}", ("w1", "w3", "w2")) for number in range(config.experts)
    )
    mixture = Experts(router, experts, config.active_experts)
    return layer_around(config, weights, index, mixture)
