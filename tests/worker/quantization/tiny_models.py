"""Small checkpoints made of random numbers, in memory."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from meshlm.worker.loading.checkpoint import Checkpoint
from meshlm.worker.models.config import ModelConfig
from meshlm.worker.text.vocabulary import byte_alphabet

CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=257,  # a token a byte, and one control token
    hidden_size=64,
    intermediate_size=128,
    layers=4,
    heads=4,
    kv_heads=2,
    head_dim=16,
    norm_eps=1e-5,
    rope_theta=10000.0,
    max_context=128,
    tied_head=True,
)


def tiny_checkpoint(seed: int = 0) -> Checkpoint:
    """Weights large enough that attention and MLPs matter to what comes out."""
    generator = torch.Generator().manual_seed(seed)
    c = CONFIG
    shapes = {"model.embed_tokens.weight": (c.vocab_size, c.hidden_size)}
    for layer in range(c.layers):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.self_attn.q_proj.weight": (c.query_size, c.hidden_size),
            f"{prefix}.self_attn.k_proj.weight": (c.kv_size, c.hidden_size),
            f"{prefix}.self_attn.v_proj.weight": (c.kv_size, c.hidden_size),
            f"{prefix}.self_attn.o_proj.weight": (c.hidden_size, c.query_size),
            f"{prefix}.mlp.gate_proj.weight": (c.intermediate_size, c.hidden_size),
            f"{prefix}.mlp.up_proj.weight": (c.intermediate_size, c.hidden_size),
            f"{prefix}.mlp.down_proj.weight": (c.hidden_size, c.intermediate_size),
        }
    tensors = {name: torch.randn(shape, generator=generator) * shape[1] ** -0.5 for name, shape in shapes.items()}
    for layer in range(c.layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = torch.rand(c.hidden_size, generator=generator) + 0.5
    tensors["model.norm.weight"] = torch.rand(c.hidden_size, generator=generator) + 0.5
    return Checkpoint(Path("tiny"), CONFIG, tensors.keys(), tensors.__getitem__)


def texts(count: int = 2, length: int = 40) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    return [torch.randint(0, CONFIG.vocab_size, (length,), generator=generator) for _ in range(count)]


def write_folder(folder: Path) -> Path:
    """The checkpoint as a Hugging Face folder, with a tokenizer of bytes."""
    folder.mkdir()
    checkpoint, c = tiny_checkpoint(), CONFIG
    save_file({name: checkpoint.read(name).contiguous() for name in checkpoint.names}, folder / "model.safetensors")
    config = {
        "model_type": c.architecture,
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": c.tied_head,
    }
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(models.BPE(vocab=dict(byte_alphabet().items()), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
