"""Tiny random Llamas, written by transformers, and a way to ask a runner for logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

TINY: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture
def tiny_llama(tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """Makes a folder and transformers' model of it; `save` goes to save_pretrained, the rest changes the config."""

    def make(save: dict[str, Any] | None = None, **changes: Any) -> tuple[Path, Any]:
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(TINY | changes))).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():  # norms and biases start as ones and zeros: too easy
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.3 if parameter.dim() == 1 else 0.15)
        folder = tmp_path / "model"
        model.save_pretrained(folder, **(save or {}))
        return folder, model

    return make
