"""A model from a Hugging Face folder: config.json and safetensors, in one file or sharded with an index."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from meshlm.worker.loading.checkpoint import Checkpoint
from meshlm.worker.loading.errors import ModelFileError
from meshlm.worker.loading.json_file import read_json
from meshlm.worker.models.config import ModelConfig, RopeScaling

ARCHITECTURES = frozenset({"llama"})

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
_READABLE = frozenset({torch.float32, torch.float16, torch.bfloat16})


def open_folder(folder: Path) -> Checkpoint:
    """Raises ModelFileError: a file missing or damaged, or an unknown architecture."""
    config = read_config(folder)
    owner = _tensor_files(folder)

    def read(name: str) -> torch.Tensor:
        path = folder / owner[name]
        try:
            with safe_open(path, framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelFileError(path, f"{name} cannot be read: {error}") from None
        if tensor.dtype not in _READABLE:
            raise ModelFileError(path, f"{name} has the type {tensor.dtype}, which cannot be read")
        return tensor.float() if tensor.dtype == torch.float16 else tensor

    return Checkpoint(folder, config, owner.keys(), read)


def _tensor_files(folder: Path) -> dict[str, str]:
    """Tensor name to file name."""
    if (folder / INDEX).exists():
        mapping = read_json(folder / INDEX).get("weight_map")
        if not isinstance(mapping, dict):
            raise ModelFileError(folder / INDEX, "no weight_map in it")
        for name in sorted(set(mapping.values())):
            if Path(name).name != name:  # an index must not lead out of its folder
                raise ModelFileError(folder / INDEX, f"{name!r} is not a plain file name")
            _tensor_names(folder / name)
        return mapping
    return dict.fromkeys(_tensor_names(folder / SINGLE), SINGLE)


def _tensor_names(path: Path) -> list[str]:
    if not path.is_file():
        raise ModelFileError(path, "no such file")
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ModelFileError(path, f"damaged or truncated: {error}") from None


def read_config(folder: Path) -> ModelConfig:
    path = folder / CONFIG
    raw = read_json(path)
    architecture = raw.get("model_type")
    if architecture not in ARCHITECTURES:
        raise ModelFileError(path, f"the architecture {architecture!r} is unknown; known: {sorted(ARCHITECTURES)}")
    activation = raw.get("hidden_act", "silu")
    if activation != "silu":
        raise ModelFileError(path, f"the activation {activation!r} is unknown; known: silu")
    try:
        heads, hidden = int(raw["num_attention_heads"]), int(raw["hidden_size"])
        theta, scaling = _rope(path, raw)
        return ModelConfig(
            architecture=architecture,
            vocab_size=int(raw["vocab_size"]),
            hidden_size=hidden,
            intermediate_size=int(raw["intermediate_size"]),
            layers=int(raw["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=int(raw.get("head_dim") or hidden // heads),
            norm_eps=float(raw["rms_norm_eps"]),
            rope_theta=theta,
            max_context=int(raw["max_position_embeddings"]),
            tied_head=bool(raw.get("tie_word_embeddings", False)),
            rope_scaling=scaling,
            attention_bias=bool(raw.get("attention_bias", False)),
            output_bias=bool(raw.get("attention_bias", False)),
            mlp_bias=bool(raw.get("mlp_bias", False)),
        )
    except KeyError as error:
        raise ModelFileError(path, f"the field {error.args[0]} is missing") from None
    except (TypeError, ValueError) as error:
        raise ModelFileError(path, f"a field has a wrong value: {error}") from None


def _rope(path: Path, raw: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Theta and scaling: `rope_parameters` since transformers 5, `rope_theta` and `rope_scaling` before."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", float(rope["factor"]))
    if kind == "llama3":
        return theta, RopeScaling(
            "llama3",
            float(rope["factor"]),
            float(rope["low_freq_factor"]),
            float(rope["high_freq_factor"]),
            int(rope["original_max_position_embeddings"]),
        )
    raise ModelFileError(path, f"the rope scaling {kind!r} is unknown; known: default, linear, llama3")
