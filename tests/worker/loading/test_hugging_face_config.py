"""config.json with anything in it: read, or refused in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from meshlm.worker.loading.errors import ModelFileError
from meshlm.worker.loading.hugging_face_config import read_config

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "rope_theta": 10_000.0,
}
LONGROPE = {"type": "su", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
CONFIGS: list[dict[str, Any]] = [
    LLAMA | {"head_dim": 16, "tie_word_embeddings": True, "rope_scaling": {"type": "linear", "factor": 2.0}},
    LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 32},
    LLAMA | {"model_type": "phi3", "original_max_position_embeddings": 64, "rope_scaling": LONGROPE},
    LLAMA | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    LLAMA
    | {
        "model_type": "gemma3_text",
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 32,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}, "sliding_attention": {}},
    },
]
WRONG: list[Any] = [None, "x", "", -1, 0, 3, 1e300, float("inf"), float("nan"), True, [], [1], {}, {"a": 1}]


def write(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config["model_type"])
def test_any_field_may_hold_anything_and_only_a_model_file_error_comes_out(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    read_config(write(tmp_path, config))
    refused = 0
    for field in config:
        for value in WRONG:
            try:
                read_config(write(tmp_path, config | {field: value}))
            except ModelFileError as error:
                refused += 1
                assert "config.json: " in str(error)
    assert refused > 3 * len(config)


def test_published_gemma3_configs_may_be_silent_about_most_fields(tmp_path: Path) -> None:
    """As that of the 4B model with eyes is: numbers from its model card and transformers' documentation."""
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    config = read_config(write(tmp_path, {"model_type": "gemma3", "text_config": text, "vision_config": {}}))
    assert (config.heads, config.kv_heads, config.head_dim) == (8, 4, 256)
    assert (config.vocab_size, config.max_context, config.tied_head) == (262_208, 131_072, True)
    assert (config.rope_theta, config.local_rope_theta) == (1_000_000.0, 10_000.0)
    assert config.rope_scaling is not None
    assert config.rope_scaling.factor == 8.0
    assert config.windows[:7] == (1024, 1024, 1024, 1024, 1024, None, 1024)


def test_yarn_serves_the_stretched_context(tmp_path: Path) -> None:
    """Qwen2.5's model card: rope_scaling is added, and max_position_embeddings stays 32,768."""
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}
    change = {"model_type": "qwen2", "max_position_embeddings": 32_768, "rope_scaling": yarn}
    assert read_config(write(tmp_path, LLAMA | change)).max_context == 131_072
