"""A model from a GGUF file, under canonical names."""

from __future__ import annotations

import re
import warnings
from collections.abc import Set
from pathlib import Path

import torch

from meshlm.kernels.quantize import GroupQuantized
from meshlm.worker.loading.checkpoint import Checkpoint
from meshlm.worker.loading.gguf_blocks import group_quantized
from meshlm.worker.loading.gguf_config import read_config
from meshlm.worker.loading.gguf_file import GgufFile
from meshlm.worker.loading.sources import Source, Sources, cut_gate_up, cut_qkv, expert_name, unstack
from meshlm.worker.models.config import ModelConfig

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "block_sparse_moe.gate",
}
_GEMMA3 = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_EXPERT = {"ffn_gate": "w1", "ffn_down": "w2", "ffn_up": "w3"}  # and with "_exps" where they are stacked


def open_gguf(path: Path) -> Checkpoint:
    """Raises ModelFileError: unreadable file, unknown architecture, or metadata missing."""
    file = GgufFile(path)
    config = read_config(file)
    reader = _Reader(file, config, canonical_sources(file.tensors.keys(), config))
    return Checkpoint(path, config, reader.sources.keys(), reader.read, reader.read_quantized)


def canonical_sources(stored: Set[str], config: ModelConfig) -> Sources:
    """Where to find what models hold. Other tensors of the file, such as `rope_freqs`, are left out."""
    found: dict[str, Source] = {}
    for name in stored:
        found |= _sources_in(name, config)
    return found


def _sources_in(stored: str, config: ModelConfig) -> dict[str, Source]:
    """`blk.3.attn_q.weight` is `model.layers.3.self_attn.q_proj.weight`; a fused or stacked tensor is several."""
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+?)(?:\.(\d+))?\.(weight|bias)", stored)
    if layer is None:
        part, _, kind = stored.partition(".")
        return {f"{_TOP[part]}.{kind}": Source(stored)} if part in _TOP and kind else {}
    index, part, expert, kind = layer.groups()
    prefix = f"model.layers.{index}"
    if expert is not None:  # as llama.cpp stored Mixtral's experts at first
        return {expert_name(prefix, int(expert), _EXPERT[part]): Source(stored)} if part in _EXPERT else {}
    if part.removesuffix("_exps") in _EXPERT and part.endswith("_exps"):
        return unstack(stored, prefix, _EXPERT[part.removesuffix("_exps")], config)
    if part == "attn_qkv":
        return cut_qkv(stored, prefix, kind, config)
    if part == "ffn_up" and config.architecture == "phi3":
        return cut_gate_up(stored, prefix, kind, config)
    names = _LAYER | (_GEMMA3 if config.architecture == "gemma3" else {})
    return {f"{prefix}.{names[part]}.{kind}": Source(stored)} if part in names else {}


class _Reader:
    def __init__(self, file: GgufFile, config: ModelConfig, sources: Sources) -> None:
        self._file = file
        self._config = config
        # Files of the architecture "llama" store q and k for interleaved rotary pairs, the others for split halves.
        self._permuted = file.metadata["general.architecture"] == "llama"
        self.sources = sources

    def read(self, name: str) -> torch.Tensor:
        source = self.sources[name]
        shape = self._file.info(source.stored).shape
        with warnings.catch_warnings():  # the array may be a read-only view of the file; it is copied before any write
            warnings.filterwarnings("ignore", message=".*not writable.*")
            if len(shape) == 1:
                tensor = torch.from_numpy(self._file.read(source.stored))
                tensor = tensor if source.rows is None else tensor[slice(*source.rows)]
            else:
                tensor = torch.from_numpy(self._file.read_rows(source.stored, *_flat_rows(source, shape)))
        heads = self._permuted_heads(name)
        return tensor if heads is None else unpermute(tensor, heads)

    def read_quantized(self, name: str) -> GroupQuantized | None:
        source = self.sources[name]
        shape = self._file.info(source.stored).shape
        raw, kind = self._file.raw_rows(source.stored, *_flat_rows(source, shape))
        found = group_quantized(raw, kind) if len(shape) > 1 else None
        heads = self._permuted_heads(name)
        if found is None or heads is None:
            return found
        minimums = None if found.minimums is None else unpermute(found.minimums, heads)
        return GroupQuantized(found.bits, unpermute(found.codes, heads), unpermute(found.scales, heads), minimums)

    def _permuted_heads(self, name: str) -> int | None:
        if self._permuted and ".q_proj." in name:
            return self._config.heads
        return self._config.kv_heads if self._permuted and ".k_proj." in name else None


def _flat_rows(source: Source, shape: tuple[int, ...]) -> tuple[int, int]:
    """The source's rows, counted through a stack of matrices."""
    each = shape[-2] if len(shape) > 1 else 1
    start, stop = source.rows or (0, each)
    skipped = (source.member or 0) * each
    return skipped + start, skipped + stop


def unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's row order for interleaved rotary pairs.

    weight: (heads * head_dim, ...), a weight, its codes or scales, or a bias.
    """
    half = weight.shape[0] // heads // 2
    return weight.view(heads, half, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
