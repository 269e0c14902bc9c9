"""Tiny random models, written by transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of a busy machine wait for each other longer than these tiny products take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_model(config: Any) -> Any:
    """A transformers model of that config, with weights far enough from each other and from what they start as."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    middle = 0.0 if config.model_type == "gemma3_text" else 1.0  # Gemma's norms multiply by 1 + w
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # norms and biases start as ones and zeros: too easy
            parameter.normal_(middle if "norm" in name else 0.0, 0.3 if parameter.dim() == 1 else 0.15)
    return model


@pytest.fixture
def tiny_llama(tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """Makes a folder and transformers' model of it; `save` goes to save_pretrained, the rest changes the config."""

    def make(save: dict[str, Any] | None = None, **changes: Any) -> tuple[Path, Any]:
        model = random_model(transformers.LlamaConfig(**(TINY | changes)))
        folder = tmp_path / "model"
        model.save_pretrained(folder, **(save or {}))
        return folder, model

    return make
