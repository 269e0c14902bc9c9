"""Both formats give the same model, and name what is wrong with a file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from meshlm.worker.loading.checkpoint import open_checkpoint
from meshlm.worker.loading.errors import ModelFileError
from meshlm.worker.loading.gguf import hugging_face_name
from meshlm.worker.loading.revision import model_revision
from meshlm.worker.loading.rotated import rotated
from meshlm.worker.models.config import ModelConfig
from meshlm.worker.models.layers import Placement
from meshlm.worker.models.registry import load_model
from tests.worker.loading.gguf_samples import LLAMA, llama_tensors, write_gguf

transformers = pytest.importorskip("transformers")
FP32 = Placement(torch.device("cpu"), torch.float32, int8=False)


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


@pytest.mark.oracle
def test_gguf_and_folder_of_one_model_hold_the_same_tensors_and_config(tmp_path: Path, model: Any) -> None:
    model.save_pretrained(tmp_path / "folder")
    ours = open_checkpoint(write_gguf(tmp_path / "m.gguf", llama_tensors(model)))
    theirs = open_checkpoint(tmp_path / "folder")
    assert ours.config.norm_eps == pytest.approx(theirs.config.norm_eps)
    different = {f for f in ModelConfig.__dataclass_fields__ if getattr(ours.config, f) != getattr(theirs.config, f)}
    assert different <= {"norm_eps"}  # float32 in GGUF
    assert ours.names == theirs.names == set(model.state_dict())
    for name, expected in model.state_dict().items():
        assert torch.equal(ours.read(name), expected), name
        assert torch.equal(theirs.read(name), expected), name


def test_a_rotated_checkpoint_is_another_basis_of_the_same_function(tmp_path: Path, model: Any) -> None:
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", llama_tensors(model)))
    turned = rotated(checkpoint)
    before = checkpoint.read("model.layers.0.mlp.gate_proj.weight")
    after = turned.read("model.layers.0.mlp.gate_proj.weight")
    assert not torch.allclose(before, after, atol=1e-3)
    norm = checkpoint.read("model.layers.0.post_attention_layernorm.weight")
    torch.testing.assert_close(after @ after.T, (before * norm) @ (before * norm).T, atol=1e-5, rtol=1e-4)
    embedding, head = turned.read("model.embed_tokens.weight"), turned.read("lm_head.weight")
    plain = checkpoint.read("model.embed_tokens.weight") @ checkpoint.read("lm_head.weight").T
    torch.testing.assert_close(
        embedding @ head.T, plain * checkpoint.read("model.norm.weight")[0], atol=1e-5, rtol=1e-3
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("blk.12.attn_q.bias", "model.layers.12.self_attn.q_proj.bias"),
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("rope_freqs.weight", None),
        ("blk.0.attn_rot_embd", None),
    ],
)
def test_gguf_names(name: str, expected: str | None) -> None:
    assert hugging_face_name(name) == expected


def test_an_unknown_architecture_is_named(tmp_path: Path, model: Any) -> None:
    path = write_gguf(tmp_path / "m.gguf", llama_tensors(model), architecture="mamba")
    with pytest.raises(ModelFileError, match=r"m\.gguf: the architecture 'mamba' is unknown; known: \['llama'\]"):
        open_checkpoint(path)
    model.save_pretrained(tmp_path / "folder")
    config = json.loads((tmp_path / "folder/config.json").read_text())
    (tmp_path / "folder/config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    with pytest.raises(ModelFileError, match=r"config\.json: the architecture 'mamba' is unknown"):
        open_checkpoint(tmp_path / "folder")


def test_a_missing_tensor_is_named(tmp_path: Path, model: Any) -> None:
    tensors = llama_tensors(model)
    del tensors["blk.1.ffn_up.weight"]
    with pytest.raises(ModelFileError, match=r"the tensor model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        load_model(open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors)), FP32, lambda done, total: None)


def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(tmp_path: Path, model: Any) -> None:
    tensors = llama_tensors(model) | {"blk.0.attn_v.weight": np.zeros((16, 64), np.float32)}
    with pytest.raises(ModelFileError, match=r"v_proj\.weight has the shape \(16, 64\).*\(32, 64\)"):
        load_model(open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors)), FP32, lambda done, total: None)


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
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "the rope scaling 'yarn' is unknown"),
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
