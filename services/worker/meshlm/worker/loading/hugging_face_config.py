"""A model's config from a Hugging Face folder's config.json, of transformers 4 or 5."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from meshlm.worker.loading.errors import ModelFileError
from meshlm.worker.loading.json_file import read_json
from meshlm.worker.models.config import ModelConfig, RopeScaling

CONFIG = "config.json"

# `model_type` to our name of the architecture.
ARCHITECTURES = {
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "llama": "llama",
    "mistral": "mistral",
    "mixtral": "mixtral",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}
# What transformers takes where config.json, as published, is silent.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "vocab_size": 262_208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131_072,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_theta": 1_000_000.0,
        "sliding_window": 4096,
    },
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "rope_theta": 1_000_000.0},
    "qwen3": {"head_dim": 128},
}
_REFUSED = ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention", "quantization_config")
_MOST_LAYERS = 10_000  # a damaged number of layers must not become a list of as many windows
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"


def read_config(folder: Path) -> ModelConfig:
    """Raises ModelFileError: missing, damaged, or asking for what is unknown here."""
    path = folder / CONFIG
    raw = read_json(path)
    try:
        return _config(path, raw)
    except KeyError as error:
        raise ModelFileError(path, f"the field {error.args[0]} is missing") from None
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise ModelFileError(path, f"a field has a wrong value: {error}") from None


def _config(path: Path, raw: dict[str, Any]) -> ModelConfig:
    kind = raw.get("model_type")
    if kind not in ARCHITECTURES:
        raise ModelFileError(path, f"the architecture {kind!r} is unknown; known: {sorted(ARCHITECTURES)}")
    architecture = ARCHITECTURES[kind]
    outer, raw = raw, raw.get("text_config", raw)
    raw = _DEFAULTS.get(architecture, {}) | raw
    _refuse_unknown(path, architecture, outer | raw)
    heads, hidden, layers = (int(raw[key]) for key in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
    if not 0 < layers <= _MOST_LAYERS:
        raise ModelFileError(path, f"num_hidden_layers is {layers:.3g}, not a number of layers")
    head_dim = int(raw.get("head_dim") or hidden // heads)
    theta, scaling, partial = _rope(path, raw)
    rotary = int(head_dim * partial)
    experts = int(raw["num_local_experts"]) if architecture == "mixtral" else 0
    bias = architecture == "qwen2" or bool(raw.get("attention_bias", False))
    config = ModelConfig(
        architecture=architecture,
        vocab_size=int(raw["vocab_size"]),
        hidden_size=hidden,
        intermediate_size=int(raw["intermediate_size"]),
        layers=layers,
        heads=heads,
        kv_heads=int(raw.get("num_key_value_heads") or heads),
        head_dim=head_dim,
        norm_eps=float(raw["rms_norm_eps"]),
        rope_theta=theta,
        max_context=_max_context(raw, scaling),
        tied_head=bool(outer.get("tie_word_embeddings", raw.get("tie_word_embeddings", False))),
        rope_scaling=scaling,
        rotary_dim=rotary if rotary != head_dim else None,
        local_rope_theta=_local_theta(path, raw) if architecture == "gemma3" else None,
        windows=_windows(path, architecture, raw, layers),
        attention_bias=bias,
        output_bias=bias and architecture != "qwen2",
        mlp_bias=bool(raw.get("mlp_bias", False)),
        qk_norm=architecture in ("qwen3", "gemma3"),
        post_norms=architecture == "gemma3",
        query_scalar=float(raw["query_pre_attn_scalar"]) if architecture == "gemma3" else None,
        experts=experts,
        active_experts=int(raw["num_experts_per_tok"]) if experts else 0,
    )
    if problem := config.problem():
        raise ModelFileError(path, f"it asks for {problem}")
    return config


def _refuse_unknown(path: Path, architecture: str, raw: dict[str, Any]) -> None:
    known = "gelu_pytorch_tanh" if architecture == "gemma3" else "silu"
    activation = raw.get("hidden_activation") or raw.get("hidden_act") or known
    if activation != known:
        raise ModelFileError(path, f"the activation {activation!r} is unknown; known: {known}")
    for field in _REFUSED:
        if raw.get(field):
            raise ModelFileError(path, f"{field} is set, which is unknown here")


def _windows(path: Path, architecture: str, raw: dict[str, Any], layers: int) -> tuple[int | None, ...]:
    window = raw.get("sliding_window")
    if architecture in ("qwen2", "qwen3") and not raw.get("use_sliding_window", False):
        window = None
    if window is None or architecture == "llama":
        return ()
    types = raw.get("layer_types") or _layer_types(architecture, raw, layers)
    for kind in types:
        if kind not in (_LOCAL, _GLOBAL):
            raise ModelFileError(path, f"the layer type {kind!r} is unknown; known: {_GLOBAL}, {_LOCAL}")
    return tuple(int(window) if kind == _LOCAL else None for kind in types)


def _layer_types(architecture: str, raw: dict[str, Any], layers: int) -> list[str]:
    """As transformers fills them in where config.json does not name them."""
    if architecture == "gemma3":
        pattern = int(raw.get("sliding_window_pattern", 6))
        return [_LOCAL if (layer + 1) % pattern else _GLOBAL for layer in range(layers)]
    if architecture in ("qwen2", "qwen3"):
        first = int(raw.get("max_window_layers", 28))
        return [_LOCAL if layer >= first else _GLOBAL for layer in range(layers)]
    return [_LOCAL] * layers


def _max_context(raw: dict[str, Any], scaling: RopeScaling | None) -> int:
    """YaRN is written into configs that keep the length they were trained with (so Qwen2.5's model cards)."""
    trained = int(raw["max_position_embeddings"])
    if scaling is None or scaling.kind != "yarn":
        return trained
    return max(trained, int(scaling.original_context * scaling.factor))


def _rope_fields(raw: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters` since transformers 5, one for each type of layer in Gemma 3; `rope_scaling` before."""
    rope: dict[str, Any] = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    return rope.get(_GLOBAL) or {} if _GLOBAL in rope or _LOCAL in rope else rope


def _local_theta(path: Path, raw: dict[str, Any]) -> float:
    rope = (raw.get("rope_parameters") or {}).get(_LOCAL) or {}
    if rope.get("rope_type", "default") != "default":
        raise ModelFileError(path, f"the rope scaling {rope['rope_type']!r} of layers with a window is unknown")
    return float(rope.get("rope_theta") or raw.get("rope_local_base_freq") or 10_000.0)


def _rope(path: Path, raw: dict[str, Any]) -> tuple[float, RopeScaling | None, float]:
    """Theta, scaling, and which part of a head is rotated."""
    rope = _rope_fields(raw)
    theta = float(rope.get("rope_theta") or raw.get("rope_theta") or 10_000.0)
    partial = float(rope.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if raw.get("model_type") == "phi3" and kind in ("su", "yarn"):  # as early Phi-3 files call it
        kind = "longrope"
    return theta, _scaling(path, raw, rope, kind), partial


def _scaling(path: Path, raw: dict[str, Any], rope: dict[str, Any], kind: str) -> RopeScaling | None:
    match kind:
        case "default":
            return None
        case "linear":
            return RopeScaling("linear", float(rope["factor"]))
        case "llama3":
            return RopeScaling(
                "llama3",
                float(rope["factor"]),
                float(rope["low_freq_factor"]),
                float(rope["high_freq_factor"]),
                int(rope["original_max_position_embeddings"]),
            )
        case "longrope":
            return _longrope(raw, rope)
        case "yarn":
            return _yarn(path, rope)
    raise ModelFileError(path, f"the rope scaling {kind!r} is unknown; known: default, linear, llama3, longrope, yarn")


def _longrope(raw: dict[str, Any], rope: dict[str, Any]) -> RopeScaling:
    trained = rope.get("original_max_position_embeddings") or raw.get("original_max_position_embeddings")
    original = int(trained or raw["max_position_embeddings"])
    factor = float(rope.get("factor") or raw["max_position_embeddings"] / original)
    own = rope.get("attention_factor")
    return RopeScaling(
        "longrope",
        original_context=original,
        short=tuple(float(value) for value in rope["short_factor"]),
        long=tuple(float(value) for value in rope["long_factor"]),
        attention_factor=float(own or math.sqrt(1 + math.log(max(1.0, factor)) / math.log(original))),
    )


def _yarn(path: Path, rope: dict[str, Any]) -> RopeScaling:
    for field in ("mscale", "mscale_all_dim"):
        if rope.get(field):
            raise ModelFileError(path, f"yarn's {field} is set, which is unknown here")
    if rope.get("truncate", True) is not True:
        raise ModelFileError(path, "yarn without truncate is unknown here")
    factor = float(rope["factor"])
    return RopeScaling(
        "yarn",
        factor,
        low_frequency=float(rope.get("beta_slow") or 1.0),
        high_frequency=float(rope.get("beta_fast") or 32.0),
        original_context=int(rope["original_max_position_embeddings"]),
        attention_factor=float(rope.get("attention_factor") or 1 + 0.1 * math.log(max(1.0, factor))),
    )
