"""A Llama-family model from a GGUF file, under Hugging Face names."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import torch

from meshlm.worker.loading.checkpoint import Checkpoint
from meshlm.worker.loading.errors import ModelFileError
from meshlm.worker.loading.gguf_file import GgufFile
from meshlm.worker.models.config import ModelConfig, RopeScaling

ARCHITECTURES = frozenset({"llama"})

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def open_gguf(path: Path) -> Checkpoint:
    """Raises ModelFileError: unreadable file, unknown architecture, or metadata missing."""
    file = GgufFile(path)
    config = read_config(file)
    sources = {hf: name for name in file.tensors if (hf := hugging_face_name(name)) is not None}

    def read(name: str) -> torch.Tensor:
        with warnings.catch_warnings():  # the array may be a read-only view of the file; it is copied before any write
            warnings.filterwarnings("ignore", message=".*not writable.*")
            tensor = torch.from_numpy(file.read(sources[name]))
        if ".q_proj." in name:
            return unpermute(tensor, config.heads)
        if ".k_proj." in name:
            return unpermute(tensor, config.kv_heads)
        return tensor

    return Checkpoint(path, config, sources.keys(), read)


def hugging_face_name(name: str) -> str | None:
    """`blk.3.attn_q.weight` to `model.layers.3.self_attn.q_proj.weight`; None for tensors that models do not hold."""
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        layer, part, kind = match.groups()
        return f"model.layers.{layer}.{_LAYER[part]}.{kind}" if part in _LAYER else None
    part, _, kind = name.partition(".")
    return f"{_TOP[part]}.{kind}" if part in _TOP and kind else None


def unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's row order: it stores q and k for interleaved rotary pairs, Hugging Face for split halves.

    weight: (heads * head_dim, ...), a weight or a bias.
    """
    half = weight.shape[0] // heads // 2
    return weight.view(heads, half, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def read_config(file: GgufFile) -> ModelConfig:
    architecture = str(file.require("general.architecture"))
    if architecture not in ARCHITECTURES:
        raise ModelFileError(file.path, f"the architecture {architecture!r} is unknown; known: {sorted(ARCHITECTURES)}")
    meta = file.metadata

    def need(key: str) -> int:
        return int(file.require(f"{architecture}.{key}"))

    heads, hidden = need("attention.head_count"), need("embedding_length")
    head_dim = int(meta.get(f"{architecture}.attention.key_length", hidden // heads))
    rotated = int(meta.get(f"{architecture}.rope.dimension_count", head_dim))
    if rotated != head_dim:
        raise ModelFileError(file.path, f"rotary embedding of {rotated} of a head's {head_dim} elements is unknown")
    if "token_embd.weight" not in file.tensors:
        raise ModelFileError(file.path, "the tensor token_embd.weight is missing")
    return ModelConfig(
        architecture=architecture,
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        hidden_size=hidden,
        intermediate_size=need("feed_forward_length"),
        layers=need("block_count"),
        heads=heads,
        kv_heads=int(meta.get(f"{architecture}.attention.head_count_kv", heads)),
        head_dim=head_dim,
        norm_eps=float(file.require(f"{architecture}.attention.layer_norm_rms_epsilon")),
        rope_theta=float(meta.get(f"{architecture}.rope.freq_base", 10000.0)),
        max_context=need("context_length"),
        tied_head="output.weight" not in file.tensors,
        rope_scaling=_rope_scaling(file, architecture),
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        output_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_down.bias" in file.tensors,
    )


def _rope_scaling(file: GgufFile, architecture: str) -> RopeScaling | None:
    kind = file.metadata.get(f"{architecture}.rope.scaling.type", "none")
    if "rope_freqs.weight" in file.tensors:
        return RopeScaling("divisors", divisors=tuple(file.read("rope_freqs.weight").tolist()))
    if kind == "none":
        return None
    if kind == "linear":
        return RopeScaling("linear", float(file.require(f"{architecture}.rope.scaling.factor")))
    raise ModelFileError(file.path, f"the rope scaling {kind!r} is unknown")
