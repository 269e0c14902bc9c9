"""The parts that architectures share: projections, a gated MLP, a layer, and the whole decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from meshlm.worker.models.config import ModelConfig
from meshlm.worker.models.decoder import Decoder, DecoderLayer, Experts, Mlp, Progress, Projection, Weights
from meshlm.worker.models.ropes import scaled_rope

W = TypeVar("W")
LayerLoader = Callable[[ModelConfig, Weights[W], int], DecoderLayer[W]]


def load_decoder_of(
    config: ModelConfig, weights: Weights[W], progress: Progress, load_layer: LayerLoader[W]
) -> Decoder[W]:
    """A decoder with one rope, whose layers `load_layer` reads. Raises ModelFileError."""
    embedding = weights.matrix("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
    layers: list[DecoderLayer[W]] = []
    for index in range(config.layers):
        layers.append(load_layer(config, weights, index))
        progress(index + 1, config.layers)
    head = embedding
    if not config.tied_head:
        head = weights.matrix("lm_head.weight", config.vocab_size, config.hidden_size)
    return Decoder(
        config=config,
        embedding=embedding,
        layers=tuple(layers),
        norm=weights.vector("model.norm.weight", config.hidden_size),
        head=head,
        ropes=(scaled_rope(config),),
        attention_scale=config.attention_scale,
    )


def load_layer(config: ModelConfig, weights: Weights[W], index: int) -> DecoderLayer[W]:
    """Llama's layer, which the other architectures vary."""
    prefix = f"model.layers.{index}"
    mlp = load_mlp(config, weights, f"{prefix}.mlp", ("gate_proj", "up_proj", "down_proj"))
    return layer_around(config, weights, index, mlp)


def layer_around(
    config: ModelConfig,
    weights: Weights[W],
    index: int,
    mlp: Mlp[W] | Experts[W],
    mlp_norm: str = "post_attention_layernorm",
) -> DecoderLayer[W]:
    """A layer's attention and norms, with query and key norms where the config has them, around `mlp`."""
    prefix, width = f"model.layers.{index}", config.hidden_size
    attention = f"{prefix}.self_attn"

    def norm(name: str) -> torch.Tensor | None:
        return weights.vector(f"{attention}.{name}.weight", config.head_dim) if config.qk_norm else None

    return DecoderLayer(
        attention_norm=weights.vector(f"{prefix}.input_layernorm.weight", width),
        query=projection(weights, f"{attention}.q_proj", config.query_size, width, config.attention_bias),
        key=projection(weights, f"{attention}.k_proj", config.kv_size, width, config.attention_bias),
        value=projection(weights, f"{attention}.v_proj", config.kv_size, width, config.attention_bias),
        output=projection(weights, f"{attention}.o_proj", width, config.query_size, config.output_bias),
        mlp_norm=weights.vector(f"{prefix}.{mlp_norm}.weight", width),
        mlp=mlp,
        query_norm=norm("q_norm"),
        key_norm=norm("k_norm"),
        window=config.window(index),
    )


def load_mlp(config: ModelConfig, weights: Weights[W], prefix: str, names: tuple[str, str, str]) -> Mlp[W]:
    """`names`: of the gate's, the up and the down projection."""
    width, middle, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
    gate, up, down = (f"{prefix}.{name}" for name in names)
    return Mlp(
        gate=projection(weights, gate, middle, width, bias),
        up=projection(weights, up, middle, width, bias),
        down=projection(weights, down, width, middle, bias),
    )


def projection(weights: Weights[W], name: str, rows: int, cols: int, bias: bool) -> Projection[W]:
    return Projection(
        weights.matrix(f"{name}.weight", rows, cols), weights.vector(f"{name}.bias", rows) if bias else None
    )
