"""Small GGUF files for tests, written with the `gguf` package as llama.cpp's converter would write them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize

LLAMA = {"embed": 64, "ffn": 96, "layers": 2, "heads": 4, "kv_heads": 2, "vocab": 96}

_ARCHITECTURES = {"mistral": "llama", "mixtral": "llama", "gemma3_text": "gemma3"}  # the others keep their names
_TOPS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_GEMMA3_PARTS = {
    "pre_feedforward_layernorm": "ffn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp's converter reorders q and k."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, tensors: Mapping[str, np.ndarray], architecture: str = "llama", **metadata: Any) -> Path:
    """Tensors in F32, with the metadata of LLAMA unless `metadata` (keys without the architecture) says otherwise."""
    values = {
        "context_length": 128,
        "embedding_length": LLAMA["embed"],
        "block_count": LLAMA["layers"],
        "feed_forward_length": LLAMA["ffn"],
        "attention.head_count": LLAMA["heads"],
        "attention.head_count_kv": LLAMA["kv_heads"],
        "attention.layer_norm_rms_epsilon": 1e-5,
    } | metadata
    return _write(path, tensors, architecture, values, Kind.F32)


def _write(path: Path, tensors: Mapping[str, np.ndarray], architecture: str, values: Any, kind: Kind) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in values.items():
        name = f"{architecture}.{key}"
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        else:
            writer.add_uint32(name, value)
    for name, tensor in tensors.items():
        if kind != Kind.F32 and _is_quantized(name, tensor):
            writer.add_tensor(name, quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _is_quantized(name: str, tensor: np.ndarray) -> bool:
    return tensor.ndim > 1 and "gate_inp" not in name  # llama.cpp leaves a mixture's router alone


def gguf_tensors(model: Any) -> dict[str, np.ndarray]:
    """A transformers model's weights under GGUF names and in GGUF's row order."""
    tensors: dict[str, np.ndarray] = {}
    for name, value in model.state_dict().items():
        if not (name == "lm_head.weight" and model.config.tie_word_embeddings):
            tensors |= _stored(name, value.numpy(), model.config)
    return {name: np.ascontiguousarray(array) for name, array in tensors.items()} | _rope_factors(model.config)


def _stored(name: str, array: np.ndarray, config: Any) -> dict[str, np.ndarray]:
    architecture = _ARCHITECTURES.get(config.model_type, config.model_type)
    if architecture == "gemma3" and name.endswith("norm.weight"):
        array = array + 1
    stem, _, kind = name.rpartition(".")
    if stem in _TOPS:
        return {f"{_TOPS[stem]}.{kind}": array}
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name)
    assert match is not None
    layer, part = f"blk.{match[1]}", match[2]
    if part == "mlp.experts.gate_up_proj":
        gate, up = np.split(array, 2, axis=1)
        return {f"{layer}.ffn_gate_exps.weight": gate, f"{layer}.ffn_up_exps.weight": up}
    if part == "mlp.experts.down_proj":
        return {f"{layer}.ffn_down_exps.weight": array}
    part = part.rpartition(".")[0]
    if architecture == "llama" and part in ("self_attn.q_proj", "self_attn.k_proj"):
        array = permute(array, config.num_attention_heads if "q_" in part else config.num_key_value_heads)
    names = _PARTS | (_GEMMA3_PARTS if architecture == "gemma3" else {})
    return {f"{layer}.{names[part]}.{kind}": array}


def _rope_factors(config: Any) -> dict[str, np.ndarray]:
    rope = config.rope_parameters
    if rope.get("rope_type") != "longrope":
        return {}
    kinds = ("long", "short")
    return {f"rope_factors_{kind}.weight": np.array(rope[f"{kind}_factor"], np.float32) for kind in kinds}


def gguf_metadata(config: Any) -> dict[str, Any]:
    """A transformers config in GGUF's words, keys without the architecture."""
    values: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    }
    if getattr(config, "head_dim", None):
        values["attention.key_length"] = config.head_dim
    if getattr(config, "sliding_window", None):
        values["attention.sliding_window"] = config.sliding_window
    if config.model_type == "mixtral":
        values |= {"expert_count": config.num_local_experts, "expert_used_count": config.num_experts_per_tok}
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    values["rope.freq_base"] = float(rope["rope_theta"])
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        head_dim = config.hidden_size // config.num_attention_heads
        values["rope.dimension_count"] = int(rope["partial_rotary_factor"] * head_dim)
    return values | _scaling(rope, config)


def _scaling(rope: Mapping[str, Any], config: Any) -> dict[str, Any]:
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return {}
    if kind == "longrope":
        original = rope["original_max_position_embeddings"]
        factor = np.sqrt(1 + np.log(config.max_position_embeddings / original) / np.log(original))
        return {"rope.scaling.original_context_length": original, "rope.scaling.attn_factor": float(factor)}
    values = {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        values["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    return values


def write_model(path: Path, model: Any, kind: Kind = Kind.F32) -> Path:
    """A transformers model as a GGUF file whose matrices are of type `kind`."""
    config = model.config
    architecture = _ARCHITECTURES.get(config.model_type, config.model_type)
    return _write(path, gguf_tensors(model), architecture, gguf_metadata(config), kind)


def round_weights(model: Any, kind: Kind) -> None:
    """Give a transformers model the weights that `write_model` stores for it: quantized, and dequantized again.

    Rows are quantized by themselves, so that their order does not matter.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not name.endswith("mlp.gate.weight"):
                array = parameter.numpy()
                parameter.copy_(torch.from_numpy(dequantize(quantize(array, kind), kind).reshape(array.shape)))
