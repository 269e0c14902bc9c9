"""Both formats give the same model, and name what is wrong with a file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meshlm.worker.loading.errors import ModelFileError
from meshlm.worker.loading.gguf import canonical_sources
from meshlm.worker.loading.opening import open_checkpoint
from meshlm.worker.loading.revision import model_revision
from meshlm.worker.models.config import ModelConfig
from tests.worker.loading.gguf_samples import LLAMA, gguf_tensors, write_gguf
from tests.worker.models.decoding import decoder_for

transformers = pytest.importorskip("transformers")


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=LLAMA["vocab"],
        hidden_size=LLAMA["embed"],
        intermediate_size=LLAMA["ffn"],
        num_hidden_layers=LLAMA["layers"],
        num_attention_heads=LLAMA["heads"],
        num_key_value_heads=LLAMA["kv_heads"],
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config).eval()


HEADER = 1400  # bytes of metadata and tensor infos in `small_gguf`, about


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    random = np.random.default_rng(0)
    sizes = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "ffn_gate_exps": (2, 96, 64)}
    tensors = {f"blk.0.{part}.weight": random.standard_normal(size, np.float32) for part, size in sizes.items()}
    tensors |= {"token_embd.weight": random.standard_normal((96, 64), np.float32)}
    metadata = {"block_count": 1, "expert_count": 2, "expert_used_count": 1, "attention.sliding_window": 8}
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    return write_gguf(path, tensors, **metadata).read_bytes()


@pytest.mark.oracle
def test_gguf_and_folder_of_one_model_hold_the_same_tensors_and_config(tmp_path: Path, model: Any) -> None:
    model.save_pretrained(tmp_path / "folder")
    ours = open_checkpoint(write_gguf(tmp_path / "m.gguf", gguf_tensors(model)))
    theirs = open_checkpoint(tmp_path / "folder")
    assert ours.config.norm_eps == pytest.approx(theirs.config.norm_eps)
    different = {f for f in ModelConfig.__dataclass_fields__ if getattr(ours.config, f) != getattr(theirs.config, f)}
    assert different <= {"norm_eps"}  # float32 in GGUF
    assert ours.names == theirs.names == set(model.state_dict())
    for name, expected in model.state_dict().items():
        assert torch.equal(ours.read(name), expected), name
        assert torch.equal(theirs.read(name), expected), name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("blk.12.attn_q.bias", {"model.layers.12.self_attn.q_proj.bias"}),
        ("token_embd.weight", {"model.embed_tokens.weight"}),
        ("rope_freqs.weight", set()),
        ("blk.0.attn_rot_embd", set()),
        ("blk.0.unheard_of.weight", set()),
        ("blk.1.attn_qkv.weight", {f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkv"}),
    ],
)
def test_gguf_names(tmp_path: Path, model: Any, name: str, expected: set[str]) -> None:
    config = open_checkpoint(write_gguf(tmp_path / "m.gguf", gguf_tensors(model))).config
    assert canonical_sources({name}, config).keys() == expected


def test_an_unknown_architecture_is_named(tmp_path: Path, model: Any) -> None:
    path = write_gguf(tmp_path / "m.gguf", gguf_tensors(model), architecture="mamba")
    with pytest.raises(ModelFileError, match=r"m\.gguf: the architecture 'mamba' is unknown; known: .*'llama'"):
        open_checkpoint(path)
    model.save_pretrained(tmp_path / "folder")
    config = json.loads((tmp_path / "folder/config.json").read_text())
    (tmp_path / "folder/config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    with pytest.raises(ModelFileError, match=r"config\.json: the architecture 'mamba' is unknown"):
        open_checkpoint(tmp_path / "folder")


def test_a_missing_tensor_is_named(tmp_path: Path, model: Any) -> None:
    tensors = gguf_tensors(model)
    del tensors["blk.1.ffn_up.weight"]
    with pytest.raises(ModelFileError, match=r"the tensor model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        decoder_for(write_gguf(tmp_path / "m.gguf", tensors))


def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(tmp_path: Path, model: Any) -> None:
    tensors = gguf_tensors(model) | {"blk.0.attn_v.weight": np.zeros((16, 64), np.float32)}
    with pytest.raises(ModelFileError, match=r"v_proj\.weight has the shape \(16, 64\).*\(32, 64\)"):
        decoder_for(write_gguf(tmp_path / "m.gguf", tensors))


def test_a_folder_with_a_truncated_or_missing_shard_is_refused(tmp_path: Path, model: Any) -> None:
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    shard = max(tmp_path.glob("*.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(ModelFileError, match=f"{shard.name}: damaged or truncated"):
        open_checkpoint(tmp_path)
    shard.unlink()
    with pytest.raises(ModelFileError, match=f"{shard.name}: no such file"):
        open_checkpoint(tmp_path)


def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path, model: Any) -> None:
    model.save_pretrained(tmp_path)
    index = {"weight_map": {"model.norm.weight": "../other/model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelFileError, match="not a plain file name"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hidden_size": None}, "a field has a wrong value"),
        ({"hidden_act": "gelu"}, "the activation 'gelu' is unknown"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "the rope scaling 'dynamic' is unknown"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "original_max_position_embeddings is missing"),
        ({"rope_parameters": {"rope_type": "longrope", "long_factor": [1], "short_factor": 3}}, "a field"),
        (
            {"rope_parameters": {"rope_type": "longrope", "long_factor": [1], "short_factor": [1]}},
            "1 rope factors for 8",
        ),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is set"),
        ({"model_type": "gemma2"}, "the architecture 'gemma2' is unknown; known: .*'gemma3'"),
        ({"model_type": "gemma3", "hidden_act": None, "attn_logit_softcapping": 50.0}, "attn_logit_softcapping is set"),
        ({"model_type": "mistral", "sliding_window": 0}, "a sliding window below 1"),
        ({"model_type": "mistral", "sliding_window": 8, "layer_types": ["chunked"]}, "the layer type 'chunked'"),
        ({"num_key_value_heads": 3}, "4 heads cannot share 3"),
        ({"num_attention_heads": 0}, "it asks for a size below 1"),
    ],
)
def test_a_config_that_cannot_be_met_is_refused(
    tmp_path: Path, model: Any, change: dict[str, Any], reason: str
) -> None:
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelFileError, match=reason):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"attention.head_count": 0}, r"llama\.attention\.head_count is 0, not a positive integer"),
        ({"attention.head_count_kv": 3}, "4 heads cannot share 3 key heads"),
        ({"block_count": 1000}, "block_count is 1000, not possible with"),
        ({"rope.dimension_count": 5}, "a rotated part of 5 of a head's 16"),
        ({"attention.layer_norm_rms_epsilon": "no"}, "is 'no', not a positive number"),
        ({"rope.scaling.type": "dynamic"}, "the rope scaling 'dynamic' is unknown"),
        ({"final_logit_softcapping": 30.0}, "soft caps are unknown"),
        ({"expert_count": 2**31, "expert_used_count": 2}, "2 active of 2147483648 experts"),
        ({"expert_count": 4, "expert_used_count": 5}, "5 active of 4 experts"),
    ],
)
def test_gguf_metadata_that_cannot_be_met_is_refused(
    tmp_path: Path, model: Any, change: dict[str, Any], reason: str
) -> None:
    path = write_gguf(tmp_path / "m.gguf", gguf_tensors(model), **change)
    with pytest.raises(ModelFileError, match=reason):
        open_checkpoint(path)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_damaged_gguf_file_is_refused_in_words_or_read(
    small_gguf: bytes, tmp_path: Path, data: st.DataObject
) -> None:
    """A few bytes of the header changed: no other exception, and no endless reading."""
    damaged = bytearray(small_gguf)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(4, HEADER))
        damaged[at] = data.draw(st.sampled_from([0, 1, 2, 8, 9, 63, 127, 128, 255]))
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damaged)
    try:
        checkpoint = open_checkpoint(path)
        for name in sorted(checkpoint.names):
            checkpoint.read(name)
            checkpoint.read_quantized(name)
    except ModelFileError as error:
        assert str(path) in str(error)


def test_a_revision_changes_with_the_weights_and_not_with_the_place(tmp_path: Path, model: Any) -> None:
    for name in ("one", "two"):
        model.save_pretrained(tmp_path / name)
    first = model_revision(tmp_path / "one", tmp_path / "cache")
    assert first == model_revision(tmp_path / "two", tmp_path / "cache")
    assert first == model_revision(tmp_path / "one", tmp_path / "cache")  # from the cache
    weights = tmp_path / "two/model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    assert model_revision(tmp_path / "two", tmp_path / "cache") != first


def test_a_gguf_files_revision_is_its_sha256_and_is_cached(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert model_revision(path, tmp_path / "cache") == known
    [entry] = (tmp_path / "cache").iterdir()
    entry.write_text("f" * 64)
    assert model_revision(path, tmp_path / "cache") == "f" * 64
    with pytest.raises(ModelFileError, match="No such file"):
        model_revision(tmp_path / "absent.gguf", tmp_path / "cache")


def test_a_cache_that_cannot_be_written_or_read_does_not_stop_a_start(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"weights")
    known = hashlib.sha256(b"weights").hexdigest()
    (tmp_path / "file").write_text("no folder")
    assert model_revision(path, tmp_path / "file" / "cache") == known
    assert model_revision(path, tmp_path / "cache") == known
    [entry] = (tmp_path / "cache").iterdir()
    entry.write_bytes(b"\xff" * 64)
    assert model_revision(path, tmp_path / "cache") == known
    assert entry.read_text() == known
    entry.unlink()
    entry.mkdir()
    assert model_revision(path, tmp_path / "cache") == known
    assert list((tmp_path / "cache").iterdir()) == [entry]
