"""The Llama architecture (Touvron et al. 2023, arXiv:2302.13971): pre-norm, rotary positions, grouped queries,
gated MLP.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from meshlm.kernels.rms_norm import rms_norm
from meshlm.kernels.rope import rope_table
from meshlm.kernels.silu_mul import silu_mul
from meshlm.worker.loading.checkpoint import Checkpoint
from meshlm.worker.models.batch import Batch
from meshlm.worker.models.config import ModelConfig
from meshlm.worker.models.layers import DenseLinear, Linear, Placement, Progress, attend, frequencies, fused_linear


@dataclass(frozen=True, slots=True)
class Layer:
    attention_norm: torch.Tensor
    qkv: Linear
    attention_output: Linear
    mlp_norm: torch.Tensor
    gate_up: Linear
    down: Linear

    @property
    def nbytes(self) -> int:
        linears = (self.qkv, self.attention_output, self.gate_up, self.down)
        return sum(part.nbytes for part in linears) + self.attention_norm.nbytes + self.mlp_norm.nbytes


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
        self._norm = placement.tensor(checkpoint.tensor("model.norm.weight", width))
        shared = config.tied_head and not placement.int8
        self._head: Linear
        if shared:
            self._head = DenseLinear(self._embedding, None)
        else:
            untied = None if config.tied_head else checkpoint.tensor("lm_head.weight", config.vocab_size, width)
            self._head = placement.linear(embedding if untied is None else untied, None)
        self._rope = rope_table(frequencies(config), config.max_context, placement.dtype).to(placement.device)
        self.weight_bytes = (
            sum(layer.nbytes for layer in self._layers)
            + self._embedding.nbytes
            + self._norm.nbytes
            + (0 if shared else self._head.nbytes)
        )
        self.parameters = _count_parameters(config)

    def forward(self, batch: Batch, cache: torch.Tensor) -> torch.Tensor:
        """cache: (layers, 2, kv_heads, blocks, block_size, head_dim). Returns (len(batch.rows), vocab_size) float32."""
        eps = self.config.norm_eps
        hidden = functional.embedding(batch.tokens, self._embedding)
        table = self._rope.index_select(0, batch.positions)
        for layer, layer_cache in zip(self._layers, cache, strict=True):
            qkv = layer.qkv(rms_norm(hidden, layer.attention_norm, eps))
            hidden = layer.attention_output(attend(qkv, self.config, table, batch, layer_cache)).add_(hidden)
            gate_up = layer.gate_up(rms_norm(hidden, layer.mlp_norm, eps))
            hidden = layer.down(silu_mul(gate_up)).add_(hidden)
        wanted = rms_norm(hidden.index_select(0, batch.rows), self._norm, eps)
        return self._head(wanted).float()


def _load_layer(checkpoint: Checkpoint, placement: Placement, index: int) -> Layer:
    config, prefix = checkpoint.config, f"model.layers.{index}"
    width, middle = config.hidden_size, config.intermediate_size

    def norm(name: str) -> torch.Tensor:
        return placement.tensor(checkpoint.tensor(f"{prefix}.{name}.weight", width))

    def project(names: list[tuple[str, int]], columns: int, bias: bool) -> Linear:
        full = [(f"{prefix}.{name}", rows) for name, rows in names]
        return fused_linear(checkpoint, full, columns, bias, placement)

    attention = [
        ("self_attn.q_proj", config.query_size),
        ("self_attn.k_proj", config.kv_size),
        ("self_attn.v_proj", config.kv_size),
    ]
    return Layer(
        attention_norm=norm("input_layernorm"),
        qkv=project(attention, width, config.attention_bias),
        attention_output=project([("self_attn.o_proj", width)], config.query_size, config.output_bias),
        mlp_norm=norm("post_attention_layernorm"),
        gate_up=project([("mlp.gate_proj", middle), ("mlp.up_proj", middle)], width, config.mlp_bias),
        down=project([("mlp.down_proj", width)], middle, config.mlp_bias),
    )


def _count_parameters(config: ModelConfig) -> int:
    """Biases and norms included, a tied head counted once."""
    width, middle = config.hidden_size, config.intermediate_size
    fused = config.query_size + 2 * config.kv_size
    layer = width * fused + config.query_size * width + 3 * width * middle + 2 * width
    layer += fused * config.attention_bias + width * config.output_bias + (2 * middle + width) * config.mlp_bias
    heads = 1 if config.tied_head else 2
    return config.layers * layer + heads * config.vocab_size * width + width
