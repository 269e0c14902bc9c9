"""The shape of a model, whatever file it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched; see `meshlm.kernels.rope` for the formulas."""

    kind: Literal["linear", "llama3", "divisors", "longrope", "yarn"]
    factor: float = 1.0  # linear, llama3, yarn
    low_frequency: float = 1.0  # llama3 and yarn: turns within `original_context`; longer waves are stretched whole,
    high_frequency: float = 4.0  # and shorter ones than of that many turns are left alone
    original_context: int = 8192  # tokens
    divisors: tuple[float, ...] = ()  # "divisors" only: one a rotated pair, as GGUF stores Llama 3's scaling
    short: tuple[float, ...] = ()  # "longrope" only: divisors for contexts up to `original_context`,
    long: tuple[float, ...] = ()  # and beyond
    attention_factor: float = 1.0  # longrope and yarn: cosines and sines are multiplied by it


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Names follow Hugging Face's config.json where it has the field."""

    architecture: str  # one of `models.registry`
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of one expert, where there are several
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    max_context: int  # tokens
    tied_head: bool  # the output head is the embedding
    rope_scaling: RopeScaling | None = None
    rotary_dim: int | None = None  # elements of a head that turn; None: all
    local_rope_theta: float | None = None  # of layers with a window, unscaled; None: as the others
    windows: tuple[int | None, ...] = ()  # of each layer, see `DecoderLayer.window`; empty: none has one
    attention_bias: bool = False
    output_bias: bool = False  # a bias on the attention's output projection as well
    mlp_bias: bool = False
    qk_norm: bool = False  # heads of queries and keys are normalized
    post_norms: bool = False  # what a layer's halves put out is normalized too
    query_scalar: float | None = None  # query-key products are divided by its root; None: head_dim
    experts: int = 0  # 0: a single MLP
    active_experts: int = 0

    @property
    def query_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def attention_scale(self) -> float:
        return float((self.query_scalar or self.head_dim) ** -0.5)

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None

    @property
    def parameters(self) -> int:
        """Biases and norms included, a tied head counted once."""
        width, middle, fused = self.hidden_size, self.intermediate_size, self.query_size + 2 * self.kv_size
        attention = width * fused + self.query_size * width + 2 * self.head_dim * self.qk_norm
        attention += fused * self.attention_bias + width * self.output_bias
        mlp = 3 * width * middle + (2 * middle + width) * self.mlp_bias
        router = width * self.experts
        norms = (4 if self.post_norms else 2) * width
        tables = 1 if self.tied_head else 2
        layer = attention + mlp * max(1, self.experts) + router + norms
        return self.layers * layer + tables * self.vocab_size * width + width

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        return 2 * self.layers * self.kv_size * element_bytes
