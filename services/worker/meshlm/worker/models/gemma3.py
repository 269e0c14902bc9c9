"""Gemma 3's text model (Gemma Team 2025, arXiv:2503.19786): embeddings scaled by the root of the width, norms after
each half of a layer as well as before, normalized queries and keys, a tanh-gelu gate, and five layers with a sliding
window and a rope of their own for each layer that sees everything.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from meshlm.worker.models.assembly import layer_around, load_decoder_of, load_mlp
from meshlm.worker.models.config import ModelConfig
from meshlm.worker.models.decoder import Decoder, DecoderLayer, Progress, Weights
from meshlm.worker.models.ropes import local_rope

W = TypeVar("W")


def load(config: ModelConfig, weights: Weights[W], progress: Progress) -> Decoder[W]:
    """Raises ModelFileError."""
    decoder = load_decoder_of(config, weights, progress, _load_layer)
    return replace(
        decoder,
        ropes=(*decoder.ropes, local_rope(config)),
        embedding_scale=config.hidden_size**0.5,
        activation="gelu_tanh",
    )


def _load_layer(config: ModelConfig, weights: Weights[W], index: int) -> DecoderLayer[W]:
    prefix, width = f"model.layers.{index}", config.hidden_size
    mlp = load_mlp(config, weights, f"{prefix}.mlp", ("gate_proj", "up_proj", "down_proj"))
    layer = layer_around(config, weights, index, mlp, mlp_norm="pre_feedforward_layernorm")
    return replace(
        layer,
        attention_post_norm=weights.vector(f"{prefix}.post_attention_layernorm.weight", width),
        mlp_post_norm=weights.vector(f"{prefix}.post_feedforward_layernorm.weight", width),
        rope=0 if layer.window is None else 1,
    )
