"""A model's config from GGUF metadata, in the words of llama.cpp's converter."""

from __future__ import annotations

import math
from typing import Any

from meshlm.worker.loading.errors import ModelFileError
from meshlm.worker.loading.gguf_file import GgufFile
from meshlm.worker.models.config import ModelConfig, RopeScaling

ARCHITECTURES = frozenset({"gemma3", "llama", "phi3", "qwen2", "qwen3"})  # Mistral and Mixtral are stored as "llama"

_SOFT_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
_GEMMA3_PATTERN = 6  # one layer in six sees everything; GGUF files do not say so
_GEMMA3_LOCAL_THETA = 10_000.0
_GEMMA3_27B_LAYERS = 62  # divides queries by width / heads and not by head_dim, which GGUF files do not say either


class _Metadata:
    """The metadata of one architecture, typed. All methods raise ModelFileError."""

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self.file, self.architecture = file, architecture

    def get(self, key: str, default: Any = None) -> Any:
        return self.file.metadata.get(f"{self.architecture}.{key}", default)

    def count(self, key: str, default: int | None = None) -> int:
        """A number of things: at least 1."""
        value = self._value(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.wrong(key, value, "a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Finite and above zero."""
        value = self._value(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise self.wrong(key, value, "a positive number")
        return float(value)

    def wrong(self, key: str, value: Any, wanted: str) -> ModelFileError:
        return ModelFileError(self.file.path, f"{self.architecture}.{key} is {value!r:.40}, not {wanted}")

    def _value(self, key: str, default: float | None) -> Any:
        return self.file.require(f"{self.architecture}.{key}") if default is None else self.get(key, default)


def read_config(file: GgufFile) -> ModelConfig:
    """Raises ModelFileError: unknown architecture or features, or metadata missing or wrong."""
    stored_as = file.require("general.architecture")
    if stored_as not in ARCHITECTURES:
        raise ModelFileError(
            file.path, f"the architecture {stored_as!r:.40} is unknown; known: {sorted(ARCHITECTURES)}"
        )
    meta = _Metadata(file, stored_as)
    for cap in _SOFT_CAPS:
        if meta.get(cap):
            raise ModelFileError(file.path, f"{stored_as}.{cap} is set; soft caps are unknown")
    layers, heads, width = meta.count("block_count"), meta.count("attention.head_count"), meta.count("embedding_length")
    if layers > len(file.tensors):
        raise meta.wrong("block_count", layers, f"possible with {len(file.tensors)} tensors")
    head_dim = meta.count("attention.key_length", width // heads)
    rotary = meta.count("rope.dimension_count", head_dim)
    kv_heads = meta.count("attention.head_count_kv", heads)
    experts = meta.count("expert_count") if meta.get("expert_count") else 0
    windows = _windows(meta, layers)
    config = ModelConfig(
        architecture=_architecture(stored_as, experts, windows),
        vocab_size=file.info("token_embd.weight").shape[0],
        hidden_size=width,
        intermediate_size=meta.count("feed_forward_length"),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=meta.number("attention.layer_norm_rms_epsilon"),
        rope_theta=meta.number("rope.freq_base", 10_000.0),
        max_context=meta.count("context_length"),
        tied_head="output.weight" not in file.tensors,
        rope_scaling=_rope_scaling(meta),
        rotary_dim=rotary if rotary != head_dim else None,
        local_rope_theta=meta.number("rope.freq_base_swa", _GEMMA3_LOCAL_THETA) if stored_as == "gemma3" else None,
        windows=windows,
        attention_bias="blk.0.attn_q.bias" in file.tensors or "blk.0.attn_qkv.bias" in file.tensors,
        output_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_down.bias" in file.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        post_norms=stored_as == "gemma3",
        query_scalar=width // heads if stored_as == "gemma3" and layers == _GEMMA3_27B_LAYERS else None,
        experts=experts,
        active_experts=meta.count("expert_used_count") if experts else 0,
    )
    if problem := config.problem():
        raise ModelFileError(file.path, f"the metadata asks for {problem}")
    return config


def _architecture(stored_as: str, experts: int, windows: tuple[int | None, ...]) -> str:
    if stored_as != "llama":
        return stored_as
    return "mixtral" if experts else "mistral" if windows else "llama"


def _windows(meta: _Metadata, layers: int) -> tuple[int | None, ...]:
    if not meta.get("attention.sliding_window"):
        if meta.architecture == "gemma3":
            raise ModelFileError(meta.file.path, "the metadata lacks gemma3.attention.sliding_window")
        return ()
    window = meta.count("attention.sliding_window")
    if meta.architecture == "gemma3":
        return tuple(window if (layer + 1) % _GEMMA3_PATTERN else None for layer in range(layers))
    return (window,) * layers


def _rope_scaling(meta: _Metadata) -> RopeScaling | None:
    file, kind = meta.file, meta.get("rope.scaling.type", "none")
    if "rope_freqs.weight" in file.tensors:
        return RopeScaling("divisors", divisors=_numbers(file, "rope_freqs.weight"))
    if "rope_factors_long.weight" in file.tensors:
        return RopeScaling(
            "longrope",
            original_context=meta.count("rope.scaling.original_context_length"),
            short=_numbers(file, "rope_factors_short.weight"),
            long=_numbers(file, "rope_factors_long.weight"),
            attention_factor=meta.number("rope.scaling.attn_factor", 1.0),
        )
    if kind == "none":
        return None
    if kind == "linear":
        return RopeScaling("linear", meta.number("rope.scaling.factor"))
    if kind == "yarn":
        factor = meta.number("rope.scaling.factor")
        own = meta.number("rope.scaling.attn_factor", 1.0)
        return RopeScaling(
            "yarn",
            factor,
            low_frequency=meta.number("rope.scaling.yarn_beta_slow", 1.0),
            high_frequency=meta.number("rope.scaling.yarn_beta_fast", 32.0),
            original_context=meta.count("rope.scaling.original_context_length"),
            attention_factor=own * (1 + 0.1 * math.log(max(1.0, factor))),
        )
    raise ModelFileError(file.path, f"the rope scaling {kind!r:.40} is unknown; known: linear, longrope, yarn")


def _numbers(file: GgufFile, name: str) -> tuple[float, ...]:
    return tuple(file.read(name).reshape(-1).tolist())
