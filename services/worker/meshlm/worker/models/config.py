"""The shape of a model, whatever file it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

_MOST_EXPERTS = 10_000  # a damaged number must not become a list of as many


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

    def problem(self) -> str | None:
        """What in it cannot be, in words for whoever reads it from a file; None: nothing."""
        sizes = (self.vocab_size, self.hidden_size, self.intermediate_size, self.layers, self.heads, self.kv_heads)
        if min(*sizes, self.head_dim, self.max_context) < 1:
            return "a size below 1"
        if self.heads % self.kv_heads:
            return f"{self.heads} heads cannot share {self.kv_heads} key heads"
        rotated = self.head_dim if self.rotary_dim is None else self.rotary_dim
        if rotated % 2 or not 0 < rotated <= self.head_dim:
            return f"a rotated part of {rotated} of a head's {self.head_dim} elements"
        if not 0 <= self.active_experts <= self.experts <= _MOST_EXPERTS or bool(self.experts) != bool(
            self.active_experts
        ):
            return f"{self.active_experts} active of {self.experts} experts"
        if self.windows and len(self.windows) != self.layers:
            return f"{len(self.windows)} layer types for {self.layers} layers"
        if any(window is not None and window < 1 for window in self.windows):
            return "a sliding window below 1"
        scaling = self.rope_scaling
        for divisors in () if scaling is None else (scaling.divisors, scaling.short, scaling.long):
            if divisors and len(divisors) != rotated // 2:
                return f"{len(divisors)} rope factors for {rotated // 2} rotated pairs"
        return None

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
