"""Every architecture against transformers' on the same tiny random weights, read back from both kinds of files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from meshlm.kernels.quantize import dequantize
from meshlm.worker.loading.opening import open_checkpoint
from tests.worker.loading.gguf_samples import round_weights, write_model
from tests.worker.models.conftest import random_model
from tests.worker.models.decoding import chunk, decoder_for, empty_cache, our_logits, their_logits

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle

WINDOW = 40  # well below the 150 tokens of the texts
SHAPE: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.5, 2.0, 3.0, 4.0, 5.0, 6.0],
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
GEMMA_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": WINDOW}),
    "mistral without a window": ("MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2 with yarn": ("Qwen2Config", {"rope_parameters": YARN}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "num_hidden_layers": 7,
            "head_dim": 32,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 32,
            "rope_parameters": GEMMA_ROPES,
            "tie_word_embeddings": True,
        },
    ),
    "phi3": ("Phi3Config", {"sliding_window": WINDOW}),
    "phi3 with longrope": ("Phi3Config", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral with a window": ("MixtralConfig", {"num_local_experts": 3, "sliding_window": WINDOW}),
}
FOLDERS_ONLY: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2 with windows in some layers": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3 with biases": ("Qwen3Config", {"head_dim": 16, "attention_bias": True}),
    "gemma3 with a scale of its own": (
        "Gemma3TextConfig",
        {"head_dim": 32, "query_pre_attn_scalar": 20, "sliding_window": WINDOW, "sliding_window_pattern": 2},
    ),
}
TOKENS = torch.randint(3, 160, (150,), generator=torch.Generator().manual_seed(1)).tolist()
PROMPT = 130


def make(name: str) -> Any:
    kind, changes = (MODELS | FOLDERS_ONLY)[name]
    return random_model(getattr(transformers, kind)(**(SHAPE | changes)))


def assert_same_logits(path: Path, model: Any) -> None:
    ours, theirs = our_logits(decoder_for(path), TOKENS, PROMPT), their_logits(model, TOKENS)
    assert float(theirs.std()) > 0.05  # a model that says the same everywhere would prove nothing
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [*MODELS, *FOLDERS_ONLY])
def test_logits_from_a_folder_equal_transformers(tmp_path: Path, name: str) -> None:
    model = make(name)
    model.save_pretrained(tmp_path)
    assert_same_logits(tmp_path, model)


@pytest.mark.parametrize("name", MODELS)
def test_logits_from_a_gguf_file_equal_transformers(tmp_path: Path, name: str) -> None:
    model = make(name)
    assert_same_logits(write_model(tmp_path / "m.gguf", model), model)


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q5_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3", "phi3", "mixtral"])
def test_logits_from_a_quantized_gguf_file_equal_transformers(tmp_path: Path, name: str, kind: Kind) -> None:
    model = make(name)
    path = write_model(tmp_path / "m.gguf", model, kind)
    round_weights(model, kind)
    assert_same_logits(path, model)


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q8_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", ["llama", "phi3", "mixtral"])
def test_codes_taken_from_a_file_are_the_weights_that_are_read_from_it(tmp_path: Path, name: str, kind: Kind) -> None:
    """Permuted rows, cut rows and members of stacks too."""
    checkpoint = open_checkpoint(write_model(tmp_path / "m.gguf", make(name), kind))
    matrices = [name for name in checkpoint.names if "norm" not in name and "block_sparse_moe.gate" not in name]
    assert len(matrices) > 10
    for matrix in matrices:
        read, taken = checkpoint.read(matrix), checkpoint.read_quantized(matrix)
        assert taken is not None, matrix
        assert torch.equal(dequantize(taken), read), matrix


def test_a_sharded_folder_of_any_architecture_is_read(tmp_path: Path) -> None:
    for name in ("gemma3", "mixtral"):
        model = make(name)
        model.save_pretrained(tmp_path / name, max_shard_size="100KB")
        assert len(list((tmp_path / name).glob("*.safetensors"))) > 1
        assert_same_logits(tmp_path / name, model)


def test_the_language_model_of_a_gemma3_with_eyes_is_read(tmp_path: Path) -> None:
    text = SHAPE | MODELS["gemma3"][1] | {"num_hidden_layers": 2}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    torch.manual_seed(0)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.15)
    model.save_pretrained(tmp_path)
    assert_same_logits(tmp_path, model)


def test_stacked_experts_of_a_folder_are_cut(tmp_path: Path) -> None:
    """As transformers 5 holds them in memory, should a folder hold them so."""
    from safetensors.torch import save_file

    model = make("mixtral")
    model.config.save_pretrained(tmp_path)
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    assert_same_logits(tmp_path, model)


def test_experts_stored_one_by_one_in_a_gguf_file_are_read(tmp_path: Path) -> None:
    """As llama.cpp stored Mixtral before April 2024."""
    from tests.worker.loading.gguf_samples import gguf_metadata, gguf_tensors, write_gguf

    model = make("mixtral")
    tensors = gguf_tensors(model)
    for name in [name for name in tensors if "_exps" in name]:
        for index, matrix in enumerate(tensors.pop(name)):
            tensors[name.replace("_exps", f".{index}")] = matrix
    assert_same_logits(write_gguf(tmp_path / "m.gguf", tensors, **gguf_metadata(model.config)), model)


def test_longrope_takes_the_short_factors_for_a_short_context(tmp_path: Path) -> None:
    model = make("phi3 with longrope")
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    short = replace(checkpoint, config=replace(checkpoint.config, max_context=64))
    tokens = TOKENS[:60]  # transformers takes the short ones up to `original_max_position_embeddings`, 64
    ours, theirs = our_logits(decoder_for(short), tokens, 40), their_logits(model, tokens)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [*MODELS, *FOLDERS_ONLY])
def test_parameters_are_counted_as_transformers_counts_them(tmp_path: Path, name: str) -> None:
    model = make(name)
    model.save_pretrained(tmp_path)
    decoder = decoder_for(tmp_path)
    assert decoder.config.parameters == model.num_parameters()
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.dim() > 1 and not n.endswith("mlp.gate.weight"))
    biases = sum(p.numel() for n, p in model.named_parameters() if n.endswith("bias"))
    assert decoder.weight_bytes == 4 * (matrices + biases)


def test_hidden_states_are_what_transformers_gives_to_its_head(tmp_path: Path) -> None:
    model = make("gemma3")
    model.save_pretrained(tmp_path)
    decoder = decoder_for(tmp_path)
    with torch.no_grad():
        theirs = model.model(torch.tensor([TOKENS])).last_hidden_state[0]
    residual = decoder.residual(chunk(decoder, TOKENS, 0, len(TOKENS), decode=False), empty_cache(decoder))
    ours = decoder.normed(residual)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["qwen2", "gemma3", "mixtral"])
def test_bfloat16_stays_close_to_float32(tmp_path: Path, name: str) -> None:
    model = make(name)
    model.save_pretrained(tmp_path)
    ours = our_logits(decoder_for(tmp_path, torch.bfloat16), TOKENS, PROMPT, torch.bfloat16)
    theirs = their_logits(model, TOKENS)
    # The median row: a mixture's router may choose another expert where two are nearly equal.
    error = ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).median()
    assert float(error) < 0.05
