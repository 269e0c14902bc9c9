"""The shape of a model, whatever file it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched; see `meshlm.kernels.rope` for the formulas."""

    kind: Literal["linear", "llama3", "divisors"]
    factor: float = 1.0
    low_frequency: float = 1.0  # llama3 only, turns within `original_context`
    high_frequency: float = 4.0
    original_context: int = 8192
    divisors: tuple[float, ...] = ()  # "divisors" only: one a rotated pair, as GGUF stores Llama 3's scaling


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Names follow Hugging Face's config.json where it has the field."""

    architecture: str  # lower case, as GGUF names it: "llama"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    max_context: int  # tokens
    tied_head: bool  # the output head is the embedding
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False
    output_bias: bool = False  # a bias on the attention's output projection as well
    mlp_bias: bool = False

    @property
    def query_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def parameters(self) -> int:
        """Of a Llama-like model: biases and norms included, a tied head counted once."""
        width, middle, fused = self.hidden_size, self.intermediate_size, self.query_size + 2 * self.kv_size
        layer = width * fused + self.query_size * width + 3 * width * middle + 2 * width
        layer += fused * self.attention_bias + width * self.output_bias + (2 * middle + width) * self.mlp_bias
        tables = 1 if self.tied_head else 2
        return self.layers * layer + tables * self.vocab_size * width + width

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        return 2 * self.layers * self.kv_size * element_bytes
