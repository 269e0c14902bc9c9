"""The Llama architecture (Touvron et al. 2023, arXiv:2302.13971): pre-norm, rotary positions, grouped queries,
gated MLP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch.nn import functional

from meshlm.kernels.rope import rope_table
from meshlm.kernels.silu_mul import silu_mul
from meshlm.worker.loading.checkpoint import Checkpoint
from meshlm.worker.models.assembly import load_decoder_of, load_layer
from meshlm.worker.models.batch import Batch
from meshlm.worker.models.config import ModelConfig
from meshlm.worker.models.decoder import Decoder, Progress, Weights
from meshlm.worker.models.layers import (
    DenseLinear,
    DenseNormLinear,
    Linear,
    NormLinear,
    Placement,
    attend,
    frequencies,
    fused,
)

W = TypeVar("W")


def load(config: ModelConfig, weights: Weights[W], progress: Progress) -> Decoder[W]:
    """Raises ModelFileError."""
    return load_decoder_of(config, weights, progress, load_layer)


@dataclass(frozen=True, slots=True)
class Layer:
    qkv: NormLinear
    attention_output: Linear
    gate_up: NormLinear
    down: Linear

    @property
    def nbytes(self) -> int:
        return self.qkv.nbytes + self.attention_output.nbytes + self.gate_up.nbytes + self.down.nbytes


class Llama:
    """Weights and the forward pass. Stateless: keys and values live in the cache that the caller passes."""

    def __init__(self, checkpoint: Checkpoint, placement: Placement, progress: Progress) -> None:
        """Reads all weights. Raises ModelFileError."""
        self.config = config = checkpoint.config
        width = config.hidden_size
        embedding = checkpoint.tensor("model.embed_tokens.weight", config.vocab_size, width)
        self._embedding = placement.tensor(embedding)
        self._layers: list[Layer] = []
        for index in range(config.layers):
            self._layers.append(_load_layer(checkpoint, placement, index))
            progress(index + 1, config.layers)
        norm = checkpoint.tensor("model.norm.weight", width)
        self._head: NormLinear
        if config.tied_head and not placement.int8:
            self._head = DenseNormLinear(placement.tensor(norm), config.norm_eps, DenseLinear(self._embedding, None))
        else:
            head = embedding if config.tied_head else checkpoint.tensor("lm_head.weight", config.vocab_size, width)
            self._head = placement.norm_linear(norm, config.norm_eps, head, None)
        self._rope = rope_table(frequencies(config), config.max_context, placement.dtype).to(placement.device)
        tables = (
            self._head.nbytes if config.tied_head and not placement.int8 else self._head.nbytes + self._embedding.nbytes
        )
        self.weight_bytes = tables + sum(layer.nbytes for layer in self._layers)

    def forward(self, batch: Batch, cache: torch.Tensor) -> torch.Tensor:
        """cache: (layers, 2, kv_heads, blocks, block_size, head_dim). Returns (len(batch.rows), vocab_size) float32."""
        hidden = functional.embedding(batch.tokens, self._embedding)
        cos, sin = self._rope.index_select(1, batch.positions)
        for layer, layer_cache in zip(self._layers, cache, strict=True):
            attended = attend(layer.qkv(hidden), self.config, (cos, sin), batch, layer_cache)
            hidden = layer.attention_output(attended, hidden)
            hidden = layer.down(silu_mul(layer.gate_up(hidden)), hidden)
        return self._head(hidden.index_select(0, batch.rows)).float()


def _load_layer(checkpoint: Checkpoint, placement: Placement, index: int) -> Layer:
    config, prefix = checkpoint.config, f"model.layers.{index}"
    width, middle, eps = config.hidden_size, config.intermediate_size, config.norm_eps
    query, kv = config.query_size, config.kv_size

    def weights(columns: int, bias: bool, *names: tuple[str, int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        return fused(checkpoint, [(f"{prefix}.{name}", rows) for name, rows in names], columns, bias)

    qkv = (("self_attn.q_proj", query), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv))
    attention_norm = checkpoint.tensor(f"{prefix}.input_layernorm.weight", width)
    mlp_norm = checkpoint.tensor(f"{prefix}.post_attention_layernorm.weight", width)
    return Layer(
        qkv=placement.norm_linear(attention_norm, eps, *weights(width, config.attention_bias, *qkv)),
        attention_output=placement.linear(*weights(query, config.output_bias, ("self_attn.o_proj", width))),
        gate_up=placement.norm_linear(
            mlp_norm, eps, *weights(width, config.mlp_bias, ("mlp.gate_proj", middle), ("mlp.up_proj", middle))
        ),
        down=placement.linear(*weights(middle, config.mlp_bias, ("mlp.down_proj", width)), outliers=True),
    )
