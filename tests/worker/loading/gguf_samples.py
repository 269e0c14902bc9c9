"""Small GGUF files for tests, written with the `gguf` package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

LLAMA = {"embed": 64, "ffn": 96, "layers": 2, "heads": 4, "kv_heads": 2, "vocab": 96}


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp's converter reorders q and k."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, tensors: Mapping[str, np.ndarray], architecture: str = "llama", **metadata: Any) -> Path:
    """Tensors in F32, with the metadata of LLAMA unless `metadata` (keys without the architecture) says otherwise."""
    writer = gguf.GGUFWriter(path, architecture)
    values = {
        "context_length": 128,
        "embedding_length": LLAMA["embed"],
        "block_count": LLAMA["layers"],
        "feed_forward_length": LLAMA["ffn"],
        "attention.head_count": LLAMA["heads"],
        "attention.head_count_kv": LLAMA["kv_heads"],
    } | metadata
    for key, value in values.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama_tensors(model: Any) -> dict[str, np.ndarray]:
    """A transformers Llama's weights under GGUF names and in GGUF's row order."""
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    tops = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    tensors: dict[str, np.ndarray] = {}
    for name, value in model.state_dict().items():
        array, stem = value.numpy(), name.removesuffix(".weight")
        if stem in tops:
            tensors[f"{tops[stem]}.weight"] = array
            continue
        _, _, layer, part = stem.split(".", 3)
        if part == "self_attn.q_proj":
            array = permute(array, LLAMA["heads"])
        if part == "self_attn.k_proj":
            array = permute(array, LLAMA["kv_heads"])
        tensors[f"blk.{layer}.{parts[part]}.weight"] = np.ascontiguousarray(array)
    return tensors
